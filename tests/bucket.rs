//! Repositories in buckets, of moto and of `SeaweedFS`, as their users meet them.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::unix::fs::FileExt as _;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use serde_json::Value;
use support::between::Between;
use support::service::{has_buckets, has_s3rver};
use support::{BLOCK, MIB, Mount, Sandbox, can_mount, run, text, wait};

const RUNS: [(u64, u64); 3] = [(0, MIB), (3 * MIB + 77, 5), (5 * MIB, 20 * MIB)];

#[rstest]
#[case::of_moto(false)]
#[case::of_seaweedfs(true)]
fn a_bucket_is_a_store_like_any(#[case] is_seaweed: bool) {
    if !has_buckets() || !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::with_bucket(is_seaweed);
    let again = sandbox.fails(&["init"]);
    assert!(again.contains("is a repository already"), "{again}");
    let image = sandbox.image("disk.img", 64 * MIB, &RUNS);
    let id = sandbox.upload("disk.img", &["--name", "web", "--tag", "role=db"]);
    sandbox.assert_downloads(&id, &image);
    assert_eq!(sandbox.described(&id)["tags"]["role"], "db");
    assert!(sandbox.ok(&["verify"]).contains("Everything is intact"));
    // The store is named in the place of -s.
    let url = format!("s3://bucket/snaps?endpoint={}", sandbox.service().url);
    let mount = sandbox.mount(&[&url]);
    sandbox.sh("cmp -n 67108864 disk.img mnt/by-name/web.img; cp disk.img mnt/new/copy.img");
    mount.unmount();
    let copies = sandbox.ok(&["list", "-q"]);
    let copy = copies.lines().find(|copy| *copy != id).unwrap();
    sandbox.assert_downloads(copy, &image);
    sandbox.ok(&["delete", "--yes", &id]);
    assert!(sandbox.ok(&["gc"]).contains("wait for the grace period"));
    sandbox.assert_downloads(copy, &image);
}

#[rstest]
#[case::of_moto(false)]
#[case::of_seaweedfs(true)]
fn an_archive_has_the_id_of_its_source_and_what_differs(#[case] is_seaweed: bool) {
    if !has_buckets() {
        return;
    }
    let sandbox = Sandbox::with_bucket(is_seaweed);
    sandbox.ok(&["-s", "here", "init"]);
    let image = sandbox.image("disk.img", 64 * MIB, &RUNS);
    let at = |arguments: &[&str]| {
        sandbox.ok(&[&["-s", "here", "-q"], arguments].concat()).trim_end().to_owned()
    };
    let first = at(&["upload", "disk.img", "--name", "web"]);
    let url = format!("bucket/archive?endpoint={}", sandbox.service().url);
    assert_eq!(at(&["movetos3", &first, &url]), first);
    std::fs::File::options()
        .write(true)
        .open(&image)
        .unwrap()
        .write_all_at(&[7; 4096], 9 * MIB)
        .unwrap();
    support::write_zeros(&std::fs::File::options().write(true).open(&image).unwrap(), 0, BLOCK);
    let second = at(&["upload", "disk.img", "--name", "web", "--parent", &first]);
    let moved = run(sandbox.fspfs().args(["-s", "here", "movetos3", &second, &url]));
    let said = text(&moved);
    assert!(moved.status.success() && said.contains("2 chunks are new"), "{said}");
    assert!(said.contains("are read and stored"), "{said}");
    // Once more, nothing is sent.
    let again = run(sandbox.fspfs().args(["-s", "here", "movetos3", &second, &url]));
    assert!(text(&again).contains("already"), "{}", text(&again));
    let archive = ["-s", &format!("s3://{url}")];
    assert_eq!(sandbox.ok(&[&archive[..], &["list", "-q"]].concat()).lines().count(), 2);
    assert_eq!(sandbox.ok(&["list", "-q", archive[1]]).lines().count(), 2);
    sandbox.ok(&["getfroms3", &second, &url, "--output", "out.img"]);
    assert!(support::same(&image, sandbox.join("out.img")));
    sandbox.ok(&["-s", "there", "init"]);
    let back =
        sandbox.ok(&["-s", "there", "-q", "getfroms3", "name:web", &url]).trim_end().to_owned();
    sandbox.ok(&["-s", "there", "download", &back, "back.img"]);
    assert!(support::same(&image, sandbox.join("back.img")));
    // A move, and the archive of a file and of a stream.
    at(&["movetos3", "--delete-source", &second, &url]);
    assert_eq!(at(&["list", "-q"]), first);
    let file = at(&["movetos3", "disk.img", &url, "--name", "file"]);
    let stream = sandbox.sh(&format!(
        "export XDG_STATE_HOME=state AWS_ACCESS_KEY_ID=AKIATEST AWS_SECRET_ACCESS_KEY=test/secret AWS_REGION=us-east-1
         {} -q movetos3 --size 1GiB - '{url}' <disk.img",
        env!("CARGO_BIN_EXE_fspfs")
    ));
    for id in [&file[..], stream.trim_end()] {
        sandbox.ok(&["getfroms3", id, &url, "--output", "out.img"]);
        sandbox.sh("cmp -n 67108864 disk.img out.img");
    }
    assert!(sandbox.ok(&[&archive[..], &["verify"]].concat()).contains("Everything is intact"));
}

