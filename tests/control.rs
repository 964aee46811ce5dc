//! Control files and jobs, through a mount, as shells and programs use them.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::MetadataExt as _;

use nix::errno::Errno;
use support::writing::Disk;
use support::{FileSystem, Mount, Sandbox, can_mount, errno, names, text, until};

/// A mount with nothing to commit in it.
fn mounted() -> (Sandbox, Mount) {
    let sandbox = Sandbox::with_store();
    let mount = sandbox.mount(&[]);
    (sandbox, mount)
}

/// Waits until a job has ended.
fn ended(mount: &Mount, job: u64) -> String {
    let state = || {
        let file = mount.join(format!("control/jobs/{job}/state"));
        std::fs::read_to_string(file).unwrap()
    };
    until("the job ends", || state() != "running\n");
    state()
}

#[test]
fn a_shell_writes_a_line_and_reads_the_number_of_the_job() {
    if !can_mount(&["bash"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    let usage = std::fs::read_to_string(mount.join("control/commit")).unwrap();
    assert!(usage.contains("Usage: commit"), "{usage}");
    // No image is written here, so the job fails; the line is fine.
    sandbox.sh("echo none.img > mnt/control/commit");
    assert_eq!(ended(&mount, 1), "failed 1\n");
    assert_eq!(
        sandbox.sh("bash -c 'exec 3<>mnt/control/commit; echo none.img >&3; cat <&3'").trim(),
        "2"
    );
    sandbox.sh("echo none.img >> mnt/control/commit");
    let mut file = std::fs::File::options();
    let mut file = file.read(true).write(true).open(mount.join("control/clone")).unwrap();
    file.write_all(b"snap-0123456789abcdef0 'a b.img'\n").unwrap();
    file.rewind().unwrap();
    let mut answer = String::new();
    file.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "4\n");
    assert_eq!(
        sandbox.sh("cat mnt/control/jobs/last/command"),
        "clone snap-0123456789abcdef0 'a b.img'\n"
    );
    assert!(sandbox.sh("cat mnt/control/jobs/*/log").contains("none.img"));
    drop(file);
    mount.unmount();
}

#[test]
fn a_bad_line_is_an_invalid_argument_and_the_file_says_why() {
    if !can_mount(&[]) {
        return;
    }
    let (sandbox, mount) = mounted();
    let commit = mount.join("control/commit");
    assert_eq!(errno(std::fs::write(&commit, "--nonsense x\n")), Errno::EINVAL as i32);
    let why = std::fs::read_to_string(&commit).unwrap();
    assert!(why.starts_with("error: ") && why.contains("--nonsense"), "{why}");
    assert!(why.contains("Usage: commit"), "{why}");
    for line in ["a\nb\n".to_owned(), "x".repeat(70_000), "x".repeat(1 << 20)] {
        assert_eq!(errno(std::fs::write(&commit, line)), Errno::EINVAL as i32);
    }
    for (operation, line) in [
        ("upload", "a.img\n"),
        ("copy", "latest --to other\n"),
        ("download", "./b.img /tmp/c.img\n"),
        ("multiclone", "latest /tmp/1.img 2.img\n"),
        ("verify", "latest --against a.img\n"),
    ] {
        let file = mount.join("control").join(operation);
        assert_eq!(errno(std::fs::write(&file, line)), Errno::EINVAL as i32, "{line}");
        let why = std::fs::read_to_string(&file).unwrap();
        assert!(why.lines().next().unwrap().ends_with(": give an absolute path"), "{why}");
    }
    assert!(names(mount.join("control/jobs")).is_empty());
    assert_eq!(commit.metadata().unwrap().size(), 0);
    let output = sandbox.try_sh("echo 'a b' > mnt/control/commit");
    assert!(text(&output).contains("Invalid argument"), "{}", text(&output));
    mount.unmount();
}

#[test]
fn the_rest_of_an_open_line_is_refused() {
    if !can_mount(&["bash"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    // As `dd bs=4k` cuts a file without a line feed.
    let output = sandbox.try_sh(
        "head -c 20000 /dev/zero | tr '\\0' a | dd of=mnt/control/verify bs=4k conv=notrunc",
    );
    assert!(text(&output).contains("Invalid argument"), "{}", text(&output));
    assert_eq!(names(mount.join("control/jobs")).len(), 2, "one and the link to it");
    let output = sandbox.try_sh("exec 3<>mnt/control/verify; echo latest >&3; echo latest >&3");
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(names(mount.join("control/jobs")).len(), 4);
    mount.unmount();
}

#[test]
fn the_link_to_the_newest_job_is_never_stale_and_rm_forgets() {
    if !can_mount(&[]) {
        return;
    }
    let (sandbox, mount) = mounted();
    let last = mount.join("control/jobs/last");
    for job in 1..=5 {
        std::fs::write(mount.join("control/commit"), "none.img").unwrap();
        assert_eq!(std::fs::read_link(&last).unwrap().to_str(), Some(&job.to_string()[..]));
        ended(&mount, job);
    }
    sandbox.sh("rm -r mnt/control/jobs/5 mnt/control/jobs/2");
    assert_eq!(names(mount.join("control/jobs")), ["1", "3", "4", "last"]);
    assert_eq!(std::fs::read_link(&last).unwrap().to_str(), Some("4"));
    std::fs::write(mount.join("control/jobs/3/cancel"), "x").unwrap();
    assert_eq!(ended(&mount, 3), "failed 1\n");
    sandbox.sh("rm -rf mnt/control/jobs/*");
    assert!(names(mount.join("control/jobs")).is_empty());
    mount.unmount();
}

#[test]
fn the_commands_ask_the_mount() {
    if !can_mount(&[]) {
        return;
    }
    let (sandbox, mount) = mounted();
    assert_eq!(sandbox.ok(&["jobs", "mnt"]).trim(), "JOB  STATE  BLOCKS  COMMAND");
    std::fs::write(mount.join("control/commit"), "'no such.img'").unwrap();
    ended(&mount, 1);
    let jobs = sandbox.ok(&["jobs", "mnt"]);
    assert!(jobs.contains("1    failed 1  -       commit 'no such.img'"), "{jobs}");
    let jobs: serde_json::Value =
        serde_json::from_str(&sandbox.ok(&["jobs", "mnt", "--json"])).unwrap();
    assert_eq!((&jobs[0]["number"], &jobs[0]["exit_code"]), (&1.into(), &1.into()));
    let message = sandbox.fails(&["jobs", "mnt", "--wait", "1"]);
    assert!(message.contains("no such.img"), "{message}");
    let message = sandbox.fails(&["jobs", "mnt", "--wait", "7"]);
    assert!(message.contains("no job 7"), "{message}");
    let message = sandbox.fails(&["jobs", "store"]);
    assert!(message.contains("is not the mount point"), "{message}");
    std::fs::write(sandbox.join("x.img"), "").unwrap();
    let message = sandbox.fails(&["commit", "x.img"]);
    assert!(message.contains("not in a mount of fspfs") && message.contains("mnt"), "{message}");
    let message = sandbox.fails(&["clone", "snap-0", "mnt/x.img"]);
    assert!(message.contains("mnt/new"), "{message}");
    mount.unmount();
}

/// Starts a job, waits for it, and gives its exit code and its result.
fn job(sandbox: &Sandbox, mount: &Mount, operation: &str, line: &str) -> (String, String) {
    let line = shlex::try_quote(line).unwrap();
    let script = format!("exec 3<>mnt/control/{operation}; printf '%s\\n' {line} >&3; cat <&3");
    let number: u64 = sandbox
        .sh(&format!("bash -c {}", shlex::try_quote(&script).unwrap()))
        .trim()
        .parse()
        .unwrap();
    let state = ended(mount, number);
    (state, sandbox.sh(&format!("cat mnt/control/jobs/{number}/result")))
}

/// The operations that a mount takes lines for.
fn operations(mount: &Mount) -> Vec<String> {
    let texts = ["README", "metrics", "pid", "damaged", "jobs"];
    let mut operations = names(mount.join("control"));
    operations.retain(|name| !texts.contains(&&name[..]));
    operations
}

/// What was printed, without what differs from run to run: times, rates, and the ids of new snapshots.
fn timeless(printed: &str, known: &[&str]) -> String {
    let is_part = |c: char| c.is_ascii_alphanumeric() || ".:-".contains(c);
    let words = printed.split_inclusive(|c: char| !is_part(c)).map(|word| {
        let (word, end) = word.split_at(word.trim_end_matches(|c: char| !is_part(c)).len());
        let is_time = word.starts_with(|c: char| c.is_ascii_digit()) && word.contains(['.', ':']);
        let shown = match word {
            _ if is_time => "TIME",
            word if word.starts_with("snap-") && !known.contains(&word) => "snap-NEW",
            word => word,
        };
        format!("{shown}{end}")
    });
    words.collect()
}

#[test]
fn every_operation_has_the_same_result_as_a_command_and_as_a_job() {
    if !can_mount(&["bash"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    for store in ["other", "third"] {
        sandbox.ok(&["init", store]);
    }
    sandbox.image("a.img", 3 << 20, &[(0, 1 << 20)]);
    let id = &sandbox.upload("a.img", &[])[..];
    let base = sandbox.ok(&["copy", "-q", id]);
    let base = base.trim_end();
    sandbox.image("b.img", 3 << 20, &[(0, 1 << 20), (2 << 20, 4096)]);
    let child = &sandbox.upload("b.img", &["--parent-snapshot-id", id])[..];
    let doomed: Vec<_> = (0..6).map(|_| sandbox.upload("a.img", &[])).collect();
    let known = [id, base, child, "snap-0123456789abcdef0"];
    let mount = sandbox.mount(&["--commit", "manual"]);
    sandbox.sh("for n in 0 1 2 3; do cp a.img mnt/new/w$n.img; cp a.img delta$n.img; done");
    let at = sandbox.path.display();
    // What is asked as a command, and as a job; each of which may need things of its own. Then the exit code.
    let same = |line: String, code: i32| ([line.clone(), line], code);
    let each = |line: &dyn Fn(usize) -> String, code: i32| ([line(0), line(1)], code);
    let cases = [
        same(format!("diff {id} {child}"), 0),
        same(format!("diff --json {child} {id}"), 0),
        same(format!("diff --extents {id} {child}"), 0),
        same(format!("diff {id} snap-0123456789abcdef0"), 1),
        same("verify".to_owned(), 0),
        same(format!("verify --json {id}"), 0),
        same(format!("verify -q {child} --against {at}/b.img"), 0),
        same(format!("verify {child} --against {at}/a.img"), 1),
        same(format!("upload --name b {at}/b.img"), 0),
        same(format!("upload --json {at}/b.img --parent-snapshot-id {id}"), 0),
        same(format!("upload {at}/none.img"), 1),
        same(format!("download {id} {at}/out.img"), 0),
        same(format!("download --json {id} {at}/out.img"), 0),
        same(format!("download -q snap-0123456789abcdef0 {at}/none.img"), 1),
        same(format!("multiclone {child} {at}/1.img {at}/2.img"), 0),
        same(format!("multiclone --json {child} {at}/1.img {at}/none/2.img"), 3),
        same(format!("multiclone --dry-run {child} {at}/1.img"), 0),
        same(format!("multiclone {child} {at}/none/1.img"), 1),
        same(format!("copy {id} --to {at}/other"), 0),
        same(format!("copy --json {child} --to {at}/other"), 0),
        same(format!("copy -q {id}"), 0),
        same(format!("copy --dry-run {child} --to {at}/other"), 0),
        same(format!("copy {id} --to {at}/none"), 1),
        same(format!("sync {id} {child} {base}"), 0),
        same(format!("sync --json {id} {child} {base}"), 0),
        same(format!("sync {child} {id} {base}"), 1),
        each(&|n| format!("deltadownload {id} {child} {at}/delta{n}.img"), 0),
        each(&|n| format!("deltadownload --json {id} {child} {at}/delta{}.img", 2 + n), 0),
        same(format!("deltadownload {id} {child} {at}/none.img"), 1),
        same(format!("fanout {at}/b.img {at}/other {at}/third"), 0),
        same(format!("fanout --json {at}/b.img {at}/other {at}/none"), 3),
        same(format!("fanout {at}/b.img {at}/none"), 1),
        // tests/bucket.rs has them with a bucket.
        same("movetos3 snap-0123456789abcdef0 bucket/x".to_owned(), 1),
        same("getfroms3 latest bucket/x?endpoint=http://127.0.0.1:9".to_owned(), 1),
        each(&|n| format!("delete --yes {}", doomed[n]), 0),
        each(&|n| format!("delete --yes --json {} snap-0123456789abcdef0", doomed[2 + n]), 3),
        same(format!("delete --yes --dry-run {id}"), 0),
        same("delete --yes -q snap-0123456789abcdef0".to_owned(), 1),
        same("gc".to_owned(), 0),
        same("gc --dry-run --json".to_owned(), 0),
        same("gc --grace 2h -q".to_owned(), 0),
        each(&|n| format!("commit {at}/mnt/new/w{n}.img"), 0),
        each(&|n| format!("commit --json --wait {at}/mnt/new/w{}.img", 2 + n), 0),
        same(format!("commit {at}/mnt/new/none.img"), 1),
        each(&|n| format!("clone {id} {at}/mnt/new/c{n}.img"), 0),
        each(&|n| format!("clone --json {id} {at}/mnt/new/d{n}.img"), 0),
        same(format!("clone {id} {at}/mnt/new/c0.img"), 1),
    ];
    for ([command, line], code) in &cases {
        let output = support::run(sandbox.fspfs().args(command.split(' ')));
        assert_eq!(output.status.code(), Some(*code), "{command}: {}", text(&output));
        let printed = String::from_utf8(output.stdout).unwrap();
        let (operation, words) = line.split_once(' ').unwrap_or((line, ""));
        let (state, result) = job(&sandbox, &mount, operation, words);
        let wanted = if *code == 0 { "done 0\n".to_owned() } else { format!("failed {code}\n") };
        assert_eq!(state, wanted, "{line}: {}", sandbox.sh("cat mnt/control/jobs/last/log"));
        let words = command.split(' ').zip(line.split(' ')).filter(|(a, b)| a != b);
        let result = words.fold(result, |result, (a, b)| result.replace(b, a));
        assert_eq!(timeless(&result, &known), timeless(&printed, &known), "{line}");
    }
    let with_buckets = ["movetos3", "getfroms3"];
    for operation in operations(&mount).into_iter().filter(|op| !with_buckets.contains(&&op[..])) {
        let begins =
            |(lines, _): &([String; 2], i32)| lines[1].split(' ').next() == Some(&operation[..]);
        let codes: Vec<_> =
            cases.iter().filter(|case| begins(case)).map(|(_, code)| *code).collect();
        assert!(codes.contains(&0), "{operation} is not among them");
    }
    for file in ["out.img", "mnt/new/c1.img", "mnt/new/d1.img", "mnt/new/w1.img"] {
        assert!(support::same(sandbox.join("a.img"), sandbox.join(file)), "{file}");
    }
    for file in ["1.img", "2.img", "delta0.img", "delta1.img", "delta3.img"] {
        assert!(support::same(sandbox.join("b.img"), sandbox.join(file)), "{file}");
    }
    // 3 at first, and what each way has made: 2 uploads, a copy within the store, 2 commits, 2 of `sync`.
    assert_eq!(sandbox.ok(&["-q", "list"]).lines().count(), 3 + doomed.len() - 4 + 2 * 7);
    for (store, made) in [("other", 2 * 4), ("third", 2)] {
        assert_eq!(sandbox.ok(&["-s", store, "-q", "list"]).lines().count(), made);
    }
    mount.unmount();
}

#[test]
fn a_job_refuses_what_would_harm_the_mount() {
    if !can_mount(&["bash"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    sandbox.image("a.img", 1 << 20, &[(0, 4096)]);
    let id = sandbox.ok(&["upload", "-q", "a.img"]).trim().to_owned();
    std::os::unix::fs::symlink(sandbox.join("mnt/new"), sandbox.join("link")).unwrap();
    for (operation, line, says) in [
        ("download", format!("{id} {}", sandbox.join("mnt/new/x.img").display()), "in this mount"),
        ("download", format!("{id} {}", sandbox.join("link/x.img").display()), "in this mount"),
        ("download", format!("{id} {}", sandbox.join("store/x.img").display()), "the store itself"),
        ("upload", sandbox.join(format!("mnt/{id}.img")).display().to_string(), "in this mount"),
        ("delete", id.clone(), "--yes"),
    ] {
        let (state, result) = job(&sandbox, &mount, operation, &line);
        let log = sandbox.sh("cat mnt/control/jobs/last/log");
        assert_eq!((&state[..], &result[..]), ("failed 1\n", ""), "{line}: {log}");
        assert!(log.contains(says), "{line}: {log}");
    }
    assert_eq!(sandbox.ok(&["list", "-q"]).trim(), id);
    mount.unmount();
}

#[test]
fn jobs_are_there_at_the_next_mount() {
    if !can_mount(&[]) {
        return;
    }
    let (sandbox, mount) = mounted();
    sandbox.image("a.img", 1 << 20, &[(0, 4096)]);
    let file = sandbox.join("a.img");
    std::fs::write(mount.join("control/upload"), format!("-q {}\n", file.display())).unwrap();
    assert_eq!(ended(&mount, 1), "done 0\n");
    std::fs::write(mount.join("control/commit"), "none.img\n").unwrap();
    assert_eq!(ended(&mount, 2), "failed 1\n");
    let files =
        || sandbox.sh("cd mnt/control/jobs; ls -l --full-time 1/; head */[c-s][oret][mgsa]*");
    let (shown, listed) = (files(), sandbox.ok(&["jobs", "mnt", "--json"]));
    mount.unmount();
    let mount = sandbox.mount(&["--read-only"]);
    assert_eq!((files(), sandbox.ok(&["jobs", "mnt", "--json"])), (shown, listed));
    sandbox.sh("rm -r mnt/control/jobs/2");
    mount.unmount();
    let mount = sandbox.mount(&[]);
    assert_eq!(names(mount.join("control/jobs")), ["1", "last"]);
    std::fs::write(mount.join("control/gc"), "--dry-run\n").unwrap();
    assert_eq!(names(mount.join("control/jobs")), ["1", "3", "last"]);
    mount.unmount();
}

#[test]
fn a_job_whose_mount_was_killed_is_interrupted() {
    if !can_mount(&["fsfreeze", "mkfs.ext4"]) {
        return;
    }
    let (sandbox, disk) = Disk::with_store(64 << 20);
    let mut mount = sandbox.mount(&["--commit", "manual"]);
    sandbox.image("a.img", 1 << 20, &[(0, 4096)]);
    sandbox.sh("cp a.img mnt/new/");
    let frozen = disk.freeze();
    std::fs::write(mount.join("control/commit"), "a.img\n").unwrap();
    until("it is kept", || sandbox.try_sh("cat state/fspfs/jobs/*/1").status.success());
    mount.signal(nix::sys::signal::SIGKILL);
    drop(frozen);
    mount.daemon.wait().unwrap();
    drop(mount);
    let mount = sandbox.mount(&[]);
    // What goes on is another job.
    ended(&mount, 2);
    assert_eq!(said(&sandbox, 2), ["commit a.img", "done 0", &mount.committed("a.img")]);
    assert_eq!(sandbox.sh("cat mnt/control/jobs/1/state"), "interrupted 1\n");
    assert_eq!(sandbox.sh("cat mnt/control/jobs/1/command"), "commit a.img\n");
    let said = sandbox.fails(&["jobs", "mnt", "--wait", "1"]);
    assert!(said.contains("the mount ended before the job did"), "{said}");
    mount.unmount();
}

/// What the directory of a job says of it.
fn said(sandbox: &Sandbox, job: u64) -> [String; 3] {
    ["command", "state", "result"]
        .map(|file| sandbox.sh(&format!("cat mnt/control/jobs/{job}/{file}")).trim().to_owned())
}

#[test]
fn a_commit_by_close_is_a_job_and_one_by_name_is_one_job() {
    if !can_mount(&["cp", "mv"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    sandbox.image("a.img", 5 << 20, &[(0, 4 << 20)]);
    sandbox.sh("cp a.img 'mnt/new/a b.img'");
    ended(&mount, 1);
    let id = mount.committed("a b.img");
    assert_eq!(said(&sandbox, 1), ["commit 'a b.img'", "done 0", &id]);
    assert_eq!(
        sandbox.sh("cat mnt/control/jobs/last/progress mnt/control/jobs/1/log"),
        "2048/2048\n"
    );
    // There is nothing more to commit, which is a job of its own with the same result.
    assert_eq!(sandbox.ok(&["commit", "mnt/new/a b.img"]).trim(), id);
    assert_eq!(said(&sandbox, 2)[1..], ["done 0".to_owned(), id]);
    // Renaming commits, and so does the end of a loop device.
    sandbox.sh("cp a.img mnt/new/b.part; mv mnt/new/b.part mnt/new/b.img");
    ended(&mount, 3);
    assert_eq!(said(&sandbox, 3), ["commit b.img", "done 0", &mount.committed("b.img")]);
    mount.unmount();

    let mount = sandbox.mount(&["--commit", "manual"]);
    sandbox.sh("cp a.img mnt/new/c.img");
    let id = sandbox.ok(&["commit", "mnt/new/c.img"]);
    assert_eq!(said(&sandbox, 4), ["commit -- c.img", "done 0", id.trim()]);
    assert_eq!(names(mount.join("control/jobs")), ["1", "2", "3", "4", "last"]);
    mount.unmount();
}

#[test]
fn the_job_of_a_commit_by_close_cancels_it() {
    if !can_mount(&["cp", "fsfreeze", "mkfs.ext4"]) {
        return;
    }
    let (sandbox, disk) = Disk::with_store(64 << 20);
    let mount = sandbox.mount(&[]);
    sandbox.image("a.img", 1 << 20, &[(0, 4096)]);
    // Should the test fail, what it waits for goes on before it is waited for.
    let cp;
    let frozen = disk.freeze();
    cp = sandbox.start("exec cp a.img mnt/new/a.img");
    until("it is committed", || mount.join("control/jobs/1").exists());
    // One by name waits for the same commit.
    std::fs::write(mount.join("control/commit"), "a.img\n").unwrap();
    let jobs = sandbox.ok(&["jobs", "mnt"]);
    assert!(jobs.contains("\n1    running  ") && jobs.contains("\n2    running  "), "{jobs}");
    std::fs::write(mount.join("control/jobs/1/cancel"), "x").unwrap();
    drop(frozen);
    assert!(!cp.ends().status.success());
    assert_eq!(ended(&mount, 1), "cancelled 1\n");
    assert!(ended(&mount, 2).contains(" 1"));
    assert_eq!(mount.state("a.img"), "interrupted");
    assert!(sandbox.sh("cat mnt/control/jobs/1/log").contains("cannot commit a.img: "));
    mount.unmount();
}

#[test]
fn more_files_than_jobs_may_run_are_closed_at_once() {
    if !can_mount(&["cp", "fsfreeze", "mkfs.ext4"]) {
        return;
    }
    let (sandbox, disk) = Disk::with_store(64 << 20);
    let mount = sandbox.mount(&[]);
    sandbox.image("a.img", 1 << 20, &[(0, 4096)]);
    let mut copies = Vec::new();
    let frozen = disk.freeze();
    copies.extend((0..70).map(|n| sandbox.start(&format!("exec cp a.img mnt/new/{n}.img"))));
    until("all are closed", || names(mount.join("control/jobs")).len() == 71);
    // They take no room from the others.
    std::fs::write(mount.join("control/commit"), "none.img\n").unwrap();
    assert_eq!(ended(&mount, 71), "failed 1\n");
    drop(frozen);
    for cp in copies {
        assert!(cp.ends().status.success());
    }
    let log = mount.unmount();
    let mount = sandbox.mount(&[]);
    let jobs = sandbox.ok(&["jobs", "mnt"]);
    assert_eq!(jobs.matches(" done ").count(), 70, "{jobs}{log}");
    mount.unmount();
}

#[test]
fn a_full_disk_takes_the_history_and_nothing_else() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let small = sandbox.join("small");
    let _disk = FileSystem::mount("none".as_ref(), "tmpfs", "size=64k", small.clone());
    sandbox.image("a.img", 1 << 20, &[(0, 4096)]);
    let id = sandbox.ok(&["upload", "-q", "a.img"]).trim().to_owned();
    let mut fspfs = sandbox.fspfs();
    fspfs.env("XDG_STATE_HOME", small);
    let mount = Mount::new(&sandbox, fspfs, &["--staging", sandbox.join("s").to_str().unwrap()]);
    sandbox.try_sh("cat /dev/zero > small/full");
    for number in 1..=3 {
        std::fs::write(mount.join("control/diff"), format!("{id} {id}\n")).unwrap();
        assert_eq!(ended(&mount, number), "done 0\n");
    }
    let log = mount.unmount();
    assert_eq!(log.matches("jobs are forgotten when this is unmounted").count(), 1, "{log}");
}

#[test]
fn the_readme_and_the_directory_have_every_operation() {
    if !can_mount(&[]) {
        return;
    }
    let (_sandbox, mount) = mounted();
    let readme = std::fs::read_to_string(mount.join("control/README")).unwrap();
    let help = String::from_utf8(
        std::process::Command::new(env!("CARGO_BIN_EXE_fspfs"))
            .arg("--help")
            .output()
            .unwrap()
            .stdout,
    );
    let help = help.unwrap();
    assert!(readme.contains("\n  jobs/ "), "{readme}");
    let operations = operations(&mount);
    for name in &operations {
        assert!(readme.contains(&format!("\n  {name} ")), "{name}: {readme}");
        assert!(help.contains(&format!("\n  {name} ")), "{name}: {help}");
    }
    assert!(operations.len() >= 8, "{operations:?}");
    mount.unmount();
}
