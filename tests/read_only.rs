//! Nothing can be changed through the mount.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::time::SystemTime;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::stat::{Mode, SFlag, mknod};
use support::{MIB, Mount, Sandbox, can_mount, can_mount_as_nobody, errno, run, same, text};

const EACCES: i32 = Errno::EACCES as i32;
const EPERM: i32 = Errno::EPERM as i32;

fn mounted() -> (Sandbox, Mount, String) {
    let sandbox = Sandbox::with_store();
    sandbox.image("disk.img", 2 * MIB, &[(0, 2 * MIB)]);
    let id = sandbox.upload("disk.img", &["--name", "disk", "--volume-id", "vol-01"]);
    let mount = sandbox.mount(&[]);
    (sandbox, mount, id)
}

#[test]
fn no_file_can_be_opened_for_writing() {
    if !can_mount(&["cmp"]) {
        return;
    }
    let (sandbox, mount, id) = mounted();
    let files = [mount.image(&id), mount.join("by-name/disk.img"), mount.join("control/metrics")];
    for file in &files {
        let open = |options: &mut OpenOptions| errno(options.open(file));
        assert_eq!(open(OpenOptions::new().write(true)), EACCES);
        assert_eq!(open(OpenOptions::new().read(true).write(true)), EACCES);
        assert_eq!(open(OpenOptions::new().append(true)), EACCES);
        assert_eq!(open(OpenOptions::new().write(true).truncate(true)), EACCES);
        assert_eq!(open(OpenOptions::new().write(true).create(true).truncate(true)), EACCES);
        // Of a file that is opened for reading, too.
        let truncate = nix::libc::O_TRUNC;
        assert_eq!(open(OpenOptions::new().read(true).custom_flags(truncate)), EACCES);
    }
    assert!(same(sandbox.join("disk.img"), &files[0]));
    mount.unmount();
}

#[test]
fn no_name_can_be_changed() {
    if !can_mount(&[]) {
        return;
    }
    let (sandbox, mount, id) = mounted();
    let image = mount.image(&id);
    let link = mount.join("by-name/disk.img");
    let readme = mount.join("control/README");
    let directories = ["", "by-name", "by-tag/Name/disk", "by-volume/vol-01", "control"];
    for name in [&image, &link, &readme] {
        assert_eq!(errno(std::fs::remove_file(name)), EPERM, "unlink {name:?}");
        assert_eq!(errno(std::fs::rename(name, mount.join("x"))), EPERM, "rename {name:?}");
        assert_eq!(errno(std::fs::rename(name, mount.join("by-name/x"))), EPERM);
        assert_eq!(errno(std::fs::hard_link(name, mount.join("x"))), EPERM, "link {name:?}");
    }
    let exchanged = renameat2(AT_FDCWD, &image, AT_FDCWD, &readme, RenameFlags::RENAME_EXCHANGE);
    assert_eq!(exchanged, Err(Errno::EPERM));
    for directory in directories {
        let new = mount.join(directory).join("other");
        assert_eq!(errno(File::create(&new)), EPERM, "create in {directory:?}");
        assert_eq!(errno(std::fs::create_dir(&new)), EPERM, "mkdir in {directory:?}");
        assert_eq!(errno(symlink("x", &new)), EPERM, "symlink in {directory:?}");
        assert_eq!(mknod(&new, SFlag::S_IFIFO, Mode::S_IRUSR, 0), Err(Errno::EPERM));
        if !directory.is_empty() {
            let directory = mount.join(directory);
            assert_eq!(errno(std::fs::remove_dir(&directory)), EPERM, "rmdir {directory:?}");
            assert_eq!(errno(std::fs::rename(&directory, mount.join("x"))), EPERM);
        }
        assert!(!new.exists());
    }
    assert!(same(sandbox.join("disk.img"), &image) && link.is_symlink() && readme.exists());
    mount.unmount();
}

