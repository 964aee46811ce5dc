//! System calls on files under `new/`, and several programs at one file at the same time.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use support::writing::Running;
use support::{BLOCK, FileSystem, MIB, Mount, Sandbox, can_mount, errno, pattern, same, until};

fn mounted() -> (Sandbox, Mount) {
    let sandbox = Sandbox::with_store();
    let mount = sandbox.mount(&[]);
    (sandbox, mount)
}

/// The same file twice: in `new/`, and beside it on an ordinary file system.
struct Twice {
    ours: File,
    theirs: File,
}

impl Twice {
    fn new(sandbox: &Sandbox, mount: &Mount, name: &str) -> Self {
        let open = |path| {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false).open(path).unwrap()
        };
        Self { ours: open(mount.new_file(name)), theirs: open(sandbox.join(name)) }
    }

    /// Does the same to both.
    #[track_caller]
    fn both(&self, change: impl Fn(&File)) {
        change(&self.ours);
        change(&self.theirs);
        self.are_the_same();
    }

    #[track_caller]
    fn are_the_same(&self) {
        let content = |file: &File| {
            let mut bytes = vec![0; file.metadata().unwrap().len().try_into().unwrap()];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        let (ours, theirs) = (content(&self.ours), content(&self.theirs));
        assert_eq!(ours.len(), theirs.len());
        let differs = ours.iter().zip(&theirs).position(|(a, b)| a != b);
        assert_eq!(differs, None, "the first byte that differs");
    }
}

fn call(file: &File, flags: FallocateFlags, offset: u64, len: u64) -> nix::Result<()> {
    let signed = |n: u64| i64::try_from(n).unwrap();
    fallocate(file, flags, signed(offset), signed(len))
}

const ROOM: FallocateFlags = FallocateFlags::empty();
const KEEP: FallocateFlags = FallocateFlags::FALLOC_FL_KEEP_SIZE;
const PUNCH: FallocateFlags =
    FallocateFlags::FALLOC_FL_PUNCH_HOLE.union(FallocateFlags::FALLOC_FL_KEEP_SIZE);
const ZERO: FallocateFlags = FallocateFlags::FALLOC_FL_ZERO_RANGE;

#[test]
fn fallocate_does_what_it_does_on_ext4() {
    if !can_mount(&[]) {
        return;
    }
    let (sandbox, mount) = mounted();
    // At first over nothing, then over a snapshot.
    for round in 0..2 {
        let files = Twice::new(&sandbox, &mount, "x.img");
        files.both(|file| call(file, ROOM, 0, 3 * MIB).unwrap());
        files.both(|file| call(file, KEEP, 2 * MIB, 9 * MIB).unwrap());
        files.both(|file| file.write_all_at(&pattern(0, 6 << 20), 0).unwrap());
        // Whole blocks, parts of blocks, a few bytes, over the end.
        for (offset, len) in [
            (BLOCK, BLOCK),
            (4 * BLOCK + 100, BLOCK),
            (6 * BLOCK - 7, 14),
            (7 * BLOCK + 1, 3 * BLOCK - 2),
            (6 * MIB - 1000, 5000),
        ] {
            files.both(|file| call(file, PUNCH, offset, len).unwrap());
        }
        files.both(|file| file.write_all_at(b"in a hole", BLOCK + 5).unwrap());
        files.both(|file| call(file, ZERO | KEEP, 3 * BLOCK + 10, 2 * BLOCK).unwrap());
        files.both(|file| call(file, ZERO | KEEP, 6 * MIB - 10, MIB).unwrap());
        files.both(|file| call(file, ZERO, 6 * MIB - 20, MIB + 3).unwrap());
        files.both(|file| file.set_len(7 * MIB + 99).unwrap());
        files.both(|file| file.set_len(5 * MIB + 1 + round).unwrap());
        files.both(|file| file.set_len(8 * MIB).unwrap());
        files.both(|file| file.write_all_at(b"the end", 8 * MIB - 7).unwrap());
        for flags in [
            FallocateFlags::FALLOC_FL_COLLAPSE_RANGE,
            FallocateFlags::FALLOC_FL_INSERT_RANGE,
            FallocateFlags::FALLOC_FL_UNSHARE_RANGE,
        ] {
            assert_eq!(call(&files.ours, flags, 0, BLOCK), Err(Errno::EOPNOTSUPP));
        }
        drop(files);
        let id = mount.committed("x.img");
        sandbox.assert_holds(&id, "x.img");
        assert!(same(mount.image(&id), sandbox.join("x.img")));
    }
    assert_eq!(sandbox.snapshots().len(), 2);
    mount.unmount();
}

