//! Copies into, between and out of services that misbehave, and many targets of one.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::unix::fs::FileExt as _;

use support::serve::Server;
use support::{BLOCK, Loop, MIB, Sandbox, can_mount, run, same, text};

const FAULTS: [&str; 2] =
    ["--inject", "throttle=6%,error=4%,cut-body=3%,cut=2%,corrupt=3%,tokens=2s,empty-pages=20%"];

/// 50 blocks, some of them zeros, and a tail.
const LENGTH: u64 = 300 * MIB + 1234;

fn image(sandbox: &Sandbox) -> std::fs::File {
    let runs = [(0, 32 * BLOCK), (200 * MIB + 7, 16 * BLOCK)];
    let path = sandbox.image("a.img", LENGTH, &runs);
    let file = std::fs::File::options().write(true).open(path).unwrap();
    support::write_zeros(&file, 60 * MIB, 2 * BLOCK);
    file
}

/// Two services that misbehave, the first of which is the store that is meant where none is named, and a
/// repository `here`.
fn two_services(options: &[&str]) -> (Sandbox, Server, [String; 2]) {
    let mut sandbox = Sandbox::with_store();
    sandbox.ok(&["init", "other"]);
    sandbox.ok(&["init", "here"]);
    sandbox.serve(options);
    let options = [options, &["--no-auth", "--region", "eu-west-1"]].concat();
    let second = Server::of(&sandbox, "other", &options);
    let url = |region: &str, at: &str| format!("ebs://{region}?endpoint={at}&ec2-endpoint={at}");
    let urls = [url("us-east-1", &sandbox.service().url), url("eu-west-1", &second.url)];
    (sandbox, second, urls)
}

/// Copies a snapshot: the id of the copy, and what is said of it.
#[track_caller]
fn copy(sandbox: &Sandbox, from: &str, id: &str, arguments: &[&str]) -> (String, String) {
    let output = run(sandbox.fspfs().args(["-s", from, "copy", id]).args(arguments));
    let said = text(&output);
    assert!(output.status.success(), "{arguments:?}: {said}");
    let printed = String::from_utf8(output.stdout).unwrap();
    (printed.lines().last().unwrap().to_owned(), said)
}

/// What is said of the cost of a store.
#[track_caller]
fn cost<'a>(said: &'a str, store: &str) -> &'a str {
    let begins = format!("fspfs: {store}: ");
    let mut costs = said.lines().filter_map(|line| line.strip_prefix(&begins));
    costs.find(|line| line.contains(" requests")).unwrap_or_else(|| panic!("{store}: {said}"))
}

#[test]
fn copies_go_through_two_services_that_misbehave_and_back() {
    let (sandbox, _second, [one, two]) = two_services(&FAULTS);
    let file = image(&sandbox);
    let parent = sandbox.ok(&["-s", "here", "-q", "upload", "a.img"]).trim_end().to_owned();
    let mut first = vec![parent.clone()];
    let route = [("here", &one[..]), (&one, &two), (&two, "here")];
    for (from, to) in route {
        let (copied, said) = copy(&sandbox, from, first.last().unwrap(), &["--to", to]);
        for store in [from, to].into_iter().filter(|store| *store != "here") {
            assert!(cost(&said, store).contains(" of them again"), "{said}");
        }
        sandbox.assert_holds_in(to, &copied, "a.img");
        first.push(copied);
    }
    // What the repository knows of the content is known of each copy.
    let digest = sandbox.described_in("here", &parent)["content_digest"].clone();
    for (store, copied) in [&one, &two].into_iter().zip(&first[1..]) {
        let found = sandbox.described_in(store, copied);
        let noted = format!("{copied} {}", digest.as_str().unwrap());
        assert_eq!(
            (&found["content_digest"], &found["tags"]["fspfs:digest"]),
            (&digest, &noted.into())
        );
    }
    assert!(sandbox.described_in("here", &first[3])["tags"].get("fspfs:digest").is_none());
    // Another block, a new one, and one that is zeros from here on.
    file.write_all_at(b"another", 3).unwrap();
    support::write_pattern(&file, 150 * MIB, BLOCK);
    support::write_zeros(&file, 10 * MIB, BLOCK);
    let upload = ["-s", "here", "-q", "upload", "a.img", "--parent-snapshot-id", &parent];
    let mut child = sandbox.ok(&upload).trim_end().to_owned();
    for ((from, to), parent) in route.into_iter().zip(&first[1..]) {
        let (copied, said) = copy(&sandbox, from, &child, &["--to", to]);
        assert!(said.contains(&format!("3 blocks differ from {parent}")), "{said}");
        assert_eq!(sandbox.described_in(to, &copied)["parent"], parent.as_str());
        sandbox.assert_holds_in(to, &copied, "a.img");
        child = copied;
    }
    sandbox.assert_no_journal_is_left();
}

