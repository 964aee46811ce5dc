//! `ebs:` stores over TLS, and through a proxy.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rstest::rstest;
use support::serve::python;
use support::service::has_moto;
use support::{MIB, Sandbox, can_mount, run, text};

/// The server says where it is within this time; Python makes keys first.
const PATIENCE: Duration = Duration::from_secs(30);

/// A TLS server before the service of a sandbox, and a proxy before that.
struct Tls {
    child: Child,
    port: u16,
    proxy: u16,
}

impl Tls {
    fn before(sandbox: &Sandbox) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/serve/tls.py");
        let mut command = Command::new(python());
        command.current_dir(&sandbox.path).arg(script).arg(sandbox.service().address());
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let (sender, ports) = std::sync::mpsc::channel();
        let stdout = child.stdout.take().unwrap();
        std::thread::spawn(move || {
            let mut line = String::new();
            let _ = BufReader::new(stdout).read_line(&mut line);
            let _ = sender.send(line);
        });
        let mut tls = Self { child, port: 0, proxy: 0 };
        let line = ports.recv_timeout(PATIENCE).expect("it says where it is");
        let (port, proxy) = line.trim().split_once(' ').expect("both ports");
        (tls.port, tls.proxy) = (port.parse().unwrap(), proxy.parse().unwrap());
        tls
    }

    /// The program, with this store and nothing of the system's proxies.
    fn fspfs(&self, sandbox: &Sandbox, host: &str) -> Command {
        let mut command = sandbox.fspfs();
        for name in ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"]
        {
            command.env_remove(name);
        }
        let store = format!("ebs://us-east-1?endpoint=https://{host}:{}", self.port);
        command.env("FSPFS_STORE", store);
        command
    }
}

impl Drop for Tls {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn sandbox() -> Option<(Sandbox, Tls)> {
    // Whoever has moto has `cryptography`.
    if !has_moto() {
        return None;
    }
    let mut sandbox = Sandbox::with_store();
    sandbox.image("disk.img", 8 * MIB, &[(0, 8 * MIB)]);
    sandbox.serve(&[]);
    let tls = Tls::before(&sandbox);
    Some((sandbox, tls))
}

fn succeeds(command: &mut Command) -> String {
    let output = run(command);
    assert!(output.status.success(), "{}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn an_authority_of_ones_own_is_trusted() {
    let Some((sandbox, tls)) = sandbox() else { return };
    // Beside one that nobody can use.
    let nonsense = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let own = std::fs::read_to_string(sandbox.join("ca.pem")).unwrap();
    std::fs::write(sandbox.join("bundle.pem"), format!("{nonsense}{own}")).unwrap();
    let fspfs = || {
        let mut command = tls.fspfs(&sandbox, "127.0.0.1");
        // Beside where it runs, as the configuration of the SDK may be.
        command.env("AWS_CA_BUNDLE", "bundle.pem");
        command
    };
    let id = succeeds(fspfs().args(["upload", "disk.img"])).lines().last().unwrap().to_owned();
    succeeds(fspfs().args(["download", &id, "out.img"]));
    assert_eq!(
        std::fs::read(sandbox.join("out.img")).unwrap(),
        std::fs::read(sandbox.join("disk.img")).unwrap()
    );
    let report = text(&run(fspfs().arg("doctor")));
    assert!(report.contains("only those of bundle.pem are trusted"), "{report}");
    if !can_mount(&["cmp"]) {
        return;
    }
    // The daemon runs elsewhere.
    std::fs::create_dir(sandbox.join("m")).unwrap();
    succeeds(fspfs().args(["mount", "m"]));
    let compared = run(Command::new("cmp")
        .arg(sandbox.join(format!("m/{id}.img")))
        .arg(sandbox.join("disk.img")));
    succeeds(fspfs().args(["umount", "m"]));
    assert!(compared.status.success(), "{}", text(&compared));
}

#[test]
fn a_server_that_nobody_vouches_for_is_refused_at_once() {
    let Some((sandbox, tls)) = sandbox() else { return };
    let began = Instant::now();
    let output = run(tls.fspfs(&sandbox, "127.0.0.1").args(["list"]));
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("certificate"), "{}", text(&output));
    // To try again brings nothing.
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn a_proxy_is_used_for_https() {
    let Some((sandbox, tls)) = sandbox() else { return };
    let fspfs = |password: &str| {
        let mut command = tls.fspfs(&sandbox, "ebs.example.internal");
        command.env("HTTPS_PROXY", format!("http://me:{password}@127.0.0.1:{}", tls.proxy));
        command.env("AWS_CA_BUNDLE", "ca.pem");
        command
    };
    let id =
        succeeds(fspfs("secret").args(["upload", "disk.img"])).lines().last().unwrap().to_owned();
    succeeds(fspfs("secret").args(["download", &id, "out.img"]));
    assert_eq!(
        std::fs::read(sandbox.join("out.img")).unwrap(),
        std::fs::read(sandbox.join("disk.img")).unwrap()
    );
    let report = text(&run(fspfs("secret").arg("doctor")));
    assert!(report.contains("127.0.0.1") && report.contains("HTTPS_PROXY"), "{report}");
    assert!(!report.contains("secret"), "{report}");
    let began = Instant::now();
    let output = run(fspfs("mistaken").args(["list"]));
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("407") || text(&output).contains("proxy"), "{}", text(&output));
    assert!(!text(&output).contains("mistaken"), "{}", text(&output));
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    // Past it, where that is said: its password does not matter.
    let mut past = tls.fspfs(&sandbox, "127.0.0.1");
    past.env("HTTPS_PROXY", format!("http://me:mistaken@127.0.0.1:{}", tls.proxy));
    past.envs([("AWS_CA_BUNDLE", "ca.pem"), ("NO_PROXY", "127.0.0.1")]);
    assert!(succeeds(past.arg("list")).contains(&id));
}

#[rstest]
#[case::proxy("HTTPS_PROXY", "socks5://me:secret@127.0.0.1:1")]
#[case::certificates("AWS_CA_BUNDLE", "missing.pem")]
fn nothing_is_done_without_what_was_asked_for(#[case] name: &str, #[case] value: &str) {
    let sandbox = Sandbox::new();
    for command in ["list", "doctor"] {
        let mut fspfs = sandbox.fspfs();
        fspfs.env("FSPFS_STORE", "ebs://us-east-1?endpoint=http://127.0.0.1:1").env(name, value);
        let output = run(fspfs.arg(command));
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        assert!(text(&output).contains(name), "{}", text(&output));
        assert!(!text(&output).contains("secret"), "{}", text(&output));
    }
}
