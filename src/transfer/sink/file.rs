//! A file or a device that becomes an image.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::stream::{self, BoxStream, StreamExt as _};

use super::target::{Target, Writer};
use super::{Content, Finished, Result, Sink, Step};
use crate::blocking::blocking;
use crate::model::{BlockIndex, Digest};
use crate::transfer::concurrent_runs;

/// Blocks of a device that are made zero by one step: 64 MiB, so that a slow one is seen to move.
const ZERO_STEP: u32 = 128;

/// A block that takes longer to write than this waits for a disk, which tasks must not: 100 MiB/s.
const SLOW: Duration = Duration::from_millis(5);

/// A file, which gets its name at the end, or a device, which is written in place.
#[derive(Debug)]
pub(crate) struct FileSink {
    target: Mutex<Option<Target>>,
    writer: Writer,
    is_device: bool,
    /// Nobody has written to it before.
    is_fresh: AtomicBool,
    /// A file takes one write at a time anyway.
    writing: tokio::sync::Mutex<()>,
    /// Whoever writes waits for a disk.
    is_slow: AtomicBool,
    written: AtomicU64,
    kept: AtomicU64,
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
        let target = blocking(move || Target::open(&path, len, key.as_deref())).await?;
        let (writer, is_device) = (target.writer(), target.is_device());
        Ok(Self {
            is_fresh: AtomicBool::new(target.is_fresh()),
            target: Mutex::new(Some(target)),
            writer,
            is_device,
            writing: tokio::sync::Mutex::default(),
            is_slow: AtomicBool::new(false),
            written: AtomicU64::new(0),
            kept: AtomicU64::new(0),
        })
    }

    /// Whether something of this kind can be written at all.
    ///
    /// # Errors
    ///
    /// If it is neither a file nor a block device.
    pub(crate) fn check_kind(path: &Path) -> Result<()> {
        Target::check_kind(path)
    }

    /// Whether [`open`](Self::open) would succeed, as far as that shows without a write.
    ///
    /// # Errors
    ///
    /// As of `open`.
    pub(crate) async fn check(path: &Path, len: u64) -> Result<()> {
        let path = path.to_owned();
        blocking(move || Target::check(&path, len)).await
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
        if !self.is_device && !self.is_fresh() {
            let writer = self.writer.clone();
            blocking(move || writer.clear()).await?;
            self.is_fresh.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The file that is not whole.
    pub(crate) fn partial(&self) -> Option<PathBuf> {
        let target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
        target.as_ref().and_then(Target::partial)
    }
}

#[async_trait]
impl Sink for FileSink {
    async fn plan(&self, index: BlockIndex) -> Result<Step> {
        Ok(Step::plain(index..index.next(), true))
    }

    fn plan_zeros(&self, blocks: Range<BlockIndex>) -> BoxStream<'_, Result<Step>> {
        // What nobody has written to a file is a hole.
        let blocks = if self.is_device { blocks } else { BlockIndex::ZERO..BlockIndex::ZERO };
        let starts = (blocks.start.0..blocks.end.0).step_by(ZERO_STEP as usize);
        let steps = starts.map(move |start| {
            let end = start.saturating_add(ZERO_STEP).min(blocks.end.0);
            Ok(Step::plain(BlockIndex(start)..BlockIndex(end), false))
        });
        stream::iter(steps).boxed()
    }

    async fn has_still(&self, index: BlockIndex, digest: Digest) -> Result<bool> {
        let writer = self.writer.clone();
        let found = blocking(move || writer.read(index)).await?;
        Ok(found.is_some_and(|block| block.digest() == digest))
    }

    async fn write(&self, step: Step, content: Content) -> Result<Option<Digest>> {
        let block = match content {
            Content::Done(digest) => {
                self.written.fetch_add(1, Ordering::Relaxed);
                self.kept.fetch_add(1, Ordering::Relaxed);
                return Ok(Some(digest));
            }
            Content::Block(block) => block,
        };
        let (writer, digest, range) = (self.writer.clone(), block.digest(), step.blocks);
        self.written.fetch_add(u64::from(step.in_source), Ordering::Relaxed);
        if block.is_zero() && self.is_device {
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
        Ok(step.in_source.then_some(digest))
    }

    fn parallelism(&self) -> usize {
        concurrent_runs()
    }

    async fn finish(&self) -> Result<Finished> {
        let target = self.target.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(target) = target {
            blocking(move || target.finish()).await?;
        }
        let (blocks, kept) = (&self.written, &self.kept);
        let [blocks, kept] = [blocks, kept].map(|count| count.load(Ordering::Relaxed));
        Ok(Finished { blocks, kept, snapshot: None })
    }

    async fn abort(&self) {
        let target = self.target.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(target) = target {
            blocking(move || target.discard()).await;
        }
    }
}
