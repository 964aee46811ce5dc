//! A store in which one chosen call goes wrong, and that knows which blocks were put where.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Semaphore;

use crate::model::{BlockIndex, Snapshot, SnapshotId, SnapshotState};
use crate::store::wrap::{Call, Wrapper};
use crate::store::{BlockPage, Error, ErrorKind, Result, SharedStore};

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
    /// No call is made from now on; each hangs until it is let go.
    HangAll,
}

impl Fault {
    /// Whether the call is made before.
    fn is_of_answer(self) -> bool {
        matches!(self, Self::Lose | Self::HangAfter)
    }
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
    /// How long each block takes to read, if it is as it is with EBS, whose lists have no digests.
    far: Option<Duration>,
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

    /// From now on lists have no digests, and each block takes so long to read.
    pub(super) fn be_far(&self, read: Duration) {
        self.state().far = Some(read);
    }

    /// Blocks that were put again since the last time that this was asked.
    pub(super) fn repeated(&self) -> u32 {
        std::mem::take(&mut self.state().repeated)
    }

    /// The fault of this call, if it is its turn.
    fn fault(&self, call: Call, answered: bool) -> Option<Fault> {
        let mut state = self.state();
        let is_due = |plan: &&mut Plan| plan.call == call && plan.fault.is_of_answer() == answered;
        let plan = state.plan.as_mut().filter(is_due)?;
        if plan.after > 0 {
            plan.after -= 1;
            return None;
        }
        if plan.fault == Fault::HangAll {
            return Some(Fault::HangAll);
        }
        state.plan.take().map(|plan| plan.fault)
    }

    async fn fall(&self, call: Call, answered: bool) -> Result<()> {
        let failed = |kind, what: &str| Err(Error::new(kind, format!("{} {what}", call.as_str())));
        match self.fault(call, answered) {
            Some(Fault::Fail | Fault::Lose) => failed(ErrorKind::Unavailable, "fails as planned"),
            Some(Fault::Deny) => failed(ErrorKind::Denied, "is not for you"),
            Some(Fault::Panic) => panic!("as planned"),
            Some(Fault::HangBefore | Fault::HangAfter | Fault::HangAll) => {
                self.hang().await;
                Ok(())
            }
            None => Ok(()),
        }
    }

    async fn hang(&self) {
        self.caught.add_permits(1);
        self.released.acquire().await.unwrap().forget();
    }
}

#[async_trait]
impl Wrapper for Trap {
    fn inner(&self) -> &SharedStore {
        &self.inner
    }

    async fn before(&self, call: Call) -> Result<()> {
        let far = self.state().far.filter(|_| call == Call::GetBlock);
        tokio::time::sleep(far.unwrap_or_default()).await;
        self.fall(call, false).await
    }

    async fn answer(&self, call: Call) -> Result<()> {
        self.fall(call, true).await
    }

    fn listed_blocks(&self, mut page: BlockPage) -> BlockPage {
        if self.state().far.is_some() {
            page.blocks.iter_mut().for_each(|block| block.digest = None);
        }
        page
    }

    fn snapshot(&self, call: Call, mut snapshot: Snapshot) -> Snapshot {
        let mut state = self.state();
        // One that was completed before never goes back.
        if call == Call::Complete && state.slow > 0 {
            state.slowed = Some(snapshot.id.clone());
        }
        let says = call != Call::Start && state.slow > 0;
        if says && state.slowed.as_ref() == Some(&snapshot.id) {
            state.slow -= 1;
            snapshot.state = SnapshotState::Pending;
        }
        snapshot
    }

    fn put(&self, id: &SnapshotId, index: BlockIndex) {
        let mut state = self.state();
        let puts = state.puts.entry((id.clone(), index)).or_default();
        *puts += 1;
        let again = *puts > 1;
        state.repeated += u32::from(again);
    }
}
