//! All operations, and what they have in common.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};

use clap::{ArgAction, ArgMatches, Args, Command};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use serde::Serialize;

use super::context::Context;
use super::reference::Reference;
use super::{Exit, Result};
use crate::arguments::{ScreenArgs, WORKING_DIRECTORY};
use crate::shown;
use crate::store::StoreUrl;

/// An operation: the fields are its arguments, the doc comments its help.
pub(crate) trait Operation: Args + fmt::Debug + Send + Sync + 'static {
    /// The name of its command, and of its control file.
    const NAME: &'static str;

    /// A line for its control file; `None` if there is none.
    const LINE: Option<&'static str> = None;

    /// Whether it has `--dry-run`.
    const DRY_RUN: bool = false;

    /// Whether it only reads lists, and so can be done where nothing is to be done.
    const READS: bool = false;

    /// What came of it.
    type Report: Report;

    /// Does what must be done while the process has one thread. A job is never asked for it.
    fn begin_alone(&mut self) -> Result<()> {
        Ok(())
    }

    /// Does it.
    fn run(self, cx: &Context) -> impl Future<Output = Result<Self::Report>> + Send;

    /// Whether it has to do with the store of `-s`.
    fn uses_store(&self) -> bool {
        true
    }

    /// What is wrong with it as a line of a control file, beside its grammar.
    fn check(&self) -> std::result::Result<(), String> {
        Ok(())
    }

    /// If only the mount of a working image can do this: the image, and the words for its control file, given the
    /// name of the image.
    fn at_mount(&self) -> Option<(&Path, Words<'_>)> {
        None
    }
}

/// Makes the words for a control file of the name of a working image.
pub(crate) type Words<'a> = Box<dyn Fn(&str) -> Vec<String> + 'a>;

/// What came of an operation. As JSON it is one value.
pub(crate) trait Report: Serialize {
    /// What is printed on stdout.
    fn lines(&self) -> Vec<String>;

    /// What is printed if the result alone is wanted.
    fn ids(&self) -> Vec<String>;

    /// How the command ends.
    fn exit(&self) -> Exit {
        Exit::Done
    }
}

/// What is printed on stdout at the end, and how the command ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) lines: Vec<String>,
    /// What the lines are about.
    pub(crate) ids: Vec<String>,
    pub(crate) exit: Exit,
}

impl Outcome {
    /// A report, in the form that is wanted.
    pub(crate) fn of(report: &impl Report, screen: ScreenArgs) -> Self {
        let lines = if screen.json {
            let json = serde_json::to_string_pretty(report).expect("reports have string keys");
            shown::json(&json).lines().map(str::to_owned).collect()
        } else if screen.quiet {
            report.ids()
        } else {
            report.lines()
        };
        Self { lines, ids: report.ids(), exit: report.exit() }
    }
}

/// An operation with its arguments.
pub(crate) trait Asked: fmt::Debug + Send + Sync {
    /// As [`Operation::begin_alone`].
    fn begin_alone(&mut self) -> Result<()>;

    /// Does it.
    fn run(self: Box<Self>, cx: Context) -> BoxFuture<'static, Result<Outcome>>;

    /// As [`Operation::uses_store`].
    fn uses_store(&self) -> bool;

    /// As [`Operation::check`].
    fn check(&self) -> std::result::Result<(), String>;

    /// As [`Operation::at_mount`].
    fn at_mount(&self) -> Option<(&Path, Words<'_>)>;
}

impl<T: Operation> Asked for T {
    fn begin_alone(&mut self) -> Result<()> {
        Operation::begin_alone(self)
    }

    fn run(self: Box<Self>, cx: Context) -> BoxFuture<'static, Result<Outcome>> {
        let run = async move {
            let report = Operation::run(*self, &cx).await?;
            Ok(Outcome::of(&report, cx.screen))
        };
        run.boxed()
    }

    fn uses_store(&self) -> bool {
        Operation::uses_store(self)
    }

    fn check(&self) -> std::result::Result<(), String> {
        Operation::check(self)
    }

    fn at_mount(&self) -> Option<(&Path, Words<'_>)> {
        Operation::at_mount(self)
    }
}

/// A line of the table.
pub(crate) struct Entry {
    pub(crate) name: &'static str,
    line: Option<&'static str>,
    dry_run: bool,
    reads: bool,
    arguments: fn(Command) -> Command,
    read: fn(&ArgMatches) -> std::result::Result<Box<dyn Asked>, clap::Error>,
}

