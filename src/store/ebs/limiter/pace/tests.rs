//! What the pace makes of services, in simulated time.

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
        let mut under_way: BinaryHeap<Reverse<(Instant, usize, Instant, bool)>> = BinaryHeap::new();
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
            let possible = (16.0 / program.latency.as_secs_f64()).min(limit) * f64::from(seconds);
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
            let (taken, _) = program.run(20, |now| service.takes(now) && random.f64() >= chance);
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
