//! Starting, deleting and aborting snapshots.

use std::collections::HashSet;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use super::describe::{Found, not_found};
use super::manifest::{MAX_MANIFEST_LEN, Manifest, Metadata, Start};
use super::names::{ObjectId, RecordId};
use super::writer::read_record;
use super::{Repository, document, names};
use crate::model::{
    Digest, Digester, MAX_DESCRIPTION_CHARS, Snapshot, SnapshotId, Tags, check_tags,
};
use crate::store::{Error, ErrorKind, Result, StartRequest};

/// Longest client token in characters, as in the EBS direct service.
const MAX_CLIENT_TOKEN: usize = 64;

const SECOND: SignedDuration = SignedDuration::from_secs(1);
const MILLISECOND: SignedDuration = SignedDuration::from_millis(1);

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
        if let Some(snapshot) = self.started_before(id, &request).await? {
            return Ok(snapshot);
        }
        let parent = match &request.parent {
            Some(parent) => Some(self.completed(parent).await?),
            None => None,
        };
        let metadata = Metadata {
            id: id.clone(),
            attempt: Uuid::new_v4(),
            volume_size: request.volume_size,
            parent: request.parent.clone(),
            lineage: parent.as_ref().map_or_else(|| id.clone(), |p| p.metadata.lineage.clone()),
            volume_id: request.volume_id.clone(),
            origin: request.origin.clone(),
            description: request.description.clone(),
            start_time: self.start_time(parent.as_ref()).await?,
            client_token: request.client_token.clone(),
        };
        check_manifest_len(&metadata)?;
        let start = Start {
            metadata,
            parent_pages: parent.as_ref().and_then(|p| p.pages),
            timeout_minutes: request.timeout.map(minutes),
        };
        if !self.objects.create_own(&names::start(id), document::encode(&start)).await? {
            return self.started_before(id, &request).await?.ok_or_else(|| exists(id));
        }
        // One that is left is of an earlier attempt.
        self.forget_writer(id, |attempt| attempt != start.metadata.attempt);
        // From here on the parent's pages stay, if they still are there.
        if let Err(error) =
            self.check_started(&start, parent.as_ref().map(|p| p.metadata.attempt)).await
        {
            self.objects.delete(&[names::start(id)]).await?;
            return Err(error);
        }
        if !request.tags.is_empty() {
            self.add_tags(id, start.metadata.attempt, &request.tags).await?;
        }
        Ok(start.snapshot(request.tags))
    }

    /// The time by the clock of the store, and after the parent's: the clock of a bucket has whole
    /// seconds, and the newest of a name must be told. Where it agrees with this host's, that one has more of them.
    async fn start_time(&self, parent: Option<&Manifest>) -> Result<Timestamp> {
        let (now, here) = (self.objects.now().await?, Timestamp::now());
        let agree = here >= now && here.duration_since(now) < 2 * SECOND;
        let now = if now.subsec_nanosecond() == 0 && agree { here } else { now };
        let Some(parent) = parent.map(|parent| parent.metadata.start_time) else { return Ok(now) };
        let is_same_second = parent >= now && parent.duration_since(now) < SECOND;
        Ok(if is_same_second { parent + MILLISECOND } else { now })
    }

    /// The snapshot that an earlier start with the same client token made.
    ///
    /// # Errors
    ///
    /// `Conflict` if the id is taken by another one.
    async fn started_before(
        &self,
        id: &SnapshotId,
        request: &StartRequest,
    ) -> Result<Option<Snapshot>> {
        let (snapshot, found, pending) = match self.look(id).await? {
            Some(Found::Completed(found)) => (found.snapshot(Tags::new()), found.metadata, false),
            Some(Found::Pending(found)) => (found.snapshot(Tags::new()), found.metadata, true),
            None => return Ok(None),
        };
        if !found.is_of(request) {
            return Err(if pending { pending_already(id) } else { exists(id) });
        }
        let attempt = found.attempt;
        if pending && !request.tags.is_empty() && self.newest_tags(id, attempt).await?.is_none() {
            // The first start was cut short.
            self.add_tags(id, attempt, &request.tags).await?;
        }
        Ok(Some(Snapshot { tags: self.tags(id, attempt).await?, ..snapshot }))
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
        if let Some(writer) = self.existing_writer(id) {
            writer.abandon().await;
        }
        self.forget_writer(id, |_| true);
        // Whatever cannot be read is deleted by its name.
        let attempts: HashSet<Uuid> = [
            self.start_of(id).await.ok().flatten().map(|start| start.metadata.attempt),
            self.manifest(id).await.ok().flatten().map(|manifest| manifest.metadata.attempt),
        ]
        .into_iter()
        .flatten()
        .collect();
        // What is left of its making goes first: without the manifest it would be pending again.
        let pending = self.objects.exists(&names::start(id)).await?;
        self.objects.delete(&[names::start(id)]).await?;
        let completed = self.objects.exists(&names::manifest(id)).await?;
        self.objects.delete(&[names::manifest(id)]).await?;
        self.forget_manifest(id);
        if !pending && !completed {
            return Err(not_found(id));
        }
        // One that was made while the start was still there.
        if let Some(writer) = self.existing_writer(id)
            && attempts.contains(&writer.attempt())
        {
            writer.abandon().await;
            self.forget_writer(id, |of| attempts.contains(&of));
        }
        for attempt in attempts {
            // It is gone, whatever becomes of the rest.
            if let Err(error) = self.delete_rest(id, attempt, completed).await {
                tracing::warn!("{id} is deleted; what is left of it `gc` will find: {error}");
            }
        }
        Ok(())
    }

    /// Deletes what only one attempt of a snapshot has needed.
    async fn delete_rest(&self, id: &SnapshotId, attempt: Uuid, completed: bool) -> Result<()> {
        self.delete_tags(id, attempt).await?;
        // Others may build on what a manifest has named.
        let packs = if completed { Vec::new() } else { self.packs_of(id, attempt).await? };
        self.delete_records(id, attempt).await?;
        self.objects.delete(&packs).await
    }

    /// The names of the packs that the records of one attempt refer to, as far as they can be read, and that nobody
    /// but the writers of these records has made.
    async fn packs_of(&self, id: &SnapshotId, attempt: Uuid) -> Result<Vec<String>> {
        let mut packs = HashSet::new();
        for name in self.objects.list(&names::attempt(id, attempt)).await? {
            let Some(record) = RecordId::from_name(id, attempt, &name) else { continue };
            match self.objects.read(&name).await {
                Ok(bytes) => {
                    // Of what is damaged `gc` finds the packs.
                    let table = read_record(&bytes).ok();
                    let of_it = table.iter().flat_map(|table| table.packs().collect::<Vec<_>>());
                    packs.extend(of_it.filter(|pack| pack.writer == record.writer));
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(packs.into_iter().map(ObjectId::pack_name).collect())
    }

    /// Deletes the records of one attempt, and what seals them.
    pub(super) async fn delete_records(&self, id: &SnapshotId, attempt: Uuid) -> Result<()> {
        let names = self.objects.list(&names::attempt(id, attempt)).await?;
        let ours = names.into_iter().filter(|name| names::is_of_attempt(name));
        self.objects.delete(&ours.collect::<Vec<_>>()).await
    }
}

/// Whole minutes, rounded up.
fn minutes(time: Duration) -> u32 {
    u32::try_from(time.as_secs().div_ceil(60)).unwrap_or(u32::MAX)
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

/// The manifest must fit: better to find out now than after all data was written.
fn check_manifest_len(metadata: &Metadata) -> Result<()> {
    let longest = ObjectId { digest: Digest::OF_ZEROS, writer: Uuid::max() };
    let manifest = Manifest {
        metadata: metadata.clone(),
        completed_time: metadata.start_time,
        content_digest: Digest::OF_ZEROS,
        data_blocks: u64::MAX,
        zero_blocks: u64::MAX,
        pages: Some(longest),
    };
    let len = document::encode(&manifest).len();
    if len <= MAX_MANIFEST_LEN {
        return Ok(());
    }
    let message = format!(
        "description, origin and client token are too long together: the manifest would have {len} bytes, more than {MAX_MANIFEST_LEN}"
    );
    Err(Error::new(ErrorKind::Invalid, message))
}

/// Somebody else makes it, or has left it.
fn pending_already(id: &SnapshotId) -> Error {
    let message = format!(
        "there is a pending snapshot {id} already: whoever began it goes on with the same command, and `fspfs delete {id}` gives it up"
    );
    Error::new(ErrorKind::Conflict, message)
}

fn exists(id: &SnapshotId) -> Error {
    Error::new(ErrorKind::Conflict, format!("there is a snapshot {id} already"))
}
