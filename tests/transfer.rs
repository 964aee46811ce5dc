//! Uploading files and devices, and downloading to files and devices: what comes out is what went
//! in, and whatever goes wrong leaves nothing half-made.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use support::{
    BLOCK, GIB, Loop, MIB, PATIENCE, Sandbox, can_mount, has, names, pattern, run, same, text,
    wait, write_pattern,
};

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// What is uploaded: id, chunks uploaded, data blocks, zero blocks.
fn upload(sandbox: &Sandbox, arguments: &[&str]) -> (String, u64, u64, u64) {
    let mut line = vec!["upload"];
    line.extend(arguments);
    let printed = sandbox.ok(&line);
    let mut lines = printed.lines().rev();
    let id = lines.next().unwrap().to_owned();
    let chunks = lines.next().unwrap().strip_prefix("Total chunks uploaded ").unwrap();
    let snapshot = sandbox.stored(&id);
    let blocks = |name: &str| snapshot[name].as_u64().unwrap();
    (id, chunks.parse().unwrap(), blocks("data_blocks"), blocks("zero_blocks"))
}

/// Downloads a snapshot and compares it with the file that it was made from.
#[track_caller]
fn comes_back(sandbox: &Sandbox, id: &str, file: &str) {
    sandbox.ok(&["download", id, "back.img"]);
    let (a, b) = (sandbox.join(file), sandbox.join("back.img"));
    assert_eq!(a.metadata().unwrap().len(), b.metadata().unwrap().len());
    for file in [&a, &b] {
        for (at, len) in data_of(file) {
            let read = |path: &Path| {
                let mut bytes = vec![0xee; usize::try_from(len).unwrap()];
                std::fs::File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
                bytes
            };
            assert!(read(&a) == read(&b), "{} is different at {at}", file.display());
        }
    }
    std::fs::remove_file(b).unwrap();
}

/// The parts of a file that are no holes, as `(offset, len)`: what is a hole in two files is equal.
fn data_of(path: &Path) -> Vec<(u64, u64)> {
    use nix::unistd::{Whence, lseek};
    let file = std::fs::File::open(path).unwrap();
    let mut parts = Vec::new();
    let mut at = 0;
    while let Ok(start) = lseek(&file, at, Whence::SeekData) {
        at = lseek(&file, start, Whence::SeekHole).unwrap();
        parts.push((start.cast_unsigned(), (at - start).cast_unsigned()));
    }
    parts
}

fn write(path: &Path, offset: u64, bytes: &[u8]) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

fn snapshots(sandbox: &Sandbox) -> usize {
    json(&sandbox.ok(&["list", "--json"])).as_array().unwrap().len()
}

/// Nothing of an upload that failed is left where it shows, or where it would be swept later.
fn nothing_is_left(sandbox: &Sandbox, snapshots: usize) {
    assert_eq!(self::snapshots(sandbox), snapshots);
    let pending = sandbox.join("store/pending");
    assert!(!pending.exists() || names(&pending).is_empty(), "{:?}", names(&pending));
    assert_eq!(names(sandbox.join("store/tmp")), Vec::<String>::new());
}

/// An upload or download that has begun; killed if the test fails.
struct Running {
    child: Child,
    stdout: BufReader<std::process::ChildStdout>,
}

impl Running {
    fn new(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self { child, stdout }
    }

    /// An upload, from the moment on that its snapshot is started.
    fn upload(sandbox: &Sandbox, file: &str) -> Self {
        let mut running = Self::new(sandbox.fspfs().args(["upload", file]));
        let mut line = String::new();
        running.stdout.read_line(&mut line).unwrap();
        assert!(line.starts_with("Size of "), "{line}");
        running
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
    }

    /// Waits for its end: the exit code, stdout and stderr.
    fn end(mut self) -> (Option<i32>, String, String) {
        let status = wait(&mut self.child, PATIENCE).expect("it ends");
        let (mut out, mut err) = (String::new(), String::new());
        self.stdout.read_to_string(&mut out).unwrap();
        self.child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        (status.code(), out, err)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Data that takes a while to upload.
fn large(sandbox: &Sandbox, name: &str) {
    sandbox.sh(&format!("head -c 120M /dev/urandom > {name}"));
}

mod uploading {
    use super::*;

    #[rstest]
    #[case::empty(": > it", "it", "is empty")]
    #[case::directory("mkdir it", "it", "is a directory")]
    #[case::fifo("mkfifo it", "it", "pipe")]
    #[case::missing(":", "it", "No such file")]
    #[case::dangling("ln -s nowhere it", "it", "No such file")]
    #[case::character_device(":", "/dev/zero", "neither a file nor a block device")]
    #[case::socket(
        "python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"it\")'",
        "it",
        "neither a file nor a block device"
    )]
    fn what_is_no_image_is_refused(#[case] make: &str, #[case] file: &str, #[case] says: &str) {
        let sandbox = Sandbox::with_store();
        sandbox.sh(make);
        let message = sandbox.fails(&["upload", file]);
        assert!(message.contains(says) && message.contains(file), "{message}");
        assert_eq!(snapshots(&sandbox), 0);
        assert_eq!(names(sandbox.join("store")), ["fspfs.json", "tmp"]);
    }

