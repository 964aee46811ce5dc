//! Mounting: the session with the kernel, from the mount to the last unmount.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fuser::{Config, Session, SessionACL};
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cache::Cache;
use crate::fuse::Adapter;
use crate::image::staging::{Kept, Staging, Unusable};
use crate::image::working::{Settings, Workshop};
use crate::ops::context::House;
use crate::store::wrap::Count;
use crate::store::{SharedStore, StoreUrl};
use crate::tree::{self, Ownership, Tree};

mod attach;
mod background;
mod holders;
mod log;
mod point;
mod table;

use attach::unmount_entry;
pub use attach::{Access, unmount};
pub(crate) use attach::{Place, look_at};
pub use background::{READY, daemon_place, is_daemon, start};
pub use holders::Holder;
pub(crate) use log::state_directory;
pub use log::{
    log_file, log_mount_to_stderr, log_to_file, log_to_stderr, log_to_stderr_aside, stderr_to_file,
};
pub(crate) use table::read_ahead;
pub use table::{MountEntry, is_served_by, mounted_elsewhere, our_mount, our_mounts, resolve};

/// Longest time that the first list of snapshots is waited for. After it the mount is made all the
/// same, and shows what is listed by and by.
const FIRST_LIST: Duration = Duration::from_secs(20);

/// Threads that serve the kernel, at most, with that which waits for them.
pub(crate) const THREADS: usize = 5;

/// Read-ahead of the kernel for the mount in KiB. The kernel's own 128 KiB would keep less than one
/// block on its way.
pub(crate) const READ_AHEAD_KIB: u32 = 4096;

/// What can go wrong with a mount itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The mount point cannot be used.
    #[error("cannot mount at {path}: {why}")]
    MountPoint {
        /// The mount point.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        why: String,
    },
    /// Nothing of ours is mounted there.
    #[error("{0} is not the mount point of an fspfs mount{1}", path.display(), others(mounts))]
    NotMounted {
        /// What was given.
        path: PathBuf,
        /// Where fspfs is mounted.
        mounts: Vec<PathBuf>,
    },
    /// A file is in no mount of ours.
    #[error("{} is not in a mount of fspfs{}", path.display(), others(mounts))]
    NotInside {
        /// What was given.
        path: PathBuf,
        /// Where fspfs is mounted.
        mounts: Vec<PathBuf>,
    },
    /// Something still uses the mount.
    #[error("{} is in use{}", path.display(), holders::list(holders))]
    Busy {
        /// The mount point.
        path: PathBuf,
        /// Who uses it, as far as can be told.
        holders: Vec<Holder>,
    },
    /// The system cannot mount or unmount.
    #[error("cannot {doing} {}: {why}", path.display())]
    System {
        /// `mount` or `unmount`
        doing: &'static str,
        /// The mount point.
        path: PathBuf,
        /// What is missing, and what to do.
        why: String,
    },
    /// The staging directory is where it would stage itself, or where others do not expect it.
    #[error("cannot stage in {}: it is inside {what}", path.display())]
    StagingInside {
        /// The staging directory.
        path: PathBuf,
        /// What it is in.
        what: &'static str,
    },
    /// The staging directory cannot be used.
    #[error(transparent)]
    Staging(#[from] Unusable),
    /// The snapshots cannot be listed.
    #[error(transparent)]
    List(#[from] tree::Error),
    /// The thread that serves the kernel has panicked.
    #[error("the session with the kernel died")]
    SessionDied,
    /// Anything else.
    #[error("{0}: {1}")]
    Io(String, io::Error),
}

fn others(mounts: &[PathBuf]) -> String {
    if mounts.is_empty() {
        return "; there is none at all".to_owned();
    }
    let mounts: Vec<_> = mounts.iter().map(|path| path.display().to_string()).collect();
    format!("; there is one at {}", mounts.join(", "))
}

/// How to mount.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where.
    pub mount_point: PathBuf,
    /// Who may use it.
    pub access: Access,
    /// Whose the files seem to be.
    pub ownership: Ownership,
    /// The budget of memory in bytes.
    pub memory: usize,
    /// How often the snapshots are listed anew.
    pub refresh: Duration,
    /// What can be written, and how; `None` for a mount that is only read. Without effect if the
    /// store can only be read.
    pub writing: Option<Writing>,
}

