//! `--freeze`: the file system of an image stands still while the image is read.

use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use clap::Args;
use futures::stream::{self, BoxStream, StreamExt as _};

use self::watchdog::{End, Frozen, Watchdog};
use super::context::Context;
use super::{Error, Result};
use crate::model::{Block, BlockIndex};
use crate::mountinfo::{MountEntry, mount_at, mount_of};
use crate::store::{ListedBlock, StoreUrl};
use crate::transfer;
use crate::transfer::engine::Run;
use crate::transfer::source::{Change, Source};

mod watchdog;

/// How long it may be frozen at most, whatever is asked for.
const MOST: Duration = Duration::from_hours(24);

fn limit(text: &str) -> std::result::Result<humantime::Duration, String> {
    let limit = text.parse::<humantime::Duration>().map_err(|e| e.to_string())?;
    if limit.is_zero() || *limit > MOST {
        return Err("give a time up to 24h, as 10m".to_owned());
    }
    Ok(limit)
}

/// What is frozen, and for how long.
#[derive(Args, Debug)]
pub(super) struct FreezeArgs {
    /// Freeze the file system that is mounted there while FILE is read: whoever writes to it waits.
    /// Nothing of the upload itself may be written to it; `/` takes --suppress-writes. Not as a job
    #[arg(long = "freeze", value_name = "MOUNTPOINT")]
    point: Option<PathBuf>,
    /// Thaw it after this time in any case, and make no snapshot then
    #[arg(long, value_name = "TIME", default_value = "10m", requires = "point")]
    #[arg(value_parser = limit)]
    freeze_limit: humantime::Duration,
    #[arg(skip)]
    watchdog: Option<Watchdog>,
}

impl FreezeArgs {
    /// Whether anything is to be frozen.
    pub(super) fn is_wanted(&self) -> bool {
        self.point.is_some()
    }

    /// Starts the process that thaws in every case, which takes a process with one thread.
    ///
    /// # Errors
    ///
    /// If there is no such directory.
    pub(super) fn begin_alone(&mut self) -> Result<()> {
        let Some(point) = &self.point else { return Ok(()) };
        let start = || {
            let mut options = File::options();
            let file = options.read(true).custom_flags(libc::O_DIRECTORY).open(point)?;
            Watchdog::start(file, *self.freeze_limit)
        };
        let started = start().map_err(|e| Error::from(e).doing(freeze(point)))?;
        self.watchdog = Some(started);
        Ok(())
    }

    /// Refuses what would wait for itself: an upload that writes to what it has frozen.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`], with the cure.
    pub(super) fn check(&self, cx: &Context, journals: Option<&Path>) -> Result<()> {
        let (Some(point), Some(watchdog)) = (&self.point, &self.watchdog) else { return Ok(()) };
        let frozen = mount_of(watchdog.file())?;
        let refused = |why: String| Err(Error::Refused(why).doing(freeze(point)));
        let Some(frozen) = frozen.filter(|found| is_at(found, point)) else {
            return refused("it is no mount point: give the one of its file system".to_owned());
        };
        let root = mount_at(Path::new("/"))?;
        if root.is_some_and(|root| root.device == frozen.device) && journals.is_some() {
            return refused("the root is frozen only with --suppress-writes".to_owned());
        }
        for (what, is_there, cure) in written(cx, journals, &frozen) {
            if is_there? {
                return refused(format!("{what} would be written to it: {cure}"));
            }
        }
        if cx.dry_run {
            cx.note(format_args!("{} would be frozen meanwhile", point.display()));
        }
        Ok(())
    }

    /// Freezes it. The run of `cx` is given up if it is thawed before its time.
    ///
    /// # Errors
    ///
    /// If it cannot be frozen, or is frozen already.
    pub(super) async fn freeze(&mut self, cx: &Context) -> Result<Option<Arc<Frozen>>> {
        let (Some(point), Some(watchdog)) = (&self.point, self.watchdog.take()) else {
            return Ok(None);
        };
        let frozen = cx.run.unless_stopped(watchdog.freeze(point, &cx.run)).await?;
        let frozen = frozen.map_err(|error| why_not(error, point).doing(freeze(point)))?;
        cx.note(format_args!("{} is frozen, for {} at most", point.display(), self.freeze_limit));
        Ok(Some(Arc::new(frozen)))
    }
}

fn freeze(point: &Path) -> String {
    format!("freeze {}", point.display())
}

fn is_at(found: &MountEntry, point: &Path) -> bool {
    point.canonicalize().is_ok_and(|point| point == found.mount_point)
}

/// Why it was not frozen.
fn why_not(error: std::io::Error, point: &Path) -> Error {
    let why = match error.raw_os_error() {
        Some(libc::EBUSY) => format!(
            "it is frozen already; who has frozen it thaws it, or `fsfreeze -u {}`",
            point.display()
        ),
        Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL | libc::ENOSYS) => {
            "its file system is of a kind that cannot be frozen".to_owned()
        }
        Some(libc::EPERM | libc::EACCES) => "only root can do that".to_owned(),
        _ => return error.into(),
    };
    Error::Refused(why)
}

