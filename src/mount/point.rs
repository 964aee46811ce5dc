//! A mount point that is opened once: whoever owns a directory above it could exchange it between two looks.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;

use super::Error;
use super::table::{self, MountEntry};
use crate::mountinfo::mount_of;

/// A place to mount at.
#[derive(Debug)]
pub(super) struct Point {
    path: PathBuf,
    directory: OwnedFd,
}

impl Point {
    /// Opens the directory at `path`, which is one without links, as [`table::resolve`] gives it.
    ///
    /// # Errors
    ///
    /// If it is none, or a part of the path is a link by now.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let unusable = |why: String| Error::MountPoint { path: path.to_owned(), why };
        let directory = open_without_links(path).map_err(|errno| match errno {
            Errno::ENOENT => unusable(format!(
                "it does not exist; make it with `mkdir -p {}`",
                path.display()
            )),
            Errno::ENOTDIR => unusable("it is not a directory".to_owned()),
            Errno::ELOOP => unusable(
                "somebody has put a link in its place just now; give a place that only you can change"
                    .to_owned(),
            ),
            errno => unusable(errno.desc().to_owned()),
        })?;
        Ok(Self { path: path.to_owned(), directory })
    }

    /// The path that was given.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What leads to it, whatever has its name by now.
    pub(super) fn link(&self) -> PathBuf {
        link(&self.directory)
    }

    /// Checks that nothing would be out of sight.
    ///
    /// # Errors
    ///
    /// If it is not empty.
    pub(super) fn check(&self) -> Result<(), Error> {
        let unusable = |why: String| Error::MountPoint { path: self.path.clone(), why };
        let mut entries = self.link().read_dir().map_err(|e| unusable(e.to_string()))?;
        match entries.next() {
            None => Ok(()),
            Some(_) => {
                Err(unusable("it is not empty, and what is in it would be out of sight".to_owned()))
            }
        }
    }

    /// The mount of ours that is over it.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub(super) fn mounted(&self) -> Result<MountEntry, Error> {
        // Where it is now.
        let at = self.link().read_link().unwrap_or_else(|_| self.path.clone());
        table::our_mount_at(&at)
    }
}

fn link(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

fn open_without_links(path: &Path) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let no_links = ResolveFlag::RESOLVE_NO_SYMLINKS;
    match openat2(AT_FDCWD, path, OpenHow::new().flags(flags).resolve(no_links)) {
        // Before Linux 5.6, and where a container lets through what it knows only.
        Err(Errno::ENOSYS | Errno::EPERM) => open(path, flags | OFlag::O_NOFOLLOW, Mode::empty()),
        opened => opened,
    }
}

/// Where a mount is, as umount2(2) wants it: in a directory that stays open meanwhile. In there the kernel lets nobody
/// rename what is mounted over.
#[derive(Debug)]
pub(super) struct Standing {
    pub(super) path: PathBuf,
    _parent: Option<OwnedFd>,
}

impl Standing {
    /// Finds a mount.
    ///
    /// # Errors
    ///
    /// If something else is at its place by now.
    pub(super) fn of(entry: &MountEntry) -> Result<Self, Error> {
        let gone = || Error::NotMounted { path: entry.mount_point.clone(), mounts: Vec::new() };
        let at = &entry.mount_point;
        let (Some(parent), Some(name)) = (at.parent(), at.file_name()) else {
            return Ok(Self { path: at.clone(), _parent: None });
        };
        let parent = open_without_links(parent).map_err(|_| gone())?;
        let path = link(&parent).join(name);
        // It must not be open any more when it is unmounted.
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let there = open(&path, flags, Mode::empty()).map_err(|_| gone())?;
        let found = mount_of(std::os::fd::AsFd::as_fd(&there)).ok().flatten();
        match found.is_some_and(|found| (found.id, &found.device) == (entry.id, &entry.device)) {
            true => Ok(Self { path, _parent: Some(parent) }),
            false => Err(gone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_that_came_into_the_path_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().canonicalize().unwrap();
        std::fs::create_dir_all(at.join("real/inner")).unwrap();
        std::os::unix::fs::symlink("real", at.join("link")).unwrap();
        for path in ["link", "link/inner"] {
            let said = Point::open(&at.join(path)).unwrap_err().to_string();
            assert!(said.contains("a link in its place"), "{said}");
        }
        let point = Point::open(&at.join("real/inner")).unwrap();
        point.check().unwrap();
        // It stays what it was, wherever it is.
        std::fs::write(at.join("real/inner/file"), "").unwrap();
        std::fs::rename(at.join("real"), at.join("moved")).unwrap();
        assert!(point.check().unwrap_err().to_string().contains("not empty"));
        assert_eq!(point.link().read_link().unwrap(), at.join("moved/inner"));
    }
}
