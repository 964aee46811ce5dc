//! One thread that writes blocks to a target while they come from many tasks.
//!
//! A file takes one write at a time anyway, and a thread that always has something to write is not
//! woken for each block.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::target::Writer;
use super::{Error, blocking};
use crate::model::{Block, BlockIndex};

/// Blocks that wait to be written, at most: 8 MiB.
const WAITING: usize = 16;

/// Writes blocks in the background. Dropping it does not wait for them.
#[derive(Debug)]
pub(crate) struct WriteThread {
    blocks: Sender<(BlockIndex, Block)>,
    failed: Arc<Mutex<Option<Error>>>,
    thread: JoinHandle<()>,
}

/// Hands blocks to the thread.
#[derive(Clone, Debug)]
pub(crate) struct WriteQueue(Sender<(BlockIndex, Block)>);

impl WriteThread {
    /// Begins to wait for blocks. `written` is told of each.
    ///
    /// # Errors
    ///
    /// If there can be no further thread.
    pub(crate) fn new(
        writer: Writer,
        written: impl Fn() + Send + 'static,
    ) -> std::io::Result<Self> {
        let (blocks, incoming) = channel(WAITING);
        let failed = Arc::new(Mutex::new(None));
        let outcome = Arc::clone(&failed);
        let thread = std::thread::Builder::new().name("writer".to_owned()).spawn(move || {
            if let Err(error) = write_all(&writer, incoming, written) {
                *outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
        })?;
        Ok(Self { blocks, failed, thread })
    }

    /// What hands it blocks.
    pub(crate) fn queue(&self) -> WriteQueue {
        WriteQueue(self.blocks.clone())
    }

    /// Waits until everything is written.
    ///
    /// # Errors
    ///
    /// That of the first write that failed.
    pub(crate) async fn finish(self) -> Result<(), Error> {
        let Self { blocks, failed, thread } = self;
        drop(blocks);
        blocking(move || {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        })
        .await;
        let failed = failed.lock().unwrap_or_else(PoisonError::into_inner).take();
        failed.map_or(Ok(()), Err)
    }
}

impl WriteQueue {
    /// Has a block written, as soon as there is room for it. False if nothing is written any more,
    /// and [`WriteThread::finish`] says why.
    pub(crate) async fn write(&self, index: BlockIndex, block: Block) -> bool {
        self.0.send((index, block)).await.is_ok()
    }
}

fn write_all(
    writer: &Writer,
    mut blocks: Receiver<(BlockIndex, Block)>,
    written: impl Fn(),
) -> Result<(), Error> {
    while let Some((index, block)) = blocks.blocking_recv() {
        writer.write(index, &block)?;
        written();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::model::BLOCK_SIZE;
    use crate::transfer::target::Target;

    fn block() -> Block {
        Block::new(vec![7; BLOCK_SIZE].into())
    }

    #[tokio::test]
    async fn what_is_handed_over_is_written() {
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
        for index in 0..40 {
            assert!(queue.write(BlockIndex(index), block()).await);
        }
        drop(queue);
        thread.finish().await.unwrap();
        assert_eq!(count.load(Ordering::Relaxed), 40);
        target.finish().unwrap();
        assert!(std::fs::read(&path).unwrap().iter().all(|&byte| byte == 7));
    }

    #[tokio::test]
    async fn a_write_that_fails_ends_it() {
        let full = std::path::Path::new("/dev/full");
        let thread = WriteThread::new(Writer::of_file(full, BLOCK_SIZE as u64), || {}).unwrap();
        let queue = thread.queue();
        while queue.write(BlockIndex(0), block()).await {}
        let error = thread.finish().await.unwrap_err().to_string();
        assert!(error.contains("/dev/full") && error.contains("No space"), "{error}");
    }
}
