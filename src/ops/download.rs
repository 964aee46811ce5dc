//! `download`: a snapshot becomes a file, or is written to a device.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::context::Context;
use super::table::{Operation, Report};
use super::text::{contains, rate, tell_kept};
use super::{Error, Left, Result, Resume};
use crate::arguments::ResumeArgs;
use crate::blocking::blocking;
use crate::model::{BLOCK_SIZE_U64, Digest, Snapshot, SnapshotId};
use crate::store::SharedStore;
use crate::transfer;
use crate::transfer::engine::{Destination, Run, transfer_to};
use crate::transfer::journal::{Ends, FileJournal, Journal, NoJournal, name_of};
use crate::transfer::sink::file::FileSink;
use crate::transfer::sink::{Finished, Sink as _};
use crate::transfer::source::snapshot::SnapshotSource;

/// Write a snapshot to a file or a block device
#[derive(Args, Debug)]
#[command(after_help = "\
A file is replaced as a whole once everything is there. A device is written in place, holes as zeros.
What is stopped goes on where it was when the same command is given again.

Examples:
  fspfs -s /srv/snaps download snap-0123456789abcdef0 disk.img
  fspfs -s /srv/snaps download snap-0123456789abcdef0 /dev/sdb")]
pub(crate) struct DownloadArgs {
    /// The snapshot
    #[arg(value_name = "SNAP")]
    snapshot: SnapshotId,
    /// A file or a block device
    #[arg(value_name = "FILE")]
    path: PathBuf,
    #[command(flatten)]
    resume: ResumeArgs,
}

/// The snapshot that was downloaded.
#[derive(Debug, Serialize)]
pub(crate) struct Downloaded {
    #[serde(flatten)]
    snapshot: Snapshot,
    #[serde(skip)]
    blocks: u64,
    #[serde(skip)]
    elapsed: Duration,
}

impl Report for Downloaded {
    fn lines(&self) -> Vec<String> {
        let Self { snapshot, blocks, elapsed } = self;
        let bytes = blocks.saturating_sub(snapshot.zero_blocks.unwrap_or(0)) * BLOCK_SIZE_U64;
        vec![
            contains(&snapshot.id, *blocks, elapsed.as_secs_f64()),
            format!("download {}", rate(*elapsed, bytes)),
            snapshot.id.to_string(),
        ]
    }

    fn ids(&self) -> Vec<String> {
        vec![self.snapshot.id.to_string()]
    }
}

impl Operation for DownloadArgs {
    const NAME: &'static str = "download";
    const LINE: Option<&'static str> = Some("snap-0123456789abcdef0 /dev/sdb");
    type Report = Downloaded;

    async fn run(self, cx: &Context) -> Result<Downloaded> {
        cx.check_place(&self.path)?;
        let store = cx.open().await?;
        let from = &cx.house.from;
        let download = Download {
            id: self.snapshot,
            path: self.path,
            not_in: from.directory().ok().map(Path::to_owned),
            resume: cx.resume(from, &store, &self.resume)?,
        };
        let doing = format!("download {} to {}", download.id, download.path.display());
        let run = cx.run_showing("Downloading");
        let done = download.run(store.clone(), &run).await.map_err(|error| error.doing(doing))?;
        drop(run);
        let Done { snapshot, blocks, kept, elapsed } = done;
        if let Some(why) = &snapshot.state_message {
            let id = &snapshot.id;
            cx.note(format_args!("{id} may be longer than what it was made from: {why}"));
        }
        tell_kept(cx, kept, "downloaded");
        cx.tell_cost(&store);
        Ok(Downloaded { snapshot, blocks, elapsed })
    }
}

/// What to download, and where to.
#[derive(Clone, Debug)]
pub(crate) struct Download {
    /// The snapshot.
    pub(crate) id: SnapshotId,
    /// The file or device.
    pub(crate) path: PathBuf,
    /// A directory that the file must not be in: the store itself.
    pub(crate) not_in: Option<PathBuf>,
    /// Its journal.
    pub(crate) resume: Resume,
}

/// What was done.
#[derive(Clone, Debug)]
pub(crate) struct Done {
    /// The snapshot.
    pub(crate) snapshot: Snapshot,
    /// Blocks that were ever written to it.
    pub(crate) blocks: u64,
    /// Those of them that an earlier run had downloaded.
    pub(crate) kept: u64,
    /// How long it took.
    pub(crate) elapsed: Duration,
}

/// What a journal says of a download.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Attempt {
    /// Bytes of the image.
    len: u64,
    /// When the snapshot was started: another one may have its id, in a repository that was made anew.
    started: Timestamp,
}

