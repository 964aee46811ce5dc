//! `copy`: a snapshot becomes one of another store.

use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::archives::{self, Archives};
use super::begin::{Begin, Made};
use super::context::{Context, place_of};
use super::destination::{
    KmsKey, LabelArgs, ToArgs, ZerosArgs, completed, key_for, open, options, tell_pending,
};
use super::image::{ImageArgs, Parent};
use super::list::Counted;
use super::reference::{HELP, Reference};
use super::table::{Operation, Report};
use super::text::{rate, shortened};
use super::{Error, Result};
use crate::arguments::ResumeArgs;
use crate::model::{BLOCK_SIZE_U64, DIGEST_TAG, MAX_TAGS, ORIGIN_TAG, Snapshot, SnapshotId, Tags};
use crate::store::page::list_all;
use crate::store::{Filter, SALVAGED_TAG, SharedStore, StartRequest, StoreOptions, StoreUrl};
use crate::transfer::engine::Run;
use crate::transfer::journal::Ends;
use crate::transfer::source::Source;
use crate::transfer::source::delta::DeltaSource;
use crate::transfer::source::snapshot::SnapshotSource;

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
    #[arg(value_name = "SNAP", help = HELP)]
    pub(super) snapshot: Reference,
    #[command(flatten)]
    to: ToArgs,
    #[command(flatten)]
    pub(super) how: HowArgs,
}

/// What the copy is like.
#[derive(Args, Clone, Debug)]
pub(super) struct HowArgs {
    #[command(flatten)]
    label: LabelArgs,
    #[command(flatten)]
    zeros: ZerosArgs,
    /// Ask the store to encrypt the copy; that of an encrypted snapshot is anyway
    #[arg(long)]
    encrypted: bool,
    /// Do not ask the store to encrypt it
    #[arg(long, conflicts_with_all = ["encrypted", "kms_keys"])]
    unencrypted: bool,
    /// The key to encrypt it with, or that of a region, as eu-west-1=arn:…; can be given several times
    #[arg(long = "kms-key", visible_alias = "kms-key-id", value_name = "KEY")]
    kms_keys: Vec<KmsKey>,
    /// Wait until the store says that the copy is completed
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    pub(super) resume: ResumeArgs,
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

impl Copied {
    /// What is missing of what was made, if that is so.
    pub(super) fn missing(&self) -> Option<&str> {
        match self {
            Self::Done { snapshot, .. } if snapshot.tags.contains_key(SALVAGED_TAG) => {
                Some(&snapshot.description)
            }
            _ => None,
        }
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
        let elsewhere = self.to.elsewhere(cx).map_err(|error| error.doing(doing))?;
        let Self { snapshot, how, .. } = self;
        Order { snapshot, how, elsewhere, archive: None }.run(cx).await
    }
}

/// A copy that is asked for.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) snapshot: Reference,
    pub(super) how: HowArgs,
    /// Where it is made, if that is not the store of `-s`.
    pub(super) elsewhere: Option<StoreUrl>,
    /// It is an archive, which keeps its id, and what it is a child of.
    pub(super) archive: Option<Parent>,
}

impl Order {
    /// Does it, once.
    pub(super) async fn run(self, cx: &Context) -> Result<Copied> {
        let to = self.elsewhere.as_ref().unwrap_or(&cx.house.from);
        let doing = format!("copy {} to {to}", self.snapshot);
        let copying = async {
            let copy = match Copy::open(&self, cx).await? {
                Found::New(copy) => *copy,
                Found::There(report) => return Ok((report, None)),
            };
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
                let snapshot = match self.how.wait {
                    true => completed(cx, &store, *snapshot).await?,
                    false => *snapshot,
                };
                tell_pending(cx, &snapshot);
                Ok(Copied::Done { snapshot: Box::new(snapshot), origin, put, elapsed })
            }
            (report, _) => Ok(report),
        }
    }
}

impl HowArgs {
    /// That nothing is asked for that only a snapshot of EBS can have.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`], with the reason.
    pub(super) fn check_plain(&self, what: &str) -> Result<()> {
        match self.encrypted || !self.kms_keys.is_empty() {
            true => {
                Err(Error::Refused(format!("{what} is not encrypted by --encrypted or --kms-key")))
            }
            false => Ok(()),
        }
    }

    /// The same for an image.
    pub(super) fn image(&self, image: &mut ImageArgs) {
        image.label = self.label.clone();
        image.zeros = self.zeros.clone();
    }

