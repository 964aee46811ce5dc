//! The one way in which blocks get from a source to sinks.
//!
//! A planner follows the source in ascending order, asks each sink what is to be done there, takes room in memory,
//! and hands out tasks. A task reads a few blocks and brings each to every sink. Tasks run beside each other and
//! end in any order. What a sink has taken durably is noted in its journal.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use self::lane::Lane;
use self::mover::Mover;
use super::journal::Journal;
use super::sink::{Finished, Sink};
use super::source::Source;
use super::{Error, Result, SharedProgress, Silent, sink};
use crate::model::BLOCK_SIZE;

mod lane;
mod mover;
#[cfg(test)]
mod tests;

/// Memory of the blocks that one command has under way: 100 requests of a service, and some blocks that are read
/// meanwhile.
const COMMAND_MEMORY: usize = 64 << 20;

/// How long a transfer takes at most to end that is given up.
pub(crate) const ENDS_WITHIN: Duration = lane::LEAVE.saturating_add(sink::snapshot::ABORT);

/// Memory that the blocks under way of transfers share.
#[derive(Clone, Debug)]
pub(crate) struct Memory {
    blocks: Arc<Semaphore>,
    most: usize,
}

impl Memory {
    /// A budget of so many bytes, but room for one run of blocks at least.
    pub(crate) fn new(bytes: usize) -> Self {
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
pub(crate) struct Run {
    /// Learns of what was done.
    pub(crate) progress: SharedProgress,
    /// What its blocks take room in.
    pub(crate) memory: Memory,
    /// Stops it; what was begun is left, if it can go on.
    pub(crate) stop: CancellationToken,
    /// Gives it up; what was begun is removed.
    pub(crate) cancel: CancellationToken,
}

impl Run {
    /// Waits for something before or behind the transfer itself, unless it is stopped or given up.
    pub(crate) async fn unless_stopped<T>(&self, work: impl Future<Output = T>) -> Result<T> {
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err(Error::Cancelled),
            () = self.stop.cancelled() => Err(Error::Stopped),
            done = work => Ok(done),
        }
    }
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
        let error = lane.failure().or_else(|| whole.clone().err());
        match error {
            None => lane.finish(&run.cancel).await,
            Some(error) => Err(lane.end(error, &run.cancel).await),
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
