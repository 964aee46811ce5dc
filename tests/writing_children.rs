//! What comes after the first snapshot of a file under `new/`: children, names, clones, commits.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use nix::errno::Errno;
use support::{BLOCK, GIB, MIB, Mount, Sandbox, can_mount, errno, names, same, until};

/// A mount with a committed `new/x.img`, of which a copy is kept; and its snapshot.
fn committed() -> (Sandbox, Mount, String) {
    let sandbox = Sandbox::with_store();
    sandbox.image("x.img", 8 * MIB + 100, &[(0, 4 * MIB), (8 * MIB, 100)]);
    let mount = sandbox.mount(&[]);
    sandbox.sh("cp x.img mnt/new/");
    let id = mount.committed("x.img");
    (sandbox, mount, id)
}

/// Runs a script on `x.img`, in `new/` and beside it: that makes a child of `parent` with the same
/// content, for which `puts` blocks are put.
#[track_caller]
fn makes_a_child(
    sandbox: &Sandbox,
    mount: &Mount,
    parent: &str,
    script: &str,
    puts: u64,
) -> String {
    let (begun, put) = (mount.begun(), mount.put());
    sandbox.sh(script);
    sandbox.sh(&format!("cd mnt/new; {script}"));
    until("it is committed", || mount.begun() == begun + 1);
    let child = mount.committed("x.img");
    assert_eq!(sandbox.parent_of(&child).as_deref(), Some(parent), "{script}");
    sandbox.assert_holds(&child, "x.img");
    assert!(same(mount.image(&child), sandbox.join("x.img")), "{script}");
    assert!(same(mount.new_file("x.img"), sandbox.join("x.img")), "{script}");
    let new = mount.put() - put;
    // EBS does not tell what a block is: what was written again as it was is put again.
    assert!(new == puts || (support::over_ebs() && new == puts + 1), "{script}: {new}");
    child
}

#[test]
fn only_changed_blocks_are_put() {
    if !can_mount(&["dd"]) {
        return;
    }
    let (sandbox, mount, first) = committed();
    assert_eq!(mount.put(), 9);
    let dd = "dd status=none of=x.img conv=notrunc bs=1";
    let second =
        makes_a_child(&sandbox, &mount, &first, &format!("printf new | {dd} seek=700000"), 1);
    // Two blocks, one of which was a hole; and one that is written as it was.
    let script = format!(
        "printf 12345 | {dd} seek=5242878; dd status=none if=x.img of=x.img count=100 conv=notrunc"
    );
    let script = format!("exec 3<>x.img; {script}; exec 3>&-");
    let third = makes_a_child(&sandbox, &mount, &second, &script, 2);
    // Zeros over data are put, over nothing they are not.
    let script = "dd status=none if=/dev/zero of=x.img conv=notrunc bs=512k count=3 seek=7";
    makes_a_child(&sandbox, &mount, &third, script, 2);
    mount.unmount();
    assert_eq!(sandbox.snapshots().len(), 4);
    sandbox.assert_nothing_is_left();
}

#[test]
fn images_shrink_and_grow() {
    if !can_mount(&["truncate"]) {
        return;
    }
    let (sandbox, mount, first) = committed();
    let second = makes_a_child(&sandbox, &mount, &first, "truncate -s 3000000 x.img", 4);
    let size = |id: &str| sandbox.described(id)["volume_size_gib"].clone();
    // What was cut off does not come back.
    let third = makes_a_child(&sandbox, &mount, &second, "truncate -s 9000000 x.img", 0);
    assert_eq!(size(&third), 1);
    let script = "printf end | dd status=none of=x.img bs=1 seek=1G conv=notrunc";
    let fourth = makes_a_child(&sandbox, &mount, &third, script, 1);
    assert_eq!(size(&fourth), 2);
    assert_eq!(mount.new_file("x.img").metadata().unwrap().len(), GIB + 3);
    let fifth = makes_a_child(&sandbox, &mount, &fourth, "truncate -s 5M x.img", 0);
    assert_eq!(size(&fifth), 1);
    let sixth = makes_a_child(&sandbox, &mount, &fifth, "truncate -s 1025M x.img", 0);
    assert_eq!(size(&sixth), 2);
    mount.unmount();
}

