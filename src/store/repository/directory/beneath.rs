//! Names below a directory that was opened once: none of them leads anywhere else.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::fchown;
use std::path::{Path, PathBuf};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{
    AtFlags, OFlag, OpenHow, RenameFlags, ResolveFlag, open, openat, openat2, renameat2,
};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat};
use nix::unistd::{UnlinkatFlags, fsync, linkat, unlinkat};

use crate::store::repository::objects::MAX_NAMES;

/// A directory, and what is below it.
///
/// Its own path is resolved when it is opened. Each name is looked up in what was opened then, and no part of one
/// may be a symbolic link: with a link, or with another directory in the place of one, whoever owns the directory
/// could lead another user, who may do more than they, to any place.
#[derive(Debug)]
pub(super) struct Beneath {
    /// The directory (`O_PATH`), or why it cannot be opened. Keeps it, and its file system, from going away.
    root: nix::Result<OwnedFd>,
    /// Opens a name: by openat2(2), or without it.
    resolve: fn(BorrowedFd<'_>, &str, OFlag, Mode) -> nix::Result<OwnedFd>,
}

/// A name in a directory, and whether it is one of a directory.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: OsString,
    pub(super) is_directory: bool,
}

impl Beneath {
    /// The directory at `path`; what is wrong with it shows when it is used.
    pub(super) fn open(path: &Path) -> Self {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Self { root: open(path, flags, Mode::empty()), resolve }
    }

    /// Opens a name as it is. The empty one is the directory itself.
    ///
    /// # Errors
    ///
    /// `InvalidData` if a part of it is a link, or leads out.
    fn at(&self, name: &str, flags: OFlag, mode: Mode) -> Result<OwnedFd> {
        let root = self.root.as_ref().map_err(|&errno| Error::from(errno))?;
        let name = if name.is_empty() { "." } else { name };
        loop {
            return match (self.resolve)(root.as_fd(), name, flags | OFlag::O_CLOEXEC, mode) {
                Err(Errno::EINTR) => continue,
                Err(Errno::ELOOP | Errno::EXDEV) => Err(link(name)),
                opened => Ok(opened?),
            };
        }
    }

