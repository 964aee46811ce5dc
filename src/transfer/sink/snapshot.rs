//! A snapshot that is being made.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::{self, BoxStream, StreamExt as _};
use jiff::SignedDuration;
use tokio::time::Instant;

use super::{Result, Sink, Step};
use crate::model::{Block, BlockIndex, Digest, Digester, Snapshot, SnapshotId, SnapshotState};
use crate::store::listing::{Blocks, Listing, read_listed};
use crate::store::{self, CompleteRequest, ErrorKind, ListedBlock, SharedStore};
use crate::transfer::Error;
use crate::transfer::holes::too_many;
use crate::transfer::source::Source;

/// How long it may take to learn what became of a snapshot, and until it is asked for again.
const LOOK: Duration = Duration::from_secs(5);

/// How long a completion may take, beyond the time in which the store learns of the snapshot.
const COMPLETE: Duration = Duration::from_mins(1);

/// How long it is tried to remove a snapshot that will not be completed: somebody waits to be let go.
pub(crate) const ABORT: Duration = Duration::from_secs(15);

/// Times of one snapshot differ less: services may round them.
const A_SECOND: SignedDuration = SignedDuration::from_secs(1);

/// What is put of what reads as zeros.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Zeros {
    /// Blocks of zeros that the source has.
    pub(crate) full_copy: bool,
    /// Holes too, of a snapshot that is encrypted: else they may read as anything.
    pub(crate) encrypted_holes: bool,
}

/// A pending snapshot, which is completed at the end.
#[derive(Debug)]
pub(crate) struct SnapshotSink {
    store: SharedStore,
    snapshot: Snapshot,
    parent: Option<Parent>,
    zeros: Zeros,
    /// From here on holes are put.
    filled_from: BlockIndex,
    order: Mutex<InOrder>,
}

/// The snapshot whose blocks it begins with.
#[derive(Debug)]
struct Parent {
    snapshot: Snapshot,
    listing: tokio::sync::Mutex<Listing<Blocks>>,
    /// The source speaks only of what was changed since: it is not compared.
    is_base: bool,
    /// Blocks of it that were read.
    read: AtomicU64,
}

/// The digests of what was put, in order of their turns though they come in any.
#[derive(Debug, Default)]
struct InOrder {
    planned: u64,
    ended: u64,
    /// Those whose turn has not come.
    waiting: BTreeMap<u64, Option<Digest>>,
    checksum: Digester,
    put: u64,
}

impl InOrder {
    /// A turn has ended, with a block that the snapshot has of its own or not.
    fn end(&mut self, turn: u64, put: Option<Digest>) {
        self.waiting.insert(turn, put);
        while let Some(put) = self.waiting.remove(&self.ended) {
            self.ended += 1;
            if let Some(digest) = put {
                self.checksum.update(digest.0);
                self.put += 1;
            }
        }
    }
}

impl SnapshotSink {
    /// What `source` has is put into `snapshot`, which is pending. If the source has only what was changed of the
    /// parent, that `is_base`.
    ///
    /// # Errors
    ///
    /// If too many holes would have to be put.
    pub(crate) async fn new(
        store: SharedStore,
        snapshot: Snapshot,
        parent: Option<(Snapshot, bool)>,
        zeros: Zeros,
        source: &dyn Source,
    ) -> Result<Self> {
        let end = snapshot.volume_size.blocks();
        // Holes of an encrypted parent were put with it.
        let behind_parent =
            parent.as_ref().map_or(BlockIndex::ZERO, |(p, _)| p.volume_size.blocks().min(end));
        let filled_from = if zeros.encrypted_holes { behind_parent } else { end };
        if zeros.encrypted_holes
            && let Some(why) = too_many(source.holes(filled_from).await?)
        {
            return Err(store::Error::new(ErrorKind::Quota, why).into());
        }
        let parent = parent.map(|(parent, is_base)| {
            let listing = Listing::blocks(store.clone(), &parent).into();
            Parent { snapshot: parent, listing, is_base, read: AtomicU64::new(0) }
        });
        Ok(Self { store, snapshot, parent, zeros, filled_from, order: Mutex::default() })
    }

    fn order(&self) -> MutexGuard<'_, InOrder> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn step(&self, index: BlockIndex, beneath: Option<ListedBlock>, in_source: bool) -> Step {
        let mut order = self.order();
        order.planned += 1;
        let turn = order.planned - 1;
        Step { beneath, turn, ..Step::new(index..index.next(), in_source) }
    }

    async fn is_needed(&self, step: &Step, block: &Block) -> Result<bool> {
        let filled = step.index() >= self.filled_from;
        let (Some(listed), Some(parent)) = (&step.beneath, &self.parent) else {
            let wanted = filled || (self.zeros.full_copy && step.in_source);
            return Ok(step.is_stale || wanted || !block.is_zero());
        };
        match listed.digest {
            _ if step.is_stale => Ok(true),
            // Zeros too, or the parent shows through.
            Some(digest) if digest != block.digest() => Ok(true),
            Some(_) if block.is_zero() => Ok(false),
            // What differs is known; to compare would cost half of what a put does.
            None if parent.is_base => Ok(true),
            // In a bucket what there is stays, and reading all of it each night would cost more than to store it.
            Some(_) if self.store.neighbours() > 1 => Ok(false),
            // The block is kept only as the parent's: it has to be there. And a block that is put is paid for as
            // long as the snapshot is there, while reading one costs half a put, once.
            _ => {
                parent.read.fetch_add(1, Ordering::Relaxed);
                match read_listed(&self.store, &parent.snapshot.id, listed).await {
                    Ok(theirs) => Ok(theirs != *block),
                    Err(error) if error.kind() == ErrorKind::Corrupt => Ok(true),
                    Err(error) => Err(error.into()),
                }
            }
        }
    }
}

