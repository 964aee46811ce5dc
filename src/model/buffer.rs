//! Buffers of one block that are used again.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard};

use bytes::Bytes;

use super::BLOCK_SIZE;
use crate::sys::{discard, map_memory, reuse};

/// Free buffers whose memory is kept at most; that of those given back beyond goes to the system.
///
/// In a full cache every new block replaces an old one, so few are ever free at a time: 64 are
/// 32 MiB. Recycling keeps the resident memory at what the budget says (allocators keep freed
/// chunks of this size), and saves the page faults of fresh memory.
const KEPT: usize = 64;

/// Buffers that are mapped at once: about 32 MiB, of which only what is used becomes resident.
const MAPPED: usize = 64;

/// Where mapped memory begins: at a huge page of the processors that have some of 2 MiB. Elsewhere it is as good
/// as any.
const HUGE_PAGE: usize = 2 << 20;

static POOL: Mutex<Pool> =
    Mutex::new(Pool { free: Vec::new(), discarded: Vec::new(), fresh: &mut [] });

/// The memory of one buffer, [`CAPACITY`] bytes.
type Memory = &'static mut [u8];

/// The memory that no buffer has.
struct Pool {
    /// With content, the last to be given back at the end: the likeliest to be in the processor's caches.
    free: Vec<Memory>,
    /// Given back to the system.
    discarded: Vec<Memory>,
    /// Mapped and never used. It is used from its start, so that few huge pages are begun.
    fresh: Memory,
}

impl Pool {
    /// Memory, and whether it was discarded.
    fn take(&mut self) -> (Memory, bool) {
        if let Some(memory) = self.free.pop() {
            return (memory, false);
        }
        if let Some(memory) = self.discarded.pop() {
            return (memory, true);
        }
        if self.fresh.is_empty() {
            self.fresh = map_memory(MAPPED * CAPACITY, HUGE_PAGE)
                .unwrap_or_else(|_| vec![0; CAPACITY].leak());
        }
        let (memory, fresh) = std::mem::take(&mut self.fresh).split_at_mut(CAPACITY);
        self.fresh = fresh;
        (memory, false)
    }
}

fn pool() -> MutexGuard<'static, Pool> {
    POOL.lock().expect("nothing panics under this lock")
}

/// What direct I/O wants offsets, lengths and memory to be multiples of: more than any disk asks for.
pub const DIRECT_ALIGNMENT: usize = 4096;

/// What a buffer can hold: a block, or a compressed block, which may be a little larger, read
/// directly from a disk, which gives whole sectors.
const CAPACITY: usize = BLOCK_SIZE + 3 * DIRECT_ALIGNMENT;

/// A buffer for one block, raw or compressed, which returns to a pool when it is dropped.
pub struct BlockBuffer {
    memory: Memory,
    len: usize,
}

impl BlockBuffer {
    /// A buffer of `len` bytes with unspecified content; `None` if that is more than one can hold
    /// ([`BLOCK_SIZE`] and 12 KiB). It begins at a multiple of [`DIRECT_ALIGNMENT`] in memory.
    pub fn with_len(len: usize) -> Option<Self> {
        if len > CAPACITY {
            return None;
        }
        // Not under the lock: to advise the kernel takes a while.
        let (memory, was_discarded) = pool().take();
        if was_discarded {
            reuse(memory);
        }
        Some(Self { memory, len })
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
        &self.memory[..self.len]
    }
}

impl DerefMut for BlockBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[..self.len]
    }
}

impl AsRef<[u8]> for BlockBuffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for BlockBuffer {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        let is_full = pool().free.len() >= KEPT;
        if is_full {
            discard(memory);
            pool().discarded.push(memory);
        } else {
            pool().free.push(memory);
        }
    }
}

impl fmt::Debug for BlockBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockBuffer({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of this process that are resident.
    fn resident() -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    }

    /// Whether the kernel has this flag for the memory at an address (proc(5), smaps, `VmFlags`).
    fn has_flag(at: *const u8, flag: &str) -> bool {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        // A block of a buffer may begin a little before the pages that advice is for.
        let at = at.addr().next_multiple_of(4096);
        let mut is_here = false;
        for line in smaps.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let ends = range.map(|(a, b)| [a, b].map(|end| usize::from_str_radix(end, 16).ok()));
            if let Some([Some(start), Some(end)]) = ends {
                is_here = (start..end).contains(&at);
            } else if is_here && let Some(flags) = line.strip_prefix("VmFlags:") {
                return flags.split(' ').any(|known| known == flag);
            }
        }
        panic!("nothing is mapped there");
    }

    #[test]
    fn buffers_begin_where_direct_io_wants_them_and_share_nothing() {
        let mut all: Vec<_> = (0..=2 * MAPPED).map(|_| BlockBuffer::block()).collect();
        for (n, buffer) in all.iter_mut().enumerate() {
            assert_eq!(buffer.as_ptr().align_offset(DIRECT_ALIGNMENT), 0);
            buffer.fill(n as u8);
        }
        assert!(all.iter().enumerate().all(|(n, buffer)| buffer.iter().all(|&b| b == n as u8)));
        assert!(BlockBuffer::with_len(CAPACITY).is_some_and(|longest| longest.len() == CAPACITY));
        assert!(BlockBuffer::with_len(CAPACITY + 1).is_none());
    }

    #[test]
    fn what_is_given_back_beyond_what_is_kept_goes_to_the_system_and_is_used_again() {
        // Other tests of the same process use the pool, too.
        if std::env::var_os("FSPFS_TEST_ALONE").is_none() {
            let name = std::thread::current().name().unwrap().to_owned();
            let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
            let alone = alone.args(["--exact", &name]).env("FSPFS_TEST_ALONE", "1").output();
            let alone = alone.unwrap();
            assert!(alone.status.success(), "{}", String::from_utf8_lossy(&alone.stdout));
            return;
        }
        let fill = || -> Vec<_> {
            let each = |_| {
                let mut buffer = BlockBuffer::block();
                buffer.fill(1);
                buffer.freeze()
            };
            (0..5 * KEPT).map(each).collect()
        };
        let all = fill();
        let full = resident();
        drop(all);
        let given_back = full - resident();
        assert!(given_back > 3 * KEPT * BLOCK_SIZE, "{given_back} of {full} bytes");
        let unused = || {
            let pool = pool();
            pool.free.len() + pool.discarded.len()
        };
        let mapped = unused();
        let again = fill();
        let advised = |flag| again.iter().filter(|buffer| has_flag(buffer.as_ptr(), flag)).count();
        assert!(advised("nh") == 0, "{} of {} are no huge pages", advised("nh"), again.len());
        drop(again);
        assert_eq!(unused(), mapped);
        // The kernel makes no huge pages of what has no content, beside what has some.
        let discarded = pool().discarded.iter().map(|memory| memory.as_ptr()).collect::<Vec<_>>();
        assert!(has_flag(discarded[0], "nh") || !has_flag(pool().free[0].as_ptr(), "hg"));
    }
}
