//! The one place where requests are sent, and sent again.
//!
//! The SDK's own retries are off. Backoff is exponential with full jitter
//! (<https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/>).

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::account::Account;
use super::failure::{Class, Failure, NoAnswer, SILENT, TOO_MUCH};
use crate::model::SnapshotId;
use crate::store::limiter::{Permit, User};
use crate::store::request::{Kind, Outcome, Sent};
use crate::store::{Error, ErrorKind, Priority, StoreOptions, Usage};

/// How long one attempt may take, from its first byte to the last of its answer.
pub(crate) const ATTEMPT: Duration = Duration::from_secs(20);

/// The same, while there is something to see of a block that comes, or one that goes: many share a slow line.
const ATTEMPT_OF_BLOCK: Duration = Duration::from_secs(35);

/// Bytes a second of the slowest line for which there is time.
const SLOWEST: usize = 128 << 10;

/// The first wait is at most this long, each further one at most twice the one before.
const BASE: Duration = Duration::from_millis(50);
const CAP: Duration = Duration::from_secs(5);

/// How long a request is tried in all. Waiting for its turn is not trying, unless nothing that was
/// sent is answered; and there is no hope if, since it was asked for, all of its kind was refused for
/// so long.
const DEADLINE: Duration = Duration::from_mins(1);

/// It is not worth trying for less than this.
const LEAST: Duration = Duration::from_secs(1);

/// How often something is asked for that comes and is not right: a block that is not what its checksum
/// says, an answer that is none.
const MAX_WRONG: u32 = 6;

/// From this attempt on, or after this time, or if all was refused for so long, a request that is sent
/// again is a warning, though not one for each of the many that fail for the same reason.
const MANY: u32 = 5;
const LONG: Duration = Duration::from_secs(10);

/// How long a service is looked for that has never answered, where its name leads nowhere or nobody listens: nobody
/// waits a minute to learn of a typing error.
const FIRST_CONTACT: Duration = Duration::from_secs(5);

/// How long a request waits for its turn at most.
const TURN: Duration = Duration::from_mins(10);

/// Why a request was not sent.
enum NotSent {
    /// For so long nothing was answered.
    Silent(Duration),
    /// For so long nothing was taken: there were too many for the service.
    Refused(Duration),
    /// It was not its turn.
    Late,
}

impl NotSent {
    /// The error of a request that was tried before, so often and so long, and failed like this.
    fn after(&self, doing: &str, attempts: u32, tried: Duration, last: Option<&Failure>) -> Error {
        let (kind, why, cure) = match self {
            Self::Silent(silent) => {
                let seconds = silent.as_secs();
                let why = format!("the service has answered nothing for {seconds} s");
                (ErrorKind::Timeout, why, SILENT)
            }
            Self::Refused(refused) => {
                let seconds = refused.as_secs();
                let why = format!("the service has refused all that came for {seconds} s");
                (ErrorKind::Throttled, why, TOO_MUCH)
            }
            Self::Late => {
                let why = format!("it was not its turn within {} s", TURN.as_secs());
                (
                    ErrorKind::Throttled,
                    why,
                    "; fewer at a time (--max-in-flight) have theirs sooner",
                )
            }
        };
        let told = match last {
            Some(failure) => format!("{}; then", failure.told(doing, attempts, tried)),
            None => format!("cannot {doing}:"),
        };
        Error::new(kind, format!("{told} {why}{cure}"))
    }
}

/// How long a request is tried, and whether what is not found may come.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RetryPolicy {
    deadline: Duration,
    /// What an attempt may take beyond what most may.
    extra: Duration,
    not_found_until: Option<Instant>,
}

impl RetryPolicy {
    /// That of most requests.
    pub(crate) fn standard() -> Self {
        Self { deadline: DEADLINE, extra: Duration::ZERO, not_found_until: None }
    }

    /// For a question whose answer nobody waits for long.
    pub(crate) fn brief() -> Self {
        Self { deadline: Duration::from_secs(5), ..Self::standard() }
    }

