//! What the tests share: a place of their own, the program, mounts and loop devices that go away
//! with the test, and a deadline.
#![allow(dead_code, unreachable_pub, reason = "every test file uses a part of it")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, missing_debug_implementations)]

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Longest time that any one program may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Longest time that a whole test may take. Then everything is cleaned up, and the test fails.
pub const DEADLINE: Duration = Duration::from_secs(240);

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
pub const BLOCK: u64 = 512 * 1024;

/// A directory of a test's own, in which nothing stays mounted or attached.
pub struct Sandbox {
    dir: tempfile::TempDir,
    /// A canonical path: the kernel's tables show these.
    pub path: PathBuf,
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
                std::process::exit(101);
            }
        });
        Self { dir, path }
    }

    /// A sandbox with an empty repository in `store`.
    pub fn with_store() -> Self {
        let sandbox = Self::new();
        sandbox.ok(&["init", "store"]);
        sandbox
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
        run(Command::new("bash").args(["-euc", script]).current_dir(&self.path))
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

/// Unmounts and detaches everything below `path`, whatever state it is in.
fn clean_up(path: &Path) {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    let below: Vec<_> = points.filter(|point| Path::new(point).starts_with(path)).collect();
    for point in below.iter().rev() {
        let _ = Command::new("umount").args(["-l", point]).status();
    }
    for device in std::fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let file = std::fs::read_to_string(device.path().join("loop/backing_file"));
        if file.is_ok_and(|file| Path::new(file.trim_end()).starts_with(path)) {
            let device = Path::new("/dev").join(device.file_name());
            let _ = Command::new("losetup").arg("-d").arg(device).status();
        }
    }
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
    /// Mounts with a command that is set up but for its arguments.
    pub fn new(sandbox: &Sandbox, mut fspfs: Command, options: &[&str]) -> Self {
        let path = sandbox.join("mnt");
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
    pub fn unmount(mut self) -> String {
        let output = run(Command::new(env!("CARGO_BIN_EXE_fspfs")).arg("umount").arg(&self.path));
        assert!(output.status.success(), "umount: {}", text(&output));
        let status =
            wait(&mut self.daemon, PATIENCE).expect("the daemon ends when it is unmounted");
        assert!(status.success(), "the daemon ended with {status}");
        self.log.take().unwrap().join().unwrap()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
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
        format!("{}p{n}", self.0.display()).into()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
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

fn skip(missing: &[String]) -> bool {
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