/// What an upload may write, whether that is in the mount that is frozen, and what is to be done then.
fn written(
    cx: &Context,
    journals: Option<&Path>,
    frozen: &MountEntry,
) -> Vec<(String, Result<bool>, &'static str)> {
    let is_on = |mount: std::io::Result<Option<MountEntry>>| -> Result<bool> {
        Ok(mount?.is_some_and(|mount| mount.device == frozen.device))
    };
    let mut all = Vec::new();
    if let Some(journals) = journals {
        let cure = "--suppress-writes keeps none, XDG_STATE_HOME names another place";
        all.push((
            format!("the journal in {}", journals.display()),
            is_on(mount_at(journals)),
            cure,
        ));
    }
    match &cx.house.from {
        StoreUrl::Directory(path) => {
            let cure = "give a store elsewhere";
            all.push((format!("the repository {}", path.display()), is_on(mount_at(path)), cure));
        }
        url @ (StoreUrl::Ebs(_) | StoreUrl::Bucket(_)) => {
            // Tokens of SSO are renewed there. Keys in the environment come first.
            let has_keys =
                url.profile().is_none() && std::env::var_os("AWS_ACCESS_KEY_ID").is_some();
            let home = std::env::var_os("HOME").filter(|_| !has_keys);
            let cache = home.map(|home| Path::new(&home).join(".aws/sso/cache"));
            if let Some(cache) = cache.filter(|cache| cache.exists()) {
                let what = format!("the credentials in {}", cache.display());
                let cure = "HOME names another place, AWS_CONFIG_FILE the configuration";
                all.push((what, is_on(mount_at(&cache)), cure));
            }
        }
        StoreUrl::Synth(_) => {}
    }
    let (stdout, stderr) = (std::io::stdout(), std::io::stderr());
    for (name, stream) in [("stdout", stdout.as_fd()), ("stderr", stderr.as_fd())] {
        if is_file(stream) {
            all.push((name.to_owned(), is_on(mount_of(stream)), "lead it elsewhere"));
        }
    }
    all
}

/// Whether what is written there is written to a disk.
fn is_file(stream: BorrowedFd<'_>) -> bool {
    use nix::sys::stat::{SFlag, fstat};
    fstat(stream).is_ok_and(|found| found.st_mode & libc::S_IFMT == SFlag::S_IFREG.bits())
}

/// How a run is given up if something is thawed before its time, and by nothing else more.
pub(super) fn run_of_its_own(run: &Run) -> Run {
    Run { cancel: run.cancel.child_token(), ..run.clone() }
}

impl Frozen {
    /// The source, which is read while this is frozen.
    pub(super) fn source(self: &Arc<Self>, source: Arc<dyn Source>) -> Arc<dyn Source> {
        Arc::new(FrozenSource { source, frozen: Arc::clone(self) })
    }

    /// Thaws it, and says what became of an upload: that it was thawed before its time is the cause of all else.
    pub(super) async fn end<T>(&self, cx: &Context, made: Result<T>) -> Result<T> {
        let (end, took) = self.thaw().await;
        match self.why(end) {
            Some(why) => made.map_err(|_| Error::Refused(why)),
            None => {
                cx.note(format_args!("it is thawed, after {:.1} s", took.as_secs_f64()));
                made
            }
        }
    }
}

/// A source whose file system is frozen until all was read.
#[derive(Debug)]
struct FrozenSource {
    source: Arc<dyn Source>,
    frozen: Arc<Frozen>,
}

#[async_trait]
impl Source for FrozenSource {
    fn changes(&self) -> BoxStream<'static, transfer::Result<Change>> {
        if self.frozen.is_over() {
            let why = "it was thawed, and would have to be read again".to_owned();
            return stream::iter([Err(lost(why))]).boxed();
        }
        self.source.changes()
    }

    async fn holes(&self, start: BlockIndex) -> transfer::Result<u64> {
        self.source.holes(start).await
    }

    fn run_len(&self) -> usize {
        self.source.run_len()
    }

    fn parallelism(&self) -> usize {
        self.source.parallelism()
    }

    async fn read(
        &self,
        blocks: &[(BlockIndex, Option<ListedBlock>)],
    ) -> transfer::Result<Vec<Block>> {
        self.source.read(blocks).await
    }

    fn is_read_again(&self) -> bool {
        self.source.is_read_again()
    }

    /// Thaws it; that it was thawed before is an error.
    async fn check(&self) -> transfer::Result<()> {
        self.source.check().await?;
        match self.frozen.thaw().await {
            (End::AsAsked, _) => Ok(()),
            (End::Stopped, _) => Err(transfer::Error::Stopped),
            (end, _) => Err(lost(self.frozen.why(end).unwrap_or_default())),
        }
    }
}

/// It does not go on after that.
fn lost(why: String) -> transfer::Error {
    transfer::Error::Unsuitable { path: "--freeze".to_owned(), why }
}
