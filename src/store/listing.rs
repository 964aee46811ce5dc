//! Following lists of blocks, and of changes, to their end.
//!
//! A page tells of a part of the volume, which begins where it was asked for. A long list is asked for at several
//! places at once, each about as far from the next as one page reaches, and delivered in order.

use std::collections::VecDeque;
use std::ops::Range;

use jiff::Timestamp;
use tokio_util::task::AbortOnDropHandle;

use super::{
    ChangedBlock, Error, ErrorKind, ListFrom, ListedBlock, MAX_PAGE_BLOCKS, PageToken, Result,
    SharedStore,
};
use crate::model::{Block, BlockIndex, Digest, Snapshot, SnapshotId};

/// Pages in a row that may tell nothing new before a list is given up: the service may answer with short and
/// empty pages, but not for ever.
pub(crate) const MAX_IDLE_PAGES: u32 = 100;

/// Pages of a long list that are asked for at the same time, and held.
const AHEAD: usize = 4;

/// Blocks of a page where only a few are looked for.
const FEW: usize = 500;

/// A list that is followed.
pub(crate) trait List: Clone + Send + Sync + 'static {
    /// What it lists.
    type Item: Clone + Send + Sync + 'static;

    /// Its position.
    fn index(item: &Self::Item) -> BlockIndex;

    /// As messages name it.
    fn id(&self) -> &SnapshotId;

    /// Asks for a page.
    fn page(
        &self,
        store: &SharedStore,
        from: ListFrom,
        max: usize,
    ) -> impl Future<Output = Result<Page<Self::Item>>> + Send;
}

/// A page of any list.
#[derive(Debug)]
pub(crate) struct Page<T> {
    items: Vec<T>,
    covered: Option<BlockIndex>,
    next: Option<PageToken>,
}

/// The snapshot that is listed. Its id may be another one's by now.
#[derive(Clone, Debug)]
pub(crate) struct Of {
    id: SnapshotId,
    started: Timestamp,
}

impl From<&Snapshot> for Of {
    fn from(snapshot: &Snapshot) -> Self {
        Self { id: snapshot.id.clone(), started: snapshot.start_time }
    }
}

impl Of {
    /// Checks that what was listed is of this one.
    ///
    /// # Errors
    ///
    /// `NotFound` if it was deleted, and another one has its id: pages of both would make an image of neither.
    pub(crate) fn check(&self, started: Option<Timestamp>) -> Result<()> {
        match started {
            Some(started) if started != self.started => {
                let why = "was deleted meanwhile, and another one was made of this id";
                Err(Error::new(ErrorKind::NotFound, format!("{} {why}", self.id)))
            }
            _ => Ok(()),
        }
    }
}

/// The blocks of a snapshot.
#[derive(Clone, Debug)]
pub(crate) struct Blocks(pub(crate) Of);

impl List for Blocks {
    type Item = ListedBlock;

    fn index(item: &ListedBlock) -> BlockIndex {
        item.index
    }

    fn id(&self) -> &SnapshotId {
        &self.0.id
    }

    async fn page(
        &self,
        store: &SharedStore,
        from: ListFrom,
        max: usize,
    ) -> Result<Page<ListedBlock>> {
        let page = store.list_blocks(&self.0.id, from, max).await?;
        self.0.check(page.started)?;
        Ok(Page { items: page.blocks, covered: page.covered, next: page.next })
    }
}

/// The blocks in which the second snapshot differs from the first.
#[derive(Clone, Debug)]
pub(crate) struct Changes(pub(crate) Of, pub(crate) Of);

impl List for Changes {
    type Item = ChangedBlock;

    fn index(item: &ChangedBlock) -> BlockIndex {
        item.index
    }

    fn id(&self) -> &SnapshotId {
        &self.1.id
    }

    async fn page(
        &self,
        store: &SharedStore,
        from: ListFrom,
        max: usize,
    ) -> Result<Page<ChangedBlock>> {
        let page = store.list_changed_blocks(&self.0.id, &self.1.id, from, max).await?;
        let (first, second) = page.started.unzip();
        self.0.check(first)?;
        self.1.check(second)?;
        Ok(Page { items: page.blocks, covered: None, next: page.next })
    }
}

/// What was listed of a part of a volume.
#[derive(Debug)]
pub(crate) struct Span<T> {
    /// Ascending, each once; some may lie behind the part.
    pub(crate) items: Vec<T>,
    /// Every item below this one was listed. At least the end of the part.
    pub(crate) covered: BlockIndex,
    /// How many indexes its first page told of.
    page: u32,
}

