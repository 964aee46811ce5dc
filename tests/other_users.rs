//! What another user of the machine, or the owner of a repository that root uses, can do to root: nothing.
#![allow(clippy::unwrap_used)]

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use support::{MIB, NOBODY, Sandbox, can_mount, run, skip, text};

mod support;

/// Whether these tests can become another user.
fn is_root() -> bool {
    let is_root = nix::unistd::geteuid().is_root();
    skip(&if is_root { Vec::new() } else { vec!["root".to_owned()] })
}

/// A repository of `nobody` in `user/store` with a snapshot of `x.img`, and a directory `away` of root's.
fn repository_of_nobody() -> (Sandbox, String) {
    let sandbox = Sandbox::new();
    sandbox.welcome_nobody();
    assert!(run(sandbox.fspfs_as_nobody().arg("init")).status.success());
    sandbox.image("x.img", 4 * MIB, &[(0, 4 * MIB)]);
    sandbox.image("y.img", 4 * MIB, &[(MIB, MIB)]);
    let id = sandbox.ok(&["-q", "-s", "user/store", "upload", "x.img"]);
    std::fs::create_dir(sandbox.join("away")).unwrap();
    (sandbox, id.trim().to_owned())
}

fn entries(directory: &Path) -> usize {
    directory.read_dir().unwrap().count()
}

#[test]
fn root_makes_nothing_where_a_link_in_anothers_repository_leads() {
    if !is_root() {
        return;
    }
    let (sandbox, _) = repository_of_nobody();
    let away = sandbox.join("away");
    for name in ["packs", "snapshots", "pending", "pages", "tmp"] {
        let planted =
            format!("cd user/store; [ ! -e {name} ] || mv {name} kept; ln -s ../../away {name}");
        assert!(sandbox.try_sh_as_nobody(&planted).status.success());
        let said = sandbox.fails(&["-s", "user/store", "upload", "y.img"]);
        assert!(said.contains(name) && said.contains("symbolic link"), "{name}: {said}");
        assert_eq!(entries(&away), 0, "{name}");
        assert_eq!(away.metadata().unwrap().uid(), 0, "{name}");
        sandbox.sh(&format!("cd user/store; rm {name}; [ ! -e kept ] || mv kept {name}"));
    }
    sandbox.ok(&["-s", "user/store", "upload", "y.img"]);
    sandbox.ok(&["-s", "user/store", "verify"]);
    let theirs = sandbox.try_sh("find user/store ! -uid 65534 | grep .");
    assert!(!theirs.status.success(), "not the owner's: {}", text(&theirs));
}

#[test]
fn root_deletes_nothing_where_a_link_in_anothers_repository_leads() {
    if !is_root() {
        return;
    }
    let (sandbox, id) = repository_of_nobody();
    sandbox.ok(&["init", "store"]);
    let ours = sandbox.upload("x.img", &[]);
    sandbox.ok(&["-s", "user/store", "delete", "--yes", &id]);
    let planted = "cd user/store; rm -rf packs pages; ln -s ../../store/packs packs; ln -s ../../store/pages pages";
    sandbox.sh(planted);
    let said = sandbox.fails(&["-s", "user/store", "gc", "--now"]);
    assert!(said.contains("cannot list pa") && said.contains("symbolic link"), "{said}");
    sandbox.ok(&["verify", &ours]);
}

#[test]
fn root_opens_no_pipe_device_or_link_in_the_place_of_an_object() {
    if !is_root() {
        return;
    }
    let (sandbox, id) = repository_of_nobody();
    let name = format!("snapshots/{id}.json");
    let object = sandbox.join("user/store").join(&name);
    std::fs::write(sandbox.join("secret"), "root's secret").unwrap();
    let put: [(&str, &dyn Fn()); 3] = [
        ("a pipe", &|| nix::unistd::mkfifo(&object, Mode::S_IRWXU).unwrap()),
        // No driver has this number: whoever opens it gets another error.
        ("a device", &|| {
            mknod(&object, SFlag::S_IFCHR, Mode::S_IRWXU, makedev(511, 7)).unwrap();
        }),
        ("a link", &|| {
            std::os::unix::fs::symlink(sandbox.join("secret"), &object).unwrap();
        }),
    ];
    for (what, put) in put {
        std::fs::remove_file(&object).unwrap();
        put();
        let output = run(sandbox.fspfs().args(["-s", "user/store", "verify", &id]));
        let said = text(&output);
        assert!(!output.status.success(), "{what}: {said}");
        assert!(said.contains(&name) && !said.contains("secret"), "{what}: {said}");
        let why = if what == "a link" { "symbolic link" } else { "it is no file" };
        assert!(said.contains(why), "{what}: {said}");
    }
}

