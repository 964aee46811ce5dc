//! A disk image that becomes snapshots: what `upload` and `fanout` have in common.

use std::fs::File;
use std::io::IsTerminal as _;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::begin::Begin;
use super::context::Context;
use super::destination::{LabelArgs, ZerosArgs};
use super::reference::{InvalidReference, Reference};
use super::text::shortened;
use super::{Error, Result, Resume, readable};
use crate::blocking::blocking;
use crate::model::{BLOCK_SIZE_U64, BlockIndex, LENGTH_TAG, Snapshot, SnapshotId, VolumeSize};
use crate::store::page::newest_named;
use crate::store::{SharedStore, StartRequest, StoreUrl};
use crate::transfer;
use crate::transfer::journal::{Ends, name_of};
use crate::transfer::source::Source;
use crate::transfer::source::file::{FileSource, Times};
use crate::transfer::source::stream::{StreamSource, stage};

/// What a snapshot of an image is like.
#[derive(Args, Clone, Debug)]
pub(super) struct ImageArgs {
    #[command(flatten)]
    pub(super) label: LabelArgs,
    /// The volume that it is an image of
    #[arg(long, value_name = "VOLUME")]
    volume_id: Option<String>,
    #[command(flatten)]
    pub(super) zeros: ZerosArgs,
    /// Ask the store to encrypt it
    #[arg(long)]
    encrypted: bool,
    /// Take an image that is shorter than what is on it, or no raw image
    #[arg(long)]
    pub(super) as_is: bool,
}

/// `--parent`: the snapshot that a new one is a child of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Parent {
    #[default]
    None,
    /// The newest one of the same name that can be one.
    Auto,
    Named(Reference),
}

impl FromStr for Parent {
    type Err = InvalidReference;

    fn from_str(text: &str) -> std::result::Result<Self, InvalidReference> {
        match text {
            "none" => Ok(Self::None),
            "auto" => Ok(Self::Auto),
            _ => text.parse().map(Self::Named),
        }
    }
}

/// What a stream on stdin is called.
pub(super) const STDIN: &str = "stdin";

/// The image, opened.
#[derive(Debug)]
pub(super) struct Image {
    /// Where it is, without links.
    path: PathBuf,
    /// Bytes that it has, or has at most.
    pub(super) len: u64,
    pub(super) size: VolumeSize,
    pub(super) source: Arc<dyn Source>,
    /// What tells more of it than it reads; nothing does of a stream.
    file: Option<FileSource>,
}

impl Image {
    /// Opens a file or a block device.
    ///
    /// # Errors
    ///
    /// If it is no image, or cannot be read.
    pub(super) async fn open(path: &Path) -> Result<Self> {
        let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let path = path.to_owned();
        let source = blocking(move || FileSource::open(&path)).await?;
        Ok(Self::of(real, source))
    }

    fn of(path: PathBuf, file: FileSource) -> Self {
        let (len, size) = (file.len(), file.volume_size());
        Self { path, len, size, source: Arc::new(file.clone()), file: Some(file) }
    }

    /// What will come on stdin, `len` bytes at most; `as_is` takes it although it is cut or packed.
    ///
    /// # Errors
    ///
    /// If no volume has this size, or stdin is a terminal.
    pub(super) fn stream(len: u64, as_is: bool) -> Result<Self> {
        let size = VolumeSize::holding(len).map_err(|e| Error::Refused(format!("--size: {e}")))?;
        let source = Arc::new(StreamSource::new(STDIN, stdin()?, len, size, as_is));
        Ok(Self { path: STDIN.into(), len, size, source, file: None })
    }

    /// All that comes on stdin, in a file without a name that goes with this process.
    ///
    /// # Errors
    ///
    /// If stdin is a terminal, or there is no room.
    pub(super) async fn staged(directory: PathBuf, sparse: bool) -> Result<Self> {
        let stdin = stdin()?;
        let file = blocking(move || stage(STDIN, &stdin, &directory, sparse)).await?;
        Ok(Self::of(STDIN.into(), FileSource::of(Path::new(STDIN), file)?))
    }

    /// Blocks that it has, with data or zeros, or that it has at most.
    ///
    /// # Errors
    ///
    /// If the file system does not say.
    pub(super) fn blocks(&self) -> Result<u64> {
        let Some(file) = &self.file else { return Ok(self.len.div_ceil(BLOCK_SIZE_U64)) };
        let extents = file.extents(BlockIndex::ZERO..self.size.blocks());
        let blocks = extents.map(|extent| extent.map(|run| u64::from(run.end.0 - run.start.0)));
        Ok(blocks.sum::<transfer::Result<_>>()?)
    }

    /// Whether its length is not known yet.
    pub(super) fn is_stream(&self) -> bool {
        self.file.is_none()
    }

    /// Whether it is a block device.
    pub(super) fn is_device(&self) -> bool {
        self.file.as_ref().is_some_and(|file| file.times().is_none())
    }

