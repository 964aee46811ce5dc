//! What names a snapshot on a command line and in a control file.

use std::cmp::Reverse;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::builder::{OsStringValueParser, TypedValueParser as _, ValueParser, ValueParserFactory};
use nix::sys::statfs::{FUSE_SUPER_MAGIC, statfs};

use super::context::Context;
use super::{Error, Result};
use crate::blocking::blocking;
use crate::model::{Snapshot, SnapshotId};
use crate::shown::one_line;
use crate::store::page::list_all;
use crate::store::{self, ErrorKind, SharedStore};

/// How many snapshots a message lists: those that a reference fits, or those that are nearest.
const LISTED: usize = 5;

/// How alike two texts have to be for one to be offered in the place of the other, by Jaro and Winkler.
const ALIKE: f64 = 0.8;

/// The help of an argument that is a reference.
pub(crate) const HELP: &str =
    "The snapshot: an id, a name, `latest`, volume:vol-…, tag:Key=Value, or an image in a mount";

/// A snapshot, by its id or by something that it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reference {
    /// Its id.
    Id(SnapshotId),
    /// Its image in a mount.
    Image(PathBuf),
    /// The newest one that fits, or the only one.
    Search { by: By, newest: bool },
}

/// What is searched for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum By {
    Anything,
    Name(String),
    Volume(String),
    Tag(String, String),
}

/// A text that is no reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct InvalidReference(String);

const LATEST: &str = "latest";

impl Reference {
    /// The path of an image, if it is one.
    pub(crate) fn image(&self) -> Option<&Path> {
        match self {
            Self::Image(path) => Some(path),
            _ => None,
        }
    }
}

impl FromStr for Reference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> std::result::Result<Self, InvalidReference> {
        let invalid = |why: &str| InvalidReference(why.to_owned());
        let (kind, rest) = text.split_once(':').unwrap_or(("", text));
        let (value, newest) = match rest.strip_suffix(":latest") {
            Some(value) => (value, true),
            None => (rest, false),
        };
        let (by, newest) = match kind {
            "name" if !rest.is_empty() => (By::Name(rest.to_owned()), true),
            "volume" if value.starts_with("vol-") => (By::Volume(value.to_owned()), newest),
            "volume" => return Err(invalid("give a volume as volume:vol-0123456789abcdef0")),
            "tag" => match value.split_once('=') {
                Some((key, value)) if !key.is_empty() => {
                    (By::Tag(key.to_owned(), value.to_owned()), newest)
                }
                _ => return Err(invalid("give a tag as tag:Role=db")),
            },
            _ if text.is_empty() || text == "name:" => return Err(invalid("it is empty")),
            _ if text == LATEST => (By::Anything, true),
            _ if text.contains('/') => return Ok(Self::Image(text.into())),
            _ if text.starts_with("snap-") => {
                return text.parse().map(Self::Id).map_err(|error| invalid(&format!("{error}")));
            }
            _ => (By::Name(text.to_owned()), true),
        };
        Ok(Self::Search { by, newest })
    }
}

impl ValueParserFactory for Reference {
    type Parser = ValueParser;

    fn value_parser() -> ValueParser {
        // What is no text is a path.
        ValueParser::new(OsStringValueParser::new().try_map(|argument| match argument.to_str() {
            Some(text) => text.parse(),
            None => Ok(Self::Image(argument.into())),
        }))
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Image(path) => path.display().fmt(f),
            Self::Search { by: By::Anything, .. } => f.write_str(LATEST),
            Self::Search { by: by @ By::Name(_), .. } | Self::Search { by, newest: false } => {
                by.fmt(f)
            }
            Self::Search { by, newest: true } => write!(f, "{by}:{LATEST}"),
        }
    }
}

impl fmt::Display for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anything => f.write_str("any"),
            Self::Name(name) => write!(f, "name:{name}"),
            Self::Volume(id) => write!(f, "volume:{id}"),
            Self::Tag(key, value) => write!(f, "tag:{key}={value}"),
        }
    }
}

impl By {
    fn fits(&self, snapshot: &Snapshot) -> bool {
        match self {
            Self::Anything => true,
            Self::Name(name) => snapshot.name() == Some(name),
            Self::Volume(id) => snapshot.volume_id.as_ref() == Some(id),
            Self::Tag(key, value) => snapshot.tags.get(key) == Some(value),
        }
    }

    /// What this could have meant of a snapshot.
    fn near(&self, snapshot: &Snapshot) -> Option<Self> {
        Some(match self {
            Self::Anything => return None,
            Self::Name(_) => Self::Name(snapshot.name()?.to_owned()),
            Self::Volume(_) => Self::Volume(snapshot.volume_id.clone()?),
            Self::Tag(key, _) => Self::Tag(key.clone(), snapshot.tags.get(key)?.clone()),
        })
    }

    /// What is compared, to find the nearest.
    fn value(&self) -> &str {
        match self {
            Self::Anything => "",
            Self::Name(value) | Self::Volume(value) | Self::Tag(_, value) => value,
        }
    }
}

impl Reference {
    /// The id of the completed snapshot that is meant. Whether there is one of an id that was given is not asked.
    ///
    /// # Errors
    ///
    /// If there is none; the nearest are listed. If several fit.
    pub(crate) async fn id(&self, cx: &Context, store: &SharedStore) -> Result<SnapshotId> {
        let Self::Search { by, newest } = self else { return self.only(store).await };
        let id = self.search(store, by, *newest, true).await?;
        cx.note(format_args!("{} is {id}", one_line(&self.to_string())));
        Ok(id)
    }

