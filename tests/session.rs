//! The life of a mount: how it begins, who may use it, how it ends.
#![allow(clippy::unwrap_used)]

mod support;

use std::ffi::OsStr;
use std::io::BufRead as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{SIGHUP, SIGINT, SIGKILL, SIGTERM, Signal, kill};
use support::{
    Loop, MIB, Mount, NOBODY, Sandbox, can_mount, can_mount_as_nobody, daemons_below, errno,
    mounts_below, names, run, same, text, until, wait,
};

/// A store with one image, `disk.img`, named `disk`.
fn stored() -> (Sandbox, String) {
    let sandbox = Sandbox::with_store();
    sandbox.image("disk.img", 3 * MIB, &[(0, 2 * MIB)]);
    let id = sandbox.upload("disk.img", &["--name", "disk"]);
    (sandbox, id)
}

/// Mounts at `mnt` in the background.
fn mount_in_background(sandbox: &Sandbox, options: &[&str]) {
    let mut command = sandbox.fspfs();
    let output = run(command.arg("mount").args(options).arg("mnt"));
    assert!(output.status.success(), "{}", text(&output));
    let (store, mnt) = (sandbox.join("store"), sandbox.join("mnt"));
    let line = format!("file://{} is mounted at {}\n", store.display(), mnt.display());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), line);
}

/// A process that has a file open, or is in a directory, until it is killed.
struct Holder(Child);

impl Holder {
    fn new(script: &str, directory: &Path) -> Self {
        let script = format!("{script}; echo held; exec sleep 200");
        let mut bash = Command::new("bash");
        bash.args(["-euc", &script]).current_dir(directory).stdout(Stdio::piped());
        let mut child = bash.spawn().unwrap();
        let mut line = String::new();
        std::io::BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "held\n");
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn log(sandbox: &Sandbox) -> String {
    let mut logs = std::fs::read_dir(sandbox.join("state/fspfs/log")).unwrap();
    std::fs::read_to_string(logs.next().unwrap().unwrap().path()).unwrap()
}

#[test]
fn a_mount_in_the_background_is_there_when_the_command_ends() {
    if !can_mount(&["cmp"]) {
        return;
    }
    let (sandbox, id) = stored();
    let mut command = sandbox.fspfs();
    let output = run(command.args(["mount", "mnt"]));
    assert!(same(sandbox.join("disk.img"), sandbox.join(format!("mnt/{id}.img"))));
    let said = String::from_utf8(output.stderr).unwrap();
    let log = said.trim_end().strip_prefix("fspfs: the log is ").unwrap();
    let metadata = std::fs::metadata(log).unwrap();
    assert_eq!(metadata.mode() & 0o777, 0o600);
    assert!(Path::new(log).starts_with(sandbox.join("state/fspfs/log")));
    assert!(std::fs::read_to_string(log).unwrap().contains(" is mounted at "));
    // Nothing keeps the directory in which it was started, or the terminal.
    let daemon = daemons_below(&sandbox.path)[0];
    assert_eq!(std::fs::read_link(format!("/proc/{daemon}/cwd")).unwrap(), Path::new("/"));
    assert_eq!(nix::unistd::getsid(Some(daemon)).unwrap(), daemon);
    assert_eq!(sandbox.ok(&["umount", "mnt"]), "");
    sandbox.assert_nothing_is_left();
    assert!(std::fs::read_to_string(log).unwrap().contains("mnt is unmounted"));
    // With -q there is the result alone.
    let output = run(sandbox.fspfs().args(["-q", "mount", "mnt"]));
    assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output));
    sandbox.ok(&["umount", "mnt"]);
    sandbox.assert_nothing_is_left();
}

