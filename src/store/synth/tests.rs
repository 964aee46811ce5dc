//! The store against a model: the content of all blocks of all versions, read one by one.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

type Content = BTreeMap<u32, Block>;

fn store(url: &str) -> Synth {
    Synth::new(url.parse().unwrap())
}

fn snap(id: &str) -> SnapshotId {
    id.parse().unwrap()
}

fn at(index: u32) -> ListFrom {
    ListFrom::Index(BlockIndex(index))
}

fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.unwrap_err().kind()
}

async fn snapshots(store: &Synth) -> Vec<Snapshot> {
    let (mut all, mut token) = (Vec::new(), None);
    loop {
        let page = store.list(token).await.unwrap();
        all.extend(page.snapshots);
        token = page.next;
        if token.is_none() {
            return all;
        }
    }
}

async fn listing(store: &Synth, id: &SnapshotId, from: u32, max: usize) -> Vec<ListedBlock> {
    let (mut all, mut from) = (Vec::new(), at(from));
    loop {
        let page = store.list_blocks(id, from, max).await.unwrap();
        assert!(page.blocks.len() <= max);
        all.extend(page.blocks);
        match page.next {
            Some(token) => from = ListFrom::Page(token),
            None => return all,
        }
    }
}

async fn changes(
    store: &Synth,
    (first, second): (&SnapshotId, &SnapshotId),
    from: u32,
    max: usize,
) -> Vec<ChangedBlock> {
    let (mut all, mut from) = (Vec::new(), at(from));
    loop {
        let page = store.list_changed_blocks(first, second, from, max).await.unwrap();
        assert!(page.blocks.len() <= max);
        all.extend(page.blocks);
        match page.next {
            Some(token) => from = ListFrom::Page(token),
            None => return all,
        }
    }
}

async fn content(store: &Synth, id: &SnapshotId) -> Content {
    let mut content = Content::new();
    for listed in listing(store, id, 0, MAX_PAGE_BLOCKS).await {
        let block = store.get_block(id, listed.index, &listed.token).await.unwrap();
        let digest = block.is_zero().then_some(Digest::OF_ZEROS);
        assert_eq!(listed.digest, digest, "of a zero block, and of no other");
        assert_eq!(content.insert(listed.index.0, block), None);
    }
    content
}

fn differ(one: &Content, two: &Content) -> Vec<u32> {
    let read = |content: &Content, index| content.get(index).cloned().unwrap_or(Block::Zero);
    let indexes: BTreeSet<_> = one.keys().chain(two.keys()).collect();
    indexes.into_iter().filter(|x| read(one, x) != read(two, x)).copied().collect()
}

/// A URL and what the model needs of it.
fn recipes() -> impl Strategy<Value = (String, u32)> {
    let density = prop::sample::select(vec!["0.02", "0.005", "0.000001"]);
    let zeros = prop::sample::select(vec!["0", "0.4", "1"]);
    let changed = prop_oneof![Just(0u32), Just(1), 2..40u32];
    (density, zeros, changed, 1..4u32, any::<u32>()).prop_map(
        |(density, zeros, changed, versions, seed)| {
            let rest = format!("changed={changed}&versions={versions}&seed={seed}");
            (format!("synth:?size=1GiB&density={density}&zeros={zeros}&{rest}"), changed)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn it_says_what_reading_everything_says(
        (url, changed) in recipes(),
        froms in prop::collection::vec(0..2100u32, 3),
        max in 1..50usize,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let store = store(&url);
            let all = snapshots(&store).await;
            let mut model: Vec<(SnapshotId, Content)> = Vec::new();
            for snapshot in all {
                let content = content(&store, &snapshot.id).await;
                model.push((snapshot.id, content));
            }
            for (n, pair) in model.windows(2).enumerate() {
                let [(_, old), (_, new)] = pair else { unreachable!("windows of two") };
                // The formula of the documents.
                let offset = (n as u64 + 1) * 2_654_435_761 % 2048;
                let formula = (0..u64::from(changed)).map(|i| (i * 2048 + offset) / u64::from(changed));
                let formula: Vec<_> = formula.map(|x| u32::try_from(x).unwrap()).collect();
                assert_eq!(differ(old, new), formula, "{url}");
                assert!(old.keys().all(|x| new.contains_key(x)), "nothing goes away");
            }
            for (id, content) in &model {
                for &from in &froms {
                    let listed = listing(&store, id, from, max).await;
                    let listed: Vec<_> = listed.iter().map(|listed| listed.index.0).collect();
                    let expected: Vec<_> = content.range(from..).map(|(x, _)| *x).collect();
                    assert_eq!(listed, expected, "{url} from {from} by {max}");
                }
                for (other, theirs) in &model {
                    compare(&store, (id, content), (other, theirs), (froms[0], max)).await;
                    compare(&store, (id, content), (other, theirs), (0, 10_000)).await;
                }
            }
        });
    }
}

/// Two versions differ where their contents do, and the tokens are those of what is there.
async fn compare(
    store: &Synth,
    (first, one): (&SnapshotId, &Content),
    (second, two): (&SnapshotId, &Content),
    (from, max): (u32, usize),
) {
    let changes = changes(store, (first, second), from, max).await;
    let indexes: Vec<_> = changes.iter().map(|change| change.index.0).collect();
    let expected: Vec<_> = differ(one, two).into_iter().filter(|&x| x >= from).collect();
    assert_eq!(indexes, expected, "{first} to {second} from {from} by {max}");
    for change in changes {
        for (listed, id, content) in [(change.first, first, one), (change.second, second, two)] {
            let block = content.get(&change.index.0);
            assert_eq!(listed.is_some(), block.is_some());
            let (Some(listed), Some(block)) = (listed, block) else { continue };
            assert_eq!(listed.index, change.index);
            assert_eq!(&store.get_block(id, listed.index, &listed.token).await.unwrap(), block);
            assert_eq!(listed.digest, block.is_zero().then_some(Digest::OF_ZEROS));
        }
    }
}

