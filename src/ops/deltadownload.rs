//! `deltadownload`: a file or device that holds one snapshot becomes another one.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use jiff::Timestamp;
use roaring::RoaringBitmap;
use serde::{Deserialize, Serialize};

use super::check::{self, Check};
use super::context::Context;
use super::diff::Difference;
use super::download::{check_outside, place};
use super::reference::Reference;
use super::table::{Operation, Report};
use super::text::{rate, tell_kept};
use super::verify::{self, Against};
use super::{Ending, Error, Left, Result, readable};
use crate::arguments::ResumeArgs;
use crate::blocking::blocking;
use crate::model::{BLOCK_SIZE_U64, Block, BlockIndex, Snapshot};
use crate::store::SharedStore;
use crate::store::listing::Listing;
use crate::transfer;
use crate::transfer::engine::{Run, transfer_to};
use crate::transfer::journal::{Ends, Journal, NoJournal, name_of};
use crate::transfer::sink::file::FileSink;
use crate::transfer::source::Source as _;
use crate::transfer::source::delta::DeltaSource;
use crate::transfer::source::file::FileSource;

/// Make of a file or device that holds one snapshot another one
#[derive(Args, Debug)]
#[command(after_help = "\
TARGET holds FIRST, as after `download FIRST TARGET`, and holds SECOND at the end. Only the blocks in
which they differ are read and written, in place. Until that is done TARGET is neither; the same
command ends what was stopped.

Examples:
  fspfs -s ebs: deltadownload snap-0123456789abcdef0 snap-0123456789abcdef1 /dev/sdb
  fspfs -s /srv/snaps deltadownload --check full snap-0123456789abcdef0 latest disk.img

Exit status: 0 done, 1 failed, 2 wrong usage.")]
pub(crate) struct DeltadownloadArgs {
    /// The snapshot that TARGET holds, named as for `download`
    #[arg(value_name = "FIRST")]
    first: Reference,
    /// The snapshot that it is to hold
    #[arg(value_name = "SECOND")]
    second: Reference,
    /// A file or a block device
    #[arg(value_name = "TARGET")]
    path: PathBuf,
    /// How it is looked whether TARGET holds FIRST
    #[arg(long, value_name = "HOW", default_value = "sampled")]
    check: Check,
    #[command(flatten)]
    resume: ResumeArgs,
}

/// What came of it.
#[derive(Debug, Serialize)]
pub(crate) struct Deltadownloaded {
    /// The snapshot that the target holds.
    #[serde(flatten)]
    snapshot: Snapshot,
    #[serde(skip)]
    difference: Difference,
    #[serde(skip)]
    dry_run: bool,
    #[serde(skip)]
    elapsed: Duration,
}

impl Report for Deltadownloaded {
    fn lines(&self) -> Vec<String> {
        let mut lines = vec![self.difference.line()];
        if !self.dry_run {
            let bytes = self.difference.blocks * BLOCK_SIZE_U64;
            lines.push(format!("deltadownload {}", rate(self.elapsed, bytes)));
        }
        lines.extend(self.ids());
        lines
    }

    fn ids(&self) -> Vec<String> {
        vec![self.snapshot.id.to_string()]
    }
}

impl Operation for DeltadownloadArgs {
    const NAME: &'static str = "deltadownload";
    const LINE: Option<&'static str> = Some("snap-0123456789abcdef0 latest /dev/sdb");
    const DRY_RUN: bool = true;
    type Report = Deltadownloaded;

    async fn run(self, cx: &Context) -> Result<Deltadownloaded> {
        let doing = format!("make {} of {} in {}", self.second, self.first, self.path.display());
        self.delta(cx).await.map_err(|error| error.doing(doing))
    }
}

/// What a journal says of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Attempt {
    first: Timestamp,
    second: Timestamp,
    len: u64,
}

impl DeltadownloadArgs {
    async fn delta(self, cx: &Context) -> Result<Deltadownloaded> {
        cx.check_place(&self.path)?;
        let store = cx.open().await?;
        let from = &cx.house.from;
        check_outside(&self.path, from.directory().ok())?;
        let finding = cx.run.unless_stopped(async {
            let first = readable(&store, &self.first.id(cx, &store).await?).await?;
            let second = readable(&store, &self.second.id(cx, &store).await?).await?;
            let mut changed = RoaringBitmap::new();
            let note = |index: BlockIndex, _| {
                changed.insert(index.0);
            };
            let difference = Difference::between(&store, &first, &second, note).await?;
            Ok::<_, Error>((first, second, changed, difference))
        });
        let (first, second, changed, difference) = finding.await??;
        let sink = FileSink::open_in_place(&self.path, second.image_len()).await?;
        let resume = cx.resume(from, &store, &self.resume)?;
        let real = place(&self.path).unwrap_or_else(|| self.path.clone());
        let ends = Ends {
            operation: Self::NAME.to_owned(),
            from: format!("{} {} {}", resume.store, first.id, second.id),
            to: name_of(&real),
        };
        let attempt =
            Attempt { first: first.start_time, second: second.start_time, len: second.image_len() };
        let found = match cx.dry_run {
            true => None,
            false => super::journal(&resume, ends).await?,
        };
        let goes_on = !self.resume.restart
            && found.as_ref().is_some_and(|(_, found)| found.as_ref() == Some(&attempt));
        let in_both = changed.range_cardinality(..DeltaSource::in_both(&first, &second).0);
        let blocks = DeltaSource::blocks(&first, &second, in_both);
        self.check_len(&first, &second, goes_on).await?;
        self.check(cx, &store, &first, &second, changed).await?;
        if cx.dry_run {
            let (path, blocks) = (self.path.display(), difference.blocks);
            cx.note(format_args!("{blocks} blocks of {path} would be written"));
            let elapsed = Duration::ZERO;
            return Ok(Deltadownloaded { snapshot: second, difference, dry_run: true, elapsed });
        }
        let journal: Arc<dyn Journal> = match found {
            Some((mut journal, _)) => {
                if !goes_on {
                    journal.begin(&attempt);
                }
                Arc::new(journal)
            }
            None => Arc::new(NoJournal),
        };
        let run = cx.run_showing("Downloading", self.path.display());
        let began = Instant::now();
        run.progress.total(blocks);
        let ending =
            Ending { journal: Arc::clone(&journal), left: Left::Device(self.path.clone()) };
        let source = Arc::new(DeltaSource::new(store.clone(), first.clone(), second.clone()));
        let finished = transfer_to(source, Arc::new(sink), journal, &run).await;
        let finished = finished.map_err(|error| match error.could_go_on() {
            true => ending.explain(error),
            false => {
                let (path, first, second) = (self.path.display(), &first.id, &second.id);
                cx.warn(format_args!(
                    "{path} is neither {first} nor {second}: the same command makes {second} of it"
                ));
                error.into()
            }
        })?;
        let elapsed = began.elapsed();
        drop(run);
        tell_kept(cx, finished.kept, "downloaded");
        cx.tell_cost(&store);
        Ok(Deltadownloaded { snapshot: second, difference, dry_run: false, elapsed })
    }

