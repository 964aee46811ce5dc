//! `movetos3`: an archive of a snapshot, an image or a device in a bucket.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::{Args, value_parser};
use roaring::RoaringBitmap;
use serde::Serialize;

use super::bucket::{BucketArgs, Cost, ensure, over, packed};
use super::context::Context;
use super::copy::{Copied, HowArgs, Order};
use super::destination::region;
use super::image::Parent;
use super::reference::Reference;
use super::table::{Operation, Report};
use super::text::{rate, size};
use super::upload::{UploadArgs, Uploaded};
use super::verify::{self, Against};
use super::{Error, Result};
use crate::model::{BLOCK_SIZE_U64, Snapshot, SnapshotId};
use crate::store::repository::Stored;
use crate::store::{Packing, SharedStore, StoreUrl};
use crate::transfer;
use crate::transfer::source::snapshot::SnapshotSource;

/// Dollars for a gibibyte and a month in the Standard class, us-east-1.
const DOLLARS_A_MONTH: f64 = 0.023;

/// Archive a snapshot, a disk image or a block device in a bucket
#[derive(Args, Debug)]
#[command(after_help = "\
The archive is a snapshot of a repository in the bucket, which is made if there is none: compressed,
incremental, and mounted in place with `fspfs mount s3://BUCKET/PREFIX /mnt/fsp`. It has the id, the size,
the tags and the description of its source. It is a child of the newest archive of the same lineage,
volume or name, unless --parent names another, and only what differs is sent. If the store of the
snapshot can tell what was changed since then, only that is read.

The source stays, unless --delete-source removes it after the archive was read back and compared.

Examples:
  fspfs -s ebs: movetos3 snap-0123456789abcdef0 my-bucket/snaps
  fspfs movetos3 /srv/images/web.img s3://my-bucket/images?region=eu-west-1
  zcat disk.img.gz | fspfs movetos3 --size 100GiB - my-bucket/images

What is stopped goes on where it was when the same command is given again.
Exit status: 0 done, 1 failed, 2 wrong usage.")]
pub(crate) struct Movetos3Args {
    /// A snapshot, named as for `download`; a disk image or a block device, by a path; or `-` for stdin
    #[arg(value_name = "SOURCE")]
    source: Source,
    #[command(flatten)]
    bucket: BucketArgs,
    /// The region of the bucket
    #[arg(short, long, value_name = "REGION", value_parser = region)]
    #[arg(visible_alias = "destination_region")]
    destination_region: Option<String>,
    /// What comes on stdin at most
    #[arg(long, value_name = "SIZE", value_parser = crate::arguments::values::bytes)]
    size: Option<u64>,
    /// How hard zstd compresses: 1 is fast, 19 is small
    #[arg(long, value_name = "LEVEL", value_parser = value_parser!(u8).range(1..=19))]
    level: Option<u8>,
    /// Blocks of one object of the bucket, at most
    #[arg(long, value_name = "1…64", value_parser = value_parser!(u8).range(1..=64))]
    pack_blocks: Option<u8>,
    /// The archive that it is a child of: `auto` is the newest one in the bucket of the same lineage, volume or name,
    /// `none` is none
    #[arg(long, value_name = "SNAP", default_value = "auto")]
    parent: Parent,
    #[command(flatten)]
    how: HowArgs,
    /// Delete the snapshot, after its archive was read and compared with it
    #[arg(long)]
    delete_source: bool,
}

/// What is archived.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    Snapshot(Reference),
    /// An image in a mount names its snapshot.
    Path(PathBuf),
}

impl std::str::FromStr for Source {
    type Err = super::reference::InvalidReference;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        match text {
            "-" => Ok(Self::Path(text.into())),
            _ => match text.parse()? {
                Reference::Image(path) => Ok(Self::Path(path)),
                // A bare word is the name of a file that is here, else of a snapshot.
                Reference::Search { .. } if Path::new(text).is_file() => {
                    Ok(Self::Path(text.into()))
                }
                reference => Ok(Self::Snapshot(reference)),
            },
        }
    }
}

