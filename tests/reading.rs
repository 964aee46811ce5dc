//! Reading an image, compared with a model, while the store below fails, lists oddly and forgets
//! its tokens.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use proptest::prelude::*;

use fspfs::cache::{Cache, MIN_BUDGET};
use fspfs::image::{Image, Reader};
use fspfs::model::{
    BLOCK_SIZE, BLOCK_SIZE_U64, Block, BlockIndex, Digest, LENGTH_TAG, Snapshot, SnapshotId,
    SnapshotState, Tags, VolumeSize,
};
use fspfs::store::repository::Repository;
use fspfs::store::wrap::{Call, Corrupt, Count, Fail};
use fspfs::store::{
    BlockPage, BlockToken, ChangedPage, CompleteRequest, Error, ErrorKind, ListFrom, ListToken,
    ListedBlock, PageToken, Result, SharedStore, SnapshotPage, SnapshotStore, StartRequest,
};

/// How a store lists blocks. The contract allows all of it.
#[derive(Clone, Copy, Debug)]
struct Manners {
    /// Blocks in a page, at most.
    page: usize,
    /// Every n-th page is empty, and says nothing.
    empty: u64,
    /// Whether the digests are known before reading.
    digests: bool,
    /// Every n-th use of a page token is answered with `ExpiredToken`.
    expires: u64,
}

const GOOD: Manners = Manners { page: usize::MAX, empty: 0, digests: true, expires: 0 };

/// Which blocks a computed snapshot has.
#[derive(Clone, Debug)]
enum Content {
    /// These: zero blocks are false.
    Chosen(BTreeMap<u32, bool>),
    /// Every n-th.
    Every(u32),
}

impl Content {
    /// The first block at or behind `index`, and whether it is data.
    fn at_or_behind(&self, index: u32, end: u32) -> Option<(u32, bool)> {
        match self {
            Self::Chosen(blocks) => blocks.range(index..end).next().map(|(&i, &data)| (i, data)),
            Self::Every(n) => Some((index.next_multiple_of(*n), true)).filter(|(i, _)| *i < end),
        }
    }

    fn get(&self, index: u32) -> Option<bool> {
        self.at_or_behind(index, u32::MAX).filter(|(i, _)| *i == index).map(|(_, data)| data)
    }
}

/// A store with one snapshot, which is computed.
#[derive(Debug)]
struct Computed {
    snapshot: Snapshot,
    content: Content,
    manners: Manners,
    pages: AtomicU64,
    page_tokens: AtomicU64,
    /// Block tokens of earlier generations do not work any more.
    generation: AtomicU64,
}

