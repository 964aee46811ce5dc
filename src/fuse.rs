//! The adapter: fuser's types in and out, and the one table from errors to errno. No logic.
//!
//! A handler copies its arguments, hands the reply to the runtime and returns: the thread that it
//! runs on never waits for a store. What needs no waiting is answered on the spot.

use std::ffi::OsStr;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek,
    ReplyOpen, ReplyStatfs, ReplyXattr, Request, TimeOrNow,
};
use tokio::runtime::Handle;

use crate::model::BLOCK_SIZE;
use crate::store::ErrorKind;
use crate::tree::{Attributes, Caching, Error, Kind, PREFERRED_READ, Tree};

/// Longest time that any request waits. A program that waits for one cannot be killed, since fuser
/// does not take interrupts; so no request may wait for ever.
const DEADLINE: Duration = Duration::from_secs(60);

/// Reads under way at once that the kernel may send on its own: read-ahead and direct reads.
/// Beyond three quarters of them the kernel drops its read-ahead.
const MAX_BACKGROUND: u16 = 256;

/// Bytes of one read at most (the mount option `max_read`): a block, so that a read that the kernel
/// cuts from a larger one is answered from one block, without copying.
pub(crate) const MAX_READ: usize = BLOCK_SIZE;

/// The tree as a FUSE file system.
#[derive(Debug)]
pub(crate) struct Adapter {
    tree: Arc<Tree>,
    runtime: Handle,
}

impl Adapter {
    pub(crate) fn new(tree: Arc<Tree>, runtime: Handle) -> Self {
        Self { tree, runtime }
    }

    /// Runs `work` on the runtime and hands its result to `answer`, within the deadline.
    fn spawn<T, F>(
        &self,
        operation: &'static str,
        ino: INodeNo,
        work: impl FnOnce(Arc<Tree>) -> F,
        answer: impl FnOnce(Result<T, Errno>) + Send + 'static,
    ) where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let work = work(Arc::clone(&self.tree));
        self.runtime.spawn(async move {
            answer(match tokio::time::timeout(DEADLINE, work).await {
                Ok(result) => result.map_err(|error| log(operation, ino, &error)),
                Err(_) => {
                    tracing::error!(operation, ino = ino.0, "no answer within {DEADLINE:?}");
                    Err(Errno::ETIMEDOUT)
                }
            });
        });
    }
}

/// Logs what is not an everyday answer, and translates it.
fn log(operation: &'static str, ino: INodeNo, error: &Error) -> Errno {
    let errno = errno(error);
    if let Error::Store(cause) = error
        && cause.kind() != ErrorKind::NotFound
    {
        tracing::error!(operation, ino = ino.0, ?errno, "{error}");
    } else {
        tracing::debug!(operation, ino = ino.0, ?errno, "{error}");
    }
    errno
}

/// The one table from errors to errno; `docs/semantics.md` has it for users.
fn errno(error: &Error) -> Errno {
    match error {
        Error::NotFound => Errno::ENOENT,
        Error::NotADirectory => Errno::ENOTDIR,
        Error::IsADirectory => Errno::EISDIR,
        Error::NotPermitted => Errno::EPERM,
        Error::Denied => Errno::EACCES,
        Error::NoSuchOffset => Errno::ENXIO,
        Error::NoSuchAttribute => Errno::ENODATA,
        Error::BadHandle => Errno::EBADF,
        Error::NotReady(..) => Errno::EAGAIN,
        Error::Store(error) => match error.kind() {
            ErrorKind::NotFound => Errno::ENOENT,
            ErrorKind::Denied => Errno::EACCES,
            ErrorKind::Throttled | ErrorKind::NotReady => Errno::EAGAIN,
            ErrorKind::Timeout => Errno::ETIMEDOUT,
            ErrorKind::Quota => Errno::EDQUOT,
            ErrorKind::Conflict => Errno::EBUSY,
            ErrorKind::Unsupported => Errno::EOPNOTSUPP,
            ErrorKind::Invalid => Errno::EINVAL,
            // Doubt is an error, never zeros.
            ErrorKind::Corrupt | ErrorKind::ExpiredToken | ErrorKind::Unavailable => Errno::EIO,
        },
    }
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::File => FileType::RegularFile,
        Kind::Link => FileType::Symlink,
    }
}

