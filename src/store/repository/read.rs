//! Reading: page lists, pages, and blocks.

use std::collections::HashSet;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{BufMut as _, Bytes, BytesMut};
use jiff::Timestamp;
use lru::LruCache;
use serde::Serialize;

use super::manifest::Manifest;
use super::names::ObjectId;
use super::page_list::{self, PageRef, span_of, span_start};
use super::table::{Entry, Location, Table, u32_at};
use super::{Repository, pack};
use crate::blocking::blocking;
use crate::model::{Block, BlockIndex, Digest, SnapshotId};
use crate::store::page::{page_token, start_index};
use crate::store::{
    BlockPage, BlockToken, ChangedBlock, ChangedPage, Error, ErrorKind, ListFrom, ListedBlock,
    MAX_PAGE_BLOCKS, Result,
};

/// Bytes of pages and page lists that a repository keeps in memory, whatever it is used for.
const CACHE_BYTES: usize = 8 << 20;

/// Index, offset, length, pack, digest of the block.
const TOKEN_LEN: usize = 4 + 4 + 4 + ObjectId::LEN + 32;

/// What a snapshot takes in a repository. Blocks that it has from its parent are not new.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stored {
    /// Blocks that it has.
    pub blocks: u64,
    /// Bytes of these, compressed.
    pub bytes: u64,
    /// Blocks that its parent has not.
    pub new_blocks: u64,
    /// Bytes of these, compressed.
    pub new_bytes: u64,
}

/// Pages and page lists that were read lately. They never change, so they are never stale.
#[derive(Debug)]
pub(super) struct PageCache(Mutex<CacheState>);

#[derive(Debug)]
struct CacheState {
    objects: LruCache<ObjectId, Cached>,
    bytes: usize,
}

#[derive(Clone, Debug)]
enum Cached {
    Page(Table),
    List(Arc<Vec<PageRef>>),
}

impl Cached {
    fn size(&self) -> usize {
        match self {
            Self::Page(table) => table.size(),
            Self::List(list) => list.len() * size_of::<PageRef>(),
        }
    }
}

impl Default for PageCache {
    fn default() -> Self {
        // The bound is that in bytes; no page is smaller than its header.
        let entries = NonZeroUsize::new(100_000).expect("not 0");
        Self(Mutex::new(CacheState { objects: LruCache::new(entries), bytes: 0 }))
    }
}

impl PageCache {
    fn get(&self, id: ObjectId) -> Option<Cached> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).objects.get(&id).cloned()
    }

    fn put(&self, id: ObjectId, object: Cached) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.bytes += object.size();
        if let Some((_, old)) = state.objects.push(id, object) {
            state.bytes -= old.size();
        }
        while state.bytes > CACHE_BYTES && state.objects.len() > 1 {
            let Some((_, old)) = state.objects.pop_lru() else { break };
            state.bytes -= old.size();
        }
    }
}

