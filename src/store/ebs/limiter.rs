//! The one place that decides when a request is sent.
//!
//! Requests wait here for a place among those under way and for the pace of their kind, of the
//! account and of the snapshot. Those that a program waits for go first.

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use lru::LruCache;
use tokio::sync::oneshot;

use self::pace::Pace;
use self::window::Window;
use super::request::Kind;
use crate::model::SnapshotId;
use crate::store::{Priority, StoreOptions};

mod pace;
mod window;

/// Blocks that are read and put at the same time, at most, unless something else is said: 100 ms a
/// request and 100 connections use the quota of an account (AWS's page on performance).
pub(super) const MAX_IN_FLIGHT: usize = 100;

/// Snapshots whose pace is remembered.
const MAX_SNAPSHOTS: NonZeroUsize = NonZeroUsize::new(64).expect("not 0");

/// What is known of the quotas of the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Quotas {
    /// They are those of AWS.
    Documented,
    /// It is another service: only what it refuses tells.
    Unknown,
}

/// How a request ended, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The service did what it could.
    Answered,
    /// The account has sent too many.
    AccountThrottled,
    /// The snapshot has had too many.
    SnapshotThrottled,
    /// There were too many at the same time, or the line is too slow for so many.
    Overloaded,
    /// It answered, and that says nothing of how much it can take.
    Failed,
    /// There was no answer: no connection, or one that ended.
    Unanswered,
    /// There was no answer in all the time that one may take.
    Silence,
}

impl Outcome {
    fn is_answer(self) -> bool {
        !matches!(self, Self::Unanswered | Self::Silence)
    }
}

/// Decides when requests are sent.
#[derive(Debug)]
pub(super) struct Limiter {
    state: Mutex<State>,
    max_in_flight: usize,
}

#[derive(Debug)]
struct State {
    window: Window,
    in_flight: usize,
    /// What was heard of the EBS direct APIs, and of EC2.
    ebs: Heard,
    ec2: Heard,
    /// All requests together, if that was asked for.
    total: Option<Pace>,
    kinds: HashMap<Kind, Pace>,
    /// Kinds of which nothing has been taken since then: all were refused as too many.
    refused_since: HashMap<Kind, Instant>,
    snapshots: LruCache<(SnapshotId, Kind), Pace>,
    quotas: Quotas,
    waiting: VecDeque<Waiter>,
    /// When those who wait for the pace are looked at again.
    alarm: Option<Instant>,
}

/// Whether one of the services answers.
#[derive(Debug, Default)]
struct Heard {
    /// Requests to it of all kinds.
    under_way: usize,
    /// When the first request was sent that came after the last answer.
    silent_since: Option<Instant>,
}

#[derive(Debug)]
struct Waiter {
    kind: Kind,
    snapshot: Option<SnapshotId>,
    priority: Priority,
    go: oneshot::Sender<Permit>,
}

/// A request that may be sent; it is under way until this is dropped.
#[derive(Debug)]
pub(super) struct Permit {
    limiter: Arc<Limiter>,
    kind: Kind,
    snapshot: Option<SnapshotId>,
    began: Instant,
    outcome: Outcome,
}

impl Limiter {
    pub(super) fn new(options: &StoreOptions, quotas: Quotas) -> Arc<Self> {
        let now = Instant::now();
        let max_in_flight = options.max_in_flight.map_or(MAX_IN_FLIGHT, NonZeroUsize::get);
        let total = options.max_requests_per_second.map(|n| Pace::new(n.get().into(), now));
        Arc::new(Self {
            state: Mutex::new(State {
                window: Window::new(max_in_flight, now),
                in_flight: 0,
                ebs: Heard::default(),
                ec2: Heard::default(),
                total,
                kinds: HashMap::new(),
                refused_since: HashMap::new(),
                snapshots: LruCache::new(MAX_SNAPSHOTS),
                quotas,
                waiting: VecDeque::new(),
                alarm: None,
            }),
            max_in_flight,
        })
    }

    /// Blocks that may ever be under way at the same time.
    pub(super) fn max_in_flight(&self) -> usize {
        self.max_in_flight
    }

    /// Blocks that may be under way at present.
    pub(super) fn in_flight_limit(&self) -> usize {
        self.state().window.size()
    }