    #[test]
    fn what_cannot_be_read_or_written_is_said() {
        if !can_mount(&["setpriv"]) {
            return;
        }
        let sandbox = Sandbox::with_store();
        sandbox.image("secret.img", MIB, &[(0, MIB)]);
        sandbox.image("open.img", MIB, &[(0, MIB)]);
        // The program may be where nobody else may look.
        std::fs::copy(env!("CARGO_BIN_EXE_fspfs"), sandbox.join("fspfs")).unwrap();
        sandbox.sh("chmod 755 . ; chmod 600 secret.img; chmod 644 open.img; ./fspfs init closed; chown -R 65534 store");
        let nobody = |line: &str| {
            let setpriv = "setpriv --reuid 65534 --regid 65534 --clear-groups";
            sandbox.try_sh(&format!("{setpriv} ./fspfs {line}"))
        };
        let output = nobody("-s store upload secret.img");
        assert_eq!(output.status.code(), Some(1));
        let message = text(&output);
        assert!(message.contains("secret.img: Permission denied"), "{message}");
        nothing_is_left(&sandbox, 0);
        let output = nobody("-s closed upload open.img");
        let message = text(&output);
        assert!(message.contains("closed") && message.contains("Permission denied"), "{message}");
        let output = nobody("-s store upload -q open.img");
        assert!(output.status.success(), "{}", text(&output));
        let id = String::from_utf8(output.stdout).unwrap();
        let output = nobody(&format!("-s store download {} root.img", id.trim()));
        let message = text(&output);
        assert!(message.contains("root.img: Permission denied"), "{message}");
    }

    #[test]
    fn the_largest_volume_is_the_largest_file() {
        if !can_mount(&[]) {
            return;
        }
        let sandbox = Sandbox::with_store();
        // A file system whose files may be that large.
        sandbox.sh("mkdir big; mount -t tmpfs -o size=64m none big");
        let tib = 1u64 << 40;
        sandbox.image("big/larger.img", 64 * tib + 1, &[(0, 1)]);
        let message = sandbox.fails(&["upload", "big/larger.img"]);
        assert!(message.contains("larger.img") && message.contains("64 TiB"), "{message}");
        assert_eq!(snapshots(&sandbox), 0);
        sandbox.image("big/largest.img", 64 * tib, &[(17 * tib, 5), (64 * tib - 5, 5)]);
        let (id, chunks, ..) = upload(&sandbox, &["big/largest.img"]);
        assert_eq!(chunks, 2);
        sandbox.ok(&["download", &id, "big/back.img"]);
        let back = std::fs::File::open(sandbox.join("big/back.img")).unwrap();
        assert_eq!(back.metadata().unwrap().len(), 64 * tib);
        assert!(back.metadata().unwrap().blocks() * 512 <= 2 * BLOCK);
        for at in [17 * tib, 64 * tib - 5] {
            let mut bytes = [0; 5];
            back.read_exact_at(&mut bytes, at).unwrap();
            assert_eq!(bytes[..], pattern(at, 5));
        }
    }

    /// Every length that is not a multiple of something.
    #[rstest]
    fn every_length_comes_back(
        #[values(1, 511, 4097, BLOCK - 1, BLOCK, BLOCK + 1, GIB - 1, GIB, GIB + 1, 2 * GIB + BLOCK)]
        len: u64,
    ) {
        let sandbox = Sandbox::with_store();
        sandbox.image("a.img", len, &[(0, 100), (len.saturating_sub(100), 100)]);
        let (id, ..) = upload(&sandbox, &["a.img"]);
        sandbox.ok(&["download", &id, "b.img"]);
        let (a, b) = (sandbox.join("a.img"), sandbox.join("b.img"));
        assert_eq!(b.metadata().unwrap().len(), len);
        let (a, b) = (std::fs::File::open(a).unwrap(), std::fs::File::open(b).unwrap());
        for at in [0, len.saturating_sub(4096), len / 2] {
            let read = |file: &std::fs::File| {
                let mut bytes = vec![1; usize::try_from(4096.min(len - at)).unwrap()];
                file.read_exact_at(&mut bytes, at).unwrap();
                bytes
            };
            assert!(read(&a) == read(&b), "{len} bytes differ at {at}");
        }
    }