impl Repository {
    /// The bytes of a page or page list, which its id vouches for.
    async fn page_bytes(&self, id: ObjectId) -> Result<Bytes> {
        let name = id.page_name();
        let bytes = match self.objects.read(&name).await {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(damaged(&name, "it is missing"));
            }
            Err(error) => return Err(error),
        };
        let check = move || {
            let digest = Digest::of(&bytes);
            if digest == id.digest {
                Ok(bytes)
            } else {
                Err(damaged(&name, "its digest is not its name"))
            }
        };
        blocking(check).await
    }

    pub(super) async fn page(&self, page: &PageRef) -> Result<Table> {
        let id = page.page;
        if let Some(Cached::Page(table)) = self.pages.get(id) {
            check_page(page, &table)?;
            return Ok(table);
        }
        self.fresh_page(page).await
    }

    /// Reads a page again, also if it is in memory.
    pub(super) async fn fresh_page(&self, page: &PageRef) -> Result<Table> {
        let id = page.page;
        let bytes = self.page_bytes(id).await?;
        let table = Table::decode(bytes).map_err(|why| damaged(&id.page_name(), why))?;
        check_page(page, &table)?;
        self.pages.put(id, Cached::Page(table.clone()));
        Ok(table)
    }

    pub(super) async fn page_list(&self, id: Option<ObjectId>) -> Result<Arc<Vec<PageRef>>> {
        let Some(id) = id else { return Ok(Arc::default()) };
        if let Some(Cached::List(list)) = self.pages.get(id) {
            return Ok(list);
        }
        self.fresh_page_list(id).await
    }

    /// Reads a page list again, also if it is in memory.
    pub(super) async fn fresh_page_list(&self, id: ObjectId) -> Result<Arc<Vec<PageRef>>> {
        let bytes = self.page_bytes(id).await?;
        let list = page_list::decode(&bytes).map_err(|why| damaged(&id.page_name(), why))?;
        let list = Arc::new(list);
        self.pages.put(id, Cached::List(Arc::clone(&list)));
        Ok(list)
    }

    /// What a completed snapshot takes in the repository.
    ///
    /// # Errors
    ///
    /// If it is not completed, or its pages are damaged.
    pub async fn stored(&self, id: &SnapshotId) -> Result<Stored> {
        let manifest = self.completed(id).await?;
        let parent = match &manifest.metadata.parent {
            // It may be gone.
            Some(parent) => self.completed(parent).await.ok(),
            None => None,
        };
        let pages = self.page_list(manifest.pages).await?;
        let theirs = self.page_list(parent.and_then(|parent| parent.pages)).await?;
        let mut stored = Stored::default();
        for (_, page, theirs) in pairs(&pages, &theirs, 0) {
            let Some(page) = page else { continue };
            let table = self.page(page).await?;
            let theirs = self.page_or_empty(theirs).await?;
            let known: HashSet<_> = (0..theirs.len()).map(|n| theirs.entry(n).location).collect();
            for entry in (0..table.len()).map(|n| table.entry(n)) {
                let len = entry.location.map_or(0, |location| u64::from(location.length));
                stored.blocks += 1;
                stored.bytes += len;
                if !known.contains(&entry.location) {
                    stored.new_blocks += 1;
                    stored.new_bytes += len;
                }
            }
        }
        Ok(stored)
    }

    /// One page of a listing never crosses into a second index page: damage in that one must not
    /// hide what this one says.
    pub(super) async fn list_page(
        &self,
        id: &SnapshotId,
        from: &ListFrom,
        max: usize,
    ) -> Result<BlockPage> {
        let failed = |e: Error| e.context(format_args!("cannot list the blocks of {id}"));
        let (from, max) = (start_index(from)?, max.clamp(1, MAX_PAGE_BLOCKS));
        let manifest = self.listable(id).await.map_err(failed)?;
        let end = manifest.metadata.volume_size.blocks();
        let started = Some(manifest.metadata.start_time);
        let pages = self.page_list(manifest.pages).await.map_err(failed)?;
        let first = pages.partition_point(|page| page.span < span_of(from));
        let Some(page) = pages.get(first) else {
            return Ok(BlockPage { blocks: Vec::new(), covered: Some(end), next: None, started });
        };
        let there = span_start(page.span);
        if there > from {
            // A hole comes first, and is one whatever may be wrong with that page.
            let (blocks, next) = (Vec::new(), there.min(end));
            let token = (next < end).then(|| page_token(next));
            return Ok(BlockPage { blocks, covered: Some(next), next: token, started });
        }
        let table = self.page(page).await.map_err(failed)?;
        let position = table.position(from);
        let stop = table.len().min(position + max);
        let tokens = tokens(&table, position..stop);
        let entries = (position..stop).map(|n| table.entry(n));
        let blocks =
            entries.zip(tokens).map(|(entry, token)| listed(&entry, token)).collect::<Vec<_>>();
        let next = if stop < table.len() {
            Some(table.index(stop))
        } else {
            pages.get(first + 1).map(|page| span_start(page.span))
        };
        let next = next.filter(|next| *next < end);
        let covered = Some(next.unwrap_or(end));
        Ok(BlockPage { blocks, covered, next: next.map(page_token), started })
    }

    pub(super) async fn list_changed_page(
        &self,
        first: &SnapshotId,
        second: &SnapshotId,
        from: &ListFrom,
        max: usize,
    ) -> Result<ChangedPage> {
        let failed = |e: Error| e.context(format_args!("cannot compare {first} and {second}"));
        let (from, max) = (start_index(from)?, max.clamp(1, MAX_PAGE_BLOCKS));
        let (first_started, one) = self.pages_of(first).await.map_err(failed)?;
        let (second_started, two) = self.pages_of(second).await.map_err(failed)?;
        let started = Some((first_started, second_started));
        let mut blocks = Vec::new();
        for (span, a, b) in pairs(&one, &two, span_of(from)) {
            // Equal content costs nothing: not even the pages are read.
            if content(a) == content(b) {
                continue;
            }
            let a = self.page_or_empty(a).await.map_err(failed)?;
            let b = self.page_or_empty(b).await.map_err(failed)?;
            let start = from.max(span_start(span));
            for (index, x, y) in differences(&a, &b, start) {
                if blocks.len() == max {
                    return Ok(ChangedPage { blocks, next: Some(page_token(index)), started });
                }
                let listed = |entry: Option<Entry>| entry.map(|e| listed(&e, token(&e)));
                blocks.push(ChangedBlock { index, first: listed(x), second: listed(y) });
            }
            if !blocks.is_empty() {
                let next = Some(page_token(span_start(span + 1)));
                return Ok(ChangedPage { blocks, next, started });
            }
        }
        Ok(ChangedPage { blocks, next: None, started })
    }

    /// When a snapshot was started, and its pages.
    async fn pages_of(&self, id: &SnapshotId) -> Result<(Timestamp, Arc<Vec<PageRef>>)> {
        let Manifest { metadata, pages, .. } = self.listable(id).await?;
        Ok((metadata.start_time, self.page_list(pages).await?))
    }

    async fn page_or_empty(&self, page: Option<&PageRef>) -> Result<Table> {
        match page {
            Some(page) => self.page(page).await,
            None => Ok(Table::decode(Table::encode(&[])).expect("it is well-formed")),
        }
    }

    pub(super) async fn read_block(
        &self,
        id: &SnapshotId,
        index: BlockIndex,
        token: &BlockToken,
    ) -> Result<Block> {
        let (location, digest) = read_token(index, token).ok_or_else(|| {
            let message = format!("the token of block {index} of {id} is not one of this block");
            Error::new(ErrorKind::ExpiredToken, message)
        })?;
        let Some(location) = location else { return Ok(Block::Zero) };
        let read = self.read_frame(location, digest).await;
        read.map_err(|e| e.context(format_args!("cannot read block {index} of {id}")))
    }

    /// Reads one block of a pack, which must have this digest.
    pub(super) async fn read_frame(&self, location: Location, digest: Digest) -> Result<Block> {
        let name = location.pack.pack_name();
        let (offset, len) = (u64::from(location.offset), location.length as usize);
        let decode = {
            let name = name.clone();
            move |frame: &[u8]| {
                let raw = pack::decompress(frame).map_err(|why| damaged(&name, &why))?;
                Ok(Block::new(raw))
            }
        };
        let block = match self.objects.read_range(&name, offset, len, Box::new(decode)).await {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(damaged(&name, "it is missing"));
            }
            block => block?,
        };
        block.expect(digest).map_err(|mismatch| damaged(&name, &mismatch.to_string()))
    }
}

