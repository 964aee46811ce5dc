//! Making the snapshot of one frozen generation.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::stream;
use futures::{StreamExt as _, TryStreamExt as _};
use roaring::RoaringBitmap;
use tokio::task::JoinHandle;

use super::commit::DIED;
use super::layer::Commit;
use super::{Error, Result, WorkingImage, end_block};
use crate::blocking::blocking;
use crate::cache::Urgency;
use crate::image::Image;
use crate::image::staging::Files;
use crate::image::staging::files::read_padded;
use crate::image::staging::map::{Mark, Marks};
use crate::image::staging::record::{Attempt, Wishes};
use crate::model::{
    BLOCK_SIZE, Block, BlockBuffer, BlockIndex, Digester, LENGTH_TAG, MAX_DESCRIPTION_CHARS,
    Snapshot, SnapshotState, VolumeSize,
};
use crate::store::{CompleteRequest, ErrorKind, ListedBlock, StartRequest};
use crate::transfer::holes::too_many;
use crate::transfer::{concurrent_runs, run_len};

/// How long a commit goes on without a block being acknowledged, or compared with that of the parent.
const STALL: Duration = Duration::from_mins(1);

/// Memory that a commit takes of the budget of the mount: blocks on their way, and what a store
/// gathers before it writes.
pub(super) const COMMIT_MEMORY: usize = 160 << 20;

/// Blocks that are put between two notes that they are durable in the store: 512 MiB.
const BETWEEN_FLUSHES: u64 = 1024;

/// Part of the budget of the mount that the blocks of a commit on their way to the store may take.
const PUT_SHARE: usize = 8;

/// The blocks of a child, its parent, and what was put before.
struct Plan {
    files: Arc<Files>,
    marks: Marks,
    parent: Option<Arc<Image>>,
    len: u64,
    /// All zeros are put, since the store keeps what was not put in the clear.
    all_zeros: bool,
    full_copy: bool,
    /// Whether all of the image is staged, though the parent has most of it.
    whole: bool,
    /// Blocks of the parent that were read: progress too, long before there is anything to put.
    compared: AtomicU64,
}

/// One attempt after the other to commit the lowest generation.
pub(super) struct Put {
    image: Arc<WorkingImage>,
    commit: Arc<Commit>,
}

impl Put {
    pub(super) fn new(image: Arc<WorkingImage>, commit: Arc<Commit>) -> Self {
        Self { image, commit }
    }

    /// Makes the snapshot; when this returns the store has accepted it whole.
    pub(super) async fn run(&mut self) -> Result<Snapshot> {
        let shop = Arc::clone(&self.image.shop);
        let _turn = shop.commits.acquire().await.expect("it is never closed");
        let _memory = shop.cache.lend(COMMIT_MEMORY);
        let resumed = self.attempt().snapshot.is_some();
        match self.once().await {
            // What was begun before is gone, takes nothing more, or was asked for otherwise.
            Err(Error::Store(error))
                if error.kind() == ErrorKind::Conflict
                    || (resumed && error.kind() == ErrorKind::NotFound) =>
            {
                tracing::info!("beginning anew: {error}");
                self.begin_anew().await?;
                self.once().await
            }
            result => result,
        }
    }

    fn attempt(&self) -> Attempt {
        let state = self.image.state();
        state.layers[0].attempt.clone().expect("a frozen generation has one")
    }

    async fn begin_anew(&self) -> Result<()> {
        self.image.state().layers[0].renew();
        self.image.recorded(true).await
    }

    async fn once(&self) -> Result<Snapshot> {
        let shop = &self.image.shop;
        let attempt = self.attempt();
        if let Some(forsaken) = &attempt.forsaken {
            self.image.abort(forsaken).await;
        }
        let parent = self.parent(&attempt).await?;
        let request = request(&attempt, parent.as_deref(), &shop.settings)?;
        let asked_to_encrypt = request.encrypted;
        let snapshot = self.start(request, &attempt).await?;
        match snapshot.state {
            // The completion was accepted before, and the answer was lost.
            SnapshotState::Completed if !attempt.changed => return Ok(snapshot),
            SnapshotState::Completed => {
                let message = format!("{} is what was there before", snapshot.id);
                return Err(crate::store::Error::new(ErrorKind::Conflict, message).into());
            }
            SnapshotState::Error | SnapshotState::Archived => {
                let message = format!("{} failed before it was complete", snapshot.id);
                return Err(crate::store::Error::new(ErrorKind::Conflict, message).into());
            }
            SnapshotState::Pending => {}
        }
        if let Some(attempt) = self.image.state().layers[0].attempt.as_mut() {
            attempt.forsaken = None;
        }
        self.image.recorded(true).await?;
        let plan = {
            let state = self.image.state();
            let layer = &state.layers[0];
            Arc::new(Plan {
                files: Arc::clone(&layer.files),
                marks: layer.marks.clone(),
                parent,
                len: attempt.len,
                all_zeros: (asked_to_encrypt || snapshot.encrypted)
                    && shop.settings.encrypted_holes,
                full_copy: shop.settings.full_copy,
                whole: state.base.is_none(),
                compared: AtomicU64::new(0),
            })
        };
        let complete = self.put_all(&snapshot, &plan).await?;
        if attempt.changed {
            // From here on the snapshot may be completed, as it is now.
            if let Some(attempt) = self.image.state().layers[0].attempt.as_mut() {
                attempt.changed = false;
            }
            self.image.recorded(true).await?;
        }
        let completed = shop.store.complete(&snapshot.id, complete);
        let patience = STALL + shop.store.settling();
        match tokio::time::timeout(patience, completed).await {
            Ok(completed) => Ok(completed?),
            Err(_) => Err(Error::Stalled(patience)),
        }
    }