#[test]
fn a_mount_in_the_background_keeps_nothing_of_whoever_made_it() {
    if !can_mount(&["flock"]) {
        return;
    }
    let (sandbox, _) = stored();
    let fspfs = env!("CARGO_BIN_EXE_fspfs");
    let environment = "export FSPFS_STORE=store XDG_STATE_HOME=$PWD/state";
    let said =
        sandbox.sh(&format!("{environment}; said=$({fspfs} mount mnt 7>&1 2>&1); echo \"$said\""));
    assert!(said.contains("is mounted at") && said.contains("the log is"), "{said}");
    sandbox.ok(&["umount", "mnt"]);
    sandbox.sh(&format!("{environment}; flock lock {fspfs} mount mnt"));
    sandbox.sh("flock --nonblock lock true");
    let daemon = daemons_below(&sandbox.path)[0];
    let open: Vec<_> =
        (0..3).map(|fd| std::fs::read_link(format!("/proc/{daemon}/fd/{fd}")).unwrap()).collect();
    assert_eq!(open[..2], [Path::new("/dev/null"); 2]);
    assert!(open[2].starts_with(sandbox.join("state/fspfs/log")), "{open:?}");
    sandbox.ok(&["umount", "mnt"]);
    sandbox.assert_nothing_is_left();
}

#[test]
fn a_limit_of_file_sizes_fails_what_is_beyond_and_nothing_else() {
    if !can_mount(&["truncate"]) {
        return;
    }
    let (sandbox, _) = stored();
    let fspfs = env!("CARGO_BIN_EXE_fspfs");
    let limited = |line: &str| {
        let at = "export FSPFS_STORE=store XDG_STATE_HOME=$PWD/state; ulimit -f 10240";
        sandbox.try_sh(&format!("{at}; exec {fspfs} {line}"))
    };
    let output = limited("mount mnt");
    assert!(output.status.success(), "{}", text(&output));
    for script in ["truncate -s 1G mnt/new/y.img", "head -c 12M /dev/urandom >mnt/new/z.img"] {
        let output = sandbox.try_sh(script);
        assert!(text(&output).contains("File too large"), "{script}: {}", text(&output));
    }
    assert!(same(sandbox.join("mnt/by-name/disk.img"), sandbox.join("disk.img")));
    sandbox.sh("rm mnt/new/*; printf x > mnt/new/small.img");
    sandbox.ok(&["umount", "mnt"]);
    sandbox.sh("head -c 29M /dev/urandom > a.img; head -c 29M /dev/urandom > b.img");
    sandbox.upload("a.img", &["--name", "a"]);
    for line in ["download a out.img", "upload b.img"] {
        let output = limited(line);
        assert_eq!(output.status.code(), Some(1), "{line}: {}", text(&output));
        assert!(text(&output).contains("File too large"), "{line}: {}", text(&output));
    }
    sandbox.assert_nothing_is_left();
}

