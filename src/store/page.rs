//! Page tokens of stores that can begin a page at any block: they name the block.

use std::collections::HashSet;

use super::{Error, ErrorKind, ListFrom, ListedBlock, PageToken, Result, SnapshotStore};
use crate::model::{BlockIndex, Snapshot, SnapshotId};

/// Pages of a listing in a row that may tell nothing new before it is given up: the service may
/// answer with short and empty pages, but not for ever.
pub(crate) const MAX_IDLE_PAGES: u32 = 100;

/// The same in the list of snapshots, where few of many may be asked for.
const MAX_IDLE_LIST_PAGES: u32 = 1000;

/// Pages of the list of snapshots that are followed: ten million snapshots.
const MAX_LIST_PAGES: usize = 10_000;

/// Lists all snapshots, page by page, in the order of the store.
///
/// # Errors
///
/// Those of the store, and `Unavailable` if the list has no end.
pub(crate) async fn list_all(store: &dyn SnapshotStore) -> Result<Vec<Snapshot>> {
    let (mut snapshots, mut token, mut idle) = (Vec::new(), None, 0);
    for _ in 0..MAX_LIST_PAGES {
        let page = store.list(token.clone()).await?;
        idle = if page.snapshots.is_empty() { idle + 1 } else { 0 };
        snapshots.extend(page.snapshots);
        if page.next.is_none() {
            // One may come on two pages if the list changes meanwhile.
            let mut seen = HashSet::new();
            snapshots.retain(|snapshot: &Snapshot| seen.insert(snapshot.id.clone()));
            return Ok(snapshots);
        }
        if page.next == token || idle > MAX_IDLE_LIST_PAGES {
            break;
        }
        token = page.next;
    }
    Err(Error::new(ErrorKind::Unavailable, "the list of snapshots does not end"))
}

/// Checks that a page goes on in order from `from`, or behind `last`, if that was listed before. What comes
/// again, or too late, would seem to be a hole where it belongs.
///
/// # Errors
///
/// `Corrupt`, if it does not.
pub(crate) fn check_ascending(
    id: &SnapshotId,
    from: BlockIndex,
    last: Option<&ListedBlock>,
    page: &[ListedBlock],
) -> Result<()> {
    let before = last.map(|block| block.index);
    let indexes = before.into_iter().chain(page.iter().map(|block| block.index));
    let ascending = indexes.is_sorted_by(|a, b| a < b);
    if ascending && page.first().is_none_or(|block| block.index >= from || before.is_some()) {
        return Ok(());
    }
    let message = format!("the store lists the blocks of {id} out of order at block {from}");
    Err(Error::new(ErrorKind::Corrupt, message))
}

/// Checks that no block lies beyond the volume: it would be left out.
///
/// # Errors
///
/// `Corrupt`, if one does.
pub(crate) fn check_within(snapshot: &Snapshot, last: Option<BlockIndex>) -> Result<()> {
    match last {
        Some(last) if last >= snapshot.volume_size.blocks() => {
            let (id, size) = (&snapshot.id, snapshot.volume_size);
            let message =
                format!("the store lists block {last} of {id}, which is beyond its {size}");
            Err(Error::new(ErrorKind::Corrupt, message))
        }
        _ => Ok(()),
    }
}

/// The error of a listing that ends nowhere.
pub(crate) fn endless_listing(id: &SnapshotId, at: BlockIndex) -> Error {
    let message = format!("the listing of {id} makes no progress at block {at}");
    Error::new(ErrorKind::Unavailable, message)
}

/// The block that a page begins at, or the first one behind it.
pub(super) fn start_index(from: &ListFrom) -> Result<BlockIndex> {
    match from {
        ListFrom::Index(index) => Ok(*index),
        ListFrom::Page(PageToken(token)) => token.parse().map(BlockIndex).map_err(|_| {
            Error::new(ErrorKind::ExpiredToken, format!("{token:?} is not a page token"))
        }),
    }
}

/// The token of the page that begins at a block.
pub(super) fn page_token(next: BlockIndex) -> PageToken {
    PageToken(next.to_string())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::store::wrap::Wrapper;
    use crate::store::{ListToken, SharedStore, SnapshotPage, StoreOptions, open};

    /// A store with one more page behind each.
    #[derive(Debug)]
    struct Endless {
        inner: SharedStore,
        next: fn() -> ListToken,
        is_empty: bool,
    }

    impl Wrapper for Endless {
        fn inner(&self) -> &SharedStore {
            &self.inner
        }

        fn listed(&self, mut page: SnapshotPage) -> SnapshotPage {
            page.next = Some((self.next)());
            if self.is_empty {
                page.snapshots.clear();
            }
            page
        }
    }

    #[tokio::test]
    async fn a_list_of_snapshots_ends() {
        let inner = open(&"synth:".parse().unwrap(), &StoreOptions::default()).await.unwrap();
        assert!(!list_all(&*inner).await.unwrap().is_empty());
        let same = || ListToken("0".to_owned());
        let another = || ListToken(fastrand::u32(..1000).to_string());
        for (next, is_empty) in [(same as fn() -> ListToken, false), (same, true), (another, true)]
        {
            let endless = Endless { inner: Arc::clone(&inner), next, is_empty };
            assert_eq!(list_all(&endless).await.unwrap_err().kind(), ErrorKind::Unavailable);
        }
    }

    #[tokio::test]
    async fn a_block_beyond_the_volume_is_no_block_of_it() {
        let store = open(&"synth:?size=1GiB".parse().unwrap(), &StoreOptions::default()).await;
        let snapshot = list_all(&*store.unwrap()).await.unwrap().remove(0);
        check_within(&snapshot, None).unwrap();
        check_within(&snapshot, Some(BlockIndex(2047))).unwrap();
        let error = check_within(&snapshot, Some(BlockIndex(2048))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("block 2048"), "{error}");
    }
}
