//! Archives that Flexible Snapshot Proxy has made in a bucket, as snapshots that can be read.
//!
//! Each object is a segment: `<snapshot>.<GiB>/<first block>.<digest>.<blocks>.zstd`, one zstd frame of up to 64 blocks that follow
//! each other within one window of 64. The digest is the SHA-256 of the blocks, in base64 for URLs. There is no list of the
//! segments, and the last one of a snapshot was never stored: an archive whose segments do not end where its volume ends
//! has lost data.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::sync::Arc;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use bytes::Bytes;
use jiff::Timestamp;
use lru::LruCache;
use tokio::sync::{Mutex, OnceCell};

use super::page::{page_token, start_index};
use super::repository::{BucketUrl, Foreign};
use super::{
    BlockPage, BlockToken, ChangedPage, CompleteRequest, Error, ErrorKind, ListFrom, ListToken,
    ListedBlock, MAX_PAGE_BLOCKS, Result, SnapshotPage, SnapshotStore, StartRequest, StoreOptions,
    Usage,
};
use crate::blocking::blocking;
use crate::model::{
    BLOCK_SIZE, Block, BlockIndex, Digest, Snapshot, SnapshotId, SnapshotState, Tags, VolumeSize,
};

/// Blocks of a segment at most, and of the window that it lies in.
const WINDOW: u32 = 64;

/// Bytes of the object of a segment at most: what zstd makes of blocks that cannot be compressed.
const MAX_OBJECT: u64 = 33 << 20;

/// Segments that are kept in memory: those that are read at the same time, and one more.
const KEPT: NonZeroUsize = NonZeroUsize::new(4).expect("not 0");

/// Blocks that are worth being read at the same time.
const PARALLEL: usize = 2 * WINDOW as usize;

/// The tag of what was restored though something is missing.
pub(crate) const SALVAGED_TAG: &str = "fspfs:salvaged";

/// Faults that are told of one archive.
const MAX_TOLD: usize = 5;

/// The archives below a prefix of a bucket.
#[derive(Debug)]
pub(crate) struct Archives {
    url: BucketUrl,
    objects: Foreign,
    by_id: BTreeMap<SnapshotId, Archive>,
    segments: Mutex<LruCache<String, Arc<OnceCell<Bytes>>>>,
    /// What is whole is read, whatever is missing.
    salvage: bool,
}

/// The archive of one snapshot.
#[derive(Debug)]
struct Archive {
    size: VolumeSize,
    /// As far as the names tell.
    found: Found,
    /// When all of it was read.
    salvaged: OnceCell<Found>,
}

/// What there is of an archive.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Found {
    /// Ascending, without those that cannot be right.
    segments: Vec<Segment>,
    /// What is wrong.
    faults: Vec<String>,
}

/// Blocks that follow each other, as the name of their object says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Segment {
    name: String,
    first: u32,
    blocks: u32,
    digest: Digest,
}

impl Segment {
    fn end(&self) -> u32 {
        self.first + self.blocks
    }

    /// The snapshot, its size, and the segment, of the name of an object.
    fn of(name: &str) -> Option<(SnapshotId, VolumeSize, std::result::Result<Self, ()>)> {
        let (directory, file) = name.split_once('/')?;
        let (id, gib) = directory.split_once('.')?;
        let (id, gib) = (id.parse().ok()?, number(gib)?);
        let size = VolumeSize::from_gib(gib.into()).ok()?;
        let segment = || {
            let mut parts = file.split('.');
            let (first, digest) = (number(parts.next()?)?, parts.next()?);
            let (blocks, kind) = (number(parts.next()?)?, parts.next()?);
            let digest = URL_SAFE.decode(digest).ok().and_then(|bytes| bytes.try_into().ok())?;
            let is_one = kind == "zstd"
                && parts.next().is_none()
                && (1..=WINDOW - first % WINDOW).contains(&blocks)
                && first.checked_add(blocks)? <= size.blocks().0;
            let name = name.to_owned();
            is_one.then_some(Self { name, first, blocks, digest: Digest(digest) })
        };
        Some((id, size, segment().ok_or(())))
    }
}

/// A number, in the one form in which it is written.
fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|number: &u32| number.to_string() == text)
}