    /// Whether the copy is to be encrypted.
    fn encrypted(&self, snapshot: &Snapshot, to: &StoreUrl) -> Result<bool> {
        let asked = self.encrypted || !self.kms_keys.is_empty();
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

    /// Whether the copy can be a child of this one.
    fn suits(&self, snapshot: &Snapshot, encrypted: bool, parent: &Snapshot) -> bool {
        let is_as_wanted = match (encrypted, self.unencrypted) {
            // Which key the parent has is not known.
            (true, _) => parent.encrypted && self.kms_keys.is_empty(),
            (false, true) => !parent.encrypted,
            (false, false) => true,
        };
        is_as_wanted && parent.volume_size <= snapshot.volume_size
    }
}

/// The tags that a copy of a snapshot has.
pub(super) fn carried(snapshot: &Snapshot) -> Tags {
    let is_carried = |key: &str| !key.starts_with("aws:") && key != DIGEST_TAG;
    let carried = snapshot.tags.iter().filter(|(key, _)| is_carried(key));
    let mut tags: Tags = carried.map(|(key, value)| (key.clone(), value.clone())).collect();
    tags.insert(ORIGIN_TAG.to_owned(), snapshot.id.to_string());
    tags
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
    order: &'a Order,
    /// It, and where it is.
    snapshot: Snapshot,
    from: SharedStore,
    /// Where it is copied to.
    to: SharedStore,
    encrypted: bool,
    kms_key: Option<String>,
    /// What the copy is a child of.
    parent: Option<Snapshot>,
    /// The snapshot that the parent is an archive of, if its store can tell what was changed since.
    first: Option<Snapshot>,
}

/// What there is of a copy.
enum Found<'a> {
    New(Box<Copy<'a>>),
    /// It was made before.
    There(Copied),
}

impl<'a> Copy<'a> {
    /// Opens both stores, and finds out what is to be copied.
    async fn open(order: &'a Order, cx: &Context) -> Result<Found<'a>> {
        cx.run.unless_stopped(Self::find(order, cx)).await?
    }

    async fn find(order: &'a Order, cx: &Context) -> Result<Found<'a>> {
        let Order { how, elsewhere, archive, .. } = order;
        let from = cx.open().await?;
        let id = order.snapshot.id(cx, &from).await?;
        let snapshot = super::readable(&from, &id).await?;
        let url = elsewhere.as_ref().unwrap_or(&cx.house.from);
        let encrypted = how.encrypted(&snapshot, url)?;
        let kms_key = key_for(&how.kms_keys, url)?;
        let to = open(cx, elsewhere.as_ref()).await?;
        let parents = match (archive, &snapshot.parent) {
            (Some(wanted), _) => {
                let archives = Archives::of(&to, (&from, &snapshot)).await?;
                if let Some(there) = archives.there {
                    cx.note(format_args!("{id} is in {url} already"));
                    let origin = Counted::of(&from, &id).await?;
                    if cx.dry_run {
                        let to = url.to_string();
                        return Ok(Found::There(Copied::DryRun { origin, to, parent: None }));
                    }
                    let (snapshot, elapsed) = (Box::new(there), Duration::ZERO);
                    return Ok(Found::There(Copied::Done { snapshot, origin, put: 0, elapsed }));
                }
                match wanted {
                    Parent::Auto => archives.parents,
                    Parent::None => Vec::new(),
                    Parent::Named(named) => {
                        let found = async { super::readable(&to, &named.id(cx, &to).await?).await };
                        let doing = format!("take {named} of {url} for the parent");
                        vec![found.await.map_err(|error| error.doing(doing))?]
                    }
                }
            }
            (None, Some(parent)) => copy_of(cx, url, parent).await?,
            (None, None) => Vec::new(),
        };
        let found = parents.first().map(|parent| parent.id.clone());
        let parent = parents.into_iter().find(|parent| how.suits(&snapshot, encrypted, parent));
        if let (Some(Parent::Named(_)), Some(named), None) = (archive, found, &parent) {
            let why = format!("{named} cannot be the parent of {id}: its volume is larger");
            return Err(Error::Refused(why));
        }
        let first = match parent.as_ref().filter(|_| archive.is_some()) {
            Some(parent) => archives::first(&from, (&to, parent), &snapshot).await,
            None => None,
        };
        let copy = Copy { order, snapshot, from, to, encrypted, kms_key, parent, first };
        Ok(Found::New(Box::new(copy)))
    }

    fn url<'b>(&'b self, cx: &'b Context) -> &'b StoreUrl {
        self.order.elsewhere.as_ref().unwrap_or(&cx.house.from)
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
        let Some(parent) = &self.parent else { return };
        let what = match (self.order.archive.is_some(), &self.snapshot.parent) {
            (false, Some(origin)) => format!("{}, a copy of {origin}", parent.id),
            _ => parent.id.to_string(),
        };
        let read = if self.first.is_some() { "read and " } else { "" };
        cx.note(format_args!(
            "it {is} a child of {what}: only blocks that differ are {read}stored"
        ));
    }

    /// Copies it. The report, and the store that has the copy.
    async fn run(self, cx: &Context, origin: Counted) -> Result<(Copied, SharedStore)> {
        let began = Instant::now();
        self.tell_parent(cx, "is");
        let run = cx.run_showing("Copying", place_of(self.url(cx), &self.to)?);
        run.progress.total(self.snapshot.volume_size.blocks().0.into());
        let made = self.make(cx, &run).await?;
        drop(run);
        made.tell(cx, None, "copied");
        let Made { snapshot, blocks, .. } = made;
        if let Some(parent) = &self.parent {
            cx.note(format_args!("{blocks} blocks differ from {}", parent.id));
        }
        if self.order.how.unencrypted && snapshot.encrypted {
            cx.note(format_args!(
                "{} is encrypted all the same: the account asks for it",
                snapshot.id
            ));
        }
        let noting = self.note_digest(snapshot);
        let snapshot = cx.run.unless_stopped(noting).await?;
        cx.tell_cost_of(&cx.house.from, &self.from);
        if !Arc::ptr_eq(&self.from, &self.to) {
            cx.tell_cost_of(self.url(cx), &self.to);
        }
        let (snapshot, elapsed) = (Box::new(snapshot), began.elapsed());
        Ok((Copied::Done { snapshot, origin, put: blocks, elapsed }, self.to))
    }

    /// Notes the content digest, where it is known and the store keeps none. Who may not set tags does without.
    async fn note_digest(&self, mut copy: Snapshot) -> Snapshot {
        let Some(digest) = self.snapshot.content_digest else { return copy };
        let is_equal = copy.volume_size == self.snapshot.volume_size;
        if copy.content_digest.is_some() || !is_equal {
            return copy;
        }
        // They are replaced whole.
        let mut tags = match self.to.describe(&copy.id).await {
            Ok(found) if found.tags.len() < MAX_TAGS => found.tags,
            _ => return copy,
        };
        tags.insert(DIGEST_TAG.to_owned(), format!("{} {}", copy.id, digest.to_hex()));
        match self.to.set_tags(&copy.id, tags.clone()).await {
            Ok(()) => copy.tags = tags,
            Err(error) => tracing::info!("{} has no {DIGEST_TAG}: {error}", copy.id),
        }
        copy
    }

    async fn make(&self, cx: &Context, run: &Run) -> Result<Made> {
        let (how, snapshot) = (&self.order.how, &self.snapshot);
        let from = cx.resume(&cx.house.from, &self.from, &how.resume)?.store;
        let resume = cx.resume(self.url(cx), &self.to, &how.resume)?;
        let store = Arc::clone(&self.from);
        let source: Arc<dyn Source> = match self.first.clone() {
            Some(first) => Arc::new(DeltaSource::new(store, first, snapshot.clone())),
            None => Arc::new(SnapshotSource::new(store, snapshot.clone())),
        };
        let begin = Begin {
            source,
            is_delta: self.first.is_some(),
            store: Arc::clone(&self.to),
            elsewhere: self.order.elsewhere.clone(),
            request: self.request(&from),
            zeros: how.zeros.zeros(),
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
        let (label, snapshot) = (&self.order.how.label, &self.snapshot);
        let mut tags = carried(snapshot);
        tags.extend(label.tags());
        let parent = self.parent.as_ref().map(|parent| parent.id.clone());
        StartRequest {
            tags,
            description: label
                .description
                .clone()
                .unwrap_or_else(|| shortened(&snapshot.description)),
            id: self.order.archive.is_some().then(|| snapshot.id.clone()),
            volume_id: snapshot.volume_id.clone(),
            // A child is encrypted as its parent is, and must not be asked for it.
            encrypted: self.encrypted && parent.is_none(),
            kms_key: self.kms_key.clone(),
            origin: Some(shortened(&format!("{from} {}", snapshot.id))),
            parent,
            ..StartRequest::new(snapshot.volume_size)
        }
    }
}

/// The completed copies of a snapshot that a store has, from new to old.
async fn copy_of(cx: &Context, url: &StoreUrl, origin: &SnapshotId) -> Result<Vec<Snapshot>> {
    let of_it = Filter { name: format!("tag:{ORIGIN_TAG}"), values: vec![origin.to_string()] };
    let options = StoreOptions { filters: vec![of_it], ..options(cx) };
    let store = cx.house.stores.open(url, &options).await?;
    let mut found = list_all(&*store).await?;
    found.retain(|copy| {
        copy.is_readable() && copy.tags.get(ORIGIN_TAG).is_some_and(|id| id == origin.as_str())
    });
    found.sort_by(|a, b| (b.start_time, &b.id).cmp(&(a.start_time, &a.id)));
    Ok(found)
}
