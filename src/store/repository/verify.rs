//! Verifying: every object that a snapshot needs is read and hashed again.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use futures::{StreamExt as _, stream};
use serde::Serialize;

use super::Repository;
use super::complete::Sealed;
use super::manifest::{Manifest, Metadata, Start};
use super::names::{self, ObjectId, RecordId};
use super::pack::FrameEntry;
use super::page_list::{PageRef, content_digest};
use super::read::damaged;
use super::table::{Location, Table};
use crate::model::{BLOCK_SIZE_U64, SnapshotId};
use crate::store::{Error, ErrorKind, Result};

/// Packs that are read and hashed at the same time: two for each core, one of which is being read.
fn concurrency() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from) * 2
}

/// Frames that are looked for at the same time, unless those of one shard are more: 140 bytes of memory
/// each. The others come in further rounds, for which the pages are read again.
const MAX_WANTED: u64 = if cfg!(test) { 8 } else { 1 << 19 };

/// Packs belong to the shard that the first byte of their digest names.
const SHARDS: usize = 256;

/// An object that is not what it was when it was written, or cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The name of the object in the repository.
    pub object: String,
    /// What is wrong with it.
    pub problem: String,
    /// The snapshots that need it, with the number of blocks that each has lost; `None` where that
    /// cannot be told, because the object is what would tell.
    pub lost_blocks: BTreeMap<SnapshotId, Option<u64>>,
}

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Snapshots that were looked at.
    pub snapshots: u64,
    /// Packs that were read.
    pub packs: u64,
    /// Blocks that were hashed.
    pub blocks: u64,
    /// Bytes of those blocks.
    pub bytes: u64,
    /// What is damaged.
    pub damage: Vec<Damage>,
}

/// Receives the number of blocks that were verified since the last call.
pub type Progress = Arc<dyn Fn(u64) + Send + Sync>;

/// The frames that pages refer to, by pack.
type Frames = BTreeMap<ObjectId, BTreeSet<FrameEntry>>;

#[derive(Debug)]
struct Wanted {
    /// The pages of each snapshot that could be read.
    pages: BTreeMap<SnapshotId, Vec<PageRef>>,
    /// All of them.
    read: HashSet<PageRef>,
    /// How often these pages refer to the packs of each shard.
    shards: [u64; SHARDS],
}

/// What is wrong with one pack.
#[derive(Debug)]
struct PackDamage {
    problem: String,
    /// The offsets of the frames that are lost.
    lost: HashSet<u32>,
}

impl Repository {
    /// Reads and hashes everything that the snapshots `ids` need; all snapshots if there are none.
    ///
    /// # Errors
    ///
    /// Damage is reported, not an error. An error is [`ErrorKind::NotFound`] for an id that is not
    /// there, or whatever keeps the store from being read at all.
    pub async fn verify(&self, ids: &[SnapshotId], progress: Progress) -> Result<VerifyReport> {
        let mut report = VerifyReport::default();
        let mut wanted = Wanted::new();
        let asked = !ids.is_empty();
        let all = if asked { ids.to_vec() } else { self.snapshot_ids().await? };
        let ids = &all;
        for id in ids {
            let looked = self.verify_snapshot(id, &mut wanted, &mut report).await;
            match looked {
                // Deleted since it was listed.
                Err(error) if error.kind() == ErrorKind::NotFound && !asked => continue,
                looked => looked?,
            }
            report.snapshots += 1;
        }
        let mut bad: HashMap<ObjectId, PackDamage> = HashMap::new();
        for shards in rounds(&wanted.shards) {
            let packs = self.frames_of(&shards, &wanted, &mut report).await?;
            report.packs += packs.len() as u64;
            let mut results = stream::iter(&packs)
                .map(|(pack, frames)| {
                    let progress = &progress;
                    async move {
                        (
                            *pack,
                            frames.len() as u64,
                            self.verify_pack(*pack, frames, progress).await,
                        )
                    }
                })
                .buffer_unordered(concurrency());
            while let Some((pack, blocks, damage)) = results.next().await {
                report.blocks += blocks;
                if let Some(damage) = damage {
                    bad.insert(pack, damage);
                }
            }
        }
        report.bytes = report.blocks * BLOCK_SIZE_U64;
        self.report_packs(&wanted, bad, &mut report).await?;
        if !report.damage.is_empty() {
            // Or it is not the objects that cannot be read.
            self.objects.read(names::INFO).await?;
        }
        if report.snapshots == 0 && !self.objects.list(names::PACKS).await?.is_empty() {
            tracing::warn!(
                "there is no snapshot, and there are packs: if there should be some, look where \
                 {} went before `fspfs gc` deletes the rest",
                names::SNAPSHOTS
            );
        }
        report.damage.sort_by(|a, b| a.object.cmp(&b.object));
        Ok(report)
    }

