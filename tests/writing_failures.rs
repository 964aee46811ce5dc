//! Stores and disks that fail while something is written under `new/`: programs are told, nothing is
//! lost, and a retry does what is missing.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;

use nix::errno::Errno;
use nix::sys::signal::{SIGINT, SIGKILL, SIGTERM, Signal};
use support::writing::Disk;
use support::{MIB, Mount, Sandbox, can_mount, errno, over_ebs, same, text, until};

/// A script fails, and what it prints on stderr has this in it.
#[track_caller]
fn fails(sandbox: &Sandbox, script: &str, says: &str) {
    let output = sandbox.try_sh(script);
    assert!(
        !output.status.success() && text(&output).contains(says),
        "{script}: {}",
        text(&output)
    );
}

/// `x.img` could not be committed, says so everywhere, and is still there.
#[track_caller]
fn has_failed(sandbox: &Sandbox, mount: &Mount, says: &str) {
    assert_eq!(mount.state("x.img"), "failed");
    let why = mount.told("x.img", "error");
    assert!(why.contains(says), "{why}");
    let staged = sandbox.ok(&["staged", "mnt"]);
    assert!(staged.contains("failed") && staged.contains(says), "{staged}");
    assert!(same(mount.new_file("x.img"), sandbox.join("x.img")), "it reads otherwise");
    assert!(sandbox.snapshots().iter().all(|snapshot| snapshot["state"] != "completed"));
}

#[test]
fn a_full_store_fails_the_close_and_all_is_there_for_the_retry() {
    if !can_mount(&["dd", "qemu-img", "rsync"]) {
        return;
    }
    let (sandbox, _disk) = Disk::with_store(48 * MIB);
    sandbox.random("x.img", 32 * MIB);
    let mount = sandbox.mount(&[]);
    sandbox.sh("fallocate -l 26M store/filler");
    for script in [
        "cp x.img mnt/new/",
        "dd status=none if=x.img of=mnt/new/x.img bs=1M",
        "rsync -I --inplace x.img mnt/new/",
    ] {
        fails(&sandbox, script, "");
        has_failed(&sandbox, &mount, "No space left");
    }
    // It does not look at what its last close says, so it ends well.
    sandbox.sh("qemu-img convert -f raw -O raw x.img mnt/new/x.img");
    has_failed(&sandbox, &mount, "No space left");
    let said = sandbox.fails(&["commit", "mnt/new/x.img"]);
    assert!(said.contains("No space left"), "{said}");
    has_failed(&sandbox, &mount, "No space left");
    std::fs::remove_file(sandbox.join("store/filler")).unwrap();
    let id = sandbox.ok(&["commit", "mnt/new/x.img"]).trim().to_owned();
    sandbox.assert_holds(&id, "x.img");
    assert_eq!((&mount.state("x.img")[..], &mount.told("x.img", "error")[..]), ("clean", ""));
    let log = mount.unmount();
    assert!(log.contains("x.img could not be committed") && log.contains("No space left"), "{log}");
}

#[test]
fn a_retry_puts_only_what_is_missing() {
    if !can_mount(&["cp"]) {
        return;
    }
    let (sandbox, _disk) = Disk::with_store(256 * MIB);
    // The repository writes 64 blocks at a time: of five such files one or two find room.
    sandbox.random("x.img", 144 * MIB);
    let mount = sandbox.mount(&[]);
    sandbox.sh("fallocate -l 176M store/filler");
    fails(&sandbox, "cp x.img mnt/new/", "No space left on device");
    has_failed(&sandbox, &mount, "No space left");
    let put = mount.put();
    std::fs::remove_file(sandbox.join("store/filler")).unwrap();
    let id = sandbox.ok(&["commit", "mnt/new/x.img"]).trim().to_owned();
    let again = mount.put() - put;
    assert!(again <= 288 - 64, "{again} of 288 blocks were put again");
    sandbox.assert_holds(&id, "x.img");
    mount.unmount();
}

