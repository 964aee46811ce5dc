//! Buffers of one block that are used again.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

use bytes::Bytes;

use super::BLOCK_SIZE;

/// Free buffers that are kept at most; those given back beyond go to the allocator.
///
/// In a full cache every new block replaces an old one, so few are ever free at a time: 64 are
/// 32 MiB. Recycling keeps the resident memory at what the budget says (allocators keep freed
/// chunks of this size), and saves the page faults of fresh memory.
const KEPT: usize = 64;

static FREE: Mutex<Vec<Box<[u8]>>> = Mutex::new(Vec::new());

/// What direct I/O wants offsets, lengths and memory to be multiples of: more than any disk asks for.
pub const DIRECT_ALIGNMENT: usize = 4096;

/// What a buffer can hold: a block, or a compressed block, which may be a little larger, read
/// directly from a disk, which gives whole sectors.
const CAPACITY: usize = BLOCK_SIZE + 3 * DIRECT_ALIGNMENT;

/// A buffer for one block, raw or compressed, which returns to a pool when it is dropped.
pub struct BlockBuffer {
    memory: Option<Box<[u8]>>,
    start: usize,
    len: usize,
}

impl BlockBuffer {
    /// A buffer of `len` bytes with unspecified content; `None` if that is more than one can hold
    /// ([`BLOCK_SIZE`] and 12 KiB). It begins at a multiple of [`DIRECT_ALIGNMENT`] in memory.
    pub fn with_len(len: usize) -> Option<Self> {
        if len > CAPACITY {
            return None;
        }
        let free = FREE.lock().expect("nothing panics under this lock").pop();
        let memory =
            free.unwrap_or_else(|| vec![0; CAPACITY + DIRECT_ALIGNMENT].into_boxed_slice());
        let start = memory.as_ptr().align_offset(DIRECT_ALIGNMENT);
        Some(Self { memory: Some(memory), start, len })
    }

    /// A buffer for a raw block, with unspecified content.
    pub fn block() -> Self {
        Self::with_len(BLOCK_SIZE).expect("a block fits")
    }

    /// Leaves the first `len` bytes; longer than it is it does not become.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// The content as shared bytes; the buffer returns to the pool with the last of them.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Deref for BlockBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory.as_deref().expect("taken in drop only")[self.start..][..self.len]
    }
}

impl DerefMut for BlockBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory.as_deref_mut().expect("taken in drop only")[self.start..][..self.len]
    }
}

impl AsRef<[u8]> for BlockBuffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for BlockBuffer {
    fn drop(&mut self) {
        let mut free = FREE.lock().expect("nothing panics under this lock");
        if free.len() < KEPT {
            free.extend(self.memory.take());
        }
    }
}

impl fmt::Debug for BlockBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockBuffer({} bytes)", self.len)
    }
}
