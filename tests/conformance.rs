//! The contract of `SnapshotStore`, as tests that run against every store and every wrapper.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::time::{Duration, Instant};

mod support;

use fspfs::model::{
    BLOCK_SIZE, BLOCK_SIZE_U64, Block, BlockIndex, Digest, Digester, Snapshot, SnapshotId,
    SnapshotState, Tags, VolumeSize,
};
use fspfs::serve::{self, Access, Keys};
use fspfs::store::ebs::Ebs;
use fspfs::store::repository::Repository;
use fspfs::store::synth::Synth;
use fspfs::store::wrap::{Call, Corrupt, Count, Fail};
use fspfs::store::{
    BlockToken, ChangedBlock, CompleteRequest, Error, ErrorKind, ListFrom, ListedBlock,
    MAX_PAGE_BLOCKS, PageToken, SharedStore, StartRequest, StoreOptions,
};

/// One place with snapshots, as two processes see it.
struct Place {
    store: SharedStore,
    other: SharedStore,
    _dir: tempfile::TempDir,
}

/// A repository in a directory, each view of it behind what `wrap` puts around it.
async fn repository(wrap: impl Fn(SharedStore) -> SharedStore) -> Place {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = wrap(Arc::new(Repository::create(&path).await.unwrap()));
    let other = wrap(Arc::new(Repository::open(&path).await.unwrap()));
    Place { store, other, _dir: dir }
}

/// The snapshots of a recipe, each view of them behind what `wrap` puts around it.
fn synthetic(url: &str, wrap: impl Fn(SharedStore) -> SharedStore) -> Ready<Place> {
    let synth = || wrap(Arc::new(Synth::new(url.parse().unwrap())));
    ready(Place { store: synth(), other: synth(), _dir: tempfile::tempdir().unwrap() })
}

/// A repository with three snapshots of a lineage, and one of another.
async fn filled() -> Place {
    let place = repository(|store| store).await;
    let store = &place.store;
    let old = blocks(&[(0, data(0)), (1, Block::Zero), (2, data(2)), (40_000, data(4))]);
    let mut request = StartRequest::new(gib(24));
    snapshot(store, request.clone(), &old).await;
    for n in 1..=3 {
        let new = blocks(&[(2, data(n)), (16_383 + n, data(n)), (n, Block::Zero)]);
        request.parent = Some(snapshot(store, request.clone(), &new).await.id);
    }
    place
}

/// A repository, behind the EBS direct APIs and EC2, behind their clients.
async fn over_the_network() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    Repository::create(&path).await.unwrap();
    let keys = Keys::for_once();
    let mut stores = Vec::new();
    for _ in 0..2 {
        let options = serve::Options {
            access: Access::Everybody(keys.clone()),
            pending: Duration::ZERO,
            faults: None,
            memory: serve::DEFAULT_MEMORY,
            account: serve::DEFAULT_ACCOUNT.to_owned(),
            region: serve::DEFAULT_REGION.to_owned(),
            name: "store".to_owned(),
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let repository = Arc::new(Repository::open(&path).await.unwrap());
        // It ends with the runtime of the test.
        tokio::spawn(serve::serve(listener, repository, options, std::future::pending()));
        stores.push(client(&endpoint));
    }
    let [store, other] = stores.try_into().unwrap();
    Place { store, other, _dir: dir }
}

/// Repositories in one bucket of moto.
struct Buckets {
    sandbox: support::Sandbox,
    number: usize,
}

impl Buckets {
    fn new() -> Option<Self> {
        support::service::has_buckets()
            .then(|| Self { sandbox: support::Sandbox::with_bucket(false), number: 0 })
    }

    async fn next(&mut self) -> Place {
        self.number += 1;
        let endpoint = &self.sandbox.service().url;
        let url = format!("s3://bucket/{}?endpoint={endpoint}", self.number).parse().unwrap();
        let (shared, options) = (configuration(endpoint), StoreOptions::default());
        let store = Arc::new(Repository::in_bucket(&shared, &url, &options).await.unwrap());
        let other = Arc::new(Repository::in_bucket(&shared, &url, &options).await.unwrap());
        Place { store, other, _dir: tempfile::tempdir().unwrap() }
    }
}

fn client(endpoint: &str) -> SharedStore {
    // What a test deletes is gone at once.
    let options = StoreOptions { settling: Some(Duration::ZERO), ..StoreOptions::default() };
    Arc::new(Ebs::with_config(&configuration(endpoint), &options))
}

fn configuration(endpoint: &str) -> aws_types::SdkConfig {
    aws_types::SdkConfig::builder()
        .behavior_version(aws_config::BehaviorVersion::latest())
        .region(aws_config::Region::new(serve::DEFAULT_REGION))
        .endpoint_url(endpoint)
        .credentials_provider(aws_credential_types::provider::SharedCredentialsProvider::new(
            aws_credential_types::Credentials::new("none", "none", None, None, "test"),
        ))
        .retry_config(aws_config::retry::RetryConfig::disabled())
        .http_client(aws_smithy_http_client::Builder::new().build_http())
        .build()
}

/// Has a macro take every test of the contract.
macro_rules! contract {
    ($then:ident $store:ident, $place:expr) => {
        $then!($store, $place; contract;
            a_missing_snapshot_is_not_found,
            a_started_snapshot_is_pending_and_unreadable,
            a_completed_snapshot_is_as_it_was_started,
            blocks_read_as_they_were_put,
            an_empty_snapshot_is_complete,
            a_listing_begins_anywhere_and_has_pages_of_any_size,
            puts_come_in_any_order_and_at_the_same_time,
            the_later_put_wins,
            a_child_is_its_parent_overlaid,
            a_child_may_be_smaller_or_larger,
            completion_checks_what_was_put,
            only_a_pending_snapshot_takes_blocks,
            deleting_leaves_the_others_alone,
            an_aborted_snapshot_is_gone,
            tags_are_replaced_whole,
            a_client_token_starts_once,
            a_chosen_id_is_free_or_refused,
            changed_blocks_are_those_that_read_differently,
            changed_blocks_have_pages_of_any_size,
            tokens_that_do_not_work_are_expired,
            several_processes_fill_one_snapshot,
            nobody_sees_a_part,
            a_dropped_call_leaves_the_store_usable,
            the_list_has_each_snapshot_once,
        );
    };
}

