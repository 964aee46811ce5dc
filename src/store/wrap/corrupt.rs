//! A store that lost blocks.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use super::forward::Wrapper;
use crate::model::{Block, BlockIndex, SnapshotId};
use crate::store::{Error, ErrorKind, Result, SharedStore};

/// Answers for chosen blocks what a store answers whose data was damaged.
///
/// Data that was really damaged is what `tests/damage.rs` is about: no wrapper can hand out other
/// bytes, since a [`Block`] cannot be made of bytes that are not what its digest says.
#[derive(Debug)]
pub struct Corrupt {
    inner: SharedStore,
    blocks: Mutex<HashSet<(SnapshotId, BlockIndex)>>,
}

impl Corrupt {
    /// Corrupts nothing yet.
    pub fn new(inner: SharedStore) -> Self {
        Self { inner, blocks: Mutex::default() }
    }

    /// From now on one block cannot be read.
    pub fn corrupt(&self, id: &SnapshotId, index: BlockIndex) {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        blocks.insert((id.clone(), index));
    }

    /// From now on every block can be read again.
    pub fn heal(&self) {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Wrapper for Corrupt {
    fn inner(&self) -> &SharedStore {
        &self.inner
    }

    fn block(&self, id: &SnapshotId, index: BlockIndex, block: Block) -> Result<Block> {
        let blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        if blocks.contains(&(id.clone(), index)) {
            let message = format!("block {index} of {id} is not what was put");
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        Ok(block)
    }
}