const fn entry<T: Operation>() -> Entry {
    Entry {
        name: T::NAME,
        line: T::LINE,
        dry_run: T::DRY_RUN,
        reads: T::READS,
        arguments: T::augment_args,
        read: |matches| Ok(Box::new(T::from_arg_matches(matches)?)),
    }
}

/// All operations, in the order in which help shows them.
pub(crate) static OPERATIONS: &[Entry] = &[
    entry::<super::list::ListArgs>(),
    entry::<super::diff::DiffArgs>(),
    entry::<super::upload::UploadArgs>(),
    entry::<super::fanout::FanoutArgs>(),
    entry::<super::download::DownloadArgs>(),
    entry::<super::deltadownload::DeltadownloadArgs>(),
    entry::<super::multiclone::MulticloneArgs>(),
    entry::<super::copy::CopyArgs>(),
    entry::<super::sync::SyncArgs>(),
    entry::<super::movetos3::Movetos3Args>(),
    entry::<super::getfroms3::Getfroms3Args>(),
    entry::<super::commit::CommitArgs>(),
    entry::<super::clone::CloneArgs>(),
    entry::<super::delete::DeleteArgs>(),
    entry::<super::verify::VerifyArgs>(),
    entry::<super::gc::GcArgs>(),
];

/// The operations that have a control file.
pub(crate) fn in_control() -> impl Iterator<Item = &'static Entry> {
    OPERATIONS.iter().filter(|entry| entry.line.is_some())
}

/// The operation of this name.
pub(crate) fn find(name: &str) -> Option<&'static Entry> {
    OPERATIONS.iter().find(|entry| entry.name == name)
}

/// What a line in a control file asks for.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) asked: Box<dyn Asked>,
    pub(crate) screen: ScreenArgs,
    pub(crate) dry_run: bool,
}

impl Entry {
    /// The grammar of its command.
    pub(crate) fn command(&self) -> Command {
        let command = (self.arguments)(Command::new(self.name));
        if !self.dry_run {
            return command;
        }
        let flag = clap::Arg::new("dry-run").long("dry-run").visible_alias("dry_run");
        command.arg(flag.action(ArgAction::SetTrue).help("Say what would be done, and do nothing"))
    }

    /// The operation that the arguments of its command ask for, and whether nothing is to be done.
    ///
    /// # Errors
    ///
    /// If they are not of its grammar.
    pub(crate) fn read(
        &self,
        matches: &ArgMatches,
    ) -> std::result::Result<(Box<dyn Asked>, bool), clap::Error> {
        let dry_run = self.dry_run && matches.get_flag("dry-run");
        Ok(((self.read)(matches)?, dry_run))
    }

    /// Whether it can say what it would do, or changes nothing anyway.
    pub(crate) fn can_dry_run(&self) -> bool {
        self.dry_run || self.reads
    }

    /// Whether it only reads lists.
    pub(crate) fn reads(&self) -> bool {
        self.reads
    }

    /// What it does, in a line.
    pub(crate) fn about(&self) -> String {
        self.command().get_about().map(ToString::to_string).unwrap_or_default()
    }

    /// The grammar of a line in its control file.
    fn grammar(&self) -> Command {
        let line = self.command().no_binary_name(true).disable_help_flag(true);
        let more = format!(
            "A line of these arguments starts a job; reading the same open file gives its number.\n\
             A working image is named as in {WORKING_DIRECTORY}/; other paths are absolute.\n\n\
             Example:\n  echo {} > control/{}",
            self.line.unwrap_or_default(),
            self.name
        );
        ScreenArgs::augment_args(line).about(self.about()).after_help(more).next_help_heading(None)
    }

    /// How to word it in the control file.
    pub(crate) fn usage(&self) -> String {
        self.grammar().render_help().to_string()
    }

