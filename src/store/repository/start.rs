//! Starting, deleting and aborting snapshots.

use uuid::Uuid;

use super::describe::not_found;
use super::manifest::{Metadata, Start};
use super::{Repository, document, names};
use crate::model::{Digester, MAX_DESCRIPTION_CHARS, Snapshot, SnapshotId, check_tags};
use crate::store::{Error, ErrorKind, Result, StartRequest};

/// Longest client token in characters, as in the EBS direct service.
const MAX_CLIENT_TOKEN: usize = 64;

impl Repository {
    pub(super) async fn start_snapshot(&self, request: StartRequest) -> Result<Snapshot> {
        check(&request)?;
        let id = self.id_for(&request);
        self.start_as(&id, request).await.map_err(|e| e.context(format_args!("cannot start {id}")))
    }

    /// The id that was chosen; else one that follows from the client token, so that starting again
    /// meets the first start; else a random one.
    fn id_for(&self, request: &StartRequest) -> SnapshotId {
        match (&request.id, &request.client_token) {
            (Some(id), _) => id.clone(),
            (None, Some(token)) => {
                let mut digester = Digester::default();
                digester.update(self.id.as_bytes());
                digester.update(token);
                let hex = digester.finish().to_hex();
                format!("snap-0{}", &hex[..16]).parse().expect("it has the form of an id")
            }
            (None, None) => SnapshotId::random(),
        }
    }

    async fn start_as(&self, id: &SnapshotId, request: StartRequest) -> Result<Snapshot> {
        let parent = match &request.parent {
            Some(parent) => Some(self.completed(parent).await?),
            None => None,
        };
        let metadata = Metadata {
            id: id.clone(),
            attempt: Uuid::new_v4(),
            volume_size: request.volume_size,
            parent: request.parent,
            lineage: parent.as_ref().map_or_else(|| id.clone(), |p| p.metadata.lineage.clone()),
            volume_id: request.volume_id,
            origin: request.origin,
            description: request.description,
            start_time: self.objects.now().await?,
            client_token: request.client_token,
        };
        if let Some(snapshot) = self.started_before(&metadata).await? {
            return Ok(snapshot);
        }
        let start = Start { metadata, parent_pages: parent.as_ref().and_then(|p| p.pages) };
        if !self.objects.create(&names::start(id), document::encode(&start)).await? {
            return match self.started_before(&start.metadata).await? {
                Some(snapshot) => Ok(snapshot),
                None => Err(exists(id)),
            };
        }
        // From here on the parent's pages stay, if they still are there.
        if let Err(error) =
            self.check_started(&start, parent.as_ref().map(|p| p.metadata.attempt)).await
        {
            self.objects.delete(&[names::start(id)]).await?;
            return Err(error);
        }
        if !request.tags.is_empty() {
            self.add_tags(id, &request.tags).await?;
        }
        Ok(start.snapshot(request.tags))
    }

    /// The snapshot that an earlier start with the same client token made.
    ///
    /// # Errors
    ///
    /// `Conflict` if the id is taken by another one.
    async fn started_before(&self, metadata: &Metadata) -> Result<Option<Snapshot>> {
        let id = &metadata.id;
        if let Some(start) = self.start_of(id).await? {
            return if start.metadata.same_request(metadata) {
                Ok(Some(start.snapshot(self.tags(id).await?)))
            } else {
                Err(exists(id))
            };
        }
        match self.manifest(id).await? {
            Some(manifest) if manifest.metadata.same_request(metadata) => {
                Ok(Some(manifest.snapshot(self.tags(id).await?)))
            }
            Some(_) => Err(exists(id)),
            None => Ok(None),
        }
    }

    /// Checks what may have changed while `start.json` was being made.
    async fn check_started(&self, start: &Start, parent_attempt: Option<Uuid>) -> Result<()> {
        let Metadata { id, parent, .. } = &start.metadata;
        if self.objects.exists(&names::manifest(id)).await? {
            return Err(exists(id));
        }
        if let Some(parent) = parent {
            let now = self.completed(parent).await?;
            if Some(now.metadata.attempt) != parent_attempt {
                return Err(not_found(parent));
            }
        }
        Ok(())
    }

    pub(super) async fn delete_snapshot(&self, id: &SnapshotId) -> Result<()> {
        self.forget_writer(id);
        // What is left of its making goes first: without the manifest it would be pending again.
        let pending = self.objects.exists(&names::start(id)).await?;
        self.objects.delete(&[names::start(id)]).await?;
        let completed = self.objects.exists(&names::manifest(id)).await?;
        self.objects.delete(&[names::manifest(id)]).await?;
        if !pending && !completed {
            return Err(not_found(id));
        }
        self.delete_tags(id).await?;
        self.delete_pending(id).await
    }

    /// Deletes what was left of making a snapshot.
    pub(super) async fn delete_pending(&self, id: &SnapshotId) -> Result<()> {
        let names = self.objects.list(&names::pending(id)).await?;
        let ours =
            |name: &String| names::attempt_of(name).is_some() || names::start_id(name).is_some();
        self.objects.delete(&names.into_iter().filter(ours).collect::<Vec<_>>()).await
    }
}

fn check(request: &StartRequest) -> Result<()> {
    let invalid = |message: String| Err(Error::new(ErrorKind::Invalid, message));
    check_tags(&request.tags).or_else(|e| invalid(e.to_string()))?;
    let too_long = |text: &str| text.chars().count() > MAX_DESCRIPTION_CHARS;
    if too_long(&request.description) {
        return invalid(format!("a description has at most {MAX_DESCRIPTION_CHARS} characters"));
    }
    if request.origin.as_deref().is_some_and(too_long) {
        return invalid(format!("an origin has at most {MAX_DESCRIPTION_CHARS} characters"));
    }
    if request.volume_id.as_deref().is_some_and(|id| id.len() > 64) {
        return invalid("the id of a volume has at most 64 characters".to_owned());
    }
    if let Some(token) = &request.client_token
        && (token.is_empty() || token.len() > MAX_CLIENT_TOKEN || !token.is_ascii())
    {
        return invalid(format!("a client token has 1 to {MAX_CLIENT_TOKEN} ASCII characters"));
    }
    if request.encrypted || request.kms_key.is_some() {
        let message = "a repository does not encrypt; encrypt the file system that it is on";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    Ok(())
}

fn exists(id: &SnapshotId) -> Error {
    Error::new(ErrorKind::Conflict, format!("there is a snapshot {id} already"))
}
