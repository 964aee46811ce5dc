//! The document of the repository format against the program: `scripts/restore.py`, which was
//! written from the document alone, restores what the program made, and refuses what is damaged.
//! A repository of format 1 that is kept here stays readable for ever.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use support::{BLOCK, GIB, MIB, Sandbox, has, names, run, skip, text, write_pattern};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/format-1");

fn python() -> String {
    std::env::var("FSPFS_PYTHON").unwrap_or_else(|_| "python3".to_owned())
}

/// Whether the script can run here.
fn can_restore() -> bool {
    let python = python();
    // A name is looked for in the path; a path is tried.
    if !python.contains('/') && !has(&[&python]) {
        return false;
    }
    let output = Command::new(&python).args(["-c", "import zstandard"]).output();
    let found = output.is_ok_and(|output| output.status.success());
    let missing = format!("the Python module zstandard for {python} (FSPFS_PYTHON)");
    skip(if found { &[] } else { std::slice::from_ref(&missing) })
}

/// Runs the script in the sandbox.
fn script(sandbox: &Sandbox, arguments: &[&str]) -> Output {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/restore.py");
    run(Command::new(python()).arg(path).args(arguments).current_dir(&sandbox.path))
}

/// Restores a snapshot of `store` with the script, which must succeed.
#[track_caller]
fn restore(sandbox: &Sandbox, id: &str) -> PathBuf {
    let output = script(sandbox, &["store", id, "restored.img"]);
    assert!(output.status.success(), "{}", text(&output));
    sandbox.join("restored.img")
}

/// Restores a snapshot of `store`, which must fail and leave nothing; what was said.
#[track_caller]
fn refuses(sandbox: &Sandbox, id: &str) -> String {
    let before = names(&sandbox.path);
    let output = script(sandbox, &["store", id, "refused.img"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert_eq!(names(&sandbox.path), before, "a file is left");
    String::from_utf8(output.stderr).unwrap()
}

/// Downloads a snapshot of `store` with the program.
fn download(sandbox: &Sandbox, id: &str) -> PathBuf {
    let path = sandbox.join("downloaded.img");
    let _ = std::fs::remove_file(&path);
    sandbox.ok(&["download", id, "downloaded.img"]);
    path
}

/// The length of a file, and all its blocks that are not all zeros. Holes are not read.
fn content(path: &Path) -> (u64, BTreeMap<u64, Vec<u8>>) {
    let file = File::open(path).unwrap();
    let len = file.metadata().unwrap().len();
    let mut blocks = BTreeMap::new();
    let mut at = 0;
    while at < len {
        at = match lseek(&file, at.try_into().unwrap(), Whence::SeekData) {
            Ok(data) => u64::try_from(data).unwrap() / BLOCK * BLOCK,
            Err(Errno::ENXIO) => break,
            Err(error) => panic!("{}: {error}", path.display()),
        };
        let mut block = vec![0; usize::try_from(BLOCK.min(len - at)).unwrap()];
        file.read_exact_at(&mut block, at).unwrap();
        if block.iter().any(|&byte| byte != 0) {
            blocks.insert(at / BLOCK, block);
        }
        at += BLOCK;
    }
    (len, blocks)
}

/// Whether two files have the same length and the same bytes.
#[track_caller]
fn assert_same(a: &Path, b: &Path) {
    let (one, two) = (content(a), content(b));
    assert_eq!(one.0, two.0, "bytes of {} and of {}", a.display(), b.display());
    assert!(one.1 == two.1, "{} and {} differ", a.display(), b.display());
}

/// The script and the program both give back an image.
#[track_caller]
fn assert_restores(sandbox: &Sandbox, id: &str, image: &Path) {
    let restored = restore(sandbox, id);
    assert_same(&restored, image);
    assert_same(&restored, &download(sandbox, id));
    let data = content(image).1.len() as u64 * BLOCK;
    let used = restored.metadata().unwrap().blocks() * 512;
    assert!(used <= data + MIB, "{used} bytes are in use for {data} bytes of data");
}

/// The names of all objects of a repository below a directory.
fn objects(sandbox: &Sandbox, directory: &str) -> Vec<String> {
    let found = sandbox.sh(&format!("cd store && find {directory} -type f | sort"));
    found.lines().map(str::to_owned).collect()
}

/// Flips one byte of an object for as long as `check` runs.
fn with_flipped(sandbox: &Sandbox, object: &str, at: u64, check: impl FnOnce()) {
    let path = sandbox.join("store").join(object);
    let good = std::fs::read(&path).unwrap();
    let mut bad = good.clone();
    bad[usize::try_from(at).unwrap()] ^= 0x20;
    std::fs::write(&path, bad).unwrap();
    check();
    std::fs::write(&path, good).unwrap();
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").unwrap();
        hex
    })
}

