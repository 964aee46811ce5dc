//! The arguments of the operations that a command line and a control file have in common: one
//! grammar, whichever way the words come.

use std::path::{Component, Path, PathBuf};

use clap::{Args, FromArgMatches};

use crate::model::SnapshotId;

/// The directory of a mount that holds the working images.
pub(crate) const WORKING_DIRECTORY: &str = "new";

/// The control file that tells what is staged and cannot be used.
pub(crate) const DAMAGED: &str = "damaged";

/// `commit`
#[derive(Args, Clone, Debug, PartialEq, Eq)]
#[command(after_help = "\
It ends when the snapshot is made: everything is stored, and the store has taken over. The id of the
snapshot is the last line on stdout. A commit that failed or was interrupted is tried again. A signal
ends the wait and not the commit; --cancel does.

Examples:
  fspfs commit /mnt/fsp/new/web.img
  fspfs commit --wait /mnt/fsp/new/web.img
  fspfs commit --cancel /mnt/fsp/new/web.img")]
pub(crate) struct CommitArgs {
    /// A file below `new/` of a mount
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Wait until the store calls the snapshot completed, which can take long
    #[arg(long, conflicts_with = "cancel")]
    pub(crate) wait: bool,
    /// Cancel the commit of this file that is running; what was written stays
    #[arg(long)]
    pub(crate) cancel: bool,
}

/// `clone`
#[derive(Args, Clone, Debug, PartialEq, Eq)]
#[command(after_help = "\
Nothing is copied: the file reads as the snapshot does, and keeps what is written over it.

Examples:
  fspfs clone snap-0123456789abcdef0 /mnt/fsp/new/web.img")]
pub(crate) struct CloneArgs {
    /// The snapshot to begin with
    #[arg(value_name = "SNAP")]
    pub(crate) snapshot: SnapshotId,
    /// A new file below `new/` of a mount
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
}

/// The name of an operation: that of its command and that of its control file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum OperationName {
    Clone,
    Commit,
}

/// An operation, as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Clone(CloneArgs),
    Commit(CommitArgs),
}

impl OperationName {
    pub(crate) const ALL: [Self; 2] = [Self::Clone, Self::Commit];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Clone => "clone",
            Self::Commit => "commit",
        }
    }

    /// The grammar of a line in the control file.
    fn grammar(self) -> clap::Command {
        let line = clap::Command::new(self.as_str()).no_binary_name(true).disable_help_flag(true);
        let (line, about, example) = match self {
            Self::Clone => (
                CloneArgs::augment_args(line),
                "Makes a working image that begins as a snapshot.",
                "echo snap-0123456789abcdef0 web.img > control/clone",
            ),
            Self::Commit => (
                CommitArgs::augment_args(line),
                "Makes a snapshot of a working image.",
                "echo web.img > control/commit",
            ),
        };
        let more = format!(
            "A line of these arguments starts a job; reading the same open file gives its number.\n\
             FILE is its name in {WORKING_DIRECTORY}/.\n\nExample:\n  {example}"
        );
        line.about(about).after_help(more)
    }

    /// How to word it in the control file.
    pub(crate) fn usage(self) -> String {
        self.grammar().render_help().to_string()
    }

    /// Reads a line of the control file, quoted as in a shell.
    ///
    /// # Errors
    ///
    /// What is wrong with it, for people.
    pub(crate) fn parse(self, line: &str) -> Result<Operation, String> {
        let words = shlex::split(line).ok_or("a quotation mark or a backslash ends nowhere")?;
        let read = || {
            let matches = self.grammar().try_get_matches_from(words)?;
            Ok(match self {
                Self::Clone => Operation::Clone(CloneArgs::from_arg_matches(&matches)?),
                Self::Commit => Operation::Commit(CommitArgs::from_arg_matches(&matches)?),
            })
        };
        read().map_err(|error: clap::Error| {
            let text = error.render().to_string();
            // The usage follows by itself, and so do hints to options that a line does not have.
            let why = text.split("\n\n").next().unwrap_or(&text);
            why.trim().trim_start_matches("error: ").to_owned()
        })
    }
}

/// The name of a working image that is given to a control file: the name alone, or a path that ends
/// in `new/<name>`.
///
/// # Errors
///
/// What is wrong with it, for people.
pub(crate) fn working_name(path: &Path) -> Result<&str, String> {
    let mut parts = path.components().rev();
    let name = match (parts.next(), parts.next()) {
        (Some(Component::Normal(name)), None) => Some(name),
        (Some(Component::Normal(name)), Some(Component::Normal(directory))) => {
            (directory == WORKING_DIRECTORY).then_some(name)
        }
        _ => None,
    };
    name.and_then(|name| name.to_str()).ok_or_else(|| {
        format!(
            "{} is no working image: give its name in {WORKING_DIRECTORY}/, such as web.img",
            path.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit(line: &str) -> Result<Operation, String> {
        OperationName::Commit.parse(line)
    }

    #[test]
    fn a_line_is_read_as_a_shell_would() {
        let args = |file: &str, wait, cancel| {
            Ok(Operation::Commit(CommitArgs { file: file.into(), wait, cancel }))
        };
        assert_eq!(commit("web.img"), args("web.img", false, false));
        assert_eq!(commit("--wait 'a b'\\ c"), args("a b c", true, false));
        assert_eq!(commit("--cancel -- -x"), args("-x", false, true));
        let clone = OperationName::Clone.parse("snap-0a new/web.img");
        let (snapshot, file) = ("snap-0a".parse().unwrap(), "new/web.img".into());
        assert_eq!(clone, Ok(Operation::Clone(CloneArgs { snapshot, file })));
    }

    #[test]
    fn a_bad_line_is_explained() {
        let says = |line: &str, why: &str| {
            let error = commit(line).unwrap_err();
            assert!(error.contains(why) && !error.contains("Usage"), "{line}: {error}");
        };
        says("", "<FILE>");
        says("a b", "'b'");
        says("--wait --cancel a", "cannot be used with");
        says("--help", "'--help'");
        says("'a", "quotation mark");
        let error = OperationName::Clone.parse("web.img x").unwrap_err();
        assert!(error.contains("is not a snapshot id"), "{error}");
    }

    #[test]
    fn the_usage_is_about_lines() {
        for name in OperationName::ALL {
            name.grammar().debug_assert();
            let usage = name.usage();
            assert!(usage.contains(&format!("Usage: {}", name.as_str())), "{usage}");
            assert!(!usage.contains("fspfs "), "{usage}");
            let example = usage.lines().find_map(|line| line.trim().strip_prefix("echo ")).unwrap();
            let (line, file) = example.split_once(" > control/").unwrap();
            assert_eq!(file, name.as_str());
            assert!(name.parse(line).is_ok());
        }
    }

    #[test]
    fn a_working_image_has_a_name_in_its_directory() {
        for good in ["web.img", "new/web.img", "/mnt/fsp/new/web.img"] {
            assert_eq!(working_name(Path::new(good)), Ok("web.img"), "{good}");
        }
        for bad in ["", "/", "..", "new/..", "/web.img", "by-name/web.img", "/mnt/new/x/web.img"] {
            assert!(working_name(Path::new(bad)).is_err(), "{bad}");
        }
    }
}
