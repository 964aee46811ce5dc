//! What programs wrote and the image does not have: the ranges of writes that failed.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Ranges that are told apart, at most. With more, all from the first to the last counts as lost.
const MAX: usize = 64;

/// Ranges of bytes, ascending, none of which touch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Lost(Vec<Range<u64>>);

impl Lost {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A write to this range failed.
    pub(crate) fn add(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let touches = |other: &Range<u64>| other.start <= range.end && range.start <= other.end;
        let mut all = range.clone();
        for other in self.0.extract_if(.., |other| touches(other)) {
            all = all.start.min(other.start)..all.end.max(other.end);
        }
        let at = self.0.partition_point(|other| other.start < all.start);
        self.0.insert(at, all);
        if self.0.len() > MAX
            && let (Some(first), Some(last)) = (self.0.first(), self.0.last())
        {
            let all = first.start..last.end;
            self.0.clear();
            self.0.push(all);
        }
    }

    /// This range has been written after all.
    pub(crate) fn remove(&mut self, range: &Range<u64>) {
        if self.0.is_empty() {
            return;
        }
        let rest = |lost: Range<u64>| {
            let before = lost.start..lost.end.min(range.start);
            let behind = lost.start.max(range.end)..lost.end;
            [before, behind].into_iter().filter(|part| !part.is_empty())
        };
        self.0 = std::mem::take(&mut self.0).into_iter().flat_map(rest).collect();
    }

    /// Nothing counts as lost any more.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes: u64 = self.0.iter().map(|range| range.end - range.start).sum();
        let start = self.0.first().map_or(0, |range| range.start);
        match self.0.len() {
            1 => write!(f, "{bytes} bytes from byte {start} on"),
            places => write!(f, "{bytes} bytes in {places} places, the first at byte {start},"),
        }
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "it is a list of ranges")]
mod tests {
    use super::*;

    #[test]
    fn writing_again_makes_up_for_a_failed_write() {
        let mut lost = Lost::default();
        lost.add(10..20);
        lost.add(20..30);
        lost.add(5..5);
        assert_eq!(lost.to_string(), "20 bytes from byte 10 on");
        lost.remove(&(15..25));
        assert_eq!(lost, Lost(vec![10..15, 25..30]));
        assert!(lost.to_string().starts_with("10 bytes in 2 places, the first at byte 10"));
        lost.add(12..26);
        assert_eq!(lost, Lost(vec![10..30]));
        lost.remove(&(0..u64::MAX));
        assert!(lost.is_empty());
    }

    #[test]
    fn many_ranges_become_one() {
        let mut lost = Lost::default();
        (0..=MAX as u64).rev().for_each(|n| lost.add(n * 10..n * 10 + 1));
        assert_eq!(lost, Lost(vec![0..MAX as u64 * 10 + 1]));
    }
}
