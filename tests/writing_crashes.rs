//! The end of a mount, in order and not, and what the next one finds; several mounts of a store.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;

use nix::sys::signal::{SIGKILL, SIGTERM};
use support::writing::Disk;
use support::{Loop, MIB, Mount, Sandbox, can_mount, names, over_ebs, same, until};

/// Kills the daemon, and mounts anew.
fn killed(sandbox: &Sandbox, mut mount: Mount) -> Mount {
    mount.signal(SIGKILL);
    mount.daemon.wait().unwrap();
    drop(mount);
    sandbox.mount(&[])
}

#[test]
fn what_was_written_is_back_after_the_daemon_was_killed() {
    if !can_mount(&["dd"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.image("x.img", 5 * MIB + 3, &[(MIB, 2 * MIB), (5 * MIB, 3)]);
    let mount = sandbox.mount(&[]);
    sandbox.sh("cp x.img mnt/new/clean.img; cp x.img mnt/new/child.img");
    let first = mount.committed("child.img");
    mount.committed("clean.img");
    let open = |name: &str| {
        File::options().write(true).create(true).truncate(false).open(mount.new_file(name)).unwrap()
    };
    let (synced, child) = (open("synced.img"), open("child.img"));
    synced.write_all_at(&std::fs::read(sandbox.join("x.img")).unwrap(), 0).unwrap();
    synced.sync_all().unwrap();
    child.write_all_at(b"changed", 4 * MIB).unwrap();
    child.sync_all().unwrap();
    sandbox.sh("cp x.img mnt/new/download.part");

    let mount = killed(&sandbox, mount);
    drop((synced, child));
    assert_eq!(names(mount.join("new")), ["child.img", "download.part", "synced.img"]);
    for name in ["child.img", "download.part", "synced.img"] {
        assert_eq!(mount.state(name), "dirty", "{name} waits");
    }
    sandbox.sh("cmp x.img mnt/new/synced.img; cmp x.img mnt/new/download.part");
    assert_eq!(sandbox.snapshots().len(), 2);
    sandbox.sh("mv mnt/new/download.part mnt/new/download.img");
    sandbox.assert_holds(&mount.committed("download.img"), "x.img");
    sandbox.assert_holds(sandbox.ok(&["commit", "mnt/new/synced.img"]).trim(), "x.img");
    let second = sandbox.ok(&["commit", "mnt/new/child.img"]).trim().to_owned();
    assert_eq!(sandbox.parent_of(&second), Some(first));
    sandbox.sh("printf changed | dd status=none of=x.img bs=1M seek=4 conv=notrunc");
    sandbox.assert_holds(&second, "x.img");
    mount.unmount();
    assert_eq!(sandbox.snapshots().len(), 5);
}

/// What was cut short is not taken for whole later on.
#[test]
fn an_interruption_is_known_after_the_daemon_was_killed() {
    if !can_mount(&["cp"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let mount = sandbox.mount(&[]);
    sandbox.sh("mkfifo pipe");
    let cp = sandbox.start("exec cp pipe mnt/new/x.img");
    let mut pipe = File::options().write(true).open(sandbox.join("pipe")).unwrap();
    pipe.write_all(&support::pattern(0, 3 << 20)).unwrap();
    let path = mount.new_file("x.img");
    until("some of it is there", || path.metadata().is_ok_and(|m| m.len() >= 2 * MIB));
    cp.signal(SIGKILL);
    assert!(!cp.ends().status.success());
    mount.becomes("x.img", "interrupted");
    let why = mount.told("x.img", "error");
    let mount = killed(&sandbox, mount);
    assert_eq!(
        (mount.state("x.img"), mount.told("x.img", "error")),
        ("interrupted".to_owned(), why)
    );
    mount.unmount();
}

#[test]
fn a_commit_goes_on_after_the_daemon_was_killed() {
    if !can_mount(&["fsfreeze"]) {
        return;
    }
    let (sandbox, disk) = Disk::with_store(64 * MIB);
    sandbox.random("x.img", 4 * MIB);
    let mount = sandbox.mount(&[]);
    let frozen = disk.freeze();
    let cp = sandbox.start("exec cp x.img mnt/new/");
    let noted = "grep -qrs '\"frozen\": *true' state";
    until("the commit is noted", || sandbox.try_sh(noted).status.success());
    mount.signal(SIGKILL);
    // A thread of it waits for the disk.
    drop(frozen);
    assert!(!cp.ends().status.success(), "its close was not answered");
    let mount = killed(&sandbox, mount);
    let id = mount.committed("x.img");
    sandbox.assert_holds(&id, "x.img");
    assert!(same(mount.new_file("x.img"), sandbox.join("x.img")));
    mount.unmount();
    assert_eq!(sandbox.snapshots().len(), 1);
}

#[test]
fn the_end_of_the_mount_waits_for_commits_and_says_so() {
    if !can_mount(&["fsfreeze"]) {
        return;
    }
    let (sandbox, disk) = Disk::with_store(64 * MIB);
    sandbox.random("x.img", 4 * MIB);
    for (n, signal) in [(1, true), (2, false)] {
        let mount = sandbox.mount(&[]);
        let frozen = disk.freeze();
        sandbox.sh("cp x.img mnt/new/.x; mv mnt/new/.x mnt/new/x.img");
        mount.becomes("x.img", "committing");
        let said = if signal {
            mount.signal(SIGTERM);
            let mut mount = mount;
            assert!(support::wait(&mut mount.daemon, std::time::Duration::from_secs(1)).is_none());
            drop(frozen);
            mount.ended()
        } else {
            let thaw = std::thread::spawn(move || {
                std::thread::sleep(std::time::Duration::from_secs(1));
                drop(frozen);
            });
            let umount = support::run(sandbox.fspfs().args(["umount", "mnt"]));
            thaw.join().unwrap();
            assert!(umount.status.success());
            mount.ended();
            support::text(&umount)
        };
        assert!(said.contains("waiting for the commit of new/x.img"), "{said}");
        let snapshots = sandbox.snapshots();
        assert_eq!(snapshots.len(), n);
        for snapshot in snapshots {
            assert_eq!(snapshot["state"], "completed");
            sandbox.assert_holds(snapshot["id"].as_str().unwrap(), "x.img");
        }
    }
}

#[test]
fn umount_tells_of_a_commit_that_failed_while_it_waited() {
    if !can_mount(&["fsfreeze"]) {
        return;
    }
    let (sandbox, disk) = Disk::with_store(16 * MIB);
    sandbox.random("x.img", 32 * MIB);
    let mount = sandbox.mount(&[]);
    let frozen = disk.freeze();
    sandbox.sh("cp x.img mnt/new/.x; mv mnt/new/.x mnt/new/x.img");
    mount.becomes("x.img", "committing");
    let thaw = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_secs(1));
        drop(frozen);
    });
    let umount = support::run(sandbox.fspfs().args(["umount", "mnt"]));
    thaw.join().unwrap();
    mount.ended();
    let said = support::text(&umount);
    assert_eq!(umount.status.code(), Some(3), "{said}");
    assert!(said.contains("new/x.img was not committed: "), "{said}");
    assert!(sandbox.try_sh("ls state/fspfs/staging/*/images/* >&2").status.success());
}

#[test]
fn umount_does_not_wait_for_a_mount_that_is_bound_elsewhere() {
    if !can_mount(&["unshare"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.image("x.img", MIB, &[(0, 10)]);
    sandbox.ok(&["upload", "x.img"]);
    let mount = sandbox.mount(&[]);
    sandbox.sh("mkdir bound; mount --bind mnt bound");
    let umount = support::run(sandbox.fspfs().args(["umount", "mnt"]));
    let said = support::text(&umount);
    let names = sandbox.try_sh("ls bound");
    // Before anything is asserted, or it stays.
    sandbox.sh("umount bound");
    assert!(umount.status.success() && said.contains("/bound, too"), "{said}");
    assert!(support::text(&names).contains(".img"));
    mount.ended();
}

#[test]
fn what_is_let_go_of_just_before_the_end_is_committed() {
    if !can_mount(&["losetup"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    for n in 1..=10 {
        let mount = sandbox.mount(&[]);
        sandbox.sh("truncate -s 1M mnt/new/x.img");
        let device = Loop::attach(&mount.new_file("x.img"), &[]);
        sandbox.sh(&format!("printf x | dd status=none of={} conv=fsync", device.0.display()));
        drop(device);
        until("it is detached", || support::loops_below(&sandbox.path).is_empty());
        mount.unmount();
        assert_eq!(sandbox.snapshots().len(), n);
    }
}

#[test]
fn two_mounts_of_a_store_write_at_the_same_time() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.random("x.img", 3 * MIB);
    std::fs::create_dir(sandbox.join("mnt2")).unwrap();
    let one = sandbox.mount(&[]);
    let two = Mount::at(sandbox.join("mnt2"), sandbox.fspfs(), &[]);
    sandbox.sh("cp x.img mnt/new/ & pid=$!; cp x.img mnt2/new/; wait $pid");
    let (first, second) = (one.committed("x.img"), two.committed("x.img"));
    assert_ne!(first, second);
    for id in [&first, &second] {
        sandbox.assert_holds(id, "x.img");
        assert!(same(one.image(id), two.image(id)));
    }
    // What a mount that is gone has left in another place is found there.
    sandbox.sh("cp x.img mnt2/new/left.part; sync mnt2/new/left.part");
    two.unmount();
    one.unmount();
    let one = sandbox.mount(&[]);
    assert_eq!(names(one.join("new")), ["left.part"]);
    assert!(same(one.new_file("left.part"), sandbox.join("x.img")));
    // A directory that was named is for one mount.
    one.unmount();
    let staging = ["--staging", "staging"];
    let one = sandbox.mount(&staging);
    let said = sandbox.fails(&["mount", "--staging", "staging", "mnt2"]);
    assert!(said.contains("another mount uses it"), "{said}");
    one.unmount();
    sandbox.ok(&["init", "other"]);
    let said = sandbox.fails(&["mount", "--store", "other", "--staging", "staging", "mnt2"]);
    assert!(said.contains("it belongs to the store") && said.contains("/store"), "{said}");
    sandbox.assert_nothing_is_left();
}

#[test]
fn staged_images_wait_for_their_own_repository() {
    if !can_mount(&[]) || over_ebs() {
        return;
    }
    let sandbox = Sandbox::new();
    for disk in ["d1", "d2"] {
        sandbox.ok(&["init", &format!("{disk}/s")]);
    }
    sandbox.random("x.img", 3 * MIB);
    let at = |store: &str| {
        let mut fspfs = sandbox.fspfs();
        fspfs.args(["-s", store]);
        Mount::new(&sandbox, fspfs, &["--commit", "manual"])
    };
    sandbox.sh("mv d1 usb");
    let mount = at("usb/s");
    sandbox.sh("cp x.img mnt/new/");
    mount.unmount();
    // Another disk takes its turn.
    sandbox.sh("mv usb d1; mv d2 usb");
    let mount = at("usb/s");
    assert_eq!(names(mount.join("new")), [] as [String; 0]);
    let log = mount.unmount();
    assert!(log.contains("1 image is staged for repository") && log.contains("usb/s"), "{log}");
    let doctor = sandbox.ok(&["-s", "usb/s", "doctor"]);
    assert!(doctor.contains("staged images: 1 image is staged for repository"), "{doctor}");
    // The repository finds it again, wherever it is.
    let mount = at("d1/s");
    assert_eq!(mount.state("x.img"), "dirty");
    let id = sandbox.ok(&["commit", "mnt/new/x.img"]).trim().to_owned();
    let log = mount.unmount();
    assert!(!log.contains("is staged for"), "{log}");
    sandbox.assert_holds_in("d1/s", &id, "x.img");
    assert_eq!(sandbox.ok(&["-q", "-s", "usb/s", "list"]), "");
}

#[test]
fn an_image_begun_in_a_repository_is_not_committed_to_its_copy() {
    if !can_mount(&["fallocate"]) || over_ebs() {
        return;
    }
    let (sandbox, _disk) = Disk::with_store(48 * MIB);
    sandbox.random("x.img", 32 * MIB);
    sandbox.sh("mkdir copy; cp -a store/fspfs.json copy/; fallocate -l 26M store/filler");
    let mount = sandbox.mount(&[]);
    assert!(!sandbox.try_sh("cp x.img mnt/new/").status.success());
    assert_eq!(mount.state("x.img"), "failed");
    mount.unmount();
    sandbox.sh("rm store/filler");
    let mut fspfs = sandbox.fspfs();
    fspfs.args(["-s", "copy"]);
    let mount = Mount::new(&sandbox, fspfs, &[]);
    assert_eq!(mount.state("x.img"), "interrupted");
    assert!(mount.told("x.img", "error").contains("copy of the store"));
    sandbox.sh("cmp x.img mnt/new/x.img; chmod 600 mnt/new/x.img");
    mount.unmount();
    assert_eq!(sandbox.ok(&["-q", "-s", "copy", "list"]), "");
    let mount = sandbox.mount(&[]);
    sandbox.assert_holds(&mount.committed("x.img"), "x.img");
    mount.unmount();
}