/// One test of many, where it takes long to begin.
macro_rules! in_turn {
    ($store:ident, $place:expr; $tests:ident; $($test:ident),* $(,)?) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $store() {
            let mut places = $place;
            $(
                eprintln!(stringify!($test));
                $tests::$test(&places.next().await).await;
            )*
        }
    };
}

/// Runs tests against a place that is made anew for each: with `writes` every test of the contract,
/// on a place that is empty; with `reads` those of `reading`, on one with snapshots; with
/// `reads_only` these and that nothing can be written.
macro_rules! conforms {
    ($store:ident reads, $place:expr $(; $more:ident)?) => {
        conforms!($store, $place; reading;
            $($more,)?
            each_snapshot_is_listed_once_and_as_it_is_described,
            snapshots_and_blocks_of_others_are_not_found,
            any_part_of_a_listing_is_that_part_of_the_whole,
            blocks_read_the_same_each_time,
            versions_differ_where_their_blocks_do,
            a_token_is_for_one_block,
        );
    };
    ($store:ident reads_only, $place:expr) => {
        conforms!($store reads, $place; nothing_can_be_written);
    };
    ($store:ident writes, $place:expr) => {
        contract!(conforms $store, $place);
    };
    ($store:ident, $place:expr; $tests:ident; $($test:ident),* $(,)?) => {
        mod $store {
            use super::*;
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $test() {
                    $tests::$test(&$place.await).await;
                }
            )*
        }
    };
}

conforms!(in_a_directory writes, repository(|store| store));
conforms!(behind_count writes, repository(|store| Arc::new(Count::new(store))));
conforms!(behind_fail writes, repository(|store| Arc::new(Fail::new(store))));
conforms!(behind_corrupt writes, repository(|store| Arc::new(Corrupt::new(store))));
conforms!(
    behind_all writes,
    repository(|store| Arc::new(Count::new(Arc::new(Fail::new(Arc::new(Corrupt::new(store)))))))
);
conforms!(over_the_network writes, over_the_network());
contract!(in_turn in_a_bucket, match Buckets::new() { Some(buckets) => buckets, None => return });
conforms!(filled reads, filled());
conforms!(synthetic reads_only, synthetic(SPARSE, |store| store));
conforms!(synthetic_behind_count reads_only, synthetic(SPARSE, |store| Arc::new(Count::new(store))));

/// A synthetic store of which everything can be read in a test.
const SPARSE: &str =
    "synth:?size=24GiB&density=0.0005&zeros=0.3&versions=3&changed=20&lineages=2&seed=3";

/// A token that does not work for a block: the store says so, or finds one that does.
async fn assert_useless(
    store: &SharedStore,
    id: &SnapshotId,
    index: BlockIndex,
    token: &BlockToken,
) {
    match store.get_block(id, index, token).await {
        Err(error) => assert_eq!(error.kind(), ErrorKind::ExpiredToken),
        Ok(block) => {
            let page = store.list_blocks(id, ListFrom::Index(index), 1).await.unwrap();
            assert_eq!(block, store.get_block(id, index, &page.blocks[0].token).await.unwrap());
        }
    }
}

/// A block that differs from those of other numbers.
fn data(number: u32) -> Block {
    let mut bytes = vec![0x5a; BLOCK_SIZE];
    bytes[BLOCK_SIZE - 4..].copy_from_slice(&number.to_le_bytes());
    Block::new(bytes.into())
}

fn gib(gib: u64) -> VolumeSize {
    VolumeSize::from_gib(gib).unwrap()
}

fn id(text: &str) -> SnapshotId {
    text.parse().unwrap()
}

fn tags(pairs: &[(&str, &str)]) -> Tags {
    pairs.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect()
}

type Blocks = BTreeMap<u32, Block>;

fn blocks(pairs: &[(u32, Block)]) -> Blocks {
    pairs.iter().cloned().collect()
}

#[track_caller]
fn kind<T: std::fmt::Debug>(result: Result<T, Error>) -> ErrorKind {
    let error = result.unwrap_err();
    assert!(!error.to_string().is_empty());
    error.kind()
}

/// What the caller of a completion says who put these blocks.
fn count(put: &Blocks) -> CompleteRequest {
    let mut checksum = Digester::default();
    for block in put.values() {
        checksum.update(block.digest().0);
    }
    CompleteRequest {
        changed_blocks: put.len() as u64,
        checksum: Some(checksum.finish()),
        started: None,
    }
}

async fn put(store: &SharedStore, id: &SnapshotId, put: &Blocks) {
    for (&index, block) in put {
        store.put_block(id, BlockIndex(index), block.clone()).await.unwrap();
    }
}

/// A completed snapshot.
async fn snapshot(store: &SharedStore, request: StartRequest, blocks: &Blocks) -> Snapshot {
    let id = store.start(request).await.unwrap().id;
    put(store, &id, blocks).await;
    let completed = store.complete(&id, count(blocks)).await.unwrap();
    settled(store, completed).await
}

/// Waits while a store goes on completing.
async fn settled(store: &SharedStore, mut snapshot: Snapshot) -> Snapshot {
    let end = Instant::now() + Duration::from_secs(30);
    while snapshot.state == SnapshotState::Pending && Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(10)).await;
        snapshot = store.describe(&snapshot.id).await.unwrap();
    }
    assert_eq!(snapshot.state, SnapshotState::Completed);
    snapshot
}

/// A whole listing from an index on, with every promise of its pages checked.
async fn listing(store: &SharedStore, id: &SnapshotId, from: u32, max: usize) -> Vec<ListedBlock> {
    let mut all: Vec<ListedBlock> = Vec::new();
    let mut covered = BlockIndex(from);
    let mut at = ListFrom::Index(BlockIndex(from));
    loop {
        let page = store.list_blocks(id, at, max).await.unwrap();
        assert!(page.blocks.len() <= max, "{} blocks in a page of {max}", page.blocks.len());
        let first = page.blocks.first().map_or(covered, |block| block.index);
        assert!(first >= covered, "{first} is listed, and {covered} was covered before");
        all.extend(page.blocks);
        if let Some(now) = page.covered {
            assert!(now >= covered, "{now} is covered after {covered}");
            covered = now;
        }
        match page.next {
            Some(token) => at = ListFrom::Page(token),
            None => break,
        }
    }
    assert!(all.is_sorted_by(|a, b| a.index < b.index), "the listing does not ascend");
    assert!(all.first().is_none_or(|block| block.index.0 >= from));
    all
}

