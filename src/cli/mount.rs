//! `mount` and `umount`.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::output::tell;
use super::run::{Exit, log_level, store_options, store_url};
use super::{CommitWhen, EncryptedHoles, Global, MountArgs, WritingArgs};
use crate::image::working::Settings;
use crate::mount::{self, Access, Options};
use crate::store::{self, StoreOptions};
use crate::tree::Ownership;

/// Threads that may wait for a disk at the same time. Each may hold a compressed block.
const WAITING_THREADS: usize = 48;

pub(super) fn mount(global: &Global, args: &MountArgs) -> anyhow::Result<Exit> {
    let url = store_url(global).absolute()?;
    let mount_point = std::path::absolute(&args.mount_point)?;
    if let Err(why) = settings(&args.writing).check() {
        anyhow::bail!("cannot mount at {}: {why}", mount_point.display());
    }
    if args.foreground || args.daemon {
        return serve(global, &url, args, &mount_point);
    }
    let log = mount::log_file(&mount_point);
    let ended = mount::start(
        &daemon_arguments(global, &url.to_string(), args, &mount_point),
        &mount_point,
    )?;
    match ended {
        None => {
            writeln!(std::io::stdout(), "{url} is mounted at {}", mount_point.display())?;
            if !global.quiet {
                tell(format_args!("the log is {}", log.display()));
            }
            Ok(Exit::Done)
        }
        // It has said why on stderr.
        Some(status) => Ok(Exit::from_code(status.code())),
    }
}

/// The command line of the process in the background.
fn daemon_arguments(
    global: &Global,
    url: &str,
    args: &MountArgs,
    mount_point: &Path,
) -> Vec<OsString> {
    let mut line: Vec<OsString> = ["mount", "--daemon", "--store", url].map(OsString::from).into();
    let mut add = |name: &str, value: String| line.push(format!("--{name}={value}").into());
    add("memory", args.memory.to_string());
    add("refresh", args.refresh.to_string());
    if let Some(uid) = args.uid {
        add("uid", uid.to_string());
    }
    if let Some(gid) = args.gid {
        add("gid", gid.to_string());
    }
    if let Some(mode) = args.file_mode {
        add("file-mode", format!("{mode:o}"));
    }
    let writing = &args.writing;
    // From here on it has another working directory.
    if let Some(staging) = &writing.staging {
        add(
            "staging",
            std::path::absolute(staging).unwrap_or_else(|_| staging.clone()).display().to_string(),
        );
    }
    if let Some(limit) = writing.staging_limit {
        add("staging-limit", limit.to_string());
    }
    add("commit", if writing.commit == CommitWhen::Close { "close" } else { "manual" }.to_owned());
    let write = writing.encrypted_holes == EncryptedHoles::Write;
    add("encrypted-holes", if write { "write" } else { "skip" }.to_owned());
    if let Some(description) = &writing.description {
        add("description", description.clone());
    }
    for (key, value) in &writing.tags {
        add("tag", format!("{key}={value}"));
    }
    if let Some(key) = &writing.kms_key_id {
        add("kms-key-id", key.clone());
    }
    if let Some(n) = global.max_requests_per_second {
        add("max-requests-per-second", n.to_string());
    }
    if let Some(n) = global.max_in_flight {
        add("max-in-flight", n.to_string());
    }
    for owner in &args.scope.owners {
        add("owner", owner.clone());
    }
    for filter in &args.scope.filters {
        add("filter", filter.to_string());
    }
    let flags = [
        (args.allow_other, "--allow-other"),
        (args.allow_root, "--allow-root"),
        (writing.read_only, "--read-only"),
        (writing.full_copy, "--full-copy"),
        (writing.encrypted, "--encrypted"),
    ];
    line.extend(flags.into_iter().filter(|(given, _)| *given).map(|(_, flag)| flag.into()));
    line.extend((0..global.verbose).map(|_| "-v".into()));
    line.push("--".into());
    line.push(mount_point.into());
    line
}

fn serve(
    global: &Global,
    url: &crate::store::StoreUrl,
    args: &MountArgs,
    mount_point: &Path,
) -> anyhow::Result<Exit> {
    let log = mount::log_file(mount_point);
    let level = if global.verbose == 0 { tracing::Level::INFO } else { log_level(global) };
    if args.foreground {
        mount::log_to_stderr(level);
    } else {
        mount::log_to_file(&log, level)?;
        nix::unistd::setsid()?;
        std::env::set_current_dir("/")?;
    }
    let workers = std::thread::available_parallelism().map_or(2, usize::from).max(2);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(WAITING_THREADS)
        .enable_all()
        .build()?;
    let of_store = StoreOptions {
        // Most of what a commit may take of the budget.
        max_unsaved: Some(args.memory.0 / 2),
        ..store_options(global, Some(&args.scope))
    };
    let store = runtime.block_on(store::open(url, &of_store))?;
    let options = options(args, mount_point.to_owned());
    let ready = || {
        if args.daemon {
            // Until now the user saw there what went wrong.
            if let Err(error) = mount::stderr_to_file(&log) {
                tracing::warn!("{error}");
            }
            announce();
        } else {
            // Whoever waits for this line may have gone away.
            let _ = writeln!(std::io::stdout(), "{url} is mounted at {}", mount_point.display());
        }
    };
    let served = mount::serve(&runtime, url, store, &options, ready);
    // Threads that wait for a store that does not answer must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    served.map(|()| Exit::Done)
}

/// Tells the process that the user started that the mount is there, and lets it go.
fn announce() {
    let mut stdout = std::io::stdout();
    if writeln!(stdout, "{}", mount::READY).and_then(|()| stdout.flush()).is_err() {
        // Whoever asked for it has been ended, and knows of no mount.
        tracing::warn!("nobody waits for this mount any more");
        let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGTERM);
    }
    if let Ok(null) = std::fs::OpenOptions::new().write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdout(null);
    }
}

fn options(args: &MountArgs, mount_point: PathBuf) -> Options {
    let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    let access = match (args.allow_other, args.allow_root) {
        (true, _) => Access::All,
        (false, true) => Access::Root,
        (false, false) => Access::Owner,
    };
    let by_default = if access == Access::All { 0o444 } else { 0o400 };
    Options {
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
        writing: (!args.writing.read_only).then(|| writing(&args.writing)),
    }
}

fn writing(args: &WritingArgs) -> mount::Writing {
    mount::Writing {
        staging: args.staging.clone(),
        limit: args.staging_limit.unwrap_or(u64::MAX),
        settings: settings(args),
    }
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
        ..Settings::default()
    }
}
