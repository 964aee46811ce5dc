//! Completed snapshots as they were listed last, so that the next list reads only what is new.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use super::tags::{AllTags, Newest};
use crate::model::{Snapshot, SnapshotId, SnapshotState};

/// What the objects of a snapshot said when it was listed, by its id.
#[derive(Debug, Default)]
pub(super) struct Listed(Mutex<HashMap<SnapshotId, One>>);

#[derive(Debug)]
struct One {
    /// That of the manifest.
    version: String,
    attempt: Uuid,
    tags: Newest,
    snapshot: Snapshot,
}

impl Listed {
    fn all(&self) -> MutexGuard<'_, HashMap<SnapshotId, One>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A snapshot, if its manifest and its tags are still the ones that were read.
    pub(super) fn get(&self, id: &SnapshotId, version: &str, tags: &AllTags) -> Option<Snapshot> {
        let all = self.all();
        let one = all.get(id).filter(|one| one.version == version)?;
        let is_same = one.tags != Newest::Unknown && tags.newest(id, one.attempt) == one.tags;
        is_same.then(|| one.snapshot.clone())
    }

    /// Remembers a completed snapshot that was read whole.
    pub(super) fn put(&self, version: &str, tags: Newest, attempt: Uuid, snapshot: &Snapshot) {
        if snapshot.state == SnapshotState::Completed && snapshot.state_message.is_none() {
            let (version, snapshot) = (version.to_owned(), snapshot.clone());
            self.all().insert(snapshot.id.clone(), One { version, attempt, tags, snapshot });
        }
    }

    /// Forgets all but these, which ascend.
    pub(super) fn retain(&self, ids: &[SnapshotId]) {
        self.all().retain(|id, _| ids.binary_search(id).is_ok());
    }
}
