//! What was changed between two snapshots, brought to files, devices and copies: `deltadownload` and `sync`.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use serde_json::Value;
use support::{BLOCK, GIB, Loop, MIB, PATIENCE, Sandbox, run, same, text, wait};

/// Writes blocks in which each sector names its number and version.
fn write_blocks(file: &File, version: u32, blocks: impl IntoIterator<Item = u64>) {
    for block in blocks {
        let sectors = (block * BLOCK / 512)..((block + 1) * BLOCK / 512);
        let bytes: Vec<u8> = sectors
            .flat_map(|sector| {
                format!("{:<512}", format!("sector {sector} version {version}")).into_bytes()
            })
            .collect();
        file.write_all_at(&bytes, block * BLOCK).unwrap();
    }
}

/// A snapshot with so many blocks and a tail, and a later one: a block is overwritten, one is overwritten by zeros, one
/// is new, and the volume has grown. Their ids; the images are `a.img` and `b.img`.
fn two_days(sandbox: &Sandbox, blocks: u64) -> (String, String) {
    let file = File::create(sandbox.join("a.img")).unwrap();
    file.set_len(150 * BLOCK).unwrap();
    write_blocks(&file, 1, 0..blocks);
    file.write_all_at(b"tail", 150 * BLOCK).unwrap();
    let first = sandbox.upload("a.img", &["--name", "web"]);
    sandbox.sh("cp --sparse=always a.img b.img");
    let file = File::options().write(true).open(sandbox.join("b.img")).unwrap();
    write_blocks(&file, 2, [blocks / 2, 140]);
    support::write_zeros(&file, (blocks - 1) * BLOCK, BLOCK);
    file.set_len(GIB + 3 * MIB).unwrap();
    write_blocks(&file, 2, [2050]);
    let second = sandbox.upload("b.img", &["--name", "web", "--parent-snapshot-id", &first]);
    (first, second)
}

/// The same with 300 blocks, of which 200 differ.
fn two_long_days(sandbox: &Sandbox) -> (String, String) {
    let file = File::create(sandbox.join("a.img")).unwrap();
    file.set_len(300 * BLOCK).unwrap();
    write_blocks(&file, 1, 0..300);
    let first = sandbox.upload("a.img", &[]);
    sandbox.sh("cp a.img b.img");
    let file = File::options().write(true).open(sandbox.join("b.img")).unwrap();
    write_blocks(&file, 2, 50..200);
    support::write_zeros(&file, 200 * BLOCK, 50 * BLOCK);
    let second = sandbox.upload("b.img", &["--parent-snapshot-id", &first]);
    (first, second)
}

/// A sandbox with a store of EBS that is served, or a repository, and another repository.
fn with_store(is_served: bool) -> Sandbox {
    let mut sandbox = Sandbox::with_store();
    sandbox.ok(&["init", "other"]);
    if is_served {
        sandbox.serve(&[]);
    }
    sandbox
}

fn delta(sandbox: &Sandbox, arguments: &[&str]) -> (i32, String) {
    let output = run(sandbox.fspfs().arg("deltadownload").args(arguments));
    (output.status.code().unwrap(), text(&output))
}

#[rstest]
fn a_delta_makes_the_later_snapshot_of_a_file(
    #[values(1, 63, 64, 65, 128, 130)] blocks: u64,
    #[values(false, true)] is_served: bool,
) {
    let sandbox = with_store(is_served);
    let (first, second) = two_days(&sandbox, blocks);
    sandbox.ok(&["download", &first, "t.img"]);
    let dry = sandbox.ok(&["deltadownload", "--dry-run", &first, &second, "t.img"]);
    assert!(dry.contains("Changes between") && same(sandbox.join("t.img"), sandbox.join("a.img")));
    let (code, said) = delta(&sandbox, &["--check", "full", &first, "latest", "t.img"]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("deltadownload took "), "{said}");
    assert!(same(sandbox.join("t.img"), sandbox.join("b.img")));
    // What is dropped is a hole.
    let stored = |name: &str| {
        use std::os::unix::fs::MetadataExt as _;
        sandbox.join(name).metadata().unwrap().blocks()
    };
    assert!(stored("t.img") <= stored("b.img") + 2 * BLOCK / 512, "{}", stored("t.img"));
    // The same again, and the way back.
    assert_eq!(delta(&sandbox, &[&first, &second, "t.img"]).0, 0);
    assert!(same(sandbox.join("t.img"), sandbox.join("b.img")));
    let (code, said) = delta(&sandbox, &[&second, &first, "t.img"]);
    assert_eq!(code, 0, "{said}");
    assert!(same(sandbox.join("t.img"), sandbox.join("a.img")));
    sandbox.assert_no_journal_is_left();
}

