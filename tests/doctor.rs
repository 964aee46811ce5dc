//! `fspfs doctor`: what it finds, that it says how to mend it, and that it always ends.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use support::serve::Server;
use support::{BLOCK, MIB, Mount, Sandbox, can_mount, can_mount_as_nobody, run, text};

/// It has to have ended within this time, whatever does not answer.
const LIMIT: Duration = Duration::from_secs(40);

/// A pair of keys that no server knows.
const KEY: &str = "AKIAIOSFODNN7EXAMPLE";
const SECRET: &str = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY";

/// The program without anything of AWS but an empty home.
fn alone(sandbox: &Sandbox, arguments: &[&str]) -> Command {
    let mut command = Server::command(sandbox);
    command.env("HOME", sandbox.join("state")).env("AWS_EC2_METADATA_DISABLED", "true");
    for name in ["SUDO_USER", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"] {
        command.env_remove(name);
    }
    command.arg("doctor").args(arguments);
    command
}

/// The same, with keys that no server knows.
fn with_keys(sandbox: &Sandbox, arguments: &[&str]) -> Command {
    let mut command = alone(sandbox, arguments);
    command.env("AWS_ACCESS_KEY_ID", KEY).env("AWS_SECRET_ACCESS_KEY", SECRET);
    command
}

/// What it found, as `--json` gives it, with the exit code.
struct Found {
    checks: Vec<Value>,
    code: i32,
    took: Duration,
}

impl Found {
    #[track_caller]
    fn by(command: &mut Command) -> Self {
        let began = Instant::now();
        let output = run(command.arg("--json"));
        let took = began.elapsed();
        assert!(took < LIMIT, "it took {took:?}");
        let all = text(&output);
        assert!(!all.contains(SECRET) && !all.contains(KEY), "{all}");
        let Value::Array(checks) = serde_json::from_slice(&output.stdout).expect(&all) else {
            panic!("{all}");
        };
        for check in &checks {
            let needs_cure = ["warning", "failure"].contains(&check["status"].as_str().unwrap());
            assert_eq!(check["cure"].is_string(), needs_cure, "{check}");
        }
        Self { checks, code: output.status.code().unwrap(), took }
    }

    #[track_caller]
    fn get(&self, check: &str) -> &Value {
        let found = self.checks.iter().find(|found| found["check"] == check);
        found.unwrap_or_else(|| panic!("no {check} in {:#?}", self.checks))
    }

    /// Asserts how a check ended, and that this was found.
    #[track_caller]
    fn assert(&self, check: &str, status: &str, found: &str) {
        let got = self.get(check);
        assert_eq!(got["status"], status, "{got}");
        assert!(got["found"].as_str().unwrap().contains(found), "{got}");
    }

    fn failures(&self) -> Vec<&str> {
        let failed = self.checks.iter().filter(|check| check["status"] == "failure");
        failed.map(|check| check["check"].as_str().unwrap()).collect()
    }
}

/// What fails on this machine, which is not what a test is about.
fn of_machine(sandbox: &Sandbox) -> Vec<String> {
    let found = Found::by(&mut alone(sandbox, &["-s", "synth:"]));
    found.failures().into_iter().map(str::to_owned).collect()
}

/// A mount that does not answer. What waits for it could not be ended if it stayed so.
struct Stopped(Pid);

impl Stopped {
    fn new(mount: &Mount) -> Self {
        let pid = Pid::from_raw(mount.daemon.id().cast_signed());
        kill(pid, Signal::SIGSTOP).unwrap();
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        kill(self.0, Signal::SIGCONT).unwrap();
    }
}

