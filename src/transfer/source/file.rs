//! A file or a device, as a source.

use std::fs::{File, Metadata};
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt as _, TryStreamExt as _};
use nix::unistd::{Whence, lseek};
use serde::{Deserialize, Serialize};

use super::{Change, Source};
use crate::blocking::blocking;
use crate::model::{BLOCK_SIZE_U64, Block, BlockBuffer, BlockIndex, VolumeSize};
use crate::store::ListedBlock;
use crate::sys;
use crate::transfer::{Error, Result};

/// A file or block device that is read block by block.
#[derive(Clone, Debug)]
pub(crate) struct FileSource(Arc<Inner>);

/// Size and times of a file, in nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Times {
    len: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    inode: u64,
}

impl Times {
    fn of(metadata: &Metadata) -> Self {
        Self {
            len: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            inode: metadata.ino(),
        }
    }
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    file: File,
    len: u64,
    size: VolumeSize,
    /// What tells whether it is as it was; a device has nothing that does.
    times: Option<Times>,
}

impl FileSource {
    /// Opens a file or a block device.
    ///
    /// # Errors
    ///
    /// If it is neither, is empty, or is larger than the largest volume.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let failed = |e| Error::io("read", path, e);
        let metadata = path.metadata().map_err(failed)?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            let why = "it is a directory; give a disk image or a block device";
            return Err(Error::unsuitable(path, why));
        }
        if !kind.is_file() && !kind.is_block_device() {
            let why = "it is neither a file nor a block device; what comes from a pipe is uploaded as `-`";
            return Err(Error::unsuitable(path, why));
        }
        // What a file system on one of its partitions has written is not in the page cache of the whole device.
        let direct = if kind.is_block_device() { libc::O_DIRECT } else { 0 };
        // Without O_NONBLOCK a file that becomes a pipe meanwhile would hang this.
        let mut options = File::options();
        options.read(true).custom_flags(libc::O_NONBLOCK | direct);
        Self::of(path, options.open(path).map_err(failed)?)
    }

    /// A file or a block device that is open; `path` is what it is called.
    ///
    /// # Errors
    ///
    /// As of [`open`](Self::open).
    pub(crate) fn of(path: &Path, file: File) -> Result<Self> {
        let failed = |e| Error::io("read", path, e);
        let metadata = file.metadata().map_err(failed)?;
        let len = match metadata.file_type().is_block_device() {
            true => sys::block_device_len(file.as_fd()).map_err(|e| failed(e.into()))?,
            false => metadata.len(),
        };
        let size = VolumeSize::holding(len).map_err(|e| Error::unsuitable(path, e.to_string()))?;
        let times = metadata.is_file().then(|| Times::of(&metadata));
        Ok(Self(Arc::new(Inner { path: path.to_owned(), file, len, size, times })))
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.0.path
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.0.len
    }

    /// Size of the volume that holds it.
    pub(crate) fn volume_size(&self) -> VolumeSize {
        self.0.size
    }

    /// What tells whether a file is as it was when it was opened; nothing does of a device.
    pub(crate) fn times(&self) -> Option<&Times> {
        self.0.times.as_ref()
    }

    /// The blocks of a range that are not holes, as runs, ascending.
    ///
    /// Asks the file system, a run at a time; a device has no holes. A run that begins where the last
    /// one ended belongs to the same extent, and blocks that two extents share are in the first.
    pub(crate) fn extents(
        &self,
        range: Range<BlockIndex>,
    ) -> impl Iterator<Item = Result<Range<BlockIndex>>> + use<> {
        let inner = Arc::clone(&self.0);
        let (mut at, stop) = (range.start.offset(), range.end.offset().min(inner.len));
        std::iter::from_fn(move || {
            if at >= stop {
                return None;
            }
            match inner.next_extent(at) {
                Ok(Some((start, end))) => {
                    let first = BlockIndex::containing(start.max(at));
                    let last = BlockIndex::containing(end - 1).next().min(range.end);
                    at = last.offset();
                    (first < last).then_some(Ok(first..last))
                }
                Ok(None) => None,
                Err(error) => {
                    at = stop;
                    Some(Err(Error::io("read", &inner.path, error)))
                }
            }
        })
    }

    /// Waits for the disk.
    fn read_bytes(&self, index: BlockIndex) -> Result<Bytes> {
        let Inner { path, file, len, .. } = &*self.0;
        read_block(file, index, *len).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => shorter(path, *len),
            _ => Error::io("read", path, e),
        })
    }

    /// Whether the file seems to be what it was when it was opened.
    pub(crate) fn is_unchanged(&self) -> bool {
        let Some(then) = &self.0.times else { return true };
        self.0.file.metadata().is_ok_and(|now| {
            // To be renamed or linked changes a file's status, not what is in it.
            let now = Times::of(&now);
            (now.len, now.modified) == (then.len, then.modified)
        })
    }
}

