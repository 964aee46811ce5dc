//! Operations of two processes at the same time.

use super::*;
use crate::store::repository::MIN_GRACE;

impl World {
    /// Two processes that were just started.
    fn two(&mut self) -> (&Process, &Process) {
        self.exit();
        (&self.processes[0], &self.processes[1])
    }

    pub(in super::super) async fn start_twice(&mut self, one: StartRequest, two: StartRequest) {
        let id = one.id.clone().unwrap();
        let same = one.client_token.is_some() && one.client_token == two.client_token;
        if self.snaps.contains_key(&id) {
            return;
        }
        let space = self.space.clone();
        let (p, q) = self.two();
        let (a, b) = space.interleave(p.start(one.clone()), q.start(two.clone())).await;
        let winner = if a.is_ok() { &one } else { &two };
        for done in [&a, &b] {
            assert!(done.as_ref().is_ok_and(|s| s.id == id) || kind2(done) == ErrorKind::Conflict);
        }
        assert!(a.is_ok() || b.is_ok());
        assert_eq!(a.is_ok() && b.is_ok(), same);
        self.insert(&id, winner, Content::new());
        let there = state(&self.space.process(), &id).await.unwrap().tags;
        assert!(there == winner.tags || same && (there == one.tags || there == two.tags));
        self.snaps.get_mut(&id).unwrap().tags = there;
    }

    /// Learns what came of completions that raced with something.
    async fn raced(&mut self, id: &SnapshotId, completions: &[Result<Snapshot>]) {
        let fits = self.snaps[id].puts().is_some();
        for error in completions.iter().filter_map(|done| done.as_ref().err()) {
            assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
        }
        assert_eq!(completions.iter().any(Result::is_ok), fits, "{completions:?}");
        let sealed = fits || self.is_sealed(id).await;
        let snap = self.snaps.get_mut(id).unwrap();
        snap.sealed = sealed;
        if fits {
            snap.complete();
        }
    }

    pub(in super::super) async fn complete_twice(&mut self, id: &SnapshotId) {
        if self.is_pending(id) {
            let space = self.space.clone();
            self.two();
            let request = self.request(0, id, Asks::Right);
            let (p, q) = self.two();
            let (a, b) = space.interleave(p.complete(id, request), q.complete(id, request)).await;
            self.raced(id, &[a, b]).await;
        }
    }

    pub(in super::super) async fn complete_and_gc(&mut self, id: &SnapshotId) {
        if self.is_pending(id) {
            let space = self.space.clone();
            self.two();
            let request = self.request(0, id, Asks::Right);
            let (p, q) = self.two();
            let gc = q.gc(MIN_GRACE, false);
            let (a, b) = space.interleave(p.complete(id, request), gc).await;
            b.unwrap();
            self.raced(id, &[a]).await;
        }
    }

    pub(in super::super) async fn complete_and_delete(&mut self, id: &SnapshotId) {
        if self.is_pending(id) {
            let space = self.space.clone();
            self.two();
            let request = self.request(0, id, Asks::Right);
            let (p, q) = self.two();
            let (_, b) = space.interleave(p.complete(id, request), q.delete(id)).await;
            b.unwrap();
            self.snaps.remove(id);
        }
    }

    /// A flush that succeeds is in what is completed; one that fails may be.
    pub(in super::super) async fn complete_and_flush(
        &mut self,
        id: &SnapshotId,
        index: u32,
        more: bool,
    ) {
        if !self.is_pending(id) || self.snaps[id].sealed {
            return;
        }
        let space = self.space.clone();
        self.two();
        self.put(1, id, index, 5).await;
        let Some(record) = self.unflushed(1, id) else { return };
        let before = self.snaps[id].clone();
        let mut after = before.clone();
        after.records.push(record);
        let request = count(if more { after.count() } else { before.count() });
        let (p, q) = (&self.processes[0], &self.processes[1]);
        let (done, flushed) = space.interleave(p.complete(id, request), q.flush(id)).await;
        let observer = self.space.process();
        let mut snap = if flushed.is_ok() { after.clone() } else { before.clone() };
        if done.is_ok() {
            let there: Content = read(&observer, id).await.unwrap().into_iter().collect();
            if flushed.is_err() && before.completed().as_ref() != Some(&there) {
                snap = after;
            }
            snap.complete();
            assert_eq!(snap.content, Some(there));
        } else {
            assert_eq!(kind(done), Some(ErrorKind::Conflict));
            if self.records(id).await > before.records.len() {
                snap = after;
            }
            snap.sealed = self.is_sealed(id).await;
        }
        self.snaps.insert(id.clone(), snap);
        self.two();
    }

    /// A child is started while its parent is deleted, or before that while garbage is collected.
    pub(in super::super) async fn start_and_delete(&mut self, parent: &SnapshotId, gc: bool) {
        if self.snaps.get(parent).is_none_or(Snap::is_pending) {
            return;
        }
        let space = self.space.clone();
        let request = child_of(parent);
        let base = self.base(&request);
        let (p, q) = self.two();
        let child = if gc {
            let both = async {
                let child = p.start(request.clone()).await;
                p.delete(parent).await.unwrap();
                child
            };
            let (child, gc) = space.interleave(both, q.gc(MIN_GRACE, false)).await;
            gc.unwrap();
            child
        } else {
            let deleting = q.delete(parent);
            let (child, deleted) = space.interleave(p.start(request.clone()), deleting).await;
            deleted.unwrap();
            child
        };
        self.snaps.remove(parent);
        match child {
            Ok(child) => self.insert(&child.id, &request, base),
            Err(error) => assert!(!gc && error.kind() == ErrorKind::NotFound, "{error}"),
        }
    }

    pub(in super::super) async fn set_tags_twice(&mut self, id: &SnapshotId) {
        if self.snaps.contains_key(id) {
            let space = self.space.clone();
            let (p, q) = self.two();
            let (a, b) = space.interleave(p.set_tags(id, tags(1)), q.set_tags(id, tags(2))).await;
            a.and(b).unwrap();
            let there = state(&self.space.process(), id).await.unwrap().tags;
            assert!(there == tags(1) || there == tags(2));
            self.snaps.get_mut(id).unwrap().tags = there;
        }
    }
}

fn kind2<T>(result: &Result<T>) -> ErrorKind {
    result.as_ref().err().expect("it failed").kind()
}
