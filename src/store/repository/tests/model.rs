//! A repository as maps: what is in it after operations that succeed, fail, crash, or race.

mod checks;
mod pairs;

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use super::memory::{Process, Space};
use super::*;
use crate::model::{Digest, Digester};
use crate::store::repository::complete::Sealed;
use crate::store::repository::names::{self, RecordId};

/// Blocks by index; a hole is not in it.
pub(super) type Content = BTreeMap<u32, u8>;

/// A snapshot, as it must be.
#[derive(Clone, Debug)]
struct Snap {
    /// Tells attempts at one id apart.
    attempt: usize,
    request: StartRequest,
    /// What it began with.
    base: Content,
    records: Vec<Record>,
    sealed: bool,
    /// Once it is completed.
    content: Option<Content>,
    tags: Tags,
}

/// What one flush saved.
#[derive(Clone, Debug)]
struct Record {
    epoch: usize,
    writer: usize,
    blocks: Content,
}

/// One process's part in a snapshot.
#[derive(Debug)]
struct Writer {
    attempt: usize,
    /// Its epoch and name, from the first put on.
    who: Option<(usize, usize)>,
    unflushed: Content,
}

impl Snap {
    fn is_pending(&self) -> bool {
        self.content.is_none()
    }

    fn blocks(&self) -> u32 {
        self.request.volume_size.blocks().0
    }

    fn epoch(&self) -> usize {
        self.records.iter().map(|record| record.epoch).max().unwrap_or(0)
    }

    fn count(&self) -> u64 {
        let blocks: BTreeSet<_> =
            self.records.iter().flat_map(|record| record.blocks.keys()).collect();
        blocks.len() as u64
    }

    /// What was put; `None` if two writers conflict.
    fn puts(&self) -> Option<Content> {
        let mut puts: BTreeMap<u32, BTreeMap<(usize, usize), u8>> = BTreeMap::new();
        for Record { epoch, writer, blocks } in &self.records {
            for (&index, &value) in blocks {
                puts.entry(index).or_default().insert((*epoch, *writer), value);
            }
        }
        let one = |(index, puts): (u32, BTreeMap<(usize, usize), u8>)| {
            let highest = puts.last_key_value()?.0.0;
            let mut values = puts.range((highest, 0)..).map(|(_, value)| *value);
            let value = values.next()?;
            values.all(|other| other == value).then_some((index, value))
        };
        puts.into_iter().map(one).collect()
    }

    /// What it has when it is completed now.
    fn completed(&self) -> Option<Content> {
        let mut content = self.base.clone();
        content.extend(self.puts()?);
        content.retain(|index, _| *index < self.blocks());
        Some(content)
    }

    fn complete(&mut self) {
        self.content = Some(self.completed().expect("two writers conflict"));
        self.records.clear();
    }

    fn same_request(&self, other: &StartRequest) -> bool {
        let of = |r: &StartRequest| (r.client_token.clone(), r.volume_size, r.parent.clone());
        other.client_token.is_some() && of(&self.request) == of(other)
    }
}

fn linear(puts: &Content) -> Digest {
    let mut digester = Digester::default();
    for value in puts.values() {
        digester.update(block(*value).digest().0);
    }
    digester.finish()
}

/// What a completion asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asks {
    Right,
    WrongCount,
    WrongChecksum,
}

/// Some processes, what they share, and what must be in it.
#[derive(Debug)]
pub(super) struct World {
    pub(super) space: Space,
    processes: Vec<Process>,
    snaps: BTreeMap<SnapshotId, Snap>,
    writers: BTreeMap<(usize, SnapshotId), Writer>,
    tokens: BTreeMap<String, SnapshotId>,
    /// Names attempts and writers.
    next: usize,
    /// Processes that have crashed.
    pub(super) crashes: usize,
}

impl World {
    pub(super) fn new(seed: u64, processes: usize) -> Self {
        let space = Space::new(seed);
        Self {
            processes: (0..processes).map(|_| space.process()).collect(),
            space,
            snaps: BTreeMap::new(),
            writers: BTreeMap::new(),
            tokens: BTreeMap::new(),
            next: 0,
            crashes: 0,
        }
    }

    fn number(&mut self) -> usize {
        self.next += 1;
        self.next
    }

    /// One of the snapshots that there are, mostly, or one that there may have been.
    pub(super) fn pick(&self, n: usize) -> SnapshotId {
        match self.snaps.keys().nth(n % self.snaps.len().max(1)) {
            Some(id) if n < 9 => id.clone(),
            _ => format!("snap-{}", n % 3).parse().unwrap(),
        }
    }

