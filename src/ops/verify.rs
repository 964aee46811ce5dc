//! `verify`, where a store cannot check itself: every block is read, and compared with its SHA-256;
//! and with a file, if there is one.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use clap::Args;
use futures::stream::{self, BoxStream};
use futures::{StreamExt as _, TryStreamExt as _};
use roaring::RoaringBitmap;
use serde::Serialize;

use super::check::is_block;
use super::context::Context;
use super::reference::Reference;
use super::text::rate;
use super::{Error, Exit, Result, list, readable, table};
use crate::blocking::blocking;
use crate::model::{BLOCK_SIZE_U64, Block, BlockIndex, Snapshot, SnapshotId};
use crate::store::SharedStore;
use crate::store::listing::{Blocks, Listing};
use crate::store::repository::{self, Checked, Damage, VerifyReport};
use crate::transfer;
use crate::transfer::engine::{Run, transfer_to};
use crate::transfer::journal::NoJournal;
use crate::transfer::sink::{Sink, Step};
use crate::transfer::source::Source;
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
    /// The snapshots, named as for `download`; all if there are none
    #[arg(value_name = "SNAP")]
    snapshots: Vec<Reference>,
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
        let ids = cx.run.unless_stopped(self.ids(cx)).await??;
        if self.against.is_some() || !cx.house.from.is_repository() {
            return self.read_all(cx, ids).await;
        }
        let repository = cx.repository().await?;
        let began = Instant::now();
        let run = cx.run_showing("Verifying", &cx.house.from);
        let progress = Arc::clone(&run.progress);
        let progress: repository::Progress = Arc::new(move |checked| match checked {
            Checked::All(blocks) => progress.total(blocks),
            Checked::Known(blocks) => progress.advance(blocks),
            Checked::Block(place, failed) => {
                progress.block(&place, 1, failed.map(|error| error as &dyn fmt::Display));
                progress.advance(1);
            }
        });
        let verified = cx.run.unless_stopped(repository.verify(&ids, progress)).await;
        drop(run);
        let verified = Verified { found: Found::Checked(verified??), elapsed: began.elapsed() };
        verified.tell_wrong(cx);
        Ok(verified)
    }
}

impl VerifyArgs {
    /// The snapshots that were named.
    async fn ids(&self, cx: &Context) -> Result<Vec<SnapshotId>> {
        let mut ids = Vec::with_capacity(self.snapshots.len());
        for reference in &self.snapshots {
            let id = reference.id(cx, &cx.open().await?).await;
            ids.push(id.map_err(|error| error.doing(format!("verify {reference}")))?);
        }
        Ok(ids)
    }

    /// Verifies snapshots by reading them.
    async fn read_all(self, cx: &Context, ids: Vec<SnapshotId>) -> Result<Verified> {
        if self.against.is_some() && ids.len() > 1 {
            let why = "a file can be compared with one snapshot, and there are several";
            return Err(Error::Refused(why.to_owned()));
        }
        if let Some(file) = &self.against {
            cx.check_place(file)?;
        }
        let store = cx.open().await?;
        let began = Instant::now();
        let run = cx.run_showing("Verifying", &cx.house.from);
        let mut report = Report::default();
        let verified = async {
            let mut snapshots = Vec::with_capacity(ids.len());
            for id in &ids {
                snapshots.push(readable(&store, id).await?);
            }
            if snapshots.is_empty() {
                snapshots = list::snapshots(&store).await?;
                snapshots.retain(Snapshot::is_readable);
            }
            let blocks =
                snapshots.iter().map(|snapshot| u64::from(snapshot.volume_size.blocks().0));
            run.progress.total(blocks.sum());
            for snapshot in snapshots {
                verify(&store, snapshot, self.against.clone(), &run, &mut report).await?;
            }
            Ok::<_, Error>(())
        };
        cx.run.unless_stopped(verified).await??;
        drop(run);
        cx.tell_cost(&store);
        let verified = Verified { found: Found::Read(report), elapsed: began.elapsed() };
        verified.tell_wrong(cx);
        Ok(verified)
    }
}

impl Verified {
    /// What is wrong, in words.
    fn wrong(&self) -> Vec<String> {
        let finding = |f: &Finding| format!("{}: block {}: {}", f.snapshot, f.block, f.problem);
        match &self.found {
            Found::Checked(report) => report.damage.iter().flat_map(damage).collect(),
            Found::Read(report) => report.findings.iter().map(finding).collect(),
        }
    }

    /// Says it, where the report has nothing but ids.
    fn tell_wrong(&self, cx: &Context) {
        if cx.screen.quiet && !cx.screen.json {
            self.wrong().iter().for_each(|line| cx.warn(line));
        }
    }
}

impl table::Report for Verified {
    fn lines(&self) -> Vec<String> {
        let mut lines = self.wrong();
        lines.extend(match &self.found {
            Found::Checked(report) => verified(report, self.elapsed),
            Found::Read(report) => was_read(report, self.elapsed),
        });
        lines
    }

    /// The snapshots that have lost something.
    fn ids(&self) -> Vec<String> {
        let ids: BTreeSet<_> = match &self.found {
            Found::Checked(report) => {
                report.damage.iter().flat_map(|damage| damage.lost_blocks.keys()).collect()
            }
            Found::Read(report) => report.findings.iter().map(|found| &found.snapshot).collect(),
        };
        ids.into_iter().map(SnapshotId::to_string).collect()
    }

    fn exit(&self) -> Exit {
        let intact = match &self.found {
            Found::Checked(report) => report.damage.is_empty(),
            Found::Read(report) => report.wrong == 0,
        };
        if intact { Exit::Done } else { Exit::Failed }
    }
}

