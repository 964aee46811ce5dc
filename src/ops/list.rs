//! `list`: which snapshots there are, and how large one is.

use super::Result;
use super::blocks::Listing;
use crate::model::{Snapshot, SnapshotId};
use crate::store::page::MAX_IDLE_PAGES;
use crate::store::{Error, ErrorKind, SharedStore};

/// All snapshots, from old to new.
pub async fn snapshots(store: &SharedStore) -> Result<Vec<Snapshot>> {
    let mut snapshots = Vec::new();
    let (mut token, mut idle) = (None, 0);
    loop {
        let page = store.list(token.clone()).await?;
        idle = if page.snapshots.is_empty() { idle + 1 } else { 0 };
        snapshots.extend(page.snapshots);
        if page.next.is_none() {
            break;
        }
        if page.next == token || idle > MAX_IDLE_PAGES {
            let message = "the list of snapshots makes no progress";
            return Err(Error::new(ErrorKind::Unavailable, message).into());
        }
        token = page.next;
    }
    snapshots.sort_by(|a, b| (a.start_time, &a.id).cmp(&(b.start_time, &b.id)));
    Ok(snapshots)
}

/// The number of blocks that were ever written to a snapshot, here or in an ancestor.
pub async fn block_count(store: &SharedStore, id: &SnapshotId) -> Result<u64> {
    let snapshot = store.describe(id).await?;
    if let (Some(data), Some(zero)) = (snapshot.data_blocks, snapshot.zero_blocks) {
        return Ok(data + zero);
    }
    let mut listing = Listing::new(store.clone(), id.clone());
    let mut blocks = 0;
    while listing.next().await?.is_some() {
        blocks += 1;
    }
    Ok(blocks)
}
