//! A generation of staging in memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{Notify, watch};

use super::super::Reader;
use super::super::staging::Files;
use super::super::staging::map::Marks;
use super::super::staging::record::Attempt;
use super::check::Staged;
use super::{Error, Result};
use crate::model::SnapshotId;

/// What became of a commit.
pub(super) type Outcome = Option<Result<SnapshotId>>;

/// One generation: its files, what is in them, and how far its commit is.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) files: Arc<Files>,
    pub(super) marks: Marks,
    /// It takes no more writes.
    pub(super) frozen: bool,
    /// It was synced since it was frozen.
    pub(super) durable: bool,
    pub(super) attempt: Option<Attempt>,
    pub(super) commit: Arc<Commit>,
}

/// One commit, for those who wait for it.
#[derive(Debug)]
pub(super) struct Commit {
    pub(super) outcome: watch::Sender<Outcome>,
    /// Told once it shall end.
    pub(super) cancel: Notify,
    /// Blocks that were put or need not be, and all.
    pub(super) done: AtomicU64,
    pub(super) total: AtomicU64,
}

impl Default for Commit {
    fn default() -> Self {
        let (outcome, _) = watch::channel(None);
        let (done, total) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { outcome, cancel: Notify::new(), done, total }
    }
}

impl Commit {
    pub(super) fn end(&self, outcome: Result<SnapshotId>) {
        self.outcome.send_replace(Some(outcome));
    }

    /// Ends it with an error, unless it has ended.
    pub(super) fn end_if_open(&self, error: &Error) {
        if self.outcome.borrow().is_none() {
            self.end(Err(error.clone()));
        }
    }

    /// Waits for the end.
    pub(super) async fn wait(&self) -> Result<SnapshotId> {
        let mut outcome = self.outcome.subscribe();
        match outcome.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(result)) => result.clone(),
            _ => Err(Error::Cancelled),
        }
    }

    pub(super) fn progress(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed))
    }
}

impl Layer {
    pub(super) fn new(files: Arc<Files>) -> Self {
        Self {
            files,
            marks: Marks::default(),
            frozen: false,
            durable: false,
            attempt: None,
            commit: Arc::default(),
        }
    }

    /// Where a block is that is staged in it.
    pub(super) fn staged(&self, index: u32) -> Staged {
        Staged { files: Arc::clone(&self.files), vouched: self.marks.hashed.contains(index) }
    }

    /// The snapshot that was started for it.
    pub(super) fn pending(&self) -> Option<SnapshotId> {
        self.attempt.as_ref()?.snapshot.clone()
    }
}

/// Where the content of a block is.
#[derive(Clone, Debug)]
pub(super) enum Source {
    Zeros,
    Staged(Staged),
    Base(Arc<Reader>),
    /// In a base that the store does not tell of.
    Missing(Error),
}

impl Source {
    /// Why it cannot be read.
    pub(super) fn error(&self) -> Option<&Error> {
        match self {
            Self::Missing(error) => Some(error),
            _ => None,
        }
    }
}
