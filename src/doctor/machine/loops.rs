//! Loop devices, by which the file systems in an image are mounted.

use std::path::Path;

use crate::doctor::report::Findings;
use crate::doctor::wait;

pub(super) async fn examine(is_root: bool, report: &mut impl Findings) {
    const SUBJECT: &str = "loop devices";
    let found =
        wait::asked(|| (Path::new("/dev/loop-control").exists(), super::program("losetup")));
    let (control, losetup) = found.await.unwrap_or((false, None));
    let purpose = "file systems in images cannot be mounted";
    match (control, losetup) {
        (false, _) => report.warn(
            SUBJECT,
            format!("there is no /dev/loop-control: {purpose}"),
            "`modprobe loop`; a container must be given the devices. Reading images needs none",
        ),
        (true, None) => report.warn(
            SUBJECT,
            format!("there is no losetup: {purpose}"),
            "install util-linux (on Debian, mount). Reading images needs none",
        ),
        (true, Some(losetup)) => {
            let who = if is_root { "" } else { "; only root may use them" };
            report.ok(SUBJECT, format!("/dev/loop-control and {}{who}", losetup.display()));
        }
    }
}
