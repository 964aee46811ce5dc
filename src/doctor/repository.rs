//! A repository in a directory.

use std::path::Path;
use std::time::Duration;

use nix::unistd::{AccessFlags, access};

use super::machine::space;
use super::report::Findings;
use super::wait;
use crate::store::StoreUrl;
use crate::store::repository::Repository;

/// How long opening may take: it reads one small file.
const OPEN: Duration = Duration::from_secs(5);

/// Less room than this is worth a word: a small image would fill it.
const LITTLE: u64 = 1 << 30;

pub(super) async fn examine(path: &Path, report: &mut impl Findings) {
    let url = StoreUrl::Directory(path.to_owned());
    let why = match tokio::time::timeout(OPEN, Repository::open(path)).await {
        Ok(Ok(repository)) => {
            report.ok("repository", format!("{url} opens: format 1, id {}", repository.id()));
            None
        }
        Ok(Err(error)) => Some(error.to_string()),
        Err(_) => Some(format!("{url} does not answer within {} s", OPEN.as_secs())),
    };
    if let Some(why) = why {
        report.fail(
            "repository",
            why,
            format!("give the directory that holds fspfs.json, as its owner; `fspfs init {url}` makes an empty repository"),
        );
        report.skip("writing to it", "because the repository does not open");
        return;
    }
    let at = path.to_owned();
    let writable = wait::asked(move || access(&at, AccessFlags::W_OK | AccessFlags::X_OK)).await;
    match writable {
        Some(Ok(())) => report.ok("writing to it", format!("{url} can be written")),
        Some(Err(error)) => report.warn(
            "writing to it",
            format!("{url} can only be read: {}", error.desc()),
            "nothing, to read; to make snapshots, run as the owner of the directory, on a file system that is not read-only",
        ),
        None => report.warn("writing to it", wait::no_answer(), "look at the disk under it"),
    }
    match space::of(path).await {
        Some(space) if space.free < LITTLE => report.warn(
            "room in it",
            space.to_string(),
            "make room before snapshots are made: `fspfs delete`, then `fspfs gc`",
        ),
        Some(space) => report.ok("room in it", space.to_string()),
        None => report.warn("room in it", "it could not be told", "`df` on the directory"),
    }
}
