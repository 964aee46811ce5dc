//! The one way in which blocks get from a source to sinks.
//!
//! A planner follows the source in ascending order, asks each sink what is to be done there, takes room in memory,
//! and hands out tasks. A task reads a few blocks and brings each to every sink. Tasks run beside each other and
//! end in any order. What a sink has taken durably is noted in its journal.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use futures::stream::{self, BoxStream, FuturesUnordered};
use futures::{StreamExt as _, TryStreamExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::journal::Journal;
use super::sink::{Content, Finished, Sink, Step};
use super::source::{Change, Source};
use super::{Error, Result, SharedProgress, Silent, concurrent_runs, spawned};
use crate::model::{BLOCK_SIZE, Block, BlockIndex, Digest};
use crate::store::{ErrorKind, ListedBlock};

#[cfg(test)]
mod tests;

/// How long nothing may move: no block is read, compared or acknowledged.
const STALL: Duration = Duration::from_mins(1);

/// Blocks that are acknowledged between two notes that they are durable: 512 MiB; and the time, if fewer are.
const BETWEEN_FLUSHES: usize = 1024;
const FLUSH_AFTER: Duration = Duration::from_secs(10);

/// How long a transfer that stops tries to make durable what it has.
const LEAVE: Duration = Duration::from_secs(10);

/// Memory that the blocks under way of one command take, unless it is part of something with a budget: those of
/// the largest number of requests, and as many that are about to be read.
const COMMAND_MEMORY: usize = 64 << 20;

/// Memory that the blocks under way of transfers share.
#[derive(Clone, Debug)]
pub struct Memory {
    blocks: Arc<Semaphore>,
    most: usize,
}

impl Memory {
    /// A budget of so many bytes, but room for one run of blocks at least.
    pub fn new(bytes: usize) -> Self {
        let most = (bytes / BLOCK_SIZE).max(super::run_len());
        Self { blocks: Arc::new(Semaphore::new(most)), most }
    }

    async fn take(&self, blocks: usize) -> OwnedSemaphorePermit {
        let blocks = u32::try_from(blocks).expect("a run is short");
        let room = Arc::clone(&self.blocks).acquire_many_owned(blocks).await;
        room.expect("it is never closed")
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self::new(COMMAND_MEMORY)
    }
}

/// How a transfer is run.
#[derive(Clone)]
pub struct Run {
    /// Learns of what was done.
    pub progress: SharedProgress,
    /// What its blocks take room in.
    pub memory: Memory,
    /// Stops it; what was begun is left, if it can go on.
    pub stop: CancellationToken,
    /// Gives it up; what was begun is removed.
    pub cancel: CancellationToken,
}

impl Default for Run {
    fn default() -> Self {
        Self {
            progress: Arc::new(Silent),
            memory: Memory::default(),
            stop: CancellationToken::new(),
            cancel: CancellationToken::new(),
        }
    }
}

impl std::fmt::Debug for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Run").field("memory", &self.memory).finish_non_exhaustive()
    }
}

/// A sink, and the journal of what it has.
#[derive(Clone, Debug)]
pub(crate) struct Destination {
    pub(crate) sink: Arc<dyn Sink>,
    pub(crate) journal: Arc<dyn Journal>,
}

/// Brings everything that the source has to each sink.
///
/// One that fails does not stop the others. The slowest holds back no more than what fits into the memory. When
/// this returns each sink is finished, has been aborted, or is left as its journal says, to go on later.
pub(crate) async fn transfer(
    source: Arc<dyn Source>,
    destinations: Vec<Destination>,
    run: &Run,
) -> Vec<Result<Finished>> {
    let lanes: Arc<[Lane]> = destinations.into_iter().map(Lane::new).collect();
    let moved = Mover::new(&source, &lanes, run).run().await;
    let whole = match moved {
        Ok(()) => source.check().await,
        error => error,
    };
    // All at once: each may have to wait for its store.
    let ends = lanes.iter().map(|lane| async {
        let error = lane.state().failed.take().or_else(|| whole.clone().err());
        match error {
            None => lane.finish().await,
            Some(error) => {
                lane.end(&error).await;
                Err(error)
            }
        }
    });
    futures::future::join_all(ends).await
}

