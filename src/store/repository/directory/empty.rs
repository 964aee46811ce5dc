//! A directory that is no repository: how it becomes one, and why it is none.

use std::fs::File;
use std::io::Result as IoResult;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use super::beneath::Beneath;
use super::names;
use crate::store::repository::already_a_repository;
use crate::store::{Error, ErrorKind, Result};

/// Makes `directory`, unless it is there.
pub(super) fn make(directory: &Path) -> Result<()> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.and_then(|()| sync_above(directory)).map_err(|error| not_made(directory, error))
}

fn not_made(directory: &Path, error: std::io::Error) -> Error {
    Error::from_io(format!("cannot create the store {}", directory.display()), error)
}

/// Checks that `opened`, at the path `directory`, holds nothing but what a crashed `init` left.
pub(super) fn check(opened: &Beneath, directory: &Path) -> Result<()> {
    let shown = directory.display();
    for entry in opened.entries("").map_err(|error| not_made(directory, error))? {
        let name = entry.name;
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
    Ok(())
}

/// The names of the directories that were just made must survive too.
fn sync_above(directory: &Path) -> IoResult<()> {
    for ancestor in std::path::absolute(directory)?.ancestors().skip(1) {
        match File::open(ancestor).and_then(|directory| directory.sync_all()) {
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