#[test]
fn root_stages_and_keeps_its_state_in_no_directory_of_another_user() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.welcome_nobody();
    sandbox.image("x.img", MIB, &[(0, MIB)]);
    let theirs = sandbox.join("user/stage");
    assert!(
        sandbox.try_sh_as_nobody("mkdir -p user/stage/images user/state/fspfs").status.success()
    );
    let refused = |said: &str, place: &Path| {
        let place = format!("{} belongs to another user", place.display());
        assert!(said.contains(&place) && said.contains("leave out -E"), "{said}");
    };
    for staging in ["user/stage", "user/new"] {
        let said = sandbox.fails(&["mount", "--staging", staging, "mnt"]);
        let place = if staging == "user/new" { sandbox.join("user") } else { theirs.clone() };
        assert!(said.contains(&place.display().to_string()), "{said}");
        refused(&said, &sandbox.join("user"));
    }
    let doctor = run(sandbox.fspfs().args(["doctor", "--staging", "user/stage"]));
    refused(&text(&doctor), &sandbox.join("user"));
    // As `sudo -E` leaves it.
    let in_their_state = |arguments: &[&str]| {
        let state = sandbox.join("user/state");
        text(&run(sandbox.fspfs().env("XDG_STATE_HOME", state).args(arguments)))
    };
    refused(&in_their_state(&["mount", "mnt"]), &sandbox.join("user"));
    let keys = "mkdir -p user/state/fspfs/serve; umask 077; printf '[default]\\naws_access_key_id = A\\naws_secret_access_key = B\\n' >user/state/fspfs/serve/credentials";
    assert!(sandbox.try_sh_as_nobody(keys).status.success());
    refused(&in_their_state(&["serve", "--listen", "127.0.0.1:0"]), &sandbox.join("user"));
    let copied = sandbox.join("user/state/fspfs/serve/credentials");
    let said = sandbox.fails(&[
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--credentials",
        copied.to_str().unwrap(),
    ]);
    assert!(said.contains("it belongs to another user, 65534"), "{said}");
    // A transfer does without a journal, and says so.
    refused(&in_their_state(&["upload", "x.img"]), &sandbox.join("user"));
    let made = sandbox.try_sh("find user ! -uid 65534 | grep .");
    assert!(!made.status.success(), "made for root: {}", text(&made));
}

#[test]
fn a_link_or_another_users_file_in_a_staging_directory_is_refused() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let secret = sandbox.join("secret");
    std::fs::write(&secret, "root's secret").unwrap();
    std::fs::create_dir(sandbox.join("stage")).unwrap();
    std::fs::set_permissions(sandbox.join("stage"), std::fs::Permissions::from_mode(0o700))
        .unwrap();
    for name in ["lock", "staging.json"] {
        let place = sandbox.join("stage").join(name);
        let put: [(&str, &dyn Fn()); 3] = [
            ("is a link", &|| std::os::unix::fs::symlink(&secret, &place).unwrap()),
            ("has another name", &|| std::fs::hard_link(&secret, &place).unwrap()),
            ("belongs to another user", &|| {
                std::fs::write(&place, "").unwrap();
                std::os::unix::fs::chown(&place, Some(NOBODY), None).unwrap();
            }),
        ];
        for (why, put) in put {
            put();
            let said = sandbox.fails(&["mount", "--staging", "stage", "mnt"]);
            assert!(said.contains(&format!("{} {why}", place.display())), "{said}");
            std::fs::remove_file(&place).unwrap();
        }
    }
    assert_eq!(std::fs::read_to_string(secret).unwrap(), "root's secret");
    sandbox.assert_nothing_is_left();
}

#[test]
fn a_log_is_not_written_where_a_link_leads() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let victim = sandbox.join("victim");
    std::fs::write(&victim, "").unwrap();
    let log = fspfs::mount::log_file(&sandbox.join("mnt"));
    let logs = sandbox.join("state/fspfs/log");
    std::fs::create_dir_all(&logs).unwrap();
    let place = logs.join(log.file_name().unwrap());
    std::os::unix::fs::symlink(&victim, &place).unwrap();
    let said = sandbox.fails(&["mount", "mnt"]);
    assert!(said.contains(&format!("{} is a link", place.display())), "{said}");
    assert_eq!(victim.metadata().unwrap().len(), 0);
    sandbox.assert_nothing_is_left();
}

#[test]
fn a_process_is_believed_to_serve_a_mount_if_it_has_it_open() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    std::fs::create_dir(sandbox.join("other")).unwrap();
    let mount = sandbox.mount(&[]);
    let other = support::Mount::at(sandbox.join("other"), sandbox.fspfs(), &[]);
    let entry = fspfs::mount::our_mount(&mount.path).unwrap();
    assert!(fspfs::mount::is_served_by(&entry, mount.daemon.id()));
    for pid in [1, std::process::id()] {
        assert!(!fspfs::mount::is_served_by(&entry, pid), "{pid}");
    }
    // Another user's mount names one of root's processes.
    let theirs = fspfs::mount::MountEntry { owner: Some(NOBODY), ..entry };
    assert!(!fspfs::mount::is_served_by(&theirs, mount.daemon.id()));
    other.unmount();
    mount.unmount();
    sandbox.assert_nothing_is_left();
}
