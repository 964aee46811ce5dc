//! What is mounted where: of ours, and in the way of ours.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::Error;
use super::attach::FS_TYPE;
pub use crate::mountinfo::MountEntry;
use crate::mountinfo::{TABLE, entries, parse};

fn read() -> Result<Vec<MountEntry>, Error> {
    entries().map_err(|e| Error::Io(format!("cannot read {TABLE}"), e))
}

/// All mounts of fspfs.
///
/// # Errors
///
/// If the table cannot be read.
pub fn our_mounts() -> Result<Vec<MountEntry>, Error> {
    Ok(read()?.into_iter().filter(|entry| entry.fs_type == FS_TYPE).collect())
}

/// The mount of fspfs exactly at `path`.
///
/// # Errors
///
/// [`Error::NotMounted`] if there is none.
pub fn our_mount(path: &Path) -> Result<MountEntry, Error> {
    if let Some(entry) = find(path)?.filter(|entry| entry.fs_type == FS_TYPE) {
        return Ok(entry);
    }
    let mounts = our_mounts()?.into_iter().map(|entry| entry.mount_point).collect();
    Err(Error::NotMounted { path: path.to_owned(), mounts })
}

/// The mount of fspfs at a path as the table has it.
///
/// # Errors
///
/// [`Error::NotMounted`] if there is none.
pub(super) fn our_mount_at(path: &Path) -> Result<MountEntry, Error> {
    let is_it = |entry: &MountEntry| entry.mount_point == path && entry.fs_type == FS_TYPE;
    let gone = || Error::NotMounted { path: path.to_owned(), mounts: Vec::new() };
    read()?.into_iter().rev().find(is_it).ok_or_else(gone)
}

/// What is mounted exactly at `path`, the topmost if there are several.
pub(super) fn find(path: &Path) -> Result<Option<MountEntry>, Error> {
    let path = resolve(path);
    Ok(read()?.into_iter().rev().find(|entry| entry.mount_point == path))
}

/// Where the file system of an entry is still mounted, in words: bound to another place, or in another mount
/// namespace.
pub fn mounted_elsewhere(entry: &MountEntry) -> Option<String> {
    let is_same =
        |other: &MountEntry| other.device == entry.device && other.fs_type == entry.fs_type;
    if let Some(other) = read().ok()?.into_iter().find(is_same) {
        return Some(other.mount_point.display().to_string());
    }
    let numbers = std::fs::read_dir("/proc").ok()?.flatten();
    let numbers = numbers.filter_map(|process| process.file_name().to_str()?.parse::<u32>().ok());
    numbers.into_iter().find_map(|pid| {
        let table = std::fs::read(format!("/proc/{pid}/mountinfo")).ok()?;
        let other = parse(&table).into_iter().find(is_same)?;
        let place = other.mount_point.display();
        Some(format!("{place} in the mount namespace of process {pid}"))
    })
}

/// Whether a process serves a mount, as it may say of itself: it is of the user who has mounted it, and has the
/// connection open. Where that cannot be seen it does not.
pub fn is_served_by(mount: &MountEntry, pid: u32) -> bool {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let owner = process.metadata().ok().map(|found| found.uid());
    if owner.is_none() || owner != mount.owner {
        return false;
    }
    let number = mount.device.split_once(':').map(|(_, minor)| minor);
    let is_it = |fd: std::fs::DirEntry| {
        let leads_to = std::fs::read_link(fd.path()).unwrap_or_default();
        let info = std::fs::read_to_string(process.join("fdinfo").join(fd.file_name()));
        // Newer kernels tell which one it is.
        let said = info.unwrap_or_default();
        let connection = said.lines().find_map(|line| line.strip_prefix("fuse_connection:"));
        leads_to == Path::new("/dev/fuse")
            && connection.is_none_or(|connection| Some(connection.trim()) == number)
    };
    process.join("fd").read_dir().is_ok_and(|fds| fds.flatten().any(is_it))
}

/// A mount that was there, where it is now: a directory above it may have been renamed.
///
/// # Errors
///
/// [`Error::NotMounted`] if it is gone.
pub(super) fn now(mount: &MountEntry) -> Result<MountEntry, Error> {
    let is_it = |entry: &MountEntry| (entry.id, &entry.device) == (mount.id, &mount.device);
    let gone = || Error::NotMounted { path: mount.mount_point.clone(), mounts: Vec::new() };
    read()?.into_iter().find(is_it).ok_or_else(gone)
}

/// The path without links, without touching what may be mounted there: that may not answer.
pub fn resolve(path: &Path) -> PathBuf {
    let mut path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for _ in 0..MAX_LINKS {
        if let (Some(Ok(parent)), Some(name)) =
            (path.parent().map(Path::canonicalize), path.file_name())
        {
            path = parent.join(name);
        }
        // The kernel answers this by itself: what is mounted is no link.
        match (std::fs::read_link(&path), path.parent()) {
            (Ok(target), Some(parent)) => path = parent.join(target),
            _ => break,
        }
    }
    path
}

/// Links that are followed, one after the other: as many as the kernel follows.
const MAX_LINKS: usize = 40;

/// The file that holds the read-ahead of a mount.
fn read_ahead_file(entry: &MountEntry) -> String {
    format!("/sys/class/bdi/{}/read_ahead_kb", entry.device)
}

/// The kernel's read-ahead in KiB for the mount at `path`, where it can be told.
pub(crate) fn read_ahead(path: &Path) -> Option<u32> {
    let entry = find(path).ok().flatten()?;
    std::fs::read_to_string(read_ahead_file(&entry)).ok()?.trim().parse().ok()
}

/// Raises the kernel's read-ahead for a mount, where that is permitted.
pub(super) fn set_read_ahead(mount: &MountEntry, kib: u32) {
    let file = read_ahead_file(mount);
    if let Err(error) = std::fs::write(&file, kib.to_string()) {
        tracing::info!("the kernel's read-ahead stays as it is: cannot write {file}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_this_machine_is_read() {
        assert!(find(Path::new("/proc")).unwrap().is_some_and(|entry| entry.fs_type == "proc"));
        assert_eq!(find(Path::new("/proc/self/status")).unwrap(), None);
    }

    #[test]
    fn links_are_followed_to_what_need_not_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let (at, link) =
            (dir.path().canonicalize().unwrap(), std::os::unix::fs::symlink::<&str, _>);
        std::fs::create_dir(at.join("a")).unwrap();
        link("../b", at.join("a/one")).unwrap();
        link("a/one", at.join("two")).unwrap();
        link("loop", at.join("loop")).unwrap();
        for path in ["two", "a/one", "a/../b", "b"] {
            assert_eq!(resolve(&at.join(path)), at.join("b"), "{path}");
        }
        assert_eq!(resolve(&at.join("loop")), at.join("loop"));
    }
}
