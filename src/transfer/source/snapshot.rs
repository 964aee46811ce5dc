//! A completed snapshot, as a source.

use async_trait::async_trait;
use futures::future::try_join_all;
use futures::stream::{self, BoxStream, StreamExt as _};

use super::{Change, Result, Source};
use crate::model::{Block, BlockIndex, Snapshot, SnapshotId};
use crate::store::listing::{Listing, read_listed};
use crate::store::{ListedBlock, SharedStore};

/// All of a snapshot.
#[derive(Debug)]
pub(crate) struct SnapshotSource {
    store: SharedStore,
    snapshot: Snapshot,
}

impl SnapshotSource {
    pub(crate) fn new(store: SharedStore, snapshot: Snapshot) -> Self {
        Self { store, snapshot }
    }
}

#[async_trait]
impl Source for SnapshotSource {
    fn changes(&self) -> BoxStream<'static, Result<Change>> {
        let listing = Listing::blocks(self.store.clone(), &self.snapshot);
        let end = self.snapshot.volume_size.blocks();
        let state = (listing, BlockIndex::ZERO, None::<ListedBlock>);
        stream::try_unfold(state, move |(mut listing, at, held)| async move {
            let block = match held {
                Some(block) => Some(block),
                None => listing.next().await?,
            };
            let next = block.as_ref().map_or(end, |block| block.index);
            if at < next {
                return Ok(Some((Change::Zeros(at..next), (listing, next, block))));
            }
            Ok(block.map(|block| {
                let index = block.index;
                (Change::Data(index, Some(block)), (listing, index.next(), None))
            }))
        })
        .boxed()
    }

    fn run_len(&self) -> usize {
        self.store.neighbours()
    }

    fn parallelism(&self) -> usize {
        self.store.parallelism()
    }

    async fn read(&self, blocks: &[(BlockIndex, Option<ListedBlock>)]) -> Result<Vec<Block>> {
        read_blocks(&self.store, &self.snapshot.id, blocks).await
    }

    fn is_read_again(&self) -> bool {
        false
    }
}

/// Reads blocks of a snapshot that were listed.
pub(super) async fn read_blocks(
    store: &SharedStore,
    id: &SnapshotId,
    blocks: &[(BlockIndex, Option<ListedBlock>)],
) -> Result<Vec<Block>> {
    let read = blocks.iter().map(|(_, listed)| {
        let listed = listed.as_ref().expect("every block of a snapshot was listed");
        read_listed(store, id, listed)
    });
    Ok(try_join_all(read).await?)
}
