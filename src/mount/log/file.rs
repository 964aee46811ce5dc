//! The file that a mount logs to: of bounded length, and opened anew when it is asked to.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use crate::own;

/// A log, of which as much is kept again under `<log>.old`.
#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    file: File,
    len: u64,
    /// Bytes from which on it becomes the old one.
    max: u64,
    /// Whether stderr leads to it.
    is_stderr: bool,
}

impl LogFile {
    pub(super) fn open(path: &Path, max: u64) -> io::Result<Self> {
        let (file, len) = open(path, max)?;
        Ok(Self { path: path.to_owned(), file, len, max, is_stderr: false })
    }

    /// Opens what has its name now.
    pub(super) fn open_anew(&mut self) -> io::Result<()> {
        (self.file, self.len) = open(&self.path, self.max)?;
        if self.is_stderr { self.take_stderr() } else { Ok(()) }
    }

    /// Leads stderr to it from now on.
    pub(super) fn take_stderr(&mut self) -> io::Result<()> {
        self.is_stderr = true;
        Ok(nix::unistd::dup2_stderr(&self.file)?)
    }
}

fn open(path: &Path, max: u64) -> io::Result<(File, u64)> {
    if let Some(directory) = path.parent() {
        own::make(directory)?;
    }
    if path.symlink_metadata().is_ok_and(|found| found.len() > max) {
        let mut old = path.as_os_str().to_owned();
        old.push(".old");
        std::fs::rename(path, old)?;
    }
    let file = own::open(path, OpenOptions::new().create(true).append(true).mode(0o600))?;
    let len = file.metadata()?.len();
    Ok((file, len))
}

impl Write for LogFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.len > self.max {
            // What cannot be turned over goes on as it is, and is tried again as much later.
            self.len = 0;
            let _ = self.open_anew();
        }
        let written = self.file.write(bytes)?;
        self.len += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_turned_over_while_it_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (dir.path().join("deep/x.log"), dir.path().join("deep/x.log.old"));
        let mut log = LogFile::open(&path, 1000).unwrap();
        for n in 0..100 {
            log.write_all(format!("{n:99}\n").as_bytes()).unwrap();
        }
        let texts = [&old, &path].map(|path| std::fs::read_to_string(path).unwrap());
        assert!(texts.iter().all(|text| text.len() <= 1100), "{texts:?}");
        let lines: Vec<u32> = texts
            .iter()
            .flat_map(|text| text.lines())
            .map(|line| line.trim().parse().unwrap())
            .collect();
        assert_eq!(lines, (100 - u32::try_from(lines.len()).unwrap()..100).collect::<Vec<_>>());
        assert!(lines.len() > 10);
    }

    #[test]
    fn a_log_that_was_moved_away_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let mut log = LogFile::open(&path, 1000).unwrap();
        log.write_all(b"one\n").unwrap();
        std::fs::rename(&path, dir.path().join("moved")).unwrap();
        log.write_all(b"two\n").unwrap();
        log.open_anew().unwrap();
        log.write_all(b"three\n").unwrap();
        assert_eq!(std::fs::read_to_string(path).unwrap(), "three\n");
    }
}