    /// Starts the snapshot, in a task of its own: one that is started when nobody waits for it any more is known
    /// all the same, or given up.
    async fn start(&self, request: StartRequest, attempt: &Attempt) -> Result<Snapshot> {
        let (image, token) = (Arc::clone(&self.image), attempt.client_token.clone());
        let started = tokio::spawn(async move {
            let snapshot = in_time(image.shop.store.start(request)).await?;
            if snapshot.state != SnapshotState::Pending {
                return Ok(snapshot);
            }
            let is_wanted = {
                let mut state = image.state();
                // A commit that goes on makes its snapshot, whatever becomes of the name.
                let removed = state.removed && !state.running;
                let attempt = state.layers.first_mut().and_then(|layer| layer.attempt.as_mut());
                let attempt = attempt.filter(|attempt| !removed && attempt.client_token == token);
                attempt.map(|attempt| attempt.snapshot = Some(snapshot.id.clone())).is_some()
            };
            if !is_wanted {
                image.abort(&snapshot.id).await;
            }
            Ok(snapshot)
        });
        started.await.unwrap_or_else(|_| Err(Error::Interrupted(DIED.to_owned())))
    }

    /// What the snapshot is a child of.
    async fn parent(&self, attempt: &Attempt) -> Result<Option<Arc<Image>>> {
        if !attempt.cut_off {
            self.image.find_base().await?;
        }
        let base = self.image.state().base.as_ref().map(|base| Arc::clone(base.image()));
        match (base, &attempt.wishes.parent) {
            (Some(base), _) if !attempt.cut_off => Ok(Some(base)),
            (None, Some(parent)) => {
                let snapshot = in_time(self.image.shop.store.describe(parent)).await?;
                Ok(Some(self.image.shop.image(snapshot)))
            }
            _ => Ok(None),
        }
    }

    async fn put_all(&self, snapshot: &Snapshot, plan: &Arc<Plan>) -> Result<CompleteRequest> {
        let indexes = self.candidates(plan).await?;
        self.commit.total.store(indexes.len(), Ordering::Relaxed);
        self.commit.done.store(0, Ordering::Relaxed);
        let (id, store) = (&snapshot.id, &self.image.shop.store);
        let mut checksum = Digester::default();
        let mut changed_blocks = 0;
        let most = self.image.shop.cache.budget() / PUT_SHARE / BLOCK_SIZE;
        let puts_at_once = store.parallelism().min(most).max(run_len());
        let runs = concurrent_runs().min((most / run_len()).max(1));
        let read = stream::iter(indexes.into_iter().map(BlockIndex))
            .chunks(run_len())
            .map(|run| self.read(plan, run))
            .buffered(runs)
            .map_ok(|run| stream::iter(run).map(Ok::<_, Error>))
            .try_flatten();
        let needed = read.try_filter_map(|(index, block, needed)| {
            if needed {
                checksum.update(block.digest().0);
                changed_blocks += 1;
            }
            let put = needed && !plan.marks.put.contains(index.0);
            if !put {
                self.commit.done.fetch_add(1, Ordering::Relaxed);
            }
            futures::future::ready(Ok(put.then_some((index, block))))
        });
        let puts = needed
            .map_ok(|(index, block)| async move {
                store.put_block(id, index, block).await?;
                Ok(index)
            })
            .try_buffer_unordered(puts_at_once);
        {
            let mut puts = std::pin::pin!(puts);
            let mut acknowledged = RoaringBitmap::new();
            let progress = || self.done() + plan.compared.load(Ordering::Relaxed);
            let mut done = 0;
            // The first block may have to wait until the store knows the snapshot.
            let mut patience = STALL + store.settling();
            // In a task of its own: puts that nobody polls may hold what it waits for.
            let mut flush: Option<(RoaringBitmap, JoinHandle<crate::store::Result<()>>)> = None;
            loop {
                let next = tokio::select! {
                    flushed = landed(&mut flush) => {
                        self.note_put(&flushed?)?;
                        continue;
                    }
                    next = tokio::time::timeout(patience, puts.try_next()) => next,
                };
                let next = match next {
                    Ok(next) => next?,
                    // Blocks that need not be put are progress too.
                    Err(_) if progress() > done => {
                        done = progress();
                        continue;
                    }
                    Err(_) => return Err(Error::Stalled(patience)),
                };
                let Some(index) = next else { break };
                patience = STALL;
                self.commit.done.fetch_add(1, Ordering::Relaxed);
                done = progress();
                self.image.state().layers[0].marks.put.insert(index.0);
                acknowledged.insert(index.0);
                if acknowledged.len() >= BETWEEN_FLUSHES && flush.is_none() {
                    let (store, id) = (Arc::clone(store), id.clone());
                    let task = tokio::spawn(async move { store.flush(&id).await });
                    flush = Some((std::mem::take(&mut acknowledged), task));
                }
            }
        }
        Ok(CompleteRequest { changed_blocks, checksum: Some(checksum.finish()) })
    }

