//! Random operations on two stores, against a model of what each snapshot holds.
//!
//! Every sector of an image names its own number and a version, so a wrong one says where it comes from.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Output;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use proptest::prelude::*;
use serde_json::Value;
use support::serve::Server;
use support::{BLOCK, GIB, Sandbox, names, run, sector, text};

/// Runs of random operations; `FSPFS_MODEL_CASES` sets more.
const CASES: u32 = 3;

/// Operations in a run.
const STEPS: usize = 24;

const SECTOR: u64 = 512;
const SECTORS: u64 = BLOCK / SECTOR;

/// At the start, on both sides of a GiB, and on both sides of what a table of a repository covers.
const BLOCKS: [u64; 11] = [0, 1, 2, 3, 4, 5, 2047, 2048, 2049, 16383, 16384];

const LENGTHS: [u64; 9] = [
    1,
    1500,
    BLOCK - 1,
    3 * BLOCK,
    6 * BLOCK + 777,
    GIB,
    GIB + BLOCK + 5,
    8 * GIB,
    8 * GIB + BLOCK + 100_000,
];

/// What goes wrong with the second store, where it is a service.
const FAULTS: &str = "throttle=3%,error=2%,cut=1%,get.cut-body=2%,get.corrupt=1%,empty-pages=10%";

/// A change of the file that is uploaded.
#[derive(Clone, Debug)]
enum Edit {
    /// Sectors of a block, with a version that no others have.
    Write {
        block: usize,
        first: u64,
        count: u64,
    },
    /// Zeros over a block, which are no hole.
    Zeros {
        block: usize,
    },
    Hole {
        block: usize,
    },
    Resize {
        to: usize,
    },
}

/// Snapshots are chosen by a number, of which the remainder counts.
#[derive(Clone, Debug)]
enum Op {
    Upload { edits: Vec<Edit>, store: usize, full: bool, parent: Option<usize> },
    Copy { from: usize, snapshot: usize, to: usize, full: bool },
    Download { store: usize, snapshot: usize },
    Multiclone { store: usize, snapshot: usize },
    Diff { store: usize, first: usize, second: usize },
    Verify { store: usize, snapshot: usize },
    VerifyAll { store: usize },
    Delete { store: usize, snapshot: usize },
    Gc { store: usize },
}

fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let block = || 0..BLOCKS.len();
    let edit = prop_oneof![
        4 => (block(), 0..SECTORS, 1..=SECTORS)
            .prop_map(|(block, first, count)| Edit::Write { block, first, count }),
        2 => block().prop_map(|block| Edit::Zeros { block }),
        3 => block().prop_map(|block| Edit::Hole { block }),
        1 => (0..LENGTHS.len()).prop_map(|to| Edit::Resize { to }),
    ];
    proptest::collection::vec(edit, 0..6)
}

fn op() -> impl Strategy<Value = Op> {
    let (store, snapshot) = (0..2_usize, 0..64_usize);
    let one = (store.clone(), snapshot.clone());
    prop_oneof![
        8 => (edits(), store.clone(), any::<bool>(), proptest::option::weighted(0.75, snapshot.clone()))
            .prop_map(|(edits, store, full, parent)| Op::Upload { edits, store, full, parent }),
        5 => (store.clone(), snapshot.clone(), store.clone(), any::<bool>())
            .prop_map(|(from, snapshot, to, full)| Op::Copy { from, snapshot, to, full }),
        1 => one.clone().prop_map(|(store, snapshot)| Op::Download { store, snapshot }),
        1 => one.clone().prop_map(|(store, snapshot)| Op::Multiclone { store, snapshot }),
        2 => (store.clone(), snapshot.clone(), snapshot)
            .prop_map(|(store, first, second)| Op::Diff { store, first, second }),
        1 => one.clone().prop_map(|(store, snapshot)| Op::Verify { store, snapshot }),
        1 => store.clone().prop_map(|store| Op::VerifyAll { store }),
        2 => one.prop_map(|(store, snapshot)| Op::Delete { store, snapshot }),
        1 => store.prop_map(|store| Op::Gc { store }),
    ]
}

/// What an image holds: its length, and the versions of its sectors that are not zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Image {
    len: u64,
    sectors: BTreeMap<u64, u32>,
}

impl Image {
    fn block(&self, index: u64) -> Vec<(u64, u32)> {
        let sectors = self.sectors.range(index * SECTORS..(index + 1) * SECTORS);
        sectors.map(|(&number, &version)| (number, version)).collect()
    }