    /// The process ends, and another takes its place.
    fn restart(&mut self, p: usize) {
        self.processes[p] = self.space.process();
        self.writers.retain(|(q, _), _| *q != p);
    }

    /// Lets the next operation of a process crash at this call.
    pub(super) fn crash(&self, p: usize, calls: Option<usize>) {
        if let Some(calls) = calls {
            self.processes[p].crash_after(calls);
        }
    }

    /// Whether it did; then there is a new process.
    fn crashed(&mut self, p: usize) -> bool {
        let crashed = self.processes[p].has_crashed();
        if crashed {
            self.crashes += 1;
            self.restart(p);
        }
        crashed
    }

    /// All processes end, without a crash, and others take their places.
    pub(super) fn exit(&mut self) {
        for p in 0..self.processes.len() {
            self.restart(p);
        }
    }

    /// Whether a start has to succeed.
    fn can_start(&self, id: Option<&SnapshotId>, request: &StartRequest) -> bool {
        if let Some(snap) = id.and_then(|id| self.snaps.get(id)) {
            return snap.same_request(request);
        }
        let parent = request.parent.as_ref();
        parent.is_none_or(|parent| self.snaps.get(parent).is_some_and(|p| !p.is_pending()))
    }

    fn insert(&mut self, id: &SnapshotId, request: &StartRequest, base: Content) {
        let attempt = self.number();
        if let Some(token) = &request.client_token
            && request.id.is_none()
        {
            self.tokens.insert(token.clone(), id.clone());
        }
        let snap = Snap {
            attempt,
            request: request.clone(),
            base,
            records: Vec::new(),
            sealed: false,
            content: None,
            tags: request.tags.clone(),
        };
        self.snaps.insert(id.clone(), snap);
    }

    fn base(&self, request: &StartRequest) -> Content {
        let parent = request.parent.as_ref().and_then(|parent| self.snaps.get(parent));
        parent.and_then(|parent| parent.content.clone()).unwrap_or_default()
    }

    pub(super) async fn start(&mut self, p: usize, request: StartRequest) {
        let token = request.client_token.as_ref().and_then(|token| self.tokens.get(token));
        let id = request.id.as_ref().or(token).cloned();
        let late_tags = match &id {
            Some(id) => !request.tags.is_empty() && self.has_no_tags(id).await,
            None => false,
        };
        let done = self.processes[p].start(request.clone()).await;
        let crashed = self.crashed(p);
        let fits = self.can_start(id.as_ref(), &request);
        let base = self.base(&request);
        match done {
            Ok(snapshot) => {
                assert!(fits, "started against the rules: {request:?}");
                let id = id.unwrap_or_else(|| snapshot.id.clone());
                assert_eq!(snapshot.id, id);
                match self.snaps.get_mut(&id) {
                    Some(snap) if snap.is_pending() && late_tags => snap.tags = request.tags,
                    Some(_) => {}
                    None => {
                        self.insert(&id, &request, base);
                        self.writers.remove(&(p, id));
                    }
                }
            }
            Err(error) if !crashed => {
                assert!(!fits, "{request:?}: {error}");
                let expected = [ErrorKind::Conflict, ErrorKind::NotFound, ErrorKind::NotReady];
                assert!(expected.contains(&error.kind()), "{error}");
            }
            Err(_) => {
                let observer = self.space.process();
                for id in observer.snapshot_ids().await.unwrap() {
                    let there = state(&observer, &id).await.unwrap();
                    match self.snaps.get_mut(&id) {
                        None => {
                            assert!(fits, "{request:?}");
                            self.insert(&id, &request, base.clone());
                            // It may not have come to them.
                            self.snaps.get_mut(&id).unwrap().tags = there.tags;
                        }
                        Some(snap) if there.tags != snap.tags => {
                            assert!(late_tags && there.tags == request.tags);
                            snap.tags = there.tags;
                        }
                        Some(_) => {}
                    }
                }
            }
        }
    }

    /// Whether the process writes to the attempt that is pending.
    fn is_current(&self, p: usize, id: &SnapshotId) -> bool {
        let attempt = self.writers.get(&(p, id.clone())).map(|writer| writer.attempt);
        self.snaps.get(id).is_some_and(|s| s.is_pending() && attempt.is_none_or(|a| a == s.attempt))
    }

