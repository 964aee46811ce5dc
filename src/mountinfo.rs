//! The table of mounts, as the kernel tells it.

use std::ffi::OsString;
use std::fs::{File, read};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Where this process finds it.
pub(crate) const TABLE: &str = "/proc/self/mountinfo";

/// A line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// What the mount is called.
    pub id: u64,
    /// `<major>:<minor>` of the file system.
    pub device: String,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// What it is.
    pub fs_type: String,
    /// What is mounted: for ours, the store.
    pub source: String,
    /// Who has mounted it, where that is told: by FUSE.
    pub owner: Option<u32>,
}

/// Reads a table, as `proc_pid_mountinfo(5)` describes it.
pub(crate) fn parse(table: &[u8]) -> Vec<MountEntry> {
    table.split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

/// Reads a line. A path is any bytes but NUL.
fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(&unescape(bytes)).into_owned();
    let mut fields = line.split(|&byte| byte == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let device = text(fields.nth(1)?);
    let mount_point = OsString::from_vec(unescape(fields.nth(1)?)).into();
    let mut after = fields.skip_while(|&field| field != b"-").skip(1);
    let (fs_type, source) = (text(after.next()?), text(after.next()?));
    let options = text(after.next().unwrap_or_default());
    let owner = options.split(',').find_map(|option| option.strip_prefix("user_id="));
    let owner = owner.and_then(|owner| owner.parse().ok());
    Some(MountEntry { id, device, mount_point, fs_type, source, owner })
}

/// Blanks, newlines, tabs and backslashes are written as three octal digits.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
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
    bytes
}

/// All of it.
pub(crate) fn entries() -> io::Result<Vec<MountEntry>> {
    Ok(parse(&read(TABLE)?))
}

/// The mount that an open file is in. A pipe is in none, and one that was unmounted neither.
pub(crate) fn mount_of(file: BorrowedFd<'_>) -> io::Result<Option<MountEntry>> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
    let id = text.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse::<u64>().ok());
    Ok(entries()?.into_iter().find(|entry| Some(entry.id) == id))
}

/// The mount that a path is in, or would be in, if it were there.
pub(crate) fn mount_at(path: &Path) -> io::Result<Option<MountEntry>> {
    let path = std::path::absolute(path)?;
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_PATH);
    let there = path.ancestors().find_map(|path| options.open(path).ok());
    there.map_or(Ok(None), |file| mount_of(std::os::fd::AsFd::as_fd(&file)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt as _;

    use super::*;

    #[test]
    fn a_line_is_read() {
        let line = b"36 25 0:41 / /mnt/a\\040b\xff rw,nosuid shared:1 - fuse.fspfs file:///srv/snaps rw,user_id=65534,group_id=0\n";
        let [entry] = &parse(line)[..] else { panic!("it is one line") };
        assert_eq!((entry.id, &entry.device[..]), (36, "0:41"));
        assert_eq!(entry.mount_point.as_os_str().as_bytes(), b"/mnt/a b\xff");
        assert_eq!(entry.owner, Some(65534));
        assert_eq!((&entry.fs_type[..], &entry.source[..]), ("fuse.fspfs", "file:///srv/snaps"));
    }

    #[test]
    fn the_mount_of_a_path_is_found_whether_it_is_there_or_not() {
        for path in ["/proc/self/status", "/proc/none/of/them"] {
            assert_eq!(mount_at(Path::new(path)).unwrap().unwrap().fs_type, "proc");
        }
        let (pipe, _end) = io::pipe().unwrap();
        assert_eq!(mount_of(std::os::fd::AsFd::as_fd(&pipe)).unwrap(), None);
    }
}
