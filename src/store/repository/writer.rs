//! Filling a pending snapshot: packs, and records of what is in them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use lru::LruCache;
use tokio::sync::{OnceCell, Semaphore};
use uuid::Uuid;

use super::complete::{SAFE, Sealed};
use super::describe::{Found, not_found};
use super::document::read_document;
use super::gc::found_before;
use super::manifest::Start;
use super::names::{ObjectId, RecordId};
use super::pack::{Encoded, Frame, PACK_BLOCKS, PackBuilder, Spare, shrinks};
use super::table::{Entry, PAGE_BLOCKS, Table};
use super::{Repository, names, since_boot};
use crate::blocking::blocking;
use crate::model::{BLOCK_SIZE, Block, BlockIndex, Digest, SnapshotId, VolumeSize};
use crate::store::{Error, ErrorKind, Result};

/// Blocks among which equal ones are stored once.
const RECENT_BLOCKS: usize = 65_536;

/// Batches that are being saved, or wait for it because it failed, at most. Each holds up to 32 MiB, if packs
/// have the full size.
const MAX_SAVING: u32 = 3;

/// The size of packs of which all that a writer holds at a time takes about so many bytes.
pub(super) fn pack_blocks(max_unsaved: usize) -> usize {
    let packs = MAX_SAVING as usize + 1;
    (max_unsaved / packs / BLOCK_SIZE).clamp(1, PACK_BLOCKS)
}

/// Blocks that are compressed at the same time, each into a buffer of its own; more than the cores
/// can do at once do not make it faster.
const MAX_COMPRESSING: usize = 8;

/// How long a deletion waits for what this process is saving: two seconds.
const ABANDON_STEPS: u32 = 100;
const ABANDON_STEP: Duration = Duration::from_millis(20);

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
    /// The epoch of what is saved from now on, if it is above the first one.
    epoch: AtomicU32,
    /// Whether other writers know of this one.
    known: OnceCell<()>,
    /// Held by whoever saves for all who put durably.
    committing: tokio::sync::Mutex<()>,
    /// One permit a block that is being compressed.
    compressing: Semaphore,
    /// One permit a batch that is being saved.
    saving: Arc<Semaphore>,
    /// Longest time between two puts.
    timeout: Option<Duration>,
    /// How hard zstd compresses.
    level: i32,
    /// When a block was put last, in milliseconds by [`since_boot`].
    last_put: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Blocks in a pack at most.
    pack_blocks: usize,
    open: Batch,
    unsaved: Vec<Batch>,
    /// Memory of packs that were saved.
    spare: Vec<Spare>,
    next_record: u32,
    /// Batches that were taken to be saved, by the number of their record, and are not yet.
    unfinished: BTreeSet<u32>,
    recent: LruCache<Digest, Frame>,
    /// Why nothing can be put any more: what was accepted before may be lost, and whoever asks has
    /// to know.
    failed: Option<String>,
    /// A completion is under way.
    closed: bool,
}

/// What is put: zeros, or data, whose frame is not needed where an equal one is known.
#[derive(Clone, Copy, Debug)]
enum Content<'a> {
    Zero,
    Data(Option<&'a Encoded>),
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
    /// The epoch in which it was saved first, or tried to.
    epoch: Option<u32>,
    /// When the pack may have been made first, by [`since_boot`].
    began: Option<Duration>,
}

impl Batch {
    fn is_full(&self, pack_blocks: usize) -> bool {
        self.pack.len() >= pack_blocks || self.blocks.len() >= MAX_RECORD_BLOCKS
    }
}

