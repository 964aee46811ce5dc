//! One sink of a transfer, with its journal: what it has taken, when that is made durable, how it ends.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Destination;
use super::mover::STALL;
use crate::model::{BlockIndex, Digest};
use crate::transfer::journal::Journal;
use crate::transfer::sink::{Finished, Sink};
use crate::transfer::{Error, Result};

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
    pub(super) fn new(destination: Destination) -> Self {
        let Destination { sink, journal } = destination;
        Self { sink, journal, state: Mutex::default() }
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
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.state().failed.get_or_insert(error);
                None
            }
        }
    }

    /// Notes that it has taken a block.
    pub(super) fn acknowledge(&self, index: BlockIndex, digest: Digest) -> Result<()> {
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
            self.sink.finish().await
        };
        let finished = tokio::select! {
            biased;
            () = cancel.cancelled() => Err(Error::Cancelled),
            finished = finish => finished,
        };
        match finished {
            Ok(finished) => {
                self.journal.forget();
                Ok(finished)
            }
            Err(error) => Err(self.end(error, cancel).await),
        }
    }

    /// Leaves it to go on later, if that may come to more, and nobody gives it up meanwhile; else removes what was
    /// begun. Answers what has ended it.
    pub(super) async fn end(&self, error: Error, cancel: &CancellationToken) -> Error {
        let mut end = error;
        if self.journal.outlasts(&end) {
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
        if !self.journal.outlasts(&end) {
            self.sink.abort().await;
            self.journal.forget();
        }
        end
    }
}
