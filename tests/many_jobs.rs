//! Many jobs of a mount at once, while its images are read, and the memory that they take.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use support::{MIB, Mount, PATIENCE, Sandbox, can_mount, peak_memory, same};

/// What is given to the mount.
const MEMORY: u64 = 64 * MIB;

/// What the daemon has beside it at most. It was 54 and 66 MiB here; 34 of 16 MiB, and 39 of 256 MiB.
const MARGIN: u64 = 110 * MIB;

const IMAGES: usize = 4;

/// The states of all jobs.
fn states(mount: &Mount) -> Vec<String> {
    let numbers =
        support::names(mount.join("control/jobs")).into_iter().filter(|name| name != "last");
    let state = |number: String| mount.join(format!("control/jobs/{number}/state"));
    numbers.map(|number| std::fs::read_to_string(state(number)).unwrap()).collect()
}

/// The snapshots that are being made in both stores.
fn begun(sandbox: &Sandbox) -> usize {
    let stores = ["store/pending", "other/pending"].map(|directory| sandbox.join(directory));
    let all = stores.iter().filter_map(|directory| std::fs::read_dir(directory).ok()).flatten();
    all.filter(|entry| entry.as_ref().unwrap().path().join("start.json").exists()).count()
}

#[test]
fn twenty_jobs_at_once_stay_within_the_memory_of_the_mount() {
    if !can_mount(&["bash", "dd", "cmp"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.ok(&["init", "other"]);
    let ids: Vec<_> = (0..IMAGES)
        .map(|n| {
            sandbox.random(&format!("{n}.img"), 64 * MIB);
            sandbox.upload(&format!("{n}.img"), &[])
        })
        .collect();
    // What is uploaded is in no store yet.
    for n in 0..IMAGES {
        sandbox.random(&format!("new{n}.img"), 64 * MIB);
    }
    let mount = sandbox.mount(&["--memory", &MEMORY.to_string()]);
    let at = sandbox.path.display();
    let mut lines = Vec::new();
    for (n, id) in ids.iter().enumerate() {
        lines.extend([
            ("upload", format!("{at}/new{n}.img")),
            ("copy", format!("{id} --to {at}/other")),
            ("download", format!("{id} {at}/down{n}.img")),
            ("multiclone", format!("{id} {at}/one{n}.img {at}/two{n}.img")),
            ("verify", format!("{id} --against {at}/{n}.img")),
        ]);
    }
    let ended = AtomicBool::new(false);
    let (mut most, mut reads, mut pending) = (0, 0, 0);
    std::thread::scope(|scope| {
        let reader = |n: usize| {
            let (sandbox, ended, id) = (&sandbox, &ended, &ids[n]);
            move || {
                let (mut reads, end) = (0, Instant::now() + 3 * PATIENCE);
                while !ended.load(Ordering::SeqCst) && Instant::now() < end {
                    sandbox.sh(&format!(
                        "dd if=mnt/{id}.img bs=1M iflag=direct status=none | cmp - {n}.img"
                    ));
                    reads += 1;
                }
                reads
            }
        };
        let readers: Vec<_> = (0..IMAGES).map(|n| scope.spawn(reader(n))).collect();
        for (operation, line) in &lines {
            std::fs::write(mount.join("control").join(operation), line).unwrap();
        }
        let end = Instant::now() + 2 * PATIENCE;
        loop {
            let running = states(&mount).iter().filter(|state| *state == "running\n").count();
            most = running.max(most);
            pending = begun(&sandbox).max(pending);
            if running == 0 || Instant::now() > end {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        ended.store(true, Ordering::SeqCst);
        reads = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
    });
    let peak = peak_memory(mount.daemon.id());
    let states = states(&mount);
    assert_eq!(
        states,
        vec!["done 0\n"; lines.len()],
        "{}",
        sandbox.sh("cat mnt/control/jobs/*/log")
    );
    assert!(most >= lines.len() / 2 && reads >= IMAGES, "{most} jobs at once, {reads} reads");
    assert_eq!(pending, 1, "snapshots that are made at the same time");
    assert!(peak <= MEMORY + MARGIN, "{} MiB of memory", peak / MIB);
    let result = |job: usize| sandbox.sh(&format!("tail -n 1 mnt/control/jobs/{job}/result"));
    for n in 0..IMAGES {
        let [upload, copy] = [1, 2].map(|job| result(5 * n + job).trim_end().to_owned());
        sandbox.assert_holds(&upload, format!("new{n}.img"));
        sandbox.ok(&["-s", "other", "download", &copy, "copied.img"]);
        for file in
            ["copied.img", &format!("down{n}.img"), &format!("one{n}.img"), &format!("two{n}.img")]
        {
            assert!(same(sandbox.join(format!("{n}.img")), sandbox.join(file)), "{file}");
        }
    }
    mount.unmount();
}
