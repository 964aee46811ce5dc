//! So many requests a second, as far as is known: a number that was given, and what the service
//! shows that it takes.
//!
//! A service that has enough answers "throttled", and goes on to take as many as it is willing to.
//! So what it took while it refused many is its limit, measured: the pace falls to that. While it
//! refuses hardly any, the pace rises slowly. Refusals at a rate that has nothing to do with
//! ours (other programs, or a service that is ill) do not bring it down to nothing.

use std::time::{Duration, Instant};

/// How long what is taken and refused is counted before something follows from it.
const EPOCH: Duration = Duration::from_millis(250);

/// Requests an epoch has at least.
const MIN_REQUESTS: u32 = 50;

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
/// needs more requests, since it tells a few in a hundred from none.
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

/// How much it rises an epoch; and after so many epochs without a refusal.
const RISE: f64 = 1.02;
const QUIET_EPOCHS: u32 = 8;
const QUIET_RISE: f64 = 1.1;

/// How much it rises where everything was refused, and is taken again; and how often.
const RECOVERY: f64 = 2.0;
const RECOVERY_EPOCH: Duration = Duration::from_secs(1);

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
    /// Nothing is begun before this.
    paused: Option<Instant>,
    epoch: Epoch,
    /// Epochs in a row without a refusal.
    quiet: u32,
    /// What is refused whatever the pace is, as trials have shown.
    by_chance: Count,
    /// Whether it refused everything when it was measured: that is no limit, and may end at any moment.
    refuses_all: bool,
    trial: Option<Trial>,
}

/// For a while it is slower than what the service takes, to see what is refused by chance.
#[derive(Clone, Copy, Debug)]
struct Trial {
    /// The pace before, what the service took of it, and what it refused.
    before: f64,
    taken: f64,
    refused: Count,
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

    /// Whether the part that is refused is the same as in `other` or smaller, as far as so few tell.
    fn is_no_more_than(self, other: Self) -> bool {
        let mut all = self;
        all.add(other);
        let variance = all.part() * (1.0 - all.part()) * (self.of.recip() + other.of.recip());
        self.part() - other.part() <= DEVIATIONS * variance.sqrt()
    }
}