/// A port on which nobody listens.
fn silent_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn a_server_with_snapshots_is_fine() {
    let sandbox = Sandbox::with_store();
    sandbox.image("a.img", MIB, &[(0, MIB)]);
    let first = sandbox.upload("a.img", &["--volume-id", "vol-0123456789abcdef0"]);
    let second = sandbox
        .upload("a.img", &["--volume-id", "vol-0123456789abcdef0", "--parent-snapshot-id", &first]);
    let server = Server::new(&sandbox, &[]);
    let mut command = alone(&sandbox, &["-s", "ebs:"]);
    let found = Found::by(command.envs(&server.environment));
    found.assert("credentials", "ok", "from the environment: a static key");
    found.assert("region", "ok", "us-east-1, of AWS_REGION");
    found.assert("endpoint of EC2", "ok", &format!("{}, of AWS_ENDPOINT_URL_EC2", server.url));
    found.assert("endpoint of EBS direct APIs", "ok", "of AWS_ENDPOINT_URL_EBS");
    found.assert("clock", "ok", "it agrees");
    found.assert("signature", "ok", "accepted");
    found.assert("identity", "ok", "account ");
    found.assert("ec2:DescribeSnapshots", "ok", "allowed");
    found.assert("ebs:ListSnapshotBlocks", "ok", "allowed: snap-");
    found.assert("ebs:GetSnapshotBlock", "ok", "allowed: block 0 of snap-");
    let changed = found.get("ebs:ListChangedBlocks");
    assert_eq!(changed["status"], "ok", "{changed}");
    for id in [&first, &second] {
        assert!(changed["found"].as_str().unwrap().contains(id.as_str()), "{changed}");
    }
    for action in ["ec2:CreateTags", "ec2:DeleteTags", "ec2:DeleteSnapshot"] {
        found.assert(action, "ok", "dry run");
    }
    found.assert("encryption by default", "warning", "InvalidAction");
    assert_eq!(found.failures(), of_machine(&sandbox));
    // Nothing was changed.
    assert_eq!(sandbox.ok(&["list"]).lines().count(), 3);
    server.stop();
}

#[test]
fn the_default_store_is_that_of_aws() {
    let sandbox = Sandbox::with_store();
    let server = Server::new(&sandbox, &[]);
    let output = run(alone(&sandbox, &[]).envs(&server.environment));
    let printed = stdout(&output);
    assert!(printed.contains(&format!("endpoint of EC2: {}", server.url)), "{}", text(&output));
    assert!(printed.contains("skipped  ebs:GetSnapshotBlock: not tried: there is no completed"));
    assert!(printed.lines().last().unwrap().contains(" warning"), "{printed}");
    server.stop();
}

#[test]
fn the_store_says_where_and_its_profile_goes_before_the_environment() {
    let sandbox = Sandbox::with_store();
    let server = Server::new(&sandbox, &[]);
    let store = format!("ebs://work@eu-central-1?endpoint={}", server.url);
    let [id, secret] = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"];
    let keys = format!(
        "[work]\naws_access_key_id = {}\naws_secret_access_key = {}\n",
        server.environment[id], server.environment[secret]
    );
    std::fs::write(sandbox.join("keys"), keys).unwrap();
    let found = Found::by(
        alone(&sandbox, &["-s", &store])
            .env("AWS_SHARED_CREDENTIALS_FILE", sandbox.join("keys"))
            .envs([(id, "AKIAOTHER"), (secret, "other")]),
    );
    found.assert("region", "ok", "eu-central-1, as the store says");
    found.assert("endpoint of EC2", "ok", "as the store says");
    found.assert("identity", "ok", "account ");
    // One that is not there is not made up for by the environment.
    let other = format!("ebs://elsewhere@eu-central-1?endpoint={}", server.url);
    let mut command = alone(&sandbox, &["-s", &other]);
    let found = Found::by(command.envs([(id, "AKIAOTHER"), (secret, "other")]));
    found.assert("credentials", "failure", "elsewhere");
    server.stop();
}

#[test]
fn wrong_keys_are_told_and_nothing_is_asked_after_them() {
    let sandbox = Sandbox::with_store();
    let server = Server::new(&sandbox, &[]);
    let store = format!("ebs:?endpoint={}", server.url);
    let found = Found::by(&mut with_keys(&sandbox, &["-s", &store]));
    found.assert("credentials", "ok", "…MPLE");
    found.assert("endpoint of EC2", "ok", "answered");
    found.assert("signature", "failure", "EC2 does not accept it: AuthFailure");
    found.assert("reading", "skipped", "because the signature was not accepted");
    assert_eq!(found.code, 1);
    server.stop();
}