#[test]
fn an_archive_is_a_child_of_the_one_that_is_named() {
    if !has_buckets() {
        return;
    }
    let sandbox = Sandbox::with_bucket(false);
    sandbox.ok(&["-s", "here", "init"]);
    sandbox.image("disk.img", 8 * MIB, &RUNS[..1]);
    let url = format!("bucket/archive?endpoint={}", sandbox.service().url);
    let moved = |words: &[&str]| -> Value {
        let move_it = ["-s", "here", "movetos3", "--json"];
        serde_json::from_str(&sandbox.ok(&[&move_it[..], words, &[&url]].concat())).unwrap()
    };
    let made = |name: &str| {
        let upload = ["-s", "here", "-q", "upload", "disk.img", "--name", name];
        sandbox.ok(&upload).trim_end().to_owned()
    };
    let [web, other, alone, last] = ["web", "other", "web", "web"].map(made);
    assert_eq!(moved(&[&web])["parent"], Value::Null);
    assert_eq!(moved(&[&other])["parent"], Value::Null);
    assert_eq!(moved(&["--parent", "none", &alone])["parent"], Value::Null);
    assert_eq!(moved(&["--parent", "name:other", &last])["parent"], other);
    let file = ["disk.img", "--name", "file", "--parent"];
    let report = moved(&[&file[..], &[&web]].concat());
    assert_eq!(report["parent"], web);
    assert_eq!(report["stored"]["new_blocks"], 0);
    assert!(report["dollars"].as_f64().unwrap() > 0.0, "{report}");
    // Of the store of -s nothing is asked where it has nothing to do with it.
    let tried = ["-s", "ebs://us-east-1?endpoint=http://127.0.0.1:9", "--dry-run", "movetos3"];
    sandbox.ok(&[&tried[..], &["disk.img", &url]].concat());
    let restored = ["getfroms3", &last, &url, "--output", "out.img", "--json"];
    let report: Value = serde_json::from_str(&sandbox.ok(&restored)).unwrap();
    assert!(report["requests"].as_u64().unwrap() > 3, "{report}");
    sandbox.sh("truncate -s 2G large.img");
    let large = sandbox.ok(&["-s", "here", "-q", "upload", "large.img"]).trim_end().to_owned();
    moved(&[&large]);
    let child = made("web");
    let refused = sandbox.fails(&["-s", "here", "movetos3", &child, &url, "--parent", &large]);
    assert!(refused.contains("its volume is larger"), "{refused}");
}

#[test]
fn a_bucket_that_ignores_conditions_needs_single_writer() {
    if !has_buckets() {
        return;
    }
    let sandbox = Sandbox::with_bucket(false);
    let image = sandbox.image("disk.img", 64 * MIB, &RUNS);
    // The condition of a creation is lost on the way, as some services ignore it.
    let way = Between::new(&sandbox.service().url, |head| {
        head.replace("if-none-match:", "x-none-matchx:")
    });
    let url = format!("s3://bucket/alone?endpoint={}", way.url);
    let message = sandbox.fails(&["init", &url]);
    assert!(message.contains("--single-writer"), "{message}");
    assert_eq!(sandbox.service().keys("alone/"), [""; 0]);
    sandbox.ok(&["--single-writer", "init", &url]);
    let at = |words: &[&str]| sandbox.ok(&[&["-s", &url, "--single-writer"], words].concat());
    let id = at(&["-q", "upload", "disk.img"]).trim_end().to_owned();
    // Whoever only reads needs no promise.
    sandbox.ok(&["-s", &url, "download", &id, "out.img"]);
    assert!(support::same(&image, sandbox.join("out.img")));
    let refused = sandbox.fails(&["-s", &url, "upload", "disk.img"]);
    assert!(refused.contains("--single-writer"), "{refused}");
}

