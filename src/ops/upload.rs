//! `upload`: a file or device becomes a snapshot.

use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures::stream::{self, TryReadyChunksError};
use futures::{StreamExt as _, TryStreamExt as _};

use super::blocks::Listing;
use super::{Error, Result};
use crate::blocking::blocking;
use crate::model::{
    Block, BlockIndex, Digester, LENGTH_TAG, MAX_DESCRIPTION_CHARS, Snapshot, SnapshotId,
    SnapshotState, Tags,
};
use crate::store::{self, CompleteRequest, ErrorKind, ListedBlock, SharedStore, StartRequest};
use crate::transfer::holes::too_many;
use crate::transfer::source::Source;
use crate::transfer::{SharedProgress, concurrent_runs, run_len, spawned};

/// How long it may take to learn whether a snapshot is completed that was to be given up.
const LOOK: Duration = Duration::from_secs(5);

/// How long it is tried to remove a snapshot that will not be completed: somebody waits to be let go.
const ABORT: Duration = Duration::from_secs(15);

/// What to upload, and as what.
#[derive(Clone, Debug)]
pub struct Upload {
    /// The file or device.
    pub path: PathBuf,
    /// The snapshot that the new one is a child of.
    pub parent: Option<SnapshotId>,
    /// Text for people; by default, where it comes from.
    pub description: Option<String>,
    /// Its tags.
    pub tags: Tags,
    /// The volume that it is an image of.
    pub volume_id: Option<String>,
    /// Put blocks of zeros too, where they are not holes.
    pub full_copy: bool,
    /// Ask the store to encrypt it. A child is encrypted as its parent is.
    pub encrypted: bool,
    /// The key to encrypt it with.
    pub kms_key: Option<String>,
    /// Put the holes of a snapshot that the store encrypts, as zeros.
    pub encrypted_holes: bool,
}

/// What was done.
#[derive(Clone, Debug)]
pub struct Done {
    /// The new snapshot.
    pub snapshot: Snapshot,
    /// Length of the file in bytes.
    pub len: u64,
    /// Blocks that were put.
    pub blocks: u64,
    /// How long it took.
    pub elapsed: Duration,
    /// Whether the file seems to have stayed the same while it was read.
    pub unchanged: bool,
}

/// A block that may have to be put.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub(super) index: BlockIndex,
    /// Whether the file has something there; else it is a hole.
    pub(super) in_file: bool,
    /// What the parent has there.
    pub(super) parent: Option<ListedBlock>,
}

/// A file, and the snapshot that was started for it.
#[derive(Debug)]
pub struct Begun {
    source: Source,
    snapshot: Snapshot,
}

impl Begun {
    /// The id of the snapshot.
    pub fn id(&self) -> &SnapshotId {
        &self.snapshot.id
    }

    /// Length of the file in bytes.
    pub fn source_len(&self) -> u64 {
        self.source.len()
    }
}

impl Upload {
    /// Opens the file and starts the snapshot. Dropping this may leave one that nobody knows of: whoever
    /// cannot wait has it run to its end elsewhere, and [`abort`]s what comes of it.
    pub async fn begin(&self, store: &SharedStore) -> Result<Begun> {
        let path = self.path.clone();
        let source = blocking(move || Source::open(&path)).await?;
        let snapshot = store.start(self.request(&source)).await?;
        Ok(Begun { source, snapshot })
    }