    #[test]
    fn holes_and_zeros_are_told_apart() {
        let sandbox = Sandbox::with_store();
        let path = sandbox.image("a.img", 40 * BLOCK + 9, &[(0, 2 * BLOCK), (30 * BLOCK, 1)]);
        write(&path, 10 * BLOCK, &vec![0; usize::try_from(3 * BLOCK).unwrap()]);
        write(&path, 40 * BLOCK, &[0; 9]);
        let (id, chunks, data, zero) = upload(&sandbox, &["a.img"]);
        assert_eq!((chunks, data, zero), (3, 3, 0), "zeros without a parent are not stored");
        comes_back(&sandbox, &id, "a.img");
        let (id, chunks, data, zero) = upload(&sandbox, &["--full-copy", "a.img"]);
        assert_eq!((chunks, data, zero), (7, 3, 4));
        comes_back(&sandbox, &id, "a.img");
        let message = sandbox.ok(&["list", &id]);
        assert!(message.contains("contains 7 chunks"), "{message}");
        // Without any data at all.
        sandbox.image("hole.img", 3 * GIB, &[]);
        let (id, chunks, ..) = upload(&sandbox, &["-f", "hole.img"]);
        assert_eq!(chunks, 0);
        sandbox.ok(&["download", &id, "b.img"]);
        let found = sandbox.join("b.img").metadata().unwrap();
        assert_eq!((found.len(), found.blocks()), (3 * GIB, 0));
    }

    #[test]
    fn a_child_stores_what_has_changed() {
        let sandbox = Sandbox::with_store();
        let path = sandbox.image("a.img", 40 * BLOCK, &[(0, 30 * BLOCK)]);
        write(&path, 35 * BLOCK, &vec![0; usize::try_from(BLOCK).unwrap()]);
        let (first, chunks, ..) = upload(&sandbox, &["-f", "a.img"]);
        assert_eq!(chunks, 31);
        std::fs::copy(&path, sandbox.join("first.img")).unwrap();
        let child =
            |parent: &str, file: &str| upload(&sandbox, &["--parent-snapshot-id", parent, file]);
        // Nothing changed: nothing is stored.
        let packs = || sandbox.sh("find store/packs -type f | wc -l");
        let before = packs();
        let (same, chunks, data, zero) = child(&first, "a.img");
        assert_eq!((chunks, data, zero), (0, 30, 1));
        assert_eq!(packs(), before);
        comes_back(&sandbox, &same, "a.img");
        // Overwritten, zeroed, punched, added, and a hole over a zero block.
        write(&path, BLOCK + 7, b"changed");
        write(&path, 2 * BLOCK, &vec![0; usize::try_from(BLOCK).unwrap()]);
        sandbox.sh(&format!("fallocate -p -o {} -l {} a.img", 3 * BLOCK, 2 * BLOCK));
        sandbox.sh(&format!("fallocate -p -o {} -l {BLOCK} a.img", 35 * BLOCK));
        write_pattern(&std::fs::File::options().write(true).open(&path).unwrap(), 39 * BLOCK, 9);
        let (second, chunks, data, zero) = child(&first, "a.img");
        assert_eq!((chunks, data, zero), (5, 28, 4));
        comes_back(&sandbox, &second, "a.img");
        // Shrunk: what is behind the new end is gone, in the last block too.
        let cut = 20 * BLOCK + 1000;
        std::fs::File::options().write(true).open(&path).unwrap().set_len(cut).unwrap();
        let (shrunk, chunks, ..) = child(&second, "a.img");
        assert_eq!(chunks, 11, "the last block, nine behind it, and the one that was added");
        comes_back(&sandbox, &shrunk, "a.img");
        // Grown beyond the volume, and back over what was cut.
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(2 * GIB + 5).unwrap();
        write_pattern(&file, GIB + 3, 9);
        let (grown, chunks, ..) = child(&shrunk, "a.img");
        assert_eq!(chunks, 1);
        comes_back(&sandbox, &grown, "a.img");
        // Shrunk below the volume of the parent.
        file.set_len(25 * BLOCK + 1).unwrap();
        write_pattern(&file, 25 * BLOCK, 1);
        let (small, chunks, ..) = child(&grown, "a.img");
        assert_eq!(chunks, 1);
        comes_back(&sandbox, &small, "a.img");
        // The first is what it was, whatever came after; and each stands alone.
        for id in [&same, &second, &shrunk, &grown] {
            sandbox.ok(&["delete", "--yes", id]);
        }
        comes_back(&sandbox, &first, "first.img");
        comes_back(&sandbox, &small, "a.img");
        let message = sandbox.fails(&["upload", "--parent-snapshot-id", &second, "a.img"]);
        assert!(
            message.contains(&second) && message.contains("there is no snapshot")
                || support::over_ebs()
        );
        nothing_is_left(&sandbox, 2);
    }

