//! `upload`: a file or device becomes a snapshot.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::context::Context;
use super::table::{Operation, Report};
use super::text::{rate, tell_kept};
use super::{Error, Left, Result, Resume};
use crate::arguments::{EncryptedHoles, ResumeArgs, values};
use crate::blocking::blocking;
use crate::model::{
    BLOCK_SIZE_U64, BlockIndex, Digest, LENGTH_TAG, MAX_DESCRIPTION_CHARS, NAME_TAG, Snapshot,
    SnapshotId, SnapshotState, Tags,
};
use crate::store::{self, ErrorKind, SharedStore, StartRequest};
use crate::transfer;
use crate::transfer::engine::{Run, transfer_to};
use crate::transfer::journal::{Ends, FileJournal, Journal, NoJournal, name_of};
use crate::transfer::sink::Sink;
use crate::transfer::sink::snapshot::{SnapshotSink, Zeros, abort};
use crate::transfer::source::Source;
use crate::transfer::source::file::{FileSource, Times};

/// How long an upload that is stopped while it begins waits for the id of its snapshot.
const STARTING: Duration = Duration::from_secs(10);

/// Make a snapshot of a file or a block device
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  fspfs -s /srv/snaps upload --name web disk.img
  fspfs -s /srv/snaps upload --parent-snapshot-id snap-0123456789abcdef0 disk.img
  id=$(fspfs -s /srv/snaps upload disk.img | tail -n 1)

What is stopped goes on where it was when the same command is given again.")]
pub(crate) struct UploadArgs {
    /// A disk image or a block device
    #[arg(value_name = "FILE")]
    path: PathBuf,
    /// Make a child of this snapshot: only blocks that differ are stored
    #[arg(long, visible_alias = "parent_snapshot_id", value_name = "SNAP")]
    parent_snapshot_id: Option<SnapshotId>,
    /// The tag Name
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// A tag; can be given several times
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = values::tag)]
    tags: Vec<(String, String)>,
    /// The description
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
    /// The volume that it is an image of
    #[arg(long, value_name = "VOLUME")]
    volume_id: Option<String>,
    /// Store blocks of zeros too, where the file has no hole
    #[arg(short, long, visible_alias = "full_copy")]
    full_copy: bool,
    /// Ask the store to encrypt it
    #[arg(long, conflicts_with = "parent_snapshot_id")]
    encrypted: bool,
    /// The key to encrypt it with
    #[arg(long, value_name = "KEY", requires = "encrypted")]
    kms_key_id: Option<String>,
    /// What becomes of the holes of an encrypted snapshot
    #[arg(long, value_name = "HOW", default_value = "write")]
    encrypted_holes: EncryptedHoles,
    #[command(flatten)]
    resume: ResumeArgs,
}

/// The snapshot that was made.
#[derive(Debug, Serialize)]
pub(crate) struct Uploaded {
    #[serde(flatten)]
    snapshot: Snapshot,
    #[serde(skip)]
    file: String,
    #[serde(skip)]
    blocks: u64,
    #[serde(skip)]
    elapsed: Duration,
}

impl Report for Uploaded {
    fn lines(&self) -> Vec<String> {
        let Self { snapshot, file, blocks, elapsed } = self;
        vec![
            format!("{file} {}", rate(*elapsed, blocks * BLOCK_SIZE_U64)),
            format!("Total chunks uploaded {blocks}"),
            snapshot.id.to_string(),
        ]
    }

    fn ids(&self) -> Vec<String> {
        vec![self.snapshot.id.to_string()]
    }
}

impl Operation for UploadArgs {
    const NAME: &'static str = "upload";
    const LINE: Option<&'static str> = Some("--name web /srv/images/web.img");
    type Report = Uploaded;