#[test]
fn a_service_that_takes_no_notice_of_conditions_has_one_writer() {
    if !has_s3rver() {
        return;
    }
    let sandbox = Sandbox::with_lax_bucket();
    let image = sandbox.image("disk.img", 64 * MIB, &RUNS);
    let message = sandbox.fails(&["init"]);
    assert!(message.contains("If-None-Match") && message.contains("--single-writer"), "{message}");
    let alone = |words: &[&str]| sandbox.ok(&[&["--single-writer"], words].concat());
    alone(&["init"]);
    let url = format!("s3://bucket/snaps?endpoint={}", sandbox.service().url);
    let (status, why) = told_of(&sandbox, &url, "s3:PutObject");
    assert!(status == "warning" && why.contains("If-None-Match"), "{status}: {why}");
    let id = alone(&["-q", "upload", "disk.img"]).trim_end().to_owned();
    sandbox.assert_downloads(&id, &image);
    assert!(sandbox.ok(&["verify"]).contains("Everything is intact"));
    alone(&["delete", "--yes", &id]);
    alone(&["gc"]);
    assert_eq!(sandbox.ok(&["list", "-q"]), "");
}

/// The program on a host whose clock is off.
fn at_another_time(sandbox: &Sandbox, off: &str, words: &[&str]) -> (bool, String) {
    let mut command = Command::new("faketime");
    command.args(["-f", off, env!("CARGO_BIN_EXE_fspfs")]).args(words);
    command.current_dir(&sandbox.path).env("XDG_STATE_HOME", sandbox.join("other"));
    sandbox.service().show_to(&mut command);
    let output = run(&mut command);
    (output.status.success(), text(&output))
}

#[test]
fn a_collection_goes_by_the_clock_of_the_bucket() {
    if !has_buckets() || !support::has(&["faketime"]) {
        return;
    }
    let sandbox = Sandbox::with_bucket(false);
    let image = sandbox.image("disk.img", 64 * MIB, &RUNS);
    let kept = sandbox.upload("disk.img", &[]);
    sandbox.random("other.img", 3 * MIB);
    let deleted = sandbox.upload("other.img", &[]);
    sandbox.ok(&["delete", "--yes", &deleted]);
    let objects = sandbox.service().keys("snaps/packs/");
    for off in ["+1h", "-3h", "+30d"] {
        let (is_done, said) = at_another_time(&sandbox, off, &["gc"]);
        assert!(is_done && said.contains("0 objects deleted"), "{off}: {said}");
        let (is_done, said) = at_another_time(&sandbox, off, &["--json", "gc", "--dry-run"]);
        assert!(is_done && said.contains("\"deleted_objects\": 0"), "{off}: {said}");
        // What another host writes meanwhile is kept, too.
        let (is_done, said) = at_another_time(&sandbox, off, &["-q", "upload", "other.img"]);
        assert!(is_done, "{off}: {said}");
        sandbox.assert_downloads(said.lines().last().unwrap(), &sandbox.join("other.img"));
    }
    sandbox.assert_downloads(&kept, &image);
    let now = sandbox.service().keys("snaps/packs/");
    assert!(objects.iter().all(|object| now.contains(object)));
}

#[test]
fn a_bucket_that_keeps_versions_or_encrypts_is_a_bucket() {
    if !has_buckets() {
        return;
    }
    let sandbox = Sandbox::with_bucket(false);
    let image = sandbox.image("disk.img", 64 * MIB, &RUNS);
    let configure = |words: &[&str]| {
        let done = sandbox.service().aws(&[&["s3api"], words, &["--bucket", "bucket"]].concat());
        assert!(done.status.success(), "{}", text(&done));
    };
    configure(&["put-bucket-versioning", "--versioning-configuration", "Status=Enabled"]);
    configure(&[
        "put-bucket-encryption",
        "--server-side-encryption-configuration",
        r#"{"Rules":[{"ApplyServerSideEncryptionByDefault":{"SSEAlgorithm":"aws:kms"}}]}"#,
    ]);
    let url = format!(
        "s3://bucket/snaps?endpoint={}&class=STANDARD_IA&kms-key=alias/backup",
        sandbox.service().url
    );
    let at = |words: &[&str]| run(sandbox.fspfs().args(["-s", &url]).args(words));
    let uploaded = at(&["upload", "disk.img", "--name", "web"]);
    let said = String::from_utf8_lossy(&uploaded.stderr).into_owned();
    assert_eq!(said.matches("keeps versions").count(), 1, "{said}");
    let id = text(&uploaded).lines().find(|l| l.starts_with("snap-")).unwrap().to_owned();
    sandbox.assert_downloads(&id, &image);
    let [pack] = &sandbox.service().keys("snaps/packs/")[..] else { panic!("one pack") };
    let head = ["s3api", "head-object", "--bucket", "bucket", "--key", pack];
    let head = text(&sandbox.service().aws(&head));
    assert!(head.contains("STANDARD_IA") && head.contains("alias/backup"), "{head}");
    assert!(at(&["delete", "--yes", &id]).status.success());
    assert!(at(&["gc"]).status.success());
    assert_eq!(sandbox.ok(&["list", "-q"]), "");
    // Its id may be used once more, and its name is created once.
    let moved = at(&["-q", "upload", "disk.img", "--name", "web"]);
    assert!(moved.status.success(), "{}", text(&moved));
    assert!(sandbox.ok(&["verify"]).contains("Everything is intact"));
}