    /// For an object of so many bytes that is sent: a slow line takes long for a large one.
    pub(crate) fn for_bytes(bytes: usize) -> Self {
        let extra = Duration::from_secs((bytes / SLOWEST) as u64);
        Self { extra, ..Self::standard() }
    }

    /// For a snapshot of which not all of the service may know until then.
    pub(crate) fn until_known(until: Instant) -> Self {
        let left = until.saturating_duration_since(Instant::now());
        // It may come to be known at the last moment, and then takes as long as any.
        Self { deadline: DEADLINE + left, not_found_until: Some(until), ..Self::standard() }
    }

    /// Whether it is worth sending a request again that has failed like this, after so many answers that were
    /// wrong.
    fn allows(&self, class: Class, wrong: u32) -> bool {
        match class {
            Class::AccountThrottled
            | Class::SnapshotThrottled
            | Class::Overloaded
            | Class::Transient => true,
            // What is spoilt each time is not spoilt on the way.
            Class::Corrupt | Class::Foreign => wrong < MAX_WRONG,
            Class::NotFound => self.not_found_until.is_some_and(|until| Instant::now() < until),
            Class::Credentials | Class::Final(_) => false,
        }
    }
}

/// What is asked of the service.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request<'a> {
    pub(crate) kind: &'static Kind,
    /// What it is about.
    pub(crate) snapshot: Option<&'a SnapshotId>,
    /// As in "cannot …".
    pub(crate) doing: &'a str,
    pub(crate) policy: RetryPolicy,
}

/// One use of an account: everything that stands between a store and its clients.
#[derive(Debug)]
pub(crate) struct Service<A> {
    pub(crate) account: Arc<A>,
    limiter: User,
    sent: Sent,
    /// It has answered something, whatever that was.
    has_answered: AtomicBool,
}

