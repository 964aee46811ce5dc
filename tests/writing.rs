//! Programs that write files under `new/`, each of which becomes one snapshot.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use support::{BLOCK, MIB, Mount, Sandbox, can_mount, names, same, until};

/// A store that is mounted, and an image `data`: sparse, and of an odd length.
fn mounted() -> (Sandbox, Mount) {
    let sandbox = Sandbox::with_store();
    sandbox.image(
        "data",
        9 * MIB + 1234,
        &[(0, MIB), (3 * MIB + 77, 5), (5 * MIB, 2 * MIB + 100), (9 * MIB, 1234)],
    );
    let mount = sandbox.mount(&[]);
    (sandbox, mount)
}

/// Runs a script which writes `data` to `mnt/new/x.img`: that makes exactly one snapshot, with just
/// this content. The script is done when the snapshot is there, unless it is made in the background.
#[track_caller]
fn makes_one_snapshot(sandbox: &Sandbox, mount: &Mount, script: &str, background: bool) -> String {
    let before = (sandbox.snapshots().len(), mount.begun());
    sandbox.sh(script);
    if !background {
        assert_eq!(mount.begun(), before.1 + 1, "{script}");
        assert_eq!(sandbox.snapshots().len(), before.0 + 1, "{script}");
    }
    let id = mount.committed("x.img");
    assert_eq!(mount.told("x.img", "error"), "", "{script}");
    assert!(same(mount.image(&id), sandbox.join("data")), "{script}: the image differs");
    assert!(same(mount.new_file("x.img"), sandbox.join("data")), "{script}: it reads otherwise");
    sandbox.assert_holds(&id, "data");
    let described = sandbox.described(&id);
    assert_eq!(described["parent"], serde_json::Value::Null, "{script}");
    assert_eq!(described["tags"]["Name"], "x", "{script}");
    std::fs::remove_file(mount.new_file("x.img")).unwrap();
    assert_eq!(mount.begun(), before.1 + 1, "{script}");
    id
}

/// All that was begun is there when the mount has ended, and no more.
#[track_caller]
fn ends_with(sandbox: &Sandbox, mount: Mount, snapshots: usize) {
    mount.unmount();
    assert_eq!(sandbox.snapshots().len(), snapshots);
    sandbox.assert_nothing_is_left();
}