impl Found {
    /// Sorts the segments of a volume, and sees what is missing.
    fn finish(&mut self, size: VolumeSize) {
        self.segments.sort_by_key(|segment| segment.first);
        let pairs = self.segments.windows(2).filter(|pair| pair[0].end() > pair[1].first);
        let mut doubtful = BTreeSet::new();
        for pair in pairs {
            let [one, other] = [&pair[0].name, &pair[1].name];
            self.faults.push(format!("{one} and {other} are of the same blocks"));
            doubtful.extend([one.clone(), other.clone()]);
        }
        self.segments.retain(|segment| !doubtful.contains(&segment.name));
        let (end, size) = (self.segments.last().map_or(0, Segment::end), size.blocks().0);
        if end < size {
            self.faults.push(format!(
                "its last segment, which Flexible Snapshot Proxy does not store, is missing: of the blocks from {end} on \
                 up to {WINDOW} or more are lost"
            ));
        }
    }
}

/// The archives that the names of objects tell of.
fn archives(names: &[String]) -> BTreeMap<SnapshotId, Archive> {
    let mut archives = BTreeMap::new();
    for name in names {
        let Some((id, size, segment)) = Segment::of(name) else { continue };
        let new = || Archive { size, found: Found::default(), salvaged: OnceCell::new() };
        let archive = archives.entry(id).or_insert_with(new);
        let Found { segments, faults } = &mut archive.found;
        match segment {
            Ok(segment) if archive.size == size => segments.push(segment),
            Ok(_) => faults.push(format!("{name} is of a volume of another size")),
            Err(()) => faults.push(format!("{name} is no segment")),
        }
    }
    for archive in archives.values_mut() {
        archive.found.finish(archive.size);
    }
    archives
}

/// Reads the names of objects.
#[cfg(any(test, fuzzing))]
pub(super) fn archives_of(names: &[String]) {
    for archive in archives(names).values() {
        let segments = &archive.found.segments;
        assert!(segments.is_sorted_by(|a, b| a.end() <= b.first), "{segments:?}");
    }
}

/// Faults, as one text.
fn told(faults: &[String]) -> String {
    let mut text = faults.iter().take(MAX_TOLD).cloned().collect::<Vec<_>>().join("; ");
    if let Some(more) = faults.len().checked_sub(MAX_TOLD).filter(|more| *more > 0) {
        let _ = write!(text, "; and {more} more");
    }
    text
}

impl Archives {
    /// The archives that a bucket has; `None` if there is none.
    ///
    /// # Errors
    ///
    /// Those of the service.
    pub(crate) async fn open(url: &BucketUrl, options: &StoreOptions) -> Result<Option<Self>> {
        let objects = Foreign::open(url, options).await?;
        // A bucket may hold anything else.
        let by_id = archives(&objects.list("snap-").await?);
        let segments = Mutex::new(LruCache::new(KEPT));
        let (url, salvage) = (url.clone(), options.salvage);
        let found = !by_id.is_empty();
        Ok(found.then_some(Self { url, objects, by_id, segments, salvage }))
    }

    fn archive(&self, id: &SnapshotId) -> Result<&Archive> {
        self.by_id.get(id).ok_or_else(|| {
            let message = format!("there is no archive of {id} in {}", self.url);
            Error::new(ErrorKind::NotFound, message)
        })
    }

