//! Completing a snapshot: from records to pages and a manifest.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry as MapEntry;
use std::ops::Range;
use std::time::Duration;

use futures::stream::{self, Stream};
use futures::{StreamExt as _, TryStreamExt as _};
use roaring::RoaringBitmap;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::describe::not_found;
use super::document::read_document;
use super::gc::{MIN_GRACE, found_before};
use super::manifest::{Manifest, Metadata, Start};
use super::names::{ObjectId, RecordId};
use super::objects::Objects;
use super::page_list::{self, PageRef, content_digest, span_of, span_start};
use super::read::damaged;
use super::table::{Entry, PAGE_BLOCKS, Table};
use super::writer::read_record;
use super::{Repository, document, names, since_boot};
use crate::model::{BlockIndex, Digest, Digester, Snapshot, SnapshotId, Tags};
use crate::store::{CompleteRequest, Error, ErrorKind, Result};

/// Entries of records that are held in memory at once: about 100 bytes each, so about 150 MB. A
/// snapshot with more (700 GiB of changes) is built in several rounds, each of which reads the
/// records that touch its part of the volume.
const ROUND_BLOCKS: u64 = 1_400_000;

/// Half the time in which a collection may find an object of ours unreachable and delete it.
pub(super) const SAFE: Duration = Duration::from_secs(MIN_GRACE.as_secs() / 2);

const STARTED_AGAIN: &str = "it was aborted, and started again, since this process wrote to it";

/// A record, as far as it is held in memory throughout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Summary {
    id: RecordId,
    first: BlockIndex,
    last: BlockIndex,
}

/// All that was put for a snapshot.
#[derive(Debug)]
struct Put {
    /// The highest epoch first, and within a writer the latest.
    records: Vec<Summary>,
    /// The distinct blocks.
    blocks: RoaringBitmap,
}

impl Put {
    fn has(&self, sealed: &Sealed) -> bool {
        self.records.iter().map(|record| record.id).eq(sealed.records())
    }
}

/// The valid put of one block so far.
#[derive(Clone, Copy, Debug)]
struct NewestPut {
    epoch: u32,
    /// The writer whose valid put was looked at last.
    writer: Uuid,
    entry: Entry,
}

/// `pending/<snap-id>/<attempt>/sealed`: the records that count.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Sealed(Vec<SealedWriter>);

#[derive(Debug, Serialize, Deserialize)]
struct SealedWriter {
    epoch: u32,
    writer: Uuid,
    /// Runs of record numbers: the first, and the last.
    numbers: Vec<(u32, u32)>,
}

impl Sealed {
    fn new(mut ids: Vec<RecordId>) -> Self {
        ids.sort_unstable();
        let mut writers: Vec<SealedWriter> = Vec::new();
        for RecordId { epoch, writer, number } in ids {
            match writers.last_mut().filter(|last| (last.epoch, last.writer) == (epoch, writer)) {
                Some(same) => {
                    match same.numbers.last_mut().filter(|run| run.1.checked_add(1) == Some(number))
                    {
                        Some(run) => run.1 = number,
                        None => same.numbers.push((number, number)),
                    }
                }
                None => {
                    writers.push(SealedWriter { epoch, writer, numbers: vec![(number, number)] });
                }
            }
        }
        Self(writers)
    }

    /// The records that count of an attempt that is closing: those that are there now, unless it
    /// was decided before. `None` if it was tidied up meanwhile.
    ///
    /// Whoever makes a record before the attempt is closing need not ask: it is in every list from
    /// which this may be decided. Whoever makes one later has to.
    pub(super) async fn decide(
        objects: &dyn Objects,
        id: &SnapshotId,
        attempt: Uuid,
    ) -> Result<Option<Self>> {
        let name = names::sealed(id, attempt);
        let decided = Self::read(objects, &name).await?;
        if decided.is_some() {
            return Ok(decided);
        }
        let sealed = Self::new(record_ids(objects, id, attempt).await?);
        if objects.create_own(&name, document::encode(&sealed)).await? {
            return Ok(Some(sealed));
        }
        Self::read(objects, &name).await
    }

    pub(super) fn contains(&self, id: RecordId) -> bool {
        let of = |w: &&SealedWriter| (w.epoch, w.writer) == (id.epoch, id.writer);
        let mut runs = self.0.iter().filter(of).flat_map(|writer| &writer.numbers);
        runs.any(|&(first, last)| (first..=last).contains(&id.number))
    }

