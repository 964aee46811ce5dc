//! How many of some requests were refused, and whether that differs from others.

use std::cmp::Ordering;

/// What comes by chance comes in twos and threes: so many standard deviations are no sign.
pub(super) const DEVIATIONS: f64 = 2.0;

/// Requests from which it is known how many are refused by chance; older ones count less and less.
const KNOWN: f64 = 1000.0;

/// Requests that were answered, and how many of them were refused.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Count {
    pub(super) refused: f64,
    pub(super) of: f64,
}

impl Count {
    pub(super) fn part(self) -> f64 {
        self.refused / self.of.max(1.0)
    }

    pub(super) fn add(&mut self, other: Self) {
        let keep = (KNOWN / (self.of + other.of).max(1.0)).min(1.0);
        self.refused = (self.refused + other.refused) * keep;
        self.of = (self.of + other.of) * keep;
    }

    /// Whether the part that is refused is the same as in `other`, as far as so few tell, or more, or less.
    pub(super) fn compare(self, other: Self) -> Ordering {
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