/// Changes a document and gives it the checksum that it needs then.
fn reseal(path: &Path, from: &str, to: &str) {
    let document = std::fs::read_to_string(path).unwrap();
    let value = document.lines().next().unwrap().replace(from, to);
    assert_ne!(document.lines().next().unwrap(), value, "{from} is not in {document}");
    let checksum = hex(&Sha256::digest(&value));
    std::fs::write(path, format!("{value}\n\"sha256:{checksum}\"\n")).unwrap();
}

#[test]
fn the_document_is_enough_to_restore_an_image() {
    if !can_restore() {
        return;
    }
    let sandbox = Sandbox::with_store();
    // Data in more packs than one, blocks that are equal, blocks of zeros, holes, and a tail.
    let parent = sandbox.image(
        "parent.img",
        GIB + 12_345,
        &[(0, 70 * BLOCK), (700 * MIB + 1, BLOCK), (GIB, 12_345)],
    );
    let file = File::options().write(true).open(&parent).unwrap();
    for at in [100, 200, 201, 900] {
        file.write_all_at(&vec![b'='; usize::try_from(BLOCK).unwrap()], at * BLOCK).unwrap();
    }
    file.write_all_at(&vec![0; usize::try_from(3 * BLOCK).unwrap()], 300 * BLOCK).unwrap();
    let id = sandbox.upload("parent.img", &["--full-copy", "--name", "parent"]);
    assert_restores(&sandbox, &id, &parent);

    // A child of another size: a changed block, one that became zeros, and new ones.
    sandbox.sh("cp --sparse=always parent.img child.img && truncate -s 2500M child.img");
    let child = sandbox.join("child.img");
    let file = File::options().write(true).open(&child).unwrap();
    file.write_all_at(b"changed", 5 * BLOCK + 17).unwrap();
    file.write_all_at(&vec![0; usize::try_from(BLOCK).unwrap()], 10 * BLOCK).unwrap();
    write_pattern(&file, 2400 * MIB, BLOCK);
    let child_id = sandbox.upload("child.img", &["--parent-snapshot-id", &id]);
    assert_restores(&sandbox, &child_id, &child);

    // Nothing of the parent is needed.
    sandbox.ok(&["delete", "--yes", &id]);
    assert!(refuses(&sandbox, &id).contains(&id));
    assert_restores(&sandbox, &child_id, &child);
}

#[test]
fn the_document_is_enough_for_large_and_for_small_images() {
    if !can_restore() {
        return;
    }
    let sandbox = Sandbox::with_store();
    let edges = [0, 8 * GIB - BLOCK, 8 * GIB, 24 * GIB - 7, 25 * GIB];
    let runs = edges.map(|at| (at, BLOCK));
    let large = sandbox.image("large.img", 25 * GIB + 77, &runs);
    let id = sandbox.upload("large.img", &[]);
    assert_restores(&sandbox, &id, &large);

    for (name, len) in [("byte.img", 1), ("holes.img", 9 * GIB), ("whole.img", GIB)] {
        let image =
            sandbox.image(name, len, &[(0, if name == "holes.img" { 0 } else { len.min(3) })]);
        let id = sandbox.upload(name, &["--parent-snapshot-id", &id]);
        assert_restores(&sandbox, &id, &image);
    }
}