    /// Reads what was decided; `None` if nothing was.
    pub(super) async fn read(objects: &dyn Objects, name: &str) -> Result<Option<Self>> {
        let found: Option<Self> = read_document(objects, name).await?;
        match found {
            Some(sealed) if !sealed.ascends() => Err(damaged(name, "its records do not ascend")),
            found => Ok(found),
        }
    }

    /// Whether no record is named twice: what reads them ends at the first that is not there.
    pub(super) fn ascends(&self) -> bool {
        let ends = |w: &SealedWriter| w.numbers.is_sorted_by(|a, b| a.1 < b.0);
        self.0.is_sorted_by(|a, b| (a.epoch, a.writer) < (b.epoch, b.writer))
            && self.0.iter().all(|w| ends(w) && w.numbers.iter().all(|run| run.0 <= run.1))
    }

    /// Descending. They may be more than there are.
    pub(super) fn records(&self) -> impl Iterator<Item = RecordId> + Send {
        let of = |w: &SealedWriter| {
            let (epoch, writer) = (w.epoch, w.writer);
            let runs = w.numbers.clone().into_iter().rev();
            let numbers = runs.flat_map(|(first, last)| (first..=last).rev());
            numbers.map(move |number| RecordId { epoch, writer, number })
        };
        self.0.iter().rev().flat_map(of)
    }
}

/// A manifest that is there.
#[derive(Debug)]
enum Completion {
    /// This completion made it, and has to tidy up.
    Ours(Manifest),
    /// Another completion of the same attempt was faster.
    ByAnother(Manifest),
}

/// What has been built of a snapshot.
#[derive(Debug, Default)]
struct ManifestDraft {
    pages: Vec<PageRef>,
    /// Objects that this completion made.
    made: Vec<ObjectId>,
}

impl Repository {
    pub(super) async fn complete_snapshot(
        &self,
        id: &SnapshotId,
        request: CompleteRequest,
    ) -> Result<Snapshot> {
        let writer = self.existing_writer(id);
        let Some(start) = self.start_of(id).await? else {
            self.forget_writer(id, |of| writer.is_some_and(|writer| writer.attempt() == of));
            return Err(if self.objects.exists(&names::manifest(id)).await? {
                Error::new(ErrorKind::Conflict, "it is completed already")
            } else {
                not_found(id)
            });
        };
        self.check_in_time(&start).await?;
        if request.started.is_some_and(|started| started != start.metadata.start_time) {
            return Err(Error::new(ErrorKind::Conflict, STARTED_AGAIN));
        }
        if let Some(writer) = &writer {
            if writer.attempt() != start.metadata.attempt {
                self.forget_writer(id, |of| of == writer.attempt());
                return Err(Error::new(ErrorKind::Conflict, STARTED_AGAIN));
            }
            // Blocks that are put from now on would come too late.
            writer.close();
            if let Err(error) = writer.flush().await {
                writer.reopen();
                return Err(error);
            }
        }
        let made = match self.make_manifest(&start, request).await {
            // Another completion of this attempt was faster, and its tidying up was in the way.
            Err(error) if was_tidied(&error) => match self.manifest(id).await? {
                Some(found) if found.metadata == start.metadata => Ok(Completion::ByAnother(found)),
                _ => Err(error),
            },
            made => made,
        };
        let manifest = match made {
            Ok(Completion::Ours(manifest)) => {
                self.tidy_up(&start).await;
                manifest
            }
            Ok(Completion::ByAnother(manifest)) => manifest,
            Err(error) => {
                writer.inspect(|writer| writer.reopen());
                return Err(error);
            }
        };
        self.forget_writer(id, |of| of == start.metadata.attempt);
        let tags = self.tags(id, start.metadata.attempt).await.unwrap_or_else(|error| {
            tracing::warn!("{id} is completed, but its tags cannot be read: {error}");
            Tags::new()
        });
        Ok(manifest.snapshot(tags))
    }

    async fn make_manifest(&self, start: &Start, request: CompleteRequest) -> Result<Completion> {
        let began = since_boot();
        let put = self.seal(start, request).await?;
        let draft = self.build(start, &put, request).await?;
        self.publish(start, draft, began).await
    }

