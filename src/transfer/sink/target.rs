//! A file or a device that is written.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata, TryLockError};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{
    FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{AccessFlags, access};
use tempfile::{NamedTempFile, TempPath};

use super::kept::Kept;
use crate::model::{Block, BlockIndex};
use crate::sys;
use crate::transfer::Error;
use crate::transfer::source::file::{len_within, read_block};

/// Bytes of a device that are made zero with one call.
const ZERO_STEP: u64 = 64 << 20;

/// Bytes of a name that the file beside it has in its own, which is longer and may have 255.
const MAX_PREFIX: usize = 200;

/// A file or block device that becomes the image of a snapshot.
///
/// A file is written beside its place and gets its name at the end: until then, and after a failure,
/// what was there is untouched. A device is written in place, holes included.
#[derive(Debug)]
pub(crate) struct Target {
    /// What writes to it, from any thread.
    pub(super) writer: Writer,
    /// The file that is not whole, and what it is given with its name; a device has none.
    pub(super) staged: Option<(NamedTempFile, Kept)>,
    /// Nobody has written to it before.
    pub(super) is_fresh: bool,
    /// The length that a file gets which is written in place.
    resize: Option<u64>,
}

impl Target {
    /// Opens the place for an image of `len` bytes. With a `key` the file that is not whole has it in its name, and
    /// that of an earlier run is taken up.
    ///
    /// # Errors
    ///
    /// If it is a directory, a device that is too small or in use, or cannot be written.
    pub(crate) fn open(path: &Path, len: u64, key: Option<&str>) -> Result<Self, Error> {
        match look(path)? {
            Place::Nothing => Self::open_file(path, len, Kept::default(), key),
            Place::File(found) => {
                // The file behind a link is replaced, not the link.
                let real = path.canonicalize().map_err(|e| Error::io("write", path, e))?;
                Self::open_file(&real, len, Kept::of(&real, &found)?, key)
            }
            Place::Device => Self::open_device(path, len),
        }
    }

    /// Opens a file or device that holds an image, which is changed in place until it has `len` bytes.
    ///
    /// # Errors
    ///
    /// As of [`open`](Self::open), and if there is nothing.
    pub(crate) fn open_in_place(path: &Path, len: u64) -> Result<Self, Error> {
        let failed = |e| Error::io("write", path, e);
        match look(path)? {
            Place::Nothing => Err(Error::unsuitable(
                path,
                "there is no such file or device, which could be changed",
            )),
            Place::Device => Self::open_device(path, len),
            Place::File(_) => {
                let file = File::options().read(true).write(true).open(path).map_err(failed)?;
                lock(&file, path)?;
                let capacity = file.metadata().map_err(failed)?.len().max(len);
                let file = Arc::new(file);
                let reader = Arc::clone(&file);
                let path = path.to_owned();
                let writer = Writer { path, file, reader, capacity, in_place: true };
                Ok(Self { writer, staged: None, is_fresh: false, resize: Some(len) })
            }
        }
    }

    /// Whether something of this kind can be written at all.
    ///
    /// # Errors
    ///
    /// If it is a directory, or something else that is neither a file nor a block device.
    pub(crate) fn check_kind(path: &Path) -> Result<(), Error> {
        match look(path) {
            Err(error @ Error::Unsuitable { .. }) => Err(error),
            _ => Ok(()),
        }
    }

    /// Whether [`open`](Self::open) would succeed, as far as that shows without a write.
    ///
    /// # Errors
    ///
    /// As of `open`.
    pub(crate) fn check(path: &Path, len: u64) -> Result<(), Error> {
        let failed = |e: Errno| Error::io("write", path, e.into());
        match look(path)? {
            Place::Device => {
                open_unused(path, File::options().read(true), len)?;
                access(path, AccessFlags::W_OK).map_err(failed)
            }
            Place::File(_) | Place::Nothing => {
                let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
                access(directory_of(&real), AccessFlags::W_OK | AccessFlags::X_OK).map_err(failed)
            }
        }
    }

