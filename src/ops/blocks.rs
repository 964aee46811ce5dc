//! All listed blocks of a snapshot, page by page.

use std::collections::VecDeque;

use futures::Stream;

use crate::model::{BlockIndex, SnapshotId};
use crate::store::{ErrorKind, ListFrom, ListedBlock, MAX_PAGE_BLOCKS, Result, SharedStore};

/// Follows a listing to its end.
#[derive(Debug)]
pub(super) struct Listing {
    store: SharedStore,
    id: SnapshotId,
    next: Option<ListFrom>,
    page: VecDeque<ListedBlock>,
    /// Every block below this one was in a page, or is a hole.
    covered: BlockIndex,
}

impl Listing {
    pub(super) fn new(store: SharedStore, id: SnapshotId) -> Self {
        let next = Some(ListFrom::Index(BlockIndex::ZERO));
        Self { store, id, next, page: VecDeque::new(), covered: BlockIndex::ZERO }
    }

    /// The next block, `None` behind the last.
    pub(super) async fn next(&mut self) -> Result<Option<ListedBlock>> {
        loop {
            if let Some(block) = self.page.pop_front() {
                return Ok(Some(block));
            }
            let Some(from) = self.next.take() else { return Ok(None) };
            let followed = matches!(from, ListFrom::Page(_));
            let page = match self.store.list_blocks(&self.id, from, MAX_PAGE_BLOCKS).await {
                // A page of blocks may take longer to move than its token lives.
                Err(error) if error.kind() == ErrorKind::ExpiredToken && followed => {
                    let from = ListFrom::Index(self.covered);
                    self.store.list_blocks(&self.id, from, MAX_PAGE_BLOCKS).await?
                }
                page => page?,
            };
            let behind = page.blocks.last().map_or(self.covered, |block| block.index.next());
            self.covered = behind.max(page.covered.unwrap_or(behind));
            self.page = page.blocks.into();
            self.next = page.next.map(ListFrom::Page);
        }
    }

    /// The blocks as a stream, which ends behind the first error.
    pub(super) fn stream(self) -> impl Stream<Item = Result<ListedBlock>> {
        futures::stream::unfold(Some(self), |listing| async {
            let mut listing = listing?;
            match listing.next().await {
                Ok(Some(block)) => Some((Ok(block), Some(listing))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
    }
}
