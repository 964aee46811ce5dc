//! Writing blocks to a target while they come from many tasks.
//!
//! A file takes one write at a time anyway. Who has a block while nobody writes does it at once, since
//! the block is in the cache of that processor; the others leave theirs to a thread. A target that
//! is slow is left to the thread altogether: tasks must not wait for a disk.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::watch;

use super::Error;
use super::target::Writer;
use crate::blocking::blocking;
use crate::model::{Block, BlockIndex};

/// Blocks that wait to be written, at most: 8 MiB.
const WAITING: usize = 16;

/// Blocks that are there and not written, from which on no further ones are asked for.
const UNWRITTEN: usize = 2 * WAITING;

/// A block that takes longer to write than this waits for a disk: 100 MiB/s.
const SLOW: Duration = Duration::from_millis(5);

/// Writes blocks in the background. Dropping it does not wait for them.
#[derive(Debug)]
pub(crate) struct WriteThread {
    queue: WriteQueue,
    thread: JoinHandle<Result<(), Error>>,
}

/// Where blocks are handed in.
#[derive(Clone, Debug)]
pub(crate) struct WriteQueue {
    blocks: Sender<Handed>,
    shared: Arc<Shared>,
}

type Handed = (BlockIndex, Block, Unwritten);

struct Shared {
    writer: Writer,
    /// Told of each block that was written.
    written: Box<dyn Fn() + Send + Sync>,
    /// Blocks that were handed in and not written.
    unwritten: watch::Sender<usize>,
    /// Held by whoever writes.
    writing: Mutex<()>,
    is_slow: AtomicBool,
}

impl WriteThread {
    /// Begins to wait for blocks. `written` is told of each.
    ///
    /// # Errors
    ///
    /// If there can be no further thread.
    pub(crate) fn new(
        writer: Writer,
        written: impl Fn() + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let (blocks, incoming) = channel(WAITING);
        let shared = Arc::new(Shared {
            writer,
            written: Box::new(written),
            unwritten: watch::Sender::new(0),
            writing: Mutex::default(),
            is_slow: AtomicBool::new(false),
        });
        let queue = WriteQueue { blocks, shared: Arc::clone(&shared) };
        let thread = std::thread::Builder::new()
            .name("writer".to_owned())
            .spawn(move || shared.write_all(incoming))?;
        Ok(Self { queue, thread })
    }

    /// Where blocks are handed in.
    pub(crate) fn queue(&self) -> WriteQueue {
        self.queue.clone()
    }

    /// Waits until everything is written.
    ///
    /// # Errors
    ///
    /// That of the first write that failed.
    pub(crate) async fn finish(self) -> Result<(), Error> {
        let Self { queue, thread } = self;
        drop(queue);
        let ended = blocking(move || thread.join()).await;
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl WriteQueue {
    /// Waits until it is worth reading a further block: what cannot be written yet only takes memory.
    /// Does not wait for a write that has failed.
    pub(crate) async fn room(&self) {
        let mut unwritten = self.shared.unwritten.subscribe();
        tokio::select! {
            // Its sender is in what is shared.
            _ = unwritten.wait_for(|&blocks| blocks < UNWRITTEN) => {}
            () = self.blocks.closed() => {}
        }
    }

    /// Writes a block, or has it written as soon as there is room for it. False if nothing is written
    /// any more, and [`WriteThread::finish`] says why.
    pub(crate) async fn write(&self, index: BlockIndex, block: Block) -> bool {
        // If a write has failed the thread has ended, and nothing is written any more.
        if self.blocks.is_closed() {
            return false;
        }
        let unwritten = Unwritten::new(&self.shared);
        if self.shared.try_write(index, &block) {
            return true;
        }
        self.blocks.send((index, block, unwritten)).await.is_ok()
    }
}

/// One block that is not written yet.
struct Unwritten(Arc<Shared>);

impl Unwritten {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.unwritten.send_modify(|blocks| *blocks += 1);
        Self(Arc::clone(shared))
    }
}

impl Drop for Unwritten {
    fn drop(&mut self) {
        self.0.unwritten.send_modify(|blocks| *blocks -= 1);
    }
}

impl Shared {
    fn write(&self, index: BlockIndex, block: &Block) -> Result<(), Error> {
        self.writer.write(index, block)?;
        (self.written)();
        Ok(())
    }