#[test]
fn punching_and_zeroing_a_committed_image_puts_only_what_changed() {
    if !can_mount(&["fallocate"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    sandbox.image("x.img", 8 * MIB, &[(0, 8 * MIB)]);
    sandbox.sh("cp x.img mnt/new/");
    let first = mount.committed("x.img");
    assert_eq!(mount.put(), 16);
    for file in ["x.img", "mnt/new/x.img"] {
        sandbox.sh(&format!("fallocate -p -o 1M -l 1M {file}"));
    }
    let second = mount.committed("x.img");
    assert_eq!((mount.put(), sandbox.parent_of(&second)), (18, Some(first)));
    sandbox.assert_holds(&second, "x.img");
    for file in ["x.img", "mnt/new/x.img"] {
        sandbox.sh(&format!("fallocate -z -o 3000000 -l 1000000 {file}"));
    }
    let third = mount.committed("x.img");
    assert_eq!((mount.put(), sandbox.parent_of(&third)), (21, Some(second)));
    sandbox.assert_holds(&third, "x.img");
    mount.unmount();
}

const MMAP: &str = "
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 5_000_000)
m = mmap.mmap(fd, 5_000_000, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
for at in range(0, 5_000_000, 300_007):
    m[at:at + 5] = b'%05d' % (at % 99_999)
assert m[300_007:300_012] == b'%05d' % (300_007 % 99_999)
if len(sys.argv) > 2: m.flush()
m.close()
os.close(fd)
";

#[test]
fn what_is_written_through_a_mapping_is_in_the_snapshot() {
    if !can_mount(&["python3"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    std::fs::write(sandbox.join("map.py"), MMAP).unwrap();
    sandbox.sh("python3 map.py x.img");
    for (name, sync) in [("a.img", ""), ("b.img", "sync")] {
        sandbox.sh(&format!("python3 map.py mnt/new/{name} {sync}"));
        sandbox.assert_holds(&mount.committed(name), "x.img");
    }
    // Over a snapshot, too.
    sandbox.sh("printf 0 | dd status=none of=mnt/new/a.img bs=1 seek=600014 conv=notrunc");
    mount.committed("a.img");
    sandbox.sh("python3 map.py mnt/new/a.img sync");
    sandbox.assert_holds(&mount.committed("a.img"), "x.img");
    mount.unmount();
}

#[test]
fn a_mapping_that_outlives_its_descriptor_is_committed_when_it_goes() {
    if !can_mount(&["python3"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    sandbox.python(
        "import mmap, os
fd = os.open('mnt/new/x.img', os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 1_000_000)
m = mmap.mmap(fd, 1_000_000, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
os.close(fd)
m[999_990:] = b'0123456789'
m.close()",
    );
    until("it is committed", || !mount.told("x.img", "snapshot").is_empty());
    let id = mount.committed("x.img");
    sandbox.sh("truncate -s 999990 data; printf 0123456789 >> data");
    sandbox.assert_holds(&id, "data");
    mount.unmount();
}

#[test]
fn a_reader_sees_what_was_just_written() {
    if !can_mount(&[]) {
        return;
    }
    let (_sandbox, mount) = mounted();
    let path = mount.new_file("x.img");
    for writer_reads in [false, true] {
        let mut options = File::options();
        options.write(true).read(writer_reads).create(true).truncate(false);
        let writer = options.open(&path).unwrap();
        let reader = File::open(&path).unwrap();
        for step in 0..40u64 {
            let at = step * 333_333 % (4 * MIB);
            let piece = pattern(at + step, 70_001);
            writer.write_all_at(&piece, at).unwrap();
            let mut read = vec![0; piece.len()];
            reader.read_exact_at(&mut read, at).unwrap();
            assert!(read == piece, "step {step}");
            if writer_reads {
                writer.read_exact_at(&mut read, at).unwrap();
                assert!(read == piece, "step {step}");
            }
        }
        let fresh = File::open(&path).unwrap();
        assert_eq!(fresh.metadata().unwrap().len(), writer.metadata().unwrap().len());
    }
    mount.committed("x.img");
    mount.unmount();
}

#[test]
fn a_working_image_tells_where_its_holes_are() {
    if !can_mount(&["cp", "du"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(mount.new_file("x.img"))
        .unwrap();
    file.set_len(20 * MIB).unwrap();
    file.write_all_at(b"data", 4 * MIB + 1).unwrap();
    file.write_all_at(b"data", 12 * MIB + 1).unwrap();
    call(&file, PUNCH, 12 * MIB, MIB).unwrap();
    file.write_all_at(b"data", 16 * MIB).unwrap();
    let map = |file: &File| {
        let (mut runs, mut at) = (Vec::new(), 0);
        loop {
            match lseek(file, at, Whence::SeekData) {
                Ok(start) => {
                    at = lseek(file, start, Whence::SeekHole).unwrap();
                    runs.push((start, at));
                }
                Err(error) => {
                    assert_eq!(error, Errno::ENXIO);
                    return runs;
                }
            }
        }
    };
    let (mib, block) = (1 << 20, 1 << 19);
    let runs = [(4 * mib, 4 * mib + block), (16 * mib, 16 * mib + block)];
    assert_eq!(map(&file), runs);
    assert_eq!(sandbox.sh("du -k mnt/new/x.img").split('\t').next(), Some("1024"));
    // It is the same over a snapshot, and in the copy.
    drop(file);
    mount.committed("x.img");
    let file = File::open(mount.new_file("x.img")).unwrap();
    assert_eq!(map(&file), runs);
    sandbox.sh("cp --sparse=auto mnt/new/x.img copy; cmp copy mnt/new/x.img");
    drop(file);
    mount.unmount();
}

#[test]
fn beyond_64_tib_a_file_is_too_large() {
    if !can_mount(&["truncate"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    // A file of ext4 has at most 16 TiB, and so has what is staged there.
    let staging =
        FileSystem::mount(Path::new("none"), "tmpfs", "size=64m,mode=700", sandbox.join("tmpfs"));
    let mount = sandbox.mount(&["--staging", staging.0.to_str().unwrap()]);
    let file = File::create(mount.new_file("x.img")).unwrap();
    let most = 64 << 40;
    file.set_len(most).unwrap();
    file.write_all_at(b"x", most - 1).unwrap();
    assert_eq!(errno(file.set_len(most + 1)), Errno::EFBIG as i32);
    assert_eq!(file.metadata().unwrap().len(), most);
    assert_eq!(call(&file, ROOM, most, 1), Err(Errno::EFBIG));
    // A write that failed is told at the close, and the image is not committed.
    assert_eq!(errno(file.write_all_at(b"x", most)), Errno::EFBIG as i32);
    drop(file);
    mount.becomes("x.img", "interrupted");
    assert!(mount.told("x.img", "error").contains("64 TiB"), "{}", mount.told("x.img", "error"));
    std::fs::remove_file(mount.new_file("x.img")).unwrap();
    assert_eq!(mount.begun(), 0);
    mount.unmount();
    drop(staging);
}

/// A `dd` that writes what it is given to `seek` MiB of `x.img`, once it has it open.
fn dd(sandbox: &Sandbox, mount: &Mount, seek: u64) -> Running {
    let dd = Running::new(
        Command::new("dd")
            .args(["of=mnt/new/x.img", "bs=64k", "conv=notrunc", "iflag=fullblock"])
            .args(["oflag=seek_bytes".to_owned(), format!("seek={}", seek * MIB)])
            .current_dir(&sandbox.path),
    );
    dd.writes_to(&mount.new_file("x.img"));
    dd
}

#[test]
fn four_writers_at_once_make_one_snapshot() {
    if !can_mount(&["dd"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    sandbox.image("x.img", 12 * MIB, &[(0, 12 * MIB)]);
    let writers: Vec<_> = (0..4).map(|n| (n, dd(&sandbox, &mount, 3 * n))).collect();
    let ends: Vec<_> = writers
        .into_iter()
        .map(|(n, mut dd)| {
            std::thread::spawn(move || {
                let piece = pattern(3 * n * MIB, 3 << 20);
                dd.child.stdin.take().unwrap().write_all(&piece).unwrap();
                dd.succeeds();
            })
        })
        .collect();
    for end in ends {
        end.join().unwrap();
    }
    let id = mount.committed("x.img");
    sandbox.assert_holds(&id, "x.img");
    assert_eq!((mount.begun(), mount.put()), (1, 24));
    mount.unmount();
    assert_eq!(sandbox.snapshots().len(), 1);
}

#[test]
fn the_last_of_two_writers_commits() {
    if !can_mount(&["dd"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    let mut late = dd(&sandbox, &mount, 1);
    sandbox.sh("printf early | dd status=none of=mnt/new/x.img conv=notrunc");
    assert_eq!((mount.begun(), &mount.state("x.img")[..]), (0, "dirty"));
    late.child.stdin.as_mut().unwrap().write_all(b"late").unwrap();
    late.succeeds();
    assert_eq!(mount.begun(), 1);
    // One that has opened it and writes nothing keeps it open until it goes.
    let idle = dd(&sandbox, &mount, 0);
    sandbox.sh("printf EARLY | dd status=none of=mnt/new/x.img conv=notrunc");
    assert_eq!((mount.begun(), &mount.state("x.img")[..]), (1, "dirty"));
    idle.succeeds();
    until("it is committed", || mount.begun() == 2);
    let id = mount.committed("x.img");
    sandbox.sh("printf EARLY > x.img; printf late | dd status=none of=x.img bs=1M seek=1");
    sandbox.assert_holds(&id, "x.img");
    mount.unmount();
}

#[test]
fn a_removed_file_stays_for_those_who_have_it_open_and_makes_no_snapshot() {
    if !can_mount(&[]) {
        return;
    }
    let (sandbox, mount) = mounted();
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(true);
    let file = options.open(mount.new_file("x.img")).unwrap();
    file.write_all_at(b"before", 0).unwrap();
    std::fs::remove_file(mount.new_file("x.img")).unwrap();
    file.write_all_at(b"after", MIB).unwrap();
    let mut read = [0; 6];
    file.read_exact_at(&mut read, 0).unwrap();
    assert_eq!(&read, b"before");
    // Another one of this name is another one.
    std::fs::write(mount.new_file("x.img"), "new").unwrap();
    let id = mount.committed("x.img");
    drop(file);
    assert_eq!(std::fs::read(mount.image(&id)).unwrap(), b"new");
    mount.unmount();
    assert_eq!(sandbox.snapshots().len(), 1);
    // Nothing of it stays on the disk.
    let staged = sandbox.sh("find state -path '*/images/*' | wc -l");
    assert_eq!(staged.trim(), "0");
}