/// The same for one sink.
pub(crate) async fn transfer_to(
    source: Arc<dyn Source>,
    sink: Arc<dyn Sink>,
    journal: Arc<dyn Journal>,
    run: &Run,
) -> Result<Finished> {
    let destination = Destination { sink, journal };
    transfer(source, vec![destination], run).await.pop().expect("there is one sink")
}

/// One sink of a transfer.
#[derive(Debug)]
struct Lane {
    sink: Arc<dyn Sink>,
    journal: Arc<dyn Journal>,
    state: Mutex<LaneState>,
}

#[derive(Debug, Default)]
struct LaneState {
    /// Why it gets nothing more.
    failed: Option<Error>,
    /// What it has taken, and may lose.
    acknowledged: Vec<(BlockIndex, Digest)>,
    is_flushing: bool,
    flushed: Option<Instant>,
}

impl Lane {
    fn new(destination: Destination) -> Self {
        let Destination { sink, journal } = destination;
        Self { sink, journal, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, LaneState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_failed(&self) -> bool {
        self.state().failed.is_some()
    }

    /// What came of something that was done for it alone; its first error ends it.
    fn absorb<T>(&self, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.state().failed.get_or_insert(error);
                None
            }
        }
    }

    /// Notes that it has taken a block.
    fn acknowledge(&self, index: BlockIndex, digest: Digest) -> Result<()> {
        if !self.sink.needs_flush() {
            return self.journal.note(&[(index, digest)]);
        }
        self.state().acknowledged.push((index, digest));
        Ok(())
    }

    /// What it has taken, if it is time to make that durable; whoever asks does so.
    fn to_flush(&self) -> Option<Vec<(BlockIndex, Digest)>> {
        let mut state = self.state();
        if !self.journal.is_kept() {
            state.acknowledged.clear();
        }
        let since = *state.flushed.get_or_insert_with(Instant::now);
        let blocks = state.acknowledged.len();
        let is_due = blocks >= BETWEEN_FLUSHES || since.elapsed() >= FLUSH_AFTER;
        if blocks == 0 || state.is_flushing || !is_due {
            return None;
        }
        state.is_flushing = true;
        Some(std::mem::take(&mut state.acknowledged))
    }

    /// Makes durable and notes what it has taken.
    async fn flush(&self, blocks: Vec<(BlockIndex, Digest)>) -> Result<()> {
        let flushed = match self.sink.flush().await {
            Ok(()) => self.journal.note(&blocks),
            error => error,
        };
        let mut state = self.state();
        (state.is_flushing, state.flushed) = (false, Some(Instant::now()));
        flushed
    }

    /// The same of all that is left.
    async fn flush_rest(&self) -> Result<()> {
        if !self.sink.needs_flush() || !self.journal.is_kept() {
            return Ok(());
        }
        let rest = std::mem::take(&mut self.state().acknowledged);
        self.flush(rest).await
    }

    async fn finish(&self) -> Result<Finished> {
        // Whoever goes on with a completion that was cut short must have nothing to put: nothing is taken any more.
        let finished = match self.flush_rest().await {
            Ok(()) => self.sink.finish().await,
            Err(error) => Err(error),
        };
        match &finished {
            Ok(_) => self.journal.forget(),
            Err(error) => self.end(error).await,
        }
        finished
    }

    /// Leaves it to go on later, if that may come to more; else removes what was begun.
    async fn end(&self, error: &Error) {
        if self.journal.outlasts(error) {
            let flushed = tokio::time::timeout(LEAVE, self.flush_rest()).await;
            if !flushed.is_ok_and(|flushed| flushed.is_ok()) {
                tracing::warn!("what was sent last may have to be sent again");
            }
        } else {
            self.sink.abort().await;
            self.journal.forget();
        }
    }
}

/// Shows that a transfer moves, or only waits for memory.
#[derive(Debug)]
struct Activity {
    began: Instant,
    /// Milliseconds after that when something was done last.
    moved: AtomicU64,
    /// Tasks that are under way.
    tasks: AtomicU64,
    /// A sink has taken something.
    has_begun: AtomicBool,
    /// The planner waits for others to give memory back.
    waits_for_memory: AtomicBool,
}

