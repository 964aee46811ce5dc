//! What all working images of a mount share.

use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use super::super::Image;
use super::super::staging::Staging;
use super::layer::Commit;
use super::{attributes, name, put};
use crate::cache::Cache;
use crate::model::{LENGTH_TAG, NAME_TAG, Snapshot, Tags, check_tags};
use crate::store::SharedStore;
use crate::transfer::engine::{Lender, Memory};

/// Commits that put blocks at the same time, at most: as many as the budget has memory for.
const MAX_COMMITS: usize = 2;

/// Part of the budget of the mount that blocks on their way to the store may take.
const PUT_SHARE: usize = 8;

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
    /// What is shorter than what is on it, or no raw image, is not committed.
    pub check_images: bool,
    /// What begins anew is a child of what was there before, or of the newest snapshot of its name.
    pub parent_auto: bool,
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
            check_images: true,
            parent_auto: false,
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
    pub(super) fn tags_of(&self, name: &str, own: &Tags) -> Tags {
        let mut tags = self.tags.clone();
        tags.entry(NAME_TAG.to_owned()).or_insert_with(|| name::stem(name).to_owned());
        tags.extend(own.clone());
        tags.insert(LENGTH_TAG.to_owned(), String::new());
        tags
    }
}

/// Learns of the commits that nobody asked for by name: by closing a file, say.
pub(crate) trait Watch: Debug + Send + Sync {
    /// A commit of the image of this name begins, or waits for another one. Must not wait itself.
    fn commit_begins(&self, name: &str, commit: &Arc<Commit>);
}

/// What all working images of a mount share.
#[derive(Debug)]
pub struct Workshop {
    pub(super) store: SharedStore,
    pub(super) cache: Arc<Cache>,
    pub(super) staging: Staging,
    pub(super) settings: Settings,
    pub(super) commits: Semaphore,
    /// What blocks on their way to the store take room in.
    pub(super) memory: Memory,
    pub(super) damaged: Mutex<Vec<Damaged>>,
    pub(super) watch: OnceLock<Box<dyn Watch>>,
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

/// A budget for the blocks on their way of a mount. Jobs make one snapshot at a time, two with much memory: beside
/// the commits no more than one has to do without a loan.
pub(crate) fn memory(cache: &Arc<Cache>) -> Memory {
    let turns = (cache.budget() / (2 * put::COMMIT_MEMORY)).clamp(1, MAX_COMMITS);
    Memory::new(cache.budget() / PUT_SHARE).with_turns(turns, Arc::new(OfCache(Arc::clone(cache))))
}

/// Lends what a commit takes, too.
#[derive(Debug)]
struct OfCache(Arc<Cache>);

impl Lender for OfCache {
    fn lend(&self) -> Box<dyn Send + Sync> {
        Box::new(self.0.lend(put::COMMIT_MEMORY))
    }
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
        let (memory, watch) = (memory(&cache), OnceLock::new());
        Arc::new(Self { store, cache, staging, settings, commits, memory, damaged, watch })
    }

    /// Tells `watch` of commits from here on. Only the first one is told.
    pub(crate) fn watch(&self, watch: Box<dyn Watch>) {
        let _ = self.watch.set(watch);
    }

    /// What blocks on their way take room in: those of commits, and of all other transfers of the mount.
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// What [`WorkingImage::load_all`](super::WorkingImage::load_all) could not use.
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

    pub(super) fn image(&self, snapshot: Snapshot) -> Arc<Image> {
        Image::new(Arc::new(snapshot), Arc::clone(&self.store), Arc::clone(&self.cache))
    }
}