impl Download {
    /// Does it. A file gets its name once it is whole. What ends it before leaves a part that the same download
    /// goes on with, if there is a journal and the cause may go away.
    ///
    /// # Errors
    ///
    /// [`Error::Unfinished`] if it can go on; else nothing is left, but what was written to a device.
    pub(crate) async fn run(self, store: SharedStore, run: &Run) -> Result<Done> {
        let began = Instant::now();
        let snapshot = run.unless_stopped(super::readable(&store, &self.id)).await??;
        check_outside(&self.path, self.not_in.as_deref())?;
        run.progress.total(snapshot.data_blocks.unwrap_or(0));
        let Prepared { destination, ending } = self.prepare(&snapshot).await?;
        let source = Arc::new(SnapshotSource::new(store, snapshot.clone()));
        let Destination { sink, journal } = destination;
        let finished = transfer_to(source, sink, journal, run).await;
        let Finished { blocks, kept, .. } = finished.map_err(|error| ending.explain(error))?;
        Ok(Done { snapshot, blocks, kept, elapsed: began.elapsed() })
    }

    /// Opens the file or device, and its journal. Whatever an earlier run has left and cannot go on is removed.
    ///
    /// # Errors
    ///
    /// If it cannot be written, or another process is at it.
    pub(crate) async fn prepare(&self, snapshot: &Snapshot) -> Result<Prepared> {
        let ends = self.ends();
        let key = self.resume.journals.as_ref().map(|_| key(&ends));
        let sink = FileSink::open(&self.path, snapshot.image_len(), key).await?;
        let journal: Arc<dyn Journal> = match self.journal(ends, snapshot).await {
            Ok(Some((journal, goes_on))) => {
                if !goes_on {
                    sink.clear().await?;
                }
                Arc::new(journal)
            }
            Ok(None) => {
                sink.clear().await?;
                Arc::new(NoJournal)
            }
            Err(error) => {
                // What another process is at is its own.
                if sink.is_fresh() {
                    sink.abort().await;
                }
                return Err(error);
            }
        };
        let left = match sink.partial() {
            Some(partial) => Left::Partial(partial),
            None => Left::Device(self.path.clone()),
        };
        let ending = Ending { keeps: journal.is_kept(), left };
        Ok(Prepared { destination: Destination { sink: Arc::new(sink), journal }, ending })
    }

    fn ends(&self) -> Ends {
        let place = place(&self.path).unwrap_or_else(|| self.path.clone());
        let place = std::path::absolute(&place).unwrap_or(place);
        let from = format!("{} {}", self.resume.store, self.id);
        Ends { operation: "download".to_owned(), from, to: name_of(&place) }
    }

    /// The journal, and whether it is of an earlier run.
    async fn journal(
        &self,
        ends: Ends,
        snapshot: &Snapshot,
    ) -> Result<Option<(FileJournal, bool)>> {
        let Some(root) = self.resume.journals.clone() else { return Ok(None) };
        let restart = self.resume.restart;
        let attempt = Attempt { len: snapshot.image_len(), started: snapshot.start_time };
        let opened = blocking(move || {
            let (mut journal, found) = FileJournal::open(&root, ends, restart)?;
            let goes_on = !restart && found.as_ref() == Some(&attempt);
            if !goes_on {
                journal.begin(&attempt);
            }
            Ok((journal, goes_on))
        });
        super::or_without_journal(opened.await)
    }
}

/// A file or device that can be written to.
#[derive(Debug)]
pub(crate) struct Prepared {
    /// It, with its journal.
    pub(crate) destination: Destination,
    /// What is said if not all of it is written.
    pub(crate) ending: Ending,
}

/// What is left when a download ends before it is done.
#[derive(Debug)]
pub(crate) struct Ending {
    keeps: bool,
    left: Left,
}

impl Ending {
    /// The error that has ended it, with what is left if it can go on.
    pub(crate) fn explain(self, error: transfer::Error) -> Error {
        if self.keeps && error.could_go_on() {
            return Error::Unfinished { cause: Box::new(error.into()), left: self.left };
        }
        error.into()
    }
}

/// Where the file is or will be, without links.
fn place(path: &Path) -> Option<PathBuf> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    path.canonicalize().ok().or_else(|| {
        let directory = directory.unwrap_or(Path::new(".")).canonicalize().ok()?;
        Some(directory.join(path.file_name()?))
    })
}

/// A store in a directory is not to be overwritten with what comes out of it.
///
/// # Errors
///
/// If the path is in that directory.
pub(crate) fn check_outside(path: &Path, store: Option<&Path>) -> Result<()> {
    let Some(store) = store.and_then(|store| store.canonicalize().ok()) else { return Ok(()) };
    match place(path) {
        Some(place) if place.starts_with(&store) => {
            Err(transfer::Error::unsuitable(path, "it is inside the store itself").into())
        }
        _ => Ok(()),
    }
}

/// What the name of the partial file is told from others by.
fn key(ends: &Ends) -> String {
    let digest = Digest::of(format!("{}\n{}", ends.from, ends.to).as_bytes());
    digest.to_hex()[..8].to_owned()
}