    pub(super) async fn put(&mut self, p: usize, id: &SnapshotId, index: u32, value: u8) {
        let done = self.processes[p].put_block(id, BlockIndex(index), block(value)).await;
        if self.crashed(p) {
            return;
        }
        let current = self.is_current(p, id);
        let writer_there = self.writers.contains_key(&(p, id.clone()));
        if !current && !writer_there {
            done.unwrap_err();
            return;
        }
        let name = self.number();
        let snap = self.snaps.get(id);
        let new =
            || Writer { attempt: snap.unwrap().attempt, who: None, unflushed: Content::new() };
        let writer = self.writers.entry((p, id.clone())).or_insert_with(new);
        let beyond = snap.is_some_and(|snap| index >= snap.blocks());
        match done {
            Ok(()) => {
                assert!(!(current && beyond));
                let epoch = snap.map_or(0, Snap::epoch) + 1;
                writer.who.get_or_insert((epoch, name));
                writer.unflushed.insert(index, value);
            }
            Err(error) if current && beyond => assert_eq!(error.kind(), ErrorKind::Invalid),
            Err(error) if current => assert!(snap.unwrap().sealed, "{error}"),
            // The next put is for the snapshot that has the id now.
            Err(error) if error.kind() == ErrorKind::Conflict => {
                self.writers.remove(&(p, id.clone()));
            }
            // Beyond the volume that it was.
            Err(error) => assert_eq!(error.kind(), ErrorKind::Invalid),
        }
    }

    /// Whether a flush has to succeed.
    fn can_flush(&self, p: usize, id: &SnapshotId) -> bool {
        let nothing = |writer: &Writer| writer.unflushed.is_empty();
        self.writers.get(&(p, id.clone())).is_none_or(nothing)
            || self.is_current(p, id) && !self.snaps[id].sealed
    }

    fn flushed(&mut self, p: usize, id: &SnapshotId) {
        if let Some(writer) = self.writers.get_mut(&(p, id.clone())) {
            let blocks = std::mem::take(&mut writer.unflushed);
            if let (Some((epoch, writer)), false) = (writer.who, blocks.is_empty()) {
                let snap = self.snaps.get_mut(id).unwrap();
                snap.records.push(Record { epoch, writer, blocks });
            }
        }
    }

    /// What a process that crashed had not flushed, as it would be flushed.
    fn unflushed(&self, p: usize, id: &SnapshotId) -> Option<Record> {
        let writer = self.writers.get(&(p, id.clone()))?;
        let (epoch, name) = writer.who?;
        let blocks = writer.unflushed.clone();
        (!blocks.is_empty()).then_some(Record { epoch, writer: name, blocks })
    }

    /// Whether a snapshot that may be there has no set of tags, not even an empty one.
    async fn has_no_tags(&self, id: &SnapshotId) -> bool {
        match self.space.process().attempt_of(id).await.unwrap() {
            Some(attempt) => self.space.names(&names::all_tags(id, attempt)).is_empty(),
            None => true,
        }
    }

    /// The records of a pending snapshot that count, or would if it were completed now.
    async fn records(&self, id: &SnapshotId) -> usize {
        let observer = self.space.process();
        let attempt = observer.start_of(id).await.unwrap().unwrap().metadata.attempt;
        let name = names::sealed(id, attempt);
        let sealed: Option<Sealed> = observer.read_document(&name).await.unwrap();
        let names = self.space.names(&names::attempt(id, attempt));
        let records = names.iter().filter_map(|name| RecordId::from_name(id, attempt, name));
        records.filter(|id| sealed.as_ref().is_none_or(|sealed| sealed.contains(*id))).count()
    }

    async fn is_sealed(&self, id: &SnapshotId) -> bool {
        self.has(id, names::sealed).await
    }

    /// Whether the attempt that is pending has this object.
    async fn has(&self, id: &SnapshotId, name: fn(&SnapshotId, Uuid) -> String) -> bool {
        let start = self.space.process().start_of(id).await.unwrap().unwrap();
        self.space.objects().contains_key(&name(id, start.metadata.attempt))
    }

    /// Learns what came of a flush that crashed.
    async fn maybe_flushed(&mut self, id: &SnapshotId, record: Option<Record>, allowed: bool) {
        if !self.snaps.get(id).is_some_and(Snap::is_pending) {
            return;
        }
        let there = self.records(id).await;
        let snap = self.snaps.get_mut(id).unwrap();
        if there != snap.records.len() {
            assert!(allowed, "what was refused is there");
            snap.records.push(record.expect("there was something to flush"));
            assert_eq!(there, snap.records.len());
        }
    }

