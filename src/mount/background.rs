//! Mounting in the background: the program starts itself again, and waits until the mount is there.
//!
//! A fresh process instead of a fork: nothing of this one's threads and locks comes along.

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use super::Error;

/// How long a mount may take to be there.
const START: Duration = Duration::from_mins(1);

/// The line that the daemon prints when the mount is there.
pub const READY: &str = "ready";

/// Variables of the environment that name files: those of the AWS SDKs
/// (<https://docs.aws.amazon.com/sdkref/latest/guide/settings-reference.html>) and of OpenSSL.
const PATHS: [&str; 6] = [
    "AWS_CA_BUNDLE",
    "AWS_CONFIG_FILE",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "SSL_CERT_FILE",
];

/// A list of directories.
const DIRECTORIES: &str = "SSL_CERT_DIR";

/// Paths of the environment that are relative, made absolute: a daemon runs in another directory.
fn absolute_paths() -> Vec<(&'static str, OsString)> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    // The SDK itself puts the home in the place of `~`.
    let absolute = |path: &Path| match path.starts_with("~") {
        true => Some(path.to_owned()),
        false => std::path::absolute(path).ok(),
    };
    let files = PATHS.into_iter().filter_map(|name| {
        let path = absolute(Path::new(&set(name)?))?;
        Some((name, path.into_os_string()))
    });
    let directories = set(DIRECTORIES).and_then(|list| {
        let all: Option<Vec<_>> =
            std::env::split_paths(&list).map(|path| absolute(&path)).collect();
        Some((DIRECTORIES, std::env::join_paths(all?).ok()?))
    });
    files.chain(directories).collect()
}

/// Marks the process in the background, in its environment: its arguments are those of the user. Has the mount point, as
/// the first process has found it: its links may lead elsewhere by now.
const DAEMON: &str = "FSPFS_DAEMON";

/// Whether this is the process in the background.
pub fn is_daemon() -> bool {
    std::env::var_os(DAEMON).is_some()
}

/// Where the process in the background mounts; `None` for another one.
pub fn daemon_place() -> Option<PathBuf> {
    std::env::var_os(DAEMON).map(PathBuf::from).filter(|place| place.is_absolute())
}

/// Starts this program again with `arguments`, in this directory, detached from the terminal, and waits until it says
/// that it is [`READY`]. Until then what it prints on stderr goes to ours.
///
/// It gets nothing else that this process was given: a lock of `flock` would stay, a pipe never end.
///
/// Answers how it ended, if it did before it was ready: it has said why.
///
/// # Errors
///
/// If it cannot be started, or is not ready within a minute.
pub fn start(arguments: &[OsString], mount_point: &Path) -> Result<Option<ExitStatus>, Error> {
    let failed = |e| Error::Io("cannot start the daemon".to_owned(), e);
    crate::sys::keep_descriptors_to_ourselves().map_err(failed)?;
    // By its name, which is what `ps` and `pgrep` show; by the link if it was replaced meanwhile.
    let program = std::env::current_exe().ok().filter(|program| program.exists());
    let mut child = Command::new(program.unwrap_or_else(|| "/proc/self/exe".into()))
        .arg0("fspfs")
        .args(arguments)
        .envs(absolute_paths())
        .env(DAEMON, mount_point)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let stdout = child.stdout.take().expect("it was asked for");
    let (said, line) = mpsc::channel();
    let listening = crate::threads::aside(move || {
        let mut line = String::new();
        // An error is the end of what it says, like its end.
        let _ = BufReader::new(stdout).read_line(&mut line);
        let _ = said.send(line);
    });
    if let Err(error) = listening {
        give_up(&mut child);
        return Err(failed(error));
    }
    match line.recv_timeout(START) {
        Ok(line) if line.trim_end() == READY => Ok(None),
        Ok(_) => child.wait().map(Some).map_err(failed),
        Err(_) => {
            give_up(&mut child);
            let path = mount_point.to_owned();
            let why = format!("it was not mounted within {} seconds", START.as_secs());
            Err(Error::MountPoint { path, why })
        }
    }
}

fn give_up(child: &mut Child) {
    // It is our child and was not waited for, so its id is still its own.
    let _ = child.kill();
    let _ = child.wait();
}
