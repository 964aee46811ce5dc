//! Comparing what is there with what must be.

use super::*;
use crate::model::SnapshotState;

impl World {
    /// Compares all that can be listed.
    pub(in super::super) async fn check(&self) {
        let observer = self.space.process();
        let mut listed = observer.list(None).await.unwrap().snapshots;
        listed.sort_by(|a, b| a.id.cmp(&b.id));
        let ids: Vec<_> = listed.iter().map(|snapshot| &snapshot.id).collect();
        assert_eq!(ids, self.snaps.keys().collect::<Vec<_>>());
        for snapshot in &listed {
            let snap = &self.snaps[&snapshot.id];
            assert_eq!(snapshot.tags, snap.tags, "{snapshot:?}");
            assert_eq!(snapshot.parent, snap.request.parent);
            assert_eq!(snapshot.volume_size, snap.request.volume_size);
            let Some(content) = &snap.content else {
                assert_eq!(snapshot.state, SnapshotState::Pending);
                continue;
            };
            assert_eq!(snapshot.state, SnapshotState::Completed);
            let zeros = content.values().filter(|value| **value == 0).count() as u64;
            assert_eq!(snapshot.zero_blocks, Some(zeros));
            assert_eq!(snapshot.data_blocks, Some(content.len() as u64 - zeros));
        }
    }

    /// Reads everything, and compares every two snapshots.
    pub(in super::super) async fn check_all(&self) {
        self.check().await;
        let observer = self.space.process();
        let completed: Vec<_> = self
            .snaps
            .iter()
            .filter_map(|(id, snap)| Some((id, snap, snap.content.as_ref()?)))
            .collect();
        for (id, _, content) in &completed {
            let there: Content = read(&observer, id).await.unwrap().into_iter().collect();
            assert_eq!(&there, *content);
            let max = 1 + self.space.random(4);
            assert_eq!(list(&observer, id, max).await, there.into_keys().collect::<Vec<_>>());
        }
        let ids: Vec<SnapshotId> = completed.iter().map(|(id, ..)| (*id).clone()).collect();
        if !ids.is_empty() {
            assert_eq!(verify(&self.space.process(), &ids).await.damage, []);
        }
        for (a, one, first) in &completed {
            for (b, two, second) in &completed {
                let max = 1 + self.space.random(4);
                let changed = changed(&observer, a, b, max).await;
                let all: BTreeSet<u32> = first.keys().chain(second.keys()).copied().collect();
                let value = |content: &Content, n| content.get(&n).copied().unwrap_or(0);
                let expected: Vec<u32> =
                    all.into_iter().filter(|n| value(first, *n) != value(second, *n)).collect();
                assert_eq!(changed, expected);
                let digests = (
                    state(&observer, a).await.unwrap().content_digest,
                    state(&observer, b).await.unwrap().content_digest,
                );
                let equal =
                    expected.is_empty() && one.request.volume_size == two.request.volume_size;
                assert_eq!(digests.0 == digests.1, equal);
            }
        }
    }

    /// Deletes everything and collects what is left.
    pub(in super::super) async fn end(&mut self) {
        self.check_all().await;
        for id in self.snaps.keys().cloned().collect::<Vec<_>>() {
            self.delete(0, &id).await;
        }
        collecting::collect_all(&self.space).await;
    }
}

/// The blocks of a snapshot, listed in small pages.
async fn list(repository: &Repository, id: &SnapshotId, max: usize) -> Vec<u32> {
    let mut indexes = Vec::new();
    let mut from = Some(ListFrom::Index(BlockIndex::ZERO));
    while let Some(at) = from {
        let page = repository.list_blocks(id, at, max).await.unwrap();
        assert!(page.blocks.len() <= max);
        indexes.extend(page.blocks.iter().map(|listed| listed.index.0));
        let covered = page.covered.unwrap();
        assert!(page.blocks.iter().all(|listed| listed.index < covered));
        from = page.next.map(ListFrom::Page);
    }
    indexes
}

async fn changed(repository: &Repository, a: &SnapshotId, b: &SnapshotId, max: usize) -> Vec<u32> {
    let mut indexes = Vec::new();
    let mut from = Some(ListFrom::Index(BlockIndex::ZERO));
    while let Some(at) = from {
        let page = repository.list_changed_blocks(a, b, at, max).await.unwrap();
        assert!(page.blocks.len() <= max);
        indexes.extend(page.blocks.iter().map(|listed| listed.index.0));
        from = page.next.map(ListFrom::Page);
    }
    indexes
}
