//! What the words of a command line and of a line for a control file have in common.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path};

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser as _, ValueParser, ValueParserFactory};

use crate::store::{Filter, InvalidStoreUrl, StoreUrl};

pub(crate) mod values;

/// The directory of a mount that holds the working images.
pub(crate) const WORKING_DIRECTORY: &str = "new";

/// The control file that tells what is staged and cannot be used.
pub(crate) const DAMAGED: &str = "damaged";

/// How much is printed, and in which form.
#[derive(Args, Clone, Copy, Debug, Default)]
#[command(next_help_heading = "Global options")]
pub(crate) struct ScreenArgs {
    /// Print one JSON value instead of text
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Print nothing but ids, one a line, and what goes wrong
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// Say how many blocks passed and failed for each store or file; twice, which; three times,
    /// also each request that is sent again. `mount` and `serve` log more
    #[arg(short, long, visible_alias = "verbosity", global = true, action = clap::ArgAction::Count, conflicts_with = "quiet")]
    pub(crate) verbose: u8,
}

/// Which snapshots are listed.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Which snapshots")]
pub(crate) struct ScopeArgs {
    /// Whose: account ids, `self` or `amazon`; can be given several times; for `ebs:`, where it is
    /// `self` by default
    #[arg(long = "owner", value_name = "OWNER")]
    pub(crate) owners: Vec<String>,
    /// Those that match, as tag:Role=web or status=completed,error; can be given several times, and
    /// all have to match
    #[arg(long = "filter", value_name = "NAME=VALUE")]
    pub(crate) filters: Vec<Filter>,
}

/// What is done with the journal of a transfer.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ResumeArgs {
    /// Begin anew, whatever an earlier run has left
    #[arg(long)]
    pub(crate) restart: bool,
    /// Keep no journal: what is stopped begins anew
    #[arg(long, visible_alias = "suppress_writes")]
    pub(crate) suppress_writes: bool,
}

/// `--encrypted-holes`
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum EncryptedHoles {
    /// They are stored, as encrypted zeros
    Write,
    /// They are left out
    Skip,
}

impl ValueParserFactory for StoreUrl {
    type Parser = ValueParser;

    fn value_parser() -> ValueParser {
        ValueParser::new(OsStringValueParser::new().try_map(|text| store(&text)))
    }
}

/// The store that an argument names. What is no text is a directory.
pub(crate) fn store(argument: &OsStr) -> Result<StoreUrl, InvalidStoreUrl> {
    match argument.to_str() {
        Some(text) => text.parse(),
        None => {
            let path = argument.as_bytes();
            let path = path.strip_prefix(b"file://").unwrap_or(path);
            Ok(StoreUrl::Directory(OsStr::from_bytes(path).into()))
        }
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

    #[test]
    fn a_path_that_is_not_utf_8_is_a_directory() {
        for argument in [&b"/srv/\xff"[..], b"file:///srv/\xff"] {
            let expected = StoreUrl::Directory(OsStr::from_bytes(b"/srv/\xff").into());
            assert_eq!(store(OsStr::from_bytes(argument)), Ok(expected));
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
