//! Filling a pending snapshot: packs, and records of what is in them.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use lru::LruCache;
use tokio::sync::{OnceCell, Semaphore};
use uuid::Uuid;

use super::describe::not_found;
use super::directory::blocking;
use super::manifest::Start;
use super::names::{ObjectId, RecordId};
use super::pack::{Frame, PackBuilder, compress};
use super::table::{Entry, PAGE_BLOCKS, Table};
use super::{Repository, names, since_boot};
use crate::model::{Block, BlockIndex, Digest, SnapshotId, VolumeSize};
use crate::store::{Error, ErrorKind, Result};

/// Blocks among which equal ones are stored once.
const RECENT_BLOCKS: NonZeroUsize = NonZeroUsize::new(65_536).expect("not 0");

/// Batches that are being saved, or wait for it because it failed, at most. Each holds up to 32 MiB.
const MAX_SAVING: u32 = 3;

/// Blocks in one record at most, so that zero blocks, which fill no pack, get one in the end.
const MAX_RECORD_BLOCKS: usize = PAGE_BLOCKS as usize;

/// This process's part in filling one pending snapshot.
///
/// A block is in the open batch until that is full; then the batch is saved: its pack, then its
/// record. A batch that could not be saved is kept and saved with the next one, so a full disk
/// costs nothing that was accepted, as long as the process lives.
#[derive(Debug)]
pub(super) struct Writer {
    id: SnapshotId,
    attempt: Uuid,
    volume_size: VolumeSize,
    objects: Arc<dyn super::Objects>,
    /// Known from the first put on.
    who: OnceCell<(u32, Uuid)>,
    /// One permit a batch that is being saved.
    saving: Semaphore,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    open: Batch,
    unsaved: Vec<Batch>,
    next_record: u32,
    recent: LruCache<Digest, Frame>,
    /// When the oldest object of this writer may have been made, by [`since_boot`].
    oldest: Option<std::time::Duration>,
}

/// What is put: zeros, or data, whose frame is not needed where an equal one is known.
#[derive(Clone, Copy, Debug)]
enum Content<'a> {
    Zero,
    Data(Option<&'a [u8]>),
}

/// A pack and the record of it.
#[derive(Debug, Default)]
struct Batch {
    pack: PackBuilder,
    /// A zero block has no frame. The later put of a block replaces the earlier one.
    blocks: BTreeMap<BlockIndex, (Option<Frame>, Digest)>,
    record: u32,
    /// The pack once it is encoded, so that saving again needs not encode again.
    encoded: Option<(ObjectId, Bytes)>,
}

impl Batch {
    fn is_full(&self) -> bool {
        self.pack.is_full() || self.blocks.len() >= MAX_RECORD_BLOCKS
    }
}

