//! `upload`: a file, a device or what comes on stdin becomes a snapshot.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use super::begin::Made;
use super::context::Context;
use super::destination::{KmsKey, key_for, tell_pending};
use super::freeze::{FreezeArgs, run_of_its_own};
use super::image::{Image, ImageArgs, Parent, Place, STDIN};
use super::table::{Operation, Report};
use super::text::rate;
use super::{Error, Result};
use crate::arguments::ResumeArgs;
use crate::model::{BLOCK_SIZE_U64, Snapshot, SnapshotId};

/// Make a snapshot of a file, a block device, or what comes on stdin
#[derive(Args, Debug)]
#[command(after_help = "\
What comes on stdin is read once, so what is stopped begins anew. Without --size all of it is kept in
a file first, in TMPDIR, else beside the journals. A stream that ends too early is known from one that
is whole only if what is on it says how long it is: use `set -o pipefail`. Not as a job.

With a parent only blocks that differ from it are stored. To find them, blocks of the parent are read
where the store does not know their digests.

Examples:
  fspfs -s /srv/snaps upload --name web disk.img
  fspfs -s ebs: upload --parent name:web --name web disk.img
  id=$(fspfs -s /srv/snaps upload disk.img | tail -n 1)
  zcat disk.img.gz | fspfs -s ebs: upload --size 8GiB -
  fspfs -s ebs: upload --suppress-writes --freeze / /dev/sda

What is stopped goes on where it was when the same command is given again.")]
pub(crate) struct UploadArgs {
    /// A disk image, a block device, or `-` for stdin
    #[arg(value_name = "FILE")]
    pub(super) path: PathBuf,
    /// What comes on stdin at most: more fails, where less comes there is a hole
    #[arg(long, value_name = "SIZE", value_parser = crate::arguments::values::bytes)]
    pub(super) size: Option<u64>,
    /// Make a child of this snapshot, named as for `download`; `auto` is the newest of the same name
    /// that can be the parent, `none` is none
    #[arg(long, value_name = "SNAP", default_value = "none")]
    #[arg(visible_aliases = ["parent-snapshot-id", "parent_snapshot_id"])]
    pub(super) parent: Parent,
    #[command(flatten)]
    pub(super) image: ImageArgs,
    /// The key to encrypt it with
    #[arg(
        long = "kms-key",
        visible_alias = "kms-key-id",
        value_name = "KEY",
        requires = "encrypted"
    )]
    kms_keys: Vec<KmsKey>,
    #[command(flatten)]
    pub(super) resume: ResumeArgs,
    #[command(flatten)]
    freeze: FreezeArgs,
}

/// What came of it.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Uploaded {
    /// The snapshot that was made.
    Done {
        #[serde(flatten)]
        snapshot: Box<Snapshot>,
        #[serde(skip)]
        file: String,
        #[serde(skip)]
        blocks: u64,
        #[serde(skip)]
        elapsed: Duration,
    },
    /// What would be read.
    DryRun { file: String, bytes: u64, blocks: u64, parent: Option<SnapshotId> },
}

impl Report for Uploaded {
    fn lines(&self) -> Vec<String> {
        match self {
            Self::Done { snapshot, file, blocks, elapsed } => vec![
                format!("{file} {}", rate(*elapsed, blocks * BLOCK_SIZE_U64)),
                format!("Total chunks uploaded {blocks}"),
                snapshot.id.to_string(),
            ],
            Self::DryRun { .. } => Vec::new(),
        }
    }

    fn ids(&self) -> Vec<String> {
        match self {
            Self::Done { snapshot, .. } => vec![snapshot.id.to_string()],
            Self::DryRun { .. } => Vec::new(),
        }
    }
}

impl Operation for UploadArgs {
    const NAME: &'static str = "upload";
    const LINE: Option<&'static str> = Some("--name web /srv/images/web.img");
    const DRY_RUN: bool = true;
    type Report = Uploaded;

    fn check(&self) -> std::result::Result<(), String> {
        if self.is_stdin() {
            return Err("a job has no stdin: give a file or a block device".to_owned());
        }
        match self.freeze.is_wanted() {
            true => Err("a job does not freeze: use the command".to_owned()),
            false => Ok(()),
        }
    }

    fn begin_alone(&mut self) -> Result<()> {
        self.freeze.begin_alone()
    }

