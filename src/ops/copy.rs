//! `copy`: a snapshot becomes one of another store.

use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::begin::{Begin, Made};
use super::context::Context;
use super::list::block_count;
use super::table::{Operation, Report};
use super::text::{contains, rate, tell_kept};
use super::{Error, Result};
use crate::arguments::{EncryptedHoles, ResumeArgs, values};
use crate::model::{
    BLOCK_SIZE_U64, MAX_DESCRIPTION_CHARS, NAME_TAG, ORIGIN_TAG, Snapshot, SnapshotId,
    SnapshotState, Tags,
};
use crate::store::ebs::EbsUrl;
use crate::store::page::list_all;
use crate::store::{self, ErrorKind, Filter, SharedStore, StartRequest, StoreOptions, StoreUrl};
use crate::transfer::engine::Run;
use crate::transfer::journal::Ends;
use crate::transfer::sink::snapshot::Zeros;
use crate::transfer::source::snapshot::SnapshotSource;

/// How long to wait before the store is asked whether it is done, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(15);

/// Copy a snapshot to another store
#[derive(Args, Debug)]
#[command(after_help = "\
The copy has the size, the tags and the description of the snapshot. The tag fspfs:origin has its id.
If the snapshot has a parent that was copied there before, the copy is a child of that copy, and only
blocks that differ are stored.

Examples:
  fspfs -s ebs://us-east-1 copy snap-0123456789abcdef0 --to /srv/snaps
  fspfs -s /srv/snaps copy snap-0123456789abcdef0 --to ebs://work@eu-central-1 --wait
  fspfs -s ebs: copy snap-0123456789abcdef0 -d us-west-2

What is stopped goes on where it was when the same command is given again.
Exit status: 0 done, 1 failed, 2 wrong usage.")]
pub(crate) struct CopyArgs {
    /// The snapshot
    #[arg(value_name = "SNAP")]
    snapshot: SnapshotId,
    /// The store that it is copied to; by default, the one that it is in
    #[arg(long, value_name = "STORE")]
    to: Option<StoreUrl>,
    /// The region that it is copied to, with the account and the endpoints of -s; for `ebs:`
    #[arg(short, long, value_name = "REGION", value_parser = region, conflicts_with = "to")]
    destination: Option<String>,
    /// The tag Name
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// A tag, beside those of the snapshot or in the place of one; can be given several times
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = values::tag)]
    tags: Vec<(String, String)>,
    /// The description; by default, that of the snapshot
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
    /// Store blocks of zeros too, where the snapshot has no hole
    #[arg(long, visible_alias = "full_copy")]
    full_copy: bool,
    /// Ask the store to encrypt the copy; that of an encrypted snapshot is anyway
    #[arg(long)]
    encrypted: bool,
    /// Do not ask the store to encrypt it
    #[arg(long, conflicts_with_all = ["encrypted", "kms_key_id"])]
    unencrypted: bool,
    /// The key to encrypt it with
    #[arg(long, value_name = "KEY")]
    kms_key_id: Option<String>,
    /// What becomes of the holes of an encrypted copy
    #[arg(long, value_name = "HOW", default_value = "write")]
    encrypted_holes: EncryptedHoles,
    /// Wait until the store says that the copy is completed
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    resume: ResumeArgs,
}

fn region(text: &str) -> std::result::Result<String, String> {
    let url: EbsUrl = format!("ebs://{text}").parse().map_err(|_| "it is not a region")?;
    let named = EbsUrl { region: Some(text.to_owned()), ..EbsUrl::default() };
    if url == named { Ok(text.to_owned()) } else { Err("it is not a region".to_owned()) }
}

/// What came of it.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Copied {
    /// The copy.
    Done {
        #[serde(flatten)]
        snapshot: Box<Snapshot>,
        #[serde(skip)]
        origin: Counted,
        /// Blocks that were put.
        #[serde(skip)]
        put: u64,
        #[serde(skip)]
        elapsed: Duration,
    },
    /// What would be copied.
    DryRun {
        #[serde(flatten)]
        origin: Counted,
        to: String,
        parent: Option<SnapshotId>,
    },
}

/// A snapshot whose blocks were counted.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Counted {
    id: SnapshotId,
    blocks: u64,
    bytes: u64,
    #[serde(skip)]
    elapsed: Duration,
}

