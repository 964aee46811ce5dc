//! What the tests share: a place of their own, the program, mounts and loop devices that go away
//! with the test, and a deadline.
#![allow(dead_code, unreachable_pub, reason = "every test file uses a part of it")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, missing_debug_implementations)]

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

pub mod between;
pub mod exchange;
pub mod serve;
pub mod service;
pub mod stores;
pub mod writing;

/// Longest time that any one program may take.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// Longest time that a whole test may take. Then everything is cleaned up, and the test fails.
pub const DEADLINE: Duration = Duration::from_mins(4);

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
pub const BLOCK: u64 = 512 * 1024;

/// The user and the group `nobody`, who own nothing here.
pub const NOBODY: u32 = 65534;

/// A directory of a test's own, in which nothing stays mounted or attached.
pub struct Sandbox {
    dir: tempfile::TempDir,
    /// A canonical path: the kernel's tables show these.
    pub path: PathBuf,
    /// What stands before the store, in the tests that run over EBS.
    service: Option<service::Service>,
}

/// Whether these tests run over EBS: those of `tests/over_ebs.rs` do.
pub fn over_ebs() -> bool {
    module_path!().starts_with("over_ebs::")
}

impl Sandbox {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("fspfs-test-").tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        for name in ["mnt", "state"] {
            std::fs::create_dir(path.join(name)).unwrap();
        }
        let watched = path.clone();
        std::thread::spawn(move || {
            std::thread::sleep(DEADLINE);
            // The test ended in time if its directory is gone.
            if watched.exists() {
                eprintln!("the test takes longer than {DEADLINE:?}");
                clean_up(&watched);
                let _ = std::fs::remove_dir_all(&watched);
                std::process::exit(101);
            }
        });
        Self { dir, path, service: None }
    }

    /// A sandbox with an empty repository in `store`; over EBS, with a service before it.
    pub fn with_store() -> Self {
        let mut sandbox = Self::new();
        sandbox.ok(&["init", "store"]);
        if over_ebs() {
            sandbox.serve(&[]);
        }
        sandbox
    }

    /// Puts a service before the store `store`: from here on the program reaches it over EBS.
    pub fn serve(&mut self, options: &[&str]) {
        self.service = None;
        self.service = Some(service::Service::new(self, options));
    }

    /// Takes away the service; the program goes on to look for it.
    pub fn stop_serving(&mut self) {
        if let Some(service) = &mut self.service {
            service.stop();
        }
    }

    /// Puts a service before the store `store`, where one was before.
    pub fn serve_at(&mut self, address: &str, options: &[&str]) {
        self.stop_serving();
        self.service = Some(service::Service::at(self, address, options));
    }

    /// A sandbox before which there is a moto, and no store of ours.
    pub fn with_moto() -> Self {
        let mut sandbox = Self::new();
        sandbox.service = Some(service::Service::moto(&sandbox));
        sandbox
    }

    /// A sandbox with an empty repository in a bucket, of moto or of `SeaweedFS`.
    pub fn with_bucket(is_seaweed: bool) -> Self {
        let mut sandbox = Self::new();
        let service = match is_seaweed {
            true => service::Service::seaweed(&sandbox),
            false => service::Service::bucket(&sandbox),
        };
        sandbox.service = Some(service);
        sandbox.ok(&["init"]);
        sandbox
    }

    /// One before a bucket whose service takes no notice of conditions. It has no repository.
    pub fn with_lax_bucket() -> Self {
        let mut sandbox = Self::new();
        sandbox.service = Some(service::Service::s3rver(&sandbox));
        sandbox
    }

    /// The service before the store.
    pub fn service(&self) -> &service::Service {
        self.service.as_ref().expect("it is served")
    }

    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// The program, in this directory, with the store `store`.
    pub fn fspfs(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fspfs"));
        command
            .current_dir(&self.path)
            .env("FSPFS_STORE", self.join("store"))
            .env("XDG_STATE_HOME", self.join("state"))
            .env_remove("FSPFS_LOG")
            .stdin(Stdio::null());
        if let Some(service) = &self.service {
            service.show_to(&mut command);
        }
        command
    }

    /// Runs the program, which must succeed; what it printed on stdout.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = run(self.fspfs().args(arguments));
        assert!(output.status.success(), "fspfs {arguments:?}: {}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs the program, which must fail with exit code 1; what it printed on stderr.
    pub fn fails(&self, arguments: &[&str]) -> String {
        let output = run(self.fspfs().args(arguments));
        assert_eq!(output.status.code(), Some(1), "fspfs {arguments:?}: {}", text(&output));
        String::from_utf8(output.stderr).unwrap()
    }

    /// Uploads a file; the id of the snapshot.
    pub fn upload(&self, file: &str, options: &[&str]) -> String {
        let mut arguments = vec!["upload", file];
        arguments.extend(options);
        self.ok(&arguments).lines().last().unwrap().to_owned()
    }

    /// Mounts the store at `mnt`.
    pub fn mount(&self, options: &[&str]) -> Mount {
        Mount::new(self, self.fspfs(), options)
    }

    /// A shell command in this directory, which must succeed; what it printed on stdout.
    pub fn sh(&self, script: &str) -> String {
        let output = self.try_sh(script);
        assert!(output.status.success(), "{script}: {}", text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A shell command in this directory.
    pub fn try_sh(&self, script: &str) -> Output {
        let mut bash = Command::new("bash");
        run(bash.args(["-euo", "pipefail", "-c", script]).current_dir(&self.path))
    }

    /// A shell command in this directory, as the user `nobody`.
    pub fn try_sh_as_nobody(&self, script: &str) -> Output {
        let mut bash = Command::new("bash");
        let bash = bash.args(["-euo", "pipefail", "-c", script]).current_dir(&self.path);
        run(bash.uid(NOBODY).gid(NOBODY))
    }

    /// Lets other users in, and gives `nobody` the directory `user` with a store and a mount point.
    pub fn welcome_nobody(&self) {
        std::fs::set_permissions(&self.path, std::fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["user", "user/mnt", "user/state"] {
            std::fs::create_dir(self.join(name)).unwrap();
            std::os::unix::fs::chown(self.join(name), Some(NOBODY), Some(NOBODY)).unwrap();
        }
        // Where the program was built may be out of reach for others.
        std::fs::copy(env!("CARGO_BIN_EXE_fspfs"), self.join("fspfs")).unwrap();
    }

    /// The program as `nobody`, with the store `user/store`.
    pub fn fspfs_as_nobody(&self) -> Command {
        let mut command = Command::new(self.join("fspfs"));
        command
            .current_dir(self.join("user"))
            .env("HOME", self.join("user"))
            .env("FSPFS_STORE", self.join("user/store"))
            .env("XDG_STATE_HOME", self.join("user/state"))
            .env_remove("FSPFS_LOG")
            .stdin(Stdio::null())
            .uid(NOBODY)
            .gid(NOBODY);
        command
    }

    /// Whether nothing is mounted, attached or served below this directory.
    #[track_caller]
    pub fn assert_nothing_is_left(&self) {
        assert_eq!(mounts_below(&self.path), [] as [PathBuf; 0], "still mounted");
        assert_eq!(loops_below(&self.path), [] as [PathBuf; 0], "still attached");
        let end = Instant::now() + Duration::from_secs(10);
        while !daemons_below(&self.path).is_empty() {
            assert!(Instant::now() < end, "still served: {:?}", daemons_below(&self.path));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// A file of `len` bytes, a hole but for `data`, runs of bytes which no two offsets share.
    pub fn image(&self, name: &str, len: u64, data: &[(u64, u64)]) -> PathBuf {
        let path = self.join(name);
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(len).unwrap();
        for &(start, count) in data {
            write_pattern(&file, start, count.min(len - start));
        }
        path
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        clean_up(&self.path);
    }
}

/// Unmounts, detaches and ends everything below `path`, whatever state it is in.
fn clean_up(path: &Path) {
    // Once the mount is out of sight, a loop device no longer tells where its file is.
    let devices = loops_below(path);
    for point in mounts_below(path).iter().rev() {
        // What waits for a frozen file system would stay with it. Others are none.
        let mut thaw = Command::new("fsfreeze");
        let _ = thaw.arg("-u").arg(point).stderr(Stdio::null()).status();
        let _ = Command::new("umount").arg("-l").arg(point).status();
    }
    for device in devices {
        let _ = Command::new("losetup").arg("-d").arg(device).status();
    }
    for daemon in daemons_below(path).into_iter().chain(servers_below(path)) {
        let _ = nix::sys::signal::kill(daemon, nix::sys::signal::SIGKILL);
    }
}

/// What is mounted below `path` or on a loop device over a file there, in the order of mounting.
pub fn mounts_below(path: &Path) -> Vec<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    points.filter(|point| point.starts_with(path)).collect()
}

/// The loop devices over files below `path`.
pub fn loops_below(path: &Path) -> Vec<PathBuf> {
    let devices = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let over = |device: &std::fs::DirEntry| {
        let file = std::fs::read_to_string(device.path().join("loop/backing_file"));
        file.is_ok_and(|file| Path::new(file.trim_end()).starts_with(path))
    };
    devices.filter(over).map(|device| Path::new("/dev").join(device.file_name())).collect()
}

/// The processes that serve mounts below `path`, in the background or not.
pub fn daemons_below(path: &Path) -> Vec<nix::unistd::Pid> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let serves = |process: &std::fs::DirEntry| {
        let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let line = line.strip_suffix(&[0]).unwrap_or(&line);
        let mut arguments = line.split(|&b| b == 0).filter_map(|a| std::str::from_utf8(a).ok());
        arguments.nth(1) == Some("mount")
            && arguments.next_back().is_some_and(|argument| Path::new(argument).starts_with(path))
    };
    let pid = |process: std::fs::DirEntry| process.file_name().to_str()?.parse().ok();
    processes.filter(serves).filter_map(pid).map(nix::unistd::Pid::from_raw).collect()
}

/// The servers of stores that run in a directory below `path`.
fn servers_below(path: &Path) -> Vec<nix::unistd::Pid> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let serves = |process: &std::fs::DirEntry| {
        let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let serves = |argument: &[u8]| {
            argument == b"serve"
                || argument.ends_with(b"moto_server")
                || argument.ends_with(b"/weed")
        };
        line.split(|&b| b == 0).any(serves)
            && std::fs::read_link(process.path().join("cwd")).is_ok_and(|d| d.starts_with(path))
    };
    let pid = |process: std::fs::DirEntry| process.file_name().to_str()?.parse().ok();
    processes.filter(serves).filter_map(pid).map(nix::unistd::Pid::from_raw).collect()
}

/// Bytes that tell where they belong: each 8 bytes are a number made of their offset.
pub fn pattern(start: u64, len: usize) -> Vec<u8> {
    let first = start / 8;
    let words = (start % 8 + len as u64).div_ceil(8);
    let bytes = (first..first + words)
        .flat_map(|word| (word + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes());
    bytes.skip(usize::try_from(start % 8).unwrap()).take(len).collect()
}

/// Writes the pattern to `start..start + len` of a file.
pub fn write_pattern(file: &std::fs::File, start: u64, len: u64) {
    let mut at = start;
    while at < start + len {
        let step = (start + len - at).min(MIB);
        file.write_all_at(&pattern(at, usize::try_from(step).unwrap()), at).unwrap();
        at += step;
    }
}

/// Writes zeros, which are no hole, to `start..start + len` of a file.
pub fn write_zeros(file: &std::fs::File, start: u64, len: u64) {
    file.write_all_at(&vec![0; usize::try_from(len).unwrap()], start).unwrap();
}

/// A sector that names its own number and its version.
pub fn sector(number: u64, version: u32) -> Vec<u8> {
    format!("{number:016x} {version:08x} ").bytes().cycle().take(512).collect()
}

/// Writes a record of a collection, a month old, that names these objects of a repository.
pub fn old_record(repository: &Path, names: &[String]) {
    let time = jiff::Timestamp::now() - jiff::SignedDuration::from_hours(24 * 30);
    let found = serde_json::json!({ "time": time, "unreachable": names }).to_string();
    let digest = fspfs::model::Digest::of(found.as_bytes());
    std::fs::create_dir_all(repository.join("gc")).unwrap();
    std::fs::write(repository.join("gc/1.json"), format!("{found}\n\"sha256:{digest}\"\n"))
        .unwrap();
}

/// The most memory that a process ever had, in bytes.
pub fn peak_memory(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// Runs a program to its end, or kills it when it takes too long.
pub fn run(command: &mut Command) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let read = |mut pipe: Box<dyn std::io::Read + Send>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            pipe.read_to_end(&mut bytes).unwrap();
            bytes
        })
    };
    let stdout = read(Box::new(child.stdout.take().unwrap()));
    let stderr = read(Box::new(child.stderr.take().unwrap()));
    let Some(status) = wait(&mut child, PATIENCE) else {
        child.kill().unwrap();
        panic!("{command:?} takes longer than {PATIENCE:?}");
    };
    Output { status, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

/// Waits for a process for a limited time.
pub fn wait(child: &mut Child, limit: Duration) -> Option<std::process::ExitStatus> {
    let end = Instant::now() + limit;
    while Instant::now() < end {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    None
}

/// What a program printed, for a message.
pub fn text(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    format!("{}\n{}{}", output.status, String::from_utf8_lossy(out), String::from_utf8_lossy(err))
}

/// A mount, served in the foreground by a child of the test.
pub struct Mount {
    pub path: PathBuf,
    pub daemon: Child,
    log: Option<std::thread::JoinHandle<String>>,
}

impl Mount {
    /// Mounts at `mnt` with a command that is set up but for its arguments.
    pub fn new(sandbox: &Sandbox, fspfs: Command, options: &[&str]) -> Self {
        Self::at(sandbox.join("mnt"), fspfs, options)
    }

    /// Mounts at `path` with a command that is set up but for its arguments.
    pub fn at(path: PathBuf, mut fspfs: Command, options: &[&str]) -> Self {
        fspfs.args(["mount", "--foreground"]).args(options).arg(&path);
        let mut daemon = fspfs.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = daemon.stderr.take().unwrap();
        let log = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = stderr.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        let mut line = String::new();
        BufReader::new(daemon.stdout.take().unwrap()).read_line(&mut line).unwrap();
        if !line.contains(" is mounted at ") {
            let _ = wait(&mut daemon, PATIENCE);
            panic!("it is not mounted: {line}{}", log.join().unwrap());
        }
        Self { path, daemon, log: Some(log) }
    }

    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// The image of a snapshot.
    pub fn image(&self, id: &str) -> PathBuf {
        self.join(format!("{id}.img"))
    }

    /// The value of a metric, added up over its labels.
    pub fn metric(&self, name: &str) -> u64 {
        let text = std::fs::read_to_string(self.join("control/metrics")).unwrap();
        let lines = text.lines().filter_map(|line| line.rsplit_once(' '));
        let values = lines.filter(|(key, _)| *key == name || key.starts_with(&format!("{name}{{")));
        values.map(|(_, value)| value.parse::<u64>().unwrap()).sum()
    }

    /// The value of a metric for one operation of the store.
    pub fn requests(&self, operation: &str) -> u64 {
        self.metric(&format!("fspfs_store_requests_total{{operation=\"{operation}\"}}"))
    }

    /// Unmounts in order; what the daemon logged.
    pub fn unmount(self) -> String {
        let output = run(Command::new(env!("CARGO_BIN_EXE_fspfs")).arg("umount").arg(&self.path));
        assert!(output.status.success(), "umount: {}", text(&output));
        self.ended()
    }

    /// Waits until the daemon has ended by itself; what it logged.
    pub fn ended(mut self) -> String {
        let status =
            wait(&mut self.daemon, PATIENCE).expect("the daemon ends when it is unmounted");
        assert!(status.success(), "the daemon ended with {status}");
        self.log.take().unwrap().join().unwrap()
    }

    /// Sends a signal to the daemon.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.daemon.id().try_into().unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// Stops the daemon, and waits until none of its threads runs.
    pub fn stop(&self) {
        self.signal(nix::sys::signal::SIGSTOP);
        let threads = format!("/proc/{}/task", self.daemon.id());
        until("the daemon stands still", || {
            let mut threads = std::fs::read_dir(&threads).unwrap().flatten();
            threads.all(|thread| {
                let status = std::fs::read_to_string(thread.path().join("status"));
                status.is_ok_and(|status| status.contains("State:\tT"))
            })
        });
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if !mounts_below(&self.path).is_empty() {
            clean_up(&self.path);
        }
        let _ = Command::new("umount").arg("-l").arg(&self.path).stderr(Stdio::null()).status();
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// A loop device, detached at the end.
pub struct Loop(pub PathBuf);

impl Loop {
    pub fn attach(file: &Path, options: &[&str]) -> Self {
        let mut losetup = Command::new("losetup");
        let output = run(losetup.args(["-f", "--show"]).args(options).arg(file));
        assert!(output.status.success(), "losetup: {}", text(&output));
        Self(String::from_utf8(output.stdout).unwrap().trim().into())
    }

    /// The n-th partition.
    pub fn partition(&self, n: u32) -> PathBuf {
        let path = PathBuf::from(format!("{}p{n}", self.0.display()));
        // A kernel that reads no partition tables is told what is in them.
        if !path.exists() {
            let output = run(Command::new("partx").arg("-a").arg(&self.0));
            assert!(output.status.success(), "partx: {}", text(&output));
        }
        path
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

/// A file system that is mounted, unmounted at the end.
pub struct FileSystem(pub PathBuf);

impl FileSystem {
    /// Mounts a device at a directory, which is made.
    pub fn mount(device: &Path, kind: &str, options: &str, at: PathBuf) -> Self {
        let output = Self::try_mount(device, kind, options, &at);
        assert!(output.status.success(), "mount {kind} {options}: {}", text(&output));
        Self(at)
    }

    /// Mounts a device at a directory, which is made; it may fail.
    pub fn try_mount(device: &Path, kind: &str, options: &str, at: &Path) -> Output {
        std::fs::create_dir_all(at).unwrap();
        run(Command::new("mount").args(["-t", kind, "-o", options]).arg(device).arg(at))
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        let mut umount = Command::new("umount");
        if !umount.arg(&self.0).status().is_ok_and(|status| status.success()) {
            let _ = Command::new("umount").arg("-l").arg(&self.0).status();
        }
    }
}

/// Waits for something that must become true; `what` is for the message.
#[track_caller]
pub fn until(what: &str, mut is_true: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !is_true() {
        assert!(Instant::now() < end, "it never becomes true that {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The blocks that runs of bytes touch, ascending.
pub fn blocks_of(runs: &[(u64, u64)]) -> Vec<u64> {
    let runs = runs.iter().filter(|(_, len)| *len > 0);
    let blocks = runs.flat_map(|(at, len)| at / BLOCK..(at + len).div_ceil(BLOCK));
    blocks.collect::<std::collections::BTreeSet<_>>().into_iter().collect()
}

/// Whether this test can run here: as root, with FUSE and loop devices, and with these programs.
///
/// What is missing is noted in the file that `FSPFS_SKIPPED` names. In CI nothing may be missing.
pub fn can_mount(programs: &[&str]) -> bool {
    let mut missing = missing_programs(programs);
    if !nix::unistd::geteuid().is_root() {
        missing.push("root".to_owned());
    }
    for device in ["/dev/fuse", "/dev/loop-control"] {
        if !Path::new(device).exists() {
            missing.push(device.to_owned());
        }
    }
    skip(&missing)
}

/// Gives the namespace that it runs in a `/dev/fuse` that is for everybody.
const OPEN_DEVICE: &str = "
    dir=$(mktemp -d)
    mount -t tmpfs none $dir
    mknod -m 0666 $dir/fuse c 10 229
    mount --bind $dir/fuse /dev/fuse
    umount -l $dir
    rmdir $dir
    exec \"$@\"";

/// Whether this test can run here, which mounts as an ordinary user too.
///
/// Where udev is at work, `/dev/fuse` is for everybody. Where it is for root alone, the test is run
/// again in a mount namespace of its own in which it is not, and has nothing more to do here.
pub fn can_mount_as_nobody(programs: &[&str]) -> bool {
    if !can_mount(&["fusermount3", "unshare"]) || !can_mount(programs) {
        return false;
    }
    if Path::new("/dev/fuse").metadata().unwrap().permissions().mode() & 0o006 == 0o006 {
        return true;
    }
    let test = std::thread::current().name().unwrap().to_owned();
    let mut again = Command::new("unshare");
    again.args(["--mount", "--propagation", "private", "sh", "-euc", OPEN_DEVICE, "sh"]);
    again.arg(std::env::current_exe().unwrap()).args([&test, "--exact", "--nocapture"]);
    let output = run(&mut again);
    assert!(output.status.success(), "in a namespace of its own: {}", text(&output));
    false
}

/// Whether these programs are there.
pub fn has(programs: &[&str]) -> bool {
    skip(&missing_programs(programs))
}

fn missing_programs(programs: &[&str]) -> Vec<String> {
    let found = |program: &&&str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let sbin = ["/usr/sbin", "/sbin"].map(PathBuf::from);
        std::env::split_paths(&path).chain(sbin).any(|dir| dir.join(program).exists())
    };
    programs.iter().filter(|p| !found(p)).map(|&p| p.to_owned()).collect()
}

/// Whether nothing is missing; notes it if something is.
pub fn skip(missing: &[String]) -> bool {
    if missing.is_empty() {
        return true;
    }
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let note = format!("{test}: needs {}\n", missing.join(", "));
    assert!(std::env::var_os("CI").is_none(), "nothing may be skipped in CI: {note}");
    if let Some(file) = std::env::var_os("FSPFS_SKIPPED") {
        use std::io::Write as _;
        let file = std::fs::OpenOptions::new().create(true).append(true).open(file);
        file.unwrap().write_all(note.as_bytes()).unwrap();
    }
    eprintln!("skipped {note}");
    false
}

/// The names in a directory, sorted.
pub fn names(directory: impl AsRef<Path>) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The error code of something that must fail.
#[track_caller]
pub fn errno<T>(result: std::io::Result<T>) -> i32 {
    match result {
        Ok(_) => panic!("it succeeded"),
        Err(error) => error.raw_os_error().unwrap_or_else(|| panic!("{error}")),
    }
}

/// Whether two files have the same content.
pub fn same(a: impl AsRef<OsStr>, b: impl AsRef<OsStr>) -> bool {
    run(Command::new("cmp").arg(a).arg(b)).status.success()
}