    /// The segments that are read, and what is wrong with the archive.
    async fn found<'a>(&self, archive: &'a Archive) -> Result<&'a Found> {
        if !self.salvage {
            return Ok(&archive.found);
        }
        let salvaged = archive.salvaged.get_or_try_init(|| async {
            let mut found = Found { faults: archive.found.faults.clone(), ..Found::default() };
            for segment in &archive.found.segments {
                match self.load(segment).await {
                    Ok(_) => found.segments.push(segment.clone()),
                    Err(error) if error.kind() == ErrorKind::Corrupt => {
                        found.faults.push(error.to_string());
                    }
                    Err(error) => return Err(error),
                }
            }
            Ok(found)
        });
        salvaged.await
    }

    async fn snapshot(
        &self,
        id: &SnapshotId,
        archive: &Archive,
        found: &Found,
    ) -> Result<Snapshot> {
        let Found { segments, faults } = found;
        let start_time = match segments.first() {
            Some(segment) => self.objects.modified(&segment.name).await?,
            None => Timestamp::UNIX_EPOCH,
        };
        let is_whole = faults.is_empty();
        let mut tags = Tags::new();
        let mut description = "archive of Flexible Snapshot Proxy".to_owned();
        if !is_whole && self.salvage {
            tags.insert(SALVAGED_TAG.to_owned(), faults.len().to_string());
            let _ = write!(description, ", salvaged: {}", told(faults));
            description = description.chars().take(crate::model::MAX_DESCRIPTION_CHARS).collect();
        }
        let state = match is_whole || self.salvage {
            true => SnapshotState::Completed,
            false => SnapshotState::Error,
        };
        let state_message = (!is_whole).then(|| {
            let cure = if self.salvage { "" } else { "; --salvage reads what is whole" };
            format!("{}{cure}", told(faults))
        });
        Ok(Snapshot {
            id: id.clone(),
            state,
            state_message,
            volume_size: archive.size,
            parent: None,
            lineage: None,
            volume_id: None,
            description,
            start_time,
            completion_time: None,
            tags,
            encrypted: false,
            content_digest: None,
            data_blocks: Some(segments.iter().map(|segment| u64::from(segment.blocks)).sum()),
            zero_blocks: None,
        })
    }

    /// The blocks of a segment, checked.
    async fn load(&self, segment: &Segment) -> Result<Bytes> {
        let place = {
            let mut segments = self.segments.lock().await;
            Arc::clone(segments.get_or_insert(segment.name.clone(), Arc::default))
        };
        let loaded = place.get_or_try_init(|| async {
            let object = match self.objects.read(&segment.name, MAX_OBJECT).await {
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    let message = format!("{} is missing", segment.name);
                    return Err(Error::new(ErrorKind::Corrupt, message));
                }
                object => object?,
            };
            let segment = segment.clone();
            blocking(move || decode(&segment, &object)).await
        });
        loaded.await.cloned()
    }

    fn read_only(&self, doing: &str) -> Error {
        let message = format!(
            "cannot {doing}: {} has archives of Flexible Snapshot Proxy, which can only be read",
            self.url
        );
        Error::new(ErrorKind::Unsupported, message)
    }
}

/// What the object of a segment holds. Waits for the processor.
fn decode(segment: &Segment, object: &[u8]) -> Result<Bytes> {
    let damaged =
        |why: String| Error::new(ErrorKind::Corrupt, format!("{} is damaged: {why}", segment.name));
    let len = segment.blocks as usize * BLOCK_SIZE;
    let blocks = zstd::bulk::decompress(object, len).map_err(|error| damaged(error.to_string()))?;
    if blocks.len() != len {
        return Err(damaged(format!("it holds {} bytes, not {len}", blocks.len())));
    }
    match Digest::of(&blocks) == segment.digest {
        true => Ok(blocks.into()),
        false => Err(damaged("its digest is not that of its name".to_owned())),
    }
}

#[async_trait]
impl SnapshotStore for Archives {
    async fn describe(&self, id: &SnapshotId) -> Result<Snapshot> {
        let archive = self.archive(id)?;
        self.snapshot(id, archive, self.found(archive).await?).await
    }

    async fn list(&self, _: Option<ListToken>) -> Result<SnapshotPage> {
        let mut snapshots = Vec::with_capacity(self.by_id.len());
        for (id, archive) in &self.by_id {
            // A list reads none of them.
            snapshots.push(self.snapshot(id, archive, &archive.found).await?);
        }
        Ok(SnapshotPage { snapshots, next: None })
    }

    async fn list_blocks(&self, id: &SnapshotId, from: ListFrom, max: usize) -> Result<BlockPage> {
        let (archive, from) = (self.archive(id)?, start_index(&from)?);
        let Found { segments, faults } = self.found(archive).await?;
        if !faults.is_empty() && !self.salvage {
            return Err(Error::new(ErrorKind::Corrupt, format!("{id}: {}", told(faults))));
        }
        let first = segments.partition_point(|segment| segment.end() <= from.0);
        let indexes = segments[first..].iter().flat_map(|segment| segment.first..segment.end());
        let mut indexes = indexes.skip_while(|index| *index < from.0);
        let max = max.clamp(1, MAX_PAGE_BLOCKS);
        let listed = |index: u32| ListedBlock {
            index: BlockIndex(index),
            token: BlockToken(Bytes::copy_from_slice(&index.to_le_bytes())),
            digest: None,
        };
        let blocks: Vec<_> = indexes.by_ref().take(max).map(listed).collect();
        let next = indexes.next().map(BlockIndex);
        let covered = Some(next.unwrap_or(archive.size.blocks()));
        Ok(BlockPage { blocks, covered, next: next.map(page_token), started: None })
    }

    async fn list_changed_blocks(
        &self,
        first: &SnapshotId,
        second: &SnapshotId,
        _: ListFrom,
        _: usize,
    ) -> Result<ChangedPage> {
        let message = format!("cannot compare {first} and {second}: they are not of one lineage");
        Err(Error::new(ErrorKind::Invalid, message))
    }