#[tokio::test]
async fn snapshots_are_versions_of_lineages() {
    let all = snapshots(&store("synth:?seed=255&versions=17&lineages=2")).await;
    assert_eq!(all.len(), 34);
    let one = &all[0];
    assert_eq!(one.id.as_str(), "snap-000000ff000100001");
    assert_eq!((&one.parent, one.name()), (&None, Some("synth-1-1")));
    assert_eq!(one.start_time.to_string(), "2024-01-01T00:00:00Z");
    assert_eq!((one.data_blocks, one.zero_blocks), (Some(16_384), Some(0)));
    assert!(one.description.contains("version 1 of lineage 1"), "{}", one.description);
    let last = &all[33];
    assert_eq!(last.id.as_str(), "snap-000000ff000200011");
    assert_eq!(last.name(), Some("synth-2-17"));
    assert_eq!(last.parent.as_ref().unwrap().as_str(), "snap-000000ff000200010");
    assert_eq!(last.lineage.as_ref().unwrap().as_str(), "snap-000000ff000200001");
    assert_eq!(last.start_time.to_string(), "2024-01-01T16:00:00Z");
    let store = store("synth:?density=0.9");
    let alone = store.describe(&snap("snap-00000000000100002")).await.unwrap();
    assert_eq!((alone.name(), alone.data_blocks), (Some("synth-2"), None));
}

#[tokio::test]
async fn a_list_of_many_has_pages() {
    let store = store("synth:?versions=1000&lineages=3");
    let all = snapshots(&store).await;
    assert_eq!(all.len(), 3000);
    assert!(all.is_sorted_by(|a, b| a.id < b.id));
    let token = store.list(None).await.unwrap().next.unwrap();
    let second = store.list(Some(token)).await.unwrap();
    assert_eq!(second.snapshots.len(), 1000);
    assert_eq!(kind(store.list(Some(ListToken("x".to_owned()))).await), ErrorKind::ExpiredToken);
    assert!(store.list(Some(ListToken("4000000000".to_owned()))).await.unwrap().next.is_none());
}

#[tokio::test]
async fn finds_only_snapshots_of_the_recipe() {
    let store = store("synth:?versions=2&seed=7");
    for id in [
        "snap-00000007000100000",
        "snap-00000007000100003",
        "snap-00000007000200001",
        "snap-00000008000100001",
        "snap-0000000700010001",
        "snap-000000070001000010",
    ] {
        assert_eq!(kind(store.describe(&snap(id)).await), ErrorKind::NotFound, "{id}");
        assert_eq!(kind(store.list_blocks(&snap(id), at(0), 1).await), ErrorKind::NotFound);
    }
}

#[tokio::test]
async fn a_token_is_for_one_block_of_one_snapshot_of_one_store() {
    let url = "synth:?size=1GiB&lineages=2";
    let store = store(url);
    let (one, two) = (snap("snap-00000000000100001"), snap("snap-00000000000100002"));
    let stranger = snap("snap-00000000000200001");
    let listed = listing(&store, &one, 5, 10_000).await.swap_remove(0);
    let token = listed.token;
    assert!(token.0.len() <= 64);
    let index = BlockIndex(5);
    assert!(store.get_block(&one, index, &token).await.is_ok());
    for (id, index) in [(&one, BlockIndex(6)), (&two, index), (&stranger, index)] {
        assert_eq!(kind(store.get_block(id, index, &token).await), ErrorKind::ExpiredToken);
    }
    let other = self::store("synth:?size=2GiB&lineages=2");
    assert_eq!(kind(other.get_block(&one, index, &token).await), ErrorKind::ExpiredToken);
    for cut in [0, 15] {
        let token = BlockToken(token.0.slice(..cut));
        assert_eq!(kind(store.get_block(&one, index, &token).await), ErrorKind::ExpiredToken);
    }
}

#[tokio::test]
async fn families_cannot_be_compared() {
    let store = store("synth:?lineages=2");
    let (one, two) = (snap("snap-00000000000100001"), snap("snap-00000000000200001"));
    let error = store.list_changed_blocks(&one, &two, at(0), 1).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("not of one lineage"), "{error}");
}

#[tokio::test]
async fn nothing_can_be_written() {
    let store = store("synth:?seed=1");
    let id = snap("snap-00000001000100001");
    let complete = CompleteRequest { changed_blocks: 0, checksum: None, started: None };
    let request = StartRequest::new(store.recipe.size);
    let errors = [
        store.start(request).await.unwrap_err(),
        store.put_block(&id, BlockIndex(0), Block::Zero).await.unwrap_err(),
        store.flush(&id).await.unwrap_err(),
        store.complete(&id, complete).await.unwrap_err(),
        store.delete(&id).await.unwrap_err(),
        store.set_tags(&id, Tags::new()).await.unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        let message = error.to_string();
        assert!(message.contains("synth:?seed=1") && message.contains("/srv/snaps"), "{message}");
    }
}
