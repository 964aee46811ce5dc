//! What boto3, the AWS CLI and `fspfs` itself wrote, read by each of them; and servers that end, or
//! share a store.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use serde_json::Value;
use sha2::Digest as _;

use super::support::exchange::same_data;
use super::support::serve::{Server, has_clients};
use super::support::{BLOCK, GIB, Sandbox, text};

/// The exit code of version 1 of the CLI, whatever went wrong.
const FAILED: Option<i32> = Some(255);

fn string<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_else(|| panic!("no {name} in {value}"))
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

/// Block `index` of a file.
fn block(file: &Path, index: u64) -> Vec<u8> {
    let mut data = vec![0; usize::try_from(BLOCK).unwrap()];
    File::open(file).unwrap().read_exact_at(&mut data, index * BLOCK).unwrap();
    data
}

/// Writes blocks of an image with the AWS CLI; the id of the snapshot.
fn write_with_cli(
    sandbox: &Sandbox,
    server: &Server,
    image: &Path,
    indexes: &[u64],
    parent: Option<&str>,
) -> String {
    let mut start = vec!["ebs", "start-snapshot", "--volume-size", "1"];
    start.extend(["--description", "by hand", "--tags", "Key=Name,Value=cli"]);
    start.extend(parent.iter().flat_map(|parent| ["--parent-snapshot-id", *parent]));
    let started = server.aws(&start);
    let id = string(&started, "SnapshotId").to_owned();
    assert_eq!(string(&started, "Status"), "pending");
    for &index in indexes {
        let data = block(image, index);
        let checksum = base64(&sha2::Sha256::digest(&data));
        std::fs::write(sandbox.join("block"), data).unwrap();
        let put = server.aws(&[
            "ebs",
            "put-snapshot-block",
            "--snapshot-id",
            &id,
            "--block-index",
            &index.to_string(),
            "--block-data",
            "block",
            "--data-length",
            "524288",
            "--checksum",
            &checksum,
            "--checksum-algorithm",
            "SHA256",
        ]);
        assert_eq!(string(&put, "Checksum"), checksum);
    }
    let count = indexes.len().to_string();
    let complete = ["ebs", "complete-snapshot", "--snapshot-id", &id, "--changed-blocks-count"];
    let completed = server.aws(&[&complete[..], &[&count]].concat());
    assert_eq!(string(&completed, "Status"), "completed");
    if parent.is_none() {
        server.aws(&["ec2", "wait", "snapshot-completed", "--snapshot-ids", &id]);
    }
    id
}

/// Reads a snapshot with the AWS CLI, and compares it with an image.
fn read_with_cli(sandbox: &Sandbox, server: &Server, id: &str, image: &Path, indexes: &[u64]) {
    let listed = server.aws(&["ebs", "list-snapshot-blocks", "--snapshot-id", id]);
    assert_eq!(listed["BlockSize"], 524_288);
    let blocks = listed["Blocks"].as_array().unwrap();
    let found: Vec<_> = blocks.iter().map(|b| b["BlockIndex"].as_u64().unwrap()).collect();
    assert_eq!(found, indexes);
    for listed in blocks {
        let index = listed["BlockIndex"].to_string();
        let read = server.aws(&[
            "ebs",
            "get-snapshot-block",
            "--snapshot-id",
            id,
            "--block-index",
            &index,
            "--block-token",
            string(listed, "BlockToken"),
            "block",
        ]);
        let data = std::fs::read(sandbox.join("block")).unwrap();
        assert_eq!(string(&read, "Checksum"), base64(&sha2::Sha256::digest(&data)));
        assert!(data == block(image, index.parse().unwrap()), "block {index} of {id}");
    }
}

