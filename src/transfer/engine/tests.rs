//! Fakes of both ends, and transfers between them that come to their end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use proptest::prelude::*;
use tokio::time::Instant;

use super::mover::STALL;
use super::*;
use crate::model::{Block, BlockIndex, Digest};
use crate::model::{Snapshot, SnapshotState, VolumeSize};
use crate::store::repository::Repository;
use crate::store::wrap::{Call, Count, Fail, Wrapper};
use crate::store::{ErrorKind, ListedBlock};
use crate::store::{SharedStore, StartRequest};
use crate::transfer::journal::NoJournal;
use crate::transfer::sink::Step;
use crate::transfer::sink::snapshot::{SnapshotSink, Zeros};
use crate::transfer::source::Change;
use crate::transfer::source::snapshot::SnapshotSource;

mod hanging;
mod resuming;

/// A block whose every sector names its own number and version.
fn block(index: u32, version: u32) -> Block {
    let mut bytes = Vec::with_capacity(BLOCK_SIZE);
    for sector in 0..BLOCK_SIZE / 512 {
        let number = u64::from(index) * 1024 + sector as u64;
        let text = format!("{number:016x} {version:08x} ");
        bytes.extend(text.bytes().cycle().take(512));
    }
    Block::new(bytes.into())
}

/// Blocks by their index; those that are missing are holes.
type Model = BTreeMap<u32, Block>;

/// A model, as a source: whole, or only what it speaks of.
#[derive(Debug)]
struct Given {
    blocks: Model,
    end: u32,
    /// Blocks to be dropped, where it is not whole.
    dropped: Option<BTreeSet<u32>>,
    run_len: usize,
    reads: AtomicU64,
    is_read_again: bool,
}

impl Given {
    fn whole(blocks: Model, end: u32) -> Self {
        let reads = AtomicU64::new(0);
        Self { blocks, end, dropped: None, run_len: 4, reads, is_read_again: false }
    }
}

#[async_trait]
impl Source for Given {
    fn changes(&self) -> BoxStream<'static, Result<Change>> {
        let mut changes = Vec::new();
        for index in 0..self.end {
            let is_hole = self.dropped.as_ref().is_none_or(|dropped| dropped.contains(&index));
            let range = BlockIndex(index)..BlockIndex(index + 1);
            match (self.blocks.contains_key(&index), changes.last_mut()) {
                (true, _) => changes.push(Change::Data(range.start, None)),
                (false, Some(Change::Zeros(last))) if is_hole && last.end == range.start => {
                    last.end = range.end;
                }
                (false, _) if is_hole => changes.push(Change::Zeros(range)),
                _ => {}
            }
        }
        stream::iter(changes.into_iter().map(Ok)).boxed()
    }

    fn run_len(&self) -> usize {
        self.run_len
    }

    fn parallelism(&self) -> usize {
        8 / self.run_len
    }

    async fn read(&self, blocks: &[(BlockIndex, Option<ListedBlock>)]) -> Result<Vec<Block>> {
        self.reads.fetch_add(blocks.len() as u64, Ordering::Relaxed);
        tokio::task::yield_now().await;
        Ok(blocks.iter().map(|(index, _)| self.blocks[&index.0].clone()).collect())
    }

    fn is_read_again(&self) -> bool {
        self.is_read_again
    }
}

/// A sink in memory.
#[derive(Debug)]
struct Kept {
    blocks: Mutex<Model>,
    writes: AtomicU64,
    /// It fails when it has taken so many.
    fails_after: u64,
    /// What it needs one of for each block.
    gate: Semaphore,
    is_finished: AtomicBool,
    is_aborted: AtomicBool,
}

impl Kept {
    fn new() -> Arc<Self> {
        Self::with(u64::MAX, Semaphore::MAX_PERMITS)
    }

    fn with(fails_after: u64, gate: usize) -> Arc<Self> {
        Arc::new(Self {
            blocks: Mutex::default(),
            writes: AtomicU64::new(0),
            fails_after,
            gate: Semaphore::new(gate),
            is_finished: AtomicBool::new(false),
            is_aborted: AtomicBool::new(false),
        })
    }

    fn content(&self) -> Model {
        self.blocks.lock().unwrap().clone()
    }

    fn ends(&self) -> (bool, bool) {
        (self.is_finished.load(Ordering::Relaxed), self.is_aborted.load(Ordering::Relaxed))
    }
}

#[async_trait]
impl Sink for Kept {
    async fn write(&self, step: Step, block: Block) -> Result<bool> {
        self.gate.acquire().await.unwrap().forget();
        if self.writes.fetch_add(1, Ordering::Relaxed) >= self.fails_after {
            return Err(Error::Staging(Arc::from(std::io::Error::other("it is broken"))));
        }
        self.blocks.lock().unwrap().insert(step.index().0, block);
        Ok(true)
    }

    fn keep(&self, _: &Step, _: Digest) {
        panic!("nothing was done before");
    }

    fn parallelism(&self) -> usize {
        8
    }

    async fn finish(&self) -> Result<Option<Snapshot>> {
        self.is_finished.store(true, Ordering::Relaxed);
        Ok(None)
    }

    async fn abort(&self) {
        self.is_aborted.store(true, Ordering::Relaxed);
    }
}

