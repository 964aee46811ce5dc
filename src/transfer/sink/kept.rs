//! What a file that is replaced hands on to the one that takes its place.

use std::ffi::OsString;
use std::fs::{File, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use nix::unistd::{Gid, getegid, geteuid, getgroups};
use xattr::FileExt as _;

use crate::transfer::Error;

/// Extended attributes that say something of the content: what a file may do as a program, and its signature. The
/// kernel takes the first away from a file that is written to, and the others would be wrong.
const OF_THE_CONTENT: [&str; 3] = ["security.capability", "security.evm", "security.ima"];

/// Owner, group, permissions and extended attributes.
#[derive(Debug)]
pub(super) struct Kept {
    /// None for those of whoever makes the file.
    owner: Option<(u32, u32)>,
    /// Permission bits, without set-user-ID and the like: those were given to another content.
    mode: u32,
    attributes: Vec<(OsString, Vec<u8>)>,
}

impl Default for Kept {
    /// What a new file has: nobody else can read it.
    fn default() -> Self {
        Self { owner: None, mode: 0o600, attributes: Vec::new() }
    }
}

impl Kept {
    /// What the file at `path`, which is no link, hands on.
    ///
    /// # Errors
    ///
    /// If it is another user's, and its successor cannot be.
    pub(super) fn of(path: &Path, found: &Metadata) -> Result<Self, Error> {
        let failed = |e| Error::io("replace", path, e);
        if !can_own(found).map_err(|e| failed(e.into()))? {
            let why = "it has another owner or group, which what takes its place cannot have; \
                       remove it, or write elsewhere";
            return Err(Error::unsuitable(path, why));
        }
        let attributes = attributes(path).map_err(failed)?;
        let owner = Some((found.uid(), found.gid()));
        Ok(Self { owner, mode: found.mode() & 0o777, attributes })
    }

    /// Gives it to a file that nobody else has opened.
    pub(super) fn give(&self, file: &File) -> io::Result<()> {
        if let Some((uid, gid)) = self.owner {
            let has = file.metadata()?;
            if (has.uid(), has.gid()) != (uid, gid) {
                std::os::unix::fs::fchown(file, Some(uid), Some(gid))?;
            }
        }
        file.set_permissions(Permissions::from_mode(self.mode))?;
        for (name, value) in &self.attributes {
            if file.get_xattr(name)?.as_ref() != Some(value) {
                file.set_xattr(name, value)?;
            }
        }
        Ok(())
    }
}

/// Whether a file of ours can get the owner and the group of this one.
fn can_own(found: &Metadata) -> nix::Result<bool> {
    if geteuid().is_root() {
        return Ok(true);
    }
    let group = Gid::from_raw(found.gid());
    let is_member = group == getegid() || getgroups()?.contains(&group);
    Ok(found.uid() == geteuid().as_raw() && is_member)
}

/// The attributes that are handed on. A file system may have none at all.
fn attributes(path: &Path) -> io::Result<Vec<(OsString, Vec<u8>)>> {
    let names = match xattr::list(path) {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => return Ok(Vec::new()),
        names => names?,
    };
    let names = names.filter(|name| OF_THE_CONTENT.iter().all(|other| name != other));
    let found = names.map(|name| Ok(xattr::get(path, &name)?.map(|value| (name, value))));
    found.filter_map(io::Result::transpose).collect()
}
