//! Who has a repository open.
//!
//! Everybody holds a shared lock on `fspfs.json`, and whoever collects at once an exclusive one. That is worth something
//! where all processes see the locks of each other: on a file system of this machine.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC,
    XFS_SUPER_MAGIC, fstatfs,
};

use super::INFO;
use super::beneath::Beneath;
use crate::store::{Error, ErrorKind, Result};

/// File systems of one machine.
const LOCAL: [FsType; 5] =
    [BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC];

/// A lock on `fspfs.json`.
#[derive(Debug)]
pub(super) struct Lock {
    _held: Flock<File>,
}

impl Lock {
    /// Notes that this process has the repository at `root` open. `None` if it is not there, or cannot be locked.
    ///
    /// # Errors
    ///
    /// `Conflict` while it is collected at once.
    pub(super) fn share(root: &Beneath) -> Result<Option<Self>> {
        let Ok((file, _)) = root.file(INFO) else { return Ok(None) };
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(lock) => Ok(Some(Self { _held: lock })),
            Err((file, Errno::EWOULDBLOCK)) => {
                let who = holders(&file);
                let message =
                    format!("a collection has it for itself{who}: try again when it has ended");
                Err(Error::new(ErrorKind::Conflict, message))
            }
            Err(_) => Ok(None),
        }
    }

    /// Takes the repository for this process alone, until the answer is dropped.
    ///
    /// # Errors
    ///
    /// `Conflict` if another process has it open; `Unsupported` if other machines may have.
    pub(super) fn alone(root: &Beneath) -> Result<Self> {
        let failed = |error: std::io::Error| Error::from_io(format!("cannot lock {INFO}"), error);
        let (file, _) = root.file(INFO).map_err(failed)?;
        let kind = fstatfs(&file).map_err(|errno| failed(errno.into()))?.filesystem_type();
        if !LOCAL.contains(&kind) {
            let message =
                "it is not known who else has it open: its file system may be of several machines";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self { _held: lock }),
            Err((file, Errno::EWOULDBLOCK)) => {
                let message = format!("others have it open{}", holders(&file));
                Err(Error::new(ErrorKind::Conflict, message))
            }
            Err((_, errno)) => Err(failed(errno.into())),
        }
    }
}

/// The processes that have a lock on a file, as the end of a sentence; nothing if that cannot be told.
fn holders(file: &File) -> String {
    let (Ok(found), Ok(locks)) = (file.metadata(), std::fs::read_to_string("/proc/locks")) else {
        return String::new();
    };
    let place = format!(
        "{:02x}:{:02x}:{}",
        nix::sys::stat::major(found.dev()),
        nix::sys::stat::minor(found.dev()),
        found.ino()
    );
    // `1: FLOCK ADVISORY READ 4711 fd:00:131 0 EOF` (proc(5))
    let held = locks.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let held = held.filter(|fields| fields.get(5) == Some(&&*place) && fields[1] == "FLOCK");
    let mut pids: Vec<_> = held.map(|fields| fields[4].to_owned()).collect();
    pids.sort_unstable();
    pids.dedup();
    match pids.is_empty() {
        true => String::new(),
        false => format!(" (process {})", pids.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_alone_excludes_all_others() {
        let dir = tempfile::tempdir().unwrap();
        let root = Beneath::open(dir.path());
        assert!(Lock::share(&root).unwrap().is_none());
        std::fs::write(dir.path().join(INFO), "{}").unwrap();
        let (one, two) = (Lock::share(&root).unwrap(), Lock::share(&root).unwrap());
        assert!(one.is_some() && two.is_some());
        let me = format!("process {}", std::process::id());
        let error = Lock::alone(&root).unwrap_err();
        assert!(error.kind() == ErrorKind::Conflict && error.to_string().contains(&me), "{error}");
        drop((one, two));
        let alone = Lock::alone(&root).unwrap();
        let error = Lock::share(&root).unwrap_err();
        assert!(error.kind() == ErrorKind::Conflict && error.to_string().contains(&me), "{error}");
        drop(alone);
        assert!(Lock::share(&root).unwrap().is_some());
    }
}