#[test]
fn a_bucket_that_locks_objects_is_written() {
    if !has_buckets() {
        return;
    }
    let sandbox = Sandbox::with_bucket(false);
    let image = sandbox.image("disk.img", 64 * MIB, &RUNS);
    let service = sandbox.service();
    for words in [
        &["create-bucket", "--object-lock-enabled-for-bucket"][..],
        &[
            "put-object-lock-configuration",
            "--object-lock-configuration",
            r#"{"ObjectLockEnabled":"Enabled","Rule":{"DefaultRetention":{"Mode":"COMPLIANCE","Days":1}}}"#,
        ],
    ] {
        let done = service.aws(&[&["s3api"], words, &["--bucket", "locked"]].concat());
        assert!(done.status.success(), "{}", text(&done));
    }
    let url = format!("s3://locked/snaps?endpoint={}", service.url);
    let id = sandbox.ok(&["-q", "movetos3", "disk.img", &url, "--name", "web"]);
    sandbox.ok(&["getfroms3", id.trim_end(), &url, "--output", "out.img"]);
    assert!(support::same(&image, sandbox.join("out.img")));
    sandbox.ok(&["-s", &url, "delete", "--yes", id.trim_end()]);
    assert!(sandbox.ok(&["-s", &url, "gc"]).contains("wait for the grace period"));
    assert_eq!(sandbox.ok(&["-s", &url, "list", "-q"]), "");
}

#[test]
fn a_source_is_deleted_only_if_its_archive_can_be_read() {
    if !has_buckets() {
        return;
    }
    let sandbox = Sandbox::with_bucket(false);
    sandbox.ok(&["-s", "here", "init"]);
    sandbox.random("disk.img", 3 * MIB);
    let id = sandbox.ok(&["-s", "here", "-q", "upload", "disk.img"]).trim_end().to_owned();
    let endpoint = &sandbox.service().url;
    let url = format!("bucket/archive?endpoint={endpoint}");
    let moved = |more: &[&str]| {
        let words = [&["-s", "here", "movetos3", &id, &url], more].concat();
        run(sandbox.fspfs().args(words))
    };
    let is_there = || sandbox.ok(&["-s", "here", "list", "-q"]).contains(&id);
    assert!(moved(&[]).status.success());
    assert!(moved(&["--dry-run", "--delete-source"]).status.success() && is_there());
    // The same bucket by another name.
    let other = format!("{url}&region=us-east-1");
    let itself = ["-s", &format!("s3://{url}"), "movetos3", &id, &other, "--delete-source"];
    let message = sandbox.fails(&itself);
    assert!(message.contains("itself"), "{message}");
    let packs = sandbox.service().keys("archive/packs/");
    sandbox.service().aws(&["s3api", "delete-object", "--bucket", "bucket", "--key", &packs[0]]);
    let deleting = moved(&["--delete-source"]);
    let said = text(&deleting);
    assert!(!deleting.status.success() && is_there(), "{said}");
    assert!(said.contains("the source stays"), "{said}");
}

#[test]
fn a_mount_moves_snapshots_to_a_bucket_and_back() {
    if !has_buckets() || !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::with_bucket(false);
    sandbox.ok(&["-s", "here", "init"]);
    let image = sandbox.image("disk.img", 64 * MIB, &RUNS);
    let id = sandbox.ok(&["-s", "here", "-q", "upload", "disk.img"]).trim_end().to_owned();
    let url = format!("bucket/archive?endpoint={}", sandbox.service().url);
    let mut fspfs = sandbox.fspfs();
    fspfs.args(["-s", "here"]);
    let mount = Mount::new(&sandbox, fspfs, &[]);
    let job = |operation: &str, line: String| {
        std::fs::write(mount.join("control").join(operation), line + "\n").unwrap();
        let read = |file: &str| {
            std::fs::read_to_string(mount.join("control/jobs/last").join(file)).unwrap()
        };
        support::until("the job ends", || read("state") != "running\n");
        assert_eq!(read("state"), "done 0\n", "{}", read("log"));
        read("result").lines().last().unwrap().to_owned()
    };
    assert_eq!(job("movetos3", format!("{id} {url}")), id);
    let out = sandbox.join("out.img");
    assert_eq!(job("getfroms3", format!("{id} {url} --output {}", out.display())), id);
    assert!(support::same(&image, &out));
    let back = job("getfroms3", format!("{id} {url}"));
    assert!(back != id && support::same(&image, mount.image(&back)), "{back}");
    mount.unmount();
}

