//! Requests to a service: what it calls them, how many it takes, what they cost, and how they end.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Usage;

/// A kind of request. Quotas and prices are counted by it. The kinds of a service are a table in its store.
#[derive(Debug)]
pub(crate) struct Kind {
    /// The name of the operation, as in the documentation of the service.
    pub(crate) name: &'static str,
    /// What IAM calls the right to it.
    pub(crate) action: &'static str,
    /// Requests a second that an account has, if that is documented.
    pub(crate) quota: Option<f64>,
    /// Billionths of a dollar, in the example region of the price list.
    pub(crate) nanodollars: u64,
    /// Whether it carries a block: these are the many, and the ones whose number is kept down.
    pub(crate) is_bulk: bool,
}

impl PartialEq for Kind {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The service did what it could.
    Answered,
    /// The account has sent too many.
    AccountThrottled,
    /// The snapshot has had too many.
    SnapshotThrottled,
    /// There were too many at the same time.
    Overloaded,
    /// It answered that it has failed.
    Failed,
    /// There was no answer: no connection, or one that ended.
    Unanswered,
    /// There was no answer in all the time that one may take.
    Silence,
}

/// Counts requests as they are sent, those that fail too.
#[derive(Debug)]
pub(crate) struct Sent {
    counts: Vec<(&'static Kind, AtomicU64)>,
    again: AtomicU64,
}

impl Sent {
    pub(crate) fn new(kinds: &[&'static Kind]) -> Self {
        let counts = kinds.iter().map(|&kind| (kind, AtomicU64::new(0))).collect();
        Self { counts, again: AtomicU64::new(0) }
    }

    pub(crate) fn count(&self, kind: &'static Kind) {
        let of_kind = self.counts.iter().find(|(known, _)| *known == kind);
        of_kind.expect("a kind of this service").1.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_again(&self) {
        self.again.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn usage(&self) -> Usage {
        let sent = || self.counts.iter().map(|(kind, n)| (*kind, n.load(Ordering::Relaxed)));
        Usage {
            requests: sent().map(|(kind, n)| (kind.name, n)).collect(),
            again: self.again.load(Ordering::Relaxed),
            nanodollars: sent().map(|(kind, n)| n * kind.nanodollars).sum(),
            in_flight_limit: 0,
        }
    }
}