#[test]
fn a_device_that_holds_the_first_holds_the_second() {
    if !support::can_mount(&["losetup"]) {
        return;
    }
    let sandbox = with_store(false);
    let (first, second) = two_days(&sandbox, 130);
    sandbox.sh("truncate -s 3G disk");
    let device = Loop::attach(&sandbox.join("disk"), &[]);
    let path = device.0.to_str().unwrap();
    sandbox.ok(&["download", &first, path]);
    for how in ["sampled", "full"] {
        let (code, said) = delta(&sandbox, &["--check", how, &first, &second, path]);
        assert_eq!(code, 0, "{said}");
        sandbox.ok(&["verify", &second, "--against", "b.img"]);
        sandbox.sh(&format!("cmp -n $(stat -c %s b.img) b.img {path}"));
        sandbox.ok(&["deltadownload", &second, &first, path]);
        sandbox.sh(&format!("cmp -n $(stat -c %s a.img) a.img {path}"));
    }
}

#[test]
fn a_target_that_does_not_hold_the_first_is_left_alone() {
    let sandbox = with_store(false);
    let (first, second) = two_days(&sandbox, 130);
    sandbox.ok(&["download", &first, "t.img"]);
    let file = File::options().write(true).open(sandbox.join("t.img")).unwrap();
    write_blocks(&file, 9, (0..64).chain(66..120));
    sandbox.sh("cp t.img before.img");
    for how in ["sampled", "full"] {
        let (code, said) = delta(&sandbox, &["--check", how, &first, &second, "t.img"]);
        assert_eq!(code, 1, "{said}");
        assert!(said.contains(&format!("it does not hold {first}: block ")), "{said}");
        assert!(same(sandbox.join("t.img"), sandbox.join("before.img")));
    }
    // One block of many is found by a full check alone.
    sandbox.ok(&["download", &first, "t.img"]);
    write_blocks(&File::options().write(true).open(sandbox.join("t.img")).unwrap(), 9, [7]);
    let (code, said) = delta(&sandbox, &["--check", "full", &first, &second, "t.img"]);
    assert!(code == 1 && said.contains("block 7 differs"), "{said}");
    let (code, said) = delta(&sandbox, &["--check", "none", &first, &second, "t.img"]);
    assert_eq!(code, 0, "{said}");
    for (target, why) in [("nothing.img", "no such file"), (".", "directory")] {
        let (code, said) = delta(&sandbox, &[&first, &second, target]);
        assert!(code == 1 && said.contains(why), "{said}");
    }
    File::create(sandbox.join("short.img")).unwrap().set_len(3 * BLOCK).unwrap();
    let (code, said) = delta(&sandbox, &[&first, &second, "short.img"]);
    assert!(code == 1 && said.contains("it has 1572864 bytes"), "{said}");
}

/// Begins a command, and kills it once so many blocks are on record.
fn killed_after(sandbox: &Sandbox, arguments: &[&str], blocks: usize) {
    let mut command = sandbox.fspfs();
    command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    support::until("some of it is on record", || {
        child.try_wait().unwrap().is_some() || sandbox.noted() >= blocks
    });
    let _ = kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGKILL);
    assert!(wait(&mut child, PATIENCE).is_some());
}

#[test]
fn a_delta_that_was_killed_is_ended_by_the_same_command() {
    let sandbox = with_store(true);
    let (first, second) = two_long_days(&sandbox);
    sandbox.ok(&["download", &first, "t.img"]);
    let slowly = ["--max-requests-per-second", "60", "--max-in-flight", "4"];
    let arguments = [&["deltadownload", &first, &second, "t.img"], &slowly[..]].concat();
    killed_after(&sandbox, &arguments, 20);
    assert!(!same(sandbox.join("t.img"), sandbox.join("b.img")));
    let output = run(sandbox.fspfs().args(&arguments[..4]));
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("chunks were downloaded before"), "{}", text(&output));
    assert!(same(sandbox.join("t.img"), sandbox.join("b.img")));
    sandbox.assert_no_journal_is_left();
}