/// Whether a page can be the one that its list means.
fn check_page(page: &PageRef, table: &Table) -> Result<()> {
    let span = span_start(page.span)..span_start(page.span + 1);
    let ends = [0, table.len().saturating_sub(1)];
    let name = || page.page.page_name();
    if table.len() > 0 && ends.iter().any(|&n| !span.contains(&table.index(n))) {
        return Err(damaged(&name(), "it has blocks of another part of the volume"));
    }
    if table.len() as u64 != u64::from(page.data_blocks) + u64::from(page.zero_blocks) {
        return Err(damaged(&name(), "it has not as many blocks as its page list says"));
    }
    Ok(())
}

pub(super) fn damaged(name: &str, why: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("{name} is damaged: {why}"))
}

fn listed(entry: &Entry, token: BlockToken) -> ListedBlock {
    ListedBlock { index: entry.index, token, digest: Some(entry.digest) }
}

fn token(entry: &Entry) -> BlockToken {
    let mut bytes = BytesMut::with_capacity(TOKEN_LEN);
    write_token(&mut bytes, entry);
    BlockToken(bytes.freeze())
}

/// The tokens of a run of entries, in one allocation.
fn tokens(table: &Table, range: std::ops::Range<usize>) -> impl Iterator<Item = BlockToken> {
    let count = range.len();
    let mut bytes = BytesMut::with_capacity(count * TOKEN_LEN);
    for n in range {
        write_token(&mut bytes, &table.entry(n));
    }
    let bytes = bytes.freeze();
    (0..count).map(move |n| BlockToken(bytes.slice(n * TOKEN_LEN..(n + 1) * TOKEN_LEN)))
}

