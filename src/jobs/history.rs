//! The jobs of earlier mounts of a store.
//!
//! A mount keeps a document of each job in a directory of its own, named by the job's number, and in `newest` the
//! number of the newest one. A document is replaced whole. Nothing is synced: what a power cut takes is forgotten.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::job::{Job, Record};
use crate::model::Digest;
use crate::own;
use crate::store::document;

/// Bytes of a document. A longer one is not kept; all are shorter that are not full of control characters.
const MAX_RECORD: usize = 256 << 10;

/// Mounts of one store at the same time that have a history each. Further ones keep none.
const MAX_PLACES: u32 = 16;

/// How long an earlier mount may take to let go of its history after it was unmounted. A mount beside another one
/// waits for so long in vain.
const LETS_GO: Duration = Duration::from_millis(500);

/// Where the number of the newest job is. It is locked for as long as a mount uses the directory.
const NEWEST: &str = "newest";

/// Begins the name of a document that is being written.
const UNFINISHED: &str = ".new-";

/// The history that a mount keeps.
#[derive(Debug)]
pub(super) struct History {
    directory: PathBuf,
    /// The number of the newest job, and the file that it is in.
    newest: Mutex<(u64, Flock<File>)>,
    has_failed: AtomicBool,
}

impl History {
    /// The history of a store below `root`, for one of possibly several mounts of it; and the jobs that are in it,
    /// ascending.
    ///
    /// # Errors
    ///
    /// If none can be kept.
    pub(super) fn open(root: &Path, store: &str) -> io::Result<(Self, Vec<Job>)> {
        let key = &Digest::of(store.as_bytes()).to_hex()[..16];
        let lets_go = Instant::now() + LETS_GO;
        for n in 0..MAX_PLACES {
            let directory = root.join(format!("{key}-{n}"));
            own::make(&directory)?;
            let lock = loop {
                match lock(&directory.join(NEWEST))? {
                    None if n == 0 && Instant::now() < lets_go => {
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    lock => break lock,
                }
            };
            if let Some(lock) = lock {
                return Self::load(directory, lock);
            }
        }
        Err(io::Error::other(format!("{MAX_PLACES} other mounts of the store keep one")))
    }

    fn load(directory: PathBuf, lock: Flock<File>) -> io::Result<(Self, Vec<Job>)> {
        let mut noted = String::new();
        (&*lock).read_to_string(&mut noted)?;
        let mut newest = noted.trim().parse().unwrap_or(0);
        let mut jobs = Vec::new();
        for entry in std::fs::read_dir(&directory)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let Some(number) = name.parse().ok().filter(|number: &u64| number.to_string() == name)
            else {
                if name.starts_with(UNFINISHED) {
                    std::fs::remove_file(entry.path())?;
                }
                continue;
            };
            newest = newest.max(number);
            match document::decode(name, &own::read(&entry.path())?) {
                Ok(record) => jobs.push(Job::of_earlier(number, record)),
                // Of the time of a power cut, or of another version.
                Err(error) => {
                    tracing::warn!("job {number} of an earlier mount is forgotten: {error}");
                    std::fs::remove_file(entry.path())?;
                }
            }
        }
        jobs.sort_unstable_by_key(Job::number);
        let newest = Mutex::new((newest, lock));
        Ok((Self { directory, newest, has_failed: AtomicBool::new(false) }, jobs))
    }

    /// The number of the newest job, also when it was forgotten.
    pub(super) fn newest(&self) -> u64 {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    /// Keeps a job in the place of what was kept of it. Waits for the disk.
    pub(super) fn keep(&self, number: u64, record: &Record) {
        let Err(error) = self.note(number).and_then(|()| self.write(number, record)) else {
            return;
        };
        // It must not seem to be running.
        self.forget(number);
        if !self.has_failed.swap(true, Ordering::Relaxed) {
            without(&self.directory, &error);
        }
    }

    fn note(&self, number: u64) -> io::Result<()> {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if number > newest.0 {
            newest.0 = number;
            // As long as every other one, so that none leaves a part of another.
            newest.1.write_all_at(format!("{number:020}\n").as_bytes(), 0)?;
        }
        Ok(())
    }

    fn write(&self, number: u64, record: &Record) -> io::Result<()> {
        let bytes = document::encode(record);
        if bytes.len() > MAX_RECORD {
            self.forget(number);
            return Ok(());
        }
        let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(&self.directory)?;
        io::Write::write_all(&mut file, &bytes)?;
        file.persist(self.directory.join(number.to_string())).map_err(|e| e.error)?;
        Ok(())
    }

    /// Forgets a job. Waits for the disk.
    pub(super) fn forget(&self, number: u64) {
        let path = self.directory.join(number.to_string());
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("job {number} comes back at the next mount: {error}");
            }
            _ => {}
        }
    }
}

/// Says that jobs are not kept, and why.
pub(super) fn without(place: &Path, error: &io::Error) {
    tracing::warn!(
        "jobs are forgotten when this is unmounted: cannot keep them in {}: {error}; XDG_STATE_HOME names another place",
        place.display()
    );
}

fn lock(path: &Path) -> io::Result<Option<Flock<File>>> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    match Flock::lock(own::open(path, &mut options)?, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(error.into()),
    }
}