    pub(super) async fn flush(&mut self, p: usize, id: &SnapshotId) {
        let (allowed, record) = (self.can_flush(p, id), self.unflushed(p, id));
        let done = self.processes[p].flush(id).await;
        if self.crashed(p) {
            self.maybe_flushed(id, record, allowed).await;
        } else if allowed {
            done.unwrap();
            self.flushed(p, id);
        } else {
            assert_eq!(kind(done), Some(ErrorKind::Conflict));
        }
        // After a completion that crashed while it was closing, whoever comes next seals.
        if self.is_pending(id) {
            self.snaps.get_mut(id).unwrap().sealed = self.is_sealed(id).await;
        }
    }

    fn is_pending(&self, id: &SnapshotId) -> bool {
        self.snaps.get(id).is_some_and(Snap::is_pending)
    }

    fn request(&self, p: usize, id: &SnapshotId, asks: Asks) -> CompleteRequest {
        let Some(mut snap) = self.snaps.get(id).cloned() else { return count(0) };
        if self.is_current(p, id) {
            snap.records.extend(self.unflushed(p, id));
        }
        let puts = snap.puts().unwrap_or_default();
        match asks {
            Asks::Right => CompleteRequest {
                changed_blocks: snap.count(),
                checksum: Some(linear(&puts)),
                started: None,
            },
            Asks::WrongCount => count(snap.count() + 1),
            Asks::WrongChecksum => CompleteRequest {
                changed_blocks: snap.count(),
                checksum: Some(Digest::of(b"something else")),
                started: None,
            },
        }
    }

    pub(super) async fn complete(&mut self, p: usize, id: &SnapshotId, asks: Asks) {
        let request = self.request(p, id, asks);
        let (flushes, record) = (self.can_flush(p, id), self.unflushed(p, id));
        let current = self.is_current(p, id);
        let closing = self.is_pending(id) && self.has(id, names::closing).await;
        let done = self.processes[p].complete(id, request).await;
        let crashed = self.crashed(p);
        if !current {
            if let Ok(snapshot) = done {
                // Only its cleaning up was left.
                assert!(self.snaps.get(id).is_some_and(|snap| !snap.is_pending()));
                assert_eq!(snapshot.id, *id);
            }
            self.restart(p);
            return;
        }
        if crashed {
            let there = state(&self.space.process(), id).await.unwrap();
            if there.is_readable() {
                assert!(flushes && asks == Asks::Right);
                let snap = self.snaps.get_mut(id).unwrap();
                snap.records.extend(record);
                snap.complete();
            } else {
                self.maybe_flushed(id, record, flushes).await;
                let sealed = self.is_sealed(id).await;
                self.snaps.get_mut(id).unwrap().sealed = sealed;
            }
            return;
        }
        if !flushes {
            assert_eq!(kind(done), Some(ErrorKind::Conflict));
            return;
        }
        self.flushed(p, id);
        let snap = self.snaps.get_mut(id).unwrap();
        if asks == Asks::Right && snap.puts().is_some() {
            done.unwrap();
            snap.complete();
            self.writers.remove(&(p, id.clone()));
        } else {
            assert_eq!(kind(done), Some(ErrorKind::Conflict));
            let before = snap.sealed;
            let sealed = self.is_sealed(id).await;
            // After a completion that crashed while it was closing, what this one saved seals.
            assert!(sealed == (before || asks != Asks::WrongCount) || sealed && closing);
            self.snaps.get_mut(id).unwrap().sealed = sealed;
        }
    }

    pub(super) async fn delete(&mut self, p: usize, id: &SnapshotId) {
        let there = self.snaps.contains_key(id);
        let done = self.processes[p].delete(id).await;
        if self.crashed(p) {
            if state(&self.space.process(), id).await.is_none() {
                self.snaps.remove(id);
            }
            return;
        }
        self.writers.remove(&(p, id.clone()));
        assert_eq!(kind(done), (!there).then_some(ErrorKind::NotFound));
        self.snaps.remove(id);
    }

    pub(super) async fn set_tags(&mut self, p: usize, id: &SnapshotId, new: Tags) {
        let done = self.processes[p].set_tags(id, new.clone()).await;
        let crashed = self.crashed(p);
        let Some(snap) = self.snaps.get_mut(id) else {
            assert!(crashed || kind(done) == Some(ErrorKind::NotFound));
            return;
        };
        if !crashed {
            done.unwrap();
        } else if state(&self.space.process(), id).await.unwrap().tags != new {
            return;
        }
        snap.tags = new;
    }

    pub(super) async fn gc(&mut self, p: usize, dry_run: bool) {
        let before = dry_run.then(|| self.space.objects());
        let done = self.processes[p].gc(super::super::MIN_GRACE, dry_run).await;
        if !self.crashed(p) {
            done.unwrap();
        }
        if let Some(before) = before {
            assert_eq!(before, self.space.objects());
        }
    }
}
