//! How a server is started, what goes wrong with it on purpose, and what it stands.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use super::support::serve::{Server, has_clients};
use super::support::{MIB, Sandbox, run, text};

/// A server that does not start: its exit code, and what it says.
fn refused(mut fspfs: Command, options: &[&str]) -> (Option<i32>, String) {
    let output = run(fspfs.args(["serve"]).args(options));
    assert!(output.stdout.is_empty(), "{}", text(&output));
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

fn of_store(sandbox: &Sandbox) -> Command {
    let mut fspfs = Server::command(sandbox);
    fspfs.args(["-s", "store"]);
    fspfs
}

#[test]
fn all_profiles_of_a_file_are_good() {
    if !has_clients() {
        return;
    }
    let sandbox = Sandbox::with_store();
    let profile = |name: &str, key: &str| {
        format!("[{name}]\naws_access_key_id = {key}\naws_secret_access_key = secret of {key}\n\n")
    };
    let path = sandbox.join("keys");
    std::fs::write(&path, profile("other", "AKIAOTHER") + &profile("default", "AKIADEFAULT"))
        .unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    let (code, said) = refused(of_store(&sandbox), &["--credentials", "keys"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("can be read by others"), "{said}");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let server = Server::new(&sandbox, &["--credentials", "keys"]);
    server.script("access.py", &["it_is", "AKIADEFAULT"]);
    server.script("access.py", &["both_profiles_are_good", "AKIADEFAULT", "AKIAOTHER"]);
    let log = server.log();
    assert!(log.contains("AKIADEFAULT") && !log.contains("secret of"), "{log}");
    server.stop();
    std::fs::write(&path, "[default]\nregion = us-east-1\n").unwrap();
    let (code, said) = refused(of_store(&sandbox), &["--credentials", "keys"]);
    assert!(code == Some(1) && said.contains("holds no keys"), "{code:?} {said}");
    let (code, said) = refused(of_store(&sandbox), &["--credentials", "missing"]);
    assert!(code == Some(1) && said.contains("missing"), "{code:?} {said}");
}

#[test]
fn keys_come_from_the_environment() {
    if !has_clients() {
        return;
    }
    let sandbox = Sandbox::with_store();
    let mut fspfs = of_store(&sandbox);
    fspfs.env("AWS_ACCESS_KEY_ID", "AKIAENV").env("AWS_SECRET_ACCESS_KEY", "s/e+c=r et");
    fspfs.env("AWS_SESSION_TOKEN", "session/token==");
    // What is printed for clients is of the same environment.
    let server = Server::run(&sandbox, fspfs, &[]);
    server.script("access.py", &["it_is", "AKIAENV"]);
    server.script("access.py", &["with_a_session", "session/token=="]);
    server.stop();
}

#[test]
fn without_keys_it_is_for_this_machine_alone() {
    if !has_clients() {
        return;
    }
    let sandbox = Sandbox::with_store();
    let server = Server::new(&sandbox, &["--no-auth"]);
    assert_eq!(server.environment["AWS_ACCESS_KEY_ID"], "none");
    server.script("access.py", &["everybody_on_this_machine"]);
    server.stop();
    for address in ["0.0.0.0:0", "192.0.2.1:4560", "[::]:0"] {
        let (code, said) = refused(of_store(&sandbox), &["--no-auth", "--listen", address]);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("--no-auth is for this machine alone"), "{said}");
    }
    let (code, said) = refused(of_store(&sandbox), &["--no-auth", "--credentials", "keys"]);
    assert_eq!(code, Some(2), "{said}");
    let (code, said) = refused(of_store(&sandbox), &["--inject", "throttle=often"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("throttle=often") && said.contains("as in `latency=20ms"), "{said}");
}

/// A test for each of these functions, with what goes wrong for it.
macro_rules! faults {
    ($($function:ident: $spec:literal)*) => {$(
        #[test]
        fn $function() {
            if !has_clients() {
                return;
            }
            let sandbox = Sandbox::with_store();
            let server = Server::new(&sandbox, &["--inject", $spec]);
            server.script("faults.py", &[stringify!($function)]);
            server.stop();
        }
    )*};
}

faults! {
    errors_have_their_names: "start.throttle=100%,put.error=100%,ec2.throttle=100%,\
        complete.fail=ServiceQuotaExceededException,list.fail=FailedToReadBlockData,\
        get.fail=DependencyAccessDenied,changed.fail=ServiceUnavailable"
    answers_are_damaged: "get.corrupt=100%"
    answers_are_cut_short: "get.cut-body=100%"
    connections_are_cut: "get.cut=100%"
    pages_are_empty: "empty-pages=70%,seed=3"
    a_snapshot_is_not_known_at_once: "missing-after-start=2s"
    tokens_end_early: "tokens=2s"
    a_rate_is_kept: "get.rate=0.2/s:5,put.snapshot-rate=0.1/s:10"
    retries_bring_the_right_bytes: "throttle=20%,error=10%,cut=5%,seed=3"
}

#[test]
fn a_seed_repeats_what_happens() {
    if !has_clients() {
        return;
    }
    let sandbox = Sandbox::with_store();
    let outcomes = |seed: &str| {
        let faults = format!("get.throttle=20%,get.error=10%,get.corrupt=20%,seed={seed}");
        let server = Server::new(&sandbox, &["--inject", &faults]);
        let outcomes = server.script("faults.py", &["what_happens"]);
        server.stop();
        outcomes
    };
    let once = outcomes("5");
    for outcome in ["good", "wrong", "RequestThrottledException", "InternalServerException"] {
        assert!(once.contains(outcome), "no {outcome} in {once}");
    }
    assert_eq!(once, outcomes("5"));
    assert_ne!(once, outcomes("6"));
}

#[test]
fn slow_clients_do_not_keep_others_out() {
    if !has_clients() {
        return;
    }
    let sandbox = Sandbox::with_store();
    let server = Server::new(&sandbox, &[]);
    server.script("load.py", &["slow_clients"]);
    let memory = server.most_memory();
    assert!(memory < 250 * MIB, "it had {} MiB", memory / MIB);
    server.stop();
}

#[test]
fn what_is_too_large_is_refused() {
    if !has_clients() {
        return;
    }
    let sandbox = Sandbox::with_store();
    let server = Server::new(&sandbox, &[]);
    server.script("load.py", &["too_large"]);
    server.stop();
}

#[test]
fn a_tebibyte_is_listed_by_pages() {
    if !has_clients() {
        return;
    }
    let sandbox = Sandbox::new();
    let server = Server::of(&sandbox, "synth:?size=1TiB&changed=25000", &[]);
    server.script("load.py", &["a_tebibyte"]);
    let memory = server.most_memory();
    assert!(memory < 200 * MIB, "it had {} MiB", memory / MIB);
    server.stop();
}

#[test]
fn what_is_computed_is_read_and_not_written() {
    if !has_clients() {
        return;
    }
    let sandbox = Sandbox::new();
    let server = Server::of(&sandbox, "synth:?size=1GiB&density=0.01&lineages=2", &[]);
    server.script("load.py", &["a_store_that_is_only_read"]);
    server.stop();
}

#[test]
fn what_is_somebody_elses_is_not_offered_to_everybody() {
    let sandbox = Sandbox::new();
    let mut fspfs = sandbox.fspfs();
    fspfs.args(["-s", "ebs://us-east-1"]);
    let (code, said) = refused(fspfs, &["--no-auth"]);
    assert_eq!(code, Some(1));
    assert!(said.contains("--no-auth is not for ebs://us-east-1"), "{said}");
}
