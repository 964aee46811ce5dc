//! Describing and listing snapshots.

use std::collections::HashSet;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use uuid::Uuid;

use super::manifest::{Manifest, Start};
use super::{Repository, document, names};
use crate::model::{Snapshot, SnapshotId, SnapshotState, Tags, VolumeSize};
use crate::store::{Error, ErrorKind, ListToken, Result, SnapshotPage};

/// Snapshots that one page of the list has at most.
const LIST_PAGE: usize = 10_000;

/// A snapshot in one of the two places where it may be.
#[derive(Debug)]
pub(super) enum Found {
    Completed(Manifest),
    Pending(Start),
}

/// Objects that are read at the same time for a list.
const LIST_CONCURRENCY: usize = 16;

impl Repository {
    pub(super) async fn manifest(&self, id: &SnapshotId) -> Result<Option<Manifest>> {
        let manifest: Option<Manifest> = self.read_document(&names::manifest(id)).await?;
        check_id(id, &names::manifest(id), manifest.as_ref().map(|found| &found.metadata.id))?;
        Ok(manifest)
    }

    pub(super) async fn start_of(&self, id: &SnapshotId) -> Result<Option<Start>> {
        let start: Option<Start> = self.read_document(&names::start(id)).await?;
        check_id(id, &names::start(id), start.as_ref().map(|found| &found.metadata.id))?;
        Ok(start)
    }

    /// Reads a document; `None` if there is none of this name.
    pub(super) async fn read_document<T: serde::de::DeserializeOwned>(
        &self,
        name: &str,
    ) -> Result<Option<T>> {
        document::read_document(&*self.objects, name).await
    }

    /// The manifest of a snapshot that must be readable.
    pub(super) async fn completed(&self, id: &SnapshotId) -> Result<Manifest> {
        match self.look(id).await? {
            Some(Found::Completed(manifest)) => Ok(manifest),
            Some(Found::Pending(_)) => {
                Err(Error::new(ErrorKind::NotReady, format!("{id} is pending, not completed")))
            }
            None => Err(not_found(id)),
        }
    }

    pub(super) async fn describe_snapshot(&self, id: &SnapshotId) -> Result<Snapshot> {
        self.describe_as(id, true).await
    }

    /// As [`describe_snapshot`](Self::describe_snapshot); looks for tags only if there are some.
    async fn describe_as(&self, id: &SnapshotId, tagged: bool) -> Result<Snapshot> {
        let (snapshot, attempt) = match self.look(id).await? {
            Some(Found::Completed(manifest)) => {
                (manifest.snapshot(Tags::new()), manifest.metadata.attempt)
            }
            Some(Found::Pending(start)) => {
                let why = self.timed_out(&start).await?;
                let snapshot = start.snapshot(Tags::new());
                let state = if why.is_some() { SnapshotState::Error } else { snapshot.state };
                (Snapshot { state, state_message: why, ..snapshot }, start.metadata.attempt)
            }
            None => return Err(not_found(id)),
        };
        if !tagged {
            return Ok(snapshot);
        }
        match self.tags(id, attempt).await {
            Ok(tags) => Ok(Snapshot { tags, ..snapshot }),
            // Its blocks can be read all the same.
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                Ok(Snapshot { state_message: Some(error.to_string()), ..snapshot })
            }
            Err(error) => Err(error),
        }
    }

    /// Whether it is an object that is damaged or cannot be read, and not the repository.
    pub(super) async fn is_of_an_object(&self, error: &Error) -> bool {
        match error.kind() {
            ErrorKind::Corrupt => true,
            ErrorKind::Denied | ErrorKind::Unavailable => {
                self.objects.read(names::INFO).await.is_ok()
            }
            _ => false,
        }
    }

    /// Which attempt a snapshot is, in whatever state.
    pub(super) async fn attempt_of(&self, id: &SnapshotId) -> Result<Option<Uuid>> {
        Ok(self.look(id).await?.map(|found| match found {
            Found::Completed(manifest) => manifest.metadata.attempt,
            Found::Pending(start) => start.metadata.attempt,
        }))
    }

    pub(super) async fn look(&self, id: &SnapshotId) -> Result<Option<Found>> {
        if let Some(manifest) = self.manifest(id).await? {
            return Ok(Some(Found::Completed(manifest)));
        }
        if let Some(start) = self.start_of(id).await? {
            return Ok(Some(Found::Pending(start)));
        }
        // It may have been completed between the two looks.
        Ok(self.manifest(id).await?.map(Found::Completed))
    }

    pub(super) async fn list_snapshots(&self, token: Option<ListToken>) -> Result<SnapshotPage> {
        let (mut ids, pending) = self.ids_and_pending().await?;
        if let Some(ListToken(after)) = token {
            ids.retain(|id| id.as_str() > after.as_str());
        }
        let more = ids.len() > LIST_PAGE;
        ids.truncate(LIST_PAGE);
        let next = more.then(|| ListToken(ids[LIST_PAGE - 1].to_string()));
        // What was pending may get its tags, and be completed, while this looks.
        let mut tagged = self.tagged().await?;
        tagged.extend(pending);
        let snapshots: Vec<Option<Snapshot>> = stream::iter(ids)
            .map(|id| self.describe_listed(id, &tagged))
            .buffered(LIST_CONCURRENCY)
            .try_collect()
            .await?;
        Ok(SnapshotPage { snapshots: snapshots.into_iter().flatten().collect(), next })
    }

    /// All ids that have a manifest or a start, ascending.
    pub(super) async fn snapshot_ids(&self) -> Result<Vec<SnapshotId>> {
        Ok(self.ids_and_pending().await?.0)
    }

    /// As [`snapshot_ids`](Self::snapshot_ids), and those of them that had a start.
    async fn ids_and_pending(&self) -> Result<(Vec<SnapshotId>, Vec<SnapshotId>)> {
        // Pending first: a snapshot that is completed meanwhile is then in one list at least.
        let pending = self.objects.list(names::PENDING).await?;
        let completed = self.objects.list(names::SNAPSHOTS).await?;
        let pending: Vec<_> = pending.iter().filter_map(|name| names::start_id(name)).collect();
        let completed = completed.iter().filter_map(|name| names::manifest_id(name));
        let mut ids: Vec<_> = completed.chain(pending.iter().cloned()).collect();
        ids.sort_unstable();
        ids.dedup();
        Ok((ids, pending))
    }

    async fn describe_listed(
        &self,
        id: SnapshotId,
        tagged: &HashSet<SnapshotId>,
    ) -> Result<Option<Snapshot>> {
        let described = self.describe_as(&id, tagged.contains(&id)).await;
        match described {
            Ok(snapshot) => Ok(Some(snapshot)),
            // Deleted since it was listed.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) if self.is_of_an_object(&error).await => {
                // If it is the tags only, that costs nothing else.
                let rest = self.describe_as(&id, false).await.ok();
                Ok(Some(match rest {
                    Some(rest) => Snapshot { state_message: Some(error.to_string()), ..rest },
                    None => damaged(id, &error),
                }))
            }
            Err(error) => Err(error),
        }
    }
}

/// An object under the name of another snapshot was put there by somebody else than us.
fn check_id(id: &SnapshotId, name: &str, found: Option<&SnapshotId>) -> Result<()> {
    match found {
        Some(found) if found != id => {
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
        completion_time: None,
        tags: Tags::new(),
        encrypted: false,
        content_digest: None,
        data_blocks: None,
        zero_blocks: None,
    }
}