/// Everything that a snapshot has, read block by block.
async fn content(store: &SharedStore, id: &SnapshotId) -> Blocks {
    let mut content = Blocks::new();
    for listed in listing(store, id, 0, MAX_PAGE_BLOCKS).await {
        let block = store.get_block(id, listed.index, &listed.token).await.unwrap();
        assert!(listed.digest.is_none_or(|digest| digest == block.digest()));
        content.insert(listed.index.0, block);
    }
    content
}

async fn listed(store: &SharedStore) -> Vec<Snapshot> {
    let mut all = Vec::new();
    let mut token = None;
    loop {
        let page = store.list(token).await.unwrap();
        all.extend(page.snapshots);
        token = page.next;
        if token.is_none() {
            return all;
        }
    }
}

async fn changes(
    store: &SharedStore,
    first: &SnapshotId,
    second: &SnapshotId,
    from: u32,
    max: usize,
) -> Result<Vec<ChangedBlock>, Error> {
    let mut all: Vec<ChangedBlock> = Vec::new();
    let mut at = ListFrom::Index(BlockIndex(from));
    loop {
        let page = store.list_changed_blocks(first, second, at, max).await?;
        assert!(page.blocks.len() <= max);
        all.extend(page.blocks);
        match page.next {
            Some(token) => at = ListFrom::Page(token),
            None => break,
        }
    }
    assert!(all.is_sorted_by(|a, b| a.index < b.index));
    Ok(all)
}

mod contract {
    use super::*;

    pub(super) async fn a_missing_snapshot_is_not_found(Place { store, .. }: &Place) {
        let none = id("snap-00000000000000000");
        let from = || ListFrom::Index(BlockIndex::ZERO);
        let token = BlockToken(bytes::Bytes::from_static(b"none"));
        assert_eq!(kind(store.describe(&none).await), ErrorKind::NotFound);
        assert_eq!(kind(store.list_blocks(&none, from(), 1).await), ErrorKind::NotFound);
        let changed = store.list_changed_blocks(&none, &none, from(), 1).await;
        assert_eq!(kind(changed), ErrorKind::NotFound);
        assert_eq!(kind(store.put_block(&none, BlockIndex(0), data(1)).await), ErrorKind::NotFound);
        assert_eq!(kind(store.complete(&none, count(&Blocks::new())).await), ErrorKind::NotFound);
        assert_eq!(kind(store.delete(&none).await), ErrorKind::NotFound);
        assert_eq!(kind(store.set_tags(&none, Tags::new()).await), ErrorKind::NotFound);
        let request = StartRequest { parent: Some(none.clone()), ..StartRequest::new(gib(1)) };
        assert_eq!(kind(store.start(request).await), ErrorKind::NotFound);
        let got = store.get_block(&none, BlockIndex(0), &token).await;
        assert!(matches!(kind(got), ErrorKind::NotFound | ErrorKind::ExpiredToken));
        assert!(listed(store).await.is_empty());
    }

    pub(super) async fn a_started_snapshot_is_pending_and_unreadable(
        Place { store, other, .. }: &Place,
    ) {
        let started = store.start(StartRequest::new(gib(1))).await.unwrap();
        let id = &started.id;
        assert_eq!(started.state, SnapshotState::Pending);
        store.put_block(id, BlockIndex(0), data(1)).await.unwrap();
        store.flush(id).await.unwrap();
        for store in [store, other] {
            assert_eq!(store.describe(id).await.unwrap().state, SnapshotState::Pending);
            assert_eq!(listed(store).await, std::slice::from_ref(&started));
            let from = || ListFrom::Index(BlockIndex::ZERO);
            assert_eq!(kind(store.list_blocks(id, from(), 9).await), ErrorKind::NotReady);
            let changed = store.list_changed_blocks(id, id, from(), 9).await;
            assert_eq!(kind(changed), ErrorKind::NotReady);
            let request = StartRequest { parent: Some(id.clone()), ..StartRequest::new(gib(1)) };
            assert_eq!(kind(store.start(request).await), ErrorKind::NotReady);
        }
    }

    pub(super) async fn a_completed_snapshot_is_as_it_was_started(
        Place { store, other, .. }: &Place,
    ) {
        let request = StartRequest {
            tags: tags(&[("Name", "web"), ("a/../\n\"ü", "")]),
            description: "ü".repeat(255),
            volume_id: Some("vol-0123456789abcdef0".to_owned()),
            ..StartRequest::new(gib(65_536))
        };
        let one = snapshot(store, request.clone(), &blocks(&[(0, data(1))])).await;
        let request = StartRequest { parent: Some(one.id.clone()), ..request };
        let two = snapshot(store, request.clone(), &Blocks::new()).await;
        let request = StartRequest { parent: Some(two.id.clone()), ..request };
        let three = snapshot(store, request.clone(), &Blocks::new()).await;
        for (snapshot, parent) in [(&one, None), (&two, Some(&one)), (&three, Some(&two))] {
            assert_eq!(snapshot.volume_size, request.volume_size);
            assert_eq!(snapshot.tags, request.tags);
            assert_eq!(snapshot.description, request.description);
            assert_eq!(snapshot.volume_id, request.volume_id);
            assert_eq!(snapshot.parent.as_ref(), parent.map(|parent| &parent.id));
            assert_eq!(snapshot.lineage, one.lineage);
            assert!(snapshot.state_message.is_none() && !snapshot.encrypted);
            assert_eq!(&store.describe(&snapshot.id).await.unwrap(), snapshot);
            assert_eq!(&other.describe(&snapshot.id).await.unwrap(), snapshot);
        }
        // What reads the same has the same digest, where the store keeps one.
        assert_eq!(one.content_digest, two.content_digest);
        let age = jiff::Timestamp::now().duration_since(one.start_time);
        assert!(age.unsigned_abs() < Duration::from_mins(10), "it was started {age} ago");
    }

