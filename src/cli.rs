//! The grammar of the command line, from which the help, the man page and the completions are made.

use std::ffi::OsString;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;

use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use crate::arguments::{EncryptedHoles, ScopeArgs, ScreenArgs, values};
use crate::cache::DEFAULT_BUDGET;
use crate::ops::table;
use crate::shown;
use crate::store::StoreUrl;
use crate::store::ebs::EbsUrl;

mod bars;
mod complete;
mod control;
mod doctor;
mod jobs;
mod mount;
mod output;
mod run;
mod serve;
mod signals;
mod staged;
mod umount;

pub use crate::ops::Exit;
pub use complete::complete;
pub use output::tell;
pub use run::run;

const EXAMPLES: &str = "\
Examples:
  fspfs init /srv/snaps                          make an empty repository
  fspfs -s /srv/snaps upload disk.img            put a disk image into it
  fspfs -s /srv/snaps mount /mnt/fsp             see its snapshots as files
  cp /mnt/fsp/snap-0123456789abcdef0.img /dev/sdb
  losetup -r -P --direct-io=on -f --show /mnt/fsp/by-name/web.img
  fspfs umount /mnt/fsp

The store can also be given once, as FSPFS_STORE; without one it is `ebs:`, the EBS snapshots of the
account and the region that AWS is configured for.
Exit status: 0 done, 1 failed, 2 wrong usage, 3 done in part.";

/// The grammar of all but the operations.
#[derive(Debug, Parser)]
#[command(name = "fspfs", version, after_help = EXAMPLES, propagate_version = true)]
#[command(disable_help_subcommand = true, about = ABOUT, long_about = None)]
struct Grammar {
    #[command(flatten)]
    global: Global,
    #[command(flatten)]
    before: Before,
    #[command(subcommand)]
    command: Command,
}

/// Options that stand before the command, as those of Flexible Snapshot Proxy.
#[derive(Args, Clone, Copy, Debug, Default)]
struct Before {
    /// Before the command: look whether it is permitted, say what would be done, and do nothing
    #[arg(short, long, visible_alias = "dry_run")]
    dry_run: bool,
    /// Before the command: write nothing to disk but what it is for
    #[arg(long, visible_alias = "suppress_writes")]
    suppress_writes: bool,
}

const ABOUT: &str =
    "Mounts snapshots as files: each is a sparse raw image, read lazily, every block checked";

/// A command line.
#[derive(Debug)]
pub struct Cli {
    global: Global,
    command: Asked,
}

/// What it asks for.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one of it")]
enum Asked {
    Operation {
        asked: Box<dyn table::Asked>,
        entry: &'static table::Entry,
        dry_run: bool,
        before: Before,
    },
    Other(Command),
}

