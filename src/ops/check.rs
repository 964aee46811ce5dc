//! Whether something holds what a snapshot has: asked before only what differs is written to it.

use clap::ValueEnum;

use crate::model::{Block, BlockIndex, Snapshot};
use crate::store::listing::{Blocks, Listing, list_span, read_listed};
use crate::store::{ListedBlock, Result, SharedStore};

/// How it is looked whether the base of a delta is what it is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Check {
    /// All blocks are compared
    Full,
    /// Blocks that are chosen at random are compared
    Sampled,
    /// Nothing is compared
    None,
}

/// Blocks that are chosen at random.
const SAMPLES: usize = 32;

/// Blocks of a page that one is chosen from.
const PAGE: usize = 500;

/// Blocks of a snapshot, chosen at random, ascending: fewer than [`SAMPLES`] if it has few.
///
/// A random place leads to the page that begins there; where nothing follows, to the first page.
///
/// # Errors
///
/// Those of the store.
pub(super) async fn sample(store: &SharedStore, snapshot: &Snapshot) -> Result<Vec<ListedBlock>> {
    let (list, end) = (Blocks(snapshot.into()), snapshot.volume_size.blocks());
    let page = async |start: BlockIndex| {
        list_span(store, &list, start..start.next(), end, PAGE).await.map(|span| span.items)
    };
    let first = page(BlockIndex::ZERO).await?;
    let mut chosen = std::collections::BTreeMap::new();
    if first.len() <= SAMPLES && first.len() < PAGE {
        chosen.extend(first.iter().map(|listed| (listed.index, listed.clone())));
    }
    for start in random_indexes(end) {
        let found = page(start).await?;
        let page = if found.is_empty() { &first } else { &found };
        if let Some(listed) = page.get(fastrand::usize(0..page.len().max(1))) {
            chosen.insert(listed.index, listed.clone());
        }
    }
    Ok(chosen.into_values().collect())
}

/// Indexes of a volume that ends at `end`, chosen at random.
pub(super) fn random_indexes(end: BlockIndex) -> impl Iterator<Item = BlockIndex> {
    (0..SAMPLES).map(move |_| BlockIndex(fastrand::u32(0..end.0)))
}

/// The first block in which two snapshots differ, of some that are chosen at random from both; and how many were
/// compared.
///
/// # Errors
///
/// Those of the stores.
pub(super) async fn differ_sampled(
    one: (&SharedStore, &Snapshot),
    other: (&SharedStore, &Snapshot),
) -> Result<(Option<BlockIndex>, usize)> {
    let mut compared = 0;
    for ((store, snapshot), (others, other)) in [(one, other), (other, one)] {
        let mut listing = Listing::blocks(others.clone(), other);
        for listed in sample(store, snapshot).await? {
            let theirs = listing.find(listed.index).await?;
            compared += 1;
            if !equal((store, snapshot, &listed), (others, other, theirs.as_ref())).await? {
                return Ok((Some(listed.index), compared));
            }
        }
    }
    Ok((None, compared))
}

/// Whether a block of one snapshot is that of another, where a hole is zeros.
async fn equal(
    (store, snapshot, ours): (&SharedStore, &Snapshot, &ListedBlock),
    (others, other, theirs): (&SharedStore, &Snapshot, Option<&ListedBlock>),
) -> Result<bool> {
    let digests = (ours.digest, theirs.map(|theirs| theirs.digest));
    if let (Some(ours), Some(Some(theirs))) = digests {
        return Ok(ours == theirs);
    }
    let block = read_listed(store, &snapshot.id, ours).await?;
    is_block((others, other, theirs), &block).await
}

/// Whether what is listed of a snapshot is this block, where a hole is zeros.
pub(super) async fn is_block(
    (store, snapshot, listed): (&SharedStore, &Snapshot, Option<&ListedBlock>),
    block: &Block,
) -> Result<bool> {
    match listed {
        None => Ok(block.is_zero()),
        Some(listed) => match listed.digest {
            Some(digest) => Ok(digest == block.digest()),
            None => Ok(read_listed(store, &snapshot.id, listed).await? == *block),
        },
    }
}
