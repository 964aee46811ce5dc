//! One file under `new/`: a base, and what was written over it.
//!
//! What is written goes to a generation of staging. A commit freezes it; what is written then goes
//! to a new generation over it. When the store calls the snapshot completed, that becomes the base
//! and its generation goes.
//!
//! Locks, in the order in which they are taken: `gate`, a copy-up lock, `recording`, `state`. The
//! last two are held for moments, and never over an `await`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::{RwLock, Semaphore};

use self::attributes::Attributes;
use self::base::Base;
use self::layer::{Layer, Source};
use self::opened::Handles;
use self::phase::Phase;
use super::staging::Staging;
use super::staging::record::{self, GenerationRecord, ImageRecord, Trouble, Wishes, boot};
use super::{Image, Reader};
use crate::blocking::blocking;
use crate::cache::Cache;
use crate::model::{
    BLOCK_SIZE_U64, BlockIndex, LENGTH_TAG, NAME_TAG, SnapshotId, SnapshotState, Tags, check_tags,
};
use crate::store::{ErrorKind, SharedStore};
use crate::transfer::engine::Memory;

mod attributes;
mod base;
mod change;
mod check;
mod commit;
mod error;
mod layer;
mod load;
mod name;
mod opened;
mod phase;
mod put;
mod read;
#[cfg(test)]
mod tests;

pub use attributes::{Maker, State, Status};
pub use error::{Error, Result};
pub use opened::{Closed, Opened};

/// Commits that put blocks at the same time, at most: as many as the budget has memory for.
const MAX_COMMITS: usize = 2;

/// Part of the budget of the mount that blocks on their way to the store may take.
const PUT_SHARE: usize = 8;

/// Locks that keep two writers from copying up one block at the same time.
const COPY_UPS: usize = 64;

/// Marks the directory of an image that was removed from `new/`.
const REMOVED: &str = "removed";

/// What the mount wants of all its working images.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Closing commits; else only asking for it does.
    pub commit_at_close: bool,
    /// Commits run in the background, since the kernel would end a request that takes long.
    pub in_background: bool,
    /// Put blocks of zeros too.
    pub full_copy: bool,
    /// Put the holes of an encrypted snapshot.
    pub encrypted_holes: bool,
    /// The description, unless an image has its own.
    pub description: Option<String>,
    /// Tags, unless an image has its own of the same key.
    pub tags: Tags,
    /// Ask for an encrypted snapshot.
    pub encrypted: bool,
    /// The key to encrypt it with.
    pub kms_key: Option<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            commit_at_close: true,
            in_background: false,
            full_copy: false,
            encrypted_holes: true,
            description: None,
            tags: Tags::new(),
            encrypted: false,
            kms_key: None,
        }
    }
}

impl Settings {
    /// Checks what every snapshot would be refused for.
    ///
    /// # Errors
    ///
    /// What is wrong, for people.
    pub fn check(&self) -> std::result::Result<(), String> {
        attributes::check_description(self.description.as_deref())?;
        check_tags(&self.tags_of(NAME_TAG, &Tags::new())).map_err(|e| e.to_string())
    }

    /// The tags of a snapshot that is made under a `name`, with the image's `own`; room for the length
    /// is kept.
    fn tags_of(&self, name: &str, own: &Tags) -> Tags {
        let mut tags = self.tags.clone();
        tags.entry(NAME_TAG.to_owned()).or_insert_with(|| name::stem(name).to_owned());
        tags.extend(own.clone());
        tags.insert(LENGTH_TAG.to_owned(), String::new());
        tags
    }
}

/// What all working images of a mount share.
#[derive(Debug)]
pub struct Workshop {
    store: SharedStore,
    cache: Arc<Cache>,
    staging: Staging,
    settings: Settings,
    commits: Semaphore,
    /// What blocks on their way to the store take room in.
    memory: Memory,
    damaged: Mutex<Vec<Damaged>>,
}

