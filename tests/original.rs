//! The command lines of Flexible Snapshot Proxy: each does what its documents say.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::process::Output;

use rstest::rstest;
use serde_json::Value;
use support::{BLOCK, Sandbox, run, same, text, write_pattern};

const BLOCKS: u64 = 130;

/// A service with two snapshots of one volume, `a.img` and `b.img`.
fn two_days() -> (Sandbox, String, String) {
    let mut sandbox = Sandbox::with_store();
    sandbox.serve(&[]);
    let length = BLOCKS * BLOCK + 1000;
    sandbox.image("a.img", length, &[(0, 100 * BLOCK), (110 * BLOCK, 10 * BLOCK)]);
    let a = sandbox.upload("a.img", &[]);
    sandbox.sh("cp a.img b.img");
    let file = File::options().write(true).open(sandbox.join("b.img")).unwrap();
    file.write_all_at(b"changed", 3 * BLOCK).unwrap();
    support::write_zeros(&file, 7 * BLOCK, BLOCK);
    write_pattern(&file, BLOCKS * BLOCK, 1000);
    let b = sandbox.upload("b.img", &["--parent_snapshot_id", &a]);
    (sandbox, a, b)
}

/// Runs a line as a shell does, with `fspfs` in the place of `python3 src/main.py`.
#[track_caller]
fn line(sandbox: &Sandbox, line: &str) -> Output {
    let words = shlex::split(line).unwrap();
    run(sandbox.fspfs().args(&words))
}

