//! Completing words in a shell: the grammar, and the snapshots of the store.

use std::any::TypeId;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::time::Duration;

use anyhow::Context as _;
use clap::builder::StyledStr;
use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};
use clap_complete::env::{CompleteEnv, Shells};

use super::{Cli, CompletionsArgs, Exit};
use crate::arguments;
use crate::model::Snapshot;
use crate::ops::image::Parent;
use crate::ops::reference::Reference;
use crate::shown::one_line;
use crate::store::ebs::EbsUrl;
use crate::store::page::list_all;
use crate::store::{self, StoreOptions, StoreUrl};

/// What a shell sets when it asks for words.
const VARIABLE: &str = "COMPLETE";

/// How long the store is waited for.
const PATIENCE: Duration = Duration::from_secs(3);

/// Answers a shell that asks for words, and ends the program then.
pub fn complete() {
    CompleteEnv::with_factory(grammar).var(VARIABLE).complete();
}

/// The grammar, in which each argument that names a snapshot knows those of the store.
fn grammar() -> clap::Command {
    let with_snapshots = |arg: clap::Arg| {
        let kind = arg.get_value_parser().type_id();
        let names_one = kind == TypeId::of::<Reference>() || kind == TypeId::of::<Parent>();
        if names_one { arg.add(ArgValueCandidates::new(snapshots)) } else { arg }
    };
    Cli::grammar().mut_subcommands(|command| command.mut_args(with_snapshots))
}

/// Prints what a shell has to know to ask this program for words.
pub(super) fn completions(args: &CompletionsArgs) -> anyhow::Result<Exit> {
    let name = args.shell.to_string();
    let shells = Shells::builtins();
    let shell = shells.completer(&name).context("it has no completions")?;
    let mut script = Vec::new();
    shell.write_registration(VARIABLE, "fspfs", "fspfs", "fspfs", &mut script)?;
    std::io::stdout().write_all(&script)?;
    Ok(Exit::Done)
}

/// The ids and names of the snapshots of the store that the command line names; nothing if it does not answer.
fn snapshots() -> Vec<CompletionCandidate> {
    let url = store_of(std::env::args_os()).unwrap_or_else(|| StoreUrl::Ebs(EbsUrl::default()));
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return Vec::new();
    };
    let listing = async {
        let store = store::open(&url, &StoreOptions::default()).await?;
        list_all(&*store).await
    };
    let listed = runtime.block_on(async { tokio::time::timeout(PATIENCE, listing).await });
    runtime.shutdown_background();
    listed.ok().and_then(Result::ok).map(candidates).unwrap_or_default()
}

fn candidates(mut snapshots: Vec<Snapshot>) -> Vec<CompletionCandidate> {
    snapshots.sort_by_key(|snapshot| std::cmp::Reverse(snapshot.start_time));
    let about = |snapshot: &Snapshot| {
        let name = snapshot.name().map(|name| format!("{} ", one_line(name))).unwrap_or_default();
        let started = snapshot.start_time.strftime("%F %H:%M");
        StyledStr::from(format!("{name}{} {started}", snapshot.volume_size))
    };
    let mut names = BTreeMap::new();
    for snapshot in snapshots.iter().filter(|snapshot| snapshot.is_readable()) {
        if let Some(name) = snapshot.name().filter(|name| name.chars().all(is_harmless)) {
            names.entry(name.to_owned()).or_insert_with(|| snapshot.id.to_string());
        }
    }
    let ids = snapshots.iter().map(|snapshot| {
        CompletionCandidate::new(snapshot.id.to_string()).help(Some(about(snapshot)))
    });
    let names = names.into_iter().map(|(name, id)| {
        // A name that would be read as something else.
        let is_plain = matches!(name.parse(), Ok(Reference::Search { .. }));
        let word = if is_plain && name != "latest" { name } else { format!("name:{name}") };
        CompletionCandidate::new(word).help(Some(id.into()))
    });
    ids.chain(names).collect()
}

/// Whether a character means nothing to a shell: what is completed stands in a command line, and others may have
/// made the name.
fn is_harmless(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '.' | '_' | '@' | '%' | '+' | '-' | '=' | ',')
}

/// The store of the words that are completed, which stand behind the first `--`; else that of the environment.
fn store_of(arguments: impl Iterator<Item = OsString>) -> Option<StoreUrl> {
    let mut words = arguments.skip_while(|word| word != "--").skip(1);
    let mut found = std::env::var_os("FSPFS_STORE");
    while let Some(word) = words.next() {
        found = match word.as_bytes() {
            b"-s" | b"--store" | b"--from" => words.next(),
            word => {
                let options: [&[u8]; 3] = [b"--store=", b"--from=", b"-s"];
                let value = options.iter().find_map(|option| word.strip_prefix(*option));
                value.map(|value| OsStr::from_bytes(value).to_owned()).or(found)
            }
        };
    }
    arguments::store(&found?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_store_is_found_among_the_words() {
        let store = |line: &str| {
            let words = line.split(' ').map(OsString::from).collect::<Vec<_>>();
            store_of(words.into_iter())
        };
        let there = Some(StoreUrl::Directory("/x".into()));
        for line in ["-s /x", "--from /x", "--store=/x", "-s/x", "-s /y -s /x"] {
            assert_eq!(store(&format!("fspfs -- fspfs {line} download snap")), there, "{line}");
            assert_eq!(store(&format!("fspfs -- fspfs download {line} snap")), there, "{line}");
        }
    }
}
