//! Moving the blocks: a planner, tasks, and who watches over them.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use futures::stream::{self, BoxStream, FuturesUnordered};
use futures::{StreamExt as _, TryStreamExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::Run;
use super::lane::{LEAVE, Lane};
use crate::model::{Block, BlockIndex, Digest};
use crate::store::{ErrorKind, ListedBlock};
use crate::transfer::sink::{Content, Step};
use crate::transfer::source::{Change, Source};
use crate::transfer::{Error, Result, SharedProgress, spawned};

/// How long nothing may move: no block is read, compared or acknowledged.
pub(super) const STALL: Duration = Duration::from_mins(1);

/// How long after that it is looked a second time: a process that was stopped, and goes on, has not seen yet what
/// moved.
const SECOND_LOOK: Duration = Duration::from_secs(1);

/// Shows that a transfer moves, or only waits for memory.
#[derive(Debug)]
struct Activity {
    began: Instant,
    /// Milliseconds after that when something was done last.
    moved: AtomicU64,
    /// Tasks that are under way.
    tasks: watch::Sender<usize>,
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
            tasks: watch::Sender::new(0),
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
        *self.tasks.borrow() == 0 && self.waits_for_memory.load(Ordering::Relaxed)
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
    Zeros { lane: usize, step: Step, content: Content },
}

/// Moves the blocks.
pub(super) struct Mover {
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
    pub(super) fn new(source: &Arc<dyn Source>, lanes: &Arc<[Lane]>, run: &Run) -> Self {
        let sinks = lanes.iter().map(|lane| lane.sink.parallelism()).max().unwrap_or(1);
        let run_len = source.run_len();
        let reads = source.parallelism().div_ceil(run_len).max(1);
        Self {
            // While some are read others are written.
            tasks_at_once: reads + sinks.div_ceil(run_len),
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

    /// Runs until all is moved, no lane is left, or it fails for all of them; then no task is under way any more.
    pub(super) async fn run(&self) -> Result<()> {
        let moved = self.move_all().await;
        let mut tasks = self.shared.activity.tasks.subscribe();
        // Those that were ended come to it as soon as they wait for anything.
        let ended = tokio::time::timeout(LEAVE, tasks.wait_for(|tasks| *tasks == 0)).await;
        if ended.is_err() {
            tracing::warn!("a block that nobody waits for any more is still on its way");
        }
        moved
    }

    async fn move_all(&self) -> Result<()> {
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
        let (activity, mut is_done, mut looked) = (&self.shared.activity, false, None);
        loop {
            // The first block may have to wait until the store knows the snapshot.
            let has_begun = activity.has_begun.load(Ordering::Relaxed);
            let patience = if has_begun { STALL } else { STALL + self.settling };
            let due = looked.map_or(activity.moved() + patience, |looked| looked + SECOND_LOOK);
            tokio::select! {
                biased;
                () = self.run.cancel.cancelled() => return Err(Error::Cancelled),
                () = self.run.stop.cancelled() => return Err(Error::Stopped),
                Some((lane, flushed)) = flushes.next() => {
                    let lane: usize = lane;
                    // It is for what was taken before, and moves nothing itself.
                    lanes[lane].absorb(flushed);
                }
                next = work.next(), if !is_done => match next {
                    Some(done) => done?,
                    None => is_done = true,
                },
                () = tokio::time::sleep_until(due) => {
                    if activity.is_held_up() {
                        activity.step();
                    }
                    let has_moved = activity.moved().elapsed() < patience;
                    if looked.is_some() && !has_moved {
                        return Err(Error::Stalled(patience));
                    }
                    looked = (!has_moved).then(Instant::now);
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
                Unit::Blocks(blocks) => self.plan_blocks(blocks, run, &tasks).await,
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
    ) -> bool {
        let mut pieces = Vec::with_capacity(blocks.len());
        for (index, listed) in blocks {
            let steps = self.steps(index, listed.as_ref()).await;
            pieces.push(Piece { index, listed, steps });
        }
        self.activity.waits_for_memory.store(true, Ordering::Relaxed);
        let room = run.memory.take(pieces.len()).await;
        self.activity.waits_for_memory.store(false, Ordering::Relaxed);
        tasks.send(Task::Blocks { pieces, room }).await.is_ok()
    }

    async fn plan_zeros(&self, range: &Range<BlockIndex>, tasks: &mpsc::Sender<Task>) -> bool {
        for (n, lane) in self.lanes.iter().enumerate() {
            let mut steps = lane.sink.plan_zeros(range.clone());
            while !lane.has_failed() {
                self.activity.step();
                let Some(mut step) = lane.absorb(steps.try_next().await).flatten() else { break };
                let content = match lane.journal.digest(step.index()) {
                    Some(Digest::OF_ZEROS) => Content::Done(Digest::OF_ZEROS),
                    _ => Content::Block(Block::Zero),
                };
                step.is_stale = lane.journal.was_begun(step.index());
                if tasks.send(Task::Zeros { lane: n, step, content }).await.is_err() {
                    return false;
                }
            }
        }
        true
    }

    /// What is to be done with a block for each lane, and what an earlier run has brought there.
    async fn steps(
        &self,
        index: BlockIndex,
        listed: Option<&ListedBlock>,
    ) -> Vec<(usize, Step, Option<Digest>)> {
        let known = listed.and_then(|listed| listed.digest);
        let mut steps = Vec::with_capacity(self.lanes.len());
        for (n, lane) in self.lanes.iter().enumerate().filter(|(_, lane)| !lane.has_failed()) {
            if let Some(mut step) = lane.absorb(lane.sink.plan(index).await) {
                step.is_stale = lane.journal.was_begun(index);
                let done = lane.journal.digest(index);
                let done = done.filter(|done| known.is_none_or(|known| known == *done));
                steps.push((n, step, done));
            }
        }
        steps
    }

    async fn execute(self: Arc<Self>, task: Task, progress: &SharedProgress) -> Result<()> {
        let _under_way = UnderWay::new(&self.activity);
        match task {
            Task::Zeros { lane, step, content } => {
                self.bring(lane, step, content).await;
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
        if !self.source.is_read_again() {
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
            for (lane, step, done) in piece.steps {
                let content = match done {
                    Some(digest) if digest == block.digest() => Content::Done(digest),
                    _ => Content::Block(block.clone()),
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
        if is_new && self.source.is_read_again() {
            lane.journal.beginning(index);
        }
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

impl<'a> UnderWay<'a> {
    fn new(activity: &'a Activity) -> Self {
        activity.tasks.send_modify(|tasks| *tasks += 1);
        Self(activity)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.tasks.send_modify(|tasks| *tasks -= 1);
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