    #[test]
    fn a_block_device_comes_back() {
        if !can_mount(&[]) {
            return;
        }
        let sandbox = Sandbox::with_store();
        let file = sandbox.image("a.img", 9 * MIB + 4096, &[(0, MIB), (5 * MIB + 77, MIB)]);
        let device = Loop::attach(&file, &["-r"]);
        let device = device.0.to_str().unwrap();
        let (id, chunks, data, zero) = upload(&sandbox, &[device]);
        assert_eq!((chunks, data, zero), (5, 5, 0));
        comes_back(&sandbox, &id, "a.img");
        let (id, chunks, data, zero) = upload(&sandbox, &["--full-copy", device]);
        assert_eq!((chunks, data, zero), (19, 5, 14), "a device has no holes");
        comes_back(&sandbox, &id, "a.img");
        // As a child of another: what reads as zeros there replaces what the parent has.
        sandbox.image("b.img", 9 * MIB + 4096, &[(3 * MIB, MIB), (5 * MIB, BLOCK)]);
        let (parent, ..) = upload(&sandbox, &["b.img"]);
        let (id, ..) = upload(&sandbox, &["--parent-snapshot-id", &parent, device]);
        comes_back(&sandbox, &id, "a.img");
    }

    #[rstest]
    #[case::dense(false)]
    #[case::sparse(true)]
    fn a_file_that_shrinks_is_an_error(#[case] sparse: bool) {
        let sandbox = Sandbox::with_store();
        if sparse {
            let runs: Vec<_> = (0..400).map(|n| (2 * n * BLOCK, BLOCK)).collect();
            sandbox.image("a.img", 800 * BLOCK, &runs);
        } else {
            large(&sandbox, "a.img");
        }
        let running = Running::upload(&sandbox, "a.img");
        running.signal(Signal::SIGSTOP);
        let file = std::fs::File::options().write(true).open(sandbox.join("a.img")).unwrap();
        file.set_len(MIB).unwrap();
        running.signal(Signal::SIGCONT);
        let (code, out, err) = running.end();
        assert_eq!(code, Some(1), "{out}{err}");
        assert!(err.contains("a.img") && err.contains("shorter"), "{err}");
        assert!(!out.contains("snap-"), "{out}");
        nothing_is_left(&sandbox, 0);
    }

    #[test]
    fn a_file_that_is_written_meanwhile_is_noted() {
        let sandbox = Sandbox::with_store();
        large(&sandbox, "a.img");
        let running = Running::upload(&sandbox, "a.img");
        running.signal(Signal::SIGSTOP);
        write(&sandbox.join("a.img"), 119 * MIB, b"changed");
        running.signal(Signal::SIGCONT);
        let (code, out, err) = running.end();
        assert_eq!(code, Some(0), "{out}{err}");
        assert!(err.contains("a.img was written to while it was read"), "{err}");
        let id = out.lines().last().unwrap();
        assert!(sandbox.ok(&["list"]).contains(id));
        let verified = sandbox.ok(&["verify"]);
        assert!(verified.contains("Everything is intact"), "{verified}");
    }

    #[rstest]
    fn a_signal_leaves_what_is_named_and_can_be_given_up(
        #[values(Signal::SIGINT, Signal::SIGTERM)] signal: Signal,
        #[values(0, 30, 150, 400)] after_ms: u64,
    ) {
        let sandbox = Sandbox::with_store();
        large(&sandbox, "a.img");
        let running = Running::upload(&sandbox, "a.img");
        std::thread::sleep(std::time::Duration::from_millis(after_ms));
        running.signal(signal);
        let (code, out, err) = running.end();
        if code == Some(0) {
            // It was faster.
            return nothing_is_left(&sandbox, 1);
        }
        assert_eq!(code, Some(1), "{out}{err}");
        assert!(err.contains(&format!("interrupted by {signal}")), "{err}");
        if snapshots(&sandbox) > 0 {
            let list = json(&sandbox.ok(&["list", "--json"]));
            let id = list[0]["id"].as_str().unwrap();
            assert!(err.contains(&format!("{id} stays pending")), "{err}");
            sandbox.ok(&["delete", "--yes", id]);
        }
        assert_eq!(snapshots(&sandbox), 0);
        // A server may still be at work on blocks that nobody waits for.
        let pending = sandbox.join("store/pending");
        support::until("nothing is pending", || !pending.exists() || names(&pending).is_empty());
        // And nothing stands in the way of the next one.
        sandbox.image("b.img", MIB, &[(0, MIB)]);
        let (id, ..) = upload(&sandbox, &["b.img"]);
        comes_back(&sandbox, &id, "b.img");
    }

