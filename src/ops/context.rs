//! What an operation is given to work with.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;

use super::shown::{Shown, Verbose};
use super::{Error, Result, Resume};
use crate::arguments::{ResumeArgs, ScopeArgs, ScreenArgs};
use crate::model::SnapshotId;
use crate::store::repository::Repository;
use crate::store::{SharedStore, StoreOptions, StoreUrl, Stores};
use crate::transfer::SharedProgress;
use crate::transfer::engine::Run;

/// Sinks of which each is shown by itself. Of more, all are shown together.
const MAX_SHOWN: usize = 8;

/// Where an operation tells what it does: a terminal, or the files of a job.
pub(crate) trait Console: Send + Sync {
    /// A line of stdout that stands before the result.
    fn line(&self, text: &str);

    /// A line of stderr.
    fn tell(&self, text: &str);

    /// Shows how far something is.
    fn progress(&self, what: &str) -> SharedProgress;

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
    /// `as_is` takes one that is known not to be whole, too.
    async fn commit(
        &self,
        name: &str,
        wait: bool,
        as_is: bool,
        progress: SharedProgress,
    ) -> Result<SnapshotId>;

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
    /// Where transfers keep their journals; nowhere, if nothing is to be written.
    pub(crate) journals: Option<PathBuf>,
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

    /// How a transfer to `place` is run that shows how far it is.
    pub(crate) fn run_showing(&self, what: &str, place: impl fmt::Display) -> Shown {
        self.show_by(self.console.progress(what), place)
    }

    /// The same for each of several places that get so many blocks; of many, how far all of them are.
    pub(crate) fn runs_showing(&self, what: &str, places: Vec<String>, blocks: u64) -> Vec<Shown> {
        let all = (places.len() > MAX_SHOWN).then(|| {
            let all = self.console.progress(what);
            all.total(blocks * places.len() as u64);
            all
        });
        let shown = places.into_iter().map(|place| {
            let progress = all.clone().unwrap_or_else(|| {
                let own = self.console.progress(&place);
                own.total(blocks);
                own
            });
            self.show_by(progress, place)
        });
        shown.collect()
    }

    fn show_by(&self, mut progress: SharedProgress, place: impl fmt::Display) -> Shown {
        if self.screen.verbose > 0 && !self.dry_run {
            let (console, each) = (Arc::clone(&self.console), self.screen.verbose > 1);
            progress = Arc::new(Verbose::new(progress, console, place.to_string(), each));
        }
        Shown::new(Run { progress, ..self.run.clone() })
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
        Ok(stores.repository(from, options).await?)
    }

    /// The mount that this runs in.
    pub(crate) fn working(&self) -> Result<&dyn WorkingImages> {
        let none = || Error::Refused("only a mount has working images".to_owned());
        self.working.as_deref().ok_or_else(none)
    }

    /// Where transfers keep their journals, if they may write anything.
    pub(crate) fn journals(&self, args: &ResumeArgs) -> Option<&Path> {
        self.house.journals.as_deref().filter(|_| !args.suppress_writes)
    }

    /// Where a transfer with this store, named by `url`, keeps its journal.
    pub(crate) fn resume(
        &self,
        url: &StoreUrl,
        store: &SharedStore,
        args: &ResumeArgs,
    ) -> Result<Resume> {
        let journals = self.journals(args).map(Path::to_owned);
        Ok(Resume { journals, store: place_of(url, store)?, restart: args.restart })
    }

    /// Says what the requests to a service that is paid for have cost.
    pub(crate) fn tell_cost(&self, store: &SharedStore) {
        if let Some(cost) = cost(store) {
            self.note(cost);
        }
    }

    /// The same, where there are several stores.
    pub(crate) fn tell_cost_of(&self, url: &StoreUrl, store: &SharedStore) {
        if let Some(cost) = cost(store) {
            self.note(format_args!("{url}: {cost}"));
        }
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

/// What the requests to a store have cost, if it is paid for.
fn cost(store: &SharedStore) -> Option<String> {
    let usage = store.usage()?;
    let sent = usage.sent();
    let again = match usage.again {
        0 => String::new(),
        again => format!(", {again} of them again"),
    };
    Some(format!("{sent} requests{again}: about ${:.4}", usage.dollars()))
}

/// A store, as it is told from others.
pub(crate) fn place_of(url: &StoreUrl, store: &SharedStore) -> Result<String> {
    // A repository is where its URL leads.
    let place = if url.is_repository() { String::new() } else { store.place() };
    Ok(format!("{} {place}", url.absolute()?).trim_end().to_owned())
}

/// The file behind a loop device or one of its partitions.
fn backing_file(device: &Path) -> Option<PathBuf> {
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
    let found = device.metadata().ok().filter(|found| found.file_type().is_block_device())?;
    let (major, minor) = (nix::sys::stat::major(found.rdev()), nix::sys::stat::minor(found.rdev()));
    let sysfs = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    ["loop/backing_file", "../loop/backing_file"].iter().find_map(|file| {
        let path = std::fs::read(sysfs.join(file)).ok()?;
        Some(OsStr::from_bytes(path.strip_suffix(b"\n").unwrap_or(&path)).into())
    })
}
