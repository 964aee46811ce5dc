//! The one thing that wrappers do: something before a call, and something with its result.

use std::fmt::Debug;
use std::time::Duration;

use async_trait::async_trait;

use super::Call;
use crate::model::{Block, BlockIndex, Snapshot, SnapshotId, Tags};
use crate::store::{
    BlockPage, BlockToken, ChangedPage, CompleteRequest, ListFrom, ListToken, Result, SharedStore,
    SnapshotPage, SnapshotStore, StartRequest, Tell, Usage,
};

/// A wrapper: by default it changes nothing.
#[async_trait]
pub(crate) trait Wrapper: Debug + Send + Sync + 'static {
    /// What is wrapped.
    fn inner(&self) -> &SharedStore;

    /// Runs before each call, which is not made if this fails.
    async fn before(&self, _call: Call) -> Result<()> {
        Ok(())
    }

    /// Runs after each call that was made.
    fn after(&self, _call: Call, _succeeded: bool) {}

    /// Runs after that, if the call succeeded; whoever called is not told so if this fails.
    async fn answer(&self, _call: Call) -> Result<()> {
        Ok(())
    }

    /// Sees each page of a list of snapshots.
    fn listed(&self, page: SnapshotPage) -> SnapshotPage {
        page
    }

    /// Sees each page of a list of blocks.
    fn listed_blocks(&self, page: BlockPage) -> BlockPage {
        page
    }

    /// Sees each snapshot that a call tells of.
    fn snapshot(&self, _call: Call, snapshot: Snapshot) -> Snapshot {
        snapshot
    }

    /// Sees each block that was read.
    fn block(&self, _id: &SnapshotId, _index: BlockIndex, block: Block) -> Result<Block> {
        Ok(block)
    }

    /// Learns of each block that was put.
    fn put(&self, _id: &SnapshotId, _index: BlockIndex) {}
}

/// Makes one call of the inner store between what the wrapper does.
macro_rules! forward {
    ($self:ident, $call:ident, $made:expr) => {{
        $self.before(Call::$call).await?;
        let result = $made.await;
        $self.after(Call::$call, result.is_ok());
        if result.is_ok() {
            $self.answer(Call::$call).await?;
        }
        result
    }};
}

#[async_trait]
impl<W: Wrapper> SnapshotStore for W {
    fn parallelism(&self) -> usize {
        self.inner().parallelism()
    }

    fn settling(&self) -> Duration {
        self.inner().settling()
    }

    fn needs_flush(&self) -> bool {
        self.inner().needs_flush()
    }

    fn neighbours(&self) -> usize {
        self.inner().neighbours()
    }

    fn place(&self) -> String {
        self.inner().place()
    }

    fn usage(&self) -> Option<Usage> {
        self.inner().usage()
    }

    async fn describe(&self, id: &SnapshotId) -> Result<Snapshot> {
        let snapshot = forward!(self, Describe, self.inner().describe(id))?;
        Ok(self.snapshot(Call::Describe, snapshot))
    }

    async fn list(&self, token: Option<ListToken>) -> Result<SnapshotPage> {
        let page = forward!(self, List, self.inner().list(token))?;
        Ok(self.listed(page))
    }

    async fn list_blocks(&self, id: &SnapshotId, from: ListFrom, max: usize) -> Result<BlockPage> {
        let page = forward!(self, ListBlocks, self.inner().list_blocks(id, from, max))?;
        Ok(self.listed_blocks(page))
    }

    async fn list_changed_blocks(
        &self,
        first: &SnapshotId,
        second: &SnapshotId,
        from: ListFrom,
        max: usize,
    ) -> Result<ChangedPage> {
        let inner = self.inner();
        forward!(self, ListChangedBlocks, inner.list_changed_blocks(first, second, from, max))
    }

    async fn get_block(
        &self,
        id: &SnapshotId,
        index: BlockIndex,
        token: &BlockToken,
    ) -> Result<Block> {
        let block = forward!(self, GetBlock, self.inner().get_block(id, index, token))?;
        self.block(id, index, block)
    }

    async fn start(&self, request: StartRequest) -> Result<Snapshot> {
        let snapshot = forward!(self, Start, self.inner().start(request))?;
        Ok(self.snapshot(Call::Start, snapshot))
    }

    async fn put_block(&self, id: &SnapshotId, index: BlockIndex, block: Block) -> Result<()> {
        forward!(self, PutBlock, self.inner().put_block(id, index, block))?;
        self.put(id, index);
        Ok(())
    }

    async fn put_block_durably(
        &self,
        id: &SnapshotId,
        index: BlockIndex,
        block: Block,
    ) -> Result<()> {
        forward!(self, PutBlock, self.inner().put_block_durably(id, index, block))?;
        self.put(id, index);
        Ok(())
    }

    async fn put_before(&self, id: &SnapshotId, tell: Tell<'_>) -> Result<()> {
        self.inner().put_before(id, tell).await
    }

    async fn flush(&self, id: &SnapshotId) -> Result<()> {
        forward!(self, Flush, self.inner().flush(id))
    }

    async fn complete(&self, id: &SnapshotId, request: CompleteRequest) -> Result<Snapshot> {
        let snapshot = forward!(self, Complete, self.inner().complete(id, request))?;
        Ok(self.snapshot(Call::Complete, snapshot))
    }

    async fn delete(&self, id: &SnapshotId) -> Result<()> {
        forward!(self, Delete, self.inner().delete(id))
    }

    async fn set_tags(&self, id: &SnapshotId, tags: Tags) -> Result<()> {
        forward!(self, SetTags, self.inner().set_tags(id, tags))
    }
}