    #[test]
    fn a_killed_upload_is_pending_until_it_is_deleted() {
        let sandbox = Sandbox::with_store();
        large(&sandbox, "a.img");
        let running = Running::upload(&sandbox, "a.img");
        let pending = sandbox.join("store/pending");
        let ids = || std::fs::read_dir(&pending).into_iter().flatten().flatten();
        support::until("the upload begins", || {
            ids().any(|id| id.path().join("start.json").exists())
        });
        running.signal(Signal::SIGKILL);
        let (code, ..) = running.end();
        assert_eq!(code, None);
        let list = json(&sandbox.ok(&["list", "--json"]));
        assert_eq!((list.as_array().unwrap().len(), &list[0]["state"]), (1, &"pending".into()));
        let id = list[0]["id"].as_str().unwrap();
        assert!(sandbox.ok(&["list"]).contains(" pending "));
        for command in [&["download", id, "b.img"][..], &["list", id]] {
            let message = sandbox.fails(command);
            assert!(message.contains(id) && message.contains("pending"), "{message}");
        }
        let message = sandbox.fails(&["upload", "--parent-snapshot-id", id, "a.img"]);
        assert!(message.contains(id) && message.contains("pending"), "{message}");
        sandbox.ok(&["verify"]);
        sandbox.ok(&["delete", "--yes", id]);
        assert_eq!(snapshots(&sandbox), 0);
        assert!(names(sandbox.join("store/pending")).is_empty());
    }

    #[test]
    fn several_processes_use_one_repository() {
        if support::over_ebs() {
            return;
        }
        let sandbox = Sandbox::with_store();
        let files: Vec<String> = (0..6).map(|n| format!("{n}.img")).collect();
        for (n, file) in files.iter().enumerate() {
            // Half of each is what the others have too.
            let own = (100 + n as u64) * 10 * BLOCK;
            sandbox.image(file, 2 * GIB, &[(0, 8 * BLOCK), (own, 8 * BLOCK)]);
        }
        let uploads: Vec<_> =
            files.iter().map(|f| Running::new(sandbox.fspfs().args(["upload", "-q", f]))).collect();
        // Meanwhile others look, collect and verify.
        for _ in 0..3 {
            sandbox.ok(&["gc"]);
            sandbox.ok(&["list"]);
        }
        let ids: Vec<String> = uploads
            .into_iter()
            .map(|running| {
                let (code, out, err) = running.end();
                assert_eq!(code, Some(0), "{err}");
                out.trim().to_owned()
            })
            .collect();
        nothing_is_left(&sandbox, files.len());
        let verified = sandbox.ok(&["verify"]);
        assert!(verified.contains("Everything is intact"), "{verified}");
        sandbox.ok(&["delete", "--yes", &ids[0]]);
        for (id, file) in ids.iter().zip(&files).skip(1) {
            sandbox.ok(&["download", id, "back.img"]);
            sandbox.sh(&format!(
                "for at in 0 {}; do cmp -n {} -i $at {file} back.img; done",
                (100 + file[..1].parse::<u64>().unwrap()) * 10 * BLOCK,
                9 * BLOCK
            ));
        }
    }
}

mod downloading {
    use super::*;

    /// A store with one snapshot of `a.img`, with data, holes and a tail.
    fn one() -> (Sandbox, String) {
        let sandbox = Sandbox::with_store();
        sandbox.image("a.img", 9 * MIB + 5, &[(0, MIB), (4 * MIB, 100), (9 * MIB, 5)]);
        let (id, ..) = upload(&sandbox, &["a.img"]);
        std::fs::create_dir(sandbox.join("out")).unwrap();
        (sandbox, id)
    }

    #[test]
    fn to_a_new_file() {
        let (sandbox, id) = one();
        sandbox.ok(&["download", &id, "out/b.img"]);
        assert!(same(sandbox.join("a.img"), sandbox.join("out/b.img")));
        let found = sandbox.join("out/b.img").metadata().unwrap();
        assert_eq!(found.permissions().mode() & 0o7777, 0o600);
        assert!(found.blocks() * 512 <= 4 * BLOCK, "holes stay holes");
        assert_eq!(names(sandbox.join("out")), ["b.img"]);
    }