    async fn run(self, cx: &Context) -> Result<Uploaded> {
        let file = self.path.display().to_string();
        cx.check_place(&self.path)?;
        let store = cx.open().await?;
        let upload = self.upload(cx.resume(&cx.house.from, &store, &self.resume)?);
        let run = cx.run_showing("Uploading");
        let uploaded = async {
            let opened = upload.open().await?;
            let (len, chunks) = (opened.source_len(), opened.source_len().div_ceil(BLOCK_SIZE_U64));
            cx.line(format_args!("Size of {file} is {len} bytes and {chunks} chunks"));
            opened.run(store.clone(), &run).await
        };
        let done = uploaded.await.map_err(|error| error.doing(format!("upload {file}")))?;
        drop(run);
        if !done.unchanged {
            cx.note(format_args!(
                "{file} was written to while it was read: the snapshot may hold a mixture"
            ));
        }
        tell_kept(cx, done.kept, "uploaded");
        cx.tell_cost(&store);
        let Done { snapshot, blocks, elapsed, .. } = done;
        if snapshot.state == SnapshotState::Pending {
            cx.note(format_args!("{} is pending until EBS has processed it", snapshot.id));
        }
        Ok(Uploaded { snapshot, file, blocks, elapsed })
    }
}

impl UploadArgs {
    fn upload(&self, resume: Resume) -> Upload {
        let mut tags: Tags = self.tags.iter().cloned().collect();
        if let Some(name) = &self.name {
            tags.insert(NAME_TAG.to_owned(), name.clone());
        }
        Upload {
            path: self.path.clone(),
            parent: self.parent_snapshot_id.clone(),
            description: self.description.clone(),
            tags,
            volume_id: self.volume_id.clone(),
            full_copy: self.full_copy,
            encrypted: self.encrypted,
            kms_key: self.kms_key_id.clone(),
            encrypted_holes: self.encrypted_holes == EncryptedHoles::Write,
            resume,
        }
    }
}

/// What to upload, and as what.
#[derive(Clone, Debug, Default)]
pub(crate) struct Upload {
    /// The file or device.
    pub(crate) path: PathBuf,
    /// The snapshot that the new one is a child of.
    pub(crate) parent: Option<SnapshotId>,
    /// Text for people; by default, where it comes from.
    pub(crate) description: Option<String>,
    /// Its tags.
    pub(crate) tags: Tags,
    /// The volume that it is an image of.
    pub(crate) volume_id: Option<String>,
    /// Put blocks of zeros too, where they are not holes.
    pub(crate) full_copy: bool,
    /// Ask the store to encrypt it. A child is encrypted as its parent is.
    pub(crate) encrypted: bool,
    /// The key to encrypt it with.
    pub(crate) kms_key: Option<String>,
    /// Put the holes of a snapshot that the store encrypts, as zeros.
    pub(crate) encrypted_holes: bool,
    /// Its journal.
    pub(crate) resume: Resume,
}

/// What was done.
#[derive(Clone, Debug)]
pub(crate) struct Done {
    /// The new snapshot.
    pub(crate) snapshot: Snapshot,
    /// Blocks that were put.
    pub(crate) blocks: u64,
    /// Those of them that an earlier run had put.
    pub(crate) kept: u64,
    /// How long it took.
    pub(crate) elapsed: Duration,
    /// Whether the file seems to have stayed the same while it was read.
    pub(crate) unchanged: bool,
}

/// What a journal says of an upload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Attempt {
    client_token: String,
    /// What the snapshot was asked for with.
    request: Digest,
    /// What tells whether the file is as it was; a device is read again.
    times: Option<Times>,
    len: u64,
    /// Known once it is started.
    snapshot: Option<SnapshotId>,
}

/// A file that is about to be uploaded.
#[derive(Debug)]
pub(crate) struct Opened {
    upload: Upload,
    source: FileSource,
}

impl Upload {
    /// Opens the file.
    ///
    /// # Errors
    ///
    /// If it is no image, or cannot be read.
    pub(crate) async fn open(self) -> Result<Opened> {
        let path = self.path.clone();
        let source = blocking(move || FileSource::open(&path)).await?;
        Ok(Opened { upload: self, source })
    }