impl Counted {
    async fn of(store: &SharedStore, id: &SnapshotId) -> Result<Self> {
        let began = Instant::now();
        let blocks = block_count(store, id).await?;
        let (id, bytes) = (id.clone(), blocks * BLOCK_SIZE_U64);
        Ok(Self { id, blocks, bytes, elapsed: began.elapsed() })
    }

    fn line(&self) -> String {
        contains(&self.id, self.blocks, self.elapsed.as_secs_f64())
    }
}

impl Report for Copied {
    fn lines(&self) -> Vec<String> {
        match self {
            Self::Done { snapshot, origin, put, elapsed } => vec![
                origin.line(),
                format!("copy {}", rate(*elapsed, put * BLOCK_SIZE_U64)),
                snapshot.id.to_string(),
            ],
            Self::DryRun { origin, .. } => vec![origin.line(), origin.id.to_string()],
        }
    }

    fn ids(&self) -> Vec<String> {
        match self {
            Self::Done { snapshot, .. } => vec![snapshot.id.to_string()],
            Self::DryRun { origin, .. } => vec![origin.id.to_string()],
        }
    }
}

impl Operation for CopyArgs {
    const NAME: &'static str = "copy";
    const LINE: Option<&'static str> = Some("snap-0123456789abcdef0 --to /srv/other");
    const DRY_RUN: bool = true;
    type Report = Copied;

    async fn run(self, cx: &Context) -> Result<Copied> {
        let doing = format!("copy {}", self.snapshot);
        let elsewhere = self.elsewhere(cx).map_err(|error| error.doing(doing))?;
        let to = elsewhere.as_ref().unwrap_or(&cx.house.from);
        let doing = format!("copy {} to {to}", self.snapshot);
        let copying = async {
            let copy = Copy::open(&self, cx, elsewhere.clone()).await?;
            let origin = copy.count(cx).await?;
            if cx.dry_run {
                return Ok((copy.would(cx, origin), None));
            }
            let (report, store) = copy.run(cx, origin).await?;
            Ok((report, Some(store)))
        };
        let (report, store) = copying.await.map_err(|error: Error| error.doing(doing))?;
        match (report, store) {
            (Copied::Done { snapshot, origin, put, elapsed }, Some(store)) => {
                let snapshot = match self.wait {
                    true => completed(cx, &store, *snapshot).await?,
                    false => *snapshot,
                };
                if snapshot.state == SnapshotState::Pending {
                    cx.note(format_args!("{} is pending until EBS has processed it", snapshot.id));
                }
                Ok(Copied::Done { snapshot: Box::new(snapshot), origin, put, elapsed })
            }
            (report, _) => Ok(report),
        }
    }
}

/// Waits until the store says that a snapshot is completed.
async fn completed(cx: &Context, store: &SharedStore, mut snapshot: Snapshot) -> Result<Snapshot> {
    let id = snapshot.id.clone();
    let waiting = async {
        let mut pause = FIRST_PAUSE;
        while snapshot.state == SnapshotState::Pending {
            tokio::time::sleep(pause).await;
            pause = (pause * 3 / 2).min(LAST_PAUSE);
            snapshot = store.describe(&id).await?;
        }
        if snapshot.state == SnapshotState::Error {
            let why = snapshot.state_message.unwrap_or_default();
            let message = format!("{id} failed in the store: {why}");
            return Err(Error::from(store::Error::new(ErrorKind::Conflict, message)));
        }
        Ok(snapshot)
    };
    let waited = cx.run.unless_stopped(waiting).await.unwrap_or_else(|stopped| {
        // To copy it again would make another one.
        cx.note(format_args!("{id} has everything: the store completes it by itself"));
        Err(stopped.into())
    });
    waited.map_err(|error| error.doing(format!("wait until {id} is completed")))
}

impl CopyArgs {
    /// The store that it is copied to, if it is another one.
    fn elsewhere(&self, cx: &Context) -> Result<Option<StoreUrl>> {
        let from = &cx.house.from;
        let to = match (&self.to, &self.destination, from) {
            (Some(to), _, _) => to.clone(),
            (None, None, _) => return Ok(None),
            (None, Some(region), StoreUrl::Ebs(url)) => {
                StoreUrl::Ebs(EbsUrl { region: Some(region.clone()), ..url.clone() })
            }
            (None, Some(_), _) => {
                let why = format!("{from} has no regions: --to names the store to copy to");
                return Err(Error::Refused(why));
            }
        };
        if let StoreUrl::Directory(path) = &to
            && cx.house.absolute
            && !path.is_absolute()
        {
            let why = format!("{}: give an absolute path", path.display());
            return Err(Error::Refused(why));
        }
        if to.absolute()? == from.absolute()? {
            return Ok(None);
        }
        if let StoreUrl::Directory(path) = &to {
            cx.check_place(path)?;
        }
        if !to.is_writable() {
            return Err(Error::Refused(format!("{to} cannot be written to")));
        }
        Ok(Some(to))
    }

