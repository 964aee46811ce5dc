//! Making the snapshot of one frozen generation.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use roaring::RoaringBitmap;

use super::commit::DIED;
use super::layer::Commit;
use super::{Error, Result, WorkingImage};
use crate::blocking::blocking;
use crate::image::Image;
use crate::image::staging::Files;
use crate::image::staging::files::read_padded;
use crate::image::staging::map::{Mark, Marks};
use crate::image::staging::record::{Attempt, Wishes};
use crate::model::{
    Block, BlockBuffer, BlockIndex, Digest, LENGTH_TAG, MAX_DESCRIPTION_CHARS, NAME_TAG, Snapshot,
    SnapshotId, SnapshotState, VolumeSize,
};
use crate::store::page::newest_named;
use crate::store::{self, ErrorKind, ListedBlock, StartRequest};
use crate::transfer::engine::{Run, transfer_to};
use crate::transfer::journal::Journal;
use crate::transfer::sink::snapshot::{SnapshotSink, Zeros};
use crate::transfer::source::{Change, Source};
use crate::transfer::{self, Progress, SharedProgress};

/// How long a call to the store may take that a commit waits for.
const STALL: Duration = Duration::from_mins(1);

/// Memory that a commit takes of the budget of the mount: blocks on their way, and what a store
/// gathers before it writes.
pub(super) const COMMIT_MEMORY: usize = 160 << 20;

/// One attempt after the other to commit the lowest generation.
pub(super) struct Put {
    pub(super) image: Arc<WorkingImage>,
    pub(super) commit: Arc<Commit>,
}