    fn open_file(path: &Path, len: u64, kept: Kept, key: Option<&str>) -> Result<Self, Error> {
        let failed = |e| Error::io("write", path, e);
        let directory = directory_of(path);
        let name =
            path.file_name().ok_or_else(|| Error::unsuitable(path, "it is not a file name"))?;
        let mut prefix = OsString::from(".");
        prefix.push(OsStr::from_bytes(beginning(name.as_bytes())));
        let mut builder = tempfile::Builder::new();
        // Nobody else sees what is not whole, and whoever goes on can write it.
        builder.permissions(std::fs::Permissions::from_mode(0o600)).suffix(".part");
        // What is found by its name may be another's at once, and outlives whatever ends this process.
        builder.disable_cleanup(key.is_some());
        let (mut staged, is_fresh) = match key {
            None => (builder.prefix(&prefix).tempfile_in(directory).map_err(failed)?, true),
            Some(key) => {
                prefix.push(format!(".{key}"));
                let made = builder.prefix(&prefix).rand_bytes(0).tempfile_in(directory);
                match made {
                    Ok(staged) => (staged, true),
                    Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                        prefix.push(".part");
                        (take_up(&directory.join(prefix))?, false)
                    }
                    Err(error) => return Err(failed(error)),
                }
            }
        };
        lock(staged.as_file(), path)?;
        // Whoever had it before may have given it its name meanwhile.
        let (ours, here) = (staged.as_file().metadata(), staged.path().metadata());
        if here.map(|here| here.ino()).ok() != Some(ours.map_err(failed)?.ino()) {
            return Err(Error::unsuitable(path, "another process was writing it; try again"));
        }
        if let Err(error) = staged.as_file().set_len(len) {
            staged.disable_cleanup(!is_fresh);
            return Err(failed(error));
        }
        let file = Arc::new(staged.as_file().try_clone().map_err(failed)?);
        let reader = Arc::clone(&file);
        let writer = Writer { path: path.to_owned(), file, reader, capacity: len, in_place: false };
        Ok(Self { writer, staged: Some((staged, kept)), is_fresh, resize: None })
    }

    fn open_device(path: &Path, len: u64) -> Result<Self, Error> {
        let (file, has) = open_unused(path, File::options().write(true), len)?;
        let mut options = File::options();
        options.read(true).custom_flags(libc::O_DIRECT);
        let reader = options.open(path).map_err(|e| Error::io("read", path, e))?;
        let (file, reader) = (Arc::new(file), Arc::new(reader));
        let writer = Writer { path: path.to_owned(), file, reader, capacity: has, in_place: true };
        Ok(Self { writer, staged: None, is_fresh: false, resize: None })
    }

    /// Removes a file that is not whole. Waits for the disk.
    pub(crate) fn discard(mut self) {
        if let Some((staged, _)) = &mut self.staged {
            staged.disable_cleanup(false);
        }
    }

    /// Makes everything durable, and gives a file its name. Waits for the disk.
    pub(crate) fn finish(self) -> Result<(), Error> {
        let Writer { path, file, .. } = &self.writer;
        let failed = |e| Error::io("write", path, e);
        let Some((staged, kept)) = self.staged else {
            let resized = self.resize.map_or(Ok(()), |len| file.set_len(len));
            return resized.and_then(|()| file.sync_all()).map_err(failed);
        };
        kept.give(staged.as_file()).map_err(failed)?;
        staged.as_file().sync_all().map_err(failed)?;
        staged.persist(path).map_err(|e| failed(e.error))?;
        File::open(directory_of(path)).and_then(|d| d.sync_all()).map_err(failed)
    }
}

/// What is where an image is to be.
enum Place {
    Nothing,
    File(Metadata),
    Device,
}

/// Keeps other processes of ours from writing a file.
fn lock(file: &File, path: &Path) -> Result<(), Error> {
    file.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => {
            Error::unsuitable(path, "another process is writing it; wait until that has ended")
        }
        TryLockError::Error(error) => Error::io("write", path, error),
    })
}

fn look(path: &Path) -> Result<Place, Error> {
    match path.metadata() {
        _ if path == Path::new("-") => {
            let why = "blocks come in any order, and standard output takes them in one; \
                       `cat` of the image in a mount does that, and ./- is a file";
            Err(Error::unsuitable(path, why))
        }
        Ok(found) if found.is_dir() => {
            Err(Error::unsuitable(path, "it is a directory; give the name of a file in it"))
        }
        Ok(found) if found.file_type().is_block_device() => Ok(Place::Device),
        Ok(found) if found.is_file() => {
            if is_planted(path, &found).map_err(|e| Error::io("write", path, e))? {
                let why = "another user's file is there, in a directory that others can write to; \
                           remove it, or write elsewhere";
                return Err(Error::unsuitable(path, why));
            }
            Ok(Place::File(found))
        }
        Ok(_) => Err(Error::unsuitable(path, "it is neither a file nor a block device")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Place::Nothing),
        Err(error) => Err(Error::io("write", path, error)),
    }
}