/// Lists the blocks `part` of a volume that ends at `end`, in pages of at most `max`, and whatever the last page
/// tells of those behind it.
///
/// # Errors
///
/// Those of the store; `Corrupt` if it lists out of order or beyond the volume, `Unavailable` if it comes to no end.
pub(crate) async fn list_span<L: List>(
    store: &SharedStore,
    list: &L,
    part: Range<BlockIndex>,
    end: BlockIndex,
    max: usize,
) -> Result<Span<L::Item>> {
    let mut span = Span { items: Vec::new(), covered: part.start, page: 0 };
    let (mut from, mut idle) = (ListFrom::Index(part.start), 0);
    while span.covered < part.end {
        let followed = matches!(from, ListFrom::Page(_));
        let page = match list.page(store, from, max).await {
            // The token of a page lives for a while only: go on from where it had come to.
            Err(error) if error.kind() == ErrorKind::ExpiredToken && followed => {
                let covered = span.items.partition_point(|item| L::index(item) < span.covered);
                span.items.truncate(covered);
                from = ListFrom::Index(span.covered);
                idle += 1;
                if idle > MAX_IDLE_PAGES {
                    return Err(error);
                }
                continue;
            }
            page => page?,
        };
        let known = span.items.last().map_or(part.start, |last| L::index(last).next());
        check_order::<L>(list.id(), known, end, &page.items)?;
        span.items.extend(page.items);
        let behind = span.items.last().map_or(part.start, |last| L::index(last).next());
        let covered = match page.next {
            None => end.max(part.end),
            Some(_) => behind.max(page.covered.unwrap_or(behind)).min(end),
        };
        idle = if covered > span.covered { 0 } else { idle + 1 };
        span.covered = span.covered.max(covered);
        if span.page == 0 {
            span.page = span.covered.0 - part.start.0;
        }
        let Some(token) = page.next else { break };
        if idle > MAX_IDLE_PAGES {
            let message =
                format!("the list of {} makes no progress at block {}", list.id(), span.covered);
            return Err(Error::new(ErrorKind::Unavailable, message));
        }
        from = ListFrom::Page(token);
    }
    Ok(span)
}

/// Checks that a page goes on in order from `known` and stays below `end`. What comes again, or too late, would
/// seem to be a hole where it belongs.
fn check_order<L: List>(
    id: &SnapshotId,
    known: BlockIndex,
    end: BlockIndex,
    items: &[L::Item],
) -> Result<()> {
    let wrong = |what: String| Err(Error::new(ErrorKind::Corrupt, what));
    if !items.is_sorted_by(|a, b| L::index(a) < L::index(b))
        || items.first().is_some_and(|first| L::index(first) < known)
    {
        return wrong(format!("the store lists the blocks of {id} out of order at block {known}"));
    }
    match items.last().map(L::index).filter(|last| *last >= end) {
        Some(last) => wrong(format!(
            "the store lists block {last} of {id}, which is beyond the {end} of its volume"
        )),
        None => Ok(()),
    }
}

/// A list that is followed from one index on, in order.
#[derive(Debug)]
pub(crate) struct Listing<L: List> {
    store: SharedStore,
    list: L,
    /// One past the last block of the volume.
    end: BlockIndex,
    items: VecDeque<L::Item>,
    /// What lies below it is listed: it is in `items`, was delivered, or is not there.
    covered: BlockIndex,
    /// What is asked for beyond it, in order.
    ahead: VecDeque<Asked<L::Item>>,
    /// How many indexes a page tells of; 0 until that is known.
    width: u32,
}

#[derive(Debug)]
struct Asked<T> {
    end: BlockIndex,
    answer: AbortOnDropHandle<Result<Span<T>>>,
}

impl Listing<Blocks> {
    /// The blocks of a snapshot.
    pub(crate) fn blocks(store: SharedStore, snapshot: &Snapshot) -> Self {
        Self::new(store, Blocks(snapshot.into()), snapshot.volume_size.blocks())
    }

    /// What is listed at `index`; nothing, if it is a hole. The indexes that are asked for ascend.
    ///
    /// # Errors
    ///
    /// As [`next`](Self::next).
    pub(crate) async fn find(&mut self, index: BlockIndex) -> Result<Option<ListedBlock>> {
        let is_far = index.0 - index.min(self.asked_until()).0 >= MAX_PAGE_BLOCKS as u32;
        self.skip_to(index);
        if is_far && index < self.end {
            // Perhaps only a few are looked for, far from each other.
            let part = index..index.next();
            let span = list_span(&self.store, &self.list, part, self.end, FEW).await?;
            self.take(span);
        }
        self.next_below(index.next()).await
    }
}