#[test]
fn a_move_that_was_killed_goes_on() {
    if !has_buckets() {
        return;
    }
    let sandbox = Sandbox::with_bucket(false);
    sandbox.random("disk.img", 60 * MIB);
    let url = format!("bucket/archive?endpoint={}", sandbox.service().url);
    let movetos3 = ["-q", "movetos3", "disk.img", &url];
    let mut id = String::new();
    for round in 0..30 {
        let mut child =
            sandbox.fspfs().args(movetos3).stdout(std::process::Stdio::piped()).spawn().unwrap();
        if wait(&mut child, Duration::from_millis(300 + 150 * round)).is_some() {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success());
            id = String::from_utf8(output.stdout).unwrap().trim_end().to_owned();
            break;
        }
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL).unwrap();
        child.wait().unwrap();
    }
    sandbox.ok(&["getfroms3", &id, &url, "--output", "out.img"]);
    assert!(support::same(sandbox.join("disk.img"), sandbox.join("out.img")));
    let packs = sandbox.service().keys("archive/packs/").len();
    assert!(packs <= 120_usize.div_ceil(64) + 30, "{packs} packs");
}

#[test]
fn an_archive_that_another_host_has_begun_anew_is_its_own() {
    if !has_buckets() {
        return;
    }
    let sandbox = Sandbox::with_bucket(false);
    sandbox.ok(&["-s", "here", "init"]);
    sandbox.random("disk.img", 60 * MIB);
    let upload = |words: &[&str]| {
        let upload = [&["-s", "here", "-q", "upload", "disk.img", "--name", "web"], words].concat();
        sandbox.ok(&upload).trim_end().to_owned()
    };
    let parent = upload(&[]);
    let url = format!("bucket/archive?endpoint={}", sandbox.service().url);
    sandbox.ok(&["-s", "here", "movetos3", &parent, &url]);
    sandbox.random("more", 20 * MIB);
    sandbox.sh("dd if=more of=disk.img bs=1M seek=10 conv=notrunc status=none");
    let child = upload(&["--parent", &parent]);
    // Each host has journals of its own.
    let moves = |host: &str, words: &[&str]| {
        let mut command = sandbox.fspfs();
        command.env("XDG_STATE_HOME", sandbox.join(host));
        command.args(["-s", "here", "movetos3", &child, &url, "--pack-blocks", "4"]).args(words);
        command
    };
    let killed = |host: &str, words: &[&str], objects: usize| {
        let mut slowly = moves(host, words);
        slowly.args(["--max-requests-per-second", "15"]).stderr(std::process::Stdio::null());
        let mut running = slowly.spawn().unwrap();
        support::until("something is pending", || {
            sandbox.service().keys("archive/pending/").len() >= objects
        });
        kill(Pid::from_raw(running.id().cast_signed()), Signal::SIGKILL).unwrap();
        running.wait().unwrap();
    };
    killed("one", &[], 3);
    sandbox.ok(&["-s", &format!("s3://{url}"), "delete", "--yes", &child]);
    killed("two", &["--parent", "none"], 1);
    let said = text(&run(&mut moves("one", &[])));
    assert!(said.contains("another has its id") && said.contains("pending snapshot"), "{said}");
    let moved = run(&mut moves("two", &["--parent", "none"]));
    assert!(moved.status.success(), "{}", text(&moved));
    sandbox.ok(&["getfroms3", &child, &url, "--output", "out.img"]);
    assert!(support::same(sandbox.join("disk.img"), sandbox.join("out.img")));
}

#[test]
fn two_who_move_one_snapshot_make_one_archive() {
    if !has_buckets() {
        return;
    }
    let sandbox = Sandbox::with_bucket(false);
    sandbox.ok(&["-s", "here", "init"]);
    sandbox.random("disk.img", 40 * MIB);
    let id = sandbox.ok(&["-s", "here", "-q", "upload", "disk.img"]).trim_end().to_owned();
    let url = format!("bucket/archive?endpoint={}", sandbox.service().url);
    let children = ["one", "two"].map(|state| {
        let mut command = sandbox.fspfs();
        command.env("XDG_STATE_HOME", sandbox.join(state));
        command.args(["-s", "here", "-q", "movetos3", &id, &url]).spawn().unwrap()
    });
    let done = children.map(|mut child| child.wait().unwrap().success());
    assert!(done.contains(&true), "{done:?}");
    sandbox.ok(&["getfroms3", &id, &url, "--output", "out.img"]);
    assert!(support::same(sandbox.join("disk.img"), sandbox.join("out.img")));
}

