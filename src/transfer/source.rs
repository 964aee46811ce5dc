//! Where the blocks of a transfer come from.

use std::fmt::Debug;
use std::ops::Range;

use async_trait::async_trait;
use futures::TryStreamExt as _;
use futures::stream::BoxStream;

use super::{Result, concurrent_runs, run_len};
use crate::model::{Block, BlockIndex};
use crate::store::ListedBlock;

pub(crate) mod delta;
pub(crate) mod file;
pub(crate) mod snapshot;
pub(crate) mod stream;

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

    /// Blocks that are read by one call: a run.
    fn run_len(&self) -> usize {
        run_len()
    }

    /// Runs that are worth being read at the same time.
    fn parallelism(&self) -> usize {
        concurrent_runs()
    }

    /// Blocks from `start` on that are in no place, as far as that is known before they are read.
    async fn holes(&self, start: BlockIndex) -> Result<u64> {
        let (mut changes, mut holes) = (self.changes(), 0);
        while let Some(change) = changes.try_next().await? {
            if let Change::Zeros(range) = change {
                holes += u64::from(range.end.0.saturating_sub(range.start.max(start).0));
            }
        }
        Ok(holes)
    }

    /// Whether the next change is waited for, and takes as long as somebody else likes.
    fn is_waiting(&self) -> bool {
        false
    }

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