fn last(output: &str) -> String {
    output.lines().last().unwrap().to_owned()
}

#[rstest]
fn a_sync_makes_a_clone_of_the_later_snapshot(
    #[values(1, 63, 64, 65, 128, 130)] blocks: u64,
    #[values(false, true)] is_served: bool,
) {
    let sandbox = with_store(is_served);
    let (first, second) = two_days(&sandbox, blocks);
    let clone = last(&sandbox.ok(&["copy", &first, "--to", "other"]));
    let arguments = ["sync", &first, &second, &clone, "--to", "other"];
    let dry = sandbox.ok(&[&arguments[..], &["--dry-run"]].concat());
    assert!(dry.contains(&format!("Changes between {first} and {second} contain")), "{dry}");
    let printed = sandbox.ok(&arguments);
    assert!(printed.contains("sync took "), "{printed}");
    let made = last(&printed);
    sandbox.assert_holds_in("other", &made, "b.img");
    let list: Value =
        serde_json::from_str(&sandbox.ok(&["-s", "other", "list", "--json"])).unwrap();
    let found = list.as_array().unwrap().iter().find(|found| found["id"] == made.as_str()).unwrap();
    assert_eq!(found["parent"], clone.as_str());
    assert_eq!(found["tags"]["fspfs:origin"], second.as_str());
    assert_eq!((&found["tags"]["Name"], &found["volume_size_gib"]), (&"web".into(), &2.into()));
    // The other way, to EBS or within the repository, with all compared; and the way back is no child.
    let there = sandbox.ok(&["-s", "other", "copy", &clone, "--to", &here(&sandbox, is_served)]);
    let to = here(&sandbox, is_served);
    let checked =
        ["-s", "other", "sync", "--check", "full", &clone, &made, &last(&there), "--to", &to];
    sandbox.assert_holds_in(&to, &last(&sandbox.ok(&checked)), "b.img");
    let smaller = sandbox.fails(&["sync", &second, &first, &made, "--to", "other"]);
    assert!(smaller.contains("cannot be smaller"), "{smaller}");
    sandbox.assert_no_journal_is_left();
}

fn here(sandbox: &Sandbox, is_served: bool) -> String {
    match is_served {
        true => sandbox.here(),
        false => sandbox.join("store").display().to_string(),
    }
}

#[test]
fn a_sync_refuses_a_base_that_is_no_clone() {
    let sandbox = with_store(false);
    let (first, second) = two_days(&sandbox, 130);
    let clone = last(&sandbox.ok(&["copy", &first, "--to", "other"]));
    // Another image that says it is a copy.
    sandbox.ok(&["-s", "other", "download", &clone, "c.img"]);
    let file = File::options().write(true).open(sandbox.join("c.img")).unwrap();
    write_blocks(&file, 9, 0..64);
    let other = last(&sandbox.ok(&["-s", "other", "upload", "c.img"]));
    let sync = |base: &str, more: &[&str]| {
        let arguments = ["sync", &first, &second, base, "--to", "other"];
        let output = run(sandbox.fspfs().args(arguments).args(more));
        (output.status.code().unwrap(), text(&output))
    };
    let (code, said) = sync(&other, &[]);
    assert!(code == 1 && said.contains(&format!("{other} is no copy of {first}")), "{said}");
    assert!(said.contains("--force-base"), "{said}");
    let (code, said) = sync(&other, &["--force-base"]);
    assert_eq!(code, 0, "{said}");
    for unknown in ["snap-0123456789abcdef0", "name:none"] {
        let (code, said) = sync(unknown, &[]);
        assert!(code == 1 && said.contains(unknown), "{said}");
    }
    let ids = sandbox.ok(&["-s", "other", "-q", "list"]);
    assert_eq!(ids.lines().count(), 3, "{ids}");
}