/// Options of every command, before or after its name.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Global options")]
struct Global {
    /// Where the snapshots are: `ebs:`, `ebs://us-west-2` or `ebs://profile@us-west-2` for those of
    /// EBS; a repository in a directory, as `/srv/snaps` or `file:///srv/snaps`, or in a bucket, as
    /// `s3://bucket/prefix`; `synth:` has computed ones
    #[arg(short, long, global = true, visible_alias = "from", value_name = "STORE")]
    #[arg(env = "FSPFS_STORE")]
    store: Option<StoreUrl>,
    /// The region of the snapshots; for `ebs:`. By default, that of the AWS configuration
    #[arg(short, long, global = true, visible_alias = "origin_region", value_name = "REGION")]
    origin_region: Option<String>,
    /// Nobody else writes to the bucket: for services that do not create a name for one alone
    #[arg(long, global = true)]
    single_writer: bool,
    /// Requests that are sent in a second, at most; for `ebs:` and `s3:`
    #[arg(long, global = true, value_name = "N", env = "FSPFS_MAX_REQUESTS_PER_SECOND")]
    max_requests_per_second: Option<NonZeroU32>,
    /// Blocks that are read and put at the same time, at most; for `ebs:` and `s3:`. Without it, `NUM_JOBS`
    #[arg(long, visible_aliases = ["num-jobs", "num_jobs"], global = true, value_name = "N")]
    #[arg(env = "FSPFS_MAX_IN_FLIGHT")]
    max_in_flight: Option<NonZeroUsize>,
    /// Taken for the sake of the original: there are no dependencies that could be looked for
    #[arg(long, global = true, hide = true)]
    nodeps: bool,
    #[command(flatten)]
    screen: ScreenArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make an empty repository
    Init(InitArgs),
    /// Mount a store as files
    Mount(MountArgs),
    /// Unmount what `mount` has mounted
    #[command(visible_alias = "unmount")]
    Umount(UmountArgs),
    /// List the working images of a mount
    Staged(StagedArgs),
    /// List the jobs of a mount, or wait for one
    Jobs(JobsArgs),
    /// Look whether everything that a mount needs is there, and say how to get what is not
    Doctor(doctor::DoctorArgs),
    /// Offer a store to every client of the EBS direct APIs
    Serve(ServeArgs),
    /// Print a script that completes commands in a shell
    Completions(CompletionsArgs),
    /// Print the man page
    Man(ManArgs),
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  fspfs init /srv/snaps")]
struct InitArgs {
    /// The directory, empty or not there yet; by default the one of -s
    #[arg(value_name = "STORE")]
    target: Option<StoreUrl>,
}

/// `fspfs mount`
#[derive(Args, Clone, Debug)]
#[command(allow_missing_positional = true)]
#[command(after_help = "\
Examples:
  fspfs mount -s /srv/snaps /mnt/fsp
  fspfs mount -s /srv/snaps --allow-other --memory 1GiB /mnt/fsp
  fspfs mount -s /srv/snaps --foreground /mnt/fsp
  fspfs mount s3://bucket/prefix /mnt/fsp

SIGINT and SIGTERM unmount, SIGHUP lists the snapshots and opens the log anew. FSPFS_LOG sets what is logged.")]
struct MountArgs {
    /// The store, in the place of -s
    #[arg(value_name = "STORE")]
    source: Option<StoreUrl>,
    /// An empty directory
    #[arg(value_name = "MOUNTPOINT")]
    mount_point: PathBuf,
    /// Stay in the foreground, and log to stderr
    #[arg(short, long, help_heading = "How to run")]
    foreground: bool,
    /// Memory for blocks and listings
    #[arg(long, value_name = "SIZE", env = "FSPFS_MEMORY", help_heading = "How to run")]
    #[arg(value_parser = values::memory, default_value_t = values::Size(DEFAULT_BUDGET))]
    memory: values::Size,
    /// How often the snapshots are listed anew
    #[arg(long, value_name = "SECONDS", env = "FSPFS_REFRESH", help_heading = "How to run")]
    #[arg(default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    refresh: u32,
    /// Let all users in; the images are 0444 then
    #[arg(long, conflicts_with = "allow_root", help_heading = "Who may read")]
    allow_other: bool,
    /// Let root in, beside the user who mounts: loop devices read as root
    #[arg(long, help_heading = "Who may read")]
    allow_root: bool,
    /// Owner of the images
    #[arg(long, value_name = "N", help_heading = "Who may read")]
    uid: Option<u32>,
    /// Group of the images
    #[arg(long, value_name = "N", help_heading = "Who may read")]
    gid: Option<u32>,
    /// Permissions of the images, in octal
    #[arg(long, value_name = "M", value_parser = values::mode, help_heading = "Who may read")]
    file_mode: Option<u16>,
    #[command(flatten)]
    scope: ScopeArgs,
    #[command(flatten)]
    writing: WritingArgs,
}

/// What `mount` does with files that are written under `new/`.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Writing under new/")]
struct WritingArgs {
    /// Nothing can be written
    #[arg(long, visible_alias = "ro", env = "FSPFS_READ_ONLY")]
    read_only: bool,
    /// Where what is written is kept until it is a snapshot
    #[arg(long, value_name = "DIR", env = "FSPFS_STAGING")]
    staging: Option<PathBuf>,
    /// How much may be kept there
    #[arg(long, value_name = "SIZE", env = "FSPFS_STAGING_LIMIT", value_parser = values::bytes)]
    staging_limit: Option<u64>,
    /// When a snapshot is made: when a file is closed, or only by `fspfs commit`
    #[arg(long, value_name = "WHEN", env = "FSPFS_COMMIT", default_value = "close")]
    commit: CommitWhen,
    /// Whether an image that is shorter than what is on it, or no raw image, is refused
    #[arg(long, value_name = "WHETHER", env = "FSPFS_CHECK_IMAGES", default_value = "on")]
    check_images: CheckImages,
    /// What the snapshot of an image that begins anew is a child of
    #[arg(long, value_name = "PARENT", env = "FSPFS_PARENT", default_value = "none")]
    parent: CommitParent,
    /// Store blocks of zeros too
    #[arg(long, env = "FSPFS_FULL_COPY")]
    full_copy: bool,
    /// What becomes of the holes of an encrypted snapshot
    #[arg(long, value_name = "HOW", env = "FSPFS_ENCRYPTED_HOLES", default_value = "write")]
    encrypted_holes: EncryptedHoles,
    /// The description of snapshots
    #[arg(long, value_name = "TEXT", env = "FSPFS_DESCRIPTION")]
    description: Option<String>,
    /// A tag of snapshots; can be given several times
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = values::tag)]
    tags: Vec<(String, String)>,
    /// Ask the store to encrypt snapshots
    #[arg(long, env = "FSPFS_ENCRYPTED")]
    encrypted: bool,
    /// The key to encrypt them with
    #[arg(long, value_name = "KEY", env = "FSPFS_KMS_KEY_ID")]
    kms_key_id: Option<String>,
}

