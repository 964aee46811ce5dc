//! `verify`, where a store cannot check itself: every block is read, and compared with its SHA-256;
//! and with a file, if there is one.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use futures::stream::{self, BoxStream};
use futures::{StreamExt as _, TryStreamExt as _};
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
    let sink = Arc::new(Check { id: id.clone(), file, report: Mutex::new(std::mem::take(report)) });
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
    report: Mutex<Report>,
}

impl Check {
    fn report(&self) -> MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Sink for Check {
    async fn plan(&self, index: BlockIndex) -> transfer::Result<Step> {
        Ok(Step::plain(index..index.next(), true))
    }

    fn plan_zeros(&self, blocks: Range<BlockIndex>) -> BoxStream<'_, transfer::Result<Step>> {
        // What the file has there has to be zeros.
        let extents = self.file.iter().flat_map(move |file| file.extents(blocks.clone()));
        let steps = stream::iter(extents).map_ok(|extent| {
            let blocks = (extent.start.0..extent.end.0).map(BlockIndex);
            stream::iter(blocks.map(|index| Ok(Step::plain(index..index.next(), false))))
        });
        steps.try_flatten().boxed()
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
