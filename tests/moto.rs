//! `ebs:` stores before moto, a service that others wrote: it is laxer than AWS, and does some of it
//! otherwise. What it says of a snapshot and its blocks is all that is relied on.
//!
//! Not tested here, because moto 5.2.5 cannot do it, or does it otherwise than AWS:
//! - parents: a child begins empty, and ListChangedBlocks leaves out what is new in the second;
//! - pages: it gives all in one, whatever is asked for (which is tested), and its tokens never end;
//! - checksums, numbers of blocks and lengths that are wrong: it takes them;
//! - pending snapshots: it calls every one completed, and takes blocks behind the end;
//! - blocks and snapshots that are not there: it dies of them, with status 500;
//! - client tokens and encryption: it does not know them;
//! - the blocks of deleted snapshots: they stay.
#![allow(clippy::unwrap_used)]

mod support;

use support::service::has_moto;
use support::{BLOCK, GIB, MIB, Sandbox, blocks_of, can_mount, run, text, until, write_zeros};

/// How many snapshots moto makes up for its own images, at the least.
const OF_MOTO: usize = 1000;

/// Runs of data of an image that ends in the middle of a block.
const RUNS: [(u64, u64); 4] =
    [(0, MIB), (3 * MIB + 77, 5), (5 * MIB, 2 * MIB + 100), (9 * MIB, 1234)];
const LENGTH: u64 = 9 * MIB + 1234;

