//! A file or a device that becomes an image.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::stream::{self, BoxStream, StreamExt as _};

use super::target::{Target, Writer};
use super::{Result, Sink, Step};
use crate::blocking::blocking;
use crate::model::{Block, BlockIndex, Digest, Snapshot};
use crate::transfer::concurrent_runs;

/// Blocks that are made zero by one step: 64 MiB, so that a slow one is seen to move.
const ZERO_STEP: u32 = 128;

/// A block that takes longer to write than this waits for a disk, which tasks must not: 100 MiB/s.
const SLOW: Duration = Duration::from_millis(5);

/// A file, which gets its name at the end, or a device or file that is written in place.
#[derive(Debug)]
pub(crate) struct FileSink {
    target: Mutex<Option<Target>>,
    writer: Writer,
    /// Nobody has written to it before.
    is_fresh: AtomicBool,
    /// A file takes one write at a time anyway.
    writing: tokio::sync::Mutex<()>,
    /// Whoever writes waits for a disk.
    is_slow: AtomicBool,
}

impl FileSink {
    /// Opens the place for an image of `len` bytes. A file that is not whole has `key` in its name, if there is
    /// one, and a later run finds it.
    ///
    /// # Errors
    ///
    /// If it is a directory, a device that is too small or in use, or cannot be written.
    pub(crate) async fn open(path: &Path, len: u64, key: Option<String>) -> Result<Self> {
        let path = path.to_owned();
        Ok(Self::over(blocking(move || Target::open(&path, len, key.as_deref())).await?))
    }

    /// Opens a file or device that holds an image, which is changed in place until it has `len` bytes.
    ///
    /// # Errors
    ///
    /// As of [`open`](Self::open), and if there is nothing.
    pub(crate) async fn open_in_place(path: &Path, len: u64) -> Result<Self> {
        let path = path.to_owned();
        Ok(Self::over(blocking(move || Target::open_in_place(&path, len)).await?))
    }

    fn over(target: Target) -> Self {
        Self {
            writer: target.writer.clone(),
            is_fresh: AtomicBool::new(target.is_fresh),
            target: Mutex::new(Some(target)),
            writing: tokio::sync::Mutex::default(),
            is_slow: AtomicBool::new(false),
        }
    }

    /// Whether nobody has written to it before.
    pub(crate) fn is_fresh(&self) -> bool {
        self.is_fresh.load(Ordering::Relaxed)
    }

    /// Removes what an earlier run has left in a file.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub(crate) async fn clear(&self) -> Result<()> {
        if !self.writer.in_place && !self.is_fresh() {
            let writer = self.writer.clone();
            blocking(move || writer.clear()).await?;
            self.is_fresh.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The file that is not whole.
    pub(crate) fn partial(&self) -> Option<PathBuf> {
        let target = self.target();
        let (staged, _) = target.as_ref()?.staged.as_ref()?;
        Some(staged.path().to_owned())
    }

    fn target(&self) -> MutexGuard<'_, Option<Target>> {
        self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Sink for FileSink {
    fn plan_zeros(&self, blocks: Range<BlockIndex>) -> BoxStream<'_, Result<Step>> {
        // What nobody has written to a file is a hole.
        if !self.writer.in_place {
            return stream::empty().boxed();
        }
        let starts = (blocks.start.0..blocks.end.0).step_by(ZERO_STEP as usize);
        let steps = starts.map(move |start| {
            let end = start.saturating_add(ZERO_STEP).min(blocks.end.0);
            Ok(Step::new(BlockIndex(start)..BlockIndex(end), false))
        });
        stream::iter(steps).boxed()
    }

    async fn has_still(&self, index: BlockIndex, digest: Digest) -> Result<bool> {
        let writer = self.writer.clone();
        let found = blocking(move || writer.read(index)).await?;
        Ok(found.is_some_and(|block| block.digest() == digest))
    }

    async fn write(&self, step: Step, block: Block) -> Result<bool> {
        let (writer, range) = (self.writer.clone(), step.blocks);
        if block.is_zero() && self.writer.in_place {
            blocking(move || writer.zero(range.start.offset(), range.end.offset())).await?;
        } else if !block.is_zero() || !self.is_fresh() {
            let _alone = self.writing.lock().await;
            if self.is_slow.load(Ordering::Relaxed) {
                blocking(move || writer.write(range.start, &block)).await?;
            } else {
                // At once, since the block is in the cache of this processor.
                let began = Instant::now();
                writer.write(range.start, &block)?;
                self.is_slow.store(began.elapsed() > SLOW, Ordering::Relaxed);
            }
        }
        Ok(step.in_source)
    }

    fn parallelism(&self) -> usize {
        concurrent_runs()
    }

    async fn finish(&self) -> Result<Option<Snapshot>> {
        let target = self.target().take();
        if let Some(target) = target {
            blocking(move || target.finish()).await?;
        }
        Ok(None)
    }

    async fn abort(&self) {
        let target = self.target().take();
        if let Some(target) = target {
            blocking(move || target.discard()).await;
        }
    }
}