/// What is staged of an image and cannot be used. It stays where it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damaged {
    /// Its name in `new/`, or that of its directory, if that is damaged too.
    pub name: String,
    /// Where it is.
    pub directory: PathBuf,
    /// What is wrong with it.
    pub error: String,
}

impl Workshop {
    /// Working images over `store`, with their data in `staging`.
    pub fn new(
        store: SharedStore,
        cache: Arc<Cache>,
        staging: Staging,
        settings: Settings,
    ) -> Arc<Self> {
        let at_once = (cache.budget() / put::COMMIT_MEMORY).clamp(1, MAX_COMMITS);
        let (commits, damaged) = (Semaphore::new(at_once), Mutex::default());
        let memory = Memory::new(cache.budget() / PUT_SHARE);
        Arc::new(Self { store, cache, staging, settings, commits, memory, damaged })
    }

    /// What [`WorkingImage::load_all`] could not use.
    pub fn damaged(&self) -> Vec<Damaged> {
        self.damaged.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Where the data is.
    pub fn staging(&self) -> &Staging {
        &self.staging
    }

    /// Bytes that may still be staged.
    pub fn spare(&self) -> u64 {
        self.staging.spare().unwrap_or(0)
    }

    fn image(&self, snapshot: crate::model::Snapshot) -> Arc<Image> {
        Image::new(Arc::new(snapshot), Arc::clone(&self.store), Arc::clone(&self.cache))
    }
}

/// A working image.
pub struct WorkingImage {
    shop: Arc<Workshop>,
    directory: PathBuf,
    number: u64,
    /// Held for reading by whoever writes, for writing by whoever changes length or generation.
    gate: RwLock<()>,
    copy_ups: [tokio::sync::Mutex<()>; COPY_UPS],
    /// Held by whoever writes the document.
    recording: Mutex<()>,
    state: Mutex<Inner>,
}

struct Inner {
    name: String,
    /// It was unlinked, or another one was renamed over it.
    removed: bool,
    attributes: Attributes,
    len: u64,
    base: Base,
    /// From the bottom up. All but the last one are frozen.
    layers: Vec<Layer>,
    phase: Phase,
    /// Commits that somebody is about to begin in the background.
    starting: usize,
    wishes: Wishes,
    /// The thread that copies the attributes of another image to this one.
    copier: Option<u32>,
    snapshot: Option<SnapshotId>,
    handles: Handles,
    /// The document, or a name of it, may not be durable.
    unsynced: bool,
}

impl fmt::Debug for WorkingImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkingImage").field("number", &self.number).finish_non_exhaustive()
    }
}

impl WorkingImage {
    /// A new, empty image.
    ///
    /// # Errors
    ///
    /// If nothing can be staged.
    pub async fn create(shop: &Arc<Workshop>, name: &str, maker: Maker) -> Result<Arc<Self>> {
        Self::create_over(shop, name, maker, None).await
    }

    /// An image that begins as a snapshot is. Copies nothing.
    pub async fn create_over(
        shop: &Arc<Workshop>,
        name: &str,
        maker: Maker,
        base: Option<Arc<Image>>,
    ) -> Result<Arc<Self>> {
        let (shop, name) = (Arc::clone(shop), name.to_owned());
        blocking(move || {
            let directory = shop
                .staging
                .new_image()
                .map_err(|e| Error::io("make a file in", shop.staging.path(), e))?;
            let base = base.map_or(Base::None, Base::from);
            let image = Self::with(shop, directory, Inner::new(name, maker.into(), base));
            image.record(false)?;
            Ok(image)
        })
        .await
    }