    /// Since when nothing was answered of what was sent to the service that has this kind; `None` if
    /// that is not so.
    pub(super) fn silent_since(&self, kind: Kind) -> Option<Instant> {
        self.state().heard(kind).silent_since
    }

    /// Since when all requests of this kind were refused, as there were too many; `None` if the last one
    /// was not.
    pub(super) fn refused_since(&self, kind: Kind) -> Option<Instant> {
        self.state().refused_since.get(&kind).copied()
    }

    /// Waits until a request may be sent.
    pub(super) async fn admit(
        self: &Arc<Self>,
        kind: Kind,
        snapshot: Option<&SnapshotId>,
        priority: Priority,
    ) -> Permit {
        let (go, admitted) = oneshot::channel();
        let waiter = Waiter { kind, snapshot: snapshot.cloned(), priority, go };
        self.state().waiting.push_back(waiter);
        self.let_in();
        admitted.await.expect("a limiter lives as long as those who wait")
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets in whoever may.
    fn let_in(self: &Arc<Self>) {
        let (admitted, alarm) = {
            let mut state = self.state();
            state.choose(Instant::now())
        };
        for waiter in admitted {
            let Waiter { kind, snapshot, go, .. } = waiter;
            let (limiter, outcome) = (Arc::clone(self), Outcome::Unanswered);
            let permit = Permit { limiter, kind, snapshot, began: Instant::now(), outcome };
            // One who does not wait any more gives it back by dropping it.
            let _ = go.send(permit);
        }
        // Without a runtime, as when a program ends, nobody waits any more.
        if let Some(at) = alarm
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let limiter = Arc::clone(self);
            runtime.spawn(async move {
                tokio::time::sleep_until(at.into()).await;
                limiter.state().alarm = None;
                limiter.let_in();
            });
        }
    }
}

impl State {
    /// Takes out those who may go, and says when to look again if nothing else happens before.
    fn choose(&mut self, now: Instant) -> (Vec<Waiter>, Option<Instant>) {
        let mut admitted = Vec::new();
        let mut wake: Option<Instant> = None;
        for urgent in [true, false] {
            // Kinds for which the account has to wait: none of them needs to be looked at again.
            let mut held = [false; Kind::ALL.len()];
            let mut at = 0;
            while let Some(waiter) = self.waiting.get(at) {
                let kind = waiter.kind;
                if waiter.go.is_closed() {
                    self.waiting.remove(at);
                    continue;
                }
                let full = kind.is_bulk() && self.in_flight >= self.window.size();
                if waiter.priority.is_urgent() != urgent || held[kind as usize] || full {
                    at += 1;
                    continue;
                }
                let snapshot = waiter.snapshot.clone();
                let (account, of_snapshot) = self.waits(kind, snapshot.as_ref(), now);
                held[kind as usize] = account.is_some();
                if let Some(until) = account.max(of_snapshot) {
                    wake = Some(wake.map_or(until, |wake| wake.min(until)));
                    at += 1;
                    continue;
                }
                self.take(kind, snapshot.as_ref(), now);
                admitted.extend(self.waiting.remove(at));
            }
        }
        let wake = wake.filter(|wake| self.alarm.is_none_or(|alarm| *wake < alarm));
        if wake.is_some() {
            self.alarm = wake;
        }
        (admitted, wake)
    }

    fn kind(&mut self, kind: Kind) -> &mut Pace {
        // Whoever says how many may be sent knows the quota better.
        let told = self.total.is_some() && kind.is_bulk();
        let quota = match self.quotas {
            Quotas::Documented if !told => kind.quota(),
            Quotas::Documented | Quotas::Unknown => None,
        };
        let pace = || Pace::new(quota.unwrap_or(f64::INFINITY), Instant::now());
        self.kinds.entry(kind).or_insert_with(pace)
    }

    /// The pace of one snapshot. Its quota is that of the account, which is kept to already; what
    /// the service refuses may show a lower one.
    fn snapshot(&mut self, id: &SnapshotId, kind: Kind) -> &mut Pace {
        let pace = || Pace::new(f64::INFINITY, Instant::now());
        self.snapshots.get_or_insert_mut((id.clone(), kind), pace)
    }