    /// Follows a snapshot to its pages.
    async fn verify_pages(
        &self,
        id: &SnapshotId,
        wanted: &mut Wanted,
        report: &mut VerifyReport,
    ) -> Result<()> {
        let manifest = match self.manifest(id).await {
            Ok(Some(manifest)) => manifest,
            Ok(None) => match self.verify_pending(id, report).await {
                // It may have been completed meanwhile.
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    self.manifest(id).await?.ok_or(error)?
                }
                looked => return looked,
            },
            Err(error) => return report.add(names::manifest(id), id, None, error),
        };
        let list = match manifest.pages {
            None => Arc::default(),
            Some(pages) => match self.fresh_page_list(pages).await {
                Ok(list) => list,
                Err(error) => {
                    let lost = Some(manifest.data_blocks);
                    return report.add(pages.page_name(), id, lost, error);
                }
            },
        };
        check_manifest(&manifest, &list)
            .or_else(|error| report.add(names::manifest(id), id, Some(0), error))?;
        for page in list.iter() {
            if !wanted.read.contains(page) {
                match self.checked_page(page).await {
                    Ok(table) => wanted.add(*page, &table),
                    Err(error) => {
                        let blocks = u64::from(page.data_blocks);
                        report.add(page.page.page_name(), id, Some(blocks), error)?;
                        continue;
                    }
                }
            }
            wanted.pages.entry(id.clone()).or_default().push(*page);
        }
        Ok(())
    }

    /// The frames that pages refer to in the packs of these shards.
    async fn frames_of(
        &self,
        shards: &Range<usize>,
        wanted: &Wanted,
        report: &mut VerifyReport,
    ) -> Result<Frames> {
        let mut frames = Frames::new();
        let mut seen = HashSet::new();
        for (id, pages) in &wanted.pages {
            for page in pages.iter().filter(|page| seen.insert(**page)) {
                let Some(table) = self.page_again(page, id, report).await? else { continue };
                for entry in table.entries() {
                    if let Some(at) = entry.location
                        && shards.contains(&shard(at.pack))
                    {
                        let frame = (at.offset, at.length, entry.digest);
                        frames.entry(at.pack).or_default().insert(frame);
                    }
                }
            }
        }
        Ok(frames)
    }

    /// Reads a page that could be read before; `None` if it has been damaged since, which is reported.
    async fn page_again(
        &self,
        page: &PageRef,
        id: &SnapshotId,
        report: &mut VerifyReport,
    ) -> Result<Option<Table>> {
        match self.page(page).await {
            Ok(table) => Ok(Some(table)),
            Err(error) => {
                let blocks = Some(u64::from(page.data_blocks));
                report.add(page.page.page_name(), id, blocks, error)?;
                Ok(None)
            }
        }
    }

    /// A page that says what its list says of it.
    async fn checked_page(&self, page: &PageRef) -> Result<Table> {
        let table = self.fresh_page(page).await?;
        let entries: Vec<_> = table.entries().collect();
        if PageRef::new(page.span, page.page, &entries) == *page {
            Ok(table)
        } else {
            let why = "its content digest or its counts are not those in its page list";
            Err(damaged(&page.page.page_name(), why))
        }
    }

    async fn verify_pending(&self, id: &SnapshotId, report: &mut VerifyReport) -> Result<()> {
        match self.start_of(id).await {
            Ok(Some(start)) => self.verify_records(&start, report).await,
            Ok(None) => Err(super::describe::not_found(id)),
            Err(error) => report.add(names::start(id), id, None, error),
        }
    }

    /// Reads what says which blocks were put for a pending snapshot: `gc` needs it, and a completion.
    async fn verify_records(&self, start: &Start, report: &mut VerifyReport) -> Result<()> {
        let Metadata { id, attempt, .. } = &start.metadata;
        for name in self.objects.list(&names::attempt(id, *attempt)).await? {
            let read = match RecordId::from_name(id, *attempt, &name) {
                Some(record) => self.record(start, record).await.map(drop),
                None if name == names::sealed(id, *attempt) => {
                    self.read_document::<Sealed>(&name).await.map(drop)
                }
                None => Ok(()),
            };
            if let Err(error) = read {
                // If it was completed or deleted meanwhile, that goes up.
                report.add(name, id, None, error)?;
            }
        }
        Ok(())
    }

    async fn verify_snapshot(
        &self,
        id: &SnapshotId,
        wanted: &mut Wanted,
        report: &mut VerifyReport,
    ) -> Result<()> {
        self.verify_pages(id, wanted, report).await?;
        // If that could not be told, it has been reported.
        let Ok(Some(attempt)) = self.attempt_of(id).await else { return Ok(()) };
        match self.tags(id, attempt).await {
            Ok(_) => Ok(()),
            Err(error) => report.add(names::all_tags(id, attempt), id, Some(0), error),
        }
    }

    /// Reads a pack frame by frame, as readers do.
    async fn verify_pack(
        &self,
        pack: ObjectId,
        frames: &BTreeSet<FrameEntry>,
        progress: &Progress,
    ) -> Option<PackDamage> {
        let mut problem = match self.pack_table(pack).await {
            Ok(_) => None,
            // Without its table a pack loses no block: the frames are checked against the pages.
            Err(error) => Some(error.to_string()),
        };
        let mut lost = HashSet::new();
        for &(offset, length, digest) in frames {
            let location = Location { pack, offset, length };
            if let Err(error) = self.read_frame(location, digest).await {
                lost.insert(offset);
                problem.get_or_insert_with(|| error.to_string());
            }
            progress(1);
        }
        problem.map(|problem| PackDamage { problem, lost })
    }

    /// Says what the damaged packs cost, which takes a second look at the pages.
    async fn report_packs(
        &self,
        wanted: &Wanted,
        bad: HashMap<ObjectId, PackDamage>,
        report: &mut VerifyReport,
    ) -> Result<()> {
        let mut damages: HashMap<ObjectId, Damage> = HashMap::new();
        for (pack, damage) in &bad {
            let damage = Damage {
                object: pack.pack_name(),
                problem: damage.problem.clone(),
                lost_blocks: BTreeMap::new(),
            };
            damages.insert(*pack, damage);
        }
        if damages.is_empty() {
            return Ok(());
        }
        for (id, pages) in &wanted.pages {
            for page in pages {
                let Some(table) = self.page_again(page, id, report).await? else { continue };
                for at in table.entries().filter_map(|entry| entry.location) {
                    let Some(damage) = damages.get_mut(&at.pack) else { continue };
                    let lost = bad[&at.pack].lost.contains(&at.offset);
                    let blocks = damage.lost_blocks.entry(id.clone()).or_default().get_or_insert(0);
                    *blocks += u64::from(lost);
                }
            }
        }
        report.damage.extend(damages.into_values());
        Ok(())
    }
}

