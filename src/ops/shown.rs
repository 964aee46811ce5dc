//! What is shown of the blocks of one sink: how far they are, and what became of them where that is wanted.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::context::Console;
use crate::transfer::engine::Run;
use crate::transfer::{Progress, SharedProgress};

/// A run with a progress, which is shown as long as this is there.
#[derive(Debug)]
pub(crate) struct Shown(Run);

impl Shown {
    pub(super) fn new(run: Run) -> Self {
        Self(run)
    }
}

impl Deref for Shown {
    type Target = Run;

    fn deref(&self) -> &Run {
        &self.0
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.0.progress.end();
    }
}

/// Tells what became of blocks, beside how far they are.
pub(super) struct Verbose {
    progress: SharedProgress,
    console: Arc<dyn Console>,
    /// Where they went.
    place: String,
    /// Tells of each.
    each: bool,
    passed: AtomicU64,
    failed: AtomicU64,
}

impl Verbose {
    pub(super) fn new(
        progress: SharedProgress,
        console: Arc<dyn Console>,
        place: String,
        each: bool,
    ) -> Self {
        let (passed, failed) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { progress, console, place, each, passed, failed }
    }
}

impl Progress for Verbose {
    fn total(&self, blocks: u64) {
        self.progress.total(blocks);
    }

    fn advance(&self, blocks: u64) {
        self.progress.advance(blocks);
    }

    fn block(&self, which: &dyn fmt::Display, blocks: u64, failed: Option<&dyn fmt::Display>) {
        let count = if failed.is_some() { &self.failed } else { &self.passed };
        count.fetch_add(blocks, Ordering::Relaxed);
        if self.each {
            let place = &self.place;
            self.console.tell(&match failed {
                None => format!("{place}: {which} passed"),
                Some(why) => format!("{place}: {which} failed: {why}"),
            });
        }
    }

    fn end(&self) {
        self.progress.end();
        let [passed, failed] = [&self.passed, &self.failed].map(|n| n.load(Ordering::Relaxed));
        self.console.tell(&format!("{}: {passed} blocks passed, {failed} failed", self.place));
    }
}
