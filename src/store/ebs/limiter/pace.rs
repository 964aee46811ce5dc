//! So many requests a second, as far as is known: a number that was given, and what the service
//! shows that it takes.
//!
//! A service that has enough answers "throttled", and goes on to take as many as it is willing to.
//! So what it took while it refused many is its limit, measured: the pace falls to that. While it
//! refuses hardly any, the pace rises slowly.
//!
//! Not all that is refused is so because of the pace. Some services refuse a few requests in a hundred by
//! chance: a trial, a while at a slower pace, shows whether less is refused then, and if not the pace goes
//! back to where it was. And where little is known of the limit, it is searched for: what was taken of a
//! handful of requests may be far below it, and a service that suddenly takes a small part of what it took
//! is ill, and may be well again at any moment. Then the pace rises quickly until much is refused.

use std::cmp::Ordering;
use std::time::{Duration, Instant};

/// How long what is taken and refused is counted before something follows from it.
const EPOCH: Duration = Duration::from_millis(250);

/// Requests an epoch has at least, unless none was refused for so long.
const MIN_REQUESTS: u32 = 50;
const QUIET_EPOCH: Duration = Duration::from_secs(2);

/// So many refusals in a row show that the limit is far below, and that there is nothing left of what
/// the service had saved up. After a pause it is measured how much it takes until that is so again.
const IN_A_ROW: u32 = 5;
const PAUSE: Duration = Duration::from_millis(60);

/// Part of the requests that may be refused because of our pace: more, and it falls to what was
/// taken.
const TOO_MANY: f64 = 0.05;

/// Part that is nothing to speak of: no more, and it rises. Between the two it falls a little.
const FEW: f64 = 0.005;
const EASE: f64 = 0.995;

/// The pace of a trial, as a part of what the service takes: what is refused then is so by chance. It
/// needs more requests, since it tells a few in a hundred from none; where no limit is known, it is not
/// worth more than so long. From fewer than half of them nothing follows.
const TRIAL: f64 = 0.85;
const TRIAL_REQUESTS: u32 = 120;
const TRIAL_TIME: Duration = Duration::from_secs(2);

/// Requests after which it follows from a few refusals too, where nothing is known of a limit yet; fewer
/// are enough for many.
const LONG: u32 = 400;

/// What comes by chance comes in twos and threes: so many standard deviations are no sign.
const DEVIATIONS: f64 = 2.0;

/// Requests from which it is known how many are refused by chance; older ones count less and less.
const KNOWN: f64 = 1000.0;

/// More than this is not refused by chance, but because the pace has not fallen far enough.
const MOST_BY_CHANCE: f64 = 0.15;

/// So many times it falls a little before a trial has to show that this is of use.
const EASES: u32 = 20;

/// A pause this long says nothing of the pace: what comes after it is counted by itself.
const IDLE: Duration = Duration::from_secs(1);

/// How much it rises an epoch; and after so many epochs without a refusal.
const RISE: f64 = 1.02;
const QUIET_EPOCHS: u32 = 4;
const QUIET_RISE: f64 = 1.1;

/// What is a tenth of what it took before is no limit: the service is ill; and from fewer than so many
/// that were taken none is known well. Then the pace rises by half whenever nothing was refused for a
/// moment, and falls to what was taken when something was, until there are enough requests to tell more.
const ILL: f64 = 0.1;
const KNOWN_FROM: u32 = 20;
const SEARCH_RISE: f64 = 1.5;

/// So many requests are enough if none of them was refused, or if some were, or those of so long.
const SEARCH_FEW: f64 = 8.0;
const SEARCH_REQUESTS: f64 = 20.0;
const SEARCH_TIME: Duration = Duration::from_secs(1);

/// Part that may be refused without being the end of a search, and that is one for certain; and so many of
/// fewer requests are, unless they are more than half: then the service is ill. It may be so too where it
/// has taken twice as much.
const SEARCH_PART: f64 = 0.1;
const SEARCH_LIMIT: f64 = 0.3;
const SEARCH_REFUSED: f64 = 4.0;
const ILL_PART: f64 = 0.5;
const FAR_BELOW: f64 = 0.5;