impl Repository {
    pub(super) fn existing_writer(&self, id: &SnapshotId) -> Option<Arc<Writer>> {
        self.writers.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// Forgets the writer if its attempt is one that has `ended`. Another one of the same id may
    /// have been started meanwhile, and have accepted blocks.
    pub(super) fn forget_writer(&self, id: &SnapshotId, ended: impl FnOnce(Uuid) -> bool) {
        let mut writers = self.writers.lock().unwrap_or_else(PoisonError::into_inner);
        if writers.get(id).is_some_and(|writer| ended(writer.attempt)) {
            writers.remove(id);
        }
    }

    /// Forgets a writer that was refused, unless its attempt is still pending: as long as it can
    /// be completed, a flush has to say that blocks are missing.
    pub(super) async fn forget_ended_writer(&self, id: &SnapshotId, attempt: Uuid) {
        match self.look(id).await {
            Ok(Some(Found::Pending(start))) if start.metadata.attempt == attempt => {}
            Ok(_) => self.forget_writer(id, |of| of == attempt),
            // Whether it has ended cannot be told.
            Err(_) => {}
        }
    }

    /// This process's writer for a pending snapshot.
    pub(super) async fn writer(&self, id: &SnapshotId) -> Result<Arc<Writer>> {
        if let Some(writer) = self.existing_writer(id) {
            return Ok(writer);
        }
        // Those who put at the same time ask once.
        let _one_for_all = self.opening_writer.lock().await;
        if let Some(writer) = self.existing_writer(id) {
            return Ok(writer);
        }
        let start = self.start_of(id).await?;
        // A completed one may still have its start.json.
        if self.objects.exists(&names::manifest(id)).await? {
            let message = "it is completed, and cannot be written any more";
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        let start = start.ok_or_else(|| not_found(id))?;
        self.check_in_time(&start).await?;
        let mut writers = self.writers.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(Writer::new(&start, self));
        Ok(Arc::clone(writers.entry(id.clone()).or_insert_with(new)))
    }
}

impl Writer {
    fn new(start: &Start, repository: &Repository) -> Self {
        Self {
            id: start.metadata.id.clone(),
            attempt: start.metadata.attempt,
            volume_size: start.metadata.volume_size,
            objects: Arc::clone(&repository.objects),
            level: repository.level,
            who: OnceCell::new(),
            epoch: AtomicU32::new(0),
            known: OnceCell::new(),
            committing: tokio::sync::Mutex::default(),
            compressing: Semaphore::new(MAX_COMPRESSING),
            saving: Arc::new(Semaphore::new(MAX_SAVING as usize)),
            timeout: start.timeout_minutes.map(|n| Duration::from_secs(60 * u64::from(n))),
            last_put: AtomicU64::new(milliseconds(since_boot())),
            state: Mutex::new(State {
                pack_blocks: repository.pack_blocks,
                open: Batch::default(),
                unsaved: Vec::new(),
                spare: Vec::new(),
                next_record: 0,
                unfinished: BTreeSet::new(),
                // It grows as it is filled.
                recent: LruCache::unbounded(),
                failed: None,
                closed: false,
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
            let records = names.iter();
            let records = records.filter_map(|n| RecordId::from_name(&self.id, self.attempt, n));
            let epoch = records.map(|record| record.epoch).max().unwrap_or(0).checked_add(1);
            let full = || Error::new(ErrorKind::Conflict, "it was begun too often");
            Ok((epoch.ok_or_else(full)?, Uuid::new_v4()))
        };
        self.who.get_or_try_init(find).await.copied()
    }

    /// The attempt at the snapshot that it writes for.
    pub(super) fn attempt(&self) -> Uuid {
        self.attempt
    }

    /// When a block was put last, or this writer was made, by [`since_boot`].
    pub(super) fn last_put(&self) -> Duration {
        Duration::from_millis(self.last_put.load(Ordering::Relaxed))
    }

    /// Whether this process put nothing for so long that the snapshot may have ended.
    pub(super) fn is_late(&self) -> bool {
        self.timeout.is_some_and(|timeout| since_boot().saturating_sub(self.last_put()) > timeout)
    }

    pub(super) async fn put(self: &Arc<Self>, index: BlockIndex, block: Block) -> Result<()> {
        self.add(index, block, false).await.map(drop)
    }

    /// Puts a block so that it is durable when this returns, and wins over what any writer put of it
    /// and had acknowledged before. Those who do so at the same time share a pack and a record.
    pub(super) async fn put_durably(
        self: &Arc<Self>,
        index: BlockIndex,
        block: Block,
    ) -> Result<()> {
        let record = self.add(index, block, true).await?;
        let one_for_all = self.committing.lock().await;
        if self.state().is_saved(record) {
            return Ok(());
        }
        let saving = Arc::clone(&self.saving);
        let permit = saving.acquire_owned().await.expect("it is never closed");
        // Whoever deletes the snapshot waits for the permit, so that nothing is made behind that.
        self.state().check_open()?;
        self.raise_epoch().await?;
        let batch = {
            let mut state = self.state();
            state.check_open()?;
            state.take_open()
        };
        if let Some(batch) = batch {
            let writer = Arc::clone(self);
            run_to_end(async move {
                let _permit = permit;
                writer.save(batch).await
            })
            .await?;
        } else {
            drop(permit);
        }
        drop(one_for_all);
        // It may be in an earlier batch, which another is saving, or which failed.
        if self.state().is_saved(record) { Ok(()) } else { self.flush().await }
    }

    /// Takes an epoch above those of other writers, if there are any: what is put from now on comes
    /// after all that they had acknowledged before.
    async fn raise_epoch(&self) -> Result<()> {
        let (first, writer) = self.who().await?;
        let announce = || async {
            let name = names::writer(&self.id, self.attempt, writer);
            self.objects.ensure(&name, Bytes::new()).await
        };
        self.known.get_or_try_init(announce).await?;
        let known = self.objects.list(&names::writers(&self.id, self.attempt)).await?;
        if known.len() <= 1 {
            return Ok(());
        }
        let names = self.objects.list(&names::attempt(&self.id, self.attempt)).await?;
        let records = names.iter();
        let records = records.filter_map(|n| RecordId::from_name(&self.id, self.attempt, n));
        let others = records.filter(|record| record.writer != writer).map(|record| record.epoch);
        let mine = first.max(self.epoch.load(Ordering::Relaxed));
        if let Some(highest) = others.max().filter(|highest| *highest >= mine) {
            let full = || Error::new(ErrorKind::Conflict, "it was begun too often");
            self.epoch.store(highest.checked_add(1).ok_or_else(full)?, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Adds a block to the open batch, and saves that if it is full. Answers the number of the
    /// record that it will be in.
    async fn add(self: &Arc<Self>, index: BlockIndex, block: Block, durably: bool) -> Result<u32> {
        if !self.volume_size.contains(index) {
            let message = format!("the volume has {} only", self.volume_size);
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        self.state().check_open()?;
        self.who().await?;
        let turn = self.compressing.acquire().await.expect("it is never closed");
        let digest = block.digest();
        let mut frame = None;
        loop {
            if !block.is_zero() && frame.is_none() && !self.knows(digest) {
                let (raw, level) = (block.bytes(), self.level);
                frame = Some(match shrinks(&raw) {
                    true => blocking(move || Ok(Encoded::compressed(&raw, level))).await?,
                    false => Encoded::Raw(raw),
                });
            }
            if !self.state().unsaved.is_empty() {
                self.flush().await?;
            }
            // Waiting here for a batch to be saved is what keeps memory bounded.
            let saving = Arc::clone(&self.saving);
            let permit = saving.acquire_owned().await.expect("it is never closed");
            let content =
                if block.is_zero() { Content::Zero } else { Content::Data(frame.as_ref()) };
            let (record, full) = {
                let mut state = self.state();
                state.check_open()?;
                if state.closed {
                    let message =
                        format!("{} is being completed; it takes no more blocks", self.id);
                    return Err(Error::new(ErrorKind::Conflict, message));
                }
                if !state.unsaved.is_empty() {
                    // A batch failed while this waited: what is put again may be in it.
                    continue;
                }
                // What was known may have been taken to be saved since: then it must be stored.
                if !state.add(index, digest, content) {
                    continue;
                }
                (state.next_record, state.take_full())
            };
            self.last_put.store(milliseconds(since_boot()), Ordering::Relaxed);
            let Some(batch) = full else { return Ok(record) };
            drop(turn);
            let writer = Arc::clone(self);
            run_to_end(async move {
                let _permit = permit;
                if durably && let Err(error) = writer.raise_epoch().await {
                    writer.state().unsaved.push(batch);
                    return Err(error);
                }
                writer.save(batch).await
            })
            .await?;
            return Ok(record);
        }
    }

    fn knows(&self, digest: Digest) -> bool {
        self.state().find(digest).is_some()
    }

    /// Saves everything that was put.
    pub(super) async fn flush(self: &Arc<Self>) -> Result<()> {
        let writer = Arc::clone(self);
        run_to_end(async move {
            // With all permits nobody else is saving.
            let _permits =
                writer.saving.acquire_many(MAX_SAVING).await.expect("it is never closed");
            loop {
                let next = {
                    let mut state = writer.state();
                    state.check_open()?;
                    state.take_any()
                };
                let Some(batch) = next else { return Ok(()) };
                writer.save(batch).await?;
            }
        })
        .await
    }

    /// Gives up what is not saved, and waits a while for what is being saved, so that nothing is made
    /// behind a deletion. What takes longer is left for `gc`.
    pub(super) async fn abandon(&self) {
        self.state().failed = Some(format!("{} was deleted", self.id));
        for _ in 0..ABANDON_STEPS {
            if self.saving.try_acquire_many(MAX_SAVING).is_ok() {
                return;
            }
            blocking(|| std::thread::sleep(ABANDON_STEP)).await;
        }
    }

    /// Refuses blocks from now on.
    pub(super) fn close(&self) {
        self.state().closed = true;
    }

    /// Takes blocks again, if a completion has failed.
    pub(super) fn reopen(&self) {
        self.state().closed = false;
    }

    /// Saves a batch, or puts it back to be saved later. If it can never be saved, this fails for
    /// good.
    async fn save(&self, mut batch: Batch) -> Result<()> {
        match self.try_save(&mut batch).await {
            Ok(()) => {
                let memory = batch.encoded.and_then(|(_, data)| data.try_into_mut().ok());
                let mut state = self.state();
                state.unfinished.remove(&batch.record);
                state.spare.extend(memory.and_then(Spare::keep));
                Ok(())
            }
            Err(error) => {
                let mut state = self.state();
                if error.kind() == ErrorKind::Conflict {
                    state.failed = Some(error.to_string());
                } else {
                    state.unsaved.push(batch);
                }
                Err(error)
            }
        }
    }

    async fn try_save(&self, batch: &mut Batch) -> Result<()> {
        let (first, writer) = self.who().await?;
        let now = first.max(self.epoch.load(Ordering::Relaxed));
        let epoch = *batch.epoch.get_or_insert(now);
        if !batch.pack.is_empty() && self.objects.neighbours() > 1 {
            self.arrange(batch);
        }
        if !batch.pack.is_empty() {
            let id = Arc::clone(&batch.pack.id);
            batch.encoded = Some(std::mem::take(&mut batch.pack).finish(writer));
            batch.pack.id = id;
        }
        let began = *batch.began.get_or_insert_with(since_boot);
        let pack = batch.encoded.as_ref().map(|(pack, _)| pack.pack_name());
        if let Some((pack, data)) = &batch.encoded {
            // A batch that is saved again may find its own pack from the first try.
            self.objects.ensure(&pack.pack_name(), data.clone()).await?;
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
        // Before the record, so that it does not count, and behind it, so that it stays.
        self.check_not_collected(pack.as_deref(), began).await?;
        let name = RecordId { epoch, writer, number: batch.record }.name(&self.id, self.attempt);
        self.objects.ensure(&name, record.into()).await?;
        self.check_counts(RecordId { epoch, writer, number: batch.record }).await?;
        let Err(error) = self.check_not_collected(pack.as_deref(), began).await else {
            return Ok(());
        };
        // It must not count without its pack.
        self.objects.delete(&[name]).await?;
        Err(error)
    }

    /// Puts the frames of a batch in the order of their blocks, which came in any: who reads in order finds them beside
    /// each other. Nobody refers to them until the pack is durable.
    fn arrange(&self, batch: &mut Batch) {
        let blocks = batch.blocks.values_mut();
        let frames = blocks.filter_map(|(frame, digest)| Some((frame.as_mut()?, *digest)));
        let spare = self.state().spare.pop();
        let (places, memory) = batch.pack.arrange(frames, spare);
        let mut state = self.state();
        for (digest, place) in places {
            let is_of_it = |known: &Frame| Arc::ptr_eq(&known.pack, &batch.pack.id);
            if state.recent.peek(&digest).is_some_and(is_of_it) {
                match place {
                    Some(place) => drop(state.recent.put(digest, place)),
                    None => drop(state.recent.pop(&digest)),
                }
            }
        }
        state.spare.extend(Spare::keep(memory));
    }

    /// Whether a record that was just made will be part of the snapshot: nobody may be told that a
    /// block was put that is not.
    async fn check_counts(&self, record: RecordId) -> Result<()> {
        let gone = |what: &str| Err(Error::new(ErrorKind::Conflict, format!("{} {what}", self.id)));
        let objects = &*self.objects;
        if objects.exists(&names::closing(&self.id, self.attempt)).await? {
            match Sealed::decide(objects, &self.id, self.attempt).await? {
                Some(sealed) if sealed.contains(record) => {}
                _ => return gone("is being completed; it takes no more blocks"),
            }
        }
        // Of a snapshot that was tidied up nothing can be decided any more.
        match read_document::<Start>(objects, &names::start(&self.id)).await? {
            Some(start) if start.metadata.attempt == self.attempt => Ok(()),
            _ => {
                // Of a snapshot that was deleted meanwhile nothing shall be left. `gc` would find it.
                let left = [
                    record.name(&self.id, self.attempt),
                    names::writer(&self.id, self.attempt, record.writer),
                ];
                if let Err(error) = objects.delete(&left).await {
                    tracing::warn!("{} is gone, but not all of it: {error}", self.id);
                }
                gone("is not pending any more")
            }
        }
    }

    /// A pack that was made long before the record that keeps it may be gone, or go soon.
    async fn check_not_collected(&self, pack: Option<&str>, began: Duration) -> Result<()> {
        let Some(pack) = pack.filter(|_| since_boot().saturating_sub(began) > SAFE) else {
            return Ok(());
        };
        let doomed = found_before(&*self.objects, self.objects.now().await?, SAFE).await?;
        if !doomed.contains(pack) && self.objects.exists(pack).await? {
            return Ok(());
        }
        let message =
            format!("a collection found {pack} before it was of use; put all blocks again");
        Err(Error::new(ErrorKind::Conflict, message))
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Runs `work` to its end, also when whoever waits for it goes away: what was accepted is in it.
async fn run_to_end(work: impl Future<Output = Result<()>> + Send + 'static) -> Result<()> {
    match tokio::spawn(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::with_source(ErrorKind::Unavailable, "saving blocks died", error)),
    }
}

impl State {
    fn check_open(&self) -> Result<()> {
        match &self.failed {
            Some(why) => Err(Error::new(ErrorKind::Conflict, why.clone())),
            None => Ok(()),
        }
    }

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
                if self.recent.len() > RECENT_BLOCKS {
                    self.recent.pop_lru();
                }
                Some(frame)
            }
            (Content::Data(None), None) => return false,
        };
        self.open.blocks.insert(index, (frame, digest));
        true
    }

    fn take_full(&mut self) -> Option<Batch> {
        if self.open.is_full(self.pack_blocks) { self.take_open() } else { None }
    }

    /// Whether the batch with this number is durable.
    fn is_saved(&self, record: u32) -> bool {
        record < self.next_record && !self.unfinished.contains(&record)
    }

    fn take_any(&mut self) -> Option<Batch> {
        if self.unsaved.is_empty() { self.take_open() } else { Some(self.unsaved.remove(0)) }
    }

    fn take_open(&mut self) -> Option<Batch> {
        if self.open.blocks.is_empty() {
            return None;
        }
        let spare = self.spare.pop().map(Spare::take);
        let next = spare.map(PackBuilder::reusing).unwrap_or_default();
        let next = Batch { pack: next, ..Batch::default() };
        let mut batch = std::mem::replace(&mut self.open, next);
        batch.record = self.next_record;
        self.unfinished.insert(batch.record);
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
