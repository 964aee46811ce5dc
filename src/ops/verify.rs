//! `verify`, where a store cannot check itself: every block is read, and compared with its SHA-256;
//! and with a file, if there is one.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use futures::stream::{self, BoxStream, StreamExt as _};
use serde::Serialize;

use super::Result;
use crate::blocking::blocking;
use crate::model::{BLOCK_SIZE_U64, BlockIndex, Digest, SnapshotId};
use crate::store::SharedStore;
use crate::transfer;
use crate::transfer::engine::{Run, transfer_to};
use crate::transfer::journal::NoJournal;
use crate::transfer::sink::{Content, Finished, Sink, Step};
use crate::transfer::source::file::FileSource;
use crate::transfer::source::snapshot::SnapshotSource;

/// Findings that a report has at most; beyond, they are only counted.
const MAX_FINDINGS: usize = 1000;

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Snapshots that were read.
    pub snapshots: u64,
    /// Blocks that were read.
    pub blocks: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// What is not as it should be.
    pub findings: Vec<Finding>,
    /// How many findings there were.
    pub wrong: u64,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// The block.
    pub block: BlockIndex,
    /// What is wrong with it.
    pub problem: String,
}

impl Report {
    fn add(&mut self, snapshot: &SnapshotId, block: BlockIndex, problem: String) {
        self.wrong += 1;
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(Finding { snapshot: snapshot.clone(), block, problem });
        }
    }
}

/// Reads every block of a snapshot. If there is a file, it must be what the snapshot is.
///
/// # Errors
///
/// If the snapshot or the file cannot be read at all. A block that is damaged is a finding.
pub async fn verify(
    store: &SharedStore,
    id: &SnapshotId,
    against: Option<PathBuf>,
    run: &Run,
    report: &mut Report,
) -> Result<()> {
    let snapshot = super::readable(store, id).await?;
    let file = match against {
        Some(path) => {
            let file = blocking(move || FileSource::open(&path)).await?;
            if file.len() != snapshot.image_len() {
                let why =
                    format!("it has {} bytes, and {id} has {}", file.len(), snapshot.image_len());
                return Err(transfer::Error::unsuitable(file.path(), why).into());
            }
            Some(file)
        }
        None => None,
    };
    let source = Arc::new(SnapshotSource::new(store.clone(), snapshot));
    let sink = Arc::new(Check::new(id.clone(), file, std::mem::take(report)));
    let done = transfer_to(source, Arc::clone(&sink) as Arc<dyn Sink>, Arc::new(NoJournal), run);
    let done = done.await;
    *report = std::mem::take(&mut *sink.report());
    done?;
    report.bytes = report.blocks * BLOCK_SIZE_U64;
    report.snapshots += 1;
    Ok(())
}

/// Takes note of what is wrong with the blocks that come, and keeps none.
#[derive(Debug)]
struct Check {
    id: SnapshotId,
    file: Option<FileSource>,
    /// The blocks that the file has, in order.
    in_file: Mutex<FileBlocks>,
    report: Mutex<Report>,
}

impl Check {
    fn new(id: SnapshotId, file: Option<FileSource>, report: Report) -> Self {
        let in_file = Mutex::new(FileBlocks::of(file.as_ref()));
        Self { id, file, in_file, report: Mutex::new(report) }
    }

    fn report(&self) -> MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn step(blocks: Range<BlockIndex>, in_source: bool) -> Step {
        Step { blocks, beneath: None, in_source, is_stale: false, turn: 0 }
    }
}

#[async_trait]
impl Sink for Check {
    async fn plan(&self, index: BlockIndex) -> transfer::Result<Step> {
        Ok(Self::step(index..index.next(), true))
    }

    fn plan_zeros(&self, blocks: Range<BlockIndex>) -> BoxStream<'_, transfer::Result<Step>> {
        let steps = std::iter::from_fn(move || {
            let mut in_file = self.in_file.lock().unwrap_or_else(PoisonError::into_inner);
            let next = in_file.next_within(&blocks).transpose()?;
            Some(next.map(|index| Self::step(index..index.next(), false)))
        });
        stream::iter(steps).boxed()
    }

    async fn write(&self, step: Step, content: Content) -> transfer::Result<Option<Digest>> {
        let index = step.index();
        self.report().blocks += u64::from(step.in_source);
        let (Some(file), Content::Block(block)) = (&self.file, content) else { return Ok(None) };
        if index.offset() < file.len() {
            let theirs = file.read_all(vec![index]).await?;
            if theirs != [block] {
                let problem = format!("it differs from {}", file.path().display());
                self.report().add(&self.id, index, problem);
            }
        }
        Ok(None)
    }

    fn damaged(&self, index: BlockIndex, error: transfer::Error) -> transfer::Result<()> {
        let mut report = self.report();
        report.blocks += 1;
        report.add(&self.id, index, error.to_string());
        Ok(())
    }

    fn parallelism(&self) -> usize {
        1
    }

    async fn finish(&self) -> transfer::Result<Finished> {
        Ok(Finished::default())
    }

    async fn abort(&self) {}
}

/// The blocks of a file that are not holes, ascending.
struct FileBlocks {
    extents: Box<dyn Iterator<Item = transfer::Result<Range<BlockIndex>>> + Send>,
    extent: Range<u32>,
}

impl FileBlocks {
    fn of(file: Option<&FileSource>) -> Self {
        let extents = file.map(FileSource::extents);
        Self { extents: Box::new(extents.into_iter().flatten()), extent: 0..0 }
    }

    /// The next one within a range; the ranges ascend.
    fn next_within(&mut self, range: &Range<BlockIndex>) -> transfer::Result<Option<BlockIndex>> {
        loop {
            self.extent.start = self.extent.start.max(range.start.0);
            if self.extent.is_empty() {
                let Some(extent) = self.extents.next().transpose()? else { return Ok(None) };
                self.extent = extent.start.0..extent.end.0;
            } else if self.extent.start >= range.end.0 {
                return Ok(None);
            } else {
                return Ok(self.extent.next().map(BlockIndex));
            }
        }
    }
}

impl std::fmt::Debug for FileBlocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileBlocks").field("extent", &self.extent).finish_non_exhaustive()
    }
}
