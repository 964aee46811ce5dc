//! Verifying: every object that a snapshot needs is read and hashed again.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
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

/// Frames that are remembered at the same time, unless those of one shard are more: 140 bytes of memory
/// each. The others come in further rounds, for which the pages are read again.
const MAX_WANTED: usize = if cfg!(test) { 8 } else { 1 << 19 };

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

/// How far a verification is.
#[derive(Debug)]
pub enum Checked<'a> {
    /// So many blocks are to be verified.
    All(u64),
    /// So many of them are in the same places as others.
    Known(u64),
    /// A block was verified, or cannot be read.
    Block(fmt::Arguments<'a>, Option<&'a Error>),
}

/// Receives how far a verification is.
pub type Progress = Arc<dyn Fn(Checked<'_>) + Send + Sync>;

#[derive(Debug, Default)]
struct Wanted {
    /// The pages of each snapshot that could be read.
    pages: BTreeMap<SnapshotId, Vec<PageRef>>,
    /// All of them.
    read: HashSet<PageRef>,
}

/// The frames that pages refer to in the packs of some shards.
#[derive(Debug)]
struct Round {
    shards: Range<usize>,
    packs: BTreeMap<ObjectId, BTreeSet<FrameEntry>>,
    /// How often pages name a frame of each shard.
    named: [u64; SHARDS],
    /// How many frames there are of each shard, and in all.
    frames: [usize; SHARDS],
    count: usize,
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
        let mut wanted = Wanted::default();
        let asked = !ids.is_empty();
        let all = if asked { ids.to_vec() } else { self.snapshot_ids().await? };
        let ids: BTreeSet<_> = all.into_iter().collect();
        for id in &ids {
            let looked = self.verify_snapshot(id, &mut wanted, &mut report).await;
            match looked {
                // Deleted since it was listed.
                Err(error) if error.kind() == ErrorKind::NotFound && !asked => continue,
                looked => looked?,
            }
            report.snapshots += 1;
        }
        progress(Checked::All(wanted.read.iter().map(|page| u64::from(page.data_blocks)).sum()));
        let mut bad: HashMap<ObjectId, PackDamage> = HashMap::new();
        let mut next = 0;
        while next < SHARDS {
            let round = self.round(next, &wanted, &mut report).await?;
            progress(Checked::Known(round.known()));
            let Round { shards, packs, .. } = round;
            next = shards.end;
            report.packs += packs.len() as u64;
            let mut results = stream::iter(packs)
                .map(|(pack, frames)| {
                    let progress = &progress;
                    async move {
                        let blocks = frames.len() as u64;
                        (pack, blocks, self.verify_pack(pack, &frames, progress).await)
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
                if let Err(error) = self.checked_page(page).await {
                    let blocks = u64::from(page.data_blocks);
                    report.add(page.page.page_name(), id, Some(blocks), error)?;
                    continue;
                }
                wanted.read.insert(*page);
            }
            wanted.pages.entry(id.clone()).or_default().push(*page);
        }
        Ok(())
    }

    /// The frames of the shards from `first` on, as far as they can be remembered.
    async fn round(
        &self,
        first: usize,
        wanted: &Wanted,
        report: &mut VerifyReport,
    ) -> Result<Round> {
        let mut round = Round::from(first);
        let mut seen = HashSet::new();
        for (id, pages) in &wanted.pages {
            for page in pages {
                if seen.contains(page) {
                    continue;
                }
                // One that cannot be read is told for each snapshot that has it.
                let Some(table) = self.page_again(page, id, report).await? else { continue };
                seen.insert(*page);
                for entry in table.entries() {
                    if let Some(at) = entry.location {
                        round.add(at.pack, (at.offset, at.length, entry.digest));
                    }
                }
            }
        }
        Ok(round)
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
    async fn checked_page(&self, page: &PageRef) -> Result<()> {
        let table = self.fresh_page(page).await?;
        let entries: Vec<_> = table.entries().collect();
        if PageRef::new(page.span, page.page, &entries) == *page {
            Ok(())
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
                    Sealed::read(&*self.objects, &name).await.map(drop)
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
            let read = self.read_frame(location, digest).await;
            let failed = read.as_ref().err();
            progress(Checked::Block(format_args!("block at {offset} of pack {pack}"), failed));
            if let Err(error) = read {
                lost.insert(offset);
                problem.get_or_insert_with(|| error.to_string());
            }
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

impl Round {
    fn from(first: usize) -> Self {
        Self {
            shards: first..SHARDS,
            packs: BTreeMap::new(),
            named: [0; SHARDS],
            frames: [0; SHARDS],
            count: 0,
        }
    }

    /// How many blocks are in the same places as others.
    fn known(&self) -> u64 {
        self.named[self.shards.clone()].iter().sum::<u64>() - self.count as u64
    }

    /// Adds a frame, if it is of this round; leaves the last shards to another one if it gets too large.
    fn add(&mut self, pack: ObjectId, frame: FrameEntry) {
        let shard = usize::from(pack.digest.0[0]);
        if !self.shards.contains(&shard) {
            return;
        }
        self.named[shard] += 1;
        if !self.packs.entry(pack).or_default().insert(frame) {
            return;
        }
        self.frames[shard] += 1;
        self.count += 1;
        while self.count > MAX_WANTED && self.shards.len() > 1 {
            self.shards.end -= 1;
            self.count -= self.frames[self.shards.end];
            let end = self.shards.end;
            self.packs.retain(|pack, _| usize::from(pack.digest.0[0]) < end);
        }
    }
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
    use uuid::Uuid;

    use super::*;
    use crate::model::{Block, BlockIndex, Digest, VolumeSize};
    use crate::store::{CompleteRequest, SnapshotStore as _, StartRequest};

    #[tokio::test]
    async fn a_page_that_is_damaged_meanwhile_is_told_for_each_snapshot_that_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = Repository::create(&dir.path().join("store")).await.unwrap();
        let size = VolumeSize::from_gib(1).unwrap();
        let parent = store.start(StartRequest::new(size)).await.unwrap().id;
        let block = Block::new(vec![1; usize::try_from(BLOCK_SIZE_U64).unwrap()].into());
        store.put_block(&parent, BlockIndex::ZERO, block).await.unwrap();
        let done =
            |changed_blocks| CompleteRequest { changed_blocks, checksum: None, started: None };
        store.complete(&parent, done(1)).await.unwrap();
        let request = StartRequest { parent: Some(parent.clone()), ..StartRequest::new(size) };
        let child = store.start(request).await.unwrap().id;
        store.complete(&child, done(0)).await.unwrap();

        let (mut wanted, mut report) = (Wanted::default(), VerifyReport::default());
        for id in [&parent, &child] {
            store.verify_snapshot(id, &mut wanted, &mut report).await.unwrap();
        }
        let page = wanted.read.iter().next().unwrap().page.page_name();
        std::fs::write(dir.path().join("store").join(&page), "x").unwrap();
        // One that has nothing of it in memory.
        let store = Repository::open(&dir.path().join("store")).await.unwrap();
        let round = store.round(0, &wanted, &mut report).await.unwrap();
        assert!(round.packs.is_empty());
        let [damage] = &report.damage[..] else { panic!("{report:?}") };
        assert_eq!(damage.object, page);
        assert_eq!(damage.lost_blocks, [(parent, Some(1)), (child, Some(1))].into());
    }

    #[test]
    fn a_round_has_all_of_its_shards_and_no_more_than_is_remembered() {
        let pack = |shard: u8, n: u8| {
            let mut digest = Digest([n; 32]);
            digest.0[0] = shard;
            ObjectId { digest, writer: Uuid::nil() }
        };
        let frame = |offset: usize| (u32::try_from(offset).unwrap(), 1, Digest([0; 32]));
        // Shards and how many frames each has, in the order in which pages name them.
        let all = [(200, MAX_WANTED + 5), (3, MAX_WANTED), (255, 2), (4, 1)];
        let (mut first, mut rounds) = (0, Vec::new());
        while first < SHARDS {
            let mut round = Round::from(first);
            // Two snapshots have the same blocks.
            for (shard, count) in all.iter().chain(&all) {
                (0..*count).for_each(|n| {
                    round.add(pack(*shard, u8::try_from(n % 2).unwrap()), frame(n));
                });
            }
            let frames: usize = round.packs.values().map(BTreeSet::len).sum();
            assert_eq!(round.known(), frames as u64, "each is named twice");
            rounds.push((round.shards.clone(), frames));
            first = round.shards.end;
        }
        let expected = [(0..4, MAX_WANTED), (4..200, 1), (200..201, MAX_WANTED + 5), (201..256, 2)];
        assert_eq!(rounds, expected);
    }
}
