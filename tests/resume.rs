//! Uploads and downloads that end before they are done, and go on when the same command is given again.
#![allow(clippy::unwrap_used, clippy::case_sensitive_file_extension_comparisons)]

mod support;

use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use support::{
    BLOCK, FileSystem, Loop, PATIENCE, Sandbox, can_mount, names, run, same, text, wait,
};

/// A block whose every sector names its own number and version.
fn block(index: u64, version: u32) -> Vec<u8> {
    let sectors = index * (BLOCK / 512)..(index + 1) * (BLOCK / 512);
    sectors.flat_map(|number| support::sector(number, version)).collect()
}

/// A file of so many blocks, with a tail if there is none of a whole block.
fn image(sandbox: &Sandbox, name: &str, blocks: u64, tail: u64) -> PathBuf {
    let path = sandbox.join(name);
    let file = std::fs::File::create(&path).unwrap();
    for index in 0..blocks {
        // Some are holes, some are zeros.
        match index % 16 {
            5 => {}
            6 => file.write_all_at(&vec![0; block(0, 0).len()], index * BLOCK).unwrap(),
            _ => file.write_all_at(&block(index, 1), index * BLOCK).unwrap(),
        }
    }
    file.set_len(blocks * BLOCK + tail).unwrap();
    path
}

/// A device of 130 blocks: the file behind it, the device, and its name.
fn device(sandbox: &Sandbox) -> (PathBuf, Loop, String) {
    let path = image(sandbox, "disk", 130, 0);
    let device = Loop::attach(&path, &[]);
    let name = device.0.to_str().unwrap().to_owned();
    (path, device, name)
}

fn begin(sandbox: &Sandbox, arguments: &[&str]) -> Child {
    let mut command = sandbox.fspfs();
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Sends a signal, and waits for the end: the exit code, stdout and stderr.
fn end(mut child: Child, signals: &[Signal]) -> (Option<i32>, String) {
    for signal in signals {
        kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), *signal).unwrap();
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(wait(&mut child, PATIENCE).is_some(), "it does not end");
    let output = child.wait_with_output().unwrap();
    (output.status.code(), text(&output))
}

/// Slots in the journals that are there: blocks that are on record.
fn noted(sandbox: &Sandbox) -> u64 {
    let journals = sandbox.join("state/fspfs/transfers");
    if !journals.exists() {
        return 0;
    }
    let noted = names(&journals).into_iter().map(|name| {
        let slots = std::fs::read(journals.join(name).join("blocks")).unwrap_or_default();
        // Those whose digest is zeros were about to be brought.
        let has_digest = |slot: &&[u8]| slot[..32].iter().any(|&byte| byte != 0);
        slots.chunks_exact(40).filter(has_digest).count() as u64
    });
    noted.sum()
}

/// Slots in the journals that say anything.
fn touched(sandbox: &Sandbox) -> usize {
    let journals = sandbox.join("state/fspfs/transfers");
    let files = std::fs::read_dir(journals).into_iter().flatten().flatten();
    let slots = files.map(|entry| std::fs::read(entry.path().join("blocks")).unwrap_or_default());
    let is_set = |slot: &&[u8]| slot.iter().any(|&byte| byte != 0);
    slots.map(|slots| slots.chunks_exact(40).filter(is_set).count()).sum()
}

fn journals(sandbox: &Sandbox) -> usize {
    let journals = sandbox.join("state/fspfs/transfers");
    if journals.exists() { names(&journals).len() } else { 0 }
}

fn state_of(sandbox: &Sandbox) -> Vec<(String, String)> {
    let list: serde_json::Value = serde_json::from_str(&sandbox.ok(&["list", "--json"])).unwrap();
    let text =
        |snapshot: &serde_json::Value, name: &str| snapshot[name].as_str().unwrap().to_owned();
    list.as_array().unwrap().iter().map(|s| (text(s, "id"), text(s, "state"))).collect()
}

/// A service that lets a client ask for so much in a second, and a sandbox that uses it.
fn served() -> Sandbox {
    let mut sandbox = Sandbox::with_store();
    sandbox.serve(&[]);
    sandbox
}

const SLOWLY: [&str; 4] = ["--max-requests-per-second", "60", "--max-in-flight", "4"];

fn slowly<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    arguments.iter().copied().chain(SLOWLY).collect()
}