    fn request(&self, source: &FileSource) -> StartRequest {
        let path = self.path.canonicalize().unwrap_or_else(|_| self.path.clone());
        let origin: String =
            path.display().to_string().chars().take(MAX_DESCRIPTION_CHARS).collect();
        let by_default = || {
            let text = format!("Uploaded by fspfs from {}", path.display());
            text.chars().take(MAX_DESCRIPTION_CHARS).collect()
        };
        let mut tags = self.tags.clone();
        if source.len() != source.volume_size().bytes() {
            tags.insert(LENGTH_TAG.to_owned(), source.len().to_string());
        }
        StartRequest {
            parent: self.parent.clone(),
            tags,
            description: self.description.clone().unwrap_or_else(by_default),
            volume_id: self.volume_id.clone(),
            // A child is encrypted as its parent is, and must not be asked for it.
            encrypted: self.encrypted && self.parent.is_none(),
            kms_key: self.kms_key.clone().filter(|_| self.parent.is_none()),
            origin: Some(origin),
            ..StartRequest::new(source.volume_size())
        }
    }

    /// What an earlier run must have asked for, too.
    fn asked(&self, request: &StartRequest) -> Digest {
        let zeros = (self.full_copy, self.encrypted_holes);
        Digest::of(format!("{request:?} {zeros:?}").as_bytes())
    }
}

impl Opened {
    /// Length of the file in bytes.
    pub(crate) fn source_len(&self) -> u64 {
        self.source.len()
    }

    fn data_blocks(&self) -> Result<u64> {
        let mut blocks = 0;
        let end = self.source.volume_size().blocks();
        for extent in self.source.extents(BlockIndex::ZERO..end) {
            let extent = extent?;
            blocks += u64::from(extent.end.0 - extent.start.0);
        }
        Ok(blocks)
    }

    /// Uploads it. What ends it before leaves a pending snapshot that the same upload goes on with, if there is a
    /// journal and the cause may go away.
    ///
    /// # Errors
    ///
    /// [`Error::Unfinished`] if it can go on; else there is no snapshot.
    pub(crate) async fn run(self, store: SharedStore, run: &Run) -> Result<Done> {
        let began = Instant::now();
        run.progress.total(self.data_blocks()?);
        let mut goes_on = false;
        let done = match self.attempt(&store, run, &mut goes_on).await {
            // What was begun before is gone, or takes nothing more.
            Err(Error::Transfer(error))
                if goes_on
                    && matches!(error.kind(), Some(ErrorKind::Conflict | ErrorKind::NotFound)) =>
            {
                tracing::warn!("beginning anew: {error}");
                self.attempt(&store, run, &mut goes_on).await
            }
            done => done,
        };
        let (snapshot, blocks, kept) = done?;
        let unchanged = self.source.is_unchanged();
        Ok(Done { snapshot, blocks, kept, elapsed: began.elapsed(), unchanged })
    }