/// How working images are kept and committed.
#[derive(Clone, Debug)]
pub struct Writing {
    /// Where they are staged; by default, a directory of our own.
    pub staging: Option<PathBuf>,
    /// Bytes that may be staged.
    pub limit: u64,
    /// What their snapshots are like.
    pub settings: Settings,
}

/// Mounts the store of `house` and serves it until it is unmounted. `ready` runs as soon as the mount is there.
///
/// SIGINT and SIGTERM unmount; a second one gives up on those who still use the mount. SIGHUP lists
/// the snapshots anew, and opens the log anew.
///
/// # Errors
///
/// If it cannot be mounted, or the session with the kernel breaks.
pub(crate) fn serve(
    runtime: &Runtime,
    mut house: House,
    store: SharedStore,
    options: &Options,
    ready: impl FnOnce(),
) -> Result<(), Error> {
    let count = Count::new(store);
    let counters = count.counters();
    let store: SharedStore = Arc::new(count);
    house.opened = Some(Arc::clone(&store));
    house
        .closed
        .push((options.mount_point.clone(), "it is in this mount, whose process cannot use it"));
    let url = &house.from.clone();
    let cache = Cache::of_store(options.memory, &store);
    let tree = Tree::new(Arc::clone(&store), Some(counters), Arc::clone(&cache), options.ownership);
    let tree = tree.with_history(&state_directory().join("jobs"), &identity(url, &store));
    let mut memory = crate::image::working::memory(&cache);
    let writing = options.writing.as_ref().filter(|_| url.is_writable_here());
    if options.writing.is_some() && writing.is_none() {
        tracing::info!("{url} can only be read: new/ is read-only");
    }
    let tree = match writing {
        Some(writing) => match staging(url, &store, &options.mount_point, writing)? {
            Some(staging) => {
                house.closed.push((staging.path().to_owned(), "the mount stages there"));
                let shop = Workshop::new(store, cache, staging, patient(&writing.settings));
                memory = shop.memory().clone();
                runtime.block_on(tree.with_new(shop))
            }
            None => tree,
        },
        None => tree,
    };
    let tree = Arc::new(tree.with_house(house, memory));
    runtime.block_on(async {
        match tokio::time::timeout(FIRST_LIST, tree.refresh()).await {
            Ok(listed) => listed,
            Err(_) => {
                tracing::warn!("listing the snapshots takes long; mounting without the list");
                Ok(())
            }
        }
    })?;
    // Before anybody can know that there is a mount to be ended.
    let signals = runtime.block_on(async { Signals::new() })?;
    let mount = attach::attach(&options.mount_point, url, options.access)?;
    let threads = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, THREADS - 1);
    let adapter = Adapter::new(Arc::clone(&tree), runtime.handle().clone(), threads);
    let session = handshake(adapter, mount.device, options.access, threads)?;
    let (ended, end) = tokio::sync::oneshot::channel();
    let session = std::thread::Builder::new()
        .name("fuse".to_owned())
        .spawn(move || {
            let result = session.run();
            // The receiver is gone only if the runtime is, and then nobody wants to know.
            let _ = ended.send(());
            result
        })
        .map_err(|e| Error::Io("cannot start a thread".to_owned(), e))?;
    table::set_read_ahead(&mount.entry, READ_AHEAD_KIB);
    tracing::info!("{url} is mounted at {}", options.mount_point.display());
    ready();
    runtime.block_on(attend(Arc::clone(&tree), options, &mount.entry, end, signals))?;
    if session.is_finished() {
        match session.join() {
            Ok(result) => {
                result.map_err(|e| Error::Io("the session with the kernel broke".to_owned(), e))?;
            }
            Err(_) => return Err(Error::SessionDied),
        }
    }
    log::settle(true);
    tracing::info!("{} is unmounted", options.mount_point.display());
    Ok(())
}

