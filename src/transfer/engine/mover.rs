//! Moving the blocks: a planner, tasks, and who watches over them.

use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use futures::stream::{self, FuturesUnordered};
use futures::{StreamExt as _, TryStreamExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::Run;
use super::lane::{LEAVE, Lane, count};
use crate::model::{Block, BlockIndex, Digest};
use crate::store::{ErrorKind, ListedBlock};
use crate::transfer::sink::Step;
use crate::transfer::source::{Change, Source};
use crate::transfer::{Error, Result, spawned};

/// How long nothing may move: no block is read, compared or acknowledged.
pub(super) const STALL: Duration = Duration::from_mins(1);

/// How often it is looked whether anything moves. It has stalled when two looks after each other say so: a process
/// that was stopped, and goes on, has not seen yet what moved.
const LOOK: Duration = Duration::from_secs(1);

/// A block or a run of zeros that a lane gets.
struct Wanted {
    lane: Arc<Lane>,
    step: Step,
    /// What an earlier run has brought there.
    done: Option<Digest>,
}

/// A block that is read, and what it is read for.
struct Piece {
    index: BlockIndex,
    listed: Option<ListedBlock>,
    wanted: Vec<Wanted>,
}

enum Task {
    /// Reads blocks, and brings them where they are wanted.
    Blocks { pieces: Vec<Piece>, room: OwnedSemaphorePermit },
    /// Makes blocks of one lane zeros.
    Zeros(Wanted),
}

/// Moves the blocks.
pub(super) struct Mover {
    source: Arc<dyn Source>,
    lanes: Vec<Arc<Lane>>,
    run: Run,
    tasks_at_once: usize,
    settling: Duration,
    /// Runs of blocks that are read from a disk and hashed at the same time.
    reads: Semaphore,
    /// Tasks that are under way.
    tasks: TaskTracker,
    /// When something was done last.
    moved: Mutex<Instant>,
    /// A sink has taken something.
    has_begun: AtomicBool,
    /// The planner waits for others to give memory back.
    waits_for_memory: AtomicBool,
}

impl Mover {
    pub(super) fn new(source: Arc<dyn Source>, lanes: Vec<Arc<Lane>>, run: &Run) -> Arc<Self> {
        let reads = source.parallelism().max(1);
        let sinks = lanes.iter().map(|lane| lane.sink.parallelism()).max().unwrap_or(1);
        Arc::new(Self {
            // While some are read others are written.
            tasks_at_once: reads + sinks.div_ceil(source.run_len()),
            settling: lanes.iter().map(|lane| lane.sink.settling()).max().unwrap_or_default(),
            source,
            lanes,
            run: run.clone(),
            reads: Semaphore::new(reads),
            tasks: TaskTracker::new(),
            moved: Mutex::new(Instant::now()),
            has_begun: AtomicBool::new(false),
            waits_for_memory: AtomicBool::new(false),
        })
    }

    /// Runs until all is moved, no lane is left, or it fails for all of them; then no task is under way any more.
    pub(super) async fn run(self: &Arc<Self>) -> Result<()> {
        let moved = self.run.unless_stopped(self.move_all()).await.flatten();
        self.tasks.close();
        // Those that were ended come to it as soon as they wait for anything.
        if tokio::time::timeout(LEAVE, self.tasks.wait()).await.is_err() {
            tracing::warn!("a block that nobody waits for any more is still on its way");
        }
        moved
    }

    async fn move_all(self: &Arc<Self>) -> Result<()> {
        let (sender, mut receiver) = mpsc::channel(1);
        let planner = spawned(Arc::clone(self).plan(sender));
        let tasks = stream::poll_fn(|cx| receiver.poll_recv(cx));
        let work = tasks
            .map(|task| spawned(self.tasks.track_future(Arc::clone(self).execute(task))))
            .buffer_unordered(self.tasks_at_once);
        let mut work = std::pin::pin!(work);
        let mut flushes = FuturesUnordered::new();
        let (mut is_done, mut late) = (false, 0);
        while !is_done || !flushes.is_empty() {
            tokio::select! {
                biased;
                // It is for what was taken before, and moves nothing itself.
                Some(()) = flushes.next() => {}
                next = work.next(), if !is_done => match next {
                    Some(done) => done?,
                    None => is_done = true,
                },
                () = tokio::time::sleep(LOOK) => {
                    if self.is_held_up() {
                        self.step();
                    }
                    // The first block may have to wait until the store knows the snapshot.
                    let has_begun = self.has_begun.load(Ordering::Relaxed);
                    let patience = if has_begun { STALL } else { STALL + self.settling };
                    late = if self.moved().elapsed() < patience { 0 } else { late + 1 };
                    if late == 2 {
                        let hangs = |lane: &&Arc<Lane>| lane.is_busy();
                        let hanging: Vec<_> = self.lanes.iter().filter(hangs).collect();
                        if hanging.is_empty() {
                            return Err(Error::Stalled(patience));
                        }
                        // They hold the others back no longer.
                        for lane in hanging {
                            lane.fail(&Error::Stalled(patience));
                        }
                        self.step();
                    }
                }
            }
            if self.lanes.iter().all(|lane| lane.has_failed()) {
                return Ok(());
            }
            for lane in self.lanes.iter().filter(|_| !is_done) {
                if let Some(blocks) = lane.to_flush() {
                    let lane = Arc::clone(lane);
                    flushes.push(spawned(async move {
                        lane.unless_failed(lane.flush(blocks)).await;
                    }));
                }
            }
        }
        planner.await
    }

    fn moved(&self) -> MutexGuard<'_, Instant> {
        self.moved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something was done.
    fn step(&self) {
        *self.moved() = Instant::now();
    }

    /// A sink has taken something.
    fn was_taken(&self) {
        self.has_begun.store(true, Ordering::Relaxed);
        self.step();
    }

    /// Whether nothing can be expected to move, since all the memory is others', or the source waits for others.
    fn is_held_up(&self) -> bool {
        let waits = self.waits_for_memory.load(Ordering::Relaxed) || self.source.is_waiting();
        self.tasks.is_empty() && waits
    }

    /// Hands out what is to be done, in order, until there is nothing more, or nobody takes it.
    async fn plan(self: Arc<Self>, tasks: mpsc::Sender<Task>) -> Result<()> {
        let run_len = self.source.run_len().min(self.run.memory.most);
        let mut changes = self.source.changes().peekable();
        while let Some(change) = changes.try_next().await? {
            self.step();
            let mut blocks = match change {
                Change::Zeros(range) => {
                    self.plan_zeros(range, &tasks).await?;
                    continue;
                }
                Change::Data(index, listed) => vec![(index, listed)],
            };
            // As many as are read together, but no more than are known without waiting.
            let is_data = |change: &Result<Change>| matches!(change, Ok(Change::Data(..)));
            while blocks.len() < run_len
                && let Poll::Ready(Some(Ok(Change::Data(index, listed)))) =
                    futures::poll!(Pin::new(&mut changes).next_if(is_data))
            {
                blocks.push((index, listed));
            }
            self.plan_blocks(blocks, &tasks).await?;
        }
        Ok(())
    }

    async fn plan_blocks(
        &self,
        blocks: Vec<(BlockIndex, Option<ListedBlock>)>,
        tasks: &mpsc::Sender<Task>,
    ) -> Result<()> {
        let mut pieces = Vec::with_capacity(blocks.len());
        for (index, listed) in blocks {
            let known = listed.as_ref().and_then(|listed| listed.digest);
            let mut wanted = Vec::with_capacity(self.lanes.len());
            for lane in self.lanes.iter().filter(|lane| !lane.has_failed()) {
                if let Some(step) = lane.absorb(lane.sink.plan(index).await) {
                    wanted.push(Wanted::new(lane, step, known));
                }
            }
            pieces.push(Piece { index, listed, wanted });
        }
        self.waits_for_memory.store(true, Ordering::Relaxed);
        let room = self.run.memory.take(pieces.len()).await;
        self.waits_for_memory.store(false, Ordering::Relaxed);
        hand_out(tasks, Task::Blocks { pieces, room }).await
    }

    async fn plan_zeros(&self, range: Range<BlockIndex>, tasks: &mpsc::Sender<Task>) -> Result<()> {
        for lane in &self.lanes {
            let mut nothing_to_do = count(&range);
            let mut steps = lane.sink.plan_zeros(range.clone());
            while !lane.has_failed()
                && let Some(Some(step)) = lane.absorb(steps.try_next().await)
            {
                self.step();
                nothing_to_do = nothing_to_do.saturating_sub(count(&step.blocks));
                let wanted = Wanted::new(lane, step, Some(Digest::OF_ZEROS));
                hand_out(tasks, Task::Zeros(wanted)).await?;
            }
            lane.are_done(nothing_to_do);
        }
        Ok(())
    }

    async fn execute(self: Arc<Self>, task: Task) -> Result<()> {
        match task {
            Task::Zeros(wanted) => self.bring(wanted, Block::Zero).await,
            Task::Blocks { pieces, room } => {
                self.execute_blocks(pieces).await?;
                drop(room);
            }
        }
        Ok(())
    }

    async fn execute_blocks(self: &Arc<Self>, mut pieces: Vec<Piece>) -> Result<()> {
        if !self.source.is_read_again() {
            for piece in &mut pieces {
                self.leave_out_done(piece).await;
            }
        }
        pieces.retain(|piece| !piece.wanted.is_empty());
        if pieces.is_empty() {
            return Ok(());
        }
        let blocks: Vec<_> = pieces.iter().map(|p| (p.index, p.listed.clone())).collect();
        let read = {
            let _turn = self.reads.acquire().await.expect("it is never closed");
            self.source.read(&blocks).await
        };
        self.step();
        let blocks = match read {
            Err(error) if error.kind() == Some(ErrorKind::Corrupt) && pieces.len() == 1 => {
                for Wanted { lane, step, .. } in &pieces[0].wanted {
                    lane.show(&step.blocks, Some(&error));
                    if lane.absorb(lane.sink.damaged(step.index(), error.clone())).is_some() {
                        lane.are_done(1);
                    }
                }
                return Ok(());
            }
            // Each for itself: the others are as they should be.
            Err(error) if error.kind() == Some(ErrorKind::Corrupt) => {
                for piece in pieces {
                    Box::pin(self.execute_blocks(vec![piece])).await?;
                }
                return Ok(());
            }
            Err(error) => {
                for Wanted { lane, step, .. } in pieces.iter().flat_map(|piece| &piece.wanted) {
                    lane.show(&step.blocks, Some(&error));
                }
                return Err(error);
            }
            Ok(blocks) => blocks,
        };
        let mut brought = Vec::new();
        for (piece, block) in pieces.into_iter().zip(blocks) {
            brought.extend(piece.wanted.into_iter().map(|wanted| (wanted, block.clone())));
        }
        if brought.len() == 1 {
            let (wanted, block) = brought.remove(0);
            self.bring(wanted, block).await;
            return Ok(());
        }
        // Each in a task of its own: to make a block ready for its store may take a while.
        let brought = brought.into_iter().map(|(wanted, block)| {
            let mover = Arc::clone(self);
            spawned(self.tasks.track_future(async move { mover.bring(wanted, block).await }))
        });
        futures::future::join_all(brought).await;
        Ok(())
    }

    /// Leaves out what an earlier run has brought, if it is there still.
    async fn leave_out_done(&self, piece: &mut Piece) {
        for mut wanted in std::mem::take(&mut piece.wanted) {
            let Some(digest) = wanted.done.take() else {
                piece.wanted.push(wanted);
                continue;
            };
            let lane = &wanted.lane;
            match lane.absorb(lane.sink.has_still(piece.index, digest).await) {
                Some(true) => {
                    lane.keep(&wanted.step, digest);
                    lane.show(&wanted.step.blocks, None);
                    self.was_taken();
                }
                Some(false) => piece.wanted.push(wanted),
                None => {}
            }
        }
    }

    /// Brings a block where it is wanted, unless an earlier run has brought the same.
    async fn bring(&self, Wanted { lane, step, done }: Wanted, block: Block) {
        let (index, digest) = (step.index(), block.digest());
        if lane.has_failed() {
            return;
        }
        if done == Some(digest) {
            lane.keep(&step, digest);
            lane.show(&step.blocks, None);
        } else {
            if self.source.is_read_again() {
                lane.journal.beginning(index);
            }
            match lane.write(step, block).await {
                Some(true) => drop(lane.absorb(lane.acknowledge(index, digest))),
                Some(false) if self.source.is_read_again() => lane.journal.spared(index),
                Some(false) | None => {}
            }
        }
        self.was_taken();
    }
}

impl Wanted {
    /// What an earlier run has brought counts if it is what is `known` to be there now, if anything is.
    fn new(lane: &Arc<Lane>, mut step: Step, known: Option<Digest>) -> Self {
        step.is_stale = lane.journal.was_begun(step.index());
        let done = lane.journal.digest(step.index());
        let done = done.filter(|done| known.is_none_or(|known| known == *done));
        Self { lane: Arc::clone(lane), step, done }
    }
}

/// Fails only where nobody waits for the planner any more.
async fn hand_out(tasks: &mpsc::Sender<Task>, task: Task) -> Result<()> {
    tasks.send(task).await.map_err(|_| Error::Stopped)
}
