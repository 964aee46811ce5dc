//! One snapshot, seen as one raw file.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};

use crate::cache::{Cache, ImageKey, Key, SharedError, Urgency, Value};
use crate::model::{
    BLOCK_SIZE, BLOCK_SIZE_U64, Block, BlockIndex, BlockMap, BlockPart, BlockState, Digest,
    Snapshot, block_parts, zeros,
};
use crate::store::listing::{Blocks, list_span, read_listed};
use crate::store::{ErrorKind, ListedBlock, Result, SharedStore};

mod prefetch;
mod reader;
pub mod staging;
pub mod working;

pub use reader::Reader;

/// Blocks whose listing is fetched, kept and forgotten together: 2 GiB of the volume.
const SPAN_BLOCKS: u32 = 4096;

/// Times that a block is listed again because its token does not work.
const MAX_RELISTS: usize = 2;

/// Spans that one search for data or a hole lists. Beyond them it answers with what is not known.
const SEEK_SPANS: usize = 4;

/// An image of one completed snapshot. It never changes.
#[derive(Debug)]
pub struct Image {
    key: ImageKey,
    snapshot: Arc<Snapshot>,
    store: SharedStore,
    cache: Arc<Cache>,
    map: Mutex<BlockMap>,
}

impl Image {
    /// An image of which nothing has been read yet. Asks nothing of the store.
    pub fn new(snapshot: Arc<Snapshot>, store: SharedStore, cache: Arc<Cache>) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let map = Mutex::new(BlockMap::unknown(snapshot.volume_size));
        let key = ImageKey(NEXT.fetch_add(1, Ordering::Relaxed));
        Arc::new(Self { key, snapshot, store, cache, map })
    }

    /// The snapshot that it is of.
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.snapshot.image_len()
    }

    /// Whether it has no byte, which no image is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn map(&self) -> MutexGuard<'_, BlockMap> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of data on record, for `st_blocks`: exact where the store tells or all is listed, else
    /// an estimate below the full size, so that programs look for holes.
    pub fn allocated(&self) -> u64 {
        allocated(&self.snapshot, Some(&self.map()))
    }

    /// Up to `len` bytes from `offset` on, if that needs no waiting.
    pub fn read_cached(&self, offset: u64, len: usize) -> Option<Bytes> {
        let len = self.clip(offset, len);
        self.assemble_cached(offset, len)
    }

    /// Up to `len` bytes from `offset` on; fewer only at the end of the image.
    pub async fn read(self: &Arc<Self>, offset: u64, len: usize) -> Result<Bytes, SharedError> {
        let len = self.clip(offset, len);
        let parts: Vec<BlockPart> = block_parts(offset, len as u64).collect();
        if let [part] = parts[..] {
            let block = self.block(part.index, Urgency::Reader).await?;
            return Ok(slice(&block, part));
        }
        let _room = self.cache.reply_room(len).await;
        // All at once: a read over several blocks waits for the slowest, not for each in turn.
        let blocks = parts.iter().map(|part| self.block(part.index, Urgency::Reader));
        let blocks = futures::future::try_join_all(blocks).await?;
        let mut bytes = BytesMut::with_capacity(len);
        for (block, part) in blocks.iter().zip(parts) {
            bytes.extend_from_slice(&slice(block, part));
        }
        Ok(bytes.freeze())
    }

    fn clip(&self, offset: u64, len: usize) -> usize {
        let rest = self.len().saturating_sub(offset);
        usize::try_from(rest).map_or(len, |rest| rest.min(len))
    }

    fn assemble_cached(&self, offset: u64, len: usize) -> Option<Bytes> {
        let mut parts = block_parts(offset, len as u64);
        let Some(first) = parts.next() else { return Some(Bytes::new()) };
        let block = self.peek(first.index)?;
        if first.len == len {
            return Some(slice(&block, first));
        }
        let mut bytes = BytesMut::with_capacity(len);
        bytes.extend_from_slice(&slice(&block, first));
        for part in parts {
            bytes.extend_from_slice(&slice(&self.peek(part.index)?, part));
        }
        Some(bytes.freeze())
    }

    /// A block that is in memory, or known to be empty.
    fn peek(&self, index: BlockIndex) -> Option<Block> {
        if self.map().state(index) == BlockState::Empty {
            return Some(Block::Zero);
        }
        let Some(Value::Listing(listing)) = self.cache.peek(&self.listing_key(index)) else {
            return None;
        };
        let Some(listed) = find(&listing, index) else { return Some(Block::Zero) };
        let Some(Value::Block(block)) = self.cache.peek(&self.block_key(listed)) else {
            return None;
        };
        self.cache.count_hit();
        Some(block)
    }

    /// Whether there is nothing to fetch for a block.
    fn is_here(&self, index: BlockIndex) -> bool {
        if self.map().state(index) == BlockState::Empty {
            return true;
        }
        let Some(Value::Listing(listing)) = self.cache.peek(&self.listing_key(index)) else {
            return false;
        };
        find(&listing, index).is_none_or(|listed| {
            listed.digest == Some(Digest::OF_ZEROS)
                || self.cache.peek(&self.block_key(listed)).is_some()
        })
    }

    /// Whether a block is known to read as zeros, without asking.
    fn is_known_empty(&self, index: BlockIndex) -> bool {
        index.offset() >= self.len() || self.map().state(index) == BlockState::Empty
    }

    /// The block at `index`, from memory or the store.
    ///
    /// # Errors
    ///
    /// Those of [`SnapshotStore::get_block`](crate::store::SnapshotStore::get_block) and `list_blocks`.
    pub async fn block(
        self: &Arc<Self>,
        index: BlockIndex,
        urgency: Urgency,
    ) -> Result<Block, SharedError> {
        let mut relists = 0;
        loop {
            if self.map().state(index) == BlockState::Empty {
                return Ok(Block::Zero);
            }
            let listing = self.listing(index, urgency).await?;
            let Some(listed) = find(&listing, index) else { return Ok(Block::Zero) };
            if listed.digest == Some(Digest::OF_ZEROS) {
                return Ok(Block::Zero);
            }
            let key = self.block_key(listed);
            let fetch = || self.fetch(listed.clone());
            match self.cache.get(key, urgency, fetch).await {
                Ok(Value::Block(block)) => return Ok(block),
                Ok(Value::Listing(_)) => unreachable!("a block is cached under the key of a block"),
                Err(error) if error.kind() == ErrorKind::ExpiredToken && relists < MAX_RELISTS => {
                    relists += 1;
                    self.cache.remove(&self.listing_key(index));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Begins to fetch a block that is likely to be read.
    async fn prefetch(self: Arc<Self>, index: BlockIndex) {
        if self.map().state(index) == BlockState::Empty {
            return;
        }
        // A reader will meet the same error, and report it.
        let Ok(listing) = self.listing(index, Urgency::Prefetch).await else { return };
        if let Some(listed) = find(&listing, index)
            && listed.digest != Some(Digest::OF_ZEROS)
        {
            self.cache.prefetch(self.block_key(listed), || self.fetch(listed.clone()));
        }
    }

    fn fetch(
        self: &Arc<Self>,
        listed: ListedBlock,
    ) -> impl Future<Output = Result<Value>> + Send + 'static + use<> {
        let image = Arc::clone(self);
        async move { read_listed(&image.store, &image.snapshot.id, &listed).await.map(Value::Block) }
    }

    fn block_key(&self, listed: &ListedBlock) -> Key {
        match listed.digest {
            Some(digest) => Key::Content(digest),
            None => Key::Block(self.key, listed.index),
        }
    }

    fn listing_key(&self, index: BlockIndex) -> Key {
        Key::Listing(self.key, index.0 / SPAN_BLOCKS)
    }

    /// The listed blocks of the span that `index` is in.
    async fn listing(
        self: &Arc<Self>,
        index: BlockIndex,
        urgency: Urgency,
    ) -> Result<Arc<Vec<ListedBlock>>, SharedError> {
        let key = self.listing_key(index);
        if let Some(Value::Listing(listing)) = self.cache.peek(&key) {
            return Ok(listing);
        }
        let image = Arc::clone(self);
        let fetch = move || async move { image.list_span(index.0 / SPAN_BLOCKS).await };
        match self.cache.get(key, urgency, fetch).await? {
            Value::Listing(listing) => Ok(listing),
            Value::Block(_) => unreachable!("a listing is cached under the key of a listing"),
        }
    }

    /// Lists one span, and keeps what the store tells of those behind it.
    async fn list_span(&self, span: u32) -> Result<Value> {
        let start = BlockIndex(span * SPAN_BLOCKS);
        let volume = self.map().end();
        let end = BlockIndex(start.0 + SPAN_BLOCKS).min(volume);
        let list = Blocks((&*self.snapshot).into());
        let listed =
            list_span(&self.store, &list, start..end, volume, SPAN_BLOCKS as usize).await?;
        let (mut blocks, covered) = (listed.items, listed.covered);
        self.learn(start, covered, blocks.iter());
        let beyond = blocks.split_off(blocks.partition_point(|block| block.index < end));
        self.keep(&beyond, span + 1, covered);
        Ok(Value::Listing(Arc::new(blocks)))
    }

    fn learn<'a>(
        &self,
        start: BlockIndex,
        end: BlockIndex,
        blocks: impl Iterator<Item = &'a ListedBlock>,
    ) {
        let data = blocks.filter(|block| block.digest != Some(Digest::OF_ZEROS));
        self.map().learn(start..end, data.map(|block| block.index));
    }

    /// Caches the listings of the spans that are covered whole.
    fn keep(&self, blocks: &[ListedBlock], first: u32, covered: BlockIndex) {
        let mut rest = blocks;
        for span in first..covered.0 / SPAN_BLOCKS {
            if rest.is_empty() {
                // The map knows that there is nothing: no need to fill the cache with it.
                return;
            }
            let end = rest.partition_point(|block| block.index.0 < (span + 1) * SPAN_BLOCKS);
            let (inside, behind) = rest.split_at(end);
            if !inside.is_empty() {
                let listing = Value::Listing(Arc::new(inside.to_vec()));
                self.cache.insert(Key::Listing(self.key, span), listing);
            }
            rest = behind;
        }
    }

    /// The first offset from `offset` on that may hold data; `None` if there is none.
    ///
    /// Lists at most a few spans. What is not known by then is said to be data, which is always a
    /// legal answer.
    pub async fn seek_data(self: &Arc<Self>, offset: u64) -> Result<Option<u64>, SharedError> {
        self.seek(offset, |state| state == BlockState::Data, None).await
    }

    /// The first offset from `offset` on that is in a hole; the end of the image is in one.
    /// `None` if `offset` is beyond the end.
    ///
    /// Lists at most a few spans. Where nothing is known by then a hole is said to be.
    pub async fn seek_hole(self: &Arc<Self>, offset: u64) -> Result<Option<u64>, SharedError> {
        self.seek(offset, |state| state == BlockState::Empty, Some(self.len())).await
    }

    async fn seek(
        self: &Arc<Self>,
        offset: u64,
        wanted: impl Fn(BlockState) -> bool,
        at_end: Option<u64>,
    ) -> Result<Option<u64>, SharedError> {
        let mut listed = 0;
        let mut at = offset;
        while at < self.len() {
            let index = BlockIndex::containing(at);
            let Some(extent) = self.map().extent(index) else { break };
            if extent.state == BlockState::Unknown && listed < SEEK_SPANS {
                listed += 1;
                self.listing(index, Urgency::Reader).await?;
                // A listing that is cached although the map does not know of it is of another life.
                if self.map().state(index) == BlockState::Unknown {
                    self.cache.remove(&self.listing_key(index));
                }
                continue;
            }
            if extent.state == BlockState::Unknown || wanted(extent.state) {
                return Ok(Some(at));
            }
            at = extent.end.offset();
        }
        Ok(if offset < self.len() { at_end } else { None })
    }
}

/// Bytes of data of a snapshot, as [`Image::allocated`]; without a map, before it is opened.
pub fn allocated(snapshot: &Snapshot, map: Option<&BlockMap>) -> u64 {
    let known = map.filter(|map| map.is_complete()).map(BlockMap::data_blocks);
    match known.or(snapshot.data_blocks) {
        Some(blocks) => blocks * BLOCK_SIZE_U64,
        None => snapshot.image_len().saturating_sub(BLOCK_SIZE_U64),
    }
}

fn slice(block: &Block, part: BlockPart) -> Bytes {
    debug_assert!(part.start + part.len <= BLOCK_SIZE);
    match block {
        Block::Zero => zeros().slice(..part.len),
        Block::Data { .. } => block.bytes().slice(part.start..part.start + part.len),
    }
}

fn find(listing: &[ListedBlock], index: BlockIndex) -> Option<&ListedBlock> {
    listing.binary_search_by_key(&index, |block| block.index).ok().map(|n| &listing[n])
}
