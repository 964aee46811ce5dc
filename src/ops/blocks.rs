//! All listed blocks of a snapshot, page by page.

use std::collections::VecDeque;

use futures::Stream;

use crate::model::{BlockIndex, SnapshotId};
use crate::store::{ListFrom, ListedBlock, MAX_PAGE_BLOCKS, Result, SharedStore};

/// Follows a listing to its end.
#[derive(Debug)]
pub(super) struct Listing {
    store: SharedStore,
    id: SnapshotId,
    next: Option<ListFrom>,
    page: VecDeque<ListedBlock>,
}

impl Listing {
    pub(super) fn new(store: SharedStore, id: SnapshotId) -> Self {
        let next = Some(ListFrom::Index(BlockIndex::ZERO));
        Self { store, id, next, page: VecDeque::new() }
    }

    /// The next block, `None` behind the last.
    pub(super) async fn next(&mut self) -> Result<Option<ListedBlock>> {
        loop {
            if let Some(block) = self.page.pop_front() {
                return Ok(Some(block));
            }
            let Some(from) = self.next.take() else { return Ok(None) };
            let page = self.store.list_blocks(&self.id, from, MAX_PAGE_BLOCKS).await?;
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
