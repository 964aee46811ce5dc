//! So many requests a second: a token bucket whose rate follows what the service refuses.
//!
//! It begins with what was given, or with the documented quota. After an epoch in which much was refused it is
//! nine tenths of what was accepted in that; after another one it is a few percent more, if it held requests up.

use std::mem;
use std::time::{Duration, Instant};

use super::MUCH;

/// An epoch lasts at least so long, and where much was refused, until there are enough answers to be sure.
const EPOCH: Duration = Duration::from_millis(200);
const ENOUGH: f64 = 20.0;

/// After so long without an answer an epoch begins anew: a program that sends nothing shows nothing.
const PAUSE: Duration = Duration::from_secs(1);

/// The rate after an epoch in which much was refused, as a part of what was accepted; it is no less than `MOST_FALL`
/// of what was answered, since a service that accepts nothing for a moment shows no rate.
const FALL: f64 = 0.9;
const MOST_FALL: f64 = 0.25;

/// The rate after another one, as a multiple of that before.
const RISE: f64 = 1.05;

/// It does not fall below this: no documented quota of EBS is lower.
const LEAST: f64 = 10.0;

/// Requests that may be sent at once after a pause, as seconds of the rate; and how long nothing is sent after a
/// refusal, where many are refused.
const BURST: Duration = Duration::from_millis(30);

/// The rate of some requests.
#[derive(Debug)]
pub(super) struct Rate {
    /// What was given; infinite if nothing was.
    most: f64,
    /// Requests a second.
    now: f64,
    /// When the next request is due if all come evenly.
    due: Instant,
    /// Answers to what was sent before the last fall show nothing of the rate since.
    fell: Instant,
    latest: Instant,
    epoch: Epoch,
}

#[derive(Debug, Default)]
struct Epoch {
    /// At an answer, which is not counted.
    began: Option<Instant>,
    accepted: f64,
    refused: f64,
    /// Whether requests had to wait for the rate.
    limited: bool,
}

impl Rate {
    /// At most `most` requests a second.
    pub(super) fn new(most: f64, now: Instant) -> Self {
        Self { most, now: most, due: now, fell: now, latest: now, epoch: Epoch::default() }
    }

    /// From now on at most `most`. One that refusals have not slowed down follows at once.
    pub(super) fn limit(&mut self, most: f64) {
        self.now = if self.now < self.most { self.now.min(most) } else { most };
        self.most = most;
    }

    /// When a request may be sent, if not at `now`.
    pub(super) fn wait(&mut self, now: Instant) -> Option<Instant> {
        let saved = BURST.max(Duration::from_secs_f64(0.5 / self.now));
        let at = self.due.checked_sub(saved).filter(|at| *at > now);
        self.epoch.limited |= at.is_some();
        at
    }

    /// A request is sent.
    pub(super) fn take(&mut self, now: Instant) {
        self.due = self.due.max(now) + Duration::from_secs_f64(1.0 / self.now);
    }

    /// A request that was sent at `sent` was accepted, or refused as one too many.
    pub(super) fn answered(&mut self, sent: Instant, refused: bool, now: Instant) {
        if sent < self.fell {
            return;
        }
        if now.saturating_duration_since(mem::replace(&mut self.latest, now)) > PAUSE {
            self.epoch = Epoch::default();
        }
        let epoch = &mut self.epoch;
        let Some(began) = epoch.began else {
            epoch.began = Some(now);
            return;
        };
        *(if refused { &mut epoch.refused } else { &mut epoch.accepted }) += 1.0;
        let answers = epoch.accepted + epoch.refused;
        let much = epoch.refused > MUCH * answers;
        if refused && much && answers >= ENOUGH / 5.0 {
            self.due = self.due.max(now + 2 * BURST);
        }
        let age = now.saturating_duration_since(began);
        if age < EPOCH || much && answers < ENOUGH {
            return;
        }
        let Epoch { accepted, limited, .. } = mem::take(&mut self.epoch);
        if much {
            let a_second = |n: f64| n / age.as_secs_f64();
            let answered = self.now.min(a_second(answers));
            self.now = (a_second(accepted) * FALL).max(answered * MOST_FALL);
            self.fell = now;
        } else if limited {
            self.now *= RISE;
        }
        self.now = self.now.clamp(LEAST.min(self.most), self.most);
    }
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;
    use std::collections::BinaryHeap;

    use super::*;

    /// A service with a token bucket of its own.
    struct Service {
        limit: f64,
        burst: f64,
        tokens: f64,
        at: Instant,
    }

    impl Service {
        fn accepts(&mut self, now: Instant) -> bool {
            let gained = now.duration_since(self.at).as_secs_f64() * self.limit;
            self.tokens = (self.tokens + gained).min(self.burst);
            self.at = now;
            let accepted = self.tokens >= 1.0;
            self.tokens -= f64::from(u8::from(accepted));
            accepted
        }
    }

