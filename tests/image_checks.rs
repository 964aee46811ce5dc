//! Images that are shorter than what is on them, or no raw images, become no snapshots; all others do.
#![allow(clippy::unwrap_used)]

mod support;

use std::process::Output;

use support::{Loop, MIB, Sandbox, can_mount, has, run, text};

/// Images in this directory, each made by a command.
const RAW: [(&str, &[&str], &str); 17] = [
    ("gpt", &["sgdisk"], "truncate -s 64M gpt; sgdisk -n 1:2048:+20M -n 2:0:0 gpt >gpt.log"),
    ("mbr", &["sfdisk"], "truncate -s 64M mbr; echo ';;;*' | sfdisk -q --label dos mbr"),
    (
        "logical",
        &["sfdisk"],
        "truncate -s 64M logical
         printf '2048,20480\n22528,,E\n24576\n' | sfdisk -q --label dos logical",
    ),
    (
        "left",
        &["sfdisk", "mkfs.ext4"],
        "truncate -s 128M left; echo ';' | sfdisk -q --label dos left; head -c 512 left >table
         truncate -s 64M left; mkfs.ext4 -qF left; dd status=none if=table of=left conv=notrunc",
    ),
    ("ext4", &["mkfs.ext4"], "truncate -s 64M ext4; mkfs.ext4 -q ext4"),
    ("ext3", &["mkfs.ext4"], "truncate -s 64M ext3; mkfs.ext4 -q -t ext3 -O ^metadata_csum ext3"),
    ("ext2", &["mkfs.ext4"], "truncate -s 64M ext2; mkfs.ext4 -q -t ext2 -b 1024 ext2"),
    ("bigalloc", &["mkfs.ext4"], "truncate -s 64M bigalloc; mkfs.ext4 -q -O bigalloc bigalloc"),
    ("xfs", &["mkfs.xfs"], "truncate -s 320M xfs; mkfs.xfs -q xfs"),
    (
        "external",
        &["mkfs.xfs"],
        "truncate -s 320M external; truncate -s 128M log; mkfs.xfs -q -l logdev=log external",
    ),
    ("btrfs", &["mkfs.btrfs"], "truncate -s 128M btrfs; mkfs.btrfs -q btrfs"),
    ("sha", &["mkfs.btrfs"], "truncate -s 128M sha; mkfs.btrfs -q --csum sha256 sha"),
    ("pair", &["mkfs.btrfs"], "truncate -s 128M pair other; mkfs.btrfs -q pair other"),
    ("fat16", &["mkfs.fat"], "truncate -s 64M fat16; mkfs.fat -F 16 fat16 >fat.log"),
    ("fat32", &["mkfs.fat"], "truncate -s 64M fat32; mkfs.fat -F 32 fat32 >fat.log"),
    ("ntfs", &["mkfs.ntfs"], "truncate -s 64M ntfs; mkfs.ntfs -qfF ntfs 2>ntfs.log"),
    (
        "iso",
        &["genisoimage"],
        "mkdir files; truncate -s 8M files/x; genisoimage -quiet -o iso files",
    ),
];

/// Uploads a file that comes on stdin.
fn send(sandbox: &Sandbox, options: &[&str], file: &str) -> Output {
    let file = std::fs::File::open(sandbox.join(file)).unwrap();
    run(sandbox.fspfs().arg("upload").args(options).arg("-").stdin(file))
}

#[test]
fn whole_images_are_taken_and_cut_ones_are_not() {
    let sandbox = Sandbox::with_store();
    for (name, programs, command) in RAW {
        if !has(programs) {
            continue;
        }
        sandbox.sh(command);
        sandbox.ok(&["upload", name]);
        // One that was made longer is fine, too.
        sandbox.sh(&format!("cp --sparse=always {name} longer; truncate -s +2M longer"));
        sandbox.ok(&["upload", "longer"]);
        sandbox.sh(&format!("truncate -s -3M {name}"));
        let said = sandbox.fails(&["upload", name]);
        assert!(said.contains(" ends at ") && said.contains("--as-is"), "{name}: {said}");
        let said = sandbox.fails(&["upload", "--dry-run", name]);
        assert!(said.contains(" ends at "), "{name}: {said}");
        sandbox.ok(&["upload", "--as-is", name]);
    }
}

