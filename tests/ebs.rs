//! `ebs:` stores when things go wrong, and what only they have: filters, costs, credentials.
#![allow(clippy::unwrap_used)]

use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use rstest::rstest;

use support::{BLOCK, GIB, MIB, Mount, Sandbox, errno, run, same, text, until, wait};

mod support;

/// How long a request is tried, and some more.
const DEADLINE: Duration = Duration::from_secs(75);

/// Everything that passes by itself, at rates that hit each operation.
const FAULTS: &str = "throttle=5%,error=2%,cut-body=2%,cut=1%,corrupt=1%,empty-pages=20%,seed=3";

fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.ok(&["init", "store"]);
    sandbox
}

/// A mount of a store with one snapshot of `mib` MiB, and its id; `None` where nothing can be mounted.
fn mounted(mib: u64, options: &[&str]) -> Option<(Sandbox, Mount, String)> {
    if !support::can_mount(&[]) {
        return None;
    }
    let mut sandbox = sandbox();
    sandbox.image("disk.img", mib * MIB, &[(0, mib * MIB)]);
    sandbox.serve(&[]);
    let id = sandbox.upload("disk.img", &[]);
    let mount = sandbox.mount(options);
    Some((sandbox, mount, id))
}

/// Reads one block of an image past the page cache.
fn read_block(mount: &Mount, id: &str, index: u64) -> std::io::Result<Vec<u8>> {
    let file = std::fs::File::open(mount.image(id))?;
    let mut block = vec![0; BLOCK as usize];
    file.read_exact_at(&mut block, index * BLOCK)?;
    Ok(block)
}

#[rstest]
#[case::slow("latency=200ms,tokens=60s")]
#[case::with_short_lived_tokens("latency=20ms,tokens=2s")]
fn faults_do_not_show(#[case] more: &str) {
    if !support::can_mount(&["cp", "dd"]) {
        return;
    }
    let mut sandbox = sandbox();
    sandbox.serve(&["--inject", &format!("{more},{FAULTS}")]);
    sandbox.random("data", 100 * MIB);
    let image = sandbox.image("disk.img", 3 * GIB + 5, &[(0, 3 * MIB), (GIB, 1), (3 * GIB, 5)]);
    sandbox.sh("dd if=data of=disk.img bs=1M seek=100 conv=notrunc status=none");
    let id = sandbox.upload("disk.img", &[]);
    sandbox.assert_holds(&id, "disk.img");
    let mount = sandbox.mount(&["--memory", "64MiB"]);
    sandbox.sh(&format!("cp {} copy.img", mount.image(&id).display()));
    assert!(same(&image, sandbox.join("copy.img")));
    sandbox.sh("cp disk.img mnt/new/again.img");
    let again = mount.committed("again.img");
    sandbox.sh("dd if=data of=mnt/new/again.img bs=1M count=20 seek=2000 conv=notrunc status=none");
    let child = mount.committed("again.img");
    assert_ne!(again, child);
    sandbox.sh("dd if=data of=disk.img bs=1M count=20 seek=2000 conv=notrunc status=none");
    let shown = mount.image(&child);
    until("the child is shown", || shown.exists());
    assert!(same(&image, &shown));
    assert!(mount.metric("fspfs_service_requests_again_total") > 20);
    mount.unmount();
    sandbox.assert_holds(&child, "disk.img");
    let verified = sandbox.ok(&["verify", &child, "--against", "disk.img"]);
    assert!(verified.contains("Everything is intact."), "{verified}");
}

#[test]
fn puts_a_corrupted_block_again() {
    let mut sandbox = sandbox();
    sandbox.serve(&["--inject", "put.corrupt=20%,put.fail=ConflictingBlockUpdate:20%"]);
    sandbox.image("disk.img", 40 * MIB, &[(0, 40 * MIB)]);
    let id = sandbox.upload("disk.img", &[]);
    sandbox.assert_holds(&id, "disk.img");
    sandbox.serve(&["--inject", "put.corrupt=100%"]);
    let message = sandbox.fails(&["upload", "disk.img"]);
    assert!(message.contains("after 6 attempts") && message.contains("INVALID_BLOCK"), "{message}");
}

