//! The directory in which working images are staged.

use std::io;
use std::path::{Path, PathBuf};

use super::space;
use crate::doctor::report::Findings;
use crate::doctor::wait;
use crate::image::staging::Staging;
use crate::image::staging::files::has_sparse_files;
use crate::{mount, own};

const SUBJECT: &str = "staging directory";

/// Less room than this is worth a word: a small image would fill it.
const LITTLE: u64 = 1 << 30;

pub(super) async fn examine(given: Option<&Path>, report: &mut impl Findings) {
    let wanted = given.map_or_else(mount::staging_root, Path::to_owned);
    let at = wanted.clone();
    let tried = wait::asked(move || {
        let there = existing(&at);
        let sparse = match own::check(&at) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            // A file without a name: nothing is left of it.
            _ => has_sparse_files(&there),
        };
        (there, sparse)
    });
    let cure = "another directory with --staging or FSPFS_STAGING, on ext4, xfs, btrfs or tmpfs; or --read-only, which needs none";
    let shown = wanted.display();
    let Some((there, sparse)) = tried.await else {
        return report.fail(SUBJECT, format!("{shown}: {}", wait::no_answer()), cure);
    };
    match sparse {
        Ok(true) => {}
        Ok(false) => {
            return report.warn(SUBJECT, format!("{shown}: files there cannot have holes"), cure);
        }
        Err(error) => {
            let found = format!("{shown}: nothing can be written in {}: {error}", there.display());
            return report.warn(SUBJECT, found, cure);
        }
    }
    let new = if there == wanted { "" } else { ", which will be made," };
    match space::of(&there).await {
        Some(space) if space.free < LITTLE => report.warn(
            SUBJECT,
            format!("{shown}{new} has little room: {space}"),
            "make room, or another directory with --staging or FSPFS_STAGING",
        ),
        Some(space) => report.ok(SUBJECT, format!("{shown}{new} can be used: {space}")),
        None => report.warn(SUBJECT, format!("{shown}: its room cannot be told"), cure),
    }
}

/// What waits for a store that is not mounted.
pub(super) async fn examine_kept(report: &mut impl Findings) {
    let kept = wait::asked(|| Staging::kept(&mount::staging_root()));
    for kept in kept.await.unwrap_or_default() {
        report.warn(
            "staged images",
            kept.to_string(),
            "mount that store: what was being committed goes on then, the rest is in new/",
        );
    }
}

/// The directory, or the closest one above it that is there.
fn existing(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let there = |at: &&Path| match at.symlink_metadata() {
        Err(error) => error.kind() != io::ErrorKind::NotFound,
        Ok(_) => true,
    };
    path.ancestors().find(there).unwrap_or(Path::new("/")).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closest_directory_that_is_there_is_found() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(existing(dir.path()), dir.path());
        assert_eq!(existing(&dir.path().join("a/b")), dir.path());
    }
}
