//! Operations that are commands and control files alike: `multiclone`.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::{Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{BLOCK, FileSystem, Loop, MIB, PATIENCE, Sandbox, can_mount, names, run, same, text};

/// A store with a snapshot of `a.img`, 8 MiB of data with holes between, and a directory `out`.
fn one() -> (Sandbox, String) {
    let sandbox = Sandbox::with_store();
    sandbox.image("a.img", 20 * MIB + 100, &[(0, 3 * MIB), (7 * MIB, 4 * MIB), (19 * MIB, MIB)]);
    std::fs::create_dir(sandbox.join("out")).unwrap();
    let id = sandbox.upload("a.img", &[]);
    (sandbox, id)
}

fn multiclone(sandbox: &Sandbox, arguments: &[&str]) -> Output {
    run(sandbox.fspfs().arg("multiclone").args(arguments))
}

/// Runs it: the exit code, stdout, and stderr.
fn ended(sandbox: &Sandbox, arguments: &[&str]) -> (i32, String, String) {
    let output = multiclone(sandbox, arguments);
    let said = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap(), said(&output.stdout), said(&output.stderr))
}

#[track_caller]
fn whole(sandbox: &Sandbox, files: &[&str]) {
    for file in files {
        assert!(same(sandbox.join("a.img"), sandbox.join(file)), "{file} is not the image");
    }
}

/// What it says of the requests that were sent.
fn requests(said: &str) -> u64 {
    let line = said.lines().find(|line| line.contains(" requests")).unwrap();
    line.split_whitespace().find_map(|word| word.parse().ok()).unwrap()
}

#[test]
fn a_snapshot_is_read_once_for_many_files() {
    let (mut sandbox, id) = one();
    sandbox.serve(&[]);
    let download = run(sandbox.fspfs().args(["download", &id, "out/0.img"]));
    std::fs::write(sandbox.join("out/2.img"), "old").unwrap();
    let files = ["out/1.img", "out/2.img", "out/3.img", "out/4.img"];
    let arguments: Vec<_> = std::iter::once(&id[..]).chain(files).collect();
    let (code, printed, said) = ended(&sandbox, &arguments);
    assert_eq!(code, 0, "{printed}{said}");
    let lines: Vec<_> = printed.lines().collect();
    assert!(lines[0].starts_with(&format!("Snapshot {id} contains 16 chunks")), "{printed}");
    assert_eq!(lines[1..5], files.map(|file| format!("{file}: done")));
    assert_eq!(lines[5..], [&id]);
    whole(&sandbox, &files);
    assert_eq!(requests(&said), requests(&text(&download)), "{said}");
    assert_eq!(names(sandbox.join("out")).len(), 5);

    let (_, printed, _) = ended(&sandbox, &["-q", &id, "out/1.img", "out/2.img"]);
    assert_eq!(printed.trim_end(), id);
}

#[test]
fn a_target_that_fails_does_not_stop_the_others() {
    let (sandbox, id) = one();
    let three = [&id[..], "out/1.img", "no/such/2.img", "out/3.img"];
    let (code, printed, said) = ended(&sandbox, &three);
    assert_eq!(code, 3, "{printed}{said}");
    assert!(said.contains("no/such/2.img") && said.contains("No such file"), "{said}");
    assert!(printed.contains("out/3.img: done") && !printed.contains("2.img"), "{printed}");
    assert_eq!(printed.lines().last(), Some(&id[..]));
    whole(&sandbox, &["out/1.img", "out/3.img"]);

    let (code, printed, _) = ended(&sandbox, &[&["--json"], &three[..]].concat());
    let json: serde_json::Value = serde_json::from_str(&printed).unwrap();
    assert_eq!((code, &json["id"], &json["failed"]), (3, &id[..].into(), &1.into()));
    let targets = json["targets"].as_array().unwrap();
    assert_eq!(targets.len(), 3);
    assert_eq!((&targets[1]["path"], &targets[0]["error"]), (&three[2].into(), &().into()));
    assert!(targets[1]["error"].as_str().unwrap().contains("No such file"), "{json}");

    let (code, printed, _) = ended(&sandbox, &[&id, "no/1.img", "no/2.img"]);
    assert_eq!((code, &printed[..]), (1, ""));
    let message = sandbox.fails(&["multiclone", "snap-0123456789abcdef0", "out/x.img"]);
    assert!(message.contains("there is no snapshot"), "{message}");
}