#[test]
fn a_snapshot_that_not_all_know_yet_is_waited_for() {
    if !support::can_mount(&["cp"]) {
        return;
    }
    let mut sandbox = sandbox();
    sandbox.serve(&["--inject", "missing-after-start=6s"]);
    let image = sandbox.image("disk.img", 40 * MIB, &[(0, 20 * MIB)]);
    let began = Instant::now();
    let id = sandbox.upload("disk.img", &[]);
    assert!(began.elapsed() >= Duration::from_secs(6));
    sandbox.assert_holds(&id, "disk.img");
    let mount = sandbox.mount(&[]);
    sandbox.sh("cp disk.img mnt/new/a.img");
    let copy = mount.committed("a.img");
    // One block tries whether it is known; all of them did, each on its own, would be hundreds.
    assert!(mount.metric("fspfs_service_requests_again_total") < 100);
    mount.unmount();
    sandbox.assert_holds(&copy, &image);
    // One that nobody started here is not there, and that is told at once.
    let began = Instant::now();
    let message = sandbox.fails(&["download", "snap-0123456789abcdef0", "x"]);
    assert!(message.contains("cannot describe snap-0123456789abcdef0"), "{message}");
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[rstest]
#[case::denied("get.fail=AccessDeniedException", Errno::EACCES, "AccessDeniedException")]
#[case::key_denied("get.fail=DependencyAccessDenied", Errno::EACCES, "DEPENDENCY_ACCESS_DENIED")]
#[case::not_found("get.fail=ResourceNotFoundException", Errno::ENOENT, "ResourceNotFoundException")]
#[case::listing_denied("list.fail=AccessDeniedException", Errno::EACCES, "list the blocks")]
#[case::expired("get.fail=ExpiredTokenException", Errno::EACCES, "ExpiredTokenException")]
#[case::quota("get.fail=ServiceQuotaExceededException", Errno::EDQUOT, "Quota")]
fn tells_faults_that_do_not_pass(#[case] fault: &str, #[case] expected: Errno, #[case] says: &str) {
    if !support::can_mount(&[]) {
        return;
    }
    let mut sandbox = sandbox();
    sandbox.image("disk.img", 8 * MIB, &[(0, 8 * MIB)]);
    sandbox.serve(&[]);
    let id = sandbox.upload("disk.img", &[]);
    let address = sandbox.service().address();
    sandbox.serve_at(&address, &["--inject", fault]);
    let mount = sandbox.mount(&[]);
    let began = Instant::now();
    assert_eq!(errno(read_block(&mount, &id, 3)), expected as i32);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let message = sandbox.fails(&["download", &id, "out.img"]);
    assert!(message.contains(says) && message.contains("[request "), "{message}");
    assert!(!sandbox.join("out.img").exists());
    // Once the cause is gone it works, without a new mount.
    sandbox.serve_at(&address, &[]);
    assert_eq!(read_block(&mount, &id, 3).unwrap(), support::pattern(3 * BLOCK, BLOCK as usize));
    let log = mount.unmount();
    assert!(log.contains(says), "{log}");
}

#[test]
fn an_endpoint_goes_and_comes_back() {
    let Some((mut sandbox, mount, id)) = mounted(64, &["--memory", "16MiB"]) else { return };
    read_block(&mount, &id, 0).unwrap();
    let address = sandbox.service().address();
    // Gone for a moment: the reader waits.
    sandbox.stop_serving();
    let path = mount.image(&id);
    let mut reader = Command::new("sha256sum").arg(&path).stdout(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(3));
    assert!(reader.try_wait().unwrap().is_none(), "the reader has not waited");
    sandbox.serve_at(&address, &[]);
    assert!(wait(&mut reader, support::PATIENCE).expect("it is read").success());
    let mut sum = String::new();
    reader.stdout.unwrap().read_to_string(&mut sum).unwrap();
    assert_eq!(sum[..64], sandbox.sh("sha256sum disk.img")[..64]);
    mount.unmount();
}

#[test]
fn an_endpoint_that_is_gone_is_an_error_in_the_end() {
    let Some((mut sandbox, mount, id)) = mounted(16, &[]) else { return };
    // Its listing is known, its blocks are not.
    assert!(std::fs::File::open(mount.image(&id)).is_ok());
    let address = sandbox.service().address();
    sandbox.stop_serving();
    let began = Instant::now();
    let got = errno(read_block(&mount, &id, 9));
    assert!([libc::EIO, libc::ETIMEDOUT].contains(&got), "{got}");
    assert!(began.elapsed() < DEADLINE, "{:?}", began.elapsed());
    sandbox.serve_at(&address, &[]);
    // What took so long is not tried again for a moment.
    until("it is read again", || read_block(&mount, &id, 9).is_ok());
    assert_eq!(read_block(&mount, &id, 9).unwrap(), support::pattern(9 * BLOCK, BLOCK as usize));
    mount.unmount();
}

#[rstest]
#[case::many_at_once(&[])]
#[case::one_after_the_other(&["--max-in-flight", "1"])]
fn an_endpoint_that_is_silent_times_out_and_its_readers_can_be_killed(#[case] options: &[&str]) {
    let Some((sandbox, mount, id)) = mounted(16, options) else { return };
    read_block(&mount, &id, 0).unwrap();
    sandbox.service().suspend();
    let mut reader =
        Command::new("cat").arg(mount.image(&id)).stdout(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    reader.kill().unwrap();
    assert!(wait(&mut reader, Duration::from_secs(5)).is_some(), "it cannot be killed");
    let began = Instant::now();
    assert_eq!(errno(read_block(&mount, &id, 20)), libc::ETIMEDOUT);
    assert!(began.elapsed() < DEADLINE, "{:?}", began.elapsed());
    sandbox.service().resume();
    until("it is read again", || read_block(&mount, &id, 20).is_ok());
    assert_eq!(read_block(&mount, &id, 20).unwrap(), support::pattern(20 * BLOCK, BLOCK as usize));
    mount.unmount();
}

#[test]
fn a_snapshot_that_is_deleted_while_it_is_read_is_gone() {
    if !support::can_mount(&[]) {
        return;
    }
    let mut sandbox = sandbox();
    sandbox.serve(&[]);
    sandbox.image("disk.img", 64 * MIB, &[(0, 64 * MIB)]);
    let id = sandbox.upload("disk.img", &[]);
    let mount = sandbox.mount(&["--memory", "16MiB"]);
    let file = std::fs::File::open(mount.image(&id)).unwrap();
    let mut block = vec![0; BLOCK as usize];
    file.read_exact_at(&mut block, 0).unwrap();
    sandbox.ok(&["delete", "--yes", &id]);
    // A server may know it for a second more.
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(errno(file.read_exact_at(&mut block, 100 * BLOCK)), libc::ENOENT);
    drop(file);
    mount.unmount();
}

#[test]
fn credentials_that_are_renewed_are_used() {
    if !support::can_mount(&[]) {
        return;
    }
    let mut sandbox = sandbox();
    let keys = |secret: &str| {
        format!("[default]\naws_access_key_id = AKIAONE\naws_secret_access_key = {secret}\n")
    };
    for (name, secret) in [("mine", "first"), ("first", "first"), ("second", "second")] {
        std::fs::write(sandbox.join(name), keys(secret)).unwrap();
    }
    sandbox.sh("chmod 600 first second mine");
    sandbox.image("disk.img", 16 * MIB, &[(0, 16 * MIB)]);
    sandbox.serve(&["--credentials", "first"]);
    let address = sandbox.service().address();
    let fspfs = || {
        let mut fspfs = sandbox.fspfs();
        fspfs.env_remove("AWS_ACCESS_KEY_ID").env_remove("AWS_SECRET_ACCESS_KEY");
        fspfs.env("AWS_SHARED_CREDENTIALS_FILE", sandbox.join("mine"));
        fspfs.env("AWS_CONFIG_FILE", "/dev/null");
        fspfs
    };
    let output = run(fspfs().args(["upload", "disk.img"]));
    assert!(output.status.success(), "{}", text(&output));
    let id = String::from_utf8(output.stdout).unwrap().lines().last().unwrap().to_owned();
    let mount = Mount::new(&sandbox, fspfs(), &[]);
    read_block(&mount, &id, 0).unwrap();
    // What was valid is not any more.
    sandbox.serve_at(&address, &["--credentials", "second"]);
    assert_eq!(errno(read_block(&mount, &id, 20)), libc::EACCES);
    std::fs::write(sandbox.join("mine"), keys("second")).unwrap();
    until("the new credentials are used", || read_block(&mount, &id, 20).is_ok());
    mount.unmount();
}

#[test]
fn the_list_is_narrowed_down_by_the_service() {
    let mut sandbox = sandbox();
    sandbox.serve(&[]);
    sandbox.image("disk.img", MIB, &[(0, 10)]);
    let web = sandbox.upload("disk.img", &["--tag", "Role=web", "--name", "a"]);
    let db = sandbox.upload("disk.img", &["--tag", "Role=db"]);
    let listed = |options: &[&str]| {
        let mut arguments = vec!["list", "--json"];
        arguments.extend(options);
        let found: Vec<serde_json::Value> = serde_json::from_str(&sandbox.ok(&arguments)).unwrap();
        let ids = found.iter().map(|snapshot| snapshot["id"].as_str().unwrap().to_owned());
        ids.collect::<Vec<_>>()
    };
    assert_eq!(listed(&[]), [web.clone(), db.clone()]);
    assert_eq!(listed(&["--filter", "tag:Role=web"]), std::slice::from_ref(&web));
    assert_eq!(listed(&["--filter", "tag:Role=w*,d*"]), [web.clone(), db.clone()]);
    assert_eq!(listed(&["--filter", "tag:Role=web", "--filter", "status=pending"]), [""; 0]);
    assert_eq!(listed(&["--owner", "self"]), [web.clone(), db.clone()]);
    assert_eq!(listed(&["--owner", "amazon"]), [""; 0]);
    let message = sandbox.fails(&["list", "--filter", "color=red"]);
    assert!(message.contains("list the snapshots") && message.contains("color"), "{message}");
    if !support::can_mount(&[]) {
        return;
    }
    let mount = sandbox.mount(&["--filter", "tag:Role=db"]);
    let shown = support::names(&mount.path);
    assert!(shown.contains(&format!("{db}.img")) && !shown.contains(&format!("{web}.img")));
    // What is not listed can still be read by its id.
    assert!(mount.image(&web).exists());
    mount.unmount();
    // A repository is filtered here.
    let output = run(sandbox.fspfs().args(["-s", "store", "list", "--filter", "tag:Role=db"]));
    assert!(text(&output).contains(&db) && !text(&output).contains(&web), "{}", text(&output));
}

#[test]
fn tells_what_requests_cost() {
    let mut sandbox = sandbox();
    sandbox.serve(&[]);
    sandbox.image("disk.img", 10 * MIB, &[(0, 10 * MIB)]);
    let output = run(sandbox.fspfs().args(["upload", "disk.img"]));
    // A start, 20 puts, the completion, and a look at what came of it.
    let said = text(&output);
    assert!(said.contains("23 requests: about $0.0001"), "{said}");
    let id = String::from_utf8(output.stdout).unwrap().lines().last().unwrap().to_owned();
    if !support::can_mount(&[]) {
        return;
    }
    let mount = sandbox.mount(&[]);
    assert_eq!(std::fs::read(mount.image(&id)).unwrap().len() as u64, 10 * MIB);
    let metrics = std::fs::read_to_string(mount.join("control/metrics")).unwrap();
    for line in [
        "fspfs_service_requests_total{request=\"GetSnapshotBlock\"} 20",
        "fspfs_service_requests_total{request=\"ListSnapshotBlocks\"} 1",
        "fspfs_service_requests_again_total 0",
        "fspfs_service_cost_dollars_total 0.000060600",
    ] {
        assert!(metrics.lines().any(|l| l == line), "{line}\n{metrics}");
    }
    mount.unmount();
}

#[test]
fn a_child_has_only_what_differs() {
    let mut sandbox = sandbox();
    sandbox.serve(&[]);
    sandbox.random("disk.img", 64 * MIB);
    let parent = sandbox.upload("disk.img", &[]);
    sandbox.sh("dd if=/dev/urandom of=disk.img bs=1M count=2 seek=10 conv=notrunc status=none
         fallocate -p -o 20M -l 1M disk.img");
    let output = run(sandbox.fspfs().args(["upload", "--parent-snapshot-id", &parent, "disk.img"]));
    let said = text(&output);
    // Two MiB were written, and one is zeros now.
    assert!(said.contains("Total chunks uploaded 6"), "{said}");
    // The service tells no digests.
    assert!(said.contains("128 chunks of the parent were read to compare"), "{said}");
    let child = String::from_utf8(output.stdout).unwrap().lines().last().unwrap().to_owned();
    sandbox.assert_holds(&child, "disk.img");
    assert_eq!(sandbox.parent_of(&child), Some(parent));
}

#[test]
fn the_holes_of_an_encrypted_snapshot_are_put() {
    let mut sandbox = sandbox();
    sandbox.serve(&[]);
    sandbox.image("disk.img", GIB, &[(5 * MIB, 10)]);
    for (options, put) in [
        (&["--encrypted"][..], 2048),
        (
            &[
                "--encrypted",
                "--kms-key-id",
                "arn:aws:kms:us-east-1:000000000000:key/mine",
                "--encrypted-holes",
                "skip",
            ],
            1,
        ),
        (&[], 1),
    ] {
        let mut arguments = vec!["upload", "disk.img"];
        arguments.extend(options);
        let said = sandbox.ok(&arguments);
        assert!(said.contains(&format!("Total chunks uploaded {put}\n")), "{options:?}: {said}");
        let id = said.lines().last().unwrap();
        assert_eq!(sandbox.described(id)["encrypted"], !options.is_empty());
        sandbox.assert_holds(id, "disk.img");
    }
    // A hundred thousand holes cost money.
    sandbox.image("large.img", 60 * GIB, &[(0, 10)]);
    let message = sandbox.fails(&["upload", "large.img", "--encrypted"]);
    assert!(message.contains("122879 holes") && message.contains("$0.74"), "{message}");
    assert_eq!(sandbox.snapshots().len(), 3, "nothing is left of it");
}

#[test]
fn finds_blocks_that_differ() {
    let mut sandbox = sandbox();
    sandbox.serve(&[]);
    sandbox.image("disk.img", 30 * MIB, &[(0, 10 * MIB), (20 * MIB, MIB)]);
    let id = sandbox.upload("disk.img", &[]);
    let said = sandbox.ok(&["verify"]);
    assert!(said.contains("Verified 1 snapshots: 22 blocks"), "{said}");
    sandbox.ok(&["verify", &id, "--against", "disk.img"]);
    let file = std::fs::File::options().write(true).open(sandbox.join("disk.img")).unwrap();
    file.write_all_at(b"!", 5 * MIB).unwrap();
    file.write_all_at(b"!", 15 * MIB).unwrap();
    let output = run(sandbox.fspfs().args(["verify", &id, "--against", "disk.img"]));
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for found in ["block 10: it differs from", "block 30: it differs from", "2 blocks are not"] {
        assert!(said.contains(found), "{said}");
    }
    // Blocks that are damaged whatever one does.
    let address = sandbox.service().address();
    sandbox.serve_at(&address, &["--inject", "get.corrupt=100%"]);
    let message = sandbox.fails(&["download", &id, "out.img"]);
    assert!(message.contains("has the SHA-256") && message.contains("attempts"), "{message}");
}

#[test]
fn a_second_commit_waits_for_the_first_snapshot() {
    if !support::can_mount(&["cp", "dd"]) {
        return;
    }
    let mut sandbox = sandbox();
    sandbox.serve(&["--pending", "4"]);
    sandbox.random("disk.img", 20 * MIB);
    let mount = sandbox.mount(&[]);
    sandbox.sh("cp disk.img mnt/new/a.img");
    sandbox.sh("dd if=/dev/urandom of=disk.img bs=1M count=1 seek=3 conv=notrunc status=none");
    sandbox
        .sh("dd if=disk.img of=mnt/new/a.img bs=1M count=1 skip=3 seek=3 conv=notrunc status=none");
    let id = mount.committed("a.img");
    mount.unmount();
    let listed = sandbox.snapshots();
    assert_eq!(listed.len(), 2);
    let until = Instant::now() + Duration::from_secs(20);
    while sandbox.described(&id)["state"] != "completed" {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(200));
    }
    sandbox.assert_holds(&id, "disk.img");
}

#[test]
fn a_completion_whose_answer_is_lost_is_no_failure() {
    let mut sandbox = sandbox();
    sandbox.image("disk.img", 4 * MIB, &[(0, 4 * MIB)]);
    // The first answer is cut, and the second attempt finds the snapshot complete, though pending.
    sandbox.serve(&["--pending", "2", "--inject", "complete.cut-body=50%,seed=1"]);
    for _ in 0..4 {
        sandbox.upload("disk.img", &[]);
    }
    assert_eq!(sandbox.snapshots().len(), 4);
}

#[test]
fn a_snapshot_is_kept_though_nothing_can_be_learnt_of_it() {
    let mut sandbox = sandbox();
    sandbox.image("disk.img", 4 * MIB, &[(0, 4 * MIB)]);
    sandbox.serve(&["--inject", "ec2.fail=AccessDeniedException"]);
    let output = run(sandbox.fspfs().args(["upload", "disk.img"]));
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("was accepted"), "{}", text(&output));
    let id = String::from_utf8(output.stdout).unwrap().lines().last().unwrap().to_owned();
    assert_eq!(sandbox.stored(&id)["state"], "completed");
}

#[test]
fn an_upload_that_is_interrupted_while_it_begins_names_what_it_leaves() {
    let mut sandbox = sandbox();
    sandbox.image("disk.img", 32 * MIB, &[(0, 32 * MIB)]);
    sandbox.serve(&[]);
    // At some of these moments the snapshot is started, and its id is on the way.
    for milliseconds in 4..64 {
        let mut upload = sandbox.fspfs();
        upload.args(["upload", "disk.img"]).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut upload = upload.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(milliseconds));
        let pid = nix::unistd::Pid::from_raw(i32::try_from(upload.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
        assert!(wait(&mut upload, Duration::from_secs(20)).is_some(), "it does not end");
        let said = text(&upload.wait_with_output().unwrap());
        let list = sandbox.snapshots();
        for pending in list.iter().filter(|snapshot| snapshot["state"] == "pending") {
            let id = pending["id"].as_str().unwrap();
            assert!(said.contains(&format!("{id} stays pending")), "{milliseconds} ms: {said}");
            sandbox.ok(&["delete", "--yes", id]);
        }
    }
}

#[test]
fn many_requests_are_not_begun_at_once_if_that_was_asked_for() {
    let mut sandbox = sandbox();
    sandbox.serve(&[]);
    sandbox.image("disk.img", 30 * MIB, &[(0, 30 * MIB)]);
    let began = Instant::now();
    sandbox.upload("disk.img", &["--max-requests-per-second", "20", "--max-in-flight", "2"]);
    assert!(began.elapsed() >= Duration::from_millis(2800), "{:?}", began.elapsed());
}

#[test]
fn no_credentials_are_told_with_where_to_look() {
    let sandbox = sandbox();
    let mut fspfs = sandbox.fspfs();
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("AWS_") {
            fspfs.env_remove(name);
        }
    }
    fspfs.env("HOME", &sandbox.path).env("AWS_EC2_METADATA_DISABLED", "true");
    let output = run(fspfs.args(["-s", "ebs://us-east-1?endpoint=http://127.0.0.1:9", "list"]));
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("fspfs doctor"), "{}", text(&output));
}