    /// Does it. If it fails there is no snapshot, unless it fails at the very end, where that may not be
    /// known; if this is dropped, call [`abort`].
    pub async fn run(
        self,
        store: SharedStore,
        begun: Begun,
        progress: SharedProgress,
    ) -> Result<Done> {
        let began = Instant::now();
        let Begun { source, snapshot } = begun;
        let put = self.put_all(&store, &snapshot, &source, &progress).await;
        let done = match put {
            Ok(request) => store.complete(&snapshot.id, request).await.map(|s| (s, request)),
            Err(error) => {
                abort(&store, &snapshot.id).await;
                return Err(error);
            }
        };
        match done {
            Ok((snapshot, _)) if snapshot.state == SnapshotState::Error => {
                let why = snapshot.state_message.unwrap_or_default();
                let message = format!("{} failed in the store: {why}", snapshot.id);
                Err(store::Error::new(ErrorKind::Unavailable, message).into())
            }
            Ok((snapshot, request)) => Ok(Done {
                snapshot,
                len: source.len(),
                blocks: request.changed_blocks,
                elapsed: began.elapsed(),
                unchanged: source.is_unchanged(),
            }),
            // It may be complete, and then it is as it should be.
            Err(error) if matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Timeout) => {
                let id = &snapshot.id;
                tracing::warn!(
                    "whether {id} was completed is not known: `fspfs list` tells; \
                     `fspfs delete {id}` removes it if it stays pending"
                );
                Err(error.into())
            }
            Err(error) => {
                abort(&store, &snapshot.id).await;
                Err(error.into())
            }
        }
    }

    fn request(&self, source: &Source) -> StartRequest {
        let path = self.path.canonicalize().unwrap_or_else(|_| self.path.clone());
        let origin: String =
            path.display().to_string().chars().take(MAX_DESCRIPTION_CHARS).collect();
        let by_default = || {
            let text = format!("Uploaded by fspfs from {}", path.display());
            text.chars().take(MAX_DESCRIPTION_CHARS).collect()
        };
        let mut tags = self.tags.clone();
        if source.len() != source.volume_size().bytes() {
            tags.insert(LENGTH_TAG.to_owned(), source.len().to_string());
        }
        StartRequest {
            parent: self.parent.clone(),
            tags,
            description: self.description.clone().unwrap_or_else(by_default),
            volume_id: self.volume_id.clone(),
            // A child is encrypted as its parent is, and must not be asked for it.
            encrypted: self.encrypted && self.parent.is_none(),
            kms_key: self.kms_key.clone().filter(|_| self.parent.is_none()),
            origin: Some(origin),
            ..StartRequest::new(source.volume_size())
        }
    }

    async fn put_all(
        &self,
        store: &SharedStore,
        snapshot: &Snapshot,
        source: &Source,
        progress: &SharedProgress,
    ) -> Result<CompleteRequest> {
        let zeros = snapshot.encrypted && self.encrypted_holes;
        let filled_from = self.filled_from(store, source, zeros).await?;
        let parent = self.parent.clone().map(|id| Parent { store: store.clone(), id });
        let listing = parent.as_ref().map(|p| Listing::new(p.store.clone(), p.id.clone()));
        let mut checksum = Digester::default();
        let mut changed_blocks = 0;
        let rule = Rule { full_copy: self.full_copy, zeros };
        // What the parent has may have to be read, which takes as long as a put.
        let reads = if parent.is_some() { store.parallelism().div_ceil(run_len()) } else { 0 };
        let candidates = candidates(source.clone(), filled_from, listing).await?;
        let read = candidates
            .try_ready_chunks(run_len())
            .map_err(|TryReadyChunksError(_, error)| error)
            .map_ok(|run| spawned(examine(source.clone(), parent.clone(), run, rule)))
            .try_buffered(reads.max(concurrent_runs()))
            .map_ok(|run| stream::iter(run).map(Ok))
            .try_flatten();
        let puts = read
            .try_filter_map(|(index, block, needed)| {
                progress.advance(1);
                if needed {
                    checksum.update(block.digest().0);
                    changed_blocks += 1;
                }
                futures::future::ready(Ok(needed.then_some((index, block))))
            })
            .map_ok(|(index, block)| {
                let (store, id) = (store.clone(), snapshot.id.clone());
                spawned(async move { Ok::<_, Error>(store.put_block(&id, index, block).await?) })
            })
            .try_buffer_unordered(store.parallelism());
        puts.try_collect::<()>().await?;
        source.check_len()?;
        Ok(CompleteRequest { changed_blocks, checksum: Some(checksum.finish()) })
    }

    /// From where on holes are candidates too. Those of an encrypted parent were put with it.
    async fn filled_from(
        &self,
        store: &SharedStore,
        source: &Source,
        zeros: bool,
    ) -> Result<BlockIndex> {
        let end = source.volume_size().blocks();
        if !zeros {
            return Ok(end);
        }
        let begin = match &self.parent {
            Some(parent) => store.describe(parent).await?.volume_size.blocks().min(end),
            None => BlockIndex::ZERO,
        };
        let mut holes = u64::from(end.0 - begin.0);
        for extent in source.extents() {
            let extent = extent?;
            holes -= u64::from(extent.end.max(begin).0 - extent.start.max(begin).0);
        }
        match too_many(holes) {
            Some(why) => Err(store::Error::new(ErrorKind::Quota, why).into()),
            None => Ok(begin),
        }
    }
}

/// What blocks of zeros are put for.
#[derive(Clone, Copy, Debug)]
struct Rule {
    /// They are in the file.
    full_copy: bool,
    /// They are missing in the snapshot else.
    zeros: bool,
}

/// The snapshot that the new one begins with.
#[derive(Clone, Debug)]
struct Parent {
    store: SharedStore,
    id: SnapshotId,
}

/// Reads blocks of the file, and finds out which have to be put.
async fn examine(
    source: Source,
    parent: Option<Parent>,
    run: Vec<Candidate>,
    rule: Rule,
) -> Result<Vec<(BlockIndex, Block, bool)>> {
    let in_file = run.iter().filter(|c| c.in_file).map(|c| c.index).collect();
    let mut blocks = source.read_all(in_file).await?.into_iter();
    let found = run.into_iter().map(|candidate| {
        let block = if candidate.in_file { blocks.next() } else { None };
        is_needed(candidate, block.unwrap_or(Block::Zero), parent.as_ref(), rule)
    });
    // All at once: each may have to be read from the parent.
    futures::future::try_join_all(found).await
}

