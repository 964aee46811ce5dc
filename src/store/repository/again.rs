//! What a writer that has died has left of a pending snapshot, for one that goes on with it.

use std::cmp::Reverse;

use futures::TryStreamExt as _;
use roaring::RoaringBitmap;

use super::complete::record_ids;
use super::{Repository, names};
use crate::model::SnapshotId;
use crate::store::{Result, Tell};

impl Repository {
    /// Tells what the last writer has put. One who goes on notes all of it before it puts anything: so there is nothing
    /// older that nobody has noted.
    ///
    /// Nothing is told where two have written at the same time, or a completion decides what counts.
    pub(super) async fn tell_last_writer(&self, id: &SnapshotId, tell: Tell<'_>) -> Result<()> {
        let Some(start) = self.start_of(id).await? else { return Ok(()) };
        let attempt = start.metadata.attempt;
        let mut records = record_ids(&*self.objects, id, attempt).await?;
        let Some(last) = records.iter().max().copied() else { return Ok(()) };
        records.retain(|record| record.epoch == last.epoch);
        let is_alone = records.iter().all(|record| record.writer == last.writer);
        if !is_alone || self.objects.exists(&names::closing(id, attempt)).await? {
            return Ok(());
        }
        // A later put of a block counts.
        records.sort_unstable_by_key(|record| Reverse(*record));
        let mut told = RoaringBitmap::new();
        let mut tables = std::pin::pin!(self.records(&start, records));
        while let Some((_, table)) = tables.try_next().await? {
            let entries = table.entries().filter(|entry| {
                start.metadata.volume_size.contains(entry.index) && told.insert(entry.index.0)
            });
            let blocks: Vec<_> = entries.map(|entry| (entry.index, entry.digest)).collect();
            tell(&blocks);
        }
        Ok(())
    }
}
