//! Lists in text files, one thing a line.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::{Error, Result};
use crate::blocking::blocking;
use crate::transfer;

/// Bytes of a list. A longer file is refused as a list; one that is a target is written.
const MAX_LIST: u64 = 8 << 20;

/// A target, and where it was named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) path: PathBuf,
    pub(super) line: Option<Line>,
}

/// A line of a list, counted from 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) list: PathBuf,
    pub(super) number: usize,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, line {}", self.list.display(), self.number)
    }
}

impl Named {
    pub(super) fn by_itself(path: PathBuf) -> Self {
        Self { path, line: None }
    }

    pub(super) fn refused(&self, why: impl fmt::Display) -> Error {
        Error::Refused(match &self.line {
            Some(line) => format!("{line}: {why}"),
            None => why.to_string(),
        })
    }
}

/// The targets of a list. Space around a path does not count.
fn parse(list: &Path, text: &str) -> Vec<Named> {
    let lines = text.lines().enumerate().map(|(n, line)| (n + 1, line.trim()));
    let named = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    named
        .map(|(number, line)| Named {
            path: line.into(),
            line: Some(Line { list: list.to_owned(), number }),
        })
        .collect()
}

/// The text of a list; `None` if it is no text.
fn text_of(bytes: Vec<u8>) -> Option<String> {
    String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))
}

/// The targets of a file that may be a list: `None` if any line is something else.
fn parse_if_list(list: &Path, bytes: Vec<u8>) -> Option<Vec<Named>> {
    let named = parse(list, &text_of(bytes)?);
    let is_list = !named.is_empty() && named.iter().all(|target| target.path.is_absolute());
    is_list.then_some(named)
}

/// What is in a file; `None` if it is no regular file, or too long for a list. Waits for the disk.
fn content(path: &Path) -> std::io::Result<Option<Vec<u8>>> {
    // Others, such as a pipe, might never answer.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let found = file.metadata()?;
    if !found.is_file() || found.len() > MAX_LIST {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    file.take(MAX_LIST + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64 <= MAX_LIST).then_some(bytes))
}

/// The targets of a file that was called a list.
pub(super) async fn read_list(list: &Path) -> Result<Vec<Named>> {
    let path = list.to_owned();
    let content = blocking(move || content(&path)).await;
    let content = content.map_err(|error| transfer::Error::io("read", list, error))?;
    let named = content.and_then(text_of).map(|text| parse(list, &text));
    let why = match named {
        None => "it is no list: give a text file of at most 8 MiB with one target a line",
        Some(named) if named.is_empty() => "it names no target",
        Some(named) => return Ok(named),
    };
    Err(transfer::Error::unsuitable(list, why).into())
}

/// The targets of a file that may be a list; `None` if it is a target itself.
pub(super) async fn read_if_list(path: &Path) -> Result<Option<Vec<Named>>> {
    let list = path.to_owned();
    let read = move || {
        // A device is not opened for nothing.
        let is_file = list.metadata().is_ok_and(|found| found.is_file());
        let bytes = if is_file { content(&list)? } else { None };
        Ok(bytes.and_then(|bytes| parse_if_list(&list, bytes)))
    };
    let named: std::io::Result<_> = blocking(read).await;
    Ok(named.map_err(|error| transfer::Error::io("read", path, error))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(named: &[Named]) -> Vec<(usize, &str)> {
        let number = |target: &Named| target.line.as_ref().unwrap().number;
        named.iter().map(|target| (number(target), target.path.to_str().unwrap())).collect()
    }

    #[test]
    fn a_list_has_a_target_a_line() {
        let text = "# two disks\n/dev/sdb\n\n  \t\r\n /dev/sdc \r\n#/dev/sdd\nb c#d.img";
        let named = parse(Path::new("list"), text);
        assert_eq!(paths(&named), [(2, "/dev/sdb"), (5, "/dev/sdc"), (7, "b c#d.img")]);
        assert_eq!(named[1].refused("no").to_string(), "list, line 5: no");
        assert_eq!(parse(Path::new("list"), "\n# none\n"), []);
    }

    #[test]
    fn a_file_of_absolute_paths_is_a_list() {
        let is_list = |bytes: &[u8]| parse_if_list(Path::new("x"), bytes.to_vec());
        let named = is_list(b"# disks\n/dev/sdb\n\n/dev/sdc\n").unwrap();
        assert_eq!(paths(&named), [(2, "/dev/sdb"), (4, "/dev/sdc")]);
        for bytes in [&b""[..], b"\n\n", b"# none\n", b"/a\nb\n", b"/a\n/b\0\n", b"/a\xff\n"] {
            assert_eq!(is_list(bytes), None, "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn long_files_and_devices_are_not_read_as_a_list() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("list");
        let file = File::create(&path).unwrap();
        file.set_len(MAX_LIST).unwrap();
        assert!(content(&path).unwrap().is_some());
        file.set_len(MAX_LIST + 1).unwrap();
        assert_eq!(content(&path).unwrap(), None);
        assert_eq!(content(dir.path()).unwrap(), None);
        assert_eq!(content(Path::new("/dev/null")).unwrap(), None);
    }
}
