//! Programs that are ended while they write under `new/`: what they close is no snapshot, and what
//! others close is one.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use nix::sys::signal::{SIGCONT, SIGINT, SIGKILL, SIGTERM};
use support::{MIB, Sandbox, can_mount, has, until};

#[test]
fn dd_that_closes_at_sigint_makes_no_snapshot() {
    if !can_mount(&["dd"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.random("x.img", 3 * MIB);
    let mount = sandbox.mount(&[]);
    // Programs that a shell without job control runs in the background ignore it.
    let dd = sandbox.start(
        "exec env --default-signal=INT dd of=mnt/new/x.img bs=1M iflag=fullblock status=none \
         < <(cat x.img; exec sleep 60 2>/dev/null)",
    );
    let path = mount.new_file("x.img");
    until("some of it is there", || path.metadata().is_ok_and(|m| m.len() == 3 * MIB));
    dd.signal(SIGINT);
    mount.becomes("x.img", "interrupted");
    let why = mount.told("x.img", "error");
    assert!(why.contains("dd was stopped by SIGINT"), "{why}");
    assert!(!dd.ends().status.success());
    assert_eq!(mount.begun(), 0);
    // One that is not stopped commits, also a file that was cut short before.
    sandbox.sh("dd if=x.img of=mnt/new/x.img bs=1M status=none");
    sandbox.assert_holds(&mount.committed("x.img"), "x.img");
    mount.unmount();
}

#[test]
fn a_close_with_a_signal_pending_makes_no_snapshot() {
    if !can_mount(&["python3"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let mount = sandbox.mount(&[]);
    for (name, handler) in [("default", "SIG_DFL"), ("caught", "default_int_handler")] {
        let mut writer = sandbox.start(&format!(
            "exec python3 -c 'import os, signal, sys
signal.signal(signal.SIGTERM, signal.{handler})
file = os.open(\"mnt/new/{name}.img\", os.O_WRONLY | os.O_CREAT)
os.write(file, b\"half\")
sys.stdin.readline()
os.close(file)'"
        ));
        let path = mount.new_file(&format!("{name}.img"));
        until("it has written", || path.metadata().is_ok_and(|m| m.len() == 4));
        mount.stop();
        drop(writer.child.stdin.take());
        let call = format!("/proc/{}/syscall", writer.child.id());
        let close = format!("{} ", libc::SYS_close);
        until("it waits for the answer to its close", || {
            std::fs::read_to_string(&call).is_ok_and(|call| call.starts_with(&close))
        });
        writer.signal(SIGTERM);
        mount.signal(SIGCONT);
        let _ = writer.ends();
        let name = format!("{name}.img");
        mount.becomes(&name, "interrupted");
        let why = mount.told(&name, "error");
        assert!(why.contains("SIGTERM") || why.contains("signal 15"), "{why}");
    }
    assert_eq!(mount.begun(), 0);
    mount.unmount();
}

#[test]
fn a_signal_ends_the_wait_for_a_commit_and_not_the_commit() {
    if !can_mount(&["python3"]) {
        return;
    }
    let mut sandbox = Sandbox::with_store();
    sandbox.serve(&["--inject", "put.latency=5s"]);
    std::fs::write(sandbox.join("whole"), "whole").unwrap();
    let mount = sandbox.mount(&[]);
    for (name, handler, signal) in [
        ("default", "SIG_DFL", SIGTERM),
        ("caught", "default_int_handler", SIGINT),
        ("killed", "SIG_DFL", SIGKILL),
    ] {
        let writer = sandbox.start(&format!(
            "exec python3 -c 'import os, signal
signal.signal(signal.SIGINT, signal.{handler})
file = os.open(\"mnt/new/{name}.img\", os.O_WRONLY | os.O_CREAT)
os.write(file, b\"whole\")
os.close(file)'"
        ));
        let name = format!("{name}.img");
        mount.becomes(&name, "committing");
        let began = Instant::now();
        writer.signal(signal);
        assert!(!writer.ends().status.success());
        assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
        sandbox.assert_holds(&mount.committed(&name), "whole");
    }
    mount.unmount();
}

#[test]
fn programs_that_end_in_order_make_snapshots() {
    if !can_mount(&["python3"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.random("x.img", 3 * MIB);
    let mount = sandbox.mount(&[]);
    // These give their handlers of signals back before they close.
    if has(&["zstd"]) {
        sandbox.sh("zstd -q x.img -o x.zst; zstd -q -d x.zst -o mnt/new/zstd.img");
        sandbox.assert_holds(&mount.committed("zstd.img"), "x.img");
    }
    if has(&["pv"]) {
        sandbox.sh("pv -q x.img >mnt/new/pv.img");
        sandbox.assert_holds(&mount.committed("pv.img"), "x.img");
    }
    // Its other threads get SIGKILL, and one of them may be the last to have the file open.
    for n in 0..5 {
        sandbox.python(&format!(
            "
import os, threading, time
file = open('mnt/new/threads{n}.img', 'wb', buffering=0)
file.write(open('x.img', 'rb').read())
for _ in range(8): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
os._exit(0)
"
        ));
        sandbox.assert_holds(&mount.committed(&format!("threads{n}.img")), "x.img");
    }
    mount.unmount();
}
