//! What cannot be done under `new/`, and what is said then.
#![allow(clippy::unwrap_used)]

mod support;

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use nix::errno::Errno;
use support::writing::Disk;
use support::{MIB, Sandbox, can_mount, errno, names, run, text};

#[test]
fn a_read_only_mount_takes_nothing() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.image("x.img", MIB, &[(0, 10)]);
    let id = sandbox.upload("x.img", &[]);
    let mount = sandbox.mount(&["--read-only"]);
    let rofs = Errno::EROFS as i32;
    assert_eq!(errno(File::create(mount.join("new/x.img"))), rofs);
    let output = sandbox.try_sh("cp x.img mnt/new/");
    assert!(text(&output).contains("Read-only file system"), "{}", text(&output));
    let said = sandbox.fails(&["clone", &id, "mnt/new/y.img"]);
    assert!(said.to_lowercase().contains("read-only") || said.contains("read only"), "{said}");
    let said = sandbox.fails(&["commit", "mnt/new/y.img"]);
    assert!(said.contains("y.img"), "{said}");
    mount.unmount();
    // It needs no staging either.
    assert_eq!(sandbox.sh("find state -name images | wc -l").trim(), "0");
}

#[test]
fn a_repository_that_cannot_be_written_is_read_and_takes_nothing() {
    if !can_mount(&["mount"]) || !nix::unistd::geteuid().is_root() {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.image("x.img", MIB, &[(0, 10)]);
    let (a, b) = (sandbox.upload("x.img", &["--name", "x"]), sandbox.upload("x.img", &[]));
    sandbox.ok(&["delete", "--yes", &sandbox.upload("x.img", &[])]);
    sandbox.sh("mkdir ro; mount --bind store ro; mount -o remount,bind,ro ro");
    let ro = |arguments: &[&str]| {
        let output = run(sandbox.fspfs().args(["-s", "ro"]).args(arguments));
        assert!(output.status.success(), "{arguments:?}: {}", text(&output));
        text(&output)
    };
    for line in [
        &["list"][..],
        &["list", &a],
        &["diff", &a, &b],
        &["verify"],
        &["download", "x", "y.img"],
        &["delete", "--dry-run", &a],
        &["gc", "--dry-run"],
    ] {
        ro(line);
    }
    let said = ro(&["mount", "mnt"]);
    assert!(said.contains("can only be read: new/ is read-only"), "{said}");
    let output = sandbox.try_sh("cp x.img mnt/new/");
    assert!(text(&output).contains("Read-only file system"), "{}", text(&output));
    sandbox.sh("cmp x.img mnt/by-name/x.img");
    ro(&["umount", "mnt"]);
    let output = run(sandbox.fspfs().args(["-s", "ro", "-q", "mount", "mnt"]));
    assert_eq!(text(&output).lines().filter(|line| line.contains("fspfs:")).count(), 0);
    ro(&["umount", "mnt"]);
    sandbox.sh("umount ro");
}

#[test]
fn a_length_that_cannot_be_staged_changes_nothing() {
    if !can_mount(&["dd"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let _disk = Disk::new(&sandbox, "disk", 64 * MIB);
    let mount = sandbox.mount(&["--staging", "disk/staging"]);
    sandbox.random("x.img", 3 * MIB);
    sandbox.sh("cp x.img mnt/new/");
    // More than ext4 has in one file.
    let output = sandbox.try_sh("truncate -s 20T mnt/new/x.img");
    assert!(text(&output).contains("File too large"), "{}", text(&output));
    assert_eq!(std::fs::metadata(mount.new_file("x.img")).unwrap().len(), 3 * MIB);
    sandbox
        .sh("for f in x.img mnt/new/x.img; do printf X | dd status=none of=$f conv=notrunc; done");
    sandbox.assert_holds(&mount.committed("x.img"), "x.img");
    mount.unmount();
}

#[test]
fn names_that_cannot_be_are_refused() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let mount = sandbox.mount(&[]);
    let new = mount.join("new");
    let long = "n".repeat(256);
    for (name, error) in [
        (OsStr::from_bytes(b"not-utf-8-\xff"), Errno::EINVAL),
        (OsStr::new("a\nb"), Errno::EINVAL),
        (OsStr::new("a\tb"), Errno::EINVAL),
        (OsStr::new(&long), Errno::ENAMETOOLONG),
    ] {
        assert_eq!(errno(File::create(new.join(name))), error as i32, "{name:?}");
        std::fs::write(new.join(".x"), "x").unwrap();
        assert_eq!(
            errno(std::fs::rename(new.join(".x"), new.join(name))),
            error as i32,
            "{name:?}"
        );
    }
    assert_eq!(names(&new), [".x"]);
    std::fs::remove_file(new.join(".x")).unwrap();
    // All others are fine, also where nothing is in front of the dot.
    for name in ["é 漢字 'quoted' \"x\" $y", &long[..255], "-rf", "x.y.z.img", "snap-0.img"] {
        std::fs::write(new.join(name), name).unwrap();
        let id = mount.committed(name);
        assert_eq!(std::fs::read_to_string(mount.image(&id)).unwrap(), name);
        std::fs::remove_file(new.join(name)).unwrap();
    }
    mount.unmount();
    assert_eq!(sandbox.snapshots().len(), 5);
}

#[test]
fn only_files_can_be_made() {
    if !can_mount(&["mkfifo"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let mount = sandbox.mount(&[]);
    std::fs::write(mount.new_file("x"), "x").unwrap();
    for script in [
        "mkdir mnt/new/d",
        "mkfifo mnt/new/p",
        "mknod mnt/new/b b 7 0",
        "ln -s x mnt/new/l",
        "ln mnt/new/x mnt/new/h",
        "python3 -c \"import socket; socket.socket(socket.AF_UNIX).bind('mnt/new/s')\"",
    ] {
        let output = sandbox.try_sh(script);
        let said = text(&output);
        assert!(!output.status.success() && said.contains("not permitted"), "{script}: {said}");
    }
    assert_eq!(names(mount.join("new")), ["x"]);
    // And not elsewhere.
    for place in ["x", "by-name/x", "control/x", "by-volume/x"] {
        assert_eq!(errno(File::create(mount.join(place))), Errno::EPERM as i32, "{place}");
    }
    mount.unmount();
}

/// `tar --xattrs` makes a file by `mknod`, and sets its attributes before it writes to it.
#[test]
fn an_archive_with_attributes_is_unpacked() {
    if !can_mount(&["tar", "setfattr"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.random("x.img", 3 * MIB);
    sandbox.sh("setfattr -n user.fspfs.tag.Role -v web x.img && tar --xattrs -cf x.tar x.img");
    let mount = sandbox.mount(&[]);
    sandbox.sh("tar --xattrs -xf x.tar -C mnt/new");
    let id = mount.committed("x.img");
    sandbox.assert_holds(&id, "x.img");
    assert_eq!(sandbox.snapshots()[0]["tags"]["Role"], "web");
    let output = sandbox.try_sh("python3 -c \"import os; os.mknod('mnt/new/x.img', 0o100600)\"");
    assert!(text(&output).contains("File exists"), "{}", text(&output));
    mount.unmount();
}

#[test]
fn attributes_that_cannot_be_are_refused() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let mount = sandbox.mount(&[]);
    let path = mount.new_file(".x");
    std::fs::write(&path, "x").unwrap();
    let set = |name: &str, value: &str| {
        let result = xattr::set(&path, name, value.as_bytes());
        assert!(result.is_err(), "{name} can be set");
        errno(result)
    };
    let (invalid, unsupported) = (Errno::EINVAL as i32, Errno::EOPNOTSUPP as i32);
    for (name, value) in [
        ("user.fspfs.nothing", "x"),
        ("user.fspfs.state", "clean"),
        ("user.fspfs.snapshot", "snap-0123456789abcdef0"),
        ("user.fspfs.parent", "vol-1"),
        ("user.fspfs.encrypted", "maybe"),
        ("user.fspfs.tag.fspfs:length", "1"),
        ("user.fspfs.description", &"d".repeat(256)),
        ("user.fspfs.tag.k", &"v".repeat(257)),
    ] {
        assert_eq!(set(name, value), invalid, "{name}");
    }
    assert_eq!(set("user.other", "x"), unsupported);
    // Our own ones need room beside them.
    for n in 0..48 {
        xattr::set(&path, format!("user.fspfs.tag.k{n}"), b"v").unwrap();
    }
    assert_eq!(set("user.fspfs.tag.one-more", "x"), Errno::ENOSPC as i32);
    assert_eq!(mount.told(".x", "state"), "dirty");
    // A parent that is not there is known when it is committed.
    xattr::set(&path, "user.fspfs.parent", b"snap-0123456789abcdef0").unwrap();
    let said = sandbox.fails(&["commit", "mnt/new/.x"]);
    assert!(said.contains("snap-0123456789abcdef0"), "{said}");
    xattr::remove(&path, "user.fspfs.parent").unwrap();
    sandbox.ok(&["commit", "mnt/new/.x"]);
    mount.unmount();
}

#[test]
fn a_staging_directory_that_cannot_be_used_is_told_at_once() {
    if !can_mount(&["mkfs.ext4"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let disk = Disk::new(&sandbox, "disk", 16 * MIB);
    sandbox.sh("touch file");
    disk.remount("ro");
    for (place, says) in [
        ("disk/staging", "Read-only file system"),
        ("file", "file"),
        ("/proc/staging", "/proc/staging"),
    ] {
        let said = sandbox.fails(&["mount", "--staging", place, "mnt"]);
        assert!(said.contains("cannot stage in") && said.contains(says), "{place}: {said}");
        assert!(support::mounts_below(&sandbox.join("mnt")).is_empty());
    }
    assert!(Path::new(&sandbox.join("file")).is_file());
}

#[test]
fn tags_that_no_snapshot_can_have_are_refused_at_the_mount() {
    let sandbox = Sandbox::with_store();
    let tags: Vec<String> = (0..49).map(|n| format!("--tag=k{n}=v")).collect();
    let long = format!("--tag=k={}", "v".repeat(256));
    let description = format!("--description={}", "d".repeat(256));
    for (options, says) in [
        (tags.iter().map(String::as_str).collect(), "tags are too many"),
        (vec![&long[..]], "the value of the tag"),
        (vec![&description[..]], "255 characters"),
    ] {
        let said = sandbox.fails(&[&["mount"], &options[..], &["mnt"]].concat());
        assert!(said.contains("cannot mount at") && said.contains(says), "{said}");
    }
}

#[test]
fn a_pending_snapshot_cannot_be_cloned() {
    if !can_mount(&["fsfreeze"]) {
        return;
    }
    // One that is being made when its disk fills up stays pending.
    let (sandbox, _disk) = Disk::with_store(48 * MIB);
    sandbox.random("x.img", 32 * MIB);
    let mount = sandbox.mount(&[]);
    sandbox.sh("fallocate -l 26M store/filler");
    assert!(!sandbox.try_sh("cp x.img mnt/new/").status.success());
    sandbox.sh("rm store/filler");
    let pending = names(sandbox.join("store/pending")).remove(0);
    let said = sandbox.fails(&["clone", &pending, "mnt/new/y.img"]);
    assert!(said.contains(&pending) && said.contains("pending"), "{said}");
    assert_eq!(names(mount.join("new")), ["x.img"]);
    mount.unmount();
}