/// `--commit`
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum CommitWhen {
    /// When the last program that wrote to a file closes it
    Close,
    /// When `fspfs commit` or `control/commit` asks for it
    Manual,
}

/// `--check-images`
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum CheckImages {
    /// It is, unless `fspfs commit` has `--as-is`
    On,
    /// It is taken as it is
    Off,
}

/// `--parent` of `mount`
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum CommitParent {
    /// The snapshot that the image had before it was truncated, else the newest of its name
    Auto,
    /// Nothing
    None,
}

#[derive(Args, Debug)]
struct UmountArgs {
    /// Where it is mounted
    #[arg(value_name = "MOUNTPOINT")]
    mount_point: PathBuf,
    /// Take it out of sight now, and unmount it once nobody uses it
    #[arg(short, long)]
    lazy: bool,
}

#[derive(Args, Debug)]
#[command(after_help = "\
A working image is clean, dirty, committing, queued, failed or interrupted. `fspfs commit` makes a
snapshot of one that is not clean.

Example:
  fspfs staged /mnt/fsp")]
struct StagedArgs {
    /// Where it is mounted
    #[arg(value_name = "MOUNTPOINT")]
    mount_point: PathBuf,
}

#[derive(Args, Debug)]
#[command(after_help = "\
A job goes on when nobody waits for it. Removing control/jobs/N cancels and forgets it.

Examples:
  fspfs jobs /mnt/fsp
  fspfs jobs /mnt/fsp --wait 3")]
