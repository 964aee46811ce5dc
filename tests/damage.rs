//! Damage to everything that a repository has on disk: it is named, it costs what it must and no
//! more, and nobody ever reads wrong bytes or zeros in its place.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use fspfs::model::Digest;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use rstest::rstest;
use support::{BLOCK, GIB, MIB, Sandbox, can_mount, errno, pattern, run, text};

/// Length of the larger image: its last page is behind a span of 8 GiB that is a hole.
const LEN: u64 = 24 * GIB + 5000;

/// Its data, in blocks.
const DATA: [u64; 8] = [0, 1, 2, 7, 18_432, 18_433, 20_000, 49_152];

/// Two snapshots that share nothing, and a child of the first that shares nearly all.
struct Damaged {
    sandbox: Sandbox,
    one: String,
    child: String,
    two: String,
}

fn kib(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap()
}

impl Damaged {
    fn new() -> Self {
        let sandbox = Sandbox::with_store();
        let runs = DATA.map(|index| (index * BLOCK, BLOCK));
        sandbox.image("one.img", LEN, &runs);
        let one = sandbox.upload("one.img", &["--name", "one"]);
        sandbox.image("two.img", 20 * MIB - 5, &[(12 * MIB, 2 * MIB)]);
        let two = sandbox.upload("two.img", &["--name", "two"]);
        let file = std::fs::File::options().write(true).open(sandbox.join("one.img")).unwrap();
        file.write_all_at(b"child", 9 * BLOCK).unwrap();
        let child = sandbox.upload("one.img", &["--parent-snapshot-id", &one, "--name", "child"]);
        Self { sandbox, one, child, two }
    }

    fn store(&self) -> PathBuf {
        self.sandbox.join("store")
    }