#[async_trait]
impl Sink for SnapshotSink {
    async fn plan(&self, index: BlockIndex) -> Result<Step> {
        let beneath = match &self.parent {
            Some(parent) => parent.listing.lock().await.find(index).await?,
            None => None,
        };
        Ok(self.step(index, beneath, true))
    }

    fn plan_zeros(&self, blocks: Range<BlockIndex>) -> BoxStream<'_, Result<Step>> {
        let filled = blocks.start.max(self.filled_from).0..blocks.end.0;
        // The end of a stream is not known before it has come.
        if let Some(why) = too_many(filled.len() as u64) {
            let error = store::Error::new(ErrorKind::Quota, why);
            return stream::iter([Err(error.into())]).boxed();
        }
        let filled = stream::iter(filled).map(|n| Ok(self.step(BlockIndex(n), None, false)));
        let Some(parent) = &self.parent else { return filled.boxed() };
        let shown = stream::try_unfold(blocks.start, move |from| async move {
            let mut listing = parent.listing.lock().await;
            listing.skip_to(from);
            // What the parent has beyond the end of a smaller volume is not in its child.
            let Some(listed) = listing.next_below(blocks.end).await? else { return Ok(None) };
            let index = listed.index;
            Ok(Some((self.step(index, Some(listed), false), index.next())))
        });
        shown.chain(filled).boxed()
    }

    fn keep(&self, step: &Step, digest: Digest) {
        self.order().end(step.turn, Some(digest));
    }

    async fn write(&self, step: Step, block: Block) -> Result<bool> {
        let digest = self.is_needed(&step, &block).await?.then(|| block.digest());
        if digest.is_some() {
            self.store.put_block(&self.snapshot.id, step.index(), block).await?;
        }
        self.order().end(step.turn, digest);
        Ok(digest.is_some())
    }

    fn parallelism(&self) -> usize {
        self.store.parallelism()
    }

    fn settling(&self) -> Duration {
        self.store.settling()
    }

    fn needs_flush(&self) -> bool {
        self.store.needs_flush()
    }

    async fn flush(&self) -> Result<()> {
        Ok(self.store.flush(&self.snapshot.id).await?)
    }

    fn compared(&self) -> u64 {
        self.parent.as_ref().map_or(0, |parent| parent.read.load(Ordering::Relaxed))
    }

    async fn finish(&self) -> Result<Option<Snapshot>> {
        let request = {
            let mut order = self.order();
            debug_assert_eq!(order.planned, order.ended, "every turn has ended");
            let checksum = std::mem::take(&mut order.checksum).finish();
            let started = Some(self.snapshot.start_time);
            CompleteRequest { changed_blocks: order.put, checksum: Some(checksum), started }
        };
        let id = &self.snapshot.id;
        let patience = COMPLETE + self.store.settling();
        let completed = tokio::time::timeout(patience, self.store.complete(id, request)).await;
        let snapshot = match completed.map_err(|_| Error::Stalled(patience))? {
            Err(error) if matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Timeout) => {
                // The answer may have been lost alone.
                match state(&self.store, id).await {
                    Some(found) if found.state == SnapshotState::Completed => found,
                    _ => return Err(error.into()),
                }
            }
            completed => completed?,
        };
        if snapshot.state == SnapshotState::Error {
            let why = snapshot.state_message.unwrap_or_default();
            let message = format!("{id} failed in the store: {why}");
            return Err(store::Error::new(ErrorKind::Conflict, message).into());
        }
        Ok(Some(snapshot))
    }

    async fn finished_before(&self) -> Option<Snapshot> {
        let end = Instant::now() + COMPLETE + self.store.settling();
        loop {
            let found = state(&self.store, &self.snapshot.id).await?;
            match found.state {
                SnapshotState::Completed => return Some(found),
                SnapshotState::Pending if Instant::now() < end => tokio::time::sleep(LOOK).await,
                _ => return None,
            }
        }
    }

    async fn abort(&self) {
        let id = &self.snapshot.id;
        // In a repository somebody else may have given it up, and started another one under its id.
        let is_another = |found: Snapshot| {
            found.start_time.duration_since(self.snapshot.start_time).abs() >= A_SECOND
        };
        if state(&self.store, id).await.is_some_and(is_another) {
            tracing::warn!("{id} is another snapshot by now, and stays");
            return;
        }
        abort(&self.store, id).await;
    }
}

/// What the store says of a snapshot, if it says so soon.
async fn state(store: &SharedStore, id: &SnapshotId) -> Option<Snapshot> {
    tokio::time::timeout(LOOK, store.describe(id)).await.ok()?.ok()
}

/// Removes a snapshot that will not be completed, unless it is all the same: somebody may use it. A failure is
/// logged: then it stays pending.
pub(crate) async fn abort(store: &SharedStore, id: &SnapshotId) {
    if state(store, id).await.is_some_and(|found| found.state == SnapshotState::Completed) {
        tracing::warn!("{id} is completed, and stays");
        return;
    }
    let why = match tokio::time::timeout(ABORT, store.delete(id)).await {
        Ok(Ok(())) => return,
        Ok(Err(error)) if error.kind() == ErrorKind::NotFound => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("the store did not delete it within {} s", ABORT.as_secs()),
    };
    tracing::error!("{id} stays pending: {why}; `fspfs delete {id}` removes it");
}
