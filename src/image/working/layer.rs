//! A generation of staging in memory.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{Notify, watch};

use super::super::Reader;
use super::super::staging::Files;
use super::super::staging::map::{Mark, Marks, Record};
use super::super::staging::record::{Attempt, Wishes};
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

    /// Notes something of a run of blocks, in memory and in the map.
    pub(super) fn mark(&mut self, mark: Mark, blocks: Range<u32>) -> std::io::Result<()> {
        let record = Record { mark, start: blocks.start, count: blocks.end - blocks.start };
        self.files.append(&[record])?;
        self.marks.apply(record);
        Ok(())
    }

    /// The snapshot that was started for it.
    pub(super) fn pending(&self) -> Option<SnapshotId> {
        self.attempt.as_ref()?.snapshot.clone()
    }

    /// Takes no more writes, and decides what its snapshot will be.
    pub(super) fn freeze(&mut self, len: u64, name: String, wishes: Wishes) {
        self.frozen = true;
        self.durable = false;
        self.commit = Arc::default();
        let cut_off = self.marks.cut_off;
        let same = self.attempt.as_ref().is_some_and(|attempt| {
            attempt.len == len
                && attempt.name == name
                && attempt.wishes == wishes
                && attempt.cut_off == cut_off
        });
        if !same {
            self.attempt_anew(len, name, wishes, cut_off);
        }
    }

    /// The same attempt once more, with another snapshot.
    pub(super) fn renew(&mut self) {
        if let Some(Attempt { len, name, wishes, cut_off, .. }) = self.attempt.clone() {
            self.attempt_anew(len, name, wishes, cut_off);
        }
    }

    /// Begins another attempt, and forgets the snapshot that was begun for the one before.
    fn attempt_anew(&mut self, len: u64, name: String, wishes: Wishes, cut_off: bool) {
        let before = self.attempt.take();
        if before.is_some()
            && let Err(error) = self.mark(Mark::Restarted, 0..0)
        {
            tracing::warn!("cannot note that a snapshot is begun anew: {error}");
            self.marks.put.clear();
        }
        self.attempt = Some(Attempt {
            client_token: uuid::Uuid::new_v4().simple().to_string(),
            len,
            name,
            wishes,
            cut_off,
            snapshot: None,
            changed: false,
            forsaken: before.and_then(|before| before.snapshot.or(before.forsaken)),
        });
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
