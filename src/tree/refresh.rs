//! Keeping the catalog up to date.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use jiff::Timestamp;
use lru::LruCache;
use tokio::time::Instant;

use super::catalog::Catalog;
use crate::model::{Snapshot, SnapshotId, SnapshotState};
use crate::store::page::list_all;
use crate::store::wrap::{Call, Counters};
use crate::store::{Error, ErrorKind, Result, SharedStore};

/// Longest time that looking at a directory waits for a fresh list; then the last one is shown.
const DEADLINE: Duration = Duration::from_secs(5);

/// A list is fresh for this many times what it took to make: so a name is hardly ever behind, and
/// however many snapshots there are, most of the time goes into something else than listing them.
const FRESH: u32 = 5;

/// How long it is remembered that there is no snapshot of an id.
const MISS: Duration = Duration::from_secs(2);

/// How old a list may be that answers others than root and the user of the mount.
const RECENT: Duration = Duration::from_secs(10);

/// Ids that are remembered not to be there, and snapshots that are but are not listed.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(1024).expect("not 0");

/// The snapshots of a store, as far as they are known.
#[derive(Debug)]
pub(super) struct Listing {
    store: SharedStore,
    /// Counts what the mount itself changes.
    calls: Option<Arc<Counters>>,
    catalog: RwLock<(Arc<Catalog>, Option<ListedAt>)>,
    /// Held by whoever lists, so that nobody else does.
    refreshing: tokio::sync::Mutex<()>,
    /// What was found when an id was looked for that is not in the catalog.
    others: Mutex<LruCache<SnapshotId, FoundAt>>,
}

/// What was found of an id, and when.
type FoundAt = (Option<Arc<Snapshot>>, Instant);

/// When a list was made.
#[derive(Clone, Copy, Debug)]
struct ListedAt {
    began: Instant,
    took: Duration,
    /// Changes that the mount had made by then.
    changes: u64,
}

impl Listing {
    pub(super) fn new(store: SharedStore, calls: Option<Arc<Counters>>) -> Self {
        Self {
            store,
            calls,
            catalog: RwLock::default(),
            refreshing: tokio::sync::Mutex::default(),
            others: Mutex::new(LruCache::new(REMEMBERED)),
        }
    }

    pub(super) fn catalog(&self) -> Arc<Catalog> {
        Arc::clone(&self.catalog.read().unwrap_or_else(PoisonError::into_inner).0)
    }

    fn listed(&self) -> Option<ListedAt> {
        self.catalog.read().unwrap_or_else(PoisonError::into_inner).1
    }

    /// Whether it is not worth listing again: what this mount has made is to be seen at once.
    fn is_fresh(&self) -> bool {
        self.listed().is_some_and(|ListedAt { began, took, changes }| {
            changes == self.changes() && began.elapsed() <= took * (1 + FRESH)
        })
    }

    /// Calls of this mount after which a list shows something else.
    fn changes(&self) -> u64 {
        let calls = [Call::Complete, Call::SetTags, Call::Delete];
        self.calls
            .as_ref()
            .map_or(0, |counters| calls.into_iter().map(|call| counters.calls(call)).sum())
    }

    /// Lists the snapshots anew.
    pub(super) async fn refresh(&self) -> Result<()> {
        let asked = Instant::now();
        let _alone = self.refreshing.lock().await;
        // Somebody else may have done it while this waited.
        if self.listed().is_some_and(|listed| listed.began > asked) {
            return Ok(());
        }
        let (began, changes) = (Instant::now(), self.changes());
        let mut catalog = Catalog::new(list_all(&*self.store).await?);
        if self.listed().is_some() {
            catalog = catalog.following(&self.catalog(), Timestamp::now());
        }
        let listed = ListedAt { began, took: began.elapsed(), changes };
        let before = self.catalog();
        // What has not changed is there once, whoever has it open.
        let catalog =
            if catalog.snapshots == before.snapshots { before } else { Arc::new(catalog) };
        *self.catalog.write().unwrap_or_else(PoisonError::into_inner) = (catalog, Some(listed));
        Ok(())
    }

    /// Lists the snapshots anew, unless that was done a moment ago; shows the last list if it takes
    /// too long or fails. The listing goes on in the background.
    pub(super) async fn fresh_catalog(self: &Arc<Self>) -> Arc<Catalog> {
        if !self.is_fresh() {
            let listing = Arc::clone(self);
            let refresh = tokio::spawn(async move { listing.refresh().await });
            match tokio::time::timeout(DEADLINE, refresh).await {
                Ok(Ok(Ok(()))) => {}
                Ok(Ok(Err(error))) => tracing::warn!("cannot list the snapshots: {error}"),
                Ok(Err(error)) => tracing::error!("listing the snapshots died: {error}"),
                Err(_) => tracing::warn!("listing the snapshots takes long; showing the last list"),
            }
        }
        self.catalog()
    }

    /// The snapshot of this id, listed or not.
    pub(super) async fn find(&self, id: &SnapshotId) -> Result<Option<Arc<Snapshot>>> {
        let listed = self.catalog().snapshots.get(id).cloned();
        if let Some(snapshot) = listed.filter(|snapshot| snapshot.is_readable()) {
            return Ok(Some(snapshot));
        }
        if let Some(found) = self.remembered(id) {
            return Ok(found);
        }
        let described = tokio::time::timeout(DEADLINE, self.store.describe(id)).await;
        let found = match described {
            Ok(Ok(snapshot)) => Some(Arc::new(snapshot)),
            Ok(Err(error)) if error.kind() == ErrorKind::NotFound => None,
            Ok(Err(error)) => return Err(error),
            Err(_) => {
                let message = format!("the store did not describe {id} within 5 seconds");
                return Err(Error::new(ErrorKind::Timeout, message));
            }
        };
        let mut others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        others.put(id.clone(), (found.clone(), Instant::now()));
        Ok(found)
    }

    /// As [`fresh_catalog`](Self::fresh_catalog), for other users of the machine: the requests that it takes are the
    /// mount's, so a list may be as old as [`RECENT`].
    pub(super) async fn recent_catalog(self: &Arc<Self>) -> Arc<Catalog> {
        let is_recent = self.listed().is_some_and(|ListedAt { began, changes, .. }| {
            changes == self.changes() && began.elapsed() < RECENT
        });
        if is_recent { self.catalog() } else { self.fresh_catalog().await }
    }

    /// As [`find`](Self::find), for other users of the machine, who would have us ask for any id: what is listed.
    pub(super) async fn find_listed(
        self: &Arc<Self>,
        id: &SnapshotId,
    ) -> Result<Option<Arc<Snapshot>>> {
        let catalog = self.recent_catalog().await;
        match catalog.snapshots.get(id) {
            Some(found) if found.state == SnapshotState::Error => {
                let why = found.state_message.as_deref().unwrap_or("it is damaged");
                Err(Error::new(ErrorKind::Corrupt, format!("{id}: {why}")))
            }
            found => Ok(found.cloned()),
        }
    }

    fn remembered(&self, id: &SnapshotId) -> Option<Option<Arc<Snapshot>>> {
        let mut others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        let (found, when) = others.get(id)?;
        (when.elapsed() < MISS).then(|| found.clone())
    }
}
