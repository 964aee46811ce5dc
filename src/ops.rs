//! The operations, one file each: its arguments, what it does, and its report.
//!
//! [`table`] lists them all; the command line and the control directory are made from it. An operation has no
//! terminal and prints nothing: a [`context::Console`] does that.

use std::path::PathBuf;
use std::sync::Arc;

use serde::de::DeserializeOwned;

use crate::blocking::blocking;
use crate::model::{Snapshot, SnapshotId};
use crate::store::{ErrorKind, SharedStore, StoreUrl};
use crate::transfer::journal::{Ends, FileJournal, Journal};
use crate::{store, transfer};

mod archives;
pub(crate) mod begin;
mod bucket;
mod check;
pub(crate) mod clone;
pub(crate) mod commit;
pub(crate) mod context;
pub(crate) mod copy;
pub(crate) mod delete;
pub(crate) mod deltadownload;
mod destination;
pub(crate) mod diff;
pub(crate) mod download;
pub(crate) mod fanout;
mod freeze;
pub(crate) mod gc;
pub(crate) mod getfroms3;
pub(crate) mod image;
pub(crate) mod list;
mod list_file;
pub(crate) mod movetos3;
pub(crate) mod multiclone;
pub(crate) mod reference;
pub(crate) mod shown;
pub(crate) mod sync;
pub(crate) mod table;
pub(crate) mod text;
pub(crate) mod upload;
pub(crate) mod verify;
mod whole;

/// How a command or a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Everything was done.
    Done,
    /// Something was not as it should be, and was reported.
    Failed,
    /// Wrong usage.
    Usage,
    /// A part was done; the report says which.
    Partly,
}

impl Exit {
    /// Its exit code.
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Partly => 3,
        }
    }

    /// What an exit code stands for; of a process that was killed there is none.
    pub fn from_code(code: Option<i32>) -> Self {
        match code {
            Some(0) => Self::Done,
            Some(2) => Self::Usage,
            Some(3) => Self::Partly,
            _ => Self::Failed,
        }
    }
}

/// What goes wrong with an operation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum Error {
    /// The store.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The transfer.
    #[error(transparent)]
    Transfer(#[from] transfer::Error),
    /// It was stopped by a signal.
    #[error("interrupted by {0}")]
    Interrupted(&'static str),
    /// It is refused.
    #[error("{0}")]
    Refused(String),
    /// Something on this machine.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The mount.
    #[error(transparent)]
    Mount(Box<dyn std::error::Error + Send + Sync>),
    /// What was being done when it went wrong.
    #[error("cannot {doing}")]
    Doing {
        /// In words, behind "cannot".
        doing: String,
        /// What went wrong.
        #[source]
        cause: Box<Error>,
    },
    /// It could go on, and what was begun is left for that.
    #[error("{cause}")]
    Unfinished {
        /// Why it ended.
        cause: Box<Error>,
        /// What is left.
        left: Left,
    },
}

impl Error {
    /// This, with what was being done.
    pub(crate) fn doing(self, doing: impl Into<String>) -> Self {
        Self::Doing { doing: doing.into(), cause: Box::new(self) }
    }

    /// This, of an operation on the store `store`, which is not the one of `-s`.
    pub(crate) fn elsewhere(self, store: &StoreUrl) -> Self {
        match self {
            Self::Doing { doing, cause } => cause.elsewhere(store).doing(doing),
            Self::Unfinished { cause, left } => {
                let left = match left {
                    Left::Snapshot(id, None) => Left::Snapshot(id, Some(store.clone())),
                    Left::Asked(None) => Left::Asked(Some(store.clone())),
                    left => left,
                };
                Self::Unfinished { cause, left }
            }
            error => error,
        }
    }

    /// Something has to be asked, and nobody is there.
    pub(crate) fn unasked() -> Self {
        Self::Refused("nobody can be asked here; give --yes".to_owned())
    }
}

/// What a transfer has left to go on with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// A pending snapshot, and the store that it is in, if that is not the one of `-s`.
    Snapshot(SnapshotId, Option<StoreUrl>),
    /// A snapshot that was asked for, and may be pending under an id that is not known; and its store likewise.
    Asked(Option<StoreUrl>),
    /// A file that is not whole.
    Partial(PathBuf),
    /// A device that holds a part of the image.
    Device(PathBuf),
    /// Several of these.
    Several(Vec<Left>),
}

/// What is left when a transfer ends before it is done.
#[derive(Debug)]
struct Ending {
    journal: Arc<dyn Journal>,
    left: Left,
}

impl Ending {
    /// The error that has ended it, with what is left if it can go on.
    fn explain(self, error: transfer::Error) -> Error {
        if !self.journal.outlasts(&error) {
            return error.into();
        }
        Error::Unfinished { cause: Box::new(error.into()), left: self.left }
    }
}

/// What came of an operation.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Where a transfer keeps a journal, and what it does with that of an earlier run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Resume {
    /// The directory of all journals; without it there is no going on.
    pub(crate) journals: Option<PathBuf>,
    /// The store, as it is told from others.
    pub(crate) store: String,
    /// Begins anew, whatever an earlier run has left.
    pub(crate) restart: bool,
}

/// A snapshot whose blocks can be read.
async fn readable(store: &SharedStore, id: &SnapshotId) -> Result<Snapshot> {
    let snapshot = reference::describe(store, id).await?;
    if snapshot.is_readable() {
        return Ok(snapshot);
    }
    let state = snapshot.state.as_str();
    let why = snapshot.state_message.map(|why| format!(" ({why})")).unwrap_or_default();
    let message = format!("{id} is {state}{why}, and cannot be read");
    Err(store::Error::new(ErrorKind::NotReady, message).into())
}

/// The journal of a transfer, and what an earlier run has begun. None if none is wanted, or none can be written: a
/// transfer is as good without it, but for going on.
async fn journal<T: DeserializeOwned + Send + 'static>(
    resume: &Resume,
    ends: Ends,
) -> Result<Option<(FileJournal, Option<T>)>> {
    let Some(root) = resume.journals.clone() else { return Ok(None) };
    let restart = resume.restart;
    match blocking(move || FileJournal::open(&root, ends, restart)).await {
        Ok(journal) => Ok(Some(journal)),
        Err(error @ transfer::Error::Io { .. }) => {
            tracing::warn!(
                "{error}: if this stops it begins anew; XDG_STATE_HOME names another place"
            );
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}
