//! Objects in a directory of a file system.

use std::collections::HashSet;
use std::fs::File;
use std::io::{ErrorKind as Io, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, fchown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use nix::sys::stat::FileStat;
use nix::unistd::Uid;
use uuid::Uuid;

use self::beneath::Beneath;
use self::direct::{read_direct, write_direct};
use self::lock::Lock;
use super::names::{self, INFO};
use super::objects::{Decode, MAX_NAMES, Objects, most_bytes, too_many};
use super::read::damaged;
use crate::blocking::blocking;
use crate::model::{Block, BlockBuffer};
use crate::shown::one_line;
use crate::store::{Error, ErrorKind, Result};
use crate::sys;

mod beneath;
mod direct;
mod empty;
mod lock;

/// Where objects are written before they get their name.
const STAGING: &str = "tmp";

/// Objects as files below one directory.
///
/// A file is written under `tmp/`, synced, and then renamed to its name, which must be free; then
/// the directory that holds the name is synced. So a name is there with all its data, or not.
///
/// The directory stays the one that it was when it was opened: its path may lead to another one, or to none,
/// when it is moved.
#[derive(Clone, Debug)]
pub(super) struct Directory(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// The path that was given.
    path: PathBuf,
    /// The directory itself, wherever its own path leads to by now.
    root: Beneath,
    /// Says that this process has it open.
    lock: Mutex<Option<Lock>>,
    /// Whose it is, if that is somebody else than root, who uses it: what is made in it is theirs too, or they
    /// could not use it any more.
    owner: Option<(u32, u32)>,
    /// Directories that are known to be there, durably.
    made: Mutex<HashSet<String>>,
}

impl Directory {
    /// The directory at `root`; what is wrong with it shows when it is used.
    ///
    /// # Errors
    ///
    /// `Conflict` while it is collected at once.
    pub(super) fn open(root: &Path) -> Result<Self> {
        let inner = Inner::new(root);
        *inner.lock() = Lock::share(&inner.root)?;
        Ok(Self(Arc::new(inner)))
    }

    /// The directory at `root`, which is made, or is empty.
    ///
    /// # Errors
    ///
    /// `Conflict` if it holds anything.
    pub(super) fn make(root: &Path) -> Result<Self> {
        empty::make(root)?;
        let made = Self::open(root)?;
        empty::check(&made.0.root, root)?;
        Ok(made)
    }

    /// Runs `work`, which waits for the disk, where waiting is allowed.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = Arc::clone(&self.0);
        blocking(move || work(&inner)).await
    }
}