    /// Where it is, without links.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the file seems to be what it was when it was opened.
    pub(super) fn is_unchanged(&self) -> bool {
        self.file.as_ref().is_none_or(FileSource::is_unchanged)
    }
}

/// Another descriptor of stdin.
fn stdin() -> Result<File> {
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        let why =
            "stdin is a terminal: send the image there, as in `zcat disk.img.gz | fspfs upload -`";
        return Err(Error::Refused(why.to_owned()));
    }
    Ok(stdin.as_fd().try_clone_to_owned()?.into())
}

/// Where a snapshot of it is made, and over what.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) store: SharedStore,
    /// That store, if it is not the one of `-s`.
    pub(super) elsewhere: Option<StoreUrl>,
    pub(super) parent: Option<SnapshotId>,
    pub(super) kms_key: Option<String>,
    pub(super) resume: Resume,
}

/// What tells whether the file is as it was; a device is read again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct AsItWas {
    times: Option<Times>,
    len: u64,
}

impl ImageArgs {
    /// The snapshot that one of this image is made of, in one place.
    pub(super) fn begin(&self, image: &Image, operation: &str, place: Place) -> Begin<AsItWas> {
        let times = image.file.as_ref().and_then(FileSource::times).cloned();
        Begin {
            request: self.request(image, &place),
            zeros: self.zeros.zeros(),
            ends: Ends {
                operation: operation.to_owned(),
                from: name_of(&image.path),
                to: place.resume.store.clone(),
            },
            resume: place.resume,
            as_it_was: AsItWas { times, len: image.len },
            what: "the file",
            source: Arc::clone(&image.source),
            is_delta: false,
            store: place.store,
            elsewhere: place.elsewhere,
        }
    }

    fn request(&self, image: &Image, place: &Place) -> StartRequest {
        let path = image.path.display();
        let mut tags = self.label.tags();
        if image.len != image.size.bytes() {
            tags.insert(LENGTH_TAG.to_owned(), image.len.to_string());
        }
        let parent = place.parent.clone();
        let description = self.label.description.clone();
        StartRequest {
            tags,
            description: description
                .unwrap_or_else(|| shortened(&format!("Uploaded by fspfs from {path}"))),
            volume_id: self.volume_id.clone(),
            // A child is encrypted as its parent is, and must not be asked for it.
            encrypted: self.encrypted && parent.is_none(),
            kms_key: place.kms_key.clone().filter(|_| parent.is_none()),
            origin: Some(shortened(&path.to_string())),
            parent,
            ..StartRequest::new(image.size)
        }
    }

    /// The parent that is meant, in a store.
    ///
    /// # Errors
    ///
    /// If the one that was named is not there, or cannot be one.
    pub(super) async fn parent(
        &self,
        cx: &Context,
        store: &SharedStore,
        image: &Image,
        parent: &Parent,
    ) -> Result<Option<SnapshotId>> {
        match parent {
            Parent::None => Ok(None),
            Parent::Auto => self.newest(cx, store, image).await,
            // Whether it can be the parent is the store's to say.
            Parent::Named(reference) => {
                Ok(Some(readable(store, &reference.id(cx, store).await?).await?.id))
            }
        }
    }

    /// The newest snapshot of the same name, if it can be the parent.
    async fn newest(
        &self,
        cx: &Context,
        store: &SharedStore,
        image: &Image,
    ) -> Result<Option<SnapshotId>> {
        let Some(name) = &self.label.name else {
            let why =
                "--parent auto looks for the newest snapshot of the same name: give it with --name";
            return Err(Error::Refused(why.to_owned()));
        };
        match newest_named(&**store, name).await? {
            None => cx.note("it has no parent: there is no snapshot of that name"),
            Some(found) => match self.why_not(image, &found) {
                None => {
                    cx.note(format_args!("it is a child of {}", found.id));
                    return Ok(Some(found.id));
                }
                Some(why) => {
                    cx.note(format_args!("it has no parent: of {} {why}", found.id));
                }
            },
        }
        Ok(None)
    }

    /// What keeps a snapshot from being the parent.
    fn why_not(&self, image: &Image, parent: &Snapshot) -> Option<String> {
        if parent.volume_size > image.size {
            return Some(format!("the volume is larger, {}", parent.volume_size));
        }
        let differs = self.encrypted && !parent.encrypted;
        differs.then(|| "the data is not encrypted".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use clap::FromArgMatches as _;

    use super::*;
    use crate::model::SnapshotState;
    use crate::store::repository::Repository;
    use crate::store::wrap::{Call, Wrapper};
    use crate::transfer::engine::Run;

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
        let words = ImageArgs::augment_args(clap::Command::new("x")).get_matches_from(["x"]);
        let args = ImageArgs::from_arg_matches(&words).unwrap();
        let image = Image::open(&path).await.unwrap();
        let resume = Resume::default();
        let place = Place { store, elsewhere: None, parent: None, kms_key: None, resume };
        let error = args.begin(&image, "upload", place).run(&Run::default()).await.unwrap_err();
        assert!(error.to_string().contains("its key is disabled"), "{error}");
    }
}
