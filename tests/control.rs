//! Control files and jobs, through a mount, as shells and programs use them.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::MetadataExt as _;

use nix::errno::Errno;
use support::{Mount, Sandbox, can_mount, errno, names, text, until};

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
    assert!(names(mount.join("control/jobs")).is_empty());
    assert_eq!(commit.metadata().unwrap().size(), 0);
    let output = sandbox.try_sh("echo 'a b' > mnt/control/commit");
    assert!(text(&output).contains("Invalid argument"), "{}", text(&output));
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

#[test]
fn an_operation_has_the_same_result_as_a_command_and_as_a_job() {
    if !can_mount(&["bash"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.image("a.img", 3 << 20, &[(0, 1 << 20)]);
    let id = sandbox.ok(&["upload", "-q", "a.img"]).trim().to_owned();
    sandbox.image("b.img", 3 << 20, &[(0, 1 << 20), (2 << 20, 4096)]);
    let child = sandbox.ok(&["upload", "-q", "b.img", "--parent-snapshot-id", &id]);
    let child = child.trim();
    let mount = sandbox.mount(&[]);
    for line in [
        format!("diff --json {id} {child}"),
        format!("diff --extents {id} {child}"),
        "verify --json".to_owned(),
        "gc --dry-run".to_owned(),
        format!("download -q {id} {}", sandbox.join("out.img").display()),
        format!("delete -q --yes {child}"),
    ] {
        let words: Vec<_> = line.split(' ').collect();
        let (state, result) = job(&sandbox, &mount, words[0], &words[1..].join(" "));
        assert_eq!(state, "done 0\n", "{line}: {}", sandbox.sh("cat mnt/control/jobs/last/log"));
        if words[0] == "delete" {
            assert_eq!(result.trim(), child);
        } else {
            assert_eq!(result, sandbox.ok(&words), "{line}");
        }
    }
    assert!(support::same(sandbox.join("out.img"), sandbox.join("a.img")));
    let file = sandbox.join("b.img");
    let (state, made) = job(&sandbox, &mount, "upload", &format!("-q --name b {}", file.display()));
    assert_eq!(state, "done 0\n");
    sandbox.assert_holds(made.trim(), "b.img");
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
        ("download", format!("{id} out.img"), "absolute path"),
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
    let mut operations = 0;
    for name in names(mount.join("control")) {
        let is_text = ["README", "metrics", "pid", "damaged", "jobs"].contains(&&name[..]);
        if !is_text {
            operations += 1;
            assert!(readme.contains(&format!("\n  {name} ")), "{name}: {readme}");
            assert!(help.contains(&format!("\n  {name} ")), "{name}: {help}");
        }
    }
    assert!(operations >= 8, "{operations}");
    mount.unmount();
}
