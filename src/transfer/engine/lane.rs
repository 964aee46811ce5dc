//! One sink of a transfer, with its journal: what it has taken, when that is made durable, how it ends.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::mover::STALL;
use super::{Destination, Finished};
use crate::model::{Block, BlockIndex, Digest};
use crate::store::ErrorKind;
use crate::transfer::journal::Journal;
use crate::transfer::sink::{Sink, Step};
use crate::transfer::{Error, Result, SharedProgress};

/// Blocks that are acknowledged between two notes that they are durable: 512 MiB; and the time, if fewer are.
const BETWEEN_FLUSHES: usize = 1024;
const FLUSH_AFTER: Duration = Duration::from_secs(10);

/// How long a transfer that stops tries to make durable what it has, and waits for what it has ended.
pub(super) const LEAVE: Duration = Duration::from_secs(10);

/// One sink of a transfer.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) sink: Arc<dyn Sink>,
    pub(super) journal: Arc<dyn Journal>,
    progress: SharedProgress,
    state: Mutex<LaneState>,
    /// It has failed.
    ended: CancellationToken,
}

#[derive(Debug, Default)]
struct LaneState {
    /// Why it gets nothing more.
    failed: Option<Error>,
    /// What it has taken, and may lose.
    acknowledged: Vec<(BlockIndex, Digest)>,
    /// Blocks that its sink is about to write.
    writing: u64,
    is_flushing: bool,
    /// It has all that it gets.
    is_finishing: bool,
    flushed: Option<Instant>,
    /// Blocks that it has of its own.
    blocks: u64,
    /// Those of them that an earlier run has brought.
    kept: u64,
}

impl Lane {
    pub(super) fn new(destination: Destination) -> Self {
        let Destination { sink, journal, progress } = destination;
        let ended = CancellationToken::new();
        Self { sink, journal, progress, state: Mutex::default(), ended }
    }

