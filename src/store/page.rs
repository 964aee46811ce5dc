//! Page tokens of stores that can begin a page at any block: they name the block.

use std::collections::HashSet;

use super::{Error, ErrorKind, ListFrom, PageToken, Result, SnapshotStore};
use crate::model::{BlockIndex, Snapshot};

/// Pages of the list of snapshots in a row that may have none before it is given up: few of many may be asked for.
const MAX_IDLE_LIST_PAGES: u32 = 1000;

/// Pages of the list of snapshots that are followed.
const MAX_LIST_PAGES: usize = 10_000;

/// Snapshots of a list at most: ten times the quota of an account in a region.
const MAX_SNAPSHOTS: usize = 1_000_000;

/// Lists all snapshots, page by page, in the order of the store.
///
/// # Errors
///
/// Those of the store, and `Unavailable` if the list has no end.
pub(crate) async fn list_all(store: &dyn SnapshotStore) -> Result<Vec<Snapshot>> {
    let (mut snapshots, mut seen) = (Vec::new(), HashSet::new());
    let (mut token, mut idle) = (None, 0);
    for _ in 0..MAX_LIST_PAGES {
        let page = store.list(token.clone()).await?;
        let before = snapshots.len();
        // One may come on two pages if the list changes meanwhile.
        snapshots.extend(page.snapshots.into_iter().filter(|found| seen.insert(found.id.clone())));
        idle = if snapshots.len() == before { idle + 1 } else { 0 };
        if page.next.is_none() {
            return Ok(snapshots);
        }
        if page.next == token || idle > MAX_IDLE_LIST_PAGES || snapshots.len() > MAX_SNAPSHOTS {
            break;
        }
        token = page.next;
    }
    Err(Error::new(ErrorKind::Unavailable, "the list of snapshots does not end"))
}

/// The newest completed snapshot of a name.
///
/// # Errors
///
/// As of [`list_all`].
pub(crate) async fn newest_named(
    store: &dyn SnapshotStore,
    name: &str,
) -> Result<Option<Snapshot>> {
    let all = list_all(store).await?.into_iter();
    let named = all.filter(|found| found.is_readable() && found.name() == Some(name));
    Ok(named.max_by(|a, b| (a.start_time, &a.id).cmp(&(b.start_time, &b.id))))
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
        for (next, is_empty) in
            [(same as fn() -> ListToken, false), (same, true), (another, true), (another, false)]
        {
            let endless = Endless { inner: Arc::clone(&inner), next, is_empty };
            assert_eq!(list_all(&endless).await.unwrap_err().kind(), ErrorKind::Unavailable);
        }
    }
}
