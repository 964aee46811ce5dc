//! Which blocks of a volume hold data, as far as that is known.

use std::collections::BTreeMap;
use std::ops::Range;

use roaring::RoaringBitmap;

use super::{BlockIndex, VolumeSize};

/// What a [`BlockMap`] knows of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// Not listed yet.
    Unknown,
    /// Reads as zeros: a hole, or a block that was written with zeros.
    Empty,
    /// Holds data.
    Data,
}

/// A run of blocks in the same state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first block.
    pub start: BlockIndex,
    /// One past the last block.
    pub end: BlockIndex,
    /// What they all are.
    pub state: BlockState,
}

/// What is known of the blocks of one volume: a compressed bitmap, about one bit a block at worst.
#[derive(Clone, Debug)]
pub struct BlockMap {
    end: BlockIndex,
    data: RoaringBitmap,
    known: RangeSet,
}

impl BlockMap {
    /// A map of a volume of this size of which nothing is known.
    pub fn unknown(size: VolumeSize) -> Self {
        Self { end: size.blocks(), data: RoaringBitmap::new(), known: RangeSet::default() }
    }

    /// One past the last block of the volume.
    pub fn end(&self) -> BlockIndex {
        self.end
    }

    /// Records that in `range` exactly `data` (ascending, inside the range) hold data.
    ///
    /// Blocks beyond the volume are left out.
    pub fn learn(&mut self, range: Range<BlockIndex>, data: impl IntoIterator<Item = BlockIndex>) {
        let range = range.start.0..range.end.min(self.end).0;
        if range.is_empty() {
            return;
        }
        self.data.remove_range(range.clone());
        self.data
            .extend(data.into_iter().map(|index| index.0).filter(|index| range.contains(index)));
        self.known.insert(range);
    }

    /// What is known of the block at `index`; a block beyond the volume is empty.
    pub fn state(&self, index: BlockIndex) -> BlockState {
        if self.data.contains(index.0) {
            BlockState::Data
        } else if index >= self.end || self.known.end_of(index.0).is_some() {
            BlockState::Empty
        } else {
            BlockState::Unknown
        }
    }

    /// The run of blocks in one state that begins at `from`; `None` at the end of the volume.
    ///
    /// The run is as long as it is known to be: two in a row may have the same state.
    pub fn extent(&self, from: BlockIndex) -> Option<Extent> {
        if from >= self.end {
            return None;
        }
        let (end, state) = match self.state(from) {
            BlockState::Unknown => {
                (self.known.start_after(from.0).unwrap_or(self.end.0), BlockState::Unknown)
            }
            BlockState::Data => {
                let run = self.data.range(from.0..self.end.0).next_range();
                (run.map_or(from.0 + 1, |run| *run.end() + 1), BlockState::Data)
            }
            BlockState::Empty => {
                let known = self.known.end_of(from.0).unwrap_or(self.end.0);
                (self.data.range(from.0..known).next().unwrap_or(known), BlockState::Empty)
            }
        };
        Some(Extent { start: from, end: BlockIndex(end.min(self.end.0)), state })
    }

    /// All runs from the start of the volume to its end.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        let mut at = BlockIndex::ZERO;
        std::iter::from_fn(move || {
            let extent = self.extent(at)?;
            at = extent.end;
            Some(extent)
        })
    }

    /// Whether every block of the volume is known.
    pub fn is_complete(&self) -> bool {
        self.known.end_of(0) == Some(self.end.0)
    }

    /// Number of blocks that are known to hold data.
    pub fn data_blocks(&self) -> u64 {
        self.data.len()
    }
}

/// Disjoint ranges of numbers; ranges that touch are one.
#[derive(Clone, Debug, Default)]
struct RangeSet(BTreeMap<u32, u32>);

impl RangeSet {
    fn insert(&mut self, range: Range<u32>) {
        let (mut start, mut end) = (range.start, range.end);
        if let Some((&before, &stop)) = self.0.range(..=start).next_back()
            && stop >= start
        {
            start = before;
            end = end.max(stop);
        }
        while let Some((&next, &stop)) = self.0.range(start..=end).next() {
            self.0.remove(&next);
            end = end.max(stop);
        }
        self.0.insert(start, end);
    }

    /// The end of the range that `at` is in.
    fn end_of(&self, at: u32) -> Option<u32> {
        let (_, &end) = self.0.range(..=at).next_back()?;
        (at < end).then_some(end)
    }

    /// The start of the first range after `at`.
    fn start_after(&self, at: u32) -> Option<u32> {
        self.0.range(at + 1..).next().map(|(&start, _)| start)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BLOCKS: u32 = 2048;

    fn one_gib() -> BlockMap {
        BlockMap::unknown(VolumeSize::from_gib(1).unwrap())
    }

    #[test]
    fn a_new_map_knows_nothing() {
        let map = one_gib();
        assert_eq!(map.state(BlockIndex(0)), BlockState::Unknown);
        assert_eq!(map.state(BlockIndex(BLOCKS)), BlockState::Empty);
        assert!(!map.is_complete());
        assert_eq!(
            map.extents().collect::<Vec<_>>(),
            [Extent { start: BlockIndex(0), end: BlockIndex(BLOCKS), state: BlockState::Unknown }]
        );
    }

    #[test]
    fn what_is_learnt_beyond_the_volume_is_ignored() {
        let mut map = one_gib();
        map.learn(BlockIndex(0)..BlockIndex(9999), [BlockIndex(1), BlockIndex(5000)]);
        assert!(map.is_complete());
        assert_eq!(map.data_blocks(), 1);
    }

    #[derive(Clone, Debug)]
    struct Lesson(u32, u32, Vec<u32>);

    fn lesson() -> impl Strategy<Value = Lesson> {
        (0..BLOCKS, 1..300u32, prop::collection::btree_set(0..BLOCKS + 300, 0..40))
            .prop_map(|(start, len, data)| Lesson(start, start + len, data.into_iter().collect()))
    }

    proptest! {
        #[test]
        fn it_says_what_an_array_of_states_says(lessons in prop::collection::vec(lesson(), 0..12)) {
            let mut map = one_gib();
            let mut model = vec![BlockState::Unknown; BLOCKS as usize];
            for Lesson(start, end, data) in lessons {
                let inside = data.iter().copied().filter(|i| (start..end).contains(i));
                map.learn(BlockIndex(start)..BlockIndex(end), inside.map(BlockIndex));
                for index in start..end.min(BLOCKS) {
                    model[index as usize] =
                        if data.contains(&index) { BlockState::Data } else { BlockState::Empty };
                }
            }
            let mut at = 0;
            for extent in map.extents() {
                prop_assert_eq!(extent.start.0, at);
                prop_assert!(extent.end.0 > at);
                for index in at..extent.end.0 {
                    prop_assert_eq!(model[index as usize], extent.state);
                    prop_assert_eq!(map.state(BlockIndex(index)), extent.state);
                }
                at = extent.end.0;
            }
            prop_assert_eq!(at, BLOCKS);
            prop_assert_eq!(map.is_complete(), !model.contains(&BlockState::Unknown));
            prop_assert_eq!(
                map.data_blocks(),
                model.iter().filter(|state| **state == BlockState::Data).count() as u64
            );
        }
    }
}
