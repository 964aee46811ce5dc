//! How many requests for blocks are under way at the same time: additive increase and multiplicative decrease, as of
//! TCP's congestion window.
//!
//! It doubles in each round until the first trouble, and then grows by one in each. It falls when a request is one
//! too many or is not answered in time, and when much of what was sent lately was refused, failed, or lost its
//! connection: what ends like this now and then leaves as much room as before.

use std::time::Instant;

use super::MUCH;

/// How many it begins with.
const BEGIN: usize = 16;

/// What is left of it when it falls.
const FALL: f64 = 0.7;

/// Requests that show how many end in trouble: those of two rounds, and no fewer than these.
const LATELY: f64 = 32.0;

/// The number of requests that may be under way.
#[derive(Debug)]
pub(super) struct Window {
    most: usize,
    size: f64,
    /// When it fell: trouble of requests that were sent before is known already.
    fell: Option<Instant>,
    /// Part of the latest requests that ended in trouble.
    troubled: f64,
}

#[expect(clippy::cast_precision_loss, clippy::cast_sign_loss, reason = "it is 1 to a few hundred")]
impl Window {
    /// One that never becomes larger than `most`.
    pub(super) fn new(most: usize) -> Self {
        Self { most, size: BEGIN.min(most) as f64, fell: None, troubled: 0.0 }
    }

    /// From now on it never becomes larger than `most`.
    pub(super) fn limit(&mut self, most: usize) {
        self.most = most;
        self.size = self.size.min(most as f64);
    }

    pub(super) fn most(&self) -> usize {
        self.most
    }

    /// How many may be under way now.
    pub(super) fn size(&self) -> usize {
        self.size as usize
    }

    /// A request was answered. `full`: as many were under way as may be.
    pub(super) fn succeeded(&mut self, full: bool) {
        self.count(0.0);
        if full {
            let step = if self.fell.is_none() { 1.0 } else { 1.0 / self.size };
            self.size = (self.size + step).min(self.most as f64);
        }
    }

    /// A request that was sent at `sent` was refused, failed in the service, or lost its connection.
    pub(super) fn troubled(&mut self, sent: Instant, now: Instant) {
        self.count(1.0);
        if self.troubled > MUCH {
            self.overloaded(sent, now);
        }
    }

    /// A request that was sent at `sent` was one too many, or was not answered in time.
    pub(super) fn overloaded(&mut self, sent: Instant, now: Instant) {
        if self.fell.is_none_or(|fell| sent >= fell) {
            self.fell = Some(now);
            self.size = (self.size * FALL).max(1.0);
        }
    }

    fn count(&mut self, trouble: f64) {
        self.troubled += (trouble - self.troubled) / (2.0 * self.size).max(LATELY);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// The size after so many requests, `part` of which end in trouble.
    fn after(window: &mut Window, requests: u32, part: f64) -> usize {
        let mut random = fastrand::Rng::with_seed(7);
        let begin = Instant::now();
        for n in 0..requests {
            let now = begin + Duration::from_millis(n.into());
            let size = u32::try_from(window.size()).unwrap();
            if random.f64() < part {
                window.troubled(begin + Duration::from_millis(n.saturating_sub(size).into()), now);
            } else {
                window.succeeded(true);
            }
        }
        window.size()
    }

    #[test]
    fn grows_to_what_was_given() {
        assert_eq!(after(&mut Window::new(100), 84, 0.0), 100);
        assert_eq!(after(&mut Window::new(1), 100, 0.0), 1);
    }

    #[test]
    fn does_not_grow_where_it_is_not_used() {
        let mut window = Window::new(100);
        window.succeeded(false);
        assert_eq!(window.size(), 16);
    }

    #[test]
    fn falls_once_for_all_that_was_under_way() {
        let start = Instant::now();
        let mut window = Window::new(128);
        let later = start + Duration::from_millis(10);
        for _ in 0..10 {
            window.overloaded(start, later);
        }
        assert_eq!(window.size(), 11);
        for n in 1..20 {
            window.overloaded(later + Duration::from_secs(n), later + Duration::from_secs(n));
        }
        assert_eq!(window.size(), 1);
        // Then it grows by one in each round.
        assert!((19..=21).contains(&after(&mut window, 200, 0.0)), "{}", window.size());
    }

    #[test]
    fn falls_where_much_is_in_trouble_and_not_where_little_is() {
        for (part, sizes) in [(0.05, 90..=128), (0.3, 1..=8)] {
            let mut window = Window::new(128);
            after(&mut window, 4000, part);
            assert!(sizes.contains(&window.size()), "{part}: {}", window.size());
        }
    }
}