    /// Removes what was needed to make the snapshot. What stays does no harm, and `gc` finds it.
    async fn tidy_up(&self, start: &Start) {
        let Metadata { id, attempt, .. } = &start.metadata;
        let tidied = async {
            // First, so that whoever finds it knows that the seal is still there, if there is one.
            if self.start_of(id).await?.is_some_and(|now| now.metadata.attempt == *attempt) {
                self.objects.delete(&[names::start(id)]).await?;
            }
            self.delete_records(id, *attempt).await
        };
        if let Err(error) = tidied.await {
            tracing::warn!("{id} is completed, but not all was tidied up: {error}");
        }
    }

    /// Reads the records that count, which is decided once and for all completions of this attempt.
    async fn seal(&self, start: &Start, request: CompleteRequest) -> Result<Put> {
        let Metadata { id, attempt, .. } = &start.metadata;
        let mut put = None;
        // If it is there, an earlier completion crashed, or another one is at work. Both may go
        // on: they build the same, and the manifest is made once.
        if !self.objects.exists(&names::sealed(id, *attempt)).await? {
            let mut ids = record_ids(&*self.objects, id, *attempt).await?;
            ids.sort_unstable_by_key(|id| Reverse(*id));
            let found = self.read_records(start, ids).await?;
            // An honest mistake is found before the point of no return.
            check_count(&found, request)?;
            put = Some(found);
            let closing = names::closing(id, *attempt);
            self.objects.ensure(&closing, document::encode(&())).await?;
        }
        let sealed = Sealed::decide(&*self.objects, id, *attempt).await?;
        let sealed = sealed.ok_or_else(|| not_found(id))?;
        let put = match put.filter(|put| put.has(&sealed)) {
            Some(put) => put,
            None => self.read_records(start, sealed.records()).await?,
        };
        check_count(&put, request)?;
        Ok(put)
    }

    /// Reads records that come in descending order.
    async fn read_records(
        &self,
        start: &Start,
        ids: impl IntoIterator<Item = RecordId, IntoIter: Send>,
    ) -> Result<Put> {
        let mut put = Put { records: Vec::new(), blocks: RoaringBitmap::new() };
        let mut tables = std::pin::pin!(self.records(start, ids));
        while let Some((id, table)) = tables.try_next().await? {
            let (first, last) = match table.len() {
                0 => (BlockIndex::ZERO, BlockIndex::ZERO),
                n => (table.index(0), table.index(n - 1)),
            };
            put.records.push(Summary { id, first, last });
            put.blocks.extend(table.entries().map(|entry| entry.index.0));
        }
        Ok(put)
    }