    fn with(shop: Arc<Workshop>, directory: PathBuf, inner: Inner) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Arc::new(Self {
            shop,
            directory,
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            gate: RwLock::new(()),
            copy_ups: std::array::from_fn(|_| tokio::sync::Mutex::new(())),
            recording: Mutex::new(()),
            state: Mutex::new(inner),
        })
    }

    /// A number that no other working image of this process has.
    pub fn number(&self) -> u64 {
        self.number
    }

    fn state(&self) -> MutexGuard<'_, Inner> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the document; durably if `sync`, with the names of all files.
    fn record(&self, sync: bool) -> Result<()> {
        let _alone = self.recording.lock().unwrap_or_else(PoisonError::into_inner);
        let record = {
            let mut state = self.state();
            if state.removed {
                return Ok(());
            }
            // What changes from now on is not in it.
            state.unsynced = !sync;
            state.record(&self.directory)
        };
        let write = || {
            record.write(&self.directory, sync)?;
            if sync { self.shop.staging.sync_image(&self.directory) } else { Ok(()) }
        };
        write().map_err(|e| {
            self.state().unsynced = true;
            Error::io("stage in", &self.directory, e)
        })
    }

    async fn recorded(self: &Arc<Self>, sync: bool) -> Result<()> {
        let image = Arc::clone(self);
        blocking(move || image.record(sync)).await
    }

    /// Whether a writer was cut short, and that is not written down durably.
    fn is_newly_interrupted(&self) -> bool {
        let state = self.state();
        state.unsynced && matches!(state.phase.trouble(), Some(Trouble::Interrupted(_)))
    }

    /// Writes down that a writer was cut short, if one was: the next mount is to know it, whatever ends this
    /// one. A failure is logged: it is known here all the same.
    pub async fn record_interruption(self: &Arc<Self>) {
        if self.is_newly_interrupted()
            && let Err(error) = self.recorded(true).await
        {
            tracing::warn!("the next mount may take {} for whole: {error}", self.name());
        }
    }

    /// The same, while something else goes on.
    pub fn record_interruption_in_background(self: &Arc<Self>) {
        if self.is_newly_interrupted() {
            let image = Arc::clone(self);
            tokio::spawn(async move { image.record_interruption().await });
        }
    }

    /// Makes everything that was written durable on the local disk.
    pub async fn sync(self: &Arc<Self>) -> Result<()> {
        let _writing = self.gate.read().await;
        let image = Arc::clone(self);
        blocking(move || {
            let (files, unsynced) = {
                let state = image.state();
                let files: Vec<_> = state.layers.iter().map(|l| Arc::clone(&l.files)).collect();
                (files, state.unsynced)
            };
            for files in files {
                files.sync().map_err(|e| Error::io("stage in", &image.directory, e))?;
            }
            if unsynced { image.record(true) } else { Ok(()) }
        })
        .await
    }

    /// Takes it out of `new/`: what is staged goes once nobody has it open and no commit runs.
    pub async fn remove(self: &Arc<Self>) {
        let abort = {
            let mut state = self.state();
            state.removed = true;
            if state.phase.is_committing() {
                None
            } else {
                state.layers.first().and_then(Layer::pending)
            }
        };
        // So that it does not come back if the mount dies before it is gone.
        if let Err(error) = std::fs::write(self.directory.join(REMOVED), b"") {
            tracing::warn!("{} may come back: {error}", self.directory.display());
        }
        if let Some(id) = abort {
            self.abort(&id).await;
        }
        self.tidy();
    }

    /// Removes what is staged, if it is of no use any more.
    pub fn tidy(&self) {
        let layers = {
            let mut state = self.state();
            if !state.removed || state.handles.open > 0 || state.phase.is_committing() {
                return;
            }
            std::mem::take(&mut state.layers)
        };
        for layer in layers {
            self.shop.staging.give_back(layer.marks.staged.len());
        }
        if let Err(error) = Staging::discard(&self.directory)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(
                "{} is of no use any more, and stays: {error}",
                self.directory.display()
            );
        }
    }

    /// Ends it with the mount: a clean image goes, what is staged stays.
    pub fn leave(&self) {
        {
            let mut state = self.state();
            if !state.layers.is_empty()
                || state.phase.is_committing()
                || state.phase.trouble().is_some()
            {
                return;
            }
            state.removed = true;
            state.handles.open = 0;
        }
        self.tidy();
    }

    /// Gives up a snapshot that was begun. One that was completed, which may not have been heard
    /// of, stays: somebody may use it.
    async fn abort(&self, id: &SnapshotId) {
        match put::in_time(self.shop.store.describe(id)).await {
            Ok(snapshot) if snapshot.state == SnapshotState::Completed => return,
            Err(Error::Store(error)) if error.kind() == ErrorKind::NotFound => return,
            _ => {}
        }
        if let Err(error) = put::in_time(self.shop.store.delete(id)).await {
            tracing::warn!("{id} stays pending: {error}");
        }
    }
}

