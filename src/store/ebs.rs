//! Snapshots of EBS, through the EBS direct APIs for blocks and EC2 for everything else.

use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use async_trait::async_trait;
use lru::LruCache;

use self::catalog::Catalog;
use self::clients::Clients;
use self::retry::{Patience, retry};
pub use self::url::{EbsUrl, InvalidEbsUrl};
use super::{
    BlockPage, BlockToken, ChangedPage, CompleteRequest, ListFrom, ListToken, Result, SnapshotPage,
    SnapshotStore, StartRequest,
};
use crate::model::{Block, BlockIndex, Snapshot, SnapshotId, SnapshotState, Tags};

mod catalog;
pub(crate) mod clients;
mod failure;
mod read;
mod retry;
mod url;
mod write;

/// Snapshots of which it is remembered when they were started here.
const MAX_STARTED: NonZeroUsize = NonZeroUsize::new(1024).expect("not 0");

/// The snapshots of one account in one region.
#[derive(Debug)]
pub struct Ebs {
    ebs: aws_sdk_ebs::Client,
    catalog: Catalog,
    /// When snapshots were started here: until two minutes later they may not be found.
    started: Mutex<LruCache<SnapshotId, Instant>>,
}

impl Ebs {
    /// The store that `url` names. No request is made yet.
    pub async fn open(url: &EbsUrl) -> Self {
        let Clients { ebs, ec2, region } = Clients::new(url).await;
        tracing::debug!("{url} is in {region}");
        Self { ebs, catalog: Catalog::new(ec2), started: Mutex::new(LruCache::new(MAX_STARTED)) }
    }

    fn started(&self) -> MutexGuard<'_, LruCache<SnapshotId, Instant>> {
        self.started.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long to wait for requests about a snapshot.
    fn patience(&self, id: &SnapshotId) -> Patience {
        Patience::since_start(self.started().get(id).copied())
    }
}

#[async_trait]
impl SnapshotStore for Ebs {
    async fn describe(&self, id: &SnapshotId) -> Result<Snapshot> {
        self.catalog.describe(id, self.patience(id)).await
    }

    async fn list(&self, token: Option<ListToken>) -> Result<SnapshotPage> {
        self.catalog.list(token).await
    }

    async fn list_blocks(&self, id: &SnapshotId, from: ListFrom, max: usize) -> Result<BlockPage> {
        self.list_block_page(id, from, max).await
    }

    async fn list_changed_blocks(
        &self,
        first: &SnapshotId,
        second: &SnapshotId,
        from: ListFrom,
        max: usize,
    ) -> Result<ChangedPage> {
        self.list_changed_page(first, second, from, max).await
    }

    async fn get_block(
        &self,
        id: &SnapshotId,
        index: BlockIndex,
        token: &BlockToken,
    ) -> Result<Block> {
        self.read_block(id, index, token).await
    }

    async fn start(&self, request: StartRequest) -> Result<Snapshot> {
        self.start_snapshot(request).await
    }

    async fn put_block(&self, id: &SnapshotId, index: BlockIndex, block: Block) -> Result<()> {
        self.put(id, index, &block).await
    }

    async fn flush(&self, _id: &SnapshotId) -> Result<()> {
        // A block that was acknowledged is durable.
        Ok(())
    }

    async fn complete(&self, id: &SnapshotId, request: CompleteRequest) -> Result<Snapshot> {
        self.complete_snapshot(id, request).await
    }

    async fn delete(&self, id: &SnapshotId) -> Result<()> {
        self.catalog.delete(id).await
    }

    async fn set_tags(&self, id: &SnapshotId, tags: Tags) -> Result<()> {
        self.catalog.set_tags(id, &tags).await
    }
}