/// Requests that are enough where it has taken twice as much before, if none was refused.
const RETURN_FEW: f64 = 4.0;

/// How far it falls at most in a search, and when nothing at all was taken: that tells that it has to
/// fall, and not how far.
const SEARCH_FALL: f64 = 0.5;
const BLIND_FALL: f64 = 0.25;

/// What it took at most counts for less when limits below it are found: while it is searched for one,
/// and when a trial has confirmed one.
const FADE: f64 = 0.8;
const FORGET: f64 = 0.5;

/// Slower than this it never gets: whoever waits must see that something happens.
const SLOWEST: f64 = 2.0;

/// Requests that may be begun at once after a pause, as seconds of the pace.
const BURST: f64 = 0.02;

/// The pace of one kind of requests.
#[derive(Debug)]
pub(super) struct Pace {
    /// What was given; infinite if nothing was.
    most: f64,
    /// Requests a second.
    now: f64,
    /// When the next request is due if all came evenly.
    due: Option<Instant>,
    /// When the latest was begun, or answered.
    latest: Option<Instant>,
    /// Nothing is begun before this.
    paused: Option<Instant>,
    epoch: Epoch,
    /// Epochs in a row without a refusal.
    quiet: u32,
    /// What is refused whatever the pace is, as trials have shown.
    by_chance: Count,
    /// Epochs in a row in which less was refused than that.
    calm: Count,
    /// What the service took at most, in requests a second.
    record: f64,
    /// Whether the limit is searched for: it was measured from few requests, or while the service was ill.
    searches: bool,
    /// Times in a row that it fell a little.
    eased: u32,
    trial: Option<Trial>,
}

/// For a while it is slower than what the service takes, to see what is refused by chance.
#[derive(Clone, Copy, Debug)]
struct Trial {
    /// The pace before, what the service took of it, and what it refused.
    before: f64,
    taken: f64,
    refused: Count,
    /// Whether it ended a search.
    searched: bool,
}

/// Requests that were answered, and how many of them were refused.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    refused: f64,
    of: f64,
}

impl Count {
    fn part(self) -> f64 {
        self.refused / self.of.max(1.0)
    }

    fn add(&mut self, other: Self) {
        let keep = (KNOWN / (self.of + other.of).max(1.0)).min(1.0);
        self.refused = (self.refused + other.refused) * keep;
        self.of = (self.of + other.of) * keep;
    }

    /// Whether the part that is refused is the same as in `other`, as far as so few tell, or more, or less.
    fn compare(self, other: Self) -> Ordering {
        let mut all = self;
        all.add(other);
        let variance = all.part() * (1.0 - all.part()) * (self.of.recip() + other.of.recip());
        let difference = self.part() - other.part();
        if difference.abs() <= DEVIATIONS * variance.sqrt() {
            Ordering::Equal
        } else {
            difference.total_cmp(&0.0)
        }
    }
}

#[derive(Debug)]
struct Epoch {
    began: Instant,
    /// Requests that were sent in it, answered or not.
    sent: u32,
    taken: u32,
    refused: u32,
    /// Refusals behind the last request that was taken.
    in_a_row: u32,
    /// Whether the service had nothing saved up when it began.
    drained: bool,
    /// Whether requests had to wait for the pace.
    held: bool,
}

impl Epoch {
    fn new(began: Instant) -> Self {
        Self { began, sent: 0, taken: 0, refused: 0, in_a_row: 0, drained: false, held: false }
    }

    fn count(&self) -> Count {
        Count { refused: self.refused.into(), of: f64::from(self.taken + self.refused) }
    }
}

impl Pace {
    /// At most `most` requests a second.
    pub(super) fn new(most: f64, now: Instant) -> Self {
        Self {
            most,
            now: most,
            due: None,
            latest: None,
            paused: None,
            epoch: Epoch::new(now),
            quiet: 0,
            by_chance: Count::default(),
            calm: Count::default(),
            trial: None,
            record: 0.0,
            searches: false,
            eased: 0,
        }
    }