    /// Until when the account and the snapshot have to wait.
    fn waits(
        &mut self,
        kind: Kind,
        snapshot: Option<&SnapshotId>,
        now: Instant,
    ) -> (Option<Instant>, Option<Instant>) {
        let total = self.total.as_mut().and_then(|pace| pace.wait(now));
        let account = self.kind(kind).wait(now).max(total);
        (account, snapshot.and_then(|id| self.snapshot(id, kind).wait(now)))
    }

    fn heard(&mut self, kind: Kind) -> &mut Heard {
        if kind.is_of_ec2() { &mut self.ec2 } else { &mut self.ebs }
    }

    fn take(&mut self, kind: Kind, snapshot: Option<&SnapshotId>, now: Instant) {
        if let Some(total) = &mut self.total {
            total.take(now);
        }
        self.kind(kind).take(now);
        if let Some(id) = snapshot {
            self.snapshot(id, kind).take(now);
        }
        self.in_flight += usize::from(kind.is_bulk());
        let heard = self.heard(kind);
        heard.under_way += 1;
        heard.silent_since.get_or_insert(now);
    }

    fn ended(&mut self, permit: &Permit, now: Instant) {
        let Permit { kind, snapshot, began, outcome, .. } = permit;
        let full = self.in_flight >= self.window.size();
        let heard = self.heard(*kind);
        heard.under_way -= 1;
        if outcome.is_answer() {
            heard.silent_since = (heard.under_way > 0).then_some(now);
        }
        match outcome {
            Outcome::AccountThrottled | Outcome::SnapshotThrottled | Outcome::Overloaded => {
                self.refused_since.entry(*kind).or_insert(now);
            }
            Outcome::Answered | Outcome::Failed => {
                self.refused_since.remove(kind);
            }
            Outcome::Unanswered | Outcome::Silence => {}
        }
        match outcome {
            Outcome::AccountThrottled => self.kind(*kind).refused(*began, now),
            Outcome::Answered => self.kind(*kind).taken(*began, now),
            _ => {}
        }
        if let Some(id) = snapshot {
            match outcome {
                Outcome::SnapshotThrottled => self.snapshot(id, *kind).refused(*began, now),
                Outcome::Answered => self.snapshot(id, *kind).taken(*began, now),
                _ => {}
            }
        }
        if kind.is_bulk() {
            self.in_flight -= 1;
            match outcome {
                Outcome::Answered => self.window.succeeded(full, *began, now),
                Outcome::AccountThrottled | Outcome::SnapshotThrottled => {
                    self.window.refused(*began, now);
                }
                Outcome::Overloaded | Outcome::Silence => self.window.overloaded(*began, now),
                Outcome::Failed | Outcome::Unanswered => {}
            }
        }
    }
}

