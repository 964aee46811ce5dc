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
const MIN_REQUESTS: u32 = 20;

/// An epoch ends at once, though not before this, if so many requests in a row were refused that the
/// limit must be far below.
const SHORT_EPOCH: Duration = Duration::from_millis(100);
const IN_A_ROW: u32 = 5;

/// Part of the requests that may be refused because of our pace: more, and it falls.
const TOO_MANY: f64 = 0.08;

/// Part that is nothing to speak of: no more, and it rises.
const FEW: f64 = 0.02;

/// More than this is not refused by chance.
const MOST_BY_CHANCE: f64 = 0.2;

/// How much it rises an epoch; and after so many epochs without a refusal, twice as much.
const RISE: f64 = 1.01;
const QUIET_EPOCHS: u32 = 40;
const QUIET_RISE: f64 = 1.1;

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
    /// Part of the requests that are refused whatever the pace is: what was refused when it had just
    /// fallen to what the service takes.
    by_chance: f64,
    /// Whether it has just fallen.
    fallen: bool,
}

#[derive(Debug)]
struct Epoch {
    began: Instant,
    taken: u32,
    refused: u32,
    /// Refusals behind the last request that was taken.
    in_a_row: u32,
    /// Whether requests had to wait for the pace.
    held: bool,
}

impl Epoch {
    fn new(began: Instant) -> Self {
        Self { began, taken: 0, refused: 0, in_a_row: 0, held: false }
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
            by_chance: 0.0,
            fallen: false,
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

    fn count(&mut self, began: Instant, now: Instant, count: impl FnOnce(&mut Epoch)) {
        // What was sent before the pace was set says nothing of it.
        if began < self.epoch.began {
            return;
        }
        count(&mut self.epoch);
        let Epoch { began, taken, refused, in_a_row, .. } = self.epoch;
        let age = now.saturating_duration_since(began);
        let early = in_a_row >= IN_A_ROW;
        if early && age < SHORT_EPOCH {
            // Until then the service takes no more than what it is willing to.
            self.paused = Some(began + SHORT_EPOCH);
            self.close(SHORT_EPOCH, began + SHORT_EPOCH);
        } else if early || (age >= EPOCH && taken + refused >= MIN_REQUESTS) {
            self.close(age, now);
        }
    }

    /// Draws the conclusion from an epoch of this length.
    fn close(&mut self, age: Duration, now: Instant) {
        let Epoch { taken, refused, held, .. } = self.epoch;
        self.epoch = Epoch::new(now);
        let part = f64::from(refused) / f64::from((taken + refused).max(1));
        self.quiet = if refused == 0 { self.quiet.saturating_add(1) } else { 0 };
        if self.fallen {
            self.by_chance = f64::midpoint(self.by_chance, part).min(MOST_BY_CHANCE);
        }
        let ours = part - self.by_chance;
        self.fallen = ours > TOO_MANY;
        if self.fallen {
            let measured = f64::from(taken) / age.as_secs_f64();
            self.set(measured.min(self.now), now);
        } else if ours <= FEW && held && self.now < self.most {
            let rise = if self.quiet > QUIET_EPOCHS { QUIET_RISE } else { RISE };
            self.set(self.now * rise, now);
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
        for limit in [40.0, 100.0, 1000.0] {
            for (burst, latency) in [(0.1, 2), (0.1, 40), (1.0, 5)] {
                let mut service = Service {
                    limit,
                    burst: limit * burst,
                    tokens: limit * burst,
                    at: Instant::now(),
                };
                let mut pace = Pace::new(f64::INFINITY, Instant::now());
                let latency = Duration::from_millis(latency);
                let (taken, refused) = run(&mut pace, |now| service.takes(now), 20, 16, latency);
                let possible = (16_000.0 / latency.as_millis() as f64).min(limit) * 20.0;
                let used = f64::from(taken) / possible;
                let part = f64::from(refused) / f64::from(taken + refused);
                let told =
                    format!("{limit} {burst} {latency:?}: used {used:.3}, refused {part:.3}");
                assert!(used > 0.9 && part < 0.05, "{told}");
            }
        }
    }

    #[test]
    fn refusals_by_chance_do_not_stop_everything() {
        let mut random = fastrand::Rng::with_seed(5);
        let mut pace = Pace::new(f64::INFINITY, Instant::now());
        let takes = |_| random.f64() >= 0.05;
        let (taken, _) = run(&mut pace, takes, 60, 32, Duration::from_millis(50));
        assert!(taken > 60 * 640 / 3, "{taken}");
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
}