#[test]
fn whoever_wrote_a_snapshot_the_others_read_it() {
    if !has_clients() {
        return;
    }
    let sandbox = Sandbox::with_store();
    let server = Server::new(&sandbox, &[]);
    // An image, and another that differs in a block that is there, and in one that is new.
    let parent = sandbox.image("parent.img", GIB, &[(2047 * BLOCK, BLOCK)]);
    let child = sandbox.image("child.img", GIB, &[(700 * BLOCK, BLOCK), (2047 * BLOCK, BLOCK)]);
    let file = File::options().write(true).open(&child).unwrap();
    file.write_all_at(b"other", 2047 * BLOCK).unwrap();
    let (old, new) = (&[2047][..], &[700, 2047][..]);
    let write = |image: &Path, indexes: &[u64], parent: Option<&str>| {
        let indexes: Vec<_> = indexes.iter().map(u64::to_string).collect();
        let image = image.to_str().unwrap();
        let arguments = ["writes", image, &indexes.join(","), parent.unwrap_or("")];
        server.script("interplay.py", &arguments).trim().to_owned()
    };
    let by_boto = write(&parent, old, None);
    let by_cli = write_with_cli(&sandbox, &server, &parent, old, None);
    let by_us = sandbox.upload("parent.img", &[]);
    let children = [
        // Each of them on a parent of another's.
        (write(&child, new, Some(&by_us)), &by_us),
        (write_with_cli(&sandbox, &server, &child, new, Some(&by_boto)), &by_boto),
        (sandbox.upload("child.img", &["--parent-snapshot-id", &by_cli]), &by_cli),
    ];
    let download = |id: &str, image: &Path| {
        sandbox.ok(&["download", id, "read.img"]);
        assert!(same_data(&sandbox.join("read.img"), image), "{id}");
        std::fs::remove_file(sandbox.join("read.img")).unwrap();
    };
    for id in [&by_boto, &by_cli, &by_us] {
        download(id, &parent);
    }
    for (id, parent) in &children {
        download(id, &child);
        // A child is read from its parent too.
        server.script("interplay.py", &["reads", id, child.to_str().unwrap(), parent]);
        read_with_cli(&sandbox, &server, id, &child, new);
    }
    let [(id, parent), ..] = &children;
    let listed = server.aws(&[
        "ebs",
        "list-changed-blocks",
        "--first-snapshot-id",
        parent,
        "--second-snapshot-id",
        id,
    ]);
    let blocks = listed["ChangedBlocks"].as_array().unwrap();
    let found =
        blocks.iter().map(|b| (b["BlockIndex"].as_u64(), b.get("FirstBlockToken").is_some()));
    assert_eq!(found.collect::<Vec<_>>(), [(Some(700), false), (Some(2047), true)], "{listed}");
    server.stop();
}

#[test]
fn the_cli_describes_tags_and_deletes() {
    if !has_clients() {
        return;
    }
    let sandbox = Sandbox::with_store();
    let server = Server::new(&sandbox, &["--account", "123456789012", "--region", "eu-north-1"]);
    sandbox.image("disk.img", GIB, &[(0, BLOCK)]);
    let id = &sandbox.upload("disk.img", &["--description", "of us"]);
    let caller = server.aws(&["sts", "get-caller-identity"]);
    assert_eq!(string(&caller, "Account"), "123456789012");
    let regions = server.aws(&["ec2", "describe-regions"]);
    assert_eq!(string(&regions["Regions"][0], "RegionName"), "eu-north-1");
    server.aws(&["ec2", "create-tags", "--resources", id, "--tags", "Key=Name,Value=a b"]);
    let describe = ["ec2", "describe-snapshots", "--owner-ids", "self", "--filters"];
    let described = server.aws(&[&describe[..], &["Name=tag:Name,Values=a*"]].concat());
    let shown = &described["Snapshots"][0];
    assert_eq!(string(shown, "SnapshotId"), id);
    assert_eq!(string(shown, "Description"), "of us");
    assert_eq!(string(shown, "OwnerId"), "123456789012");
    assert_eq!(string(&shown["Tags"][0], "Value"), "a b");
    server.aws(&["ec2", "delete-snapshot", "--snapshot-id", id]);
    let refused = server.try_aws(&["ebs", "list-snapshot-blocks", "--snapshot-id", id]);
    assert_eq!(refused.status.code(), FAILED, "{}", text(&refused));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("ResourceNotFoundException"), "{said}");
    let address = server.url.clone();
    let mut lost = server.client(&super::support::serve::aws_program());
    lost.args(["ebs", "list-snapshot-blocks", "--snapshot-id", id]).env("AWS_MAX_ATTEMPTS", "1");
    server.stop();
    let lost = super::support::run(&mut lost);
    assert_eq!(lost.status.code(), FAILED, "{}", text(&lost));
    assert!(String::from_utf8_lossy(&lost.stderr).contains(&address), "{}", text(&lost));
}