    /// Whether a file is as long as the first snapshot, or as an earlier run may have left it.
    async fn check_len(&self, first: &Snapshot, second: &Snapshot, goes_on: bool) -> Result<()> {
        let path = self.path.clone();
        let file = blocking(move || FileSource::open(&path)).await?;
        let (has, len) = (file.len(), first.image_len());
        let is_longer = has > len && file.times().is_none();
        let is_between = goes_on && has <= len.max(second.image_len());
        if self.check == Check::None || has == len || is_longer || is_between {
            return Ok(());
        }
        // An earlier run that has ended.
        if has == second.image_len() {
            return Ok(());
        }
        let why = format!("it has {has} bytes, and {} has {len}", first.id);
        Err(transfer::Error::unsuitable(&self.path, why).into())
    }

    /// Whether the target holds the first snapshot, but for blocks that are written anyway.
    async fn check(
        &self,
        cx: &Context,
        store: &SharedStore,
        first: &Snapshot,
        second: &Snapshot,
        changed: RoaringBitmap,
    ) -> Result<()> {
        let differs = match self.check {
            Check::None => None,
            Check::Sampled => {
                let sampled = self.differs_sampled(store, first, second, &changed);
                let (differs, compared) = cx.run.unless_stopped(sampled).await??;
                if differs.is_none() {
                    let (path, id) = (self.path.display(), &first.id);
                    cx.note(format_args!(
                        "{compared} blocks of {path} were compared with {id}, and are equal"
                    ));
                }
                differs
            }
            Check::Full => {
                cx.note(format_args!(
                    "all of {} is compared with {}",
                    self.path.display(),
                    first.id
                ));
                let run = cx.run_showing("Comparing", self.path.display());
                self.differs(store, first, changed, &run).await?
            }
        };
        match differs {
            None => Ok(()),
            Some(index) => {
                let why = format!(
                    "it does not hold {}: block {index} differs; --check none writes to it all the same",
                    first.id
                );
                Err(transfer::Error::unsuitable(&self.path, why).into())
            }
        }
    }

    /// A block that differs, of some that are chosen at random; and how many were to be compared.
    async fn differs_sampled(
        &self,
        store: &SharedStore,
        first: &Snapshot,
        second: &Snapshot,
        changed: &RoaringBitmap,
    ) -> Result<(Option<BlockIndex>, usize)> {
        let path = self.path.clone();
        let file = blocking(move || FileSource::open(&path)).await?;
        let end = first.volume_size.min(second.volume_size).blocks();
        let chosen = check::sample(store, first).await?;
        let mut chosen: Vec<_> = chosen.into_iter().map(|listed| listed.index).collect();
        // Holes too: something else may be there.
        chosen.extend(check::random_indexes(end));
        chosen.retain(|index| {
            *index < end && !changed.contains(index.0) && index.offset() < file.len()
        });
        chosen.sort_unstable();
        chosen.dedup();
        let compared = chosen.len();
        let mut listing = Listing::blocks(store.clone(), first);
        for index in chosen {
            let listed = listing.find(index).await?;
            let theirs = file.read(&[(index, None)]).await?.pop().unwrap_or(Block::Zero);
            if !check::is_block((store, first, listed.as_ref()), &theirs).await? {
                return Ok((Some(index), compared));
            }
        }
        Ok((None, compared))
    }

    /// The first block that differs.
    async fn differs(
        &self,
        store: &SharedStore,
        first: &Snapshot,
        changed: RoaringBitmap,
        run: &Run,
    ) -> Result<Option<BlockIndex>> {
        let path = self.path.clone();
        let file = blocking(move || FileSource::open(&path)).await?;
        run.progress.total(file.volume_size().blocks().0.into());
        let against = Against::snapshot(store.clone(), first.clone(), changed);
        let mut report = verify::Report::default();
        verify::compare(Arc::new(file), &first.id, against, run, &mut report).await?;
        Ok(report.findings.iter().map(|finding| finding.block).min())
    }
}
