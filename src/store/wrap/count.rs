//! A store that counts: for metrics, and for tests of what must not be asked of a store.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Call;
use super::forward::Wrapper;
use crate::model::{BLOCK_SIZE_U64, Block, BlockIndex, SnapshotId};
use crate::store::{Result, SharedStore};

/// Counts the calls of a store.
#[derive(Debug)]
pub struct Count {
    inner: SharedStore,
    counters: Arc<Counters>,
}

/// What a [`Count`] has counted.
#[derive(Debug, Default)]
pub struct Counters {
    calls: [AtomicU64; Call::ALL.len()],
    errors: [AtomicU64; Call::ALL.len()],
    bytes_read: AtomicU64,
    bytes_put: AtomicU64,
}

impl Count {
    /// Counts the calls of `inner`.
    pub fn new(inner: SharedStore) -> Self {
        Self { inner, counters: Arc::default() }
    }

    /// What was counted, and goes on being counted.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }
}

impl Counters {
    /// Calls of this kind that were made.
    pub fn calls(&self, call: Call) -> u64 {
        self.calls[call as usize].load(Ordering::Relaxed)
    }

    /// Calls of this kind that failed.
    pub fn errors(&self, call: Call) -> u64 {
        self.errors[call as usize].load(Ordering::Relaxed)
    }

    /// All calls that were made.
    pub fn total(&self) -> u64 {
        Call::ALL.into_iter().map(|call| self.calls(call)).sum()
    }

    /// Bytes of the blocks that were read.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Bytes of the blocks that were put.
    pub fn bytes_put(&self) -> u64 {
        self.bytes_put.load(Ordering::Relaxed)
    }
}

impl Wrapper for Count {
    fn inner(&self) -> &SharedStore {
        &self.inner
    }

    fn after(&self, call: Call, succeeded: bool) {
        self.counters.calls[call as usize].fetch_add(1, Ordering::Relaxed);
        if !succeeded {
            self.counters.errors[call as usize].fetch_add(1, Ordering::Relaxed);
        }
    }

    fn block(&self, _id: &SnapshotId, _index: BlockIndex, block: Block) -> Result<Block> {
        self.counters.bytes_read.fetch_add(BLOCK_SIZE_U64, Ordering::Relaxed);
        Ok(block)
    }

    fn put(&self, _id: &SnapshotId, _index: BlockIndex) {
        self.counters.bytes_put.fetch_add(BLOCK_SIZE_U64, Ordering::Relaxed);
    }
}