#[async_trait]
impl Source for FileSource {
    fn changes(&self) -> BoxStream<'static, Result<Change>> {
        let end = self.0.size.blocks();
        // An extent of nothing at the end of the volume, for the hole before it.
        let extents = self.extents(BlockIndex::ZERO..end).chain([Ok(end..end)]);
        let mut at = BlockIndex::ZERO;
        let changes = stream::iter(extents).map_ok(move |extent| {
            let hole = at..extent.start;
            at = extent.end;
            let hole = (!hole.is_empty()).then_some(Change::Zeros(hole));
            let blocks = (extent.start.0..extent.end.0).map(BlockIndex);
            let data = blocks.map(|index| Change::Data(index, None));
            stream::iter(hole.into_iter().chain(data).map(Ok))
        });
        changes.try_flatten().boxed()
    }

    /// Reads blocks, and hashes them together; what is behind the end of the file is zeros.
    ///
    /// # Errors
    ///
    /// If one cannot be read, or the file has become shorter.
    async fn read(&self, blocks: &[(BlockIndex, Option<ListedBlock>)]) -> Result<Vec<Block>> {
        let indexes: Vec<_> = blocks.iter().map(|(index, _)| *index).collect();
        let source = self.clone();
        blocking(move || {
            let bytes = indexes.into_iter().map(|index| source.read_bytes(index));
            Ok(Block::many(bytes.collect::<Result<_>>()?))
        })
        .await
    }

    fn is_read_again(&self) -> bool {
        self.0.times.is_none()
    }

    async fn check(&self) -> Result<()> {
        let Inner { path, file, len, times, .. } = &*self.0;
        if times.is_some() {
            let now = file.metadata().map_err(|e| Error::io("read", path, e))?;
            if now.len() < *len {
                return Err(shorter(path, *len));
            }
        }
        Ok(())
    }
}