#[test]
fn a_damaged_block_is_one_line_however_often_it_is_read() {
    if !can_mount(&["dd", "find"]) {
        return;
    }
    let (sandbox, id) = stored();
    sandbox.sh("for pack in $(find store/packs -type f); do
        head -c 200 /dev/urandom | dd status=none of=$pack bs=1 seek=64 conv=notrunc; done");
    mount_in_background(&sandbox, &[]);
    let read = "for n in $(seq 100); do dd if=mnt/ID.img bs=4k count=1 skip=$((n * 5)) iflag=direct || true; done";
    sandbox.sh(&format!("({}) 2>/dev/null", read.replace("ID", &id)));
    let errors = || log(&sandbox).lines().filter(|line| line.contains("ERROR")).count();
    assert!((1..=4).contains(&errors()), "{}", log(&sandbox));
    sandbox.ok(&["umount", "mnt"]);
    sandbox.assert_nothing_is_left();
    let log = log(&sandbox);
    assert!(log.contains(" times more)"), "{log}");
}

#[test]
fn the_log_is_opened_anew_at_sighup() {
    if !can_mount(&[]) {
        return;
    }
    let (sandbox, _) = stored();
    mount_in_background(&sandbox, &[]);
    let daemon = daemons_below(&sandbox.path)[0];
    sandbox.sh("mv state/fspfs/log/*.log moved");
    kill(daemon, SIGHUP).unwrap();
    until("there is a log", || names(sandbox.join("state/fspfs/log")).len() == 1);
    let stderr = std::fs::read_link(format!("/proc/{daemon}/fd/2")).unwrap();
    assert!(stderr.starts_with(sandbox.join("state/fspfs/log")), "{stderr:?}");
    sandbox.ok(&["umount", "mnt"]);
    sandbox.assert_nothing_is_left();
    assert!(log(&sandbox).contains("is unmounted"));
    let moved = std::fs::read_to_string(sandbox.join("moved")).unwrap();
    assert!(moved.contains("is mounted at") && !moved.contains("is unmounted"), "{moved}");
}

#[test]
fn a_mount_point_is_a_link_or_any_bytes_and_may_be_moved() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let bytes = |name: &'static [u8]| sandbox.join(OsStr::from_bytes(name));
    let (place, parents) = (bytes(b"a\xff/m \xfe"), [bytes(b"a\xff"), bytes(b"b\xff")]);
    std::fs::create_dir_all(&place).unwrap();
    let link = sandbox.join("link");
    std::os::unix::fs::symlink(&place, &link).unwrap();
    let ok = |command: &str, at: &Path| {
        let output = run(sandbox.fspfs().arg(command).arg(at));
        assert!(output.status.success(), "{command} {}: {}", at.display(), text(&output));
        text(&output)
    };
    let works = |at: &Path, name: &str| {
        std::fs::write(at.join("new").join(name), name).unwrap();
        ok("commit", &at.join("new").join(name));
        assert!(ok("staged", at).contains(name), "{name} is not staged");
        assert!(ok("jobs", at).contains(name), "{name} was no job");
        assert!(ok("doctor", at).contains("read-ahead: 4096 KiB"), "the read-ahead is not set");
    };
    let mount = Mount::at(link.clone(), sandbox.fspfs(), &[]);
    works(&link, "one.img");
    works(&place, "two.img");
    std::fs::rename(&parents[0], &parents[1]).unwrap();
    let moved = bytes(b"b\xff/m \xfe");
    works(&moved, "three.img");
    mount.signal(nix::sys::signal::SIGTERM);
    mount.ended();
    std::fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(&moved, &link).unwrap();
    let mut killed = Mount::at(link.clone(), sandbox.fspfs(), &[]);
    killed.signal(nix::sys::signal::SIGKILL);
    killed.daemon.wait().unwrap();
    let mount = Mount::at(link.clone(), sandbox.fspfs(), &[]);
    ok("umount", &link);
    mount.ended();
    drop(killed);
    let store = bytes(b"store\xff");
    let of = |command: &[&str]| run(sandbox.fspfs().arg("-s").arg(&store).args(command));
    assert!(run(sandbox.fspfs().arg("init").arg(&store)).status.success());
    sandbox.image("x.img", 1, &[]);
    let id = String::from_utf8(of(&["-q", "upload", "x.img"]).stdout).unwrap();
    assert_eq!(of(&["-q", "list"]).stdout, id.as_bytes());
    sandbox.assert_nothing_is_left();
}

#[test]
fn a_limit_on_threads_is_an_error_and_no_panic() {
    if !can_mount_as_nobody(&[]) {
        return;
    }
    let sandbox = Sandbox::new();
    sandbox.welcome_nobody();
    let init = run(sandbox.fspfs_as_nobody().args(["init", "store"]));
    assert!(init.status.success(), "{}", text(&init));
    for threads in [1, 3, 5, 8, 12] {
        for line in ["list", "serve --listen 127.0.0.1:0", "mount --foreground mnt", "mount mnt"] {
            let mut bash = Command::new("bash");
            let script = format!("ulimit -u {threads}; exec timeout -k 9 -s INT 2 ../fspfs {line}");
            bash.args(["-c", &script]).current_dir(sandbox.join("user"));
            for (name, value) in sandbox.fspfs_as_nobody().get_envs() {
                bash.env(name, value.unwrap_or_default());
            }
            let output = run(bash.stdin(Stdio::null()).uid(NOBODY).gid(NOBODY));
            let said = text(&output);
            assert!(!said.contains("panicked"), "{threads} for {line}: {said}");
            assert_ne!(output.status.code(), Some(137), "{threads} for {line}: it hangs: {said}");
            if threads == 1 {
                assert!(!output.status.success(), "{line}: {said}");
            }
            let _ = run(sandbox.fspfs_as_nobody().args(["-q", "umount", "mnt"]));
            assert_eq!(mounts_below(&sandbox.path), [] as [std::path::PathBuf; 0], "{threads}");
        }
    }
    let list = run(Command::new("bash")
        .args(["-c", "ulimit -u 1; exec ../fspfs list"])
        .current_dir(sandbox.join("user"))
        .env("FSPFS_STORE", sandbox.join("user/store"))
        .uid(NOBODY)
        .gid(NOBODY));
    assert!(text(&list).contains("cannot start a thread"), "{}", text(&list));
}