/// What came of it.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Moved {
    Done {
        /// The archive.
        #[serde(flatten)]
        snapshot: Box<Snapshot>,
        /// What it takes in the bucket.
        stored: Stored,
        /// What was asked of the bucket.
        #[serde(flatten)]
        cost: Cost,
        #[serde(skip)]
        blocks: u64,
        #[serde(skip)]
        elapsed: std::time::Duration,
    },
    DryRun {
        to: String,
    },
}

impl Report for Moved {
    fn lines(&self) -> Vec<String> {
        let Self::Done { snapshot, stored, cost, blocks, elapsed } = self else {
            return Vec::new();
        };
        let Stored { blocks: all, bytes, new_blocks, new_bytes } = stored;
        #[allow(clippy::cast_precision_loss)]
        let (raw, kept) = ((all * BLOCK_SIZE_U64) as f64, *bytes as f64);
        let ratio = if *bytes == 0 { 1.0 } else { raw / kept };
        let month = kept / f64::from(1 << 30) * DOLLARS_A_MONTH;
        vec![
            format!(
                "Snapshot {} contains {all} chunks, {} of {}; {new_blocks} chunks are new, {}",
                snapshot.id,
                size(*bytes),
                size(all * BLOCK_SIZE_U64),
                size(*new_bytes)
            ),
            format!("ratio {ratio:.2}, {} requests, about ${month:.4} a month", cost.requests),
            format!("movetos3 {}", rate(*elapsed, blocks * BLOCK_SIZE_U64)),
            snapshot.id.to_string(),
        ]
    }

    fn ids(&self) -> Vec<String> {
        match self {
            Self::Done { snapshot, .. } => vec![snapshot.id.to_string()],
            Self::DryRun { .. } => Vec::new(),
        }
    }
}

impl Operation for Movetos3Args {
    const NAME: &'static str = "movetos3";
    const LINE: Option<&'static str> = Some("snap-0123456789abcdef0 my-bucket/snaps");
    const DRY_RUN: bool = true;
    type Report = Moved;

    fn uses_store(&self) -> bool {
        matches!(self.source, Source::Snapshot(_))
    }

    fn check(&self) -> std::result::Result<(), String> {
        match &self.source {
            Source::Path(path) if path == Path::new("-") => {
                Err("a job has no stdin: give a snapshot, a file or a block device".to_owned())
            }
            Source::Path(path) if !path.is_absolute() => {
                Err(format!("{}: give an absolute path", path.display()))
            }
            _ => Ok(()),
        }
    }

    async fn run(self, cx: &Context) -> Result<Moved> {
        let began = Instant::now();
        let url = self.bucket.url(self.destination_region.as_ref())?;
        let doing = format!("archive in {url}");
        self.archive(cx, &url, began).await.map_err(|error| error.doing(doing))
    }
}

impl Movetos3Args {
    async fn archive(self, cx: &Context, url: &StoreUrl, began: Instant) -> Result<Moved> {
        let cx = &packed(cx, Packing { level: self.level, blocks: self.pack_blocks });
        // What is not there makes no repository.
        let source = self.snapshot(cx).await?;
        let delete_source = self.delete_source;
        if source.is_none() {
            if delete_source {
                let why = "--delete-source deletes a snapshot, and no file";
                return Err(Error::Refused(why.to_owned()));
            }
            self.how.check_plain("an archive")?;
        }
        let Some(repository) = cx.run.unless_stopped(ensure(cx, url)).await?? else {
            cx.note(format_args!("{url} would be made a repository"));
            return Ok(Moved::DryRun { to: url.to_string() });
        };
        let store: SharedStore = Arc::clone(&repository) as SharedStore;
        let (snapshot, blocks) = match source {
            Some((from, id)) => {
                if from.place() == store.place() {
                    return Err(Error::Refused(format!("{id} is in {url} itself")));
                }
                let (snapshot, elsewhere) = (Reference::Id(id), Some(url.clone()));
                let archive = Some(self.parent);
                let order = Order { snapshot, how: self.how, elsewhere, archive };
                match order.run(cx).await? {
                    Copied::Done { snapshot, put, .. } => (snapshot, put),
                    Copied::DryRun { to, .. } => return Ok(Moved::DryRun { to }),
                }
            }
            None => {
                let uploaded = self.upload(cx).run(&over(cx, url)).await;
                match uploaded.map_err(|error| error.elsewhere(url))? {
                    Uploaded::Done { snapshot, blocks, .. } => (snapshot, blocks),
                    Uploaded::DryRun { .. } => return Ok(Moved::DryRun { to: url.to_string() }),
                }
            }
        };
        let stored = cx.run.unless_stopped(repository.stored(&snapshot.id)).await??;
        if delete_source {
            delete(cx, &store, &snapshot).await?;
        }
        let cost = Cost::of(&store);
        Ok(Moved::Done { snapshot, stored, cost, blocks, elapsed: began.elapsed() })
    }

