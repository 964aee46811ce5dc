//! The one place where a request is tried again.
//!
//! The SDK's own retries are off. Backoff is exponential with full jitter
//! (<https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/>).

use std::fmt;
use std::time::{Duration, Instant};

use super::failure::{Class, Failure};
use crate::store::{Error, ErrorKind};

/// How long one attempt may take, from its first byte to the last of its answer.
const ATTEMPT: Duration = Duration::from_secs(20);

/// The first wait is at most this long, each further one at most twice the one before.
const BASE: Duration = Duration::from_millis(50);
const CAP: Duration = Duration::from_secs(5);

/// How long a request is tried in all.
pub(super) const DEADLINE: Duration = Duration::from_secs(60);

/// How long after its start a snapshot may not be found (the EBS team: about two minutes).
pub(super) const NEW: Duration = Duration::from_secs(120);

/// How long, and whether what is not found may come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    deadline: Instant,
    not_found_until: Option<Instant>,
}

impl Patience {
    /// That of most requests.
    pub(super) fn usual() -> Self {
        Self { deadline: Instant::now() + DEADLINE, not_found_until: None }
    }

    /// For a snapshot that was started at this time: it may not be known everywhere yet.
    pub(super) fn since_start(started: Option<Instant>) -> Self {
        let usual = Self::usual();
        match started.map(|started| started + NEW) {
            Some(until) if until > Instant::now() => {
                Self { deadline: usual.deadline.max(until), not_found_until: Some(until) }
            }
            _ => usual,
        }
    }

    fn allows(&self, class: Class) -> bool {
        match class {
            Class::Throttled | Class::Transient | Class::Corrupt => true,
            Class::NotFound => self.not_found_until.is_some_and(|until| Instant::now() < until),
            Class::Final(_) => false,
        }
    }
}

/// The longest wait before the attempt after `attempts`.
fn longest_wait(attempts: u32) -> Duration {
    BASE.saturating_mul(1 << attempts.min(16)).min(CAP)
}

/// Tries `attempt` until it succeeds, cannot, or `patience` ends.
///
/// # Errors
///
/// The last failure, with the number of attempts and the time that they took; `Timeout` if the
/// last one had no answer.
pub(super) async fn retry<T, F>(
    doing: impl fmt::Display,
    patience: Patience,
    mut attempt: impl FnMut() -> F,
) -> Result<T, Error>
where
    F: Future<Output = Result<T, Failure>>,
{
    let began = Instant::now();
    for attempts in 1.. {
        let left = patience.deadline.saturating_duration_since(Instant::now());
        let time = ATTEMPT.min(left);
        let (failure, timed_out) = match tokio::time::timeout(time, attempt()).await {
            Ok(Ok(value)) => {
                if attempts > 1 {
                    let seconds = began.elapsed().as_secs_f64();
                    tracing::debug!(
                        "{doing}: succeeded in attempt {attempts}, after {seconds:.1} s"
                    );
                }
                return Ok(value);
            }
            Ok(Err(failure)) => (failure, false),
            Err(_) => (Failure::timed_out(time.as_secs()), true),
        };
        let wait = longest_wait(attempts).mul_f64(fastrand::f64());
        let seconds = began.elapsed().as_secs_f64();
        if !patience.allows(failure.class) || Instant::now() + wait >= patience.deadline {
            let error = failure.after(&doing, attempts, seconds);
            return Err(if timed_out { error.of_kind(ErrorKind::Timeout) } else { error });
        }
        if attempts > 1 {
            tracing::warn!("{doing}: attempt {attempts} failed after {seconds:.1} s: {failure}");
        }
        tokio::time::sleep(wait).await;
    }
    unreachable!("it is tried until there is a result")
}
