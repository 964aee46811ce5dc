//! A server, and the clients of it that others wrote: boto3 and the AWS CLI.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};

use super::{Sandbox, run, skip, text, wait};

/// A server says where it is within this time, and has ended as long after it was told to.
const PATIENCE: Duration = Duration::from_secs(20);

/// Lines of its log that are shown when a test fails.
const LOG_LINES: usize = 30;

/// The Python that has boto3, with the AWS CLI beside it.
pub fn python() -> PathBuf {
    std::env::var_os("FSPFS_PYTHON").map_or_else(|| "python3".into(), PathBuf::from)
}

/// Whether the clients are there.
pub fn has_clients() -> bool {
    let python = python();
    let mut missing = Vec::new();
    // To import them takes a second; to find them does not.
    let find = "from importlib.util import find_spec as f; exit(not (f('boto3') and f('awscli')))";
    let found = Command::new(&python).args(["-c", find]).output();
    if !found.is_ok_and(|output| output.status.success()) || !aws_program().exists() {
        missing.push(format!("boto3 and awscli for {} (FSPFS_PYTHON)", python.display()));
    }
    skip(&missing)
}

/// The AWS CLI.
pub fn aws_program() -> PathBuf {
    python().with_file_name("aws")
}

/// `fspfs serve` in the foreground, ended with the test.
pub struct Server {
    /// `http://127.0.0.1:PORT`
    pub url: String,
    /// What a shell sets after `--print-env`: the variables of the AWS clients.
    pub environment: BTreeMap<String, String>,
    daemon: Child,
    log: Arc<Mutex<String>>,
    home: PathBuf,
}

impl Server {
    /// Serves the store `store` of the sandbox.
    pub fn new(sandbox: &Sandbox, options: &[&str]) -> Self {
        Self::of(sandbox, "store", options)
    }

    /// Serves any store.
    pub fn of(sandbox: &Sandbox, store: &str, options: &[&str]) -> Self {
        let mut fspfs = Self::command(sandbox);
        fspfs.args(["-s", store]);
        Self::run(sandbox, fspfs, options)
    }