fn word(index: u32, n: usize) -> u64 {
    (u64::from(index) << 20 | n as u64 | 1 << 60).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// The bytes of a data block: no two words of an image are equal.
fn data(index: u32) -> Vec<u8> {
    (0..BLOCK_SIZE / 8).flat_map(|n| word(index, n).to_le_bytes()).collect()
}

fn snapshot(volume: VolumeSize, len: u64) -> Snapshot {
    Snapshot {
        id: "snap-0123456789abcdef0".parse().unwrap(),
        state: SnapshotState::Completed,
        state_message: None,
        volume_size: volume,
        parent: None,
        lineage: None,
        volume_id: None,
        description: String::new(),
        start_time: jiff::Timestamp::UNIX_EPOCH,
        completion_time: None,
        tags: Tags::from([(LENGTH_TAG.to_owned(), len.to_string())]),
        encrypted: false,
        content_digest: None,
        data_blocks: None,
        zero_blocks: None,
    }
}

impl Computed {
    fn new(len: u64, content: Content, manners: Manners) -> Arc<Self> {
        Arc::new(Self {
            snapshot: snapshot(VolumeSize::holding(len).unwrap(), len),
            content,
            manners,
            pages: AtomicU64::new(0),
            page_tokens: AtomicU64::new(0),
            generation: AtomicU64::new(0),
        })
    }

    fn expire(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    fn token(&self, index: u32) -> BlockToken {
        let generation = self.generation.load(Ordering::SeqCst);
        BlockToken(format!("{generation}/{index}").into_bytes().into())
    }
}

fn every(n: u64, counter: &AtomicU64) -> bool {
    n > 0 && (counter.fetch_add(1, Ordering::SeqCst) + 1).is_multiple_of(n)
}

fn never<T>() -> Result<T> {
    panic!("reading an image asks for nothing but listings and blocks")
}

#[async_trait]
impl SnapshotStore for Computed {
    async fn describe(&self, _: &SnapshotId) -> Result<Snapshot> {
        never()
    }

    async fn list(&self, _: Option<ListToken>) -> Result<SnapshotPage> {
        never()
    }

    async fn list_blocks(&self, id: &SnapshotId, from: ListFrom, max: usize) -> Result<BlockPage> {
        assert_eq!(*id, self.snapshot.id);
        let mut at = match from {
            ListFrom::Index(index) => index.0,
            ListFrom::Page(PageToken(token)) => {
                if every(self.manners.expires, &self.page_tokens) {
                    return Err(Error::new(ErrorKind::ExpiredToken, "the page token has expired"));
                }
                token.parse().unwrap()
            }
        };
        if every(self.manners.empty, &self.pages) {
            let next = Some(PageToken(at.to_string()));
            return Ok(BlockPage { blocks: vec![], covered: None, next, started: None });
        }
        let end = self.snapshot.volume_size.blocks();
        let mut blocks = Vec::new();
        while blocks.len() < max.min(self.manners.page) {
            let Some((index, data)) = self.content.at_or_behind(at, end.0) else {
                return Ok(BlockPage { blocks, covered: Some(end), next: None, started: None });
            };
            // Of a computed snapshot with a million blocks nobody wants to hash all.
            let digest = match (data, self.manners.digests) {
                (_, false) => None,
                (false, true) => Some(Digest::OF_ZEROS),
                (true, true) => Some(Digest::of(&self::data(index))),
            };
            blocks.push(ListedBlock { index: BlockIndex(index), token: self.token(index), digest });
            at = index + 1;
        }
        let next = Some(PageToken(at.to_string()));
        Ok(BlockPage { blocks, covered: Some(BlockIndex(at)), next, started: None })
    }

    async fn list_changed_blocks(
        &self,
        _: &SnapshotId,
        _: &SnapshotId,
        _: ListFrom,
        _: usize,
    ) -> Result<ChangedPage> {
        never()
    }

    async fn get_block(&self, _: &SnapshotId, at: BlockIndex, token: &BlockToken) -> Result<Block> {
        if *token != self.token(at.0) {
            return Err(Error::new(ErrorKind::ExpiredToken, "the block token has expired"));
        }
        match self.content.get(at.0) {
            Some(true) => Ok(Block::new(data(at.0).into())),
            Some(false) => Ok(Block::Zero),
            None => panic!("block {at} is a hole: no token was ever given for it"),
        }
    }

    async fn start(&self, _: StartRequest) -> Result<Snapshot> {
        never()
    }

    async fn put_block(&self, _: &SnapshotId, _: BlockIndex, _: Block) -> Result<()> {
        never()
    }

    async fn flush(&self, _: &SnapshotId) -> Result<()> {
        never()
    }

    async fn complete(&self, _: &SnapshotId, _: CompleteRequest) -> Result<Snapshot> {
        never()
    }

    async fn delete(&self, _: &SnapshotId) -> Result<()> {
        never()
    }

    async fn set_tags(&self, _: &SnapshotId, _: Tags) -> Result<()> {
        never()
    }
}

/// What an image holds.
#[derive(Clone, Debug)]
struct Model {
    len: u64,
    content: Content,
}

impl Model {
    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let end = self.len.min(offset.saturating_add(len as u64));
        let mut bytes = Vec::new();
        let mut at = offset;
        while at < end {
            let index = BlockIndex::containing(at);
            let stop = end.min(index.next().offset());
            let range = usize::try_from(at - index.offset()).unwrap()
                ..usize::try_from(stop - index.offset()).unwrap();
            match self.content.get(index.0) {
                Some(true) => bytes.extend_from_slice(&data(index.0)[range]),
                _ => bytes.resize(bytes.len() + range.len(), 0),
            }
            at = stop;
        }
        bytes
    }

    fn is_data(&self, index: u32) -> bool {
        self.content.get(index) == Some(true)
    }

    /// The data that `offset..self.len` begins with, or comes to.
    fn next_data(&self, offset: u64) -> Option<u64> {
        let Content::Chosen(blocks) = &self.content else { unreachable!() };
        let here = BlockIndex::containing(offset).0;
        let (&next, _) = blocks.range(here..).find(|(_, data)| **data)?;
        Some(BlockIndex(next).offset().max(offset)).filter(|&at| at < self.len)
    }

    fn next_hole(&self, offset: u64) -> Option<u64> {
        if offset >= self.len {
            return None;
        }
        let mut index = BlockIndex::containing(offset);
        while self.is_data(index.0) {
            index = index.next();
        }
        Some(index.offset().max(offset).min(self.len))
    }
}

const GIB: u64 = 1 << 30;

/// Indexes where something may go wrong: around the ends of what is listed together.
fn index(blocks: u32) -> impl Strategy<Value = u32> {
    let edges = [0, 1, 2, 3, 63, 64, 4094, 4095, 4096, 4097, 8191, 8192, 12_287, 12_288, 16_384];
    prop_oneof![
        3 => prop::sample::select(edges.to_vec()),
        1 => 0..blocks,
        1 => (1..8u32).prop_map(move |back| blocks.saturating_sub(back)),
        3 => (0..40u32).prop_map(|n| 4080 + n),
    ]
    .prop_map(move |index| index.min(blocks - 1))
}

fn model() -> impl Strategy<Value = Model> {
    let len = prop_oneof![
        (1..9u64, 0..GIB).prop_map(|(gib, less)| gib * GIB - less),
        (1..9u64).prop_map(|gib| gib * GIB),
        (1..3 * BLOCK_SIZE_U64),
    ];
    len.prop_flat_map(|len| {
        let blocks = u32::try_from(len.div_ceil(BLOCK_SIZE_U64)).unwrap();
        let content = prop::collection::btree_map(index(blocks), prop::bool::weighted(0.8), 0..60);
        content.prop_map(move |blocks| Model { len, content: Content::Chosen(blocks) })
    })
}

fn manners() -> impl Strategy<Value = Manners> {
    let page = prop::sample::select(vec![1, 2, 3, 7, 100, usize::MAX]);
    let some = || prop::sample::select(vec![0, 2, 3]);
    (page, some(), any::<bool>(), some()).prop_map(|(page, empty, digests, expires)| Manners {
        page,
        empty,
        digests,
        expires,
    })
}

#[derive(Clone, Debug)]
enum Step {
    /// Reads at the same time, each `(offset, len)`.
    Read(Vec<(u64, usize)>),
    /// A sequential run.
    Run(u64),
    SeekData(u64),
    SeekHole(u64),
    /// All tokens stop working.
    Expire,
    Fail(Call, u64, u64, ErrorKind),
    Heal,
}

fn range() -> impl Strategy<Value = (u64, usize)> {
    let near = index(20_000).prop_flat_map(|index| {
        let at = BlockIndex(index).offset();
        let around = at.saturating_sub(3 * BLOCK_SIZE_U64)..at + 3 * BLOCK_SIZE_U64;
        prop_oneof![Just(at), Just(at.saturating_sub(1)), around]
    });
    let offset = prop_oneof![4 => near, 1 => 0..10 * GIB];
    let len = prop_oneof![0..10usize, Just(4096), 1..300_000usize, 500_000..3_000_000usize];
    (offset, len)
}

fn step() -> impl Strategy<Value = Step> {
    let call = prop::sample::select(vec![Call::GetBlock, Call::ListBlocks]);
    let kind = prop::sample::select(vec![
        ErrorKind::Throttled,
        ErrorKind::Unavailable,
        ErrorKind::Timeout,
        ErrorKind::NotFound,
        ErrorKind::ExpiredToken,
    ]);
    prop_oneof![
        8 => prop::collection::vec(range(), 1..5).prop_map(Step::Read),
        1 => range().prop_map(|(offset, _)| Step::Run(offset)),
        2 => range().prop_map(|(offset, _)| Step::SeekData(offset)),
        2 => range().prop_map(|(offset, _)| Step::SeekHole(offset)),
        1 => Just(Step::Expire),
        2 => (call, 0..4u64, 1..6u64, kind).prop_map(|(c, a, t, k)| Step::Fail(c, a, t, k)),
        1 => Just(Step::Heal),
    ]
}

/// Reads, from memory first as the mount does it.
async fn read(reader: &Reader, offset: u64, len: usize) -> std::result::Result<Bytes, ErrorKind> {
    match reader.read_cached(offset, len) {
        Some(bytes) => Ok(bytes),
        None => reader.read(offset, len).await.map_err(|error| error.kind()),
    }
}

fn same(bytes: &[u8], model: &Model, (offset, len): (u64, usize)) {
    // Not assert_eq: a megabyte of numbers helps nobody.
    let expected = model.read(offset, len);
    assert_eq!(bytes.len(), expected.len(), "{len} bytes at {offset}");
    let wrong = bytes.iter().zip(&expected).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "wrong bytes in {len} bytes at {offset}");
}