/// What tells a store from others, also those that its URL leads to at another time.
fn identity(url: &StoreUrl, store: &SharedStore) -> String {
    match (store.place(), url) {
        (place, _) if place.is_empty() => url.to_string(),
        (place, url) if url.is_repository() => place,
        (place, _) => format!("{url} ({place})"),
    }
}

/// The staging directory. One that nobody asked for is done without, if it cannot be had.
fn staging(
    url: &StoreUrl,
    store: &SharedStore,
    mount_point: &Path,
    writing: &Writing,
) -> Result<Option<Staging>, Error> {
    let store = identity(url, store);
    if let Some(path) = &writing.staging {
        let inside = |what| Err(Error::StagingInside { path: path.clone(), what });
        let at = path.canonicalize().unwrap_or_else(|_| path.clone());
        let mut mounts = our_mounts()?.into_iter().map(|entry| entry.mount_point);
        if at.starts_with(mount_point) || mounts.any(|mount| at.starts_with(mount)) {
            return inside("a mount of fspfs itself");
        }
        if let StoreUrl::Directory(repository) = url
            && let Ok(repository) = repository.canonicalize()
            // It may not be there yet.
            && let Some(above) = at.ancestors().find_map(|above| above.canonicalize().ok())
            && above.starts_with(repository)
        {
            return inside("the repository");
        }
        let staging = Staging::open(path, &store, writing.limit)?;
        staging.note_url(url);
        return Ok(Some(staging));
    }
    match Staging::open_default(&staging_root(), &store, writing.limit) {
        Ok(staging) => {
            staging.note_url(url);
            Ok(Some(staging))
        }
        Err(error) => {
            tracing::warn!("nothing can be written under new/: {error}");
            Ok(None)
        }
    }
}

/// Where the staging directories are that nobody has named.
pub(crate) fn staging_root() -> PathBuf {
    log::state_directory().join("staging")
}

/// What is staged for stores that this one may be taken for, in words: those that its URL led to before, or EBS with
/// other credentials.
pub(crate) fn staged_for_others(url: &StoreUrl, store: &SharedStore) -> Vec<String> {
    let store = identity(url, store);
    let is_alike = |kept: &Kept| match url {
        StoreUrl::Ebs(_) => kept.store.starts_with("ebs:"),
        _ => kept.url.as_ref() == Some(&url.to_string()),
    };
    let kept = Staging::kept(&staging_root()).into_iter();
    let others = kept.filter(|kept| kept.store != store && is_alike(kept));
    others.map(|kept| format!("{kept}: not shown here, but when that one is mounted")).collect()
}

/// Whether the kernel ends requests that take long.
pub(crate) fn requests_are_timed() -> bool {
    let limit = |name: &str| {
        let value = std::fs::read_to_string(format!("/proc/sys/fs/fuse/{name}"));
        value.ok().and_then(|value| value.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    ["default_request_timeout", "max_request_timeout"].map(limit) != [0, 0]
}

/// Where the kernel ends requests that take long, commits run in the background.
fn patient(settings: &Settings) -> Settings {
    let in_background = requests_are_timed();
    if in_background {
        tracing::warn!(
            "the kernel ends requests that take long: close() does not wait for commits"
        );
    }
    Settings { in_background, ..settings.clone() }
}

fn handshake(
    adapter: Adapter,
    device: std::os::fd::OwnedFd,
    access: Access,
    threads: usize,
) -> Result<Session<Adapter>, Error> {
    let mut config = Config::default();
    config.n_threads = Some(threads);
    let acl = match access {
        Access::Owner => SessionACL::Owner,
        Access::Root => SessionACL::RootAndOwner,
        Access::All => SessionACL::All,
    };
    config.acl = acl;
    Session::from_fd(adapter, device, acl, config)
        .map_err(|e| Error::Io("the kernel does not speak with us over /dev/fuse".to_owned(), e))
}

/// The signals that a mount obeys.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> Result<Self, Error> {
        let catch =
            |kind| signal(kind).map_err(|e| Error::Io("cannot wait for signals".to_owned(), e));
        Ok(Self {
            interrupt: catch(SignalKind::interrupt())?,
            terminate: catch(SignalKind::terminate())?,
            hangup: catch(SignalKind::hangup())?,
        })
    }
}