#[test]
fn an_image_on_stdin_is_looked_at_before_its_snapshot_is_completed() {
    if !has(&["sgdisk"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.random("x", 16 * MIB);
    sandbox.sh("sgdisk -n 1:0:0 x >x.log; head -c 7340035 x >half; gzip -c half >packed");
    for size in [&["--size", "1GiB"][..], &["--size", "16MiB"], &[]] {
        for (file, why) in [("half", "the image at 7340035 bytes"), ("packed", "gzip -dc FILE")] {
            let sent = send(&sandbox, size, file);
            let said = text(&sent);
            assert!(!sent.status.success() && said.contains(why), "{size:?}: {said}");
            assert_eq!(sandbox.snapshots().len(), 0, "{size:?}: one is left");
        }
    }
    for (options, file) in [(&[][..], "x"), (&["--as-is"], "half")] {
        let sent = send(&sandbox, &[&["--size", "1GiB"], options].concat(), file);
        assert!(sent.status.success(), "{}", text(&sent));
    }
}

#[test]
fn a_cut_device_is_taken_and_so_is_the_child_of_a_cut_image() {
    if !can_mount(&["mkfs.ext4"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.sh("truncate -s 64M x; mkfs.ext4 -q x; head -c 32M x >half; head -c 31M x >less");
    sandbox.sh("head -c 33M x >more");
    let device = Loop::attach(&sandbox.join("half"), &["-r"]);
    let output = run(sandbox.fspfs().arg("upload").arg(&device.0));
    let said = text(&output);
    assert!(output.status.success() && said.contains("the image at 32 MiB; it is taken"), "{said}");
    sandbox.fails(&["upload", "half"]);
    let id = sandbox.upload("half", &["--as-is"]);
    for file in ["half", "more"] {
        sandbox.upload(file, &["--parent", &id]);
    }
    let said = sandbox.fails(&["upload", "--parent", &id, "less"]);
    assert!(said.contains("the image at 31 MiB: write all of it"), "{said}");
    sandbox.ok(&["init", "other"]);
    let said = sandbox.fails(&["fanout", "half", "other"]);
    assert!(said.contains("the image at 32 MiB"), "{said}");
    sandbox.ok(&["fanout", "--as-is", "half", "other"]);
}

#[test]
fn packed_images_are_refused_with_the_command_that_unpacks() {
    let sandbox = Sandbox::with_store();
    sandbox.image("x", 8 * MIB, &[(0, 512), (MIB, 3 * MIB)]);
    let mut made: Vec<_> = ["qcow2", "vmdk", "vpc", "vhdx", "vdi"]
        .into_iter()
        .filter(|_| has(&["qemu-img"]))
        .map(|format| (format!("qemu-img convert -f raw -O {format} x packed"), format))
        .collect();
    for (program, command) in [
        ("gzip", "gzip -c x >packed"),
        ("xz", "xz -c x >packed"),
        ("zstd", "zstd -qc x >packed"),
        ("bzip2", "bzip2 -c x >packed"),
        ("zip", "zip -q packed.zip x; mv packed.zip packed"),
    ] {
        if has(&[program]) {
            made.push((command.to_owned(), program));
        }
    }
    for (command, names) in made {
        sandbox.sh(&format!("rm -f packed; {command}"));
        let said = sandbox.fails(&["upload", "packed"]);
        assert!(said.contains("not a raw image") && said.contains(names), "{command}: {said}");
        sandbox.ok(&["upload", "--as-is", "packed"]);
    }
    if has(&["qemu-img"]) {
        sandbox.sh("qemu-img convert -f raw -O vpc -o subformat=fixed x fixed");
        sandbox.ok(&["upload", "fixed"]);
    }
    sandbox.random("random", 2 * MIB);
    sandbox.image("zeros", 2 * MIB, &[]);
    for file in ["random", "zeros"] {
        sandbox.ok(&["upload", file]);
    }
}

#[test]
fn a_cut_image_under_new_waits_until_it_is_whole() {
    if !can_mount(&["sgdisk", "dd"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.image("x.img", 16 * MIB, &[(3 * MIB, MIB), (14 * MIB, MIB)]);
    sandbox.sh("sgdisk -n 1:0:0 x.img >x.log; head -c 7M x.img >half");
    let mount = sandbox.mount(&[]);
    let output = sandbox.try_sh("cp half mnt/new/x.img");
    assert!(!output.status.success());
    assert_eq!(mount.state("x.img"), "interrupted");
    let why = mount.told("x.img", "error");
    assert!(
        why.contains("its partition table ends at") && why.contains("the image at 7 MiB"),
        "{why}"
    );
    let said = sandbox.fails(&["commit", "mnt/new/x.img"]);
    assert!(said.contains("its partition table ends at") && said.contains("--as-is"), "{said}");
    // The rest of it makes it whole.
    sandbox.sh("dd status=none if=x.img of=mnt/new/x.img bs=1M skip=7 seek=7 conv=notrunc");
    sandbox.assert_holds(&mount.committed("x.img"), "x.img");
    // So it is where the last name is given at the end, and nobody can be told.
    sandbox.sh("cp half mnt/new/y.img.part; mv mnt/new/y.img.part mnt/new/y.img");
    mount.becomes("y.img", "interrupted");
    assert_eq!(mount.begun(), 1);
    let id = sandbox.ok(&["commit", "--as-is", "mnt/new/y.img"]);
    sandbox.assert_holds(id.trim(), "half");
    // A child of it is no worse.
    sandbox.sh("printf x | dd status=none of=mnt/new/y.img bs=1M seek=5 conv=notrunc");
    mount.committed("y.img");
    assert_eq!(mount.begun(), 3);
    mount.unmount();
    let mount = sandbox.mount(&["--check-images", "off"]);
    sandbox.sh("cp half mnt/new/z.img");
    sandbox.assert_holds(&mount.committed("z.img"), "half");
    mount.unmount();
}
