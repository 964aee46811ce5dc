//! Where a mount logs to.

use std::fs::OpenOptions;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use tracing::Level;
use tracing_subscriber::EnvFilter;

use super::Error;
use crate::model::Digest;

/// A log that is larger when a mount begins becomes `<log>.old`, and a new one is begun.
const MAX_LOG: u64 = 16 << 20;

/// What is logged, unless `FSPFS_LOG` says otherwise (a filter of `tracing`). fuser warns of every request that
/// we do not know, and every program may send some (`ioctl`).
fn filter(level: Level) -> EnvFilter {
    let by_default = || EnvFilter::new(format!("{level},fuser=error"));
    EnvFilter::try_from_env("FSPFS_LOG").unwrap_or_else(|_| by_default())
}

/// Logs to stderr what is at least as important as `level`. A log that cannot be written, there or
/// in a file, is lost: saying so on stderr, which may be just as gone or full, would end the thread
/// that had something to say.
pub fn log_to_stderr(level: Level) {
    // Fails only if a log was set up already, and then there is one.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter(level))
        .with_target(false)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr)
        .log_internal_errors(false)
        .try_init();
}

/// As [`log_to_stderr`], from a thread of its own: nobody waits for whoever should read it and does
/// not. What does not fit into its buffer meanwhile is left out. Ends, with what is still to be
/// written, when the guard is dropped.
pub fn log_to_stderr_aside(level: Level) -> tracing_appender::non_blocking::WorkerGuard {
    let (writer, guard) = tracing_appender::non_blocking(std::io::stderr());
    // Fails only if a log was set up already, and then there is one.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter(level))
        .with_target(false)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(writer)
        .log_internal_errors(false)
        .try_init();
    guard
}

fn open(file: &Path) -> Result<std::fs::File, Error> {
    let failed = |e| {
        let what = format!("cannot log to {}; XDG_STATE_HOME says where", file.display());
        Error::Io(what, e)
    };
    if let Some(directory) = file.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    }
    if file.metadata().is_ok_and(|found| found.len() > MAX_LOG) {
        let mut old = file.as_os_str().to_owned();
        old.push(".old");
        std::fs::rename(file, old).map_err(failed)?;
    }
    OpenOptions::new().create(true).append(true).mode(0o600).open(file).map_err(failed)
}

/// Logs to `file` from now on what is at least as important as `level`.
///
/// # Errors
///
/// If the file cannot be made, or written.
pub fn log_to_file(file: &Path, level: Level) -> Result<(), Error> {
    let writer = std::sync::Mutex::new(open(file)?);
    // Fails only if a log was set up already, and then there is one.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter(level))
        .with_target(false)
        .with_ansi(false)
        .with_writer(writer)
        .log_internal_errors(false)
        .try_init();
    Ok(())
}

/// Sends what else goes to stderr, a panic say, to the log too.
///
/// # Errors
///
/// If the file cannot be written.
pub fn stderr_to_file(file: &Path) -> Result<(), Error> {
    let failed =
        |e: nix::Error| Error::Io(format!("cannot send stderr to {}", file.display()), e.into());
    nix::unistd::dup2_stderr(open(file)?).map_err(failed)
}

/// Bytes of a name from which on it is cut, and told apart by a digest: no file name has more than 255.
const MAX_NAME: usize = 200;

/// The file that the mount at `mount_point` logs to:
/// `$XDG_STATE_HOME/fspfs/log/<mount point>.log`, for root by default below `/var/lib`. In it, `-` is for
/// each slash and `\x2d` for each `-`.
pub fn log_file(mount_point: &Path) -> PathBuf {
    let path = mount_point.display().to_string();
    // As systemd names the unit of a mount point, so that no two have the same.
    let name = path.trim_matches('/').replace('\\', r"\x5c").replace('-', r"\x2d");
    let mut name = name.replace('/', "-");
    if name.len() > MAX_NAME || mount_point.to_str().is_none() {
        let digest = Digest::of(mount_point.as_os_str().as_bytes()).to_hex();
        name.truncate(name.floor_char_boundary(MAX_NAME));
        name = format!("{name}-{}", &digest[..16]);
    }
    state_directory().join("log").join(format!("{name}.log"))
}

/// Where we keep what must survive: `$XDG_STATE_HOME/fspfs`.
pub(crate) fn state_directory() -> PathBuf {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let state = absolute("XDG_STATE_HOME").unwrap_or_else(|| match absolute("HOME") {
        Some(home) if !nix::unistd::geteuid().is_root() => home.join(".local/state"),
        _ => PathBuf::from("/var/lib"),
    });
    state.join("fspfs")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_mount_points_have_one_log() {
        let places = ["/a/b", "/a-b", r"/a\x2db", "/a--b", "/a/-b"];
        let logs: std::collections::HashSet<_> =
            places.iter().map(|place| log_file(Path::new(place))).collect();
        assert_eq!(logs.len(), places.len(), "{logs:?}");
        let long = "/a-é".repeat(100);
        let log = log_file(Path::new(&long));
        assert!(log.file_name().unwrap().len() < 255);
        assert_ne!(log, log_file(Path::new(&format!("{long}x"))));
    }
}