/// Checks an answer of `SEEK_DATA` that may stop early, but may not skip data.
fn legal_data(model: &Model, offset: u64, found: Option<u64>) {
    let next = model.next_data(offset);
    match found {
        None => assert_eq!(next, None, "the data behind {offset} is not found"),
        Some(found) => {
            assert!(found >= offset && found < model.len);
            assert!(
                next.is_none_or(|next| found <= next),
                "{found} is behind the data at {next:?}"
            );
        }
    }
}

/// Checks an answer of `SEEK_HOLE` that may stop early; what it skips is read as data anyway.
fn legal_hole(model: &Model, offset: u64, found: Option<u64>) {
    match found {
        None => assert!(offset >= model.len),
        Some(found) => assert!(found >= offset && found <= model.len && offset < model.len),
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

async fn play(model: Model, manners: Manners, steps: Vec<Step>) {
    let computed = Computed::new(model.len, model.content.clone(), manners);
    let fail = Arc::new(Fail::new(computed.clone()));
    let cache = Cache::new(MIN_BUDGET);
    let image = Image::new(Arc::new(computed.snapshot.clone()), fail.clone(), cache.clone());
    assert_eq!(image.len(), model.len);
    let reader = Arc::new(Reader::new(Arc::clone(&image)));
    let mut failing = false;
    for step in steps {
        match step {
            Step::Read(ranges) => {
                let reads = ranges.into_iter().map(|range| {
                    let reader = Arc::clone(&reader);
                    tokio::spawn(async move { (range, read(&reader, range.0, range.1).await) })
                });
                for done in reads.collect::<Vec<_>>() {
                    let (range, result) = done.await.unwrap();
                    match result {
                        Ok(bytes) => same(&bytes, &model, range),
                        Err(kind) => assert!(failing, "{kind:?} for {range:?}, unasked"),
                    }
                }
            }
            Step::Run(start) => {
                for n in 0..40 {
                    let range = (start + n * 131_072, 131_072);
                    match read(&reader, range.0, range.1).await {
                        Ok(bytes) => same(&bytes, &model, range),
                        Err(kind) => assert!(failing, "{kind:?} for {range:?}, unasked"),
                    }
                }
            }
            Step::SeekData(offset) => match image.seek_data(offset).await {
                Ok(found) => legal_data(&model, offset, found),
                Err(error) => assert!(failing, "{error}"),
            },
            Step::SeekHole(offset) => match image.seek_hole(offset).await {
                Ok(found) => legal_hole(&model, offset, found),
                Err(error) => assert!(failing, "{error}"),
            },
            Step::Expire => computed.expire(),
            Step::Fail(call, after, times, kind) => {
                failing = true;
                fail.plan(call, after, times, kind);
            }
            Step::Heal => {
                fail.heal();
                // Fetches that are under way may still bring an error to who joins them.
                while cache.metrics().in_flight.load(Ordering::SeqCst) > 0 {
                    tokio::task::yield_now().await;
                }
                failing = false;
            }
        }
        assert!(cache.bytes() <= MIN_BUDGET, "{} bytes are cached", cache.bytes());
    }
    fail.heal();
    let Content::Chosen(blocks) = &model.content else { unreachable!() };
    for &index in blocks.keys() {
        let range = (BlockIndex(index).offset(), BLOCK_SIZE);
        // The first try may join a fetch that failed before.
        let bytes = match read(&reader, range.0, range.1).await {
            Ok(bytes) => bytes,
            Err(_) => read(&reader, range.0, range.1).await.unwrap(),
        };
        same(&bytes, &model, range);
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 96,
        max_shrink_iters: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn reads_are_right_or_fail(
        model in model(),
        manners in manners(),
        steps in prop::collection::vec(step(), 1..25),
    ) {
        runtime().block_on(play(model, manners, steps));
    }

    #[test]
    fn a_corrupt_block_is_an_error_and_no_other_is(
        model in model(),
        digests in any::<bool>(),
        bad in prop::collection::vec(any::<prop::sample::Index>(), 1..4),
    ) {
        let Content::Chosen(blocks) = &model.content else { unreachable!() };
        let data: Vec<u32> = blocks.iter().filter(|(_, data)| **data).map(|(i, _)| *i).collect();
        prop_assume!(!data.is_empty());
        let bad: BTreeSet<u32> = bad.into_iter().map(|n| *n.get(&data)).collect();
        runtime().block_on(async {
            let computed = Computed::new(model.len, model.content.clone(), Manners { digests, ..GOOD });
            let corrupt = Arc::new(Corrupt::new(computed.clone()));
            let snapshot = Arc::new(computed.snapshot.clone());
            let image = Image::new(snapshot, corrupt.clone(), Cache::new(MIN_BUDGET));
            let reader = Reader::new(image);
            for index in &bad {
                corrupt.corrupt(&computed.snapshot.id, BlockIndex(*index));
            }
            for healed in [false, true] {
                for &index in blocks.keys() {
                    for range in [(0, 1), (BLOCK_SIZE_U64 - 1, 1), (0, BLOCK_SIZE)] {
                        let range = (BlockIndex(index).offset() + range.0, range.1);
                        match read(&reader, range.0, range.1).await {
                            Ok(bytes) => {
                                same(&bytes, &model, range);
                                let inside = range.0 < model.len;
                                assert!(healed || !inside || !bad.contains(&index));
                            }
                            Err(kind) => {
                                assert_eq!(kind, ErrorKind::Corrupt);
                                assert!(!healed && bad.contains(&index), "block {index}");
                            }
                        }
                    }
                }
                corrupt.heal();
            }
        });
    }

    #[test]
    fn seeking_is_exact_where_all_is_known(
        model in model(),
        manners in manners(),
        offsets in prop::collection::vec(range(), 1..20),
    ) {
        runtime().block_on(async {
            let computed = Computed::new(model.len, model.content.clone(), manners);
            let snapshot = Arc::new(computed.snapshot.clone());
            let image = Image::new(snapshot, computed.clone(), Cache::new(MIN_BUDGET));
            // Not listed yet: legal. At most four spans are listed for one answer, so again.
            for (offset, _) in &offsets {
                legal_data(&model, *offset, image.seek_data(*offset).await.unwrap());
                legal_hole(&model, *offset, image.seek_hole(*offset).await.unwrap());
            }
            for at in (0..model.len).step_by(1 << 31) {
                image.seek_hole(at).await.unwrap();
                image.seek_data(at).await.unwrap();
                image.read(at, 1).await.unwrap();
            }
            for (offset, _) in offsets {
                // A store that does not tell zero blocks from data lists both.
                if manners.digests {
                    prop_assert_eq!(image.seek_data(offset).await.unwrap(), model.next_data(offset));
                    prop_assert_eq!(image.seek_hole(offset).await.unwrap(), model.next_hole(offset));
                }
            }
            Ok(())
        })?;
    }
}

/// The same against a real repository, with fewer cases since it writes to a disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repository_reads_as_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let store: SharedStore = Arc::new(Repository::create(&dir.path().join("store")).await.unwrap());
    let len = 9 * GIB + 12_345;
    let blocks: BTreeMap<u32, bool> =
        [0, 1, 2, 4095, 4096, 4097, 9000, 16_383, 16_384, 18_432].map(|n| (n, n != 2)).into();
    let model = Model { len, content: Content::Chosen(blocks.clone()) };
    let size = VolumeSize::holding(len).unwrap();
    let tags = Tags::from([(LENGTH_TAG.to_owned(), len.to_string())]);
    let started = store.start(StartRequest { tags, ..StartRequest::new(size) }).await.unwrap();
    for (&index, &is_data) in &blocks {
        let block = if is_data { Block::new(data(index).into()) } else { Block::Zero };
        store.put_block(&started.id, BlockIndex(index), block).await.unwrap();
    }
    let request =
        CompleteRequest { changed_blocks: blocks.len() as u64, checksum: None, started: None };
    let snapshot = Arc::new(store.complete(&started.id, request).await.unwrap());
    let fail = Arc::new(Fail::new(store));
    let count = Count::new(fail.clone());
    let counters = count.counters();
    let image = Image::new(snapshot, Arc::new(count), Cache::new(MIN_BUDGET));
    assert_eq!(counters.total(), 0);
    let reader = Reader::new(Arc::clone(&image));
    let holes_of = [3, 5000, 10_000, 18_431];
    for round in 0..6 {
        fail.plan(Call::GetBlock, round, 2, ErrorKind::Unavailable);
        fail.plan(Call::ListBlocks, round, 1, ErrorKind::Timeout);
        for index in blocks.keys().copied().chain(holes_of) {
            let range = (BlockIndex(index).offset().saturating_sub(9), 1_000_000);
            if let Ok(bytes) = read(&reader, range.0, range.1).await {
                same(&bytes, &model, range);
            }
        }
    }
    fail.heal();
    for index in blocks.keys().copied().chain(holes_of) {
        let range = (BlockIndex(index).offset(), BLOCK_SIZE);
        same(&read(&reader, range.0, range.1).await.unwrap(), &model, range);
    }
    let before = counters.total();
    for index in holes_of {
        read(&reader, BlockIndex(index).offset(), BLOCK_SIZE).await.unwrap();
    }
    assert_eq!(counters.total(), before, "a hole that is known costs no call");
}

/// Of an id that is another snapshot's by now, what was not listed before is an error, and never the other's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_is_never_of_two_snapshots_of_one_id() {
    let dir = tempfile::tempdir().unwrap();
    let store: SharedStore = Arc::new(Repository::create(&dir.path().join("store")).await.unwrap());
    // In each of three parts of 8 GiB.
    let blocks = [0, 17_000, 40_000];
    let make = async |content: u8| {
        let size = VolumeSize::from_gib(32).unwrap();
        let id = Some("snap-0a".parse().unwrap());
        let started = store.start(StartRequest { id, ..StartRequest::new(size) }).await.unwrap();
        for index in blocks {
            let block = Block::new(vec![content; BLOCK_SIZE].into());
            store.put_block(&started.id, BlockIndex(index), block).await.unwrap();
        }
        let request = CompleteRequest { changed_blocks: 3, checksum: None, started: None };
        Arc::new(store.complete(&started.id, request).await.unwrap())
    };
    let first = make(b'a').await;
    let reader = async |of: &Arc<Snapshot>| {
        let image = Image::new(Arc::clone(of), Arc::clone(&store), Cache::new(MIN_BUDGET));
        let reader = Reader::new(image);
        let mut found = Vec::new();
        for index in blocks {
            let read = read(&reader, BlockIndex(index).offset(), 1).await;
            found.push(read.map(|bytes| bytes[0]));
        }
        found
    };
    assert_eq!(reader(&first).await, [Ok(b'a'); 3]);
    let image = Image::new(Arc::clone(&first), Arc::clone(&store), Cache::new(MIN_BUDGET));
    let open = Reader::new(image);
    assert_eq!(read(&open, 0, 1).await.unwrap()[..], b"a"[..]);
    store.delete(&first.id).await.unwrap();
    let second = make(b'b').await;
    assert_eq!(read(&open, 0, 1).await.unwrap()[..], b"a"[..]);
    for index in &blocks[1..] {
        let error = read(&open, BlockIndex(*index).offset(), 1).await.unwrap_err();
        assert_eq!(error, ErrorKind::NotFound);
    }
    // Whoever still knows the first only gets nothing of the second, and the other way round.
    assert_eq!(reader(&first).await, [Err(ErrorKind::NotFound); 3]);
    assert_eq!(reader(&second).await, [Ok(b'b'); 3]);
    let changed =
        store.list_changed_blocks(&second.id, &second.id, ListFrom::Index(BlockIndex::ZERO), 100);
    let started = (second.start_time, second.start_time);
    assert_eq!(changed.await.unwrap().started, Some(started));
}

/// No thread but the reader's own has anything to do with it: there is none to spawn a task on.
#[test]
fn what_is_in_memory_is_read_ahead_by_nobody() {
    let (len, blocks) = (20 * BLOCK_SIZE_U64, 20);
    let computed = Computed::new(len, Content::Every(2), GOOD);
    let mut snapshot = computed.snapshot.clone();
    // Behind what is read nothing can be read ahead.
    snapshot.tags.insert("fspfs:length".to_owned(), len.to_string());
    let snapshot = Arc::new(snapshot);
    let image = Image::new(snapshot, computed, Cache::new(MIN_BUDGET));
    runtime().block_on(async {
        let reader = Reader::new(Arc::clone(&image));
        for index in 0..blocks {
            read(&reader, BlockIndex(index).offset(), BLOCK_SIZE).await.unwrap();
        }
        // What was fetched last is put into the cache by a task, which would end with the runtime.
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    });
    let reader = Reader::new(Arc::clone(&image));
    for piece in 0..u64::from(blocks) * 4 {
        assert_eq!(reader.read_cached(piece * 131_072, 131_072).unwrap().len(), 131_072);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_byte_of_a_huge_snapshot_costs_few_calls() {
    let tib = 1u64 << 40;
    let blocks = 1 << 20;
    let content = Content::Every(u32::try_from(16 * tib / BLOCK_SIZE_U64 / blocks).unwrap());
    for at in [0, 8 * tib + 17, 16 * tib - 16_777_216] {
        // No digests: hashing what is listed would take the time of the test.
        let manners = Manners { digests: false, ..GOOD };
        let computed = Computed::new(16 * tib, content.clone(), manners);
        let count = Count::new(computed.clone());
        let counters = count.counters();
        let snapshot = Arc::new(computed.snapshot.clone());
        let cache = Cache::new(MIN_BUDGET);
        let image = Image::new(snapshot, Arc::new(count), cache.clone());
        let model = Model { len: image.len(), content: content.clone() };
        same(&image.read(at, 1).await.unwrap(), &model, (at, 1));
        assert!(counters.total() <= 4, "{} calls for the first byte", counters.total());
        image.seek_hole(at).await.unwrap();
        image.seek_data(at).await.unwrap();
        assert!(counters.total() <= 20, "{} calls for two seeks", counters.total());
        for n in 0..300u64 {
            let range = (n.wrapping_mul(0x9E37_79B9_7F4A_7C15) % (16 * tib), 10);
            same(&image.read(range.0, range.1).await.unwrap(), &model, range);
            assert!(cache.bytes() <= MIN_BUDGET);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listing_without_end_or_order_is_an_error() {
    /// A store that lists what it likes.
    #[derive(Debug)]
    struct Odd(Arc<Computed>, fn(u32) -> Vec<u32>);

    #[async_trait]
    impl SnapshotStore for Odd {
        async fn describe(&self, _: &SnapshotId) -> Result<Snapshot> {
            never()
        }
        async fn list(&self, _: Option<ListToken>) -> Result<SnapshotPage> {
            never()
        }
        async fn list_blocks(&self, _: &SnapshotId, from: ListFrom, _: usize) -> Result<BlockPage> {
            let page = match from {
                ListFrom::Index(_) => 0,
                ListFrom::Page(PageToken(token)) => token.parse().unwrap(),
            };
            let block = |index| ListedBlock {
                index: BlockIndex(index),
                token: self.0.token(index),
                digest: None,
            };
            let blocks = (self.1)(page).into_iter().map(block).collect();
            let next = Some(PageToken((page + 1).to_string()));
            Ok(BlockPage { blocks, covered: None, next, started: None })
        }
        async fn list_changed_blocks(
            &self,
            _: &SnapshotId,
            _: &SnapshotId,
            _: ListFrom,
            _: usize,
        ) -> Result<ChangedPage> {
            never()
        }
        async fn get_block(&self, id: &SnapshotId, i: BlockIndex, t: &BlockToken) -> Result<Block> {
            self.0.get_block(id, i, t).await
        }
        async fn start(&self, _: StartRequest) -> Result<Snapshot> {
            never()
        }
        async fn put_block(&self, _: &SnapshotId, _: BlockIndex, _: Block) -> Result<()> {
            never()
        }
        async fn flush(&self, _: &SnapshotId) -> Result<()> {
            never()
        }
        async fn complete(&self, _: &SnapshotId, _: CompleteRequest) -> Result<Snapshot> {
            never()
        }
        async fn delete(&self, _: &SnapshotId) -> Result<()> {
            never()
        }
        async fn set_tags(&self, _: &SnapshotId, _: Tags) -> Result<()> {
            never()
        }
    }

    type Pages = fn(u32) -> Vec<u32>;
    let odd: [(Pages, ErrorKind); 4] = [
        (|_| vec![], ErrorKind::Unavailable),
        (|_| vec![3, 2], ErrorKind::Corrupt),
        (|_| vec![5, 5], ErrorKind::Corrupt),
        (|page| vec![9 - page], ErrorKind::Corrupt),
    ];
    for (pages, kind) in odd {
        let computed = Computed::new(GIB, Content::Every(1), GOOD);
        let snapshot = Arc::new(computed.snapshot.clone());
        let image = Image::new(snapshot, Arc::new(Odd(computed, pages)), Cache::new(MIN_BUDGET));
        assert_eq!(image.read(0, 1).await.unwrap_err().kind(), kind);
        assert_eq!(image.seek_data(0).await.unwrap_err().kind(), kind);
    }
}

/// The edges of what everything is compared with.
#[test]
fn the_model_knows_what_it_says() {
    let blocks = BTreeMap::from([(0, true), (1, false), (3, true)]);
    let model = Model { len: 3 * BLOCK_SIZE_U64 + 5, content: Content::Chosen(blocks) };
    assert_eq!(model.next_data(1), Some(1));
    assert_eq!(model.next_data(BLOCK_SIZE_U64), Some(3 * BLOCK_SIZE_U64));
    assert_eq!(model.next_hole(3 * BLOCK_SIZE_U64), Some(model.len));
    assert_eq!(model.next_hole(7), Some(BLOCK_SIZE_U64));
    assert_eq!(model.next_hole(model.len), None);
    assert_eq!(model.read(3 * BLOCK_SIZE_U64 + 3, 9), data(3)[3..5]);
}
