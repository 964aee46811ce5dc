//! From our types to those of FUSE.

use std::time::SystemTime;

use fuser::{
    Errno, FileAttr, FileType, FopenFlags, INodeNo, OpenAccMode, OpenFlags, RenameFlags, TimeOrNow,
};
use jiff::Timestamp;

use crate::image::working;
use crate::store::ErrorKind;
use crate::tree::{
    Allocation, Attributes, Caching, Error, Kind, OpenMode, PREFERRED_READ, RenameMode,
    thread_group,
};

/// The one table from errors to errno; `docs/semantics.md` has it for users.
pub(super) fn errno(error: &Error) -> Errno {
    match error {
        Error::NotFound => Errno::ENOENT,
        Error::NotADirectory => Errno::ENOTDIR,
        Error::IsADirectory => Errno::EISDIR,
        Error::NotPermitted => Errno::EPERM,
        Error::Denied => Errno::EACCES,
        Error::NoSuchOffset => Errno::ENXIO,
        Error::NoSuchAttribute => Errno::ENODATA,
        Error::TooMany => Errno::EMFILE,
        Error::BadHandle => Errno::EBADF,
        Error::ReadOnly => Errno::EROFS,
        Error::Exists => Errno::EEXIST,
        Error::NameTooLong => Errno::ENAMETOOLONG,
        Error::CrossDevice => Errno::EXDEV,
        Error::Unsupported => Errno::EOPNOTSUPP,
        Error::Refused(_) => Errno::EINVAL,
        Error::Working(error) => of_working(error),
        Error::CalledAway => Errno::ECANCELED,
        Error::NotReady(..) => Errno::EAGAIN,
        Error::Store(error) => match error.kind() {
            ErrorKind::NotFound => Errno::ENOENT,
            ErrorKind::Denied | ErrorKind::Credentials => Errno::EACCES,
            ErrorKind::Throttled | ErrorKind::NotReady => Errno::EAGAIN,
            ErrorKind::Timeout => Errno::ETIMEDOUT,
            ErrorKind::Quota => Errno::EDQUOT,
            ErrorKind::NoRoom => Errno::ENOSPC,
            ErrorKind::Conflict => Errno::EBUSY,
            ErrorKind::Unsupported => Errno::EOPNOTSUPP,
            ErrorKind::Invalid => Errno::EINVAL,
            // Doubt is an error, never zeros.
            ErrorKind::Corrupt | ErrorKind::ExpiredToken | ErrorKind::Unavailable => Errno::EIO,
        },
    }
}

pub(super) fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::File => FileType::RegularFile,
        Kind::Link => FileType::Symlink,
    }
}

pub(super) fn file_attr(attributes: &Attributes) -> FileAttr {
    let time = SystemTime::from(attributes.time);
    FileAttr {
        ino: INodeNo(attributes.ino),
        size: attributes.size,
        blocks: attributes.allocated.div_ceil(512),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: file_type(attributes.kind),
        perm: attributes.mode,
        nlink: attributes.links,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: 0,
        blksize: u32::try_from(PREFERRED_READ).expect("a block is small"),
        flags: 0,
    }
}

fn of_working(error: &working::Error) -> Errno {
    match error {
        working::Error::Limit(_) | working::Error::DiskFull | working::Error::TooManyTags(_) => {
            Errno::ENOSPC
        }
        working::Error::TooLarge => Errno::EFBIG,
        working::Error::Cancelled => Errno::ECANCELED,
        working::Error::Empty | working::Error::Refused(_) => Errno::EINVAL,
        // Without one of the system it would become EIO anyway.
        working::Error::Io { cause, .. } => {
            cause.raw_os_error().map_or(Errno::EIO, Errno::from_i32)
        }
        _ => Errno::EIO,
    }
}

/// Entries to leave out when a directory is read from `offset` on: the number of the last one.
pub(super) fn skipped(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

/// What is told of an entry that was not looked at: its number and its kind.
pub(super) fn name_only(ino: u64, kind: Kind) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino),
        size: 0,
        blocks: 0,
        atime: SystemTime::UNIX_EPOCH,
        mtime: SystemTime::UNIX_EPOCH,
        ctime: SystemTime::UNIX_EPOCH,
        crtime: SystemTime::UNIX_EPOCH,
        kind: file_type(kind),
        perm: 0,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 512,
        flags: 0,
    }
}

/// How the kernel is told to keep what it reads of a file.
pub(super) fn open_flags(caching: Caching) -> FopenFlags {
    match caching {
        Caching::Keep => FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH,
        Caching::Until => FopenFlags::empty(),
        Caching::Direct => FopenFlags::FOPEN_DIRECT_IO,
        Caching::Never => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH,
    }
}

pub(super) fn open_mode(flags: OpenFlags, thread: u32) -> OpenMode {
    let access = flags.acc_mode();
    OpenMode {
        read: access != OpenAccMode::O_WRONLY,
        write: access != OpenAccMode::O_RDONLY,
        truncate: flags.0 & libc::O_TRUNC != 0,
        exclusive: flags.0 & libc::O_EXCL != 0,
        opener: if access == OpenAccMode::O_RDONLY { 0 } else { thread_group(thread) },
    }
}

/// What `fallocate` asks for; `None` for a mode that no file here has.
pub(super) fn allocation(mode: i32) -> Option<Allocation> {
    let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
    match mode & !libc::FALLOC_FL_KEEP_SIZE {
        0 => Some(Allocation::Room { keep_size }),
        libc::FALLOC_FL_PUNCH_HOLE => Some(Allocation::Punch),
        libc::FALLOC_FL_ZERO_RANGE => Some(Allocation::Zeros { keep_size }),
        _ => None,
    }
}

/// How something is renamed; `None` for a way that no file here can go.
pub(super) fn rename_mode(flags: RenameFlags) -> Option<RenameMode> {
    if flags.is_empty() {
        Some(RenameMode::Replace)
    } else if flags == RenameFlags::RENAME_NOREPLACE {
        Some(RenameMode::Keep)
    } else {
        None
    }
}

pub(super) fn timestamp(time: TimeOrNow) -> Timestamp {
    match time {
        TimeOrNow::SpecificTime(time) => Timestamp::try_from(time).unwrap_or(Timestamp::UNIX_EPOCH),
        TimeOrNow::Now => Timestamp::now(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store;

    #[test]
    fn doubt_is_an_input_output_error() {
        for kind in [ErrorKind::Corrupt, ErrorKind::Unavailable, ErrorKind::ExpiredToken] {
            let error = Error::from(store::Error::new(kind, "x"));
            assert_eq!(errno(&error), Errno::EIO);
        }
        let denied = Error::from(store::Error::new(ErrorKind::Denied, "x"));
        assert_eq!(errno(&denied), Errno::EACCES);
        assert_eq!(errno(&Error::Denied), Errno::EACCES);
        assert_eq!(errno(&Error::NotPermitted), Errno::EPERM);
    }
}