#[test]
fn truncating_to_zero_begins_a_fresh_lineage() {
    if !can_mount(&["cp"]) {
        return;
    }
    let (sandbox, mount, first) = committed();
    sandbox.image("y", 2 * MIB, &[(MIB, 77)]);
    sandbox.sh("cp y mnt/new/x.img");
    let second = mount.committed("x.img");
    assert_ne!(second, first);
    assert_eq!(sandbox.parent_of(&second), None);
    sandbox.assert_holds(&second, "y");
    assert_eq!(mount.put(), 10);
    // Also where it is truncated by name, and grows again before it is committed.
    let file = File::options().write(true).open(mount.new_file("x.img")).unwrap();
    file.set_len(0).unwrap();
    file.set_len(MIB).unwrap();
    file.write_all_at(b"x", BLOCK).unwrap();
    drop(file);
    until("it is committed", || mount.begun() == 3);
    let third = mount.committed("x.img");
    assert_eq!(sandbox.parent_of(&third), None);
    let mut content = vec![0; 1 << 20];
    content[1 << 19] = b'x';
    assert!(std::fs::read(mount.image(&third)).unwrap() == content);
    mount.unmount();
}

#[test]
fn a_file_can_be_renamed_over_another_one() {
    if !can_mount(&["mv"]) {
        return;
    }
    let (sandbox, mount, first) = committed();
    sandbox.sh("printf other > mnt/new/other.img; mv -f mnt/new/other.img mnt/new/x.img");
    assert_eq!(names(mount.join("new")), ["x.img"]);
    assert_eq!(std::fs::read(mount.new_file("x.img")).unwrap(), b"other");
    let other = mount.committed("x.img");
    assert_ne!(other, first);
    // No snapshot is removed, and the moved one is named as its file is.
    sandbox.assert_holds(&first, "x.img");
    until("it is renamed", || sandbox.described(&other)["tags"]["Name"] == "x");
    let newest = mount.join("by-name/x.img");
    until("the link leads to it", || {
        std::fs::read_link(&newest).unwrap().to_str() == Some(&format!("../{other}.img"))
    });
    sandbox.sh("printf ' more' >> mnt/new/x.img");
    let child = mount.committed("x.img");
    assert_eq!(sandbox.parent_of(&child), Some(other));
    assert_eq!(std::fs::read(mount.image(&child)).unwrap(), b"other more");
    // Out of new/ and into it there is no way but copying.
    let rename = |from: &str, to: &str| errno(std::fs::rename(mount.join(from), mount.join(to)));
    assert_eq!(rename("new/x.img", "x.img"), Errno::EXDEV as i32);
    assert_eq!(rename("new/x.img", "by-name/y.img"), Errno::EXDEV as i32);
    assert_eq!(rename(&format!("{first}.img"), "new/y.img"), Errno::EPERM as i32);
    assert_eq!(rename("new/none", "new/y.img"), Errno::ENOENT as i32);
    mount.unmount();
}

#[test]
fn a_name_that_says_it_is_not_whole_is_committed_when_it_says_so_no_more() {
    if !can_mount(&["mv"]) {
        return;
    }
    let (sandbox, mount, _) = committed();
    for (n, name) in ["y.img.part", "y.partial", ".y.img.a1B2c3", "y.tmp"].iter().enumerate() {
        sandbox.sh(&format!("cp x.img mnt/new/{name}; sync mnt/new/{name}"));
        assert_eq!((mount.begun(), &mount.state(name)[..]), (1 + n as u64, "dirty"), "{name}");
        // From one such name to another it is still not whole.
        sandbox.sh(&format!("mv mnt/new/{name} mnt/new/.z; mv mnt/new/.z mnt/new/y{n}.img"));
        let id = mount.committed(&format!("y{n}.img"));
        sandbox.assert_holds(&id, "x.img");
        assert_eq!(sandbox.described(&id)["tags"]["Name"], format!("y{n}"));
    }
    // A link of a name to itself is no rename, and one that is open is committed when it is closed.
    let file = File::create(mount.new_file("open.part")).unwrap();
    file.write_all_at(b"x", 0).unwrap();
    sandbox.sh("mv mnt/new/open.part mnt/new/open.img");
    assert_eq!(mount.state("open.img"), "dirty");
    drop(file);
    until("it is committed", || mount.begun() == 6);
    mount.committed("open.img");
    mount.unmount();
    assert_eq!(sandbox.snapshots().len(), 6);
}