/// Whether somebody else may have put a file where he expects an image, to have what is in it. The kernel refuses
/// such a file to whoever would make one (`fs.protected_regular`).
fn is_planted(path: &Path, found: &Metadata) -> std::io::Result<bool> {
    let is_anothers = |directory: &Path, found: &Metadata| -> std::io::Result<bool> {
        let directory = directory.metadata()?;
        let others_write = directory.mode() & 0o002 != 0 || directory.mode() & 0o1020 == 0o1020;
        let ours = [nix::unistd::geteuid().as_raw(), directory.uid()];
        Ok(others_write && !ours.contains(&found.uid()))
    };
    // A link that leads to it, too: the kernel follows none of another user's there (`fs.protected_symlinks`).
    Ok(is_anothers(directory_of(path), &path.symlink_metadata()?)?
        || is_anothers(directory_of(&path.canonicalize()?), found)?)
}

/// Opens a device that nobody uses, and has room for `len` bytes; and how many it has.
fn open_unused(
    path: &Path,
    options: &mut std::fs::OpenOptions,
    len: u64,
) -> Result<(File, u64), Error> {
    // O_EXCL on a device: not while it, or a partition of it, is mounted or otherwise in use.
    let file =
        options.custom_flags(libc::O_EXCL).open(path).map_err(|e| match e.raw_os_error() {
            Some(libc::EBUSY) => Error::unsuitable(
                path,
                "it is in use: mounted, or part of something that is; unmount it first",
            ),
            _ => Error::io("write", path, e),
        })?;
    let has =
        sys::block_device_len(file.as_fd()).map_err(|e| Error::io("write", path, e.into()))?;
    if has < len {
        let why = format!("it is too small: it has {has} bytes, and the image has {len}");
        return Err(Error::unsuitable(path, why));
    }
    Ok((file, has))
}

/// Writes blocks to a target.
#[derive(Clone, Debug)]
pub(crate) struct Writer {
    path: PathBuf,
    file: Arc<File>,
    /// What is read past the page cache, of a device.
    reader: Arc<File>,
    /// Bytes that can be written: the image, or the whole device.
    capacity: u64,
    /// Whether something is there already: holes have to be written.
    pub(super) in_place: bool,
}

impl Writer {
    /// Makes a file a single hole. Waits for the disk.
    pub(crate) fn clear(&self) -> Result<(), Error> {
        let cleared = self.file.set_len(0).and_then(|()| self.file.set_len(self.capacity));
        cleared.map_err(|e| Error::io("write", &self.path, e))
    }

    /// Reads one block; `None` if the target ends before it. Waits for the disk.
    pub(crate) fn read(&self, index: BlockIndex) -> Result<Option<Block>, Error> {
        if index.offset() >= self.capacity {
            return Ok(None);
        }
        let bytes = read_block(&self.reader, index, self.capacity);
        Ok(Some(Block::new(bytes.map_err(|e| Error::io("read", &self.path, e))?)))
    }

    /// Writes one block, as far as the target reaches. Waits for the disk.
    pub(crate) fn write(&self, index: BlockIndex, block: &Block) -> Result<(), Error> {
        let bytes = &block.bytes()[..len_within(index, self.capacity)];
        let written = self.file.write_all_at(bytes, index.offset());
        written.map_err(|e| Error::io("write", &self.path, e))
    }

    /// Makes the bytes `start..end` zero, holes of a file. Waits for the disk.
    pub(crate) fn zero(&self, start: u64, end: u64) -> Result<(), Error> {
        let end = end.min(self.capacity);
        let mut at = start;
        while at < end {
            let len = (end - at).min(ZERO_STEP);
            // Not every device or file system can, nor every length: then zeros are written.
            if sys::zero_block_device(self.file.as_fd(), at, len).is_err()
                && punch(&self.file, at, len).is_err()
            {
                self.write_zeros(at, len).map_err(|e| Error::io("write", &self.path, e))?;
            }
            at += len;
        }
        Ok(())
    }

    fn write_zeros(&self, start: u64, len: u64) -> std::io::Result<()> {
        for part in crate::model::block_parts(start, len) {
            let at = part.index.offset() + part.start as u64;
            self.file.write_all_at(&crate::model::zeros()[..part.len], at)?;
        }
        Ok(())
    }
}

/// Makes a hole of a part of a file.
fn punch(file: &File, start: u64, len: u64) -> nix::Result<()> {
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let offset = |n: u64| libc::off_t::try_from(n).map_err(|_| Errno::EFBIG);
    fallocate(file, hole, offset(start)?, offset(len)?)
}