impl<L: List> Listing<L> {
    /// A list of a volume of so many blocks.
    pub(crate) fn new(store: SharedStore, list: L, end: BlockIndex) -> Self {
        let (items, ahead) = (VecDeque::new(), VecDeque::new());
        Self { store, list, end, items, covered: BlockIndex::ZERO, ahead, width: 0 }
    }

    /// The next item, `None` behind the last.
    ///
    /// # Errors
    ///
    /// Those of [`list_span`].
    pub(crate) async fn next(&mut self) -> Result<Option<L::Item>> {
        self.next_below(self.end).await
    }

    /// The next item whose index is below `stop`.
    ///
    /// # Errors
    ///
    /// Those of [`list_span`].
    pub(crate) async fn next_below(&mut self, stop: BlockIndex) -> Result<Option<L::Item>> {
        let stop = stop.min(self.end);
        loop {
            if let Some(item) = self.items.front() {
                let is_below = L::index(item) < stop;
                return Ok(if is_below { self.items.pop_front() } else { None });
            }
            if self.covered >= stop {
                return Ok(None);
            }
            self.fetch().await?;
        }
    }

    /// Leaves out what lies below `index`.
    pub(crate) fn skip_to(&mut self, index: BlockIndex) {
        while self.items.front().is_some_and(|item| L::index(item) < index) {
            self.items.pop_front();
        }
        if index > self.asked_until() {
            self.width = 0;
        }
        self.cover(index.min(self.end));
    }

    /// What lies below `index` is not waited for any more.
    fn cover(&mut self, index: BlockIndex) {
        self.covered = self.covered.max(index);
        while self.ahead.front().is_some_and(|asked| asked.end <= self.covered) {
            self.ahead.pop_front();
        }
    }

    /// Where that ends which is known or asked for.
    fn asked_until(&self) -> BlockIndex {
        self.ahead.back().map_or(self.covered, |asked| asked.end.max(self.covered))
    }

    /// Waits for what lies behind `covered`, and asks for more of a list that goes on.
    async fn fetch(&mut self) -> Result<()> {
        if self.width > 0 {
            self.ask_ahead();
        }
        let span = match self.ahead.pop_front() {
            Some(asked) => match asked.answer.await {
                Ok(span) => span?,
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            },
            None => {
                let part = self.covered..self.covered.next();
                list_span(&self.store, &self.list, part, self.end, MAX_PAGE_BLOCKS).await?
            }
        };
        self.width = span.page;
        self.take(span);
        Ok(())
    }

    fn ask_ahead(&mut self) {
        while self.ahead.len() < AHEAD {
            let start = self.asked_until();
            if start >= self.end {
                return;
            }
            let end = BlockIndex(start.0.saturating_add(self.width)).min(self.end);
            let (store, list, volume) = (self.store.clone(), self.list.clone(), self.end);
            let asked = tokio::spawn(async move {
                list_span(&store, &list, start..end, volume, MAX_PAGE_BLOCKS).await
            });
            self.ahead.push_back(Asked { end, answer: AbortOnDropHandle::new(asked) });
        }
    }

    /// Takes what is not known yet of a span.
    fn take(&mut self, span: Span<L::Item>) {
        let known = span.items.partition_point(|item| L::index(item) < self.covered);
        self.items.extend(span.items.into_iter().skip(known));
        self.cover(span.covered);
    }
}

/// Reads a listed block, and checks that it is the one that was listed.
///
/// # Errors
///
/// Those of [`get_block`](super::SnapshotStore::get_block); `Corrupt` if it is another one.
pub(crate) async fn read_listed(
    store: &SharedStore,
    id: &SnapshotId,
    listed: &ListedBlock,
) -> Result<Block> {
    if listed.digest == Some(Digest::OF_ZEROS) {
        return Ok(Block::Zero);
    }
    let index = listed.index;
    let block = store.get_block(id, index, &listed.token).await?;
    match listed.digest {
        Some(digest) if digest != block.digest() => {
            let has = block.digest();
            let message = format!(
                "block {index} of {id} was listed with the SHA-256 {digest}, and has {has}"
            );
            Err(Error::new(ErrorKind::Corrupt, message))
        }
        _ => Ok(block),
    }
}

#[cfg(test)]
mod tests;