impl Put {
    /// Makes the snapshot; when this returns the store has accepted it whole.
    pub(super) async fn run(&self) -> Result<Snapshot> {
        let shop = Arc::clone(&self.image.shop);
        let _turn = shop.commits.acquire().await.expect("it is never closed");
        let _memory = shop.cache.lend(COMMIT_MEMORY);
        let resumed = self.attempt().snapshot.is_some();
        match self.once().await {
            // What was begun before is gone or damaged, takes nothing more, or was asked for otherwise.
            Err(Error::Store(error))
                if error.kind() == ErrorKind::Conflict
                    || (resumed
                        && matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Corrupt)) =>
            {
                tracing::info!("beginning anew: {error}");
                self.image.state().lowest_mut().renew();
                self.image.recorded(true).await?;
                self.once().await
            }
            result => result,
        }
    }

    fn attempt(&self) -> Attempt {
        let state = self.image.state();
        state.lowest().attempt.clone().expect("a frozen generation has one")
    }

    async fn once(&self) -> Result<Snapshot> {
        let shop = &self.image.shop;
        let attempt = self.attempt();
        if let Some(forsaken) = &attempt.forsaken {
            self.image.abort(forsaken).await;
        }
        let mut parent = self.parent(&attempt).await?;
        let chosen = if parent.is_none() { self.chosen_parent(&attempt).await? } else { None };
        let is_chosen = chosen.is_some();
        parent = parent.or(chosen);
        let mut request = request(&attempt, parent.as_deref(), &shop.settings)?;
        let mut started = self.start(request.clone(), &attempt).await;
        if let Err(error) = &started
            && is_chosen
            && matches!(error, Error::Store(error) if error.kind().refuses_as_asked())
        {
            tracing::warn!("{} has no parent after all: {error}", attempt.name);
            parent = None;
            request = self::request(&attempt, None, &shop.settings)?;
            started = self.start(request.clone(), &attempt).await;
        }
        let snapshot = started?;
        let asked_to_encrypt = request.encrypted;
        let conflict =
            |why: &str| store::Error::new(ErrorKind::Conflict, format!("{} {why}", snapshot.id));
        match snapshot.state {
            SnapshotState::Pending => {}
            // The completion was accepted before, and the answer was lost.
            SnapshotState::Completed if !attempt.changed => return Ok(snapshot),
            SnapshotState::Completed => return Err(conflict("is what was there before").into()),
            SnapshotState::Error | SnapshotState::Archived => {
                return Err(conflict("failed before it was complete").into());
            }
        }
        if let Some(attempt) = self.image.state().lowest_mut().attempt.as_mut() {
            attempt.forsaken = None;
        }
        self.image.recorded(true).await?;
        let is_encrypted = asked_to_encrypt || snapshot.encrypted;
        self.put_all(snapshot, &attempt, parent, is_encrypted).await
    }

    /// Puts what is staged, and completes the snapshot.
    async fn put_all(
        &self,
        snapshot: Snapshot,
        attempt: &Attempt,
        parent: Option<Arc<Image>>,
        is_encrypted: bool,
    ) -> Result<Snapshot> {
        let shop = &self.image.shop;
        let mut staged = {
            let state = self.image.state();
            let layer = state.lowest();
            let is_whole = state.base.known().is_none() || attempt.cut_off;
            let beneath = parent.as_ref().filter(|_| !is_whole);
            Staged {
                image: Arc::clone(&self.image),
                files: Arc::clone(&layer.files),
                marks: layer.marks.clone(),
                volume: VolumeSize::holding(attempt.len).map_err(|_| Error::Empty)?.blocks(),
                whole_from: beneath
                    .map_or(BlockIndex::ZERO, |base| base.snapshot().volume_size.blocks()),
                was_changed: attempt.changed,
            }
        };
        if attempt.snapshot.is_some() {
            staged.catch_up(&snapshot.id).await?;
        }
        let staged = Arc::new(staged);
        let (data, zeros) = staged.spoken_of();
        let (image, commit) = (Arc::clone(&self.image), Arc::clone(&self.commit));
        let watched: SharedProgress = Arc::new(Watched { image, commit });
        watched.total(data.len() + zeros.len());
        let zeros = Zeros {
            full_copy: shop.settings.full_copy,
            encrypted_holes: is_encrypted && shop.settings.encrypted_holes,
        };
        let is_base = staged.whole_from > BlockIndex::ZERO;
        let parent = parent.map(|parent| (Snapshot::clone(parent.snapshot()), is_base));
        let store = Arc::clone(&shop.store);
        let sink = SnapshotSink::new(store, snapshot, parent, zeros, &*staged).await;
        let sink = Arc::new(sink.map_err(Error::from)?);
        let run =
            Run { progress: Arc::clone(&watched), memory: shop.memory.clone(), ..Run::default() };
        let journal = Arc::clone(&staged) as Arc<dyn Journal>;
        let finished = transfer_to(staged, sink, journal, &run).await?;
        Ok(finished.snapshot.expect("a snapshot was made"))
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
                let removed = state.removed && !state.phase.is_committing();
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
        let base = self.image.state().base.known().map(|base| Arc::clone(base.image()));
        match (base, &attempt.wishes.parent) {
            (Some(base), _) if !attempt.cut_off => Ok(Some(base)),
            (None, Some(parent)) => {
                let snapshot = in_time(self.image.shop.store.describe(parent)).await?;
                Ok(Some(self.image.shop.image(snapshot)))
            }
            _ => Ok(None),
        }
    }

    /// The parent of an image that begins anew, if the mount wants one: what it was before, else the newest snapshot
    /// of its name.
    async fn chosen_parent(&self, attempt: &Attempt) -> Result<Option<Arc<Image>>> {
        let shop = &self.image.shop;
        if !shop.settings.parent_auto {
            return Ok(None);
        }
        let volume_size = VolumeSize::holding(attempt.len).map_err(|_| Error::Empty)?;
        let encrypts = attempt.wishes.encrypted || shop.settings.encrypted;
        let suits = |parent: &Snapshot| {
            parent.volume_size <= volume_size && (parent.encrypted || !encrypts)
        };
        let base = self.image.state().base.known().map(|base| Arc::clone(base.image()));
        if let Some(base) = base {
            return Ok(Some(base).filter(|base| suits(base.snapshot())));
        }
        let tags = shop.settings.tags_of(&attempt.name, &attempt.wishes.tags);
        let Some(name) = tags.get(NAME_TAG).filter(|name| !name.is_empty()) else {
            return Ok(None);
        };
        let newest = in_time(newest_named(&*shop.store, name)).await?;
        Ok(newest.filter(suits).map(|snapshot| shop.image(snapshot)))
    }
}

/// How far a commit is, for all who want to see that.
struct Watched {
    image: Arc<WorkingImage>,
    commit: Arc<Commit>,
}

impl Watched {
    fn show(&self, show: impl Fn(&dyn Progress)) {
        let mut watchers = self.image.watchers();
        watchers.retain(|watcher| watcher.upgrade().inspect(|watcher| show(&**watcher)).is_some());
    }
}