#[test]
fn renaming_a_file_renames_its_snapshot() {
    if !can_mount(&["mv"]) {
        return;
    }
    let (sandbox, mount, first) = committed();
    let name = |id: &str| sandbox.described(id)["tags"]["Name"].clone();
    sandbox.sh("mv mnt/new/x.img mnt/new/web.server.img");
    until("it is renamed", || name(&first) == "web.server");
    until("the link is there", || mount.join("by-name/web.server.img").is_symlink());
    assert!(same(mount.join("by-name/web.server.img"), sandbox.join("x.img")));
    // A name that somebody else has given is left alone.
    sandbox.sh("setfattr -n user.fspfs.tag.Name -v mine mnt/new/web.server.img");
    sandbox.sh("printf x >> mnt/new/web.server.img");
    let second = mount.committed("web.server.img");
    assert_eq!(name(&second), "mine");
    sandbox.sh("mv mnt/new/web.server.img mnt/new/db");
    sandbox.sh("setfattr -x user.fspfs.tag.Name mnt/new/db; printf x >> mnt/new/db");
    let third = mount.committed("db");
    assert_eq!((name(&third), name(&second)), ("db".into(), "mine".into()));
    mount.unmount();
}

#[test]
fn a_clone_copies_nothing_and_its_commit_is_a_child() {
    if !can_mount(&[]) {
        return;
    }
    let (sandbox, mount, first) = committed();
    assert_eq!(sandbox.ok(&["clone", &first, "mnt/new/a.img"]).trim(), first);
    sandbox.sh(&format!("echo '{first} \"b c.img\"' > mnt/control/clone"));
    until("it is there", || mount.new_file("b c.img").exists());
    for name in ["a.img", "b c.img"] {
        assert_eq!((&mount.state(name)[..], &mount.told(name, "base")), ("clean", &first));
        assert_eq!(mount.told(name, "staged-bytes"), "0");
        assert!(same(mount.new_file(name), sandbox.join("x.img")));
    }
    // Looking at it, or opening it for writing, makes no snapshot.
    drop(File::options().append(true).open(mount.new_file("a.img")).unwrap());
    assert_eq!(mount.begun(), 1);
    let put = mount.put();
    for file in ["x.img", "mnt/new/a.img"] {
        sandbox.sh(&format!("printf y | dd status=none of={file} bs=1 seek=4194304 conv=notrunc"));
    }
    let child = mount.committed("a.img");
    assert_eq!(sandbox.parent_of(&child), Some(first.clone()));
    assert_eq!(sandbox.described(&child)["tags"]["Name"], "a");
    sandbox.assert_holds(&child, "x.img");
    assert_eq!(mount.put() - put, 1);

    let clone = |snapshot: &str, file: &str| sandbox.fails(&["clone", snapshot, file]);
    let said = clone("snap-0123456789abcdef0", "mnt/new/c.img");
    assert!(said.contains("snap-0123456789abcdef0"), "{said}");
    let said = clone(&first, "mnt/new/a.img");
    assert!(said.contains("there is a file of this name"), "{said}");
    let said = clone(&first, "mnt/c.img");
    assert!(said.contains("mnt/new"), "{said}");
    let said = clone(&first, "mnt/new/none/c.img");
    assert!(said.contains("none"), "{said}");
    assert_eq!(names(mount.join("new")), ["a.img", "b c.img", "x.img"]);
    mount.unmount();
    assert_eq!(sandbox.snapshots().len(), 2);
}