fn write_token(bytes: &mut BytesMut, entry: &Entry) {
    let none = Location {
        pack: ObjectId { digest: Digest([0; 32]), writer: uuid::Uuid::nil() },
        offset: 0,
        length: 0,
    };
    let Location { pack, offset, length } = entry.location.unwrap_or(none);
    bytes.put_u32_le(entry.index.0);
    bytes.put_u32_le(offset);
    bytes.put_u32_le(length);
    bytes.put_slice(&pack.to_bytes());
    bytes.put_slice(&entry.digest.0);
}

fn read_token(index: BlockIndex, token: &BlockToken) -> Option<(Option<Location>, Digest)> {
    let bytes = &token.0;
    if bytes.len() != TOKEN_LEN || u32_at(bytes, 0) != index.0 {
        return None;
    }
    let digest = Digest(bytes[12 + ObjectId::LEN..].try_into().expect("32 bytes"));
    let location = Location {
        pack: ObjectId::from_bytes(&bytes[12..12 + ObjectId::LEN]),
        offset: u32_at(bytes, 4),
        length: u32_at(bytes, 8),
    };
    // No frame is empty: an entry without one is a zero block.
    Some(((location.length > 0).then_some(location), digest))
}

/// The pages of two snapshots, span by span, from `first` on.
fn pairs<'a>(
    one: &'a [PageRef],
    two: &'a [PageRef],
    first: u32,
) -> impl Iterator<Item = (u32, Option<&'a PageRef>, Option<&'a PageRef>)> {
    let skip = |pages: &'a [PageRef]| &pages[pages.partition_point(|page| page.span < first)..];
    let (mut one, mut two) = (skip(one).iter().peekable(), skip(two).iter().peekable());
    std::iter::from_fn(move || {
        let spans = [one.peek().map(|page| page.span), two.peek().map(|page| page.span)];
        let span = spans.into_iter().flatten().min()?;
        Some((span, one.next_if(|page| page.span == span), two.next_if(|page| page.span == span)))
    })
}

/// The content of a page; a page without data reads like none.
fn content(page: Option<&PageRef>) -> Option<Digest> {
    page.filter(|page| page.data_blocks > 0).map(|page| page.content)
}

/// The blocks from `start` on whose content differs.
fn differences(
    a: &Table,
    b: &Table,
    start: BlockIndex,
) -> impl Iterator<Item = (BlockIndex, Option<Entry>, Option<Entry>)> {
    let mut a = (a.position(start)..a.len()).map(|n| a.entry(n)).peekable();
    let mut b = (b.position(start)..b.len()).map(|n| b.entry(n)).peekable();
    std::iter::from_fn(move || {
        loop {
            let indexes = [a.peek().map(|e| e.index), b.peek().map(|e| e.index)];
            let index = indexes.into_iter().flatten().min()?;
            let (x, y) = (a.next_if(|e| e.index == index), b.next_if(|e| e.index == index));
            let digest = |e: &Option<Entry>| e.map_or(Digest::OF_ZEROS, |e| e.digest);
            if digest(&x) != digest(&y) {
                return Some((index, x, y));
            }
        }
    })
}