#[test]
fn a_store_that_cannot_be_written_fails_the_close_and_opening_again_retries() {
    if !can_mount(&["dd"]) {
        return;
    }
    let (sandbox, disk) = Disk::with_store(48 * MIB);
    sandbox.random("x.img", 3 * MIB);
    let mount = sandbox.mount(&[]);
    disk.remount("ro");
    fails(&sandbox, "cp x.img mnt/new/", "failed to close");
    has_failed(&sandbox, &mount, "Read-only file system");
    disk.remount("rw");
    // Opening it for writing and closing it tries again, and so does the next mount.
    drop(File::options().write(true).open(mount.new_file("x.img")).unwrap());
    sandbox.assert_holds(&mount.committed("x.img"), "x.img");
    disk.remount("ro");
    sandbox.sh("printf x >> x.img");
    fails(
        &sandbox,
        "printf x | dd status=none of=mnt/new/x.img oflag=append conv=notrunc",
        "closing",
    );
    assert_eq!(mount.state("x.img"), "failed");
    mount.unmount();
    disk.remount("rw");
    let mount = sandbox.mount(&[]);
    let id = mount.committed("x.img");
    sandbox.assert_holds(&id, "x.img");
    assert!(sandbox.parent_of(&id).is_some());
    mount.unmount();
}

