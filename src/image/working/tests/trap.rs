//! A store in which one chosen call goes wrong, and that knows which blocks were put where.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::Semaphore;

use crate::model::{Block, BlockIndex, Snapshot, SnapshotId, SnapshotState, Tags};
use crate::store::wrap::Call;
use crate::store::{
    BlockPage, BlockToken, ChangedPage, CompleteRequest, Error, ErrorKind, ListFrom, ListToken,
    Result, SharedStore, SnapshotPage, SnapshotStore, StartRequest,
};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The call is not made.
    Fail,
    /// The call is made, and its answer lost.
    Lose,
    /// The store does not let this user do it: the call is not made.
    Deny,
    /// The call is not made, and whoever makes it dies.
    Panic,
    /// The call is not made before it is let go.
    HangBefore,
    /// The call is made, and not answered before it is let go.
    HangAfter,
}

/// One fault.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) call: Call,
    /// Calls of this kind that succeed before.
    pub(super) after: u32,
    pub(super) fault: Fault,
}

/// The store.
#[derive(Debug)]
pub(super) struct Trap {
    inner: SharedStore,
    state: Mutex<State>,
    /// A permit once a call hangs.
    pub(super) caught: Semaphore,
    released: Semaphore,
}

#[derive(Debug, Default)]
struct State {
    plan: Option<Plan>,
    /// Acknowledged puts.
    puts: HashMap<(SnapshotId, BlockIndex), u32>,
    /// Times that `describe` still says that a snapshot is pending.
    slow: u32,
    /// Of which one.
    slowed: Option<SnapshotId>,
    /// Blocks that were put again, after they had been acknowledged.
    repeated: u32,
}

impl Trap {
    pub(super) fn new(inner: SharedStore) -> Self {
        let (caught, released) = (Semaphore::new(0), Semaphore::new(0));
        Self { inner, state: Mutex::default(), caught, released }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn arm(&self, plan: Plan) {
        self.state().plan = Some(plan);
        self.caught.forget_permits(usize::MAX >> 4);
        self.released.forget_permits(usize::MAX >> 4);
    }

    /// Nothing goes wrong any more. Whether nothing has.
    pub(super) fn disarm(&self) -> bool {
        self.state().plan.take().is_some()
    }

    /// Lets a hanging call go on.
    pub(super) fn release(&self) {
        self.released.add_permits(1);
    }

    /// From now on the store goes on for a while after a completion.
    pub(super) fn slow_down(&self, describes: u32) {
        self.state().slow = describes;
    }

    /// Blocks that were put again since the last time that this was asked.
    pub(super) fn repeated(&self) -> u32 {
        std::mem::take(&mut self.state().repeated)
    }

    /// The fault of this call, if it is its turn.
    fn fault(&self, call: Call) -> Option<Fault> {
        let mut state = self.state();
        let plan = state.plan.as_mut().filter(|plan| plan.call == call)?;
        if plan.after > 0 {
            plan.after -= 1;
            return None;
        }
        let fault = plan.fault;
        state.plan = None;
        Some(fault)
    }

    async fn call<T>(&self, call: Call, made: impl Future<Output = Result<T>> + Send) -> Result<T> {
        let failed = || {
            Err(Error::new(ErrorKind::Unavailable, format!("{} fails as planned", call.as_str())))
        };
        let fault = self.fault(call);
        match fault {
            Some(Fault::Fail) => return failed(),
            Some(Fault::Deny) => return Err(Error::new(ErrorKind::Denied, "it is not for you")),
            Some(Fault::Panic) => panic!("as planned"),
            Some(Fault::HangBefore) => self.hang().await,
            _ => {}
        }
        let result = made.await;
        match fault {
            Some(Fault::Lose) => failed(),
            Some(Fault::HangAfter) => {
                self.hang().await;
                result
            }
            _ => result,
        }
    }

    async fn hang(&self) {
        self.caught.add_permits(1);
        self.released.acquire().await.unwrap().forget();
    }

    fn slowed(&self, mut snapshot: Snapshot, completing: bool) -> Snapshot {
        let mut state = self.state();
        // One that was completed before never goes back.
        if completing && state.slow > 0 {
            state.slowed = Some(snapshot.id.clone());
        }
        if state.slow > 0 && state.slowed.as_ref() == Some(&snapshot.id) {
            state.slow -= 1;
            snapshot.state = SnapshotState::Pending;
        }
        snapshot
    }
}

#[async_trait]
impl SnapshotStore for Trap {
    async fn describe(&self, id: &SnapshotId) -> Result<Snapshot> {
        let snapshot = self.call(Call::Describe, self.inner.describe(id)).await?;
        Ok(self.slowed(snapshot, false))
    }

    async fn list(&self, token: Option<ListToken>) -> Result<SnapshotPage> {
        self.call(Call::List, self.inner.list(token)).await
    }

    async fn list_blocks(&self, id: &SnapshotId, from: ListFrom, max: usize) -> Result<BlockPage> {
        self.call(Call::ListBlocks, self.inner.list_blocks(id, from, max)).await
    }

    async fn list_changed_blocks(
        &self,
        first: &SnapshotId,
        second: &SnapshotId,
        from: ListFrom,
        max: usize,
    ) -> Result<ChangedPage> {
        let made = self.inner.list_changed_blocks(first, second, from, max);
        self.call(Call::ListChangedBlocks, made).await
    }

    async fn get_block(
        &self,
        id: &SnapshotId,
        index: BlockIndex,
        token: &BlockToken,
    ) -> Result<Block> {
        self.call(Call::GetBlock, self.inner.get_block(id, index, token)).await
    }

    async fn start(&self, request: StartRequest) -> Result<Snapshot> {
        self.call(Call::Start, self.inner.start(request)).await
    }

    async fn put_block(&self, id: &SnapshotId, index: BlockIndex, block: Block) -> Result<()> {
        self.call(Call::PutBlock, self.inner.put_block(id, index, block)).await?;
        let mut state = self.state();
        let puts = state.puts.entry((id.clone(), index)).or_default();
        *puts += 1;
        let again = *puts > 1;
        state.repeated += u32::from(again);
        Ok(())
    }

    async fn flush(&self, id: &SnapshotId) -> Result<()> {
        self.call(Call::Flush, self.inner.flush(id)).await
    }

    async fn complete(&self, id: &SnapshotId, request: CompleteRequest) -> Result<Snapshot> {
        let snapshot = self.call(Call::Complete, self.inner.complete(id, request)).await?;
        Ok(self.slowed(snapshot, true))
    }

    async fn delete(&self, id: &SnapshotId) -> Result<()> {
        self.call(Call::Delete, self.inner.delete(id)).await
    }

    async fn set_tags(&self, id: &SnapshotId, tags: Tags) -> Result<()> {
        self.call(Call::SetTags, self.inner.set_tags(id, tags)).await
    }
}
