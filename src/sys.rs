//! Every system call that no safe interface covers.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

nix::ioctl_read!(
    /// Length of a block device in bytes (`BLKGETSIZE64`, linux/fs.h).
    blkgetsize64,
    0x12,
    114,
    u64
);

nix::ioctl_write_ptr_bad!(
    /// Writes zeros over a range of a block device (`BLKZEROOUT`, linux/fs.h).
    blkzeroout,
    nix::request_code_none!(0x12, 127),
    [u64; 2]
);

nix::ioctl_readwrite!(
    /// Freezes a file system (`FIFREEZE`, linux/fs.h).
    fifreeze,
    b'X',
    119,
    libc::c_int
);

nix::ioctl_readwrite!(
    /// Thaws a file system (`FITHAW`, linux/fs.h).
    fithaw,
    b'X',
    120,
    libc::c_int
);

/// Freezes the file system that an open file is on: everything is written, and whoever writes more waits until it is
/// thawed. That outlives this process.
///
/// # Errors
///
/// `EBUSY` if it is frozen already, `EOPNOTSUPP` if it cannot be, `EPERM` without `CAP_SYS_ADMIN`.
pub(crate) fn freeze(file: BorrowedFd<'_>) -> nix::Result<()> {
    let mut unused = 0;
    // SAFETY: the descriptor is open for the call, and the kernel does nothing with the number.
    unsafe { fifreeze(file.as_raw_fd(), &raw mut unused) }.map(drop)
}

/// Thaws the file system that an open file is on.
///
/// # Errors
///
/// `EINVAL` if it is not frozen.
pub(crate) fn thaw(file: BorrowedFd<'_>) -> nix::Result<()> {
    let mut unused = 0;
    // SAFETY: as in `freeze`.
    unsafe { fithaw(file.as_raw_fd(), &raw mut unused) }.map(drop)
}

/// Runs `work` in a process of its own, which has all that is open here, and ends with it.
///
/// # Errors
///
/// `EDEADLK` if there is another thread already: what it has locked would never be free there.
pub(crate) fn fork_off(work: impl FnOnce()) -> nix::Result<()> {
    use nix::unistd::{ForkResult, fork};
    let threads = std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    if threads != 1 {
        return Err(nix::Error::EDEADLK);
    }
    // SAFETY: there is no other thread.
    match unsafe { fork() }? {
        ForkResult::Parent { .. } => Ok(()),
        ForkResult::Child => {
            work();
            // SAFETY: it only ends this process; what the first one does at its end is not done twice.
            unsafe { libc::_exit(0) }
        }
    }
}

/// Length of a block device in bytes.
///
/// # Errors
///
/// `ENOTTY` if it is none.
pub fn block_device_len(device: BorrowedFd<'_>) -> nix::Result<u64> {
    let mut len = 0;
    // SAFETY: the descriptor is open for the call, and the kernel writes one u64 to a u64.
    unsafe { blkgetsize64(device.as_raw_fd(), &raw mut len) }?;
    Ok(len)
}

/// Makes `len` bytes of a block device from `offset` on read as zeros, by whatever means the device
/// has. Both are multiples of its sector.
pub fn zero_block_device(device: BorrowedFd<'_>, offset: u64, len: u64) -> nix::Result<()> {
    // SAFETY: the descriptor is open for the call, and the kernel reads two u64 from an array of
    // two.
    unsafe { blkzeroout(device.as_raw_fd(), &[offset, len]) }?;
    Ok(())
}

/// The number of cachestat(2), which every architecture of Linux that this is built for shares
/// (include/uapi/asm-generic/unistd.h).
const SYS_CACHESTAT: libc::c_long = 451;

/// Whether all pages of `offset..offset + len` of a file are in memory. Does not bring any there, as a read
/// that must not wait does by beginning to read ahead.
///
/// # Errors
///
/// `ENOSYS` before Linux 6.5, `EPERM` for a file that is another user's.
pub fn is_cached(file: BorrowedFd<'_>, offset: u64, len: u64) -> nix::Result<bool> {
    // SAFETY: sysconf only answers a number.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let page = u64::try_from(page).map_err(|_| nix::Error::EINVAL)?.max(1);
    let range = [offset, len];
    // Pages that are in memory; dirty, written at present, evicted, evicted lately.
    let mut found = [0_u64; 5];
    // SAFETY: the descriptor is open for the call, and the kernel reads two u64 and writes five, to which
    // both pointers lead.
    let done = unsafe {
        libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range.as_ptr(), found.as_mut_ptr(), 0_u32)
    };
    nix::Error::result(done)?;
    let pages = (offset + len).div_ceil(page) - offset / page;
    Ok(found[0] >= pages)
}