impl Inner {
    fn new(path: &Path) -> Self {
        let root = Beneath::open(path);
        let owner = root.stat("").ok().map(|found| (found.st_uid, found.st_gid));
        let owner = owner.filter(|(uid, _)| *uid != 0 && Uid::effective().is_root());
        let (path, lock) = (path.to_owned(), Mutex::default());
        Self { path, root, lock, owner, made: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Lock>> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// That nothing is left of the repository, if that is so: what is missing then was not just deleted, and
    /// nothing must be made in its place.
    fn gone(&self) -> std::io::Result<()> {
        match self.root.stat(INFO) {
            Err(error) if error.kind() == Io::NotFound => {
                let message = format!("the repository is gone: it has no {INFO} any more");
                Err(std::io::Error::other(message))
            }
            _ => Ok(()),
        }
    }

    /// That something is not there, or that nothing is.
    fn missing(&self, error: std::io::Error) -> std::io::Error {
        match self.gone() {
            Err(gone) if error.kind() == Io::NotFound => gone,
            _ => error,
        }
    }

    fn create(&self, name: &str, data: &[u8]) -> Result<bool> {
        let failed = |e| Error::from_io(format!("cannot write {name}"), e);
        let staged = self.stage(data).map_err(failed)?;
        self.publish(&staged, name).map_err(|error| {
            // Best effort: what stays behind has no name that counts, and is swept later.
            let _ = self.root.remove(&staged);
            failed(error)
        })
    }

    /// Writes and syncs a file under `tmp/`.
    fn stage(&self, data: &[u8]) -> std::io::Result<String> {
        self.ensure_directory(STAGING)?;
        let name = format!("{STAGING}/{}", Uuid::new_v4().simple());
        let write = || {
            let mut file = self.root.create(&name)?;
            if let Some((uid, gid)) = self.owner {
                // Where that cannot be, as on some network file systems, it stays root's.
                let _ = fchown(&file, Some(uid), Some(gid));
            }
            let written = write_direct(&mut file, data)?;
            file.write_all(&data[written..])?;
            file.sync_all()
        };
        match write() {
            Ok(()) => Ok(name),
            Err(error) => {
                // A full disk is freed again at once.
                let _ = self.root.remove(&name);
                Err(error)
            }
        }
    }

    /// Gives a staged file its name, unless that is taken.
    fn publish(&self, staged: &str, name: &str) -> std::io::Result<bool> {
        let parent = parent(name);
        for attempt in 0.. {
            self.ensure_directory(parent)?;
            match self.root.rename(staged, name) {
                Ok(()) => break,
                Err(error) if error.kind() == Io::AlreadyExists => {
                    self.root.remove(staged)?;
                    // Whoever made it may not have synced it yet, and we are about to rely on it.
                    self.root.sync(parent)?;
                    return Ok(false);
                }
                // Somebody removed the directory when it was empty: make it again, once.
                Err(error) if error.kind() == Io::NotFound && attempt == 0 => {
                    self.made.lock().expect("nothing panics under this lock").clear();
                }
                Err(error) => return Err(error),
            }
        }
        self.root.sync(parent)?;
        Ok(true)
    }

    /// Makes a directory below the root durably, with those above it.
    fn ensure_directory(&self, directory: &str) -> std::io::Result<()> {
        let known = || self.made.lock().expect("nothing panics under this lock");
        if directory.is_empty() || known().contains(directory) {
            return Ok(());
        }
        let parent = parent(directory);
        self.ensure_directory(parent)?;
        // When a repository is made there is nothing but this one.
        if directory != STAGING {
            self.gone()?;
        }
        match self.root.make_directory(directory) {
            Ok(()) => {
                if let Some((uid, gid)) = self.owner {
                    let _ = self.root.give_directory(directory, uid, gid);
                }
            }
            Err(error) if error.kind() == Io::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        self.root.sync(parent)?;
        known().insert(directory.to_owned());
        Ok(())
    }

    /// Opens an object for reading, and tells its length.
    ///
    /// # Errors
    ///
    /// `Corrupt` if something else than a file has its name.
    fn open(&self, name: &str) -> Result<(File, u64)> {
        self.root.file(name).map_err(|e| self.unread(name, e))
    }

    /// The error of an object that cannot be read.
    fn unread(&self, name: &str, error: std::io::Error) -> Error {
        match error.kind() {
            Io::InvalidData => return damaged(name, &error.to_string()),
            // Something else than a directory holds nothing.
            Io::NotADirectory if name == INFO => {
                let message = format!("cannot read {name}");
                return Error::from_io(message, error).of_kind(ErrorKind::NotFound);
            }
            _ => {}
        }
        let error = if name == INFO { error } else { self.missing(error) };
        let whose = match error.kind() {
            Io::PermissionDenied => {
                ", which is another user's: chown -R gives the repository to one user"
            }
            _ => "",
        };
        Error::from_io(format!("cannot read {name}{whose}"), error)
    }

    fn read(&self, name: &str) -> Result<Bytes> {
        let (file, len) = self.open(name)?;
        let most = most_bytes(name);
        if len > most {
            return Err(damaged(name, &format!("it has {len} bytes, more than any such object")));
        }
        let mut data = Vec::with_capacity(usize::try_from(len).expect("it is not too long"));
        file.take(most).read_to_end(&mut data).map_err(|e| self.unread(name, e))?;
        Ok(data.into())
    }

    fn read_range(&self, name: &str, offset: u64, len: usize) -> Result<Bytes> {
        let failed = |e| match std::io::Error::kind(&e) {
            Io::UnexpectedEof => Error::new(ErrorKind::Corrupt, format!("{name} is truncated")),
            _ => self.unread(name, e),
        };
        let (file, _) = self.open(name)?;
        let too_long = || {
            Error::new(ErrorKind::Corrupt, format!("{len} bytes of {name} are more than a block"))
        };
        let mut buffer = BlockBuffer::with_len(len).ok_or_else(too_long)?;
        // To try would make the kernel read ahead, what is then read once more past its memory.
        let may_be_cached = sys::is_cached(file.as_fd(), offset, len as u64).unwrap_or(true);
        if may_be_cached && sys::read_cached(file.as_fd(), &mut buffer, offset) == Ok(len) {
            return Ok(buffer.freeze());
        }
        if let Some(read) = read_direct(&file, offset, len).map_err(failed)? {
            return Ok(read);
        }
        file.read_exact_at(&mut buffer, offset).map_err(failed)?;
        Ok(buffer.freeze())
    }

    fn read_tail(&self, name: &str, len: usize) -> Result<Bytes> {
        let (file, size) = self.open(name)?;
        let len = usize::try_from(size).unwrap_or(usize::MAX).min(len);
        let mut data = vec![0; len];
        let read = file.read_exact_at(&mut data, size - len as u64);
        read.map_err(|e| self.unread(name, e))?;
        Ok(data.into())
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>> {
        let mut names = Vec::new();
        let mut directories = vec![prefix.trim_end_matches('/').to_owned()];
        while let Some(directory) = directories.pop() {
            let failed = |e| Error::from_io(format!("cannot list {}", one_line(&directory)), e);
            let entries = match self.root.entries(&directory) {
                Ok(entries) => entries,
                Err(error) if error.kind() == Io::NotFound => {
                    self.gone().map_err(failed)?;
                    continue;
                }
                Err(error) => return Err(failed(error)),
            };
            for entry in entries {
                // A name that is not UTF-8 is none of ours.
                let Ok(name) = entry.name.into_string() else { continue };
                let name = format!("{directory}/{name}");
                // What has the name of a document is one, or was.
                if entry.is_directory && !names::is_document(&name) {
                    directories.push(name);
                } else {
                    names.push(name);
                }
            }
            if names.len() + directories.len() > MAX_NAMES {
                return Err(too_many(prefix));
            }
        }
        Ok(names)
    }

    fn delete(&self, names: &[String]) -> Result<()> {
        let mut parents = Vec::new();
        for name in names {
            match self.root.remove(name) {
                Ok(()) => {}
                // Whoever deleted it before us may not have synced that yet.
                Err(error) if error.kind() == Io::NotFound => {}
                Err(error) => return Err(Error::from_io(format!("cannot delete {name}"), error)),
            }
            let parent = parent(name);
            if parents.last() != Some(&parent) {
                parents.push(parent);
            }
        }
        parents.sort_unstable();
        parents.dedup();
        for parent in parents.iter().rev() {
            self.tidy(parent)
                .map_err(|e| Error::from_io(format!("cannot delete in {parent}"), e))?;
        }
        Ok(())
    }

    /// Makes the deletions in a directory durable, and removes it if it is empty and of one
    /// snapshot only.
    fn tidy(&self, directory: &str) -> std::io::Result<()> {
        let mut at = directory;
        loop {
            match self.root.sync(at) {
                Err(error) if error.kind() != Io::NotFound => return Err(error),
                _ => {}
            }
            // What is below `pending/` and `tags/` comes and goes.
            let below_top = at.starts_with("pending/") || at.starts_with("tags/");
            if !below_top || self.root.remove_directory(at).is_err() {
                return Ok(());
            }
            self.made.lock().expect("nothing panics under this lock").remove(at);
            at = parent(at);
        }
    }

    fn sweep(&self, before: Timestamp) -> Result<u64> {
        let entries = match self.root.entries(STAGING) {
            Ok(entries) => entries,
            Err(error) if error.kind() == Io::NotFound => return Ok(0),
            Err(error) => return Err(Error::from_io(format!("cannot sweep {STAGING}"), error)),
        };
        let mut bytes = 0;
        let ours = |name: &&str| Uuid::try_parse(name).is_ok();
        for name in entries.iter().filter_map(|entry| entry.name.to_str().filter(ours)) {
            let name = format!("{STAGING}/{name}");
            let Ok(found) = self.root.stat(&name) else { continue };
            let old = modified(&found).is_ok_and(|time| time < before);
            if old && self.root.remove(&name).is_ok() {
                bytes += u64::try_from(found.st_size).unwrap_or(0);
            }
        }
        Ok(bytes)
    }

    /// The time that the file system gives a new file: on a network file system, the server's.
    fn now(&self) -> Result<Timestamp> {
        let time = || {
            self.ensure_directory(STAGING)?;
            let file = self.root.unnamed(STAGING)?;
            file.set_len(1)?;
            Ok(nix::sys::stat::fstat(&file)?)
        };
        let found =
            time().map_err(|e| Error::from_io("cannot tell the time of the file system", e))?;
        modified(&found)
    }
}

/// The directory that a name is in.
fn parent(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(parent, _)| parent)
}

/// When a file was changed, by the clock of its file system.
fn modified(file: &FileStat) -> Result<Timestamp> {
    let nanoseconds = i32::try_from(file.st_mtime_nsec).unwrap_or(0);
    Timestamp::new(file.st_mtime, nanoseconds).map_err(|e| {
        Error::with_source(ErrorKind::Unavailable, "the clock of the file system is off", e)
    })
}

#[async_trait]
impl Objects for Directory {
    fn name(&self) -> String {
        self.0.path.display().to_string()
    }

    async fn no_repository(&self) -> Error {
        let inner = Arc::clone(&self.0);
        blocking(move || empty::no_repository(&inner.path)).await
    }

    async fn create(&self, name: &str, data: Bytes) -> Result<bool> {
        let name = name.to_owned();
        self.run(move |inner| inner.create(&name, &data)).await
    }

    async fn read(&self, name: &str) -> Result<Bytes> {
        let name = name.to_owned();
        self.run(move |inner| inner.read(&name)).await
    }

    async fn read_range(
        &self,
        name: &str,
        offset: u64,
        len: usize,
        decode: Decode,
    ) -> Result<Block> {
        let name = name.to_owned();
        self.run(move |inner| decode(&inner.read_range(&name, offset, len)?)).await
    }

    async fn read_tail(&self, name: &str, len: usize) -> Result<Bytes> {
        let name = name.to_owned();
        self.run(move |inner| inner.read_tail(&name, len)).await
    }

    async fn exists(&self, name: &str) -> Result<bool> {
        let name = name.to_owned();
        self.run(move |inner| match inner.root.stat(&name) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == Io::NotFound => Ok(false),
            Err(error) => Err(Error::from_io(format!("cannot look for {name}"), error)),
        })
        .await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>> {
        let prefix = prefix.to_owned();
        self.run(move |inner| inner.list(&prefix)).await
    }

    async fn modified(&self, name: &str) -> Result<Timestamp> {
        let name = name.to_owned();
        self.run(move |inner| {
            let found = inner.root.stat(&name);
            modified(
                &found.map_err(|e| Error::from_io(format!("cannot tell how old {name} is"), e))?,
            )
        })
        .await
    }

    async fn delete(&self, names: &[String]) -> Result<()> {
        let names = names.to_vec();
        self.run(move |inner| inner.delete(&names)).await
    }

    async fn sweep(&self, before: Timestamp) -> Result<u64> {
        self.run(move |inner| inner.sweep(before)).await
    }

    async fn now(&self) -> Result<Timestamp> {
        self.run(Inner::now).await
    }

    async fn alone(&self) -> Result<Box<dyn Send + Sync>> {
        self.run(|inner| {
            // One's own is given up for it.
            let mut own = inner.lock();
            *own = None;
            match Lock::alone(&inner.root) {
                Ok(lock) => Ok(Box::new(lock) as Box<dyn Send + Sync>),
                Err(error) => {
                    *own = Lock::share(&inner.root)?;
                    Err(error)
                }
            }
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

    use super::*;
    use crate::model::DIRECT_ALIGNMENT;

    #[test]
    fn an_object_is_what_was_given_however_long_and_wherever_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let inner = Inner::new(dir.path());
        let mut memory: Vec<u8> = (0..3_200_000u32).map(|n| (n % 253) as u8).collect();
        let start = memory.as_ptr().align_offset(DIRECT_ALIGNMENT);
        memory.drain(..7);
        for (n, from) in [start, start + 1, start + 512].into_iter().enumerate() {
            for len in [0, 1, 1 << 20, (1 << 20) + 1, 3_000_001] {
                let data = &memory[from..from + len];
                let name = format!("{n}-{len}");
                assert!(inner.create(&name, data).unwrap());
                assert_eq!(inner.read(&name).unwrap(), data, "{len} bytes from {from}");
            }
        }
    }

    #[test]
    fn finds_and_makes_nothing_where_a_repository_was() {
        let dir = tempfile::tempdir().unwrap();
        let (here, away) = (dir.path().join("here"), dir.path().join("away"));
        std::fs::create_dir(&here).unwrap();
        let inner = Inner::new(&here);
        assert!(inner.create(INFO, b"{}").unwrap() && inner.create("a/b/c", b"x").unwrap());
        // It is the same one under another name.
        std::fs::rename(&here, &away).unwrap();
        std::fs::create_dir(&here).unwrap();
        assert!(inner.create("a/b/d", b"y").unwrap());
        assert_eq!(inner.list("a/").unwrap().len(), 2);
        assert!(away.join("a/b/d").exists() && !here.join("a").exists());
        assert_eq!(inner.read("a/b/x").unwrap_err().kind(), ErrorKind::NotFound);
        std::fs::rename(away.join("a"), here.join("a")).unwrap();
        std::fs::remove_file(away.join(INFO)).unwrap();
        for error in [
            inner.list("a/").unwrap_err(),
            inner.read("a/b/c").unwrap_err(),
            inner.read_range("a/b/c", 0, 1).unwrap_err(),
            inner.create("a/b/e", b"z").unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Unavailable);
            assert!(crate::store::causes(&error).contains("the repository is gone"), "{error:?}");
        }
        assert!(!away.join("a").exists());
    }

    #[test]
    fn objects_made_by_root_belong_to_the_owner_of_the_repository() {
        if !Uid::effective().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(dir.path(), Some(1234), Some(567)).unwrap();
        let inner = Inner::new(dir.path());
        assert!(inner.create(INFO, b"{}").unwrap() && inner.create("a/b", b"x").unwrap());
        for name in [INFO, "a", "a/b"] {
            let found = dir.path().join(name).metadata().unwrap();
            assert_eq!((found.uid(), found.gid()), (1234, 567), "{name}");
        }
    }

    #[test]
    fn names_that_lead_nowhere_or_to_no_file_are_damage() {
        let dir = tempfile::tempdir().unwrap();
        let inner = Inner::new(dir.path());
        assert!(inner.create(INFO, b"{}").unwrap() && inner.create("a/b.json", b"x").unwrap());
        std::fs::create_dir(dir.path().join("a/c.json")).unwrap();
        std::os::unix::fs::symlink("/no/such", dir.path().join("a/d.json")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", dir.path().join("a/e.json")).unwrap();
        let mut names = inner.list("a/").unwrap();
        names.sort();
        assert_eq!(names, ["a/b.json", "a/c.json", "a/d.json", "a/e.json"]);
        for name in &names[1..] {
            for error in [
                inner.read(name).unwrap_err(),
                inner.read_range(name, 0, 1).unwrap_err(),
                inner.read_tail(name, 1).unwrap_err(),
            ] {
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                assert!(error.to_string().contains(name), "{error}");
            }
        }
        // A directory that is somewhere else, and not there now, is not an empty one.
        std::os::unix::fs::symlink("/no/such", dir.path().join("f")).unwrap();
        assert!(inner.list("f/").unwrap_err().to_string().contains("cannot list f"));
        assert!(inner.list("g/").unwrap().is_empty());
    }

    #[test]
    fn a_range_is_the_same_from_the_disk_and_from_memory() {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..1_500_001u32).map(|n| (n % 251) as u8).collect();
        std::fs::write(dir.path().join("x"), &content).unwrap();
        let inner = Inner::new(dir.path());
        let file = File::open(dir.path().join("x")).unwrap();
        file.sync_all().unwrap();
        for (offset, len) in [(0, 1), (4095, 2), (511, 524_300), (975_701, 524_300), (4096, 4096)] {
            for _ in ["from the disk", "from memory"] {
                let read = inner.read_range("x", offset, len).unwrap();
                assert_eq!(read, content[usize::try_from(offset).unwrap()..][..len], "{offset}");
            }
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
            let direct = read_direct(&File::open(dir.path().join("x")).unwrap(), offset, len);
            if let Some(read) = direct.unwrap() {
                assert_eq!(read, content[usize::try_from(offset).unwrap()..][..len], "{offset}");
            }
        }
        // What is in memory is found there, and looking for it brings nothing there.
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        // A file system that is in memory altogether cannot show it.
        if sys::is_cached(file.as_fd(), 100_000, 400_000) == Ok(false) {
            inner.read_range("x", 100_000, 400_000).unwrap();
            let page = |n| sys::is_cached(file.as_fd(), n * 4096, 4096).unwrap();
            let cached: Vec<u64> = (0..content.len() as u64 / 4096).filter(|n| page(*n)).collect();
            assert!(cached.is_empty(), "pages in memory: {cached:?}");
            file.read_exact_at(&mut vec![0; content.len()], 0).unwrap();
            assert!(sys::is_cached(file.as_fd(), 100_000, 400_000).unwrap());
            assert!(sys::is_cached(file.as_fd(), 1_499_999, 1).unwrap());
        }
        for (offset, len) in [(1_500_000, 2), (1_499_000, 100_000), (2_000_000, 1)] {
            let cut = inner.read_range("x", offset, len).unwrap_err();
            assert_eq!(cut.kind(), ErrorKind::Corrupt, "{offset}");
        }
    }
}
