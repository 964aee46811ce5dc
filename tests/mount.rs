//! Images in the mount, through the programs that users use.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use support::{
    BLOCK, GIB, MIB, Mount, Sandbox, blocks_of, can_mount, names, pattern, same, write_pattern,
    write_zeros,
};

/// Length of the sparse image: no whole number of blocks, but of sectors, since `qemu-img` counts
/// in those.
const LEN: u64 = 96 * MIB + 12_800;

/// Where the sparse image has data: at both ends, inside a block, across the edge of two.
const DATA: [(u64, u64); 4] =
    [(0, MIB), (10 * MIB + 100, 5000), (50 * MIB - 1, 2), (96 * MIB, 12_800)];

/// A mount of the sparse image, `disk.img`, and its id.
fn sparse(options: &[&str]) -> (Sandbox, Mount, String) {
    let sandbox = Sandbox::with_store();
    sandbox.image("disk.img", LEN, &DATA);
    let id = sandbox.upload("disk.img", &["--name", "disk"]);
    let mount = sandbox.mount(options);
    (sandbox, mount, id)
}

/// 512-byte sectors that a file takes on the disk.
fn sectors(sandbox: &Sandbox, name: &str) -> u64 {
    sandbox.join(name).metadata().unwrap().blocks()
}

#[test]
fn cp_gives_back_what_was_uploaded() {
    if !can_mount(&["cmp"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let image = sandbox.image(
        "disk.img",
        GIB + 12_345,
        &[(0, 3 * MIB), (700 * MIB + 1, BLOCK), (GIB, 12_345)],
    );
    let id = sandbox.upload("disk.img", &["--name", "web"]);
    let mount = sandbox.mount(&[]);
    assert_eq!(
        names(&mount.path),
        ["by-name", "by-tag", "by-volume", "control", "new", &format!("{id}.img")]
    );
    sandbox.sh("cp mnt/by-name/web.img copy.img");
    assert!(same(image, sandbox.join("copy.img")));
    // Holes came out as holes.
    assert!(sectors(&sandbox, "copy.img") * 512 < 8 * MIB);
    mount.unmount();
    sandbox.assert_nothing_is_left();
}

#[test]
fn dd_reads_any_piece() {
    if !can_mount(&["dd", "cmp"]) {
        return;
    }
    let (sandbox, mount, _) = sparse(&[]);
    for (bs, skip, count, direct) in [
        (1, BLOCK - 3, 6, ""),
        (4097, 10 * MIB + 7, 3 * 4097 + 5, ""),
        (511, 50 * MIB - 600, 5000, ""),
        (3 * BLOCK + 1, 1, 2 * MIB, ""),
        (7 * MIB + 13, 5, LEN, ""),
        (MIB, 95 * MIB + 1, 2 * MIB, ""),
        (4096, 10 * MIB, MIB, "direct,"),
        (512, 50 * MIB - 4096, 64 * 1024, "direct,"),
        (16 * MIB, 0, LEN, "direct,"),
        // Up to the end, which is in no whole page.
        (MIB, 96 * MIB - 4096, MIB, "direct,"),
        // Beyond the end there is nothing.
        (MIB, LEN + 1, MIB, ""),
    ] {
        let flags = "fullblock,skip_bytes,count_bytes";
        let options = format!("bs={bs} skip={skip} count={count} status=none");
        sandbox.sh(&format!(
            "dd if=mnt/by-name/disk.img of=a iflag={direct}{flags} {options} 2> said
             dd if=disk.img of=b iflag={flags} {options} 2> said
             cmp a b"
        ));
        let expected = count.min(LEN.saturating_sub(skip));
        assert_eq!(sandbox.join("a").metadata().unwrap().len(), expected, "{options}");
    }
    mount.unmount();
}

#[test]
fn programs_that_know_holes_copy_data_only() {
    if !can_mount(&["cmp", "tar", "rsync"]) {
        return;
    }
    let (sandbox, mount, id) = sparse(&[]);
    let data = blocks_of(&DATA).len() as u64;
    sandbox.sh("cp mnt/by-name/disk.img plain.img");
    assert_eq!(mount.requests("get_block"), data);
    sandbox.sh(&format!(
        "cp --sparse=always mnt/by-name/disk.img always.img
         tar -S -cf disk.tar -C mnt {id}.img
         mkdir untarred && tar -S -xf disk.tar -C untarred
         rsync -S mnt/{id}.img rsynced.img"
    ));
    let archive = sandbox.join("disk.tar").metadata().unwrap().len();
    assert!((MIB..4 * MIB).contains(&archive), "an archive of {archive} bytes");
    for copy in ["plain.img", "always.img", &format!("untarred/{id}.img"), "rsynced.img"] {
        assert!(same(sandbox.join("disk.img"), sandbox.join(copy)), "{copy}");
        assert!(sectors(&sandbox, copy) * 512 < 4 * MIB, "{copy} is not sparse");
    }
    mount.unmount();
}

#[test]
fn qemu_img_converts_and_sees_the_holes() {
    if !can_mount(&["qemu-img", "cmp"]) {
        return;
    }
    let (sandbox, mount, _) = sparse(&[]);
    sandbox.sh("qemu-img convert -f raw -O raw mnt/by-name/disk.img raw.img
         qemu-img convert -f raw -O qcow2 mnt/by-name/disk.img disk.qcow2
         qemu-img compare -f raw -F qcow2 disk.img disk.qcow2
         cmp raw.img disk.img");
    assert!(sectors(&sandbox, "raw.img") * 512 < 4 * MIB);

    let map = sandbox.sh("qemu-img map --output=json -f raw mnt/by-name/disk.img");
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let mut data: Vec<(u64, u64)> = Vec::new();
    let mut at = 0;
    for extent in map.as_array().unwrap() {
        let (start, len) = (extent["start"].as_u64().unwrap(), extent["length"].as_u64().unwrap());
        assert_eq!(start, at);
        at += len;
        if extent["data"] == true {
            match data.last_mut() {
                Some(last) if last.1 == start => last.1 = at,
                _ => data.push((start, at)),
            }
        }
    }
    assert_eq!(at, LEN);
    let half = MIB / 2;
    let expected = [
        (0, MIB),
        (10 * MIB, 10 * MIB + half),
        (50 * MIB - half, 50 * MIB + half),
        (96 * MIB, LEN),
    ];
    assert_eq!(data, expected);
    mount.unmount();
}

#[test]
fn an_image_can_be_mapped_into_memory() {
    if !can_mount(&["python3"]) {
        return;
    }
    let (sandbox, mount, _) = sparse(&[]);
    let script = r"
import mmap, random, sys
a, b = (open(name, 'rb') for name in sys.argv[1:])
whole = b.read()
shared = mmap.mmap(a.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
private = mmap.mmap(a.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
assert len(shared) == len(whole), (len(shared), len(whole))
rng = random.Random(1)
edges = [0, 1 << 20, (10 << 20) + 100, (50 << 20) - 1, 96 << 20, len(whole) - 1]
for at in edges + [rng.randrange(len(whole)) for _ in range(500)]:
    at = max(0, at - rng.randrange(9000))
    n = rng.randrange(20000)
    assert shared[at:at + n] == whole[at:at + n], at
    assert private[at:at + n] == whole[at:at + n], at
assert shared[:] == whole
private[5] = 255 - whole[5]
assert shared[5] == whole[5]
";
    std::fs::write(sandbox.join("map.py"), script).unwrap();
    sandbox.sh("python3 map.py mnt/by-name/disk.img disk.img");
    mount.unmount();
}

#[test]
fn eight_readers_of_one_image_fetch_each_block_once() {
    if !can_mount(&["cmp"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.image("disk.img", 24 * MIB + 1, &[(0, 24 * MIB + 1)]);
    let id = sandbox.upload("disk.img", &[]);
    let mount = sandbox.mount(&[]);
    sandbox.sh(&format!(
        "for n in 1 2 3 4 5 6 7 8; do cmp mnt/{id}.img disk.img & pids+=($!); done
         for pid in ${{pids[@]}}; do wait $pid; done"
    ));
    assert_eq!(mount.requests("get_block"), 49);
    mount.unmount();
}

#[test]
fn eight_readers_of_eight_images_with_little_memory() {
    if !can_mount(&["dd", "cmp"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    // The data is at a place of its own in each, and so differs.
    for n in 0..8 {
        let name = format!("{n}.img");
        sandbox.image(&name, 160 * MIB, &[(n * 16 * MIB + 5, 8 * MIB)]);
        sandbox.upload(&name, &["--name", &n.to_string()]);
    }
    let mount = sandbox.mount(&["--memory", "16MiB"]);
    sandbox.sh("for n in 0 1 2 3 4 5 6 7; do
           dd if=mnt/by-name/$n.img bs=1M iflag=direct status=none | cmp - $n.img & pids+=($!)
         done
         for pid in ${pids[@]}; do wait $pid; done");
    let memory = mount.metric("fspfs_memory_bytes");
    assert!((1..=16 * MIB).contains(&memory), "{memory} bytes in memory");
    assert!(mount.requests("get_block") >= 8 * 17);
    mount.unmount();
}

#[test]
fn images_may_have_any_length() {
    if !can_mount(&["cmp"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let lengths = [
        1,
        511,
        513,
        4095,
        BLOCK - 1,
        BLOCK,
        BLOCK + 1,
        MIB + 77,
        GIB - 1,
        GIB,
        GIB + 1,
        3 * GIB / 2 + 5,
    ];
    let ids = lengths.map(|len| {
        sandbox.image("x.img", len, &[(0, 1), (len.saturating_sub(9000), 9000)]);
        sandbox.upload("x.img", &[])
    });
    let mount = sandbox.mount(&[]);
    for (len, id) in lengths.into_iter().zip(ids) {
        let image = File::open(mount.image(&id)).unwrap();
        assert_eq!(image.metadata().unwrap().len(), len);
        let start = len.saturating_sub(9000);
        let expected = pattern(start, usize::try_from(len - start).unwrap());
        // More is asked for than there is.
        let mut read = vec![0; 20_000];
        assert_eq!(image.read_at(&mut read, start).unwrap(), expected.len(), "{len}");
        assert!(read[..expected.len()] == expected[..], "the end of {len} bytes");
        assert_eq!(image.read_at(&mut read, len).unwrap(), 0);
        assert_eq!(image.read_at(&mut read, len + BLOCK).unwrap(), 0);
    }
    mount.unmount();
}

#[test]
fn stat_and_df_are_honest() {
    if !can_mount(&["df"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.image("sparse.img", LEN, &DATA);
    // A block of zeros takes no room in the image.
    let file = sandbox.image("zeros.img", 4 * BLOCK, &[(0, 10)]);
    let file = File::options().write(true).open(file).unwrap();
    write_zeros(&file, BLOCK, MIB);
    write_pattern(&file, 3 * BLOCK, BLOCK);
    let full = sandbox.image("full.img", GIB, &[(0, 2 * MIB)]);
    let images = [
        (sandbox.upload("sparse.img", &[]), LEN, blocks_of(&DATA).len() as u64),
        (sandbox.upload("zeros.img", &["--full-copy"]), 4 * BLOCK, 2),
        (sandbox.upload(full.to_str().unwrap(), &[]), GIB, 4),
    ];
    let mount = sandbox.mount(&[]);
    for (id, len, blocks) in &images {
        // The same before anything is known of the blocks, and afterwards.
        for _ in 0..2 {
            let found = mount.image(id).metadata().unwrap();
            assert_eq!(found.mode(), 0o100_400);
            assert_eq!((found.uid(), found.gid(), found.nlink()), (0, 0, 1));
            assert_eq!(found.blksize(), BLOCK);
            assert_eq!(found.len(), *len);
            assert_eq!(found.blocks(), blocks * BLOCK / 512, "{id}");
            assert!(found.blocks() * 512 < *len, "programs look for holes only then");
            sandbox.sh(&format!("cp mnt/{id}.img copy.img"));
        }
    }
    let df = sandbox.sh("df -B1 --output=used,iused,source mnt | tail -n 1");
    let df: Vec<_> = df.split_whitespace().collect();
    let used: u64 = images.iter().map(|(_, _, blocks)| blocks * BLOCK).sum();
    let source = format!("file://{}", sandbox.join("store").display());
    assert_eq!(df, [&used.to_string(), "3", &source]);
    // What is free is what can be written.
    assert_ne!(sandbox.sh("df -B1 --output=avail mnt | tail -n 1").trim(), "0");
    // Nobody is alarmed.
    assert_eq!(sandbox.sh("df --output=ipcent mnt | tail -n 1").trim(), "1%");
    mount.unmount();
}

#[test]
fn every_recipe_tells_qemu_img_what_an_image_is() {
    // It would guess: an image that begins as a qcow2 file can name files of the host.
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let directories = ["docs", "scripts", "tests", "tests/support", "src/ops"];
    let files = directories.into_iter().flat_map(|name| root.join(name).read_dir().unwrap());
    let files = files.map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    let commands =
        ["convert", "map", "info", "compare", "check", "resize", "rebase", "dd", "measure"];
    let commands = commands.map(|command| format!("qemu-img {command} -"));
    let mut seen = 0;
    for path in files.chain([root.join("README.md"), root.join("CHANGELOG.md")]) {
        let text = std::fs::read_to_string(&path).unwrap();
        for line in text.lines().filter(|line| commands.iter().any(|c| line.contains(c))) {
            assert!(line.contains(" -f"), "{path:?}: {line}");
            seen += 1;
        }
    }
    assert!(seen > 8, "{seen}");
}

#[test]
fn looking_costs_no_request() {
    if !can_mount(&["find", "getfattr"]) {
        return;
    }
    let (sandbox, mount, id) = sparse(&[]);
    let asked = |mount: &Mount| mount.requests("list_blocks") + mount.requests("get_block");
    let listing = sandbox.sh("ls -lR mnt");
    assert!(listing.contains(&LEN.to_string()), "{listing}");
    let found = sandbox.sh("find mnt -type f -name 'snap-*' -size +90M; find mnt -type l");
    assert_eq!(found.lines().count(), 1 + 3, "{found}");
    sandbox
        .sh(&format!("stat -L mnt/by-name/disk.img; du mnt/{id}.img; df mnt; file=mnt/{id}.img"));
    sandbox.sh(&format!("getfattr -d mnt/{id}.img; test -r mnt/{id}.img; exec 3< mnt/{id}.img"));
    assert_eq!(asked(&mount), 0);
    // So that the test would see it.
    sandbox.sh("head -c 1 mnt/by-name/disk.img > /dev/null");
    assert_eq!(mount.requests("get_block"), 1);
    mount.unmount();
}

#[test]
fn holes_and_what_was_read_are_not_fetched() {
    if !can_mount(&["dd", "cmp"]) {
        return;
    }
    let (sandbox, mount, _) = sparse(&[]);
    for options in ["bs=1M skip=20 count=4", "bs=1M skip=60 count=4 iflag=direct"] {
        sandbox.sh(&format!(
            "dd if=mnt/by-name/disk.img {options} status=none | cmp -n 4M - /dev/zero"
        ));
    }
    assert_eq!(mount.requests("get_block"), 0);
    assert!(mount.requests("list_blocks") > 0);
    // A direct read comes to us each time, the others may come from the page cache.
    for options in ["", "", "iflag=direct"] {
        sandbox.sh(&format!(
            "dd if=mnt/by-name/disk.img bs=1M {options} status=none | cmp - disk.img"
        ));
        assert_eq!(mount.requests("get_block"), blocks_of(&DATA).len() as u64);
    }
    mount.unmount();
}
