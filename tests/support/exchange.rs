//! Snapshots that go between `fspfs` and boto3, through a service that both know.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use nix::unistd::{Whence, lseek};

use super::{BLOCK, Mount, Sandbox};

/// How many places of an image are read at random.
const READS: usize = 200;

fn list(blocks: &[u64]) -> String {
    blocks.iter().map(u64::to_string).collect::<Vec<_>>().join(",")
}

impl Sandbox {
    /// Has boto3 write these blocks of an image, in no order; the id of the snapshot.
    #[track_caller]
    pub fn boto_writes(&self, image: &Path, blocks: &[u64], parent: Option<&str>) -> String {
        let arguments = ["writes", image.to_str().unwrap(), &list(blocks), parent.unwrap_or("")];
        self.service().script("snapshots.py", &arguments).trim().to_owned()
    }

    /// Has boto3 compare a snapshot with an image: it has these blocks, with their checksums.
    #[track_caller]
    pub fn boto_reads(&self, id: &str, image: &Path, blocks: &[u64]) {
        let arguments = ["reads", id, image.to_str().unwrap(), &list(blocks)];
        self.service().script("snapshots.py", &arguments);
    }

    /// Downloads a snapshot, which must be what is in a file, large and sparse as it may be.
    #[track_caller]
    pub fn assert_downloads(&self, id: &str, file: &Path) {
        self.ok(&["download", id, "read.img"]);
        let read = self.join("read.img");
        assert!(same_data(&read, file), "{id} is not {}", file.display());
        std::fs::remove_file(read).unwrap();
    }

    /// Has boto3 ask in which blocks a child differs from its parent.
    #[track_caller]
    pub fn boto_compares(&self, parent: &str, child: &str, blocks: &[u64]) {
        self.service().script("snapshots.py", &["differ", parent, child, &list(blocks)]);
    }
}

impl Mount {
    /// The image of a snapshot is what is in a file, holes included, however it is read: here and
    /// there, so that no listing goes before, then for its holes, and by `cp`.
    #[track_caller]
    pub fn assert_shows(&self, sandbox: &Sandbox, id: &str, file: &Path, blocks: &[u64]) {
        let image = File::open(self.image(id)).unwrap();
        let expected = File::open(file).unwrap();
        let len = expected.metadata().unwrap().len();
        assert_eq!(image.metadata().unwrap().len(), len, "the length of {id}");
        // Half of the places are beside data.
        let mut random = 7_u64;
        let mut below = |end: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % end
        };
        for n in 0..READS {
            let anywhere = below(len);
            let near = blocks[usize::try_from(below(blocks.len() as u64)).unwrap()] * BLOCK;
            let near = (near + below(2 * BLOCK)).saturating_sub(BLOCK / 2);
            let at = if n % 2 == 0 { anywhere } else { near }.min(len - 1);
            let count = usize::try_from(below(3 * BLOCK).clamp(1, len - at)).unwrap();
            let (mut read, mut wanted) = (vec![0; count], vec![0; count]);
            image.read_exact_at(&mut read, at).unwrap();
            expected.read_exact_at(&mut wanted, at).unwrap();
            assert!(read == wanted, "{count} bytes at {at} of {id}");
        }
        assert_eq!(data_blocks(&image), blocks, "the data of {id}");
        let copy = sandbox.join(format!("{id}.copy"));
        sandbox.sh(&format!("cp --sparse=always mnt/{id}.img {}", copy.display()));
        assert!(same_data(&copy, file), "{id} is not {}", file.display());
        std::fs::remove_file(copy).unwrap();
    }
}

/// Whether two files are the same: where one has data, the other has it too. To read the holes of
/// both would take most of the time of the test.
pub fn same_data(a: &Path, b: &Path) -> bool {
    let [a, b] = [a, b].map(|path| File::open(path).unwrap());
    let equal = |one: &File, other: &File| {
        let mut at = 0;
        while let Ok(start) = lseek(one, at, Whence::SeekData) {
            at = lseek(one, start, Whence::SeekHole).unwrap();
            let mut ours = vec![0; usize::try_from(at - start).unwrap()];
            let mut theirs = ours.clone();
            one.read_exact_at(&mut ours, start.cast_unsigned()).unwrap();
            other.read_exact_at(&mut theirs, start.cast_unsigned()).unwrap();
            if ours != theirs {
                return false;
            }
        }
        true
    };
    a.metadata().unwrap().len() == b.metadata().unwrap().len() && equal(&a, &b) && equal(&b, &a)
}

/// The blocks of a file that are no holes.
fn data_blocks(file: &File) -> Vec<u64> {
    let mut blocks = Vec::new();
    let mut at = 0;
    while let Ok(start) = lseek(file, at, Whence::SeekData) {
        at = lseek(file, start, Whence::SeekHole).unwrap();
        let [start, end] = [start, at].map(i64::cast_unsigned);
        blocks.extend(start / BLOCK..end.div_ceil(BLOCK));
    }
    blocks
}