#[test]
fn a_bad_target_is_refused_before_anything_is_written() {
    let (sandbox, id) = one();
    sandbox
        .sh("ln a.img hard; ln -s a.img soft; ln -s out also; ln -s store to-store; mkfifo fifo");
    let fails = |arguments: &[&str], says: &[&str]| {
        let before = sandbox.sh("find . -ls");
        let message = sandbox.fails(&[&["multiclone", &id], arguments].concat());
        assert!(says.iter().all(|says| message.contains(says)), "{arguments:?}: {message}");
        assert_eq!(sandbox.sh("find . -ls"), before);
    };
    fails(&["out/1.img", "a.img", "hard"], &["hard", "same target as a.img"]);
    fails(&["soft", "out/1.img", "a.img"], &["a.img", "same target as soft"]);
    fails(&["out/1.img", "also/1.img"], &["also/1.img", "same target as out/1.img"]);
    fails(&["out/1.img", "out"], &["out: it is a directory"]);
    fails(&["out/1.img", "fifo"], &["neither a file nor a block device"]);
    fails(&["out/1.img", "-"], &["standard output"]);
    if !support::over_ebs() {
        fails(&["out/1.img", "to-store/x.img"], &["to-store/x.img", "inside the store"]);
    }
    for (list, says) in [
        ("# disks\nout/1.img\n\nout\n", &["list, line 4", "it is a directory"][..]),
        ("a.img\n# again\nhard\n", &["list, line 3", "same target as a.img of list, line 1"]),
        ("out/1.img\nlist\n", &["list, line 2", "the list itself"]),
        ("# none\n", &["list: it names no target"]),
        ("a\0b", &["list: it is no list"]),
    ] {
        std::fs::write(sandbox.join("list"), list).unwrap();
        fails(&["--list", "list"], says);
    }
    fails(&["--list", "fifo"], &["fifo: it is no list"]);
    fails(&["--list", "none"], &["cannot read none"]);
    let (code, _, said) = ended(&sandbox, &[&id]);
    assert_eq!(code, 2, "{said}");
}

#[test]
fn targets_come_from_a_list() {
    let (sandbox, id) = one();
    std::fs::write(sandbox.join("list"), "# two\nout/1.img\n\n  out/2.img  \r\n#x\n").unwrap();
    let (code, printed, said) = ended(&sandbox, &[&id, "--list", "list", "out/0.img"]);
    assert_eq!(code, 0, "{printed}{said}");
    whole(&sandbox, &["out/0.img", "out/1.img", "out/2.img"]);
    assert_eq!(names(sandbox.join("out")).len(), 3);

    // As the original takes it.
    let path = |name: &str| sandbox.join(name).display().to_string();
    let list = format!("{}\n\n{}\n", path("out/3.img"), path("out/4.img"));
    std::fs::write(sandbox.join("list"), &list).unwrap();
    let (code, printed, said) = ended(&sandbox, &[&id, "list"]);
    assert_eq!(code, 0, "{printed}{said}");
    assert!(said.contains("list is a list of 2 targets"), "{said}");
    whole(&sandbox, &["out/3.img", "out/4.img"]);
    assert_eq!(std::fs::read_to_string(sandbox.join("list")).unwrap(), list);

    // It is a target like any other where it is not alone, and if it is no list.
    ended(&sandbox, &[&id, "list", "out/5.img"]);
    whole(&sandbox, &["list", "out/5.img"]);
    let (code, _, said) = ended(&sandbox, &[&id, "list"]);
    assert_eq!(code, 0, "{said}");
    assert!(!said.contains("is a list"), "{said}");
}

#[test]
fn a_dry_run_writes_nothing() {
    let (sandbox, id) = one();
    let before = sandbox.sh("find . -ls");
    let (code, printed, said) = ended(&sandbox, &["--dry-run", &id, "out/1.img", "a.img"]);
    assert_eq!((code, printed.trim_end()), (0, &id[..]), "{said}");
    assert!(said.contains("out/1.img would be written"), "{said}");
    assert!(said.contains("a.img would be written"), "{said}");
    assert!(said.contains(&format!("16 blocks of {id} would be read")), "{said}");
    let (code, _, said) = ended(&sandbox, &["--dry-run", &id, "no/1.img", "a.img"]);
    assert_eq!(code, 3, "{said}");
    assert!(said.contains("no/1.img") && !said.contains("no/1.img would"), "{said}");
    assert_eq!(sandbox.sh("find . -ls"), before);
}