    pub(super) async fn blocks_read_as_they_were_put(Place { store, other, .. }: &Place) {
        let end = gib(9).blocks().0;
        let mut text = vec![0; BLOCK_SIZE];
        text[0] = 1;
        let put = blocks(&[
            (0, data(0)),
            (1, Block::Zero),
            (3, data(3)),
            // Equal blocks, and the edges of whatever the store groups blocks by.
            (4, data(3)),
            (63, Block::new(text.into())),
            (64, data(64)),
            (16_383, data(5)),
            (16_384, data(6)),
            (end - 1, data(7)),
        ]);
        let snapshot = snapshot(store, StartRequest::new(gib(9)), &put).await;
        for store in [store, other] {
            assert_eq!(content(store, &snapshot.id).await, put);
        }
        // A store that does not tell zeros apart counts them as data.
        let data_blocks = if snapshot.zero_blocks.is_some() { 8 } else { 9 };
        assert!(snapshot.data_blocks.is_none_or(|blocks| blocks == data_blocks));
        assert!(snapshot.zero_blocks.is_none_or(|blocks| blocks == 1));
        let listed = listing(store, &snapshot.id, 0, 100).await;
        let tokens = |n: usize| &listed[n].token;
        assert_ne!(tokens(2), tokens(3), "the tokens of equal blocks tell that they are equal");
    }

    pub(super) async fn an_empty_snapshot_is_complete(Place { store, .. }: &Place) {
        let snapshot = snapshot(store, StartRequest::new(gib(3)), &Blocks::new()).await;
        assert!(content(store, &snapshot.id).await.is_empty());
    }

    pub(super) async fn a_listing_begins_anywhere_and_has_pages_of_any_size(
        Place { store, .. }: &Place,
    ) {
        let indexes = [0, 1, 2, 7, 16_383, 16_384, 16_400, 40_000, 49_151];
        let put = indexes.map(|index| (index, if index == 7 { Block::Zero } else { data(9) }));
        let id = snapshot(store, StartRequest::new(gib(24)), &blocks(&put)).await.id;
        for from in [0, 1, 3, 8, 16_383, 16_384, 16_385, 20_000, 32_768, 40_001, 49_151, 49_152] {
            for max in [1, 2, 5, MAX_PAGE_BLOCKS] {
                let listed = listing(store, &id, from, max).await;
                let listed: Vec<_> = listed.iter().map(|block| block.index.0).collect();
                let expected: Vec<_> = indexes.into_iter().filter(|&i| i >= from).collect();
                assert_eq!(listed, expected, "from {from} by {max}");
            }
        }
    }

    pub(super) async fn puts_come_in_any_order_and_at_the_same_time(Place { store, .. }: &Place) {
        let all: Blocks = (0..100u32).map(|n| (n * 37 % 2048, data(n))).collect();
        let id = store.start(StartRequest::new(gib(1))).await.unwrap().id;
        let puts = all.iter().rev().map(|(&index, block)| {
            let (store, id, block) = (Arc::clone(store), id.clone(), block.clone());
            tokio::spawn(async move { store.put_block(&id, BlockIndex(index), block).await })
        });
        for put in puts.collect::<Vec<_>>() {
            put.await.unwrap().unwrap();
        }
        let snapshot = store.complete(&id, count(&all)).await.unwrap();
        settled(store, snapshot).await;
        assert_eq!(content(store, &id).await, all);
    }

    pub(super) async fn the_later_put_wins(Place { store, .. }: &Place) {
        let id = store.start(StartRequest::new(gib(1))).await.unwrap().id;
        put(store, &id, &blocks(&[(1, data(1)), (2, data(2)), (3, Block::Zero), (4, data(4))]))
            .await;
        store.flush(&id).await.unwrap();
        put(store, &id, &blocks(&[(1, data(11)), (2, Block::Zero), (3, data(13))])).await;
        put(store, &id, &blocks(&[(1, data(21))])).await;
        let end = blocks(&[(1, data(21)), (2, Block::Zero), (3, data(13)), (4, data(4))]);
        let snapshot = store.complete(&id, count(&end)).await.unwrap();
        settled(store, snapshot).await;
        assert_eq!(content(store, &id).await, end);
    }

    pub(super) async fn a_child_is_its_parent_overlaid(Place { store, .. }: &Place) {
        let old = blocks(&[(0, data(0)), (1, data(1)), (2, Block::Zero), (17_000, data(3))]);
        let parent = snapshot(store, StartRequest::new(gib(10)), &old).await;
        let request =
            StartRequest { parent: Some(parent.id.clone()), ..StartRequest::new(gib(10)) };
        let new = blocks(&[(1, Block::Zero), (2, data(12)), (9, data(19)), (17_001, data(20))]);
        let child = snapshot(store, request.clone(), &new).await;
        let overlaid: Blocks = old.clone().into_iter().chain(new).collect();
        assert_eq!(content(store, &child.id).await, overlaid);
        assert_eq!(content(store, &parent.id).await, old);
        let request = StartRequest { parent: Some(child.id), ..request };
        let newer = blocks(&[(0, Block::Zero)]);
        let grandchild = snapshot(store, request, &newer).await;
        let overlaid: Blocks = overlaid.into_iter().chain(newer).collect();
        assert_eq!(content(store, &grandchild.id).await, overlaid);
    }

    pub(super) async fn a_child_may_be_smaller_or_larger(Place { store, .. }: &Place) {
        let old = blocks(&[(0, data(0)), (2047, data(1)), (2048, data(2)), (6000, data(3))]);
        let parent = snapshot(store, StartRequest::new(gib(3)), &old).await.id;
        let with = |size| StartRequest { parent: Some(parent.clone()), ..StartRequest::new(size) };
        match store.start(with(gib(1))).await {
            // A service may insist on volumes that do not shrink.
            Err(error) => assert_eq!(error.kind(), ErrorKind::Invalid),
            Ok(started) => {
                let beyond = store.put_block(&started.id, BlockIndex(2048), data(9)).await;
                assert_eq!(kind(beyond), ErrorKind::Invalid);
                store.complete(&started.id, count(&Blocks::new())).await.unwrap();
                let left: Blocks = old.clone().into_iter().filter(|(i, _)| *i < 2048).collect();
                assert_eq!(content(store, &started.id).await, left);
            }
        }
        let new = blocks(&[(6144, data(4))]);
        let larger = snapshot(store, with(gib(4)), &new).await.id;
        let all: Blocks = old.into_iter().chain(new).collect();
        assert_eq!(content(store, &larger).await, all);
    }

