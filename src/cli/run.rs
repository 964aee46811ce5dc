//! Running a command.

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;

use super::bars::AboveBars;
use super::output::{Output, Terminal};
use super::signals::Signals;
use super::{
    Asked, Before, Cli, Command, Global, InitArgs, ManArgs, ScopeArgs, jobs, mount, staged,
};
use crate::ops::Exit;
use crate::ops::context::{Context, House};
use crate::ops::table;
use crate::store::ebs::EbsUrl;
use crate::store::repository::Repository;
use crate::store::{StoreOptions, StoreUrl, Stores};
use crate::transfer::engine::Run;

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// Runs a command.
///
/// # Errors
///
/// Whatever keeps it from being done.
pub fn run(cli: Cli) -> anyhow::Result<Exit> {
    let Cli { mut global, mut command } = cli;
    if let Asked::Other(Command::Mount(args)) = &command
        && let Some(store) = &args.source
    {
        global.store = Some(store.clone());
    }
    // `mount` sets up its own log, and a runtime once it is where it will stay.
    match &command {
        Asked::Other(Command::Mount(args)) => return mount::mount(&global, args),
        Asked::Other(Command::Umount(args)) => {
            return super::umount::umount(Output::new(&global), args);
        }
        Asked::Other(Command::Serve(args)) => return super::serve::serve(&global, args),
        Asked::Other(Command::Completions(args)) => return super::complete::completions(args),
        Asked::Other(Command::Man(args)) => return man(args),
        _ => {}
    }
    crate::mount::log_to_stderr(of_commands(&global), || AboveBars);
    if let Asked::Operation { asked, .. } = &mut command {
        asked.begin_alone()?;
    }
    let runtime = crate::threads::runtime(None, 0)?;
    let out = Output::new(&global);
    let exit = runtime.block_on(async {
        match command {
            Asked::Operation { asked, entry, dry_run, before } => {
                if before.dry_run && asked.uses_store() && !permitted(&global, out, entry).await? {
                    return Ok(Exit::Failed);
                }
                if before.dry_run && !entry.can_dry_run() {
                    return Ok(Exit::Done);
                }
                operation(&global, out, asked, entry, dry_run, before).await
            }
            Asked::Other(Command::Init(args)) => init(&global, out, &args).await,
            Asked::Other(Command::Staged(args)) => staged::staged(out, &args).await,
            Asked::Other(Command::Jobs(args)) => jobs::jobs(out, &args).await,
            Asked::Other(Command::Doctor(args)) => super::doctor::doctor(&global, out, &args).await,
            Asked::Other(
                Command::Mount(_)
                | Command::Umount(_)
                | Command::Serve(_)
                | Command::Completions(_)
                | Command::Man(_),
            ) => unreachable!("they were run above"),
        }
    });
    runtime.shutdown_background();
    exit
}

/// Whether the store lets an operation be done, as far as that shows without doing it.
async fn permitted(global: &Global, out: Output, entry: &table::Entry) -> anyhow::Result<bool> {
    let is_permitted = super::doctor::permitted(&store_url(global), out).await?;
    if is_permitted && !entry.can_dry_run() {
        out.note(format_args!("{} was not done", entry.name));
    }
    Ok(is_permitted)
}

/// Does it here, or lets the mount do it whose working image it is about.
async fn operation(
    global: &Global,
    out: Output,
    asked: Box<dyn table::Asked>,
    entry: &table::Entry,
    dry_run: bool,
    before: Before,
) -> anyhow::Result<Exit> {
    if let Some((file, words)) = asked.at_mount() {
        return super::control::forward(entry.name, file, words, global.screen, out).await;
    }
    let run = Run::default();
    let signals = Signals::watch(&run)?;
    let house = House {
        stores: Arc::new(Stores::default()),
        from: store_url(global),
        options: store_options(global, None),
        opened: None,
        journals: (!before.suppress_writes)
            .then(|| crate::mount::state_directory().join("transfers")),
        closed: Vec::new(),
        absolute: false,
    };
    let from = house.from.clone();
    let cx = Context {
        house: Arc::new(house),
        screen: global.screen,
        dry_run,
        console: Arc::new(Terminal::new(out)),
        run,
        working: None,
    };
    let outcome = asked.run(cx).await.map_err(|error| signals.explained(error, &from))?;
    match entry.reads() {
        true => out.lines(&outcome.lines)?,
        false => out.made(&outcome.lines, &outcome.ids)?,
    }
    Ok(outcome.exit)
}

/// What a command logs on stderr: with `-vvv` each request that is sent again.
fn of_commands(global: &Global) -> &'static str {
    match global.screen.verbose {
        0 if global.screen.quiet => "error",
        0 => "warn",
        1 | 2 => "info",
        _ => "info,fspfs::store::aws::service=debug",
    }
}

/// How much is logged by what runs on.
pub(super) fn log_level(global: &Global) -> tracing::Level {
    match global.screen.verbose {
        0 if global.screen.quiet => tracing::Level::ERROR,
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
        max_in_flight: global.max_in_flight.or_else(num_jobs),
        owners: scope.owners,
        filters: scope.filters,
        settling: None,
        max_unsaved: None,
        packing: crate::store::Packing::default(),
        single_writer: global.single_writer,
        salvage: false,
        state: Some(crate::mount::state_directory()),
    }
}

/// What the original's environment says of how much is done at the same time.
fn num_jobs() -> Option<std::num::NonZeroUsize> {
    std::env::var("NUM_JOBS").ok()?.parse().ok()
}

async fn init(global: &Global, out: Output, args: &InitArgs) -> anyhow::Result<Exit> {
    let url = match &args.target {
        Some(target) => target.clone(),
        None => store_url(global),
    };
    let repository = match &url {
        StoreUrl::Bucket(url) => {
            Repository::create_in_bucket(url, &store_options(global, None)).await?
        }
        url => Repository::create(url.directory()?).await?,
    };
    let url = url.absolute()?;
    let made = serde_json::json!({ "store": url.to_string(), "id": repository.id() });
    out.result(&made, Vec::new, || vec![format!("{url} is an empty repository")])?;
    Ok(Exit::Done)
}

fn man(args: &ManArgs) -> anyhow::Result<Exit> {
    let mut grammar = Cli::grammar();
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
