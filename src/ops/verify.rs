//! `verify`, where a store cannot check itself: every block is read, and compared with its SHA-256;
//! and with a file, if there is one.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use clap::Args;
use futures::stream::{self, BoxStream};
use futures::{StreamExt as _, TryStreamExt as _};
use serde::Serialize;

use super::context::Context;
use super::text::rate;
use super::{Error, Exit, Result, list, table};
use crate::blocking::blocking;
use crate::model::{BLOCK_SIZE_U64, BlockIndex, Digest, Snapshot, SnapshotId};
use crate::store::SharedStore;
use crate::store::repository::{self, Damage, VerifyReport};
use crate::transfer;
use crate::transfer::engine::{Run, transfer_to};
use crate::transfer::journal::NoJournal;
use crate::transfer::sink::{Content, Finished, Sink, Step};
use crate::transfer::source::file::FileSource;
use crate::transfer::source::snapshot::SnapshotSource;

/// Findings that a report has at most; beyond, they are only counted.
const MAX_FINDINGS: usize = 1000;

/// Read everything that snapshots need, and check it
#[derive(Args, Debug)]
#[command(after_help = "\
A repository is checked whole, with everything that its snapshots need. Of EBS every block is read,
which costs what a download costs.

Examples:
  fspfs -s /srv/snaps verify
  fspfs -s ebs: verify snap-0123456789abcdef0 --against disk.img")]
pub(crate) struct VerifyArgs {
    /// The snapshots; all if there are none
    #[arg(value_name = "SNAP")]
    snapshots: Vec<SnapshotId>,
    /// Compare the snapshot with this file or block device
    #[arg(long, value_name = "FILE", requires = "snapshots")]
    against: Option<PathBuf>,
}

/// What was found, and how long it took.
#[derive(Debug, Serialize)]
pub(crate) struct Verified {
    #[serde(flatten)]
    found: Found,
    #[serde(skip)]
    elapsed: Duration,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Found {
    Checked(VerifyReport),
    Read(Report),
}

impl table::Operation for VerifyArgs {
    const NAME: &'static str = "verify";
    const LINE: Option<&'static str> = Some("snap-0123456789abcdef0");
    type Report = Verified;

    async fn run(self, cx: &Context) -> Result<Verified> {
        if self.against.is_some() || cx.house.from.directory().is_err() {
            return self.read_all(cx).await;
        }
        let repository = cx.repository().await?;
        let began = Instant::now();
        let progress = cx.console.progress("Verifying");
        let progress: repository::Progress = Arc::new(move |blocks| progress.advance(blocks));
        let verified = cx.run.unless_stopped(repository.verify(&self.snapshots, progress));
        Ok(Verified { found: Found::Checked(verified.await??), elapsed: began.elapsed() })
    }
}

impl VerifyArgs {
    /// Verifies snapshots by reading them.
    async fn read_all(self, cx: &Context) -> Result<Verified> {
        if self.against.is_some() && self.snapshots.len() > 1 {
            let why = "a file can be compared with one snapshot, and there are several";
            return Err(Error::Refused(why.to_owned()));
        }
        if let Some(file) = &self.against {
            cx.check_place(file)?;
        }
        let store = cx.open().await?;
        let began = Instant::now();
        let run = cx.run_showing("Verifying");
        let mut report = Report::default();
        let verified = async {
            let ids = match &self.snapshots[..] {
                [] => {
                    let all = list::snapshots(&store).await?.into_iter();
                    all.filter(Snapshot::is_readable).map(|snapshot| snapshot.id).collect()
                }
                ids => ids.to_vec(),
            };
            for id in &ids {
                verify(&store, id, self.against.clone(), &run, &mut report).await?;
            }
            Ok::<_, Error>(())
        };
        cx.run.unless_stopped(verified).await??;
        drop(run);
        cx.tell_cost(&store);
        Ok(Verified { found: Found::Read(report), elapsed: began.elapsed() })
    }
}

impl table::Report for Verified {
    fn lines(&self) -> Vec<String> {
        match &self.found {
            Found::Checked(report) => verified(report, self.elapsed),
            Found::Read(report) => was_read(report, self.elapsed),
        }
    }

    fn ids(&self) -> Vec<String> {
        self.lines()
    }

    fn exit(&self) -> Exit {
        let intact = match &self.found {
            Found::Checked(report) => report.damage.is_empty(),
            Found::Read(report) => report.wrong == 0,
        };
        if intact { Exit::Done } else { Exit::Failed }
    }
}

/// What a verification found.
fn verified(report: &VerifyReport, elapsed: Duration) -> Vec<String> {
    let mut lines: Vec<String> = report.damage.iter().flat_map(damage).collect();
    let VerifyReport { snapshots, packs, blocks, .. } = report;
    lines.push(format!(
        "Verified {snapshots} snapshots: {blocks} blocks in {packs} packs {}",
        rate(elapsed, report.bytes)
    ));
    lines.push(match report.damage.len() {
        0 => "Everything is intact.".to_owned(),
        n => format!("{n} objects are damaged."),
    });
    lines
}

/// What reading snapshots found.
fn was_read(report: &Report, elapsed: Duration) -> Vec<String> {
    let finding = |f: &Finding| format!("{}: block {}: {}", f.snapshot, f.block, f.problem);
    let mut lines: Vec<String> = report.findings.iter().map(finding).collect();
    let Report { snapshots, blocks, bytes, wrong, .. } = report;
    let rate = rate(elapsed, *bytes);
    lines.push(format!("Verified {snapshots} snapshots: {blocks} blocks {rate}"));
    lines.push(match wrong {
        0 => "Everything is intact.".to_owned(),
        n => format!("{n} blocks are not as they should be."),
    });
    lines
}

fn damage(damage: &Damage) -> Vec<String> {
    let mut lines = vec![format!("{}: {}", damage.object, damage.problem)];
    for (id, lost) in &damage.lost_blocks {
        lines.push(match lost {
            Some(0) => format!("  {id} has lost no block"),
            Some(blocks) => format!("  {id} has lost {blocks} blocks"),
            None => format!("  {id} cannot be read at all"),
        });
    }
    lines
}

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Report {
    /// Snapshots that were read.
    pub(crate) snapshots: u64,
    /// Blocks that were read.
    pub(crate) blocks: u64,
    /// Bytes of them.
    pub(crate) bytes: u64,
    /// What is not as it should be.
    pub(crate) findings: Vec<Finding>,
    /// How many findings there were.
    pub(crate) wrong: u64,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// The snapshot.
    pub(crate) snapshot: SnapshotId,
    /// The block.
    pub(crate) block: BlockIndex,
    /// What is wrong with it.
    pub(crate) problem: String,
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
pub(crate) async fn verify(
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