    pub(super) async fn completion_checks_what_was_put(Place { store, .. }: &Place) {
        let put = blocks(&[(5, data(5)), (6, Block::Zero)]);
        let id = store.start(StartRequest::new(gib(1))).await.unwrap().id;
        super::put(store, &id, &put).await;
        let right = count(&put);
        for changed_blocks in [0, 1, 3] {
            let wrong = store.complete(&id, CompleteRequest { changed_blocks, ..right }).await;
            assert_eq!(kind(wrong), ErrorKind::Conflict);
        }
        let wrong = CompleteRequest { checksum: Some(Digest::OF_ZEROS), ..right };
        assert_eq!(kind(store.complete(&id, wrong).await), ErrorKind::Conflict);
        assert_eq!(store.describe(&id).await.unwrap().state, SnapshotState::Pending);
        store.delete(&id).await.unwrap();
        assert_eq!(kind(store.describe(&id).await), ErrorKind::NotFound);
    }

    pub(super) async fn only_a_pending_snapshot_takes_blocks(Place { store, other, .. }: &Place) {
        let id = store.start(StartRequest::new(gib(1))).await.unwrap().id;
        for index in [2048, u32::MAX] {
            let beyond = store.put_block(&id, BlockIndex(index), data(1)).await;
            assert_eq!(kind(beyond), ErrorKind::Invalid);
        }
        let put = blocks(&[(2047, data(1))]);
        super::put(store, &id, &put).await;
        let snapshot = store.complete(&id, count(&put)).await.unwrap();
        settled(store, snapshot).await;
        for store in [store, other] {
            let late = store.put_block(&id, BlockIndex(0), data(2)).await;
            assert_eq!(kind(late), ErrorKind::Conflict);
            assert_eq!(kind(store.complete(&id, count(&put)).await), ErrorKind::Conflict);
            assert_eq!(content(store, &id).await, put);
        }
    }

    pub(super) async fn deleting_leaves_the_others_alone(Place { store, other, .. }: &Place) {
        let old = blocks(&[(0, data(0)), (1, data(1))]);
        let parent = snapshot(store, StartRequest::new(gib(1)), &old).await.id;
        let request = StartRequest { parent: Some(parent.clone()), ..StartRequest::new(gib(1)) };
        let middle = snapshot(store, request.clone(), &blocks(&[(1, data(11))])).await.id;
        let request = StartRequest { parent: Some(middle.clone()), ..request };
        let child = snapshot(store, request, &blocks(&[(2, data(2))])).await.id;
        let content_of_child = content(store, &child).await;
        store.delete(&middle).await.unwrap();
        for store in [store, other] {
            assert_eq!(kind(store.describe(&middle).await), ErrorKind::NotFound);
            assert_eq!(content(store, &child).await, content_of_child);
            assert_eq!(content(store, &parent).await, old);
        }
        assert_eq!(kind(other.delete(&middle).await), ErrorKind::NotFound);
        other.delete(&parent).await.unwrap();
        assert_eq!(content(store, &child).await, content_of_child);
        assert_eq!(listed(store).await.len(), 1);
    }

    pub(super) async fn an_aborted_snapshot_is_gone(Place { store, other, .. }: &Place) {
        let old = blocks(&[(0, data(0))]);
        let parent = snapshot(store, StartRequest::new(gib(1)), &old).await.id;
        let request = StartRequest { parent: Some(parent.clone()), ..StartRequest::new(gib(1)) };
        let id = store.start(request).await.unwrap().id;
        put(store, &id, &blocks(&[(0, data(1))])).await;
        other.delete(&id).await.unwrap();
        for store in [store, other] {
            assert_eq!(kind(store.describe(&id).await), ErrorKind::NotFound);
        }
        let late = store.complete(&id, count(&blocks(&[(0, data(1))]))).await;
        assert!(matches!(kind(late), ErrorKind::NotFound | ErrorKind::Conflict));
        assert_eq!(listed(store).await.len(), 1);
        assert_eq!(content(store, &parent).await, old);
    }

    pub(super) async fn tags_are_replaced_whole(Place { store, other, .. }: &Place) {
        let request = StartRequest { tags: tags(&[("a", "1")]), ..StartRequest::new(gib(1)) };
        let id = store.start(request).await.unwrap().id;
        let read = async |store: &SharedStore| {
            let described = store.describe(&id).await.unwrap().tags;
            let listed = listed(store).await;
            assert_eq!(listed[0].tags, described);
            described
        };
        assert_eq!(read(other).await, tags(&[("a", "1")]));
        let odd = tags(&[("b", "2"), ("../x", "\n"), (&"k".repeat(127), &"v".repeat(255))]);
        other.set_tags(&id, odd.clone()).await.unwrap();
        assert_eq!(read(store).await, odd);
        store.complete(&id, count(&Blocks::new())).await.unwrap();
        assert_eq!(read(store).await, odd, "completing keeps the tags");
        for wrong in [tags(&[("", "x")]), tags(&[("k", &"v".repeat(256))])] {
            assert_eq!(kind(store.set_tags(&id, wrong).await), ErrorKind::Invalid);
        }
        let many = (0..51).map(|n| (n.to_string(), String::new())).collect();
        assert_eq!(kind(store.set_tags(&id, many).await), ErrorKind::Invalid);
        let (one, two) = (tags(&[("who", "one")]), tags(&[("who", "two")]));
        let (a, b) =
            tokio::join!(store.set_tags(&id, one.clone()), other.set_tags(&id, two.clone()));
        a.unwrap();
        b.unwrap();
        let last = read(store).await;
        assert!(last == one || last == two, "{last:?}");
        assert_eq!(read(other).await, last);
        store.set_tags(&id, Tags::new()).await.unwrap();
        assert_eq!(read(other).await, Tags::new());
    }

    pub(super) async fn a_client_token_starts_once(Place { store, other, .. }: &Place) {
        let request = StartRequest {
            client_token: Some("token-1".to_owned()),
            tags: tags(&[("a", "1")]),
            ..StartRequest::new(gib(2))
        };
        let one = store.start(request.clone()).await.unwrap();
        assert_eq!(store.start(request.clone()).await.unwrap(), one);
        assert_eq!(other.start(request.clone()).await.unwrap(), one);
        for wrong in [
            StartRequest { volume_size: gib(3), ..request.clone() },
            StartRequest { description: "other".to_owned(), ..request.clone() },
        ] {
            assert_eq!(kind(other.start(wrong).await), ErrorKind::Conflict);
        }
        let another = StartRequest { client_token: Some("token-2".to_owned()), ..request.clone() };
        assert_ne!(store.start(another).await.unwrap().id, one.id);
        store.complete(&one.id, count(&Blocks::new())).await.unwrap();
        assert_eq!(store.start(request).await.unwrap().id, one.id);
        let untold = [StartRequest::new(gib(1)), StartRequest::new(gib(1))];
        let [a, b] = untold.map(|request| store.start(request));
        assert_ne!(a.await.unwrap().id, b.await.unwrap().id);
    }