struct JobsArgs {
    /// Where it is mounted
    #[arg(value_name = "MOUNTPOINT")]
    mount_point: PathBuf,
    /// Wait until this job ends, print what it has to say, and exit as it did
    #[arg(short, long, value_name = "N")]
    wait: Option<u64>,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Clients sign with the key in --credentials, else with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of
this process, else with one that is made for this user. SIGTERM finishes what is in flight.

Examples:
  fspfs serve -s /srv/snaps
  eval \"$(fspfs serve --print-env)\"; aws ec2 describe-snapshots --owner-ids self
  fspfs serve -s /srv/snaps --no-auth --inject latency=20ms,throttle=5%,seed=7")]
struct ServeArgs {
    /// Address and port; port 0 for any that is free
    #[arg(long, value_name = "ADDRESS", default_value = crate::serve::DEFAULT_LISTEN)]
    listen: std::net::SocketAddr,
    /// Print what a shell needs to reach the server, and end
    #[arg(long)]
    print_env: bool,
    /// A file of keys that clients may sign with, as ~/.aws/credentials
    #[arg(long, value_name = "FILE", help_heading = "Who may ask")]
    credentials: Option<PathBuf>,
    /// Ask for no signature: for programs on this machine alone
    #[arg(long, conflicts_with = "credentials", help_heading = "Who may ask")]
    no_auth: bool,
    /// Memory for blocks
    #[arg(long, value_name = "SIZE", value_parser = values::memory)]
    #[arg(default_value_t = values::Size(crate::serve::DEFAULT_MEMORY))]
    memory: values::Size,
    /// How long a snapshot stays pending after its completion
    #[arg(long, value_name = "SECONDS", default_value_t = 0, help_heading = "As the service")]
    pending: u32,
    /// What goes wrong on purpose, as latency=20ms,throttle=5%,seed=7
    #[arg(long, value_name = "SPEC", help_heading = "As the service")]
    inject: Option<crate::serve::Faults>,
    /// The account that owns the snapshots
    #[arg(long, value_name = "ID", value_parser = values::account, help_heading = "As the service")]
    #[arg(default_value = crate::serve::DEFAULT_ACCOUNT)]
    account: String,
    /// The region that it says it is in
    #[arg(long, value_name = "REGION", help_heading = "As the service")]
    #[arg(default_value = crate::serve::DEFAULT_REGION)]
    region: String,
}

#[derive(Args, Debug)]
struct CompletionsArgs {
    /// The shell
    shell: clap_complete::Shell,
}

#[derive(Args, Debug)]
struct ManArgs {
    /// The command whose page is wanted
    #[arg(value_name = "COMMAND")]
    command: Option<String>,
}

impl Global {
    /// Takes the region that was named into the store.
    fn in_region(mut self) -> Result<Self, clap::Error> {
        let Some(region) = self.origin_region.take() else { return Ok(self) };
        let wrong = |why: String| clap::Error::raw(clap::error::ErrorKind::ArgumentConflict, why);
        let store = self.store.take().unwrap_or_else(|| StoreUrl::Ebs(EbsUrl::default()));
        let StoreUrl::Ebs(url) = store else {
            return Err(wrong(format!("{store} is in no region: -o is for `ebs:`")));
        };
        if url.region.as_ref().is_some_and(|named| *named != region) {
            return Err(wrong(format!("{url} and -o {region} name two regions")));
        }
        let parsed: EbsUrl =
            format!("ebs://{region}").parse().map_err(|error| wrong(format!("{error}")))?;
        self.store = Some(StoreUrl::Ebs(EbsUrl { region: parsed.region, ..url }));
        Ok(self)
    }
}

impl Cli {
    /// Reads a command line; prints help or what is wrong with it, and ends the program then.
    pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Self {
        let arguments: Vec<OsString> = arguments.into_iter().collect();
        let is_json = arguments.iter().any(|word| word == "--json");
        Self::parse(arguments).unwrap_or_else(|error| {
            if is_json && error.use_stderr() {
                let error = error.to_string();
                let error = error.trim().trim_start_matches("error: ");
                let error = serde_json::json!({ "error": error }).to_string();
                eprintln!("{}", shown::json(&error));
                std::process::exit(Exit::Usage.code().into());
            }
            error.exit()
        })
    }

