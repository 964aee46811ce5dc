//! `sync`: what was changed between two snapshots is brought to a clone of the first.

use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use jiff::Timestamp;
use roaring::RoaringBitmap;
use serde::{Deserialize, Serialize};

use super::begin::{Begin, Made};
use super::check::{Check, differ_sampled};
use super::context::{Context, place_of};
use super::copy::carried;
use super::destination::{LabelArgs, ToArgs, ZerosArgs, completed, open, tell_pending};
use super::diff::Difference;
use super::reference::Reference;
use super::table::{Operation, Report};
use super::text::{rate, shortened};
use super::verify::{self, Against};
use super::{Error, Result, readable};
use crate::arguments::ResumeArgs;
use crate::model::{BLOCK_SIZE_U64, ORIGIN_TAG, Snapshot, SnapshotId};
use crate::shown::one_line;
use crate::store::{SharedStore, StartRequest, StoreUrl};
use crate::transfer::engine::Run;
use crate::transfer::journal::Ends;
use crate::transfer::source::delta::DeltaSource;
use crate::transfer::source::snapshot::SnapshotSource;

/// Bring what was changed between two snapshots to a clone of the first
#[derive(Args, Debug)]
#[command(after_help = "\
CLONE is a copy of FIRST, in this store, another one, or another region. The snapshot that is made is
a child of it, and reads as SECOND does. Only the blocks that differ between FIRST and SECOND are
read and stored. Whether CLONE is one is looked at before.

Examples:
  fspfs -s ebs: sync snap-0123456789abcdef0 snap-0123456789abcdef1 snap-0123456789abcdef2 -d us-west-2
  fspfs -s ebs: sync --to /srv/snaps snap-0123456789abcdef0 snap-0123456789abcdef1 name:web

What is stopped goes on where it was when the same command is given again.
Exit status: 0 done, 1 failed, 2 wrong usage.")]
pub(crate) struct SyncArgs {
    /// The earlier snapshot, named as for `download`
    #[arg(value_name = "FIRST")]
    first: Reference,
    /// The later snapshot
    #[arg(value_name = "SECOND")]
    second: Reference,
    /// The copy of the earlier snapshot
    #[arg(value_name = "CLONE")]
    base: Reference,
    #[command(flatten)]
    to: ToArgs,
    #[command(flatten)]
    label: LabelArgs,
    /// How it is looked whether CLONE is a copy of FIRST
    #[arg(long, value_name = "HOW", default_value = "sampled")]
    check: Check,
    /// Do not look whether CLONE is a copy of FIRST
    #[arg(long, conflicts_with = "check")]
    force_base: bool,
    #[command(flatten)]
    zeros: ZerosArgs,
    /// Bring what is encrypted to a clone that is not
    #[arg(long)]
    unencrypted: bool,
    /// Wait until the store says that the snapshot is completed
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    resume: ResumeArgs,
}

/// What came of it.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Synced {
    /// The snapshot that was made.
    Done {
        #[serde(flatten)]
        snapshot: Box<Snapshot>,
        #[serde(skip)]
        difference: Difference,
        /// Blocks that were put.
        put: u64,
        #[serde(skip)]
        elapsed: Duration,
    },
    /// What would be brought.
    DryRun {
        #[serde(flatten)]
        difference: Difference,
        clone: SnapshotId,
        to: String,
    },
}

impl Report for Synced {
    fn lines(&self) -> Vec<String> {
        match self {
            Self::Done { snapshot, difference, put, elapsed } => vec![
                difference.line(),
                format!("sync {}", rate(*elapsed, put * BLOCK_SIZE_U64)),
                snapshot.id.to_string(),
            ],
            Self::DryRun { difference, .. } => vec![difference.line()],
        }
    }

    fn ids(&self) -> Vec<String> {
        match self {
            Self::Done { snapshot, .. } => vec![snapshot.id.to_string()],
            Self::DryRun { .. } => Vec::new(),
        }
    }
}

