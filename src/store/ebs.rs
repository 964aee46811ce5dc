//! Snapshots of EBS, through the EBS direct APIs for blocks and EC2 for everything else.

use std::num::NonZeroUsize;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use aws_config::SdkConfig;
use lru::LruCache;

pub(crate) use self::account::{Account, Accounts};
use self::catalog::Scope;
use self::clients::Clients;
pub use self::url::{EbsUrl, InvalidEbsUrl};
use super::aws::service::{Request, RetryPolicy, Service};
use super::request::Kind;
use super::{
    BlockPage, BlockToken, ChangedPage, CompleteRequest, ListFrom, ListToken, Result, SnapshotPage,
    SnapshotStore, StartRequest, StoreOptions, Usage,
};
use crate::model::{Block, BlockIndex, Snapshot, SnapshotId, SnapshotState, Tags};

mod account;
mod catalog;
pub(crate) mod clients;
pub(crate) mod ec2;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod kinds;
mod read;
#[cfg(test)]
mod tests;
mod tokens;
mod url;
mod write;

/// Snapshots of which it is remembered when they were started here.
const MAX_STARTED: NonZeroUsize = NonZeroUsize::new(1024).expect("not 0");

/// How long after its start a snapshot may not be found (the EBS team: about two minutes).
const SETTLING: Duration = Duration::from_mins(2);

/// The snapshots of one account in one region.
#[derive(Debug)]
pub struct Ebs {
    service: Service<Account>,
    scope: Scope,
    settling: Duration,
}

/// A snapshot that was started here.
#[derive(Clone, Debug)]
struct Started {
    snapshot: Snapshot,
    /// Until when it may not be found.
    until: Instant,
    visibility: Arc<Visibility>,
}

/// Whether the service knows of a new snapshot.
#[derive(Debug, Default)]
struct Visibility {
    /// It was not found, the last time that a block was put.
    is_missing: AtomicBool,
    /// Held by the one put that tries whether it is there by now.
    trying: tokio::sync::Mutex<()>,
}

impl Ebs {
    /// The store behind a configuration of the AWS SDK, for programs that have one themselves. It shares
    /// nothing with others.
    pub fn with_config(shared: &SdkConfig, options: &StoreOptions) -> Self {
        let clients = Clients::of(shared, &EbsUrl::default());
        Self::of(Arc::new(Account::alone(clients)), options)
    }

    /// One use of an account, with limits and a scope of its own.
    pub(crate) fn of(account: Arc<Account>, options: &StoreOptions) -> Self {
        Self {
            service: Service::new(account, &kinds::ALL, options),
            scope: Scope::new(options),
            settling: options.settling.unwrap_or(SETTLING),
        }
    }

    fn started(&self) -> MutexGuard<'_, LruCache<SnapshotId, Started>> {
        self.service.account.started()
    }

    /// How long to wait for requests about a snapshot.
    fn policy(&self, id: &SnapshotId) -> RetryPolicy {
        match self.started().get(id) {
            Some(started) => RetryPolicy::until_known(started.until),
            None => RetryPolicy::standard(),
        }
    }

    /// A request about a snapshot that may have been started here.
    fn about<'a>(&self, kind: &'static Kind, id: &'a SnapshotId, doing: &'a str) -> Request<'a> {
        Request { kind, snapshot: Some(id), doing, policy: self.policy(id) }
    }
}

#[async_trait]
impl SnapshotStore for Ebs {
    async fn describe(&self, id: &SnapshotId) -> Result<Snapshot> {
        catalog::describe(&self.service, id, self.policy(id)).await
    }

    async fn list(&self, token: Option<ListToken>) -> Result<SnapshotPage> {
        catalog::list(&self.service, &self.scope, token).await
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
        catalog::delete(&self.service, id, self.policy(id)).await?;
        self.started().pop(id);
        Ok(())
    }

    async fn set_tags(&self, id: &SnapshotId, tags: Tags) -> Result<()> {
        catalog::set_tags(&self.service, id, &tags, self.policy(id)).await
    }

    fn parallelism(&self) -> usize {
        self.service.max_in_flight()
    }

    fn needs_flush(&self) -> bool {
        false
    }

    fn settling(&self) -> Duration {
        self.settling
    }

    fn place(&self) -> String {
        self.service.account.place()
    }

    fn usage(&self) -> Option<Usage> {
        Some(self.service.usage())
    }
}
