//! Files under `new/`: what they say of themselves, what became of them, and stores that misbehave.

use std::io::Read as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{SIGKILL, Signal, kill, killpg};
use nix::unistd::Pid;
use serde_json::Value;

use super::{FileSystem, Loop, Mount, PATIENCE, Sandbox, run, same, text, until, wait};

impl Mount {
    /// A file in `new/`.
    pub fn new_file(&self, name: &str) -> PathBuf {
        self.join("new").join(name)
    }

    /// An attribute of a file in `new/`; empty if there is none.
    #[track_caller]
    pub fn told(&self, name: &str, attribute: &str) -> String {
        let value = xattr::get(self.new_file(name), format!("user.fspfs.{attribute}"));
        let value = value.unwrap_or_else(|e| panic!("{attribute} of {name}: {e}"));
        String::from_utf8(value.unwrap_or_default()).unwrap()
    }

    /// The state of a file in `new/`.
    #[track_caller]
    pub fn state(&self, name: &str) -> String {
        self.told(name, "state")
    }

    /// Waits until a file in `new/` is in this state.
    #[track_caller]
    pub fn becomes(&self, name: &str, state: &str) {
        let end = Instant::now() + Duration::from_secs(20);
        // It may not be there yet.
        while !self.new_file(name).exists() || self.state(name) != state {
            let say = || format!("{name}: {}, {}", self.state(name), self.told(name, "error"));
            assert!(Instant::now() < end, "it never becomes {state}: {}", say());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until a file in `new/` is a snapshot; its id.
    #[track_caller]
    pub fn committed(&self, name: &str) -> String {
        self.becomes(name, "clean");
        let id = self.told(name, "snapshot");
        assert!(id.starts_with("snap-"), "{name} has no snapshot");
        id
    }

    /// The snapshots that were begun through this mount.
    pub fn begun(&self) -> u64 {
        self.requests("start")
    }

    /// The blocks that were put through this mount.
    pub fn put(&self) -> u64 {
        self.requests("put_block")
    }
}

impl Sandbox {
    /// All snapshots, as `fspfs list --json` has them.
    pub fn snapshots(&self) -> Vec<Value> {
        serde_json::from_str(&self.ok(&["list", "--json"])).unwrap()
    }

    /// What the repository has of a snapshot, also over EBS.
    #[track_caller]
    pub fn stored(&self, id: &str) -> Value {
        let all: Vec<Value> =
            serde_json::from_str(&self.ok(&["-s", "store", "list", "--json"])).unwrap();
        let found = all.into_iter().find(|snapshot| snapshot["id"] == id);
        found.unwrap_or_else(|| panic!("there is no {id}"))
    }

    /// What `fspfs list --json` has of a snapshot.
    #[track_caller]
    pub fn described(&self, id: &str) -> Value {
        let found = self.snapshots().into_iter().find(|snapshot| snapshot["id"] == id);
        found.unwrap_or_else(|| panic!("there is no {id}"))
    }

    /// The parent of a snapshot.
    #[track_caller]
    pub fn parent_of(&self, id: &str) -> Option<String> {
        self.described(id)["parent"].as_str().map(str::to_owned)
    }

    /// Downloads a snapshot, which must be what is in a file of this directory, byte by byte.
    #[track_caller]
    pub fn assert_holds(&self, id: &str, file: impl AsRef<Path>) {
        let (to, file) = (self.join(format!("{id}.download")), self.join(file));
        self.ok(&["download", id, to.to_str().unwrap()]);
        assert!(same(&to, &file), "{id} is not {}", file.display());
        std::fs::remove_file(to).unwrap();
    }

    /// A file of `len` random bytes, which cannot be compressed.
    pub fn random(&self, name: &str, len: u64) -> PathBuf {
        let source = std::fs::File::open("/dev/urandom").unwrap();
        let mut file = std::fs::File::create(self.join(name)).unwrap();
        assert_eq!(std::io::copy(&mut source.take(len), &mut file).unwrap(), len);
        self.join(name)
    }

    /// Starts a shell command in this directory.
    pub fn start(&self, script: &str) -> Running {
        let mut bash = Command::new("bash");
        bash.args(["-euo", "pipefail", "-c", script]).current_dir(&self.path);
        Running::new(&mut bash)
    }

    /// Runs a Python script in this directory, which must succeed; what it printed.
    pub fn python(&self, script: &str) -> String {
        let output = self.try_python(script);
        assert!(output.status.success(), "{script}: {}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a Python script in this directory.
    pub fn try_python(&self, script: &str) -> Output {
        run(Command::new("python3").args(["-c", script]).current_dir(&self.path))
    }
}

/// A program that runs beside the test, killed at the end with all that it has started.
pub struct Running {
    pub child: Child,
}

impl Running {
    pub fn new(command: &mut Command) -> Self {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { child: command.process_group(0).spawn().unwrap() }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().try_into().unwrap())
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits until its stdout is this file. What it opened it by is closed, and asks for no commit later.
    #[track_caller]
    pub fn writes_to(&self, file: &Path) {
        let directory = format!("/proc/{}/fd", self.child.id());
        until("it has opened the file", || {
            let entries = std::fs::read_dir(&directory).into_iter().flatten().flatten();
            let is_it = |at: &Path| std::fs::read_link(at).is_ok_and(|at| at == file);
            let names = entries.filter(|entry| is_it(&entry.path())).map(|entry| entry.file_name());
            names.eq(["1"])
        });
    }

    /// Waits for its end.
    #[track_caller]
    pub fn ends(mut self) -> Output {
        drop(self.child.stdin.take());
        let status = wait(&mut self.child, PATIENCE).expect("it ends");
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        self.child.stdout.take().unwrap().read_to_end(&mut stdout).unwrap();
        self.child.stderr.take().unwrap().read_to_end(&mut stderr).unwrap();
        Output { status, stdout, stderr }
    }

    /// Waits for its end, which must be a good one.
    #[track_caller]
    pub fn succeeds(self) {
        let output = self.ends();
        assert!(output.status.success(), "{}", text(&output));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.is_running() {
            let _ = killpg(self.pid(), SIGKILL);
            // Whoever waits for the mount cannot be killed before it answers.
            let _ = wait(&mut self.child, Duration::from_secs(5));
        }
    }
}

/// A small disk with an ext4 of its own.
pub struct Disk {
    pub file_system: FileSystem,
    device: Loop,
}

impl Disk {
    /// A disk of `len` bytes, mounted at `name`.
    pub fn new(sandbox: &Sandbox, name: &str, len: u64) -> Self {
        let file = sandbox.image(&format!("{name}.disk"), len, &[]);
        sandbox.sh(&format!("mkfs.ext4 -q -m 0 {name}.disk"));
        let device = Loop::attach(&file, &[]);
        let file_system = FileSystem::mount(&device.0, "ext4", "rw", sandbox.join(name));
        std::fs::remove_dir(sandbox.join(name).join("lost+found")).unwrap();
        Self { file_system, device }
    }

    /// A sandbox whose repository is on a disk of `len` bytes.
    pub fn with_store(len: u64) -> (Sandbox, Self) {
        let sandbox = Sandbox::new();
        let disk = Self::new(&sandbox, "store", len);
        sandbox.ok(&["init", "store"]);
        (sandbox, disk)
    }

    /// Nothing can be written until the answer is dropped: whoever tries waits.
    pub fn freeze(&self) -> Frozen {
        let output = run(Command::new("fsfreeze").arg("-f").arg(&self.file_system.0));
        assert!(output.status.success(), "{}", text(&output));
        Frozen(self.file_system.0.clone())
    }

    /// Mounts it anew with other options.
    pub fn remount(&self, options: &str) {
        let options = format!("remount,{options}");
        let output = run(Command::new("mount").args(["-o", &options]).arg(&self.file_system.0));
        assert!(output.status.success(), "{}", text(&output));
    }
}

/// A file system on which all writes wait.
pub struct Frozen(PathBuf);

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("-u").arg(&self.0).status();
    }
}
