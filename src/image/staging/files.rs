//! Small things done to files.

use std::fs::File;
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

use super::map::{Mark, Marks};
use crate::model::{BlockIndex, MAX_VOLUME_BYTES};
use crate::own;

/// Makes the names in a directory durable.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Replaces a file, whole or not at all.
pub(crate) fn replace(path: &Path, content: &[u8], sync: bool) -> io::Result<()> {
    let next = path.with_extension("next");
    let mut options = File::options();
    options.write(true).create(true).truncate(false).mode(0o600);
    // One that was not finished may be there.
    let mut file = own::open(&next, &mut options)?;
    file.set_len(0)?;
    file.write_all(content)?;
    if sync {
        file.sync_all()?;
    }
    std::fs::rename(&next, path)?;
    match path.parent().filter(|_| sync) {
        Some(directory) => sync_directory(directory),
        None => Ok(()),
    }
}

/// Makes a range read as zeros, and gives its space back where the file system can.
pub(crate) fn punch(file: &File, start: u64, end: u64) -> io::Result<()> {
    let end = end.min(file.metadata()?.size());
    if start >= end {
        return Ok(());
    }
    let signed = |n: u64| i64::try_from(n).expect("less than 64 TiB");
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match fallocate(file, flags, signed(start), signed(end - start)) {
        Ok(()) => Ok(()),
        Err(nix::Error::EOPNOTSUPP | nix::Error::ENOSYS) => write_zeros(file, start, end),
        Err(error) => Err(error.into()),
    }
}

fn write_zeros(file: &File, start: u64, end: u64) -> io::Result<()> {
    let zeros = crate::model::zeros();
    let mut at = start;
    while at < end {
        let len = usize::try_from(end - at).map_or(zeros.len(), |rest| rest.min(zeros.len()));
        file.write_all_at(&zeros[..len], at)?;
        at += len as u64;
    }
    Ok(())
}

/// The first data of a file from `at` on, as the file system has it.
pub(crate) fn next_data(file: &File, at: u64) -> io::Result<Option<u64>> {
    let signed = i64::try_from(at).expect("less than 64 TiB");
    match lseek(file, signed, Whence::SeekData) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(nix::Error::ENXIO) => Ok(None),
        Err(nix::Error::EINVAL | nix::Error::EOPNOTSUPP) => Ok(Some(at)),
        Err(error) => Err(error.into()),
    }
}

/// The ranges of a data file that may hold data, and that its map does not call staged.
pub(crate) fn strays(data: &File, marks: &Marks) -> io::Result<Vec<Range<u64>>> {
    let len = data.metadata()?.len().min(MAX_VOLUME_BYTES);
    let (mut strays, mut at) = (Vec::new(), 0);
    while let Some(found) = next_data(data, at)?.filter(|found| *found < len) {
        let index = BlockIndex::containing(found);
        let (mark, end) = marks.run(index.0, u32::MAX);
        at = BlockIndex(end).offset();
        if mark != Some(Mark::Staged) {
            strays.push(index.offset()..at);
        }
    }
    Ok(strays)
}

/// Reads a range; what is behind the end of the file is zeros.
pub(crate) fn read_padded(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let mut have = 0;
    while have < buffer.len() {
        match file.read_at(&mut buffer[have..], offset + have as u64) {
            Ok(0) => {
                buffer[have..].fill(0);
                break;
            }
            Ok(read) => have += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether a file of the directory can have holes.
pub(crate) fn has_sparse_files(directory: &Path) -> io::Result<bool> {
    const LEN: u64 = 8 << 20;
    let file = tempfile::tempfile_in(directory)?;
    file.set_len(LEN)?;
    file.write_all_at(&[1], LEN - 1)?;
    file.sync_all()?;
    Ok(file.metadata()?.blocks() * 512 < LEN / 2)
}
