//! The adapter: fuser's types in and out, and the one table from errors to errno. No logic.
//!
//! A handler copies its arguments, hands the reply to the runtime and returns: the thread that it
//! runs on never waits for a store. What needs no waiting is answered on the spot.

use std::ffi::OsStr;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use fuser::{
    BsdFileFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use self::translate::{
    allocation, errno, file_attr, file_type, name_only, open_flags, open_mode, rename_mode,
    skipped, timestamp,
};
use crate::image::working::Maker;
use crate::model::BLOCK_SIZE;
use crate::store::ErrorKind;
use crate::tree::{Changes, Error, PREFERRED_READ, Tree, cut_short, is_called_away, thread_group};

mod translate;

/// Longest time that any request waits. A program that waits for one cannot be killed, since fuser
/// does not take interrupts; so no request may wait for ever.
const DEADLINE: Duration = Duration::from_mins(1);

/// Reads under way at once that the kernel may send on its own: read-ahead and direct reads.
/// Beyond three quarters of them the kernel drops its read-ahead.
const MAX_BACKGROUND: u16 = 256;

/// Bytes of one read at most (the mount option `max_read`): a block, so that a read that the kernel
/// cuts from a larger one is answered from one block, without copying.
pub(crate) const MAX_READ: usize = BLOCK_SIZE;

/// Bytes of writes on their way to staging, beside the thread that receives them. Beyond them that
/// thread waits, and with it the kernel.
const MAX_WRITES: usize = 16 << 20;

/// The tree as a FUSE file system.
#[derive(Debug)]
pub(crate) struct Adapter {
    tree: Arc<Tree>,
    runtime: Handle,
    /// One permit a KiB of writes.
    writes: Arc<Semaphore>,
    /// One permit a thread of the session that may write to the local disk itself: all but one.
    at_once: Semaphore,
}

impl Adapter {
    /// An adapter for a session with so many `threads`.
    pub(crate) fn new(tree: Arc<Tree>, runtime: Handle, threads: usize) -> Self {
        let writes = Arc::new(Semaphore::new(MAX_WRITES >> 10));
        Self { tree, runtime, writes, at_once: Semaphore::new(threads - 1) }
    }

    /// Runs `work` on the runtime, however long it takes: it has deadlines of its own.
    fn spawn_unbounded<F>(
        &self,
        operation: &'static str,
        ino: INodeNo,
        reply: ReplyEmpty,
        work: impl FnOnce(Arc<Tree>) -> F,
    ) where
        F: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let work = work(Arc::clone(&self.tree));
        self.runtime.spawn(async move {
            match work.await {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(log(operation, ino, &error)),
            }
        });
    }

    /// Runs `work`, which has nothing to tell, on the runtime, within the deadline.
    fn spawn_empty<F>(
        &self,
        operation: &'static str,
        ino: INodeNo,
        reply: ReplyEmpty,
        work: impl FnOnce(Arc<Tree>) -> F,
    ) where
        F: Future<Output = Result<(), Error>> + Send + 'static,
    {
        self.spawn(operation, ino, work, |result| match result {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        });
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
    // What was found when it was opened is missed.
    if let Error::Store(cause) = error
        && (cause.kind() != ErrorKind::NotFound || operation == "read")
    {
        tracing::error!(operation, ino = ino.0, ?errno, "{error}");
    } else {
        tracing::debug!(operation, ino = ino.0, ?errno, "{error}");
    }
    errno
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
            // A file that somebody only writes is open past the page cache, for all.
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
            // No file here has a set-user-ID bit or a capability that a write would have to take
            // away; told so, the kernel does not ask for them before each write.
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
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

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_owned();
        let uid = request.uid();
        let work = move |tree: Arc<Tree>| async move { tree.lookup(parent.0, &name, uid).await };
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

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let mode = open_mode(flags, request.pid());
        let work = move |tree: Arc<Tree>| async move { tree.open(ino.0, mode).await };
        self.spawn("open", ino, work, |opened| match opened {
            Ok((handle, caching)) => reply.opened(FileHandle(handle), open_flags(caching)),
            Err(errno) => reply.error(errno),
        });
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let name = name.to_owned();
        let maker = maker(request, mode, umask);
        let how = open_mode(OpenFlags(flags), request.pid());
        let work =
            move |tree: Arc<Tree>| async move { tree.create(parent.0, &name, maker, how).await };
        self.spawn("create", parent, work, |created| match created {
            Ok((found, handle, caching)) => reply.created(
                &found.ttl,
                &file_attr(&found),
                GENERATION,
                FileHandle(handle),
                open_flags(caching),
            ),
            Err(errno) => reply.error(errno),
        });
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let len = u32::try_from(data.len()).expect("the kernel cuts writes");
        self.tree.begin_write(handle.0, request.pid());
        // Without a copy, and without changing threads; but not on all of them at a time.
        if let Ok(_turn) = self.at_once.try_acquire()
            && let Some(written) = self.tree.write_now(handle.0, offset, data)
        {
            return match written {
                Ok(()) => reply.written(len),
                Err(error) => reply.error(log("write", ino, &error)),
            };
        }
        let kib = (len >> 10).max(1);
        let data = Bytes::copy_from_slice(data);
        let work = |tree: Arc<Tree>| async move { tree.write(handle.0, offset, data).await };
        let Ok(room) = Arc::clone(&self.writes).try_acquire_many_owned(kib) else {
            // A timer is made for the runtime that it is made in.
            let _runtime = self.runtime.enter();
            let written = tokio::time::timeout(DEADLINE, work(Arc::clone(&self.tree)));
            let written = self.runtime.block_on(written);
            return match written {
                Ok(Ok(())) => reply.written(len),
                Ok(Err(error)) => reply.error(log("write", ino, &error)),
                Err(_) => reply.error(Errno::ETIMEDOUT),
            };
        };
        self.spawn("write", ino, work, move |written| {
            drop(room);
            match written {
                Ok(()) => reply.written(len),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let Some(what) = allocation(mode) else { return reply.error(Errno::EOPNOTSUPP) };
        let work = move |tree: Arc<Tree>| async move {
            tree.fallocate(handle.0, offset, length, what).await
        };
        self.spawn_empty("fallocate", ino, reply, work);
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

    fn flush(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _: LockOwner,
        reply: ReplyEmpty,
    ) {
        let thread = request.pid();
        self.spawn_unbounded("flush", ino, reply, move |tree| async move {
            let dying = |closed_at_sigint| cut_short(thread, closed_at_sigint);
            let called_away = || is_called_away(thread);
            tree.flush(handle.0, thread_group(thread), dying, called_away).await
        });
    }

    fn fsync(&self, _: &Request, ino: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        self.spawn_unbounded(
            "fsync",
            ino,
            reply,
            move |tree| async move { tree.fsync(handle.0).await },
        );
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
        let _runtime = self.runtime.enter();
        self.tree.release(handle.0);
        reply.ok();
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let uid = request.uid();
        let work = move |tree: Arc<Tree>| async move { tree.opendir(ino.0, uid).await };
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
        let spare = self.tree.spare() / PREFERRED_READ;
        let blocks = bytes.div_ceil(PREFERRED_READ) + spare;
        // As many as 32 bits count: a file system without a free inode is an alarm everywhere.
        let free = u64::from(u32::MAX).saturating_sub(files);
        reply.statfs(blocks, spare, spare, files + free, free, size, 255, size);
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

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        modified: Option<TimeOrNow>,
        _: Option<SystemTime>,
        handle: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mode = mode.map(|mode| u16::try_from(mode & 0o777).expect("nine bits"));
        let changes = Changes { size, mode, uid, gid, modified: modified.map(timestamp) };
        let handle = handle.map(|handle| handle.0);
        let work = move |tree: Arc<Tree>| async move { tree.setattr(ino.0, handle, changes).await };
        self.spawn("setattr", ino, work, |changed| match changed {
            Ok(found) => reply.attr(&found.ttl, &file_attr(&found)),
            Err(errno) => reply.error(errno),
        });
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        self.spawn_empty("unlink", parent, reply, move |tree| async move {
            tree.unlink(parent.0, &name).await
        });
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        self.spawn_empty("rmdir", parent, reply, move |tree| async move {
            tree.rmdir(parent.0, &name).await
        });
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (name, new_name) = (name.to_owned(), new_name.to_owned());
        let how = rename_mode(flags);
        self.spawn_unbounded("rename", parent, reply, move |tree| async move {
            tree.rename(parent.0, &name, new_parent.0, &new_name, how).await
        });
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        _: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        let (name, value, by) = (name.to_owned(), value.to_vec(), request.pid());
        self.spawn_empty("setxattr", ino, reply, move |tree| async move {
            tree.set_xattr(ino.0, &name, Some(&value), by).await
        });
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (name, by) = (name.to_owned(), request.pid());
        self.spawn_empty("removexattr", ino, reply, move |tree| async move {
            tree.set_xattr(ino.0, &name, None, by).await
        });
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _: u32,
        reply: ReplyEntry,
    ) {
        if !matches!(mode & libc::S_IFMT, libc::S_IFREG | 0) {
            return reply.error(Errno::EPERM);
        }
        let (name, maker) = (name.to_owned(), maker(request, mode, umask));
        let work = move |tree: Arc<Tree>| async move { tree.make(parent.0, &name, maker).await };
        self.spawn("mknod", parent, work, |made| match made {
            Ok(found) => reply.entry(&found.ttl, &file_attr(&found), GENERATION),
            Err(errno) => reply.error(errno),
        });
    }

    // What follows would make something that no directory here can hold.

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }
}

fn maker(request: &Request, mode: u32, umask: u32) -> Maker {
    let mode = u16::try_from(mode & !umask & 0o777).expect("nine bits");
    Maker { uid: request.uid(), gid: request.gid(), mode }
}

/// Answers with a value, or with its length if only that was asked for.
fn sized(value: &[u8], size: u32, reply: ReplyXattr) {
    match u32::try_from(value.len()) {
        Ok(len) if size == 0 => reply.size(len),
        Ok(len) if len <= size => reply.data(value),
        _ => reply.error(Errno::ERANGE),
    }
}