#[test]
fn devices_are_written_beside_files_and_a_full_disk_is_its_own_matter() {
    if !can_mount(&[]) {
        return;
    }
    let (sandbox, id) = one();
    let device = |name: &str, len: u64| {
        let file = sandbox.image(name, len, &[(0, len)]);
        Loop::attach(&file, &[])
    };
    let (good, small) = (device("good", 24 * MIB), device("small", 16 * MIB));
    let [good_path, small_path] = [&good, &small].map(|l| l.0.to_str().unwrap().to_owned());
    let none = Path::new("none");
    let full = FileSystem::mount(none, "tmpfs", "size=1m", sandbox.join("full"));
    let (code, _, said) = ended(&sandbox, &["--dry-run", &id, &good_path, &small_path]);
    assert_eq!(code, 3, "{said}");
    assert!(said.contains("too small") && said.contains(&format!("{good_path} would")), "{said}");
    sandbox.sh("cmp -n 25165824 good <(cat good)");

    let targets = [&id[..], &good_path, &small_path, "full/x.img", "out/1.img"];
    let (code, printed, said) = ended(&sandbox, &targets);
    assert_eq!(code, 3, "{printed}{said}");
    assert!(said.contains(&format!("{small_path}: it is too small")), "{said}");
    assert!(said.contains("full/x.img") && said.contains("No space left"), "{said}");
    assert!(said.contains(&format!("a download of {id} to full/x.img goes on")), "{said}");
    assert_eq!(printed.matches(": done").count(), 2, "{printed}");
    whole(&sandbox, &["out/1.img"]);
    let len = 20 * MIB + 100;
    sandbox.sh(&format!("cmp -n {len} a.img {good_path}"));
    // The device ends with zeros.
    sandbox.sh(&format!("cmp -n 3000000 -i {len}:0 {good_path} /dev/zero"));
    drop(full);
}

#[test]
fn a_stopped_multiclone_goes_on() {
    let mut sandbox = Sandbox::with_store();
    let len = 80 * BLOCK;
    sandbox.image("a.img", len, &[(0, len)]);
    let id = sandbox.upload("a.img", &[]);
    sandbox.serve(&[]);
    let slowly = ["--max-requests-per-second", "40", "--max-in-flight", "2"];
    let mut command = sandbox.fspfs();
    command.args(["multiclone", &id, "1.img", "2.img"]).args(slowly);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let size = || {
        let part = names(&sandbox.path).into_iter().find(|name| name.starts_with(".1.img"));
        let found = part.and_then(|name| sandbox.join(name).metadata().ok());
        found.map_or(0, |found| std::os::unix::fs::MetadataExt::blocks(&found) * 512)
    };
    support::until("some of it is there", || size() >= 10 * BLOCK);
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGINT).unwrap();
    assert!(support::wait(&mut child, PATIENCE).is_some(), "it does not end");
    let output = child.wait_with_output().unwrap();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("interrupted by SIGINT") && said.contains("goes on:"), "{said}");
    assert!(said.contains("gives up: ") && said.contains(".2.img."), "{said}");
    // One goes on by itself, and then both.
    let download = run(sandbox.fspfs().args(["download", &id, "2.img"]));
    assert!(text(&download).contains("chunks were downloaded before"), "{}", text(&download));
    let (code, _, said) = ended(&sandbox, &[&id, "1.img", "2.img"]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("1.img: ") && said.contains("chunks were downloaded before"), "{said}");
    whole(&sandbox, &["1.img", "2.img"]);
    assert!(names(&sandbox.path).iter().all(|name| !name.starts_with('.')));
}

#[test]
fn a_mount_does_it_too() {
    if !can_mount(&["bash"]) {
        return;
    }
    let (sandbox, id) = one();
    let mount = sandbox.mount(&[]);
    let out = sandbox.join("out");
    let out = out.display();
    std::fs::write(sandbox.join("list"), format!("# one\n{out}/2.img\nrelative.img\n")).unwrap();
    let job = |line: &str| {
        std::fs::write(mount.join("control/multiclone"), line).unwrap();
        let read = |file: &str| {
            std::fs::read_to_string(mount.join(format!("control/jobs/last/{file}"))).unwrap()
        };
        support::until("the job ends", || read("state") != "running\n");
        (read("state"), read("result") + &read("log"))
    };
    let (state, said) = job(&format!("{id} {out}/1.img {out}/2.img"));
    assert_eq!(state, "done 0\n", "{said}");
    assert!(said.contains("2.img: done"), "{said}");
    whole(&sandbox, &["out/1.img", "out/2.img"]);
    std::fs::remove_file(sandbox.join("out/2.img")).unwrap();
    let list = sandbox.join("list");
    for (line, says) in [
        (format!("{id} --list {}", list.display()), "line 3: relative.img: give an absolute path"),
        (format!("{id} {out}/3.img {}/x.img", mount.path.display()), "it is in this mount"),
    ] {
        let (state, said) = job(&line);
        assert_eq!(state, "failed 1\n", "{line}: {said}");
        assert!(said.contains(says), "{line}: {said}");
    }
    assert_eq!(names(sandbox.join("out")), ["1.img"]);
    mount.unmount();
}