    pub(super) async fn a_chosen_id_is_free_or_refused(Place { store, other, .. }: &Place) {
        let chosen = id("snap-0123456789abcdef0");
        let request = StartRequest { id: Some(chosen.clone()), ..StartRequest::new(gib(1)) };
        match store.start(request.clone()).await {
            Err(error) => return assert_eq!(error.kind(), ErrorKind::Unsupported),
            Ok(started) => assert_eq!(started.id, chosen),
        }
        assert_eq!(kind(other.start(request.clone()).await), ErrorKind::Conflict);
        put(store, &chosen, &blocks(&[(0, data(1))])).await;
        store.complete(&chosen, count(&blocks(&[(0, data(1))]))).await.unwrap();
        assert_eq!(kind(other.start(request.clone()).await), ErrorKind::Conflict);
        assert_eq!(content(other, &chosen).await, blocks(&[(0, data(1))]));
        store.delete(&chosen).await.unwrap();
        // The id is free again, and nothing of the old snapshot shows.
        let (a, b) = tokio::join!(store.start(request.clone()), other.start(request));
        assert_eq!(usize::from(a.is_ok()) + usize::from(b.is_ok()), 1, "{a:?} {b:?}");
        store.complete(&chosen, count(&Blocks::new())).await.unwrap();
        assert_eq!(content(store, &chosen).await, Blocks::new());
    }

    pub(super) async fn changed_blocks_are_those_that_read_differently(
        Place { store, .. }: &Place,
    ) {
        let old = blocks(&[
            (0, data(0)),
            (1, data(1)),
            (2, data(2)),
            (3, Block::Zero),
            (20_000, data(4)),
            (40_000, data(5)),
        ]);
        let first = snapshot(store, StartRequest::new(gib(24)), &old).await;
        let request = StartRequest { parent: Some(first.id.clone()), ..StartRequest::new(gib(24)) };
        let new = blocks(&[
            (0, data(0)),
            (1, data(11)),
            (2, Block::Zero),
            (3, Block::Zero),
            (4, Block::Zero),
            (5, data(15)),
            (40_000, data(55)),
        ]);
        let second = snapshot(store, request, &new).await;
        let changed = changes(store, &first.id, &second.id, 0, 100).await.unwrap();
        let indexes: Vec<_> = changed.iter().map(|block| block.index.0).collect();
        assert_eq!(indexes, [1, 2, 5, 40_000]);
        let after: Blocks = old.clone().into_iter().chain(new).collect();
        for ChangedBlock { index, first: one, second: two } in changed {
            for (listed, snapshot, model) in [(one, &first, &old), (two, &second, &after)] {
                match listed {
                    None => assert!(!model.contains_key(&index.0), "{index} is no hole"),
                    Some(listed) => {
                        assert_eq!(listed.index, index);
                        let block =
                            store.get_block(&snapshot.id, index, &listed.token).await.unwrap();
                        assert_eq!(&block, &model[&index.0]);
                    }
                }
            }
        }
        assert!(changes(store, &first.id, &first.id, 0, 10).await.unwrap().is_empty());
        let stranger = snapshot(store, StartRequest::new(gib(24)), &old).await;
        match changes(store, &first.id, &stranger.id, 0, 10).await {
            Ok(changed) => assert!(changed.is_empty()),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Invalid),
        }
    }

    pub(super) async fn changed_blocks_have_pages_of_any_size(Place { store, .. }: &Place) {
        let old: Blocks = [0, 1, 2, 16_383, 16_384, 33_000].map(|n| (n, data(n))).into();
        let first = snapshot(store, StartRequest::new(gib(24)), &old).await.id;
        let request = StartRequest { parent: Some(first.clone()), ..StartRequest::new(gib(24)) };
        let new: Blocks = [1, 2, 16_383, 16_385, 33_000].map(|n| (n, data(n + 1))).into();
        let second = snapshot(store, request, &new).await.id;
        for from in [0, 1, 2, 3, 16_384, 16_385, 16_386, 33_000, 33_001, 49_152] {
            for max in [1, 2, 100] {
                let changed = changes(store, &first, &second, from, max).await.unwrap();
                let changed: Vec<_> = changed.iter().map(|block| block.index.0).collect();
                let expected: Vec<_> = new.keys().copied().filter(|&i| i >= from).collect();
                assert_eq!(changed, expected, "from {from} by {max}");
            }
        }
    }

    pub(super) async fn tokens_that_do_not_work_are_expired(Place { store, .. }: &Place) {
        let put = blocks(&[(0, data(0)), (1, data(1)), (2, Block::Zero)]);
        let id = snapshot(store, StartRequest::new(gib(1)), &put).await.id;
        let listed = listing(store, &id, 0, 10).await;
        let garbage = BlockToken(bytes::Bytes::from_static(b"garbage"));
        for (index, token) in [(0, &listed[1].token), (1, &listed[2].token), (0, &garbage)] {
            assert_useless(store, &id, BlockIndex(index), token).await;
        }
        let page = ListFrom::Page(PageToken("garbage".to_owned()));
        assert_eq!(kind(store.list_blocks(&id, page, 10).await), ErrorKind::ExpiredToken);
        assert_eq!(content(store, &id).await, put);
    }

    pub(super) async fn several_processes_fill_one_snapshot(Place { store, other, .. }: &Place) {
        let id = store.start(StartRequest::new(gib(1))).await.unwrap().id;
        let (even, odd): (Blocks, Blocks) =
            (0..80u32).map(|n| (n, data(n))).partition(|(n, _)| n % 2 == 0);
        tokio::join!(put(store, &id, &even), put(other, &id, &odd));
        other.flush(&id).await.unwrap();
        let all: Blocks = even.into_iter().chain(odd).collect();
        let snapshot = store.complete(&id, count(&all)).await.unwrap();
        settled(store, snapshot).await;
        assert_eq!(content(other, &id).await, all);
    }

    pub(super) async fn nobody_sees_a_part(Place { store, other, .. }: &Place) {
        let put: Blocks = (0..200u32).map(|n| (n * 300, data(n))).collect();
        let id = store.start(StartRequest::new(gib(30))).await.unwrap().id;
        super::put(store, &id, &put).await;
        let watch = {
            let (other, id, put) = (Arc::clone(other), id.clone(), put.clone());
            tokio::spawn(async move {
                let from = || ListFrom::Index(BlockIndex::ZERO);
                while let Err(error) = other.list_blocks(&id, from(), 1).await {
                    assert_eq!(error.kind(), ErrorKind::NotReady);
                }
                assert_eq!(content(&other, &id).await, put);
                assert_eq!(other.describe(&id).await.unwrap().state, SnapshotState::Completed);
            })
        };
        let snapshot = store.complete(&id, count(&put)).await.unwrap();
        settled(store, snapshot).await;
        watch.await.unwrap();
    }

    pub(super) async fn a_dropped_call_leaves_the_store_usable(Place { store, .. }: &Place) {
        let put: Blocks = (0..70u32).map(|n| (n, data(n))).collect();
        let id = store.start(StartRequest::new(gib(1))).await.unwrap().id;
        for (&index, block) in &put {
            let call = store.put_block(&id, BlockIndex(index), block.clone());
            let patience = Duration::from_micros(u64::from(index) * 40);
            let _ = tokio::time::timeout(patience, call).await;
        }
        let _ = tokio::time::timeout(Duration::from_micros(200), store.flush(&id)).await;
        super::put(store, &id, &put).await;
        let snapshot = store.complete(&id, count(&put)).await.unwrap();
        settled(store, snapshot).await;
        assert_eq!(content(store, &id).await, put);
    }

    pub(super) async fn the_list_has_each_snapshot_once(Place { store, other, .. }: &Place) {
        let mut expected = BTreeMap::new();
        for n in 0..6 {
            let request =
                StartRequest { tags: tags(&[("n", &n.to_string())]), ..StartRequest::new(gib(1)) };
            let snapshot = match n % 2 {
                0 => store.start(request).await.unwrap(),
                _ => snapshot(store, request, &Blocks::new()).await,
            };
            expected.insert(snapshot.id.clone(), snapshot);
        }
        for store in [store, other] {
            let all = listed(store).await;
            assert_eq!(all.len(), expected.len());
            for snapshot in all {
                assert_eq!(snapshot, expected[&snapshot.id]);
            }
        }
    }
}