    /// All files below a directory of the store, sorted.
    fn files(&self, below: &str) -> Vec<PathBuf> {
        fn walk(at: &Path, files: &mut Vec<PathBuf>) {
            for entry in std::fs::read_dir(at).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { walk(&path, files) } else { files.push(path) }
            }
        }
        let mut files = Vec::new();
        walk(&self.store().join(below), &mut files);
        files.sort();
        files
    }

    /// The manifest of a snapshot.
    fn manifest(&self, id: &str) -> PathBuf {
        self.store().join(format!("snapshots/{id}.json"))
    }

    fn tags(&self, id: &str) -> PathBuf {
        self.files("tags").into_iter().find(|path| path.to_str().unwrap().contains(id)).unwrap()
    }

    /// The page list of a snapshot, as its manifest names it.
    fn page_list(&self, id: &str) -> PathBuf {
        let manifest = std::fs::read_to_string(self.manifest(id)).unwrap();
        let manifest: serde_json::Value =
            serde_json::from_str(manifest.lines().next().unwrap()).unwrap();
        self.object("pages", manifest["pages"].as_str().unwrap())
    }

    fn object(&self, kind: &str, id: &str) -> PathBuf {
        self.store().join(kind).join(&id[..2]).join(id)
    }

    /// The pages of a snapshot, as its page list names them, by their span.
    fn pages(&self, id: &str) -> BTreeMap<u32, PathBuf> {
        let list = std::fs::read(self.page_list(id)).unwrap();
        let entry = |entry: &[u8]| {
            let span = u32::from_le_bytes(entry[..4].try_into().unwrap());
            (span, self.object("pages", &object_id(&entry[4..52])))
        };
        list[12..].chunks_exact(4 + 48 + 32 + 8).map(entry).collect()
    }

    /// The packs that a page names.
    fn packs_of(&self, page: &Path) -> Vec<PathBuf> {
        let page = std::fs::read(page).unwrap();
        let count = u32::from_le_bytes(page[8..12].try_into().unwrap()) as usize;
        let packs = page[16..].chunks_exact(48).take(count);
        packs.map(|id| self.object("packs", &object_id(id))).collect()
    }

    /// The one pack with the data of a snapshot.
    fn pack(&self, id: &str) -> PathBuf {
        let packs: Vec<_> = self.pages(id).values().flat_map(|page| self.packs_of(page)).collect();
        assert!(packs.iter().all(|pack| *pack == packs[0]), "more than one pack");
        packs[0].clone()
    }

    fn path(&self, kind: Kind, id: &str) -> PathBuf {
        match kind {
            Kind::Pack => self.pack(id),
            Kind::FirstPage => self.pages(id).pop_first().unwrap().1,
            Kind::PageList => self.page_list(id),
            Kind::Manifest => self.manifest(id),
            Kind::Tags => self.tags(id),
            Kind::Info => self.store().join("fspfs.json"),
        }
    }

    fn download(&self, id: &str) -> std::process::Output {
        run(self.sandbox.fspfs().args(["download", id, "out.img"]))
    }

    /// The state of each snapshot in the list, by id.
    fn states(&self) -> BTreeMap<String, String> {
        let list = self.sandbox.ok(&["list", "--json"]);
        let list: Vec<serde_json::Value> = serde_json::from_str(&list).unwrap();
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        list.iter().map(|s| (text(&s["id"]), text(&s["state"]))).collect()
    }

    /// Downloads what must be intact, and compares it.
    fn two_is_intact(&self) {
        self.sandbox.ok(&["download", &self.two, "two.out"]);
        assert!(support::same(self.sandbox.join("two.img"), self.sandbox.join("two.out")));
        std::fs::remove_file(self.sandbox.join("two.out")).unwrap();
    }

    /// The frames of a pack: offset, length, digest.
    fn frames(pack: &[u8]) -> Vec<(usize, usize, Digest)> {
        let u32_at = |at: usize| u32::from_le_bytes(pack[at..at + 4].try_into().unwrap()) as usize;
        let table = pack.len() - u32_at(pack.len() - 4) + 16;
        let entries = pack[table..pack.len() - 4].chunks_exact(40);
        let entry = |(n, bytes): (usize, &[u8])| {
            let at = table + n * 40;
            (u32_at(at), u32_at(at + 4), Digest(bytes[8..].try_into().unwrap()))
        };
        entries.enumerate().map(entry).collect()
    }
}

