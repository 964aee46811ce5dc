//! One file under `new/`: a base, and what was written over it.
//!
//! What is written goes to a generation of staging. A commit freezes it; what is written then goes
//! to a new generation over it. When the store calls the snapshot completed, that becomes the base
//! and its generation goes.
//!
//! Locks, in the order in which they are taken: `gate`, a copy-up lock, `recording`, `state`. The
//! last two are held for moments, and never over an `await`.

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::RwLock;

use self::attributes::Attributes;
use self::base::Base;
use self::layer::{Layer, Source};
use self::opened::Handles;
use self::phase::Phase;
use super::staging::lost::Lost;
use super::staging::record::{Trouble, Wishes};
use super::staging::{Files, Staging};
use super::{Image, Reader};
use crate::blocking::blocking;
use crate::model::{BLOCK_SIZE_U64, BlockIndex, SnapshotId, SnapshotState};
use crate::store::ErrorKind;
use crate::transfer::Progress;

mod active;
mod attributes;
mod base;
mod change;
mod check;
mod commit;
mod document;
mod error;
mod layer;
mod load;
mod name;
mod opened;
mod phase;
mod put;
mod read;
mod run;
#[cfg(test)]
mod tests;
mod whole;
mod workshop;

pub use attributes::{Maker, State, Status};
pub use error::{Error, Result};
pub(crate) use layer::Commit;
pub use opened::{Closed, Opened};
pub use workshop::{Damaged, Settings, Workshop};
pub(crate) use workshop::{Watch, memory};

/// Locks that keep two writers from copying up one block at the same time.
const COPY_UPS: usize = 64;

/// Marks the directory of an image that was removed from `new/`.
const REMOVED: &str = "removed";

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
    /// Who sees how far its commits are.
    watchers: Mutex<Vec<Weak<dyn Progress>>>,
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
    /// What programs wrote in vain since it was committed.
    lost: Lost,
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
            watchers: Mutex::default(),
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
        let mut options = std::fs::File::options();
        options.write(true).create(true).truncate(false);
        if let Err(error) = crate::own::open(&self.directory.join(REMOVED), &mut options) {
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
            lost: Lost::default(),
            starting: 0,
            wishes: Wishes::default(),
            copier: None,
            snapshot: None,
            handles: Handles::default(),
            unsynced: true,
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

    /// The generation with these files, unless it has become a snapshot.
    fn layer_with(&mut self, files: &Files) -> Option<&mut Layer> {
        self.layers.iter_mut().find(|layer| layer.files.id == files.id)
    }

    fn is_dirty(&self) -> bool {
        self.layers.last().is_some_and(|layer| !layer.frozen)
    }
}

/// One past the last block of so many bytes.
fn end_block(len: u64) -> u32 {
    BlockIndex::containing(len.next_multiple_of(BLOCK_SIZE_U64)).0
}