    /// Writes a block if that can be done at once. False if it was not: what is wrong, if anything is,
    /// the thread finds when it tries.
    fn try_write(&self, index: BlockIndex, block: &Block) -> bool {
        if self.is_slow.load(Ordering::Relaxed) {
            return false;
        }
        let Ok(_alone) = self.writing.try_lock() else { return false };
        let began = Instant::now();
        let written = self.write(index, block);
        if began.elapsed() > SLOW {
            self.is_slow.store(true, Ordering::Relaxed);
        }
        written.is_ok()
    }

    fn write_all(&self, mut blocks: Receiver<Handed>) -> Result<(), Error> {
        while let Some((index, block, _unwritten)) = blocks.blocking_recv() {
            let _alone = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
            self.write(index, &block)?;
        }
        Ok(())
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("writer", &self.writer).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use rstest::rstest;

    use super::*;
    use crate::model::BLOCK_SIZE;
    use crate::transfer::target::Target;

    fn block() -> Block {
        Block::new(vec![7; BLOCK_SIZE].into())
    }

    #[rstest]
    #[case::fast(false)]
    #[case::slow(true)]
    #[tokio::test]
    async fn what_is_handed_over_is_written(#[case] is_slow: bool) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let target = Target::open(&path, 40 * BLOCK_SIZE as u64).unwrap();
        let count = Arc::new(AtomicUsize::new(0));
        let written = Arc::clone(&count);
        let told = move || {
            written.fetch_add(1, Ordering::Relaxed);
        };
        let thread = WriteThread::new(target.writer(), told).unwrap();
        let queue = thread.queue();
        queue.shared.is_slow.store(is_slow, Ordering::Relaxed);
        for index in 0..40 {
            queue.room().await;
            assert!(queue.write(BlockIndex(index), block()).await);
        }
        drop(queue);
        thread.finish().await.unwrap();
        assert_eq!(count.load(Ordering::Relaxed), 40);
        target.finish().unwrap();
        assert!(std::fs::read(&path).unwrap().iter().all(|&byte| byte == 7));
    }

    #[tokio::test]
    #[allow(clippy::await_holding_lock, reason = "whoever else wants it is on another thread")]
    async fn there_is_room_again_once_something_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let target = Target::open(&dir.path().join("out"), 100 * BLOCK_SIZE as u64).unwrap();
        let thread = WriteThread::new(target.writer(), || {}).unwrap();
        let queue = thread.queue();
        let disk = queue.shared.writing.lock().unwrap();
        let hand_in = |n| {
            let queue = queue.clone();
            tokio::spawn(async move { queue.write(BlockIndex(n), block()).await })
        };
        let writes: Vec<_> = (0..UNWRITTEN as u32).map(hand_in).collect();
        let full = async {
            while *queue.shared.unwritten.borrow() < UNWRITTEN {
                tokio::task::yield_now().await;
            }
        };
        full.await;
        assert!(tokio::time::timeout(Duration::from_millis(20), queue.room()).await.is_err());
        drop(disk);
        queue.room().await;
        for write in writes {
            assert!(write.await.unwrap());
        }
    }

    #[rstest]
    #[case::fast(false)]
    #[case::slow(true)]
    #[tokio::test]
    async fn a_write_that_fails_ends_it(#[case] is_slow: bool) {
        let full = std::path::Path::new("/dev/full");
        let thread = WriteThread::new(Writer::of_file(full, BLOCK_SIZE as u64), || {}).unwrap();
        let queue = thread.queue();
        queue.shared.is_slow.store(is_slow, Ordering::Relaxed);
        while queue.write(BlockIndex(0), block()).await {
            queue.room().await;
        }
        queue.room().await;
        let error = thread.finish().await.unwrap_err().to_string();
        assert!(error.contains("/dev/full") && error.contains("No space"), "{error}");
    }
}
