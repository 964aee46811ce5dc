//! The one place that decides when a request to a service is sent.
//!
//! Requests wait in one queue for a place among those under way (`window.rs`), and for the rates of all, of their
//! kind and of their snapshot (`rate.rs`). Those that a program waits for go first. Kinds are data: whatever uses
//! the same account of a service shares one limiter, of which each is a user, and may state limits.

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use lru::LruCache;
use tokio::sync::oneshot;

use self::rate::Rate;
use self::user::Limits;
pub(crate) use self::user::User;
use self::window::Window;
use super::Priority;
use super::request::{Kind, Outcome};
use crate::model::SnapshotId;

mod rate;
mod user;
mod window;

/// Blocks under way at most, unless a user states something else: with 100 ms a request they use the quota of an account
/// (AWS's page on performance).
const MAX_IN_FLIGHT: usize = 100;

/// Snapshots whose rates are remembered.
const MAX_SNAPSHOTS: NonZeroUsize = NonZeroUsize::new(64).expect("not 0");

/// Part of the requests that may end in trouble by chance: with more there is too much of them.
const MUCH: f64 = 0.15;

/// Decides when requests are sent.
#[derive(Debug)]
pub(crate) struct Limiter(Mutex<State>);

#[derive(Debug)]
struct State {
    /// Those of all users.
    stated: Vec<Limits>,
    window: Window,
    in_flight: usize,
    /// All requests together, if a user states that.
    total: Option<Rate>,
    kinds: HashMap<&'static str, Lane>,
    snapshots: LruCache<(SnapshotId, &'static str), Rate>,
    /// Whether the documented quotas hold; else only what is refused tells.
    documented: bool,
    waiting: VecDeque<Waiter>,
    /// When those who wait for a rate are looked at again.
    alarm: Option<Instant>,
}

/// The requests of one kind.
#[derive(Debug)]
struct Lane {
    kind: &'static Kind,
    rate: Rate,
    under_way: usize,
    /// When the first was sent that came after the last answer.
    silent_since: Option<Instant>,
    /// Since when all were refused, as there were too many.
    refused_since: Option<Instant>,
}

#[derive(Debug)]
struct Waiter {
    kind: &'static Kind,
    snapshot: Option<SnapshotId>,
    priority: Priority,
    go: oneshot::Sender<Permit>,
}

/// A request that may be sent; it is under way until this is dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    limiter: Arc<Limiter>,
    kind: &'static Kind,
    snapshot: Option<SnapshotId>,
    sent: Instant,
    /// How it ended; `None` if whoever sent it has gone away.
    outcome: Option<Outcome>,
}

impl Limiter {
    /// `documented`: the quotas of kinds are to be expected.
    pub(crate) fn new(documented: bool) -> Self {
        Self(Mutex::new(State {
            stated: Vec::new(),
            window: Window::new(MAX_IN_FLIGHT),
            in_flight: 0,
            total: None,
            kinds: HashMap::new(),
            snapshots: LruCache::new(MAX_SNAPSHOTS),
            documented,
            waiting: VecDeque::new(),
            alarm: None,
        }))
    }

    /// Blocks that may ever be under way at the same time.
    pub(crate) fn max_in_flight(&self) -> usize {
        self.state().window.most()
    }

    /// Blocks that may be under way at present.
    pub(crate) fn in_flight_limit(&self) -> usize {
        self.state().window.size()
    }

    /// Since when nothing was answered of what was sent of this kind; `None` if that is not so.
    pub(crate) fn silent_since(&self, kind: &Kind) -> Option<Instant> {
        self.state().kinds.get(kind.name)?.silent_since
    }

    /// Since when all of this kind were refused as too many; `None` if the last one was not.
    pub(crate) fn refused_since(&self, kind: &Kind) -> Option<Instant> {
        self.state().kinds.get(kind.name)?.refused_since
    }