/// Runs a command that has to succeed: what it prints, with its notes.
#[track_caller]
fn succeeds(sandbox: &Sandbox, arguments: &[&str]) -> String {
    let output = run(sandbox.fspfs().args(arguments));
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    said
}

/// What a finished run says of what was done before.
fn kept(output: &str) -> u64 {
    let line = output.lines().find(|line| line.contains(" before"));
    line.map_or(0, |line| {
        let number = line.split_whitespace().find_map(|word| word.parse().ok());
        number.unwrap_or_else(|| panic!("{line}"))
    })
}

#[rstest]
#[case::killed(Signal::SIGKILL)]
#[case::interrupted(Signal::SIGINT)]
#[case::terminated(Signal::SIGTERM)]
fn an_upload_goes_on_where_it_was(#[case] signal: Signal) {
    let sandbox = served();
    image(&sandbox, "a.img", 130, 100);
    let upload = slowly(&["upload", "a.img"]);
    let child = begin(&sandbox, &upload);
    support::until("some of it is on record", || noted(&sandbox) >= 40);
    let (code, said) = end(child, &[signal]);
    assert_ne!(code, Some(0), "{said}");
    let [(id, state)] = &state_of(&sandbox)[..] else { panic!("{:?}", state_of(&sandbox)) };
    assert_eq!(state, "pending");
    if signal != Signal::SIGKILL {
        assert!(said.contains(&format!("interrupted by {signal}")), "{said}");
        assert!(said.contains(&format!("{id} stays pending")), "{said}");
        assert!(said.contains("goes on:") && said.contains("upload a.img"), "{said}");
        assert!(said.contains(&format!("delete {id}")), "{said}");
    }
    let durable = noted(&sandbox);
    let said = succeeds(&sandbox, &upload);
    assert_eq!(kept(&said), durable, "{said}");
    assert_eq!(state_of(&sandbox), [(id.clone(), "completed".to_owned())]);
    assert_eq!(journals(&sandbox), 0);
    sandbox.ok(&["download", id, "b.img"]);
    assert!(same(sandbox.join("a.img"), sandbox.join("b.img")));
}

#[test]
fn a_copy_that_is_killed_brings_nothing_again_that_the_repository_has() {
    let sandbox = served();
    sandbox.ok(&["init", "other"]);
    image(&sandbox, "a.img", 400, 0);
    let id = sandbox.upload("a.img", &[]);
    let copy = ["copy", &id, "--to", "other", "--max-requests-per-second"];
    // What is saved: a pack, and then its record.
    let records = || {
        sandbox.sh("find other -path '*/pending/*' -name '*-*-*' | wc -l").trim().parse().unwrap()
    };
    let child = begin(&sandbox, &[&copy[..], &["200"]].concat());
    support::until("two packs are saved", || records() >= 2);
    let (_, said) = end(child, &[Signal::SIGKILL]);
    assert_eq!(noted(&sandbox), 0, "{said}");
    let saved: u64 = records();
    let said = succeeds(&sandbox, &[&copy[..], &["2000"]].concat());
    assert!(kept(&said) >= 64 * saved, "{} of {saved} packs: {said}", kept(&said));
    let made = said.lines().find(|line| line.starts_with("snap-")).unwrap();
    sandbox.ok(&["-s", "other", "download", made, "b.img"]);
    assert!(same(sandbox.join("a.img"), sandbox.join("b.img")));
}

#[rstest]
#[case::killed(Signal::SIGKILL)]
#[case::interrupted(Signal::SIGINT)]
fn a_download_goes_on_where_it_was(#[case] signal: Signal, #[values(false, true)] damaged: bool) {
    let sandbox = served();
    image(&sandbox, "a.img", 130, 100);
    let id = sandbox.upload("a.img", &[]);
    std::fs::create_dir(sandbox.join("out")).unwrap();
    std::fs::write(sandbox.join("out/b.img"), "old").unwrap();
    let download = slowly(&["download", &id, "out/b.img"]);
    let child = begin(&sandbox, &download);
    support::until("some of it is on record", || noted(&sandbox) >= 40);
    let (code, said) = end(child, &[signal]);
    assert_ne!(code, Some(0), "{said}");
    assert_eq!(std::fs::read(sandbox.join("out/b.img")).unwrap(), b"old");
    let all = names(sandbox.join("out"));
    let partial = all.iter().find(|name| *name != "b.img").unwrap();
    assert!(all.len() == 2 && partial.starts_with(".b.img.") && partial.ends_with(".part"));
    if signal != Signal::SIGKILL {
        assert!(said.contains("goes on:") && said.contains(partial), "{said}");
    }
    let durable = noted(&sandbox);
    if damaged {
        // What is there is not what was written.
        let part = std::fs::File::options().write(true).open(sandbox.join("out").join(partial));
        part.unwrap().write_all_at(b"damage", 700).unwrap();
    }
    let said = succeeds(&sandbox, &download);
    assert_eq!(kept(&said), durable - u64::from(damaged), "{said}");
    assert!(same(sandbox.join("a.img"), sandbox.join("out/b.img")));
    assert_eq!((names(sandbox.join("out")), journals(&sandbox)), (vec!["b.img".to_owned()], 0));
}

