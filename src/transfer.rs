//! Moving blocks between snapshots, files and devices.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::task::AbortOnDropHandle;

use crate::model::Digest;
use crate::store::{self, ErrorKind};

pub(crate) mod engine;
pub(crate) mod holes;
pub(crate) mod journal;
pub(crate) mod sink;
pub(crate) mod source;

/// Runs of [`Digest::lanes`] blocks that are read from a file at the same time: one for each core, while
/// one more is read, and no more than 8, which are 16 to 128 MiB.
const MAX_RUNS: usize = 8;

/// Runs of blocks that are read from a file and hashed at the same time, at most.
pub(crate) fn concurrent_runs() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).saturating_add(1).min(MAX_RUNS)
}

/// Blocks that are read from a file together: as many as are hashed together best, or some, where a
/// processor hashes them one by one.
pub(crate) fn run_len() -> usize {
    Digest::lanes().max(4)
}

/// Receives how far the blocks of one sink are.
pub trait Progress: Send + Sync {
    /// There are this many, holes included, and none is done.
    fn total(&self, blocks: u64);
    /// This many more are done with, whether or not there was anything to do.
    fn advance(&self, blocks: u64);
    /// Something was done for a block, or for a run of them; or could not be, and why.
    fn block(&self, which: &dyn fmt::Display, blocks: u64, failed: Option<&dyn fmt::Display>) {
        let _ = (which, blocks, failed);
    }
    /// Nothing more comes.
    fn end(&self) {}
}

impl fmt::Debug for dyn Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Progress")
    }
}

/// A progress that nobody wants to see.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn total(&self, _: u64) {}
    fn advance(&self, _: u64) {}
}

/// A progress that is shared between tasks.
pub type SharedProgress = Arc<dyn Progress>;

/// Shows what somebody else counts.
#[derive(Debug)]
pub(crate) struct Follower {
    progress: SharedProgress,
    done: u64,
    total: u64,
}

impl Follower {
    pub(crate) fn new(progress: SharedProgress) -> Self {
        Self { progress, done: 0, total: 0 }
    }

    /// So much is done now.
    pub(crate) fn is_at(&mut self, done: u64, total: u64) {
        if total != self.total {
            self.progress.total(total);
            (self.done, self.total) = (0, total);
        }
        self.progress.advance(done.saturating_sub(self.done));
        self.done = done.max(self.done);
    }
}

/// What goes wrong with a transfer.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The store.
    #[error("{0}")]
    Store(Arc<store::Error>),
    /// The file cannot be used for this.
    #[error("{path}: {why}")]
    Unsuitable {
        /// The file.
        path: String,
        /// Why not, and what to do.
        why: String,
    },
    /// The operating system says no.
    #[error("cannot {doing} {path}: {cause}")]
    Io {
        /// `read`, `write`, …
        doing: &'static str,
        /// The file.
        path: String,
        /// What it says.
        cause: Arc<std::io::Error>,
    },
    /// What is staged cannot be read.
    #[error("{0}")]
    Staging(Arc<dyn std::error::Error + Send + Sync>),
    /// Nothing was read, written or acknowledged any more.
    #[error("nothing has moved for {} seconds", .0.as_secs())]
    Stalled(Duration),
    /// It was told to stop, and can go on later.
    #[error("it was stopped")]
    Stopped,
    /// It was told to give up.
    #[error("it was given up")]
    Cancelled,
}

impl Error {
    pub(crate) fn unsuitable(path: &std::path::Path, why: impl Into<String>) -> Self {
        Self::Unsuitable { path: path.display().to_string(), why: why.into() }
    }

    pub(crate) fn io(doing: &'static str, path: &std::path::Path, cause: std::io::Error) -> Self {
        Self::Io { doing, path: path.display().to_string(), cause: Arc::new(cause) }
    }

    /// What a caller can do about it, if it is the store's.
    pub fn kind(&self) -> Option<ErrorKind> {
        match self {
            Self::Store(error) => Some(error.kind()),
            _ => None,
        }
    }

    /// Whether the same transfer may come further another time, without anything else being given.
    pub(crate) fn could_go_on(&self) -> bool {
        match self {
            Self::Store(error) => matches!(
                error.kind(),
                ErrorKind::Throttled
                    | ErrorKind::ExpiredToken
                    | ErrorKind::Credentials
                    | ErrorKind::Quota
                    | ErrorKind::NoRoom
                    | ErrorKind::Unavailable
                    | ErrorKind::Timeout
            ),
            Self::Io { .. } | Self::Stalled(_) | Self::Stopped => true,
            Self::Unsuitable { .. } | Self::Staging(_) | Self::Cancelled => false,
        }
    }
}

impl From<store::Error> for Error {
    fn from(error: store::Error) -> Self {
        Self::Store(Arc::new(error))
    }
}

/// What came of a part of a transfer.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Runs `work` in a task of its own, so that all cores have something to do; dropping it ends it.
pub(crate) fn spawned<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> impl Future<Output = T> {
    let task = AbortOnDropHandle::new(tokio::spawn(work));
    async move { task.await.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic())) }
}
