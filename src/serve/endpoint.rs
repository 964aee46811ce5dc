//! What all requests share: the store, and what the server itself knows.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use lru::LruCache;
use tokio::sync::Semaphore;

use super::direct::token::Tokens;
use super::inject::Injector;
use super::metrics::Metrics;
use super::refusal::Refusal;
use super::{Access, Options};
use crate::cache::{Cache, ImageKey};
use crate::model::{Snapshot, SnapshotId, SnapshotState};
use crate::store::{ErrorKind, Result, SharedStore};

/// How long what a store said of a snapshot is taken for true: a block is read that often without
/// asking. One that another server deletes is gone here after this time.
const SEEN_LIFE: Duration = Duration::from_secs(1);

/// Snapshots of which that is remembered.
const MAX_SNAPSHOTS: NonZeroUsize = NonZeroUsize::new(1024).expect("not 0");

/// Pages of listings that are made or sent at the same time; each has up to 2 MB.
const MAX_LISTINGS: usize = 16;

/// The tag that remembers that a snapshot was asked to be encrypted, and with which key, in a store
/// that does not encrypt. Clients do not see it.
pub(super) const KMS_TAG: &str = "fspfs:serve:kms-key";

/// A server over one store.
#[derive(Debug)]
pub(super) struct Endpoint {
    pub(super) store: SharedStore,
    pub(super) access: Access,
    pub(super) faults: Option<Injector>,
    pub(super) account: String,
    pub(super) region: String,
    pub(super) local: Option<SocketAddr>,
    pub(super) tokens: Tokens,
    pub(super) blocks: Arc<Cache>,
    pub(super) metrics: Arc<Metrics>,
    /// One permit a page of a listing.
    pub(super) listings: Arc<Semaphore>,
    /// Tags are read, changed and written by one request at a time.
    pub(super) tagging: tokio::sync::Mutex<()>,
    pending: Duration,
    seen: Mutex<LruCache<SnapshotId, (Instant, Arc<Seen>)>>,
    next_key: AtomicU64,
}

/// A snapshot, as the store described it.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) snapshot: Snapshot,
    pub(super) key: ImageKey,
}

impl Endpoint {
    pub(super) fn new(
        store: SharedStore,
        options: Options,
        local: Option<SocketAddr>,
    ) -> Arc<Self> {
        let secrets = match &options.access {
            Access::Keys(keys) | Access::Everybody(keys) => keys.secrets(),
        };
        let faults = options.faults.map(Injector::new);
        let mut tokens = Tokens::new(&options.name, &secrets);
        if let Some(faults) = &faults {
            tokens.shorten(faults.block_token_life(), faults.page_token_life());
        }
        Arc::new(Self {
            tokens,
            store,
            access: options.access,
            faults,
            account: options.account,
            region: options.region,
            local,
            blocks: Cache::new(options.memory),
            metrics: Arc::default(),
            listings: Arc::new(Semaphore::new(MAX_LISTINGS)),
            tagging: tokio::sync::Mutex::default(),
            pending: options.pending,
            seen: Mutex::new(LruCache::new(MAX_SNAPSHOTS)),
            next_key: AtomicU64::new(0),
        })
    }

    fn seen(&self) -> MutexGuard<'_, LruCache<SnapshotId, (Instant, Arc<Seen>)>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the store says of a snapshot, or said a moment ago.
    pub(super) async fn look(&self, id: &SnapshotId) -> Result<Arc<Seen>> {
        let known = self.seen().get(id).cloned();
        if let Some((when, seen)) = &known
            && when.elapsed() < SEEN_LIFE
        {
            return Ok(Arc::clone(seen));
        }
        let snapshot = self.store.describe(id).await?;
        let key = match known {
            // An id that is used again is another snapshot.
            Some((_, seen)) if seen.snapshot.start_time == snapshot.start_time => seen.key,
            _ => ImageKey(self.next_key.fetch_add(1, Ordering::Relaxed)),
        };
        let seen = Arc::new(Seen { snapshot, key });
        self.seen().put(id.clone(), (Instant::now(), Arc::clone(&seen)));
        Ok(seen)
    }

    /// Asks the store anew for this snapshot.
    pub(super) fn forget(&self, id: &SnapshotId) {
        self.seen().pop(id);
    }

    /// As [`look`](Self::look), for a snapshot whose blocks are to be read.
    pub(super) async fn readable(&self, id: &SnapshotId) -> Result<Arc<Seen>, Refusal> {
        let seen = self.look(id).await.map_err(|e| match e.kind() {
            ErrorKind::NotFound => Refusal::no_snapshot(id),
            _ => Refusal::of_store(&e, "INVALID_SNAPSHOT_ID"),
        })?;
        match self.state(&seen.snapshot) {
            SnapshotState::Completed => Ok(seen),
            state => {
                let state = state.as_str();
                let message = format!("The snapshot '{id}' is {state}, not completed.");
                Err(Refusal::invalid("INVALID_SNAPSHOT_ID", message))
            }
        }
    }

    /// The state that clients see.
    pub(super) fn state(&self, snapshot: &Snapshot) -> SnapshotState {
        let since = snapshot.completion_time.map(|time| Timestamp::now().duration_since(time));
        match snapshot.state {
            SnapshotState::Completed
                if since.is_some_and(|since| since.unsigned_abs() < self.pending) =>
            {
                SnapshotState::Pending
            }
            state => state,
        }
    }
}