fn object_id(bytes: &[u8]) -> String {
    let (digest, writer) = bytes.split_at(32);
    let writer = u128::from_be_bytes(writer.try_into().unwrap());
    format!("{}.{writer:032x}", Digest(digest.try_into().unwrap()))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Pack,
    FirstPage,
    PageList,
    Manifest,
    Tags,
    Info,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Damage {
    Empty,
    Half,
    FlipFirst,
    FlipMiddle,
    FlipLast,
    Delete,
    Swap,
    /// Something else has its name.
    Directory,
    Pipe,
    LinkToNowhere,
    /// More than there is memory for.
    Huge,
}

impl Damage {
    fn inflict(self, path: &Path, other: &Path) {
        let mut bytes = std::fs::read(path).unwrap();
        let len = bytes.len();
        match self {
            Self::Empty => bytes.clear(),
            Self::Half => bytes.truncate(len / 2),
            Self::FlipFirst => bytes[0] ^= 1,
            Self::FlipMiddle => bytes[len / 2] ^= 0x10,
            Self::FlipLast => bytes[len - 1] ^= 0x80,
            Self::Delete => return std::fs::remove_file(path).unwrap(),
            Self::Directory => {
                std::fs::remove_file(path).unwrap();
                return std::fs::create_dir(path).unwrap();
            }
            Self::Pipe => {
                std::fs::remove_file(path).unwrap();
                return mkfifo(path, Mode::S_IRUSR).unwrap();
            }
            Self::LinkToNowhere => {
                std::fs::remove_file(path).unwrap();
                return std::os::unix::fs::symlink("nowhere/at/all", path).unwrap();
            }
            Self::Huge => {
                let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
                return file.set_len(1 << 40).unwrap();
            }
            Self::Swap => {
                std::fs::write(path, std::fs::read(other).unwrap()).unwrap();
                return std::fs::write(other, bytes).unwrap();
            }
        }
        std::fs::write(path, bytes).unwrap();
    }
}

/// Puts a file back in its place, whatever is there.
fn mend(path: &Path, good: &[u8]) {
    match path.symlink_metadata() {
        Ok(found) if found.is_dir() => std::fs::remove_dir(path).unwrap(),
        Ok(_) => std::fs::remove_file(path).unwrap(),
        Err(_) => {}
    }
    std::fs::write(path, good).unwrap();
}

/// What is written once more is not kept as what is lost.
#[test]
fn good_data_over_a_lost_block_is_kept() {
    if !support::can_mount(&["dd"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.random("x.img", 4 * MIB);
    let id = sandbox.upload("x.img", &[]);
    let damaged = Damaged { sandbox, one: id.clone(), child: id.clone(), two: id.clone() };
    let pack = damaged.pack(&id);
    let mut bytes = std::fs::read(&pack).unwrap();
    bytes[1000] ^= 1;
    std::fs::write(&pack, bytes).unwrap();
    let Damaged { sandbox, .. } = &damaged;
    let mount = sandbox.mount(&[]);
    sandbox.ok(&["clone", &id, "mnt/new/y.img"]);
    // Blocks are in a pack in the order in which they came, and no other.
    let lost: Vec<u32> = (0..8)
        .filter(|block| {
            let read = format!(
                "dd status=none if=mnt/new/y.img of=/dev/null bs=512K skip={block} count=1"
            );
            !sandbox.try_sh(&read).status.success()
        })
        .collect();
    let [lost] = lost[..] else { panic!("one block was damaged, not {lost:?}") };
    sandbox.sh(&format!(
        "dd status=none if=x.img of=mnt/new/y.img bs=512K skip={lost} seek={lost} count=1 conv=notrunc,fsync"
    ));
    let child = mount.committed("y.img");
    sandbox.sh("cmp x.img mnt/new/y.img");
    mount.unmount();
    sandbox.assert_holds(&child, "x.img");
}

#[rstest]
fn damage_is_named_and_nothing_else_suffers(
    #[values(Kind::Pack, Kind::FirstPage, Kind::PageList, Kind::Manifest, Kind::Tags)] kind: Kind,
    #[values(
        Damage::Empty,
        Damage::Half,
        Damage::FlipFirst,
        Damage::FlipMiddle,
        Damage::FlipLast,
        Damage::Delete,
        Damage::Swap,
        Damage::Directory,
        Damage::Pipe,
        Damage::LinkToNowhere,
        Damage::Huge
    )]
    damage: Damage,
) {
    // A manifest does not say that there was a set of tags, which come later.
    if kind == Kind::Tags && damage == Damage::Delete {
        return;
    }
    let damaged = Damaged::new();
    let Damaged { sandbox, one, child, two } = &damaged;
    let (path, other) = (damaged.path(kind, one), damaged.path(kind, two));
    assert_ne!(path, other);
    damage.inflict(&path, &other);
    let name = path.strip_prefix(damaged.store()).unwrap().to_str().unwrap().to_owned();
    let swapped = damage == Damage::Swap;

    // Of a manifest that is gone nobody knows; what else is gone is missed.
    let unknown = kind == Kind::Manifest && damage == Damage::Delete;
    // The frames of a pack are found without its table, which is at its end.
    let table_only = kind == Kind::Pack && matches!(damage, Damage::FlipLast | Damage::Huge);
    // Of tags that are gone with the length in them it is said that they are.
    let readable = table_only || kind == Kind::Tags;
    let output = damaged.download(one);
    if readable {
        assert!(output.status.success(), "{}", text(&output));
        if kind == Kind::Tags {
            assert!(text(&output).contains(&name), "{}", text(&output));
            assert_eq!(sandbox.join("out.img").metadata().unwrap().len(), 25 * GIB);
        }
        sandbox.sh("cmp -n 4194304 one.img out.img && rm out.img");
    } else {
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        let message = text(&output);
        if unknown {
            assert!(message.contains(&format!("there is no snapshot {one}")), "{message}");
        } else {
            assert!(message.contains(&name) && message.contains(one), "{message}");
        }
        assert!(!sandbox.join("out.img").exists(), "half a download is left");
    }

    let states = damaged.states();
    let state = |id: &str| states.get(id).map(String::as_str);
    let listed = kind == Kind::Manifest;
    match (unknown, listed) {
        (true, _) => assert_eq!(state(one), None),
        (_, true) => assert_eq!(state(one), Some("error")),
        _ => assert_eq!(state(one), Some("completed")),
    }
    assert_eq!(state(child), Some("completed"));
    assert_eq!(state(two), Some(if swapped && listed { "error" } else { "completed" }));
    let table = sandbox.ok(&["list"]);
    if matches!(kind, Kind::Manifest | Kind::Tags) && !unknown {
        let line = table.lines().find(|line| line.starts_with(one)).unwrap();
        assert_eq!(line.contains(" error "), listed, "{table}");
        assert!(line.contains(&name), "{table}");
    }
    if !swapped {
        damaged.two_is_intact();
    }

    let output = run(sandbox.fspfs().args(["verify", "--json"]));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let damage = report["damage"].as_array().unwrap();
    if unknown {
        assert!(output.status.success(), "{}", text(&output));
        return;
    }
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert_eq!(damage.len(), if swapped { 2 } else { 1 }, "{report:#}");
    let about = damage
        .iter()
        .find(|damage| {
            damage["problem"].as_str().unwrap().contains(&name) || damage["object"] == name.as_str()
        })
        .unwrap();
    let lost = about["lost_blocks"].as_object().unwrap();
    let blocks = |id: &str| lost.get(id).cloned();
    let number = |n: u64| Some(serde_json::Value::from(n));
    match kind {
        Kind::Pack if table_only => assert!(lost.values().all(|n| *n == 0), "{report:#}"),
        Kind::Pack => {
            let n = blocks(one).unwrap().as_u64().unwrap();
            assert!((1..=8).contains(&n), "{report:#}");
            assert_eq!(blocks(child), number(n), "the child shares the pack");
            assert_eq!(blocks(two), None);
        }
        // The child has a page and a page list of its own.
        Kind::FirstPage => assert_eq!((blocks(one), blocks(child)), (number(4), None)),
        Kind::PageList => assert_eq!((blocks(one), blocks(child)), (number(8), None)),
        Kind::Manifest => assert_eq!(blocks(one), Some(serde_json::Value::Null)),
        Kind::Tags => assert_eq!(blocks(one), number(0)),
        Kind::Info => unreachable!(),
    }
    let printed = run(sandbox.fspfs().arg("verify"));
    assert_eq!(printed.status.code(), Some(1));
    let printed = text(&printed);
    assert!(printed.contains(&name) && printed.contains(one.as_str()), "{printed}");
}

#[rstest]
#[case(Damage::Empty, "fspfs.json")]
#[case(Damage::Half, "fspfs.json")]
#[case(Damage::FlipFirst, "fspfs.json")]
#[case(Damage::Delete, "has packs, and its fspfs.json is lost")]
#[case(Damage::Pipe, "fspfs.json is damaged: it is no file")]
#[case(Damage::Huge, "fspfs.json is damaged: it has 1099511627776 bytes")]
fn a_repository_without_its_first_file_is_none(#[case] damage: Damage, #[case] says: &str) {
    let damaged = Damaged::new();
    let info = damaged.path(Kind::Info, &damaged.one);
    let good = std::fs::read(&info).unwrap();
    damage.inflict(&info, &info);
    for command in [&["list"][..], &["verify"], &["gc"], &["download", &damaged.one, "x"]] {
        let message = damaged.sandbox.fails(command);
        assert!(message.contains(says), "{message}");
    }
    // Making a new one over it would not help.
    if damage != Damage::Delete {
        damaged.sandbox.fails(&["init", "store"]);
    }
    mend(&info, &good);
    damaged.two_is_intact();
}

/// Reads one byte range of a file, past the page cache's failures of others.
fn read(path: &Path, offset: u64, len: u64) -> std::io::Result<Vec<u8>> {
    let file = std::fs::File::open(path)?;
    let mut bytes = vec![0xee; kib(len)];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

/// Checks blocks of an image in the mount: those in `lost` cannot be read, the others are right.
fn check(image: &Path, blocks: &[u64], lost: &[u64]) {
    for &index in blocks {
        let offset = index * BLOCK;
        let len = BLOCK.min(LEN - offset);
        for (offset, len) in [(offset, 1), (offset + len - 1, 1), (offset, len)] {
            let result = read(image, offset, len);
            if lost.contains(&index) {
                assert_eq!(errno(result), libc::EIO, "block {index}");
            } else {
                let bytes = result.unwrap_or_else(|e| panic!("block {index}: {e}"));
                if DATA.contains(&index) {
                    assert!(bytes == pattern(offset, kib(len)), "block {index} is wrong");
                } else {
                    assert!(bytes.iter().all(|&b| b == 0), "block {index} is no hole");
                }
            }
        }
    }
}

/// Blocks to look at: all data, the holes around it, and the edges of the pages.
fn probes() -> Vec<u64> {
    let mut probes: Vec<u64> =
        DATA.iter().flat_map(|&index| [index.saturating_sub(1), index, index + 1]).collect();
    probes.extend([4095, 4096, 16_383, 16_384, 20_500, 32_767, 32_768, 40_000, 49_151]);
    probes.retain(|&index| index * BLOCK < LEN);
    probes.sort_unstable();
    probes.dedup();
    probes
}

/// Mounts with `path` damaged, checks which blocks are lost, mends it, and checks again.
fn through_a_mount(damaged: &Damaged, path: &Path, damage: Damage, lost: &[u64]) {
    let good = std::fs::read(path).unwrap();
    damage.inflict(path, path);
    for backwards in [false, true] {
        let mut probes = probes();
        if backwards {
            // So that nothing is known of what comes before.
            probes.reverse();
        }
        let mount = damaged.sandbox.mount(&[]);
        check(&mount.image(&damaged.one), &probes, lost);
        let two = read(&mount.image(&damaged.two), 12 * MIB, 2 * MIB).unwrap();
        assert!(two == pattern(12 * MIB, kib(2 * MIB)));
        if backwards {
            std::fs::write(path, &good).unwrap();
            check(&mount.image(&damaged.one), &probes, &[]);
        }
        mount.unmount();
    }
}

#[test]
fn a_flipped_frame_costs_the_mount_one_block() {
    if !can_mount(&[]) {
        return;
    }
    let damaged = Damaged::new();
    let path = damaged.pack(&damaged.one);
    let pack = std::fs::read(&path).unwrap();
    let frames = Damaged::frames(&pack);
    assert_eq!(frames.len(), DATA.len());
    for index in [2, 18_432] {
        let start = index * BLOCK;
        let digest = Digest::of(&pattern(start, kib(BLOCK)));
        let (offset, length, _) = *frames.iter().find(|frame| frame.2 == digest).unwrap();
        let mut bytes = pack.clone();
        bytes[offset + length / 2] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let mount = damaged.sandbox.mount(&[]);
        check(&mount.image(&damaged.one), &probes(), &[index]);
        check(&mount.image(&damaged.one), &probes(), &[index]);
        std::fs::write(&path, &pack).unwrap();
        check(&mount.image(&damaged.one), &probes(), &[]);
        mount.unmount();
    }
}

#[test]
fn a_cut_pack_costs_the_mount_what_was_cut_off() {
    if !can_mount(&[]) {
        return;
    }
    let damaged = Damaged::new();
    let path = damaged.pack(&damaged.one);
    let pack = std::fs::read(&path).unwrap();
    let frames = Damaged::frames(&pack);
    let gone: Vec<Digest> = frames
        .iter()
        .filter(|(offset, length, _)| offset + length > pack.len() / 2)
        .map(|frame| frame.2)
        .collect();
    let digest = |index: u64| {
        let mut block = pattern(index * BLOCK, kib(BLOCK));
        let len = BLOCK.min(LEN - index * BLOCK);
        block[kib(len)..].fill(0);
        Digest::of(&block)
    };
    let lost: Vec<u64> = DATA.into_iter().filter(|&index| gone.contains(&digest(index))).collect();
    assert!(!lost.is_empty() && lost.len() < DATA.len());
    through_a_mount(&damaged, &path, Damage::Half, &lost);
}

#[test]
fn a_missing_pack_costs_the_mount_its_blocks() {
    if !can_mount(&[]) {
        return;
    }
    let damaged = Damaged::new();
    through_a_mount(&damaged, &damaged.pack(&damaged.one), Damage::Delete, &DATA);
}

#[rstest]
#[case::first(0, Damage::FlipMiddle)]
#[case::second(1, Damage::Delete)]
#[case::last(3, Damage::Half)]
fn a_damaged_page_costs_the_mount_its_span(#[case] span: u32, #[case] damage: Damage) {
    if !can_mount(&[]) {
        return;
    }
    let damaged = Damaged::new();
    let pages = damaged.pages(&damaged.one);
    assert_eq!(pages.keys().copied().collect::<Vec<_>>(), [0, 1, 3]);
    let lost: Vec<u64> =
        probes().into_iter().filter(|index| index / 16_384 == u64::from(span)).collect();
    through_a_mount(&damaged, &pages[&span], damage, &lost);
}

#[test]
fn a_damaged_page_list_costs_the_mount_one_image() {
    if !can_mount(&[]) {
        return;
    }
    let damaged = Damaged::new();
    let list = damaged.page_list(&damaged.one);
    through_a_mount(&damaged, &list, Damage::FlipMiddle, &probes());
}

#[test]
fn a_damaged_manifest_costs_the_mount_one_image() {
    if !can_mount(&[]) {
        return;
    }
    let damaged = Damaged::new();
    let path = damaged.manifest(&damaged.one);
    let good = std::fs::read(&path).unwrap();
    Damage::FlipMiddle.inflict(&path, &path);
    let mount = damaged.sandbox.mount(&[]);
    let image = mount.image(&damaged.one);
    assert_eq!(errno(std::fs::File::open(&image)), libc::EIO);
    let two = read(&mount.image(&damaged.two), 12 * MIB, 10).unwrap();
    assert_eq!(two, pattern(12 * MIB, 10));
    std::fs::write(&path, good).unwrap();
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while std::fs::File::open(&image).is_err() && std::time::Instant::now() < end {
        std::thread::sleep(std::time::Duration::from_millis(100));
        support::names(&mount.path);
    }
    check(&image, &probes(), &[]);
    mount.unmount();
}

#[test]
fn verify_names_every_damaged_object() {
    let damaged = Damaged::new();
    let Damaged { sandbox, one, child, two } = &damaged;
    let intact = sandbox.ok(&["verify"]);
    assert!(intact.contains("Everything is intact"), "{intact}");
    let pack = damaged.pack(one);
    let page = damaged.pages(child).pop_first().unwrap().1;
    let list = damaged.page_list(two);
    let tags = damaged.tags(child);
    Damage::FlipFirst.inflict(&pack, &pack);
    Damage::Delete.inflict(&page, &page);
    Damage::Half.inflict(&list, &list);
    Damage::Empty.inflict(&tags, &tags);
    let output = run(sandbox.fspfs().arg("verify"));
    assert_eq!(output.status.code(), Some(1));
    let printed = String::from_utf8(output.stdout).unwrap();
    for path in [&pack, &page, &list, &tags] {
        let name = path.strip_prefix(damaged.store()).unwrap().to_str().unwrap();
        assert!(printed.contains(name), "{name} is missing in {printed}");
    }
    assert!(printed.contains("4 objects are damaged"), "{printed}");
    // Only what is asked for is looked at.
    let output = run(sandbox.fspfs().args(["verify", two]));
    assert_eq!(output.status.code(), Some(1));
    let printed = text(&output);
    assert!(printed.contains("1 objects are damaged") && !printed.contains(one), "{printed}");
}

#[rstest]
#[case::manifest(Kind::Manifest, Damage::FlipMiddle)]
#[case::manifest_cut(Kind::Manifest, Damage::Half)]
#[case::manifest_hidden(Kind::Manifest, Damage::LinkToNowhere)]
#[case::manifest_a_directory(Kind::Manifest, Damage::Directory)]
#[case::page(Kind::FirstPage, Damage::FlipMiddle)]
#[case::page_gone(Kind::FirstPage, Damage::Delete)]
#[case::page_list(Kind::PageList, Damage::Half)]
#[case::page_list_gone(Kind::PageList, Damage::Delete)]
fn gc_deletes_nothing_while_it_cannot_tell(#[case] kind: Kind, #[case] damage: Damage) {
    let damaged = Damaged::new();
    let Damaged { sandbox, one, two, .. } = &damaged;
    // What only `two` has becomes garbage; an old record names everything that there is.
    let names: Vec<String> = ["packs", "pages"]
        .into_iter()
        .flat_map(|kind| damaged.files(kind))
        .map(|path| path.strip_prefix(damaged.store()).unwrap().to_str().unwrap().to_owned())
        .collect();
    support::old_record(&damaged.store(), &names);
    sandbox.ok(&["delete", "--yes", two]);
    let path = damaged.path(kind, one);
    let good = std::fs::read(&path).unwrap();
    damage.inflict(&path, &path);
    let before = damaged.files("");
    let message = sandbox.fails(&["gc", "--grace", "1h"]);
    let name = path.strip_prefix(damaged.store()).unwrap().to_str().unwrap();
    assert!(message.contains(name) && message.contains("nothing was collected"), "{message}");
    assert_eq!(damaged.files(""), before);
    // Mended, it deletes what `two` had, and only that.
    mend(&path, &good);
    let report: serde_json::Value =
        serde_json::from_str(&sandbox.ok(&["gc", "--grace", "1h", "--json"])).unwrap();
    assert_eq!(report["deleted_objects"], 3, "{report:#}");
    let verified = sandbox.ok(&["verify"]);
    assert!(verified.contains("Everything is intact"), "{verified}");
}

#[test]
fn damage_to_what_is_pending_is_seen() {
    let damaged = Damaged::new();
    let Damaged { sandbox, two, .. } = &damaged;
    // A pending snapshot, as a crash leaves it.
    let id = "snap-0aaaaaaaaaaaaaaaa";
    std::fs::create_dir_all(damaged.store().join("pending").join(id)).unwrap();
    let start = damaged.store().join(format!("pending/{id}/start.json"));
    std::fs::write(&start, "{\"id\"").unwrap();
    assert_eq!(damaged.states()[id], "error");
    let message = sandbox.fails(&["gc"]);
    assert!(message.contains(&format!("pending/{id}/start.json")), "{message}");
    let output = run(sandbox.fspfs().arg("verify"));
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains(id));
    damaged.two_is_intact();
    // And it can be got rid of.
    sandbox.ok(&["delete", "--yes", id]);
    assert!(!start.exists());
    assert_eq!(damaged.states().len(), 3);
    sandbox.ok(&["gc"]);
    sandbox.ok(&["verify", two]);
}
