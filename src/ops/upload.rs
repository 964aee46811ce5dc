//! `upload`: a file or device becomes a snapshot.

use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures::TryStreamExt as _;

use super::blocks::Listing;
use super::{Error, Result};
use crate::model::{
    Block, BlockIndex, Digester, LENGTH_TAG, MAX_DESCRIPTION_CHARS, Snapshot, SnapshotId, Tags,
};
use crate::store::{CompleteRequest, ListedBlock, SharedStore, StartRequest};
use crate::transfer::source::Source;
use crate::transfer::{SharedProgress, blocking, concurrency};

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
struct Candidate {
    index: BlockIndex,
    /// Whether the file has something there; else it is a hole.
    in_file: bool,
    /// What the parent has there.
    parent: Option<ListedBlock>,
}

impl Upload {
    /// Does it. If it fails there is no snapshot; if this is dropped, call [`abort`] with the id that
    /// `started` got, with the length of the file in bytes.
    pub async fn run(
        self,
        store: SharedStore,
        progress: SharedProgress,
        started: impl FnOnce(&SnapshotId, u64),
    ) -> Result<Done> {
        let began = Instant::now();
        let path = self.path.clone();
        let source = blocking(move || Source::open(&path)).await?;
        let snapshot = store.start(self.request(&source)).await?;
        started(&snapshot.id, source.len());
        let put = self.put_all(&store, &snapshot.id, &source, &progress).await;
        let done = match put {
            Ok(request) => store.complete(&snapshot.id, request).await.map(|s| (s, request)),
            Err(error) => {
                abort(&store, &snapshot.id).await;
                return Err(error);
            }
        };
        match done {
            Ok((snapshot, request)) => Ok(Done {
                snapshot,
                len: source.len(),
                blocks: request.changed_blocks,
                elapsed: began.elapsed(),
                unchanged: source.is_unchanged(),
            }),
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
            origin: Some(origin),
            ..StartRequest::new(source.volume_size())
        }
    }

    async fn put_all(
        &self,
        store: &SharedStore,
        id: &SnapshotId,
        source: &Source,
        progress: &SharedProgress,
    ) -> Result<CompleteRequest> {
        let parent = self.parent.clone().map(|parent| Listing::new(store.clone(), parent));
        let mut checksum = Digester::default();
        let mut changed_blocks = 0;
        let candidates = candidates(source.clone(), parent).await?;
        let read = candidates
            .map_ok(|candidate| {
                let source = source.clone();
                async move {
                    let block = match candidate.in_file {
                        true => blocking(move || source.read(candidate.index)).await?,
                        false => Block::Zero,
                    };
                    Ok::<_, Error>((candidate, block))
                }
            })
            .try_buffered(concurrency());
        let puts = read
            .try_filter_map(|(candidate, block)| {
                progress.advance(1);
                let put = self.is_needed(&candidate, &block);
                if put {
                    checksum.update(block.digest().0);
                    changed_blocks += 1;
                }
                futures::future::ready(Ok(put.then_some((candidate.index, block))))
            })
            .map_ok(|(index, block)| async move {
                store.put_block(id, index, block).await.map_err(Error::from)
            })
            .try_buffer_unordered(store.parallelism());
        puts.try_collect::<()>().await?;
        source.check_len()?;
        Ok(CompleteRequest { changed_blocks, checksum: Some(checksum.finish()) })
    }

    fn is_needed(&self, candidate: &Candidate, block: &Block) -> bool {
        match &candidate.parent {
            // What the parent has is put where it differs; zeros too, or the parent shows through.
            Some(parent) => parent.digest != Some(block.digest()),
            None => !block.is_zero() || (self.full_copy && candidate.in_file),
        }
    }
}

/// Removes a snapshot that will not be completed. A failure is logged: it stays pending, and
/// `delete` removes it.
pub async fn abort(store: &SharedStore, id: &SnapshotId) {
    if let Err(error) = store.delete(id).await {
        tracing::warn!("{id} stays pending: {error}");
    }
}

/// The blocks that the file or the parent has, ascending.
async fn candidates(
    source: Source,
    mut parent: Option<Listing>,
) -> Result<impl futures::Stream<Item = Result<Candidate>>> {
    let next_parent = next(&mut parent).await?;
    let (extents, end) = (source.extents(), source.volume_size().blocks());
    let state = (extents, None::<Range<u32>>, parent, next_parent);
    Ok(futures::stream::try_unfold(
        state,
        move |(mut extents, mut run, mut parent, mut theirs)| async move {
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
            let Some(index) = [ours, other].into_iter().flatten().min() else { return Ok(None) };
            let in_file = ours == Some(index);
            if in_file {
                run.as_mut().map(Iterator::next);
            }
            let mut candidate = Candidate { index, in_file, parent: None };
            if other == Some(index) {
                candidate.parent = theirs.take();
                theirs = next(&mut parent).await?;
            }
            Ok::<_, Error>(Some((candidate, (extents, run, parent, theirs))))
        },
    ))
}

async fn next(listing: &mut Option<Listing>) -> Result<Option<ListedBlock>> {
    match listing {
        Some(listing) => Ok(listing.next().await?),
        None => Ok(None),
    }
}
