//! The operations of the command line, one small file each.

mod blocks;
pub mod download;
pub mod list;
pub mod upload;
pub mod verify;

use crate::{store, transfer};

/// What goes wrong with an operation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The store.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// A file or device.
    #[error(transparent)]
    Transfer(#[from] transfer::Error),
    /// It was stopped by a signal.
    #[error("interrupted by {0}")]
    Interrupted(&'static str),
}

/// What came of an operation.
pub type Result<T> = std::result::Result<T, Error>;

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