    /// Reads records in the order in which they are asked for, some ahead: where each takes a while, a large snapshot
    /// has many.
    pub(super) fn records<'a>(
        &'a self,
        start: &'a Start,
        ids: impl IntoIterator<Item = RecordId, IntoIter: Send> + 'a,
    ) -> impl Stream<Item = Result<(RecordId, Table)>> + Send + 'a {
        stream::iter(ids)
            .map(move |id| async move { Ok((id, self.record(start, id).await?)) })
            .buffered(self.objects.parallelism())
    }

    pub(super) async fn record(&self, start: &Start, id: RecordId) -> Result<Table> {
        let name = id.name(&start.metadata.id, start.metadata.attempt);
        let bytes = self.objects.read(&name).await?;
        read_record(&bytes).map_err(|why| damaged(&name, why))
    }

    async fn build(
        &self,
        start: &Start,
        put: &Put,
        request: CompleteRequest,
    ) -> Result<ManifestDraft> {
        let who = Uuid::new_v4();
        let parent = self.page_list(start.parent_pages).await?;
        let end = start.metadata.volume_size.blocks();
        let mut draft = ManifestDraft::default();
        let mut checksum = Digester::default();
        for round in rounds(put, end) {
            let mut winners = self.winners(start, put, &round).await?;
            for winner in winners.values() {
                checksum.update(winner.entry.digest.0);
            }
            for span in span_of(round.start)..span_of(BlockIndex(round.end.0 + PAGE_BLOCKS - 1)) {
                let after = winners.split_off(&span_start(span + 1));
                let changes = std::mem::replace(&mut winners, after);
                let old = parent.iter().find(|page| page.span == span);
                self.build_page(who, span, old, changes, end, &mut draft).await?;
            }
        }
        if let Some(expected) = request.checksum {
            let actual = checksum.finish();
            if actual != expected {
                let message =
                    format!("the blocks that were put have the checksum {actual}, not {expected}");
                return Err(Error::new(ErrorKind::Conflict, message));
            }
        }
        Ok(draft)
    }

    /// The valid put of each block in a range.
    async fn winners(
        &self,
        start: &Start,
        put: &Put,
        range: &Range<BlockIndex>,
    ) -> Result<BTreeMap<BlockIndex, NewestPut>> {
        let mut winners = BTreeMap::new();
        let touches = |summary: &&Summary| summary.first < range.end && summary.last >= range.start;
        let ids: Vec<_> = put.records.iter().filter(touches).map(|summary| summary.id).collect();
        let mut tables = std::pin::pin!(self.records(start, ids));
        while let Some((RecordId { epoch, writer, .. }, table)) = tables.try_next().await? {
            for n in table.position(range.start)..table.position(range.end) {
                let new = NewestPut { epoch, writer, entry: table.entry(n) };
                match winners.entry(new.entry.index) {
                    MapEntry::Vacant(vacant) => {
                        vacant.insert(new);
                    }
                    MapEntry::Occupied(mut old) => keep_newer(old.get_mut(), new)?,
                }
            }
        }
        Ok(winners)
    }

    /// Builds the page of one span, or takes over the parent's where nothing changed.
    async fn build_page(
        &self,
        who: Uuid,
        span: u32,
        old: Option<&PageRef>,
        changes: BTreeMap<BlockIndex, NewestPut>,
        end: BlockIndex,
        draft: &mut ManifestDraft,
    ) -> Result<()> {
        let mut entries = BTreeMap::new();
        if let Some(old) = old {
            let ends_inside = span_start(span + 1) > end;
            if changes.is_empty() && !ends_inside {
                draft.pages.push(*old);
                return Ok(());
            }
            let table = self.page(old).await?;
            if changes.is_empty() && table.position(end) == table.len() {
                draft.pages.push(*old);
                return Ok(());
            }
            entries.extend(table.entries().map(|entry| (entry.index, entry)));
        }
        entries.extend(changes.into_iter().map(|(index, winner)| (index, winner.entry)));
        // A volume that is smaller than its parent's ends inside a page.
        entries.split_off(&end);
        if entries.is_empty() {
            return Ok(());
        }
        let entries: Vec<Entry> = entries.into_values().collect();
        let data = Table::encode(&entries);
        let page = ObjectId { digest: Digest::of(&data), writer: who };
        self.objects.ensure(&page.page_name(), data).await?;
        draft.made.push(page);
        draft.pages.push(PageRef::new(span, page, &entries));
        Ok(())
    }

    /// Makes the manifest, the moment from which the snapshot is there.
    async fn publish(
        &self,
        start: &Start,
        mut draft: ManifestDraft,
        began: Duration,
    ) -> Result<Completion> {
        let id = &start.metadata.id;
        let pages = self.save_page_list(start, &mut draft).await?;
        let sum =
            |count: fn(&PageRef) -> u32| draft.pages.iter().map(|p| u64::from(count(p))).sum();
        let manifest = Manifest {
            metadata: start.metadata.clone(),
            completed_time: self.objects.now().await?.max(start.metadata.start_time),
            content_digest: content_digest(start.metadata.volume_size, &draft.pages),
            data_blocks: sum(|page| page.data_blocks),
            zero_blocks: sum(|page| page.zero_blocks),
            pages,
        };
        self.check_not_collected(&draft, began).await?;
        let (name, data) = (names::manifest(id), document::encode(&manifest));
        // Without pages of its own it may equal that of another completion, and only one of them may tidy up: then
        // a lost answer fails this one, as a crash would.
        let created = if pages.is_some_and(|pages| draft.made.contains(&pages)) {
            self.objects.create_own(&name, data).await?
        } else {
            self.objects.create(&name, data).await?
        };
        if !created {
            return match self.manifest(id).await? {
                Some(found) if found.metadata == start.metadata => Ok(Completion::ByAnother(found)),
                _ => Err(Error::new(ErrorKind::Conflict, "there is a snapshot of this id already")),
            };
        }
        if let Err(error) = self.check_published(start, &draft, began).await {
            // The id may be another snapshot's by now.
            if self.manifest(id).await?.is_some_and(|found| found.metadata == start.metadata) {
                self.objects.delete(&[name]).await?;
            }
            return Err(error);
        }
        Ok(Completion::Ours(manifest))
    }

    async fn save_page_list(
        &self,
        start: &Start,
        draft: &mut ManifestDraft,
    ) -> Result<Option<ObjectId>> {
        if draft.pages.is_empty() {
            return Ok(None);
        }
        if draft.made.is_empty() && start.parent_pages.is_some() {
            let parent = self.page_list(start.parent_pages).await?;
            if *parent == draft.pages {
                return Ok(start.parent_pages);
            }
        }
        let data = page_list::encode(&draft.pages);
        let list = ObjectId { digest: Digest::of(&data), writer: Uuid::new_v4() };
        self.objects.ensure(&list.page_name(), data).await?;
        draft.made.push(list);
        Ok(Some(list))
    }

    /// Whoever aborted the snapshot, or deleted it after another completion, meant this one too.
    async fn check_published(
        &self,
        start: &Start,
        draft: &ManifestDraft,
        began: Duration,
    ) -> Result<()> {
        let now = self.start_of(&start.metadata.id).await?;
        if now.map(|now| now.metadata.attempt) != Some(start.metadata.attempt) {
            return Err(Error::new(ErrorKind::Conflict, "it was aborted or deleted meanwhile"));
        }
        self.check_not_collected(draft, began).await
    }

    /// Fails if this took so long that a collection may have deleted what only the manifest will
    /// refer to: the pages. The packs are kept by the records.
    async fn check_not_collected(&self, draft: &ManifestDraft, began: Duration) -> Result<()> {
        if since_boot().saturating_sub(began) < SAFE {
            return Ok(());
        }
        // What was named lately is safe: it is reachable before the grace period ends.
        let doomed = found_before(&*self.objects, self.objects.now().await?, SAFE).await?;
        for name in draft.made.iter().map(|page| page.page_name()) {
            if doomed.contains(&name) || !self.objects.exists(&name).await? {
                let message = format!(
                    "completing it took so long that a collection found {name} unused; complete it again"
                );
                return Err(Error::new(ErrorKind::Conflict, message));
            }
        }
        Ok(())
    }
}