impl Operation for SyncArgs {
    const NAME: &'static str = "sync";
    const LINE: Option<&'static str> = Some("snap-0a1 latest snap-0a2 --to /srv/other");
    const DRY_RUN: bool = true;
    type Report = Synced;

    async fn run(self, cx: &Context) -> Result<Synced> {
        let doing = format!("sync {} to {}", self.second, self.base);
        let syncing = async {
            let elsewhere = self.to.elsewhere(cx)?;
            let opening = Sync::open(&self, cx, elsewhere);
            let sync = cx.run.unless_stopped(opening).await??;
            sync.check(cx).await?;
            sync.run(cx).await
        };
        syncing.await.map_err(|error: Error| error.doing(doing))
    }
}

/// What tells whether the snapshots are the same: others may have their ids, in a repository that was made anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Ids {
    first: (SnapshotId, Timestamp),
    second: (SnapshotId, Timestamp),
    base: (SnapshotId, Timestamp),
}

/// What is about to be brought.
#[derive(Debug)]
struct Sync<'a> {
    args: &'a SyncArgs,
    from: SharedStore,
    first: Snapshot,
    second: Snapshot,
    /// Where the clone is.
    to: SharedStore,
    elsewhere: Option<StoreUrl>,
    base: Snapshot,
}

impl<'a> Sync<'a> {
    async fn open(
        args: &'a SyncArgs,
        cx: &Context,
        elsewhere: Option<StoreUrl>,
    ) -> Result<Sync<'a>> {
        let from = cx.open().await?;
        let first = readable(&from, &args.first.id(cx, &from).await?).await?;
        let second = readable(&from, &args.second.id(cx, &from).await?).await?;
        let to = open(cx, elsewhere.as_ref()).await?;
        let base = readable(&to, &args.base.id(cx, &to).await?).await?;
        let refused = |why: String| Err(Error::Refused(why));
        if second.volume_size < base.volume_size {
            return refused(format!(
                "{} has {}, and a child of {} cannot be smaller than its {}",
                second.id, second.volume_size, base.id, base.volume_size
            ));
        }
        if second.encrypted && !base.encrypted && !args.unencrypted {
            return refused(format!(
                "{} is encrypted, and {} is not: --unencrypted brings it there in the clear",
                second.id, base.id
            ));
        }
        Ok(Sync { args, from, first, second, to, elsewhere, base })
    }

    /// Looks whether the clone is one.
    async fn check(&self, cx: &Context) -> Result<()> {
        if self.args.force_base || self.args.check == Check::None {
            return Ok(());
        }
        let (first, base) = (&self.first, &self.base);
        let no_clone = |why: String| {
            let why = format!("{} is no copy of {}: {why}", base.id, first.id);
            Err(Error::Refused(format!("{why}; --force-base takes it for one")))
        };
        if first.volume_size != base.volume_size {
            return no_clone(format!("it has {}, not {}", base.volume_size, first.volume_size));
        }
        let digests = (first.content_digest, base.content_digest);
        if let (Some(one), Some(other)) = digests
            && one != other
        {
            return no_clone("their contents have different digests".to_owned());
        }
        let sampled = differ_sampled((&self.from, first), (&self.to, base));
        let (differs, compared) = cx.run.unless_stopped(sampled).await??;
        if let Some(index) = differs {
            return no_clone(format!("block {index} differs"));
        }
        if self.args.check == Check::Sampled {
            let origin = base.tags.get(ORIGIN_TAG);
            let is_recorded = base.id == first.id
                || origin.is_some_and(|id| id == first.id.as_str())
                || (origin.is_some() && origin == first.tags.get(ORIGIN_TAG));
            match origin {
                _ if is_recorded => {}
                // Few blocks that differ are hardly met at random.
                Some(origin) => {
                    let why = format!("it says that it is one of {}", one_line(origin));
                    return no_clone(format!("{why}; --check full compares all of it"));
                }
                None => cx.note(format_args!(
                    "{} does not say what it is a copy of: {compared} blocks of it and {} were compared, and are equal",
                    base.id, first.id
                )),
            }
            return Ok(());
        }
        if digests.0.is_some() && digests.0 == digests.1 {
            return Ok(());
        }
        let mut report = verify::Report::default();
        let run = cx.run_showing("Comparing", &base.id);
        run.progress.total(first.volume_size.blocks().0.into());
        let against = Against::snapshot(Arc::clone(&self.to), base.clone(), RoaringBitmap::new());
        let source = Arc::new(SnapshotSource::new(Arc::clone(&self.from), first.clone()));
        let compared = verify::compare(source, &first.id, against, &run, &mut report);
        cx.run.unless_stopped(compared).await??;
        match report.findings.first() {
            Some(finding) => no_clone(format!("block {}: {}", finding.block, finding.problem)),
            None => Ok(()),
        }
    }

    async fn run(self, cx: &Context) -> Result<Synced> {
        let began = Instant::now();
        let (mut changed, end) = (0, DeltaSource::in_both(&self.first, &self.second));
        let count = |index, _| changed += u64::from(index < end);
        let counting = Difference::between(&self.from, &self.first, &self.second, count);
        let difference = cx.run.unless_stopped(counting).await??;
        if cx.dry_run {
            let to = self.elsewhere.as_ref().unwrap_or(&cx.house.from).to_string();
            let clone = self.base.id;
            cx.note(format_args!(
                "{} blocks would be brought to a child of {clone} in {to}",
                difference.blocks
            ));
            return Ok(Synced::DryRun { difference, clone, to });
        }
        let to = place_of(self.elsewhere.as_ref().unwrap_or(&cx.house.from), &self.to)?;
        let run = cx.run_showing("Syncing", to);
        run.progress.total(DeltaSource::blocks(&self.first, &self.second, changed));
        let made = self.make(cx, &run).await?;
        drop(run);
        made.tell(cx, None, "brought");
        let Made { snapshot, blocks, .. } = made;
        cx.tell_cost(&self.from);
        if !Arc::ptr_eq(&self.from, &self.to) {
            cx.tell_cost(&self.to);
        }
        let snapshot = match self.args.wait {
            true => completed(cx, &self.to, snapshot).await?,
            false => snapshot,
        };
        tell_pending(cx, &snapshot);
        let (snapshot, elapsed) = (Box::new(snapshot), began.elapsed());
        Ok(Synced::Done { snapshot, difference, put: blocks, elapsed })
    }

    async fn make(&self, cx: &Context, run: &Run) -> Result<Made> {
        let Self { args, first, second, base, .. } = self;
        let from = cx.resume(&cx.house.from, &self.from, &args.resume)?.store;
        let url = self.elsewhere.as_ref().unwrap_or(&cx.house.from);
        let resume = cx.resume(url, &self.to, &args.resume)?;
        let source = DeltaSource::new(Arc::clone(&self.from), first.clone(), second.clone());
        let mut tags = carried(second);
        tags.extend(args.label.tags());
        let request = StartRequest {
            tags,
            description: match &args.label.description {
                Some(description) => description.clone(),
                None => shortened(&second.description),
            },
            volume_id: second.volume_id.clone(),
            origin: Some(shortened(&format!("{from} {}", second.id))),
            parent: Some(base.id.clone()),
            ..StartRequest::new(second.volume_size)
        };
        let identity = |snapshot: &Snapshot| (snapshot.id.clone(), snapshot.start_time);
        let begin = Begin {
            source: Arc::new(source),
            is_delta: true,
            store: Arc::clone(&self.to),
            elsewhere: self.elsewhere.clone(),
            request,
            zeros: args.zeros.zeros(),
            ends: Ends {
                operation: SyncArgs::NAME.to_owned(),
                from: format!("{from} {} {}", first.id, second.id),
                to: format!("{} {}", resume.store, base.id),
            },
            resume,
            as_it_was: Ids {
                first: identity(first),
                second: identity(second),
                base: identity(base),
            },
            what: "a snapshot",
        };
        begin.run(run).await
    }
}