    /// When a request may be begun, if not at `now`.
    pub(super) fn wait(&mut self, now: Instant) -> Option<Instant> {
        if let Some(until) = self.paused.filter(|until| *until > now) {
            return Some(until);
        }
        let burst = Duration::from_secs_f64(BURST.max(0.5 / self.now));
        let at = self.due?.checked_sub(burst)?;
        if at <= now {
            return None;
        }
        self.epoch.held = true;
        Some(at)
    }

    /// A request is begun.
    pub(super) fn take(&mut self, now: Instant) {
        let before = self.latest.replace(now);
        let gap = before.map_or(Duration::ZERO, |before| now.saturating_duration_since(before));
        // The program had nothing to send: no time in which the service took little.
        let idle = gap.saturating_sub(Duration::from_secs_f64(1.0 / self.now));
        if gap > IDLE
            && let Some(trial) = self.trial.take()
        {
            self.set(trial.before, now);
            self.epoch = Epoch::new(now);
        } else if gap > IDLE && (self.epoch.drained || self.epoch.refused > 0) {
            self.epoch = Epoch::new(now);
        } else if idle > 2 * PAUSE {
            self.epoch.began += idle;
        }
        self.epoch.sent += 1;
        if self.now.is_finite() {
            let due = self.due.map_or(now, |due| due.max(now));
            self.due = Some(due + Duration::from_secs_f64(1.0 / self.now));
        }
    }

    /// A request that was begun at `began` was taken by the service.
    pub(super) fn taken(&mut self, began: Instant, now: Instant) {
        self.count(began, now, |epoch| {
            epoch.taken += 1;
            epoch.in_a_row = 0;
        });
    }

    /// A request that was begun at `began` was refused.
    pub(super) fn refused(&mut self, began: Instant, now: Instant) {
        self.count(began, now, |epoch| {
            epoch.refused += 1;
            epoch.in_a_row += 1;
        });
    }

    fn count(&mut self, sent: Instant, now: Instant, count: impl FnOnce(&mut Epoch)) {
        self.latest = self.latest.max(Some(now));
        // What was sent before the pace was set says nothing of it.
        if sent < self.epoch.began {
            return;
        }
        count(&mut self.epoch);
        let Epoch { began, in_a_row, drained, .. } = self.epoch;
        let age = now.saturating_duration_since(began);
        let sent = sent.saturating_duration_since(began);
        if in_a_row >= IN_A_ROW && !drained {
            // From here on, what is taken is what it is willing to take.
            self.epoch = Epoch { drained: true, ..Epoch::new(now) };
            self.paused = Some(now + PAUSE);
        } else if in_a_row >= IN_A_ROW && age >= PAUSE {
            self.close((sent + age) / 2, true, now);
        } else if sent >= EPOCH && self.is_enough(sent) {
            self.close(sent, false, now);
        }
    }

    /// Whether something follows from what was counted in an epoch, of which the last request was sent
    /// so long after it began.
    fn is_enough(&self, sent: Duration) -> bool {
        let count = self.epoch.count();
        if let Some(trial) = self.trial {
            let is_late = trial.before >= self.most && sent >= TRIAL_TIME;
            return is_late || count.of >= f64::from(TRIAL_REQUESTS);
        }
        if self.searches {
            let (enough, time) = match count.part() {
                0.0 if self.is_far_below(self.now) => (RETURN_FEW, SEARCH_TIME),
                0.0 => (SEARCH_FEW, SEARCH_TIME),
                part if part < SEARCH_PART => (SEARCH_REQUESTS, Duration::MAX),
                part if part < SEARCH_LIMIT => (f64::from(MIN_REQUESTS), Duration::MAX),
                _ => (SEARCH_REQUESTS, SEARCH_TIME),
            };
            return count.of >= enough || sent >= time;
        }
        if count.of < f64::from(MIN_REQUESTS) {
            return self.now < self.most && count.refused == 0.0 && sent >= QUIET_EPOCH;
        }
        let expected = self.by_chance.part() + TOO_MANY;
        self.now < self.most
            || count.of >= f64::from(LONG)
            || count.part() > expected + DEVIATIONS * (expected / count.of).sqrt()
    }

