//! Running a command.

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use clap::CommandFactory as _;
use serde::Serialize;

use super::output::{self, Output};
use super::{
    Cli, Command, CompletionsArgs, DeleteArgs, GcArgs, Global, InitArgs, ListArgs, ManArgs,
    ScopeArgs, VerifyArgs, jobs, mount, transfer, working,
};
use crate::model::{BLOCK_SIZE_U64, Snapshot, SnapshotId};
use crate::ops::{self, list, until_signal};
use crate::store::ebs::EbsUrl;
use crate::store::repository::Repository;
use crate::store::{self, SharedStore, StoreOptions, StoreUrl, Stores};
use crate::transfer::engine::Run;
use crate::transfer::journal::forget_snapshot;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Everything was done.
    Done,
    /// Something was not as it should be, and was reported.
    Failed,
    /// Wrong usage, reported by the daemon that was started.
    Usage,
    /// A part was done; the report says which.
    Partly,
}

impl Exit {
    pub(super) fn from_code(code: Option<i32>) -> Self {
        match code {
            Some(0) => Self::Done,
            Some(2) => Self::Usage,
            Some(3) => Self::Partly,
            _ => Self::Failed,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        match exit {
            Exit::Done => Self::SUCCESS,
            Exit::Failed => Self::from(1),
            Exit::Usage => Self::from(2),
            Exit::Partly => Self::from(3),
        }
    }
}

/// Runs a command.
///
/// # Errors
///
/// Whatever keeps it from being done.
pub fn run(cli: &Cli) -> anyhow::Result<Exit> {
    let Cli { global, command } = cli;
    // `mount` sets up its own log, and a runtime once it is where it will stay.
    match command {
        Command::Mount(args) => return mount::mount(global, args),
        Command::Umount(args) => return super::umount::umount(args),
        Command::Serve(args) => return super::serve::serve(global, args),
        Command::Completions(args) => return completions(args),
        Command::Man(args) => return man(args),
        _ => {}
    }
    crate::mount::log_to_stderr(log_level(global));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // One may wait for a disk.
        .worker_threads(std::thread::available_parallelism().map_or(2, usize::from).max(2))
        .enable_all()
        .build()?;
    let out = Output::new(global);
    let stores = Stores::default();
    let exit = runtime.block_on(async {
        match command {
            Command::Init(args) => init(global, out, args).await,
            Command::Commit(args) => working::commit(out, args).await,
            Command::Clone(args) => working::clone(out, args).await,
            Command::Staged(args) => working::staged(out, args).await,
            Command::Jobs(args) => jobs::jobs(out, args).await,
            Command::List(args) => list(global, &stores, out, args).await,
            Command::Upload(args) => transfer::upload(global, &stores, out, args).await,
            Command::Download(args) => transfer::download(global, &stores, out, args).await,
            Command::Delete(args) => delete(global, &stores, out, args).await,
            Command::Verify(args) => verify(global, &stores, out, args).await,
            Command::Gc(args) => gc(global, &stores, out, args).await,
            Command::Doctor(args) => super::doctor::doctor(global, out, args).await,
            Command::Mount(_)
            | Command::Umount(_)
            | Command::Serve(_)
            | Command::Completions(_)
            | Command::Man(_) => unreachable!("they were run above"),
        }
    });
    runtime.shutdown_background();
    exit
}

/// How much is logged on stderr.
pub(super) fn log_level(global: &Global) -> tracing::Level {
    match global.verbose {
        0 if global.quiet => tracing::Level::ERROR,
        0 => tracing::Level::WARN,
        1 => tracing::Level::INFO,
        2 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    }
}

/// The store that was named, else that of EBS which AWS is configured for.
pub(super) fn store_url(global: &Global) -> StoreUrl {
    global.store.clone().unwrap_or_else(|| StoreUrl::Ebs(EbsUrl::default()))
}

pub(super) fn store_options(global: &Global, scope: Option<&ScopeArgs>) -> StoreOptions {
    let scope = scope.cloned().unwrap_or_default();
    StoreOptions {
        max_requests_per_second: global.max_requests_per_second,
        max_in_flight: global.max_in_flight,
        owners: scope.owners,
        filters: scope.filters,
        settling: None,
        max_unsaved: None,
    }
}

async fn open(
    global: &Global,
    stores: &Stores,
    scope: Option<&ScopeArgs>,
) -> anyhow::Result<SharedStore> {
    Ok(stores.open(&store_url(global), &store_options(global, scope)).await?)
}

async fn repository(global: &Global, stores: &Stores) -> anyhow::Result<Arc<Repository>> {
    let (url, options) = (store_url(global), store_options(global, None));
    Ok(stores.repository(url.directory()?, &options).await?)
}

async fn init(global: &Global, out: Output, args: &InitArgs) -> anyhow::Result<Exit> {
    let url = match &args.target {
        Some(target) => target.clone(),
        None => store_url(global),
    };
    let repository = Repository::create(url.directory()?).await?;
    let url = url.absolute()?;
    let made = serde_json::json!({ "store": url.to_string(), "id": repository.id() });
    out.result(&made, || vec![format!("{url} is an empty repository")])?;
    Ok(Exit::Done)
}

async fn list(
    global: &Global,
    stores: &Stores,
    out: Output,
    args: &ListArgs,
) -> anyhow::Result<Exit> {
    let store = open(global, stores, Some(&args.scope)).await?;
    let Some(id) = &args.snapshot else {
        let snapshots = list::snapshots(&store).await?;
        out.result(&snapshots, || output::table(&snapshots))?;
        return Ok(Exit::Done);
    };
    let began = Instant::now();
    let blocks = list::block_count(&store, id).await?;
    let (bytes, seconds) = (blocks * BLOCK_SIZE_U64, began.elapsed().as_secs_f64());
    let size = serde_json::json!({ "id": id, "blocks": blocks, "bytes": bytes });
    out.result(&size, || vec![contains(id, blocks, seconds)])?;
    Ok(Exit::Done)
}

/// Says what the requests to a service that is paid for have cost.
pub(super) fn tell_cost(out: Output, store: &SharedStore) {
    let Some(usage) = store.usage() else { return };
    let sent: u64 = usage.requests.iter().map(|(_, sent)| sent).sum();
    let again = match usage.again {
        0 => String::new(),
        again => format!(", {again} of them again"),
    };
    out.note(format_args!("{sent} requests{again}: about ${:.4}", usage.dollars()));
}

/// The original's line.
pub(super) fn contains(id: &SnapshotId, blocks: u64, seconds: f64) -> String {
    let bytes = blocks * BLOCK_SIZE_U64;
    format!("Snapshot {id} contains {blocks} chunks and {bytes} bytes, took {seconds:.2} seconds.")
}

#[derive(Debug, Serialize)]
struct Deleted {
    deleted: Vec<SnapshotId>,
    failed: Vec<SnapshotId>,
}

async fn delete(
    global: &Global,
    stores: &Stores,
    out: Output,
    args: &DeleteArgs,
) -> anyhow::Result<Exit> {
    let store = open(global, stores, None).await?;
    if !args.yes && std::io::stdin().is_terminal() && !confirmed(&args.snapshots)? {
        out.note("nothing was deleted");
        return Ok(Exit::Failed);
    }
    let mut report = Deleted { deleted: Vec::new(), failed: Vec::new() };
    for id in &args.snapshots {
        match store.delete(id).await {
            Ok(()) => {
                // Nothing goes on with it.
                forget_snapshot(&transfer::journals(), id);
                out.line(id)?;
                report.deleted.push(id.clone());
            }
            Err(error) => {
                output::tell(error);
                report.failed.push(id.clone());
            }
        }
    }
    out.result(&report, Vec::new)?;
    Ok(match (report.deleted.is_empty(), report.failed.is_empty()) {
        (_, true) => Exit::Done,
        (true, false) => Exit::Failed,
        (false, false) => Exit::Partly,
    })
}

fn confirmed(ids: &[SnapshotId]) -> std::io::Result<bool> {
    let ids: Vec<_> = ids.iter().map(SnapshotId::as_str).collect();
    let mut stderr = std::io::stderr();
    write!(stderr, "Delete {}? [y/N] ", ids.join(", "))?;
    stderr.flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

async fn verify(
    global: &Global,
    stores: &Stores,
    out: Output,
    args: &VerifyArgs,
) -> anyhow::Result<Exit> {
    if args.against.is_some() || store_url(global).directory().is_err() {
        return read_all(global, stores, out, args).await;
    }
    let repository = repository(global, stores).await?;
    let began = Instant::now();
    let bar = out.progress("Verifying");
    let progress: store::repository::Progress = Arc::new(move |blocks| bar.advance(blocks));
    let work = async { Ok(repository.verify(&args.snapshots, progress).await?) };
    let report = until_signal(work).await?;
    out.result(&report, || output::verified(&report, began.elapsed()))?;
    Ok(if report.damage.is_empty() { Exit::Done } else { Exit::Failed })
}

/// Verifies snapshots by reading them.
async fn read_all(
    global: &Global,
    stores: &Stores,
    out: Output,
    args: &VerifyArgs,
) -> anyhow::Result<Exit> {
    if args.against.is_some() && args.snapshots.len() > 1 {
        anyhow::bail!("a file can be compared with one snapshot, and there are several");
    }
    let store = open(global, stores, None).await?;
    let began = Instant::now();
    let run = Run { progress: out.progress("Verifying"), ..Run::default() };
    let mut report = ops::verify::Report::default();
    until_signal(async {
        let ids = match &args.snapshots[..] {
            [] => {
                let all = list::snapshots(&store).await?.into_iter();
                all.filter(Snapshot::is_readable).map(|snapshot| snapshot.id).collect()
            }
            ids => ids.to_vec(),
        };
        for id in &ids {
            ops::verify::verify(&store, id, args.against.clone(), &run, &mut report).await?;
        }
        Ok(())
    })
    .await?;
    drop(run);
    tell_cost(out, &store);
    out.result(&report, || output::was_read(&report, began.elapsed()))?;
    Ok(if report.wrong == 0 { Exit::Done } else { Exit::Failed })
}

async fn gc(global: &Global, stores: &Stores, out: Output, args: &GcArgs) -> anyhow::Result<Exit> {
    let repository = repository(global, stores).await?;
    let report =
        until_signal(async { Ok(repository.gc(*args.grace, args.dry_run).await?) }).await?;
    out.result(&report, || output::collected(&report, args.dry_run))?;
    Ok(Exit::Done)
}

fn completions(args: &CompletionsArgs) -> anyhow::Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "fspfs", &mut script);
    std::io::stdout().write_all(&script)?;
    Ok(Exit::Done)
}

fn man(args: &ManArgs) -> anyhow::Result<Exit> {
    let mut grammar = Cli::command();
    grammar.build();
    let page = match &args.command {
        None => grammar,
        Some(name) => {
            let command = grammar.find_subcommand(name);
            let command = command.with_context(|| format!("there is no command {name:?}"))?;
            command.clone().name(format!("fspfs-{name}")).bin_name(format!("fspfs {name}"))
        }
    };
    let mut text = Vec::new();
    clap_mangen::Man::new(page).render(&mut text)?;
    std::io::stdout().write_all(&text)?;
    Ok(Exit::Done)
}
