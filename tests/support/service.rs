//! A service that `ebs:` stores are behind: `fspfs serve`, or moto, which others wrote.

use std::io::{BufRead as _, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::serve::python;
use super::{Sandbox, run, skip, text, wait};

/// It says where it is within this time, and has ended as long after it was told to.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long moto may take to begin: it is Python, and imports much.
const PATIENCE_WITH_MOTO: Duration = Duration::from_mins(1);

const KEYS: [(&str, &str); 2] =
    [("AWS_ACCESS_KEY_ID", "AKIATEST"), ("AWS_SECRET_ACCESS_KEY", "test/secret")];

const REGION: &str = "us-east-1";

/// The server of moto, beside the Python that has the clients.
fn moto_program() -> PathBuf {
    python().with_file_name("moto_server")
}

/// Whether moto is there.
pub fn has_moto() -> bool {
    let program = moto_program();
    let missing = (!program.exists()).then(|| format!("{} (FSPFS_PYTHON)", program.display()));
    skip(&missing.into_iter().collect::<Vec<_>>())
}

/// A service over the store of a sandbox, which ends with it.
pub struct Service {
    /// `http://127.0.0.1:PORT`
    pub url: String,
    child: Child,
    home: PathBuf,
}

impl Service {
    pub fn new(sandbox: &Sandbox, options: &[&str]) -> Self {
        Self::at(sandbox, "127.0.0.1:0", options)
    }

    /// One at this address.
    pub fn at(sandbox: &Sandbox, address: &str, options: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fspfs"));
        command
            .current_dir(&sandbox.path)
            .env("XDG_STATE_HOME", sandbox.join("state"))
            .env_remove("FSPFS_STORE")
            .envs(KEYS)
            .args(["serve", "--quiet", "-s", "store", "--listen", address])
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdout = Box::new(child.stdout.take().unwrap());
        Self::ready(sandbox, child, stdout, " is served at ", PATIENCE)
    }

    /// A moto with nothing in it but the snapshots that it makes up itself.
    pub fn moto(sandbox: &Sandbox) -> Self {
        let mut command = Command::new(moto_program());
        command
            .current_dir(&sandbox.path)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .args(["-H", "127.0.0.1", "-p", "0"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stderr = Box::new(child.stderr.take().unwrap());
        Self::ready(sandbox, child, stderr, " * Running on ", PATIENCE_WITH_MOTO)
    }

    /// Waits until it says where it is, and lets it say what it likes from then on.
    fn ready(
        sandbox: &Sandbox,
        child: Child,
        says: Box<dyn Read + Send>,
        before: &'static str,
        patience: Duration,
    ) -> Self {
        let (sender, ready) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(says).lines().map_while(Result::ok) {
                let url = line.split_once(before).map(|(_, url)| url.trim_end().to_owned());
                let _ = url.map(|url| sender.send(url));
            }
        });
        let mut service = Self { url: String::new(), child, home: sandbox.path.clone() };
        service.url = ready.recv_timeout(patience).expect("it says where it is");
        service
    }

    /// `127.0.0.1:PORT`
    pub fn address(&self) -> String {
        self.url.strip_prefix("http://").unwrap().to_owned()
    }

    /// Sets up a program to find it, and nothing else of AWS.
    pub fn show_to(&self, command: &mut Command) {
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("AWS_") {
                command.env_remove(name);
            }
        }
        command
            .env("FSPFS_STORE", format!("ebs://{REGION}?endpoint={}", self.url))
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .envs(KEYS);
    }

    /// Runs a function of one of the scripts in `tests/serve` with boto3, in the directory of the
    /// sandbox, which must succeed; what it printed.
    #[track_caller]
    pub fn script(&self, file: &str, arguments: &[&str]) -> String {
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/serve");
        let mut command = Command::new(python());
        self.show_to(&mut command);
        command
            .current_dir(&self.home)
            .env("HOME", &self.home)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("AWS_REGION", REGION)
            .env("AWS_DEFAULT_REGION", REGION)
            .envs(["EBS", "EC2"].map(|service| (format!("AWS_ENDPOINT_URL_{service}"), &self.url)))
            .arg(scripts.join(file))
            .args(arguments)
            .stdin(Stdio::null());
        let output = run(&mut command);
        assert!(output.status.success(), "{file} {arguments:?}: {}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Stops it in the middle of whatever it does; `resume` goes on.
    pub fn suspend(&self) {
        self.signal(Signal::SIGSTOP);
    }

    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }
}

impl Service {
    /// Ends it; what remains is its address.
    pub fn stop(&mut self) {
        if self.child.try_wait().unwrap().is_some() {
            return;
        }
        self.signal(Signal::SIGCONT);
        self.signal(Signal::SIGTERM);
        if wait(&mut self.child, PATIENCE).is_none() {
            eprintln!("the service does not end");
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop();
    }
}