    async fn get_block(
        &self,
        id: &SnapshotId,
        index: BlockIndex,
        token: &BlockToken,
    ) -> Result<Block> {
        let expired = || {
            let message = format!("the token of block {index} of {id} is not one of this block");
            Error::new(ErrorKind::ExpiredToken, message)
        };
        let Found { segments, .. } = self.found(self.archive(id)?).await?;
        let at = segments.partition_point(|segment| segment.end() <= index.0);
        let segment = segments.get(at).filter(|segment| segment.first <= index.0);
        let segment =
            segment.filter(|_| token.0[..] == index.0.to_le_bytes()).ok_or_else(expired)?;
        let blocks = self.load(segment).await?;
        let start = (index.0 - segment.first) as usize * BLOCK_SIZE;
        Ok(Block::new(blocks.slice(start..start + BLOCK_SIZE)))
    }

    async fn start(&self, _request: StartRequest) -> Result<Snapshot> {
        Err(self.read_only("start a snapshot"))
    }

    async fn put_block(&self, id: &SnapshotId, index: BlockIndex, _block: Block) -> Result<()> {
        Err(self.read_only(&format!("put block {index} of {id}")))
    }

    async fn flush(&self, id: &SnapshotId) -> Result<()> {
        Err(self.read_only(&format!("flush {id}")))
    }

    async fn complete(&self, id: &SnapshotId, _request: CompleteRequest) -> Result<Snapshot> {
        Err(self.read_only(&format!("complete {id}")))
    }

    async fn delete(&self, id: &SnapshotId) -> Result<()> {
        Err(self.read_only(&format!("delete {id}")))
    }

    async fn set_tags(&self, id: &SnapshotId, _tags: Tags) -> Result<()> {
        Err(self.read_only(&format!("change the tags of {id}")))
    }

    fn parallelism(&self) -> usize {
        PARALLEL
    }

    fn usage(&self) -> Option<Usage> {
        Some(self.objects.usage())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(directory: &str, first: u32, blocks: u32) -> String {
        let digest = URL_SAFE.encode(Digest::of(&first.to_le_bytes()).0);
        format!("{directory}/{first}.{digest}.{blocks}.zstd")
    }

    #[test]
    fn an_archive_is_whole_if_its_segments_end_where_its_volume_does() {
        let at = "snap-0123456789abcdef0.1";
        let whole = [name(at, 64, 64), name(at, 3, 2), name(at, 2047, 1), "x/y".to_owned()];
        let found = archives(&whole);
        let archive = found.values().next().unwrap();
        assert_eq!((found.len(), &archive.found.faults), (1, &vec![]));
        let firsts: Vec<_> = archive.found.segments.iter().map(|segment| segment.first).collect();
        assert_eq!(firsts, [3, 64, 2047]);
        let faults = |names: &[String]| {
            let Found { segments, faults } = archives(names).into_values().next().unwrap().found;
            (segments.len(), told(&faults))
        };
        let (kept, why) = faults(&whole[..2]);
        assert!(kept == 2 && why.contains("last segment") && why.contains("from 128 on"), "{why}");
        for (bad, says) in [
            (name(at, 3, 1), "same blocks"),
            (name("snap-0123456789abcdef0.2", 9, 1), "another size"),
            (name(at, 60, 5), "no segment"),
            (name(at, 2046, 9), "no segment"),
            (name(at, 9, 1).replace(".zstd", ".gz"), "no segment"),
            (format!("{at}/9.AAAA.1.zstd"), "no segment"),
        ] {
            let (_, why) = faults(&[&whole[..], std::slice::from_ref(&bad)].concat());
            assert!(why.contains(says), "{bad}: {why}");
        }
    }

    #[test]
    fn a_segment_is_what_its_name_says_or_damaged() {
        let blocks = vec![7; 2 * BLOCK_SIZE];
        let object = zstd::bulk::compress(&blocks, 1).unwrap();
        let segment =
            |blocks: u32, digest| Segment { name: "x".to_owned(), first: 0, blocks, digest };
        let digest = Digest::of(&blocks);
        assert_eq!(decode(&segment(2, digest), &object).unwrap(), blocks);
        for (segment, object) in [
            (segment(2, Digest::of(b"")), &object[..]),
            (segment(3, digest), &object),
            (segment(1, digest), &object),
            (segment(2, digest), &object[..object.len() / 2]),
            (segment(2, digest), b""),
        ] {
            assert_eq!(decode(&segment, object).unwrap_err().kind(), ErrorKind::Corrupt);
        }
    }
}