#[test]
fn signals_unmount() {
    if !can_mount(&[]) {
        return;
    }
    let (sandbox, id) = stored();
    for signal in [SIGINT, SIGTERM] {
        mount_in_background(&sandbox, &[]);
        assert!(sandbox.join(format!("mnt/{id}.img")).exists());
        kill(daemons_below(&sandbox.path)[0], signal).unwrap();
        until("it is unmounted", || mounts_below(&sandbox.path).is_empty());
        sandbox.assert_nothing_is_left();

        let mount = sandbox.mount(&[]);
        assert!(mount.image(&id).exists());
        mount.signal(signal);
        let log = mount.ended();
        assert!(log.contains(&format!("{signal}: unmounting")), "{log}");
        sandbox.assert_nothing_is_left();
    }
}

#[test]
fn umount_names_who_holds_the_mount() {
    if !can_mount(&["losetup", "cmp"]) {
        return;
    }
    let (sandbox, id) = stored();
    mount_in_background(&sandbox, &[]);
    let image = sandbox.join(format!("mnt/{id}.img"));
    let mnt = sandbox.join("mnt");

    let reader = Holder::new(&format!("exec 3< {}", image.display()), Path::new("/"));
    let visitor = Holder::new(":", &mnt.join("by-name"));
    let device = Loop::attach(&image, &["-r"]);
    let said = sandbox.fails(&["umount", "mnt"]);
    for expected in [
        format!("{} is in use", mnt.display()),
        format!("process {} (sleep) has {} open", reader.0.id(), image.display()),
        format!("process {} (sleep) is in {}", visitor.0.id(), mnt.join("by-name").display()),
        format!("{} is attached to {}", device.0.display(), image.display()),
        format!("losetup -d {}", device.0.display()),
    ] {
        // The mount point was given as it is below the working directory.
        let relative = expected.replace(&format!("{} is in use", mnt.display()), "mnt is in use");
        assert!(said.contains(&expected) || said.contains(&relative), "{expected}\n{said}");
    }
    // Nothing happened to it.
    assert!(same(sandbox.join("disk.img"), &image));
    drop((reader, visitor));
    let said = sandbox.fails(&["umount", "mnt"]);
    assert!(said.contains("is attached to") && !said.contains("process"), "{said}");

    // Out of sight, but served to those who have it open.
    assert_eq!(sandbox.ok(&["umount", "--lazy", "mnt"]), "");
    assert_eq!(std::fs::read_dir(&mnt).unwrap().count(), 0);
    assert_eq!(mounts_below(&sandbox.path).len(), 0);
    assert!(!daemons_below(&sandbox.path).is_empty());
    sandbox.sh(&format!("blockdev --flushbufs {0} && cmp {0} disk.img", device.0.display()));
    drop(device);
    sandbox.assert_nothing_is_left();
}

#[test]
fn a_signal_to_a_busy_mount_says_who_holds_it_and_serves_them_to_the_end() {
    if !can_mount(&["losetup", "cmp"]) {
        return;
    }
    let (sandbox, id) = stored();
    let mount = sandbox.mount(&[]);
    let device = Loop::attach(&mount.image(&id), &["-r", "--direct-io=on"]);
    mount.signal(SIGTERM);
    until("it is out of sight", || mounts_below(&sandbox.path).is_empty());
    sandbox.sh(&format!("cmp {} disk.img", device.0.display()));
    let shown = device.0.display().to_string();
    drop(device);
    let log = mount.ended();
    assert!(log.contains(&format!("{shown} is attached to")), "{log}");
    sandbox.assert_nothing_is_left();

    // A second signal leaves them alone.
    let mount = sandbox.mount(&[]);
    let _reader = Holder::new(&format!("exec 3< {}", mount.image(&id).display()), Path::new("/"));
    mount.signal(SIGINT);
    until("it is out of sight", || mounts_below(&sandbox.path).is_empty());
    mount.signal(SIGINT);
    let log = mount.ended();
    assert!(log.contains("SIGINT again"), "{log}");
}

