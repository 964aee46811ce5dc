//! Snapshots that are named by something else than their id.
#![allow(clippy::unwrap_used)]

mod support;

use rstest::rstest;
use support::{BLOCK, Sandbox, run, same, text};

/// A store with three snapshots, from old to new: `one.img`, `two.img` and `three.img`. The first two have a name, a
/// volume and a tag in common.
fn three() -> (Sandbox, [String; 3]) {
    let sandbox = Sandbox::with_store();
    let common = ["--volume-id", "vol-0a", "--tag", "Role=db", "--name", "web"];
    let ids = ["one", "two", "three"].map(|name| {
        let file = format!("{name}.img");
        sandbox.image(&file, 3 * BLOCK, &[]);
        std::fs::write(sandbox.join(&file), name.repeat(1000)).unwrap();
        // A store tells times in seconds.
        std::thread::sleep(std::time::Duration::from_millis(1100));
        let options = if name == "three" { &["--name", "mail"][..] } else { &common };
        sandbox.upload(&file, options)
    });
    (sandbox, ids)
}

#[rstest]
#[case("latest", "three.img")]
#[case("web", "two.img")]
#[case("name:web", "two.img")]
#[case("mail", "three.img")]
#[case("volume:vol-0a:latest", "two.img")]
#[case("tag:Role=db:latest", "two.img")]
#[case("tag:Name=mail", "three.img")]
fn the_newest_that_fits_is_read(#[case] reference: &str, #[case] image: &str) {
    let (sandbox, ids) = three();
    let output = run(sandbox.fspfs().args(["download", reference, "out.img"]));
    assert!(output.status.success(), "{}", text(&output));
    assert!(same(sandbox.join("out.img"), sandbox.join(image)));
    let id = &ids[if image == "two.img" { 1 } else { 2 }];
    assert!(String::from_utf8(output.stderr).unwrap().contains(&format!(" is {id}")));
    assert!(sandbox.ok(&["list", reference]).contains(id));
    sandbox.ok(&["verify", reference]);
    sandbox.ok(&["diff", reference, id]);
}

#[test]
fn a_reference_that_fits_several_or_none_is_refused() {
    let (sandbox, ids) = three();
    for reference in ["volume:vol-0a", "tag:Role=db"] {
        let message = sandbox.fails(&["list", reference]);
        assert!(message.contains("2 snapshots fit") && message.contains(":latest"), "{message}");
        assert!(message.contains(&ids[0]) && message.contains(&ids[1]), "{message}");
        assert!(!message.contains(&ids[2]), "{message}");
    }
    let message = sandbox.fails(&["list", "webb"]);
    assert!(message.contains("no such snapshot; the nearest: name:web"), "{message}");
    let mistyped = format!("{}{}", &ids[2][..21], if ids[2].ends_with('0') { "1" } else { "0" });
    let message = sandbox.fails(&["list", &mistyped]);
    assert!(message.contains(&format!("the nearest: {}", ids[2])), "{message}");
    for (bad, why) in [("volume:x", "volume:vol-"), ("tag:x", "tag:Role=db"), ("snap-x", "snap-x")]
    {
        let output = run(sandbox.fspfs().args(["list", bad]));
        assert_eq!(output.status.code(), Some(2), "{}", text(&output));
        assert!(text(&output).contains(why), "{}", text(&output));
    }
    let empty = sandbox.ok(&["init", "empty"]);
    assert!(!empty.is_empty());
    let message = sandbox.fails(&["-s", "empty", "list", "latest"]);
    assert!(message.contains("there is no snapshot"), "{message}");
}

#[test]
fn delete_takes_what_fits_one_alone() {
    let (sandbox, ids) = three();
    for reference in ["web", "latest", "volume:vol-0a:latest"] {
        let message = sandbox.fails(&["delete", "--yes", reference]);
        assert!(message.contains("fit, and one alone must be named"), "{message}");
    }
    sandbox.ok(&["delete", "--yes", "mail"]);
    sandbox.ok(&["delete", "--yes", &ids[0]]);
    sandbox.ok(&["delete", "--yes", "volume:vol-0a"]);
    assert_eq!(sandbox.ok(&["-q", "list"]), "");
}

#[test]
fn an_image_in_a_mount_names_its_snapshot() {
    if !support::can_mount(&[]) {
        return;
    }
    let (sandbox, ids) = three();
    let mount = sandbox.mount(&[]);
    let by_name = mount.join("by-name/web.img");
    for (path, id) in [(mount.image(&ids[0]), &ids[0]), (by_name, &ids[1])] {
        let printed = sandbox.ok(&["-q", "download", path.to_str().unwrap(), "out.img"]);
        assert_eq!(printed.trim(), id);
    }
    sandbox.sh("cp --preserve=xattr mnt/by-name/mail.img copy.img");
    let message = sandbox.fails(&["delete", "--yes", "./copy.img"]);
    assert!(message.contains("no image of a snapshot in a mount"), "{message}");
    // As a line of a control file.
    sandbox.sh("echo \"web $PWD/out2.img\" > mnt/control/download");
    sandbox.ok(&["jobs", mount.path.to_str().unwrap(), "--wait", "1"]);
    assert!(same(sandbox.join("out2.img"), sandbox.join("two.img")));
    sandbox.ok(&["clone", "name:mail", mount.join("new/c.img").to_str().unwrap()]);
    assert!(same(mount.join("new/c.img"), sandbox.join("three.img")));
}
