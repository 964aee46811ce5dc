//! Token buckets: so many requests a second, and no more.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::spec::Rate;
use crate::serve::gate::Operation;

/// Snapshots that have a bucket at most; those that were idle longest may lose theirs.
const MAX_BUCKETS: usize = 4096;

/// The buckets of one server, by the rule that they belong to.
#[derive(Debug, Default)]
pub(super) struct Buckets(Mutex<HashMap<(Option<Operation>, String), Bucket>>);

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    filled: Instant,
}

impl Buckets {
    /// Takes a token of the account; false if there is none.
    pub(super) fn account(&self, of: Option<Operation>, rate: Rate) -> bool {
        self.take((of, String::new()), rate)
    }

    /// Takes a token of a snapshot; false if there is none.
    pub(super) fn snapshot(&self, of: Option<Operation>, snapshot: &str, rate: Rate) -> bool {
        self.take((of, format!("/{snapshot}")), rate)
    }

    fn take(&self, key: (Option<Operation>, String), rate: Rate) -> bool {
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if buckets.len() >= MAX_BUCKETS {
            // A bucket that is full by now is as good as none.
            buckets.retain(|_, bucket| {
                now.duration_since(bucket.filled).as_secs_f64() * rate.per_second < rate.burst
            });
        }
        let full = || Bucket { tokens: rate.burst, filled: now };
        let bucket = buckets.entry(key).or_insert_with(full);
        let gained = now.duration_since(bucket.filled).as_secs_f64() * rate.per_second;
        bucket.tokens = (bucket.tokens + gained).min(rate.burst);
        bucket.filled = now;
        if bucket.tokens < 1.0 {
            return false;
        }
        bucket.tokens -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_none_and_each_snapshot_has_its_own() {
        let buckets = Buckets::default();
        let rate = Rate { per_second: 0.001, burst: 3.0 };
        let taken = (0..5).filter(|_| buckets.account(None, rate)).count();
        assert_eq!(taken, 3);
        assert!(buckets.account(Some(Operation::Query), rate));
        assert!(buckets.snapshot(None, "snap-0a", rate));
        assert!(buckets.snapshot(None, "snap-0b", rate));
    }

    #[test]
    fn it_fills_again() {
        let buckets = Buckets::default();
        let rate = Rate { per_second: 1000.0, burst: 1.0 };
        assert!(buckets.account(None, rate));
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert!(buckets.account(None, rate));
    }
}
