//! FUSE: the device, the right to mount, and what ordinary users mount with.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;

use crate::doctor::report::Findings;
use crate::doctor::wait;

/// The capability to mount, `CAP_SYS_ADMIN`, in `capabilities(7)`.
const CAN_MOUNT: u32 = 21;

pub(super) async fn examine(is_root: bool, report: &mut impl Findings) {
    device(report).await;
    if is_root {
        may_mount(report).await;
    } else {
        fusermount(report).await;
        fuse_conf(report).await;
    }
}

async fn device(report: &mut impl Findings) {
    let opened = wait::asked(|| {
        std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").map(drop)
    });
    let error = match opened.await {
        Some(Ok(())) => return report.ok("/dev/fuse", "it can be opened"),
        Some(Err(error)) => error,
        None => return report.fail("/dev/fuse", wait::no_answer(), "start this machine again"),
    };
    let cure = match error.kind() {
        ErrorKind::NotFound => {
            "load the module with `modprobe fuse`; give a container the device: `--device /dev/fuse --cap-add SYS_ADMIN`"
        }
        ErrorKind::PermissionDenied => {
            "let everybody use it, as udev does: `chmod 0666 /dev/fuse`; or run as root; a container must be allowed the device"
        }
        _ => "load the module with `modprobe fuse`",
    };
    report.fail("/dev/fuse", format!("it cannot be opened: {error}"), cure);
}

async fn may_mount(report: &mut impl Findings) {
    let status = wait::asked(|| std::fs::read_to_string("/proc/self/status").ok()).await.flatten();
    match status.as_deref().and_then(|status| has_capability(status, CAN_MOUNT)) {
        Some(false) => report.fail(
            "mounting",
            "it is not permitted, although this is root",
            "a container needs `--cap-add SYS_ADMIN`",
        ),
        Some(true) => report.ok("mounting", "it is permitted"),
        None => report.warn(
            "mounting",
            "whether it is permitted could not be told",
            "try it: `fspfs mount` says what is missing",
        ),
    }
}

/// Whether a process has a capability, by its `/proc/<pid>/status`.
fn has_capability(status: &str, number: u32) -> Option<bool> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    let mask = u64::from_str_radix(line.trim(), 16).ok()?;
    Some(mask >> number & 1 == 1)
}

async fn fusermount(report: &mut impl Findings) {
    let found = wait::asked(|| {
        let file = super::program("fusermount3")?;
        let found = file.metadata().ok()?;
        Some((file, found.mode() & 0o4000 != 0 && found.uid() == 0))
    });
    match found.await.flatten() {
        Some((file, true)) => report.ok("fusermount3", file.display().to_string()),
        Some((file, false)) => report.warn(
            "fusermount3",
            format!("{} is not set-user-id root", file.display()),
            "as root, `chmod u+s` it, or install fuse3 anew; or mount as root",
        ),
        None => report.fail(
            "fusermount3",
            "it is not there, and ordinary users mount with it",
            "install fuse3, or mount as root",
        ),
    }
}

async fn fuse_conf(report: &mut impl Findings) {
    let text = wait::asked(|| std::fs::read_to_string("/etc/fuse.conf").unwrap_or_default()).await;
    if text.as_deref().is_some_and(allows_other) {
        report.ok("user_allow_other", "/etc/fuse.conf has it: --allow-other and --allow-root work");
    } else {
        report.warn(
            "user_allow_other",
            "/etc/fuse.conf does not have it: --allow-other and --allow-root do not work for ordinary users",
            "nothing, without these; else put the line `user_allow_other` into /etc/fuse.conf, as root",
        );
    }
}

/// Whether `fuse.conf` lets ordinary users let others in. As `fusermount3` reads it: a line each,
/// blanks around it do not count, and a comment begins with `#`.
fn allows_other(text: &str) -> bool {
    text.lines().any(|line| {
        let line = line.split_once('#').map_or(line, |(line, _)| line);
        line.trim() == "user_allow_other"
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fuse_conf_is_read() {
        assert!(allows_other("user_allow_other\n"));
        assert!(allows_other("# x\nmount_max = 1000\n  user_allow_other  # for root\n"));
        assert!(!allows_other("#user_allow_other\n"));
        assert!(!allows_other("user_allow_others\nmount_max=7"));
        assert!(!allows_other(""));
    }

    #[test]
    fn capabilities_are_read() {
        let status = "Name:\tfspfs\nCapPrm:\t0000000000000000\nCapEff:\t00000000a80425fb\n";
        assert_eq!(has_capability(status, 0), Some(true));
        assert_eq!(has_capability(status, CAN_MOUNT), Some(false));
        assert_eq!(has_capability("CapEff:\t000001ffffffffff\n", CAN_MOUNT), Some(true));
        assert_eq!(has_capability("Name:\tfspfs\n", CAN_MOUNT), None);
    }
}
