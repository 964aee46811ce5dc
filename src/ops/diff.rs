//! `diff`: in which blocks one snapshot differs from another.

use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use super::context::Context;
use super::reference::Reference;
use super::table::{Operation, Report};
use super::{Error, Result, readable};
use crate::model::{BLOCK_SIZE_U64, BlockIndex, Snapshot, SnapshotId};
use crate::store::listing::{Changes, Listing};
use crate::store::{ChangedBlock, SharedStore};

/// Say how much differs between two snapshots of one volume
#[derive(Args, Debug)]
#[command(after_help = "\
A block counts as changed if it was written since, also if what was written is the same. Nothing is
read but the lists of the store.

Examples:
  fspfs -s /srv/snaps diff snap-0123456789abcdef0 snap-0123456789abcdef1
  fspfs -s /srv/snaps diff --extents snap-0123456789abcdef0 snap-0123456789abcdef1")]
pub(crate) struct DiffArgs {
    /// The earlier snapshot, named as for `download`
    #[arg(value_name = "FIRST")]
    first: Reference,
    /// The later snapshot
    #[arg(value_name = "SECOND")]
    second: Reference,
    /// Print the runs of changed blocks instead, each as a line of JSON: offset and length in bytes,
    /// and the kind: added, overwritten or dropped
    #[arg(long)]
    extents: bool,
}

/// What became of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Kind {
    /// Only the second snapshot has it.
    Added,
    /// Both have it.
    Overwritten,
    /// Only the first snapshot has it.
    Dropped,
}

impl Kind {
    fn of(change: &ChangedBlock) -> Self {
        match (&change.first, &change.second) {
            (None, _) => Self::Added,
            (Some(_), Some(_)) => Self::Overwritten,
            (Some(_), None) => Self::Dropped,
        }
    }
}

/// Blocks next to each other of which the same became.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Extent {
    /// Bytes.
    offset: u64,
    /// Bytes.
    length: u64,
    kind: Kind,
}

impl Extent {
    /// Takes one more block, if it is the next one and of this kind.
    fn takes(&mut self, index: BlockIndex, kind: Kind) -> bool {
        let fits = kind == self.kind && index.offset() == self.offset + self.length;
        self.length += if fits { BLOCK_SIZE_U64 } else { 0 };
        fits
    }
}

/// How much differs between two snapshots.
#[derive(Debug, Serialize)]
pub(crate) struct Difference {
    first: SnapshotId,
    second: SnapshotId,
    /// Blocks that only the second snapshot has.
    added: u64,
    /// Blocks that both have.
    overwritten: u64,
    /// Blocks that only the first one has.
    dropped: u64,
    /// All of them.
    pub(super) blocks: u64,
    bytes: u64,
    #[serde(skip)]
    elapsed: Duration,
}

impl Difference {
    /// Follows the list of changes, and shows each to `each`.
    ///
    /// # Errors
    ///
    /// Those of the store.
    pub(super) async fn between(
        store: &SharedStore,
        first: &Snapshot,
        second: &Snapshot,
        mut each: impl FnMut(BlockIndex, Kind),
    ) -> Result<Self> {
        let began = Instant::now();
        let end = first.volume_size.max(second.volume_size).blocks();
        let changes = Changes(first.into(), second.into());
        let mut listing = Listing::new(store.clone(), changes, end);
        let (mut added, mut overwritten, mut dropped) = (0, 0, 0);
        while let Some(change) = listing.next().await? {
            let kind = Kind::of(&change);
            *match kind {
                Kind::Added => &mut added,
                Kind::Overwritten => &mut overwritten,
                Kind::Dropped => &mut dropped,
            } += 1;
            each(change.index, kind);
        }
        let blocks = added + overwritten + dropped;
        let (first, second) = (first.id.clone(), second.id.clone());
        let (bytes, elapsed) = (blocks * BLOCK_SIZE_U64, began.elapsed());
        Ok(Self { first, second, added, overwritten, dropped, blocks, bytes, elapsed })
    }

    /// The original's line.
    pub(super) fn line(&self) -> String {
        let Self { first, second, blocks, bytes, elapsed, .. } = self;
        let seconds = elapsed.as_secs_f64();
        format!(
            "Changes between {first} and {second} contain {blocks} chunks and {bytes} bytes, took {seconds:.2} seconds."
        )
    }
}

/// What came of it.
#[derive(Debug, Serialize)]
pub(crate) struct Differs {
    #[serde(flatten)]
    difference: Difference,
    /// The extents were printed: they are the result.
    #[serde(skip)]
    extents: bool,
}

impl Operation for DiffArgs {
    const NAME: &'static str = "diff";
    const READS: bool = true;
    const LINE: Option<&'static str> = Some("snap-0123456789abcdef0 snap-0123456789abcdef1");
    type Report = Differs;

    async fn run(self, cx: &Context) -> Result<Differs> {
        let doing = format!("compare {} with {}", self.first, self.second);
        let difference = cx.run.unless_stopped(self.difference(cx)).await;
        difference.map_err(Error::from).flatten().map_err(|error| error.doing(doing))
    }
}

impl DiffArgs {
    async fn difference(self, cx: &Context) -> Result<Differs> {
        let store = cx.open().await?;
        let first = readable(&store, &self.first.id(cx, &store).await?).await?;
        let second = readable(&store, &self.second.id(cx, &store).await?).await?;
        let mut extent: Option<Extent> = None;
        let each = |index: BlockIndex, kind| {
            if self.extents && !extent.as_mut().is_some_and(|last| last.takes(index, kind)) {
                let new = Extent { offset: index.offset(), length: BLOCK_SIZE_U64, kind };
                print(cx, extent.replace(new));
            }
        };
        let difference = Difference::between(&store, &first, &second, each).await?;
        print(cx, extent);
        cx.tell_cost(&store);
        Ok(Differs { difference, extents: self.extents })
    }
}

/// Prints an extent now: there may be millions of them.
fn print(cx: &Context, extent: Option<Extent>) {
    if let Some(extent) = extent {
        cx.console.line(&serde_json::to_string(&extent).expect("it has string keys"));
    }
}

impl Report for Differs {
    fn lines(&self) -> Vec<String> {
        if self.extents {
            return Vec::new();
        }
        let Difference { added, overwritten, dropped, .. } = &self.difference;
        vec![
            format!("{added} chunks added, {overwritten} overwritten, {dropped} dropped"),
            self.difference.line(),
        ]
    }

    fn ids(&self) -> Vec<String> {
        if self.extents { Vec::new() } else { vec![self.difference.blocks.to_string()] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_next_to_each_other_are_one_extent() {
        let mut extent = Extent { offset: 0, length: BLOCK_SIZE_U64, kind: Kind::Added };
        assert!(extent.takes(BlockIndex(1), Kind::Added));
        assert!(!extent.takes(BlockIndex(2), Kind::Dropped));
        assert!(!extent.takes(BlockIndex(3), Kind::Added));
        let json = serde_json::to_string(&extent).unwrap();
        assert_eq!(json, r#"{"offset":0,"length":1048576,"kind":"added"}"#);
    }
}