#[test]
fn a_second_signal_gives_up() {
    let sandbox = served();
    image(&sandbox, "a.img", 130, 0);
    // The server answers late: leaving takes a while.
    let child = begin(&sandbox, &slowly(&["upload", "a.img", "--suppress-writes"]));
    support::until("it is started", || !state_of(&sandbox).is_empty());
    let (code, said) = end(child, &[Signal::SIGINT]);
    assert_eq!(code, Some(1), "{said}");
    // Without a journal nothing could go on.
    assert_eq!(state_of(&sandbox), []);
    assert_eq!(journals(&sandbox), 0);
}

#[test]
fn other_arguments_or_a_changed_file_begin_anew() {
    let sandbox = served();
    let path = image(&sandbox, "a.img", 130, 0);
    let pending = || state_of(&sandbox).into_iter().find(|(_, state)| state == "pending");
    // Begins, and is killed when there is another pending snapshot than before.
    let stopped = |arguments: &[&str]| {
        let before = pending();
        let child = begin(&sandbox, &slowly(arguments));
        support::until("it begins", || pending().is_some_and(|now| Some(now) != before));
        support::until("some of it is on record", || noted(&sandbox) >= 5);
        end(child, &[Signal::SIGKILL]);
        pending().unwrap().0
    };
    let first = stopped(&["upload", "a.img"]);
    // Other words for the same file.
    let second = stopped(&["upload", "--name", "web", "a.img"]);
    assert_ne!(first, second);
    assert_eq!(state_of(&sandbox).len(), 1, "the first one is removed");
    std::fs::File::options().write(true).open(&path).unwrap().write_all_at(b"new", 10).unwrap();
    let third = stopped(&["upload", "--name", "web", "a.img"]);
    assert_ne!(second, third);
    // Somebody deleted it.
    sandbox.ok(&["delete", "--yes", &third]);
    assert_eq!(journals(&sandbox), 0);
    let fourth = stopped(&["upload", "--name", "web", "a.img"]);
    let fifth = stopped(&["upload", "--name", "web", "--restart", "a.img"]);
    assert_ne!(fourth, fifth);
    let id = sandbox.upload("a.img", &["--name", "web"]);
    assert_eq!(id, fifth);
    assert_eq!(state_of(&sandbox).len(), 1);
    sandbox.ok(&["download", &id, "b.img"]);
    assert!(same(path, sandbox.join("b.img")));
}

#[test]
fn a_device_that_changed_meanwhile_is_read_again() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = served();
    let (path, device, name) = device(&sandbox);
    let upload = slowly(&["upload", &name]);
    let child = begin(&sandbox, &upload);
    support::until("some of it is on record", || noted(&sandbox) >= 40);
    end(child, &[Signal::SIGKILL]);
    // What was put, also by zeros, and what was not.
    let file = std::fs::File::options().write(true).open(&device.0).unwrap();
    file.write_all_at(&block(1, 2), BLOCK).unwrap();
    file.write_all_at(&vec![0; block(0, 0).len()], 2 * BLOCK).unwrap();
    file.write_all_at(&block(129, 2), 129 * BLOCK).unwrap();
    file.sync_all().unwrap();
    let durable = noted(&sandbox);
    let said = succeeds(&sandbox, &upload);
    assert_eq!(kept(&said), durable - 2, "{said}");
    let id = &state_of(&sandbox)[0].0;
    sandbox.ok(&["download", id, "b.img"]);
    drop(device);
    assert!(same(path, sandbox.join("b.img")));
}

