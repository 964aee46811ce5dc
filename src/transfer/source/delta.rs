//! What was changed from one snapshot to another, as a source.

use async_trait::async_trait;
use futures::stream::{self, BoxStream, StreamExt as _};

use super::snapshot::read_blocks;
use super::{Change, Result, Source};
use crate::model::{Block, BlockIndex, Snapshot};
use crate::store::listing::{Changes, Listing};
use crate::store::{ChangedBlock, ListedBlock, SharedStore};

/// The blocks in which a snapshot differs from an earlier one.
///
/// Blocks that only the earlier one has are zeros. Of what is behind the end of the earlier one every block is
/// spoken of, as in a whole image.
#[derive(Debug)]
pub(crate) struct DeltaSource {
    store: SharedStore,
    first: Snapshot,
    second: Snapshot,
}

impl DeltaSource {
    /// One past the last block that both volumes have.
    pub(crate) fn in_both(first: &Snapshot, second: &Snapshot) -> BlockIndex {
        first.volume_size.min(second.volume_size).blocks()
    }

    /// How many blocks it speaks of: those that were `changed` of what both volumes have, and all that was grown.
    pub(crate) fn blocks(first: &Snapshot, second: &Snapshot, changed: u64) -> u64 {
        let [first, second] = [first, second].map(|snapshot| snapshot.volume_size.blocks().0);
        changed + u64::from(second.saturating_sub(first))
    }

    /// What is in `second` and not in `first`. Both are completed.
    pub(crate) fn new(store: SharedStore, first: Snapshot, second: Snapshot) -> Self {
        Self { store, first, second }
    }
}

#[async_trait]
impl Source for DeltaSource {
    fn changes(&self) -> BoxStream<'static, Result<Change>> {
        let grown_from = self.first.volume_size.blocks();
        let end = self.second.volume_size.blocks();
        let changes = Changes((&self.first).into(), (&self.second).into());
        let listing = Listing::new(self.store.clone(), changes, grown_from.max(end));
        let state = (listing, grown_from, None::<ChangedBlock>);
        stream::try_unfold(state, move |(mut listing, at, held)| async move {
            let changed = match held {
                Some(changed) => Some(changed),
                None => listing.next().await?,
            };
            // What was behind the end of a smaller volume is in no image of it.
            let changed = changed.filter(|changed| changed.index < end);
            let next = changed.as_ref().map_or(end, |changed| changed.index);
            if at < next {
                return Ok(Some((Change::Zeros(at..next), (listing, next, changed))));
            }
            Ok(changed.map(|ChangedBlock { index, second, .. }| {
                let change = match second {
                    Some(listed) => Change::Data(index, Some(listed)),
                    None => Change::Zeros(index..index.next()),
                };
                (change, (listing, at.max(index.next()), None))
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
        read_blocks(&self.store, &self.second.id, blocks).await
    }

    fn is_read_again(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures::TryStreamExt as _;

    use super::*;
    use crate::model::VolumeSize;
    use crate::store::repository::Repository;
    use crate::store::{CompleteRequest, StartRequest};

    async fn snapshot(store: &SharedStore, gib: u64, blocks: &[(u32, u8)]) -> Snapshot {
        let size = VolumeSize::from_gib(gib).unwrap();
        let id = store.start(StartRequest::new(size)).await.unwrap().id;
        for (index, byte) in blocks {
            let block = Block::new(vec![*byte; crate::model::BLOCK_SIZE].into());
            store.put_block(&id, BlockIndex(*index), block).await.unwrap();
        }
        let changed_blocks = blocks.len() as u64;
        store
            .complete(&id, CompleteRequest { changed_blocks, checksum: None, started: None })
            .await
            .unwrap()
    }

    async fn changes(store: &SharedStore, first: &Snapshot, second: &Snapshot) -> Vec<String> {
        let source = DeltaSource::new(store.clone(), first.clone(), second.clone());
        let changes = source.changes().map_ok(|change| match change {
            Change::Data(index, listed) => {
                format!("data {}", index.0 + u32::from(listed.is_none()))
            }
            Change::Zeros(range) => format!("zeros {}..{}", range.start.0, range.end.0),
        });
        changes.try_collect().await.unwrap()
    }

    #[tokio::test]
    async fn a_delta_has_dropped_blocks_and_all_of_what_was_grown() {
        let directory = tempfile::tempdir().unwrap();
        let repository = Repository::create(&directory.path().join("store")).await.unwrap();
        let store: SharedStore = Arc::new(repository);
        let first = snapshot(&store, 1, &[(0, 1), (1, 1), (5, 1), (2047, 1)]).await;
        let second = snapshot(&store, 2, &[(0, 1), (1, 2), (7, 1), (2047, 1), (2050, 3)]).await;
        let grown =
            ["data 1", "zeros 5..6", "data 7", "zeros 2048..2050", "data 2050", "zeros 2051..4096"];
        assert_eq!(changes(&store, &first, &second).await, grown);
        // The other way the volume becomes smaller.
        let back = ["data 1", "data 5", "zeros 7..8"];
        assert_eq!(changes(&store, &second, &first).await, back);
        assert!(changes(&store, &first, &first).await.is_empty());
    }
}