    fn done(&self) -> u64 {
        self.commit.done.load(Ordering::Relaxed)
    }

    /// Notes in the map what is durable in the store.
    fn note_put(&self, blocks: &RoaringBitmap) -> Result<()> {
        let mut state = self.image.state();
        let layer = &mut state.layers[0];
        let mut rest = blocks.iter().peekable();
        while let Some(start) = rest.next() {
            let mut end = start + 1;
            while rest.next_if_eq(&end).is_some() {
                end += 1;
            }
            layer
                .mark(Mark::Put, start..end)
                .map_err(|e| Error::io("stage in", &self.image.directory, e))?;
        }
        Ok(())
    }

    /// The blocks that may have to be put.
    async fn candidates(&self, plan: &Plan) -> Result<RoaringBitmap> {
        let end = end_block(plan.len);
        let mut candidates = &plan.marks.staged | &plan.marks.holes;
        let volume = VolumeSize::holding(plan.len).map_err(|_| Error::Empty)?.blocks().0;
        let base = self.image.state().base.is_some();
        if let Some(parent) = plan.parent.as_ref().filter(|_| !base) {
            // A parent that was wished for: what it has and the image has not must become zeros.
            let mut at = 0;
            while let Some(start) = in_time(parent.seek_data(at)).await? {
                let stop = in_time(parent.seek_hole(start)).await?;
                let stop = stop.unwrap_or(parent.len()).max(start + 1);
                candidates.insert_range(BlockIndex::containing(start).0..end_block(stop));
                at = stop;
            }
        }
        if plan.all_zeros {
            let begin = plan.parent.as_ref().map_or(0, |p| p.snapshot().volume_size.blocks().0);
            let mut holes = RoaringBitmap::new();
            holes.insert_range(begin.min(volume)..volume);
            let holes = holes - &plan.marks.staged;
            if let Some(why) = too_many(holes.len()) {
                return Err(Error::Refused(why));
            }
            candidates |= holes;
        }
        // What is behind the end of the image is not in it; holes there are those of the parent.
        candidates.remove_range(volume..);
        debug_assert!(plan.marks.staged.max().is_none_or(|last| last < end));
        Ok(candidates)
    }

    /// Blocks, and whether each has to be put.
    async fn read(
        &self,
        plan: &Arc<Plan>,
        run: Vec<BlockIndex>,
    ) -> Result<Vec<(BlockIndex, Block, bool)>> {
        let is_staged = |index: &BlockIndex| plan.marks.staged.contains(index.0);
        let staged: Vec<_> = run.iter().copied().filter(is_staged).collect();
        let (image, shared) = (Arc::clone(&self.image), Arc::clone(plan));
        let mut blocks = blocking(move || image.read_frozen(&shared, &staged)).await?.into_iter();
        let found = run.into_iter().map(|index| {
            let block = if is_staged(&index) { blocks.next() } else { None };
            self.is_needed(plan, index, block.unwrap_or(Block::Zero))
        });
        futures::future::try_join_all(found).await
    }

