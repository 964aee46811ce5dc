//! Uploads of what comes on stdin.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::Write as _;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use support::{
    BLOCK, GIB, PATIENCE, Sandbox, can_mount, has, names, pattern, run, same, text, until,
};

/// Sends bytes to an upload of stdin, in pieces, and waits for its end.
fn send(sandbox: &Sandbox, options: &[&str], bytes: &[u8]) -> Output {
    let mut child = begin(sandbox, options);
    let mut stdin = child.stdin.take().unwrap();
    let bytes = bytes.to_vec();
    let sender = std::thread::spawn(move || {
        // It may have had enough.
        let _ = bytes.chunks(100_003).try_for_each(|piece| stdin.write_all(piece));
    });
    let ended = support::wait(&mut child, PATIENCE);
    if ended.is_none() {
        child.kill().unwrap();
    }
    sender.join().unwrap();
    assert!(ended.is_some(), "it does not end");
    child.wait_with_output().unwrap()
}

fn begin(sandbox: &Sandbox, options: &[&str]) -> Child {
    let mut command = sandbox.fspfs();
    command.env("TMPDIR", sandbox.join("tmp")).args(["upload", "-"]).args(options);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn sandbox() -> Sandbox {
    let sandbox = Sandbox::with_store();
    std::fs::create_dir(sandbox.join("tmp")).unwrap();
    sandbox
}

#[track_caller]
fn id(output: &Output) -> String {
    assert!(output.status.success(), "{}", text(output));
    String::from_utf8_lossy(&output.stdout).lines().last().unwrap().to_owned()
}

#[track_caller]
fn fails(output: &Output, why: &str) {
    assert_eq!(output.status.code(), Some(1), "{}", text(output));
    assert!(text(output).contains(why), "{}", text(output));
}

#[track_caller]
fn assert_nothing_is_left(sandbox: &Sandbox) {
    assert_eq!(sandbox.ok(&["list", "--json"]).trim(), "[]");
    assert_no_file_is_left(sandbox);
}

#[track_caller]
fn assert_no_file_is_left(sandbox: &Sandbox) {
    assert!(names(sandbox.join("tmp")).is_empty());
    let journals = sandbox.join("state/fspfs/transfers");
    assert!(!journals.exists() || names(journals).is_empty());
}

#[rstest]
fn an_image_on_stdin_becomes_a_snapshot(
    #[values(1, BLOCK - 1, BLOCK, BLOCK + 1, 63 * BLOCK, 64 * BLOCK, 65 * BLOCK - 1, 130 * BLOCK + 5)]
    len: u64,
) {
    let sandbox = sandbox();
    let bytes = pattern(0, len as usize);
    std::fs::write(sandbox.join("image"), &bytes).unwrap();
    let (exactly, more) = (format!("{len}"), format!("{}", len + 3 * BLOCK));
    for size in [None, Some(&exactly), Some(&more)] {
        let options: Vec<&str> = size.into_iter().flat_map(|size| ["--size", size]).collect();
        let sent = send(&sandbox, &options, &bytes);
        sandbox.ok(&["download", &id(&sent), "copy"]);
        let copy = std::fs::File::options().write(true).open(sandbox.join("copy")).unwrap();
        let whole = size.map_or(len, |size| size.parse().unwrap());
        assert_eq!(copy.metadata().unwrap().len(), whole);
        let copied = std::fs::read(sandbox.join("copy")).unwrap();
        assert!(copied[len as usize..].iter().all(|&byte| byte == 0), "it does not end in a hole");
        copy.set_len(len).unwrap();
        assert!(same(sandbox.join("image"), sandbox.join("copy")), "{size:?}");
        std::fs::remove_file(sandbox.join("copy")).unwrap();
        assert_no_file_is_left(&sandbox);
    }
}

#[test]
fn a_stream_is_called_stdin_and_sized_as_asked_for() {
    let sandbox = sandbox();
    let sent = send(&sandbox, &["--size", "3GiB", "--name", "db"], b"x");
    let list: serde_json::Value = serde_json::from_str(&sandbox.ok(&["list", "--json"])).unwrap();
    let snapshot = &list[0];
    assert_eq!(snapshot["id"], id(&sent));
    assert_eq!(snapshot["volume_size_gib"].as_u64(), Some(3), "{snapshot}");
    assert_eq!(snapshot["description"], "Uploaded by fspfs from stdin", "{snapshot}");
    let said = text(&sent);
    assert!(said.contains("Size of stdin is at most 3221225472 bytes and 6144 chunks"), "{said}");
    let staged = text(&send(&sandbox, &[], b"x"));
    assert!(staged.contains("Size of stdin is 1 bytes and 1 chunks"), "{staged}");
}

#[rstest]
fn zeros_of_a_stream_are_left_out_unless_all_is_wanted(#[values(true, false)] sized: bool) {
    let sandbox = sandbox();
    let mut bytes = vec![0; 10 * BLOCK as usize];
    bytes[4 * BLOCK as usize + 9] = 1;
    let size: &[&str] = if sized { &["--size", "1GiB"] } else { &[] };
    let put = |options: &[&str], count: u64| {
        let said = text(&send(&sandbox, &[size, options].concat(), &bytes));
        assert!(said.contains(&format!("Total chunks uploaded {count}\n")), "{said}");
    };
    put(&[], 1);
    put(&["--full-copy"], 10);
}

#[test]
fn a_stream_can_be_the_child_of_a_snapshot() {
    let sandbox = sandbox();
    let mut bytes = pattern(0, 20 * BLOCK as usize);
    let parent = id(&send(&sandbox, &["--size", "1GiB"], &bytes));
    bytes[3 * BLOCK as usize..4 * BLOCK as usize].fill(0);
    bytes.truncate(17 * BLOCK as usize);
    let sent = send(&sandbox, &["--size", "1GiB", "--parent", &parent], &bytes);
    // One is zeros now, and three are in the hole.
    assert!(text(&sent).contains("Total chunks uploaded 4\n"), "{}", text(&sent));
    sandbox.ok(&["download", &id(&sent), "copy"]);
    bytes.resize(GIB as usize, 0);
    std::fs::write(sandbox.join("image"), &bytes).unwrap();
    assert!(same(sandbox.join("image"), sandbox.join("copy")));
}

#[test]
fn a_stream_that_is_too_long_or_empty_makes_no_snapshot() {
    let sandbox = sandbox();
    let bytes = pattern(0, 70 * BLOCK as usize);
    for size in [1, BLOCK, 5 * BLOCK + 7, 64 * BLOCK, 70 * BLOCK - 1] {
        let sent = send(&sandbox, &["--size", &size.to_string()], &bytes);
        fails(&sent, &format!("it is longer than --size, {size} bytes"));
        assert_nothing_is_left(&sandbox);
    }
    fails(&send(&sandbox, &["--size", "1GiB"], b""), "stdin: nothing has come");
    assert_nothing_is_left(&sandbox);
    fails(&send(&sandbox, &[], b""), "it is empty");
    assert_nothing_is_left(&sandbox);
}

#[rstest]
fn a_signal_ends_the_waiting_for_stdin(
    #[values(Signal::SIGINT, Signal::SIGTERM)] signal: Signal,
    #[values(true, false)] sized: bool,
) {
    let sandbox = sandbox();
    let options: &[&str] = if sized { &["--size", "1GiB"] } else { &[] };
    let mut child = begin(&sandbox, options);
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&pattern(0, 20 * BLOCK as usize)).unwrap();
    if sized {
        until("it is begun", || sandbox.ok(&["list"]).contains("pending"));
    }
    let began = Instant::now();
    kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
    let ended = support::wait(&mut child, Duration::from_secs(5));
    if ended.is_none() {
        child.kill().unwrap();
    }
    let output = child.wait_with_output().unwrap();
    assert!(ended.is_some(), "after {:?}: {}", began.elapsed(), text(&output));
    fails(&output, &format!("interrupted by {signal}"));
    assert!(!text(&output).contains("goes on"), "{}", text(&output));
    assert_nothing_is_left(&sandbox);
}

