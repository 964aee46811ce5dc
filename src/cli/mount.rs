//! `mount` and `umount`.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::output::{print, tell};
use super::run::{log_level, store_options, store_url};
use super::{CheckImages, CommitParent, CommitWhen, Global, MountArgs, WritingArgs};
use crate::arguments::EncryptedHoles;
use crate::image::working::Settings;
use crate::mount::{self, Access, Options};
use crate::ops::Exit;
use crate::ops::context::House;
use crate::store::{StoreOptions, Stores};
use crate::threads;
use crate::tree::Ownership;

/// Threads that may wait for a disk at the same time. Each may hold a compressed block.
const WAITING_THREADS: usize = 48;

pub(super) fn mount(global: &Global, args: &MountArgs) -> anyhow::Result<Exit> {
    let url = store_url(global).absolute()?;
    // One that leads elsewhere is known by where it leads.
    let mount_point = mount::daemon_place().unwrap_or_else(|| mount::resolve(&args.mount_point));
    if let Err(why) = settings(&args.writing).check() {
        anyhow::bail!("cannot mount at {}: {why}", mount_point.display());
    }
    if args.foreground || mount::is_daemon() {
        return serve(global, &url, args, &mount_point);
    }
    let log = mount::log_file(&mount_point);
    match mount::start(&arguments(args, &mount_point), &mount_point)? {
        None => {
            print(format_args!("{url} is mounted at {}", mount_point.display()))?;
            if !global.screen.quiet {
                tell(format_args!("the log is {}", log.display()));
            }
            Ok(Exit::Done)
        }
        // It has said why on stderr.
        Some(status) => Ok(Exit::from_code(status.code())),
    }
}

/// The arguments of this program, with the mount point as `ps` should show it.
fn arguments(args: &MountArgs, mount_point: &Path) -> Vec<OsString> {
    let mut arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let mut given = arguments.iter_mut().filter(|argument| **argument == args.mount_point);
    // One that looks like it may be the value of an option.
    if let (Some(given), None) = (given.next(), given.next()) {
        *given = mount_point.into();
    }
    arguments
}

fn serve(
    global: &Global,
    url: &crate::store::StoreUrl,
    args: &MountArgs,
    mount_point: &Path,
) -> anyhow::Result<Exit> {
    let log = mount::log_file(mount_point);
    let options = options(args, mount_point.to_owned())?;
    let level = if global.screen.verbose == 0 { tracing::Level::INFO } else { log_level(global) };
    if args.foreground {
        mount::log_mount_to_stderr(level);
    } else {
        mount::log_to_file(&log, level)?;
        nix::unistd::setsid()?;
        std::env::set_current_dir("/")?;
    }
    let runtime = threads::runtime(Some(WAITING_THREADS), mount::THREADS)?;
    let of_store = StoreOptions {
        // Most of what a commit may take of the budget.
        max_unsaved: Some(args.memory.0 / 2),
        ..store_options(global, Some(&args.scope))
    };
    let stores = Arc::new(Stores::default());
    let store = runtime.block_on(stores.open(url, &of_store))?;
    let waiting = mount::staged_for_others(url, &store);
    for told in &waiting {
        tracing::warn!("{told}");
    }
    if mount::is_daemon() && !global.screen.quiet {
        // The log says so, too, and nobody reads it before something is wrong.
        waiting.iter().for_each(tell);
        if options.writing.is_some() && !url.is_writable_here() {
            tell(format_args!("{url} can only be read: new/ is read-only"));
        }
    }
    let house = House {
        stores,
        from: url.clone(),
        options: of_store,
        opened: None,
        journals: Some(mount::state_directory().join("transfers")),
        closed: url
            .directory()
            .map(|at| (at.to_owned(), "it is the store itself"))
            .into_iter()
            .collect(),
        absolute: true,
    };
    let ready = || {
        if mount::is_daemon() {
            // Until now the user saw there what went wrong.
            if let Err(error) = mount::stderr_to_file(&log) {
                tracing::warn!("{error}");
                to_nowhere(nix::unistd::dup2_stderr);
            }
            announce();
        } else {
            // Whoever waits for this line may have gone away.
            let _ = print(format_args!("{url} is mounted at {}", mount_point.display()));
        }
    };
    let served = mount::serve(&runtime, house, store, &options, ready);
    // Threads that wait for a store that does not answer must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    served?;
    Ok(Exit::Done)
}

/// Tells the process that the user started that the mount is there, and lets it go.
fn announce() {
    let mut stdout = std::io::stdout();
    if writeln!(stdout, "{}", mount::READY).and_then(|()| stdout.flush()).is_err() {
        // Whoever asked for it has been ended, and knows of no mount.
        tracing::warn!("nobody waits for this mount any more");
        let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGTERM);
    }
    to_nowhere(nix::unistd::dup2_stdout);
}

/// Leads a descriptor to `/dev/null`, as far as there is one.
fn to_nowhere(lead: impl FnOnce(std::fs::File) -> nix::Result<()>) {
    if let Ok(null) = std::fs::OpenOptions::new().write(true).open("/dev/null") {
        let _ = lead(null);
    }
}

/// How to mount. Paths are absolute: a daemon runs in another directory.
fn options(args: &MountArgs, mount_point: PathBuf) -> std::io::Result<Options> {
    let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    let access = match (args.allow_other, args.allow_root) {
        (true, _) => Access::All,
        (false, true) => Access::Root,
        (false, false) => Access::Owner,
    };
    let by_default = if access == Access::All { 0o444 } else { 0o400 };
    let staging = args.writing.staging.as_ref().map(std::path::absolute).transpose()?;
    let writing = mount::Writing {
        staging,
        limit: args.writing.staging_limit.unwrap_or(u64::MAX),
        settings: settings(&args.writing),
    };
    Ok(Options {
        mount_point,
        access,
        ownership: Ownership {
            uid: args.uid.unwrap_or(uid),
            gid: args.gid.unwrap_or(gid),
            file_mode: args.file_mode.unwrap_or(by_default),
            daemon_uid: uid,
            daemon_gid: gid,
        },
        memory: args.memory.0,
        refresh: Duration::from_secs(args.refresh.into()),
        writing: (!args.writing.read_only).then_some(writing),
    })
}

fn settings(args: &WritingArgs) -> Settings {
    Settings {
        commit_at_close: args.commit == CommitWhen::Close,
        full_copy: args.full_copy,
        encrypted_holes: args.encrypted_holes == EncryptedHoles::Write,
        description: args.description.clone(),
        tags: args.tags.iter().cloned().collect(),
        encrypted: args.encrypted,
        kms_key: args.kms_key_id.clone(),
        check_images: args.check_images == CheckImages::On,
        parent_auto: args.parent == CommitParent::Auto,
        ..Settings::default()
    }
}
