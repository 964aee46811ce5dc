//! A file or a device that is written.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{
    FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{AccessFlags, access};
use tempfile::{NamedTempFile, TempPath};

use crate::model::{BLOCK_SIZE_U64, Block, BlockBuffer, BlockIndex};
use crate::sys;
use crate::transfer::Error;

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
    path: PathBuf,
    len: u64,
    kind: Kind,
    /// Nobody has written to it before.
    is_fresh: bool,
}

#[derive(Debug)]
enum Kind {
    File { staged: NamedTempFile, handle: Arc<File>, mode: u32, _lock: Flock<File> },
    Device { handle: Arc<File>, direct: Arc<File>, len: u64 },
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
            Place::Nothing => Self::open_file(path, len, 0o600, key),
            Place::File { mode } => {
                // The file behind a link is replaced, not the link.
                let real = path.canonicalize().map_err(|e| Error::io("write", path, e))?;
                Self::open_file(&real, len, mode, key)
            }
            Place::Device => Self::open_device(path, len),
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
            Place::File { .. } | Place::Nothing => {
                let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
                access(directory_of(&real), AccessFlags::W_OK | AccessFlags::X_OK).map_err(failed)
            }
        }
    }

    fn open_file(path: &Path, len: u64, mode: u32, key: Option<&str>) -> Result<Self, Error> {
        let failed = |e| Error::io("write", path, e);
        let directory = directory_of(path);
        let name =
            path.file_name().ok_or_else(|| Error::unsuitable(path, "it is not a file name"))?;
        let mut prefix = OsString::from(".");
        prefix.push(OsStr::from_bytes(beginning(name.as_bytes())));
        let mut builder = tempfile::Builder::new();
        // Nobody else sees what is not whole, and whoever goes on can write it.
        builder.permissions(std::fs::Permissions::from_mode(0o600)).suffix(".part");
        let (staged, is_fresh) = match key {
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
        let lock = staged.as_file().try_clone().map_err(failed)?;
        let lock =
            Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| match e {
                Errno::EWOULDBLOCK => Error::unsuitable(
                    path,
                    "another process is writing it; wait until that has ended",
                ),
                error => failed(error.into()),
            })?;
        // Whoever had it before may have given it its name meanwhile.
        let (ours, here) = (staged.as_file().metadata(), staged.path().metadata());
        if here.map(|here| here.ino()).ok() != Some(ours.map_err(failed)?.ino()) {
            return Err(Error::unsuitable(path, "another process was writing it; try again"));
        }
        staged.as_file().set_len(len).map_err(failed)?;
        let handle = Arc::new(staged.as_file().try_clone().map_err(failed)?);
        let kind = Kind::File { staged, handle, mode, _lock: lock };
        let mut target = Self { path: path.to_owned(), len, kind, is_fresh };
        // What is found by its name outlives whatever ends this process: no error on the way may remove it.
        if key.is_some() {
            target.keep();
        }
        Ok(target)
    }

    fn open_device(path: &Path, len: u64) -> Result<Self, Error> {
        let (file, has) = open_unused(path, File::options().write(true), len)?;
        let mut options = File::options();
        options.read(true).custom_flags(libc::O_DIRECT);
        let direct = options.open(path).map_err(|e| Error::io("read", path, e))?;
        let kind = Kind::Device { handle: Arc::new(file), direct: Arc::new(direct), len: has };
        Ok(Self { path: path.to_owned(), len, kind, is_fresh: false })
    }

    /// Whether nobody has written to it before.
    pub(crate) fn is_fresh(&self) -> bool {
        self.is_fresh
    }

    /// The file that is not whole.
    pub(crate) fn partial(&self) -> Option<PathBuf> {
        match &self.kind {
            Kind::File { staged, .. } => Some(staged.path().to_owned()),
            Kind::Device { .. } => None,
        }
    }

    /// Leaves a file that is not whole when this is dropped.
    fn keep(&mut self) {
        if let Kind::File { staged, .. } = &mut self.kind {
            staged.disable_cleanup(true);
        }
    }

    /// Removes a file that is not whole. Waits for the disk.
    pub(crate) fn discard(mut self) {
        if let Kind::File { staged, .. } = &mut self.kind {
            staged.disable_cleanup(false);
        }
    }

    /// Whether holes have to be written.
    pub(crate) fn is_device(&self) -> bool {
        matches!(self.kind, Kind::Device { .. })
    }

    /// Bytes that can be written: the image, or the whole device.
    pub(crate) fn capacity(&self) -> u64 {
        match &self.kind {
            Kind::File { .. } => self.len,
            Kind::Device { len, .. } => *len,
        }
    }

    /// What writes to it, from any thread.
    pub(crate) fn writer(&self) -> Writer {
        let (file, reader) = match &self.kind {
            Kind::File { handle, .. } => (handle, handle),
            Kind::Device { handle, direct, .. } => (handle, direct),
        };
        let (file, reader) = (Arc::clone(file), Arc::clone(reader));
        Writer { path: self.path.clone(), file, reader, capacity: self.capacity() }
    }

    /// Makes everything durable, and gives a file its name. Waits for the disk.
    pub(crate) fn finish(self) -> Result<(), Error> {
        let Self { path, kind, .. } = self;
        let failed = |e| Error::io("write", &path, e);
        match kind {
            Kind::Device { handle, .. } => handle.sync_all().map_err(failed),
            Kind::File { staged, mode, .. } => {
                let mode = std::fs::Permissions::from_mode(mode);
                staged.as_file().set_permissions(mode).map_err(failed)?;
                staged.as_file().sync_all().map_err(failed)?;
                staged.persist(&path).map_err(|e| failed(e.error))?;
                File::open(directory_of(&path)).and_then(|d| d.sync_all()).map_err(failed)
            }
        }
    }
}

