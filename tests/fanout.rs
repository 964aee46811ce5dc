//! One image that becomes a snapshot in each of several stores.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::unix::fs::FileExt as _;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use serde_json::Value;
use support::{BLOCK, PATIENCE, Sandbox, run, text, wait, write_pattern};

/// A sandbox with three repositories, `store`, `one` and `two`, of which the first is served.
fn three_stores() -> Sandbox {
    let mut sandbox = Sandbox::with_store();
    sandbox.ok(&["init", "one"]);
    sandbox.ok(&["init", "two"]);
    sandbox.serve(&[]);
    sandbox
}

/// The exit code, what was said, and the last line of stdout as JSON.
fn fanout(sandbox: &Sandbox, arguments: &[&str]) -> (i32, String, Value) {
    let output = run(sandbox.fspfs().arg("fanout").args(arguments));
    let printed = String::from_utf8(output.stdout.clone()).unwrap();
    let last = printed.lines().last().unwrap_or("null");
    (output.status.code().unwrap(), text(&output), serde_json::from_str(last).unwrap_or_default())
}

#[track_caller]
fn assert_holds(sandbox: &Sandbox, store: &str, id: &Value, file: &str) {
    let store = if store == "us-east-1" { sandbox.here() } else { store.to_owned() };
    sandbox.assert_holds_in(&store, id.as_str().unwrap(), file);
}

#[rstest]
fn each_store_has_the_whole_image(#[values(1, 63, 64, 65, 128, 130)] blocks: u64) {
    let sandbox = three_stores();
    sandbox.image("a.img", blocks * BLOCK + 77, &[(0, blocks * BLOCK + 77)]);
    let file = std::fs::File::options().write(true).open(sandbox.join("a.img")).unwrap();
    support::write_zeros(&file, (blocks / 2) * BLOCK, BLOCK.min(blocks * BLOCK));
    let (code, said, made) = fanout(&sandbox, &["a.img", "us-east-1", "./one", "./two"]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("Spawned 3 EBS Clients"), "{said}");
    for store in ["us-east-1", "./one", "./two"] {
        assert_holds(&sandbox, store, &made[store], "a.img");
    }
    sandbox.assert_no_journal_is_left();
}

#[test]
fn each_destination_has_its_own_parent() {
    let sandbox = three_stores();
    sandbox.image("a.img", 130 * BLOCK, &[(0, 130 * BLOCK)]);
    let (_, _, first) =
        fanout(&sandbox, &["--name", "web", "a.img", "us-east-1", "./one", "./two"]);
    let file = std::fs::File::options().write(true).open(sandbox.join("a.img")).unwrap();
    file.write_all_at(b"changed", 7 * BLOCK).unwrap();
    support::write_zeros(&file, 9 * BLOCK, BLOCK);
    let parent = first["us-east-1"].as_str().unwrap();
    let list = format!(
        "# where it goes\n\n us-east-1 --parent {parent}\n./one --parent name:web\n./two --parent auto\n"
    );
    std::fs::write(sandbox.join("list"), list).unwrap();
    let (code, said, made) = fanout(&sandbox, &["--name", "web", "a.img", "list"]);
    assert_eq!(code, 0, "{said}");
    for store in ["us-east-1", "./one", "./two"] {
        assert_holds(&sandbox, store, &made[store], "a.img");
        let url = if store == "us-east-1" { sandbox.here() } else { store.to_owned() };
        let all: Value =
            serde_json::from_str(&sandbox.ok(&["-s", &url, "list", "--json"])).unwrap();
        let found =
            all.as_array().unwrap().iter().find(|found| found["id"] == made[store]).unwrap();
        assert_eq!(found["parent"], first[store]);
    }
}

#[test]
fn a_destination_that_fails_does_not_stop_the_others() {
    let sandbox = three_stores();
    sandbox.image("a.img", 70 * BLOCK, &[(0, 70 * BLOCK)]);
    let nowhere = "ebs://us-east-1?endpoint=http://127.0.0.1:9";
    let (code, said, made) = fanout(&sandbox, &["a.img", "./one", nowhere, "./missing", "./two"]);
    assert_eq!(code, 3, "{said}");
    assert!(said.contains("./missing: ") && said.contains("127.0.0.1:9"), "{said}");
    assert_eq!(made.as_object().unwrap().len(), 2, "{made}");
    for store in ["./one", "./two"] {
        assert_holds(&sandbox, store, &made[store], "a.img");
    }
    let (code, said, _) = fanout(&sandbox, &["a.img", "./missing"]);
    assert_eq!(code, 1, "{said}");
}

#[test]
fn a_bad_list_begins_nothing() {
    let sandbox = three_stores();
    sandbox.image("a.img", BLOCK, &[(0, BLOCK)]);
    for (list, why) in [
        ("./one\nus-east-1\n./one\n", "list, line 3: ./one is named twice"),
        ("./one\nus-east-1 --frobnicate\n", "list, line 2: unexpected argument"),
        ("./one\nsynth:\n", "list, line 2: synth: cannot be written"),
        ("./one 'two\n", "line 1: a quotation mark"),
        ("# none\n", "it names no"),
    ] {
        std::fs::write(sandbox.join("list"), list).unwrap();
        let (code, said, _) = fanout(&sandbox, &["a.img", "list"]);
        assert!(code == 1 && said.contains(why), "{list}: {said}");
    }
    assert_eq!(sandbox.ok(&["-s", "one", "-q", "list"]), "");
}

#[test]
fn a_fanout_that_was_killed_goes_on() {
    let sandbox = three_stores();
    sandbox.image("a.img", 300 * BLOCK, &[]);
    let file = std::fs::File::options().write(true).open(sandbox.join("a.img")).unwrap();
    write_pattern(&file, 0, 300 * BLOCK);
    let slowly = ["--max-requests-per-second", "60", "--max-in-flight", "4"];
    let arguments = [&["fanout", "a.img", "us-east-1", "./one"], &slowly[..]].concat();
    let mut command = sandbox.fspfs();
    command.args(&arguments).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let pending = || {
        let all = sandbox.ok(&["list", "--json"]);
        let all: Value = serde_json::from_str(&all).unwrap();
        all.as_array().unwrap().iter().filter(|found| found["state"] == "pending").count()
    };
    support::until("it has begun", || pending() == 1);
    std::thread::sleep(std::time::Duration::from_secs(1));
    let _ = kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGKILL);
    assert!(wait(&mut child, PATIENCE).is_some());
    let (code, said, made) = fanout(&sandbox, &arguments[1..4]);
    assert_eq!(code, 0, "{said}");
    for store in ["us-east-1", "./one"] {
        assert_holds(&sandbox, store, &made[store], "a.img");
    }
    assert_eq!(pending(), 0);
    assert_eq!(sandbox.ok(&["-s", "one", "-q", "list"]).lines().count(), 1);
    sandbox.assert_no_journal_is_left();
}