#[test]
fn a_reader_of_the_document_finds_all_damage() {
    if !can_restore() {
        return;
    }
    let sandbox = Sandbox::with_store();
    let image = sandbox.image("disk.img", 3 * MIB + 5, &[(0, MIB), (2 * MIB, MIB + 5)]);
    let id = sandbox.upload("disk.img", &["--full-copy"]);

    let manifest = format!("snapshots/{id}.json");
    let [pages, packs] = ["pages", "packs"].map(|directory| objects(&sandbox, directory));
    assert_eq!((pages.len(), packs.len()), (2, 1));
    // What a checksum or a name covers is refused wherever it is damaged. The data of a pack is at
    // its beginning; to restore an image, nobody needs the table at its end.
    let covered = pages.iter().chain([&manifest]);
    let len = |object: &String| sandbox.join("store").join(object).metadata().unwrap().len();
    let mut cases: Vec<_> = covered
        .flat_map(|object| [0, len(object) / 2, len(object) - 1].map(|at| (object, at)))
        .collect();
    cases.extend([0, 3, 1000, MIB, 2 * MIB].map(|at| (&packs[0], at)));
    for (object, at) in cases {
        with_flipped(&sandbox, object, at, || {
            let said = refuses(&sandbox, &id);
            assert!(said.contains(object.as_str()), "byte {at} of {object}: {said}");
        });
    }

    // So is what is cut, or missing.
    for object in pages.iter().chain(&packs).chain([&manifest]) {
        let path = sandbox.join("store").join(object);
        let good = std::fs::read(&path).unwrap();
        std::fs::write(&path, &good[..good.len() / 2]).unwrap();
        assert!(refuses(&sandbox, &id).contains(object.as_str()), "{object} is cut");
        std::fs::remove_file(&path).unwrap();
        let named = if *object == manifest { &id } else { object };
        assert!(refuses(&sandbox, &id).contains(named.as_str()), "{object} is missing");
        std::fs::write(&path, good).unwrap();
    }

    // Documents with a right checksum and a wrong value.
    let path = sandbox.join("store").join(&manifest);
    let good = std::fs::read_to_string(&path).unwrap();
    let fields: Value = serde_json::from_str(good.lines().next().unwrap()).unwrap();
    let digest = fields["content_digest"].as_str().unwrap().to_owned();
    for (from, to) in [
        (digest.as_str(), "0".repeat(64).as_str()),
        ("\"data_blocks\":5", "\"data_blocks\":6"),
        ("\"volume_size_gib\":1", "\"volume_size_gib\":2"),
        ("\"volume_size_gib\":1", "\"volume_size_gib\":true"),
        ("\"zero_blocks\"", "\"no_blocks\""),
        (id.as_str(), "snap-0"),
        ("{", "{\"data_blocks\":5,"),
    ] {
        reseal(&path, from, to);
        assert!(refuses(&sandbox, &id).contains(&manifest), "{from} became {to}");
        std::fs::write(&path, &good).unwrap();
    }
    let unknown = "{\"later\":[{\"a\":null}],";
    reseal(&path, "{", unknown);
    assert_restores(&sandbox, &id, &image);
    std::fs::write(&path, &good).unwrap();

    // A repository of a later version.
    let path = sandbox.join("store/fspfs.json");
    let good = std::fs::read_to_string(&path).unwrap();
    for (from, to) in [
        ("\"format\":1", "\"format\":2"),
        ("\"requires\":[]", "\"requires\":[\"encryption\"]"),
        ("524288", "1048576"),
    ] {
        std::fs::write(&path, good.replace(from, to)).unwrap();
        assert!(refuses(&sandbox, &id).contains("fspfs.json"), "{to}");
        sandbox.fails(&["download", &id, "refused.img"]);
    }
    std::fs::write(&path, good).unwrap();
    assert_restores(&sandbox, &id, &image);
}

#[test]
fn damaged_tags_are_no_reason_not_to_restore() {
    if !can_restore() {
        return;
    }
    let sandbox = Sandbox::with_store();
    let image = sandbox.image("disk.img", 3 * MIB + 5, &[(0, MIB)]);
    let id = sandbox.upload("disk.img", &["--name", "disk"]);
    let tags = objects(&sandbox, "tags");
    with_flipped(&sandbox, &tags[0], 5, || {
        // Without the tag the image is as long as the volume.
        let whole = File::options().write(true).open(&image).unwrap();
        whole.set_len(GIB).unwrap();
        let output = script(&sandbox, &["store", &id, "restored.img"]);
        assert!(output.status.success() && text(&output).contains(&tags[0]), "{}", text(&output));
        assert_restores(&sandbox, &id, &image);
        whole.set_len(3 * MIB + 5).unwrap();
    });
    // Those of another snapshot are as good as damaged.
    let other = sandbox.upload("disk.img", &["--name", "other"]);
    let others = objects(&sandbox, &format!("tags/{other}"));
    let [to, from] = [&tags[0], &others[0]].map(|set| sandbox.join("store").join(set));
    std::fs::copy(from, to).unwrap();
    let restored = restore(&sandbox, &id);
    assert_eq!(restored.metadata().unwrap().len(), GIB);
    assert_same(&restored, &download(&sandbox, &id));
}

