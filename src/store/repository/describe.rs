//! Describing and listing snapshots.

use std::collections::HashSet;

use futures::{StreamExt as _, TryStreamExt as _, stream};

use super::manifest::{Manifest, Start};
use super::{Repository, document, names};
use crate::model::{Snapshot, SnapshotId, SnapshotState, VolumeSize};
use crate::store::{Error, ErrorKind, ListToken, Result, SnapshotPage};

/// Snapshots that one page of the list has at most.
const LIST_PAGE: usize = 1000;

/// Objects that are read at the same time for a list.
const LIST_CONCURRENCY: usize = 16;

impl Repository {
    pub(super) async fn manifest(&self, id: &SnapshotId) -> Result<Option<Manifest>> {
        let manifest: Option<Manifest> = self.read_document(&names::manifest(id)).await?;
        check_id(id, manifest.as_ref().map(|manifest| &manifest.metadata.id))?;
        Ok(manifest)
    }

    pub(super) async fn start_of(&self, id: &SnapshotId) -> Result<Option<Start>> {
        let start: Option<Start> = self.read_document(&names::start(id)).await?;
        check_id(id, start.as_ref().map(|start| &start.metadata.id))?;
        Ok(start)
    }

    /// Reads a document; `None` if there is none of this name.
    pub(super) async fn read_document<T: serde::de::DeserializeOwned>(
        &self,
        name: &str,
    ) -> Result<Option<T>> {
        match self.objects.read(name).await {
            Ok(bytes) => document::decode(name, &bytes).map(Some),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The manifest of a snapshot that must be readable.
    pub(super) async fn completed(&self, id: &SnapshotId) -> Result<Manifest> {
        match self.manifest(id).await? {
            Some(manifest) => Ok(manifest),
            None if self.objects.exists(&names::start(id)).await? => {
                Err(Error::new(ErrorKind::NotReady, format!("{id} is pending, not completed")))
            }
            None => Err(not_found(id)),
        }
    }

    pub(super) async fn describe_snapshot(&self, id: &SnapshotId) -> Result<Snapshot> {
        if let Some(manifest) = self.manifest(id).await? {
            return Ok(manifest.snapshot(self.tags(id).await?));
        }
        if let Some(start) = self.start_of(id).await? {
            return Ok(start.snapshot(self.tags(id).await?));
        }
        // It may have been completed between the two looks.
        match self.manifest(id).await? {
            Some(manifest) => Ok(manifest.snapshot(self.tags(id).await?)),
            None => Err(not_found(id)),
        }
    }

    pub(super) async fn list_snapshots(&self, token: Option<ListToken>) -> Result<SnapshotPage> {
        let mut ids = self.snapshot_ids().await?;
        if let Some(ListToken(after)) = token {
            ids.retain(|id| id.as_str() > after.as_str());
        }
        let more = ids.len() > LIST_PAGE;
        ids.truncate(LIST_PAGE);
        let next = more.then(|| ListToken(ids[LIST_PAGE - 1].to_string()));
        let tagged = self.tagged().await?;
        let snapshots: Vec<Option<Snapshot>> = stream::iter(ids)
            .map(|id| self.describe_listed(id, &tagged))
            .buffered(LIST_CONCURRENCY)
            .try_collect()
            .await?;
        Ok(SnapshotPage { snapshots: snapshots.into_iter().flatten().collect(), next })
    }

    /// All ids that have a manifest or a start, ascending.
    pub(super) async fn snapshot_ids(&self) -> Result<Vec<SnapshotId>> {
        // Pending first: a snapshot that is completed meanwhile is then in one list at least.
        let pending = self.objects.list(names::PENDING).await?;
        let completed = self.objects.list(names::SNAPSHOTS).await?;
        let pending = pending.iter().filter_map(|name| names::start_id(name));
        let mut ids: Vec<_> =
            completed.iter().filter_map(|name| names::manifest_id(name)).chain(pending).collect();
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    async fn describe_listed(
        &self,
        id: SnapshotId,
        tagged: &HashSet<SnapshotId>,
    ) -> Result<Option<Snapshot>> {
        let described = if tagged.contains(&id) {
            self.describe_snapshot(&id).await
        } else {
            self.describe_untagged(&id).await
        };
        match described {
            Ok(snapshot) => Ok(Some(snapshot)),
            // Deleted since it was listed.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) if error.kind() == ErrorKind::Corrupt => Ok(Some(damaged(id, &error))),
            Err(error) => Err(error),
        }
    }

    /// As [`describe_snapshot`](Self::describe_snapshot), without looking for tags.
    async fn describe_untagged(&self, id: &SnapshotId) -> Result<Snapshot> {
        if let Some(manifest) = self.manifest(id).await? {
            return Ok(manifest.snapshot(Default::default()));
        }
        self.describe_snapshot(id).await
    }
}

/// An object under the name of another snapshot was put there by somebody else than us.
fn check_id(id: &SnapshotId, found: Option<&SnapshotId>) -> Result<()> {
    match found {
        Some(found) if found != id => {
            let name = names::manifest(id);
            let message = format!("{name} is damaged: it is the one of {found}");
            Err(Error::new(ErrorKind::Corrupt, message))
        }
        _ => Ok(()),
    }
}

pub(super) fn not_found(id: &SnapshotId) -> Error {
    Error::new(ErrorKind::NotFound, format!("there is no snapshot {id}"))
}

/// What is listed of a snapshot whose manifest cannot be read: that it is there, and why it is not.
fn damaged(id: SnapshotId, error: &Error) -> Snapshot {
    Snapshot {
        id,
        state: SnapshotState::Error,
        state_message: Some(error.to_string()),
        volume_size: VolumeSize::from_gib(1).expect("1 GiB is a size"),
        parent: None,
        lineage: None,
        volume_id: None,
        description: String::new(),
        start_time: jiff::Timestamp::UNIX_EPOCH,
        tags: Default::default(),
        encrypted: false,
        content_digest: None,
        data_blocks: None,
        zero_blocks: None,
    }
}
