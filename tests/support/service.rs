//! A service that `ebs:` stores are behind: `fspfs serve`, or moto, which others wrote.

use std::io::{BufRead as _, BufReader, Read};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

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

/// The bucket of those that have one.
const BUCKET: &str = "bucket";

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

/// The server of `SeaweedFS`, beside it.
fn weed_program() -> PathBuf {
    python().with_file_name("weed")
}

/// Whether the servers of buckets are there.
pub fn has_buckets() -> bool {
    let programs = [moto_program(), weed_program()].into_iter();
    let missing = programs.filter(|program| !program.exists());
    skip(
        &missing.map(|program| format!("{} (FSPFS_PYTHON)", program.display())).collect::<Vec<_>>(),
    )
}

/// The server of `s3rver`, beside it, which takes no notice of conditions.
fn s3rver_program() -> PathBuf {
    python().parent().unwrap().with_file_name("s3rver").join("node_modules/.bin/s3rver")
}

/// Whether it is there.
pub fn has_s3rver() -> bool {
    let program = s3rver_program();
    let missing = (!program.exists()).then(|| format!("{} (FSPFS_PYTHON)", program.display()));
    skip(&missing.into_iter().collect::<Vec<_>>())
}

/// A port that nobody listens at, below those that outgoing connections get.
fn free_port() -> u16 {
    loop {
        let port = fastrand::u16(10_000..32_000);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A service over the store of a sandbox, which ends with it.
pub struct Service {
    /// `http://127.0.0.1:PORT`
    pub url: String,
    child: Child,
    home: PathBuf,
    bucket: Option<&'static str>,
    keys: [(&'static str, &'static str); 2],
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

    /// A bucket of S3 in a moto.
    pub fn bucket(sandbox: &Sandbox) -> Self {
        let mut service = Self::moto(sandbox);
        service.make_bucket();
        service
    }

    /// A bucket in a `SeaweedFS`, which looks at signatures and digests.
    pub fn seaweed(sandbox: &Sandbox) -> Self {
        std::fs::create_dir(sandbox.join("weed")).unwrap();
        let keys = serde_json::json!({ "identities": [{
            "name": "test",
            "credentials": [{ "accessKey": KEYS[0].1, "secretKey": KEYS[1].1 }],
            "actions": ["Admin", "Read", "Write", "List"],
        }]});
        std::fs::write(sandbox.join("keys.json"), keys.to_string()).unwrap();
        // Its own connections would take a port of those that anybody gets.
        let ports: Vec<_> = (0..8).map(|_| free_port()).collect();
        let names = ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc"];
        let names =
            names.iter().chain(&["filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc"]);
        let mut command = Command::new(weed_program());
        command
            .current_dir(&sandbox.path)
            .args(["server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-dir=weed", "-filer", "-s3"])
            .args(["-s3.config=keys.json", "-master.volumeSizeLimitMB=64", "-volume.max=64"])
            .args(["-s3.port.iceberg=0", "-s3.port.lance=0"])
            .args(names.zip(&ports).map(|(name, port)| format!("-{name}={port}")))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(sandbox.join("weed.log")).unwrap());
        let child = command.spawn().unwrap();
        let url = format!("http://127.0.0.1:{}", ports[6]);
        let mut service = Self { url, child, home: sandbox.path.clone(), bucket: None, keys: KEYS };
        service.make_bucket();
        service
    }

    /// A bucket in an `s3rver`, which takes no notice of conditions.
    pub fn s3rver(sandbox: &Sandbox) -> Self {
        let port = free_port();
        let mut command = Command::new(s3rver_program());
        command
            .current_dir(&sandbox.path)
            .args(["-a", "127.0.0.1", "-d", "s3rver", "-p", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        std::fs::create_dir(sandbox.join("s3rver")).unwrap();
        let child = command.spawn().unwrap();
        let url = format!("http://127.0.0.1:{port}");
        let keys = [(KEYS[0].0, "S3RVER"), (KEYS[1].0, "S3RVER")];
        let mut service = Self { url, child, home: sandbox.path.clone(), bucket: None, keys };
        service.make_bucket();
        service
    }

    fn make_bucket(&mut self) {
        let end = Instant::now() + PATIENCE_WITH_MOTO;
        // SeaweedFS does not say when it is ready.
        while !self.aws(&["s3api", "create-bucket", "--bucket", BUCKET]).status.success() {
            assert!(Instant::now() < end, "no bucket can be made");
            std::thread::sleep(Duration::from_millis(500));
        }
        self.bucket = Some(BUCKET);
    }

    /// Runs the AWS CLI.
    pub fn aws(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(python().with_file_name("aws"));
        self.show_to(&mut command);
        command
            .current_dir(&self.home)
            .env("HOME", &self.home)
            .env("AWS_DEFAULT_REGION", REGION)
            .args(["--endpoint-url", &self.url, "--cli-read-timeout", "20"])
            .args(arguments)
            .stdin(Stdio::null());
        run(&mut command)
    }

    /// The names of the objects that begin so.
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let list = ["s3api", "list-objects-v2", "--bucket", BUCKET, "--prefix", prefix];
        let output =
            self.aws(&[&list[..], &["--query", "Contents[].Key", "--output", "json"]].concat());
        assert!(output.status.success(), "{}", text(&output));
        serde_json::from_slice::<Option<Vec<String>>>(&output.stdout).unwrap().unwrap_or_default()
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
        let home = sandbox.path.clone();
        let mut service = Self { url: String::new(), child, home, bucket: None, keys: KEYS };
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
        let store = match self.bucket {
            Some(bucket) => format!("s3://{bucket}/snaps?region={REGION}&endpoint={}", self.url),
            None => format!("ebs://{REGION}?endpoint={}", self.url),
        };
        command.env("FSPFS_STORE", store).env("AWS_EC2_METADATA_DISABLED", "true").envs(self.keys);
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
