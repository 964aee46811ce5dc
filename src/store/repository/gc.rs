//! Collecting garbage: what crashed writers, aborts and deletions left behind.
//!
//! A run finds what nothing reaches, and records it. It deletes only what a record that is older
//! than the grace period already named, and that this run still does not reach. A writer makes an
//! object first and refers to it later, but within the grace period, or it checks the records.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::describe::Found as Snapshot;
use super::manifest::{Metadata, Start};
use super::names::{self, ObjectId, RecordId, TagsId};
use super::pack::{FrameEntry, MAX_TABLE_LEN, read_table};
use super::read::damaged;
use super::{Objects, Repository, document, since_boot};
use crate::store::{Error, ErrorKind, Result};

/// The grace period unless another is given: one week.
pub const DEFAULT_GRACE: Duration = Duration::from_hours(168);

/// The shortest grace period: one hour.
pub const MIN_GRACE: Duration = Duration::from_hours(1);

/// Longest time between looking at what is reachable and deleting what is not.
const MAX_RUN: Duration = Duration::from_secs(MIN_GRACE.as_secs() / 4);

/// Names in one record at most; what is more is found again by a later run.
const MAX_RECORDED: usize = 1_000_000;

/// Collections that may begin at the same time, and all note what they found.
const COLLECTIONS: i64 = 100;

/// What a collection did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GcReport {
    /// Objects that something refers to.
    pub reachable_objects: u64,
    /// Objects that were deleted.
    pub deleted_objects: u64,
    /// Objects that nothing refers to, and that are deleted after the grace period.
    pub waiting_objects: u64,
    /// Bytes of unfinished files that were removed.
    pub swept_bytes: u64,
    /// Blocks that packs hold and no snapshot has any more, where packs are kept for others.
    pub wasted_blocks: u64,
    /// Blocks that the packs in use hold in all.
    pub packed_blocks: u64,
}

/// `gc/<time>.json`: what one run found unreachable.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Found {
    time: Timestamp,
    unreachable: Vec<String>,
}

/// What a collection may delete.
#[derive(Debug, Default)]
struct Candidates {
    objects: Vec<String>,
    tags: Vec<TagsId>,
}

#[derive(Debug, Default)]
struct Reachable {
    names: HashSet<String>,
    /// The attempts that are snapshots, completed or pending.
    attempts: HashSet<Uuid>,
    /// Pages and page lists that were followed already.
    followed: HashSet<ObjectId>,
    packs: HashSet<ObjectId>,
    /// The offsets of the frames that pages refer to, each once, by pack: they are at most
    /// [`PACK_BLOCKS`](super::pack::PACK_BLOCKS).
    frames: HashMap<ObjectId, Vec<u32>>,
}

