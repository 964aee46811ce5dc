//! Those who use a limiter, each with limits of its own.

use std::num::{NonZeroU32, NonZeroUsize};
use std::ops::Deref;
use std::sync::Arc;
use std::time::Instant;

use super::Limiter;
use crate::store::StoreOptions;

/// One of those who use a limiter. The limits that it states count while it lives, where no other user states
/// smaller ones.
#[derive(Debug)]
pub(crate) struct User {
    limiter: Arc<Limiter>,
    limits: Limits,
}

/// What one user states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) in_flight: Option<NonZeroUsize>,
    pub(super) a_second: Option<NonZeroU32>,
}

impl Limiter {
    /// A further user, with the limits of its options.
    pub(crate) fn join(self: Arc<Self>, options: &StoreOptions) -> User {
        let limits =
            Limits { in_flight: options.max_in_flight, a_second: options.max_requests_per_second };
        let mut state = self.state();
        state.stated.push(limits);
        state.keep_to_smallest(Instant::now());
        drop(state);
        User { limiter: self, limits }
    }
}

impl Deref for User {
    type Target = Arc<Limiter>;

    fn deref(&self) -> &Arc<Limiter> {
        &self.limiter
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let mut state = self.state();
        if let Some(at) = state.stated.iter().position(|limits| *limits == self.limits) {
            state.stated.swap_remove(at);
        }
        state.keep_to_smallest(Instant::now());
        drop(state);
        // Those who wait need not wait as long any more.
        self.let_in();
    }
}
