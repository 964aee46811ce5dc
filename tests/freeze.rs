//! Uploads that freeze a file system while they read its device. Whatever happens, it is thawed.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use support::{FileSystem, Loop, MIB, PATIENCE, Sandbox, can_mount, names, run, same, text, until};

/// A device with a file system, mounted at `at`; it is thawed and unmounted at the end.
struct Disk {
    point: PathBuf,
    device: String,
    _file_system: FileSystem,
    _device: Loop,
}

impl Disk {
    /// One that begins with some data.
    fn new(sandbox: &Sandbox, kind: &str) -> Self {
        let file = sandbox.image("disk", 320 * MIB, &[]);
        sandbox.sh(&format!("mkfs.{kind} -q disk"));
        let device = Loop::attach(&file, &[]);
        let file_system = FileSystem::mount(&device.0, kind, "rw", sandbox.join("at"));
        sandbox.sh("head -c 48M /dev/urandom > at/data; sync -f at");
        Self {
            point: sandbox.join("at"),
            device: device.0.to_str().unwrap().to_owned(),
            _file_system: file_system,
            _device: device,
        }
    }

    /// Whether somebody who writes to it gets on.
    fn can_be_written(&self, patience: Duration) -> bool {
        let mut write = Command::new("sh");
        let mut write =
            write.args(["-c", "echo x > probe"]).current_dir(&self.point).spawn().unwrap();
        support::wait(&mut write, patience).is_some_and(|status| status.success())
    }

    #[track_caller]
    fn assert_thawed(&self) {
        assert!(self.can_be_written(Duration::from_secs(5)), "it is frozen still");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let mut thaw = Command::new("fsfreeze");
        let _ = thaw.arg("-u").arg(&self.point).stderr(Stdio::null()).status();
    }
}

/// A program that writes a line to `at/lines` a hundred times a second.
struct Writer {
    child: Child,
    file: PathBuf,
}

impl Writer {
    fn new(disk: &Disk) -> Self {
        let file = disk.point.join("lines");
        let mut sh = Command::new("sh");
        sh.args(["-c", "while echo line >> lines; do sleep .01; done"]).current_dir(&disk.point);
        let writer = Self { child: sh.spawn().unwrap(), file };
        until("it writes", || writer.file.exists() && writer.lines() > 3);
        writer
    }