#[test]
fn the_next_mount_cleans_up_after_a_killed_daemon() {
    if !can_mount(&["cmp"]) {
        return;
    }
    let (sandbox, id) = stored();
    let mnt = sandbox.join("mnt");
    let killed = || {
        mount_in_background(&sandbox, &[]);
        kill(daemons_below(&sandbox.path)[0], SIGKILL).unwrap();
        until("nobody serves it", || std::fs::read_dir(&mnt).is_err());
        assert_eq!(errno(std::fs::read_dir(&mnt)), Errno::ENOTCONN as i32);
        assert_eq!(mounts_below(&sandbox.path).len(), 1);
    };
    killed();
    mount_in_background(&sandbox, &[]);
    assert!(log(&sandbox).contains("removed the mount that a killed fspfs left at"));
    assert!(same(sandbox.join("disk.img"), sandbox.join(format!("mnt/{id}.img"))));
    assert_eq!(mounts_below(&sandbox.path).len(), 1);
    sandbox.ok(&["umount", "mnt"]);
    sandbox.assert_nothing_is_left();
    // It can be unmounted as well, and as ever.
    killed();
    sandbox.ok(&["umount", "mnt"]);
    sandbox.assert_nothing_is_left();
    // While somebody still has a file of it open, too.
    mount_in_background(&sandbox, &[]);
    let image = sandbox.join(format!("mnt/{id}.img"));
    let reader = Holder::new(&format!("exec 3< {}", image.display()), Path::new("/"));
    kill(daemons_below(&sandbox.path)[0], SIGKILL).unwrap();
    until("nobody serves it", || std::fs::read_dir(&mnt).is_err());
    mount_in_background(&sandbox, &[]);
    assert!(same(sandbox.join("disk.img"), &image));
    sandbox.ok(&["umount", "mnt"]);
    drop(reader);
    sandbox.assert_nothing_is_left();
}

#[test]
fn a_mount_point_that_cannot_be_one_is_refused() {
    if !can_mount(&["mount"]) {
        return;
    }
    let (sandbox, id) = stored();
    sandbox.sh("mkdir full && touch full/file");
    for (mount_point, says) in [
        ("missing", "mkdir -p"),
        ("disk.img", "it is not a directory"),
        ("full", "it is not empty"),
    ] {
        for how in [&["mount"][..], &["mount", "--foreground"]] {
            let said = sandbox.fails(&[how, &[mount_point]].concat());
            assert!(said.contains(says) && said.contains(mount_point), "{said}");
        }
    }
    let mount = sandbox.mount(&[]);
    for how in [&["mount"][..], &["mount", "--foreground"]] {
        let said = sandbox.fails(&[how, &["mnt"]].concat());
        assert!(said.contains("is mounted there already; `fspfs umount` it first"), "{said}");
    }
    assert!(mount.image(&id).exists());
    mount.unmount();
    for mount_point in ["mnt", "missing", "/proc"] {
        let said = sandbox.fails(&["umount", mount_point]);
        assert!(said.contains("is not the mount point of an fspfs mount"), "{said}");
    }
    sandbox.assert_nothing_is_left();
}

#[test]
fn the_list_is_made_anew_on_a_signal_and_by_the_clock() {
    if !can_mount(&["stat"]) {
        return;
    }
    let (sandbox, _) = stored();
    // This never asks for a new list, as opening a directory does (and `df`, which opens it).
    let listed = || sandbox.sh("echo $(($(stat -f -c '%c - %d' mnt)))").trim().to_owned();
    let mount = sandbox.mount(&["--refresh", "3600"]);
    sandbox.upload("disk.img", &[]);
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(listed(), "1");
    mount.signal(SIGHUP);
    until("SIGHUP lists anew", || listed() == "2");
    mount.unmount();
    let mount = sandbox.mount(&["--refresh", "1"]);
    sandbox.upload("disk.img", &[]);
    until("the timer lists anew", || listed() == "3");
    mount.unmount();
}

