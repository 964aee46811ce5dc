//! Where the blocks of a transfer come from.

use std::fmt::Debug;
use std::ops::Range;

use async_trait::async_trait;
use futures::TryStreamExt as _;
use futures::stream::BoxStream;

use super::Result;
use crate::model::{Block, BlockIndex};
use crate::store::ListedBlock;

pub(crate) mod file;
pub(crate) mod snapshot;

/// A part of what a source has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// A block, to be read; with what is known of it, if it was listed.
    Data(BlockIndex, Option<ListedBlock>),
    /// Blocks that read as zeros, and are in no place.
    Zeros(Range<BlockIndex>),
}

/// One end of a transfer: an image, or what was changed of one.
#[async_trait]
pub(crate) trait Source: Debug + Send + Sync + 'static {
    /// What it has, ascending, each block once at most. What it does not speak of is as before; a whole image
    /// speaks of every block of its volume.
    fn changes(&self) -> BoxStream<'static, Result<Change>>;

    /// Blocks that are read by one call.
    fn run_len(&self) -> usize;

    /// Blocks that are worth being read at the same time.
    fn parallelism(&self) -> usize;

    /// Reads blocks, in this order.
    async fn read(&self, blocks: &[(BlockIndex, Option<ListedBlock>)]) -> Result<Vec<Block>>;

    /// Whether what an earlier run has brought is read again: it may be something else by now.
    fn is_read_again(&self) -> bool;

    /// Checks that all of it was there until the end: everything was read, and no sink is finished.
    ///
    /// # Errors
    ///
    /// If what it spoke of is not all of it.
    async fn check(&self) -> Result<()> {
        Ok(())
    }
}

/// Blocks from `start` on that are in no place.
pub(crate) async fn holes(source: &dyn Source, start: BlockIndex) -> Result<u64> {
    let holes = source.changes().try_fold(0, |sum, change| {
        let blocks = match change {
            Change::Zeros(range) => u64::from(range.end.0.saturating_sub(range.start.max(start).0)),
            Change::Data(..) => 0,
        };
        futures::future::ready(Ok(sum + blocks))
    });
    holes.await
}