    fn state(&self) -> MutexGuard<'_, LaneState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn has_failed(&self) -> bool {
        self.state().failed.is_some()
    }

    /// Why it gets nothing more, if it has failed.
    pub(super) fn failure(&self) -> Option<Error> {
        self.state().failed.clone()
    }

    /// What came of something that was done for it alone; its first error ends it.
    pub(super) fn absorb<T>(&self, result: Result<T>) -> Option<T> {
        result.inspect_err(|error| self.fail(error)).ok()
    }

    /// Ends it, unless something has before.
    pub(super) fn fail(&self, error: &Error) {
        self.state().failed.get_or_insert_with(|| error.clone());
        self.ended.cancel();
    }

    /// Whether its sink is about to write something, or to make it durable.
    pub(super) fn is_busy(&self) -> bool {
        let state = self.state();
        state.failed.is_none() && (state.writing > 0 || state.is_flushing)
    }

    /// Waits for its sink, unless it fails meanwhile.
    pub(super) async fn unless_failed<T>(
        &self,
        work: impl Future<Output = Result<T>>,
    ) -> Option<T> {
        tokio::select! {
            biased;
            () = self.ended.cancelled() => None,
            done = work => self.absorb(done),
        }
    }

    /// Writes a block, if that is needed; whether it was, unless it fails meanwhile.
    pub(super) async fn write(&self, step: Step, block: Block) -> Option<bool> {
        self.state().writing += 1;
        let blocks = step.blocks.clone();
        let write = async {
            let written = self.sink.write(step, block).await;
            self.show(&blocks, written.as_ref().err());
            written
        };
        let written = self.unless_failed(write).await;
        self.state().writing -= 1;
        written
    }

    /// Shows what came of blocks.
    pub(super) fn show(&self, blocks: &Range<BlockIndex>, failed: Option<&Error>) {
        let failed = failed.map(|error| error as &dyn fmt::Display);
        self.progress.block(&Blocks(blocks), count(blocks), failed);
        if failed.is_none() {
            self.are_done(count(blocks));
        }
    }

    /// Shows that so many blocks are done with.
    pub(super) fn are_done(&self, blocks: u64) {
        self.progress.advance(blocks);
    }

    /// Notes that it has a block that an earlier run has brought.
    pub(super) fn keep(&self, step: &Step, digest: Digest) {
        self.sink.keep(step, digest);
        let mut state = self.state();
        state.blocks += 1;
        state.kept += 1;
    }

    /// Notes that it has taken a block.
    pub(super) fn acknowledge(&self, index: BlockIndex, digest: Digest) -> Result<()> {
        self.state().blocks += 1;
        if !self.sink.needs_flush() {
            return self.journal.note(&[(index, digest)]);
        }
        self.journal.taken(index);
        self.state().acknowledged.push((index, digest));
        Ok(())
    }

    /// What it has taken, if it is time to make that durable; whoever asks does so.
    pub(super) fn to_flush(&self) -> Option<Vec<(BlockIndex, Digest)>> {
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
    pub(super) async fn flush(&self, blocks: Vec<(BlockIndex, Digest)>) -> Result<()> {
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

    pub(super) async fn finish(&self, cancel: &CancellationToken) -> Result<Finished> {
        let finish = async {
            // A store takes no block of a snapshot that it completes: a run that goes on from here must have all of
            // them on record.
            let flushed = tokio::time::timeout(STALL, self.flush_rest()).await;
            flushed.map_err(|_| Error::Stalled(STALL))??;
            self.journal.finishing();
            self.state().is_finishing = true;
            match self.sink.finish().await {
                Err(error) if is_conflict(&error) && self.journal.was_finishing() => {
                    self.sink.finished_before().await.map(Some).ok_or(error)
                }
                finished => finished,
            }
        };
        let finished = tokio::select! {
            biased;
            () = cancel.cancelled() => Err(Error::Cancelled),
            finished = finish => finished,
        };
        match finished {
            Ok(snapshot) => {
                self.journal.forget();
                let (state, compared) = (self.state(), self.sink.compared());
                Ok(Finished { blocks: state.blocks, kept: state.kept, compared, snapshot })
            }
            Err(error) => Err(self.end(error, cancel).await),
        }
    }

    /// Whether a later run may go on. Not where a store that gathers takes no more blocks since an earlier run wanted
    /// to finish: that went away with its process.
    fn outlasts(&self, end: &Error) -> bool {
        let takes_no_more =
            is_conflict(end) && self.journal.was_finishing() && !self.state().is_finishing;
        self.journal.outlasts(end) && !(takes_no_more && self.sink.needs_flush())
    }

    /// Leaves it to go on later, if that may come to more, and nobody gives it up meanwhile; else removes what was
    /// begun. Answers what has ended it.
    pub(super) async fn end(&self, mut end: Error, cancel: &CancellationToken) -> Error {
        if self.outlasts(&end) {
            tokio::select! {
                biased;
                () = cancel.cancelled() => end = Error::Cancelled,
                flushed = tokio::time::timeout(LEAVE, self.flush_rest()) => {
                    if !flushed.is_ok_and(|flushed| flushed.is_ok()) {
                        tracing::warn!("what was sent last may have to be sent again");
                    }
                    return end;
                }
            }
        }
        if !self.outlasts(&end) {
            self.sink.abort().await;
            self.journal.forget();
        }
        end
    }
}

fn is_conflict(error: &Error) -> bool {
    error.kind() == Some(ErrorKind::Conflict)
}

/// How many they are.
pub(super) fn count(blocks: &Range<BlockIndex>) -> u64 {
    u64::from(blocks.end.0 - blocks.start.0)
}

/// Blocks, in words.
struct Blocks<'a>(&'a Range<BlockIndex>);

impl fmt::Display for Blocks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Range { start, end } = self.0;
        match count(self.0) {
            1 => write!(f, "block {start}"),
            _ => write!(f, "blocks {start} to {}", end.0 - 1),
        }
    }
}