#[test]
fn damage_is_found_and_named() {
    if !has_buckets() {
        return;
    }
    let sandbox = Sandbox::with_bucket(false);
    sandbox.random("disk.img", 40 * MIB);
    let id = sandbox.upload("disk.img", &[]);
    let packs = sandbox.service().keys("snaps/packs/");
    assert_eq!(packs.len(), 2);
    sandbox.service().aws(&["s3api", "delete-object", "--bucket", "bucket", "--key", &packs[0]]);
    std::fs::write(sandbox.join("short"), "short").unwrap();
    let put = ["s3api", "put-object", "--bucket", "bucket", "--body", "short", "--key", &packs[1]];
    assert!(sandbox.service().aws(&put).status.success());
    let output = run(sandbox.fspfs().arg("verify"));
    let said = text(&output);
    for pack in &packs {
        let name = pack.rsplit('/').next().unwrap();
        assert!(said.contains(name), "{said}");
    }
    let message = sandbox.fails(&["download", &id, "out.img"]);
    assert!(message.contains("packs/"), "{message}");
    assert!(!sandbox.join("out.img").exists());
}

#[test]
fn a_bucket_or_a_server_that_is_not_there_is_told_within_seconds() {
    if !has_buckets() {
        return;
    }
    let sandbox = Sandbox::with_bucket(false);
    let url = &sandbox.service().url;
    let other = sandbox.fails(&["list", "-s", &format!("s3://other-bucket/x?endpoint={url}")]);
    assert!(other.contains("NoSuchBucket"), "{other}");
    let began = std::time::Instant::now();
    let nobody = sandbox.fails(&["list", "-s", "s3://bucket/x?endpoint=http://127.0.0.1:9"]);
    assert!(
        nobody.contains("127.0.0.1:9") && began.elapsed() < Duration::from_secs(15),
        "{nobody}"
    );
    let empty = sandbox.fails(&["list", "-s", &format!("s3://bucket/x?endpoint={url}")]);
    assert!(empty.contains(&format!("`fspfs init 's3://bucket/x?endpoint={url}'`")), "{empty}");
    let taken = sandbox.fails(&["init", &format!("s3://bucket?endpoint={url}")]);
    assert!(taken.contains("something else"), "{taken}");
}

/// What the doctor says of a check: how it is, and why.
fn told_of(sandbox: &Sandbox, url: &str, check: &str) -> (String, String) {
    let checks = sandbox.doctor(url);
    let found = checks.iter().find(|found| found["check"] == check);
    let found = found.unwrap_or_else(|| panic!("{check} is not among {checks:?}"));
    let [status, why] = ["status", "found"].map(|name| found[name].as_str().unwrap().to_owned());
    assert!(status == "ok" || status == "skipped" || found["cure"].is_string(), "{found}");
    (status, why)
}