fn file_attr(attributes: &Attributes) -> FileAttr {
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

/// No inode number is used for another object while the kernel knows it.
const GENERATION: Generation = Generation(0);

impl Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // One by one: a kernel that lacks one of them would be given none.
        for wanted in [
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            InitFlags::FUSE_CACHE_SYMLINKS,
        ] {
            if config.add_capabilities(wanted).is_err() {
                tracing::debug!("the kernel does not offer {wanted:?}");
            }
        }
        if let Err(nearest) = config.set_max_background(MAX_BACKGROUND) {
            tracing::debug!("the kernel allows {nearest} requests in the background");
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_owned();
        let work = |tree: Arc<Tree>| async move { tree.lookup(parent.0, &name).await };
        self.spawn("lookup", parent, work, |found| match found {
            Ok(found) => reply.entry(&found.ttl, &file_attr(&found), GENERATION),
            Err(errno) => reply.error(errno),
        });
    }

    fn forget(&self, _: &Request, ino: INodeNo, count: u64) {
        self.tree.forget(ino.0, count);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.tree.getattr(ino.0) {
            Ok(found) => reply.attr(&found.ttl, &file_attr(&found)),
            Err(error) => reply.error(log("getattr", ino, &error)),
        }
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        match self.tree.readlink(ino.0) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(error) => reply.error(log("readlink", ino, &error)),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let for_writing = flags.acc_mode() != OpenAccMode::O_RDONLY || flags.0 & libc::O_TRUNC != 0;
        match self.tree.open(ino.0, for_writing) {
            Ok((handle, caching)) => {
                let flags = match caching {
                    Caching::Keep => FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH,
                    Caching::Never => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH,
                };
                reply.opened(FileHandle(handle), flags);
            }
            Err(error) => reply.error(log("open", ino, &error)),
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        // Following a run may begin to fetch blocks, which takes a runtime.
        let _runtime = self.runtime.enter();
        let size = size as usize;
        match self.tree.read_cached(handle.0, offset, size) {
            Ok(Some(bytes)) => return reply.data(&bytes),
            Ok(None) => {}
            Err(error) => return reply.error(log("read", ino, &error)),
        }
        let work = |tree: Arc<Tree>| async move { tree.read(handle.0, offset, size).await };
        self.spawn("read", ino, work, |read| match read {
            Ok(bytes) => reply.data(&bytes),
            Err(errno) => reply.error(errno),
        });
    }

    fn lseek(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        let work = move |tree: Arc<Tree>| async move {
            match whence {
                libc::SEEK_DATA => tree.seek_data(handle.0, offset).await.map(Some),
                libc::SEEK_HOLE => tree.seek_hole(handle.0, offset).await.map(Some),
                _ => Ok(None),
            }
        };
        self.spawn("lseek", ino, work, |found| match found.map(|o| o.map(i64::try_from)) {
            Ok(Some(Ok(offset))) => reply.offset(offset),
            Ok(Some(Err(_))) => reply.error(Errno::EOVERFLOW),
            Ok(None) => reply.error(Errno::EINVAL),
            Err(errno) => reply.error(errno),
        });
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.tree.release(handle.0);
        reply.ok();
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let work = |tree: Arc<Tree>| async move { tree.opendir(ino.0).await };
        self.spawn("opendir", ino, work, |opened| match opened {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::empty()),
            Err(errno) => reply.error(errno),
        });
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let entries = match self.tree.entries(handle.0) {
            Ok(entries) => entries,
            Err(error) => return reply.error(log("readdir", ino, &error)),
        };
        for (next, entry) in (1u64..).zip(entries.iter()).skip(skipped(offset)) {
            let kind = file_type(entry.kind);
            if reply.add(INodeNo(entry.ino), next, kind, &entry.name) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let entries = match self.tree.entries(handle.0) {
            Ok(entries) => entries,
            Err(error) => return reply.error(log("readdirplus", ino, &error)),
        };
        for (next, entry) in (1u64..).zip(entries.iter()).skip(skipped(offset)) {
            let told = self.tree.entry_attributes(entry);
            let (node, attr, ttl) = match &told {
                Some(found) => (INodeNo(found.ino), file_attr(found), found.ttl),
                // Node 0: here is a name, look it up if you want more.
                None => (INodeNo(0), name_only(entry.ino, entry.kind), Duration::ZERO),
            };
            if reply.add(node, next, &entry.name, &ttl, &attr, GENERATION) {
                // It did not fit, so the kernel was not told of it.
                if let Some(found) = told {
                    self.tree.forget(found.ino, 1);
                }
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.tree.release(handle.0);
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let (bytes, files) = self.tree.totals();
        let size = u32::try_from(PREFERRED_READ).expect("a block is small");
        reply.statfs(bytes.div_ceil(PREFERRED_READ), 0, 0, files, 0, size, 255, size);
    }

    fn getxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        match self.tree.xattr(ino.0, name) {
            Ok(value) => sized(value.as_bytes(), size, reply),
            Err(error) => reply.error(log("getxattr", ino, &error)),
        }
    }

    fn listxattr(&self, _: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        match self.tree.xattrs(ino.0) {
            Ok(attributes) => {
                let names: String = attributes.into_iter().map(|(name, _)| name + "\0").collect();
                sized(names.as_bytes(), size, reply);
            }
            Err(error) => reply.error(log("listxattr", ino, &error)),
        }
    }

    // What follows would change something, and nothing here can be changed.

    fn setattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(Errno::EPERM);
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EPERM);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EPERM);
    }

    fn setxattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: &[u8],
        _: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EPERM);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }
}

/// Entries to leave out when a directory is read from `offset` on: the number of the last one.
fn skipped(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

/// What is told of an entry that was not looked at: its number and its kind.
fn name_only(ino: u64, kind: Kind) -> FileAttr {
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

/// Answers with a value, or with its length if only that was asked for.
fn sized(value: &[u8], size: u32, reply: ReplyXattr) {
    match u32::try_from(value.len()) {
        Ok(len) if size == 0 => reply.size(len),
        Ok(len) if len <= size => reply.data(value),
        _ => reply.error(Errno::ERANGE),
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
        assert_eq!(errno(&Error::Denied), Errno::EACCES);
        assert_eq!(errno(&Error::NotPermitted), Errno::EPERM);
    }
}