/// The file that an earlier run has left, if it is one of ours.
fn take_up(path: &Path) -> Result<NamedTempFile, Error> {
    let failed = |e| Error::io("write", path, e);
    let mut options = File::options();
    let options = options.read(true).write(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options.open(path).map_err(failed)?;
    let found = file.metadata().map_err(failed)?;
    // Somebody else could read and change what is written to a file of his own.
    let is_ours = found.uid() == nix::unistd::geteuid().as_raw();
    if !found.is_file() || !is_ours || found.nlink() != 1 || found.mode() & 0o077 != 0 {
        let why = "it is in the way, and is not what an earlier run has left; remove it";
        return Err(Error::unsuitable(path, why));
    }
    let mut place = TempPath::try_from_path(path).map_err(failed)?;
    place.disable_cleanup(true);
    Ok(NamedTempFile::from_parts(file, place))
}

/// As much of a name as its copy has, without a part of a character.
fn beginning(name: &[u8]) -> &[u8] {
    let len = name.len().min(MAX_PREFIX);
    // A character of UTF-8 has up to four bytes, which begin with the bits 10 but for the first.
    let begins = |at: usize| name.get(at).is_none_or(|byte| byte & 0xc0 != 0x80);
    let back = (0..4).find(|back| begins(len.saturating_sub(*back))).unwrap_or(0);
    &name[..len - back]
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data() -> Block {
        Block::new(vec![5; crate::model::BLOCK_SIZE].into())
    }

    #[test]
    fn a_file_is_replaced_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.img");
        std::fs::write(&path, "old").unwrap();
        let target = Target::open(&path, 600_000, None).unwrap();
        target.writer.write(BlockIndex(0), &data()).unwrap();
        drop(target);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
        let target = Target::open(&path, 600_000, None).unwrap();
        target.writer.write(BlockIndex(1), &data()).unwrap();
        target.finish().unwrap();
        let written = std::fs::read(&path).unwrap();
        assert_eq!(written.len(), 600_000);
        assert!(
            written[..524_288].iter().all(|&b| b == 0)
                && written[524_288..].iter().all(|&b| b == 5)
        );
    }

    #[test]
    fn a_name_may_be_as_long_as_any() {
        let dir = tempfile::tempdir().unwrap();
        // 255 bytes, of which the last character has two.
        let name = format!("a{}", "é".repeat(127));
        assert_eq!(beginning(name.as_bytes()), &name.as_bytes()[..199]);
        assert_eq!(beginning(b"short"), b"short");
        // It need not be UTF-8.
        assert_eq!(beginning(&[0x80; 255]), [0x80; MAX_PREFIX]);
        let path = dir.path().join(name);
        Target::open(&path, 10, None).unwrap().finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), [0; 10]);
    }

    #[test]
    fn refuses_a_partial_file_that_others_can_open() {
        let dir = tempfile::tempdir().unwrap();
        let (path, part) = (dir.path().join("x"), dir.path().join(".x.key.part"));
        let open = || Target::open(&path, 10, Some("key"));
        drop(open().unwrap());
        assert!(!open().unwrap().is_fresh, "it is our own");
        std::fs::set_permissions(&part, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(open().unwrap_err().to_string().contains("in the way"));
        std::fs::set_permissions(&part, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::hard_link(&part, dir.path().join("link")).unwrap();
        assert!(open().unwrap_err().to_string().contains("in the way"));
        std::fs::remove_file(dir.path().join("link")).unwrap();
        if nix::unistd::geteuid().is_root() {
            nix::unistd::chown(&part, Some(65534.into()), None).unwrap();
            assert!(open().unwrap_err().to_string().contains("in the way"));
        }
    }

    #[test]
    fn of_two_who_begin_at_once_one_has_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let (path, part) = (dir.path().join("x"), dir.path().join(".x.key.part"));
        for _ in 0..500 {
            let both = std::sync::Barrier::new(2);
            let open = || {
                both.wait();
                Target::open(&path, 10, Some("key"))
            };
            let opened = std::thread::scope(|scope| {
                [scope.spawn(open), scope.spawn(open)].map(|thread| thread.join().unwrap())
            });
            let says = format!("{opened:?}");
            assert!(says.contains("another process"), "{says}");
            let mut opened: Vec<_> = opened.into_iter().flatten().collect();
            assert_eq!(opened.len(), 1, "{says}");
            assert!(part.exists(), "the other one has removed it");
            opened.remove(0).discard();
            assert!(!part.exists());
        }
        // What is not begun is not left behind.
        Target::open(&path, u64::MAX, Some("key")).unwrap_err();
        assert!(!part.exists());
    }

    #[test]
    fn a_link_stays_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let (link, real) = (dir.path().join("link"), dir.path().join("real"));
        std::fs::write(&real, "old").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        Target::open(&link, 10, None).unwrap().finish().unwrap();
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!(std::fs::read(&real).unwrap(), [0; 10]);
    }

    #[test]
    fn what_cannot_hold_an_image_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (path, says) in [
            (dir.path().to_owned(), "is a directory"),
            (dir.path().join("no/such/dir"), "No such file"),
            (PathBuf::from("-"), "./- is a file"),
            (PathBuf::from("/dev/null"), "neither a file nor a block device"),
        ] {
            let error = Target::open(&path, 1, None).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