#[test]
fn a_copy_of_another_snapshot_is_no_clone_however_few_blocks_differ() {
    let sandbox = with_store(true);
    let (first, second) = two_days(&sandbox, 130);
    // The copy of the day before.
    let clone = last(&sandbox.ok(&["copy", &first, "--to", "other"]));
    let third = sandbox.upload("b.img", &["--parent", &second]);
    let message = sandbox.fails(&["sync", &second, &third, &clone, "--to", "other"]);
    assert!(message.contains("is no copy of"), "{message}");
    sandbox.sh("cp a.img c.img; printf x | dd of=c.img bs=1 seek=7000000 conv=notrunc status=none");
    let one_block = sandbox.upload("c.img", &["--parent", &first]);
    let message = sandbox.fails(&["sync", &one_block, &second, &clone, "--to", "other"]);
    assert!(message.contains("is no copy of"), "{message}");
    let message =
        sandbox.fails(&["sync", "--check", "full", &one_block, &second, &clone, "--to", "other"]);
    assert!(message.contains("block 13"), "{message}");
}

#[test]
fn a_sync_that_was_killed_goes_on() {
    let sandbox = with_store(true);
    let (first, second) = two_long_days(&sandbox);
    let clone = last(&sandbox.ok(&["copy", &first]));
    let slowly = ["--max-requests-per-second", "60", "--max-in-flight", "4"];
    let arguments = [&["sync", &first, &second, &clone], &slowly[..]].concat();
    killed_after(&sandbox, &arguments, 20);
    let output = run(sandbox.fspfs().args(&arguments[..4]));
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("chunks were brought before"), "{}", text(&output));
    let made = last(&String::from_utf8(output.stdout).unwrap());
    let here = here(&sandbox, true);
    sandbox.assert_holds_in(&here, &made, "b.img");
    assert_eq!(sandbox.ok(&["-q", "list"]).lines().count(), 4);
    sandbox.assert_no_journal_is_left();
}

#[test]
fn a_clone_of_a_file_system_is_kept_in_step_for_thirty_days() {
    if !support::can_mount(&["mkfs.ext4", "losetup", "mount"]) {
        return;
    }
    let sandbox = with_store(false);
    sandbox.sh("truncate -s 256M disk.img && mkfs.ext4 -q disk.img");
    let there = sandbox.join("other").display().to_string();
    let mut yesterday: Option<(String, String)> = None;
    let (mut changed, mut sent) = (0, 0);
    for day in 0..30 {
        let device = Loop::attach(&sandbox.join("disk.img"), &[]);
        let mounted = support::FileSystem::mount(&device.0, "ext4", "rw", sandbox.join("fs"));
        sandbox.sh(&format!(
            "head -c {} /dev/urandom > fs/day-{day}; head -c 300000 /dev/urandom > fs/often; \
             rm -f fs/day-{}; sync -f fs",
            700_000 + day * 50_000,
            day - 5,
        ));
        drop(mounted);
        drop(device);
        let parent = yesterday.as_ref().map_or("none", |(id, _)| id).to_owned();
        let today = sandbox.upload("disk.img", &["--parent", &parent]);
        let copied = match &yesterday {
            None => last(&sandbox.ok(&["copy", &today, "--to", &there])),
            Some((before, clone)) => {
                let sync = ["sync", before, &today, clone, "--to", &there, "--json"];
                let made: Value = serde_json::from_str(&sandbox.ok(&sync)).unwrap();
                let diff = ["diff", before, &today, "--json"];
                let diff: Value = serde_json::from_str(&sandbox.ok(&diff)).unwrap();
                changed += diff["blocks"].as_u64().unwrap();
                sent += made["put"].as_u64().unwrap();
                made["id"].as_str().unwrap().to_owned()
            }
        };
        let digest = |store: &str, id: &str| {
            sandbox.described_in(store, id)["content_digest"].as_str().unwrap().to_owned()
        };
        assert_eq!(digest("store", &today), digest("other", &copied), "day {day}");
        if day % 10 == 9 {
            sandbox.assert_holds_in("other", &copied, "disk.img");
        }
        yesterday = Some((today, copied));
    }
    assert!(changed > 0 && sent <= changed + changed / 10, "{sent} of {changed} blocks");
}