/// Whether this may come of records that are vanishing: one is missing, or the count is too low.
fn was_tidied(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Conflict)
}

/// Meets another put of the same block. They come from the highest epoch down, writer by writer,
/// from the latest record of each: so the first of each writer is the valid one.
fn keep_newer(valid: &mut NewestPut, other: NewestPut) -> Result<()> {
    if other.epoch < valid.epoch || other.writer == valid.writer {
        return Ok(());
    }
    if other.entry.digest != valid.entry.digest {
        let index = other.entry.index;
        let message = format!("two writers put different data at block {index} at the same time");
        return Err(Error::new(ErrorKind::Conflict, message));
    }
    valid.writer = other.writer;
    Ok(())
}

/// The records of an attempt that are there.
pub(super) async fn record_ids(
    objects: &dyn Objects,
    id: &SnapshotId,
    attempt: Uuid,
) -> Result<Vec<RecordId>> {
    let names = objects.list(&names::attempt(id, attempt)).await?;
    Ok(names.iter().filter_map(|name| RecordId::from_name(id, attempt, name)).collect())
}

fn check_count(put: &Put, request: CompleteRequest) -> Result<()> {
    let (found, named) = (put.blocks.len(), request.changed_blocks);
    if found == named {
        return Ok(());
    }
    let message = format!("{found} blocks were put, not {named} as its writer says");
    Err(Error::new(ErrorKind::Conflict, message))
}

/// Parts of the volume, of whole spans, each with few enough puts to be held in memory.
fn rounds(put: &Put, end: BlockIndex) -> Vec<Range<BlockIndex>> {
    let spans = span_of(BlockIndex(end.0 + PAGE_BLOCKS - 1));
    let mut rounds = Vec::new();
    let (mut start, mut blocks) = (0, 0);
    for span in 0..spans {
        let range = span_start(span).0..span_start(span + 1).0;
        let more = put.blocks.range_cardinality(range);
        if blocks + more > ROUND_BLOCKS && blocks > 0 {
            rounds.push(span_start(start)..span_start(span));
            (start, blocks) = (span, 0);
        }
        blocks += more;
    }
    rounds.push(span_start(start)..span_start(spans));
    rounds
}