/// The part of the contract that holds for snapshots which are there, however they came to be.
mod reading {
    use super::*;

    pub(super) async fn each_snapshot_is_listed_once_and_as_it_is_described(
        Place { store, other, .. }: &Place,
    ) {
        let mut all = listed(store).await;
        assert!(all.len() >= 4);
        for snapshot in &all {
            assert_eq!(&store.describe(&snapshot.id).await.unwrap(), snapshot);
            assert_eq!(&other.describe(&snapshot.id).await.unwrap(), snapshot);
            let lineage = |id| all.iter().find(|s| s.id == id).map(|s| &s.lineage);
            if let Some(parent) = &snapshot.parent {
                assert_eq!(lineage(parent.clone()), Some(&snapshot.lineage));
            }
        }
        let count = all.len();
        all.sort_by(|a, b| a.id.cmp(&b.id));
        all.dedup_by(|a, b| a.id == b.id);
        assert_eq!(all.len(), count);
    }

    pub(super) async fn snapshots_and_blocks_of_others_are_not_found(Place { store, .. }: &Place) {
        let none = id("snap-00000000000000000");
        let there = listed(store).await.swap_remove(0).id;
        let from = || ListFrom::Index(BlockIndex::ZERO);
        assert_eq!(kind(store.describe(&none).await), ErrorKind::NotFound);
        assert_eq!(kind(store.list_blocks(&none, from(), 1).await), ErrorKind::NotFound);
        for (first, second) in [(&none, &there), (&there, &none)] {
            let changed = store.list_changed_blocks(first, second, from(), 1).await;
            assert_eq!(kind(changed), ErrorKind::NotFound);
        }
        let token = BlockToken(bytes::Bytes::from_static(b"none"));
        let got = store.get_block(&none, BlockIndex(0), &token).await;
        assert!(matches!(kind(got), ErrorKind::NotFound | ErrorKind::ExpiredToken));
    }

    pub(super) async fn any_part_of_a_listing_is_that_part_of_the_whole(
        Place { store, .. }: &Place,
    ) {
        for snapshot in listed(store).await {
            let id = &snapshot.id;
            let all = listing(store, id, 0, MAX_PAGE_BLOCKS).await;
            assert!(all.iter().all(|block| snapshot.volume_size.contains(block.index)));
            let end = snapshot.volume_size.blocks().0;
            let middle = all[all.len() / 2].index.0;
            for from in [0, 1, middle, middle + 1, 16_384, end - 1, end] {
                for max in [1, 7, MAX_PAGE_BLOCKS] {
                    let part = listing(store, id, from, max).await;
                    let place = all.partition_point(|block| block.index.0 < from);
                    assert_eq!(part, all[place..], "{id} from {from} by {max}");
                }
            }
        }
    }

    pub(super) async fn blocks_read_the_same_each_time(Place { store, other, .. }: &Place) {
        for snapshot in listed(store).await {
            let content = super::content(store, &snapshot.id).await;
            assert_eq!(super::content(other, &snapshot.id).await, content);
            let zeros = content.values().filter(|block| block.is_zero()).count() as u64;
            assert!(snapshot.zero_blocks.is_none_or(|blocks| blocks == zeros));
            let data = content.len() as u64 - zeros;
            assert!(snapshot.data_blocks.is_none_or(|blocks| blocks == data));
        }
    }

