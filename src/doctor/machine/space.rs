//! Room on a disk.

use std::fmt;
use std::path::Path;

use bytesize::ByteSize;
use nix::sys::statvfs::statvfs;

use crate::doctor::wait;

/// What a file system has, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::doctor) struct Space {
    /// For this user.
    pub(in crate::doctor) free: u64,
    total: u64,
}

/// The room where `path` is, if it can be told in time.
pub(in crate::doctor) async fn of(path: &Path) -> Option<Space> {
    let path = path.to_owned();
    let found = wait::asked(move || statvfs(&path)).await?.ok()?;
    let unit = found.fragment_size();
    Some(Space { free: found.blocks_available() * unit, total: found.blocks() * unit })
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = |bytes| ByteSize(bytes).display().iec();
        write!(f, "{} of {} are free", size(self.free), size(self.total))
    }
}
