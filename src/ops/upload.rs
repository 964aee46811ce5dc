//! `upload`: a file or device becomes a snapshot.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::begin::{Begin, Made};
use super::context::Context;
use super::table::{Operation, Report};
use super::text::{rate, tell_kept};
use super::{Result, Resume};
use crate::arguments::{EncryptedHoles, ResumeArgs, values};
use crate::blocking::blocking;
use crate::model::{
    BLOCK_SIZE_U64, BlockIndex, LENGTH_TAG, MAX_DESCRIPTION_CHARS, NAME_TAG, Snapshot, SnapshotId,
    SnapshotState, Tags,
};
use crate::store::{SharedStore, StartRequest};
use crate::transfer::engine::Run;
use crate::transfer::journal::{Ends, name_of};
use crate::transfer::sink::snapshot::Zeros;
use crate::transfer::source::file::{FileSource, Times};

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

/// What tells whether the file is as it was; a device is read again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct AsItWas {
    times: Option<Times>,
    len: u64,
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
    /// [`Error::Unfinished`](super::Error::Unfinished) if it can go on; else there is no snapshot.
    pub(crate) async fn run(self, store: SharedStore, run: &Run) -> Result<Done> {
        let began = Instant::now();
        run.progress.total(self.data_blocks()?);
        let Self { upload, source } = self;
        let path = upload.path.canonicalize().unwrap_or_else(|_| upload.path.clone());
        let (operation, to) = (UploadArgs::NAME.to_owned(), upload.resume.store.clone());
        let begun = Begin {
            request: upload.request(&source),
            zeros: Zeros { full_copy: upload.full_copy, encrypted_holes: upload.encrypted_holes },
            ends: Ends { operation, from: name_of(&path), to },
            resume: upload.resume,
            as_it_was: AsItWas { times: source.times().cloned(), len: source.len() },
            what: "the file",
            source: Arc::new(source.clone()),
            store,
            elsewhere: None,
        };
        let Made { snapshot, blocks, kept } = begun.run(run).await?;
        let unchanged = source.is_unchanged();
        Ok(Done { snapshot, blocks, kept, elapsed: began.elapsed(), unchanged })
    }
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