    /// The directory that a name is in, and the name there.
    fn parent<'n>(&self, name: &'n str) -> Result<(OwnedFd, &'n str)> {
        let (parent, last) = name.rsplit_once('/').unwrap_or(("", name));
        Ok((self.at(parent, OFlag::O_PATH | OFlag::O_DIRECTORY, Mode::empty())?, last))
    }

    /// What has a name, a link itself if it is one. The empty name is the directory itself.
    pub(super) fn stat(&self, name: &str) -> Result<FileStat> {
        Ok(fstat(self.at(name, OFlag::O_PATH | OFlag::O_NOFOLLOW, Mode::empty())?)?)
    }

    /// Opens a file for reading, and tells its length.
    ///
    /// # Errors
    ///
    /// `InvalidData` if it is none. It is not opened then: a pipe would be waited for, and a device may do
    /// something.
    pub(super) fn file(&self, name: &str) -> Result<(File, u64)> {
        let found = self.at(name, OFlag::O_PATH | OFlag::O_NOFOLLOW, Mode::empty())?;
        let stat = fstat(&found)?;
        match kind_of(&stat) {
            SFlag::S_IFREG => {}
            SFlag::S_IFLNK => return Err(link(name)),
            _ => return Err(Error::new(ErrorKind::InvalidData, "it is no file")),
        }
        Ok((File::open(by_descriptor(&found))?, u64::try_from(stat.st_size).unwrap_or(0)))
    }

    /// Makes a file, of this user alone, under a name that must be free.
    pub(super) fn create(&self, name: &str) -> Result<File> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
        self.at(name, flags, Mode::S_IRUSR | Mode::S_IWUSR).map(File::from)
    }

    /// Opens a directory.
    pub(super) fn directory(&self, name: &str) -> Result<OwnedFd> {
        self.at(name, OFlag::O_RDONLY | OFlag::O_DIRECTORY, Mode::empty())
    }

    /// Makes a directory, of this user alone, under a name that must be free.
    pub(super) fn make_directory(&self, name: &str) -> Result<()> {
        let (parent, last) = self.parent(name)?;
        Ok(mkdirat(parent, last, Mode::S_IRWXU)?)
    }

    /// Gives a directory that was just made to another user: one that has its name by now and is not empty stays
    /// whose it is.
    pub(super) fn give_directory(&self, name: &str, uid: u32, gid: u32) -> Result<()> {
        let mut directory = Dir::from_fd(self.directory(name)?)?;
        if directory.iter().count() > 2 {
            return Err(Error::other("somebody has put another directory in its place"));
        }
        fchown(&directory, Some(uid), Some(gid))
    }

    /// A file without a name in a directory.
    pub(super) fn unnamed(&self, directory: &str) -> Result<File> {
        tempfile::tempfile_in(by_descriptor(&self.directory(directory)?))
    }

    /// What is in a directory: not much more than [`MAX_NAMES`], since a file system may have no end of them.
    pub(super) fn entries(&self, name: &str) -> Result<Vec<Entry>> {
        let mut directory = Dir::from_fd(self.directory(name)?)?;
        let mut entries = Vec::new();
        for entry in directory.iter().take(MAX_NAMES + 3) {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes()).to_owned();
            if name != "." && name != ".." {
                entries.push((name, entry.file_type()));
            }
        }
        let entry = |(name, kind): (OsString, Option<Type>)| {
            let is_directory = match kind {
                Some(kind) => kind == Type::Directory,
                // Some file systems have to be asked for it. What is deleted meanwhile is none.
                None => nix::sys::stat::fstatat(&directory, &*name, AtFlags::AT_SYMLINK_NOFOLLOW)
                    .is_ok_and(|found| kind_of(&found) == SFlag::S_IFDIR),
            };
            Entry { name, is_directory }
        };
        Ok(entries.into_iter().map(entry).collect())
    }

    /// Makes the names in a directory durable.
    pub(super) fn sync(&self, directory: &str) -> Result<()> {
        Ok(fsync(self.directory(directory)?)?)
    }

    /// Renames a file to a name that must be free.
    pub(super) fn rename(&self, from: &str, to: &str) -> Result<()> {
        let ((from_parent, from), (to_parent, to)) = (self.parent(from)?, self.parent(to)?);
        match renameat2(&from_parent, from, &to_parent, to, RenameFlags::RENAME_NOREPLACE) {
            // Some file systems (NFS among them) cannot; a hard link is as exclusive.
            Err(Errno::EINVAL | Errno::ENOSYS) => {
                linkat(&from_parent, from, &to_parent, to, AtFlags::empty())?;
                Ok(unlinkat(&from_parent, from, UnlinkatFlags::NoRemoveDir)?)
            }
            renamed => Ok(renamed?),
        }
    }

    /// Removes a file.
    pub(super) fn remove(&self, name: &str) -> Result<()> {
        let (parent, last) = self.parent(name)?;
        Ok(unlinkat(parent, last, UnlinkatFlags::NoRemoveDir)?)
    }

    /// Removes a directory that is empty.
    pub(super) fn remove_directory(&self, name: &str) -> Result<()> {
        let (parent, last) = self.parent(name)?;
        Ok(unlinkat(parent, last, UnlinkatFlags::RemoveDir)?)
    }
}