    /// Whether the copy is to be encrypted.
    fn encrypted(&self, snapshot: &Snapshot, to: &StoreUrl) -> Result<bool> {
        let asked = self.encrypted || self.kms_key_id.is_some();
        let encrypted = asked || (snapshot.encrypted && !self.unencrypted);
        match (encrypted, asked, to) {
            (true, _, StoreUrl::Ebs(_)) | (false, ..) => Ok(encrypted),
            (true, true, _) => {
                Err(Error::Refused(format!("{to} encrypts nothing: only `ebs:` does")))
            }
            (true, false, _) => Err(Error::Refused(format!(
                "{} is encrypted, and {to} encrypts nothing: --unencrypted copies it there in the clear",
                snapshot.id
            ))),
        }
    }

    fn tags(&self, snapshot: &Snapshot) -> Tags {
        let carried = snapshot.tags.iter().filter(|(key, _)| !key.starts_with("aws:"));
        let mut tags: Tags = carried.map(|(key, value)| (key.clone(), value.clone())).collect();
        tags.extend(self.tags.iter().cloned());
        if let Some(name) = &self.name {
            tags.insert(NAME_TAG.to_owned(), name.clone());
        }
        tags.insert(ORIGIN_TAG.to_owned(), snapshot.id.to_string());
        tags
    }
}

/// What tells whether the snapshot is the same: another one may have its id, in a repository that was made anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Origin {
    origin: SnapshotId,
    started: Timestamp,
}

/// A snapshot that is about to be copied.
#[derive(Debug)]
struct Copy<'a> {
    args: &'a CopyArgs,
    /// It, and where it is.
    snapshot: Snapshot,
    from: SharedStore,
    /// Where it is copied to.
    to: SharedStore,
    elsewhere: Option<StoreUrl>,
    encrypted: bool,
    /// A copy of its parent.
    parent: Option<Snapshot>,
}