#[test]
fn a_file_stays_until_the_image_that_replaces_it_is_complete() {
    if !can_restore() {
        return;
    }
    let sandbox = Sandbox::with_store();
    let image = sandbox.image("disk.img", 3 * MIB + 5, &[(0, MIB)]);
    let id = sandbox.upload("disk.img", &[]);
    std::fs::write(sandbox.join("kept.img"), "kept").unwrap();
    let pack = &objects(&sandbox, "packs")[0];
    with_flipped(&sandbox, pack, 1000, || {
        let output = script(&sandbox, &["store", &id, "kept.img"]);
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    });
    assert_eq!(std::fs::read_to_string(sandbox.join("kept.img")).unwrap(), "kept");
    let output = script(&sandbox, &["store", &id, "kept.img"]);
    assert!(output.status.success(), "{}", text(&output));
    assert_same(&sandbox.join("kept.img"), &image);
}

// --- Repositories of earlier versions -------------------------------------------------------------

/// A sandbox with a copy of the repository of format 1, and what is expected of it.
fn format_1() -> (Sandbox, serde_json::Map<String, Value>) {
    let sandbox = Sandbox::new();
    sandbox.sh(&format!("cp -r '{FIXTURES}/repository' store"));
    let expected = std::fs::read_to_string(format!("{FIXTURES}/expected.json")).unwrap();
    (sandbox, serde_json::from_str(&expected).unwrap())
}

/// Compares an image with its length and the digests of its blocks.
#[track_caller]
fn assert_expected(path: &Path, expected: &Value) {
    let (len, blocks) = content(path);
    assert_eq!(Some(len), expected["length"].as_u64());
    let digests = blocks.iter().map(|(i, data)| (i.to_string(), hex(&Sha256::digest(data)).into()));
    assert_eq!(Value::Object(digests.collect()), expected["blocks"]);
}

fn completed(expected: &serde_json::Map<String, Value>) -> Vec<(&String, &Value)> {
    let found: Vec<_> = expected.iter().filter(|(_, e)| e["state"] == "completed").collect();
    assert_eq!(found.len(), 2);
    found
}

#[test]
fn a_repository_of_format_1_stays_readable() {
    let (sandbox, expected) = format_1();
    let check = |ids: usize| {
        let list: Vec<Value> = serde_json::from_str(&sandbox.ok(&["list", "--json"])).unwrap();
        assert_eq!(list.len(), ids);
        for found in &list {
            let wanted = expected[found["id"].as_str().unwrap()].as_object().unwrap();
            // The length and the blocks are those of the image.
            let of_list = wanted.iter().filter(|(key, _)| *key != "length" && *key != "blocks");
            for (key, value) in of_list {
                assert_eq!(found[key], *value, "{key}");
            }
        }
        for (id, wanted) in completed(&expected) {
            assert_expected(&download(&sandbox, id), wanted);
        }
        sandbox.ok(&["verify"]);
    };
    check(3);
    // It stays one that can be written to: an end for what is pending, a child, a collection.
    let (pending, _) = expected.iter().find(|(_, e)| e["state"] == "pending").unwrap();
    assert!(sandbox.fails(&["download", pending, "pending.img"]).contains(pending.as_str()));
    sandbox.ok(&["delete", "--yes", pending]);
    let image = sandbox.image("disk.img", 9 * GIB, &[(0, BLOCK), (8 * GIB, MIB)]);
    let parent = completed(&expected)[0].0;
    let id = sandbox.upload("disk.img", &["--parent-snapshot-id", parent]);
    assert_same(&download(&sandbox, &id), &image);
    sandbox.ok(&["delete", "--yes", &id]);
    sandbox.ok(&["gc"]);
    check(2);
}

#[test]
fn the_document_is_enough_to_read_a_repository_of_format_1() {
    if !can_restore() {
        return;
    }
    let (sandbox, expected) = format_1();
    let output = script(&sandbox, &["--list", "store"]);
    assert!(output.status.success(), "{}", text(&output));
    let list = String::from_utf8(output.stdout).unwrap();
    let list: Vec<_> = list.lines().map(|line| line.split('\t').collect::<Vec<_>>()).collect();
    let wanted: Vec<_> =
        expected.iter().map(|(id, e)| [id, e["state"].as_str().unwrap()]).collect();
    assert_eq!(list.iter().map(|fields| [fields[0], fields[1]]).collect::<Vec<_>>(), wanted);
    for (id, wanted) in completed(&expected) {
        assert_expected(&restore(&sandbox, id), wanted);
        let line = list.iter().find(|fields| fields[0] == id).unwrap();
        assert_eq!(line[2], wanted["length"].to_string());
        assert_eq!(line[4], wanted["tags"]["Name"].to_string());
    }
    let (pending, _) = expected.iter().find(|(_, e)| e["state"] == "pending").unwrap();
    assert!(refuses(&sandbox, pending).contains("pending"));
}