impl Activity {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            moved: AtomicU64::new(0),
            tasks: AtomicU64::new(0),
            has_begun: AtomicBool::new(false),
            waits_for_memory: AtomicBool::new(false),
        }
    }

    /// Something was done.
    fn step(&self) {
        let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.moved.store(now, Ordering::Relaxed);
    }

    /// When something was done last.
    fn moved(&self) -> Instant {
        self.began + Duration::from_millis(self.moved.load(Ordering::Relaxed))
    }

    /// Whether nothing can be expected to move, since all the memory is others'.
    fn is_held_up(&self) -> bool {
        self.tasks.load(Ordering::Relaxed) == 0 && self.waits_for_memory.load(Ordering::Relaxed)
    }
}

/// A block that is read, and what it is read for.
#[derive(Debug)]
struct Piece {
    index: BlockIndex,
    listed: Option<ListedBlock>,
    /// The lanes that get it, and what an earlier run has brought there.
    steps: Vec<(usize, Step, Option<Digest>)>,
}

#[derive(Debug)]
enum Task {
    /// Reads blocks, and brings them where they are wanted.
    Blocks { pieces: Vec<Piece>, room: OwnedSemaphorePermit },
    /// Makes blocks of one lane zeros.
    Zeros { lane: usize, step: Step },
}

/// Moves the blocks.
struct Mover {
    shared: Arc<Shared>,
    run: Run,
    tasks_at_once: usize,
    settling: Duration,
}

#[derive(Debug)]
struct Shared {
    source: Arc<dyn Source>,
    lanes: Arc<[Lane]>,
    activity: Activity,
    /// Runs of blocks that are read from a disk and hashed at the same time.
    reads: Semaphore,
}

impl Mover {
    fn new(source: &Arc<dyn Source>, lanes: &Arc<[Lane]>, run: &Run) -> Self {
        let sinks = lanes.iter().map(|lane| lane.sink.parallelism()).max().unwrap_or(1);
        let run_len = source.run_len();
        let reads = source.parallelism().div_ceil(run_len).max(1);
        // What is read while all that can be written is under way.
        let ahead = if run_len > 1 { concurrent_runs() } else { 0 };
        Self {
            tasks_at_once: sinks.div_ceil(run_len).max(reads) + ahead,
            settling: lanes.iter().map(|lane| lane.sink.settling()).max().unwrap_or_default(),
            shared: Arc::new(Shared {
                source: Arc::clone(source),
                lanes: Arc::clone(lanes),
                activity: Activity::new(),
                reads: Semaphore::new(reads),
            }),
            run: run.clone(),
        }
    }