fn to(sink: &Arc<Kept>) -> Destination {
    Destination { sink: sink.clone(), journal: Arc::new(NoJournal), progress: Arc::new(Silent) }
}

fn image(blocks: u32) -> Model {
    (0..blocks).filter(|n| n % 7 != 3).map(|n| (n, block(n, 1))).collect()
}

#[tokio::test]
async fn brings_every_block_to_each_sink() {
    for len in [0, 1, 3, 4, 5, 130] {
        let source = Arc::new(Given::whole(image(len), 2048));
        let (a, b) = (Kept::new(), Kept::new());
        let done = transfer(source.clone(), vec![to(&a), to(&b)], &Run::default()).await;
        assert!(done.iter().all(Result::is_ok), "{done:?}");
        assert!(a.content() == image(len) && b.content() == image(len), "{len}");
        assert_eq!(source.reads.load(Ordering::Relaxed), image(len).len() as u64);
        assert_eq!([a.ends(), b.ends()], [(true, false); 2]);
    }
}

#[tokio::test]
async fn a_sink_that_fails_does_not_stop_the_others() {
    for fails_after in [0, 1, 50, 129] {
        let (bad, good) = (Kept::with(fails_after, Semaphore::MAX_PERMITS), Kept::new());
        let source = Arc::new(Given::whole((0..130).map(|n| (n, block(n, 1))).collect(), 2048));
        let done = transfer(source, vec![to(&bad), to(&good)], &Run::default()).await;
        assert!(done[0].is_err() && done[1].is_ok(), "{done:?}");
        assert_eq!((bad.ends(), good.ends()), ((false, true), (true, false)));
        assert_eq!(good.content().len(), 130);
    }
}

/// What a sink's progress has received.
#[derive(Debug, Default)]
struct Counted {
    done: AtomicU64,
    passed: AtomicU64,
    failed: AtomicU64,
}

impl Counted {
    fn counts(&self) -> [u64; 3] {
        [&self.done, &self.passed, &self.failed].map(|count| count.load(Ordering::Relaxed))
    }
}

impl crate::transfer::Progress for Counted {
    fn total(&self, _: u64) {}

    fn advance(&self, blocks: u64) {
        self.done.fetch_add(blocks, Ordering::Relaxed);
    }

    fn block(&self, _: &dyn std::fmt::Display, n: u64, failed: Option<&dyn std::fmt::Display>) {
        let count = if failed.is_some() { &self.failed } else { &self.passed };
        count.fetch_add(n, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn holes_are_done_and_blocks_pass_or_fail_for_each_sink() {
    let (bad, good) = (Kept::with(5, Semaphore::MAX_PERMITS), Kept::new());
    let counted = [Arc::new(Counted::default()), Arc::new(Counted::default())];
    let mut destinations = vec![to(&bad), to(&good)];
    for (destination, counted) in destinations.iter_mut().zip(&counted) {
        destination.progress = counted.clone();
    }
    let source = Arc::new(Given::whole(image(130), 2048));
    let _ = transfer(source, destinations, &Run::default()).await;
    let blocks = image(130).len() as u64;
    assert_eq!(counted[1].counts(), [2048, blocks, 0]);
    let [done, passed, failed] = counted[0].counts();
    assert!(passed == 5 && failed > 0 && done < 2048, "{done} {passed} {failed}");
}

#[tokio::test]
async fn the_slowest_sink_holds_back_no_more_than_the_memory() {
    let (slow, fast) = (Kept::with(u64::MAX, 0), Kept::new());
    let memory = Memory::new(16 * BLOCK_SIZE);
    let run = Run { memory: memory.clone(), ..Run::default() };
    let source: Arc<dyn Source> = Arc::new(Given::whole(image(130), 2048));
    let destinations = vec![to(&slow), to(&fast)];
    let moving = tokio::spawn(async move { transfer(source, destinations, &run).await });
    for _ in 0..500 {
        tokio::task::yield_now().await;
    }
    let ahead = fast.content().len();
    assert!((1..=memory.most).contains(&ahead), "{ahead}");
    slow.gate.add_permits(1000);
    let done = moving.await.unwrap();
    assert!(done.iter().all(Result::is_ok), "{done:?}");
    assert_eq!(memory.blocks.available_permits(), memory.most);
}

/// A journal in memory: what was begun, and the digest of what is durable.
#[derive(Debug, Default)]
struct Noted(Mutex<BTreeMap<u32, Option<Digest>>>);

impl Noted {
    fn durable(&self) -> u64 {
        self.0.lock().unwrap().values().flatten().count() as u64
    }
}

impl Journal for Noted {
    fn digest(&self, index: BlockIndex) -> Option<Digest> {
        self.0.lock().unwrap().get(&index.0).copied().flatten()
    }

    fn was_begun(&self, index: BlockIndex) -> bool {
        self.0.lock().unwrap().contains_key(&index.0)
    }

    fn beginning(&self, index: BlockIndex) {
        self.0.lock().unwrap().insert(index.0, None);
    }

    fn note(&self, blocks: &[(BlockIndex, Digest)]) -> Result<()> {
        let noted = blocks.iter().map(|(index, digest)| (index.0, Some(*digest)));
        self.0.lock().unwrap().extend(noted);
        Ok(())
    }

    fn is_kept(&self) -> bool {
        true
    }

    fn forget(&self) {
        self.0.lock().unwrap().clear();
    }
}