/// What a verification found, in all.
fn verified(report: &VerifyReport, elapsed: Duration) -> [String; 2] {
    let VerifyReport { snapshots, packs, blocks, .. } = report;
    let rate = rate(elapsed, report.bytes);
    let found = match report.damage.len() {
        0 => "Everything is intact.".to_owned(),
        n => format!("{n} objects are damaged."),
    };
    [format!("Verified {snapshots} snapshots: {blocks} blocks in {packs} packs {rate}"), found]
}

/// What reading snapshots found, in all.
fn was_read(report: &Report, elapsed: Duration) -> [String; 2] {
    let Report { snapshots, blocks, bytes, wrong, .. } = report;
    let rate = rate(elapsed, *bytes);
    let found = match wrong {
        0 => "Everything is intact.".to_owned(),
        n => format!("{n} blocks are not as they should be."),
    };
    [format!("Verified {snapshots} snapshots: {blocks} blocks {rate}"), found]
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

/// What a snapshot is compared with.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one of it")]
pub(super) enum Against {
    Nothing,
    File(FileSource),
    /// But for some blocks.
    Snapshot {
        store: SharedStore,
        snapshot: Snapshot,
        listing: tokio::sync::Mutex<Listing<Blocks>>,
        except: RoaringBitmap,
    },
}

impl Against {
    /// Another snapshot, but for some blocks.
    pub(super) fn snapshot(store: SharedStore, snapshot: Snapshot, except: RoaringBitmap) -> Self {
        let listing = Listing::blocks(store.clone(), &snapshot).into();
        Self::Snapshot { store, snapshot, listing, except }
    }

    fn name(&self) -> String {
        match self {
            Self::Nothing => String::new(),
            Self::File(file) => file.path().display().to_string(),
            Self::Snapshot { snapshot, .. } => snapshot.id.to_string(),
        }
    }
}

/// Reads every block of a snapshot. If there is a file, it must be what the snapshot is.
///
/// # Errors
///
/// If the list of its blocks or the file cannot be read at all. A block that is damaged is a finding.
pub(crate) async fn verify(
    store: &SharedStore,
    snapshot: Snapshot,
    against: Option<PathBuf>,
    run: &Run,
    report: &mut Report,
) -> Result<()> {
    let id = &snapshot.id.clone();
    let against = match against {
        Some(path) => {
            let file = blocking(move || FileSource::open(&path)).await?;
            if file.len() != snapshot.image_len() {
                let why =
                    format!("it has {} bytes, and {id} has {}", file.len(), snapshot.image_len());
                return Err(transfer::Error::unsuitable(file.path(), why).into());
            }
            Against::File(file)
        }
        None => Against::Nothing,
    };
    let source = Arc::new(SnapshotSource::new(store.clone(), snapshot));
    compare(source, id, against, run, report).await
}

/// Reads every block of a source, and compares it. What is wrong is said of the snapshot `id`.
///
/// # Errors
///
/// As [`verify`].
pub(super) async fn compare(
    source: Arc<dyn Source>,
    id: &SnapshotId,
    against: Against,
    run: &Run,
    report: &mut Report,
) -> Result<()> {
    let report_so_far = Mutex::new(std::mem::take(report));
    let sink = Arc::new(Check { id: id.clone(), against, report: report_so_far });
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
    against: Against,
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
        let beneath = match &self.against {
            Against::Snapshot { listing, .. } => listing.lock().await.find(index).await?,
            _ => None,
        };
        Ok(Step { beneath, ..Step::new(index..index.next(), true) })
    }

    fn plan_zeros(&self, blocks: Range<BlockIndex>) -> BoxStream<'_, transfer::Result<Step>> {
        // What the other has there has to be zeros.
        let file = match &self.against {
            Against::Nothing => None,
            Against::File(file) => Some(file),
            Against::Snapshot { listing, .. } => {
                let shown = stream::try_unfold(blocks, move |left| async move {
                    let mut listing = listing.lock().await;
                    listing.skip_to(left.start);
                    let found = listing.next_below(left.end).await?;
                    Ok(found.map(|listed| {
                        let blocks = listed.index..listed.index.next();
                        let rest = blocks.end..left.end;
                        (Step { beneath: Some(listed), ..Step::new(blocks, false) }, rest)
                    }))
                });
                return shown.boxed();
            }
        };
        let extents = file.into_iter().flat_map(move |file| file.extents(blocks.clone()));
        let steps = stream::iter(extents).map_ok(|extent| {
            let blocks = (extent.start.0..extent.end.0).map(BlockIndex);
            stream::iter(blocks.map(|index| Ok(Step::new(index..index.next(), false))))
        });
        steps.try_flatten().boxed()
    }

    async fn write(&self, step: Step, block: Block) -> transfer::Result<bool> {
        let index = step.index();
        self.report().blocks += u64::from(step.in_source);
        let is_equal = match &self.against {
            Against::Nothing => true,
            Against::File(file) if index.offset() >= file.len() => true,
            Against::File(file) => file.read(&[(index, None)]).await? == [block],
            Against::Snapshot { except, .. } if except.contains(index.0) => true,
            Against::Snapshot { store, snapshot, .. } => {
                is_block((store, snapshot, step.beneath.as_ref()), &block).await?
            }
        };
        if !is_equal {
            let problem = format!("it differs from {}", self.against.name());
            self.report().add(&self.id, index, problem);
        }
        Ok(false)
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

    async fn finish(&self) -> transfer::Result<Option<Snapshot>> {
        Ok(None)
    }

    async fn abort(&self) {}
}