impl Permit {
    /// The request has ended like this.
    pub(super) fn ended(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let limiter = Arc::clone(&self.limiter);
        limiter.state().ended(self, Instant::now());
        limiter.let_in();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn limiter(in_flight: usize, a_second: u32) -> Arc<Limiter> {
        let options = StoreOptions {
            max_in_flight: NonZeroUsize::new(in_flight),
            max_requests_per_second: a_second.try_into().ok(),
            ..StoreOptions::default()
        };
        Limiter::new(&options, Quotas::Unknown)
    }

    async fn get(limiter: &Arc<Limiter>, priority: Priority) -> Permit {
        limiter.admit(Kind::GetSnapshotBlock, None, priority).await
    }

    /// What becomes of a request that is not let in at once.
    async fn waits<F: Future>(request: F) -> bool {
        tokio::time::timeout(Duration::from_millis(20), request).await.is_err()
    }

    #[tokio::test]
    async fn no_more_are_under_way_than_may_be() {
        let limiter = limiter(2, 0);
        let first = get(&limiter, Priority::background()).await;
        let _second = get(&limiter, Priority::background()).await;
        assert!(waits(get(&limiter, Priority::urgent())).await);
        // A listing is no block.
        limiter
            .admit(Kind::ListSnapshotBlocks, None, Priority::background())
            .await
            .ended(Outcome::Answered);
        first.ended(Outcome::Answered);
        get(&limiter, Priority::background()).await;
    }

    #[tokio::test]
    async fn those_whom_a_program_waits_for_go_first() {
        let limiter = limiter(1, 0);
        let first = get(&limiter, Priority::background()).await;
        let raised = Priority::background();
        let order = Arc::new(Mutex::new(Vec::new()));
        let tasks: Vec<_> = [Priority::background(), raised.clone(), Priority::urgent()]
            .into_iter()
            .enumerate()
            .map(|(n, priority)| {
                let (limiter, order) = (Arc::clone(&limiter), Arc::clone(&order));
                tokio::spawn(async move {
                    let permit = get(&limiter, priority).await;
                    order.lock().unwrap().push(n);
                    permit.ended(Outcome::Answered);
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(20)).await;
        raised.raise();
        first.ended(Outcome::Answered);
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(*order.lock().unwrap(), [1, 2, 0]);
    }

    #[tokio::test]
    async fn one_who_goes_away_takes_no_place() {
        let limiter = limiter(1, 0);
        let first = get(&limiter, Priority::background()).await;
        assert!(waits(get(&limiter, Priority::background())).await);
        drop(first);
        get(&limiter, Priority::background()).await.ended(Outcome::Answered);
        assert_eq!(limiter.state().in_flight, 0);
    }

    #[tokio::test]
    async fn silence_begins_with_a_request_and_ends_with_an_answer() {
        let limiter = limiter(8, 0);
        let since = |limiter: &Limiter| limiter.silent_since(Kind::GetSnapshotBlock);
        assert_eq!(since(&limiter), None);
        let first = get(&limiter, Priority::background()).await;
        let begin = since(&limiter).unwrap();
        let second = get(&limiter, Priority::background()).await;
        first.ended(Outcome::Silence);
        // The other service has nothing to do with it.
        let other = limiter.admit(Kind::DescribeSnapshots, None, Priority::urgent()).await;
        other.ended(Outcome::Answered);
        assert_eq!(since(&limiter), Some(begin));
        second.ended(Outcome::Unanswered);
        assert_eq!(since(&limiter), Some(begin), "nobody has answered as yet");
        let (third, fourth) =
            (get(&limiter, Priority::background()).await, get(&limiter, Priority::urgent()).await);
        third.ended(Outcome::AccountThrottled);
        assert!(since(&limiter).unwrap() > begin, "the fourth still waits");
        fourth.ended(Outcome::Answered);
        assert_eq!(since(&limiter), None);
    }

    #[tokio::test]
    async fn what_is_refused_each_time_is_known_until_one_is_taken() {
        let limiter = limiter(8, 0);
        let since = |limiter: &Limiter| limiter.refused_since(Kind::GetSnapshotBlock);
        let of = async |outcome| get(&limiter, Priority::urgent()).await.ended(outcome);
        of(Outcome::Answered).await;
        assert_eq!(since(&limiter), None);
        of(Outcome::AccountThrottled).await;
        let begin = since(&limiter).unwrap();
        of(Outcome::SnapshotThrottled).await;
        of(Outcome::Silence).await;
        let other = limiter.admit(Kind::ListSnapshotBlocks, None, Priority::urgent()).await;
        other.ended(Outcome::Answered);
        assert_eq!(since(&limiter), Some(begin));
        of(Outcome::Answered).await;
        assert_eq!(since(&limiter), None);
    }

    #[tokio::test]
    async fn requests_come_no_faster_than_they_may() {
        let limiter = limiter(64, 100);
        let began = Instant::now();
        for _ in 0..30 {
            get(&limiter, Priority::background()).await.ended(Outcome::Answered);
        }
        // Two come at once, the others one after the other; later is always possible.
        assert!(began.elapsed() >= Duration::from_millis(260), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn a_snapshot_that_has_had_too_many_does_not_hold_up_others() {
        let limiter = limiter(64, 0);
        let [slow, fast]: [SnapshotId; 2] = ["snap-0a", "snap-0b"].map(|id| id.parse().unwrap());
        let get = async |id: &SnapshotId| {
            limiter.admit(Kind::GetSnapshotBlock, Some(id), Priority::background()).await
        };
        for _ in 0..5 {
            get(&slow).await.ended(Outcome::SnapshotThrottled);
        }
        assert!(waits(get(&slow)).await);
        get(&fast).await.ended(Outcome::Answered);
    }
}