    /// The blocks that are not zeros.
    fn blocks(&self) -> BTreeSet<u64> {
        self.sectors.keys().map(|number| number / SECTORS).collect()
    }

    /// The bytes of a sector; the last one may be cut.
    fn sector(&self, number: u64) -> Vec<u8> {
        let len = usize::try_from((self.len - number * SECTOR).min(SECTOR)).unwrap();
        let mut bytes = self.sectors.get(&number).map_or(vec![0; 512], |&v| sector(number, v));
        bytes.truncate(len);
        bytes
    }

    #[track_caller]
    fn assert_is(&self, path: &Path) {
        let file = File::open(path).unwrap();
        assert_eq!(file.metadata().unwrap().len(), self.len, "the length of {}", path.display());
        let (mut at, mut seen) = (0, 0);
        while let Ok(start) = lseek(&file, at, Whence::SeekData) {
            at = lseek(&file, start, Whence::SeekHole).unwrap();
            let end = at.cast_unsigned();
            for number in start.cast_unsigned() / SECTOR..end.div_ceil(SECTOR) {
                let wanted = self.sector(number);
                let mut found = vec![0; wanted.len()];
                file.read_exact_at(&mut found, number * SECTOR).unwrap();
                let say = |bytes: &[u8]| {
                    String::from_utf8_lossy(&bytes[..bytes.len().min(26)]).into_owned()
                };
                assert!(
                    found == wanted,
                    "sector {number} of {} is {:?}, not {:?}",
                    path.display(),
                    say(&found),
                    say(&wanted)
                );
                seen += usize::from(self.sectors.contains_key(&number));
            }
        }
        assert_eq!(seen, self.sectors.len(), "data of {} is a hole", path.display());
    }
}

struct Store {
    url: String,
    /// Where its repository is.
    directory: &'static str,
    /// It is reached over a service, which compares only what is of one lineage.
    served: bool,
    snapshots: Vec<(String, Image)>,
}

impl Store {
    fn get(&self, snapshot: usize) -> Option<&(String, Image)> {
        self.snapshots.get(snapshot.checked_rem(self.snapshots.len())?)
    }
}

struct World {
    sandbox: Sandbox,
    stores: [Store; 2],
    /// What `disk` holds.
    image: Image,
    disk: File,
    version: u32,
    server: Option<Server>,
}

impl World {
    fn new(served: bool) -> Self {
        let sandbox = Sandbox::with_store();
        sandbox.ok(&["init", "other"]);
        let options = ["--no-auth", "--inject", FAULTS];
        let server = served.then(|| Server::of(&sandbox, "other", &options));
        let store = |url: String, directory, served| Store {
            url,
            directory,
            served,
            snapshots: Vec::new(),
        };
        let second = match &server {
            Some(server) => format!("ebs://us-east-1?endpoint={}", server.url),
            None => "other".to_owned(),
        };
        let stores = [store("store".to_owned(), "store", false), store(second, "other", served)];
        let disk = File::create_new(sandbox.join("disk")).unwrap();
        let image = Image { len: LENGTHS[4], sectors: BTreeMap::new() };
        disk.set_len(image.len).unwrap();
        let mut world = Self { sandbox, stores, image, disk, version: 0, server };
        for block in 0..BLOCKS.len() {
            world.edit(&Edit::Write { block, first: 0, count: SECTORS });
        }
        world
    }

    fn run(&self, store: usize, arguments: &[&str]) -> Output {
        let mut fspfs = self.sandbox.fspfs();
        if let Some(server) = &self.server {
            fspfs.envs(&server.environment);
        }
        run(fspfs.args(["-s", &self.stores[store].url]).args(arguments))
    }

