//! Which blocks versions change, without looking at all of them.
//!
//! With B blocks in the volume, C of them changed, version v ≥ 2 changes
//!
//! ```text
//! floor((i · B + o(v)) / C)   for i = 0 … C - 1,   o(v) = (v - 1) · 2654435761 mod B
//! ```
//!
//! that is every B / C-th block, from a place on that is another one for each version. Block x is
//! one of them if there is an `i · B + o(v)` from `x · C` to before `(x + 1) · C`. So the blocks
//! that any of several versions changes are found in ascending order by looking up where the next
//! multiple of C falls among their o(v).

use super::recipe::Recipe;
use crate::model::BlockIndex;

/// A prime (2^32 divided by the golden ratio): the o(v) of no two versions are the same, and those
/// of neighbours are far apart.
const SPREAD: u64 = 2_654_435_761;

/// The blocks that some versions of a lineage change, in ascending order.
#[derive(Debug)]
pub(super) struct Changes {
    blocks: u64,
    changed: u64,
    /// Ascending.
    offsets: Vec<u64>,
}

impl Changes {
    /// What the versions behind `older` change, up to `newer`.
    pub(super) fn between(recipe: &Recipe, older: u32, newer: u32) -> Self {
        let blocks = u64::from(recipe.size.blocks().0);
        let mut offsets: Vec<_> = (older + 1..=newer).map(|v| offset(blocks, v)).collect();
        offsets.sort_unstable();
        Self { blocks, changed: recipe.changed.into(), offsets }
    }

    /// The first of them from `from` on.
    pub(super) fn next(&self, from: BlockIndex) -> Option<BlockIndex> {
        let first = self.offsets.first().filter(|_| self.changed > 0)?;
        let start = u64::from(from.0) * self.changed;
        let (round, within) = (start / self.blocks, start % self.blocks);
        let place = self.offsets.partition_point(|&offset| offset < within);
        let point = match self.offsets.get(place) {
            Some(offset) => round * self.blocks + offset,
            None => (round + 1) * self.blocks + first,
        };
        let index = point / self.changed;
        let index = (index < self.blocks).then_some(index)?;
        Some(BlockIndex(u32::try_from(index).expect("a volume has less than 2^32 blocks")))
    }

    /// Whether the block at `index` is one of them.
    pub(super) fn contains(&self, index: BlockIndex) -> bool {
        self.next(index) == Some(index)
    }
}

/// The version up to `version` that changed a block last; 1 if none did.
pub(super) fn last_change(recipe: &Recipe, index: BlockIndex, version: u32) -> u32 {
    let (blocks, changed) = (u64::from(recipe.size.blocks().0), u64::from(recipe.changed));
    let start = u64::from(index.0) * changed % blocks;
    let changes = |&v: &u32| (offset(blocks, v) + blocks - start) % blocks < changed;
    (2..=version).rev().find(changes).unwrap_or(1)
}

fn offset(blocks: u64, version: u32) -> u64 {
    u64::from(version - 1) * SPREAD % blocks
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::model::VolumeSize;

    fn recipe(gib: u64, versions: u32, changed: u32) -> Recipe {
        let size = VolumeSize::from_gib(gib).unwrap();
        Recipe { size, versions, changed, ..Recipe::default() }
    }

    /// The formula of the documents.
    fn formula(recipe: &Recipe, version: u64) -> Vec<u32> {
        let (blocks, changed) = (u64::from(recipe.size.blocks().0), u64::from(recipe.changed));
        let offset = (version - 1) * 2_654_435_761 % blocks;
        (0..changed).map(|i| u32::try_from((i * blocks + offset) / changed).unwrap()).collect()
    }

    fn all(changes: &Changes, from: u32) -> Vec<u32> {
        let mut at = changes.next(BlockIndex(from));
        let mut all = Vec::new();
        while let Some(index) = at {
            all.push(index.0);
            at = changes.next(index.next());
        }
        all
    }

    #[test]
    fn a_version_changes_the_blocks_of_the_formula() {
        for (gib, changed) in
            [(1, 0), (1, 1), (1, 64), (3, 1000), (1, 2047), (1, 2048), (65_536, 9)]
        {
            let recipe = recipe(gib, 9, changed);
            for version in 2..=9 {
                let expected = formula(&recipe, version.into());
                let changes = Changes::between(&recipe, version - 1, version);
                assert_eq!(all(&changes, 0), expected, "{changed} of {gib} GiB, {version}");
                let distinct: BTreeSet<_> = expected.iter().collect();
                assert_eq!(distinct.len(), changed as usize);
                assert!(expected.iter().all(|&x| x < recipe.size.blocks().0));
                for index in expected {
                    assert_eq!(last_change(&recipe, BlockIndex(index), version), version);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn several_versions_change_what_each_of_them_does(
            gib in 1..3u64,
            changed in prop_oneof![0..20u32, 0..=2048u32],
            (older, newer) in (1..40u32, 1..40u32),
            from in 0..5000u32,
            probes in prop::collection::vec(0..2048u32, 20),
        ) {
            let (older, newer) = (older.min(newer), older.max(newer));
            let recipe = recipe(gib, 40, changed);
            let versions = (1..=newer).map(|v| match v {
                1 => BTreeSet::new(),
                v => formula(&recipe, v.into()).into_iter().collect::<BTreeSet<_>>(),
            });
            let versions: Vec<_> = versions.collect();
            let union: BTreeSet<_> =
                versions[older as usize..].iter().flatten().copied().filter(|&x| x >= from).collect();
            let changes = Changes::between(&recipe, older, newer);
            prop_assert_eq!(all(&changes, from), union.into_iter().collect::<Vec<_>>());
            for index in probes {
                let last = versions.iter().rposition(|blocks| blocks.contains(&index));
                let last = last.map_or(1, |n| u32::try_from(n + 1).unwrap());
                prop_assert_eq!(last_change(&recipe, BlockIndex(index), newer), last);
                let between = changes.contains(BlockIndex(index));
                prop_assert_eq!(between, last > older);
            }
        }
    }
}
