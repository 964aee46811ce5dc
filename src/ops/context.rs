//! What an operation is given to work with.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;

use super::{Error, Result, Resume};
use crate::arguments::{ResumeArgs, ScopeArgs, ScreenArgs};
use crate::model::SnapshotId;
use crate::store::repository::Repository;
use crate::store::{SharedStore, StoreOptions, StoreUrl, Stores};
use crate::transfer::SharedProgress;
use crate::transfer::engine::Run;

/// Where an operation tells what it does: a terminal, or the files of a job.
pub(crate) trait Console: Send + Sync {
    /// A line of stdout that stands before the result.
    fn line(&self, text: &str);

    /// A line of stderr.
    fn tell(&self, text: &str);

    /// Shows how far something is.
    fn progress(&self, what: &'static str) -> SharedProgress;

    /// Asks whether something that cannot be undone shall be done.
    ///
    /// # Errors
    ///
    /// If nobody can be asked.
    fn confirm(&self, question: &str) -> Result<bool>;
}

/// The working images of the mount that an operation runs in.
#[async_trait]
pub(crate) trait WorkingImages: Send + Sync {
    /// Makes a snapshot of one; waits until it is there, or, if `wait`, until the store calls it completed.
    async fn commit(&self, name: &str, wait: bool, progress: SharedProgress) -> Result<SnapshotId>;

    /// Ends the commit of one that is under way.
    fn cancel_commit(&self, name: &str) -> Result<()>;

    /// Makes one that begins as a snapshot.
    async fn clone_of(&self, snapshot: &SnapshotId, name: &str) -> Result<()>;
}

/// What all operations of a process share.
#[derive(Clone, Debug)]
pub(crate) struct House {
    pub(crate) stores: Arc<Stores>,
    /// The store that is meant where none is named.
    pub(crate) from: StoreUrl,
    pub(crate) options: StoreOptions,
    /// That store, where it is open already.
    pub(crate) opened: Option<SharedStore>,
    /// Where transfers keep their journals.
    pub(crate) journals: PathBuf,
    /// Where no target and no source may be, and why.
    pub(crate) closed: Vec<(PathBuf, &'static str)>,
    /// Paths must be absolute: nobody knows the directory that they would be relative to.
    pub(crate) absolute: bool,
}

/// One run of an operation.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) house: Arc<House>,
    pub(crate) screen: ScreenArgs,
    /// Says what would be done, and does nothing.
    pub(crate) dry_run: bool,
    pub(crate) console: Arc<dyn Console>,
    /// Memory and tokens; without a progress.
    pub(crate) run: Run,
    pub(crate) working: Option<Arc<dyn WorkingImages>>,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("house", &self.house).finish_non_exhaustive()
    }
}

impl Context {
    /// Prints a line before the result, unless that is wanted alone.
    pub(crate) fn line(&self, text: impl fmt::Display) {
        if !self.screen.json && !self.screen.quiet {
            self.console.line(&text.to_string());
        }
    }

    /// Says something that no program wants to read.
    pub(crate) fn note(&self, text: impl fmt::Display) {
        if !self.screen.quiet {
            self.console.tell(&text.to_string());
        }
    }

    /// Says what is wrong, whatever else is wanted.
    pub(crate) fn warn(&self, text: impl fmt::Display) {
        self.console.tell(&text.to_string());
    }

    /// How a transfer is run that shows how far it is.
    pub(crate) fn run_showing(&self, what: &'static str) -> Run {
        Run { progress: self.console.progress(what), ..self.run.clone() }
    }

    /// Opens the store.
    pub(crate) async fn open(&self) -> Result<SharedStore> {
        match &self.house.opened {
            Some(store) => Ok(Arc::clone(store)),
            None => self.open_scope(&ScopeArgs::default()).await,
        }
    }

    /// Opens the store, for a list of some of its snapshots.
    pub(crate) async fn open_scope(&self, scope: &ScopeArgs) -> Result<SharedStore> {
        let House { stores, from, options, .. } = &*self.house;
        let ScopeArgs { owners, filters } = scope.clone();
        let options = StoreOptions { owners, filters, ..options.clone() };
        Ok(stores.open(from, &options).await?)
    }

    /// The store, where it must be a repository.
    pub(crate) async fn repository(&self) -> Result<Arc<Repository>> {
        let House { stores, from, options, .. } = &*self.house;
        let directory = from.directory().map_err(|error| Error::Refused(error.to_string()))?;
        Ok(stores.repository(directory, options).await?)
    }

    /// The mount that this runs in.
    pub(crate) fn working(&self) -> Result<&dyn WorkingImages> {
        let none = || Error::Refused("only a mount has working images".to_owned());
        self.working.as_deref().ok_or_else(none)
    }

    /// Where a transfer with this store, named by `url`, keeps its journal.
    pub(crate) fn resume(
        &self,
        url: &StoreUrl,
        store: &SharedStore,
        args: &ResumeArgs,
    ) -> Result<Resume> {
        let journals = (!args.suppress_writes).then(|| self.house.journals.clone());
        let store = format!("{} {}", url.absolute()?, store.place()).trim_end().to_owned();
        Ok(Resume { journals, store, restart: args.restart })
    }

    /// Says what the requests to a service that is paid for have cost.
    pub(crate) fn tell_cost(&self, store: &SharedStore) {
        let Some(usage) = store.usage() else { return };
        let sent: u64 = usage.requests.iter().map(|(_, sent)| sent).sum();
        let again = match usage.again {
            0 => String::new(),
            again => format!(", {again} of them again"),
        };
        self.note(format_args!("{sent} requests{again}: about ${:.4}", usage.dollars()));
    }

    /// Refuses a file or device that must not be read or written here.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`], with the reason.
    pub(crate) fn check_place(&self, path: &Path) -> Result<()> {
        let refused = |why: &str| Err(Error::Refused(format!("{}: {why}", path.display())));
        if self.house.absolute && !path.is_absolute() {
            return refused("give an absolute path");
        }
        let place = std::path::absolute(path)?;
        self.check_closed(path, &place)?;
        // What is not there yet is where its directory is.
        let real = place
            .canonicalize()
            .ok()
            .or_else(|| Some(place.parent()?.canonicalize().ok()?.join(place.file_name()?)));
        let Some(real) = real else { return Ok(()) };
        self.check_closed(path, &real)?;
        match backing_file(&real) {
            Some(file) => self.check_closed(path, &file),
            None => Ok(()),
        }
    }

    fn check_closed(&self, path: &Path, place: &Path) -> Result<()> {
        let mut closed = self.house.closed.iter();
        match closed.find(|(closed, _)| place.starts_with(closed)) {
            Some((_, why)) => Err(Error::Refused(format!("{}: {why}", path.display()))),
            None => Ok(()),
        }
    }
}

/// The file behind a loop device or one of its partitions.
fn backing_file(device: &Path) -> Option<PathBuf> {
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
    let found = device.metadata().ok().filter(|found| found.file_type().is_block_device())?;
    let (major, minor) = (nix::sys::stat::major(found.rdev()), nix::sys::stat::minor(found.rdev()));
    let sysfs = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    ["loop/backing_file", "../loop/backing_file"].iter().find_map(|file| {
        let path = std::fs::read_to_string(sysfs.join(file)).ok()?;
        Some(PathBuf::from(path.trim_end_matches('\n')))
    })
}