/// What is where an image is to be.
enum Place {
    Nothing,
    File { mode: u32 },
    Device,
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
            Ok(Place::File { mode: found.permissions().mode() & 0o7777 })
        }
        Ok(_) => Err(Error::unsuitable(path, "it is neither a file nor a block device")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Place::Nothing),
        Err(error) => Err(Error::io("write", path, error)),
    }
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
    capacity: u64,
}

impl Writer {
    /// Makes a file a single hole. Waits for the disk.
    pub(crate) fn clear(&self) -> Result<(), Error> {
        let cleared = self.file.set_len(0).and_then(|()| self.file.set_len(self.capacity));
        cleared.map_err(|e| Error::io("write", &self.path, e))
    }

    /// Reads one block; `None` if the target ends before it. Waits for the disk.
    pub(crate) fn read(&self, index: BlockIndex) -> Result<Option<Block>, Error> {
        let start = index.offset();
        let len = self.capacity.saturating_sub(start).min(BLOCK_SIZE_U64);
        let len = usize::try_from(len).expect("at most a block");
        if len == 0 {
            return Ok(None);
        }
        let mut buffer = BlockBuffer::block();
        let read = self.reader.read_exact_at(&mut buffer[..len], start);
        read.map_err(|e| Error::io("read", &self.path, e))?;
        buffer[len..].fill(0);
        Ok(Some(Block::new(buffer.freeze())))
    }

    /// Writes one block, as far as the target reaches. Waits for the disk.
    pub(crate) fn write(&self, index: BlockIndex, block: &Block) -> Result<(), Error> {
        let start = index.offset();
        let len = self.capacity.saturating_sub(start).min(BLOCK_SIZE_U64);
        let bytes = &block.bytes()[..usize::try_from(len).expect("at most a block")];
        self.file.write_all_at(bytes, start).map_err(|e| Error::io("write", &self.path, e))
    }

    /// Makes the bytes `start..end` of a device zero. Waits for the disk.
    pub(crate) fn zero(&self, start: u64, end: u64) -> Result<(), Error> {
        let end = end.min(self.capacity);
        let mut at = start;
        while at < end {
            let len = (end - at).min(ZERO_STEP);
            match sys::zero_block_device(self.file.as_fd(), at, len) {
                Ok(()) => {}
                // Not every device can, nor every length: then zeros are written.
                Err(_) => {
                    self.write_zeros(at, len).map_err(|e| Error::io("write", &self.path, e))?;
                }
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
        target.writer().write(BlockIndex(0), &data()).unwrap();
        drop(target);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
        let target = Target::open(&path, 600_000, None).unwrap();
        target.writer().write(BlockIndex(1), &data()).unwrap();
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
        assert!(!open().unwrap().is_fresh(), "it is our own");
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
