//! Snapshots that are copied from one store to another, and within one.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::unix::fs::FileExt as _;
use std::process::{Child, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use serde_json::Value;
use support::{BLOCK, GIB, MIB, PATIENCE, Sandbox, run, text, wait, write_pattern};

const RUNS: [(u64, u64); 3] = [(0, 3 * BLOCK), (5 * MIB, 10), (90 * MIB + 7, 20 * BLOCK)];
const LENGTH: u64 = 200 * MIB + 1234;

/// A sandbox with a second repository, `other`.
fn two_stores() -> Sandbox {
    let sandbox = Sandbox::with_store();
    sandbox.ok(&["init", "other"]);
    sandbox
}

/// Copies a snapshot: the id of the copy, and all that is said.
#[track_caller]
fn copy(sandbox: &Sandbox, arguments: &[&str]) -> (String, String) {
    let output = run(sandbox.fspfs().arg("copy").args(arguments));
    let said = text(&output);
    assert!(output.status.success(), "{arguments:?}: {said}");
    let printed = String::from_utf8(output.stdout).unwrap();
    (printed.lines().last().unwrap().to_owned(), said)
}

#[test]
fn a_snapshot_goes_to_another_repository_and_back() {
    let sandbox = two_stores();
    sandbox.image("a.img", LENGTH, &RUNS);
    let file = std::fs::File::options().write(true).open(sandbox.join("a.img")).unwrap();
    support::write_zeros(&file, 20 * MIB, 2 * BLOCK);
    let id = sandbox.upload("a.img", &["--full-copy"]);
    let (there, said) = copy(&sandbox, &[&id, "--to", "other"]);
    assert_ne!(there, id);
    let contains = format!("Snapshot {id} contains ");
    assert!(said.contains(&contains) && said.contains("copy took "), "{said}");
    sandbox.assert_holds_in("other", &there, "a.img");
    // Zeros are no data of a snapshot without a parent, unless they are wanted.
    assert_eq!(sandbox.described_in("other", &there)["zero_blocks"], 0);
    let (full, _) = copy(&sandbox, &[&id, "--to", "other", "--full-copy"]);
    let zeros = sandbox.described_in("store", &id)["zero_blocks"].clone();
    assert!(zeros.as_u64() >= Some(2), "{zeros}");
    assert_eq!(sandbox.described_in("other", &full)["zero_blocks"], zeros);
    let store = sandbox.join("store");
    let (back, _) = copy(&sandbox, &["-s", "other", &there, "--to", store.to_str().unwrap()]);
    sandbox.assert_holds_in("store", &back, "a.img");
    assert_eq!(
        sandbox.described_in("store", &back)["content_digest"],
        sandbox.described_in("store", &id)["content_digest"]
    );
    sandbox.assert_no_journal_is_left();
}

#[test]
fn a_snapshot_is_copied_within_its_store() {
    let sandbox = Sandbox::with_store();
    sandbox.image("a.img", LENGTH, &RUNS);
    let id = sandbox.upload("a.img", &["--name", "web"]);
    let json: Value = serde_json::from_str(&sandbox.ok(&["copy", &id, "--json"])).unwrap();
    let copied = json["id"].as_str().unwrap();
    assert_ne!(copied, id);
    assert_eq!(json["tags"]["fspfs:origin"], id.as_str());
    assert_eq!(json, sandbox.described_in("store", copied));
    sandbox.assert_holds_in("store", copied, "a.img");
    let quiet = sandbox.ok(&["-q", "copy", &id, "--to", "./store"]);
    sandbox.described_in("store", quiet.trim_end());
    assert_eq!(sandbox.count_in("store"), 3);
}

#[test]
fn tags_and_description_are_carried_and_replaced() {
    let sandbox = two_stores();
    sandbox.image("a.img", LENGTH, &RUNS);
    let tags = ["--name", "web", "--tag", "Role=db", "--tag", "aws:backup=x", "--tag", "A=b"];
    let id = sandbox.upload("a.img", &[&tags[..], &["--description", "as it was"]].concat());
    let (plain, _) = copy(&sandbox, &[&id, "--to", "other"]);
    let mut wanted = sandbox.described_in("store", &id);
    wanted["tags"]["fspfs:origin"] = id.as_str().into();
    wanted["tags"].as_object_mut().unwrap().remove("aws:backup").unwrap();
    let found = sandbox.described_in("other", &plain);
    assert_eq!(found["tags"]["fspfs:length"], LENGTH.to_string());
    for field in ["tags", "description", "volume_size_gib", "data_blocks", "volume_id"] {
        assert_eq!(found[field], wanted[field], "{field}");
    }
    let other = ["--name", "copy", "--tag", "Role=", "--tag", "New=1", "--description", "else"];
    let (changed, _) = copy(&sandbox, &[&[&id, "--to", "other"], &other[..]].concat());
    let found = sandbox.described_in("other", &changed);
    assert_eq!(found["description"], "else");
    for (key, value) in [("Name", "copy"), ("Role", ""), ("New", "1"), ("A", "b")] {
        wanted["tags"][key] = value.into();
    }
    assert_eq!(found["tags"], wanted["tags"]);
    // A copy of a copy names the one that it was made of.
    let (again, _) = copy(&sandbox, &["-s", "other", &plain]);
    assert_eq!(sandbox.described_in("other", &again)["tags"]["fspfs:origin"], plain.as_str());
}

#[rstest]
#[case::of_a_repository(false)]
#[case::of_a_service(true)]
fn a_child_of_a_copied_parent_is_a_child_there(#[case] over_service: bool) {
    let mut sandbox = two_stores();
    sandbox.image("a.img", LENGTH, &RUNS);
    let parent = sandbox.upload("a.img", &[]);
    let file = std::fs::File::options().write(true).open(sandbox.join("a.img")).unwrap();
    // Another block, a new one, and one that is zeros from here on.
    file.write_all_at(b"another", 3).unwrap();
    write_pattern(&file, 150 * MIB, BLOCK);
    support::write_zeros(&file, 92 * MIB, BLOCK);
    file.set_len(GIB + 1).unwrap();
    let child = sandbox.upload("a.img", &["--parent-snapshot-id", &parent]);
    let grandchild = sandbox.upload("a.img", &["--parent-snapshot-id", &child]);
    let to = if over_service {
        sandbox.sh("mv store here; mv other store");
        sandbox.serve(&[]);
        sandbox.here()
    } else {
        sandbox.sh("mv store here");
        "other".to_owned()
    };
    let from_here = |id: &str| copy(&sandbox, &["-s", "here", id, "--to", &to]);
    let (alone, said) = from_here(&child);
    assert!(!said.contains("a child of"), "{said}");
    assert_eq!(sandbox.described_in(&to, &alone)["parent"], Value::Null);
    let (first, _) = from_here(&parent);
    let (second, said) = from_here(&child);
    assert!(said.contains(&format!("a child of {first}, a copy of {parent}")), "{said}");
    assert!(said.contains(&format!("3 blocks differ from {first}")), "{said}");
    assert_eq!(sandbox.described_in(&to, &second)["parent"], first.as_str());
    sandbox.assert_holds_in(&to, &second, "a.img");
    // Of the copies that there are the newest is taken.
    let (third, said) = from_here(&grandchild);
    assert!(said.contains(&format!("0 blocks differ from {second}")), "{said}");
    sandbox.assert_holds_in(&to, &third, "a.img");
    let output = run(sandbox
        .fspfs()
        .args(["-s", "here", "copy", &child, "--dry-run", "--json"])
        .args(["--to", &to]));
    let (said, json) = (text(&output), String::from_utf8(output.stdout).unwrap());
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["id"], &json["parent"]), (&child.as_str().into(), &first.as_str().into()));
    assert!(said.contains("would be copied to"), "{said}");
    assert_eq!(sandbox.count_in(&to), 4);
}

