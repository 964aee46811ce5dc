//! The names in the mount: of images, of links by name, volume and tag, of attributes.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use support::{FileSystem, MIB, Sandbox, can_mount, errno, names, run, until};

/// A snapshot of one block, which no other has.
fn upload(sandbox: &Sandbox, seed: u64, options: &[&str]) -> String {
    sandbox.image("x.img", MIB, &[(seed * 8, 8)]);
    sandbox.upload("x.img", options)
}

/// Where a link leads.
fn target(link: impl AsRef<Path>) -> String {
    std::fs::read_link(link).unwrap().to_str().unwrap().to_owned()
}

#[test]
fn every_link_leads_to_its_image() {
    if !can_mount(&["find"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let old = upload(&sandbox, 1, &["--name", "web", "--volume-id", "vol-01", "--tag", "Role=a"]);
    let new = upload(&sandbox, 2, &["--name", "web", "--volume-id", "vol-01", "--tag", "Role=b"]);
    let other = upload(&sandbox, 3, &["--name", "db", "--tag", "Role=b"]);
    let plain = upload(&sandbox, 4, &[]);
    let mount = sandbox.mount(&[]);

    let mut root: Vec<_> =
        [&old, &new, &other, &plain].iter().map(|id| format!("{id}.img")).collect();
    root.extend(["by-name", "by-tag", "by-volume", "control", "new"].map(str::to_owned));
    root.sort();
    assert_eq!(names(&mount.path), root);

    assert_eq!(names(mount.join("by-name")), ["db.img", "web.img"]);
    assert_eq!(target(mount.join("by-name/web.img")), format!("../{new}.img"));
    assert_eq!(target(mount.join("by-name/db.img")), format!("../{other}.img"));

    let volume = names(mount.join("by-volume/vol-01"));
    assert_eq!(names(mount.join("by-volume")), ["vol-01"]);
    assert_eq!(volume.len(), 3);
    assert_eq!(target(mount.join("by-volume/vol-01/latest.img")), format!("../../{new}.img"));
    for id in [&old, &new] {
        let name = volume.iter().find(|name| name.ends_with(&format!("Z-{id}.img"))).unwrap();
        assert_eq!(target(mount.join("by-volume/vol-01").join(name)), format!("../../{id}.img"));
    }

    assert_eq!(names(mount.join("by-tag")), ["Name", "Role"]);
    assert_eq!(names(mount.join("by-tag/Role")), ["a", "b"]);
    let mut both = vec!["latest.img".to_owned(), format!("{new}.img"), format!("{other}.img")];
    both.sort();
    assert_eq!(names(mount.join("by-tag/Role/b")), both);
    assert_eq!(target(mount.join("by-tag/Role/b/latest.img")), format!("../../../{other}.img"));
    assert_eq!(target(mount.join("by-tag/Role/a/latest.img")), format!("../../../{old}.img"));

    // No link leads nowhere, and each is as long as it says.
    assert_eq!(sandbox.sh("find mnt -type l | wc -l").trim(), "15");
    assert_eq!(sandbox.sh("find mnt -xtype l"), "");
    for link in sandbox.sh("find mnt -type l").lines() {
        let link = sandbox.join(link);
        assert_eq!(link.symlink_metadata().unwrap().len(), target(&link).len() as u64);
        let image = link.metadata().unwrap();
        assert_eq!((image.len(), image.mode()), (MIB, 0o100_400));
    }
    mount.unmount();
}

#[test]
fn no_text_of_a_tag_can_leave_its_place() {
    if !can_mount(&["find"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let long = "v".repeat(255);
    let wide = "ü".repeat(255);
    let texts =
        ["../../escape", "..", ".", "a/b", "line\nfeed", "", " ", "%2F", "-rf", &long, &wide];
    let mut ids = Vec::new();
    for (n, text) in (1..).zip(texts) {
        let key = format!("../{}", n % 2);
        ids.push(upload(
            &sandbox,
            n,
            &[&format!("--name={text}"), "--volume-id=../vol", &format!("--tag={key}={text}")],
        ));
    }
    let mount = sandbox.mount(&[]);
    // An empty name is none.
    let by_name = names(mount.join("by-name"));
    assert_eq!(by_name.len(), texts.len() - 1);
    assert_eq!(names(mount.join("by-tag")), ["%2E.%2F0", "%2E.%2F1", "Name"]);
    assert_eq!(names(mount.join("by-tag/Name")).len(), texts.len());
    assert_eq!(names(mount.join("by-volume")), ["%2E.%2Fvol"]);
    for (name, id) in [
        ("%2E.%2F..%2Fescape", 0),
        ("%2E.", 1),
        ("%2E", 2),
        ("a%2Fb", 3),
        ("line%0Afeed", 4),
        (" ", 6),
        ("%252F", 7),
        ("-rf", 8),
    ] {
        let id = &ids[id];
        assert_eq!(target(mount.join(format!("by-name/{name}.img"))), format!("../{id}.img"));
        let link = mount.join(format!("by-tag/Name/{name}/latest.img"));
        assert_eq!(target(link), format!("../../../{id}.img"));
    }
    let empty = mount.join("by-tag/Name/%/latest.img");
    assert_eq!(target(empty), format!("../../../{}.img", ids[5]));
    assert_eq!(target(mount.join(format!("by-tag/Name/{long}/latest.img"))).len(), 9 + 26);
    // Everything leads to an image in the root directory, and all are found.
    let found = sandbox.sh("find -L mnt -name '*.img' -printf '%i\n' | sort -u | wc -l");
    assert_eq!(found.trim(), texts.len().to_string());
    assert_eq!(sandbox.sh("find mnt -xtype l"), "");
    mount.unmount();
}

/// Waits less than the kernel would keep a name, and the timer is off: whatever becomes true in this time
/// was looked for.
#[track_caller]
fn soon(what: &str, is_true: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(5);
    while !is_true() {
        assert!(Instant::now() < end, "it is not true in time that {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn what_is_new_is_found_at_once() {
    if !can_mount(&["ls"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let first = upload(&sandbox, 1, &["--name", "web", "--volume-id", "vol-01"]);
    // The timer must not help.
    let mount = sandbox.mount(&["--refresh", "3600"]);
    let [name, latest] = ["by-name/web.img", "by-volume/vol-01/latest.img"].map(|n| mount.join(n));
    let mut number = name.symlink_metadata().unwrap().ino();
    let mut last = first;
    for n in 2..6 {
        // So that the kernel has the link in its cache.
        assert_eq!(target(&name), format!("../{last}.img"));
        assert_eq!(target(&latest), format!("../../{last}.img"));
        assert_eq!(std::fs::read(&name).unwrap()[..8 * n - 8], vec![0; 8 * n - 8]);
        let id = upload(&sandbox, n as u64, &["--name", "web", "--volume-id", "vol-01"]);
        match n {
            // By id, though it is in no list yet.
            2 => assert_eq!(mount.image(&id).metadata().unwrap().len(), MIB),
            // In a directory that is listed.
            3 => soon("it is listed", || names(&mount.path).contains(&format!("{id}.img"))),
            _ => {}
        }
        // A list that took long to make is shown for a moment more.
        soon("the name is that of the new one", || target(&name) == format!("../{id}.img"));
        soon("it is the latest", || target(&latest) == format!("../../{id}.img"));
        let data = std::fs::read(&name).unwrap();
        assert_eq!(data.iter().position(|&byte| byte != 0), Some(8 * n), "upload {n}");
        assert_ne!(name.symlink_metadata().unwrap().ino(), number, "the kernel caches links");
        number = name.symlink_metadata().unwrap().ino();
        last = id;
    }
    upload(&sandbox, 9, &["--name", "fresh", "--tag", "Role=x"]);
    soon("it has a name", || mount.join("by-name/fresh.img").exists());
    soon("it has a tag", || mount.join("by-tag/Role/x/latest.img").exists());
    mount.unmount();
}

#[test]
fn what_is_deleted_vanishes() {
    if !can_mount(&["ls"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let kept = upload(&sandbox, 1, &["--name", "web", "--tag", "Role=a"]);
    let gone = upload(&sandbox, 2, &["--name", "web", "--tag", "Role=b"]);
    let mount = sandbox.mount(&["--refresh", "3600"]);
    assert_eq!(target(mount.join("by-name/web.img")), format!("../{gone}.img"));
    assert!(mount.image(&gone).exists());
    sandbox.ok(&["delete", "--yes", &gone]);
    // A list that took long to make is shown for a moment more.
    let kept_image = format!("../{kept}.img");
    soon("the name is that of another", || target(mount.join("by-name/web.img")) == kept_image);
    assert_eq!(names(mount.join("by-tag/Role")), ["a"]);
    assert!(!names(&mount.path).contains(&format!("{gone}.img")));
    // The kernel may remember the name for a moment.
    until("a deleted snapshot has no name", || !mount.image(&gone).exists());
    assert!(mount.image(&kept).exists());
    mount.unmount();
}

#[test]
fn a_missing_snapshot_is_not_found() {
    if !can_mount(&["ls"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    upload(&sandbox, 1, &["--name", "web"]);
    let mount = sandbox.mount(&[]);
    for name in [
        "x",
        "snap-0123456789abcdef0.img",
        "snap-0123456789abcdef0",
        "snap-.img",
        "SNAP-0.img",
        "by-name/x.img",
        "by-name/web",
        "by-volume/vol-01",
        "by-tag/Name/x",
        "control/x",
    ] {
        assert_eq!(errno(mount.join(name).symlink_metadata()), Errno::ENOENT as i32, "{name}");
    }
    assert_eq!(errno(mount.join("control/README/x").metadata()), Errno::ENOTDIR as i32);
    mount.unmount();
}

#[test]
fn attributes_tell_what_is_known() {
    // EBS knows no digest of the content, and counts zeros as data.
    if !can_mount(&["getfattr"]) || support::over_ebs() {
        return;
    }
    let sandbox = Sandbox::with_store();
    let parent = upload(&sandbox, 1, &[]);
    let id = upload(
        &sandbox,
        2,
        &[
            "--parent-snapshot-id",
            &parent,
            "--name",
            "web",
            "--volume-id",
            "vol-01",
            "--description",
            "two\nlines",
            "--tag",
            "a/b=c=d",
            "--tag",
            "empty=",
            "--tag",
            &format!("long={}", "ü".repeat(255)),
            "--tag",
            &format!("{}=k", "ü".repeat(127)),
        ],
    );
    let mount = sandbox.mount(&[]);
    let one = |name: &str, file: &str| {
        let script = format!("getfattr --only-values -n 'user.fspfs.{name}' mnt/{file}.img");
        sandbox.sh(&script)
    };
    let listed = sandbox.ok(&["list", "--json"]);
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let listed = listed.as_array().unwrap().iter().find(|s| s["id"] == id.as_str()).unwrap();
    for (name, value) in [
        ("id", id.as_str()),
        ("state", "completed"),
        ("size", "1073741824"),
        ("parent", &parent),
        ("lineage", &parent),
        ("volume-id", "vol-01"),
        ("description", "two\nlines"),
        ("encrypted", "false"),
        ("start-time", listed["start_time"].as_str().unwrap()),
        ("content-digest", listed["content_digest"].as_str().unwrap()),
        ("data-blocks", "1"),
        ("zero-blocks", "0"),
        ("tag.Name", "web"),
        ("tag.a/b", "c=d"),
        ("tag.empty", ""),
        ("tag.long", &"ü".repeat(255)),
    ] {
        assert_eq!(one(name, &id), value, "{name}");
        assert_eq!(one(name, "by-name/web"), value, "{name} through a link");
    }
    // A key that is too long for an attribute is in `tags` all the same.
    let tags: serde_json::Value = serde_json::from_str(&one("tags", &id)).unwrap();
    assert_eq!(tags["ü".repeat(127)], "k");
    assert_eq!(tags, listed["tags"]);
    // What is listed is what can be asked for.
    let dump = sandbox.sh(&format!("getfattr -m - mnt/{id}.img | grep -c ^user.fspfs"));
    assert_eq!(dump.trim(), "18", "15 of its own with `tags`, and the tags but one");
    for file in [&parent, "by-name/web"] {
        let missing = sandbox.try_sh(&format!("getfattr -n user.fspfs.none mnt/{file}.img"));
        assert!(!missing.status.success());
    }
    let parent_of_parent = format!("getfattr -n user.fspfs.parent mnt/{parent}.img");
    assert!(!sandbox.try_sh(&parent_of_parent).status.success());
    assert_eq!(sandbox.sh("getfattr -d -m - mnt/by-name mnt/control/README mnt"), "");
    mount.unmount();
}

/// Number of snapshots in the large repository.
const MANY: usize = 10_000;

/// Makes a repository of many snapshots of nothing, in the place of uploads that would take minutes:
/// the documents of one that was uploaded, under other names.
fn make_many(sandbox: &Sandbox) {
    sandbox.image("x.img", MIB, &[]);
    let id = sandbox.upload("x.img", &["--name", "template"]);
    let read = |name: &str| -> serde_json::Value {
        let text = std::fs::read_to_string(sandbox.join("store").join(name)).unwrap();
        serde_json::from_str(text.lines().next().unwrap()).unwrap()
    };
    let write = |name: &str, value: &serde_json::Value| {
        let line = value.to_string();
        let hex = fspfs::model::Digest::of(line.as_bytes()).to_hex();
        let path = sandbox.join("store").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, format!("{line}\n\"sha256:{hex}\"\n")).unwrap();
    };
    let mut manifest = read(&format!("snapshots/{id}.json"));
    let attempt = manifest["attempt"].as_str().unwrap().to_owned();
    let tags_of = |id: &str| format!("tags/{id}/{}/1.json", attempt.replace('-', ""));
    let mut tags = read(&tags_of(&id));
    for n in 1..MANY {
        let id = format!("snap-{n:017x}");
        manifest["id"] = id.clone().into();
        manifest["lineage"] = id.clone().into();
        tags["id"] = id.clone().into();
        tags["tags"]["Name"] = format!("machine {}", n % 5000).into();
        write(&format!("snapshots/{id}.json"), &manifest);
        write(&tags_of(&id), &tags);
    }
}

#[test]
fn ten_thousand_snapshots_are_listed_in_bounded_time() {
    if !can_mount(&["ls", "find"]) {
        return;
    }
    let sandbox = Sandbox::new();
    // In memory: removing the files from a disk can take longer than all the rest.
    let _memory = FileSystem::mount(Path::new("none"), "tmpfs", "size=1g", sandbox.join("store"));
    sandbox.ok(&["init", "store"]);
    make_many(&sandbox);
    let limit = Duration::from_secs(15);
    let timed = |what: &str, run: &mut dyn FnMut() -> String, expected: usize| {
        let began = Instant::now();
        let found = run();
        let took = began.elapsed();
        eprintln!("{what}: {took:?}");
        assert_eq!(found.trim(), expected.to_string(), "{what}");
        assert!(took < limit, "{what} took {took:?}");
    };
    let began = Instant::now();
    let mount = sandbox.mount(&[]);
    assert!(began.elapsed() < limit, "mounting took {:?}", began.elapsed());
    let link = || target(mount.join("by-name/machine 1.img"));
    let newest = format!("snap-{:017x}", MANY - 4999);
    for (script, expected) in [
        ("ls mnt | wc -l", MANY + 5),
        ("ls -f mnt | wc -l", MANY + 7),
        ("ls -l mnt | grep -c snap-", MANY),
        ("find mnt -maxdepth 1 -name 'snap-*' -size 2048 | wc -l", MANY),
        ("ls -l mnt/by-name | grep -c ' -> ../snap-'", 5000 + 1),
        ("find mnt/by-tag/Name -maxdepth 1 | wc -l", 5000 + 2),
        ("find mnt/by-tag -type l | wc -l", MANY + 5001),
    ] {
        timed(script, &mut || sandbox.sh(script), expected);
    }
    timed(
        "a link",
        &mut || (link() == format!("../{newest}.img")).to_string().len().to_string(),
        4,
    );
    assert_eq!(mount.requests("list_blocks") + mount.requests("get_block"), 0);
    // One that is made now is found at once, among so many.
    let id = upload(&sandbox, 1, &[]);
    assert!(mount.image(&id).exists());
    let listed = run(sandbox.fspfs().arg("list"));
    assert_eq!(String::from_utf8(listed.stdout).unwrap().lines().count(), MANY + 2);
    mount.unmount();
}

#[test]
fn a_directory_has_the_time_of_its_last_change() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let old = upload(&sandbox, 1, &["--name", "web", "--tag", "Role=a"]);
    let mount = sandbox.mount(&["--refresh", "3600"]);
    let of = |name: &str| {
        let found = mount.join(name).metadata().unwrap();
        (found.mtime(), found.mtime_nsec())
    };
    let directories = ["", "new", "by-name", "by-tag", "by-tag/Role", "by-tag/Role/a"];
    let times = || directories.map(of);
    // What has changed since then, and how that looks.
    let mut before = times();
    let mut changed = || {
        // So that the list is a new one.
        std::thread::sleep(Duration::from_millis(50));
        let _ = names(&mount.path);
        let now = times();
        let of = directories.iter().zip(before.iter().zip(&now));
        let changed: Vec<_> = of.filter(|(_, (a, b))| a < b).map(|(&name, _)| name).collect();
        before = now;
        changed
    };
    assert_eq!(changed(), [] as [&str; 0]);
    let new = upload(&sandbox, 2, &["--name", "db", "--tag", "Role=b"]);
    soon("it is listed", || names(&mount.path).contains(&format!("{new}.img")));
    assert_eq!(changed(), ["", "by-name", "by-tag/Role"]);
    std::fs::copy(sandbox.join("x.img"), mount.join("new/db.img.part")).unwrap();
    assert_eq!(changed(), ["new"]);
    std::fs::rename(mount.join("new/db.img.part"), mount.join("new/.db")).unwrap();
    assert_eq!(changed(), ["new"]);
    std::fs::remove_file(mount.join("new/.db")).unwrap();
    assert_eq!(changed(), ["new"]);
    sandbox.ok(&["delete", "--yes", &old]);
    soon("it is gone", || !names(&mount.path).contains(&format!("{old}.img")));
    let gone = ["", "by-name", "by-tag/Role"].map(of);
    assert!(gone.iter().zip([before[0], before[2], before[4]]).all(|(now, before)| *now > before));
    mount.unmount();
}