#[test]
fn others_may_read_only_if_they_are_let_in() {
    if !can_mount(&["cmp"]) {
        return;
    }
    let (sandbox, id) = stored();
    sandbox.sh("chmod 0755 . && chmod 0644 disk.img");
    let image = format!("mnt/{id}.img");
    let nobody = |script: &str| sandbox.try_sh_as_nobody(script).status.success();
    let mode = |name: &str| sandbox.join(name).symlink_metadata().unwrap().permissions().mode();

    let mount = sandbox.mount(&[]);
    assert_eq!((mode(&image), mode("mnt")), (0o100_400, 0o040_700));
    assert!(!nobody("ls mnt") && !nobody(&format!("cat {image}")));
    mount.unmount();

    let mount = sandbox.mount(&["--allow-other"]);
    assert_eq!((mode(&image), mode("mnt")), (0o100_444, 0o040_755));
    assert!(nobody(&format!(
        "ls -l mnt && cmp {image} disk.img && cmp mnt/by-name/disk.img {image}"
    )));
    // What the daemon tells of itself stays its own.
    assert_eq!((mode("mnt/control"), mode("mnt/control/metrics")), (0o040_700, 0o100_400));
    assert!(!nobody("ls mnt/control") && !nobody("cat mnt/control/metrics"));
    assert!(!nobody(&format!("exec 3>> {image}")) && !nobody("touch mnt/new"));
    mount.unmount();

    // Root is the owner here, so nobody else is let in.
    let mount = sandbox.mount(&["--allow-root"]);
    assert_eq!(mode(&image), 0o100_400);
    assert!(!nobody("ls mnt"));
    sandbox.sh(&format!("cmp {image} disk.img"));
    mount.unmount();
    sandbox.assert_nothing_is_left();
}

#[test]
fn owner_and_permissions_are_as_they_are_asked_for() {
    if !can_mount(&["cmp", "setpriv"]) {
        return;
    }
    let (sandbox, id) = stored();
    sandbox.sh("chmod 0755 . && chmod 0644 disk.img");
    let image = format!("mnt/{id}.img");
    let owner = NOBODY.to_string();
    let options = ["--allow-other", "--uid", &owner, "--gid", "12", "--file-mode", "0440"];
    for background in [false, true] {
        let mount = (!background).then(|| sandbox.mount(&options));
        if background {
            mount_in_background(&sandbox, &options);
        }
        let found = sandbox.join(&image).metadata().unwrap();
        assert_eq!((found.uid(), found.gid(), found.mode()), (NOBODY, 12, 0o100_440));
        let control = sandbox.join("mnt/control").metadata().unwrap();
        assert_eq!((control.uid(), control.gid(), control.mode()), (0, 0, 0o040_700));
        let read = |uid: u32, gid: u32| {
            let who = format!("setpriv --reuid={uid} --regid={gid} --clear-groups");
            sandbox.try_sh(&format!("{who} cmp {image} disk.img")).status.success()
        };
        assert!(read(NOBODY, NOBODY), "the owner");
        assert!(read(1000, 12), "the group");
        assert!(!read(1000, 1000), "anybody else");
        match mount {
            Some(mount) => drop(mount.unmount()),
            None => drop(sandbox.ok(&["umount", "mnt"])),
        }
    }
    for mode in ["0888", "1444", "x"] {
        let output = run(sandbox.fspfs().args(["mount", "--file-mode", mode, "mnt"]));
        assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    }
    sandbox.assert_nothing_is_left();
}