    /// A program that asks all the time, and its clock.
    struct Program {
        rate: Rate,
        now: Instant,
        at_once: usize,
        latency: Duration,
    }

    impl Program {
        fn new(most: f64, at_once: usize, latency: u64) -> Self {
            let now = Instant::now();
            Self {
                rate: Rate::new(most, now),
                now,
                at_once,
                latency: Duration::from_millis(latency),
            }
        }

        /// Requests that are accepted and refused in so many seconds.
        fn run(&mut self, seconds: f64, mut accepts: impl FnMut(Instant) -> bool) -> (u32, u32) {
            let end = self.now + Duration::from_secs_f64(seconds);
            let (mut sent, mut accepted, mut refused) = (0, 0, 0);
            let mut under_way: BinaryHeap<Reverse<(Instant, u32, Instant, bool)>> =
                BinaryHeap::new();
            while self.now < end {
                let now = self.now;
                while let Some(Reverse((.., asked, ok))) =
                    under_way.peek().copied().filter(|Reverse((at, ..))| *at <= now)
                {
                    under_way.pop();
                    *(if ok { &mut accepted } else { &mut refused }) += 1;
                    self.rate.answered(asked, !ok, now);
                }
                while under_way.len() < self.at_once && self.rate.wait(now).is_none() {
                    self.rate.take(now);
                    sent += 1;
                    under_way.push(Reverse((now + self.latency, sent, now, accepts(now))));
                }
                self.now += Duration::from_millis(1);
            }
            (accepted, refused)
        }

        fn with_limit(&mut self, seconds: f64, limit: f64, burst: f64) -> (f64, f64) {
            let mut service = Service { limit, burst, tokens: burst, at: self.now };
            let (accepted, refused) = self.run(seconds, |now| service.accepts(now));
            let used = f64::from(accepted) / (limit * seconds);
            (used, f64::from(refused) / f64::from(accepted + refused))
        }
    }

    #[test]
    fn keeps_to_what_was_given_and_uses_it() {
        let (accepted, _) = Program::new(1000.0, 64, 25).run(10.0, |_| true);
        assert!((9_700..=10_100).contains(&accepted), "{accepted}");
    }

    #[test]
    fn finds_a_limit_that_nobody_told_and_uses_it() {
        for (limit, at_once, latency, least) in [
            (100.0, 16, 2, 0.9),
            (100.0, 16, 40, 0.9),
            (100.0, 48, 200, 0.85),
            (1000.0, 64, 25, 0.9),
        ] {
            for burst in [0.1, 1.0] {
                let mut program = Program::new(f64::INFINITY, at_once, latency);
                let (used, refused) = program.with_limit(20.0, limit, limit * burst);
                let told = format!("{limit} {burst} {latency}: {used:.3}, refused {refused:.3}");
                assert!(used > least && refused < 0.1, "{told}");
            }
        }
    }

    #[test]
    fn is_not_slowed_down_by_refusals_that_come_by_chance() {
        for latency in [2, 25, 200] {
            let mut random = fastrand::Rng::with_seed(latency);
            let mut program = Program::new(f64::INFINITY, 64, latency);
            let (accepted, _) = program.run(10.0, |_| random.f64() > 0.05);
            let (possible, _) = Program::new(f64::INFINITY, 64, latency).run(10.0, |_| true);
            assert!(f64::from(accepted) > 0.8 * f64::from(possible), "{latency}: {accepted}");
        }
    }

    #[test]
    fn few_requests_are_not_slowed_down_by_refusals_that_come_by_chance() {
        for (at_once, latency) in [(1, 200), (2, 200), (1, 100), (4, 200)] {
            let mut random = fastrand::Rng::with_seed(latency);
            let mut program = Program::new(f64::INFINITY, at_once, latency);
            let (accepted, _) = program.run(120.0, |_| random.f64() > 0.05);
            let (possible, _) = Program::new(f64::INFINITY, at_once, latency).run(120.0, |_| true);
            let part = f64::from(accepted) / f64::from(possible);
            assert!(part > 0.8, "{at_once} {latency}: {part:.2}");
        }
    }

    #[test]
    fn returns_within_half_a_minute_after_a_time_in_which_all_was_refused() {
        for outage in [0.5, 3.0, 10.0] {
            let mut program = Program::new(f64::INFINITY, 20, 20);
            program.run(1.0, |_| true);
            program.run(outage, |_| false);
            program.run(30.0, |_| true);
            let (accepted, _) = program.run(1.0, |_| true);
            assert!(accepted > 900, "{outage}: {accepted}");
        }
    }

    #[test]
    fn a_pause_of_the_program_shows_nothing() {
        let mut program = Program::new(f64::INFINITY, 16, 10);
        for _ in 0..20 {
            let mut n = 0;
            program.run(0.1, |_| {
                n += 1;
                n % 6 > 0
            });
            program.now += Duration::from_secs(5);
        }
        let (accepted, _) = program.run(1.0, |_| true);
        assert!(accepted > 1_400, "{accepted}");
    }
}
