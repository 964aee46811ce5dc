//! What this machine has to have, whatever the store is.

use std::path::{Path, PathBuf};

use super::report::Findings;
use super::wait;
use crate::mount;
use crate::store::StoreUrl;

mod fuse;
mod loops;
pub(super) mod space;
mod staging;

pub(super) async fn examine(url: &StoreUrl, staging: Option<&Path>, report: &mut impl Findings) {
    let is_root = nix::unistd::geteuid().is_root();
    fuse::examine(is_root, report).await;
    loops::examine(is_root, report).await;
    read_ahead(is_root, report).await;
    if url.is_writable() {
        staging::examine(staging, report).await;
    }
    staging::examine_kept(report).await;
    if wait::asked(mount::requests_are_timed).await == Some(true) {
        report.warn(
            "request timeout",
            "the kernel ends FUSE requests that take long: close() does not wait for commits",
            "`fspfs commit --wait` after writing; or as root `sysctl fs.fuse.default_request_timeout=0 fs.fuse.max_request_timeout=0`",
        );
    } else {
        report.ok("request timeout", "the kernel lets close() wait for commits");
    }
}

/// Whether the read-ahead of a mount can be raised.
async fn read_ahead(is_root: bool, report: &mut impl Findings) {
    const SUBJECT: &str = "raising the read-ahead";
    if !is_root {
        report.warn(
            SUBJECT,
            "only root can: reading in order is slower than it could be",
            "nothing; or mount as root",
        );
        return;
    }
    let writable = wait::asked(|| {
        let all = std::fs::read_dir("/sys/class/bdi").ok()?;
        let files = all.flatten().map(|entry| entry.path().join("read_ahead_kb"));
        let mut files = files.filter(|file| file.exists());
        let can = |file: PathBuf| nix::unistd::access(&file, nix::unistd::AccessFlags::W_OK);
        files.next().map(|file| can(file).is_ok())
    });
    match writable.await.flatten() {
        Some(true) => report.ok(SUBJECT, "/sys/class/bdi can be written"),
        _ => report.warn(
            SUBJECT,
            "/sys/class/bdi cannot be written: reading in order is slower than it could be",
            "nothing; in a container, mount /sys writable",
        ),
    }
}

/// The program of this name that a shell would start, or that Debian keeps out of an ordinary path.
fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    places.map(|place| place.join(name)).find(|file| {
        nix::unistd::access(file, nix::unistd::AccessFlags::X_OK).is_ok() && file.is_file()
    })
}
