//! Images in the mount, through the programs that users use.

mod support;

use support::{BLOCK, GIB, MIB, Sandbox, can_mount, names, same};

#[test]
fn cp_gives_back_what_was_uploaded() {
    if !can_mount(&["cmp"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let image = sandbox.image(
        "disk.img",
        GIB + 12_345,
        &[(0, 3 * MIB), (700 * MIB + 1, BLOCK), (GIB, 12_345)],
    );
    let id = sandbox.upload("disk.img", &["--name", "web"]);
    let mount = sandbox.mount(&[]);
    assert_eq!(
        names(&mount.path),
        ["by-name", "by-tag", "by-volume", "control", &format!("{id}.img")]
    );
    sandbox.sh("cp mnt/by-name/web.img copy.img");
    assert!(same(image, sandbox.join("copy.img")));
    mount.unmount();
}
