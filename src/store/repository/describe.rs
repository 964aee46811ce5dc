//! Describing and listing snapshots.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use lru::LruCache;
use uuid::Uuid;

use super::manifest::{Manifest, Start};
use super::tags::AllTags;
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

/// What a list says of the content of each manifest, where it says that.
type Versions = HashMap<SnapshotId, Option<String>>;

/// Objects that are read at the same time for a list.
const LIST_CONCURRENCY: usize = 16;

/// Manifests that were read a moment ago, at most: one for each snapshot that is being read.
const RECENT_MANIFESTS: NonZeroUsize = NonZeroUsize::new(64).expect("not 0");

/// Manifests that were read a moment ago, and when.
#[derive(Debug)]
pub(super) struct RecentManifests(Mutex<LruCache<SnapshotId, (Instant, Manifest)>>);

impl Default for RecentManifests {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(RECENT_MANIFESTS)))
    }
}

impl RecentManifests {
    fn manifests(&self) -> std::sync::MutexGuard<'_, LruCache<SnapshotId, (Instant, Manifest)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Repository {
    pub(super) async fn manifest(&self, id: &SnapshotId) -> Result<Option<Manifest>> {
        let asked = Instant::now();
        let manifest: Option<Manifest> = self.read_document(&names::manifest(id)).await?;
        check_id(id, &names::manifest(id), manifest.as_ref().map(|found| &found.metadata.id))?;
        match &manifest {
            Some(found) => self.manifests.manifests().put(id.clone(), (asked, found.clone())),
            None => self.manifests.manifests().pop(id),
        };
        Ok(manifest)
    }

    /// A manifest that is deleted is not listed by any more.
    pub(super) fn forget_manifest(&self, id: &SnapshotId) {
        self.manifests.manifests().pop(id);
    }

    /// The manifest of a snapshot whose blocks are listed: it was there a moment ago, if it is not looked for.
    pub(super) async fn listable(&self, id: &SnapshotId) -> Result<Manifest> {
        let recent = self.manifests.manifests().get(id).cloned();
        match recent.filter(|(asked, _)| asked.elapsed() < self.objects.manifests_last()) {
            Some((_, manifest)) => Ok(manifest),
            None => self.completed(id).await,
        }
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
        let (snapshot, attempt) = self.untagged(id).await?;
        with_tags(snapshot, self.tags(id, attempt).await)
    }

    /// A snapshot without its tags, and its attempt.
    async fn untagged(&self, id: &SnapshotId) -> Result<(Snapshot, Uuid)> {
        match self.look(id).await? {
            Some(Found::Completed(manifest)) => {
                Ok((manifest.snapshot(Tags::new()), manifest.metadata.attempt))
            }
            Some(Found::Pending(start)) => {
                let why = self.timed_out(&start).await?;
                let snapshot = start.snapshot(Tags::new());
                let state = if why.is_some() { SnapshotState::Error } else { snapshot.state };
                Ok((Snapshot { state, state_message: why, ..snapshot }, start.metadata.attempt))
            }
            None => Err(not_found(id)),
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
        let (mut ids, pending, versions) = self.ids_and_pending().await?;
        self.listed.retain(&ids);
        if let Some(ListToken(after)) = token {
            ids.retain(|id| id.as_str() > after.as_str());
        }
        let more = ids.len() > LIST_PAGE;
        ids.truncate(LIST_PAGE);
        let next = more.then(|| ListToken(ids[LIST_PAGE - 1].to_string()));
        // What was pending may get its tags, and be completed, while this looks.
        let mut tags = self.all_tags().await?;
        tags.are_changing(pending.into_iter().collect());
        let snapshots: Vec<Option<Snapshot>> = stream::iter(ids)
            .map(|id| self.describe_listed(id, &versions, &tags))
            .buffered(LIST_CONCURRENCY)
            .try_collect()
            .await?;
        Ok(SnapshotPage { snapshots: snapshots.into_iter().flatten().collect(), next })
    }

    /// All ids that have a manifest or a start, ascending.
    pub(super) async fn snapshot_ids(&self) -> Result<Vec<SnapshotId>> {
        Ok(self.ids_and_pending().await?.0)
    }

    /// As [`snapshot_ids`](Self::snapshot_ids), those of them that had a start, and the versions of manifests.
    async fn ids_and_pending(&self) -> Result<(Vec<SnapshotId>, Vec<SnapshotId>, Versions)> {
        // Pending first: a snapshot that is completed meanwhile is then in one list at least.
        let pending = self.objects.list(names::PENDING).await?;
        let completed = self.objects.list_versions(names::SNAPSHOTS).await?;
        let pending: Vec<_> = pending.iter().filter_map(|name| names::start_id(name)).collect();
        let completed = completed.into_iter();
        let completed = completed.filter_map(|(name, is)| Some((names::manifest_id(&name)?, is)));
        let versions: Versions = completed.collect();
        let mut ids: Vec<_> = versions.keys().chain(&pending).cloned().collect();
        ids.sort_unstable();
        ids.dedup();
        Ok((ids, pending, versions))
    }

    async fn describe_listed(
        &self,
        id: SnapshotId,
        versions: &Versions,
        all: &AllTags,
    ) -> Result<Option<Snapshot>> {
        let version = versions.get(&id).and_then(Option::as_deref);
        if let Some(same) = version.and_then(|version| self.listed.get(&id, version, all)) {
            return Ok(Some(same));
        }
        let described = async {
            let (snapshot, attempt) = self.untagged(&id).await?;
            let snapshot = with_tags(snapshot, self.listed_tags(&id, attempt, all).await)?;
            if let Some(version) = version {
                self.listed.put(version, all.newest(&id, attempt), attempt, &snapshot);
            }
            Ok::<_, Error>(snapshot)
        };
        match described.await {
            Ok(snapshot) => Ok(Some(snapshot)),
            // Deleted since it was listed.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) if self.is_of_an_object(&error).await => {
                // If it is the tags only, that costs nothing else.
                let rest = self.untagged(&id).await.ok();
                Ok(Some(match rest {
                    Some((rest, _)) => Snapshot { state_message: Some(error.to_string()), ..rest },
                    None => damaged(id, &error),
                }))
            }
            Err(error) => Err(error),
        }
    }
}

/// A snapshot whose tags cannot be read is read all the same.
fn with_tags(snapshot: Snapshot, tags: Result<Tags>) -> Result<Snapshot> {
    match tags {
        Ok(tags) => Ok(Snapshot { tags, ..snapshot }),
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            Ok(Snapshot { state_message: Some(error.to_string()), ..snapshot })
        }
        Err(error) => Err(error),
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