/// Waits for the end of the session; meanwhile keeps the list fresh and obeys signals.
async fn attend(
    tree: Arc<Tree>,
    options: &Options,
    mount: &MountEntry,
    mut end: tokio::sync::oneshot::Receiver<()>,
    signals: Signals,
) -> Result<(), Error> {
    let Signals { mut interrupt, mut terminate, mut hangup } = signals;
    let mut timer = tokio::time::interval(options.refresh.max(Duration::from_secs(1)));
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    timer.tick().await;
    let mut asked = false;
    loop {
        let signalled = tokio::select! {
            _ = &mut end => break,
            _ = interrupt.recv() => "SIGINT",
            _ = terminate.recv() => "SIGTERM",
            _ = hangup.recv() => { log::open_anew(); refresh(&tree); continue }
            _ = timer.tick() => { log::settle(false); refresh(&tree); continue }
        };
        if asked {
            tracing::warn!("{signalled} again: leaving those who still use the mount alone");
            return Ok(());
        }
        asked = true;
        tracing::info!("{signalled}: unmounting");
        tell_commits(&tree);
        tokio::select! {
            () = tree.commits_done() => leave(mount),
            _ = &mut end => break,
            _ = interrupt.recv() => {
                detach(mount);
                return given_up();
            }
            _ = terminate.recv() => {
                detach(mount);
                return given_up();
            }
        }
    }
    // What programs closed while it was unmounted is committed now.
    tree.release_all();
    tell_commits(&tree);
    tokio::select! {
        () = tree.commits_done() => {}
        _ = interrupt.recv() => return given_up(),
        _ = terminate.recv() => return given_up(),
    }
    tree.close_new().await;
    Ok(())
}

fn tell_commits(tree: &Tree) {
    for name in tree.commits_under_way() {
        tracing::info!("waiting for the commit of new/{name}");
    }
}

#[expect(clippy::unnecessary_wraps, reason = "it ends `attend`, which can fail")]
fn given_up() -> Result<(), Error> {
    tracing::warn!("a second signal: commits go on at the next mount");
    Ok(())
}

fn refresh(tree: &Arc<Tree>) {
    let tree = Arc::clone(tree);
    tokio::spawn(async move {
        if let Err(error) = tree.refresh().await {
            tracing::warn!("cannot list the snapshots: {error}");
        }
    });
}

/// Unmounts; if the mount is in use, says by whom, and takes it out of sight until they are done.
fn leave(mount: &MountEntry) {
    match table::now(mount).and_then(|mount| unmount_entry(&mount, false)) {
        Ok(()) => {}
        Err(busy @ Error::Busy { .. }) => {
            tracing::warn!("{busy}");
            tracing::warn!("it is served until they are done; a second signal ends it at once");
            detach(mount);
        }
        Err(error) => tracing::error!("{error}"),
    }
}

/// Takes the mount out of sight, whoever uses it.
fn detach(mount: &MountEntry) {
    if let Err(error) = table::now(mount).and_then(|mount| unmount_entry(&mount, true)) {
        tracing::error!("{error}");
    }
}