    async fn run(mut self, cx: &Context) -> Result<Uploaded> {
        let cx = &Context { run: run_of_its_own(&cx.run), ..cx.clone() };
        let file = match self.is_stdin() {
            true => STDIN.to_owned(),
            false => self.path.display().to_string(),
        };
        if !self.is_stdin() {
            cx.check_place(&self.path)?;
        }
        let doing = |error: Error| error.doing(format!("upload {file}"));
        self.freeze.check(cx, cx.journals(&self.resume)).map_err(doing)?;
        let store = cx.open().await?;
        let mut image = self.image(cx).await.map_err(doing)?;
        let (bytes, chunks) = (image.len, image.len.div_ceil(BLOCK_SIZE_U64));
        let most = if image.is_stream() { "at most " } else { "" };
        cx.line(format_args!("Size of {file} is {most}{bytes} bytes and {chunks} chunks"));
        let parent = self.image.parent(cx, &store, &image, &self.parent);
        let parent = cx.run.unless_stopped(parent).await?.map_err(doing)?;
        let of = parent.as_ref().map(|parent| (&store, parent));
        image.check_whole(cx, self.image.as_is, of).await.map_err(doing)?;
        if cx.dry_run {
            let blocks = image.blocks().map_err(doing)?;
            let to = &cx.house.from;
            cx.note(format_args!(
                "{file} would be uploaded to {to}: {most}{blocks} blocks would be read"
            ));
            return Ok(Uploaded::DryRun { file, bytes, blocks, parent });
        }
        let mut resume = cx.resume(&cx.house.from, &store, &self.resume)?;
        // What comes on stdin does not come again.
        resume.journals.take_if(|_| self.is_stdin());
        let place = Place {
            store: store.clone(),
            elsewhere: None,
            parent,
            kms_key: key_for(&self.kms_keys, &cx.house.from).map_err(doing)?,
            resume,
        };
        let frozen = self.freeze.freeze(cx).await.map_err(doing)?;
        if let Some(frozen) = &frozen {
            image.source = frozen.source(image.source);
        }
        let began = Instant::now();
        let made = match self.make(cx, &image, place.clone()).await {
            Err(error)
                if self.parent == Parent::Auto && place.parent.is_some() && refused(&error) =>
            {
                cx.note(format_args!("it has no parent after all: {error}"));
                self.make(cx, &image, Place { parent: None, ..place }).await
            }
            made => made,
        };
        let made = match &frozen {
            Some(frozen) => frozen.end(cx, made).await,
            None => made,
        };
        let made = made.map_err(doing)?;
        let elapsed = began.elapsed();
        if !image.is_unchanged() {
            cx.note(format_args!(
                "{file} was written to while it was read: the snapshot may hold a mixture"
            ));
        }
        made.tell(cx, None, "uploaded");
        let Made { snapshot, blocks, .. } = made;
        cx.tell_cost(&store);
        tell_pending(cx, &snapshot);
        Ok(Uploaded::Done { snapshot: Box::new(snapshot), file, blocks, elapsed })
    }
}

/// Whether the store does not take the snapshot as it was asked for.
fn refused(error: &Error) -> bool {
    matches!(error, Error::Store(error) if error.kind().refuses_as_asked())
}

impl UploadArgs {
    /// One of stdin, with nothing asked for.
    pub(super) fn plain() -> Self {
        let matches = Self::augment_args(clap::Command::new(Self::NAME));
        let matches = matches.get_matches_from([Self::NAME, "-"]);
        clap::FromArgMatches::from_arg_matches(&matches).expect("it is its own grammar")
    }

    fn is_stdin(&self) -> bool {
        self.path == Path::new("-")
    }

    /// What is to be uploaded.
    async fn image(&self, cx: &Context) -> Result<Image> {
        let refused = |why: &str| Err(Error::Refused(why.to_owned()));
        if !self.is_stdin() {
            if self.size.is_some() {
                return refused("--size is for what comes on stdin");
            }
            return Image::open(&self.path).await;
        }
        if self.freeze.is_wanted() {
            return refused("--freeze does not know who reads what comes on stdin");
        }
        let journals = cx.journals(&self.resume).map(Path::to_owned);
        match (self.size, journals) {
            (Some(size), _) => Image::stream(size, self.image.as_is),
            (None, _) if cx.dry_run => refused("all of it would have to be read; give --size"),
            (None, None) => refused("--suppress-writes keeps it in no file; give --size"),
            (None, Some(journals)) => {
                let place = std::env::var_os("TMPDIR").filter(|place| !place.is_empty());
                let place = place.map_or(journals, PathBuf::from);
                cx.run.unless_stopped(Image::staged(place, !self.image.zeros.full_copy)).await?
            }
        }
    }

    async fn make(&self, cx: &Context, image: &Image, place: Place) -> Result<Made> {
        let run = cx.run_showing("Uploading", &place.resume.store);
        run.progress.total(image.size.blocks().0.into());
        self.image.begin(image, Self::NAME, place).run(&run).await
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::table::find;

    #[test]
    fn a_job_neither_reads_stdin_nor_freezes() {
        let upload = find("upload").unwrap();
        upload.parse("/a.img").unwrap();
        for (line, says) in [
            ("-", "no stdin"),
            ("--size 1GiB -", "no stdin"),
            ("--freeze /srv /a.img", "does not freeze"),
        ] {
            let error = upload.parse(line).map(|_| ()).unwrap_err();
            assert!(error.contains(says), "{line}: {error}");
        }
    }
}