    fn parse(
        arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>,
    ) -> Result<Self, clap::Error> {
        let mut grammar = Self::grammar();
        // The original's documents write it with one dash.
        let arguments = arguments.into_iter().map(|word| match word.into() {
            word if word == "-nodeps" => "--nodeps".into(),
            word => word,
        });
        let matches = grammar.try_get_matches_from_mut(arguments)?;
        let read = || {
            let global = Global::from_arg_matches(&matches)?.in_region()?;
            let before = Before::from_arg_matches(&matches)?;
            let operation =
                matches.subcommand().and_then(|(name, of)| Some((table::find(name)?, of)));
            let command = match operation {
                Some((entry, of)) => {
                    let (asked, dry_run) = entry.read(of)?;
                    let dry_run = dry_run || before.dry_run;
                    Asked::Operation { asked, entry, dry_run, before }
                }
                None if before.dry_run => {
                    let why = "-d before the name is for operations: this command has no dry run";
                    return Err(clap::Error::raw(clap::error::ErrorKind::ArgumentConflict, why));
                }
                None => Asked::Other(Command::from_arg_matches(&matches)?),
            };
            Ok(Self { global, command })
        };
        read().map_err(|error: clap::Error| error.format(&mut grammar))
    }

    /// Whether one JSON value is wanted instead of text.
    pub fn is_json(&self) -> bool {
        self.global.screen.json
    }

    /// The grammar: that of the operations stands between that of the other commands.
    pub fn grammar() -> clap::Command {
        Grammar::command().subcommands(table::OPERATIONS.iter().map(table::Entry::command))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grammar_is_sound() {
        Cli::grammar().debug_assert();
    }

    #[test]
    fn the_store_stands_before_or_after_the_command() {
        for line in [
            "fspfs -s /x list",
            "fspfs list -s /x",
            "fspfs list --from /x",
            "fspfs --store=/x list",
        ] {
            let cli = Cli::parse(line.split(' ')).unwrap();
            assert_eq!(cli.global.store, Some(StoreUrl::Directory("/x".into())), "{line}");
        }
    }

    #[test]
    fn working_images_have_commands() {
        let command = |line: &str| Cli::parse(line.split(' ')).map(|cli| cli.command);
        let Ok(Asked::Operation { asked, entry, dry_run: false, .. }) =
            command("fspfs commit --wait /mnt/new/a")
        else {
            panic!()
        };
        assert_eq!(entry.name, "commit");
        let (file, words) = asked.at_mount().unwrap();
        assert_eq!(file, std::path::Path::new("/mnt/new/a"));
        assert_eq!(words("a"), ["--wait", "--", "a"]);
        let Ok(Asked::Other(Command::Jobs(args))) = command("fspfs jobs /mnt --wait 3") else {
            panic!()
        };
        assert_eq!((args.mount_point, args.wait), ("/mnt".into(), Some(3)));
        assert!(matches!(
            command("fspfs staged --json /mnt"),
            Ok(Asked::Other(Command::Staged(_)))
        ));
        for bad in [
            "fspfs",
            "fspfs commit",
            "fspfs commit --wait --cancel a",
            "fspfs clone a",
            "fspfs staged",
            "fspfs jobs /mnt --wait last",
        ] {
            assert!(command(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_and_times_have_units() {
        let mount = |memory: &str| {
            let line = ["fspfs", "mount", "--memory", memory, "/mnt"];
            match Cli::parse(line).map(|cli| cli.command) {
                Ok(Asked::Other(Command::Mount(args))) => Ok(args.memory.0),
                Ok(_) => unreachable!(),
                Err(error) => Err(error.to_string()),
            }
        };
        assert_eq!(mount("256MiB"), Ok(256 << 20));
        assert_eq!(mount("1GiB"), Ok(1 << 30));
        assert!(mount("1MiB").unwrap_err().contains("16"));
        assert!(mount("lots").is_err());
    }
}
