//! The grammar of the command line, from which the help, the man page and the completions are made.

use std::ffi::OsString;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;

use clap::{Args, CommandFactory as _, Parser, Subcommand};

use crate::arguments::{CloneArgs, CommitArgs};
use crate::cache::DEFAULT_BUDGET;
use crate::model::SnapshotId;
use crate::store::repository::DEFAULT_GRACE;
use crate::store::{Filter, StoreUrl};

mod control;
mod doctor;
mod jobs;
mod mount;
mod output;
mod run;
mod serve;
mod transfer;
mod umount;
mod values;
mod working;

pub use output::tell;
pub use run::{Exit, run};

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

/// Mounts snapshots as files: each is a sparse raw image, read lazily, every block checked.
#[derive(Debug, Parser)]
#[command(name = "fspfs", version, after_help = EXAMPLES, propagate_version = true)]
#[command(disable_help_subcommand = true)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command, before or after its name.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Global options")]
struct Global {
    /// Where the snapshots are: `ebs:`, `ebs://us-west-2` or `ebs://profile@us-west-2` for those of
    /// EBS; a directory, as `/srv/snaps` or `file:///srv/snaps`; `synth:` has computed ones
    #[arg(short, long, global = true, visible_alias = "from", value_name = "STORE")]
    #[arg(env = "FSPFS_STORE")]
    store: Option<StoreUrl>,
    /// Requests that are sent in a second, at most; for `ebs:`
    #[arg(long, global = true, value_name = "N", env = "FSPFS_MAX_REQUESTS_PER_SECOND")]
    max_requests_per_second: Option<NonZeroU32>,
    /// Blocks that are read and put at the same time, at most; for `ebs:`
    #[arg(long, global = true, value_name = "N", env = "FSPFS_MAX_IN_FLIGHT")]
    max_in_flight: Option<NonZeroUsize>,
    /// Print one JSON value instead of text
    #[arg(long, global = true)]
    json: bool,
    /// Print the result alone
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Say more about what is done; twice, even more
    #[arg(short, long, global = true, action = clap::ArgAction::Count, conflicts_with = "quiet")]
    verbose: u8,
}

