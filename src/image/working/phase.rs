//! How far a working image is on its way to its next snapshot.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Trouble;

/// What the generations do not tell: they say whether the image is clean or dirty.
///
/// A commit that failed has ended, so nothing goes with that. What is written during a commit may be
/// cut short, so a remark goes with one. That the image was removed, and that commits are about to
/// begin, are kept apart: both may be so in every phase.
#[derive(Debug)]
pub(super) enum Phase {
    /// No commit is under way.
    Idle(Option<Remark>),
    /// Commits are under way: somebody puts, or waits for the store.
    Committing { run: u64, remark: Option<Remark> },
    /// The last commit failed; why.
    Failed(String),
}

/// What there is to say of what was written last.
#[derive(Debug)]
pub(super) enum Remark {
    /// Why closing it made no snapshot, where nothing is wrong.
    Notice(String),
    /// Why it is not known to be whole.
    Interrupted(String),
    /// Why it is not known to belong to this store, and what was wrong with it. Another mount may find that it does.
    Elsewhere(String, Option<Trouble>),
}

impl From<Trouble> for Phase {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Failed(why) => Self::Failed(why),
            Trouble::Interrupted(why) => Self::Idle(Some(Remark::Interrupted(why))),
        }
    }
}

impl Phase {
    /// The number of the run of commits that is under way.
    pub(super) fn run(&self) -> Option<u64> {
        if let Self::Committing { run, .. } = self { Some(*run) } else { None }
    }

    pub(super) fn is_committing(&self) -> bool {
        self.run().is_some()
    }

    /// What is wrong: what is kept in the document.
    pub(super) fn trouble(&self) -> Option<Trouble> {
        match self {
            Self::Failed(why) => Some(Trouble::Failed(why.clone())),
            Self::Idle(Some(Remark::Interrupted(why)))
            | Self::Committing { remark: Some(Remark::Interrupted(why)), .. } => {
                Some(Trouble::Interrupted(why.clone()))
            }
            Self::Idle(Some(Remark::Elsewhere(_, trouble)))
            | Self::Committing { remark: Some(Remark::Elsewhere(_, trouble)), .. } => {
                trouble.clone()
            }
            _ => None,
        }
    }

    /// What is wrong, or why there is no snapshot.
    pub(super) fn why(&self) -> Option<&str> {
        match self {
            Self::Idle(remark) | Self::Committing { remark, .. } => match remark.as_ref()? {
                Remark::Notice(why) | Remark::Interrupted(why) | Remark::Elsewhere(why, _) => {
                    Some(why)
                }
            },
            Self::Failed(why) => Some(why),
        }
    }

    /// Says this in the place of what was said before.
    pub(super) fn say(&mut self, said: Option<Remark>) {
        match self {
            Self::Idle(remark) | Self::Committing { remark, .. } => *remark = said,
            Self::Failed(_) => *self = Self::Idle(said),
        }
    }

    /// Forgets what was wrong; answers whether anything was.
    pub(super) fn forget_trouble(&mut self) -> bool {
        let trouble = self.trouble().is_some();
        if trouble {
            self.say(None);
        }
        trouble
    }

    /// Forgets why there is no snapshot, but not what is wrong.
    pub(super) fn forget_notice(&mut self) {
        if matches!(
            self,
            Self::Idle(Some(Remark::Notice(_)))
                | Self::Committing { remark: Some(Remark::Notice(_)), .. }
        ) {
            self.say(None);
        }
    }

    /// Whether it is not known to belong to this store.
    pub(super) fn is_elsewhere(&self) -> bool {
        matches!(self, Self::Idle(Some(Remark::Elsewhere(..))))
    }

    /// What failed is over, and no more than a notice; answers why it failed.
    pub(super) fn failure_to_notice(&mut self) -> Option<String> {
        let Self::Failed(why) = self else { return None };
        let why = std::mem::take(why);
        *self = Self::Idle(Some(Remark::Notice(why.clone())));
        Some(why)
    }

    /// Commits begin, or go on, and what was said is over. Answers the number of a run that begins.
    pub(super) fn begin(&mut self) -> Option<u64> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let under_way = self.run();
        let run = under_way.unwrap_or_else(|| NEXT.fetch_add(1, Ordering::Relaxed));
        *self = Self::Committing { run, remark: None };
        under_way.is_none().then_some(run)
    }

    /// No commit is under way any more.
    pub(super) fn end(&mut self) {
        if let Self::Committing { remark, .. } = self {
            *self = Self::Idle(remark.take());
        }
    }
}