#[derive(Debug)]
struct Epoch {
    began: Instant,
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
        Self { began, taken: 0, refused: 0, in_a_row: 0, drained: false, held: false }
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
            paused: None,
            epoch: Epoch::new(now),
            quiet: 0,
            by_chance: Count::default(),
            trial: None,
            refuses_all: false,
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
            self.close(age, true, now);
        } else if sent >= EPOCH && self.is_enough(sent)
            || self.refuses_all && in_a_row == 0 && age >= RECOVERY_EPOCH
        {
            self.close(sent, false, now);
        }
    }

    /// Whether something follows from what was counted in an epoch, of which the last request was sent
    /// so long after it began.
    fn is_enough(&self, sent: Duration) -> bool {
        let count = self.epoch.count();
        if self.trial.is_some() {
            return count.of >= f64::from(TRIAL_REQUESTS) || sent >= TRIAL_TIME;
        }
        if count.of < f64::from(MIN_REQUESTS) {
            return false;
        }
        let expected = self.by_chance.part() + TOO_MANY;
        self.now < self.most
            || count.of >= f64::from(LONG)
            || count.part() > expected + DEVIATIONS * (expected / count.of).sqrt()
    }

    /// Draws the conclusion from an epoch of this length. `exact`: nothing was left of what the service
    /// had saved up, neither at its beginning nor at its end.
    fn close(&mut self, age: Duration, exact: bool, now: Instant) {
        let Epoch { taken, refused, in_a_row, held, .. } = self.epoch;
        let count = self.epoch.count();
        self.epoch = Epoch::new(now);
        let part = count.part();
        self.quiet = if refused == 0 { self.quiet.saturating_add(1) } else { 0 };
        let measured = (f64::from(taken) / age.as_secs_f64()).min(self.now);
        if exact {
            self.trial = None;
            self.refuses_all = taken == 0;
            return self.set(measured, now);
        }
        if self.refuses_all && in_a_row == 0 {
            return self.set(self.now * RECOVERY, now);
        }
        self.refuses_all = false;
        if let Some(trial) = self.trial.take() {
            // Where a slower pace changes nothing, it was not the pace.
            if trial.refused.is_no_more_than(count) {
                self.by_chance.add(trial.refused);
                self.by_chance.add(count);
                return self.set(trial.before, now);
            }
            if part < MOST_BY_CHANCE {
                self.by_chance.add(count);
                return self.set(trial.taken, now);
            }
        }
        let by_chance = self.by_chance.part();
        let ours = part - by_chance;
        let noise = DEVIATIONS * (by_chance / count.of).sqrt();
        if ours > TOO_MANY.max(noise) {
            self.trial = Some(Trial { before: self.now, taken: measured, refused: count });
            self.set(measured * TRIAL, now);
        } else if ours <= FEW && held && self.now < self.most {
            let rise = if self.quiet > QUIET_EPOCHS { QUIET_RISE } else { RISE };
            self.set(self.now * rise, now);
        } else if ours > FEW {
            self.set(self.now * EASE, now);
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

    /// Requests that were taken and refused in so many seconds, `at_once` of them under way, each
    /// for `latency`.
    fn run(
        pace: &mut Pace,
        mut takes: impl FnMut(Instant) -> bool,
        seconds: u64,
        at_once: usize,
        latency: Duration,
    ) -> (u32, u32) {
        let start = Instant::now();
        let (mut now, mut taken, mut refused) = (start, 0, 0);
        let mut under_way = std::collections::VecDeque::new();
        while now < start + Duration::from_secs(seconds) {
            while let Some((began, answer)) = under_way.front().copied()
                && began + latency <= now
            {
                under_way.pop_front();
                if answer {
                    taken += 1;
                    pace.taken(began, now);
                } else {
                    refused += 1;
                    pace.refused(began, now);
                }
            }
            while under_way.len() < at_once && pace.wait(now).is_none() {
                pace.take(now);
                under_way.push_back((now, takes(now)));
            }
            now += Duration::from_millis(1);
        }
        (taken, refused)
    }

    #[test]
    fn what_was_given_is_kept_to_and_used() {
        let mut pace = Pace::new(1000.0, Instant::now());
        let (taken, _) = run(&mut pace, |_| true, 10, 64, Duration::from_millis(25));
        assert!((9_800..=10_050).contains(&taken), "{taken}");
    }

    #[test]
    fn a_limit_that_nobody_told_is_found_and_used() {
        for (limit, seconds) in [(40.0, 50_u32), (100.0, 20), (1000.0, 20)] {
            for (burst, latency) in [(0.1, 2), (0.1, 40), (1.0, 5)] {
                let mut service = Service {
                    limit,
                    burst: limit * burst,
                    tokens: limit * burst,
                    at: Instant::now(),
                };
                let mut pace = Pace::new(f64::INFINITY, Instant::now());
                let latency = Duration::from_millis(latency);
                let (taken, refused) =
                    run(&mut pace, |now| service.takes(now), seconds.into(), 16, latency);
                let possible = (16.0 / latency.as_secs_f64()).min(limit) * f64::from(seconds);
                let used = f64::from(taken) / possible;
                let part = f64::from(refused) / f64::from(taken + refused);
                let told =
                    format!("{limit} {burst} {latency:?}: used {used:.3}, refused {part:.3}");
                assert!(used > 0.9 && part < 0.05, "{told}");
            }
        }
    }

    #[test]
    fn refusals_by_chance_do_not_slow_down() {
        for seed in 0..8 {
            for (at_once, latency) in [(32, 50), (16, 200)] {
                let mut random = fastrand::Rng::with_seed(seed);
                let mut pace = Pace::new(f64::INFINITY, Instant::now());
                let takes = |_| random.f64() >= 0.05;
                let (taken, _) = run(&mut pace, takes, 60, at_once, Duration::from_millis(latency));
                let possible = at_once as u64 * 60_000 / latency * 95 / 100;
                assert!(u64::from(taken) > possible * 8 / 10, "{seed} {latency}: {taken}");
            }
        }
    }

    #[test]
    fn a_limit_is_found_among_refusals_by_chance() {
        for seed in 0..8 {
            let mut random = fastrand::Rng::with_seed(seed);
            let begin = Instant::now();
            let mut service = Service { limit: 100.0, burst: 10.0, tokens: 10.0, at: begin };
            let mut pace = Pace::new(f64::INFINITY, begin);
            let takes = |now| random.f64() >= 0.05 && service.takes(now);
            let (taken, refused) = run(&mut pace, takes, 60, 32, Duration::from_millis(50));
            let part = f64::from(refused) / f64::from(taken + refused);
            assert!(taken > 5_000 && part < 0.15, "{seed}: {taken} {part:.3}");
        }
    }

    #[test]
    fn a_limit_that_is_lifted_is_noticed() {
        let begin = Instant::now();
        let mut service = Service { limit: 50.0, burst: 5.0, tokens: 5.0, at: begin };
        let mut pace = Pace::new(f64::INFINITY, begin);
        run(&mut pace, |now| service.takes(now), 10, 16, Duration::from_millis(5));
        assert!(pace.now < 70.0, "{}", pace.now);
        run(&mut pace, |_| true, 60, 16, Duration::from_millis(5));
        assert!(pace.now > 400.0, "{}", pace.now);
    }

    #[test]
    fn a_service_that_was_ill_for_a_while_is_soon_used_as_before() {
        let mut pace = Pace::new(f64::INFINITY, Instant::now());
        run(&mut pace, |_| false, 6, 16, Duration::from_millis(5));
        assert!(pace.now < 3.0, "{}", pace.now);
        // The first six seconds are those of before.
        run(&mut pace, |_| true, 20, 16, Duration::from_millis(5));
        assert!(pace.now > 100.0, "{}", pace.now);
    }
}