#[test]
fn without_credentials_the_endpoints_are_looked_at_all_the_same() {
    let sandbox = Sandbox::with_store();
    let server = Server::new(&sandbox, &[]);
    let store = format!("ebs:?endpoint={}", server.url);
    let found = Found::by(&mut alone(&sandbox, &["-s", &store]));
    found.assert("credentials", "failure", "there are none");
    let cure = found.get("credentials")["cure"].as_str().unwrap();
    assert!(cure.contains("aws configure"), "{cure}");
    found.assert("region", "warning", "us-east-1, since nothing names one");
    found.assert("endpoint of EC2", "ok", "answered");
    found.assert("clock", "ok", "agrees");
    found.assert("reading", "skipped", "because there are no credentials");
    assert_eq!(found.code, 1);
    let mut command = alone(&sandbox, &["-s", &store]);
    let found = Found::by(command.env("AWS_PROFILE", "work"));
    found.assert("credentials", "failure", "in the profile work");
    server.stop();
}

#[test]
fn root_by_sudo_is_told_how_to_take_the_configuration_along() {
    if !nix::unistd::geteuid().is_root() {
        support::skip(&["root".to_owned()]);
        return;
    }
    let sandbox = Sandbox::new();
    let store = format!("ebs:?endpoint=http://127.0.0.1:{}", silent_port());
    let mut command = alone(&sandbox, &["-s", &store]);
    let found = Found::by(command.env("SUDO_USER", "nobody"));
    let cure = found.get("credentials")["cure"].as_str().unwrap();
    assert!(cure.contains("sudo --preserve-env") && cure.contains("of nobody"), "{cure}");
}

#[test]
fn a_port_where_nobody_listens_is_told() {
    let sandbox = Sandbox::new();
    let store = format!("ebs://us-west-2?endpoint=http://127.0.0.1:{}", silent_port());
    let found = Found::by(&mut with_keys(&sandbox, &["-s", &store]));
    found.assert("endpoint of EC2", "failure", "the connection is refused");
    found.assert("endpoint of EBS direct APIs", "failure", "the connection is refused");
    found.assert("clock", "skipped", "no answer");
    found.assert("reading", "skipped", "because EC2 does not answer");
    assert_eq!(found.code, 1);
}

#[test]
fn a_name_that_leads_nowhere_is_told() {
    let sandbox = Sandbox::new();
    let store = "ebs://us-west-2?endpoint=http://nowhere.invalid";
    let found = Found::by(&mut with_keys(&sandbox, &["-s", store]));
    found.assert("endpoint of EC2", "failure", "its name is not found");
}

#[test]
fn a_port_that_accepts_and_never_answers_keeps_nobody() {
    let sandbox = Sandbox::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let kept: Vec<_> = listener.incoming().collect();
        drop(kept);
    });
    let store = format!("ebs://us-west-2?endpoint=http://127.0.0.1:{port}");
    let found = Found::by(&mut with_keys(&sandbox, &["-s", &store]));
    found.assert("endpoint of EC2", "failure", "it is connected, and does not answer");
    found.assert("writing", "skipped", "because EC2 does not answer");
    assert_eq!(found.code, 1);
    // Both services are asked at the same time, once.
    assert!(found.took < Duration::from_secs(13), "it took {:?}", found.took);
}

