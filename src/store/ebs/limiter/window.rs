//! How many requests for blocks are under way at the same time.
//!
//! One more for each round without trouble, and a part fewer when the service is overloaded (TCP's
//! additive increase and multiplicative decrease); and no more than what brings something: if a
//! quarter more of them moved hardly more blocks, it goes back, and tries again later.

use std::time::{Duration, Instant};

/// How many it begins with.
const BEGIN: f64 = 16.0;

/// Where even the fastest answer took this long, it begins to grow by one for each of them, as far as this: many are
/// needed there, and the first seconds count.
const FAR: Duration = Duration::from_millis(20);
/// Where it took this long it is the line that is slow, and more of them only share it.
const SLOW: Duration = Duration::from_secs(1);
const QUICKLY_TO: f64 = 48.0;

/// How many it never goes below.
const LEAST: f64 = 2.0;

/// What is left when the service is overloaded.
const DECREASE: f64 = 0.7;

/// Part of the requests that may be refused without being too many at once: this comes by chance, or
/// of the pace, which is somebody else's affair. And over how many of them, at least, it is counted.
const BY_CHANCE: f64 = 0.15;
const COUNTED: f64 = 32.0;

/// How long throughput is measured before something follows from it, in time and in rounds.
const MEASURE: Duration = Duration::from_millis(200);
const ROUNDS: f64 = 2.0;

/// How much larger it must be for a comparison, and how much more that must bring: a quarter, where
/// only time is waited for, and nothing, where a processor or a line is busy.
const STEP: f64 = 1.25;
const GAIN: f64 = 1.1;

/// Measurements that say nothing: connections are made, and memory is touched for the first time.
const WARM_UP: u32 = 1;

/// How long it stays where more brought nothing.
const HOLD: Duration = Duration::from_secs(3);

/// The number of requests that may be under way.
#[derive(Debug)]
pub(super) struct Window {
    most: f64,
    size: f64,
    /// It was reduced then: trouble of requests that began before is answered already.
    reduced: Option<Instant>,
    held_until: Option<Instant>,
    measure: Measure,
    /// The last size at which more still brought something, and its requests a second.
    proven: Option<(f64, f64)>,
    warm_up: u32,
    /// Whether there was no trouble, and no measurement that says to stop, so far.
    begins: bool,
    fastest: Duration,
    /// Part of the latest requests that was refused.
    refused: f64,
}

#[derive(Debug)]
struct Measure {
    began: Instant,
    ended: f64,
}