#[track_caller]
fn ok(sandbox: &Sandbox, words: &str) -> Vec<String> {
    let output = line(sandbox, words);
    assert!(output.status.success(), "{words}: {}", text(&output));
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[track_caller]
fn assert_is(sandbox: &Sandbox, id: &str, image: &str) {
    ok(sandbox, &format!("download {id} check.img"));
    assert!(same(sandbox.join("check.img"), sandbox.join(image)), "{id} is not {image}");
}

#[test]
fn sizes_are_told_in_its_words() {
    let (sandbox, a, b) = two_days();
    let says = |words: &str, begins: &str| {
        let printed = ok(&sandbox, words);
        let last = printed.last().unwrap();
        assert!(last.starts_with(begins) && last.ends_with(" seconds."), "{words}: {printed:?}");
    };
    let list = format!("Snapshot {a} contains 110 chunks and {} bytes, took ", 110 * BLOCK);
    for before in [
        "",
        "-o us-east-1 ",
        "--origin_region us-east-1 ",
        "--nodeps ",
        "-nodeps ",
        "-v ",
        "-vv ",
        "-vvv ",
    ] {
        says(&format!("{before}list {a}"), &list);
    }
    let diff =
        format!("Changes between {a} and {b} contain 3 chunks and {} bytes, took ", 3 * BLOCK);
    says(&format!("diff {a} {b}"), &diff);
    says(&format!("-d diff {a} {b}"), &diff);
}

#[test]
fn snapshots_become_files() {
    let (sandbox, a, b) = two_days();
    ok(&sandbox, &format!("download {a} t.img"));
    assert!(same(sandbox.join("t.img"), sandbox.join("a.img")));
    ok(&sandbox, &format!("--suppress_writes deltadownload {a} {b} t.img"));
    assert!(same(sandbox.join("t.img"), sandbox.join("b.img")));
    assert!(
        !sandbox.join("state/fspfs/transfers").exists()
            || support::names(sandbox.join("state/fspfs/transfers")).is_empty()
    );
    let list = format!("{0}/one.img\n\n{0}/two.img\n", sandbox.join("").display());
    std::fs::write(sandbox.join("list.txt"), list).unwrap();
    ok(&sandbox, &format!("multiclone {b} list.txt"));
    for copy in ["one.img", "two.img"] {
        assert!(same(sandbox.join(copy), sandbox.join("b.img")));
    }
}

#[rstest]
#[case::full("upload b.img")]
#[case::quiet("-q upload b.img")]
#[case::of_the_scenarios("-nodeps upload b.img")]
#[case::frozen("--nodeps --suppress_writes upload b.img")]
#[case::incremental("upload b.img --parent_snapshot_id A")]
#[case::option_first("upload --parent_snapshot_id A b.img")]
fn an_image_becomes_a_snapshot(#[case] words: &str) {
    let (sandbox, a, _) = two_days();
    let printed = ok(&sandbox, &words.replace('A', &a));
    assert_is(&sandbox, printed.last().unwrap(), "b.img");
    if words.contains("--parent") {
        let chunks =
            printed.iter().find(|line| line.starts_with("Total chunks uploaded ")).unwrap();
        assert_eq!(chunks, "Total chunks uploaded 3");
    }
}

#[rstest]
#[case("copy A")]
#[case("copy A -d us-east-1")]
#[case("copy A --destination_region us-east-1")]
#[case("-o us-east-1 copy A -d us-east-1")]
#[case("-q copy -d us-east-1 A")]
fn a_snapshot_is_copied(#[case] words: &str) {
    let (sandbox, a, _) = two_days();
    let printed = ok(&sandbox, &words.replace('A', &a));
    assert_ne!(printed.last(), Some(&a));
    assert_is(&sandbox, printed.last().unwrap(), "a.img");
}

#[rstest]
#[case("sync A B C")]
#[case("sync A B C -d us-east-1")]
#[case("sync A B C -d us-east-1 -f")]
#[case("sync -f A B C")]
#[case("sync A B C --destination_region us-east-1 --full_copy")]
fn a_clone_is_kept_in_step(#[case] words: &str) {
    let (sandbox, a, b) = two_days();
    let clone = ok(&sandbox, &format!("copy {a}")).pop().unwrap();
    let printed = ok(&sandbox, &words.replace('A', &a).replace('B', &b).replace('C', &clone));
    assert!(printed[0].starts_with(&format!("Changes between {a} and {b} contain 3 chunks")));
    assert_is(&sandbox, printed.last().unwrap(), "b.img");
}

#[test]
fn a_device_becomes_a_snapshot_in_each_region_of_a_list() {
    let (sandbox, ..) = two_days();
    std::fs::write(sandbox.join("regions.txt"), " us-east-1\n\n").unwrap();
    let printed = ok(&sandbox, "fanout b.img regions.txt");
    let length = BLOCKS * BLOCK + 1000;
    assert_eq!(
        printed[0],
        format!(
            "Size of b.img is {length} bytes and 131 chunks. Aligning snapshot to 1 GiB boundary."
        )
    );
    assert_eq!(printed[1], "Spawned 1 EBS Clients and started a snapshot in each region.");
    let made: Value = serde_json::from_str(printed.last().unwrap()).unwrap();
    assert_is(&sandbox, made["us-east-1"].as_str().unwrap(), "b.img");
    std::fs::write(sandbox.join("regions.txt"), "us-east-1\nus-east-1\n").unwrap();
    let output = line(&sandbox, "fanout b.img regions.txt");
    assert!(text(&output).contains("line 2: us-east-1 is named twice"), "{}", text(&output));
}

#[test]
fn a_dry_run_changes_nothing() {
    let (sandbox, a, b) = two_days();
    let clone = ok(&sandbox, &format!("copy {a}")).pop().unwrap();
    let snapshots = ok(&sandbox, "-q list");
    std::fs::write(sandbox.join("list.txt"), format!("{}/one.img\n", sandbox.join("").display()))
        .unwrap();
    for words in [
        format!("-d copy {a}"),
        format!("--dry_run copy {a} -d us-east-1"),
        format!("-d sync {a} {b} {clone}"),
        "-d upload b.img".to_owned(),
        "-d fanout b.img us-east-1".to_owned(),
        format!("-d download {a} one.img"),
        format!("-d multiclone {a} list.txt"),
        format!("-d verify {a}"),
        format!("-d delete --yes {a}"),
    ] {
        let output = line(&sandbox, &words);
        let said = text(&output);
        assert!(output.status.success(), "{words}: {said}");
        // What is permitted was asked for real.
        assert!(
            said.contains("ebs:GetSnapshotBlock: allowed") && said.contains("ebs:PutSnapshotBlock"),
            "{words}: {said}"
        );
    }
    assert_eq!(ok(&sandbox, "-q list"), snapshots);
    assert!(!sandbox.join("one.img").exists());
}

#[test]
fn its_environment_counts() {
    let (sandbox, a, _) = two_days();
    let output =
        run(sandbox.fspfs().args(["-q", "copy", &a]).env("NUM_JOBS", "2").env("FULL_COPY", "1"));
    assert!(output.status.success(), "{}", text(&output));
    let id = String::from_utf8(output.stdout).unwrap();
    assert_is(&sandbox, id.trim(), "a.img");
}
