//! File systems inside images: loop devices over the mount, forensics, and what they fetch.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;

use support::{BLOCK, FileSystem, Loop, MIB, Sandbox, can_mount, same, write_pattern};

/// Makes a tree of files in `directory` whose content follows from their names and `seed`.
fn fill(directory: &Path, seed: u64) {
    let sizes = [0, 1, 100, 4095, 4096, 4097, 70_000, 600_000, 1_500_000];
    for (n, name) in ["", "etc", "var/log deep/ä"].into_iter().enumerate() {
        let directory = directory.join(name);
        std::fs::create_dir_all(&directory).unwrap();
        for (k, size) in sizes.into_iter().enumerate() {
            let file = File::create(directory.join(format!("file {k}"))).unwrap();
            // The pattern follows from the offset: beyond the end, different in each file.
            let shift = (seed + n as u64 * 100 + k as u64) * 8 * MIB;
            write_at_start(&file, shift, size);
        }
        std::os::unix::fs::symlink("file 3", directory.join("link")).unwrap();
    }
}

fn write_at_start(file: &File, shift: u64, len: u64) {
    use std::os::unix::fs::FileExt as _;
    file.write_all_at(&support::pattern(shift, usize::try_from(len).unwrap()), 0).unwrap();
}

/// A file system to be made on a device.
struct Kind {
    name: &'static str,
    mib: u64,
    mkfs: &'static str,
    /// How a user mounts it read-only, whatever state it is in.
    options: &'static str,
}

const KINDS: [Kind; 3] = [
    Kind { name: "ext4", mib: 64, mkfs: "mkfs.ext4 -q", options: "ro,noload" },
    // The smallest that its program makes.
    Kind { name: "xfs", mib: 304, mkfs: "mkfs.xfs -q", options: "ro,norecovery,nouuid" },
    Kind { name: "btrfs", mib: 128, mkfs: "mkfs.btrfs -q", options: "ro" },
];

const PROGRAMS: [&str; 7] =
    ["losetup", "partx", "sfdisk", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "diff"];