    #[track_caller]
    fn ok(&self, store: usize, arguments: &[&str]) -> String {
        let output = self.run(store, arguments);
        assert!(output.status.success(), "{arguments:?}: {}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn edit(&mut self, edit: &Edit) {
        let within = |block: usize| {
            let start = BLOCKS[block] * BLOCK;
            let end = (start + BLOCK).min(self.image.len);
            (start < end).then_some((start, end))
        };
        match *edit {
            Edit::Write { block, first, count } => {
                let Some((start, end)) = within(block) else { return };
                self.version += 1;
                let first = start / SECTOR + first;
                let last = (first + count).min(start / SECTOR + SECTORS).min(end.div_ceil(SECTOR));
                for number in first..last {
                    self.image.sectors.insert(number, self.version);
                    let bytes = self.image.sector(number);
                    self.disk.write_all_at(&bytes, number * SECTOR).unwrap();
                }
            }
            Edit::Zeros { block } => {
                let Some((start, end)) = within(block) else { return };
                support::write_zeros(&self.disk, start, end - start);
                self.clear(start, end);
            }
            Edit::Hole { block } => {
                let Some((start, end)) = within(block) else { return };
                let how =
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let [at, len] = [start, end - start].map(u64::cast_signed);
                fallocate(&self.disk, how, at, len).unwrap();
                self.clear(start, end);
            }
            Edit::Resize { to } => {
                // What remains of a sector that was cut is zeros from here on.
                let (len, cut) = (self.image.len, self.image.len % SECTOR);
                if cut > 0 {
                    support::write_zeros(&self.disk, len - cut, cut);
                    self.image.sectors.remove(&(len / SECTOR));
                }
                self.image.len = LENGTHS[to];
                self.disk.set_len(LENGTHS[to]).unwrap();
                self.image.sectors.retain(|number, _| number * SECTOR < LENGTHS[to]);
            }
        }
    }

    fn clear(&mut self, start: u64, end: u64) {
        let cleared = start / SECTOR..end.div_ceil(SECTOR);
        self.image.sectors.retain(|number, _| !cleared.contains(number));
    }

    fn step(&mut self, op: &Op) {
        match *op {
            Op::Upload { ref edits, store, full, parent } => {
                for edit in edits {
                    self.edit(edit);
                }
                self.upload(store, full, parent);
            }
            Op::Copy { from, snapshot, to, full } => {
                let Some((id, image)) = self.stores[from].get(snapshot).cloned() else { return };
                let url = self.stores[to].url.clone();
                let elsewhere = ["--to", &url];
                let mut arguments = vec!["-q", "copy", &id];
                arguments.extend(if from == to { &[][..] } else { &elsewhere });
                arguments.extend(full.then_some("--full-copy"));
                let made = self.ok(from, &arguments).trim_end().to_owned();
                self.stores[to].snapshots.push((made, image));
            }
            Op::Download { store, snapshot } => self.assert_holds(store, snapshot),
            Op::Multiclone { store, snapshot } => {
                let Some((id, image)) = self.stores[store].get(snapshot) else { return };
                self.ok(store, &["multiclone", id, "1.img", "2.img", "3.img"]);
                for file in ["1.img", "2.img", "3.img"] {
                    image.assert_is(&self.sandbox.join(file));
                }
            }
            Op::Diff { store, first, second } => self.diff(store, first, second),
            Op::Verify { store, snapshot } => {
                let Some((id, image)) = self.stores[store].get(snapshot) else { return };
                let output = self.run(store, &["verify", id, "--against", "disk"]);
                let code = i32::from(*image != self.image);
                assert_eq!(output.status.code(), Some(code), "{}", text(&output));
            }
            Op::VerifyAll { store } => {
                let said = self.ok(store, &["verify"]);
                assert!(said.contains("Everything is intact"), "{said}");
            }
            Op::Delete { store, snapshot } => {
                let Some((id, _)) = self.stores[store].get(snapshot).cloned() else { return };
                assert_eq!(self.ok(store, &["delete", "--yes", &id]).trim_end(), id);
                self.stores[store].snapshots.retain(|(kept, _)| *kept != id);
            }
            Op::Gc { store } => self.gc(store),
        }
        self.assert_nothing_else();
    }

    fn upload(&mut self, store: usize, full: bool, parent: Option<usize>) {
        let parent = parent.and_then(|parent| self.stores[store].get(parent));
        let mut arguments = vec!["-q", "upload", "disk"];
        arguments.extend(full.then_some("--full-copy"));
        arguments.extend(parent.iter().flat_map(|(id, _)| ["--parent-snapshot-id", &id[..]]));
        let id = self.ok(store, &arguments).trim_end().to_owned();
        self.stores[store].snapshots.push((id, self.image.clone()));
    }

    fn diff(&self, store: usize, first: usize, second: usize) {
        let place = &self.stores[store];
        let (Some((one, before)), Some((two, after))) = (place.get(first), place.get(second))
        else {
            return;
        };
        let output = self.run(store, &["diff", "--extents", "--json", one, two]);
        let said = text(&output);
        if place.served && said.contains("not of one lineage") {
            return;
        }
        assert!(output.status.success(), "{said}");
        let printed = String::from_utf8(output.stdout).unwrap();
        let values = serde_json::Deserializer::from_str(&printed).into_iter::<Value>();
        let mut values: Vec<Value> = values.map(Result::unwrap).collect();
        let summary = values.pop().unwrap();
        let mut found = BTreeMap::new();
        for extent in &values {
            let [at, len] = ["offset", "length"].map(|field| extent[field].as_u64().unwrap());
            for index in at / BLOCK..(at + len) / BLOCK {
                assert!(found.insert(index, &extent["kind"]).is_none(), "block {index}: {printed}");
            }
        }
        let blocks: BTreeSet<_> = before.blocks().union(&after.blocks()).copied().collect();
        let differ = blocks.into_iter().filter(|&index| {
            // What is behind the end of one of them is zeros there.
            bytes_of(before, index) != bytes_of(after, index)
        });
        let differ: Vec<_> = differ.collect();
        assert_eq!(found.keys().copied().collect::<Vec<_>>(), differ, "{one} {two}: {printed}");
        assert_eq!(summary["blocks"], differ.len());
        for (index, kind) in found {
            let (was, is) = (before.block(index), after.block(index));
            let fits = match kind.as_str().unwrap() {
                "added" => was.is_empty(),
                "dropped" => is.is_empty(),
                _ => true,
            };
            assert!(fits, "block {index} of {two} over {one}: {kind}");
        }
    }

    /// A collection that may remove whatever nothing needs.
    fn gc(&self, store: usize) {
        let directory = self.stores[store].directory;
        let list = format!("cd {directory}; find packs pages -type f 2>/dev/null || true");
        let objects = self.sandbox.sh(&list);
        let objects: Vec<_> = objects.lines().map(str::to_owned).collect();
        support::old_record(&self.sandbox.join(directory), &objects);
        self.sandbox.ok(&["-s", directory, "gc", "--grace", "1h"]);
    }

    #[track_caller]
    fn assert_holds(&self, store: usize, snapshot: usize) {
        let Some((id, image)) = self.stores[store].get(snapshot) else { return };
        self.ok(store, &["download", id, "out.img"]);
        image.assert_is(&self.sandbox.join("out.img"));
    }

    /// The stores have those snapshots that they should have, and transfers have left nothing behind.
    #[track_caller]
    fn assert_nothing_else(&self) {
        for (n, store) in self.stores.iter().enumerate() {
            let listed: Vec<Value> =
                serde_json::from_str(&self.ok(n, &["list", "--json"])).unwrap();
            let state = |found: &Value| {
                [&found["id"], &found["state"]].map(|v| v.as_str().unwrap().to_owned())
            };
            let found: BTreeSet<_> = listed.iter().map(state).collect();
            let wanted = store.snapshots.iter().map(|(id, _)| [id.clone(), "completed".to_owned()]);
            assert_eq!(found, wanted.collect(), "in {}", store.url);
        }
        let left = names(&self.sandbox.path);
        assert!(left.iter().all(|name| !name.starts_with('.')), "{left:?}");
        let journals = self.sandbox.join("state/fspfs/transfers");
        assert!(!journals.exists() || names(journals).is_empty(), "a journal is left");
    }
}

/// A block, as it is compared.
fn bytes_of(image: &Image, index: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::new();
    for number in image.block(index).iter().map(|(number, _)| *number) {
        bytes.extend(number.to_le_bytes());
        bytes.extend(image.sector(number));
    }
    bytes
}

fn holds(steps: &[Op], served: bool) {
    let mut world = World::new(served);
    for op in steps {
        world.step(op);
    }
    for store in [0, 1] {
        for snapshot in 0..world.stores[store].snapshots.len() {
            world.assert_holds(store, snapshot);
        }
        world.step(&Op::VerifyAll { store });
    }
}

fn config() -> ProptestConfig {
    let cases = std::env::var("FSPFS_MODEL_CASES").ok().and_then(|n| n.parse().ok());
    ProptestConfig {
        cases: cases.unwrap_or(CASES),
        failure_persistence: None,
        max_shrink_iters: 10,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn two_repositories_hold_what_was_put(steps in proptest::collection::vec(op(), STEPS)) {
        holds(&steps, false);
    }

    #[test]
    fn a_repository_and_a_service_hold_what_was_put(steps in proptest::collection::vec(op(), STEPS)) {
        holds(&steps, true);
    }
}
