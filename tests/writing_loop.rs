//! File systems made and filled in a new image, through a loop device.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;

use support::writing::Running;
use support::{BLOCK, FileSystem, Loop, MIB, Mount, Sandbox, can_mount, loops_below, until};

fn mounted() -> (Sandbox, Mount) {
    let sandbox = Sandbox::with_store();
    sandbox.sh("mkdir files files/deep; seq 100000 > files/numbers; head -c 3M /dev/urandom > files/random
        cp files/random files/deep/copy; ln -s ../numbers files/deep/link; truncate -s 5M files/hole");
    let mount = sandbox.mount(&[]);
    (sandbox, mount)
}

/// Makes a file system in a new image of `len`, lets `fill` work in it at `fs`, and takes it apart;
/// the snapshot that comes of it.
fn fill(sandbox: &Sandbox, mount: &Mount, kind: &str, len: u64, fill: impl Fn()) -> String {
    sandbox.sh(&format!("truncate -s {len} mnt/new/{kind}.img"));
    let device = Loop::attach(&mount.new_file(&format!("{kind}.img")), &[]);
    sandbox.sh(&format!("mkfs.{kind} -q {}", device.0.display()));
    let file_system = FileSystem::mount(&device.0, kind, "rw", sandbox.join("fs"));
    fill();
    drop(file_system);
    // As long as it is attached it is being written.
    assert_eq!(mount.begun(), 0);
    drop(device);
    until("it is committed in the background", || mount.begun() == 1);
    mount.committed(&format!("{kind}.img"))
}

/// The image of a snapshot passes the check of its file system, and has the files.
fn check(sandbox: &Sandbox, image: &Path, kind: &str, fsck: &str, options: &str) {
    let device = Loop::attach(image, &["-r"]);
    sandbox.sh(&format!("{fsck} {}", device.0.display()));
    let file_system = FileSystem::mount(&device.0, kind, options, sandbox.join("back"));
    sandbox.sh("diff -r --no-dereference files back/files");
    drop((file_system, device));
    until("it is detached", || loops_below(&sandbox.path).is_empty());
}

fn makes_a_snapshot(kind: &str, len: u64, fsck: &str, options: &str) {
    if !can_mount(&["losetup", &format!("mkfs.{kind}")]) {
        return;
    }
    let (sandbox, mount) = mounted();
    let id = fill(&sandbox, &mount, kind, len, || {
        sandbox
            .sh("cp -a files fs/; sync -f fs; cp -a files/random fs/files/more; rm fs/files/more");
    });
    check(&sandbox, &mount.image(&id), kind, fsck, options);
    assert_eq!(mount.begun(), 1);
    mount.unmount();
    assert_eq!(sandbox.snapshots().len(), 1);
    sandbox.assert_nothing_is_left();
}

#[test]
fn an_ext4_becomes_a_snapshot() {
    makes_a_snapshot("ext4", 40 * MIB, "e2fsck -f -n", "ro,noload");
}

#[test]
fn an_xfs_becomes_a_snapshot() {
    makes_a_snapshot("xfs", 320 * MIB, "xfs_repair -n", "ro,norecovery,nouuid");
}

#[test]
fn a_btrfs_becomes_a_snapshot() {
    makes_a_snapshot("btrfs", 128 * MIB, "btrfs check --readonly", "ro");
}

#[test]
fn a_thousand_files_with_syncs_put_each_block_once() {
    if !can_mount(&["losetup", "mkfs.ext4", "python3"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    let id = fill(&sandbox, &mount, "ext4", 40 * MIB, || {
        sandbox.python(
            "import os
for n in range(1000):
    fd = os.open(f'fs/{n}', os.O_WRONLY | os.O_CREAT)
    os.write(fd, b'%d' % n * 500)
    if n % 20 == 0: os.fsync(fd)
    os.close(fd)",
        );
        sandbox.sh("mkdir fs/files; rmdir fs/files; cp -a files fs/");
        assert_eq!(mount.put(), 0, "fsync uploads nothing");
    });
    check(&sandbox, &mount.image(&id), "ext4", "e2fsck -f -n", "ro,noload");
    let blocks = sandbox.stored(&id)["data_blocks"].as_u64().unwrap();
    assert!(blocks > 10 && blocks < 40 * MIB / BLOCK, "{blocks}");
    assert!(mount.put() <= 2 * blocks, "{} puts for {blocks} blocks", mount.put());
    mount.unmount();
}

#[test]
fn a_file_system_in_a_clone_is_changed_in_a_child() {
    if !can_mount(&["losetup", "mkfs.ext4"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    let first = fill(&sandbox, &mount, "ext4", 40 * MIB, || {
        sandbox.sh("cp -a files fs/");
    });
    let put = mount.put();
    sandbox.ok(&["clone", &first, "mnt/new/child.img"]);
    let device = Loop::attach(&mount.new_file("child.img"), &["--direct-io=on"]);
    {
        let _file_system = FileSystem::mount(&device.0, "ext4", "discard", sandbox.join("fs"));
        sandbox.sh("echo more | tee fs/files/more files/more; rm fs/files/random files/random");
    }
    drop(device);
    let second = mount.committed("child.img");
    assert_eq!(sandbox.parent_of(&second), Some(first));
    check(&sandbox, &mount.image(&second), "ext4", "e2fsck -f -n", "ro,noload");
    assert!(mount.put() - put < put, "{} puts, after {put}", mount.put() - put);
    mount.unmount();
}

#[test]
fn a_file_system_is_made_three_times_while_the_store_is_slow() {
    if !can_mount(&["losetup", "mkfs.ext4"]) {
        return;
    }
    let mut sandbox = Sandbox::with_store();
    sandbox.serve(&["--inject", "put.latency=5s"]);
    let mount = sandbox.mount(&[]);
    sandbox.sh("truncate -s 40M mnt/new/x.img");
    for _ in 0..3 {
        let device = Loop::attach(&mount.new_file("x.img"), &["--direct-io=on"]);
        sandbox.sh(&format!("mkfs.ext4 -q {0}; blockdev --flushbufs {0}", device.0.display()));
    }
    sandbox.sh("cp mnt/new/x.img last.img");
    sandbox.assert_holds(&mount.committed("x.img"), "last.img");
    mount.unmount();
}

#[test]
fn a_mounted_file_system_goes_on_while_it_is_committed_twice() {
    if !can_mount(&["losetup", "mkfs.ext4", "e2fsck"]) {
        return;
    }
    let (mut sandbox, image) = (Sandbox::with_store(), "mnt/new/x.img");
    sandbox.serve(&["--inject", "put.latency=3s"]);
    let mount = sandbox.mount(&[]);
    sandbox.sh(&format!("truncate -s 40M {image}"));
    let device = Loop::attach(&mount.new_file("x.img"), &["--direct-io=on"]);
    sandbox.sh(&format!("mkfs.ext4 -q {}", device.0.display()));
    let file_system = FileSystem::mount(&device.0, "ext4", "rw", sandbox.join("fs"));
    let commit = || Running::new(sandbox.fspfs().args(["-q", "commit", image]));
    sandbox.sh("echo 1 >fs/one; sync -f fs");
    let first = commit();
    mount.becomes("x.img", "committing");
    sandbox.sh("echo 2 >fs/two; sync -f fs");
    let second = commit();
    mount.becomes("x.img", "queued");
    sandbox.sh("head -c 1M /dev/urandom >fs/three; sync -f fs; touch fs/four; sync -f fs");
    let second = second.ends();
    assert!(second.status.success() && first.ends().status.success());
    let id = String::from_utf8(second.stdout).unwrap();
    drop((file_system, device));
    // What was asked for while another one went on has what was there at its turn.
    let copy = Loop::attach(&mount.image(id.trim()), &["-r"]);
    let back = FileSystem::mount(&copy.0, "ext4", "ro,noload", sandbox.join("back"));
    assert!(sandbox.join("back/two").exists() && sandbox.join("back/four").exists());
    drop((back, copy));
    mount.committed("x.img");
    mount.unmount();
}