#[test]
fn a_device_with_a_parent_goes_on_with_what_differs() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = served();
    let (path, device, name) = device(&sandbox);
    let parent = sandbox.upload(&name, &[]);
    let stored = || sandbox.sh("find store/packs -type f -print0 | xargs -0 cat | wc -c");
    let before = stored();
    let file = std::fs::File::options().write(true).open(&device.0).unwrap();
    file.write_all_at(&block(100, 2), 100 * BLOCK).unwrap();
    file.sync_all().unwrap();
    let upload = slowly(&["upload", &name, "--parent", &parent]);
    let child = begin(&sandbox, &upload);
    support::until("some of it was looked at", || touched(&sandbox) >= 40);
    end(child, &[Signal::SIGKILL]);
    let said = succeeds(&sandbox, &upload);
    let bytes = |text: String| text.trim().parse::<u64>().unwrap();
    let more = bytes(stored()) - bytes(before);
    assert!(more < 10 * BLOCK, "{more} bytes were stored: {said}");
    let id = said.lines().rfind(|line| line.starts_with("snap-")).unwrap();
    sandbox.ok(&["download", id, "b.img"]);
    drop(device);
    assert!(same(path, sandbox.join("b.img")));
}

#[rstest]
#[case::a_record("find other -path '*/pending/*' -name '*-*-*' | xargs -I@ truncate -s -1 @")]
#[case::its_start("find other -path '*/pending/*' -name start.json | xargs truncate -s 20")]
fn a_damaged_pending_snapshot_is_begun_anew(#[case] damage: &str) {
    let sandbox = served();
    sandbox.ok(&["init", "other"]);
    image(&sandbox, "a.img", 200, 0);
    let id = sandbox.upload("a.img", &[]);
    let copy = ["copy", &id, "--to", "other", "--max-requests-per-second"];
    let records = || sandbox.sh("find other -path '*/pending/*' -name '*-*-*' | wc -l");
    let child = begin(&sandbox, &[&copy[..], &["200"]].concat());
    support::until("a pack is saved", || records().trim() != "0");
    end(child, &[Signal::SIGKILL]);
    sandbox.sh(damage);
    let said = succeeds(&sandbox, &[&copy[..], &["2000"]].concat());
    assert!(said.contains("is removed"), "{said}");
    let made = said.lines().find(|line| line.starts_with("snap-")).unwrap();
    sandbox.ok(&["-s", "other", "download", made, "b.img"]);
    assert!(same(sandbox.join("a.img"), sandbox.join("b.img")));
    assert_eq!(sandbox.ok(&["-s", "other", "-q", "list"]).lines().count(), 1);
}

#[test]
fn a_download_to_a_device_goes_on_and_zeros_what_is_a_hole() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = served();
    let path = image(&sandbox, "a.img", 130, 0);
    let id = sandbox.upload("a.img", &[]);
    std::fs::write(sandbox.join("disk"), vec![0xaa; usize::try_from(130 * BLOCK).unwrap()])
        .unwrap();
    let device = Loop::attach(&sandbox.join("disk"), &[]);
    let download = slowly(&["download", &id, device.0.to_str().unwrap()]);
    let child = begin(&sandbox, &download);
    support::until("some of it is on record", || noted(&sandbox) >= 40);
    let (_, said) = end(child, &[Signal::SIGINT]);
    assert!(said.contains("holds a part of the image"), "{said}");
    let durable = noted(&sandbox);
    let said = succeeds(&sandbox, &download);
    assert_eq!(kept(&said), durable, "{said}");
    drop(device);
    assert!(same(path, sandbox.join("disk")));
}

