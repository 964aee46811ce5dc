//! A mount, or a place for one.

use std::path::Path;

use nix::errno::Errno;
use nix::sys::statvfs::statvfs;

use super::report::Findings;
use super::wait;
use crate::mount::{self, Place};

const SUBJECT: &str = "mount point";

pub(super) async fn examine(path: &Path, report: &mut impl Findings) {
    let shown = path.display();
    let at = path.to_owned();
    let Some(place) = wait::asked(move || mount::look_at(&at)).await else {
        report.fail(
            SUBJECT,
            format!("{shown}: {}", wait::no_answer()),
            format!("take it away: `fspfs umount --lazy {shown}`, or `umount -l {shown}`"),
        );
        return;
    };
    match place {
        Ok(Place::Free) => report.ok(SUBJECT, format!("{shown} is an empty directory")),
        Ok(Place::Left) => report.warn(
            SUBJECT,
            format!("the mount that a killed fspfs left is at {shown}"),
            "nothing: `fspfs mount` removes it; or `fspfs umount` does",
        ),
        Ok(Place::Ours(entry)) => answers(path, &entry.source, report).await,
        Err(error) => report.fail(
            SUBJECT,
            error.to_string(),
            "give an empty directory, or the place of an fspfs mount",
        ),
    }
}

/// Asks the mount something that the kernel does not know by itself.
async fn answers(path: &Path, source: &str, report: &mut impl Findings) {
    let shown = path.display();
    let at = path.to_owned();
    match wait::asked(move || statvfs(&at).and_then(|_| nix::sys::stat::stat(&at))).await {
        Some(Ok(_)) => report.ok(SUBJECT, format!("{source} is mounted at {shown}, and answers")),
        Some(Err(Errno::EACCES)) => {
            report.warn(
                SUBJECT,
                format!("{source} is mounted at {shown}, by another user"),
                "run as that user, or mount with --allow-other or --allow-root",
            );
            return;
        }
        Some(Err(error)) => {
            report.fail(
                SUBJECT,
                format!("{source} is mounted at {shown}, and says: {}", error.desc()),
                format!("`fspfs umount {shown}`, and mount again; its log is {}", log(path)),
            );
            return;
        }
        None => {
            report.fail(
                SUBJECT,
                format!("{source} is mounted at {shown}: {}", wait::no_answer()),
                format!("see its log, {}; `fspfs umount --lazy {shown}` takes it away", log(path)),
            );
            return;
        }
    }
    let at = path.to_owned();
    match wait::asked(move || mount::read_ahead(&at)).await.flatten() {
        Some(kib) if kib >= mount::READ_AHEAD_KIB => {
            report.ok("read-ahead", format!("{kib} KiB at {shown}"));
        }
        Some(kib) => report.warn(
            "read-ahead",
            format!("{kib} KiB at {shown}: reading in order is slower than it could be"),
            format!("mount as root, which raises it to {} KiB", mount::READ_AHEAD_KIB),
        ),
        None => report.warn(
            "read-ahead",
            "it cannot be told: /sys/class/bdi does not show it",
            "nothing; in a container, let /sys be seen",
        ),
    }
}

fn log(path: &Path) -> String {
    mount::log_file(path).display().to_string()
}
