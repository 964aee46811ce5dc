//! `download`: a snapshot becomes a file, or is written to a device.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::context::Context;
use super::list::Counted;
use super::reference::{HELP, Reference};
use super::table::{Operation, Report};
use super::text::{contains, rate, tell_kept};
use super::{Ending, Error, Left, Result, Resume};
use crate::arguments::ResumeArgs;
use crate::blocking::blocking;
use crate::model::{BLOCK_SIZE_U64, Digest, Snapshot, SnapshotId};
use crate::transfer;
use crate::transfer::engine::{Destination, Finished, Run, transfer_to};
use crate::transfer::journal::{Ends, Journal, NoJournal, name_of};
use crate::transfer::sink::Sink as _;
use crate::transfer::sink::file::FileSink;
use crate::transfer::sink::target::Target;
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
    #[arg(value_name = "SNAP", help = HELP)]
    snapshot: Reference,
    /// A file or a block device
    #[arg(value_name = "FILE")]
    path: PathBuf,
    #[command(flatten)]
    resume: ResumeArgs,
}

impl DownloadArgs {
    pub(super) fn of(snapshot: Reference, path: PathBuf, resume: ResumeArgs) -> Self {
        Self { snapshot, path, resume }
    }
}

/// The snapshot that was downloaded.
#[derive(Debug, Serialize)]
pub(crate) struct Downloaded {
    #[serde(flatten)]
    snapshot: Snapshot,
    #[serde(skip)]
    dry_run: bool,
    #[serde(skip)]
    blocks: u64,
    #[serde(skip)]
    elapsed: Duration,
}

impl Downloaded {
    /// Whether nothing is missing of what it was made of.
    pub(super) fn is_whole(&self) -> bool {
        !self.snapshot.tags.contains_key(crate::store::SALVAGED_TAG)
    }
}

impl Report for Downloaded {
    fn lines(&self) -> Vec<String> {
        let Self { snapshot, dry_run, blocks, elapsed } = self;
        let bytes = blocks.saturating_sub(snapshot.zero_blocks.unwrap_or(0)) * BLOCK_SIZE_U64;
        let mut lines = vec![contains(&snapshot.id, *blocks, elapsed.as_secs_f64())];
        if !dry_run {
            lines.push(format!("download {}", rate(*elapsed, bytes)));
        }
        lines.extend(self.ids());
        lines
    }

    fn ids(&self) -> Vec<String> {
        vec![self.snapshot.id.to_string()]
    }
}

impl Operation for DownloadArgs {
    const NAME: &'static str = "download";
    const LINE: Option<&'static str> = Some("snap-0123456789abcdef0 /dev/sdb");
    const DRY_RUN: bool = true;
    type Report = Downloaded;

    async fn run(self, cx: &Context) -> Result<Downloaded> {
        cx.check_place(&self.path)?;
        let store = cx.open().await?;
        let from = &cx.house.from;
        let doing = format!("download {} to {}", self.snapshot, self.path.display());
        let id = cx.run.unless_stopped(self.snapshot.id(cx, &store)).await?;
        let id = id.map_err(|error| error.doing(&doing))?;
        let resume = cx.resume(from, &store, &self.resume)?;
        let run = cx.run_showing("Downloading", self.path.display());
        let began = Instant::now();
        let download = Download { id, path: self.path, resume };
        let Download { id, path, .. } = &download;
        let downloaded = async {
            let snapshot = run.unless_stopped(super::readable(&store, id)).await??;
            check_outside(path, from.directory().ok())?;
            if cx.dry_run {
                let (target, len) = (path.clone(), snapshot.image_len());
                blocking(move || Target::check(&target, len)).await?;
                let counted = Counted::of(&store, id).await?;
                let (blocks, path) = (counted.blocks, path.display());
                cx.note(format_args!("{blocks} blocks would be read, and written to {path}"));
                return Ok((snapshot, Finished { blocks, kept: 0, compared: 0, snapshot: None }));
            }
            run.progress.total(snapshot.volume_size.blocks().0.into());
            let (Destination { sink, journal, .. }, ending) =
                download.prepare(&snapshot, &run).await?;
            let source = Arc::new(SnapshotSource::new(store.clone(), snapshot.clone()));
            let finished = transfer_to(source, sink, journal, &run).await;
            Ok((snapshot, finished.map_err(|error| ending.explain(error))?))
        };
        let downloaded = downloaded.await.map_err(|error: Error| error.doing(doing));
        let (snapshot, Finished { blocks, kept, .. }) = downloaded?;
        let elapsed = began.elapsed();
        drop(run);
        if let Some(why) = &snapshot.state_message {
            cx.note(format_args!("{id} may be longer than what it was made from: {why}"));
        }
        tell_kept(cx, kept, "downloaded");
        cx.tell_cost(&store);
        Ok(Downloaded { snapshot, dry_run: cx.dry_run, blocks, elapsed })
    }
}

/// What to download, and where to. A file gets its name once it is whole. What ends it before leaves a part that the
/// same download goes on with, if there is a journal and the cause may go away.
#[derive(Debug)]
pub(super) struct Download {
    pub(super) id: SnapshotId,
    /// The file or device.
    pub(super) path: PathBuf,
    pub(super) resume: Resume,
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
    /// Opens the file or device, and its journal. Whatever an earlier run has left and cannot go on is removed. It,
    /// and what is said if not all of it is written.
    ///
    /// # Errors
    ///
    /// If it cannot be written, or another process is at it.
    pub(super) async fn prepare(
        &self,
        snapshot: &Snapshot,
        run: &Run,
    ) -> Result<(Destination, Ending)> {
        let ends = self.ends();
        let key = self.resume.journals.as_ref().map(|_| key(&ends));
        let sink = FileSink::open(&self.path, snapshot.image_len(), key).await?;
        let (journal, goes_on) = match self.journal(ends, snapshot).await {
            Ok(found) => found,
            Err(error) => {
                // What another process is at is its own.
                if sink.is_fresh() {
                    sink.abort().await;
                }
                return Err(error);
            }
        };
        if !goes_on {
            sink.clear().await?;
        }
        let left = match sink.partial() {
            Some(partial) => Left::Partial(partial),
            None => Left::Device(self.path.clone()),
        };
        let ending = Ending { journal: Arc::clone(&journal), left };
        let progress = Arc::clone(&run.progress);
        Ok((Destination { sink: Arc::new(sink), journal, progress }, ending))
    }

    fn ends(&self) -> Ends {
        let place = place(&self.path).unwrap_or_else(|| self.path.clone());
        let place = std::path::absolute(&place).unwrap_or(place);
        let from = format!("{} {}", self.resume.store, self.id);
        Ends { operation: "download".to_owned(), from, to: name_of(&place) }
    }

    /// The journal, and whether it is of an earlier run.
    async fn journal(&self, ends: Ends, snapshot: &Snapshot) -> Result<(Arc<dyn Journal>, bool)> {
        let Some((mut journal, found)) = super::journal(&self.resume, ends).await? else {
            return Ok((Arc::new(NoJournal), false));
        };
        let attempt = Attempt { len: snapshot.image_len(), started: snapshot.start_time };
        let goes_on = !self.resume.restart && found.as_ref() == Some(&attempt);
        if !goes_on {
            journal.begin(&attempt);
        }
        Ok((Arc::new(journal), goes_on))
    }
}

/// Where the file is or will be, without links.
pub(super) fn place(path: &Path) -> Option<PathBuf> {
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