    /// Draws the conclusion from an epoch of this length. `exact`: nothing was left of what the service
    /// had saved up, neither at its beginning nor at its end.
    fn close(&mut self, age: Duration, exact: bool, now: Instant) {
        let Epoch { began, sent, taken, held, .. } = self.epoch;
        let count = self.epoch.count();
        self.epoch = Epoch::new(now);
        let part = count.part();
        // Of those that were sent last, not all are answered yet.
        let measured = if exact {
            f64::from(taken + 1) / age.as_secs_f64()
        } else {
            f64::from(sent) / now.saturating_duration_since(began).as_secs_f64() * (1.0 - part)
        };
        let measured = measured.min(self.now);
        if exact {
            self.trial = None;
            self.searches = taken < KNOWN_FROM || measured <= self.record * ILL;
            self.record = self.record.max(measured);
            let blind =
                self.now * if taken == 0 && self.now.is_finite() { BLIND_FALL } else { 0.0 };
            self.set(measured.max(blind), now);
            // There is nothing saved up for the first ones.
            self.paused = Some(now + Duration::from_secs_f64(2.0 / self.now).min(EPOCH));
            return;
        }
        if self.searches
            && let Some(pace) = self.found(count, measured, held)
        {
            return self.set(pace, now);
        }
        let searched = std::mem::take(&mut self.searches);
        self.record = self.record.max(measured);
        if let Some(trial) = self.trial.take()
            && let Some(pace) = self.after(trial, count)
        {
            return self.set(pace, now);
        }
        self.forget_chance(count);
        let by_chance = self.by_chance.part();
        let ours = part - by_chance;
        let noise = DEVIATIONS * (by_chance / count.of).sqrt();
        // A single one is chance.
        let is_much = count.refused > 1.0 && ours > FEW.max(noise / 2.0);
        self.quiet = if is_much { 0 } else { self.quiet.saturating_add(1) };
        if ours > TOO_MANY.max(noise) || is_much && self.eased >= EASES {
            let before = self.now / EASE.powi(i32::try_from(self.eased).unwrap_or(0));
            self.trial = Some(Trial { before, taken: measured, refused: count, searched });
            self.set(measured * TRIAL, now);
        } else if is_much {
            self.set(self.now * EASE, now);
            self.eased += 1;
            return;
        } else if held && self.now < self.most {
            self.searches = self.is_far_below(self.now);
            let rise = match self.quiet {
                _ if self.searches => SEARCH_RISE,
                ..=QUIET_EPOCHS => RISE,
                _ => QUIET_RISE,
            };
            self.set(self.now * rise, now);
        }
        self.eased = 0;
    }

    /// The pace to go on with the search at; `None` if it has ended, with a limit.
    fn found(&mut self, count: Count, measured: f64, held: bool) -> Option<f64> {
        let faster = self.now * SEARCH_RISE;
        if count.refused == 0.0 {
            return Some(if held { faster } else { self.now });
        }
        let part = count.part() - self.by_chance.part();
        let slower = measured.max(self.now * SEARCH_FALL);
        let is_far_below = self.is_far_below(measured);
        if count.of < SEARCH_REQUESTS {
            let is_limit = count.refused >= SEARCH_REFUSED
                && (SEARCH_LIMIT..=ILL_PART).contains(&count.part());
            return match count.refused {
                ..2.0 => Some(self.now),
                _ => (is_far_below || !is_limit).then_some(slower),
            };
        }
        if part <= SEARCH_PART {
            return Some(faster);
        }
        // It took more before, and what is refused may be so by chance.
        if part <= MOST_BY_CHANCE && self.now < self.record {
            return Some(faster.min(self.record));
        }
        if is_far_below {
            self.record *= FADE;
        }
        is_far_below.then_some(slower)
    }