    /// Reads a line of the control file, quoted as in a shell.
    ///
    /// # Errors
    ///
    /// What is wrong with it, for people.
    pub(crate) fn parse(&self, line: &str) -> std::result::Result<Line, String> {
        let words = shlex::split(line).ok_or("a quotation mark or a backslash ends nowhere")?;
        let read = || {
            let matches = self.grammar().try_get_matches_from(words)?;
            let (asked, dry_run) = self.read(&matches)?;
            // A working image is named without its directory.
            if asked.at_mount().is_none()
                && let Some(path) = relative(&self.command(), &matches)
            {
                let why = format!("{}: give an absolute path", path.display());
                return Err(clap::Error::raw(clap::error::ErrorKind::ValueValidation, why));
            }
            let screen = <ScreenArgs as clap::FromArgMatches>::from_arg_matches(&matches)?;
            Ok(Line { asked, screen, dry_run })
        };
        let line = read().map_err(|error: clap::Error| {
            let text = error.render().to_string();
            // The usage follows by itself, and so do hints to options that a line does not have.
            let why = text.split("\n\n").next().unwrap_or(&text);
            why.trim().trim_start_matches("error: ").to_owned()
        })?;
        line.asked.check()?;
        Ok(line)
    }
}

/// A path among the arguments that is relative: nobody knows the directory that it would be relative to.
fn relative<'a>(grammar: &Command, matches: &'a ArgMatches) -> Option<&'a Path> {
    let mut paths: Vec<&Path> = Vec::new();
    for argument in grammar.get_arguments() {
        let id = argument.get_id().as_str();
        if let Ok(Some(files)) = matches.try_get_many::<PathBuf>(id) {
            paths.extend(files.map(PathBuf::as_path));
        }
        if let Ok(Some(stores)) = matches.try_get_many::<StoreUrl>(id) {
            paths.extend(stores.filter_map(|store| store.directory().ok()));
        }
        if let Ok(Some(references)) = matches.try_get_many::<Reference>(id) {
            paths.extend(references.filter_map(Reference::image));
        }
    }
    // What stands for stdin is refused with a reason of its own.
    paths.into_iter().find(|path| !path.is_absolute() && *path != Path::new("-"))
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Entry {}

impl Hash for Entry {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Entry").field(&self.name).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str, line: &str) -> std::result::Result<String, String> {
        find(name).unwrap().parse(line).map(|line| format!("{:?}", line.asked))
    }

    #[test]
    fn a_line_is_read_as_a_shell_would() {
        let commit = |file: &str, wait: bool, cancel: bool| {
            Ok(format!(
                "CommitArgs {{ file: {file:?}, wait: {wait}, as_is: false, cancel: {cancel} }}"
            ))
        };
        assert_eq!(parse("commit", "web.img"), commit("web.img", false, false));
        assert_eq!(parse("commit", "--wait 'a b'\\ c"), commit("a b c", true, false));
        assert_eq!(parse("commit", "--cancel -- -x"), commit("-x", false, true));
        let line = find("commit").unwrap().parse("--json web.img").unwrap();
        assert!(line.screen.json && !line.screen.quiet);
        assert!(find("gc").unwrap().parse("--dry-run").unwrap().dry_run);
    }

    #[test]
    fn a_bad_line_is_explained() {
        let says = |line: &str, why: &str| {
            let error = parse("commit", line).unwrap_err();
            assert!(error.contains(why) && !error.contains("Usage"), "{line}: {error}");
        };
        says("", "<FILE>");
        says("a b", "'b'");
        says("--wait --cancel a", "cannot be used with");
        says("--help", "'--help'");
        says("'a", "quotation mark");
        let error = parse("clone", "snap-zz web.img").unwrap_err();
        assert!(error.contains("is not a snapshot id"), "{error}");
    }

    #[test]
    fn every_operation_has_a_command_and_a_usage() {
        for entry in OPERATIONS {
            let about = entry.about();
            assert!(!about.is_empty() && !about.ends_with('.'), "{}: {about}", entry.name);
            entry.command().debug_assert();
            let documented =
                include_str!("../../docs/json.md").contains(&format!("`{}`", entry.name));
            assert!(documented, "docs/json.md has no {}", entry.name);
        }
        for entry in in_control() {
            entry.grammar().debug_assert();
            let usage = entry.usage();
            assert!(usage.starts_with(&entry.about()), "{usage}");
            assert!(usage.contains(&format!("Usage: {}", entry.name)), "{usage}");
            let example = usage.lines().find_map(|line| line.trim().strip_prefix("echo ")).unwrap();
            let (line, file) = example.split_once(" > control/").unwrap();
            assert_eq!(file, entry.name);
            entry.parse(line).unwrap();
        }
    }
}