    async fn is_needed(
        &self,
        plan: &Plan,
        index: BlockIndex,
        block: Block,
    ) -> Result<(BlockIndex, Block, bool)> {
        let theirs = match &plan.parent {
            Some(parent) => parent.listed(index).await?,
            None => None,
        };
        let needed = match theirs {
            // What the parent has is put where it differs; zeros too, or the parent shows through.
            Some(ListedBlock { digest: Some(digest), .. }) if digest != block.digest() => true,
            // What was written is kept only as what the parent has: it has to be there.
            Some(ListedBlock { digest: Some(_), .. }) if !block.is_zero() => {
                let parent = plan.parent.as_ref().expect("it has the block");
                let is_lost = match parent.block(index, Urgency::Prefetch).await {
                    Ok(_) => false,
                    Err(error) if error.kind() == ErrorKind::Corrupt => true,
                    Err(error) => return Err(error.into()),
                };
                plan.compared.fetch_add(1, Ordering::Relaxed);
                is_lost
            }
            Some(ListedBlock { digest: Some(_), .. }) => false,
            // The whole image was written, not what differs: reading a block costs less than keeping
            // it twice.
            Some(_) if plan.whole => {
                let parent = plan.parent.as_ref().expect("it has the block");
                let theirs = parent.block(index, Urgency::Prefetch).await?;
                plan.compared.fetch_add(1, Ordering::Relaxed);
                theirs != block
            }
            Some(_) => true,
            None => {
                let staged = plan.marks.staged.contains(index.0);
                !block.is_zero() || plan.all_zeros || (plan.full_copy && staged)
            }
        };
        Ok((index, block, needed))
    }
}

impl WorkingImage {
    /// Reads staged blocks, and checks them, or notes what they are. Waits for the disk.
    fn read_frozen(&self, plan: &Plan, indexes: &[BlockIndex]) -> Result<Vec<Block>> {
        let bytes = indexes.iter().map(|index| {
            let mut buffer = BlockBuffer::block();
            read_padded(&plan.files.data, &mut buffer, index.offset())?;
            Ok(buffer.freeze())
        });
        let bytes = bytes.collect::<std::io::Result<_>>();
        let blocks = Block::many(bytes.map_err(|e| Error::io("read", &self.directory, e))?);
        for (index, block) in indexes.iter().zip(&blocks) {
            self.check_or_note(plan, *index, block)?;
        }
        Ok(blocks)
    }

    /// Checks a staged block against what is vouched for, or notes what it is.
    fn check_or_note(&self, plan: &Plan, index: BlockIndex, block: &Block) -> Result<()> {
        let failed = |e| Error::io("read", &self.directory, e);
        if !plan.marks.hashed.contains(index.0) {
            return plan.files.write_sum(index.0, block.digest()).map_err(failed).and_then(|()| {
                let mut state = self.state();
                state.layers[0].mark(Mark::Hashed, index.0..index.0 + 1).map_err(failed)
            });
        }
        match plan.files.is_sum(index.0, block.digest()).map_err(failed)? {
            true => Ok(()),
            false => Err(self.damaged(index)),
        }
    }
}

fn request(
    attempt: &Attempt,
    parent: Option<&Image>,
    settings: &super::Settings,
) -> Result<StartRequest> {
    let volume_size = VolumeSize::holding(attempt.len).map_err(|_| Error::Empty)?;
    let Wishes { description, tags: own, encrypted, kms_key, .. } = &attempt.wishes;
    let mut tags = settings.tags_of(&attempt.name, own);
    tags.remove(LENGTH_TAG);
    if attempt.len != volume_size.bytes() {
        tags.insert(LENGTH_TAG.to_owned(), attempt.len.to_string());
    }
    let by_default = || {
        let text = format!("Written to new/{}", attempt.name);
        text.chars().take(MAX_DESCRIPTION_CHARS).collect()
    };
    let description =
        description.clone().or_else(|| settings.description.clone()).unwrap_or_else(by_default);
    // A child is encrypted as its parent is, and must not be asked for it.
    let encrypt = parent.is_none();
    Ok(StartRequest {
        parent: parent.map(|parent| parent.snapshot().id.clone()),
        tags,
        description,
        client_token: Some(attempt.client_token.clone()),
        encrypted: encrypt && (*encrypted || settings.encrypted),
        kms_key: kms_key.clone().or_else(|| settings.kms_key.clone()).filter(|_| encrypt),
        ..StartRequest::new(volume_size)
    })
}

/// The blocks that a flush under way has made durable, once it is done; never, if there is none.
async fn landed(
    flush: &mut Option<(RoaringBitmap, JoinHandle<crate::store::Result<()>>)>,
) -> Result<RoaringBitmap> {
    let Some((_, task)) = flush else { return std::future::pending().await };
    let result = task.await;
    let (blocks, _) = flush.take().expect("it was there");
    match result {
        Ok(result) => result.map(|()| blocks).map_err(Error::from),
        Err(_) => Err(Error::Interrupted("saving blocks died".to_owned())),
    }
}

/// What a call to the store answers, within the time that a commit waits for one.
pub(super) async fn in_time<T, E: Into<Error>>(
    call: impl Future<Output = std::result::Result<T, E>>,
) -> Result<T> {
    match tokio::time::timeout(STALL, call).await {
        Ok(result) => result.map_err(Into::into),
        Err(_) => Err(Error::Stalled(STALL)),
    }
}
