//! All listed blocks of a snapshot, page by page.

use std::collections::VecDeque;

use futures::Stream;

use crate::model::{BlockIndex, SnapshotId};
use crate::store::page::{MAX_IDLE_PAGES, check_ascending, endless_listing};
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
    /// Pages in a row that told nothing new.
    idle: u32,
}

impl Listing {
    pub(super) fn new(store: SharedStore, id: SnapshotId) -> Self {
        let next = Some(ListFrom::Index(BlockIndex::ZERO));
        Self { store, id, next, page: VecDeque::new(), covered: BlockIndex::ZERO, idle: 0 }
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
            check_ascending(&self.id, self.covered, None, &page.blocks)?;
            let behind = page.blocks.last().map_or(self.covered, |block| block.index.next());
            let covered = behind.max(page.covered.unwrap_or(behind));
            self.idle = if covered > self.covered { 0 } else { self.idle + 1 };
            if page.next.is_some() && self.idle > MAX_IDLE_PAGES {
                return Err(endless_listing(&self.id, covered));
            }
            self.covered = covered;
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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::store::wrap::Wrapper;
    use crate::store::{BlockPage, StoreOptions, open};

    /// A store that answers a first page, and then goes on like this.
    #[derive(Debug)]
    struct Odd {
        inner: SharedStore,
        first: Mutex<Option<BlockPage>>,
        then: fn(&BlockPage, BlockPage) -> BlockPage,
    }

    impl Wrapper for Odd {
        fn inner(&self) -> &SharedStore {
            &self.inner
        }

        fn listed_blocks(&self, page: BlockPage) -> BlockPage {
            let mut first = self.first.lock().unwrap();
            match &*first {
                Some(first) => (self.then)(first, page),
                None => first.insert(page).clone(),
            }
        }
    }

    async fn listed(then: fn(&BlockPage, BlockPage) -> BlockPage) -> Result<usize> {
        let url = "synth:?size=16GiB&density=1".parse().unwrap();
        let inner = open(&url, &StoreOptions::default()).await?;
        let id = inner.list(None).await?.snapshots[0].id.clone();
        let store: SharedStore = Arc::new(Odd { inner, first: Mutex::default(), then });
        let mut listing = Listing::new(store, id);
        let mut blocks = 0;
        while listing.next().await?.is_some() {
            blocks += 1;
        }
        Ok(blocks)
    }

    #[tokio::test]
    async fn a_list_that_is_none_is_told() {
        assert_eq!(listed(|_, page| page).await.unwrap(), 32_768);
        let kind = async |then| listed(then).await.unwrap_err().kind();
        assert_eq!(kind(|first, _| first.clone()).await, ErrorKind::Corrupt);
        let overlaps = |first: &BlockPage, mut page: BlockPage| {
            page.blocks.insert(0, first.blocks.last().unwrap().clone());
            page
        };
        assert_eq!(kind(overlaps).await, ErrorKind::Corrupt);
        let reversed = |_: &BlockPage, mut page: BlockPage| {
            page.blocks.reverse();
            page
        };
        assert_eq!(kind(reversed).await, ErrorKind::Corrupt);
        let nothing = |first: &BlockPage, _| BlockPage { blocks: vec![], ..first.clone() };
        assert_eq!(kind(nothing).await, ErrorKind::Unavailable);
    }
}