async fn is_needed(
    candidate: Candidate,
    block: Block,
    parent: Option<&Parent>,
    rule: Rule,
) -> Result<(BlockIndex, Block, bool)> {
    let Candidate { index, in_file, parent: theirs } = candidate;
    // What the parent has is put where it differs; zeros too, or the parent shows through.
    let needed = match (theirs, parent) {
        (Some(ListedBlock { digest: Some(digest), .. }), _) => digest != block.digest(),
        (Some(listed), Some(Parent { store, id })) => {
            // To read one costs half of what putting one does, and a block that is put is paid for
            // as long as the snapshot is there.
            store.get_block(id, index, &listed.token).await?.digest() != block.digest()
        }
        _ => !block.is_zero() || rule.zeros || (rule.full_copy && in_file),
    };
    Ok((index, block, needed))
}

/// Removes a snapshot that will not be completed, unless it is all the same. A failure is logged: then it
/// stays pending.
pub async fn abort(store: &SharedStore, id: &SnapshotId) {
    if let Ok(Ok(found)) = tokio::time::timeout(LOOK, store.describe(id)).await
        && found.state == SnapshotState::Completed
    {
        tracing::warn!("{id} is completed, and stays");
        return;
    }
    let why = match tokio::time::timeout(ABORT, store.delete(id)).await {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("the store did not delete it within {} s", ABORT.as_secs()),
    };
    tracing::error!("{id} stays pending: {why}; `fspfs delete {id}` removes it");
}

/// The blocks that the file or the parent has, ascending; from `filled_from` on, all.
pub(super) async fn candidates(
    source: Source,
    filled_from: BlockIndex,
    mut parent: Option<Listing>,
) -> Result<impl futures::Stream<Item = Result<Candidate>>> {
    let next_parent = next(&mut parent).await?;
    let (extents, end) = (source.extents(), source.volume_size().blocks());
    let state = (extents, None::<Range<u32>>, filled_from.0..end.0, (parent, next_parent));
    Ok(futures::stream::try_unfold(
        state,
        move |(mut extents, mut run, mut filler, (mut parent, mut theirs))| async move {
            while run.as_ref().is_none_or(Range::is_empty) {
                match extents.next() {
                    Some(extent) => run = Some(extent.map(|r| r.start.0..r.end.0)?),
                    None => {
                        run = None;
                        break;
                    }
                }
            }
            let ours = run.as_ref().map(|run| BlockIndex(run.start));
            // What the parent has beyond the end of a smaller volume is not in the child anyway.
            let other = theirs.as_ref().map(|block: &ListedBlock| block.index).filter(|i| *i < end);
            let hole = (!filler.is_empty()).then_some(BlockIndex(filler.start));
            let Some(index) = [ours, other, hole].into_iter().flatten().min() else {
                return Ok(None);
            };
            let in_file = ours == Some(index);
            if in_file {
                run.as_mut().map(Iterator::next);
            }
            filler.start = filler.start.max(index.0 + 1);
            let mut candidate = Candidate { index, in_file, parent: None };
            if other == Some(index) {
                candidate.parent = theirs.take();
                theirs = next(&mut parent).await?;
            }
            Ok::<_, Error>(Some((candidate, (extents, run, filler, (parent, theirs)))))
        },
    ))
}

async fn next(listing: &mut Option<Listing>) -> Result<Option<ListedBlock>> {
    match listing {
        Some(listing) => Ok(listing.next().await?),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::repository::Repository;
    use crate::store::wrap::{Call, Wrapper};
    use crate::transfer::Silent;

    /// A store that takes everything, and then cannot complete it.
    #[derive(Debug)]
    struct Failing(SharedStore);

    impl Wrapper for Failing {
        fn inner(&self) -> &SharedStore {
            &self.0
        }

        fn snapshot(&self, call: Call, mut snapshot: Snapshot) -> Snapshot {
            if call == Call::Complete {
                snapshot.state = SnapshotState::Error;
                snapshot.state_message = Some("its key is disabled".to_owned());
            }
            snapshot
        }
    }

    #[tokio::test]
    async fn a_snapshot_that_fails_at_the_end_is_no_success() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.img");
        std::fs::write(&path, "x").unwrap();
        let repository = Repository::create(&dir.path().join("store")).await.unwrap();
        let store: SharedStore = std::sync::Arc::new(Failing(std::sync::Arc::new(repository)));
        let upload = Upload {
            path,
            parent: None,
            description: None,
            tags: Tags::default(),
            volume_id: None,
            full_copy: false,
            encrypted: false,
            kms_key: None,
            encrypted_holes: false,
        };
        let begun = upload.begin(&store).await.unwrap();
        let error = upload.run(store, begun, std::sync::Arc::new(Silent)).await.unwrap_err();
        assert!(error.to_string().contains("its key is disabled"), "{error}");
    }
}