#[test]
fn a_killed_upload_leaves_no_staged_file() {
    let sandbox = sandbox();
    let mut child = begin(&sandbox, &[]);
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&pattern(0, 20 * BLOCK as usize)).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_nothing_is_left(&sandbox);
}

#[test]
fn a_stream_that_ends_early_is_a_snapshot_of_what_came() {
    let sandbox = sandbox();
    let mut sender = Command::new("sh");
    sender.args(["-c", "head -c 700000 /dev/zero | tr '\\0' x; kill -9 $$"]);
    let mut sender = sender.stdout(Stdio::piped()).spawn().unwrap();
    let mut upload = sandbox.fspfs();
    upload.args(["upload", "--size", "1000000", "-"]).stdin(sender.stdout.take().unwrap());
    let output = run(&mut upload);
    sender.wait().unwrap();
    sandbox.ok(&["download", &id(&output), "copy"]);
    let copied = std::fs::read(sandbox.join("copy")).unwrap();
    let (came, hole) = copied.split_at(700_000);
    assert!(came.iter().all(|&byte| byte == b'x') && hole.iter().all(|&byte| byte == 0));
    assert_eq!(copied.len(), 1_000_000);
}

#[rstest]
fn a_stream_that_cannot_be_read_makes_no_snapshot(#[values(true, false)] sized: bool) {
    let sandbox = sandbox();
    let size = if sized { "--size 1GiB" } else { "" };
    let program = env!("CARGO_BIN_EXE_fspfs");
    let output = sandbox.try_sh(&format!(
        "TMPDIR=tmp XDG_STATE_HOME=$PWD/state {program} -s store upload {size} - < ."
    ));
    fails(&output, "Is a directory");
    assert_nothing_is_left(&sandbox);
}