impl Repository {
    /// Collects garbage. `dry_run` records and deletes nothing.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if `grace` is shorter than [`MIN_GRACE`]. [`ErrorKind::Corrupt`] if
    /// anything that may refer to an object is damaged: then nothing is deleted, since nobody can
    /// tell what it refers to.
    pub async fn gc(&self, grace: Duration, dry_run: bool) -> Result<GcReport> {
        if grace < MIN_GRACE {
            let message = "the grace period must be at least an hour: writers may be at work";
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        self.collect(Some(grace), dry_run).await
    }

    /// Collects at once whatever nothing refers to, while nobody else has the repository open. What pending snapshots
    /// refer to stays.
    ///
    /// # Errors
    ///
    /// As [`gc`](Self::gc); [`ErrorKind::Conflict`] if others have it open, [`ErrorKind::Unsupported`] if that cannot
    /// be told.
    pub async fn gc_now(&self, dry_run: bool) -> Result<GcReport> {
        let _alone = self.objects.alone().await?;
        self.collect(None, dry_run).await
    }

    /// With a grace period, or without where nobody else is at work.
    async fn collect(&self, grace: Option<Duration>, dry_run: bool) -> Result<GcReport> {
        let at_once = grace.is_none();
        let grace = grace.unwrap_or_default();
        let began = since_boot();
        let now = match dry_run {
            true => self.objects.now_by_reading().await?,
            false => self.objects.now().await?,
        };
        let matured = found_before(&*self.objects, now, grace).await?;
        // First what there is, then what of it is in use: what is made later is no candidate.
        let candidates = self.candidates().await?;
        let mut reachable = self.reachable().await.map_err(|e| {
            e.context("nothing was collected, since not all that is in use could be told")
        })?;
        let unreachable = candidates.unreachable(&mut reachable);
        if reachable.attempts.is_empty() && !unreachable.is_empty() {
            tracing::warn!(
                "there is no snapshot, and nothing of what there is is in use: if there should be some, \
                 look where {} went before the next collections delete the rest",
                names::SNAPSHOTS
            );
        }
        let (doomed, waiting): (Vec<_>, Vec<_>) =
            unreachable.into_iter().partition(|name| at_once || matured.contains(name));
        let mut report = GcReport {
            reachable_objects: reachable.names.len() as u64,
            deleted_objects: doomed.len() as u64,
            waiting_objects: waiting.len() as u64,
            packed_blocks: self.packed_blocks(&reachable).await,
            ..GcReport::default()
        };
        let used: usize = reachable.frames.values().map(Vec::len).sum();
        report.wasted_blocks = report.packed_blocks.saturating_sub(used as u64);
        if dry_run {
            return Ok(report);
        }
        for batch in doomed.chunks(1000) {
            if since_boot().saturating_sub(began) > MAX_RUN {
                let message = "the collection took too long to be safe; run it again to go on";
                return Err(Error::new(ErrorKind::Timeout, message));
            }
            self.objects.delete(batch).await?;
        }
        self.record_found(now, waiting).await?;
        self.forget_found(now, grace, &reachable).await?;
        let grace = jiff::SignedDuration::try_from(grace).unwrap_or(jiff::SignedDuration::MAX);
        if let Ok(before) = now.checked_sub(grace) {
            report.swept_bytes = self.objects.sweep(before).await?;
        }
        Ok(report)
    }

    async fn record_found(&self, time: Timestamp, mut unreachable: Vec<String>) -> Result<()> {
        if unreachable.is_empty() {
            return Ok(());
        }
        // What an earlier run has named already need not be named again.
        let named = found_before(&*self.objects, time, Duration::ZERO).await?;
        unreachable.retain(|name| !named.contains(name));
        unreachable.truncate(MAX_RECORDED);
        if unreachable.is_empty() {
            return Ok(());
        }
        // The clock of a bucket has whole seconds, and several collections may begin within one.
        for later in 0..COLLECTIONS {
            let time = time + jiff::SignedDuration::from_nanos(later);
            let found = document::encode(&Found { time, unreachable: unreachable.clone() });
            if self.objects.create_own(&names::found(time), found).await? {
                return Ok(());
            }
        }
        Err(Error::new(ErrorKind::Conflict, "too many collections began at the same time"))
    }

    /// Deletes old records of which every name is gone, or reachable after all.
    async fn forget_found(
        &self,
        now: Timestamp,
        grace: Duration,
        reachable: &Reachable,
    ) -> Result<()> {
        let mut done = Vec::new();
        for (name, found) in found(&*self.objects).await? {
            if elapsed(now, found.time) >= Some(grace) && !self.any_left(&found, reachable).await? {
                done.push(name);
            }
        }
        self.objects.delete(&done).await
    }

    async fn any_left(&self, found: &Found, reachable: &Reachable) -> Result<bool> {
        for name in &found.unreachable {
            if !reachable.names.contains(name) && self.objects.exists(name).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Everything that snapshots, complete or pending, refer to.
    async fn reachable(&self) -> Result<Reachable> {
        let mut reachable = Reachable::default();
        let mut seen = HashSet::new();
        // A child may be started and its parent deleted while this looks: it goes on until it has
        // seen every snapshot. Whoever starts a child later finds that the parent is gone. At least
        // twice: if both happen while the ids are listed, only an earlier list has one of the two.
        for round in 0.. {
            let mut new = false;
            for id in self.snapshot_ids().await? {
                match self.look(&id).await? {
                    Some(Snapshot::Completed(found))
                        if seen.insert((found.metadata.attempt, true)) =>
                    {
                        self.reach_pages(found.pages, &mut reachable).await?;
                        new = true;
                    }
                    Some(Snapshot::Pending(found))
                        if seen.insert((found.metadata.attempt, false)) =>
                    {
                        self.reach_pending(&found, &mut reachable).await?;
                        new = true;
                    }
                    _ => {}
                }
            }
            if !new && round > 0 {
                break;
            }
        }
        reachable.attempts = seen.into_iter().map(|(attempt, _)| attempt).collect();
        reachable.names.extend(reachable.packs.iter().map(|pack| pack.pack_name()));
        Ok(reachable)
    }

    /// What a pending snapshot refers to. If it is completed meanwhile, the next round sees that.
    async fn reach_pending(&self, start: &Start, reachable: &mut Reachable) -> Result<()> {
        self.reach_pages(start.parent_pages, reachable).await?;
        let Metadata { id, attempt, .. } = &start.metadata;
        for name in self.objects.list(&names::attempt(id, *attempt)).await? {
            if let Some(record) = RecordId::from_name(id, *attempt, &name) {
                match self.record(start, record).await {
                    Ok(table) => reachable.packs.extend(table.packs()),
                    Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                    Err(error) => return Err(error),
                }
            }
            reachable.names.insert(name);
        }
        Ok(())
    }

    async fn reach_pages(&self, list: Option<ObjectId>, reachable: &mut Reachable) -> Result<()> {
        let Some(id) = list else { return Ok(()) };
        if !reachable.followed.insert(id) {
            return Ok(());
        }
        reachable.names.insert(id.page_name());
        for page in self.page_list(list).await?.iter() {
            if reachable.followed.insert(page.page) {
                reachable.names.insert(page.page.page_name());
                let table = self.page(page).await?;
                let locations = table.entries().filter_map(|entry| entry.location);
                for location in locations {
                    reachable.packs.insert(location.pack);
                    let frames = reachable.frames.entry(location.pack).or_default();
                    if !frames.contains(&location.offset) {
                        frames.push(location.offset);
                    }
                }
            }
        }
        Ok(())
    }

    /// What may be collected, if nothing refers to it.
    ///
    /// Manifests and starts are not among it: they are what makes a snapshot. All other names are
    /// used once, so that one that was found unreachable never becomes another object.
    async fn candidates(&self) -> Result<Candidates> {
        let mut candidates = Candidates::default();
        for prefix in [names::PENDING, names::PAGES, names::PACKS] {
            let ours = |name: &String| match prefix {
                names::PENDING => names::is_of_attempt(name),
                _ => ObjectId::from_name(prefix, name).is_some(),
            };
            candidates.objects.extend(self.objects.list(prefix).await?.into_iter().filter(ours));
        }
        let tags = self.objects.list(names::TAGS).await?;
        candidates.tags.extend(tags.iter().filter_map(|name| TagsId::from_name(name)));
        Ok(candidates)
    }

    /// Blocks that the packs in use hold, as their tables say.
    async fn packed_blocks(&self, reachable: &Reachable) -> u64 {
        let mut blocks = 0;
        for pack in reachable.frames.keys() {
            match self.pack_table(*pack).await {
                Ok(table) => blocks += table.len() as u64,
                // Damage is for `verify` to find; it does not keep garbage from being collected.
                Err(error) => tracing::debug!("the blocks of a pack are not counted: {error}"),
            }
        }
        blocks
    }

    /// The table at the end of a pack.
    pub(super) async fn pack_table(&self, pack: ObjectId) -> Result<Vec<FrameEntry>> {
        let name = pack.pack_name();
        let tail = match self.objects.read_tail(&name, MAX_TABLE_LEN).await {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(damaged(&name, "it is missing"));
            }
            tail => tail?,
        };
        read_table(pack, &tail).map_err(|why| damaged(&name, why))
    }
}

impl Candidates {
    /// Those that nothing refers to. Of the tags of a snapshot, all but the newest.
    fn unreachable(self, reachable: &mut Reachable) -> Vec<String> {
        let Self { mut objects, tags } = self;
        let mut newest: HashMap<Uuid, u64> = HashMap::new();
        for set in &tags {
            let number = newest.entry(set.attempt).or_default();
            *number = set.number.max(*number);
        }
        for set in tags {
            if reachable.attempts.contains(&set.attempt) && newest[&set.attempt] == set.number {
                reachable.names.insert(set.name());
            } else {
                objects.push(set.name());
            }
        }
        objects.retain(|name| !reachable.names.contains(name));
        objects
    }
}

/// What a collection found unreachable at least `age` ago, and may soon delete.
pub(super) async fn found_before(
    objects: &dyn Objects,
    now: Timestamp,
    age: Duration,
) -> Result<HashSet<String>> {
    let mut names = HashSet::new();
    for (_, found) in found(objects).await? {
        if elapsed(now, found.time) >= Some(age) {
            names.extend(found.unreachable);
        }
    }
    Ok(names)
}

async fn found(objects: &dyn Objects) -> Result<Vec<(String, Found)>> {
    let mut found = Vec::new();
    for name in objects.list(names::GC).await? {
        if !names::is_found(&name) {
            continue;
        }
        match document::read_document(objects, &name).await {
            Ok(document) => found.extend(document.map(|document| (name, document))),
            // It is damaged for everybody: no run will delete what only it names.
            Err(error) if error.kind() == ErrorKind::Corrupt => tracing::warn!("{error}"),
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

fn elapsed(now: Timestamp, then: Timestamp) -> Option<Duration> {
    Duration::try_from(now.duration_since(then)).ok()
}