impl Window {
    /// One that never becomes larger than `most`.
    pub(super) fn new(most: usize, now: Instant) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "it is a few hundred")]
        let most = most as f64;
        Self {
            most,
            size: BEGIN.min(most),
            reduced: None,
            held_until: None,
            measure: Measure { began: now, ended: 0.0 },
            proven: None,
            warm_up: WARM_UP,
            begins: true,
            fastest: Duration::MAX,
            refused: 0.0,
        }
    }

    /// How many may be under way now.
    pub(super) fn size(&self) -> usize {
        #[expect(clippy::cast_sign_loss, reason = "it is at least 1")]
        let size = self.size as usize;
        size.max(1)
    }

    /// A request that was begun at `began` ended well. `full`: as many were under way as may be, and
    /// others waited.
    pub(super) fn succeeded(&mut self, full: bool, began: Instant, now: Instant) {
        self.fastest = self.fastest.min(now.saturating_duration_since(began));
        self.count_refused(0.0);
        if !full {
            // What is not used shows nothing.
            self.measure = Measure { began: now, ended: 0.0 };
            return;
        }
        self.measure.ended += 1.0;
        let age = now.saturating_duration_since(self.measure.began);
        if age >= MEASURE && self.measure.ended >= self.size * ROUNDS {
            self.judge(self.measure.ended / age.as_secs_f64(), now);
            self.measure = Measure { began: now, ended: 0.0 };
        }
        if self.held_until.is_none_or(|until| until <= now) {
            let is_far = FAR < self.fastest && self.fastest < SLOW;
            let quickly = self.begins && self.size < QUICKLY_TO && is_far;
            let step = if quickly { 1.0 } else { 1.0 / self.size };
            self.size = (self.size + step).min(self.most);
        }
    }

    /// The service refused a request that was begun at `began`, because there were too many.
    pub(super) fn refused(&mut self, began: Instant, now: Instant) {
        self.count_refused(1.0);
        if self.refused > BY_CHANCE {
            self.overloaded(began, now);
        }
    }

    fn count_refused(&mut self, refused: f64) {
        self.refused += (refused - self.refused) / (2.0 * self.size).max(COUNTED);
    }

    /// The service had too many at once, or was too slow, for a request that was begun at `began`.
    pub(super) fn overloaded(&mut self, began: Instant, now: Instant) {
        if self.reduced.is_some_and(|at| began < at) {
            return;
        }
        self.reduced = Some(now);
        self.begins = false;
        self.size = (self.size * DECREASE).max(LEAST.min(self.most));
        self.proven = None;
        self.measure = Measure { began: now, ended: 0.0 };
    }

    fn judge(&mut self, rate: f64, now: Instant) {
        if self.warm_up > 0 {
            self.warm_up -= 1;
            return;
        }
        match self.proven {
            Some((size, _)) if self.size < size * STEP => {}
            Some((size, before)) if rate < before * GAIN => {
                self.begins = false;
                self.size = size;
                self.held_until = Some(now + HOLD);
                self.proven = Some((size, rate.max(before * 0.9)));
            }
            _ => self.proven = Some((self.size, rate)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The size after so many seconds with a service that answers each of `n` requests after `latency(n)`.
    fn after(window: &mut Window, seconds: u64, latency: impl Fn(f64) -> f64) -> usize {
        let start = Instant::now();
        let mut now = start;
        while now < start + Duration::from_secs(seconds) {
            #[expect(clippy::cast_precision_loss, reason = "it is small")]
            let size = window.size() as f64;
            now += Duration::from_secs_f64(latency(size) / size);
            let began = now.checked_sub(Duration::from_secs_f64(latency(size)));
            window.succeeded(true, began.unwrap_or(now), now);
        }
        window.size()
    }

    #[test]
    fn it_grows_while_more_is_faster() {
        // A tenth of a second each, however many.
        let mut window = Window::new(128, Instant::now());
        assert!(after(&mut window, 30, |_| 0.1) > 120);
    }

    #[test]
    fn a_slow_line_is_not_shared_by_more() {
        // One a second, whatever one does.
        let mut window = Window::new(128, Instant::now());
        let size = after(&mut window, 120, |n| n);
        assert!(size <= 24, "{size}");
    }

    #[test]
    fn it_stays_where_more_brings_nothing() {
        // A thousand a second, whatever one does.
        let mut window = Window::new(128, Instant::now());
        let size = after(&mut window, 30, |n| n / 1000.0);
        assert!((10..=40).contains(&size), "{size}");
        // Forty are enough here.
        let mut window = Window::new(128, Instant::now());
        let size = after(&mut window, 30, |n| (n / 1000.0).max(0.04));
        assert!((36..=64).contains(&size), "{size}");
    }

    #[test]
    fn trouble_reduces_it_once() {
        let start = Instant::now();
        let mut window = Window::new(128, start);
        let later = start + Duration::from_millis(10);
        for _ in 0..10 {
            window.overloaded(start, later);
        }
        assert_eq!(window.size(), 11);
        for n in 1..20 {
            window.overloaded(later + Duration::from_secs(n), later + Duration::from_secs(n));
        }
        assert_eq!(window.size(), 2);
        assert!(after(&mut window, 5, |_| 0.02) > 30);
    }

    #[test]
    fn refusals_reduce_it_only_where_they_are_many() {
        let latency = Duration::from_millis(200);
        for (part, sizes) in [(0.05, 45..=128), (0.3, 2..=8)] {
            let mut random = fastrand::Rng::with_seed(7);
            let mut now = Instant::now();
            let mut window = Window::new(128, now);
            for _ in 0..4000 {
                #[expect(clippy::cast_possible_truncation, reason = "it is a hundred or so")]
                let size = window.size() as u32;
                let began = now;
                now += latency / size;
                let began = began.checked_sub(latency).unwrap_or(now);
                if random.f64() < part {
                    window.refused(began, now);
                } else {
                    window.succeeded(true, began, now);
                }
            }
            assert!(sizes.contains(&window.size()), "{part}: {}", window.size());
        }
    }

    #[test]
    fn it_keeps_to_what_was_given() {
        let mut window = Window::new(1, Instant::now());
        assert_eq!(after(&mut window, 5, |_| 0.01), 1);
        window.overloaded(Instant::now(), Instant::now());
        assert_eq!(window.size(), 1);
    }
}
