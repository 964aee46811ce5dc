//! `SEEK_DATA` and `SEEK_HOLE` on images.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use support::{BLOCK, GIB, MIB, Sandbox, blocks_of, can_mount, write_zeros};

/// An image of `len` bytes of which these blocks hold data.
struct Layout {
    len: u64,
    data: Vec<u64>,
}

impl Layout {
    fn is_data(&self, offset: u64) -> bool {
        self.data.binary_search(&(offset / BLOCK)).is_ok()
    }

    fn seek(&self, offset: u64, data: bool) -> Result<u64, Errno> {
        if offset >= self.len {
            return Err(Errno::ENXIO);
        }
        let mut at = offset;
        while at < self.len {
            if self.is_data(at) == data {
                return Ok(at);
            }
            at = (at / BLOCK + 1) * BLOCK;
        }
        if data { Err(Errno::ENXIO) } else { Ok(self.len) }
    }

    /// Offsets at which something changes, and those beside them.
    fn edges(&self) -> Vec<u64> {
        let edges = self.data.iter().flat_map(|block| [block * BLOCK, (block + 1) * BLOCK]);
        let edges = edges.chain([0, 1, self.len - 1, self.len, self.len + 1, self.len + 3 * GIB]);
        let beside = edges.flat_map(|at| [at.saturating_sub(1), at, at + 1, at + BLOCK / 2]);
        beside.collect()
    }
}

fn seek(file: &File, offset: u64, data: bool) -> Result<u64, Errno> {
    let whence = if data { Whence::SeekData } else { Whence::SeekHole };
    lseek(file, offset.try_into().unwrap(), whence).map(|at| at.try_into().unwrap())
}

fn random(seed: u64) -> impl Iterator<Item = u64> {
    std::iter::successors(Some(seed), |x| {
        let x = x ^ (x << 13);
        let x = x ^ (x >> 7);
        Some(x ^ (x << 17))
    })
}

#[test]
fn every_edge_is_where_it_belongs() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let cases: [(u64, &[(u64, u64)]); 6] = [
        // A block at both ends, runs of one and of several blocks, a tail.
        (GIB + 777, &[(0, 1), (MIB + 9, 1), (4 * MIB, 3 * MIB), (900 * MIB, BLOCK), (GIB, 777)]),
        // Begins and ends with a hole.
        (100 * MIB, &[(MIB, BLOCK)]),
        // Nothing but a hole.
        (5 * MIB, &[]),
        // No hole at all, and a length that is no whole number of blocks.
        (MIB + 1, &[(0, MIB + 1)]),
        // Less than a block.
        (100, &[(0, 100)]),
        // Spread wider than one listing.
        (30 * GIB, &[(3 * GIB - 1, 2), (17 * GIB, MIB), (30 * GIB - 1, 1)]),
    ];
    let cases = cases.map(|(len, data)| {
        sandbox.image("x.img", len, data);
        (sandbox.upload("x.img", &[]), Layout { len, data: blocks_of(data) })
    });
    for known in [false, true] {
        let mount = sandbox.mount(&[]);
        for (id, layout) in &cases {
            let file = File::open(mount.image(id)).unwrap();
            if known {
                for at in (0..layout.len / GIB).map(|n| n * GIB) {
                    file.read_at(&mut [0], at).unwrap();
                }
            }
            for at in layout.edges() {
                for data in [true, false] {
                    let what = format!("data: {data}, from {at} of {}", layout.len);
                    assert_eq!(seek(&file, at, data), layout.seek(at, data), "{what}");
                }
            }
        }
        assert!(mount.requests("list_blocks") > 0);
        mount.unmount();
    }
}

#[test]
fn blocks_of_zeros_are_holes() {
    // EBS does not tell what a block is before it is read.
    if !can_mount(&[]) || support::over_ebs() {
        return;
    }
    let sandbox = Sandbox::with_store();
    let path = sandbox.image("x.img", 16 * BLOCK, &[(0, 2 * BLOCK), (9 * BLOCK, BLOCK)]);
    let file = File::options().write(true).open(path).unwrap();
    write_zeros(&file, 4 * BLOCK, 4 * BLOCK);
    write_zeros(&file, 15 * BLOCK, BLOCK);
    let id = sandbox.upload("x.img", &["--full-copy"]);
    assert!(sandbox.ok(&["list", &id]).contains(" 8 chunks "));
    let mount = sandbox.mount(&[]);
    let layout = Layout { len: 16 * BLOCK, data: vec![0, 1, 9] };
    let file = File::open(mount.image(&id)).unwrap();
    for at in layout.edges() {
        for data in [true, false] {
            assert_eq!(seek(&file, at, data), layout.seek(at, data), "data: {data}, from {at}");
        }
    }
    drop(file);
    // Telling took no block.
    assert_eq!(mount.requests("get_block"), 0);
    mount.unmount();
}

#[test]
fn random_probes_agree_with_the_layout() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let len = 3 * GIB + 4097;
    let runs: Vec<_> = random(7).take(120).map(|x| (x % len, 1 + (x >> 40) % BLOCK)).collect();
    sandbox.image("x.img", len, &runs);
    let id = sandbox.upload("x.img", &[]);
    let mount = sandbox.mount(&[]);
    let within: Vec<_> = runs.iter().map(|&(at, n)| (at, n.min(len - at))).collect();
    let layout = Layout { len, data: blocks_of(&within) };
    let file = File::open(mount.image(&id)).unwrap();
    for (n, at) in random(99).take(4000).map(|x| x % (len + MIB)).enumerate() {
        let data = n % 2 == 0;
        assert_eq!(seek(&file, at, data), layout.seek(at, data), "data: {data}, from {at}");
    }
    drop(file);
    mount.unmount();
}
