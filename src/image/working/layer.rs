//! A generation of staging in memory.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

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
    /// It was synced since it was frozen, or came to wait for that.
    pub(super) durable: bool,
    /// Its commit waits for the one before, and what it will take. It takes writes meanwhile.
    pub(super) queued: Option<Turn>,
    pub(super) attempt: Option<Attempt>,
    pub(super) commit: Arc<Commit>,
}

/// What a commit takes when its turn comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// What was closed; a change takes that back.
    Closed,
    /// Whatever is there then; whether that was changed since it was asked for.
    Whatever { changed: bool },
}

/// Who asks for a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// Whoever closed it, and would do so again after another change.
    Closing,
    /// The end of a loop device, of a mapping or of an inherited descriptor.
    Ending,
    /// Somebody, by name, who sees to it; what is known not to be whole is taken, too, if it is `as_is`.
    Name { as_is: bool },
}

/// One commit, for those who wait for it.
#[derive(Debug)]
pub(crate) struct Commit {
    pub(super) outcome: watch::Sender<Outcome>,
    /// Told once it shall end.
    pub(super) cancel: Notify,
    /// Blocks that were put or need not be, and all.
    pub(super) done: AtomicU64,
    pub(super) total: AtomicU64,
    /// Somebody sees to it, or was told of it.
    pub(super) is_known: AtomicBool,
    /// It takes what is known not to be whole, too.
    pub(super) as_is: AtomicBool,
}

impl Default for Commit {
    fn default() -> Self {
        let (outcome, _) = watch::channel(None);
        let (done, total) = (AtomicU64::new(0), AtomicU64::new(0));
        let (is_known, as_is) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { outcome, cancel: Notify::new(), done, total, is_known, as_is }
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

    /// Asks it to end. One that has to wait for another ends when its turn comes.
    pub(crate) fn cancel(&self) {
        self.cancel.notify_one();
    }

    /// Waits for the end: the store has accepted the snapshot, or there is none.
    pub(crate) async fn wait(&self) -> Result<SnapshotId> {
        let mut outcome = self.outcome.subscribe();
        match outcome.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(result)) => result.clone(),
            _ => Err(Error::Cancelled),
        }
    }

    /// Blocks that were put or need not be, and all.
    pub(crate) fn progress(&self) -> (u64, u64) {
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
            queued: None,
            attempt: None,
            commit: Arc::default(),
        }
    }

    /// Whether there is to be a snapshot of it.
    pub(super) fn is_wanted(&self) -> bool {
        self.frozen || self.queued.is_some()
    }

    /// Lets its commit wait for the one before.
    pub(super) fn queue(&mut self, by: By) {
        self.queued = Some(match (self.queued, by) {
            // Nothing has changed since it was closed, so its end has nothing to add.
            (None, By::Closing) | (Some(Turn::Closed), By::Closing | By::Ending) => Turn::Closed,
            _ => Turn::Whatever { changed: false },
        });
    }

    /// Whether it is durable, and known to the next mount, that it is to be committed as it is.
    pub(super) fn is_queued_as_it_is(&self) -> bool {
        matches!(self.queued, Some(Turn::Closed | Turn::Whatever { changed: false }))
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
        if self.queued.take().is_none() {
            self.commit = Arc::default();
        }
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
