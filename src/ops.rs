//! The operations of the command line, one small file each.

use std::path::PathBuf;

use crate::model::{Snapshot, SnapshotId};
use crate::store::{ErrorKind, SharedStore};
use crate::{store, transfer};

pub mod download;
pub mod list;
pub mod upload;
pub mod verify;

/// What goes wrong with an operation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The store.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The transfer.
    #[error(transparent)]
    Transfer(#[from] transfer::Error),
    /// It was stopped by a signal.
    #[error("interrupted by {0}")]
    Interrupted(&'static str),
    /// It could go on, and what was begun is left for that.
    #[error("{cause}")]
    Unfinished {
        /// Why it ended.
        cause: Box<Error>,
        /// What is left.
        left: Left,
    },
}

/// What a transfer has left to go on with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Left {
    /// A pending snapshot.
    Snapshot(SnapshotId),
    /// A snapshot that was asked for, and may be pending under an id that is not known.
    Asked,
    /// A file that is not whole.
    Partial(PathBuf),
    /// A device that holds a part of the image.
    Device(PathBuf),
}

/// What came of an operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Where a transfer keeps a journal, and what it does with that of an earlier run.
#[derive(Clone, Debug, Default)]
pub struct Resume {
    /// The directory of all journals; without it there is no going on.
    pub journals: Option<PathBuf>,
    /// The store, as it is told from others.
    pub store: String,
    /// Begins anew, whatever an earlier run has left.
    pub restart: bool,
}

/// Runs `work` until it is done or a signal asks to stop: then it is dropped.
pub async fn until_signal<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return work.await;
    };
    tokio::select! {
        done = work => done,
        _ = interrupt.recv() => Err(Error::Interrupted("SIGINT")),
        _ = terminate.recv() => Err(Error::Interrupted("SIGTERM")),
    }
}

/// A snapshot whose blocks can be read.
async fn readable(store: &SharedStore, id: &SnapshotId) -> Result<Snapshot> {
    let snapshot = store.describe(id).await?;
    if snapshot.is_readable() {
        return Ok(snapshot);
    }
    let state = snapshot.state.as_str();
    let why = snapshot.state_message.map(|why| format!(" ({why})")).unwrap_or_default();
    let message = format!("{id} is {state}{why}, and cannot be read");
    Err(store::Error::new(ErrorKind::NotReady, message).into())
}

/// A journal, if one can be written: a transfer is as good without it, but for going on.
fn or_without_journal<T>(opened: transfer::Result<T>) -> Result<Option<T>> {
    match opened {
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
