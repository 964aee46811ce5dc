//! The one way in which blocks get from a source to sinks.
//!
//! A planner follows the source in ascending order, asks each sink what is to be done there, takes room in memory,
//! and hands out tasks. A task reads a few blocks and brings each to every sink. Tasks run beside each other and
//! end in any order. What a sink has taken durably is noted in its journal.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use self::lane::Lane;
use self::mover::Mover;
use super::journal::Journal;
use super::sink::Sink;
use super::source::Source;
use super::{Error, Result, SharedProgress, Silent, sink};
use crate::model::{BLOCK_SIZE, Snapshot};

mod lane;
mod mover;
#[cfg(test)]
mod tests;

/// Memory of the blocks that one command has under way: 100 requests of a service, and some blocks that are read
/// meanwhile.
const COMMAND_MEMORY: usize = 64 << 20;

/// How long a transfer takes at most to end that is given up.
pub(crate) const ENDS_WITHIN: Duration = lane::LEAVE.saturating_add(sink::snapshot::ABORT);

/// What lends memory for that which a store gathers for one snapshot.
pub(crate) trait Lender: Debug + Send + Sync {
    /// It is lent until what this gives is dropped.
    fn lend(&self) -> Box<dyn Send + Sync>;
}

/// Memory that the blocks under way of transfers share.
#[derive(Clone, Debug)]
pub(crate) struct Memory {
    blocks: Arc<Semaphore>,
    most: usize,
    /// Who makes a snapshot waits for its turn, and is lent memory.
    turns: Option<(Arc<Semaphore>, Arc<dyn Lender>)>,
}

impl Memory {
    /// A budget of so many bytes, but room for one run of blocks at least.
    pub(crate) fn new(bytes: usize) -> Self {
        let most = (bytes / BLOCK_SIZE).max(super::run_len());
        Self { blocks: Arc::new(Semaphore::new(most)), most, turns: None }
    }

    /// This, where so many snapshots are made at the same time at most.
    pub(crate) fn with_turns(self, turns: usize, lender: Arc<dyn Lender>) -> Self {
        Self { turns: Some((Arc::new(Semaphore::new(turns)), lender)), ..self }
    }

    /// Waits until a snapshot may be made; it may until the answer is dropped.
    pub(crate) async fn turn(&self) -> impl Send + use<> {
        let (turns, lender) = self.turns.as_ref()?;
        let turn = Arc::clone(turns).acquire_owned().await.expect("it is never closed");
        Some((turn, lender.lend()))
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
    /// That of the sink, where there is one.
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
    /// Learns of what was done for it.
    pub(crate) progress: SharedProgress,
}

/// What came of a transfer for one sink.
#[derive(Clone, Debug)]
pub(crate) struct Finished {
    /// Blocks that were written.
    pub(crate) blocks: u64,
    /// Those of them that an earlier run had written.
    pub(crate) kept: u64,
    /// Blocks that were read from a parent, to compare.
    pub(crate) compared: u64,
    /// The snapshot that was made.
    pub(crate) snapshot: Option<Snapshot>,
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
    let lanes: Vec<_> = destinations.into_iter().map(Lane::new).map(Arc::new).collect();
    let whole = match Mover::new(Arc::clone(&source), lanes.clone(), run).run().await {
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
    let destination = Destination { sink, journal, progress: Arc::clone(&run.progress) };
    transfer(source, vec![destination], run).await.pop().expect("there is one sink")
}