    #[test]
    fn over_an_existing_file() {
        let (sandbox, id) = one();
        let path = sandbox.join("out/b.img");
        std::fs::write(&path, vec![0xaa; 20 << 20]).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("out/b.img", sandbox.join("link")).unwrap();
        sandbox.ok(&["download", &id, "link"]);
        assert!(sandbox.join("link").symlink_metadata().unwrap().is_symlink());
        assert!(same(sandbox.join("a.img"), &path), "nothing of the old content is left");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o640);
        assert_eq!(names(sandbox.join("out")), ["b.img"]);
        // Over the very file that it was made from.
        sandbox.ok(&["download", &id, "a.img"]);
        assert!(same(sandbox.join("a.img"), &path));
    }

    #[test]
    fn over_the_file_of_another_user() {
        if !has(&["setfattr"]) || !nix::unistd::geteuid().is_root() {
            return;
        }
        let (sandbox, id) = one();
        sandbox.sh("chmod 755 . out; printf old > out/b.img; chown 4711:4712 out/b.img
            setfattr -n user.label -v mine out/b.img
            setfattr -n security.capability -v 0x0100000200200000000000000000000000000000 out/b.img
            chmod 6754 out/b.img");
        sandbox.ok(&["download", &id, "out/b.img"]);
        assert!(same(sandbox.join("a.img"), sandbox.join("out/b.img")));
        // What the old content was allowed to do the new one is not.
        assert_eq!(sandbox.sh("stat -c '%u:%g %a' out/b.img").trim(), "4711:4712 754");
        let attributes = sandbox.sh("getfattr -d -m - out/b.img");
        assert!(attributes.contains("user.label=\"mine\""), "{attributes}");
        assert!(!attributes.contains("capability"), "{attributes}");
        // Where others can write, he may have put it there to have the image.
        sandbox.sh("chmod 1777 out");
        for option in [&[][..], &["--dry-run"]] {
            let mut line = vec!["multiclone", &*id, "out/b.img"];
            line.extend(option);
            let said = sandbox.fails(&line);
            assert!(said.contains("another user's file"), "{said}");
        }
        // Or a link to what is root's own.
        sandbox.sh("echo mine > victim; ln -s ../victim out/l.img; chown -h 4711 out/l.img");
        let said = sandbox.fails(&["download", &id, "out/l.img"]);
        assert!(said.contains("another user's file"), "{said}");
        assert_eq!(sandbox.sh("cat victim"), "mine\n");
        sandbox.sh("chown 0 out/b.img; chmod 600 out/b.img");
        sandbox.ok(&["download", &id, "out/b.img"]);
        assert_eq!(sandbox.sh("stat -c '%u:%g %a' out/b.img").trim(), "0:4712 600");
        // Whoever cannot make a file for that user does not get far.
        sandbox.welcome_nobody();
        sandbox.sh("chown 65534:65534 user; echo old > user/b.img; chown 4711:65534 user/b.img");
        let store = sandbox.join("store");
        sandbox.sh("chmod -R go+rX store");
        let mut download = sandbox.fspfs_as_nobody();
        let output = run(download.env("FSPFS_STORE", store).args(["download", &id, "b.img"]));
        assert!(text(&output).contains("another owner or group"), "{}", text(&output));
        assert_eq!(std::fs::read(sandbox.join("user/b.img")).unwrap(), b"old\n");
    }

    #[rstest]
    #[case::directory("out", "is a directory")]
    #[case::missing_directory("no/such/b.img", "No such file")]
    #[case::under_a_file("a.img/b.img", "Not a directory")]
    #[case::in_the_store("store/b.img", "inside the store")]
    #[case::deep_in_the_store("store/packs/b.img", "inside the store")]
    #[case::through_a_link("to-store/b.img", "inside the store")]
    #[case::an_object("store/fspfs.json", "inside the store")]
    #[case::character_device("/dev/null", "neither a file nor a block device")]
    #[case::fifo("fifo", "neither a file nor a block device")]
    fn what_is_no_place_is_refused(#[case] target: &str, #[case] says: &str) {
        if support::over_ebs() && says.contains("the store") {
            return;
        }
        let (sandbox, id) = one();
        sandbox.sh("ln -s store to-store; mkfifo fifo");
        let before = sandbox.sh("find . -ls");
        let message = sandbox.fails(&["download", &id, target]);
        assert!(message.contains(says) && message.contains(target), "{message}");
        assert_eq!(sandbox.sh("find . -ls"), before);
    }

    #[test]
    fn a_failure_leaves_the_old_file() {
        // EBS answers damage of its own as something that may pass: `tests/ebs.rs` has that.
        if support::over_ebs() {
            return;
        }
        let (sandbox, id) = one();
        std::fs::write(sandbox.join("out/b.img"), "old").unwrap();
        sandbox.sh("pack=$(find store/packs -type f); truncate -s 10 $pack");
        let message = sandbox.fails(&["download", &id, "out/b.img"]);
        assert!(message.contains("packs/"), "{message}");
        sandbox.fails(&["download", &id, "out/new.img"]);
        assert_eq!(names(sandbox.join("out")), ["b.img"]);
        assert_eq!(std::fs::read(sandbox.join("out/b.img")).unwrap(), b"old");
    }

    #[rstest]
    #[case(Signal::SIGTERM)]
    #[case(Signal::SIGINT)]
    #[case(Signal::SIGKILL)]
    fn a_signal_leaves_the_old_file(#[case] signal: Signal) {
        let sandbox = Sandbox::with_store();
        large(&sandbox, "a.img");
        let (id, ..) = upload(&sandbox, &["a.img"]);
        std::fs::create_dir(sandbox.join("out")).unwrap();
        std::fs::write(sandbox.join("out/b.img"), "old").unwrap();
        let running = Running::new(sandbox.fspfs().args(["download", &id, "out/b.img"]));
        // From the moment on that there is a second file.
        let end = std::time::Instant::now() + PATIENCE;
        while names(sandbox.join("out")).len() < 2 && std::time::Instant::now() < end {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        running.signal(signal);
        let (code, out, err) = running.end();
        assert_ne!(code, Some(0), "it was faster: {out}{err}");
        assert_eq!(std::fs::read(sandbox.join("out/b.img")).unwrap(), b"old");
        if signal != Signal::SIGKILL {
            assert!(err.contains(&format!("interrupted by {signal}")), "{err}");
        }
        // What is there has a hidden name, and the next one goes on with it.
        assert!(names(sandbox.join("out")).iter().all(|n| n == "b.img" || n.starts_with('.')));
        sandbox.ok(&["download", &id, "out/b.img"]);
        assert_eq!(names(sandbox.join("out")), ["b.img"]);
        assert!(same(sandbox.join("a.img"), sandbox.join("out/b.img")));
    }

    #[test]
    fn to_a_dirty_device() {
        if !can_mount(&[]) {
            return;
        }
        let (sandbox, id) = one();
        let dirty = |len: usize| {
            let path = sandbox.join(format!("{len}.dev"));
            std::fs::write(&path, vec![0xaa; len]).unwrap();
            path
        };
        // As large as the image, up to the sector; and larger.
        for len in [(9 << 20) + 512, 20 << 20] {
            let file = dirty(len);
            let device = Loop::attach(&file, &[]);
            sandbox.ok(&["download", &id, device.0.to_str().unwrap()]);
            drop(device);
            let written = std::fs::read(&file).unwrap();
            let image = std::fs::read(sandbox.join("a.img")).unwrap();
            assert_eq!(written.len(), len);
            assert!(written[..image.len()] == image[..], "the image is not on the device");
            assert!(written[image.len()..].iter().all(|&b| b == 0), "old content is behind it");
        }
        let small = dirty(9 << 20);
        let device = Loop::attach(&small, &[]);
        let message = sandbox.fails(&["download", &id, device.0.to_str().unwrap()]);
        assert!(message.contains("too small") && message.contains("9437184"), "{message}");
        drop(device);
        assert!(std::fs::read(&small).unwrap().iter().all(|&b| b == 0xaa), "it was written to");
    }

    #[test]
    fn a_device_in_use_is_refused() {
        if !can_mount(&["mkfs.ext4"]) {
            return;
        }
        let (sandbox, id) = one();
        sandbox.sh("truncate -s 20M disk; mkfs.ext4 -q disk");
        let before = std::fs::read(sandbox.join("disk")).unwrap();
        let device = Loop::attach(&sandbox.join("disk"), &[]);
        let path = device.0.to_str().unwrap();
        sandbox.sh(&format!("mount -o ro {path} mnt"));
        let message = sandbox.fails(&["download", &id, path]);
        assert!(message.contains("in use") && message.contains("unmount"), "{message}");
        sandbox.sh("umount mnt");
        assert!(std::fs::read(sandbox.join("disk")).unwrap() == before, "it was written to");
        // Read-only devices say so.
        sandbox.sh(&format!("blockdev --setro {path}"));
        let message = sandbox.fails(&["download", &id, path]);
        assert!(message.contains(path), "{message}");
        sandbox.sh(&format!("blockdev --setrw {path}"));
        sandbox.ok(&["download", &id, path]);
    }
}

mod full_disks {
    use super::*;

    /// A small file system at `disk`.
    fn small(sandbox: &Sandbox, kind: &str, mib: u32) {
        match kind {
            "tmpfs" => sandbox.sh(&format!("mkdir disk; mount -t tmpfs -o size={mib}m none disk")),
            _ => sandbox.sh(&format!(
                "mkdir disk; truncate -s {mib}M fs; mkfs.ext4 -q -m 0 -O ^has_journal fs; mount -o loop fs disk"
            )),
        };
    }

    /// Does what a message says gives up, if it says that.
    fn give_up(sandbox: &Sandbox, message: &str) -> bool {
        let command = message.lines().find_map(|line| line.trim().strip_prefix("gives up: "));
        let Some(command) = command else { return false };
        match command.rsplit_once(" delete ") {
            Some((_, id)) => sandbox.ok(&["delete", "--yes", id]),
            None => sandbox.sh(command),
        };
        true
    }

    #[rstest]
    fn while_uploading(#[values("tmpfs", "ext4")] kind: &str) {
        if !can_mount(&["mkfs.ext4"]) {
            return;
        }
        let sandbox = Sandbox::new();
        small(&sandbox, kind, 128);
        sandbox.sh("ln -s disk/store store");
        sandbox.ok(&["init", "disk/store"]);
        sandbox.image("a.img", 3 * MIB, &[(0, 2 * MIB)]);
        sandbox.sh("head -c 60M /dev/urandom > large.img; head -c 70M /dev/zero > disk/ballast");
        let (id, ..) = upload(&sandbox, &["a.img"]);
        let message = sandbox.fails(&["upload", "large.img"]);
        assert!(message.contains("No space left on device"), "{message}");
        assert!(message.contains("large.img") && message.contains("packs/"), "{message}");
        // It could go on with more room; here it is given up.
        assert!(give_up(&sandbox, &message), "{message}");
        nothing_is_left(&sandbox, 1);
        comes_back(&sandbox, &id, "a.img");
        let verified = sandbox.ok(&["verify"]);
        assert!(verified.contains("Everything is intact"), "{verified}");
        // To the last byte: not even a pending snapshot can be made, or one can.
        let _ = sandbox.try_sh("cat /dev/zero > disk/rest");
        let message = sandbox.fails(&["upload", "a.img"]);
        assert!(message.contains("No space left on device"), "{message}");
        give_up(&sandbox, &message);
        nothing_is_left(&sandbox, 1);
        comes_back(&sandbox, &id, "a.img");
        sandbox.sh("rm disk/ballast disk/rest");
        let (large, ..) = upload(&sandbox, &["large.img"]);
        comes_back(&sandbox, &large, "large.img");
        // A full disk does not keep anything from being deleted.
        let _ = sandbox.try_sh("cat /dev/zero > disk/rest");
        sandbox.ok(&["delete", "--yes", &large]);
        assert_eq!(snapshots(&sandbox), 1);
        sandbox.sh("umount disk");
    }

    #[rstest]
    fn while_downloading(#[values("tmpfs", "ext4")] kind: &str) {
        if !can_mount(&["mkfs.ext4"]) {
            return;
        }
        let sandbox = Sandbox::with_store();
        small(&sandbox, kind, 16);
        sandbox.sh("head -c 20M /dev/urandom > large.img; echo old > disk/b.img");
        sandbox.image("a.img", 3 * MIB, &[(0, 2 * MIB)]);
        let (large, ..) = upload(&sandbox, &["large.img"]);
        let (id, ..) = upload(&sandbox, &["a.img"]);
        let before = names(sandbox.join("disk"));
        let message = sandbox.fails(&["download", &large, "disk/b.img"]);
        assert!(message.contains("No space left on device"), "{message}");
        assert!(message.contains("disk/b.img"), "{message}");
        // It could go on with more room; here it is given up.
        assert!(give_up(&sandbox, &message), "{message}");
        assert_eq!(names(sandbox.join("disk")), before, "litter");
        assert_eq!(std::fs::read(sandbox.join("disk/b.img")).unwrap(), b"old\n");
        sandbox.ok(&["download", &id, "disk/b.img"]);
        assert!(same(sandbox.join("a.img"), sandbox.join("disk/b.img")));
        sandbox.sh("umount disk");
    }
}

#[test]
fn what_is_uploaded_from_a_mount_is_what_is_in_it() {
    if !can_mount(&[]) || !has(&["cmp"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.image("a.img", GIB + 5, &[(0, 3 * MIB), (GIB, 5)]);
    let (id, chunks, ..) = upload(&sandbox, &["a.img"]);
    let mount = sandbox.mount(&[]);
    let image = mount.image(&id);
    let (again, chunks_again, ..) = upload(&sandbox, &[image.to_str().unwrap()]);
    assert_eq!(chunks, chunks_again);
    let list = json(&sandbox.ok(&["list", "--json"]));
    assert_eq!(list[0]["content_digest"], list[1]["content_digest"]);
    // Blocks that are equal are equal in the mount too.
    assert!(run(Command::new("cmp").arg(&image).arg(mount.image(&again))).status.success());
    mount.unmount();
}