/// Reads from a file what of `offset..offset + buffer.len()` is in memory already, without waiting
/// for a disk; answers how much from the start on (`RWF_NOWAIT`, preadv2(2)).
///
/// # Errors
///
/// `EAGAIN` if the start is not in memory, `EOPNOTSUPP` if the file system cannot tell.
pub fn read_cached(file: BorrowedFd<'_>, buffer: &mut [u8], offset: u64) -> nix::Result<usize> {
    let part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let offset = i64::try_from(offset).map_err(|_| nix::Error::EINVAL)?;
    // SAFETY: the descriptor is open for the call, and the kernel writes at most `iov_len` bytes
    // to the buffer, which is borrowed exclusively.
    let read =
        unsafe { libc::preadv2(file.as_raw_fd(), &raw const part, 1, offset, libc::RWF_NOWAIT) };
    nix::Error::result(read).map(|read| usize::try_from(read).expect("it is not negative"))
}

/// Lets a child process inherit a descriptor under its own number.
pub fn keep_over_exec(fd: BorrowedFd<'_>) -> nix::Result<()> {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).map(drop)
}

/// Takes over a descriptor that was received over a socket, and that nobody else knows.
pub(crate) fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel made this descriptor for the message that it came with, and the caller
    // got the number from there.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Lets this process have as many descriptors open as it may: each image that is written to takes a few, and
/// the usual limit is for programs that use select(2). A failure leaves it as it is.
pub fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Lets a write beyond the limit of a file's size (`RLIMIT_FSIZE`) fail with `EFBIG`, instead of ending the program
/// and with it whatever else it does. Caught and not ignored: programs that it starts have the signal as they
/// expect it.
pub fn outlive_file_size_limit() {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    extern "C" fn nothing(_: libc::c_int) {}
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: a handler that does nothing is safe at any time. It cannot fail: the signal can be caught.
    let _ = unsafe { sigaction(Signal::SIGXFSZ, &action) };
}

/// Keeps whatever this program has open, but for 0, 1 and 2, from the programs that it starts from here on.
///
/// # Errors
///
/// If `/proc` is not there.
pub fn keep_descriptors_to_ourselves() -> std::io::Result<()> {
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let number = entry?.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok());
        if let Some(number) = number.filter(|&number| number > libc::STDERR_FILENO) {
            // SAFETY: this changes nothing that this program could notice, whoever has the descriptor; one that
            // was closed meanwhile is EBADF.
            unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
    }
    Ok(())
}

/// Memory that begins at a multiple of `alignment`, a power of two, and is never given up: zeros that take nothing
/// until they are written to, in huge pages where the system has some, which makes few page faults of many
/// and copies faster.
///
/// # Errors
///
/// `ENOMEM` if the system has none left or allows none.
pub fn map_memory(len: usize, alignment: usize) -> nix::Result<&'static mut [u8]> {
    let mapped = len.checked_add(alignment).ok_or(nix::Error::ENOMEM)?;
    let (access, kind) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: the kernel chooses where, so nothing that is in use is mapped over.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), mapped, access, kind, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(nix::Error::last());
    }
    let skipped = start.align_offset(alignment);
    // SAFETY: `skipped` is less than `alignment`, and so many bytes were mapped beyond `len`; they are readable,
    // writable and zero, nobody else knows them, and nothing ever unmaps them.
    let memory = unsafe { std::slice::from_raw_parts_mut(start.cast::<u8>().add(skipped), len) };
    // A system without huge pages refuses it.
    advise(memory, libc::MADV_HUGEPAGE);
    Ok(memory)
}

/// Gives what `memory` takes back to the system, all whole pages of it; its content is unspecified then. Until
/// [`reuse`] the system makes no huge page of it: the kernel does so by and by of what is beside memory that is in
/// use, and the program would take the more.
pub fn discard(memory: &mut [u8]) {
    advise(memory, libc::MADV_NOHUGEPAGE);
    advise(memory, libc::MADV_DONTNEED);
}

/// Takes `memory` that was discarded to use again.
pub fn reuse(memory: &mut [u8]) {
    advise(memory, libc::MADV_HUGEPAGE);
}

/// Tells the kernel what will be of the whole pages of `memory`; what it says against it is without consequence.
fn advise(memory: &mut [u8], advice: libc::c_int) {
    // SAFETY: sysconf only answers a number.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    let skipped = memory.as_ptr().align_offset(page).min(memory.len());
    let whole = &mut memory[skipped..];
    let len = whole.len() / page * page;
    // SAFETY: the memory is borrowed exclusively, and whatever the advice makes of its bytes, they are bytes. A
    // failure leaves them as they are.
    unsafe { libc::madvise(whole.as_mut_ptr().cast(), len, advice) };
}

/// Gives memory that was freed back to the system: the allocator keeps what lies between other chunks, and uses
/// none of it for large ones. Takes milliseconds.
pub fn give_back_freed_memory() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: malloc_trim takes no memory that is in use, and may be called by any thread.
        unsafe { libc::malloc_trim(0) };
    }
}

/// Keeps the allocator from spreading freed memory over many arenas: the budget of a mount is
/// about what is resident. Call it before the first thread is started.
pub fn bound_allocator() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: mallopt only stores a number, and no other thread is running yet.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, 2) };
    }
}