impl Progress for Watched {
    fn total(&self, blocks: u64) {
        self.commit.total.store(blocks, Ordering::Relaxed);
        self.commit.done.store(0, Ordering::Relaxed);
        self.show(|watcher| watcher.total(blocks));
    }

    fn advance(&self, blocks: u64) {
        self.commit.done.fetch_add(blocks, Ordering::Relaxed);
        self.show(|watcher| watcher.advance(blocks));
    }

    fn block(&self, which: &dyn fmt::Display, blocks: u64, failed: Option<&dyn fmt::Display>) {
        self.show(|watcher| watcher.block(which, blocks, failed));
    }
}

impl WorkingImage {
    fn watchers(&self) -> MutexGuard<'_, Vec<Weak<dyn Progress>>> {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows how far its commits are, as long as the progress is there.
    pub(crate) fn show_commits(&self, progress: &SharedProgress) {
        let mut watchers = self.watchers();
        if let Some((done, total)) = self.status().progress.filter(|(_, total)| *total > 0) {
            progress.total(total);
            progress.advance(done);
        }
        watchers.push(Arc::downgrade(progress));
    }
}

/// A frozen generation: a source, and the journal of what the store has of it.
#[derive(Debug)]
struct Staged {
    image: Arc<WorkingImage>,
    files: Arc<Files>,
    marks: Marks,
    /// One past the last block of the volume.
    volume: BlockIndex,
    /// What is not staged from here on is a hole; below it is as in the base.
    whole_from: BlockIndex,
    /// The snapshot may have blocks of what was there before.
    was_changed: bool,
}

impl Staged {
    /// Notes what the store has got of it since something was noted last: the process that put it was killed.
    async fn catch_up(&mut self, id: &SnapshotId) -> Result<()> {
        let noted = Mutex::new(Ok(()));
        let tell = |blocks: &[(BlockIndex, Digest)]| {
            let is_new = |block: &&(BlockIndex, Digest)| {
                self.sum(block.0) == Some(block.1) && !self.marks.put.contains(block.0.0)
            };
            let new: Vec<_> = blocks.iter().filter(is_new).copied().collect();
            if let Err(error) = self.note(&new) {
                *noted.lock().unwrap_or_else(PoisonError::into_inner) = Err(error);
            }
        };
        match in_time(self.image.shop.store.put_before(id, &tell)).await {
            Err(Error::Store(error)) if error.kind() == ErrorKind::Corrupt => {
                return Err(error.into());
            }
            Err(error) => tracing::warn!("what {id} has got last may be put again: {error}"),
            Ok(()) => {}
        }
        noted.into_inner().unwrap_or_else(PoisonError::into_inner)?;
        if let Some(layer) = self.image.state().layer_with(&self.files) {
            self.marks.put.clone_from(&layer.marks.put);
        }
        Ok(())
    }

    /// The SHA-256 of what a block is, as far as it is known.
    fn sum(&self, index: BlockIndex) -> Option<Digest> {
        if !self.marks.staged.contains(index.0) {
            // A hole is put as zeros, where the parent has something.
            return Some(Digest::OF_ZEROS);
        }
        // A sum that cannot be read is computed again.
        self.marks.hashed.contains(index.0).then(|| self.files.read_sum(index.0).ok()).flatten()
    }

    /// The blocks of data, and those that read as zeros.
    fn spoken_of(&self) -> (RoaringBitmap, RoaringBitmap) {
        let mut staged = self.marks.staged.clone();
        staged.remove_range(self.volume.0..);
        let mut holes = self.marks.holes.clone();
        holes.insert_range(self.whole_from.0..self.volume.0.max(self.whole_from.0));
        holes -= &staged;
        // What is behind the end of the image is not in it.
        holes.remove_range(self.volume.0..);
        (staged, holes)
    }
}