impl<'a> Copy<'a> {
    /// Opens both stores, and finds out what is to be copied.
    async fn open(
        args: &'a CopyArgs,
        cx: &Context,
        elsewhere: Option<StoreUrl>,
    ) -> Result<Copy<'a>> {
        let opening = async {
            let from = cx.open().await?;
            let snapshot = super::readable(&from, &args.snapshot).await?;
            let url = elsewhere.as_ref().unwrap_or(&cx.house.from);
            let encrypted = args.encrypted(&snapshot, url)?;
            let options = StoreOptions {
                owners: Vec::new(),
                filters: Vec::new(),
                ..cx.house.options.clone()
            };
            let to = match &elsewhere {
                Some(url) => cx.house.stores.open(url, &options).await?,
                None => Arc::clone(&from),
            };
            let parent = match &snapshot.parent {
                Some(parent) => copy_of(cx, url, &options, parent).await?,
                None => Vec::new(),
            };
            let parent = parent.into_iter().find(|parent| args.suits(&snapshot, encrypted, parent));
            Ok(Copy { args, snapshot, from, to, elsewhere, encrypted, parent })
        };
        cx.run.unless_stopped(opening).await?
    }

    fn url<'b>(&'b self, cx: &'b Context) -> &'b StoreUrl {
        self.elsewhere.as_ref().unwrap_or(&cx.house.from)
    }

    async fn count(&self, cx: &Context) -> Result<Counted> {
        cx.run.unless_stopped(Counted::of(&self.from, &self.snapshot.id)).await?
    }

    /// Says what would be copied.
    fn would(self, cx: &Context, origin: Counted) -> Copied {
        let to = self.url(cx).to_string();
        let Counted { id, blocks, bytes, .. } = &origin;
        let encrypted = if self.encrypted { ", encrypted" } else { "" };
        cx.note(format_args!(
            "{id} would be copied to {to}{encrypted}: {blocks} blocks, {bytes} bytes"
        ));
        self.tell_parent(cx, "would be");
        Copied::DryRun { origin, to, parent: self.parent.map(|parent| parent.id) }
    }

    fn tell_parent(&self, cx: &Context, is: &str) {
        if let (Some(parent), Some(origin)) = (&self.parent, &self.snapshot.parent) {
            cx.note(format_args!(
                "it {is} a child of {}, a copy of {origin}: only blocks that differ are stored",
                parent.id
            ));
        }
    }

    /// Copies it. The report, and the store that has the copy.
    async fn run(self, cx: &Context, origin: Counted) -> Result<(Copied, SharedStore)> {
        let began = Instant::now();
        self.tell_parent(cx, "is");
        let run = cx.run_showing("Copying");
        run.progress.total(origin.blocks);
        let Made { snapshot, blocks, kept } = self.make(cx, &run).await?;
        drop(run);
        tell_kept(cx, kept, "copied");
        if let Some(parent) = &self.parent {
            cx.note(format_args!("{blocks} blocks differ from {}", parent.id));
        }
        if self.args.unencrypted && snapshot.encrypted {
            cx.note(format_args!(
                "{} is encrypted all the same: the account asks for it",
                snapshot.id
            ));
        }
        cx.tell_cost(&self.from);
        if !Arc::ptr_eq(&self.from, &self.to) {
            cx.tell_cost(&self.to);
        }
        let (snapshot, elapsed) = (Box::new(snapshot), began.elapsed());
        Ok((Copied::Done { snapshot, origin, put: blocks, elapsed }, self.to))
    }

    async fn make(&self, cx: &Context, run: &Run) -> Result<Made> {
        let (args, snapshot) = (self.args, &self.snapshot);
        let from = cx.resume(&cx.house.from, &self.from, &args.resume)?.store;
        let resume = cx.resume(self.url(cx), &self.to, &args.resume)?;
        let begin = Begin {
            source: Arc::new(SnapshotSource::new(Arc::clone(&self.from), snapshot.clone())),
            store: Arc::clone(&self.to),
            elsewhere: self.elsewhere.clone(),
            request: self.request(&from),
            zeros: Zeros {
                full_copy: args.full_copy,
                encrypted_holes: args.encrypted_holes == EncryptedHoles::Write,
            },
            ends: Ends {
                operation: CopyArgs::NAME.to_owned(),
                from: format!("{from} {}", snapshot.id),
                to: resume.store.clone(),
            },
            resume,
            as_it_was: Origin { origin: snapshot.id.clone(), started: snapshot.start_time },
            what: "the snapshot",
        };
        begin.run(run).await
    }

    fn request(&self, from: &str) -> StartRequest {
        let (args, snapshot) = (self.args, &self.snapshot);
        let short = |text: &str| text.chars().take(MAX_DESCRIPTION_CHARS).collect();
        let parent = self.parent.as_ref().map(|parent| parent.id.clone());
        StartRequest {
            tags: args.tags(snapshot),
            description: args.description.clone().unwrap_or_else(|| short(&snapshot.description)),
            volume_id: snapshot.volume_id.clone(),
            // A child is encrypted as its parent is, and must not be asked for it.
            encrypted: self.encrypted && parent.is_none(),
            kms_key: args.kms_key_id.clone(),
            origin: Some(short(&format!("{from} {}", snapshot.id))),
            parent,
            ..StartRequest::new(snapshot.volume_size)
        }
    }
}

impl CopyArgs {
    /// Whether the copy can be a child of this one.
    fn suits(&self, snapshot: &Snapshot, encrypted: bool, parent: &Snapshot) -> bool {
        let is_as_wanted = match (encrypted, self.unencrypted) {
            // Which key the parent has is not known.
            (true, _) => parent.encrypted && self.kms_key_id.is_none(),
            (false, true) => !parent.encrypted,
            (false, false) => true,
        };
        is_as_wanted && parent.volume_size <= snapshot.volume_size
    }
}

/// The completed copies of a snapshot that a store has, from new to old.
async fn copy_of(
    cx: &Context,
    url: &StoreUrl,
    options: &StoreOptions,
    origin: &SnapshotId,
) -> Result<Vec<Snapshot>> {
    let of_it = Filter { name: format!("tag:{ORIGIN_TAG}"), values: vec![origin.to_string()] };
    let options = StoreOptions { filters: vec![of_it], ..options.clone() };
    let store = cx.house.stores.open(url, &options).await?;
    let mut found = list_all(&*store).await?;
    found.retain(|copy| {
        copy.is_readable() && copy.tags.get(ORIGIN_TAG).is_some_and(|id| id == origin.as_str())
    });
    found.sort_by(|a, b| (b.start_time, &b.id).cmp(&(a.start_time, &a.id)));
    Ok(found)
}