    /// The snapshot that is archived, and its store; `None` if it is a file.
    ///
    /// # Errors
    ///
    /// If it is not there.
    async fn snapshot(&self, cx: &Context) -> Result<Option<(SharedStore, SnapshotId)>> {
        let reference = match &self.source {
            Source::Snapshot(reference) => reference.clone(),
            Source::Path(path) if path == Path::new("-") => return Ok(None),
            Source::Path(path) => match super::reference::mounted(path).await {
                Some(id) => Reference::Id(id),
                None => {
                    cx.check_place(path)?;
                    let found =
                        path.metadata().map_err(|e| transfer::Error::io("read", path, e))?;
                    return if found.is_dir() {
                        Err(transfer::Error::unsuitable(path, "it is a directory").into())
                    } else {
                        Ok(None)
                    };
                }
            },
        };
        let finding = async {
            let store = cx.open().await?;
            let id = reference.id(cx, &store).await?;
            super::readable(&store, &id).await?;
            Ok(Some((store, id)))
        };
        cx.run.unless_stopped(finding).await?
    }

    fn upload(self, cx: &Context) -> UploadArgs {
        let path = match self.source {
            Source::Path(path) => path,
            Source::Snapshot(reference) => reference.to_string().into(),
        };
        let mut upload = UploadArgs::plain();
        self.how.image(&mut upload.image);
        (upload.path, upload.size) = (path, self.size);
        // A file has nothing but its name to find a parent by.
        upload.parent = match (self.parent, &upload.image.label.name) {
            (Parent::Auto, None) => {
                cx.note("without --name all of it is stored anew: it has no parent");
                Parent::None
            }
            (parent, _) => parent,
        };
        upload.resume = self.how.resume;
        upload
    }
}

/// Deletes the snapshot of an archive, if every block of the archive can be read and is the snapshot's.
async fn delete(cx: &Context, store: &SharedStore, archive: &Snapshot) -> Result<()> {
    let from = cx.open().await?;
    let snapshot = super::readable(&from, &archive.id).await?;
    let run = cx.run_showing("Comparing", &archive.id);
    run.progress.total(snapshot.volume_size.blocks().0.into());
    let against = Against::snapshot(Arc::clone(&from), snapshot.clone(), RoaringBitmap::default());
    // What is a source is read, whatever its list says.
    let source = Arc::new(SnapshotSource::new(Arc::clone(store), archive.clone()));
    let mut report = verify::Report::default();
    let compared = verify::compare(source, &archive.id, against, &run, &mut report);
    cx.run.unless_stopped(compared).await??;
    drop(run);
    if let Some(finding) = report.findings.first() {
        let (block, problem) = (finding.block, &finding.problem);
        let why = format!("block {block} of the archive: {problem}; the source stays");
        return Err(Error::Refused(why));
    }
    from.delete(&snapshot.id).await?;
    cx.note(format_args!("{} is deleted in {}", snapshot.id, cx.house.from));
    Ok(())
}