#[test]
fn a_store_that_is_gone_fails_the_close() {
    if over_ebs() || !can_mount(&["cp"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.random("x.img", 3 * MIB);
    let mount = sandbox.mount(&[]);
    sandbox.sh("mkdir away; mv store/* away/");
    fails(&sandbox, "cp x.img mnt/new/", "failed to close");
    assert_eq!(mount.state("x.img"), "failed");
    assert!(sandbox.ok(&["staged", "mnt"]).contains("the repository is gone"));
    // Nothing was made where it was.
    assert_eq!(sandbox.sh("find store -not -type d -or -name '[0-9a-f]*'"), "");
    sandbox.sh("rm -rf store/*; mv away/* store/");
    sandbox.assert_holds(sandbox.ok(&["commit", "mnt/new/x.img"]).trim(), "x.img");
    mount.unmount();
    assert_eq!(sandbox.snapshots().len(), 1);
}

#[test]
fn a_repository_stays_the_one_that_was_mounted() {
    if over_ebs() || !can_mount(&["cp"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.random("x.img", 3 * MIB);
    let mount = sandbox.mount(&[]);
    sandbox.sh("mv store away");
    sandbox.ok(&["-s", "store", "init"]);
    sandbox.sh("cp x.img mnt/new/; cmp x.img mnt/new/x.img");
    let id = mount.committed("x.img");
    sandbox.sh(&format!("cmp x.img mnt/{id}.img"));
    assert!(!sandbox.join("store/snapshots").exists());
    sandbox.sh("rm -rf store; mv away store");
    sandbox.assert_holds(&id, "x.img");
    mount.unmount();
}

#[test]
fn the_disk_of_a_repository_cannot_be_taken_away() {
    if over_ebs() || !can_mount(&[]) {
        return;
    }
    let (sandbox, _disk) = Disk::with_store(48 * MIB);
    let mount = sandbox.mount(&[]);
    fails(&sandbox, "umount store", "busy");
    mount.unmount();
}

#[test]
fn a_killed_cp_commits_nothing() {
    if !can_mount(&["cp"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let mount = sandbox.mount(&[]);
    for (name, signal) in [("a.img", SIGKILL), ("b.img", SIGTERM), ("c.img", SIGINT)] {
        sandbox.sh("rm -f pipe; mkfifo pipe");
        let cp = sandbox.start(&format!("exec cp pipe mnt/new/{name}"));
        let mut pipe = File::options().write(true).open(sandbox.join("pipe")).unwrap();
        pipe.write_all(&support::pattern(0, 3 << 20)).unwrap();
        let path = mount.new_file(name);
        until("some of it is there", || path.metadata().is_ok_and(|m| m.len() >= 2 * MIB));
        cp.signal(signal);
        assert!(!cp.ends().status.success());
        drop(pipe);
        mount.becomes(name, "interrupted");
        let (why, number) = (mount.told(name, "error"), signal as i32);
        assert!(
            why.contains("cp was killed by signal") && why.contains(&number.to_string()),
            "{why}"
        );
        assert!(path.metadata().unwrap().len() >= 2 * MIB);
    }
    assert_eq!(mount.begun(), 0);
    // Who wants it as it is says so; else it is written anew, or removed.
    sandbox.sh("cp mnt/new/a.img as-it-is");
    sandbox.assert_holds(sandbox.ok(&["commit", "mnt/new/a.img"]).trim(), "as-it-is");
    sandbox.random("x.img", MIB);
    sandbox.sh("cp x.img mnt/new/b.img; rm mnt/new/c.img");
    sandbox.assert_holds(&mount.committed("b.img"), "x.img");
    mount.unmount();
    assert_eq!(sandbox.snapshots().len(), 2);
}

/// What is staged and damaged is told, stays as it is, and is in nobody's way.
#[test]
fn damaged_images_are_listed_and_kept() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let mount = sandbox.mount(&[]);
    std::fs::write(mount.new_file("x.img.part"), "one").unwrap();
    mount.unmount();
    sandbox.sh("truncate -s 100 state/fspfs/staging/*/images/*/*.map");
    let kept = sandbox.sh("cd state/fspfs/staging/*/images && sha256sum */*.{data,map,sums}");
    for content in ["two", "three"] {
        let mount = sandbox.mount(&[]);
        let staged = sandbox.ok(&["staged", "mnt"]);
        let line = staged.lines().find(|line| line.contains("damaged")).unwrap();
        assert!(line.starts_with("x.img.part ") && line.contains("map was cut off"), "{staged}");
        std::fs::write(mount.new_file("x.img.part"), content).unwrap();
        let staged: serde_json::Value =
            serde_json::from_str(&sandbox.ok(&["staged", "mnt", "--json"])).unwrap();
        let mut found: Vec<_> = staged.as_array().unwrap().iter().collect();
        found.sort_by_key(|image| image["state"].to_string());
        assert_eq!(found.len(), 2, "{staged}");
        assert_eq!([&found[0]["state"], &found[1]["state"]], ["damaged", "dirty"]);
        assert_eq!([&found[0]["name"], &found[1]["name"]], ["x.img.part"; 2]);
        let why = found[0]["error"].as_str().unwrap();
        assert!(why.contains("/images/") && why.contains("map was cut off"), "{why}");
        assert_eq!(std::fs::read(mount.new_file("x.img.part")).unwrap(), content.as_bytes());
        mount.unmount();
    }
    let now = sandbox.sh("cd state/fspfs/staging/*/images && sha256sum */*.{data,map,sums}");
    assert!(kept.lines().all(|line| now.contains(line)), "{now}");
}

/// Without its base an image shows what is staged, and it is whole again once the base is there.
#[test]
fn a_base_that_comes_back_needs_no_new_mount() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.random("x.img", 2 * MIB);
    let mount = sandbox.mount(&["--commit", "manual"]);
    sandbox.sh("cp x.img mnt/new/");
    let id = sandbox.ok(&["commit", "--wait", "mnt/new/x.img"]).lines().last().unwrap().to_owned();
    for place in ["x.img", "mnt/new/x.img"] {
        sandbox.sh(&format!("printf changed | dd status=none conv=notrunc of={place}"));
    }
    mount.unmount();
    sandbox.sh(&format!("mv store/snapshots/{id}.json hidden"));
    let mount = sandbox.mount(&[]);
    let staged = sandbox.ok(&["staged", "mnt"]);
    let line = staged.lines().find(|line| line.starts_with("x.img ")).unwrap();
    assert!(line.contains("failed") && line.contains(&id), "{staged}");
    let file = File::open(mount.new_file("x.img")).unwrap();
    let mut start = vec![0; 512 << 10];
    file.read_exact_at(&mut start, 0).unwrap();
    assert!(start.starts_with(b"changed"));
    assert_eq!(errno(file.read_at(&mut start, 1 << 20)), Errno::EIO as i32);
    drop(file);
    let said = sandbox.fails(&["commit", "mnt/new/x.img"]);
    assert!(said.contains(&id), "{said}");
    sandbox.sh(&format!("mv hidden store/snapshots/{id}.json"));
    assert!(same(mount.new_file("x.img"), sandbox.join("x.img")));
    sandbox.ok(&["commit", "--wait", "mnt/new/x.img"]);
    assert_eq!(mount.state("x.img"), "clean");
    let child = mount.told("x.img", "snapshot");
    assert_eq!(sandbox.parent_of(&child), Some(id));
    mount.unmount();
}

/// A file in which a write failed becomes no snapshot, unless it is to be taken as it is.
fn refuses(sandbox: &Sandbox, mount: &Mount, name: &str) {
    let file = mount.new_file(name);
    let said = sandbox.fails(&["commit", file.to_str().unwrap()]);
    let len = file.metadata().unwrap().len();
    let missing = format!("from byte {len} on could not be written");
    assert!(said.contains(&missing) && said.contains("--as-is"), "{said}");
    sandbox.sh(&format!("touch mnt/new/{name}"));
    fails(sandbox, &format!("printf x | dd status=none of=mnt/new/{name} conv=notrunc"), "closing");
    mount.becomes(name, "interrupted");
}

/// `cp` of more than can be staged is told so, and nothing is committed; less is fine.
fn meets_the_end_of_the_room(sandbox: &Sandbox, mount: &Mount, says: &str) {
    sandbox.random("large", 40 * MIB);
    sandbox.random("x.img", 2 * MIB);
    sandbox.sh("cp x.img mnt/new/kept.part");
    fails(sandbox, "cp large mnt/new/large.img", "No space left");
    mount.becomes("large.img", "interrupted");
    let why = mount.told("large.img", "error");
    assert!(why.contains("a write failed") && why.contains(says), "{why}");
    fails(sandbox, "dd status=none if=large of=mnt/new/too.img bs=1M", "No space left");
    // Nor is it when somebody asks, opens it, or writes elsewhere; also by the next mount.
    refuses(sandbox, mount, "large.img");
    assert_eq!(mount.begun(), 0);
    let room = File::create(mount.new_file("room")).unwrap();
    let result = nix::fcntl::fallocate(&room, nix::fcntl::FallocateFlags::empty(), 0, 40 << 20);
    assert_eq!(result, Err(Errno::ENOSPC));
    drop(room);
    // What was staged before is whole.
    assert!(same(mount.new_file("kept.part"), sandbox.join("x.img")));
    sandbox.sh("rm mnt/new/large.img mnt/new/too.img; cp x.img mnt/new/");
    sandbox.assert_holds(&mount.committed("x.img"), "x.img");
    sandbox.sh("mv mnt/new/kept.part mnt/new/kept.img");
    sandbox.assert_holds(&mount.committed("kept.img"), "x.img");
}

#[test]
fn staging_keeps_to_its_limit() {
    if !can_mount(&["dd"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let mount = sandbox.mount(&["--staging-limit", "8MiB"]);
    meets_the_end_of_the_room(&sandbox, &mount, "--staging-limit");
    // What is a snapshot takes no room.
    sandbox.random("y.img", 7 * MIB);
    sandbox.sh("cp y.img mnt/new/; cp y.img mnt/new/z.img");
    mount.committed("z.img");
    mount.unmount();
}

#[test]
fn staging_leaves_the_disk_some_room() {
    if !can_mount(&["dd"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let _disk = Disk::new(&sandbox, "staging", 32 * MIB);
    let mount = sandbox.mount(&["--staging", "staging"]);
    meets_the_end_of_the_room(&sandbox, &mount, "disk of the staging directory");
    // Somebody else takes the last space.
    sandbox.try_sh("dd status=none if=/dev/zero of=staging/filler bs=64k; true");
    fails(&sandbox, "cp x.img mnt/new/y.img", "No space left");
    std::fs::remove_file(sandbox.join("staging/filler")).unwrap();
    sandbox.sh("cp x.img mnt/new/y.img");
    sandbox.assert_holds(&mount.committed("y.img"), "x.img");
    mount.unmount();
}

#[test]
fn a_failed_write_outlasts_the_mount_and_ends_with_what_is_written_anew() {
    if !can_mount(&["dd"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let mount = sandbox.mount(&["--staging-limit", "4MiB"]);
    sandbox.random("x.img", 6 * MIB);
    fails(&sandbox, "dd status=none if=x.img of=mnt/new/y.img bs=1M", "No space");
    mount.unmount();
    let mount = sandbox.mount(&[]);
    refuses(&sandbox, &mount, "y.img");
    sandbox.sh(
        "cp --reflink=never x.img anew.img; printf x | dd status=none of=anew.img conv=notrunc",
    );
    // What is missing is written, and no more.
    sandbox.sh("dd status=none if=x.img of=mnt/new/y.img bs=1M skip=4 seek=4 conv=notrunc");
    sandbox.assert_holds(&mount.committed("y.img"), "anew.img");
    mount.unmount();
}

#[test]
fn a_file_with_a_failed_write_is_taken_as_it_is_on_request() {
    if !can_mount(&["dd"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let mount = sandbox.mount(&["--staging-limit", "4MiB"]);
    sandbox.random("x.img", 6 * MIB);
    fails(&sandbox, "dd status=none if=x.img of=mnt/new/x.img bs=1M", "No space");
    refuses(&sandbox, &mount, "x.img");
    let id = sandbox.ok(&["commit", "--as-is", "mnt/new/x.img"]);
    sandbox.sh("head -c 4M x.img >cut.img; printf x | dd status=none of=cut.img conv=notrunc");
    sandbox.assert_holds(id.trim(), "cut.img");
    mount.unmount();
}

/// A mount whose store does not answer, with a `cp` to `x.img` that waits for it.
fn waits(sandbox: &Sandbox, mount: &Mount) -> support::writing::Running {
    let cp = sandbox.start("exec cp x.img mnt/new/");
    mount.becomes("x.img", "committing");
    cp
}

#[test]
fn what_is_written_during_a_commit_is_the_next_snapshot() {
    if !can_mount(&["fsfreeze"]) {
        return;
    }
    let (sandbox, disk) = Disk::with_store(64 * MIB);
    sandbox.random("x.img", 3 * MIB);
    sandbox.sh("cp x.img y.img; printf two | dd status=none of=y.img bs=1 seek=1M conv=notrunc");
    let mount = sandbox.mount(&[]);
    let frozen = disk.freeze();
    let cp = waits(&sandbox, &mount);
    // Nobody else waits.
    sandbox
        .sh("cp x.img mnt/new/.other; ls -l mnt/new; cmp x.img mnt/new/x.img; sync mnt/new/.other");
    let write = "dd status=none of=mnt/new/x.img bs=1 conv=notrunc";
    sandbox.sh(&format!("printf two | {write} seek=1M; cmp y.img mnt/new/x.img"));
    assert_eq!(mount.state("x.img"), "queued");
    // Nobody's writes wait for a commit that waits: the next close asks anew.
    sandbox.sh(&format!("printf three | {write}; head -c 5 x.img | {write}"));
    assert_eq!(mount.state("x.img"), "queued");
    sandbox.sh("cmp y.img mnt/new/x.img; mv mnt/new/x.img mnt/new/z.img");
    drop(frozen);
    cp.succeeds();
    let second = mount.committed("z.img");
    let first = sandbox.parent_of(&second).unwrap();
    sandbox.assert_holds(&first, "x.img");
    sandbox.assert_holds(&second, "y.img");
    assert_eq!(mount.put(), 7);
    mount.unmount();
    assert_eq!(sandbox.snapshots().len(), 2);
}

#[test]
fn cancelling_a_commit_frees_the_close() {
    if !can_mount(&["fsfreeze"]) {
        return;
    }
    let (sandbox, disk) = Disk::with_store(64 * MIB);
    sandbox.random("x.img", 3 * MIB);
    let mount = sandbox.mount(&[]);
    let frozen = disk.freeze();
    let cp = waits(&sandbox, &mount);
    sandbox.ok(&["commit", "--cancel", "mnt/new/x.img"]);
    // The attempt that waits for the disk ends with it.
    let output = cp.ends();
    assert!(!output.status.success() && text(&output).contains("ancel"), "{}", text(&output));
    assert!(mount.told("x.img", "error").contains("cancelled"));
    drop(frozen);
    mount.becomes("x.img", "interrupted");
    sandbox.assert_holds(sandbox.ok(&["commit", "mnt/new/x.img"]).trim(), "x.img");
    mount.unmount();
}

#[test]
fn a_file_that_is_removed_during_its_commit_is_gone() {
    if !can_mount(&["fsfreeze"]) {
        return;
    }
    let (sandbox, disk) = Disk::with_store(64 * MIB);
    sandbox.random("x.img", 3 * MIB);
    let mount = sandbox.mount(&[]);
    let frozen = disk.freeze();
    let cp = waits(&sandbox, &mount);
    std::fs::remove_file(mount.new_file("x.img")).unwrap();
    assert_eq!(errno(mount.new_file("x.img").metadata()), Errno::ENOENT as i32);
    drop(frozen);
    // The commit ends as it began.
    cp.succeeds();
    let snapshots = sandbox.snapshots();
    assert_eq!(snapshots.len(), 1);
    sandbox.assert_holds(snapshots[0]["id"].as_str().unwrap(), "x.img");
    mount.unmount();
    assert_eq!(sandbox.sh("find state -path '*/images/*' | wc -l").trim(), "0");
}

#[test]
fn a_signal_while_the_close_waits_does_not_end_the_commit() {
    if !can_mount(&["fsfreeze"]) {
        return;
    }
    let (sandbox, disk) = Disk::with_store(64 * MIB);
    sandbox.random("x.img", 3 * MIB);
    let mount = sandbox.mount(&[]);
    let frozen = disk.freeze();
    let cp = waits(&sandbox, &mount);
    cp.signal(Signal::SIGKILL);
    drop(frozen);
    let _ = cp.ends();
    sandbox.assert_holds(&mount.committed("x.img"), "x.img");
    let file = File::options().write(true).open(mount.new_file("x.img")).unwrap();
    file.write_all_at(b"more", 0).unwrap();
    drop(file);
    until("it can be written to", || mount.begun() == 2);
    mount.committed("x.img");
    mount.unmount();
}