    /// The program, without keys in its environment.
    pub fn command(sandbox: &Sandbox) -> Command {
        let mut fspfs = sandbox.fspfs();
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("AWS_") {
                fspfs.env_remove(name);
            }
        }
        fspfs.env_remove("FSPFS_STORE");
        fspfs
    }

    /// Serves with a command that is set up but for the subcommand and its options.
    pub fn run(sandbox: &Sandbox, mut fspfs: Command, options: &[&str]) -> Self {
        let own =
            |(name, value): (&OsStr, Option<&OsStr>)| Some((name.to_owned(), value?.to_owned()));
        let variables: Vec<_> = fspfs.get_envs().filter_map(own).collect();
        fspfs.args(["serve", "--listen", "127.0.0.1:0"]).args(options);
        let mut daemon = fspfs.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let (kept, stderr) = (Arc::clone(&log), daemon.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let mut log = kept.lock().unwrap();
                log.push_str(&line);
                log.push('\n');
            }
        });
        let (sender, ready) = mpsc::channel();
        let stdout = daemon.stdout.take().unwrap();
        std::thread::spawn(move || {
            let mut line = String::new();
            let _ = BufReader::new(stdout).read_line(&mut line);
            let _ = sender.send(line);
        });
        let line = ready.recv_timeout(PATIENCE).unwrap_or_default();
        let url = line.trim_end().rsplit_once(" is served at ").map(|(_, url)| url.to_owned());
        let home = sandbox.path.clone();
        let mut server =
            Self { url: String::new(), environment: BTreeMap::new(), daemon, log, home };
        server.url = url.unwrap_or_else(|| {
            let _ = wait(&mut server.daemon, Duration::from_secs(1));
            panic!("it does not serve: {line:?} {}", server.log())
        });
        let mut fspfs = Self::command(sandbox);
        server.environment = environment(fspfs.envs(variables), &server.url, options);
        server
    }

    /// `127.0.0.1:PORT`
    pub fn address(&self) -> &str {
        self.url.strip_prefix("http://").unwrap()
    }

    /// What it wrote to stderr so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// A program that finds the server, and nothing else of AWS.
    pub fn client(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(&self.home)
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
            .env("HOME", &self.home)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .env("AWS_PAGER", "")
            .envs(&self.environment)
            .stdin(Stdio::null());
        command
    }

    /// Runs a function of one of the scripts; what it printed.
    #[track_caller]
    pub fn script(&self, file: &str, arguments: &[&str]) -> String {
        let output = run(&mut self.python(file, arguments));
        succeeded(output, &format!("{file} {arguments:?}"))
    }

    /// A script with its arguments, the first of which is the function.
    pub fn python(&self, file: &str, arguments: &[&str]) -> Command {
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/serve");
        let mut command = self.client(&python());
        command.arg(scripts.join(file)).args(arguments);
        command
    }

    /// Runs the AWS CLI, which must succeed; the JSON that it printed.
    #[track_caller]
    pub fn aws(&self, arguments: &[&str]) -> serde_json::Value {
        let output = self.try_aws(arguments);
        let printed = succeeded(output, &format!("aws {arguments:?}"));
        if printed.trim().is_empty() {
            return serde_json::Value::Null;
        }
        serde_json::from_str(&printed)
            .unwrap_or_else(|e| panic!("aws {arguments:?}: {e}: {printed}"))
    }

    /// Runs the AWS CLI.
    pub fn try_aws(&self, arguments: &[&str]) -> Output {
        run(self.client(&aws_program()).args(arguments).args(["--output", "json"]))
    }

    /// The most memory that it ever had, in bytes.
    pub fn most_memory(&self) -> u64 {
        super::peak_memory(self.daemon.id())
    }

    /// Tells it to end.
    pub fn terminate(&self) {
        kill(nix::unistd::Pid::from_raw(self.daemon.id().cast_signed()), Signal::SIGTERM).unwrap();
    }

    /// Ends it as a crash would.
    pub fn kill(mut self) {
        self.daemon.kill().unwrap();
        self.daemon.wait().unwrap();
    }

    /// Ends it in order, which must not take long.
    #[track_caller]
    pub fn stop(mut self) {
        self.terminate();
        let status = wait(&mut self.daemon, PATIENCE).expect("it ends when it is told to");
        assert!(status.success(), "the server ended with {status}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.daemon.try_wait().unwrap().is_none() {
            self.terminate();
            if wait(&mut self.daemon, PATIENCE).is_none() {
                eprintln!("the server does not end");
                let _ = self.daemon.kill();
                let _ = self.daemon.wait();
            }
        }
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            let last = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
            eprintln!("the server at {} said at last:\n{last}", self.url);
        }
    }
}

#[track_caller]
fn succeeded(output: Output, what: &str) -> String {
    assert!(output.status.success(), "{what}: {}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// The variables of AWS that a shell has after it evaluated what `--print-env` prints.
fn environment(fspfs: &mut Command, url: &str, options: &[&str]) -> BTreeMap<String, String> {
    let address = url.strip_prefix("http://").unwrap();
    let output = run(fspfs.args(["serve", "--print-env", "--listen", address]).args(options));
    assert!(output.status.success(), "--print-env: {}", text(&output));
    let mut bash = Command::new("bash");
    // What is not for this server must be gone afterwards.
    bash.env_clear().env("AWS_PROFILE", "other").env("AWS_SESSION_TOKEN", "old");
    let output = run(bash
        .args(["-euc", "eval \"$1\"; /usr/bin/env -0", "bash"])
        .arg(String::from_utf8(output.stdout).unwrap()));
    assert!(output.status.success(), "{}", text(&output));
    let printed = String::from_utf8(output.stdout).unwrap();
    let pairs = printed.split('\0').filter_map(|pair| pair.split_once('='));
    let ours = pairs.filter(|(name, _)| name.starts_with("AWS_"));
    let found: BTreeMap<_, _> = ours.map(|(n, v)| (n.to_owned(), v.to_owned())).collect();
    assert!(!found.contains_key("AWS_PROFILE"));
    assert_eq!(found["AWS_ENDPOINT_URL_EBS"], url);
    found
}
