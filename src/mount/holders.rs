//! Who still uses a mount.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use crate::shown::one_line;

/// Holders that a message names.
const NAMED: usize = 10;

/// Somebody who uses a file of a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// A process.
    Process {
        /// Its id.
        pid: i32,
        /// Its name.
        name: String,
        /// What it uses, and as what.
        uses: String,
    },
    /// A loop device.
    Loop {
        /// The device.
        device: PathBuf,
        /// The file behind it.
        file: PathBuf,
    },
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { pid, name, uses } => write!(f, "process {pid} ({name}) {uses}"),
            Self::Loop { device, file } => {
                let (device, file) = (device.display(), file.display());
                write!(f, "{device} is attached to {file}; `losetup -d {device}` detaches it")
            }
        }
    }
}

/// The holders as lines of a message.
pub(super) fn list(holders: &[Holder]) -> String {
    if holders.is_empty() {
        return ", by whom cannot be told: perhaps another user's process".to_owned();
    }
    let mut text = ":".to_owned();
    for holder in holders.iter().take(NAMED) {
        // A name has no line of its own.
        text.push_str(&format!("\n  {}", one_line(&holder.to_string())));
    }
    if holders.len() > NAMED {
        text.push_str(&format!("\n  and {} more", holders.len() - NAMED));
    }
    text
}

/// Those who use the mount at `path`, as far as we may see. Never touches the mount itself.
pub(super) fn of(path: &Path) -> Vec<Holder> {
    let mut holders = loops(path);
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for process in processes {
        let pid = process.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(pid) = pid
            && let Some(uses) = use_of(&process.path(), path)
        {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            holders.push(Holder::Process { pid, name: name.trim().to_owned(), uses });
        }
    }
    holders
}

/// What a process uses of a mount, by its links in `/proc`.
fn use_of(process: &Path, mount: &Path) -> Option<String> {
    let inside = |link: &Path| std::fs::read_link(link).ok().filter(|to| to.starts_with(mount));
    for (link, what) in [("cwd", "is in"), ("root", "has as its root"), ("exe", "runs")] {
        if let Some(to) = inside(&process.join(link)) {
            return Some(format!("{what} {}", to.display()));
        }
    }
    let mut open = std::fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    if let Some(to) = open.find_map(|fd| inside(&fd.path())) {
        return Some(format!("has {} open", to.display()));
    }
    let maps = std::fs::read(process.join("maps")).unwrap_or_default();
    let mut mapped = maps.split(|&byte| byte == b'\n').filter_map(|line| {
        let start = line.iter().position(|&byte| byte == b'/')?;
        Some(path_of(&line[start..]))
    });
    mapped.find(|file| file.starts_with(mount)).map(|file| format!("has {} mapped", file.display()))
}

fn path_of(bytes: &[u8]) -> PathBuf {
    OsStr::from_bytes(bytes).into()
}

fn loops(mount: &Path) -> Vec<Holder> {
    let devices = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let holder = |device: std::fs::DirEntry| {
        let file = std::fs::read(device.path().join("loop/backing_file")).ok()?;
        let file = path_of(file.trim_ascii_end());
        let device = Path::new("/dev").join(device.file_name());
        file.starts_with(mount).then_some(Holder::Loop { device, file })
    };
    devices.filter_map(holder).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_makes_no_line_of_its_own() {
        let name = "sh) has /mnt open\n  process 1 (init".to_owned();
        let uses = "has /mnt open".to_owned();
        let text = list(&[Holder::Process { pid: 7, name, uses }]);
        assert_eq!(text.lines().count(), 2, "{text}");
    }

    #[test]
    fn an_open_file_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        assert_eq!(of(&path), []);
        let file = std::fs::File::create(path.join("x")).unwrap();
        let me = i32::try_from(std::process::id()).unwrap();
        let found = of(&path);
        assert!(
            matches!(&found[..], [Holder::Process { pid, uses, .. }] if *pid == me && uses.contains("/x open"))
        );
        drop(file);
        assert_eq!(of(&path), []);
    }
}