    fn lines(&self) -> usize {
        std::fs::read(&self.file).unwrap().len() / 5
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An upload that has frozen its file system.
struct Upload {
    child: Child,
    said: std::thread::JoinHandle<String>,
}

impl Upload {
    /// One that takes some seconds.
    #[track_caller]
    fn begin(sandbox: &Sandbox, disk: &Disk, options: &[&str]) -> Self {
        let mut command = sandbox.fspfs();
        command.args(["upload", "--freeze", "at", "--max-requests-per-second", "20"]);
        command.args(options).arg(&disk.device).process_group(0);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (tell, is_frozen) = mpsc::channel();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let said = std::thread::spawn(move || {
            let mut said = String::new();
            for line in lines.map_while(Result::ok) {
                if line.contains("is frozen, for ") {
                    let _ = tell.send(());
                }
                said += &format!("{line}\n");
            }
            said
        });
        let is_frozen = is_frozen.recv_timeout(Duration::from_secs(20)).is_ok();
        if !is_frozen {
            let _ = child.kill();
        }
        let upload = Self { child, said };
        assert!(is_frozen, "{}", upload.said.join().unwrap());
        upload
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// The process that thaws.
    fn watchdog(&self) -> Pid {
        let children = format!("/proc/{0}/task/{0}/children", self.pid());
        let children = std::fs::read_to_string(children).unwrap();
        let mut children = children.split_whitespace().map(|pid| pid.parse::<i32>().unwrap());
        let is_it = |pid: &i32| {
            std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap() == "thaw-watchdog\n"
        };
        Pid::from_raw(children.find(is_it).unwrap())
    }

    /// How it ends, and what it has said: the id on stdout comes last.
    fn end(mut self) -> (ExitStatus, String) {
        let ended = support::wait(&mut self.child, PATIENCE);
        if ended.is_none() {
            let _ = self.child.kill();
        }
        let mut out = String::new();
        let mut stdout = self.child.stdout.take().unwrap();
        std::io::Read::read_to_string(&mut stdout, &mut out).unwrap();
        (ended.expect("it ends"), self.said.join().unwrap() + &out)
    }

    #[track_caller]
    fn fails(self, why: &str) -> String {
        let (status, said) = self.end();
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(said.contains(why), "{said}");
        said
    }
}

fn served() -> Sandbox {
    let mut sandbox = Sandbox::with_store();
    sandbox.serve(&[]);
    sandbox
}

#[track_caller]
fn assert_no_snapshot(sandbox: &Sandbox) {
    assert_eq!(sandbox.ok(&["list", "--json"]).trim(), "[]");
    let journals = sandbox.join("state/fspfs/transfers");
    assert!(!journals.exists() || names(journals).is_empty());
}

#[rstest]
fn a_file_system_stands_still_while_it_is_uploaded(#[values("ext4", "xfs")] kind: &str) {
    if !can_mount(&["fsfreeze", &format!("mkfs.{kind}")]) {
        return;
    }
    let sandbox = served();
    let disk = Disk::new(&sandbox, kind);
    let writer = Writer::new(&disk);
    let upload = Upload::begin(&sandbox, &disk, &[]);
    let lines = writer.lines();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(writer.lines(), lines, "it is written to");
    let (status, said) = upload.end();
    assert!(status.success() && said.contains("it is thawed"), "{said}");
    until("the writer goes on", || writer.lines() > lines + 3);
    drop(writer);
    let id = said.lines().last().unwrap().to_owned();
    sandbox.ok(&["download", &id, "copy"]);
    // As a frozen one is: nothing has to be repaired to read all of it.
    let copy = Loop::attach(&sandbox.join("copy"), &["-r"]);
    let options = if kind == "xfs" { "ro,norecovery,nouuid" } else { "ro,noload" };
    let copied = FileSystem::mount(&copy.0, kind, options, sandbox.join("copied"));
    assert_eq!(std::fs::read(copied.0.join("lines")).unwrap().len(), lines * 5);
    assert!(same(copied.0.join("data"), disk.point.join("data")));
    if kind == "ext4" {
        let head = sandbox.sh(&format!("dumpe2fs -h {}", copy.0.display()));
        assert!(!head.contains("needs_recovery"), "{head}");
    }
}

#[derive(Debug)]
enum End {
    Signal(Signal),
    KilledWithItsGroup,
}

#[rstest]
#[case::killed(End::Signal(Signal::SIGKILL))]
#[case::killed_with_its_group(End::KilledWithItsGroup)]
#[case::interrupted(End::Signal(Signal::SIGINT))]
#[case::terminated(End::Signal(Signal::SIGTERM))]
#[case::hung_up(End::Signal(Signal::SIGHUP))]
fn the_end_of_an_upload_thaws(#[case] end: End) {
    if !can_mount(&["fsfreeze", "mkfs.ext4"]) {
        return;
    }
    let sandbox = served();
    let disk = Disk::new(&sandbox, "ext4");
    let upload = Upload::begin(&sandbox, &disk, &[]);
    assert!(!disk.can_be_written(Duration::from_millis(500)));
    // What it has begun cannot be ended well, and that takes its time.
    sandbox.service().suspend();
    match end {
        End::Signal(signal) => kill(upload.pid(), signal).unwrap(),
        End::KilledWithItsGroup => {
            kill(Pid::from_raw(-upload.pid().as_raw()), Signal::SIGKILL).unwrap();
        }
    }
    let thawed = disk.can_be_written(Duration::from_secs(5));
    sandbox.service().resume();
    assert!(thawed, "it is frozen still");
    let (status, said) = upload.end();
    assert!(!status.success(), "{said}");
    assert!(!sandbox.ok(&["list", "--json"]).contains("completed"));
}

#[test]
fn an_upload_that_hangs_is_thawed_in_time_and_makes_no_snapshot() {
    if !can_mount(&["fsfreeze", "mkfs.ext4"]) {
        return;
    }
    let sandbox = served();
    let disk = Disk::new(&sandbox, "ext4");
    let upload = Upload::begin(&sandbox, &disk, &["--freeze-limit", "3s"]);
    let began = Instant::now();
    sandbox.service().suspend();
    let thawed = disk.can_be_written(Duration::from_secs(10));
    let took = began.elapsed();
    sandbox.service().resume();
    assert!(thawed && (2..6).contains(&took.as_secs()), "{took:?}");
    upload.fails("thawed after 3s, before all was read");
    assert_no_snapshot(&sandbox);
}

#[test]
fn an_upload_that_is_too_slow_makes_no_snapshot() {
    if !can_mount(&["fsfreeze", "mkfs.ext4"]) {
        return;
    }
    let mut sandbox = Sandbox::with_store();
    sandbox.serve(&["--inject", "latency=900ms"]);
    let disk = Disk::new(&sandbox, "ext4");
    let options = ["--freeze-limit", "3s", "--max-in-flight", "2"];
    let upload = Upload::begin(&sandbox, &disk, &options);
    assert!(disk.can_be_written(Duration::from_secs(6)));
    upload.fails("thawed after 3s, before all was read");
    assert_no_snapshot(&sandbox);
}

#[test]
fn a_thaw_by_somebody_else_makes_no_snapshot() {
    if !can_mount(&["fsfreeze", "mkfs.ext4"]) {
        return;
    }
    let sandbox = served();
    let disk = Disk::new(&sandbox, "ext4");
    let upload = Upload::begin(&sandbox, &disk, &[]);
    sandbox.sh("fsfreeze -u at");
    upload.fails("somebody else has thawed it before all was read");
    assert_no_snapshot(&sandbox);
}

#[rstest]
#[case(Signal::SIGTERM, "a signal had it thawed")]
#[case(Signal::SIGKILL, "the watchdog was killed")]
fn the_end_of_the_watchdog_thaws(#[case] signal: Signal, #[case] says: &str) {
    if !can_mount(&["fsfreeze", "mkfs.ext4"]) {
        return;
    }
    let sandbox = served();
    let disk = Disk::new(&sandbox, "ext4");
    let upload = Upload::begin(&sandbox, &disk, &[]);
    kill(upload.watchdog(), signal).unwrap();
    disk.assert_thawed();
    upload.fails(says);
    assert_no_snapshot(&sandbox);
}

/// Runs an upload that is refused, and leaves nothing frozen.
#[track_caller]
fn refuses(disk: &Disk, command: &mut Command, says: &str) {
    let output = run(command);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains(says), "{says}: {}", text(&output));
    disk.assert_thawed();
}

#[test]
fn a_freeze_that_would_wait_for_itself_is_refused() {
    if !can_mount(&["fsfreeze", "mkfs.ext4"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let disk = Disk::new(&sandbox, "ext4");
    sandbox.ok(&["init", "at/store"]);
    std::fs::create_dir_all(disk.point.join("home/.aws/sso/cache")).unwrap();
    let upload = |options: &[&str]| {
        let mut command = sandbox.fspfs();
        command.args(["upload", "--freeze", "at", &disk.device]).args(options);
        command
    };
    refuses(&disk, &mut upload(&["-s", "at/store"]), "the repository");
    refuses(&disk, upload(&[]).env("XDG_STATE_HOME", disk.point.join("none/yet")), "the journal");
    let mut with_sso = upload(&["-s", "ebs://us-east-1?endpoint=http://127.0.0.1:9"]);
    with_sso.env("HOME", disk.point.join("home")).env_remove("AWS_ACCESS_KEY_ID");
    refuses(&disk, &mut with_sso, "the credentials");
    for (name, out) in [("stdout", "> at/out"), ("stderr", "2> at/err")] {
        let program = env!("CARGO_BIN_EXE_fspfs");
        let script = format!("{program} upload -s store --freeze at {} {out}", disk.device);
        let mut sh = Command::new("sh");
        sh.args(["-c", &script]).current_dir(&sandbox.path);
        sh.env("XDG_STATE_HOME", sandbox.join("state"));
        assert_eq!(run(&mut sh).status.code(), Some(1), "{name}");
        disk.assert_thawed();
    }
    assert!(std::fs::read_to_string(disk.point.join("err")).unwrap().contains("stderr would be"));
    // Nothing is frozen by this, whatever happens.
    let mut root = sandbox.fspfs();
    root.args(["upload", "--dry-run", "--freeze", "/", &disk.device]);
    refuses(&disk, &mut root, "only with --suppress-writes");
    assert_no_snapshot(&sandbox);
    let mut without = upload(&["--suppress-writes"]);
    let done = run(without.env("XDG_STATE_HOME", disk.point.join("none/yet")));
    assert!(done.status.success(), "{}", text(&done));
    disk.assert_thawed();
    assert!(!disk.point.join("none").exists());
}

#[test]
fn a_freeze_that_cannot_be_had_is_refused() {
    if !can_mount(&["fsfreeze", "mkfs.ext4"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let disk = Disk::new(&sandbox, "ext4");
    let memory = FileSystem::mount(Path::new("none"), "tmpfs", "size=1m", sandbox.join("memory"));
    std::fs::create_dir(disk.point.join("inside")).unwrap();
    let upload = |point: &str| {
        let mut command = sandbox.fspfs();
        command.args(["upload", "--freeze", point, &disk.device]);
        command
    };
    refuses(&disk, &mut upload("at/inside"), "no mount point");
    refuses(&disk, &mut upload("nowhere"), "No such file");
    refuses(&disk, &mut upload("disk"), "Not a directory");
    refuses(&disk, &mut upload(memory.0.to_str().unwrap()), "cannot be frozen");
    let mut stdin = sandbox.fspfs();
    refuses(&disk, stdin.args(["upload", "--freeze", "at", "--size", "1MiB", "-"]), "stdin");
    assert_no_snapshot(&sandbox);

    sandbox.welcome_nobody();
    let mut nobody = sandbox.fspfs_as_nobody();
    assert!(run(sandbox.fspfs_as_nobody().args(["init", "store"])).status.success());
    std::fs::write(sandbox.join("user/image"), "x").unwrap();
    refuses(&disk, nobody.args(["upload", "--freeze", "../at", "image"]), "only root");

    sandbox.sh("fsfreeze -f at");
    let output = run(&mut upload("at"));
    let still = !disk.can_be_written(Duration::from_millis(500));
    sandbox.sh("fsfreeze -u at");
    assert!(still, "it was thawed");
    assert!(text(&output).contains("it is frozen already"), "{}", text(&output));
    disk.assert_thawed();
    assert_no_snapshot(&sandbox);
}
