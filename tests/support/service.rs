//! `fspfs serve` as the service that `ebs:` stores are behind.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Sandbox, wait};

/// It says where it is within this time, and has ended as long after it was told to.
const PATIENCE: Duration = Duration::from_secs(20);

const KEYS: [(&str, &str); 2] =
    [("AWS_ACCESS_KEY_ID", "AKIATEST"), ("AWS_SECRET_ACCESS_KEY", "test/secret")];

/// A service over the store of a sandbox, which ends with it.
pub struct Service {
    /// `http://127.0.0.1:PORT`
    pub url: String,
    child: Child,
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
        let (sender, ready) = mpsc::channel();
        let stdout = child.stdout.take().unwrap();
        std::thread::spawn(move || {
            let mut line = String::new();
            let _ = BufReader::new(stdout).read_line(&mut line);
            let _ = sender.send(line);
        });
        let line = ready.recv_timeout(PATIENCE).unwrap_or_default();
        let url = line.trim_end().rsplit_once(" is served at ").map(|(_, url)| url.to_owned());
        let mut service = Self { url: String::new(), child };
        service.url = url.unwrap_or_else(|| panic!("it does not serve: {line:?}"));
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
            .env("FSPFS_STORE", format!("ebs://us-east-1?endpoint={}", self.url))
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .envs(KEYS);
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