#[test]
fn no_attribute_can_be_changed() {
    if !can_mount(&["setfattr"]) {
        return;
    }
    let (sandbox, mount, id) = mounted();
    let before = sandbox.sh(&format!("stat mnt mnt/{id}.img mnt/by-name mnt/control/README"));
    for name in [mount.image(&id), mount.join("by-name"), mount.join("control/README")] {
        assert_eq!(errno(std::fs::set_permissions(&name, Permissions::from_mode(0o777))), EPERM);
        assert_eq!(errno(std::os::unix::fs::chown(&name, Some(1), Some(1))), EPERM);
        let opened = File::open(&name).unwrap();
        assert_eq!(errno(opened.set_modified(SystemTime::UNIX_EPOCH)), EPERM);
        assert_eq!(errno(opened.set_permissions(Permissions::from_mode(0o777))), EPERM);
        for change in ["-n user.new -v 1", "-n user.fspfs.id -v 1", "-x user.fspfs.id"] {
            let output = sandbox.try_sh(&format!("setfattr {change} {}", name.display()));
            assert!(!output.status.success(), "setfattr {change}");
            assert!(text(&output).contains("Operation not permitted"), "{}", text(&output));
        }
    }
    for len in [0, MIB, 4 * MIB] {
        let truncated = nix::unistd::truncate(&mount.image(&id), len.try_into().unwrap());
        assert_eq!(truncated, Err(Errno::EPERM), "truncate to {len}");
    }
    let after = sandbox.sh(&format!("stat mnt mnt/{id}.img mnt/by-name mnt/control/README"));
    assert_eq!(before, after);
    mount.unmount();
}

#[test]
fn removing_everything_removes_nothing() {
    if !can_mount(&["cmp"]) {
        return;
    }
    let (sandbox, mount, id) = mounted();
    let before = sandbox.sh("find mnt | sort");
    let output = sandbox.try_sh("rm -rf mnt/*");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains(&format!("{id}.img': Operation not permitted")));
    assert_eq!(sandbox.sh("find mnt | sort"), before);
    assert!(sandbox.ok(&["list"]).contains(&id));
    assert!(same(sandbox.join("disk.img"), mount.image(&id)));
    mount.unmount();
    assert!(sandbox.ok(&["verify"]).contains("Everything is intact."));
}

#[test]
fn neither_can_the_owner_who_is_not_root() {
    if !can_mount_as_nobody(&["cmp"]) {
        return;
    }
    let sandbox = Sandbox::new();
    sandbox.welcome_nobody();
    sandbox.image("user/disk.img", MIB, &[(0, MIB)]);
    sandbox.sh("chmod 0644 user/disk.img");
    assert!(run(sandbox.fspfs_as_nobody().args(["init"])).status.success());
    let uploaded = run(sandbox.fspfs_as_nobody().args(["upload", "disk.img", "--name", "disk"]));
    assert!(uploaded.status.success(), "{}", text(&uploaded));
    let mount = Mount::at(sandbox.join("user/mnt"), sandbox.fspfs_as_nobody(), &[]);
    for (script, says) in [
        ("exec 3>> user/mnt/by-name/disk.img", "Permission denied"),
        ("exec 3<> user/mnt/by-name/disk.img", "Permission denied"),
        ("rm -f user/mnt/snap-*.img", "Operation not permitted"),
        ("mv user/mnt/snap-*.img user/mnt/x", "Operation not permitted"),
        ("chmod u+w user/mnt/snap-*.img", "Operation not permitted"),
        ("touch user/mnt/snap-*.img", "denied"),
        ("truncate -s 0 user/mnt/snap-*.img", "Permission denied"),
        ("mkdir user/mnt/other", "Operation not permitted"),
        ("ln -s x user/mnt/other", "Operation not permitted"),
    ] {
        let output = sandbox.try_sh_as_nobody(script);
        assert!(!output.status.success(), "{script}");
        assert!(text(&output).contains(says), "{script}: {}", text(&output));
    }
    let compared = sandbox.try_sh_as_nobody("cmp user/disk.img user/mnt/by-name/disk.img");
    assert!(compared.status.success(), "{}", text(&compared));
    mount.unmount();
    sandbox.assert_nothing_is_left();
}