    /// Uploads to the snapshot of an earlier run, if there is one, else to a new one. The snapshot, how many blocks
    /// were put, and how many of them by the earlier run.
    async fn attempt(
        &self,
        store: &SharedStore,
        run: &Run,
        goes_on: &mut bool,
    ) -> Result<(Snapshot, u64, u64)> {
        let parent = match &self.upload.parent {
            Some(parent) => {
                Some((run.unless_stopped(super::readable(store, parent)).await??, false))
            }
            None => None,
        };
        let (mut journal, found) = self.journal().await?;
        *goes_on = found.is_some();
        let start = Starting { opened: self, store, journal: journal.as_mut(), run };
        let snapshot = start.snapshot(found).await?;
        let journal: Arc<dyn Journal> = match journal {
            Some(journal) => Arc::new(journal),
            None => Arc::new(NoJournal),
        };
        if snapshot.state == SnapshotState::Completed {
            // It was completed by the run before, which did not hear of it.
            journal.forget();
            return Ok((snapshot, 0, 0));
        }
        let id = snapshot.id.clone();
        let zeros = Zeros {
            full_copy: self.upload.full_copy,
            encrypted_holes: snapshot.encrypted && self.upload.encrypted_holes,
        };
        let sink = SnapshotSink::new(store.clone(), snapshot, parent, zeros, &self.source).await;
        let sink: Arc<dyn Sink> = match sink {
            Ok(sink) => Arc::new(sink),
            Err(error) => {
                abort(store, &id).await;
                journal.forget();
                return Err(error.into());
            }
        };
        let of_journal = Arc::clone(&journal);
        let source: Arc<dyn Source> = Arc::new(self.source.clone());
        match transfer_to(source, sink, journal, run).await {
            Ok(finished) => {
                let snapshot = finished.snapshot.expect("a snapshot was made");
                Ok((snapshot, finished.blocks, finished.kept))
            }
            Err(error) if of_journal.outlasts(&error) => {
                Err(Error::Unfinished { cause: Box::new(error.into()), left: Left::Snapshot(id) })
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn journal(&self) -> Result<(Option<FileJournal>, Option<Attempt>)> {
        let Resume { journals, store, restart } = self.upload.resume.clone();
        let Some(root) = journals else { return Ok((None, None)) };
        let path = self.upload.path.canonicalize().unwrap_or_else(|_| self.upload.path.clone());
        let operation = "upload".to_owned();
        let ends = Ends { operation, from: name_of(&path), to: store };
        let opened = blocking(move || FileJournal::open::<Attempt>(&root, ends, restart));
        Ok(match super::or_without_journal(opened.await)? {
            Some((journal, found)) => (Some(journal), found),
            None => (None, None),
        })
    }
}

/// An upload that begins, or goes on.
struct Starting<'a> {
    opened: &'a Opened,
    store: &'a SharedStore,
    journal: Option<&'a mut FileJournal>,
    run: &'a Run,
}

impl Starting<'_> {
    /// The snapshot that is put to: that of an earlier run, or a new one.
    async fn snapshot(mut self, found: Option<Attempt>) -> Result<Snapshot> {
        let Opened { upload, source } = self.opened;
        let request = upload.request(source);
        let wanted = Attempt {
            client_token: uuid::Uuid::new_v4().simple().to_string(),
            request: upload.asked(&request),
            times: source.times().cloned(),
            len: source.len(),
            snapshot: None,
        };
        if let Some(found) = found {
            let (client_token, snapshot) = (found.client_token.clone(), found.snapshot.clone());
            let is_same = !upload.resume.restart
                && found == Attempt { client_token, snapshot, ..wanted.clone() };
            if let Some(going_on) = self.go_on(found, is_same, &request).await? {
                return Ok(going_on);
            }
        }
        if let Some(journal) = &mut self.journal {
            journal.begin(&wanted);
        }
        self.start(wanted, request).await
    }

    /// The snapshot of an earlier run, if it takes more.
    async fn go_on(
        &self,
        found: Attempt,
        is_same: bool,
        request: &StartRequest,
    ) -> Result<Option<Snapshot>> {
        let Some(id) = found.snapshot.clone() else {
            // It may have been started without our having heard of it.
            if is_same {
                return self.start(found, request.clone()).await.map(Some);
            }
            tracing::warn!(
                "an earlier run may have left a pending snapshot: `fspfs list` shows it, `fspfs delete` removes it"
            );
            return Ok(None);
        };
        let described = self.run.unless_stopped(self.store.describe(&id)).await?;
        let state = match described {
            Ok(snapshot) => snapshot,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                tracing::warn!("{id}, which was begun before, is gone: beginning anew");
                return Ok(None);
            }
            Err(error) => {
                tracing::warn!("{id}, which was begun before, may be pending");
                return Err(error.into());
            }
        };
        match state.state {
            SnapshotState::Completed if is_same && !self.opened.source.is_read_again() => {
                tracing::warn!(
                    "{id} was completed by an earlier run, and nothing was changed since"
                );
                return Ok(Some(state));
            }
            SnapshotState::Pending if is_same => {
                tracing::info!("going on with {id}");
                return Ok(Some(state));
            }
            SnapshotState::Completed => {
                tracing::warn!("{id} was completed by an earlier run: beginning anew");
            }
            SnapshotState::Pending => {
                let why = match self.opened.upload.resume.restart {
                    true => "--restart",
                    false => "it was begun with other arguments, or before the file was changed",
                };
                tracing::warn!("{id} is removed, and it begins anew: {why}");
                abort(self.store, &id).await;
            }
            SnapshotState::Error | SnapshotState::Archived => {
                let why = state.state_message.unwrap_or_else(|| "it waited too long".to_owned());
                tracing::warn!("{id} takes no more ({why}): beginning anew");
                abort(self.store, &id).await;
            }
        }
        Ok(None)
    }

