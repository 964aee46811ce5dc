//! The table of mounts, as the kernel tells it.

use std::path::{Path, PathBuf};

use super::Error;
use super::attach::FS_TYPE;

const TABLE: &str = "/proc/self/mountinfo";

/// A line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// `<major>:<minor>` of the file system.
    pub device: String,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// What it is.
    pub fs_type: String,
    /// What is mounted: for ours, the store.
    pub source: String,
}

/// Reads a line of the table, as `proc_pid_mountinfo(5)` describes it.
fn parse(line: &str) -> Option<MountEntry> {
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ');
    let device = before.nth(2)?;
    let mount_point = before.nth(1)?;
    let mut after = after.split(' ');
    Some(MountEntry {
        device: device.to_owned(),
        mount_point: unescape(mount_point).into(),
        fs_type: after.next()?.to_owned(),
        source: unescape(after.next()?),
    })
}

/// Blanks, newlines, tabs and backslashes are written as three octal digits.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let code = (byte == b'\\').then(|| tail.get(..3)).flatten();
        let code = code.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(code) => {
                bytes.push(code);
                rest = &tail[3..];
            }
            None => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn read() -> Result<Vec<MountEntry>, Error> {
    let text = std::fs::read(TABLE).map_err(|e| Error::Io(format!("cannot read {TABLE}"), e))?;
    Ok(String::from_utf8_lossy(&text).lines().filter_map(parse).collect())
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
        let text = std::fs::read(format!("/proc/{pid}/mountinfo")).ok()?;
        let text = String::from_utf8_lossy(&text);
        let other = text.lines().filter_map(parse).find(is_same)?;
        let place = other.mount_point.display();
        Some(format!("{place} in the mount namespace of process {pid}"))
    })
}

/// The path without links, without touching what may be mounted there.
fn resolve(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    match (path.parent().map(Path::canonicalize), path.file_name()) {
        (Some(Ok(parent)), Some(name)) => parent.join(name),
        _ => path,
    }
}

/// The file that holds the read-ahead of a mount.
fn read_ahead_file(entry: &MountEntry) -> String {
    format!("/sys/class/bdi/{}/read_ahead_kb", entry.device)
}

/// The kernel's read-ahead in KiB for the mount at `path`, where it can be told.
pub(crate) fn read_ahead(path: &Path) -> Option<u32> {
    let entry = find(path).ok().flatten()?;
    std::fs::read_to_string(read_ahead_file(&entry)).ok()?.trim().parse().ok()
}

/// Raises the kernel's read-ahead for the mount at `path`, where that is permitted.
pub(super) fn set_read_ahead(path: &Path, kib: u32) {
    // The device comes from the table: `stat` would ask our own mount.
    let Ok(Some(entry)) = find(path) else { return };
    let file = read_ahead_file(&entry);
    if let Err(error) = std::fs::write(&file, kib.to_string()) {
        tracing::info!("the kernel's read-ahead stays as it is: cannot write {file}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read() {
        let line = r"36 25 0:41 / /mnt/a\040b rw,nosuid shared:1 - fuse.fspfs file:///srv/snaps rw,user_id=0";
        let entry = parse(line).unwrap();
        assert_eq!(entry.device, "0:41");
        assert_eq!(entry.mount_point, Path::new("/mnt/a b"));
        assert_eq!((&entry.fs_type[..], &entry.source[..]), ("fuse.fspfs", "file:///srv/snaps"));
    }

    #[test]
    fn the_table_of_this_machine_is_read() {
        assert!(find(Path::new("/proc")).unwrap().is_some_and(|entry| entry.fs_type == "proc"));
        assert_eq!(find(Path::new("/proc/self")).unwrap(), None);
    }
}