/// What is open, whatever has its name by now.
fn by_descriptor(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

fn link(name: &str) -> Error {
    let message = format!(
        "{name} is a symbolic link, or below one; a repository has none: mount what it leads to there (mount --bind)"
    );
    Error::new(ErrorKind::InvalidData, message)
}

/// Opens a name below `root`. `ELOOP` and `EXDEV` say that a part of it is a link, or leads out.
fn resolve(root: BorrowedFd<'_>, name: &str, flags: OFlag, mode: Mode) -> nix::Result<OwnedFd> {
    let beneath = ResolveFlag::RESOLVE_BENEATH
        | ResolveFlag::RESOLVE_NO_SYMLINKS
        | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    match openat2(root, name, OpenHow::new().flags(flags).mode(mode).resolve(beneath)) {
        // Before Linux 5.6, and where a container lets through what it knows only.
        Err(Errno::ENOSYS | Errno::EPERM) => walk(root, name, flags, mode),
        opened => opened,
    }
}

/// The same without openat2(2): one part after the other.
fn walk(root: BorrowedFd<'_>, name: &str, flags: OFlag, mode: Mode) -> nix::Result<OwnedFd> {
    let step = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut at = openat(root, ".", step, Mode::empty())?;
    let mut parts = name.split('/').peekable();
    while let Some(part) = parts.next() {
        let is_last = parts.peek().is_none();
        let is_made = is_last && flags.contains(OFlag::O_CREAT);
        if part == ".." || part.is_empty() {
            return Err(Errno::EXDEV);
        }
        // What is there now may be another thing at once: it is opened without following it all the same.
        let wants_link = is_last && flags.contains(OFlag::O_NOFOLLOW);
        if !is_made && !wants_link {
            let found = fstat(openat(&at, part, step, Mode::empty())?)?;
            if kind_of(&found) == SFlag::S_IFLNK {
                return Err(Errno::ELOOP);
            }
        }
        if is_last {
            return openat(&at, part, flags | OFlag::O_NOFOLLOW, mode);
        }
        at = openat(&at, part, step | OFlag::O_DIRECTORY, Mode::empty())?;
    }
    Err(Errno::ENOENT)
}

fn kind_of(found: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::{FileTypeExt as _, symlink};

    use nix::sys::stat::{makedev, mknod};
    use nix::unistd::{Uid, mkfifo};
    use rstest::rstest;

    use super::*;

    type Resolve = fn(BorrowedFd<'_>, &str, OFlag, Mode) -> nix::Result<OwnedFd>;

    /// A directory `here` with `a/b/file`, and beside it `away` with `file`.
    fn world(resolve: Resolve) -> (tempfile::TempDir, Beneath) {
        let dir = tempfile::tempdir().unwrap();
        for (directory, file) in [("here/a/b", "here/a/b/file"), ("away", "away/file")] {
            std::fs::create_dir_all(dir.path().join(directory)).unwrap();
            std::fs::write(dir.path().join(file), "old").unwrap();
        }
        let root = Beneath { resolve, ..Beneath::open(&dir.path().join("here")) };
        (dir, root)
    }

    #[rstest]
    #[case(resolve)]
    #[case(walk)]
    fn names_below_the_root_are_read_made_renamed_and_removed(#[case] resolve: Resolve) {
        let (dir, root) = world(resolve);
        assert_eq!(root.file("a/b/file").unwrap().1, 3);
        root.make_directory("a/c").unwrap();
        root.create("a/c/new").unwrap().write_all(b"longer").unwrap();
        assert_eq!(root.create("a/c/new").unwrap_err().kind(), ErrorKind::AlreadyExists);
        let taken = root.rename("a/c/new", "a/b/file").unwrap_err();
        assert_eq!(taken.kind(), ErrorKind::AlreadyExists);
        root.rename("a/c/new", "a/b/new").unwrap();
        assert_eq!(root.stat("a/b/new").unwrap().st_size, 6);
        let mut names = root.entries("a").unwrap();
        names.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        assert!(names.iter().all(|entry| entry.is_directory));
        assert_eq!(names.iter().map(|entry| &entry.name).collect::<Vec<_>>(), ["b", "c"]);
        root.sync("a").and_then(|()| root.sync("")).unwrap();
        root.remove_directory("a/c").and_then(|()| root.remove("a/b/new")).unwrap();
        assert_eq!(root.stat("a/b/new").unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(root.file("a/no/file").unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(std::fs::read_dir(dir.path().join("here/a")).unwrap().count(), 1);
    }

    #[rstest]
    #[case(resolve)]
    #[case(walk)]
    fn nothing_is_found_or_made_through_a_link(#[case] resolve: Resolve) {
        let (dir, root) = world(resolve);
        symlink(dir.path().join("away"), dir.path().join("here/out")).unwrap();
        symlink("a", dir.path().join("here/in")).unwrap();
        symlink("file", dir.path().join("here/a/b/link")).unwrap();
        symlink("/no/such", dir.path().join("here/a/nowhere")).unwrap();
        for name in ["out/file", "in/b/file", "a/b/link", "a/nowhere", "../away/file"] {
            assert_eq!(root.file(name).unwrap_err().kind(), ErrorKind::InvalidData, "{name}");
        }
        for name in ["out", "in/b", "../away", "a/nowhere"] {
            let inside = format!("{name}/new");
            let errors = [
                root.entries(name).unwrap_err(),
                root.sync(name).unwrap_err(),
                root.unnamed(name).unwrap_err(),
                root.create(&inside).unwrap_err(),
                root.make_directory(&inside).unwrap_err(),
                root.rename("a/b/file", &inside).unwrap_err(),
                root.remove(&format!("{name}/file")).unwrap_err(),
                root.remove_directory(&inside).unwrap_err(),
            ];
            for error in errors {
                assert_eq!(error.kind(), ErrorKind::InvalidData, "{name}: {error}");
            }
        }
        assert_eq!(std::fs::read_dir(dir.path().join("away")).unwrap().count(), 1);
        assert_eq!(std::fs::read_to_string(dir.path().join("away/file")).unwrap(), "old");
        // A link goes as what it is.
        root.remove("out").unwrap();
        assert!(dir.path().join("away/file").exists() && root.file("a/b/file").is_ok());
    }

    #[rstest]
    #[case(resolve)]
    #[case(walk)]
    fn a_pipe_or_a_device_is_never_opened(#[case] resolve: Resolve) {
        let (dir, root) = world(resolve);
        mkfifo(&dir.path().join("here/pipe"), Mode::S_IRWXU).unwrap();
        std::os::unix::net::UnixListener::bind(dir.path().join("here/socket")).unwrap();
        let mut names = vec!["pipe", "socket", "a"];
        let device = dir.path().join("here/device");
        // There is no driver of this number: to open it would be another error.
        let kind = makedev(511, 7);
        if Uid::effective().is_root() && mknod(&device, SFlag::S_IFCHR, Mode::S_IRWXU, kind).is_ok()
        {
            assert!(device.metadata().unwrap().file_type().is_char_device());
            names.push("device");
        }
        for name in names {
            let error = root.file(name).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidData, "{name}: {error}");
        }
    }

    #[test]
    fn a_directory_is_given_away_that_is_empty() {
        if !Uid::effective().is_root() {
            return;
        }
        let (dir, root) = world(resolve);
        let owner =
            |name| std::os::unix::fs::MetadataExt::uid(&dir.path().join(name).metadata().unwrap());
        root.make_directory("new").and_then(|()| root.give_directory("new", 7, 7)).unwrap();
        assert!(root.give_directory("a", 7, 7).is_err());
        assert_eq!((owner("here/new"), owner("here/a")), (7, 0));
    }

    #[test]
    fn stays_the_directory_that_was_opened() {
        let (dir, root) = world(resolve);
        std::fs::rename(dir.path().join("here"), dir.path().join("moved")).unwrap();
        symlink("away", dir.path().join("here")).unwrap();
        root.create("new").unwrap();
        assert!(dir.path().join("moved/new").exists() && !dir.path().join("away/new").exists());
    }
}
