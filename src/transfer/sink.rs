//! Where the blocks of a transfer go.

use std::fmt::Debug;
use std::ops::Range;
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::{self, BoxStream, StreamExt as _};

use super::{Error, Result};
use crate::model::{Block, BlockIndex, Digest, Snapshot};
use crate::store::ListedBlock;

pub(crate) mod file;
mod kept;
pub(crate) mod snapshot;
pub(crate) mod target;

/// A block that a sink is about to get.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) blocks: Range<BlockIndex>,
    /// What is in its place now, where that is known: the parent's.
    pub(crate) beneath: Option<ListedBlock>,
    /// The source has something there, zeros or not; else it is a hole.
    pub(crate) in_source: bool,
    /// An earlier run has brought something there, or was about to: perhaps another block.
    pub(crate) is_stale: bool,
    /// Its turn among all that the sink has planned.
    pub(crate) turn: u64,
}

impl Step {
    /// One of a sink that knows nothing of what is there.
    pub(crate) fn new(blocks: Range<BlockIndex>, in_source: bool) -> Self {
        Self { blocks, beneath: None, in_source, is_stale: false, turn: 0 }
    }

    /// The one block of it.
    pub(crate) fn index(&self) -> BlockIndex {
        self.blocks.start
    }
}

/// One end of a transfer.
///
/// Steps are planned in ascending order, one after the other, and written in any.
#[async_trait]
pub(crate) trait Sink: Debug + Send + Sync + 'static {
    /// Plans one block that the source has.
    async fn plan(&self, index: BlockIndex) -> Result<Step> {
        Ok(Step::new(index..index.next(), true))
    }

    /// Plans blocks that read as zeros. Where that is so already nothing has to be done.
    fn plan_zeros(&self, blocks: Range<BlockIndex>) -> BoxStream<'_, Result<Step>> {
        let _ = blocks;
        stream::empty().boxed()
    }

    /// Whether the block is still there that an earlier run has written.
    async fn has_still(&self, index: BlockIndex, digest: Digest) -> Result<bool> {
        let _ = (index, digest);
        Ok(true)
    }

    /// Takes note of a block that an earlier run has written, and that is still there.
    fn keep(&self, step: &Step, digest: Digest) {
        let _ = (step, digest);
    }

    /// Writes a block, zeros where the step has several, if that is needed; answers whether it was.
    async fn write(&self, step: Step, block: Block) -> Result<bool>;

    /// Takes note of a block that the source has, but damaged.
    ///
    /// # Errors
    ///
    /// The damage, unless it is looked for.
    fn damaged(&self, index: BlockIndex, error: Error) -> Result<()> {
        let _ = index;
        Err(error)
    }

    /// Blocks that are worth being written at the same time.
    fn parallelism(&self) -> usize;

    /// How long it may take until the first block is taken.
    fn settling(&self) -> Duration {
        Duration::ZERO
    }

    /// Whether what [`write`](Self::write) has written needs a [`flush`](Self::flush) to be found by a later run.
    fn needs_flush(&self) -> bool {
        false
    }

    /// Makes durable what was written.
    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    /// Blocks that were read from the parent, to compare.
    fn compared(&self) -> u64 {
        0
    }

    /// Makes the whole of it, and answers the snapshot, if that is what was made.
    async fn finish(&self) -> Result<Option<Snapshot>>;

    /// The snapshot, if an earlier run has finished it. Waits for a store that is still at work on it, within a bound.
    async fn finished_before(&self) -> Option<Snapshot> {
        None
    }

    /// Removes what was begun, within a bound. A failure is logged.
    async fn abort(&self);
}