#[test]
fn a_copy_to_another_region_has_the_endpoints_of_its_origin() {
    let (sandbox, _second, [one, _]) = two_services(&FAULTS);
    image(&sandbox);
    let id = sandbox.upload("a.img", &["--name", "web"]);
    let (copied, said) = copy(&sandbox, &one, &id, &["-d", "us-west-2"]);
    let there = one.replace("us-east-1", "us-west-2");
    assert!(!cost(&said, &one).is_empty() && !cost(&said, &there).is_empty());
    let found = sandbox.described_in(&there, &copied);
    assert_eq!(
        (&found["tags"]["Name"], &found["tags"]["fspfs:origin"]),
        (&"web".into(), &id[..].into())
    );
    sandbox.assert_holds_in(&there, &copied, "a.img");
}

#[test]
fn a_copy_to_another_service_is_encrypted_as_its_origin_unless_that_is_given_up() {
    let (sandbox, _second, [one, two]) = two_services(&FAULTS);
    image(&sandbox);
    let id = sandbox.upload("a.img", &["--encrypted", "--encrypted-holes", "skip"]);
    let skip = ["--to", &two, "--encrypted-holes", "skip"];
    let (copied, _) = copy(&sandbox, &one, &id, &skip);
    assert_eq!(sandbox.described_in(&two, &copied)["encrypted"], true);
    sandbox.assert_holds_in(&two, &copied, "a.img");
    let there = one.replace("us-east-1", "us-west-2");
    let regional = ["-d", "us-west-2", "--encrypted-holes", "skip"];
    let (regional, _) = copy(&sandbox, &one, &id, &regional);
    assert_eq!(sandbox.described_in(&there, &regional)["encrypted"], true);
    let (clear, _) = copy(&sandbox, &one, &id, &["--to", &two, "--unencrypted"]);
    assert_eq!(sandbox.described_in(&two, &clear)["encrypted"], false);
    sandbox.assert_holds_in(&two, &clear, "a.img");
    let message = sandbox.fails(&["-s", &two, "copy", &copied, "--to", "here"]);
    assert!(message.contains("is encrypted") && message.contains("--unencrypted"), "{message}");
    assert_eq!(sandbox.ok(&["-s", "here", "-q", "list"]), "");
    let (here, _) = copy(&sandbox, &two, &copied, &["--to", "here", "--unencrypted"]);
    sandbox.assert_holds_in("here", &here, "a.img");
}

#[test]
fn many_targets_are_written_from_a_service_that_misbehaves() {
    if !can_mount(&[]) {
        return;
    }
    let (sandbox, _second, [one, _]) = two_services(&FAULTS);
    image(&sandbox);
    let id = sandbox.upload("a.img", &[]);
    let disk = sandbox.image("disk", LENGTH.next_multiple_of(MIB), &[(0, LENGTH)]);
    let device = Loop::attach(&disk, &[]);
    let targets = ["1.img", device.0.to_str().unwrap(), "2.img"];
    let output = run(sandbox.fspfs().args(["-s", &one, "multiclone", &id]).args(targets));
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains(" of them again"), "{}", text(&output));
    drop(device);
    for target in ["1.img", "2.img"] {
        assert!(same(sandbox.join("a.img"), sandbox.join(target)), "{target}");
    }
    sandbox.sh(&format!("cmp -n {LENGTH} a.img disk"));
}
