//! Synthetic stores, on the command line and mounted.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::process::Command;

use fspfs::model::{BLOCK_SIZE, BlockIndex};
use fspfs::store::{ListFrom, SnapshotStore as _, synth::Synth};
use support::{BLOCK, GIB, Mount, Sandbox, can_mount, errno, names, run, text};

const TIB: u64 = 1024 * GIB;

/// A store of which everything can be read in a test.
const SPARSE: &str = "synth:?size=3GiB&density=0.01&zeros=0.2&versions=3&changed=9";

/// The program with a synthetic store.
fn fspfs(sandbox: &Sandbox, store: &str) -> Command {
    let mut command = sandbox.fspfs();
    command.env("FSPFS_STORE", store);
    command
}

fn ok(sandbox: &Sandbox, store: &str, arguments: &[&str]) -> String {
    let output = run(fspfs(sandbox, store).args(arguments));
    assert!(output.status.success(), "{arguments:?}: {}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// What a block of data begins with.
fn beginning(index: u64, version: u32, family: u32) -> Vec<u8> {
    let parts = [&index.to_le_bytes()[..], &version.to_le_bytes(), &family.to_le_bytes()];
    parts.concat()
}

#[test]
fn snapshots_are_listed_by_age_and_counted() {
    let sandbox = Sandbox::new();
    let listed = ok(&sandbox, "synth:?versions=3", &["list"]);
    let ids: Vec<_> = listed.lines().skip(1).map(|line| &line[..22]).collect();
    let versions = [1, 2, 3].map(|version| format!("snap-00000000{:04x}{version:05x}", 1));
    assert_eq!(ids, versions, "{listed}");
    assert!(listed.contains("synth-3"), "{listed}");
    // Without a scan where nothing is left out, and with one where something is.
    let full = "synth:?size=64TiB";
    let said = ok(&sandbox, full, &["list", "snap-00000000000100001"]);
    assert!(said.contains("contains 134217728 chunks"), "{said}");
    let said = ok(&sandbox, "synth:?size=1TiB&density=0.001", &["list", "snap-00000000000100001"]);
    let chunks: u64 = said.split_whitespace().nth(3).unwrap().parse().unwrap();
    assert!((1900..2300).contains(&chunks), "{said}");
}

#[test]
fn a_snapshot_is_downloaded_as_the_store_computes_it() {
    let sandbox = Sandbox::new();
    let id = "snap-00000000000100003";
    ok(&sandbox, SPARSE, &["download", id, "disk.img"]);
    let file = File::open(sandbox.join("disk.img")).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 3 * GIB);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let data = runtime.block_on(async {
        let store = Synth::new(SPARSE.parse().unwrap());
        let id = id.parse().unwrap();
        let from = ListFrom::Index(BlockIndex::ZERO);
        let page = store.list_blocks(&id, from, 10_000).await.unwrap();
        assert!(page.next.is_none());
        let mut data = 0;
        for listed in page.blocks {
            let block = store.get_block(&id, listed.index, &listed.token).await.unwrap();
            let mut read = vec![0; BLOCK_SIZE];
            file.read_exact_at(&mut read, listed.index.offset()).unwrap();
            assert!(read[..] == block.bytes()[..], "block {}", listed.index);
            data += u64::from(!block.is_zero());
        }
        data
    });
    // What is not listed is a hole, but for what the file system notes for itself.
    let taken = file.metadata().unwrap().blocks() * 512;
    assert!(
        (data * BLOCK..data * BLOCK + BLOCK).contains(&taken),
        "{data} blocks in {taken} bytes"
    );
}

#[test]
fn what_needs_a_repository_says_so() {
    let sandbox = Sandbox::new();
    std::fs::write(sandbox.join("a.img"), "x").unwrap();
    for (command, says) in [
        (&["init"][..], "no repository"),
        (&["gc"], "no repository"),
        (&["upload", "a.img"], "can only be read"),
        (&["delete", "--yes", "snap-00000000000100001"], "can only be read"),
        (&["download", "snap-00000000000100009", "b.img"], "there is no snapshot"),
    ] {
        let output = run(fspfs(&sandbox, "synth:?seed=0").args(command));
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{command:?}: {message}");
        assert!(message.contains("synth:") && message.contains(says), "{command:?}: {message}");
        let cure = says == "there is no snapshot" || message.contains("/srv/snaps");
        assert!(cure, "{command:?}: {message}");
    }
    assert!(!sandbox.join("b.img").exists() && !sandbox.join("synth:").exists());
}

#[test]
fn a_url_that_is_wrong_is_wrong_usage() {
    let sandbox = Sandbox::new();
    for store in ["synth:?size=big", "synth:?colour=red", "synth:16TiB", "synth:?density=0"] {
        let output = run(fspfs(&sandbox, store).arg("list"));
        assert_eq!(output.status.code(), Some(2), "{}", text(&output));
        let message = text(&output);
        assert!(message.contains(store) && message.contains("synth:?size=16TiB&"), "{message}");
    }
}

#[test]
fn a_snapshot_of_16_tib_is_mounted_and_read_anywhere() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::new();
    let store = "synth:?size=16TiB&versions=2&changed=1";
    let mount = Mount::new(&sandbox, fspfs(&sandbox, store), &[]);
    // The one block that the second version changes, as docs/synth.md says.
    let blocks = 16 * TIB / BLOCK;
    let changed = 2_654_435_761 % blocks;
    for version in [1, 2] {
        let image = File::open(mount.image(&format!("snap-000000000001{version:05x}"))).unwrap();
        let found = image.metadata().unwrap();
        assert_eq!(found.len(), 16 * TIB);
        assert_eq!(found.blocks(), 16 * TIB / 512);
        let mut byte = [9];
        image.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [0]);
        for index in [0, 1, blocks / 2, changed, blocks - 1] {
            let last = if index == changed { version } else { 1 };
            let mut read = [0; 16];
            image.read_exact_at(&mut read, index * BLOCK).unwrap();
            assert_eq!(read[..], beginning(index, last, 1), "block {index} of version {version}");
        }
        let mut end = [0; 20];
        assert_eq!(image.read_at(&mut end, 16 * TIB - 7).unwrap(), 7);
        assert_eq!(image.read_at(&mut end, 16 * TIB).unwrap(), 0);
    }
    // Nothing was listed but what was around the reads.
    let listed = mount.requests("list_blocks");
    assert!(listed <= 2 * 8, "{listed} pages were listed");
    assert_eq!(names(mount.join("by-name")), ["synth-1.img", "synth-2.img"]);
    mount.unmount();
    sandbox.assert_nothing_is_left();
}

#[test]
fn nothing_can_be_written_through_a_mount() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::new();
    let mount = Mount::new(&sandbox, fspfs(&sandbox, SPARSE), &[]);
    let refused = errno(std::fs::write(mount.join("new/a.img"), "x"));
    assert_eq!(refused, nix::libc::EROFS);
    let log = mount.unmount();
    assert!(log.contains("synth:") && log.contains("can only be read"), "{log}");
    sandbox.assert_nothing_is_left();
}
