//! Guessing which blocks will be read next.
//!
//! A cursor follows one sequential run. Its window, the blocks that are fetched ahead of the
//! reader, begins when the run has crossed a few blocks, and doubles each time the reader had to
//! wait all the same. The kernel reads ahead by itself, in pieces that arrive out of order, so
//! "sequential" is near, not next.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use crate::cache::{Cache, Stream};
use crate::model::{BLOCK_SIZE_U64, BlockIndex};

/// Runs that are followed on one handle; beyond them the one unused for longest is forgotten.
const MAX_CURSORS: usize = 4;

/// How far from where a run has come to a read may be and belong to it.
const TOLERANCE: u64 = 4 << 20;

/// Bytes that a run has read before anything is fetched ahead: mounting a file system or reading a
/// small file stays below it, so that nothing is fetched that is not touched.
const PATIENCE: u64 = 2 * BLOCK_SIZE_U64;

/// A window is topped up when this part of it is used.
const TOP_UP: usize = 8;

/// Blocks of the first window.
const FIRST_WINDOW: usize = 4;

/// The sequential runs of one handle, the most recent first.
#[derive(Debug, Default)]
pub(super) struct Cursors(VecDeque<Cursor>);

#[derive(Debug)]
struct Cursor {
    /// Where the run has come to.
    reached: u64,
    /// Bytes that it has read.
    read: u64,
    /// Blocks to have fetched ahead; 0 until it is clear that this is a run.
    window: usize,
    /// One past the last block that was asked for.
    asked: BlockIndex,
    stream: Option<Stream>,
}

impl Cursors {
    /// Notes a read; answers which blocks to fetch now.
    pub(super) fn advance(
        &mut self,
        cache: &Arc<Cache>,
        offset: u64,
        len: usize,
        waited: bool,
    ) -> Option<Range<BlockIndex>> {
        let near = |cursor: &Cursor| cursor.reached.abs_diff(offset) <= TOLERANCE;
        let mut cursor = match self.0.iter().position(near) {
            Some(n) => self.0.remove(n).expect("it was found there"),
            None => Cursor {
                reached: offset,
                read: 0,
                window: 0,
                asked: BlockIndex::containing(offset),
                stream: None,
            },
        };
        let ahead = cursor.advance(cache, offset, len, waited);
        self.0.push_front(cursor);
        self.0.truncate(MAX_CURSORS);
        ahead
    }
}

impl Cursor {
    fn advance(
        &mut self,
        cache: &Arc<Cache>,
        offset: u64,
        len: usize,
        waited: bool,
    ) -> Option<Range<BlockIndex>> {
        let end = offset + len as u64;
        self.reached = self.reached.max(end);
        self.read += len as u64;
        if self.read <= PATIENCE {
            return None;
        }
        let stream = self.stream.get_or_insert_with(|| cache.stream());
        let wanted = match (self.window, waited) {
            (0, _) => FIRST_WINDOW,
            (window, true) => window * 2,
            (window, false) => window,
        };
        self.window = wanted.min(stream.max_window());
        let here = BlockIndex::containing(self.reached);
        let start = self.asked.max(here);
        let stop = BlockIndex(here.0 + u32::try_from(self.window).expect("a window is small"));
        // Not block by block, and not so late that what is on its way becomes little.
        let missing = stop.0.saturating_sub(start.0) as usize;
        if missing == 0 || missing * TOP_UP < self.window {
            return None;
        }
        self.asked = stop;
        Some(start..stop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::MIN_BUDGET;

    const KIB: usize = 1024;

    fn read(cursors: &mut Cursors, cache: &Arc<Cache>, at: u64, waited: bool) -> Vec<u32> {
        let range = cursors.advance(cache, at, 128 * KIB, waited);
        range.map_or_else(Vec::new, |range| (range.start.0..range.end.0).collect())
    }

    #[test]
    fn a_sequential_run_is_fetched_ahead_once() {
        let cache = Cache::new(256 << 20);
        let mut cursors = Cursors::default();
        let mut ahead = Vec::new();
        for n in 0..64 {
            ahead.extend(read(&mut cursors, &cache, n * 128 * 1024, n < 12));
        }
        assert!(ahead.is_sorted_by(|a, b| a < b), "{ahead:?}");
        assert!(ahead.contains(&16) && ahead[0] <= 3, "{ahead:?}");
    }

    #[test]
    fn random_and_short_reads_fetch_nothing_ahead() {
        let cache = Cache::new(256 << 20);
        let mut cursors = Cursors::default();
        for n in 0..100u64 {
            assert!(read(&mut cursors, &cache, (n * 7919 % 1000) << 24, true).is_empty());
        }
        for n in 0..8 {
            assert!(read(&mut cursors, &cache, n * 128 * 1024, true).is_empty());
        }
    }

    #[test]
    fn the_window_grows_only_while_readers_wait() {
        let cache = Cache::new(256 << 20);
        let mut cursors = Cursors::default();
        for n in 0..40 {
            read(&mut cursors, &cache, n * 128 * 1024, true);
        }
        let grown = cursors.0[0].window;
        assert_eq!(grown, 64);
        for n in 40..80 {
            read(&mut cursors, &cache, n * 128 * 1024, false);
        }
        assert_eq!(cursors.0[0].window, grown);
    }

    #[test]
    fn many_streams_share_the_budget() {
        let cache = Cache::new(MIN_BUDGET);
        let mut handles: Vec<Cursors> = (0..8).map(|_| Cursors::default()).collect();
        for n in 0..40 {
            for cursors in &mut handles {
                read(cursors, &cache, n * 128 * 1024, true);
            }
        }
        let total: usize = handles.iter().map(|cursors| cursors.0[0].window).sum();
        assert!(total * 512 * KIB <= MIN_BUDGET / 2, "{total} blocks ahead");
        drop(handles);
        assert_eq!(cache.stream().max_window(), MIN_BUDGET / 2 / (512 * KIB));
    }

    #[test]
    fn out_of_order_pieces_are_one_run() {
        let cache = Cache::new(256 << 20);
        let mut cursors = Cursors::default();
        for n in [1u64, 0, 3, 2, 6, 5, 4, 7, 9, 8, 11, 10] {
            read(&mut cursors, &cache, n * 128 * 1024, false);
        }
        assert_eq!(cursors.0.len(), 1);
        assert!(cursors.0[0].window > 0);
    }
}
