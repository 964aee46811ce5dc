//! Reading and writing past the page cache.

use std::fs::File;
use std::io::{ErrorKind as Io, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;

use bytes::Bytes;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::model::{BlockBuffer, DIRECT_ALIGNMENT};

/// Reads a range past the page cache: what is above keeps what is worth keeping, and a copy here
/// would only drive out what others keep. `None` if the file system or the range does not allow it.
pub(super) fn read_direct(file: &File, offset: u64, len: usize) -> std::io::Result<Option<Bytes>> {
    const ALIGNMENT: u64 = DIRECT_ALIGNMENT as u64;
    let start = offset / ALIGNMENT * ALIGNMENT;
    let skip = usize::try_from(offset - start).expect("less than the alignment");
    let whole = (skip + len).next_multiple_of(DIRECT_ALIGNMENT);
    let Some(mut buffer) = BlockBuffer::with_len(whole) else { return Ok(None) };
    if fcntl(file.as_fd(), FcntlArg::F_SETFL(OFlag::O_DIRECT)).is_err() {
        return Ok(None);
    }
    let mut have = 0;
    while have < skip + len {
        match file.read_at(&mut buffer[have..], start + have as u64) {
            Ok(0) => return Err(Io::UnexpectedEof.into()),
            Ok(read) => have += read,
            Err(error) if error.kind() == Io::Interrupted => {}
            // A file system that wants another alignment, or none at all.
            Err(error) if error.kind() == Io::InvalidInput => {
                fcntl(file.as_fd(), FcntlArg::F_SETFL(OFlag::empty()))?;
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Some(buffer.freeze().slice(skip..skip + len)))
}

/// Writes what it can of `data` past the page cache, and answers how much: nobody reads a pack soon,
/// and fresh memory for a copy of it costs more than the disk does.
pub(super) fn write_direct(file: &mut File, data: &[u8]) -> std::io::Result<usize> {
    /// Less than this is not worth the trouble.
    const WORTH: usize = 1 << 20;
    let whole = data.len() / DIRECT_ALIGNMENT * DIRECT_ALIGNMENT;
    if whole < WORTH || data.as_ptr().align_offset(DIRECT_ALIGNMENT) != 0 {
        return Ok(0);
    }
    if fcntl(file.as_fd(), FcntlArg::F_SETFL(OFlag::O_DIRECT)).is_err() {
        return Ok(0);
    }
    let mut written = 0;
    while written < whole {
        match file.write(&data[written..whole]) {
            Ok(0) => break,
            Ok(more) => written += more,
            Err(error) if error.kind() == Io::Interrupted => {}
            // A file system that wants another alignment; the rest is written as ever.
            Err(error) if error.kind() == Io::InvalidInput => break,
            Err(error) => return Err(error),
        }
    }
    fcntl(file.as_fd(), FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(written)
}