impl Inner {
    /// The bytes of the first run of data at or behind `at`.
    fn next_extent(&self, at: u64) -> std::io::Result<Option<(u64, u64)>> {
        if self.times.is_none() {
            return Ok(Some((at, self.len)));
        }
        let offset = i64::try_from(at).expect("less than 64 TiB");
        let start = match lseek(self.file.as_fd(), offset, Whence::SeekData) {
            Ok(start) => start,
            Err(nix::Error::ENXIO) => return Ok(None),
            // A file system that cannot tell has no holes.
            Err(nix::Error::EINVAL | nix::Error::EOPNOTSUPP) => return Ok(Some((at, self.len))),
            Err(error) => return Err(error.into()),
        };
        let end = match lseek(self.file.as_fd(), start, Whence::SeekHole) {
            Ok(end) => end,
            // It became shorter in between, which `check` says.
            Err(nix::Error::ENXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let bytes = |offset: i64| u64::try_from(offset).expect("an offset is not negative");
        // A hole of no length (FUSE file systems may say so) is data of at least one byte.
        let (start, end) = (bytes(start), bytes(end).min(self.len));
        Ok((start < self.len).then(|| (start, end.max(start + 1))))
    }
}

fn shorter(path: &Path, len: u64) -> Error {
    let why = format!(
        "it has become shorter than {len} bytes while it was read; upload it when nobody writes to it"
    );
    Error::unsuitable(path, why)
}

/// Reads a block of a file of `len` bytes; what is behind its end is zeros. Waits for the disk.
pub(crate) fn read_block(file: &File, index: BlockIndex, len: u64) -> std::io::Result<Bytes> {
    let mut buffer = BlockBuffer::block();
    let (inside, behind) = buffer.split_at_mut(len_within(index, len));
    file.read_exact_at(inside, index.offset())?;
    behind.fill(0);
    Ok(buffer.freeze())
}

/// How many bytes of a block are in a file of `len` bytes.
pub(crate) fn len_within(index: BlockIndex, len: u64) -> usize {
    let bytes = len.saturating_sub(index.offset()).min(BLOCK_SIZE_U64);
    usize::try_from(bytes).expect("at most a block")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{BLOCK_SIZE, GIB};

    fn file(len: u64, writes: &[(u64, &[u8])]) -> (tempfile::NamedTempFile, FileSource) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        for (at, bytes) in writes {
            file.as_file().write_all_at(bytes, *at).unwrap();
        }
        let source = FileSource::open(file.path()).unwrap();
        (file, source)
    }

    fn blocks(source: &FileSource) -> Vec<u32> {
        within(source, 0, source.volume_size().blocks().0)
    }

    fn within(source: &FileSource, start: u32, end: u32) -> Vec<u32> {
        let extents = source.extents(BlockIndex(start)..BlockIndex(end)).map(Result::unwrap);
        extents.flat_map(|run| run.start.0..run.end.0).collect()
    }

    #[test]
    fn only_data_is_in_the_extents() {
        let (_file, source) =
            file(3 * GIB + 5, &[(0, b"a"), (BLOCK_SIZE_U64 * 9 - 1, b"bc"), (3 * GIB, b"d")]);
        assert_eq!(blocks(&source), [0, 8, 9, 6144]);
        assert_eq!(within(&source, 1, 9), [8]);
        assert_eq!(within(&source, 9, 6144), [9]);
        assert_eq!(within(&source, 10, 6144), [0; 0]);
        assert_eq!(source.volume_size().gib(), 4);
        let tail = source.read_bytes(BlockIndex(6144)).unwrap();
        assert_eq!(&tail[..6], b"d\0\0\0\0\0");
        assert_eq!(tail.len(), BLOCK_SIZE);
        assert_eq!(source.read_bytes(BlockIndex(1)).unwrap(), crate::model::zeros());
    }

    #[test]
    #[allow(clippy::large_stack_arrays)]
    fn a_file_that_shrinks_is_an_error() {
        let (file, source) = file(BLOCK_SIZE_U64 * 2, &[(0, &[1; 2 * BLOCK_SIZE])]);
        assert!(source.is_unchanged());
        file.as_file().set_len(BLOCK_SIZE_U64).unwrap();
        assert!(source.read_bytes(BlockIndex(0)).is_ok());
        assert!(source.read_bytes(BlockIndex(1)).unwrap_err().to_string().contains("shorter"));
        assert!(!source.is_unchanged());
    }

    #[test]
    fn refuses_a_source_that_is_no_image() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
        let empty = dir.path().join("empty");
        std::fs::write(&empty, "").unwrap();
        let missing = dir.path().join("missing");
        for (path, says) in [
            (dir.path(), "is a directory"),
            (&fifo, "pipe"),
            (&empty, "is empty"),
            (&missing, "No such file"),
            (Path::new("/dev/zero"), "neither a file nor a block device"),
        ] {
            let error = FileSource::open(path).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains(&path.display().to_string()), "{error}");
        }
    }
}