    pub(super) async fn versions_differ_where_their_blocks_do(Place { store, .. }: &Place) {
        let mut all = Vec::new();
        for snapshot in listed(store).await {
            let content = super::content(store, &snapshot.id).await;
            all.push((snapshot, content));
        }
        let read = |blocks: &Blocks, x: u32| blocks.get(&x).cloned().unwrap_or(Block::Zero);
        for (one, old) in &all {
            for (two, new) in &all {
                let changed = match changes(store, &one.id, &two.id, 0, 9).await {
                    Err(error) if one.lineage != two.lineage => {
                        assert_eq!(error.kind(), ErrorKind::Invalid);
                        continue;
                    }
                    changed => changed.unwrap(),
                };
                let indexes: Vec<_> = changed.iter().map(|block| block.index.0).collect();
                let union: BTreeMap<_, _> = old.iter().chain(new).collect();
                let differ = union.into_keys().filter(|&&x| read(old, x) != read(new, x));
                assert_eq!(indexes, differ.copied().collect::<Vec<_>>());
                for ChangedBlock { index, first, second } in changed {
                    for (listed, id, blocks) in [(first, &one.id, old), (second, &two.id, new)] {
                        let block = blocks.get(&index.0);
                        assert_eq!(listed.is_some(), block.is_some());
                        let (Some(listed), Some(block)) = (listed, block) else { continue };
                        let got = store.get_block(id, index, &listed.token).await.unwrap();
                        assert_eq!(&got, block);
                    }
                }
                let from = indexes.get(indexes.len() / 2).map_or(5, |index| index + 1);
                let rest = changes(store, &one.id, &two.id, from, 2).await.unwrap();
                let rest: Vec<_> = rest.iter().map(|block| block.index.0).collect();
                assert_eq!(rest, indexes[indexes.partition_point(|&x| x < from)..]);
            }
        }
    }

    pub(super) async fn a_token_is_for_one_block(Place { store, .. }: &Place) {
        let id = listed(store).await.swap_remove(0).id;
        let listed = listing(store, &id, 0, 2).await;
        let (one, two) = (&listed[0], &listed[1]);
        assert_ne!(one.token, two.token);
        let garbage = BlockToken(bytes::Bytes::from_static(b"garbage"));
        for (index, token) in
            [(one.index, &two.token), (two.index, &one.token), (one.index, &garbage)]
        {
            assert_useless(store, &id, index, token).await;
        }
        let page = || ListFrom::Page(PageToken("garbage".to_owned()));
        assert_eq!(kind(store.list_blocks(&id, page(), 10).await), ErrorKind::ExpiredToken);
        let changed = store.list_changed_blocks(&id, &id, page(), 10).await;
        assert_eq!(kind(changed), ErrorKind::ExpiredToken);
    }

    pub(super) async fn nothing_can_be_written(Place { store, .. }: &Place) {
        let there = listed(store).await.swap_remove(0);
        for id in [&there.id, &id("snap-00000000000000000")] {
            let request = StartRequest { parent: Some(id.clone()), ..StartRequest::new(gib(1)) };
            let put = store.put_block(id, BlockIndex(0), data(1)).await;
            let outcomes = [
                kind(store.start(request).await),
                kind(put),
                kind(store.flush(id).await),
                kind(store.complete(id, count(&Blocks::new())).await),
                kind(store.delete(id).await),
                kind(store.set_tags(id, Tags::new()).await),
            ];
            assert_eq!(outcomes, [ErrorKind::Unsupported; 6]);
        }
        assert_eq!(store.describe(&there.id).await.unwrap(), there);
    }
}

#[tokio::test]
async fn count_counts_calls_errors_and_bytes() {
    let Place { store, _dir, .. } = repository(|store| store).await;
    let count = Count::new(store);
    let counters = count.counters();
    let store: SharedStore = Arc::new(count);
    let put = blocks(&[(0, data(0)), (1, data(1)), (2, Block::Zero)]);
    let id = snapshot(&store, StartRequest::new(gib(1)), &put).await.id;
    assert_eq!(content(&store, &id).await.len(), 3);
    assert!(store.describe(&self::id("snap-0")).await.is_err());
    let calls = [(Call::Start, 1), (Call::PutBlock, 3), (Call::Complete, 1), (Call::GetBlock, 3)];
    for (call, times) in calls {
        assert_eq!((counters.calls(call), counters.errors(call)), (times, 0), "{call:?}");
    }
    assert_eq!((counters.calls(Call::Describe), counters.errors(Call::Describe)), (1, 1));
    assert_eq!(counters.total(), Call::ALL.map(|call| counters.calls(call)).iter().sum::<u64>());
    assert_eq!(counters.bytes_put(), 3 * BLOCK_SIZE_U64);
    assert_eq!(counters.bytes_read(), 3 * BLOCK_SIZE_U64);
}

#[tokio::test]
async fn fail_fails_the_planned_calls_and_does_not_make_them() {
    let Place { store, _dir, .. } = repository(|store| store).await;
    let count = Count::new(store);
    let counters = count.counters();
    let fail = Arc::new(Fail::new(Arc::new(count)));
    let store: SharedStore = fail.clone();
    fail.plan(Call::List, 2, 2, ErrorKind::Timeout);
    let mut outcomes = Vec::new();
    for _ in 0..6 {
        outcomes.push(store.list(None).await.err().map(|error| error.kind()));
        store.start(StartRequest::new(gib(1))).await.unwrap();
    }
    let timeout = Some(ErrorKind::Timeout);
    assert_eq!(outcomes, [None, None, timeout, timeout, None, None]);
    assert_eq!(counters.calls(Call::List), 4);
    fail.plan(Call::List, 0, u64::MAX, ErrorKind::Denied);
    assert_eq!(kind(store.list(None).await), ErrorKind::Denied);
    fail.heal();
    store.list(None).await.unwrap();
}

#[tokio::test]
async fn corrupt_loses_the_chosen_blocks_until_it_is_healed() {
    let Place { store, _dir, .. } = repository(|store| store).await;
    let put = blocks(&[(0, data(0)), (1, data(1))]);
    let ids = [
        snapshot(&store, StartRequest::new(gib(1)), &put).await.id,
        snapshot(&store, StartRequest::new(gib(1)), &put).await.id,
    ];
    let corrupt = Arc::new(Corrupt::new(store));
    let store: SharedStore = corrupt.clone();
    corrupt.corrupt(&ids[0], BlockIndex(1));
    for id in &ids {
        for listed in listing(&store, id, 0, 10).await {
            let got = store.get_block(id, listed.index, &listed.token).await;
            if *id == ids[0] && listed.index == BlockIndex(1) {
                assert_eq!(kind(got), ErrorKind::Corrupt);
            } else {
                assert_eq!(got.unwrap(), put[&listed.index.0]);
            }
        }
    }
    corrupt.heal();
    assert_eq!(content(&store, &ids[0]).await, put);
}