    /// Runs until all is moved, no lane is left, or it fails for all of them.
    async fn run(&self) -> Result<()> {
        let (sender, mut receiver) = mpsc::channel(1);
        let (shared, run) = (Arc::clone(&self.shared), self.run.clone());
        let planner = tokio::spawn(async move { shared.plan(&run, sender).await });
        let planner = AbortOnDropHandle::new(planner);
        let tasks = stream::poll_fn(move |cx| receiver.poll_recv(cx));
        let work = tasks
            .map(|task| {
                let (shared, progress) = (Arc::clone(&self.shared), Arc::clone(&self.run.progress));
                spawned(async move { shared.execute(task, &progress).await })
            })
            .buffer_unordered(self.tasks_at_once);
        let mut work = std::pin::pin!(work);
        let mut flushes = FuturesUnordered::new();
        let lanes = &self.shared.lanes;
        let (activity, mut is_done) = (&self.shared.activity, false);
        loop {
            // The first block may have to wait until the store knows the snapshot.
            let has_begun = activity.has_begun.load(Ordering::Relaxed);
            let patience = if has_begun { STALL } else { STALL + self.settling };
            tokio::select! {
                biased;
                () = self.run.cancel.cancelled() => return Err(Error::Cancelled),
                () = self.run.stop.cancelled() => return Err(Error::Stopped),
                Some((lane, flushed)) = flushes.next() => {
                    let lane: usize = lane;
                    lanes[lane].absorb(flushed);
                    activity.step();
                }
                next = work.next(), if !is_done => match next {
                    Some(done) => done?,
                    None => is_done = true,
                },
                () = tokio::time::sleep_until(activity.moved() + patience) => {
                    if activity.is_held_up() {
                        activity.step();
                    } else if activity.moved().elapsed() >= patience {
                        return Err(Error::Stalled(patience));
                    }
                }
            }
            if is_done && flushes.is_empty() {
                break;
            }
            if lanes.iter().all(Lane::has_failed) {
                return Ok(());
            }
            for (n, lane) in lanes.iter().enumerate().filter(|_| !is_done) {
                let Some(blocks) = lane.to_flush() else { continue };
                let shared = Arc::clone(&self.shared);
                let flushed = async move { shared.lanes[n].flush(blocks).await };
                flushes.push(async move { (n, spawned(flushed).await) });
            }
        }
        match planner.await {
            Ok(planned) => planned,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

impl Shared {
    /// Hands out what is to be done, in order, until there is nothing more, or nobody takes it.
    async fn plan(&self, run: &Run, tasks: mpsc::Sender<Task>) -> Result<()> {
        let run_len = self.source.run_len().min(run.memory.most);
        let mut units = Units { changes: self.source.changes().fuse(), held: None, run_len };
        while let Some(unit) = units.next().await? {
            self.activity.step();
            let taken = match unit {
                Unit::Blocks(blocks) => self.plan_blocks(blocks, run, &tasks).await?,
                Unit::Zeros(range) => self.plan_zeros(&range, &tasks).await,
            };
            if !taken {
                break;
            }
        }
        Ok(())
    }

    async fn plan_blocks(
        &self,
        blocks: Vec<ToRead>,
        run: &Run,
        tasks: &mpsc::Sender<Task>,
    ) -> Result<bool> {
        let mut pieces = Vec::with_capacity(blocks.len());
        for (index, listed) in blocks {
            pieces.push(Piece { index, listed, steps: self.steps(index).await });
        }
        self.activity.waits_for_memory.store(true, Ordering::Relaxed);
        let room = run.memory.take(pieces.len()).await;
        self.activity.waits_for_memory.store(false, Ordering::Relaxed);
        Ok(tasks.send(Task::Blocks { pieces, room }).await.is_ok())
    }

    async fn plan_zeros(&self, range: &Range<BlockIndex>, tasks: &mpsc::Sender<Task>) -> bool {
        for (n, lane) in self.lanes.iter().enumerate() {
            let mut steps = lane.sink.plan_zeros(range.clone());
            while !lane.has_failed() {
                self.activity.step();
                let Some(step) = lane.absorb(steps.try_next().await).flatten() else { break };
                if tasks.send(Task::Zeros { lane: n, step }).await.is_err() {
                    return false;
                }
            }
        }
        true
    }

    /// What is to be done with a block for each lane.
    async fn steps(&self, index: BlockIndex) -> Vec<(usize, Step, Option<Digest>)> {
        let mut steps = Vec::with_capacity(self.lanes.len());
        for (n, lane) in self.lanes.iter().enumerate().filter(|(_, lane)| !lane.has_failed()) {
            if let Some(step) = lane.absorb(lane.sink.plan(index).await) {
                steps.push((n, step, lane.journal.digest(index)));
            }
        }
        steps
    }

    async fn execute(self: Arc<Self>, task: Task, progress: &SharedProgress) -> Result<()> {
        self.activity.tasks.fetch_add(1, Ordering::Relaxed);
        let _under_way = UnderWay(&self.activity);
        match task {
            Task::Zeros { lane, step } => {
                self.bring(lane, step, Content::Block(Block::Zero)).await;
                Ok(())
            }
            Task::Blocks { pieces, room } => {
                let blocks = pieces.len() as u64;
                self.execute_blocks(pieces).await?;
                drop(room);
                progress.advance(blocks);
                Ok(())
            }
        }
    }

    async fn execute_blocks(self: &Arc<Self>, mut pieces: Vec<Piece>) -> Result<()> {
        if self.source.is_as_before() {
            self.leave_out_done(&mut pieces).await;
        }
        pieces.retain(|piece| !piece.steps.is_empty());
        if pieces.is_empty() {
            return Ok(());
        }
        let wanted: Vec<_> = pieces.iter().map(|p| (p.index, p.listed.clone())).collect();
        let read = {
            let _turn = self.reads.acquire().await.expect("it is never closed");
            self.source.read(&wanted).await
        };
        self.activity.step();
        let blocks = match read {
            Ok(blocks) => blocks,
            Err(error) if error.kind() == Some(ErrorKind::Corrupt) && pieces.len() == 1 => {
                for (lane, ..) in &pieces[0].steps {
                    let lane = &self.lanes[*lane];
                    lane.absorb(lane.sink.damaged(pieces[0].index, error.clone()));
                }
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let mut brought = Vec::new();
        for (piece, block) in pieces.into_iter().zip(blocks) {
            for (lane, mut step, done) in piece.steps {
                let content = match done {
                    Some(digest) if digest == block.digest() => Content::Done(digest),
                    Some(_) => {
                        step.is_stale = true;
                        Content::Block(block.clone())
                    }
                    None => Content::Block(block.clone()),
                };
                brought.push((lane, step, content));
            }
        }
        if let [(lane, step, content)] = &brought[..] {
            self.bring(*lane, step.clone(), content.clone()).await;
            return Ok(());
        }
        // Each in a task of its own: to make a block ready for its store may take a while.
        let brought = brought.into_iter().map(|(lane, step, content)| {
            let shared = Arc::clone(self);
            spawned(async move { shared.bring(lane, step, content).await })
        });
        futures::future::join_all(brought).await;
        Ok(())
    }

    /// Leaves out what an earlier run has brought, if it is there still.
    async fn leave_out_done(&self, pieces: &mut [Piece]) {
        for piece in pieces {
            let mut left = Vec::with_capacity(piece.steps.len());
            for (n, step, done) in std::mem::take(&mut piece.steps) {
                let lane = &self.lanes[n];
                let Some(digest) = done else {
                    left.push((n, step, None));
                    continue;
                };
                match lane.absorb(lane.sink.has_still(piece.index, digest).await) {
                    Some(true) => self.bring(n, step, Content::Done(digest)).await,
                    Some(false) => left.push((n, step, None)),
                    None => {}
                }
            }
            piece.steps = left;
        }
    }

    async fn bring(&self, lane: usize, step: Step, content: Content) {
        let lane = &self.lanes[lane];
        if lane.has_failed() {
            return;
        }
        let (index, is_new) = (step.index(), matches!(content, Content::Block(_)));
        let written = lane.absorb(lane.sink.write(step, content).await);
        if let Some(Some(digest)) = written
            && is_new
        {
            lane.absorb(lane.acknowledge(index, digest));
        }
        self.activity.has_begun.store(true, Ordering::Relaxed);
        self.activity.step();
    }
}

/// A task that is under way.
struct UnderWay<'a>(&'a Activity);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.tasks.fetch_sub(1, Ordering::Relaxed);
    }
}

type ToRead = (BlockIndex, Option<ListedBlock>);

/// What is planned at a time.
enum Unit {
    Blocks(Vec<ToRead>),
    Zeros(Range<BlockIndex>),
}

/// The changes of a source, in units.
struct Units {
    changes: stream::Fuse<BoxStream<'static, Result<Change>>>,
    held: Option<Change>,
    run_len: usize,
}

impl Units {
    /// The next unit: as many blocks as are read together, but no more than are known without waiting.
    async fn next(&mut self) -> Result<Option<Unit>> {
        let first = match self.held.take() {
            Some(change) => Some(change),
            None => self.changes.try_next().await?,
        };
        let mut blocks = match first {
            None => return Ok(None),
            Some(Change::Zeros(range)) => return Ok(Some(Unit::Zeros(range))),
            Some(Change::Data(index, listed)) => vec![(index, listed)],
        };
        while blocks.len() < self.run_len {
            match futures::poll!(self.changes.next()) {
                Poll::Ready(Some(Ok(Change::Data(index, listed)))) => blocks.push((index, listed)),
                Poll::Ready(Some(change)) => {
                    self.held = Some(change?);
                    break;
                }
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        Ok(Some(Unit::Blocks(blocks)))
    }
}
