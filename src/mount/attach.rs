//! Getting a connection to the kernel and a place in the tree of mounts, and leaving it.
//!
//! The mount is made here and not by fuser: fuser 0.18.0 would at the end unmount whatever is at
//! the mount point by then, also when that is another file system.

use std::io::{IoSliceMut, Read as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use super::point::{Point, Standing};
use super::table::{self, MountEntry};
use super::{Error, holders};
use crate::fuse::MAX_READ;
use crate::store::StoreUrl;

/// Type of our mounts in the table of mounts.
pub(super) const FS_TYPE: &str = "fuse.fspfs";

/// How long a mount point may take to answer before it counts as hung.
const PROBE: Duration = Duration::from_secs(5);

/// How long `fusermount3` may take to hand over the device.
const HAND_OVER: Duration = Duration::from_secs(30);

/// Who may use the mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The user who mounts.
    Owner,
    /// The user who mounts, and root.
    Root,
    /// Everybody, as the permissions of the files allow.
    All,
}

/// A mount that nobody serves yet.
pub(super) struct Mount {
    pub(super) device: OwnedFd,
    /// What the table said of it.
    pub(super) entry: MountEntry,
}

/// Mounts at `path`.
pub(super) fn attach(path: &Path, url: &StoreUrl, access: Access) -> Result<Mount, Error> {
    clear_stale(path)?;
    let point = Point::open(path)?;
    point.check()?;
    let device = if nix::unistd::geteuid().is_root() {
        by_mount(&point, url, access)?
    } else {
        by_fusermount(path, url, access)?
    };
    Ok(Mount { device, entry: point.mounted()? })
}

fn unusable(path: &Path, why: impl Into<String>) -> Error {
    Error::MountPoint { path: path.to_owned(), why: why.into() }
}

/// What is at a mount point.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    /// An empty directory.
    Free,
    /// The dead mount of an fspfs that was killed; mounting removes it.
    Left,
    /// A mount of fspfs.
    Ours(MountEntry),
}

/// Looks at a mount point, without changing anything there. May take [`PROBE`].
///
/// # Errors
///
/// If nothing can be mounted there: why, and what to do.
pub(crate) fn look_at(path: &Path) -> Result<Place, Error> {
    if let Some(entry) = table::find(path)?.filter(|entry| entry.fs_type == FS_TYPE) {
        return Ok(match probe(path) {
            Some(Errno::ENOTCONN | Errno::ECONNABORTED) => Place::Left,
            _ => Place::Ours(entry),
        });
    }
    if left(path)?.is_some() {
        return Ok(Place::Left);
    }
    Point::open(&table::resolve(path))?.check().map(|()| Place::Free)
}

/// Removes a mount that a killed daemon left behind.
fn clear_stale(path: &Path) -> Result<(), Error> {
    if let Some(entry) = left(path)? {
        detach(&entry)?;
        tracing::warn!("removed the mount that a killed fspfs left at {}", path.display());
    }
    Ok(())
}

/// The mount that a killed daemon left behind.
///
/// # Errors
///
/// If something else is mounted there which is no place to mount in.
fn left(path: &Path) -> Result<Option<MountEntry>, Error> {
    let Some(entry) = table::find(path)? else { return Ok(None) };
    match probe(path) {
        Some(Errno::ENOTCONN | Errno::ECONNABORTED) if entry.fs_type == FS_TYPE => Ok(Some(entry)),
        Some(Errno::ENOTCONN) => Err(unusable(
            path,
            format!(
                "a dead mount of the type {} is there; remove it with `umount -l`",
                entry.fs_type
            ),
        )),
        Some(Errno::ETIMEDOUT) => {
            Err(unusable(path, format!("{} is mounted there, and does not answer", entry.source)))
        }
        _ if entry.fs_type == FS_TYPE => {
            let source = entry.source;
            Err(unusable(
                path,
                format!("{source} is mounted there already; `fspfs umount` it first"),
            ))
        }
        // Something else may well be a place to mount in: the root of a disk, say.
        _ => Ok(None),
    }
}

/// Whether a directory answers: what `stat` says, or `ETIMEDOUT`.
fn probe(path: &Path) -> Option<Errno> {
    let (answer, answered) = std::sync::mpsc::channel();
    let path = path.to_owned();
    let asked = crate::threads::aside(move || {
        // Nobody listens if it took too long.
        let _ = answer.send(nix::sys::stat::stat(&path).err());
    });
    if asked.is_err() {
        return Some(Errno::EAGAIN);
    }
    answered.recv_timeout(PROBE).unwrap_or(Some(Errno::ETIMEDOUT))
}

fn open_device(path: &Path) -> Result<OwnedFd, Error> {
    let opened = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse");
    opened.map(OwnedFd::from).map_err(|e| {
        let why = match e.kind() {
            std::io::ErrorKind::NotFound => {
                "there is no /dev/fuse: load the module with `modprobe fuse`; a container must be given the device".to_owned()
            }
            _ => format!("/dev/fuse cannot be opened: {e}"),
        };
        Error::System { doing: "mount at", path: path.to_owned(), why }
    })
}