    /// The id of the only one that fits, in whatever state it is.
    ///
    /// # Errors
    ///
    /// If there is none, or there are several.
    pub(crate) async fn only(&self, store: &SharedStore) -> Result<SnapshotId> {
        match self {
            Self::Id(id) => Ok(id.clone()),
            Self::Image(path) => image_at(path).await,
            Self::Search { by, .. } => self.search(store, by, false, false).await,
        }
    }

    async fn search(
        &self,
        store: &SharedStore,
        by: &By,
        newest: bool,
        completed: bool,
    ) -> Result<SnapshotId> {
        let all = list_all(&**store).await?;
        let mut fitting: Vec<_> = all.iter().filter(|snapshot| by.fits(snapshot)).collect();
        let others = fitting.len();
        fitting.retain(|snapshot| !completed || snapshot.is_readable());
        fitting.sort_by_key(|snapshot| Reverse((snapshot.start_time, &snapshot.id)));
        let shown = one_line(&self.to_string());
        match fitting[..] {
            [one] => Ok(one.id.clone()),
            [one, ..] if newest => Ok(one.id.clone()),
            [] => {
                let why = match (by, others) {
                    (By::Anything, 0) => format!("{shown}: there is no snapshot"),
                    (_, 0) => {
                        let near = all.iter().filter_map(|snapshot| by.near(snapshot));
                        let near = near.map(|near| (near.value().to_owned(), near.to_string()));
                        let near = nearest(by.value(), near);
                        format!("{shown}: there is no such snapshot{near}")
                    }
                    _ => format!("{shown}: none of {others} that fit is completed"),
                };
                Err(store::Error::new(ErrorKind::NotFound, why).into())
            }
            _ => {
                let listed = fitting.iter().take(LISTED).map(|snapshot| {
                    format!("\n  {} of {}", snapshot.id, snapshot.start_time.strftime("%F %T"))
                });
                let cure = match completed {
                    true => format!("; {shown}:{LATEST} is the newest"),
                    false => ", and one alone must be named".to_owned(),
                };
                let (many, listed) = (fitting.len(), listed.collect::<String>());
                Err(Error::Refused(format!("{shown}: {many} snapshots fit{cure}:{listed}")))
            }
        }
    }
}

/// Describes a snapshot. If there is none the nearest ids are listed.
pub(crate) async fn describe(store: &SharedStore, id: &SnapshotId) -> Result<Snapshot> {
    match store.describe(id).await {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let all = list_all(&**store).await?;
            let ids = all.iter().map(|snapshot| snapshot.id.to_string());
            let near = nearest(id.as_str(), ids.map(|id| (id.clone(), id)));
            Err(store::Error::new(ErrorKind::NotFound, format!("{error}{near}")).into())
        }
        described => Ok(described?),
    }
}

/// The id of the snapshot whose image, or a link to it, is at a path.
async fn image_at(path: &Path) -> Result<SnapshotId> {
    let none = |why: &str| Error::Refused(format!("{}: {why}", one_line(&path.to_string_lossy())));
    let id = id_at(path).await.map_err(|error| none(&error.to_string()))?;
    id.ok_or_else(|| none("that is no image of a snapshot in a mount"))
}

/// The id of the snapshot whose image is at a path, if that is one.
pub(super) async fn mounted(path: &Path) -> Option<SnapshotId> {
    id_at(path).await.ok().flatten()
}

async fn id_at(path: &Path) -> std::io::Result<Option<SnapshotId>> {
    let place = path.to_owned();
    let id = blocking(move || {
        // A copy of an image can have its attributes, and is no image of a mount.
        let is_mounted = statfs(&place)?.filesystem_type() == FUSE_SUPER_MAGIC;
        Ok(if is_mounted { xattr::get_deref(&place, "user.fspfs.id")? } else { None })
    });
    let id: std::io::Result<_> = id.await;
    Ok(id?.and_then(|id| std::str::from_utf8(&id).ok()?.parse().ok()))
}

/// What is shown of the texts that are most like this one, as the end of a message.
fn nearest(text: &str, texts: impl Iterator<Item = (String, String)>) -> String {
    let mut near: Vec<_> = texts
        .map(|(near, shown)| (strsim::jaro_winkler(text, &near), shown))
        .filter(|(alike, _)| *alike >= ALIKE)
        .collect();
    near.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    near.dedup();
    let near: Vec<_> = near.iter().take(LISTED).map(|(_, shown)| one_line(shown)).collect();
    match near.is_empty() {
        true => String::new(),
        false => format!("; the nearest: {}", near.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_is_printed_as_it_is_read() {
        for text in [
            "snap-0123456789abcdef0",
            "latest",
            "name:web",
            "name:snap-x",
            "volume:vol-0a",
            "volume:vol-0a:latest",
            "tag:Role=db",
            "tag:Role=a:b",
            "tag:Role=db:latest",
            "/mnt/fsp/by-name/web.img",
        ] {
            assert_eq!(text.parse::<Reference>().unwrap().to_string(), text);
        }
        let bare: Reference = "web 22.04".parse().unwrap();
        assert_eq!(bare.to_string(), "name:web 22.04");
        assert_eq!(bare.to_string().parse(), Ok(bare));
        for bad in ["", "name:", "volume:", "volume:web", "tag:", "tag:=x", "tag:Role", "snap-x"] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_nearest_are_offered_first() {
        let texts = ["mail", "web-2", "web-1", "web-1"];
        let texts = || texts.iter().map(|text| ((*text).to_owned(), format!("name:{text}")));
        assert_eq!(nearest("web1", texts()), "; the nearest: name:web-1, name:web-2");
        assert_eq!(nearest("x", texts()), "");
    }
}
