//! Where a mount logs to.

use std::fmt;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tracing::Level;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use self::file::LogFile;
use self::repeats::Repeats;
use super::Error;
use crate::model::Digest;
use crate::shown::Shown;

mod file;
mod repeats;

/// A log that is larger becomes `<log>.old`, and a new one is begun.
const MAX_LOG: u64 = 16 << 20;

/// What is logged, unless `FSPFS_LOG` says otherwise (a filter of `tracing`). fuser warns of every request that
/// we do not know, and every program may send some (`ioctl`).
fn filter(level: impl fmt::Display) -> EnvFilter {
    let by_default = || EnvFilter::new(format!("{level},fuser=error"));
    EnvFilter::try_from_env("FSPFS_LOG").unwrap_or_else(|_| by_default())
}

/// Logs to stderr, by `writer`, what is at least as important as `level`, which may be a filter too. A log
/// that cannot be written, there or in a file, is lost: saying so on stderr, which may be just as gone or
/// full, would end the thread that had something to say.
pub fn log_to_stderr<W>(level: impl fmt::Display, writer: W)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    // Fails only if a log was set up already, and then there is one.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter(level))
        .with_target(false)
        .with_ansi(false)
        .with_writer(writer)
        .log_internal_errors(false)
        .try_init();
}

/// As [`log_to_stderr`], from a thread of its own: nobody waits for whoever should read it and does
/// not. What does not fit into its buffer meanwhile is left out. Ends, with what is still to be
/// written, when the guard is dropped.
///
/// # Errors
///
/// If the system makes no thread.
pub fn log_to_stderr_aside(
    level: Level,
) -> io::Result<tracing_appender::non_blocking::WorkerGuard> {
    crate::threads::can_start(1)?;
    let (writer, guard) = tracing_appender::non_blocking(Shown(std::io::stderr()));
    // Fails only if a log was set up already, and then there is one.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter(level))
        .with_target(false)
        .with_ansi(false)
        .with_writer(writer)
        .log_internal_errors(false)
        .try_init();
    Ok(guard)
}

/// What a mount logs to, once it does.
static LOG: Mutex<Option<Repeats<Shown<Sink>>>> = Mutex::new(None);

fn log() -> MutexGuard<'static, Option<Repeats<Shown<Sink>>>> {
    LOG.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the log of a mount goes.
#[derive(Debug)]
enum Sink {
    Stderr,
    File(LogFile),
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Stderr => io::stderr().write(bytes),
            Self::File(file) => file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Stderr => io::stderr().flush(),
            Self::File(file) => file.flush(),
        }
    }
}

/// Writes to [`LOG`].
struct ToLog;

impl Write for ToLog {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        log().as_mut().map_or(Ok(line.len()), |log| log.write(line))
    }

    fn flush(&mut self) -> io::Result<()> {
        log().as_mut().map_or(Ok(()), Write::flush)
    }
}

fn log_to(sink: Sink, level: Level) {
    *log() = Some(Repeats::new(Shown(sink)));
    // Fails only if a log was set up already, and then there is one.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter(level))
        .with_target(false)
        .with_ansi(false)
        .with_writer(|| ToLog)
        .log_internal_errors(false)
        .try_init();
}

/// Logs a mount in the foreground on stderr from now on.
pub fn log_mount_to_stderr(level: Level) {
    log_to(Sink::Stderr, level);
}

/// Logs to `file` from now on what is at least as important as `level`.
///
/// # Errors
///
/// If the file cannot be made, or written.
pub fn log_to_file(file: &Path, level: Level) -> Result<(), Error> {
    let opened = LogFile::open(file, MAX_LOG).map_err(|e| unwritable(file, e))?;
    log_to(Sink::File(opened), level);
    Ok(())
}

/// Sends what else goes to stderr, a panic say, to the log too.
///
/// # Errors
///
/// If the file cannot be written.
pub fn stderr_to_file(file: &Path) -> Result<(), Error> {
    match log().as_mut().map(|log| &mut log.inner().0) {
        Some(Sink::File(log)) => log.take_stderr().map_err(|e| unwritable(file, e)),
        _ => Ok(()),
    }
}

/// Begins to write the log by its name again: somebody may have moved it away.
pub(super) fn open_anew() {
    let opened = match log().as_mut().map(|log| &mut log.inner().0) {
        Some(Sink::File(log)) => log.open_anew(),
        _ => Ok(()),
    };
    if let Err(error) = opened {
        tracing::warn!("the log cannot be opened anew: {error}");
    }
}

/// Writes how often lines have come again, of those that are no longer counted, or of all.
pub(super) fn settle(all: bool) {
    if let Some(log) = log().as_mut() {
        // A log that cannot be written is lost.
        let _ = log.settle(all);
    }
}

fn unwritable(file: &Path, error: io::Error) -> Error {
    Error::Io(format!("cannot log to {}; XDG_STATE_HOME says where", file.display()), error)
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
