//! What all requests share: the store, and what the server itself knows.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use lru::LruCache;
use roaring::RoaringBitmap;
use tokio::sync::Semaphore;

use super::direct::token::Tokens;
use super::inject::Injector;
use super::metrics::Metrics;
use super::refusal::Refusal;
use super::{Access, Options};
use crate::cache::{Cache, ImageKey};
use crate::model::{Block, BlockIndex, Snapshot, SnapshotId, SnapshotState};
use crate::store::{CompleteRequest, ErrorKind, Result, SharedStore};

/// How long what a store said of a snapshot is taken for true: a block is read that often without
/// asking. One that another server deletes is gone here after this time.
const SEEN_LIFE: Duration = Duration::from_secs(1);

/// Snapshots of which that is remembered, and pending ones whose puts are.
const MAX_SNAPSHOTS: NonZeroUsize = NonZeroUsize::new(1024).expect("not 0");

/// How often it is looked whether something that was put has to be saved, so that other servers of
/// the store see it, and a crash does not lose it.
const SAVE_EVERY: Duration = Duration::from_millis(500);

/// It has to be if nothing more was put for this long, or if it is so old; under load the store
/// saves what fills a pack anyway.
const SAVE_IDLE: Duration = Duration::from_millis(300);
const SAVE_AGE: Duration = Duration::from_secs(5);

/// A completion that finds too few blocks waits this long for other servers to save theirs, so
/// often.
const SAVED_ELSEWHERE: Duration = Duration::from_millis(1200);
const SAVED_ELSEWHERE_TRIES: u32 = 2;

/// Pages of listings that are made or sent at the same time; each has up to 2 MB.
const MAX_LISTINGS: usize = 16;

/// Blocks that are being put into the store at the same time. Each takes a second buffer there, and
/// more than the cores can compress do not make it faster.
const MAX_PUTS: usize = 8;

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
    puts: Semaphore,
    /// Tags are read, changed and written by one request at a time.
    pub(super) tagging: tokio::sync::Mutex<()>,
    pending: Duration,
    seen: Mutex<LruCache<SnapshotId, (Instant, Arc<Seen>)>>,
    next_key: AtomicU64,
    written: Mutex<LruCache<SnapshotId, Written>>,
}

/// A snapshot, as the store described it.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) snapshot: Snapshot,
    pub(super) key: ImageKey,
}

/// What this server knows of a pending snapshot.
#[derive(Debug, Default)]
struct Written {
    /// It was started here, so that all puts before those in `blocks` are known: none.
    ours: bool,
    blocks: RoaringBitmap,
    /// When the first and the last block were put that may not be saved yet.
    unsaved: Option<(Instant, Instant)>,
}

impl Written {
    fn is_due(&self) -> bool {
        self.unsaved
            .is_some_and(|(first, last)| last.elapsed() >= SAVE_IDLE || first.elapsed() >= SAVE_AGE)
    }
}

impl Endpoint {
    pub(super) fn new(
        store: SharedStore,
        options: Options,
        local: Option<SocketAddr>,
    ) -> Arc<Self> {
        let secrets = match &options.access {
            Access::Keys(keys) => keys.secrets(),
            Access::Everybody => Vec::new(),
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
            puts: Semaphore::new(MAX_PUTS),
            tagging: tokio::sync::Mutex::default(),
            pending: options.pending,
            seen: Mutex::new(LruCache::new(MAX_SNAPSHOTS)),
            next_key: AtomicU64::new(0),
            written: Mutex::new(LruCache::new(MAX_SNAPSHOTS)),
        })
    }

    fn seen(&self) -> MutexGuard<'_, LruCache<SnapshotId, (Instant, Arc<Seen>)>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn written(&self) -> MutexGuard<'_, LruCache<SnapshotId, Written>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Notes that this server was asked at `asked` to start a snapshot. With a client token it may
    /// have been started earlier, and by another server.
    pub(super) fn started(&self, id: &SnapshotId, start_time: Timestamp, asked: Timestamp) {
        /// What the clock of a file system may be behind.
        const COARSE: Duration = Duration::from_millis(100);
        self.forget(id);
        let behind = asked.duration_since(start_time);
        let ours = behind.is_negative() || behind.unsigned_abs() <= COARSE;
        if !self.written().contains(id) {
            self.written().put(id.clone(), Written { ours, ..Written::default() });
        }
        if let Some(faults) = &self.faults {
            faults.started(id);
        }
    }

    /// Forgets what is known of a snapshot that is not pending any more.
    pub(super) fn ended(&self, id: &SnapshotId) {
        self.written().pop(id);
        self.forget(id);
    }

    /// Puts a block. A later put of the same block is durable when this returns: should the server
    /// die, the completion would otherwise not notice that it was lost. A first one is saved within
    /// seconds, and noticed missing by the count of blocks.
    pub(super) async fn put(&self, id: &SnapshotId, index: BlockIndex, block: Block) -> Result<()> {
        let permit = self.puts.acquire().await.expect("it is never closed");
        self.store.put_block(id, index, block).await?;
        drop(permit);
        let first = {
            let mut written = self.written();
            let written = written.get_or_insert_mut(id.clone(), Written::default);
            let now = Instant::now();
            written.unsaved = Some((written.unsaved.map_or(now, |(first, _)| first), now));
            written.blocks.insert(index.0) && written.ours
        };
        if first { Ok(()) } else { self.store.flush(id).await }
    }

    /// Completes a snapshot. Other servers may have blocks that they are about to save.
    pub(super) async fn complete(
        &self,
        id: &SnapshotId,
        request: CompleteRequest,
    ) -> Result<Snapshot> {
        let mut tries = 0;
        loop {
            let result = self.store.complete(id, request).await;
            match result {
                Err(error)
                    if error.kind() == ErrorKind::Conflict && tries < SAVED_ELSEWHERE_TRIES =>
                {
                    if self.store.describe(id).await?.state != SnapshotState::Pending {
                        return Err(error);
                    }
                    tries += 1;
                    tokio::time::sleep(SAVED_ELSEWHERE).await;
                }
                Ok(snapshot) => {
                    self.ended(id);
                    return Ok(snapshot);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Saves what was put, again and again.
    pub(super) async fn save_regularly(self: Arc<Self>) {
        loop {
            tokio::time::sleep(SAVE_EVERY).await;
            self.save(Written::is_due).await;
        }
    }

    /// Saves all that was put.
    pub(super) async fn save_all(&self) {
        self.save(|written| written.unsaved.is_some()).await;
    }

    async fn save(&self, wanted: impl Fn(&Written) -> bool) {
        let ids: Vec<_> = {
            let mut written = self.written();
            let unsaved = written.iter_mut().filter(|(_, written)| wanted(written));
            let take = |(id, written): (&SnapshotId, &mut Written)| {
                written.unsaved = None;
                id.clone()
            };
            unsaved.map(take).collect()
        };
        for id in ids {
            let Err(error) = self.store.flush(&id).await else { continue };
            match error.kind() {
                // It was completed or deleted meanwhile.
                ErrorKind::Conflict | ErrorKind::NotFound => self.ended(&id),
                _ => {
                    tracing::warn!("what was put into {id} is not saved yet: {error}");
                    if let Some(written) = self.written().peek_mut(&id) {
                        let now = Instant::now();
                        written.unsaved.get_or_insert((now, now));
                    }
                }
            }
        }
    }
}
