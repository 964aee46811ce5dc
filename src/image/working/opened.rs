//! Who has a working image open, and when it counts as closed.
//!
//! A handle counts as closed from the flush of its opener if it has written, until it writes again;
//! else from its release. `docs/semantics.md` says why.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::layer::{By, Layer};
use super::phase::Remark;
use super::{Error, Result, Trouble, WorkingImage, commit};

/// Who has an image open.
#[derive(Debug, Default)]
pub(super) struct Handles {
    writers: HashMap<u64, Writer>,
    /// For reading or writing.
    pub(super) open: usize,
    /// Past the page cache of the kernel.
    direct: usize,
}

/// An open handle that can write.
#[derive(Debug)]
struct Writer {
    /// The thread group that opened it; 0 is nobody's.
    opener: u32,
    written: bool,
    /// Whether its program is one that closes what it has at SIGINT; known from its first write on.
    closes_at_sigint: Option<bool>,
    closed: bool,
    /// A write through it was answered with this error.
    failed: Option<Error>,
    /// It was open when something went wrong: its end is no clean close.
    spoiled: bool,
}

/// A handle on a working image.
#[derive(Debug)]
pub struct Opened {
    image: Arc<WorkingImage>,
    /// Its number among the writers, if it can write.
    writer: Option<u64>,
    direct: bool,
}

/// What closing a handle leads to.
#[derive(Debug)]
pub enum Closed {
    /// Nothing: others have it open, or there is nothing to commit.
    Nothing,
    /// The image is to be committed.
    Commit,
}

impl Opened {
    /// Opens an image; `opener` is the thread group, 0 if it is not known.
    pub fn new(image: Arc<WorkingImage>, readable: bool, writable: bool, opener: u32) -> Self {
        let (writer, direct) = {
            let handles = &mut image.state().handles;
            // A program that only writes gains nothing from the page cache, which would cost it a
            // copy. As long as it writes past the cache, nobody else may read from there.
            let direct = handles.direct > 0 || (writable && !readable && handles.open == 0);
            handles.open += 1;
            handles.direct += usize::from(direct);
            let writer = writable.then(|| {
                let number = handles.writers.keys().max().map_or(1, |last| last + 1);
                let writer = Writer {
                    opener,
                    written: false,
                    closes_at_sigint: None,
                    closed: false,
                    failed: None,
                    spoiled: false,
                };
                handles.writers.insert(number, writer);
                number
            });
            (writer, direct)
        };
        Self { image, writer, direct }
    }

    /// Whether reads and writes go past the page cache of the kernel.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// What is open.
    pub fn image(&self) -> &Arc<WorkingImage> {
        &self.image
    }

    /// Whether it can write.
    pub fn is_writable(&self) -> bool {
        self.writer.is_some()
    }

    /// Notes that a write through this handle begins. The first one asks whether its program is one that closes
    /// what it has at SIGINT.
    pub fn begin_write(&self, closes_at_sigint: impl FnOnce() -> bool) {
        let mut is_first = false;
        self.with_writer(|writer| is_first = writer.closes_at_sigint.is_none());
        if is_first {
            let closes = closes_at_sigint();
            self.with_writer(|writer| writer.closes_at_sigint = Some(closes));
        }
    }

    /// Whether the program that wrote first through this handle was one that closes what it has at SIGINT.
    pub fn closes_at_sigint(&self) -> bool {
        let mut closes = false;
        self.with_writer(|writer| closes = writer.closes_at_sigint == Some(true));
        closes
    }

    /// Notes that a change through this handle begins.
    pub fn begin_change(&self) {
        self.with_writer(|writer| {
            writer.written = true;
            writer.closed = false;
        });
    }

    /// Notes how a write to a range through this handle ended.
    pub fn end_write(&self, range: Range<u64>, result: &Result<()>) {
        if result.is_err() {
            self.image.state().lost.add(range);
        }
        self.end_change(result);
    }

    /// Notes how a change through this handle ended.
    pub fn end_change<T>(&self, result: &Result<T>) {
        if let Err(error) = result {
            self.with_writer(|writer| writer.failed = Some(error.clone()));
        }
    }

    fn with_writer(&self, change: impl FnOnce(&mut Writer)) {
        let handles = &mut self.image.state().handles;
        if let Some(writer) = self.writer.and_then(|number| handles.writers.get_mut(&number)) {
            change(writer);
        }
    }

    /// A program closes a descriptor of this handle; `dying` says why, if a signal kills it.
    ///
    /// # Errors
    ///
    /// That of a write that failed before: the image is not committed then.
    pub fn flush(&self, closer: u32, dying: Option<String>) -> Result<Closed> {
        let mut state = self.image.state();
        let handles = &mut state.handles;
        let Some(writer) = self.writer.and_then(|number| handles.writers.get_mut(&number)) else {
            return Ok(Closed::Nothing);
        };
        if !writer.written {
            return Ok(Closed::Nothing);
        }
        if let Some(why) = dying {
            state.interrupt(why);
            return Ok(Closed::Nothing);
        }
        if writer.opener == 0 || writer.opener != closer {
            return Ok(Closed::Nothing);
        }
        writer.closed = true;
        if let Some(error) = writer.failed.take() {
            state.interrupt(format!("a write failed: {error}"));
            return Err(error);
        }
        let spoiled = writer.spoiled;
        Ok(state.closed(spoiled))
    }

    /// The last descriptor of this handle is gone.
    pub fn release(&self) -> Closed {
        let mut state = self.image.state();
        let handles = &mut state.handles;
        handles.open = handles.open.saturating_sub(1);
        handles.direct = handles.direct.saturating_sub(usize::from(self.direct));
        let Some(writer) = self.writer.and_then(|number| handles.writers.remove(&number)) else {
            return Closed::Nothing;
        };
        if let Some(error) = writer.failed {
            state.interrupt(format!("a write failed: {error}"));
            return Closed::Nothing;
        }
        // What its opener closed was committed then, or waits for others, who are still open. Who wrote
        // nothing has not made whole what was cut short (`touch` opens a file for writing, too).
        let cut_short = matches!(state.phase.trouble(), Some(Trouble::Interrupted(_)));
        if writer.closed || (cut_short && !writer.written) {
            return Closed::Nothing;
        }
        state.closed(writer.spoiled)
    }
}

impl WorkingImage {
    /// Commits in the background what was changed without opening it, if nobody has it open.
    pub fn commit_if_closed(self: &Arc<Self>) {
        let closed = self.state().closed(false);
        if let Closed::Commit = closed {
            self.commit_unseen(By::Closing);
        }
    }
}

impl super::Inner {
    /// What the end of one writer means for the image.
    fn closed(&mut self, spoiled: bool) -> Closed {
        let open = self.handles.writers.values().any(|writer| !writer.closed);
        let wanted = self.is_dirty() || self.phase.trouble().is_some();
        if !wanted && self.len == 0 && self.snapshot.is_none() {
            // Nobody ever wrote to it, so there is not even something staged.
            self.phase.say(Some(Remark::Notice(commit::EMPTY.to_owned())));
        }
        if spoiled || open || !wanted || self.removed { Closed::Nothing } else { Closed::Commit }
    }

    /// Remembers that the image may not be whole, unless nothing was changed since the last commit
    /// began, or was asked for.
    pub(super) fn interrupt(&mut self, why: String) {
        for writer in self.handles.writers.values_mut() {
            writer.spoiled = true;
        }
        if !self.is_dirty() || self.layers.last().is_some_and(Layer::is_queued_as_it_is) {
            return;
        }
        self.phase.say(Some(Remark::Interrupted(why)));
        self.unsynced = true;
    }
}
