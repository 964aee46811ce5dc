//! `download`: a snapshot becomes a file, or is written to a device.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures::TryStreamExt as _;

use super::blocks::Listing;
use super::{Error, Result};
use crate::blocking::blocking;
use crate::model::{BLOCK_SIZE_U64, BlockIndex, Digest, Snapshot, SnapshotId};
use crate::store::page::check_within;
use crate::store::{self, ErrorKind, ListedBlock, SharedStore};
use crate::transfer::target::{Target, Writer};
use crate::transfer::thread::{WriteQueue, WriteThread};
use crate::transfer::{self, SharedProgress, spawned};

/// What to download, and where to.
#[derive(Clone, Debug)]
pub struct Download {
    /// The snapshot.
    pub id: SnapshotId,
    /// The file or device.
    pub path: PathBuf,
    /// A directory that the file must not be in: the store itself.
    pub not_in: Option<PathBuf>,
}

/// What was done.
#[derive(Clone, Debug)]
pub struct Done {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// Blocks that hold data, each read, checked and written.
    pub blocks: u64,
    /// How long it took.
    pub elapsed: Duration,
}

impl Download {
    /// Does it. Dropping this leaves a file as it was, and a device half written.
    pub async fn run(self, store: SharedStore, progress: SharedProgress) -> Result<Done> {
        let began = Instant::now();
        let snapshot = store.describe(&self.id).await?;
        if !snapshot.is_readable() {
            let state = snapshot.state.as_str();
            let why = snapshot.state_message.map(|why| format!(" ({why})")).unwrap_or_default();
            let message = format!("{} is {state}{why}, and cannot be read", self.id);
            return Err(store::Error::new(ErrorKind::NotReady, message).into());
        }
        self.check_place()?;
        progress.total(snapshot.data_blocks.unwrap_or(0));
        let target = Target::open(&self.path, snapshot.image_len())?;
        let written = write_blocks(&store, &snapshot, &target, &progress).await?;
        blocking(move || target.finish()).await?;
        Ok(Done { snapshot, blocks: written, elapsed: began.elapsed() })
    }

    /// The store is not to be overwritten with what comes out of it.
    fn check_place(&self) -> Result<()> {
        let Some(store) = self.not_in.as_deref().and_then(|store| store.canonicalize().ok()) else {
            return Ok(());
        };
        let directory = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let place = self
            .path
            .canonicalize()
            .ok()
            .or_else(|| directory.unwrap_or(Path::new(".")).canonicalize().ok());
        match place {
            Some(place) if place.starts_with(&store) => {
                Err(transfer::Error::unsuitable(&self.path, "it is inside the store itself").into())
            }
            _ => Ok(()),
        }
    }
}

async fn write_blocks(
    store: &SharedStore,
    snapshot: &Snapshot,
    target: &Target,
    progress: &SharedProgress,
) -> Result<u64> {
    let id = &snapshot.id;
    let end = BlockIndex::containing(snapshot.image_len().next_multiple_of(BLOCK_SIZE_U64));
    let mut zeroed = Zeroed { writer: target.writer(), needed: target.is_device(), at: 0 };
    let written = progress.clone();
    let thread = WriteThread::new(target.writer(), move || written.advance(1))
        .map_err(|e| transfer::Error::io("write", target.path(), e))?;
    let mut copied = 0;
    {
        let listed = Listing::new(store.clone(), id.clone()).stream();
        let within = listed.and_then(|block| {
            let checked = check_within(snapshot, Some(block.index));
            futures::future::ready(checked.map(|()| block))
        });
        let data = within.map_err(Error::from).try_filter(|block| {
            let data = block.digest != Some(Digest::OF_ZEROS) && block.index < end;
            futures::future::ready(data)
        });
        // What is between the blocks is zeroed in order, while the blocks are written in any.
        let holes = data.and_then(|block| {
            let zero = zeroed.up_to(block.index.offset());
            let next = block.index.next().offset();
            zeroed.at = next;
            async move {
                zero.await?;
                Ok(block)
            }
        });
        let writes = holes
            .map_ok(|block| {
                let (store, id) = (store.clone(), id.clone());
                spawned(copy_block(store, id, block, thread.queue()))
            })
            .try_buffer_unordered(store.parallelism());
        let mut writes = std::pin::pin!(writes);
        // If nothing is written any more, the thread says why.
        while writes.try_next().await? == Some(true) {
            copied += 1;
        }
    }
    thread.finish().await?;
    zeroed.up_to(snapshot.volume_size.bytes()).await?;
    Ok(copied)
}

async fn copy_block(
    store: SharedStore,
    id: SnapshotId,
    listed: ListedBlock,
    queue: WriteQueue,
) -> Result<bool> {
    let index = listed.index;
    queue.room().await;
    let block = store.get_block(&id, index, &listed.token).await?;
    if listed.digest.is_some_and(|digest| digest != block.digest()) {
        let message = format!("block {index} of {id} is not what was listed");
        return Err(store::Error::new(ErrorKind::Corrupt, message).into());
    }
    Ok(queue.write(index, block).await)
}

/// Zeros the holes of a device, in order.
struct Zeroed {
    writer: Writer,
    needed: bool,
    /// Everything before this offset is written, or about to be.
    at: u64,
}

impl Zeroed {
    fn up_to(&self, end: u64) -> impl Future<Output = Result<()>> + use<> {
        let hole = (self.needed && self.at < end).then(|| (self.writer.clone(), self.at));
        async move {
            match hole {
                Some((writer, start)) => Ok(blocking(move || writer.zero(start, end)).await?),
                None => Ok(()),
            }
        }
    }
}