#[test]
fn cp_makes_a_snapshot() {
    if !can_mount(&["cp"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    let scripts = [
        "cp data mnt/new/x.img",
        "cp --sparse=always data mnt/new/x.img",
        "cp --sparse=never data mnt/new/x.img",
        "chmod 640 data; touch -d 2020-02-02 data; cp -p data mnt/new/x.img",
        "mkdir d; cp data d/x.img; cp -a d/. mnt/new/ || true",
        "cp data x.img; install -m 600 x.img mnt/new/",
    ];
    for script in scripts {
        makes_one_snapshot(&sandbox, &mount, script, false);
    }
    ends_with(&sandbox, mount, scripts.len());
}

#[test]
fn cp_p_keeps_mode_owner_and_time() {
    if !can_mount(&["cp"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    sandbox.sh("chmod 640 data; chown 12:34 data; touch -d '2020-02-02 02:02:02.5' data");
    sandbox.sh("cp -p data mnt/new/x.img");
    let is = mount.new_file("x.img").metadata().unwrap();
    assert_eq!((is.mode() & 0o7777, is.uid(), is.gid()), (0o640, 12, 34));
    let should = sandbox.join("data").metadata().unwrap();
    assert_eq!((is.mtime(), is.mtime_nsec()), (should.mtime(), should.mtime_nsec()));
    assert_eq!(mount.begun(), 1);
    ends_with(&sandbox, mount, 1);
}

#[test]
fn dd_makes_a_snapshot() {
    if !can_mount(&["dd"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    let dd = "dd status=none if=data of=mnt/new/x.img";
    let scripts = [
        dd.to_owned(),
        format!("{dd} bs=1M conv=notrunc"),
        format!("{dd} bs=1M conv=fsync"),
        format!("{dd} bs=64k conv=fdatasync"),
        format!("{dd} bs=1M conv=sparse"),
        format!("{dd} bs=512k oflag=direct iflag=fullblock"),
        format!("{dd} bs=512k oflag=dsync"),
        format!("{dd} bs=7777"),
        format!("{dd} bs=1000003"),
        format!("{dd} bs=3M"),
        "dd status=none bs=64k < data > mnt/new/x.img".to_owned(),
    ];
    for script in &scripts {
        makes_one_snapshot(&sandbox, &mount, script, false);
    }
    ends_with(&sandbox, mount, scripts.len());
}

#[test]
fn rsync_makes_a_snapshot() {
    if !can_mount(&["rsync"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    std::fs::rename(sandbox.join("data"), sandbox.join("x.img")).unwrap();
    std::os::unix::fs::symlink("x.img", sandbox.join("data")).unwrap();
    // It writes a hidden file and renames it.
    makes_one_snapshot(&sandbox, &mount, "rsync x.img mnt/new/", true);
    makes_one_snapshot(&sandbox, &mount, "rsync -a --sparse x.img mnt/new/", true);
    makes_one_snapshot(&sandbox, &mount, "rsync --inplace x.img mnt/new/", false);
    makes_one_snapshot(&sandbox, &mount, "rsync -a --inplace --sparse x.img mnt/new/", false);
    assert_eq!(names(mount.join("new")), [] as [&str; 0]);
    ends_with(&sandbox, mount, 4);
}

#[test]
fn rsync_inplace_of_a_changed_image_makes_a_child() {
    if !can_mount(&["rsync"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    sandbox.sh("cp data x.img; rsync --inplace x.img mnt/new/");
    let first = mount.committed("x.img");
    let put = mount.put();
    sandbox.sh("printf changed | dd status=none of=x.img bs=1 seek=5300000 conv=notrunc");
    sandbox.sh("rsync -I --inplace --no-whole-file x.img mnt/new/");
    let second = mount.committed("x.img");
    assert_eq!(sandbox.parent_of(&second), Some(first));
    // All was written, but for rsync there is nothing to change elsewhere.
    assert_eq!(mount.put() - put, 1, "one block was changed");
    sandbox.assert_holds(&second, "x.img");
    ends_with(&sandbox, mount, 2);
}

#[test]
fn tar_makes_a_snapshot_of_each_file() {
    if !can_mount(&["tar"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    sandbox.sh("cp data x.img; cp data y.img; tar -cSf both.tar x.img y.img");
    sandbox.sh("tar -xf both.tar -C mnt/new");
    assert_eq!(mount.begun(), 2);
    for name in ["x.img", "y.img"] {
        sandbox.assert_holds(&mount.committed(name), "data");
    }
    sandbox.sh("rm mnt/new/*; tar -cf plain.tar x.img");
    makes_one_snapshot(&sandbox, &mount, "tar -xf plain.tar -C mnt/new", false);
    ends_with(&sandbox, mount, 3);
}

#[test]
fn qemu_img_makes_a_snapshot() {
    if !can_mount(&["qemu-img"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    // It counts in sectors.
    sandbox.sh("truncate -s 10M data; qemu-img convert -f raw -O qcow2 data data.qcow2");
    let convert = "qemu-img convert -O raw -f";
    let scripts = [
        format!("{convert} raw data mnt/new/x.img"),
        format!("{convert} qcow2 data.qcow2 mnt/new/x.img"),
        format!("{convert} qcow2 -W -m 8 data.qcow2 mnt/new/x.img"),
        format!("{convert} qcow2 -t none data.qcow2 mnt/new/x.img"),
        format!("truncate -s 10M mnt/new/x.img; {convert} qcow2 -n data.qcow2 mnt/new/x.img"),
    ];
    for script in &scripts {
        makes_one_snapshot(&sandbox, &mount, script, false);
    }
    ends_with(&sandbox, mount, scripts.len());
}

#[test]
fn a_shell_makes_one_snapshot_of_all_that_it_redirects() {
    if !can_mount(&["tee"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    sandbox.sh("split -n 3 data part.");
    let scripts = [
        "(cat part.aa; cat part.ab; cat part.ac) > mnt/new/x.img",
        "{ cat part.aa; cat part.ab part.ac; } > mnt/new/x.img",
        "for part in part.*; do cat $part; done > mnt/new/x.img",
        "cat part.aa part.ab part.ac | cat > mnt/new/x.img",
        "tee mnt/new/x.img < data > /dev/null",
        "cat data | tee mnt/new/x.img | cmp - data",
        "sh -c 'cat data > mnt/new/x.img'",
        "exec 3> mnt/new/x.img; cat part.aa >&3; cat part.ab >&3; (cat part.ac >&3); exec 3>&-",
        "exec 3> mnt/new/x.img; cat data >&3",
    ];
    for script in scripts {
        // A shell that ends closes by ending, which it does not wait for.
        makes_one_snapshot(&sandbox, &mount, script, true);
    }
    ends_with(&sandbox, mount, scripts.len());
}

#[test]
fn appending_makes_a_child() {
    if !can_mount(&[]) {
        return;
    }
    let (sandbox, mount) = mounted();
    sandbox.sh("head -c 2M data > mnt/new/x.img");
    let first = mount.committed("x.img");
    sandbox.sh("tail -c +2097153 data >> mnt/new/x.img");
    let second = mount.committed("x.img");
    sandbox.assert_holds(&second, "data");
    assert_eq!(sandbox.parent_of(&second), Some(first));
    ends_with(&sandbox, mount, 2);
}

#[test]
fn threads_make_one_snapshot() {
    if !can_mount(&["python3"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    let script = |descriptor: &str| {
        format!(
            "python3 - <<'END'
import os, threading
data = open('data', 'rb').read()
shared = os.open('mnt/new/x.img', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
start = threading.Barrier(4)
def work(n):
    fd = {descriptor}
    start.wait()
    for at in range(n * 100_001, len(data), 4 * 100_001):
        os.pwrite(fd, data[at:at + 100_001], at)
    if fd != shared: os.close(fd)
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
os.close(shared)
END"
        )
    };
    makes_one_snapshot(&sandbox, &mount, &script("shared"), false);
    makes_one_snapshot(&sandbox, &mount, &script("os.open('mnt/new/x.img', os.O_RDWR)"), false);
    ends_with(&sandbox, mount, 2);
}

#[test]
fn a_duplicated_descriptor_makes_one_snapshot_unless_it_is_written_to() {
    if !can_mount(&["python3"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    let dup = "python3 - <<'END'
import os
fd = os.open('mnt/new/x.img', os.O_WRONLY | os.O_CREAT)
os.write(fd, open('data', 'rb').read())
copies = [os.dup(fd), os.dup(fd)]
for each in [fd] + copies: os.close(each)
END";
    makes_one_snapshot(&sandbox, &mount, dup, false);

    let begun = mount.begun();
    sandbox.python(
        "import os
fd = os.open('mnt/new/y.img', os.O_WRONLY | os.O_CREAT)
os.write(fd, b'first')
copy = os.dup(fd)
os.close(fd)
os.write(copy, b' and second')
os.close(copy)",
    );
    assert_eq!(mount.begun(), begun + 2);
    let second = mount.committed("y.img");
    assert_eq!(std::fs::read(mount.image(&second)).unwrap(), b"first and second");
    let first = sandbox.parent_of(&second).unwrap();
    assert_eq!(std::fs::read(mount.image(&first)).unwrap(), b"first");
    ends_with(&sandbox, mount, 3);
}

#[test]
fn a_descriptor_that_a_child_holds_commits_in_the_background() {
    if !can_mount(&[]) {
        return;
    }
    let (sandbox, mount) = mounted();
    // Who opened it has gone when it is written to, and the writer is not who opened it.
    sandbox.sh("mkfifo go; exec 3> mnt/new/x.img; (read -r < go; cat data >&3) > /dev/null 2>&1 &");
    assert_eq!(mount.begun(), 0);
    sandbox.sh("echo go > go");
    until("it is committed", || mount.begun() == 1);
    sandbox.assert_holds(&mount.committed("x.img"), "data");
    ends_with(&sandbox, mount, 1);
}

#[test]
fn a_descriptor_that_execve_closes_stops_nobody() {
    if !can_mount(&["python3"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    // Closing it is part of execve, during which nobody may look closely at who does it.
    let script = "timeout 20 python3 - <<'END'
import os, subprocess
fd = os.open('mnt/new/x.img', os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
os.write(fd, open('data', 'rb').read())
for n in range(5): subprocess.run(['true'], close_fds=False, check=True)
os.system('true')
os.execv('/bin/true', ['true'])
END";
    makes_one_snapshot(&sandbox, &mount, script, false);
    ends_with(&sandbox, mount, 1);
}

#[test]
fn what_holds_nothing_makes_no_snapshot_and_says_so() {
    if !can_mount(&[]) {
        return;
    }
    let (sandbox, mount) = mounted();
    let zeros = "holds nothing but zeros";
    for (name, script, says) in [
        ("truncated", "truncate -s 10M mnt/new/truncated", zeros),
        ("zeros", "head -c 3M /dev/zero > mnt/new/zeros", zeros),
        ("odd", "head -c 1234567 /dev/zero > mnt/new/odd", zeros),
        ("touched", "touch mnt/new/touched", "empty"),
        ("empty", ": > mnt/new/empty", "empty"),
        ("copy", ": > none; cp none mnt/new/copy", "empty"),
    ] {
        sandbox.sh(script);
        until("it says so", || !mount.told(name, "error").is_empty());
        let said = mount.told(name, "error");
        assert!(said.contains(says) && said.contains("no snapshot was made"), "{script}: {said}");
        assert_eq!(mount.told(name, "snapshot"), "", "{script}");
        let staged = sandbox.ok(&["staged", "mnt"]);
        let line = staged.lines().find(|line| line.starts_with(name)).unwrap();
        assert!(line.contains(says), "{staged}");
    }
    assert_eq!(mount.begun(), 0);
    // What is asked for is made. Zeros need no block.
    let id = sandbox.ok(&["commit", "mnt/new/truncated"]).trim().to_owned();
    assert_eq!(mount.told("truncated", "error"), "");
    sandbox.sh("truncate -s 10M hole");
    sandbox.assert_holds(&id, "hole");
    assert_eq!(mount.put(), 0);
    let said = sandbox.fails(&["commit", "mnt/new/empty"]);
    assert!(said.contains("it is empty"), "{said}");
    // Something in them makes one.
    sandbox.sh("printf x | dd status=none of=mnt/new/zeros bs=1 seek=2000000 conv=notrunc");
    assert_eq!(mount.told("zeros", "error"), "");
    mount.committed("zeros");
    assert_eq!(mount.put(), 1);
    ends_with(&sandbox, mount, 2);
}

#[test]
fn zeros_after_a_truncation_make_no_child() {
    if !can_mount(&[]) {
        return;
    }
    let (sandbox, mount) = mounted();
    sandbox.sh("cp data mnt/new/x.img");
    let first = mount.committed("x.img");
    // As programs do that make a file anew, close it, and open it again to write.
    let anew = || {
        let path = mount.new_file("x.img");
        let file = File::options().write(true).truncate(true).open(path).unwrap();
        file.set_len(10 * MIB).unwrap();
        file
    };
    let says_so = || mount.told("x.img", "error").contains("holds nothing but zeros");
    drop(anew());
    assert!(says_so());
    anew().write_all_at(&vec![0; 3 << 20], MIB).unwrap();
    assert!(says_so());
    assert_eq!((mount.begun(), mount.told("x.img", "snapshot")), (1, first));
    let file = File::options().write(true).open(mount.new_file("x.img")).unwrap();
    file.write_all_at(b"x", 5 * MIB).unwrap();
    drop(file);
    let second = mount.committed("x.img");
    sandbox.sh("truncate -s 10M copy; printf x | dd status=none of=copy bs=1M seek=5 conv=notrunc");
    sandbox.assert_holds(&second, "copy");
    assert_eq!(mount.begun(), 2);
    // What is not truncated is a child, also of zeros; and so is what is asked for.
    sandbox.sh("head -c 10M /dev/zero | dd status=none of=mnt/new/x.img conv=notrunc");
    sandbox.sh("truncate -s 10M hole");
    sandbox.assert_holds(&mount.committed("x.img"), "hole");
    drop(anew());
    let id = sandbox.ok(&["commit", "mnt/new/x.img"]).trim().to_owned();
    sandbox.assert_holds(&id, "hole");
    ends_with(&sandbox, mount, 4);
}

#[test]
fn qemu_img_over_a_committed_image_makes_one_snapshot() {
    if !can_mount(&["qemu-img"]) {
        return;
    }
    let (sandbox, mount) = mounted();
    sandbox.image("other", 6 * MIB, &[(MIB, MIB)]);
    sandbox.sh("cp data mnt/new/x.img");
    mount.committed("x.img");
    sandbox.sh("qemu-img convert -f raw -O raw other mnt/new/x.img");
    sandbox.assert_holds(&mount.committed("x.img"), "other");
    assert_eq!(mount.begun(), 2);
    ends_with(&sandbox, mount, 2);
}

#[test]
fn the_snapshot_is_as_the_mount_and_the_file_ask() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.image("data", 3 * BLOCK, &[(0, 10)]);
    let options = ["--full-copy", "--description", "of mine", "--tag", "team=a", "--tag", "x=y z"];
    let mount = sandbox.mount(&options);
    sandbox.sh("cp --sparse=never data mnt/new/x.img");
    let described = sandbox.described(&mount.committed("x.img"));
    assert_eq!(described["description"], "of mine");
    assert_eq!((&described["tags"]["team"], &described["tags"]["x"]), (&"a".into(), &"y z".into()));
    let stored = sandbox.stored(described["id"].as_str().unwrap());
    assert_eq!((&stored["data_blocks"], &stored["zero_blocks"]), (&1.into(), &2.into()));
    // What is asked for one file goes before them.
    sandbox.sh("truncate -s 1M mnt/new/y.img
        setfattr -n user.fspfs.description -v 'of yours' mnt/new/y.img
        setfattr -n user.fspfs.tag.team -v b mnt/new/y.img
        setfattr -n user.fspfs.tag.Name -v other mnt/new/y.img
        printf y | dd status=none of=mnt/new/y.img conv=notrunc");
    let described = sandbox.described(&mount.committed("y.img"));
    assert_eq!(described["description"], "of yours");
    let tags = &described["tags"];
    assert_eq!((&tags["team"], &tags["x"]), (&"b".into(), &"y z".into()));
    assert_eq!(tags["Name"], "other");
    ends_with(&sandbox, mount, 2);
}

#[test]
fn a_copy_with_attributes_is_an_image_of_its_own() {
    if !can_mount(&["rsync", "getfattr"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.image("a.img", 2 * MIB, &[(0, 10)]);
    let mount = sandbox.mount(&["--tag", "team=x"]);
    sandbox.sh("cp a.img mnt/new/a.img; printf y | dd status=none of=mnt/new/a.img conv=notrunc");
    let child = mount.committed("a.img");
    assert!(sandbox.described(&child)["parent"].is_string());
    sandbox.sh(
        "cp -aL mnt/by-name/a.img kept.img; chmod u+w kept.img; setfattr -n user.mine -v 1 kept.img
        getfattr -d kept.img | grep -q user.fspfs.parent
        cp -a kept.img mnt/new/b.img
        rsync -aX a.img mnt/new/c.img",
    );
    for name in ["b", "c"] {
        let described = sandbox.described(&mount.committed(&format!("{name}.img")));
        assert_eq!(described["tags"]["Name"], name);
        assert!(described["parent"].is_null(), "{described}");
    }
    // Whoever asks for it means it.
    sandbox.sh("cp -a kept.img mnt/new/.d; setfattr -n user.fspfs.tag.Name -v mine mnt/new/.d
        mv mnt/new/.d mnt/new/d.img");
    assert_eq!(sandbox.described(&mount.committed("d.img"))["tags"]["Name"], "mine");
    ends_with(&sandbox, mount, 5);
}
