//! What goes wrong with a working image.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::super::staging::NoRoom;
use crate::cache::SharedError;
use crate::model::MAX_TAGS;
use crate::{store, transfer};

/// What came of a request.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a working image cannot do.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What the store says.
    #[error("{0}")]
    Store(SharedError),
    /// What the system says of the staging directory.
    #[error("cannot {doing} {path}: {cause}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: String,
        /// What it says.
        cause: Arc<io::Error>,
    },
    /// `--staging-limit` is reached.
    #[error("{} bytes are staged, the most that --staging-limit allows; commit or remove images under new/", .0)]
    Limit(u64),
    /// The disk is nearly full.
    #[error(
        "the disk of the staging directory is nearly full; free some space, or commit or remove images under new/"
    )]
    DiskFull,
    /// It would be larger than the largest volume.
    #[error("an image has at most 64 TiB")]
    TooLarge,
    /// There is no byte to make a snapshot of.
    #[error("it is empty, and a snapshot has at least one byte")]
    Empty,
    /// It was changed before it was the turn of its commit.
    #[error("it was changed before its commit began: the next close commits it")]
    Changed,
    /// Somebody cancelled the commit.
    #[error("the commit was cancelled")]
    Cancelled,
    /// The store does not acknowledge blocks any more.
    #[error("the store has not acknowledged a block for {} seconds", .0.as_secs())]
    Stalled(Duration),
    /// It took longer than a request may.
    #[error("it took too long")]
    TimedOut,
    /// The snapshot beneath it is not known.
    #[error("{0}")]
    NoBase(String),
    /// Staged data is not what was written.
    #[error("what is staged in {path} is damaged: {why}")]
    Damaged {
        /// Its directory.
        path: String,
        /// What is wrong.
        why: String,
    },
    /// More tags than a snapshot can have.
    #[error(
        "{0} tags are too many: a snapshot has at most {MAX_TAGS}, with its name, its length and those that --tag gives it"
    )]
    TooManyTags(usize),
    /// An attribute that cannot be set, or no longer.
    #[error("{0}")]
    Refused(String),
    /// It is known not to be whole, or is no raw image.
    #[error("{0}")]
    NotWhole(String),
    /// It was not committed when a program that wrote to it had met an error, or had been killed.
    #[error("{0}")]
    Interrupted(String),
}

impl Error {
    pub(super) fn io(doing: &'static str, path: &Path, cause: io::Error) -> Self {
        if cause.kind() == io::ErrorKind::StorageFull {
            return Self::DiskFull;
        }
        Self::Io { doing, path: path.display().to_string(), cause: Arc::new(cause) }
    }
}

impl From<store::Error> for Error {
    fn from(error: store::Error) -> Self {
        Self::Store(Arc::new(error))
    }
}

impl From<SharedError> for Error {
    fn from(error: SharedError) -> Self {
        Self::Store(error)
    }
}

impl From<transfer::Error> for Error {
    fn from(error: transfer::Error) -> Self {
        match error {
            transfer::Error::Store(error) => Self::Store(error),
            transfer::Error::Io { doing, path, cause } => Self::Io { doing, path, cause },
            transfer::Error::Staging(error) => match error.downcast_ref::<Self>() {
                Some(error) => error.clone(),
                None => Self::Refused(error.to_string()),
            },
            transfer::Error::Stalled(time) => Self::Stalled(time),
            transfer::Error::Stopped | transfer::Error::Cancelled => Self::Cancelled,
            error @ transfer::Error::Unsuitable { .. } => Self::Refused(error.to_string()),
        }
    }
}

impl From<NoRoom> for Error {
    fn from(error: NoRoom) -> Self {
        match error {
            NoRoom::Limit(limit) => Self::Limit(limit),
            NoRoom::Disk => Self::DiskFull,
        }
    }
}