    /// Whether the service has taken so much more than this that it may do so again.
    fn is_far_below(&self, pace: f64) -> bool {
        pace <= self.record * FAR_BELOW
    }

    /// The pace after a trial; `None` if too much was refused in that as well.
    fn after(&mut self, trial: Trial, count: Count) -> Option<f64> {
        let enough = count.of >= f64::from(TRIAL_REQUESTS / 2);
        match trial.refused.compare(count) {
            Ordering::Equal | Ordering::Less if !enough => Some(trial.before),
            // Where a slower pace changes nothing, it was not the pace.
            Ordering::Equal => {
                self.by_chance.add(trial.refused);
                self.by_chance.add(count);
                self.searches = trial.searched || self.is_far_below(trial.before);
                Some(trial.before)
            }
            Ordering::Greater if count.part() < MOST_BY_CHANCE => {
                self.by_chance.add(count);
                // What ended the search may have been chance.
                if trial.searched {
                    self.record = trial.taken.max(self.record * FORGET);
                }
                let few = trial.refused.of < f64::from(MIN_REQUESTS);
                self.searches = trial.searched && few && count.part() > FEW;
                Some(trial.taken)
            }
            _ => None,
        }
    }

    /// What comes by chance does not stay away for long.
    fn forget_chance(&mut self, count: Count) {
        if count.part() >= self.by_chance.part() {
            self.calm = Count::default();
            return;
        }
        self.calm.add(count);
        if self.calm.compare(self.by_chance) == Ordering::Less {
            self.by_chance = self.calm;
        }
    }