#[test]
fn the_file_systems_of_a_partitioned_disk_are_mounted_and_compared() {
    if !can_mount(&PROGRAMS) || !can_mount(&["mmls", "fls"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    fill(&sandbox.join("files"), 1);
    // Each partition begins and ends at a whole MiB; the second copy of the table needs some room.
    let mib: u64 = KINDS.iter().map(|kind| kind.mib).sum();
    let disk = sandbox.image("disk.img", (mib + 2) * MIB, &[]);
    let sizes: Vec<_> = KINDS.iter().map(|kind| format!("size={}MiB", kind.mib)).collect();
    sandbox.sh(&format!("printf 'label: gpt\n{}\n' | sfdisk -q disk.img", sizes.join("\n")));
    let device = Loop::attach(&disk, &["-P"]);
    for (n, kind) in (1..).zip(&KINDS) {
        let partition = device.partition(n);
        sandbox.sh(&format!("{} {}", kind.mkfs, partition.display()));
        let mounted = FileSystem::mount(&partition, kind.name, "rw", sandbox.join("fs"));
        sandbox.sh("cp -a files/. fs/");
        drop(mounted);
    }
    drop(device);
    let id = sandbox.upload("disk.img", &["--name", "disk"]);
    let mount = sandbox.mount(&[]);
    for options in [&["-r", "-P", "--direct-io=on"][..], &["-r", "-P"]] {
        let device = Loop::attach(&mount.join("by-name/disk.img"), options);
        for (n, kind) in (1..).zip(&KINDS) {
            let at = sandbox.join("fs");
            let mounted = FileSystem::mount(&device.partition(n), kind.name, kind.options, at);
            sandbox.sh("diff -r --no-dereference --exclude lost+found files fs");
            drop(mounted);
        }
    }
    let table = sandbox.sh(&format!("mmls mnt/{id}.img"));
    let starts: Vec<_> = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        // The others are "Meta" and "-------".
        .filter(|line| line.get(1).is_some_and(|slot| slot.parse::<u32>().is_ok()))
        .map(|line| line[2].parse::<u64>().unwrap())
        .collect();
    let expected = [1, 1 + KINDS[0].mib, 1 + KINDS[0].mib + KINDS[1].mib];
    assert_eq!(starts, expected.map(|mib| mib * MIB / 512), "{table}");
    let files = sandbox.sh(&format!("fls -r -p -F -o {} mnt/{id}.img", starts[0]));
    let found: BTreeSet<_> = files.lines().filter_map(|line| line.split_once(":\t")).collect();
    let found: BTreeSet<_> = found.into_iter().map(|(_, name)| name.to_owned()).collect();
    let there = sandbox.sh("cd files && find . -type f -printf '%P\n'");
    let missing: Vec<_> = there.lines().filter(|name| !found.contains(*name)).collect();
    assert!(missing.is_empty() && there.lines().count() == 27, "{missing:?} not in {files}");
    mount.unmount();
    sandbox.assert_nothing_is_left();
}

/// An image that was copied while its file system was mounted and written to, as a snapshot of a
/// running machine is. What was there before is whole; the journal is not empty.
#[test]
fn dirty_file_systems_are_read_without_repairing_them() {
    if !can_mount(&PROGRAMS) {
        return;
    }
    let sandbox = Sandbox::with_store();
    fill(&sandbox.join("files"), 2);
    for kind in &KINDS {
        let disk = sandbox.image("disk.img", kind.mib * MIB, &[]);
        sandbox.sh(&format!("{} disk.img", kind.mkfs));
        let device = Loop::attach(&disk, &[]);
        let mounted = FileSystem::mount(&device.0, kind.name, "rw", sandbox.join("fs"));
        sandbox.sh("mkdir fs/old && cp -a files/. fs/old/");
        drop(mounted);
        let mounted = FileSystem::mount(&device.0, kind.name, "rw", sandbox.join("fs"));
        // What is made durable here is in the journal, or the log, and nowhere else yet.
        sandbox.sh("mkdir fs/new && cp -a files/. fs/new/ && sync -f fs
             echo late > fs/late && sync fs/late && echo never > fs/never
             cp --sparse=always disk.img dirty.img");
        drop(mounted);
        drop(device);
        sandbox.upload("dirty.img", &["--name", kind.name]);
    }
    let mount = sandbox.mount(&[]);
    for kind in &KINDS {
        let image = mount.join(format!("by-name/{}.img", kind.name));
        let device = Loop::attach(&image, &["-r", "--direct-io=on"]);
        let at = sandbox.join("fs");
        // It is dirty indeed: a mount that would repair it is refused, since it could not write.
        let plain = FileSystem::try_mount(&device.0, kind.name, "ro", &at);
        assert!(!plain.status.success(), "{} is not dirty", kind.name);
        // The log of btrfs is left alone by this option only.
        let options = if kind.name == "btrfs" { "ro,rescue=nologreplay" } else { kind.options };
        let mounted = FileSystem::mount(&device.0, kind.name, options, at);
        sandbox.sh("diff -r --no-dereference files fs/old");
        drop(mounted);
    }
    mount.unmount();
    sandbox.assert_nothing_is_left();
}

#[test]
fn cp_onto_a_dirty_device_leaves_nothing_of_it() {
    if !can_mount(&["losetup", "cmp"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let len = 48 * MIB;
    let data = [(5 * MIB + 1, 3 * MIB), (47 * MIB, MIB)];
    sandbox.image("disk.img", len, &data);
    let id = sandbox.upload("disk.img", &[]);
    let old = sandbox.image("old.img", len, &[]);
    write_pattern(&File::options().write(true).open(&old).unwrap(), 0, len);
    let mount = sandbox.mount(&[]);
    let device = Loop::attach(&old, &[]);
    sandbox.sh(&format!("cp mnt/{id}.img {0} && sync {0}", device.0.display()));
    assert!(same(&device.0, sandbox.join("disk.img")));
    drop(device);
    assert!(same(&old, sandbox.join("disk.img")));
    mount.unmount();
}

/// Prints how many blocks of 512 KiB of a device the file system on it, and a reader of a file in it,
/// have touched. `cachestat` (Linux 6.5) of the device tells what metadata was read, and FIEMAP
/// (`filefrag`) where the file is. Blocks of zeros are left out, since they are in no store.
const TOUCHED: &str = r"
import ctypes, os, re, subprocess, sys
device, file = sys.argv[1:]
fd = os.open(device, os.O_RDONLY)
size = os.lseek(fd, 0, os.SEEK_END)
syscall = ctypes.CDLL(None, use_errno=True).syscall
def cached(block):
    span, stat = (ctypes.c_uint64 * 2)(block << 19, 1 << 19), (ctypes.c_uint64 * 5)()
    assert syscall(451, fd, span, stat, 0) == 0, os.strerror(ctypes.get_errno())
    return stat[0] > 0
touched = {n for n in range(size >> 19) if cached(n)}
assert touched
extents = subprocess.run(['filefrag', '-e', '-b4096', file], capture_output=True, text=True, check=True)
found = re.findall(r'^ *\d+: +\d+\.\. +\d+: +(\d+)\.\. +(\d+):', extents.stdout, re.M)
assert found, extents.stdout
for first, last in found:
    touched |= {n * 4096 >> 19 for n in range(int(first), int(last) + 1)}
print(sum(any(os.pread(fd, 1 << 19, n << 19)) for n in touched))
";

#[test]
fn mounting_ext4_and_reading_a_file_fetches_little_more_than_it_touches() {
    if !can_mount(&["losetup", "mkfs.ext4", "python3", "filefrag", "blockdev"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let disk = sandbox.image("disk.img", 512 * MIB, &[]);
    sandbox.sh("mkfs.ext4 -q -E lazy_itable_init=0 disk.img");
    let device = Loop::attach(&disk, &[]);
    let mounted = FileSystem::mount(&device.0, "ext4", "rw", sandbox.join("fs"));
    // Full enough for blocks beside those that are needed to be fetched in vain.
    for n in 0..12 {
        fill(&sandbox.join(format!("fs/{n}")), 1000 * n);
    }
    drop(mounted);
    drop(device);
    sandbox.upload("disk.img", &["--name", "disk"]);

    // What is touched is measured on a copy, on a loop device without read-ahead: only what the
    // file system asks for comes into the page cache of the device.
    let device = Loop::attach(&disk, &["-r", "--direct-io=on"]);
    std::fs::write(sandbox.join("touched.py"), TOUCHED).unwrap();
    let shown = device.0.display();
    sandbox.sh(&format!("blockdev --setra 0 {shown} && blockdev --flushbufs {shown}"));
    let mounted = FileSystem::mount(&device.0, "ext4", "ro,noload", sandbox.join("fs"));
    sandbox.sh("cat 'fs/7/etc/file 6' > small");
    let touched = sandbox.sh(&format!("python3 touched.py {shown} 'fs/7/etc/file 6'"));
    let touched: u64 = touched.trim().parse().unwrap();
    drop(mounted);
    drop(device);

    let mount = sandbox.mount(&[]);
    let device = Loop::attach(&mount.join("by-name/disk.img"), &["-r", "--direct-io=on"]);
    let mounted = FileSystem::mount(&device.0, "ext4", "ro,noload", sandbox.join("fs"));
    sandbox.sh("cmp small 'fs/7/etc/file 6'");
    let fetched = mount.requests("get_block");
    drop(mounted);
    drop(device);
    let stored = sandbox.sh("find mnt -name 'snap-*' -printf '%b'").parse::<u64>().unwrap() * 512;
    eprintln!("{touched} blocks touched, {fetched} fetched, {} stored", stored / BLOCK);
    assert!(touched >= 3 && fetched >= touched / 2, "{touched} touched, {fetched} fetched");
    assert!(fetched <= 3 * touched, "{touched} touched, {fetched} fetched");
    assert!(stored / BLOCK > 6 * touched, "the image is too small to tell anything");
    mount.unmount();
}
