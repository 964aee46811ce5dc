//! An `ebs:` store and boto3, over one `fspfs serve`: what either writes the other reads.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

use support::serve::has_clients;
use support::{BLOCK, GIB, MIB, Sandbox, blocks_of, can_mount};

/// Runs of data of an image that ends in the middle of a block.
const RUNS: [(u64, u64); 4] =
    [(0, MIB), (3 * MIB + 77, 5), (5 * MIB, 2 * MIB + 100), (9 * MIB, 1234)];
const LENGTH: u64 = 9 * MIB + 1234;

/// A block that has data, and one that is a hole, of which a child has other content.
const CHANGED: [u64; 2] = [1, 8];

fn served() -> Sandbox {
    let mut sandbox = Sandbox::with_store();
    sandbox.serve(&[]);
    sandbox
}

/// Changes a file in the blocks `CHANGED`.
fn change(file: &File) {
    for block in CHANGED {
        file.write_all_at(b"changed", block * BLOCK + 300).unwrap();
    }
}

/// The blocks of an image that was changed.
fn with_changes(blocks: &[u64]) -> Vec<u64> {
    let all = blocks.iter().chain(&CHANGED).copied();
    all.collect::<BTreeSet<_>>().into_iter().collect()
}

#[test]
fn what_boto_wrote_is_downloaded_and_mounted() {
    if !has_clients() || !can_mount(&["cp"]) {
        return;
    }
    let sandbox = served();
    // Both ends of a volume, single blocks, and more in a row than the least that a page has.
    let runs = [(0, 3 * BLOCK), (700 * BLOCK, 130 * BLOCK), (3 * GIB - BLOCK, BLOCK)];
    let image = sandbox.image("disk.img", 3 * GIB, &runs);
    let blocks = blocks_of(&runs);
    let id = sandbox.boto_writes(&image, &blocks, None);
    let changed = sandbox.image("child.img", 3 * GIB, &runs);
    change(&File::options().write(true).open(&changed).unwrap());
    let child = sandbox.boto_writes(&changed, &CHANGED, Some(&id));
    let of_child = with_changes(&blocks);
    let described = sandbox.described(&child);
    assert_eq!(described["tags"]["role"], "boto");
    assert_eq!(described["description"], "of boto3");
    let mount = sandbox.mount(&["--filter", "tag:role=boto"]);
    mount.assert_shows(&sandbox, &id, &image, &blocks);
    mount.assert_shows(&sandbox, &child, &changed, &of_child);
    // Both have the name: it is the later one's.
    let link = std::fs::read_link(mount.join("by-name/by boto.img")).unwrap();
    assert_eq!(link.to_str().unwrap(), format!("../{child}.img"));
    mount.unmount();
    sandbox.assert_downloads(&id, &image);
    sandbox.assert_downloads(&child, &changed);
    sandbox.assert_nothing_is_left();
}

#[test]
fn what_is_uploaded_is_read_by_boto() {
    if !has_clients() {
        return;
    }
    let sandbox = served();
    let image = sandbox.image("disk.img", LENGTH, &RUNS);
    let blocks = blocks_of(&RUNS);
    let id = sandbox.upload("disk.img", &[]);
    sandbox.boto_reads(&id, &image, &blocks);
    let changed = sandbox.image("child.img", LENGTH, &RUNS);
    change(&File::options().write(true).open(&changed).unwrap());
    let child = sandbox.upload("child.img", &["--parent-snapshot-id", &id]);
    sandbox.boto_reads(&child, &changed, &with_changes(&blocks));
    sandbox.boto_compares(&id, &child, &CHANGED);
    // One by boto3 of one by us, and the other way round.
    let other = sandbox.boto_writes(&changed, &CHANGED, Some(&id));
    sandbox.boto_compares(&id, &other, &CHANGED);
    let back = sandbox.upload("disk.img", &["--parent-snapshot-id", &other]);
    sandbox.boto_compares(&other, &back, &CHANGED);
}

#[test]
fn what_is_written_under_new_is_read_by_boto() {
    if !has_clients() || !can_mount(&["cp"]) {
        return;
    }
    let sandbox = served();
    let image = sandbox.image("disk.img", LENGTH, &RUNS);
    let blocks = blocks_of(&RUNS);
    let mount = sandbox.mount(&[]);
    sandbox.sh("cp disk.img mnt/new/web.img");
    let id = mount.committed("web.img");
    sandbox.boto_reads(&id, &image, &blocks);
    // A change of it is a child, also for others.
    let changed = sandbox.image("child.img", LENGTH, &RUNS);
    for file in [&changed, &mount.new_file("web.img")] {
        change(&File::options().write(true).open(file).unwrap());
    }
    let child = mount.committed("web.img");
    assert_eq!(sandbox.parent_of(&child), Some(id.clone()));
    assert_eq!(mount.put(), (blocks.len() + CHANGED.len()) as u64);
    sandbox.boto_reads(&child, &changed, &with_changes(&blocks));
    sandbox.boto_compares(&id, &child, &CHANGED);
    mount.unmount();
    sandbox.assert_nothing_is_left();
}