    fn set(&mut self, pace: f64, now: Instant) {
        self.now = pace.clamp(SLOWEST.min(self.most), self.most);
        if self.now.is_finite() && self.due.is_none() {
            self.due = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;
    use std::collections::BinaryHeap;

    use super::*;

    /// A service that takes `limit` requests a second, and `burst` at once.
    struct Service {
        limit: f64,
        burst: f64,
        tokens: f64,
        at: Instant,
    }

    impl Service {
        fn takes(&mut self, now: Instant) -> bool {
            let gained = now.duration_since(self.at).as_secs_f64() * self.limit;
            self.tokens = (self.tokens + gained).min(self.burst);
            self.at = now;
            let taken = self.tokens >= 1.0;
            if taken {
                self.tokens -= 1.0;
            }
            taken
        }
    }

    /// A program that asks all the time, and its clock.
    struct Program {
        pace: Pace,
        now: Instant,
        at_once: usize,
        latency: Duration,
        /// Answers take up to so much less or more, as a part of that; then they come in any order.
        jitter: f64,
        random: fastrand::Rng,
    }

    impl Program {
        fn new(most: f64, at_once: usize, latency: u64) -> Self {
            let now = Instant::now();
            let latency = Duration::from_millis(latency);
            let random = fastrand::Rng::with_seed(0);
            Self { pace: Pace::new(most, now), now, at_once, latency, jitter: 0.0, random }
        }

        fn with_jitter(self, jitter: f64, seed: u64) -> Self {
            Self { jitter, random: fastrand::Rng::with_seed(seed), ..self }
        }

        /// Requests that are taken and refused in so many seconds.
        fn run(&mut self, seconds: u64, mut takes: impl FnMut(Instant) -> bool) -> (u32, u32) {
            let end = self.now + Duration::from_secs(seconds);
            let (mut sent, mut taken, mut refused) = (0, 0, 0);
            let mut under_way: BinaryHeap<Reverse<(Instant, usize, Instant, bool)>> =
                BinaryHeap::new();
            while self.now < end || !under_way.is_empty() {
                let now = self.now;
                while let Some(Reverse((.., began, taken_up))) =
                    under_way.peek().copied().filter(|Reverse((at, ..))| *at <= now)
                {
                    under_way.pop();
                    if taken_up {
                        taken += 1;
                        self.pace.taken(began, now);
                    } else {
                        refused += 1;
                        self.pace.refused(began, now);
                    }
                }
                while now < end && under_way.len() < self.at_once && self.pace.wait(now).is_none() {
                    self.pace.take(now);
                    let factor = 1.0 + self.jitter * (2.0 * self.random.f64() - 1.0);
                    let answered = now + self.latency.mul_f64(factor);
                    sent += 1;
                    under_way.push(Reverse((answered, sent, now, takes(now))));
                }
                self.now += Duration::from_millis(1);
            }
            (taken, refused)
        }
    }

    impl Service {
        fn new(limit: f64, burst: f64, at: Instant) -> Self {
            Self { limit, burst, tokens: burst, at }
        }
    }

    #[test]
    fn what_was_given_is_kept_to_and_used() {
        let (taken, _) = Program::new(1000.0, 64, 25).run(10, |_| true);
        assert!((9_800..=10_100).contains(&taken), "{taken}");
    }

    #[test]
    fn a_limit_that_nobody_told_is_found_and_used() {
        for (limit, seconds) in [(40.0, 50_u32), (100.0, 20), (1000.0, 20)] {
            for (burst, latency) in [(0.1, 2), (0.1, 40), (1.0, 5)] {
                let mut program = Program::new(f64::INFINITY, 16, latency);
                let mut service = Service::new(limit, limit * burst, program.now);
                let (taken, refused) = program.run(seconds.into(), |now| service.takes(now));
                let possible =
                    (16.0 / program.latency.as_secs_f64()).min(limit) * f64::from(seconds);
                let used = f64::from(taken) / possible;
                let part = f64::from(refused) / f64::from(taken + refused);
                let told = format!("{limit} {burst} {latency}: used {used:.3}, refused {part:.3}");
                assert!(used > 0.9 && part < 0.05, "{told}");
            }
        }
    }

    #[test]
    fn a_limit_that_few_requests_showed_is_found_soon() {
        for at_once in 8..40 {
            for (burst, latency) in [(0.1, 2), (0.1, 30), (0.5, 10), (2.0, 50)] {
                let mut program =
                    Program::new(f64::INFINITY, at_once, latency).with_jitter(0.5, at_once as u64);
                let mut service = Service::new(100.0, 100.0 * burst, program.now);
                let (taken, refused) = program.run(20, |now| service.takes(now));
                let part = f64::from(refused) / f64::from(taken + refused);
                let told = format!("{at_once} {burst} {latency}: {taken}, refused {part:.3}");
                assert!(taken > 1_800 && part < 0.12, "{told}");
            }
        }
    }

    #[test]
    fn a_limit_is_found_however_long_answers_take() {
        for (limit, burst, at_once, latency) in
            [(100.0, 10.0, 48, 200), (100.0, 100.0, 48, 200), (200.0, 200.0, 100, 300)]
        {
            let mut program = Program::new(f64::INFINITY, at_once, latency);
            let mut service = Service::new(limit, burst, program.now);
            let (taken, refused) = program.run(60, |now| service.takes(now));
            let used = f64::from(taken) / limit / 60.0;
            let part = f64::from(refused) / f64::from(taken + refused);
            assert!(used > 0.85 && part < 0.05, "{limit} {burst}: {used:.3} {part:.3}");
        }
    }

    #[test]
    fn refusals_by_chance_do_not_slow_down() {
        for seed in 0..8 {
            for (part, most, at_once, latency) in [
                (0.05, f64::INFINITY, 32, 50),
                (0.05, f64::INFINITY, 16, 200),
                (0.10, f64::INFINITY, 32, 50),
                (0.02, 1000.0, 100, 50),
            ] {
                let mut random = fastrand::Rng::with_seed(seed);
                let mut program = Program::new(most, at_once, latency);
                let (taken, _) = program.run(60, |_| random.f64() >= part);
                #[expect(clippy::cast_precision_loss, reason = "it is a hundred or so")]
                let at_once = at_once as f64;
                let possible = (at_once / program.latency.as_secs_f64()).min(most) * (1.0 - part);
                let used = f64::from(taken) / possible / 60.0;
                assert!(used > 0.8, "{seed} {part} {latency}: {used:.3}");
            }
        }
    }

    #[test]
    fn a_limit_is_found_among_refusals_by_chance() {
        let mut slow = Vec::new();
        for seed in 0..100 {
            let mut random = fastrand::Rng::with_seed(seed);
            for jitter in [0.0, 0.2, 0.8] {
                let mut program = Program::new(f64::INFINITY, 32, 50).with_jitter(jitter, seed);
                let mut service = Service::new(100.0, 10.0, program.now);
                let takes = |now| random.f64() >= 0.05 && service.takes(now);
                let (taken, refused) = program.run(60, takes);
                let part = f64::from(refused) / f64::from(taken + refused);
                let told = format!("{seed} {jitter}: {taken}, refused {part:.3}");
                assert!(taken > 3_000 && part < 0.2, "{told}");
                if taken < 5_000 || part > 0.13 {
                    slow.push(told);
                }
            }
        }
        // A few of three hundred are unlucky.
        assert!(slow.len() < 30, "{slow:#?}");
    }

    #[test]
    fn a_limit_of_a_few_a_second_is_found_and_left_when_it_is_lifted() {
        for seed in 0..8 {
            let mut program = Program::new(f64::INFINITY, 16, 20).with_jitter(0.5, seed);
            let mut service = Service::new(10.0, 10.0, program.now);
            let (taken, refused) = program.run(60, |now| service.takes(now));
            let part = f64::from(refused) / f64::from(taken + refused);
            assert!(taken > 540 && part < 0.2, "{seed}: {taken} {part:.3}");
            program.run(60, |_| true);
            let (taken, _) = program.run(10, |_| true);
            assert!(taken > 4_000, "{seed}: {taken}");
        }
    }

    #[test]
    fn a_limit_that_is_lifted_is_noticed() {
        let mut program = Program::new(f64::INFINITY, 16, 5);
        let mut service = Service::new(50.0, 5.0, program.now);
        program.run(10, |now| service.takes(now));
        assert!(program.pace.now < 70.0, "{}", program.pace.now);
        program.run(60, |_| true);
        assert!(program.pace.now > 400.0, "{}", program.pace.now);
    }

    #[test]
    fn a_service_that_was_ill_for_a_while_is_soon_used_as_before() {
        for seed in 0..8 {
            for part in [0.5, 0.85, 0.9, 0.95, 1.0] {
                let mut random = fastrand::Rng::with_seed(seed);
                let mut program = Program::new(1000.0, 32, 30);
                program.run(5, |_| true);
                program.run(30, |_| random.f64() >= part);
                program.run(10, |_| true);
                let (taken, _) = program.run(10, |_| true);
                assert!(taken > 8_000, "{seed} {part}: {taken}");
            }
        }
    }

    #[test]
    fn what_is_wrong_for_a_moment_is_got_over() {
        for seed in 0..20 {
            // Most, limit, at once, latency, seconds of trouble, what is taken in it, by chance after it.
            for (most, limit, at_once, latency, trouble, part, chance) in [
                (1000.0, 1000.0, 100, 50, 1, 0.3, 0.01),
                (1000.0, 1000.0, 100, 50, 10, 0.5, 0.01),
                (1000.0, 1000.0, 100, 50, 1, 0.0, 0.0),
                (f64::INFINITY, 100.0, 32, 30, 2, 0.12, 0.0),
                (f64::INFINITY, 100.0, 32, 30, 20, 0.12, 0.01),
            ] {
                let mut random = fastrand::Rng::with_seed(seed);
                let mut program = Program::new(most, at_once, latency).with_jitter(0.5, seed);
                let mut service = Service::new(limit, limit / 10.0, program.now);
                program.run(10, |now| service.takes(now));
                program.run(trouble, |now| service.takes(now) && random.f64() < part);
                program.run(30, |now| service.takes(now) && random.f64() >= chance);
                let (taken, _) =
                    program.run(20, |now| service.takes(now) && random.f64() >= chance);
                let used = f64::from(taken) / limit / 20.0;
                assert!(used > 0.75, "{seed}: {trouble} s of {part} of {limit}: {used:.3}");
            }
        }
    }

    #[test]
    fn a_program_that_pauses_again_and_again_is_not_slowed_down() {
        for seed in 0..20 {
            for (busy, pause, chance) in [(1, 900, 0.02), (1, 900, 0.0), (1, 300, 0.01)] {
                let mut random = fastrand::Rng::with_seed(seed);
                let mut program = Program::new(f64::INFINITY, 32, 30).with_jitter(0.5, seed);
                let mut service = Service::new(100.0, 10.0, program.now);
                let mut taken = 0;
                for _ in 0..40 {
                    let run = program.run(busy, |now| service.takes(now) && random.f64() >= chance);
                    taken += run.0;
                    program.now += Duration::from_millis(pause);
                }
                assert!(taken > 3_200, "{seed}: {busy} s and {pause} ms, {chance}: {taken}");
            }
        }
    }

    #[test]
    fn what_a_well_service_refuses_by_chance_does_not_keep_it_slow() {
        for seed in 0..4 {
            for (outage, part) in
                [(1, 0.01), (17, 0.005), (17, 0.01), (17, 0.02), (17, 0.05), (17, 0.1)]
            {
                let mut random = fastrand::Rng::with_seed(seed);
                let mut program = Program::new(1000.0, 32, 30);
                program.run(5, |_| true);
                program.run(outage, |_| false);
                program.run(40, |_| random.f64() >= part);
                let (taken, _) = program.run(20, |_| random.f64() >= part);
                assert!(taken > 12_000, "{seed} {outage} {part}: {taken}");
            }
        }
    }

    #[test]
    fn answers_that_take_longer_than_a_second_are_no_pauses() {
        for (outage, limit, at_once, latency) in [(6, 100.0, 100, 1500), (0, 50.0, 100, 1200)] {
            let mut program = Program::new(f64::INFINITY, at_once, latency);
            program.run(outage, |_| false);
            let mut service = Service::new(limit, limit / 10.0, program.now);
            program.run(40, |now| service.takes(now));
            let (taken, refused) = program.run(40, |now| service.takes(now));
            #[expect(clippy::cast_precision_loss, reason = "it is a hundred")]
            let possible = (at_once as f64 / program.latency.as_secs_f64()).min(limit);
            let used = f64::from(taken) / possible / 40.0;
            let part = f64::from(refused) / f64::from(taken + refused);
            assert!(used > 0.8 && part < 0.1, "{limit} {latency}: {used:.3} {part:.3}");
        }
    }

    #[test]
    fn a_low_limit_is_found_by_few_at_once() {
        for (limit, at_once, latency) in [(30.0, 2, 30), (30.0, 4, 60), (25.0, 3, 40)] {
            let mut program = Program::new(f64::INFINITY, at_once, latency);
            let mut service = Service::new(limit, limit / 10.0, program.now);
            program.run(30, |now| service.takes(now));
            let (taken, refused) = program.run(60, |now| service.takes(now));
            let used = f64::from(taken) / limit / 60.0;
            let part = f64::from(refused) / f64::from(taken + refused);
            assert!(used > 0.85 && part < 0.08, "{limit} {at_once}: {used:.3} {part:.3}");
        }
    }

    #[test]
    fn a_pause_says_nothing() {
        let mut program = Program::new(f64::INFINITY, 16, 20);
        let mut service = Service::new(100.0, 100.0, program.now);
        for _ in 0..8 {
            // What was saved up and a little more.
            let (taken, _) = program.run(2, |now| service.takes(now));
            assert!(taken > 200, "{taken}");
            program.now += Duration::from_mins(2);
        }
    }
}