fn begin(sandbox: &Sandbox, arguments: &[&str]) -> Child {
    let mut command = sandbox.fspfs();
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Sends a signal, and waits for the end: what was said.
fn end(mut child: Child, signal: Signal) -> String {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
    assert!(wait(&mut child, PATIENCE).is_some(), "it does not end");
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success(), "{}", text(&output));
    text(&output)
}

#[rstest]
#[case::killed(Signal::SIGKILL)]
#[case::interrupted(Signal::SIGINT)]
fn a_copy_goes_on_where_it_was(#[case] signal: Signal) {
    let mut sandbox = two_stores();
    sandbox.image("a.img", LENGTH, &[(0, 130 * BLOCK)]);
    let id = sandbox.upload("a.img", &[]);
    sandbox.sh("mv store here; mv other store");
    sandbox.serve(&[]);
    let to = sandbox.here();
    let slowly = ["--max-requests-per-second", "60", "--max-in-flight", "4"];
    let arguments = [&["-s", "here", "copy", &id, "--to", &to], &slowly[..]].concat();
    let child = begin(&sandbox, &arguments);
    support::until("some of it is on record", || sandbox.noted() >= 40);
    let said = end(child, signal);
    let pending = sandbox.ok(&["-q", "list"]).trim_end().to_owned();
    assert_eq!(sandbox.described_in(&to, &pending)["state"], "pending");
    if signal != Signal::SIGKILL {
        assert!(said.contains("interrupted by SIGINT") && said.contains("goes on:"), "{said}");
        let line = said.lines().find(|line| line.contains("gives up:")).unwrap();
        assert!(line.contains(&to) && line.contains(&format!("delete {pending}")), "{line}");
    }
    let durable = sandbox.noted();
    let (copied, said) = copy(&sandbox, &[&["-s", "here"], &arguments[3..]].concat());
    assert_eq!(copied, pending);
    assert!(said.contains(&format!("{durable} chunks were copied before")), "{said}");
    assert_eq!(sandbox.count_in(&to), 1);
    sandbox.assert_no_journal_is_left();
    sandbox.assert_holds_in(&to, &copied, "a.img");
}