#[test]
fn a_page_of_html_is_no_answer() {
    let sandbox = Sandbox::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let page = "<html><body>Please log in</body></html>";
            let head = "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close";
            let _ = stream.read(&mut [0; 4096]);
            let _ = write!(stream, "{head}\r\nContent-Length: {}\r\n\r\n{page}", page.len());
        }
    });
    let store = format!("ebs://us-west-2?endpoint=http://127.0.0.1:{port}");
    let found = Found::by(&mut with_keys(&sandbox, &["-s", &store]));
    for service in ["EC2", "EBS direct APIs"] {
        let endpoint = format!("endpoint of {service}");
        found.assert(&endpoint, "failure", "there is no answer that can be understood");
    }
    assert_eq!(found.code, 1);
}

#[test]
fn a_repository_is_looked_at() {
    let sandbox = Sandbox::with_store();
    let found = Found::by(&mut alone(&sandbox, &["-s", "store"]));
    found.assert("repository", "ok", "opens: format 1");
    found.assert("writing to it", "ok", "can be written");
    assert!(found.get("room in it")["found"].as_str().unwrap().contains("free"));
    assert_eq!(found.failures(), of_machine(&sandbox));
    let found = Found::by(&mut alone(&sandbox, &["-s", "elsewhere"]));
    found.assert("repository", "failure", "does not exist");
    found.assert("writing to it", "skipped", "because the repository does not open");
    assert_eq!(found.code, 1);
}

#[test]
fn what_an_ordinary_user_cannot_write_is_told() {
    if !can_mount_as_nobody(&[]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.welcome_nobody();
    sandbox.sh("chmod -R a+rX store");
    let store = sandbox.join("store");
    let mut command = sandbox.fspfs_as_nobody();
    let found = Found::by(command.args(["doctor", "-s"]).arg(&store));
    found.assert("writing to it", "warning", "can only be read");
    found.assert("fusermount3", "ok", "fusermount3");
    found.assert("raising the read-ahead", "warning", "only root");
    assert!(["ok", "warning"].contains(&found.get("user_allow_other")["status"].as_str().unwrap()));
    let mut command = sandbox.fspfs_as_nobody();
    let found = Found::by(command.args(["doctor", "-s", "synth:"]).env("FSPFS_STAGING", &store));
    assert!(!found.checks.iter().any(|check| check["check"] == "staging directory"));
    let mut command = sandbox.fspfs_as_nobody();
    let found =
        Found::by(command.args(["doctor", "--staging"]).arg(&store).args(["-s"]).arg(&store));
    found.assert("staging directory", "warning", "nothing can be written");
}

#[test]
fn a_place_to_mount_at_is_looked_at() {
    let sandbox = Sandbox::new();
    let found = Found::by(&mut alone(&sandbox, &["-s", "synth:", "mnt"]));
    found.assert("store", "ok", "needs nothing");
    found.assert("mount point", "ok", "is an empty directory");
    std::fs::write(sandbox.join("mnt/thesis.txt"), "").unwrap();
    let found = Found::by(&mut alone(&sandbox, &["-s", "synth:", "mnt"]));
    found.assert("mount point", "failure", "not empty");
    let found = Found::by(&mut alone(&sandbox, &["-s", "synth:", "nothing"]));
    found.assert("mount point", "failure", "does not exist");
    assert_eq!(found.code, 1);
}

#[test]
fn a_mount_answers_or_does_not() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.image("a.img", BLOCK, &[(0, BLOCK)]);
    sandbox.upload("a.img", &[]);
    let mut mount = sandbox.mount(&[]);
    let found = Found::by(&mut alone(&sandbox, &["-s", "store", "mnt"]));
    found.assert("mount point", "ok", "and answers");
    assert!(found.get("read-ahead")["found"].as_str().unwrap().contains("KiB"));
    let stopped = Stopped::new(&mount);
    let found = Found::by(&mut alone(&sandbox, &["-s", "synth:", "mnt"]));
    drop(stopped);
    found.assert("mount point", "failure", "no answer within 5 s");
    assert_eq!(found.code, 1);
    mount.daemon.kill().unwrap();
    mount.daemon.wait().unwrap();
    let found = Found::by(&mut alone(&sandbox, &["-s", "synth:", "mnt"]));
    found.assert("mount point", "warning", "a killed fspfs left");
}