#[test]
fn servers_of_one_store_are_as_one() {
    if !has_clients() {
        return;
    }
    let sandbox = Sandbox::with_store();
    let one = Server::new(&sandbox, &[]);
    let two = Server::new(&sandbox, &[]);
    assert_eq!(one.environment["AWS_ACCESS_KEY_ID"], two.environment["AWS_ACCESS_KEY_ID"]);
    one.script("interplay.py", &["two_servers", &two.url]);
    one.script("interplay.py", &["the_later_put_counts", &two.url]);
    one.stop();
    two.stop();
}

#[test]
fn what_was_acknowledged_survives_the_end_of_the_server() {
    if !has_clients() {
        return;
    }
    let sandbox = Sandbox::with_store();
    let server = Server::new(&sandbox, &[]);
    let mut writer = server.python("interplay.py", &["writes_until_it_ends", "acknowledged"]);
    let mut writer = writer.spawn().unwrap();
    let acknowledged = sandbox.join("acknowledged");
    let lines = || std::fs::read_to_string(&acknowledged).unwrap_or_default().lines().count();
    super::support::until("blocks are put", || lines() > 60);
    // Connections that it keeps open for the next request do not keep the server.
    let told = std::time::Instant::now();
    server.stop();
    assert!(told.elapsed() < std::time::Duration::from_secs(10), "{:?}", told.elapsed());
    let status = super::support::wait(&mut writer, super::support::PATIENCE).unwrap();
    assert!(status.success(), "the writer: {status}");
    let server = Server::new(&sandbox, &[]);
    server.script("interplay.py", &["completes_what_was_acknowledged", "acknowledged"]);
    server.stop();
}

#[test]
fn what_was_acknowledged_survives_a_server_that_is_killed() {
    if !has_clients() {
        return;
    }
    let sandbox = Sandbox::with_store();
    let server = Server::new(&sandbox, &[]);
    let mut writer = server.python("interplay.py", &["writes_until_it_ends", "acknowledged"]);
    let mut writer = writer.spawn().unwrap();
    let acknowledged = sandbox.join("acknowledged");
    let lines = || std::fs::read_to_string(&acknowledged).unwrap_or_default().lines().count();
    super::support::until("blocks are put", || lines() > 60);
    server.kill();
    let status = super::support::wait(&mut writer, super::support::PATIENCE).unwrap();
    assert!(status.success(), "the writer: {status}");
    let server = Server::new(&sandbox, &[]);
    server.script("interplay.py", &["completes_what_was_acknowledged", "acknowledged"]);
    server.stop();
}

#[test]
fn a_log_that_nobody_reads_keeps_nobody_waiting() {
    if !has_clients() {
        return;
    }
    let sandbox = Sandbox::with_store();
    let mut fspfs = Server::command(&sandbox);
    fspfs.args(["-s", "store", "serve", "--listen", "127.0.0.1:0", "--no-auth"]);
    fspfs.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut server = fspfs.spawn().unwrap();
    let mut line = String::new();
    let mut stdout = std::io::BufReader::new(server.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut stdout, &mut line).unwrap();
    let address = line.trim_end().rsplit_once("http://").unwrap().1.to_owned();
    // Its stderr is a pipe of 64 KiB, which is full by now.
    for n in 0..2000 {
        let mut stream = std::net::TcpStream::connect(&address).unwrap();
        stream.set_read_timeout(Some(super::support::PATIENCE)).unwrap();
        let request = format!(
            "GET /snapshots/snap-0{n:x}/blocks HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n"
        );
        std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
        let mut answer = String::new();
        std::io::Read::read_to_string(&mut stream, &mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 404"), "{n}: {answer}");
    }
    let pid = nix::unistd::Pid::from_raw(server.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let ended = super::support::wait(&mut server, super::support::PATIENCE);
    if ended.is_none() {
        server.kill().unwrap();
        server.wait().unwrap();
    }
    assert!(ended.expect("it ends when it is told to").success());
}

#[test]
fn a_snapshot_stays_pending_for_a_while() {
    if !has_clients() {
        return;
    }
    let sandbox = Sandbox::with_store();
    let server = Server::new(&sandbox, &["--pending", "3"]);
    server.script("interplay.py", &["stays_pending"]);
    server.stop();
}