fn by_mount(point: &Point, url: &StoreUrl, access: Access) -> Result<OwnedFd, Error> {
    let path = point.path();
    let device = open_device(path)?;
    let fd = device.as_raw_fd();
    let mut data = format!(
        "fd={fd},rootmode=40000,user_id=0,group_id={},default_permissions,max_read={MAX_READ}",
        nix::unistd::getegid()
    );
    if access != Access::Owner {
        data.push_str(",allow_other");
    }
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOATIME;
    let source = url.to_string();
    let source: &str = &source;
    mount(Some(source), &point.link(), Some(FS_TYPE), flags, Some(data.as_str())).map_err(|e| {
        let why = match e {
            Errno::EPERM => {
                "mounting is not permitted, although you are root: a container needs CAP_SYS_ADMIN"
                    .to_owned()
            }
            Errno::ENODEV => {
                "the kernel has no FUSE: load the module with `modprobe fuse`".to_owned()
            }
            e => e.desc().to_owned(),
        };
        Error::System { doing: "mount at", path: path.to_owned(), why }
    })?;
    Ok(device)
}

/// An ordinary user mounts through `fusermount3`, which hands over the device.
fn by_fusermount(path: &Path, url: &StoreUrl, access: Access) -> Result<OwnedFd, Error> {
    let failed = |why: String| Error::System { doing: "mount at", path: path.to_owned(), why };
    let (ours, theirs) = UnixStream::pair().map_err(|e| failed(e.to_string()))?;
    crate::sys::keep_over_exec(theirs.as_fd()).map_err(|e| failed(e.to_string()))?;
    // A comma would end the option.
    let source = url.to_string().replace('\\', "\\\\").replace(',', "\\,");
    let mut options = format!(
        "fsname={source},subtype=fspfs,nosuid,nodev,noatime,default_permissions,max_read={MAX_READ}"
    );
    if access != Access::Owner {
        options.push_str(",allow_other");
    }
    let child = fusermount()
        .args(["-o", &options, "--"])
        .arg(path)
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .stderr(Stdio::piped())
        .spawn();
    drop(theirs);
    let mut child = child.map_err(|e| failed(no_fusermount(&e)))?;
    ours.set_read_timeout(Some(HAND_OVER)).map_err(|e| failed(e.to_string()))?;
    let device = receive_device(&ours);
    if device.is_none() {
        // It has said why and ended, or it hangs: it is our child, and was not waited for yet.
        let _ = child.kill();
    }
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        // What it says is only to explain a failure, which is there anyway.
        let _ = stderr.read_to_string(&mut said);
    }
    let _ = child.wait();
    device.ok_or_else(|| {
        let cure = if said.contains("user_allow_other") {
            "; put the line `user_allow_other` into /etc/fuse.conf, or leave out --allow-other and --allow-root"
        } else if said.contains("/dev/fuse: Permission denied") {
            "; let everybody use the device, as udev does, with `chmod 0666 /dev/fuse`, or mount as root"
        } else {
            ""
        };
        failed(format!("{}{cure}", said.trim()))
    })
}

fn fusermount() -> Command {
    let mut command = Command::new("fusermount3");
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

fn no_fusermount(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => {
            "there is no fusermount3, which ordinary users mount with: install fuse3".to_owned()
        }
        _ => format!("fusermount3 cannot be run: {error}"),
    }
}

fn receive_device(socket: &UnixStream) -> Option<OwnedFd> {
    let mut byte = [0];
    let mut buffers = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut buffers,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )
    .ok()?;
    let fds = message.cmsgs().ok()?.find_map(|message| match message {
        ControlMessageOwned::ScmRights(fds) => Some(fds),
        _ => None,
    });
    fds?.first().map(|&fd| crate::sys::own(fd))
}

/// Unmounts what fspfs has mounted at `path`; `lazy` takes it out of sight while it is in use.
///
/// # Errors
///
/// [`Error::NotMounted`] if it is no mount of ours, [`Error::Busy`] if it is in use.
pub fn unmount(path: &Path, lazy: bool) -> Result<(), Error> {
    unmount_entry(&table::our_mount(path)?, lazy)
}

/// The same for a mount that is known.
///
/// # Errors
///
/// As [`unmount`].
pub(super) fn unmount_entry(entry: &MountEntry, lazy: bool) -> Result<(), Error> {
    if lazy {
        return detach(entry);
    }
    let place = Standing::of(entry)?;
    match umount2(&place.path, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(Errno::EBUSY) => Err(busy(entry.mount_point.clone())),
        Err(Errno::EPERM) => unmount_by_fusermount(entry, &["-u"]),
        Err(error) => Err(cannot_unmount(entry, error.desc())),
    }
}

fn busy(path: PathBuf) -> Error {
    Error::Busy { holders: holders::of(&path), path }
}

fn detach(entry: &MountEntry) -> Result<(), Error> {
    let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
    let place = Standing::of(entry)?;
    match umount2(&place.path, flags) {
        Ok(()) => Ok(()),
        Err(Errno::EPERM) => unmount_by_fusermount(entry, &["-u", "-z"]),
        Err(error) => Err(cannot_unmount(entry, error.desc())),
    }
}

fn unmount_by_fusermount(entry: &MountEntry, flags: &[&str]) -> Result<(), Error> {
    let path = &entry.mount_point;
    let run = fusermount().args(flags).arg("--").arg(path).stderr(Stdio::piped()).output();
    let output = run.map_err(|e| cannot_unmount(entry, &no_fusermount(&e)))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("busy") {
        return Err(busy(path.clone()));
    }
    Err(cannot_unmount(entry, said.trim()))
}

fn cannot_unmount(entry: &MountEntry, why: &str) -> Error {
    Error::System { doing: "unmount", path: entry.mount_point.clone(), why: why.to_owned() }
}