#[test]
fn the_doctor_looks_at_a_bucket_and_changes_nothing() {
    if !has_buckets() || !support::has(&["faketime"]) {
        return;
    }
    let sandbox = Sandbox::with_bucket(true);
    let url = format!("s3://bucket/snaps?endpoint={}", sandbox.service().url);
    let status = |check: &str| told_of(&sandbox, &url, check).0;
    for check in ["credentials", "clock", "s3:ListBucket", "repository", "s3:GetObject"] {
        assert_eq!(status(check), "ok", "{check}");
    }
    let objects = sandbox.service().keys("");
    assert_eq!(told_of(&sandbox, &url, "s3:PutObject").0, "ok");
    assert_eq!(sandbox.service().keys(""), objects);
    let (_, said) = at_another_time(&sandbox, "+1h", &["doctor", "-s", &url]);
    assert!(said.contains("FAILURE  clock: it is 36") && said.contains("timedatectl"), "{said}");
    let other = url.replace("//bucket", "//other-bucket");
    let (status, why) = told_of(&sandbox, &other, "s3:ListBucket");
    assert!(status == "failure" && why.contains("NoSuchBucket"), "{status}: {why}");
    assert_eq!(told_of(&sandbox, &other, "repository").0, "skipped");
    let (status, why) = told_of(&sandbox, &url.replace("/snaps", "/none"), "repository");
    assert!(status == "failure" && why.contains("fspfs.json"), "{status}: {why}");
    let began = std::time::Instant::now();
    let nobody = "s3://bucket/snaps?endpoint=http://127.0.0.1:9";
    let (status, why) = told_of(&sandbox, nobody, "bucket");
    assert!(status == "failure" && why.contains("127.0.0.1:9"), "{status}: {why}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn archives_are_copied_and_fetched_by_tools_that_know_nothing_of_them() {
    if !has_buckets() {
        return;
    }
    let sandbox = Sandbox::with_bucket(false);
    let image = sandbox.image("disk.img", 64 * MIB, &RUNS);
    let id = sandbox.upload("disk.img", &["--name", "web"]);
    let aws = |arguments: &[&str]| {
        let output = sandbox.service().aws(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", text(&output));
    };
    aws(&["s3", "mb", "s3://other"]);
    aws(&["s3", "sync", "--quiet", "s3://bucket/snaps", "s3://other/copy"]);
    let copy = format!("s3://other/copy?endpoint={}", sandbox.service().url);
    assert!(sandbox.ok(&["-s", &copy, "verify"]).contains("Everything is intact"));
    sandbox.ok(&["-s", &copy, "download", "name:web", "out.img"]);
    assert!(support::same(&image, sandbox.join("out.img")));
    // And written to.
    let child = ["-s", &copy, "-q", "upload", "disk.img", "--name", "web", "--parent", &id];
    sandbox.ok(&child);
    aws(&["s3", "sync", "--quiet", "s3://bucket/snaps", "fetched"]);
    sandbox.sh(&format!(
        "{} {}/scripts/restore.py fetched {id} restored.img",
        support::serve::python().display(),
        env!("CARGO_MANIFEST_DIR")
    ));
    assert!(support::same(&image, sandbox.join("restored.img")));
    assert!(sandbox.ok(&["-s", "fetched", "verify"]).contains("Everything is intact"));
}

#[test]
fn an_endpoint_with_a_password_is_refused_without_showing_it() {
    let sandbox = Sandbox::new();
    let at = "http://me:geheim@127.0.0.1:9";
    for (store, variable) in
        [("s3://bucket/x", "AWS_ENDPOINT_URL_S3"), ("ebs:", "AWS_ENDPOINT_URL")]
    {
        let output = run(sandbox.fspfs().env(variable, at).args(["-s", store, "list"]));
        let said = text(&output);
        assert!(!output.status.success() && said.contains("a user or a password"), "{said}");
        assert!(!said.contains("geheim"), "{said}");
        let output = run(sandbox.fspfs().env(variable, at).args(["-s", store, "doctor"]));
        let said = text(&output);
        assert!(said.contains("a user or a password") && !said.contains("geheim"), "{said}");
    }
    // Also where a profile names it.
    std::fs::create_dir(sandbox.join(".aws")).unwrap();
    let profile = format!("[default]\nregion = us-east-1\nendpoint_url = {at}\n");
    std::fs::write(sandbox.join(".aws/config"), profile).unwrap();
    for store in ["s3://bucket/x", "ebs:"] {
        let output = run(sandbox.fspfs().env("HOME", &sandbox.path).args(["-s", store, "list"]));
        let said = text(&output);
        assert!(!output.status.success() && said.contains("a user or a password"), "{said}");
        assert!(!said.contains("geheim"), "{said}");
    }
}

#[test]
fn a_profile_that_is_not_there_is_told_at_once() {
    let sandbox = Sandbox::new();
    std::fs::create_dir(sandbox.join(".aws")).unwrap();
    std::fs::write(sandbox.join(".aws/config"), "[profile work]\nregion = eu-west-1\n").unwrap();
    let failed = |store: &str, variable: Option<&str>| {
        let mut command = sandbox.fspfs();
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("AWS_") {
                command.env_remove(name);
            }
        }
        command.envs(variable.map(|profile| ("AWS_PROFILE", profile)));
        let began = std::time::Instant::now();
        let output = run(command.env("HOME", &sandbox.path).args(["-s", store, "list"]));
        let said = text(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}: {said}", began.elapsed());
        assert!(said.contains("which has work"), "{said}");
        assert!(said.contains("aws configure --profile nobody"), "{said}");
    };
    failed("ebs://nobody@us-east-1", None);
    failed("s3://bucket/snaps?profile=nobody", None);
    failed("ebs:", Some("nobody"));
    failed("s3://bucket/snaps", Some("nobody"));
}

#[test]
fn an_archive_is_compressed_and_cut_as_asked() {
    if !has_buckets() {
        return;
    }
    let sandbox = Sandbox::with_bucket(false);
    // Numbers shrink, and the more the harder it is tried.
    sandbox.sh("seq 1 2000000 >numbers; head -c 8M numbers >disk.img");
    let packs = |more: &[&str], prefix: &str| {
        let url = format!("bucket/{prefix}?endpoint={}", sandbox.service().url);
        let archive = ["--json", "movetos3", "disk.img", &url, "--name", prefix];
        let said = sandbox.ok(&[&archive[..], more].concat());
        let said: serde_json::Value = serde_json::from_str(&said).unwrap();
        sandbox.ok(&["getfroms3", said["id"].as_str().unwrap(), &url, "--output", "out.img"]);
        sandbox.sh("cmp -n 8388608 disk.img out.img");
        let packs = sandbox.service().keys(&format!("{prefix}/packs/")).len();
        (packs, said["stored"]["bytes"].as_u64().unwrap())
    };
    let (plain, fast) = packs(&[], "plain");
    assert_eq!(plain, 1);
    let (cut, small) = packs(&["--level", "19", "--pack-blocks", "5"], "small");
    assert_eq!(cut, 4);
    assert!(small < fast * 9 / 10, "{small} of {fast}");
    for bad in
        [["--level", "0"], ["--level", "20"], ["--pack-blocks", "0"], ["--pack-blocks", "65"]]
    {
        let output = run(sandbox.fspfs().args(["movetos3", "disk.img", "bucket/x"]).args(bad));
        assert_eq!(output.status.code(), Some(2), "{bad:?}: {}", text(&output));
    }
}

/// An archive of an image of 1 GiB as Flexible Snapshot Proxy lays it out, in `orig/` of the bucket: of these runs of
/// blocks, one object each.
fn original(sandbox: &Sandbox, id: &str, runs: &[(u64, u64)]) -> Vec<String> {
    use base64::Engine as _;
    let image = std::fs::File::open(sandbox.join("disk.img")).unwrap();
    let directory = sandbox.join(format!("orig/{id}.1"));
    std::fs::create_dir_all(&directory).unwrap();
    let mut names = Vec::new();
    for &(first, count) in runs {
        let mut blocks = vec![0; usize::try_from(count * BLOCK).unwrap()];
        image.read_exact_at(&mut blocks, first * BLOCK).unwrap();
        let digest = fspfs::model::Digest::of(&blocks).0;
        let digest = base64::engine::general_purpose::URL_SAFE.encode(digest);
        let name = format!("{first}.{digest}.{count}.zstd");
        std::fs::write(directory.join(&name), zstd::bulk::compress(&blocks, 1).unwrap()).unwrap();
        names.push(name);
    }
    let copied =
        sandbox.service().aws(&["s3", "cp", "--quiet", "--recursive", "orig", "s3://bucket/orig"]);
    assert!(copied.status.success(), "{}", text(&copied));
    names
}

#[test]
fn archives_of_the_original_are_read_as_far_as_they_are_whole() {
    if !has_buckets() {
        return;
    }
    let sandbox = Sandbox::with_bucket(false);
    sandbox.image("disk.img", 1 << 30, &[(0, 70 * BLOCK), ((1 << 30) - 8 * BLOCK, 8 * BLOCK)]);
    let whole = "snap-0123456789abcdef0";
    let runs = [(0, 64), (64, 6), (2040, 8)];
    original(&sandbox, whole, &runs);
    let url = format!("bucket/orig?endpoint={}", sandbox.service().url);
    sandbox.ok(&["getfroms3", whole, &url, "--output", "out.img"]);
    assert!(support::same(sandbox.join("disk.img"), sandbox.join("out.img")));
    sandbox.ok(&["-s", "there", "init"]);
    let back = sandbox.ok(&["-s", "there", "-q", "getfroms3", whole, &url]).trim_end().to_owned();
    sandbox.ok(&["-s", "there", "download", &back, "out.img"]);
    assert!(support::same(sandbox.join("disk.img"), sandbox.join("out.img")));
    // As the original leaves it: the last one is missing. And one more is damaged.
    let cut = "snap-0123456789abcdef1";
    let names = original(&sandbox, cut, &runs[..2]);
    let said = sandbox.ok(&["-s", &format!("s3://{url}"), "list"]);
    assert!(said.contains("completed") && said.contains("error"), "{said}");
    let message = sandbox.fails(&["getfroms3", cut, &url, "--output", "cut.img"]);
    assert!(message.contains("last segment") && message.contains("--salvage"), "{message}");
    std::fs::write(sandbox.join(format!("orig/{cut}.1/{}", names[1])), "damage").unwrap();
    let copied =
        sandbox.service().aws(&["s3", "cp", "--quiet", "--recursive", "orig", "s3://bucket/orig"]);
    assert!(copied.status.success());
    for arguments in [&["--output", "cut.img"][..], &["-s", "there"]] {
        let salvage = [&["getfroms3", cut, &url, "--salvage"], arguments].concat();
        let output = run(sandbox.fspfs().args(salvage));
        let said = text(&output);
        assert_eq!(output.status.code(), Some(3), "{said}");
        assert!(said.contains(&names[1]) && said.contains("last segment"), "{said}");
    }
    sandbox.sh(&format!("cmp -n {} disk.img cut.img", 64 * BLOCK));
    let list = sandbox.ok(&["-s", "there", "list", "--json"]);
    assert!(list.contains("fspfs:salvaged"), "{list}");
    assert!(
        sandbox
            .fails(&["-s", &format!("s3://{url}"), "delete", "--yes", whole])
            .contains("only be read")
    );
}