#[test]
fn stdin_that_is_a_terminal_is_refused() {
    if !has(&["script"]) {
        return;
    }
    let sandbox = sandbox();
    let program = env!("CARGO_BIN_EXE_fspfs");
    for size in ["", "--size 1GiB"] {
        let command = format!("{program} -s store upload {size} -");
        let output = sandbox.try_sh(&format!("script -qec '{command}' /dev/null < /dev/null"));
        fails(&output, "stdin is a terminal");
    }
    assert_nothing_is_left(&sandbox);
}

#[test]
fn options_that_do_not_go_with_stdin_are_refused() {
    let sandbox = sandbox();
    std::fs::write(sandbox.join("image"), "x").unwrap();
    let message = sandbox.fails(&["upload", "--size", "1GiB", "image"]);
    assert!(message.contains("--size is for what comes on stdin"), "{message}");
    for (options, says) in [
        (&["--size", "0B"][..], "--size: it is empty"),
        (&["--size", "65TiB"], "--size: it is larger than 64 TiB"),
        (&["--suppress-writes"], "give --size"),
        (&["--dry-run"], "give --size"),
    ] {
        fails(&send(&sandbox, options, b"x"), says);
    }
    let sent = send(&sandbox, &["--dry-run", "--size", "1GiB"], b"x");
    assert!(text(&sent).contains("at most 2048 blocks would be read"), "{}", text(&sent));
    assert_nothing_is_left(&sandbox);
}

#[test]
fn a_full_disk_for_staging_is_told_with_its_cure() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = sandbox();
    let small = sandbox.join("tmp");
    let _small =
        support::FileSystem::mount(std::path::Path::new("none"), "tmpfs", "size=2m", small);
    let sent = send(&sandbox, &[], &pattern(0, 10 * BLOCK as usize));
    fails(&sent, "TMPDIR names another place");
    assert!(text(&sent).contains("No space left on device"), "{}", text(&sent));
    assert_nothing_is_left(&sandbox);
    // Nothing but data takes room there, and with --size nothing does.
    id(&send(&sandbox, &[], &vec![0; 10 * BLOCK as usize]));
    id(&send(&sandbox, &["--size", "1GiB"], &pattern(0, 10 * BLOCK as usize)));
}
