//! One computed snapshot: which blocks it has, from any place on.

use super::changes::{Changes, last_change};
use super::content;
use super::mix::{key, nth};
use super::recipe::{Fraction, Recipe};
use crate::model::{Block, BlockIndex};

/// Positions that are looked at for one page: where hardly anything is written a page is short.
pub(super) const MAX_LOOKS: usize = 1 << 20;

/// A snapshot of a family: one version of its volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Version {
    pub(super) recipe: Recipe,
    /// From 1.
    pub(super) family: u32,
    /// From 1, the oldest.
    pub(super) number: u32,
}

/// What a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Hole,
    Zero,
    Data,
}

/// A part of a listing.
#[derive(Debug)]
pub(super) struct Page {
    /// Ascending, without holes.
    pub(super) blocks: Vec<(BlockIndex, Kind)>,
    /// Where the next part begins; `None` at the end of the volume.
    pub(super) next: Option<BlockIndex>,
    /// Positions that were looked at.
    pub(super) looks: usize,
}

impl Version {
    /// The blocks from `from` on: at most `max`, and fewer where few are written.
    pub(super) fn page(&self, from: BlockIndex, max: usize) -> Page {
        let end = self.recipe.size.blocks();
        let base = Base::new(self);
        let changes = Changes::between(&self.recipe, 1, self.number);
        let mut changed = changes.next(from);
        let mut page = Page { blocks: Vec::new(), next: None, looks: 0 };
        let mut at = from;
        while at < end && page.blocks.len() < max && page.looks < MAX_LOOKS {
            page.looks += 1;
            let kind = if changed == Some(at) {
                changed = changes.next(at.next());
                Kind::Data
            } else {
                base.kind(at)
            };
            if kind != Kind::Hole {
                page.blocks.push((at, kind));
            }
            at = at.next();
        }
        page.next = (at < end).then_some(at);
        page
    }

    /// The blocks in which a later version differs, and what they are here; all are data there.
    pub(super) fn changes_to(&self, later: &Self, from: BlockIndex, max: usize) -> Page {
        let base = Base::new(self);
        let before = Changes::between(&self.recipe, 1, self.number);
        let between = Changes::between(&self.recipe, self.number, later.number);
        let mut page = Page { blocks: Vec::new(), next: between.next(from), looks: 0 };
        while let Some(index) = page.next.filter(|_| page.blocks.len() < max) {
            page.looks += 1;
            let kind = if before.contains(index) { Kind::Data } else { base.kind(index) };
            page.blocks.push((index, kind));
            page.next = between.next(index.next());
        }
        page
    }

    /// The content of a block; `None` if it is a hole, or beyond the volume.
    pub(super) fn block(&self, index: BlockIndex) -> Option<Block> {
        if !self.recipe.size.contains(index) {
            return None;
        }
        let last = last_change(&self.recipe, index, self.number);
        let kind = if last > 1 { Kind::Data } else { Base::new(self).kind(index) };
        match kind {
            Kind::Hole => None,
            Kind::Zero => Some(Block::Zero),
            Kind::Data => Some(Block::new(content::bytes(&self.recipe, self.family, index, last))),
        }
    }
}

/// The first version of a family: what the blocks are that nothing has changed.
#[derive(Debug)]
struct Base {
    written: Choice,
    zero: Choice,
}

impl Base {
    fn new(version: &Version) -> Self {
        let Version { recipe, family, .. } = version;
        let choice = |number: u64, fraction: Fraction| Choice {
            key: key([recipe.seed.into(), (*family).into(), number]),
            below: fraction.bound(),
        };
        Self { written: choice(1, recipe.density), zero: choice(2, recipe.zeros) }
    }

    fn kind(&self, index: BlockIndex) -> Kind {
        match (self.written.has(index), self.zero.has(index)) {
            (false, _) => Kind::Hole,
            (true, true) => Kind::Zero,
            (true, false) => Kind::Data,
        }
    }
}

/// A fraction of the blocks, chosen by a hash of the index.
#[derive(Debug)]
struct Choice {
    key: u64,
    below: Option<u64>,
}

impl Choice {
    fn has(&self, index: BlockIndex) -> bool {
        match self.below {
            None => true,
            Some(0) => false,
            Some(bound) => nth(self.key, index.0.into()) < bound,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(url: &str, family: u32, number: u32) -> Version {
        Version { recipe: url.parse().unwrap(), family, number }
    }

    #[test]
    fn the_last_page_of_a_full_volume_costs_as_much_as_the_first() {
        let version = version("synth:?size=64TiB&versions=1000&changed=100000", 1, 1000);
        for from in [0, 1 << 26, (1 << 27) - 10_000] {
            let page = version.page(BlockIndex(from), 10_000);
            assert_eq!((page.blocks.len(), page.looks), (10_000, 10_000), "from {from}");
        }
        let old = Version { number: 1, ..version };
        let end = (1 << 27) - 100_000;
        for from in [0, 1 << 26, end] {
            let page = old.changes_to(&version, BlockIndex(from), 1000);
            assert_eq!((page.blocks.len(), page.looks), (1000, 1000), "from {from}");
        }
    }

    #[test]
    fn a_page_of_an_almost_empty_volume_is_short() {
        let version = version("synth:?size=64TiB&density=0.000001&changed=0", 1, 1);
        let mut at = Some(BlockIndex::ZERO);
        let (mut pages, mut blocks) = (0, 0);
        while let Some(from) = at {
            let page = version.page(from, 10_000);
            assert!(page.looks <= MAX_LOOKS);
            pages += 1;
            blocks += page.blocks.len();
            at = page.next;
        }
        assert_eq!(pages, (1 << 27) / MAX_LOOKS);
        assert!((90..180).contains(&blocks), "{blocks} of 134");
    }

    #[test]
    fn a_difference_tells_what_was_there_before() {
        // So many changes that most blocks are changed more than once.
        let url = "synth:?size=1GiB&density=0.3&zeros=0.5&versions=4&changed=900";
        for older in 1..4 {
            let old = version(url, 1, older);
            let blocks = old.page(BlockIndex::ZERO, usize::MAX).blocks;
            let kind = |index| {
                let place = blocks.binary_search_by_key(&index, |(index, _)| *index);
                place.map_or(Kind::Hole, |place| blocks[place].1)
            };
            let page = old.changes_to(&version(url, 1, 4), BlockIndex::ZERO, usize::MAX);
            assert!(page.blocks.len() >= 900);
            for (index, was) in page.blocks {
                assert_eq!(was, kind(index), "block {index} of version {older}");
            }
        }
    }

    #[test]
    fn densities_are_those_of_the_url() {
        let version = version("synth:?size=64GiB&density=0.25&zeros=0.5&lineages=2", 2, 1);
        let page = version.page(BlockIndex::ZERO, usize::MAX);
        let zeros = page.blocks.iter().filter(|(_, kind)| *kind == Kind::Zero).count();
        let blocks = page.blocks.len();
        assert_eq!(page.looks, 1 << 17);
        assert!((32_200..33_400).contains(&blocks), "{blocks} of 32768");
        assert!((blocks * 48 / 100..blocks * 52 / 100).contains(&zeros), "{zeros} of {blocks}");
        let other = Version { family: 1, ..version }.page(BlockIndex::ZERO, usize::MAX);
        assert_ne!(other.blocks, page.blocks);
    }
}