/// Which snapshots are listed.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Which snapshots")]
struct ScopeArgs {
    /// Whose: account ids, `self` or `amazon`; can be given several times; for `ebs:`, where it is
    /// `self` by default
    #[arg(long = "owner", value_name = "OWNER")]
    owners: Vec<String>,
    /// Those that match, as tag:Role=web or status=completed,error; can be given several times, and
    /// all have to match
    #[arg(long = "filter", value_name = "NAME=VALUE")]
    filters: Vec<Filter>,
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
    /// Make a snapshot of a working image, or try again
    Commit(CommitArgs),
    /// Make a working image that begins as a snapshot
    Clone(CloneArgs),
    /// List the working images of a mount
    Staged(StagedArgs),
    /// List the jobs of a mount, or wait for one
    Jobs(JobsArgs),
    /// List the snapshots, or say how large one is
    List(ListArgs),
    /// Make a snapshot of a file or a block device
    Upload(UploadArgs),
    /// Write a snapshot to a file or a block device
    Download(DownloadArgs),
    /// Delete snapshots, or abort pending ones
    Delete(DeleteArgs),
    /// Read everything that snapshots need, and check it
    Verify(VerifyArgs),
    /// Remove what no snapshot needs any more
    Gc(GcArgs),
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
#[command(after_help = "\
Examples:
  fspfs mount -s /srv/snaps /mnt/fsp
  fspfs mount -s /srv/snaps --allow-other --memory 1GiB /mnt/fsp
  fspfs mount -s /srv/snaps --foreground /mnt/fsp

SIGINT and SIGTERM unmount, SIGHUP lists the snapshots anew. FSPFS_LOG sets what is logged.")]
struct MountArgs {
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

/// `--encrypted-holes`
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum EncryptedHoles {
    /// They are stored, as encrypted zeros
    Write,
    /// They are left out
    Skip,
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
struct ListArgs {
    /// Say how many blocks this snapshot has
    #[arg(value_name = "SNAP")]
    snapshot: Option<SnapshotId>,
    #[command(flatten)]
    scope: ScopeArgs,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  fspfs -s /srv/snaps upload --name web disk.img
  fspfs -s /srv/snaps upload --parent-snapshot-id snap-0123456789abcdef0 disk.img
  id=$(fspfs -s /srv/snaps upload disk.img | tail -n 1)

What is stopped goes on where it was when the same command is given again.")]
struct UploadArgs {
    /// A disk image or a block device
    #[arg(value_name = "FILE")]
    path: PathBuf,
    /// Make a child of this snapshot: only blocks that differ are stored
    #[arg(long, visible_alias = "parent_snapshot_id", value_name = "SNAP")]
    parent_snapshot_id: Option<SnapshotId>,
    /// The tag Name
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// A tag; can be given several times
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = values::tag)]
    tags: Vec<(String, String)>,
    /// The description
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
    /// The volume that it is an image of
    #[arg(long, value_name = "VOLUME")]
    volume_id: Option<String>,
    /// Store blocks of zeros too, where the file has no hole
    #[arg(short, long, visible_alias = "full_copy")]
    full_copy: bool,
    /// Ask the store to encrypt it
    #[arg(long, conflicts_with = "parent_snapshot_id")]
    encrypted: bool,
    /// The key to encrypt it with
    #[arg(long, value_name = "KEY", requires = "encrypted")]
    kms_key_id: Option<String>,
    /// What becomes of the holes of an encrypted snapshot
    #[arg(long, value_name = "HOW", default_value = "write")]
    encrypted_holes: EncryptedHoles,
    #[command(flatten)]
    resume: ResumeArgs,
}

/// What is done with the journal of a transfer.
#[derive(Args, Clone, Debug)]
struct ResumeArgs {
    /// Begin anew, whatever an earlier run has left
    #[arg(long)]
    restart: bool,
    /// Keep no journal: what is stopped begins anew
    #[arg(long, visible_alias = "suppress_writes")]
    suppress_writes: bool,
}

#[derive(Args, Debug)]
#[command(after_help = "\
A file is replaced as a whole once everything is there. A device is written in place, holes as zeros.
What is stopped goes on where it was when the same command is given again.

Examples:
  fspfs -s /srv/snaps download snap-0123456789abcdef0 disk.img
  fspfs -s /srv/snaps download snap-0123456789abcdef0 /dev/sdb")]
struct DownloadArgs {
    /// The snapshot
    #[arg(value_name = "SNAP")]
    snapshot: SnapshotId,
    /// A file or a block device
    #[arg(value_name = "FILE")]
    path: PathBuf,
    #[command(flatten)]
    resume: ResumeArgs,
}

#[derive(Args, Debug)]
struct DeleteArgs {
    /// The snapshots
    #[arg(value_name = "SNAP", required = true)]
    snapshots: Vec<SnapshotId>,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

#[derive(Args, Debug)]
#[command(after_help = "\
A repository is checked whole, with everything that its snapshots need. Of EBS every block is read,
which costs what a download costs.

Examples:
  fspfs -s /srv/snaps verify
  fspfs -s ebs: verify snap-0123456789abcdef0 --against disk.img")]
struct VerifyArgs {
    /// The snapshots; all if there are none
    #[arg(value_name = "SNAP")]
    snapshots: Vec<SnapshotId>,
    /// Compare the snapshot with this file or block device
    #[arg(long, value_name = "FILE", requires = "snapshots")]
    against: Option<PathBuf>,
}

#[derive(Args, Debug)]
#[command(after_help = "\
A first run finds what is not needed, and a later one deletes it: what a writer has just made looks
the same. So run this now and then, say once a week.")]
struct GcArgs {
    /// How long something must have been of no use, as 7d or 12h; at least 1h
    #[arg(long, value_name = "TIME", value_parser = values::grace)]
    #[arg(default_value_t = humantime::Duration::from(DEFAULT_GRACE))]
    grace: humantime::Duration,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
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

impl Cli {
    /// Reads a command line; prints help or what is wrong with it, and ends the program then.
    pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Self {
        Self::parse_from(arguments)
    }

    /// The grammar.
    pub fn grammar() -> clap::Command {
        Self::command()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grammar_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_store_stands_before_or_after_the_command() {
        for line in [
            "fspfs -s /x list",
            "fspfs list -s /x",
            "fspfs list --from /x",
            "fspfs --store=/x list",
        ] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert_eq!(cli.global.store, Some(StoreUrl::Directory("/x".into())), "{line}");
        }
    }

    #[test]
    fn working_images_have_commands() {
        let command = |line: &str| Cli::try_parse_from(line.split(' ')).map(|cli| cli.command);
        let Ok(Command::Commit(args)) = command("fspfs commit --wait /mnt/new/a") else { panic!() };
        assert_eq!((args.file, args.wait, args.cancel), ("/mnt/new/a".into(), true, false));
        let Ok(Command::Clone(args)) = command("fspfs clone snap-0a /mnt/new/a") else { panic!() };
        assert_eq!((args.snapshot.as_str(), args.file), ("snap-0a", "/mnt/new/a".into()));
        let Ok(Command::Jobs(args)) = command("fspfs jobs /mnt --wait 3") else { panic!() };
        assert_eq!((args.mount_point, args.wait), ("/mnt".into(), Some(3)));
        assert!(matches!(command("fspfs staged --json /mnt"), Ok(Command::Staged(_))));
        for bad in [
            "fspfs commit",
            "fspfs commit --wait --cancel a",
            "fspfs clone a b",
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
            match Cli::try_parse_from(line).map(|cli| cli.command) {
                Ok(Command::Mount(args)) => Ok(args.memory.0),
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
