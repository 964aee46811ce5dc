//! A directory that is no repository: how it becomes one, and why it is none.

use std::io::Result as IoResult;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use super::{names, sync_directory};
use crate::store::repository::already_a_repository;
use crate::store::{Error, ErrorKind, Result};

/// Makes `directory`, or checks that it holds nothing but what a crashed `init` left.
pub(super) fn make(directory: &Path) -> Result<()> {
    let shown = directory.display();
    let failed = |e| Error::from_io(format!("cannot create the store {shown}"), e);
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if name == names::INFO {
            return Err(already_a_repository(&shown.to_string()));
        }
        if name != "tmp" && name != "lost+found" {
            let name = name.display();
            let message = format!(
                "{shown} is not empty: it holds {name}. Give an empty directory, or one that does not exist yet"
            );
            return Err(Error::new(ErrorKind::Conflict, message));
        }
    }
    sync_above(directory).map_err(failed)
}

/// The names of the directories that were just made must survive too.
fn sync_above(directory: &Path) -> IoResult<()> {
    for ancestor in std::path::absolute(directory)?.ancestors().skip(1) {
        match sync_directory(ancestor) {
            // We may not look into what others made long ago.
            Err(error) if error.kind() != std::io::ErrorKind::PermissionDenied => {
                return Err(error);
            }
            _ => {}
        }
    }
    Ok(())
}

/// What to tell somebody who looked for a repository in `directory`, where there is no `fspfs.json`.
pub(super) fn no_repository(directory: &Path) -> Error {
    let shown = directory.display();
    let what = match directory.metadata() {
        Err(_) => "does not exist",
        Ok(found) if !found.is_dir() => "is not a directory",
        Ok(_) if directory.join("packs").is_dir() => {
            let message = format!(
                "the store {shown} has packs, and its fspfs.json is lost: restore that one file, or \
                 copy that of another repository and change its id"
            );
            return Error::new(ErrorKind::Corrupt, message);
        }
        Ok(_) => "is not a repository: it has no fspfs.json",
    };
    let message = format!("the store {shown} {what}; `fspfs init {shown}` makes an empty one");
    Error::new(ErrorKind::NotFound, message)
}
