//! `list`: which snapshots there are, and how large one is.

use super::Result;
use crate::model::{Snapshot, SnapshotId};
use crate::store::SharedStore;
use crate::store::listing::Listing;
use crate::store::page::list_all;

/// All snapshots, from old to new.
pub async fn snapshots(store: &SharedStore) -> Result<Vec<Snapshot>> {
    let mut snapshots = list_all(&**store).await?;
    snapshots.sort_by(|a, b| (a.start_time, &a.id).cmp(&(b.start_time, &b.id)));
    Ok(snapshots)
}

/// The number of blocks that were ever written to a snapshot, here or in an ancestor.
pub async fn block_count(store: &SharedStore, id: &SnapshotId) -> Result<u64> {
    let snapshot = store.describe(id).await?;
    if let (Some(data), Some(zero)) = (snapshot.data_blocks, snapshot.zero_blocks) {
        return Ok(data + zero);
    }
    let mut listing = Listing::blocks(store.clone(), &snapshot);
    let mut blocks = 0;
    while listing.next().await?.is_some() {
        blocks += 1;
    }
    Ok(blocks)
}