impl Repository {
    pub(super) fn existing_writer(&self, id: &SnapshotId) -> Option<Arc<Writer>> {
        self.writers.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    pub(super) fn forget_writer(&self, id: &SnapshotId) {
        self.writers.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    /// This process's writer for a pending snapshot.
    pub(super) async fn writer(&self, id: &SnapshotId) -> Result<Arc<Writer>> {
        if let Some(writer) = self.existing_writer(id) {
            return Ok(writer);
        }
        let Some(start) = self.start_of(id).await? else {
            return Err(if self.objects.exists(&names::manifest(id)).await? {
                Error::new(ErrorKind::Conflict, "it is completed, and cannot be written any more")
            } else {
                not_found(id)
            });
        };
        let mut writers = self.writers.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(Writer::new(&start, Arc::clone(&self.objects)));
        Ok(Arc::clone(writers.entry(id.clone()).or_insert_with(new)))
    }
}

impl Writer {
    fn new(start: &Start, objects: Arc<dyn super::Objects>) -> Self {
        Self {
            id: start.metadata.id.clone(),
            attempt: start.metadata.attempt,
            volume_size: start.metadata.volume_size,
            objects,
            who: OnceCell::new(),
            saving: Semaphore::new(MAX_SAVING as usize),
            state: Mutex::new(State {
                open: Batch::default(),
                unsaved: Vec::new(),
                next_record: 0,
                recent: LruCache::new(RECENT_BLOCKS),
                oldest: None,
            }),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The epoch and the name of this writer: its epoch is one above all that it found.
    async fn who(&self) -> Result<(u32, Uuid)> {
        let find = || async {
            let names = self.objects.list(&names::attempt(&self.id, self.attempt)).await?;
            let highest =
                names.iter().filter_map(|name| RecordId::from_name(name)).map(|r| r.epoch);
            Ok((highest.max().map_or(1, |epoch| epoch + 1), Uuid::new_v4()))
        };
        self.who.get_or_try_init(find).await.copied()
    }

    /// When the oldest object of this writer may have been made, by [`since_boot`].
    pub(super) fn oldest(&self) -> Option<std::time::Duration> {
        self.state().oldest
    }

    pub(super) async fn put(&self, index: BlockIndex, block: Block) -> Result<()> {
        if !self.volume_size.contains(index) {
            let message = format!("the volume has {} only", self.volume_size);
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        self.who().await?;
        let digest = block.digest();
        let mut frame = None;
        loop {
            if !block.is_zero() && frame.is_none() && !self.knows(digest) {
                let raw = block.bytes();
                frame = Some(blocking(move || Ok(compress(&raw))).await?);
            }
            if !self.state().unsaved.is_empty() {
                self.flush().await?;
            }
            // Waiting here for a batch to be saved is what keeps memory bounded.
            let _permit = self.saving.acquire().await.expect("it is never closed");
            let content =
                if block.is_zero() { Content::Zero } else { Content::Data(frame.as_deref()) };
            let full = {
                let mut state = self.state();
                // What was known may have been taken to be saved since: then it must be stored.
                if !state.add(index, digest, content) {
                    continue;
                }
                state.take_full()
            };
            return match full {
                Some(batch) => self.save(batch).await,
                None => Ok(()),
            };
        }
    }

    fn knows(&self, digest: Digest) -> bool {
        self.state().find(digest).is_some()
    }

    /// Saves everything that was put.
    pub(super) async fn flush(&self) -> Result<()> {
        // With all permits nobody else is saving.
        let _permits = self.saving.acquire_many(MAX_SAVING).await.expect("it is never closed");
        loop {
            let batch = {
                let mut state = self.state();
                match state.unsaved.is_empty() {
                    false => Some(state.unsaved.remove(0)),
                    true => state.take_open(),
                }
            };
            let Some(batch) = batch else { return Ok(()) };
            self.save(batch).await?;
        }
    }

    /// Saves a batch, or puts it back to be saved later.
    async fn save(&self, mut batch: Batch) -> Result<()> {
        match self.try_save(&mut batch).await {
            Ok(()) => Ok(()),
            Err(error) => {
                self.state().unsaved.push(batch);
                Err(error)
            }
        }
    }

    async fn try_save(&self, batch: &mut Batch) -> Result<()> {
        let (epoch, writer) = self.who().await?;
        if !batch.pack.is_empty() {
            let id = std::sync::Arc::clone(&batch.pack.id);
            batch.encoded = Some(std::mem::take(&mut batch.pack).finish(writer));
            batch.pack.id = id;
        }
        if let Some((pack, data)) = &batch.encoded {
            // A batch that is saved again may find its own pack from the first try.
            self.objects.create(&pack.pack_name(), data.clone()).await?;
            let _ = batch.pack.id.set(*pack);
        }
        let entry = |(&index, (frame, digest)): (&BlockIndex, &(Option<Frame>, Digest))| {
            let location = frame.as_ref().map(|f| f.location().expect("its pack is saved"));
            Entry { index, location, digest: *digest }
        };
        let entries: Vec<_> = batch.blocks.iter().map(entry).collect();
        let table = Table::encode(&entries);
        let mut record = table.to_vec();
        record.extend_from_slice(&Digest::of(&table).0);
        let name = RecordId { epoch, writer, number: batch.record }.name(&self.id, self.attempt);
        self.objects.create(&name, record.into()).await?;
        if self.objects.exists(&names::sealed(&self.id, self.attempt)).await? {
            let message =
                format!("the completion of {} has begun; it takes no more blocks", self.id);
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        Ok(())
    }
}

impl State {
    /// A frame with this digest that can be referred to: in the open batch, or saved.
    fn find(&self, digest: Digest) -> Option<Frame> {
        let frame = self.recent.peek(&digest)?;
        let usable = frame.pack.get().is_some() || Arc::ptr_eq(&frame.pack, &self.open.pack.id);
        usable.then(|| frame.clone())
    }

    /// Adds a block to the open batch; false if its frame is needed and was not given.
    fn add(&mut self, index: BlockIndex, digest: Digest, content: Content<'_>) -> bool {
        let frame = match (content, self.find(digest)) {
            (Content::Zero, _) => None,
            (Content::Data(_), Some(frame)) => Some(frame),
            (Content::Data(Some(data)), None) => {
                let frame = self.open.pack.push(data, digest);
                self.recent.put(digest, frame.clone());
                Some(frame)
            }
            (Content::Data(None), None) => return false,
        };
        self.oldest.get_or_insert_with(since_boot);
        self.open.blocks.insert(index, (frame, digest));
        true
    }

    fn take_full(&mut self) -> Option<Batch> {
        if self.open.is_full() { self.take_open() } else { None }
    }

    fn take_open(&mut self) -> Option<Batch> {
        if self.open.blocks.is_empty() {
            return None;
        }
        let mut batch = std::mem::take(&mut self.open);
        batch.record = self.next_record;
        self.next_record += 1;
        Some(batch)
    }
}

/// The entries of a record; what is wrong with it otherwise.
pub(super) fn read_record(bytes: &Bytes) -> std::result::Result<Table, &'static str> {
    let end = bytes.len().checked_sub(32).ok_or("it is truncated")?;
    let table = bytes.slice(..end);
    if Digest::of(&table).0 != bytes[end..] {
        return Err("its checksum does not match");
    }
    Table::decode(table)
}