impl Wanted {
    fn new() -> Self {
        Self { pages: BTreeMap::new(), read: HashSet::new(), shards: [0; SHARDS] }
    }

    fn add(&mut self, page: PageRef, table: &Table) {
        if self.read.insert(page) {
            for at in table.entries().filter_map(|entry| entry.location) {
                self.shards[shard(at.pack)] += 1;
            }
        }
    }
}

fn shard(pack: ObjectId) -> usize {
    pack.digest.0[0].into()
}

/// The shards that are looked at together, given how many frames each of them has.
fn rounds(shards: &[u64; SHARDS]) -> Vec<Range<usize>> {
    let mut rounds: Vec<Range<usize>> = Vec::new();
    let mut frames = 0;
    for (shard, more) in shards.iter().enumerate() {
        frames += more;
        match rounds.last_mut() {
            Some(round) if frames <= MAX_WANTED => round.end = shard + 1,
            _ => {
                rounds.push(shard..shard + 1);
                frames = *more;
            }
        }
    }
    rounds
}

impl VerifyReport {
    /// Adds an object that is damaged, or cannot be read; what is not there any more goes up.
    fn add(
        &mut self,
        object: String,
        id: &SnapshotId,
        lost: Option<u64>,
        error: Error,
    ) -> Result<()> {
        if error.kind() == ErrorKind::NotFound {
            return Err(error);
        }
        let problem = error.to_string();
        let damage = match self.damage.iter_mut().find(|damage| damage.object == object) {
            Some(damage) => damage,
            None => {
                self.damage.push(Damage { object, problem, lost_blocks: BTreeMap::new() });
                self.damage.last_mut().expect("it was pushed")
            }
        };
        damage.lost_blocks.insert(id.clone(), lost);
        Ok(())
    }
}

/// What a manifest says of the content is what deltas and people rely on.
fn check_manifest(manifest: &Manifest, list: &[PageRef]) -> Result<()> {
    let data: u64 = list.iter().map(|page| u64::from(page.data_blocks)).sum();
    let zero: u64 = list.iter().map(|page| u64::from(page.zero_blocks)).sum();
    let digest = content_digest(manifest.metadata.volume_size, list);
    if (manifest.content_digest, manifest.data_blocks, manifest.zero_blocks) == (digest, data, zero)
    {
        return Ok(());
    }
    let name = names::manifest(&manifest.metadata.id);
    Err(damaged(&name, "its content digest or its counts are not those of its pages"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_have_all_shards_once_and_no_more_frames_than_are_remembered() {
        let mut shards = [0; SHARDS];
        shards[3] = MAX_WANTED;
        shards[4] = 1;
        shards[200] = MAX_WANTED + 5;
        shards[255] = 2;
        assert_eq!(rounds(&shards), [0..4, 4..200, 200..201, 201..SHARDS]);
    }
}
