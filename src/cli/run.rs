//! Running a command.

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;

use super::output::{Output, Terminal};
use super::signals::Signals;
use super::{
    Asked, Cli, Command, CompletionsArgs, Global, InitArgs, ManArgs, ScopeArgs, jobs, mount, staged,
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
    let Cli { global, command } = cli;
    // `mount` sets up its own log, and a runtime once it is where it will stay.
    match &command {
        Asked::Other(Command::Mount(args)) => return mount::mount(&global, args),
        Asked::Other(Command::Umount(args)) => return super::umount::umount(args),
        Asked::Other(Command::Serve(args)) => return super::serve::serve(&global, args),
        Asked::Other(Command::Completions(args)) => return completions(args),
        Asked::Other(Command::Man(args)) => return man(args),
        _ => {}
    }
    crate::mount::log_to_stderr(log_level(&global));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // One may wait for a disk.
        .worker_threads(std::thread::available_parallelism().map_or(2, usize::from).max(2))
        .enable_all()
        .build()?;
    let out = Output::new(&global);
    let exit = runtime.block_on(async {
        match command {
            Asked::Operation { asked, name, dry_run } => {
                operation(&global, out, asked, name, dry_run).await
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

/// Does it here, or lets the mount do it whose working image it is about.
async fn operation(
    global: &Global,
    out: Output,
    asked: Box<dyn table::Asked>,
    name: &str,
    dry_run: bool,
) -> anyhow::Result<Exit> {
    if let Some((file, words)) = asked.at_mount() {
        return super::control::forward(name, file, words, global.screen, out).await;
    }
    let run = Run::default();
    let signals = Signals::watch(&run)?;
    let house = House {
        stores: Arc::new(Stores::default()),
        from: store_url(global),
        options: store_options(global, None),
        opened: None,
        journals: crate::mount::state_directory().join("transfers"),
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
    out.lines(&outcome.lines)?;
    Ok(outcome.exit)
}

/// How much is logged on stderr.
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
        max_in_flight: global.max_in_flight,
        owners: scope.owners,
        filters: scope.filters,
        settling: None,
        max_unsaved: None,
    }
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

fn completions(args: &CompletionsArgs) -> anyhow::Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::grammar(), "fspfs", &mut script);
    std::io::stdout().write_all(&script)?;
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