    /// Starts a snapshot, in a task of its own: the id of one that is started when nobody waits for it any more
    /// is told all the same.
    async fn start(&self, mut attempt: Attempt, mut request: StartRequest) -> Result<Snapshot> {
        request.client_token = Some(attempt.client_token.clone());
        let store = self.store.clone();
        let mut starting = tokio::spawn(async move { store.start(request).await });
        let joined = tokio::select! {
            started = &mut starting => Some(started),
            () = self.run.stop.cancelled() => tokio::select! {
                started = tokio::time::timeout(STARTING, starting) => started.ok(),
                () = self.run.cancel.cancelled() => None,
            },
        };
        let Some(started) = joined else {
            let cause = Box::new(transfer::Error::Stopped.into());
            return Err(Error::Unfinished { cause, left: Left::Asked });
        };
        let started = started.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
        let snapshot: Snapshot = match started {
            Ok(snapshot) => snapshot,
            // It may have been started all the same, and is found by its client token.
            Err(error) if self.journal.is_some() && is_unsure(&error) => {
                let cause = Box::new(error.into());
                return Err(Error::Unfinished { cause, left: Left::Asked });
            }
            Err(error) => {
                if let Some(journal) = &self.journal {
                    journal.forget();
                }
                return Err(error.into());
            }
        };
        attempt.snapshot = Some(snapshot.id.clone());
        if let Some(journal) = &self.journal {
            journal.update(&attempt);
        }
        Ok(snapshot)
    }
}

/// Whether a request that failed may have been done.
fn is_unsure(error: &store::Error) -> bool {
    matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Unavailable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::repository::Repository;
    use crate::store::wrap::{Call, Wrapper};

    /// A store that takes everything, and then cannot complete it.
    #[derive(Debug)]
    struct Failing(SharedStore);

    impl Wrapper for Failing {
        fn inner(&self) -> &SharedStore {
            &self.0
        }

        fn snapshot(&self, call: Call, mut snapshot: Snapshot) -> Snapshot {
            if call == Call::Complete {
                snapshot.state = SnapshotState::Error;
                snapshot.state_message = Some("its key is disabled".to_owned());
            }
            snapshot
        }
    }

    #[tokio::test]
    async fn a_snapshot_that_fails_at_the_end_is_no_success() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.img");
        std::fs::write(&path, "x").unwrap();
        let repository = Repository::create(&dir.path().join("store")).await.unwrap();
        let store: SharedStore = Arc::new(Failing(Arc::new(repository)));
        let opened = Upload { path, ..Upload::default() }.open().await.unwrap();
        let error = opened.run(store, &Run::default()).await.unwrap_err();
        assert!(error.to_string().contains("its key is disabled"), "{error}");
    }
}