/// What `nobody` has: a store with the image `disk.img`.
fn stored_by_nobody() -> (Sandbox, String) {
    let sandbox = Sandbox::new();
    sandbox.welcome_nobody();
    sandbox.image("user/disk.img", 3 * MIB, &[(0, 2 * MIB)]);
    sandbox.sh("chmod 0644 user/disk.img");
    let ok = |arguments: &[&str]| {
        let output = run(sandbox.fspfs_as_nobody().args(arguments));
        assert!(output.status.success(), "{arguments:?}: {}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    ok(&["init"]);
    let id = ok(&["-q", "upload", "disk.img", "--name", "disk"]).trim().to_owned();
    (sandbox, id)
}

#[test]
fn an_ordinary_user_mounts_through_fusermount() {
    if !can_mount_as_nobody(&["cmp"]) {
        return;
    }
    let (sandbox, id) = stored_by_nobody();
    let image = sandbox.join(format!("user/mnt/{id}.img"));
    let as_nobody = |arguments: &[&str]| run(sandbox.fspfs_as_nobody().args(arguments));
    let compare = format!("cmp user/disk.img {}", image.display());
    let ends: [&dyn Fn(); 4] = [
        &|| assert!(as_nobody(&["umount", "mnt"]).status.success()),
        &|| signal_as_nobody(&sandbox, SIGTERM),
        &|| signal_as_nobody(&sandbox, SIGINT),
        // Root may do so too.
        &|| drop(sandbox.ok(&["umount", "user/mnt"])),
    ];
    for end in ends {
        let output = as_nobody(&["mount", "mnt"]);
        assert!(output.status.success(), "{}", text(&output));
        let line = String::from_utf8(output.stdout).unwrap();
        assert!(line.ends_with(&format!(
            "/user/store is mounted at {}\n",
            sandbox.join("user/mnt").display()
        )));
        let compared = sandbox.try_sh_as_nobody(&compare);
        assert!(compared.status.success(), "{}", text(&compared));
        let owner = sandbox.try_sh_as_nobody(&format!("stat -c '%u %g %a' {}", image.display()));
        assert_eq!(String::from_utf8(owner.stdout).unwrap(), "65534 65534 400\n");
        // It is his alone: root, who is not asked for here, is kept out by the kernel.
        assert_eq!(errno(std::fs::metadata(&image)), Errno::EACCES as i32);
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let entry = table.lines().find(|line| line.contains("/user/mnt ")).unwrap();
        assert!(entry.contains("nosuid,nodev") && entry.contains("fuse.fspfs file:///"), "{entry}");
        end();
        until("it is unmounted", || mounts_below(&sandbox.path).is_empty());
        wait_for_daemons(&sandbox);
    }
    sandbox.assert_nothing_is_left();
}

fn daemons_of_nobody(sandbox: &Sandbox) -> Vec<nix::unistd::Pid> {
    daemons_below(&sandbox.join("user"))
}

fn wait_for_daemons(sandbox: &Sandbox) {
    until("the daemon ends", || daemons_of_nobody(sandbox).is_empty());
}

/// Sends a signal to the daemon, as its own user.
fn signal_as_nobody(sandbox: &Sandbox, signal: Signal) {
    let daemon = daemons_of_nobody(sandbox)[0];
    let output = sandbox.try_sh_as_nobody(&format!("kill -s {} {daemon}", signal as i32));
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn the_mount_of_an_ordinary_user_may_be_busy_or_dead() {
    if !can_mount_as_nobody(&["cmp", "setpriv"]) {
        return;
    }
    let (sandbox, id) = stored_by_nobody();
    let as_nobody = |arguments: &[&str]| run(sandbox.fspfs_as_nobody().args(arguments));
    let image = sandbox.join(format!("user/mnt/{id}.img"));
    assert!(as_nobody(&["mount", "mnt"]).status.success());

    let mut holder = Command::new("setpriv");
    holder.args(["--reuid=65534", "--regid=65534", "--clear-groups", "tail", "-f"]).arg(&image);
    let mut holder = Holder(holder.stdout(Stdio::null()).spawn().unwrap());
    let pid = holder.0.id();
    until("the file is open", || {
        let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        open.filter_map(|fd| std::fs::read_link(fd.path()).ok()).any(|file| file == image)
    });
    let busy = as_nobody(&["umount", "mnt"]);
    assert_eq!(busy.status.code(), Some(1));
    let said = text(&busy);
    assert!(
        said.contains("is in use") && said.contains(&format!("process {pid} (tail)")),
        "{said}"
    );
    assert!(as_nobody(&["umount", "--lazy", "mnt"]).status.success());
    assert_eq!(mounts_below(&sandbox.path).len(), 0);
    assert!(
        wait(&mut holder.0, Duration::ZERO).is_none() && !daemons_of_nobody(&sandbox).is_empty()
    );
    drop(holder);
    wait_for_daemons(&sandbox);

    assert!(as_nobody(&["mount", "mnt"]).status.success());
    kill(daemons_of_nobody(&sandbox)[0], SIGKILL).unwrap();
    wait_for_daemons(&sandbox);
    assert_eq!(mounts_below(&sandbox.path).len(), 1);
    let again = as_nobody(&["mount", "mnt"]);
    assert!(again.status.success(), "{}", text(&again));
    let compared = sandbox.try_sh_as_nobody(&format!("cmp user/disk.img {}", image.display()));
    assert!(compared.status.success(), "{}", text(&compared));
    assert!(as_nobody(&["umount", "mnt"]).status.success());
    wait_for_daemons(&sandbox);
    sandbox.assert_nothing_is_left();
}

#[test]
fn an_ordinary_user_cannot_let_others_in_unless_the_system_allows_it() {
    if !can_mount_as_nobody(&[]) {
        return;
    }
    let conf = std::fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
    if conf.lines().any(|line| line.trim() == "user_allow_other") {
        eprintln!("/etc/fuse.conf allows it");
        return;
    }
    let (sandbox, _) = stored_by_nobody();
    for option in ["--allow-other", "--allow-root"] {
        for how in [&["mount"][..], &["mount", "--foreground"]] {
            let output = run(sandbox.fspfs_as_nobody().args(how).args([option, "mnt"]));
            assert_eq!(output.status.code(), Some(1));
            let said = text(&output);
            assert!(said.contains("put the line `user_allow_other` into /etc/fuse.conf"), "{said}");
        }
    }
    wait_for_daemons(&sandbox);
    sandbox.assert_nothing_is_left();
}

/// As it is where nobody set the device up for users.
#[test]
fn an_ordinary_user_without_the_device_is_told_so() {
    if !can_mount(&["fusermount3"]) {
        return;
    }
    if Path::new("/dev/fuse").metadata().unwrap().mode() & 0o006 == 0o006 {
        return;
    }
    let (sandbox, _) = stored_by_nobody();
    let output = run(sandbox.fspfs_as_nobody().args(["mount", "mnt"]));
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("chmod 0666 /dev/fuse"), "{}", text(&output));
    wait_for_daemons(&sandbox);
    sandbox.assert_nothing_is_left();
}

#[test]
fn what_the_system_lacks_is_named_with_its_cure() {
    if !can_mount(&["unshare", "mount"]) {
        return;
    }
    let (sandbox, _) = stored();
    // In a namespace of its own, in which there are no devices.
    let mut without_device = Command::new("unshare");
    let hide = "mount -t tmpfs none /dev && exec \"$0\" mount --foreground mnt";
    let fspfs = sandbox.fspfs();
    without_device
        .args(["--mount", "--propagation", "private", "sh", "-c", hide])
        .arg(fspfs.get_program())
        .current_dir(&sandbox.path)
        .envs(fspfs.get_envs().filter_map(|(key, value)| Some((key, value?))));
    let output = run(&mut without_device);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    let said = text(&output);
    assert!(said.contains("there is no /dev/fuse") && said.contains("modprobe fuse"), "{said}");

    sandbox.welcome_nobody();
    let nobody = || {
        let mut command = sandbox.fspfs_as_nobody();
        command.env("PATH", sandbox.join("empty"));
        command
    };
    assert!(run(nobody().args(["init", "store"])).status.success());
    let output = run(nobody().args(["mount", "--foreground", "mnt"]));
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("install fuse3"), "{}", text(&output));
    sandbox.assert_nothing_is_left();
}