impl<A: Account> Service<A> {
    /// The limits in `options` count for all who use the account, as long as this lives.
    pub(crate) fn new(account: Arc<A>, kinds: &[&'static Kind], options: &StoreOptions) -> Self {
        let limiter = account.limiter().join(options);
        let has_answered = AtomicBool::new(false);
        Self { account, limiter, sent: Sent::new(kinds), has_answered }
    }

    /// A permit to send a request.
    #[cfg(test)]
    pub(crate) async fn permit(&self, kind: &'static Kind) -> Permit {
        self.limiter.admit(kind, None, Priority::background()).await
    }

    /// Blocks that may be under way at the same time.
    pub(crate) fn max_in_flight(&self) -> usize {
        self.limiter.max_in_flight()
    }

    /// What was sent so far, for this use of the account.
    pub(crate) fn usage(&self) -> Usage {
        Usage { in_flight_limit: self.limiter.in_flight_limit() as u64, ..self.sent.usage() }
    }

    /// Sends a request until it succeeds, cannot, or its time is over.
    ///
    /// # Errors
    ///
    /// The last failure, with the number of attempts and the time that they took; `Timeout` if there
    /// was no answer to the last one.
    pub(crate) async fn call<T, F>(
        &self,
        request: Request<'_>,
        mut attempt: impl FnMut(Arc<A::Clients>) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let Request { kind, doing, policy, .. } = request;
        // Listings are few, and a page of one is what many blocks wait for.
        let priority = if kind.is_bulk { Priority::of_task() } else { Priority::urgent() };
        let begin = Instant::now();
        let (mut tried, mut renewed, mut wrong) = (Duration::ZERO, false, 0);
        let mut last: Option<Failure> = None;
        for attempts in 1.. {
            let permit = match self.turn(&request, priority.clone(), begin, &mut tried).await {
                Ok(permit) => permit,
                Err(why) => return Err(why.after(doing, attempts - 1, tried, last.as_ref())),
            };
            let began = Instant::now();
            let most = if kind.is_bulk { ATTEMPT_OF_BLOCK } else { ATTEMPT };
            let time = most.min(policy.deadline.saturating_sub(tried)) + policy.extra;
            let clients = self.account.clients();
            self.sent.count(kind);
            let answer = tokio::time::timeout(time, attempt(Arc::clone(&clients))).await;
            let failure = match answer {
                Ok(Ok(value)) => {
                    self.has_answered.store(true, Ordering::Relaxed);
                    permit.ended(Outcome::Answered);
                    if attempts > 1 {
                        tracing::debug!("{doing}: succeeded in attempt {attempts}");
                    }
                    return Ok(value);
                }
                Ok(Err(failure)) => {
                    permit.ended(failure.outcome());
                    failure
                }
                Err(_) => {
                    permit.ended(Outcome::Silence);
                    Failure::timed_out(time)
                }
            };
            tried += began.elapsed();
            if failure.class == Class::Credentials && !renewed {
                renewed = true;
                tracing::info!("{doing}: {failure}; signing it again, with what is valid now");
                self.account.renew(&clients).await;
                self.sent.count_again();
                continue;
            }
            let wait = longest_wait(attempts).mul_f64(fastrand::f64());
            let nobody = matches!(failure.no_answer, Some(NoAnswer::Name | NoAnswer::Nobody));
            if failure.no_answer.is_none() {
                self.has_answered.store(true, Ordering::Relaxed);
            }
            let deadline = match nobody && !self.has_answered.load(Ordering::Relaxed) {
                true => FIRST_CONTACT,
                false => policy.deadline + policy.extra,
            };
            let is_over = tried + wait + LEAST >= deadline;
            wrong += u32::from(matches!(failure.class, Class::Corrupt | Class::Foreign));
            if is_over || !policy.allows(failure.class, wrong) {
                // The answer to a HEAD has no code.
                let is_denied = failure.is_denial() || failure.code() == Some("status 403");
                let doing = match is_denied {
                    true => format!("{doing}, which needs {}", kind.action),
                    false => doing.to_owned(),
                };
                let error = failure.after(doing, attempts, tried);
                return Err(if failure.is_silence() {
                    error.of_kind(ErrorKind::Timeout)
                } else {
                    error
                });
            }
            let told = format!(
                "{doing}: attempt {attempts} failed after {:.1} s: {failure}",
                tried.as_secs_f64()
            );
            let refused = self.limiter.refused_since(kind).is_some_and(|s| s.elapsed() >= LONG);
            let is_notable = attempts >= MANY || tried >= LONG || refused;
            match attempts {
                _ if is_notable && self.account.may_warn() => tracing::warn!("{told}"),
                1 => tracing::debug!("{told}"),
                _ => tracing::info!("{told}"),
            }
            last = Some(failure);
            self.sent.count_again();
            tokio::time::sleep(wait).await;
            tried += wait;
        }
        unreachable!("it is tried until there is a result")
    }

    /// Waits until a request may be sent that was asked for at `begin` and was `tried` for so long, to
    /// which is added for how long the service was silent meanwhile.
    async fn turn(
        &self,
        request: &Request<'_>,
        priority: Priority,
        begin: Instant,
        tried: &mut Duration,
    ) -> Result<Permit, NotSent> {
        let Request { kind, snapshot, policy, .. } = *request;
        let asked = Instant::now();
        let lasts = |since: Option<Instant>, from: Instant| {
            since.map_or(Duration::ZERO, |since| since.max(from).elapsed())
        };
        let silent = || lasts(self.limiter.silent_since(kind), asked);
        let mut admitted = pin!(self.limiter.admit(kind, snapshot, priority));
        loop {
            let silent_for = silent();
            let refused_for = lasts(self.limiter.refused_since(kind), begin);
            // In less there is no answer.
            let after = |spent: Duration| policy.deadline.saturating_sub(spent + LEAST);
            let (left, hope) = (after(*tried + silent_for), after(refused_for));
            let turn = TURN.saturating_sub(asked.elapsed());
            if left.is_zero() {
                *tried += silent_for;
                return Err(NotSent::Silent(silent_for));
            }
            if hope.is_zero() {
                return Err(NotSent::Refused(refused_for));
            }
            if turn.is_zero() {
                return Err(NotSent::Late);
            }
            let wait = left.min(hope).min(turn);
            if let Ok(permit) = tokio::time::timeout(wait, &mut admitted).await {
                *tried += silent();
                return Ok(permit);
            }
        }
    }
}

/// The longest wait before the attempt after `attempts`.
fn longest_wait(attempts: u32) -> Duration {
    BASE.saturating_mul(1 << attempts.min(16)).min(CAP)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::limiter::Limiter;

    #[test]
    fn waits_grow_to_a_cap() {
        assert_eq!(longest_wait(1), Duration::from_millis(100));
        assert_eq!(longest_wait(3), Duration::from_millis(400));
        assert_eq!(longest_wait(7), CAP);
        assert_eq!(longest_wait(u32::MAX), CAP);
    }

    static GET: Kind =
        Kind { name: "Get", action: "s3:Get", quota: Some(1000.0), nanodollars: 0, is_bulk: true };

    /// One that sends nothing by itself.
    #[derive(Debug)]
    struct Nobody(Arc<Limiter>);

    impl Account for Nobody {
        type Clients = ();

        fn clients(&self) -> Arc<()> {
            Arc::new(())
        }

        fn limiter(&self) -> Arc<Limiter> {
            Arc::clone(&self.0)
        }

        async fn renew(&self, _: &Arc<()>) {}

        fn may_warn(&self) -> bool {
            false
        }
    }

    fn service() -> Service<Nobody> {
        let account = Nobody(Arc::new(Limiter::new(false)));
        Service::new(Arc::new(account), &[&GET], &StoreOptions::default())
    }

    #[tokio::test]
    async fn gives_up_waiting_after_the_deadline_while_all_is_refused() {
        let service = service();
        let policy = RetryPolicy { deadline: Duration::from_secs(3), ..RetryPolicy::standard() };
        let request = Request { kind: &GET, snapshot: None, doing: "read it", policy };
        let refuse = |_| {
            let refusal = Failure::new(Class::AccountThrottled, "too many");
            std::future::ready(Err::<(), _>(refusal))
        };
        let began = Instant::now();
        let all = futures::future::join_all((0..200).map(|_| service.call(request, refuse))).await;
        // One after the other has its turn, in which it may be refused; there is no hope after a while.
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
        for error in all.into_iter().map(Result::unwrap_err) {
            assert_eq!(error.kind(), ErrorKind::Throttled, "{error}");
        }
    }

    #[tokio::test]
    async fn waiting_while_others_are_refused_is_not_counted_as_trying() {
        let service = service();
        let kind = &GET;
        for _ in 0..5 {
            let permit = service.limiter.admit(kind, None, Priority::urgent()).await;
            permit.ended(Outcome::AccountThrottled);
        }
        let request =
            Request { kind, snapshot: None, doing: "read it", policy: RetryPolicy::standard() };
        let (begin, mut tried) = (Instant::now(), Duration::ZERO);
        let permit = service.turn(&request, Priority::urgent(), begin, &mut tried).await;
        let waited = begin.elapsed();
        permit.ok().unwrap().ended(Outcome::Answered);
        assert!(waited > Duration::from_millis(10) && tried < waited / 2, "{tried:?} {waited:?}");
    }

    #[test]
    fn only_a_new_snapshot_may_still_come() {
        let later = Instant::now() + Duration::from_mins(1);
        assert!(!RetryPolicy::standard().allows(Class::NotFound, 1));
        assert!(RetryPolicy::until_known(later).allows(Class::NotFound, 1));
        assert!(!RetryPolicy::until_known(Instant::now()).allows(Class::NotFound, 1));
        assert!(!RetryPolicy::until_known(later).allows(Class::Final(ErrorKind::Denied), 1));
        assert!(RetryPolicy::standard().allows(Class::Transient, 1000));
        assert!(RetryPolicy::standard().allows(Class::Corrupt, 5));
        assert!(!RetryPolicy::standard().allows(Class::Corrupt, 6));
        assert!(!RetryPolicy::standard().allows(Class::Foreign, 6));
    }
}