#[test]
fn a_commit_by_hand_says_what_came_of_it() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let mount = sandbox.mount(&["--commit", "manual"]);
    sandbox.image("x.img", 3 * MIB, &[(0, 2 * MIB)]);
    sandbox.sh("cp x.img mnt/new/; cp x.img mnt/new/y.img; cp x.img mnt/new/-z.img");
    assert_eq!((mount.begun(), &mount.state("x.img")[..]), (0, "dirty"));
    let staged = sandbox.ok(&["staged", "mnt"]);
    let line = staged.lines().find(|line| line.starts_with("x.img")).unwrap();
    assert!(line.contains("dirty") && line.contains("2.0 MiB"), "{staged}");

    let first = sandbox.ok(&["commit", "mnt/new/x.img"]).trim().to_owned();
    sandbox.assert_holds(&first, "x.img");
    assert_eq!(mount.told("x.img", "snapshot"), first);
    // There is nothing more to commit.
    assert_eq!(sandbox.ok(&["commit", "--wait", "mnt/new/x.img"]).trim(), first);
    let waited = sandbox.ok(&["commit", "--wait", "mnt/new/y.img"]).trim().to_owned();
    assert_eq!(mount.state("y.img"), "clean");
    sandbox.assert_holds(&waited, "x.img");
    sandbox.assert_holds(sandbox.ok(&["commit", "mnt/new/-z.img"]).trim(), "x.img");
    assert_eq!(mount.begun(), 3);

    sandbox.sh("printf more >> mnt/new/x.img; echo x.img > mnt/control/commit");
    until("it is committed", || mount.begun() == 4);
    let second = mount.committed("x.img");
    assert_eq!(sandbox.parent_of(&second), Some(first));
    until("the job tells it", || sandbox.sh("cat mnt/control/jobs/last/result").trim() == second);

    let said = sandbox.fails(&["commit", "mnt/new/none.img"]);
    assert!(said.contains("none.img"), "{said}");
    let said = sandbox.fails(&["commit", "--cancel", "mnt/new/x.img"]);
    assert!(said.contains("no commit of it is under way"), "{said}");
    let staged: serde_json::Value =
        serde_json::from_str(&sandbox.ok(&["staged", "mnt", "--json"])).unwrap();
    let states: Vec<_> = staged.as_array().unwrap().iter().map(|image| &image["state"]).collect();
    assert_eq!(states, ["clean", "clean", "clean"]);
    mount.unmount();
    assert_eq!(sandbox.snapshots().len(), 4);
}

#[test]
fn a_parent_can_be_asked_for_before_the_first_snapshot() {
    if !can_mount(&["setfattr"]) {
        return;
    }
    let (sandbox, mount, first) = committed();
    // An image of the same disk, made by other means: less data, and a change.
    sandbox.sh("cp x.img y.img; printf new | dd status=none of=y.img bs=1 seek=99 conv=notrunc
        fallocate -p -o 2M -l 1M y.img; touch mnt/new/y.img");
    sandbox.sh(&format!("setfattr -n user.fspfs.parent -v {first} mnt/new/y.img"));
    assert_eq!(mount.told("y.img", "parent"), first);
    sandbox.sh("cp --sparse=always y.img mnt/new/y.img");
    let child = mount.committed("y.img");
    assert_eq!(sandbox.parent_of(&child), Some(first.clone()));
    sandbox.assert_holds(&child, "y.img");
    assert_eq!(mount.put(), 9 + 3);
    for (attribute, value) in [("parent", &first[..]), ("encrypted", "true"), ("kms-key", "k")] {
        let path = mount.new_file("y.img");
        let set = xattr::set(path, format!("user.fspfs.{attribute}"), value.as_bytes());
        assert_eq!(errno(set), Errno::EINVAL as i32, "{attribute} is too late");
    }
    mount.unmount();
}

#[test]
fn the_image_of_today_is_a_child_of_that_of_yesterday() {
    if !can_mount(&["cp"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.image("x.img", 8 * MIB + 100, &[(0, 4 * MIB), (8 * MIB, 100)]);
    let mount = sandbox.mount(&["--parent", "auto"]);
    sandbox.sh("cp x.img mnt/new/");
    let first = mount.committed("x.img");
    assert_eq!(sandbox.parent_of(&first), None);
    // `cp` truncates what was there, and writes all of it again.
    let put = mount.put();
    sandbox.sh(
        "printf new | dd status=none of=x.img conv=notrunc bs=1 seek=700000; cp x.img mnt/new/",
    );
    until("it is committed", || mount.committed("x.img") != first);
    let second = mount.committed("x.img");
    assert_eq!(sandbox.parent_of(&second).as_deref(), Some(&*first));
    sandbox.assert_holds(&second, "x.img");
    assert!(mount.put() - put <= 2, "{}", mount.put() - put);
    mount.unmount();
    // Another mount knows it by its name.
    let mount = sandbox.mount(&["--parent", "auto"]);
    sandbox.sh("rm -f mnt/new/x.img; cp x.img mnt/new/");
    let third = mount.committed("x.img");
    assert_eq!(sandbox.parent_of(&third).as_deref(), Some(&*second));
    sandbox.assert_holds(&third, "x.img");
}