fn ids(list: &str) -> Vec<String> {
    let list: Vec<serde_json::Value> = serde_json::from_str(list).unwrap();
    list.iter().map(|snapshot| snapshot["id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn the_list_copes_with_a_thousand_others_and_is_narrowed_down() {
    if !has_moto() {
        return;
    }
    let sandbox = Sandbox::with_moto();
    // More than EC2 has on a page, and moto gives them all on one.
    let before = ids(&sandbox.ok(&["list", "--json"]));
    assert!(before.len() > OF_MOTO, "{} snapshots", before.len());
    sandbox.image("x.img", MIB, &[(0, 8)]);
    let web = sandbox.upload("x.img", &["--name", "a b", "--tag", "role=web"]);
    let db = sandbox.upload("x.img", &["--tag", "role=db", "--description", "<ü> & more"]);
    let all = ids(&sandbox.ok(&["list", "--json"]));
    assert_eq!(all.len(), before.len() + 2);
    assert!(all.contains(&web) && all.contains(&db));
    let narrowed = |filters: &[&str]| {
        let filters = filters.iter().flat_map(|filter| ["--filter", *filter]);
        ids(&sandbox.ok(&["list", "--json"].into_iter().chain(filters).collect::<Vec<_>>()))
    };
    assert_eq!(narrowed(&["tag:role=web"]), [&web[..]]);
    assert_eq!(narrowed(&["tag:role=web", "tag:Name=a b"]), [&web[..]]);
    assert_eq!(narrowed(&["tag:role=web", "tag:Name=c"]), [] as [&str; 0]);
    assert_eq!(narrowed(&["tag:role=web,db"]).len(), 2);
    let described = sandbox.described(&web);
    assert_eq!(
        (&described["tags"]["Name"], &described["tags"]["role"]),
        (&"a b".into(), &"web".into())
    );
    assert_eq!(sandbox.described(&db)["description"], "<ü> & more");
}

#[test]
fn what_is_uploaded_is_downloaded_and_read_by_boto() {
    if !has_moto() {
        return;
    }
    let sandbox = Sandbox::with_moto();
    let image = sandbox.image("disk.img", LENGTH, &RUNS);
    // Zeros are no data, where there is no parent that could have some.
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    write_zeros(&file, 4 * MIB, BLOCK);
    let id = sandbox.upload("disk.img", &[]);
    let blocks = blocks_of(&RUNS);
    let says = sandbox.ok(&["list", &id]);
    let count = blocks.len() as u64;
    let wanted = format!("contains {count} chunks and {} bytes", count * BLOCK);
    assert!(says.contains(&wanted), "{says}");
    sandbox.assert_downloads(&id, &image);
    sandbox.boto_reads(&id, &image, &blocks);
    // A block of 512 bytes is none of EBS: that is said, and what comes is looked at.
    let output = run(sandbox.fspfs().args(["download", &id, "again.img"]));
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("block size of 512"), "{}", text(&output));
}

#[test]
fn what_boto_wrote_in_no_order_is_downloaded_and_mounted() {
    if !has_moto() || !can_mount(&["cp"]) {
        return;
    }
    let sandbox = Sandbox::with_moto();
    // Both ends of a volume, single blocks, and more in a row than the service has to list at once.
    let runs = [(0, 3 * BLOCK), (700 * BLOCK, 130 * BLOCK), (GIB - BLOCK, 2 * BLOCK)];
    let runs = runs.into_iter().chain([(3000 * BLOCK, 9), (3 * GIB - BLOCK, BLOCK)]);
    let runs: Vec<_> = runs.collect();
    let image = sandbox.image("disk.img", 3 * GIB, &runs);
    let blocks = blocks_of(&runs);
    let id = sandbox.boto_writes(&image, &blocks, None);
    assert_eq!(sandbox.described(&id)["tags"]["role"], "boto");
    let mount = sandbox.mount(&["--filter", "tag:role=boto"]);
    mount.assert_shows(&sandbox, &id, &image, &blocks);
    let link = std::fs::read_link(mount.join("by-name/by boto.img")).unwrap();
    assert_eq!(link.to_str().unwrap(), format!("../{id}.img"));
    mount.unmount();
    sandbox.assert_downloads(&id, &image);
    sandbox.assert_nothing_is_left();
}

#[test]
fn what_is_written_under_new_is_read_back_and_deleted() {
    if !has_moto() || !can_mount(&["cp"]) {
        return;
    }
    let sandbox = Sandbox::with_moto();
    let image = sandbox.image("disk.img", LENGTH, &RUNS);
    let blocks = blocks_of(&RUNS);
    let mount = sandbox.mount(&[]);
    sandbox.sh("cp disk.img mnt/new/web.img");
    let id = mount.committed("web.img");
    assert_eq!((mount.begun(), mount.put()), (1, blocks.len() as u64));
    mount.assert_shows(&sandbox, &id, &image, &blocks);
    let name = |name: &str| mount.join("by-name").join(name).is_symlink();
    until("it is found by its name", || name("web.img"));
    // EC2 tags it anew.
    sandbox.sh("mv mnt/new/web.img mnt/new/db.img");
    until("it has its new name", || name("db.img") && !name("web.img"));
    sandbox.sh("rm mnt/new/db.img");
    mount.unmount();
    sandbox.assert_downloads(&id, &image);
    sandbox.boto_reads(&id, &image, &blocks);
    // By hand, without a file that is closed.
    let mount = sandbox.mount(&["--commit", "manual"]);
    sandbox.sh("cp disk.img mnt/new/late.img");
    assert_eq!(mount.begun(), 0);
    sandbox.ok(&["commit", mount.new_file("late.img").to_str().unwrap()]);
    let late = mount.committed("late.img");
    mount.assert_shows(&sandbox, &late, &image, &blocks);
    sandbox.sh("rm mnt/new/late.img");
    mount.unmount();
    sandbox.ok(&["delete", "--yes", &id, &late]);
    let left = ids(&sandbox.ok(&["list", "--json"]));
    assert!(!left.contains(&id) && !left.contains(&late) && left.len() > OF_MOTO);
    let said = sandbox.fails(&["download", &id, "gone.img"]);
    // moto has no message beside the code.
    assert!(said.contains("InvalidSnapshot.NotFound [request "), "{said}");
    assert!(!sandbox.join("gone.img").exists());
    sandbox.assert_nothing_is_left();
}

#[test]
fn a_snapshot_is_copied_into_it_within_it_and_out_of_it() {
    if !has_moto() {
        return;
    }
    let sandbox = Sandbox::with_moto();
    sandbox.ok(&["init", "here"]);
    let image = sandbox.image("disk.img", LENGTH, &RUNS);
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    write_zeros(&file, 4 * MIB, BLOCK);
    let tags = ["--name", "a b", "--tag", "role=web", "--description", "<ü> & more"];
    let upload = [&["-s", "here", "-q", "upload", "disk.img"][..], &tags[..]].concat();
    let mut id = sandbox.ok(&upload).trim_end().to_owned();
    let moto = format!("ebs://us-east-1?endpoint={}", sandbox.service().url);
    for (from, to) in [("here", &moto[..]), (&moto, &moto), (&moto, "here")] {
        let copied = sandbox.ok(&["-s", from, "-q", "copy", &id, "--to", to]).trim_end().to_owned();
        assert_ne!(copied, id);
        let all: Vec<serde_json::Value> =
            serde_json::from_str(&sandbox.ok(&["-s", to, "list", "--json"])).unwrap();
        let found = all.iter().find(|snapshot| snapshot["id"] == copied[..]).unwrap();
        let tags = &found["tags"];
        assert_eq!((&tags["Name"], &tags["role"]), (&"a b".into(), &"web".into()), "{found}");
        assert_eq!(tags["fspfs:origin"], id[..], "{found}");
        assert_eq!(
            (&found["description"], &found["state"]),
            (&"<ü> & more".into(), &"completed".into())
        );
        if to == moto {
            sandbox.assert_downloads(&copied, &image);
            sandbox.boto_reads(&copied, &image, &blocks_of(&RUNS));
        } else {
            sandbox.ok(&["-s", to, "verify", &copied, "--against", "disk.img"]);
        }
        id = copied;
    }
    let message = sandbox.fails(&["copy", "snap-0123456789abcdef0", "--to", "here"]);
    assert!(message.contains("snap-0123456789abcdef0"), "{message}");
}