#[test]
fn a_whole_device_is_read_past_its_page_cache() {
    if !can_mount(&["mkfs.ext4", "sfdisk", "fsfreeze"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.sh("truncate -s 64M disk; echo 'start=2048' | sfdisk -q disk; mkdir at");
    let device = Loop::attach(&sandbox.join("disk"), &["--partscan"]);
    let (whole, partition) = (device.0.to_str().unwrap().to_owned(), device.partition(1));
    let partition = partition.to_str().unwrap();
    sandbox.sh(&format!("mkfs.ext4 -q {partition}; mount {partition} at; cp /bin/sh at/one; sync"));
    // From here on the whole device is in the page cache.
    sandbox.upload(&whole, &[]);
    sandbox.sh(&format!("cat {whole} > /dev/null; cp /bin/sh at/two; sync; fsfreeze -f at"));
    let uploaded = run(sandbox.fspfs().args(["upload", &whole]));
    let copied =
        sandbox.try_sh(&format!("dd if={whole} of=direct.img bs=1M iflag=direct status=none"));
    sandbox.sh("fsfreeze -u at; umount at");
    assert!(uploaded.status.success() && copied.status.success(), "{}", text(&uploaded));
    let id = String::from_utf8(uploaded.stdout).unwrap().lines().last().unwrap().to_owned();
    sandbox.ok(&["download", &id, "b.img"]);
    assert!(same(sandbox.join("direct.img"), sandbox.join("b.img")));
}

#[test]
fn a_journal_that_is_no_good_is_told_with_its_cure() {
    let sandbox = served();
    image(&sandbox, "a.img", 130, 0);
    let child = begin(&sandbox, &slowly(&["upload", "a.img"]));
    support::until("some of it is on record", || noted(&sandbox) >= 5);
    let message = sandbox.fails(&["upload", "a.img"]);
    assert!(message.contains("another process"), "{message}");
    end(child, &[Signal::SIGKILL]);
    let journals = sandbox.join("state/fspfs/transfers");
    let document = journals.join(&names(&journals)[0]).join("transfer.json");
    let bytes = std::fs::read(&document).unwrap();
    for broken in [&b""[..], &bytes[..bytes.len() / 2], b"{}\n"] {
        std::fs::write(&document, broken).unwrap();
        let message = sandbox.fails(&["upload", "a.img"]);
        assert!(message.contains("damaged") && message.contains("--restart"), "{message}");
    }
    let id = sandbox.upload("a.img", &["--restart"]);
    assert!(state_of(&sandbox).contains(&(id, "completed".to_owned())));
    assert_eq!(self::journals(&sandbox), 0);
}

#[test]
fn without_a_place_for_a_journal_a_transfer_says_so_and_is_done() {
    let sandbox = served();
    let path = image(&sandbox, "a.img", 20, 0);
    // Not even root can make a directory of a file.
    std::fs::create_dir_all(sandbox.join("state/fspfs")).unwrap();
    std::fs::write(sandbox.join("state/fspfs/transfers"), "").unwrap();
    let output = run(sandbox.fspfs().args(["upload", "a.img"]));
    let said = text(&output);
    assert!(output.status.success() && said.contains("XDG_STATE_HOME"), "{said}");
    let id = state_of(&sandbox)[0].0.clone();
    sandbox.ok(&["download", &id, "b.img"]);
    assert!(same(path, sandbox.join("b.img")));
    assert_eq!(sandbox.join("b.img").metadata().unwrap().permissions().mode() & 0o777, 0o600);
}

/// With no page left at the beginning, or after the first 102 blocks.
#[rstest]
#[case::at_the_beginning(true, "begins anew")]
#[case::on_the_way(false, "is done again")]
fn a_full_place_for_a_journal_holds_nothing_up(#[case] is_full: bool, #[case] says: &str) {
    if !can_mount(&["mount", "umount"]) {
        return;
    }
    let sandbox = served();
    image(&sandbox, "a.img", 260, 0);
    let state = sandbox.join("state");
    let _state = FileSystem::mount(Path::new("none"), "tmpfs", "size=8k", state);
    if is_full {
        sandbox.try_sh("head -c 8192 /dev/zero > state/full");
    }
    let said = succeeds(&sandbox, &["upload", "a.img"]);
    assert!(said.contains("No space left") && said.contains(says), "{said}");
    let id = state_of(&sandbox)[0].0.clone();
    let said = succeeds(&sandbox, &["download", &id, "b.img"]);
    assert!(said.contains("No space left") && said.contains(says), "{said}");
    assert!(same(sandbox.join("a.img"), sandbox.join("b.img")));
    assert_eq!(journals(&sandbox), 0);
}

#[test]
fn a_second_download_to_the_same_file_is_refused() {
    let sandbox = served();
    image(&sandbox, "a.img", 130, 0);
    let id = sandbox.upload("a.img", &[]);
    let download = slowly(&["download", &id, "b.img"]);
    let child = begin(&sandbox, &download);
    support::until("some of it is on record", || noted(&sandbox) >= 5);
    let message = sandbox.fails(&["download", &id, "b.img"]);
    assert!(message.contains("another process is writing it"), "{message}");
    let (code, said) = end(child, &[]);
    assert_eq!(code, Some(0), "{said}");
    assert!(same(sandbox.join("a.img"), sandbox.join("b.img")));
    assert_eq!(journals(&sandbox), 0);
}

/// The journal as it is once an upload has brought some blocks, for one that was killed just after its completion.
fn keep_journal(sandbox: &Sandbox, upload: &[&str], blocks: u64) -> String {
    let child = begin(sandbox, upload);
    support::until("so many blocks are on record", || noted(sandbox) >= blocks);
    sandbox.sh("cp -a state/fspfs/transfers kept");
    let (code, said) = end(child, &[]);
    assert_eq!(code, Some(0), "{said}");
    sandbox.sh("mkdir -p state/fspfs/transfers; cp -a kept/* state/fspfs/transfers/");
    sandbox.sh("for journal in state/fspfs/transfers/*; do touch $journal/finishing; done");
    state_of(sandbox)[0].0.clone()
}

#[test]
fn a_device_is_uploaded_anew_after_an_unheard_completion() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = served();
    let (_file, device, name) = device(&sandbox);
    let upload = slowly(&["upload", &name]);
    let first = keep_journal(&sandbox, &upload, 5);
    std::fs::File::options()
        .write(true)
        .open(&device.0)
        .unwrap()
        .write_all_at(&block(1, 2), BLOCK)
        .unwrap();
    let output = run(sandbox.fspfs().args(["upload", &name]));
    let said = text(&output);
    assert!(output.status.success() && said.contains("beginning anew"), "{said}");
    let second = String::from_utf8(output.stdout).unwrap().lines().last().unwrap().to_owned();
    assert_ne!(first, second);
    sandbox.ok(&["download", &second, "b.img"]);
    sandbox.sh(&format!("sync; cmp b.img {name}"));
}

#[test]
fn a_snapshot_that_may_be_complete_is_not_removed() {
    let mut sandbox = Sandbox::with_store();
    sandbox.serve(&["--pending", "8"]);
    image(&sandbox, "a.img", 130, 0);
    let upload = slowly(&["upload", "a.img"]);
    let id = keep_journal(&sandbox, &upload, 5);
    let message = sandbox.fails(&["upload", "a.img"]);
    assert!(message.contains(&format!("{id} stays pending")), "{message}");
    support::until("it is processed", || {
        state_of(&sandbox) == [(id.clone(), "completed".to_owned())]
    });
    assert_eq!(sandbox.upload("a.img", &[]), id);
    assert_eq!(journals(&sandbox), 0);
}

#[test]
fn a_completion_that_an_earlier_run_asked_for_is_waited_for() {
    let mut sandbox = Sandbox::with_store();
    sandbox.serve(&["--pending", "8", "--inject", "latency=100ms"]);
    image(&sandbox, "a.img", 3, 0);
    let id = keep_journal(&sandbox, &["upload", "a.img"], 3);
    assert_eq!(state_of(&sandbox), [(id.clone(), "pending".to_owned())]);
    assert_eq!(sandbox.upload("a.img", &[]), id);
    assert_eq!(state_of(&sandbox), [(id, "completed".to_owned())]);
    assert_eq!(journals(&sandbox), 0);
}

#[test]
fn a_download_to_a_file_that_nobody_may_write_goes_on() {
    let sandbox = served();
    image(&sandbox, "a.img", 130, 0);
    let id = sandbox.upload("a.img", &[]);
    std::fs::write(sandbox.join("b.img"), "old").unwrap();
    let readable = std::fs::Permissions::from_mode(0o444);
    std::fs::set_permissions(sandbox.join("b.img"), readable).unwrap();
    let child = begin(&sandbox, &slowly(&["download", &id, "b.img"]));
    support::until("some of it is on record", || noted(&sandbox) >= 20);
    let part = names(&sandbox.path).into_iter().find(|name| name.ends_with(".part")).unwrap();
    assert_eq!(sandbox.join(part).metadata().unwrap().permissions().mode() & 0o777, 0o600);
    end(child, &[Signal::SIGKILL]);
    sandbox.ok(&["download", &id, "b.img"]);
    assert!(same(sandbox.join("a.img"), sandbox.join("b.img")));
    assert_eq!(sandbox.join("b.img").metadata().unwrap().permissions().mode() & 0o777, 0o444);
}

/// Rounds of being killed at random moments: `scripts/kill-loop.sh` sets more.
fn rounds() -> u64 {
    std::env::var("FSPFS_KILL_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(3)
}

/// Kills a command at random moments, and gives it again, until it is done: what it printed then.
#[track_caller]
fn until_done(sandbox: &Sandbox, arguments: &[&str], random: &mut fastrand::Rng) -> String {
    for kills in 0..200 {
        let mut child = begin(sandbox, arguments);
        // On a busy machine nothing may be done within the first ones.
        let after = Duration::from_millis(random.u64(5..400 + 40 * kills));
        if wait(&mut child, after).is_some() {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{arguments:?}: {}", text(&output));
            return String::from_utf8(output.stdout).unwrap();
        }
        end(child, &[Signal::SIGKILL]);
    }
    panic!("{arguments:?} never ends");
}

/// Transfers have left no partial file, no journal, and no snapshot that is not completed.
#[track_caller]
fn assert_nothing_is_unfinished(sandbox: &Sandbox) {
    let left = names(&sandbox.path);
    assert!(left.iter().all(|name| !name.ends_with(".part")), "{left:?}");
    assert_eq!(journals(sandbox), 0);
    // One that was killed between its completion and its last word is done twice.
    let all = state_of(sandbox);
    assert!(all.iter().all(|(_, state)| state == "completed"), "{all:?}");
}

/// What is injected where a service is killed at random moments.
const FAULTS: [&str; 2] = ["--inject", "latency=2ms,throttle=2%"];

#[rstest]
#[case::of_a_repository(false)]
#[case::of_a_service(true)]
fn kills_at_random_moments_end_with_the_same_image(#[case] over_service: bool) {
    let mut random = fastrand::Rng::new();
    for round in 0..rounds() {
        let mut sandbox = Sandbox::with_store();
        if over_service {
            sandbox.serve(&FAULTS);
        }
        let blocks = [0, 1, 63, 64, 65, 128, 130, 400][random.usize(..8)];
        let tail = if blocks == 0 { 1 } else { [0, 512, 100_000][random.usize(..3)] };
        let path = image(&sandbox, "a.img", blocks, tail);
        let printed = until_done(&sandbox, &["upload", "a.img"], &mut random);
        let id = printed.lines().last().unwrap().to_owned();
        until_done(&sandbox, &["download", &id, "b.img"], &mut random);
        assert!(same(&path, sandbox.join("b.img")), "round {round}: {blocks} blocks and {tail}");
        assert_nothing_is_unfinished(&sandbox);
    }
}

#[rstest]
#[case::of_a_repository(false)]
#[case::of_a_service(true)]
fn kills_at_random_moments_of_copy_and_multiclone(#[case] over_service: bool) {
    if !can_mount(&[]) {
        return;
    }
    let mut random = fastrand::Rng::new();
    for round in 0..rounds() {
        let mut sandbox = Sandbox::with_store();
        sandbox.ok(&["init", "other"]);
        let blocks = [1, 63, 65, 130, 200][random.usize(..5)];
        let tail = [0, 512, 100_000][random.usize(..3)];
        let path = image(&sandbox, "a.img", blocks, tail);
        let id = sandbox.ok(&["-s", "other", "-q", "upload", "a.img"]).trim_end().to_owned();
        let to = if over_service {
            sandbox.serve(&FAULTS);
            format!("ebs://us-east-1?endpoint={}", sandbox.service().url)
        } else {
            "store".to_owned()
        };
        let copy = ["-s", "other", "-q", "copy", &id, "--to", &to];
        let copied = until_done(&sandbox, &copy, &mut random).trim_end().to_owned();
        for (made, _) in state_of(&sandbox) {
            sandbox.assert_holds(&made, "a.img");
        }
        // The device has no zeros where the image has holes.
        let len = blocks * BLOCK + tail;
        let room = usize::try_from(len.next_multiple_of(BLOCK)).unwrap();
        std::fs::write(sandbox.join("disk"), vec![0xaa; room]).unwrap();
        let device = Loop::attach(&sandbox.join("disk"), &[]);
        let targets = ["1.img", device.0.to_str().unwrap(), "2.img"];
        let multiclone = [&["multiclone", &copied], &targets[..]].concat();
        until_done(&sandbox, &multiclone, &mut random);
        drop(device);
        for target in ["1.img", "2.img"] {
            assert!(same(&path, sandbox.join(target)), "round {round}: {target} of {len} bytes");
        }
        sandbox.sh(&format!("cmp -n {len} a.img disk"));
        assert_nothing_is_unfinished(&sandbox);
    }
}