impl Inner {
    /// An image of which nothing is staged.
    fn new(name: String, attributes: Attributes, base: Base) -> Self {
        Self {
            name,
            removed: false,
            attributes,
            len: base.known().map_or(0, |base| base.image().len()),
            base,
            layers: Vec::new(),
            phase: Phase::Idle(None),
            starting: 0,
            wishes: Wishes::default(),
            copier: None,
            snapshot: None,
            handles: Handles::default(),
            unsynced: true,
        }
    }

    fn record(&self, directory: &Path) -> ImageRecord {
        let generation = |layer: &Layer| GenerationRecord {
            id: layer.files.id,
            frozen: layer.frozen,
            durable: layer.durable,
            attempt: layer.attempt.clone(),
        };
        let Attributes { mode, uid, gid, modified } = self.attributes;
        ImageRecord {
            id: record::id_of(directory).unwrap_or_default(),
            name: self.name.clone(),
            mode,
            uid,
            gid,
            modified,
            base: self.base.id(),
            snapshot: self.snapshot.clone(),
            trouble: self.phase.trouble(),
            wishes: self.wishes.clone(),
            boot: boot(),
            generations: self.layers.iter().map(generation).collect(),
        }
    }

    /// Where the content of a block is, as the lowest `layers` have it.
    fn source(&self, index: BlockIndex, layers: usize) -> Source {
        for layer in self.layers[..layers].iter().rev() {
            if layer.marks.staged.contains(index.0) {
                return Source::Staged(layer.staged(index.0));
            }
            if layer.marks.holes.contains(index.0) || layer.marks.cut_off {
                return Source::Zeros;
            }
        }
        match &self.base {
            Base::Known(base) if !base.image().is_known_empty(index) => {
                Source::Base(Arc::clone(base))
            }
            Base::Missing(missing) => Source::Missing(missing.error()),
            _ => Source::Zeros,
        }
    }

    /// Whether a block may have data below the uppermost generation.
    fn is_over_data(&self, index: BlockIndex) -> bool {
        let top = self.layers.len().saturating_sub(1);
        let cut_off = self.layers.last().is_some_and(|layer| layer.marks.cut_off);
        !cut_off && !matches!(self.source(index, top), Source::Zeros)
    }

    /// The generation that is committed next. Whoever asks knows that there is one.
    fn lowest(&self) -> &Layer {
        self.layers.first().expect("only the end of its commit takes it away")
    }

    fn lowest_mut(&mut self) -> &mut Layer {
        self.layers.first_mut().expect("only the end of its commit takes it away")
    }

    /// The generation that takes what is written, if there is one.
    fn active(&mut self) -> Option<&mut Layer> {
        self.layers.last_mut().filter(|layer| !layer.frozen)
    }

    /// Whether what is staged is known to be what a commit failed to make a snapshot of, or may
    /// have made one of: a change must be noted first.
    fn is_as_attempted(&self) -> bool {
        let [layer] = &self.layers[..] else { return false };
        let attempt = layer.attempt.as_ref();
        let begun = attempt.is_some_and(|attempt| attempt.snapshot.is_some() && !attempt.changed);
        !layer.frozen && (begun || matches!(self.phase, Phase::Failed(_)))
    }

    fn is_dirty(&self) -> bool {
        self.layers.last().is_some_and(|layer| !layer.frozen)
    }
}

/// One past the last block of so many bytes.
fn end_block(len: u64) -> u32 {
    BlockIndex::containing(len.next_multiple_of(BLOCK_SIZE_U64)).0
}