#[test]
fn an_encrypted_snapshot_stays_encrypted_unless_that_is_given_up() {
    let mut sandbox = two_stores();
    sandbox.serve(&[]);
    sandbox.image("a.img", LENGTH, &RUNS);
    let id = sandbox.upload("a.img", &["--encrypted", "--encrypted-holes", "skip"]);
    let message = sandbox.fails(&["copy", &id, "--to", "other"]);
    assert!(message.contains(&format!("{id} is encrypted")), "{message}");
    assert!(message.contains("--unencrypted"), "{message}");
    let (clear, _) = copy(&sandbox, &[&id, "--to", "other", "--unencrypted"]);
    sandbox.assert_holds_in("other", &clear, "a.img");
    let here = sandbox.here();
    let (copied, _) = copy(&sandbox, &[&id, "--encrypted-holes", "skip"]);
    assert_eq!(sandbox.described_in(&here, &copied)["encrypted"], true);
    sandbox.assert_holds_in(&here, &copied, "a.img");
    let (plain, _) = copy(&sandbox, &[&id, "-d", "us-east-1", "--unencrypted"]);
    assert_eq!(sandbox.described_in(&here, &plain)["encrypted"], false);
    let message = sandbox.fails(&["-s", "other", "copy", &clear, "--encrypted"]);
    assert!(message.contains("encrypts nothing"), "{message}");
}

#[test]
fn the_end_is_waited_for() {
    let mut sandbox = two_stores();
    sandbox.serve(&["--pending", "3"]);
    sandbox.image("a.img", LENGTH, &RUNS);
    let id = sandbox.ok(&["-s", "other", "-q", "upload", "a.img"]).trim_end().to_owned();
    let to = sandbox.here();
    let (copied, said) = copy(&sandbox, &["-s", "other", &id, "--to", &to]);
    assert!(said.contains(&format!("{copied} is pending")), "{said}");
    let began = std::time::Instant::now();
    let arguments = ["-s", "other", "copy", &id, "--to", &to, "--wait", "--json"];
    let json: Value = serde_json::from_str(&sandbox.ok(&arguments)).unwrap();
    assert_eq!(json["state"], "completed");
    assert!(began.elapsed() >= Duration::from_secs(3));
}

#[test]
fn the_cost_of_each_store_is_told() {
    let mut sandbox = two_stores();
    sandbox.serve(&[]);
    sandbox.image("a.img", LENGTH, &RUNS);
    let id = sandbox.upload("a.img", &[]);
    let (here, there) = (sandbox.here(), sandbox.here().replace("us-east", "us-west"));
    let (_, said) = copy(&sandbox, &[&id, "-d", "us-west-1"]);
    for store in [here, there] {
        let cost = said.lines().find(|line| line.starts_with(&format!("fspfs: {store}: ")));
        assert!(cost.is_some_and(|line| line.contains(" requests: about $")), "{store}: {said}");
    }
}

#[test]
fn snapshots_that_cannot_be_copied_are_refused() {
    let sandbox = two_stores();
    sandbox.image("a.img", LENGTH, &RUNS);
    let id = sandbox.upload("a.img", &[]);
    for (arguments, why) in [
        (&["snap-0123456789abcdef0", "--to", "other"][..], "snap-0123456789abcdef0"),
        (&[&id, "--to", "nowhere"], "fspfs init"),
        (&[&id, "--to", "synth:"], "cannot be written"),
        (&[&id, "--destination-region", "us-west-2"], "has no regions"),
    ] {
        let message = sandbox.fails(&[&["copy"], arguments].concat());
        assert!(message.contains("cannot copy snap-"), "{message}");
        assert!(message.contains(why), "{arguments:?}: {message}");
    }
    let output = run(sandbox.fspfs().args(["copy", &id, "-d", "a@b"]));
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("is not a region"), "{}", text(&output));
    assert_eq!((sandbox.count_in("store"), sandbox.count_in("other")), (1, 0));
}