    /// Waits until a request may be sent.
    pub(crate) async fn admit(
        self: &Arc<Self>,
        kind: &'static Kind,
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
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets in whoever may.
    fn let_in(self: &Arc<Self>) {
        let sent = Instant::now();
        let (admitted, alarm) = self.state().choose(sent);
        for Waiter { kind, snapshot, go, .. } in admitted {
            let limiter = Arc::clone(self);
            // One who does not wait any more gives it back by dropping it.
            let _ = go.send(Permit { limiter, kind, snapshot, sent, outcome: None });
        }
        // Without a runtime, as when a program ends, nobody waits any more.
        if let (Some(at), Ok(runtime)) = (alarm, tokio::runtime::Handle::try_current()) {
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
    /// Of what the users state the smallest counts.
    fn keep_to_smallest(&mut self, now: Instant) {
        let in_flight = self.stated.iter().filter_map(|limits| limits.in_flight).min();
        self.window.limit(in_flight.map_or(MAX_IN_FLIGHT, NonZeroUsize::get));
        let total = self.stated.iter().filter_map(|limits| limits.a_second).min();
        let total = total.map(|n| f64::from(n.get()));
        match (&mut self.total, total) {
            (Some(rate), Some(most)) => rate.limit(most),
            (rate, most) => *rate = most.map(|most| Rate::new(most, now)),
        }
        let (documented, told) = (self.documented, self.total.is_some());
        for lane in self.kinds.values_mut() {
            lane.rate.limit(quota(lane.kind, documented, told));
        }
    }

    /// Takes out those who may go, and says when to look again if nothing else happens before.
    fn choose(&mut self, now: Instant) -> (Vec<Waiter>, Option<Instant>) {
        let (mut admitted, mut wake) = (Vec::new(), None);
        for urgent in [true, false] {
            // Kinds for which the account has to wait: none of them needs to be looked at again.
            let mut held: Vec<&Kind> = Vec::new();
            let mut at = 0;
            while let Some(Waiter { kind, snapshot, priority, go }) = self.waiting.get(at) {
                let full = kind.is_bulk && self.in_flight >= self.window.size();
                if go.is_closed() {
                    self.waiting.remove(at);
                    continue;
                }
                if priority.is_urgent() != urgent || full || held.contains(kind) {
                    at += 1;
                    continue;
                }
                let (kind, snapshot) = (*kind, snapshot.clone());
                let rates = self.rates(kind, snapshot.as_ref(), now);
                let [all, of_kind, of_snapshot] = rates.map(|rate| rate?.wait(now));
                held.extend(all.or(of_kind).map(|_| kind));
                if let Some(until) = all.max(of_kind).max(of_snapshot) {
                    wake = Some(wake.map_or(until, |wake: Instant| wake.min(until)));
                    at += 1;
                } else {
                    self.take(kind, snapshot.as_ref(), now);
                    admitted.extend(self.waiting.remove(at));
                }
            }
        }
        let wake = wake.filter(|wake| self.alarm.is_none_or(|alarm| *wake < alarm));
        self.alarm = wake.or(self.alarm);
        (admitted, wake)
    }

    /// The rates of all requests, of one kind, and of one snapshot. The quota of a snapshot is that of the account,
    /// unless what is refused shows a lower one.
    fn rates(
        &mut self,
        kind: &'static Kind,
        id: Option<&SnapshotId>,
        now: Instant,
    ) -> [Option<&mut Rate>; 3] {
        let rate = Rate::new(quota(kind, self.documented, self.total.is_some()), now);
        let lane = Lane { kind, rate, under_way: 0, silent_since: None, refused_since: None };
        let lane = self.kinds.entry(kind.name).or_insert(lane);
        let rate = || Rate::new(f64::INFINITY, now);
        let of_snapshot =
            id.map(|id| self.snapshots.get_or_insert_mut((id.clone(), kind.name), rate));
        [self.total.as_mut(), Some(&mut lane.rate), of_snapshot]
    }

    fn take(&mut self, kind: &'static Kind, snapshot: Option<&SnapshotId>, now: Instant) {
        self.rates(kind, snapshot, now).into_iter().flatten().for_each(|rate| rate.take(now));
        self.in_flight += usize::from(kind.is_bulk);
        if let Some(lane) = self.kinds.get_mut(kind.name) {
            lane.under_way += 1;
            lane.silent_since.get_or_insert(now);
        }
    }

    fn ended(&mut self, permit: &Permit, now: Instant) {
        use Outcome::{AccountThrottled, Answered, Failed, Silence, SnapshotThrottled, Unanswered};
        let Permit { kind, snapshot, sent, outcome, .. } = permit;
        let full = self.in_flight >= self.window.size();
        self.in_flight -= usize::from(kind.is_bulk);
        let Some(lane) = self.kinds.get_mut(kind.name) else { return };
        lane.under_way -= 1;
        let Some(outcome) = outcome else {
            lane.silent_since = lane.silent_since.filter(|_| lane.under_way > 0);
            return;
        };
        if !matches!(outcome, Unanswered | Silence) {
            lane.silent_since = (lane.under_way > 0).then_some(now);
        }
        match outcome {
            Answered | Failed => lane.refused_since = None,
            Unanswered | Silence => {}
            _ => _ = lane.refused_since.get_or_insert(now),
        }
        let [_, of_kind, of_snapshot] = self.rates(kind, snapshot.as_ref(), now);
        for (rate, throttled) in [(of_kind, AccountThrottled), (of_snapshot, SnapshotThrottled)] {
            if let Some(rate) = rate.filter(|_| [Answered, throttled].contains(outcome)) {
                rate.answered(*sent, *outcome == throttled, now);
            }
        }
        if kind.is_bulk {
            match outcome {
                Answered => self.window.succeeded(full),
                Outcome::Overloaded | Silence => self.window.overloaded(*sent, now),
                _ => self.window.troubled(*sent, now),
            }
        }
    }
}

/// The rate of a kind that is expected. Whoever says how many may be sent knows the quota of the many better.
fn quota(kind: &Kind, documented: bool, told: bool) -> f64 {
    let expected = kind.quota.filter(|_| documented && !(told && kind.is_bulk));
    expected.unwrap_or(f64::INFINITY)
}

impl Permit {
    /// The request has ended like this.
    pub(crate) fn ended(mut self, outcome: Outcome) {
        self.outcome = Some(outcome);
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
    use crate::store::StoreOptions;

    const fn kind(name: &'static str, is_bulk: bool) -> Kind {
        Kind { name, action: "", quota: None, nanodollars: 0, is_bulk }
    }

    static GET: Kind = kind("GetSnapshotBlock", true);
    static LIST: Kind = kind("ListSnapshotBlocks", false);
    static DESCRIBE: Kind = kind("DescribeSnapshots", false);

    /// What a user states: 0 is no limit.
    fn limits(in_flight: usize, a_second: u32) -> StoreOptions {
        StoreOptions {
            max_in_flight: NonZeroUsize::new(in_flight),
            max_requests_per_second: a_second.try_into().ok(),
            ..StoreOptions::default()
        }
    }

    fn limiter(in_flight: usize, a_second: u32) -> User {
        Arc::new(Limiter::new(false)).join(&limits(in_flight, a_second))
    }

    async fn get(limiter: &Arc<Limiter>, priority: Priority) -> Permit {
        limiter.admit(&GET, None, priority).await
    }

    /// What becomes of a request that is not let in at once.
    async fn waits<F: Future>(request: F) -> bool {
        tokio::time::timeout(Duration::from_millis(20), request).await.is_err()
    }

    #[tokio::test]
    async fn keeps_to_the_window() {
        let limiter = limiter(2, 0);
        let first = get(&limiter, Priority::background()).await;
        let _second = get(&limiter, Priority::background()).await;
        assert!(waits(get(&limiter, Priority::urgent())).await);
        // A listing is no block.
        limiter.admit(&LIST, None, Priority::background()).await.ended(Outcome::Answered);
        first.ended(Outcome::Answered);
        get(&limiter, Priority::background()).await;
    }

    #[tokio::test]
    async fn urgent_requests_go_first() {
        let limiter = limiter(1, 0);
        let first = get(&limiter, Priority::background()).await;
        let raised = Priority::background();
        let order = Arc::new(Mutex::new(Vec::new()));
        let tasks: Vec<_> = [Priority::background(), raised.clone(), Priority::urgent()]
            .into_iter()
            .enumerate()
            .map(|(n, priority)| {
                let (limiter, order) = (Arc::clone(&*limiter), Arc::clone(&order));
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
    async fn an_abandoned_request_takes_no_place() {
        let limiter = limiter(1, 0);
        let first = get(&limiter, Priority::background()).await;
        assert!(waits(get(&limiter, Priority::background())).await);
        drop(first);
        get(&limiter, Priority::background()).await.ended(Outcome::Answered);
        assert_eq!(limiter.state().in_flight, 0);
    }

    #[tokio::test]
    async fn abandoned_requests_are_no_trouble_of_the_service() {
        let limiter = limiter(16, 0);
        for _ in 0..100 {
            drop(get(&limiter, Priority::background()).await);
        }
        assert_eq!(limiter.in_flight_limit(), 16);
    }

    #[tokio::test]
    async fn silence_begins_with_a_request_and_ends_with_an_answer() {
        let limiter = limiter(8, 0);
        let since = |limiter: &Limiter| limiter.silent_since(&GET);
        assert_eq!(since(&limiter), None);
        let first = get(&limiter, Priority::background()).await;
        let begin = since(&limiter).unwrap();
        let second = get(&limiter, Priority::background()).await;
        first.ended(Outcome::Silence);
        // The other service has nothing to do with it.
        let other = limiter.admit(&DESCRIBE, None, Priority::urgent()).await;
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
    async fn knows_since_when_all_is_refused() {
        let limiter = limiter(8, 0);
        let since = |limiter: &Limiter| limiter.refused_since(&GET);
        let of = async |outcome| get(&limiter, Priority::urgent()).await.ended(outcome);
        of(Outcome::Answered).await;
        assert_eq!(since(&limiter), None);
        of(Outcome::AccountThrottled).await;
        let begin = since(&limiter).unwrap();
        of(Outcome::SnapshotThrottled).await;
        of(Outcome::Silence).await;
        let other = limiter.admit(&LIST, None, Priority::urgent()).await;
        other.ended(Outcome::Answered);
        assert_eq!(since(&limiter), Some(begin));
        of(Outcome::Answered).await;
        assert_eq!(since(&limiter), None);
    }

    #[tokio::test]
    async fn keeps_to_the_rate() {
        let limiter = limiter(64, 100);
        let began = Instant::now();
        for _ in 0..30 {
            get(&limiter, Priority::background()).await.ended(Outcome::Answered);
        }
        // Two come at once, the others one after the other; later is always possible.
        assert!(began.elapsed() >= Duration::from_millis(260), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn the_smallest_number_under_way_counts_while_its_user_runs() {
        let one = limiter(0, 0);
        assert_eq!(one.max_in_flight(), MAX_IN_FLIGHT);
        let larger = Arc::clone(&*one).join(&limits(200, 0));
        assert_eq!((one.max_in_flight(), one.in_flight_limit()), (200, 16));
        let smaller = Arc::clone(&*one).join(&limits(2, 0));
        let same = Arc::clone(&*one).join(&limits(2, 0));
        assert_eq!((one.max_in_flight(), larger.in_flight_limit()), (2, 2));
        let first = get(&one, Priority::background()).await;
        let second = get(&smaller, Priority::background()).await;
        assert!(waits(get(&larger, Priority::urgent())).await);
        drop(smaller);
        assert_eq!(one.max_in_flight(), 2);
        drop(same);
        assert_eq!(one.max_in_flight(), 200);
        // It grows again as it is used.
        first.ended(Outcome::Answered);
        second.ended(Outcome::Answered);
        assert_eq!(one.in_flight_limit(), 3);
        drop(larger);
        assert_eq!(one.max_in_flight(), MAX_IN_FLIGHT);
    }

    /// How long so many requests take, one after the other.
    async fn time_of(requests: usize, limiter: &Arc<Limiter>, kind: &'static Kind) -> Duration {
        let began = Instant::now();
        for _ in 0..requests {
            let permit = limiter.admit(kind, None, Priority::background()).await;
            permit.ended(Outcome::Answered);
        }
        began.elapsed()
    }

    #[tokio::test]
    async fn the_smallest_rate_counts_while_its_user_runs() {
        let one = limiter(0, 100_000);
        let smaller = Arc::clone(&*one).join(&limits(0, 20));
        // Two of them come at once, whoever asks.
        assert!(time_of(5, &one, &GET).await >= Duration::from_millis(140));
        drop(smaller);
        assert!(time_of(100, &one, &GET).await < Duration::from_secs(2));
    }

    #[tokio::test]
    async fn those_who_wait_for_a_rate_go_when_its_user_does() {
        let one = limiter(0, 0);
        let slow = Arc::clone(&*one).join(&limits(0, 1));
        time_of(2, &one, &GET).await;
        let waiting = tokio::spawn({
            let limiter = Arc::clone(&*one);
            async move { time_of(1, &limiter, &GET).await }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(slow);
        assert!(waiting.await.unwrap() < Duration::from_millis(500));
    }

    #[tokio::test]
    async fn a_documented_quota_counts_where_no_user_states_a_rate() {
        static PUT: Kind = Kind { quota: Some(100.0), ..kind("PutSnapshotBlock", true) };
        let one = Arc::new(Limiter::new(true)).join(&limits(0, 0));
        assert!(time_of(12, &one, &PUT).await >= Duration::from_millis(70));
        let told = Arc::clone(&*one).join(&limits(0, 100_000));
        assert!(time_of(200, &one, &PUT).await < Duration::from_millis(1_500));
        drop(told);
        assert!(time_of(12, &one, &PUT).await >= Duration::from_millis(70));
    }

    #[tokio::test]
    async fn a_snapshot_that_has_had_too_many_does_not_hold_up_others() {
        let limiter = limiter(64, 0);
        let [slow, fast]: [SnapshotId; 2] = ["snap-0a", "snap-0b"].map(|id| id.parse().unwrap());
        let get =
            async |id: &SnapshotId| limiter.admit(&GET, Some(id), Priority::background()).await;
        for _ in 0..5 {
            get(&slow).await.ended(Outcome::SnapshotThrottled);
        }
        assert!(waits(get(&slow)).await);
        get(&fast).await.ended(Outcome::Answered);
    }
}