#[async_trait]
impl Source for Staged {
    fn changes(&self) -> BoxStream<'static, transfer::Result<Change>> {
        let (staged, holes) = self.spoken_of();
        let end = self.volume.0;
        let (mut staged, mut holes) = (staged.into_iter().peekable(), runs(holes).peekable());
        let merged = std::iter::from_fn(move || {
            let next = staged.peek().map_or(end, |next| *next);
            let hole = holes.next_if(|hole| hole.start.0 < next).map(Change::Zeros);
            hole.or_else(|| staged.next().map(|next| Change::Data(BlockIndex(next), None)))
        });
        stream::iter(merged.map(Ok)).boxed()
    }

    async fn read(
        &self,
        blocks: &[(BlockIndex, Option<ListedBlock>)],
    ) -> transfer::Result<Vec<Block>> {
        let indexes: Vec<_> = blocks.iter().map(|(index, _)| *index).collect();
        let (image, files) = (Arc::clone(&self.image), Arc::clone(&self.files));
        let vouched: Vec<_> =
            indexes.iter().map(|index| self.marks.hashed.contains(index.0)).collect();
        let read = blocking(move || image.read_frozen(&files, &indexes, &vouched)).await;
        read.map_err(|error| transfer::Error::Staging(Arc::new(error)))
    }

    /// It does not change, but is checked: what is damaged must not seem to be what was put.
    fn is_read_again(&self) -> bool {
        true
    }

    async fn check(&self) -> transfer::Result<()> {
        if self.was_changed {
            // From here on the snapshot may be completed, as it is now.
            if let Some(layer) = self.image.state().layer_with(&self.files)
                && let Some(attempt) = layer.attempt.as_mut()
            {
                attempt.changed = false;
            }
            let recorded = self.image.recorded(true).await;
            recorded.map_err(|error| transfer::Error::Staging(Arc::new(error)))?;
        }
        Ok(())
    }
}

impl Journal for Staged {
    fn digest(&self, index: BlockIndex) -> Option<Digest> {
        self.marks.put.contains(index.0).then(|| self.sum(index)).flatten()
    }

    fn taken(&self, index: BlockIndex) {
        if let Some(layer) = self.image.state().layer_with(&self.files) {
            layer.marks.put.insert(index.0);
        }
    }

    fn note(&self, blocks: &[(BlockIndex, Digest)]) -> transfer::Result<()> {
        let put: RoaringBitmap = blocks.iter().map(|(index, _)| index.0).collect();
        let mut state = self.image.state();
        let Some(layer) = state.layer_with(&self.files) else { return Ok(()) };
        for run in runs(put) {
            layer
                .mark(Mark::Put, run.start.0..run.end.0)
                .map_err(|e| transfer::Error::io("stage in", &self.image.directory, e))?;
        }
        Ok(())
    }

    fn is_kept(&self) -> bool {
        true
    }

    /// What is staged stays, and is committed again.
    fn outlasts(&self, _: &transfer::Error) -> bool {
        true
    }
}

/// The runs of a set of blocks.
fn runs(blocks: RoaringBitmap) -> impl Iterator<Item = Range<BlockIndex>> {
    let mut blocks = blocks.into_iter().peekable();
    std::iter::from_fn(move || {
        let start = blocks.next()?;
        let mut end = start + 1;
        while blocks.next_if_eq(&end).is_some() {
            end += 1;
        }
        Some(BlockIndex(start)..BlockIndex(end))
    })
}

impl WorkingImage {
    /// Reads staged blocks, and checks those that are vouched for, or notes what they are. Waits for the disk.
    fn read_frozen(
        &self,
        files: &Files,
        indexes: &[BlockIndex],
        vouched: &[bool],
    ) -> Result<Vec<Block>> {
        let failed = |e| Error::io("read", &self.directory, e);
        let bytes = indexes.iter().map(|index| {
            let mut buffer = BlockBuffer::block();
            read_padded(&files.data, &mut buffer, index.offset())?;
            Ok(buffer.freeze())
        });
        let blocks = Block::many(bytes.collect::<std::io::Result<_>>().map_err(failed)?);
        for ((index, block), vouched) in indexes.iter().zip(&blocks).zip(vouched) {
            if *vouched {
                if !files.is_sum(index.0, block.digest()).map_err(failed)? {
                    return Err(self.damaged(*index));
                }
            } else {
                files.write_sum(index.0, block.digest()).map_err(failed)?;
                let mut state = self.state();
                if let Some(layer) = state.layer_with(files) {
                    layer.mark(Mark::Hashed, index.0..index.0 + 1).map_err(failed)?;
                }
            }
        }
        Ok(blocks)
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

/// What a call to the store answers, within the time that a commit waits for one.
pub(super) async fn in_time<T, E: Into<Error>>(
    call: impl Future<Output = std::result::Result<T, E>>,
) -> Result<T> {
    match tokio::time::timeout(STALL, call).await {
        Ok(result) => result.map_err(Into::into),
        Err(_) => Err(Error::Stalled(STALL)),
    }
}
