//! Store URLs: which store the user means.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};

use super::ebs::{EbsUrl, InvalidEbsUrl};
use super::repository::{BucketUrl, InvalidBucketUrl};
use super::synth::{self, InvalidRecipe, Recipe};

/// Where snapshots live, as the user says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreUrl {
    /// A repository in a directory: `file:///srv/snaps`, `/srv/snaps` or `./snaps`.
    Directory(PathBuf),
    /// A repository in a bucket: `s3://bucket/prefix`.
    Bucket(Box<BucketUrl>),
    /// Snapshots that are computed: `synth:` or `synth:?size=16TiB`.
    Synth(Recipe),
    /// Snapshots of EBS: `ebs:`, `ebs://us-west-2` or `ebs://profile@us-west-2`.
    Ebs(EbsUrl),
}

/// A store that is not a repository, where one is needed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0} is no repository: this needs one in a directory, as `/srv/snaps`, or in a bucket, as `s3://bucket/prefix`"
)]
pub struct NoRepository(pub(super) StoreUrl);

/// A text that names no store.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidStoreUrl {
    /// Nothing at all.
    #[error("the store is empty: give a directory, as `-s /srv/snaps` or `-s file:///srv/snaps`")]
    Empty,
    /// A scheme that this version cannot open.
    #[error(
        "{url:?} names a store of the kind `{scheme}:`, which this version cannot open: give a directory, as `-s /srv/snaps` or `-s file:///srv/snaps`"
    )]
    Scheme {
        /// What was given.
        url: String,
        /// Its scheme.
        scheme: String,
    },
    /// A `file:` URL with a host, or without an absolute path.
    #[error(
        "{0:?} is not a file URL: one is `file://` and an absolute path, as `file:///srv/snaps`"
    )]
    File(String),
    /// A `synth:` URL with options that make no sense.
    #[error(transparent)]
    Synth(#[from] InvalidRecipe),
    /// An EBS store whose profile, region or endpoint cannot be.
    #[error(transparent)]
    Ebs(#[from] InvalidEbsUrl),
    /// A bucket whose name, prefix or options cannot be.
    #[error(transparent)]
    Bucket(#[from] InvalidBucketUrl),
}

impl FromStr for StoreUrl {
    type Err = InvalidStoreUrl;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            return Err(InvalidStoreUrl::Empty);
        }
        if let Some(rest) = text.strip_prefix("file:") {
            let path = rest.strip_prefix("//").unwrap_or(rest);
            return if path.starts_with('/') {
                Ok(Self::Directory(path.into()))
            } else {
                Err(InvalidStoreUrl::File(text.to_owned()))
            };
        }
        match text.split_once(':') {
            Some(("ebs", _)) => Ok(Self::Ebs(text.parse()?)),
            Some(("s3", _)) => Ok(Self::Bucket(Box::new(text.parse()?))),
            Some((synth::SCHEME, _)) => Ok(Self::Synth(text.parse()?)),
            Some((scheme, _)) if is_scheme(scheme) => {
                Err(InvalidStoreUrl::Scheme { url: text.to_owned(), scheme: scheme.to_owned() })
            }
            _ => Ok(Self::Directory(text.into())),
        }
    }
}

/// A scheme is letters and digits: a path with a colon can be written as `./a:b`.
fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b))
}

impl StoreUrl {
    /// The same store, whatever the working directory is.
    ///
    /// # Errors
    ///
    /// If the working directory cannot be found out.
    pub fn absolute(&self) -> std::io::Result<Self> {
        match self {
            // A repository may not exist yet (`init`): then its path is made absolute as it is.
            Self::Directory(path) => {
                path.canonicalize().or_else(|_| std::path::absolute(path)).map(Self::Directory)
            }
            Self::Bucket(_) | Self::Synth(_) | Self::Ebs(_) => Ok(self.clone()),
        }
    }

    /// The directory of the repository.
    ///
    /// # Errors
    ///
    /// If it is a store of another kind.
    pub fn directory(&self) -> Result<&Path, NoRepository> {
        match self {
            Self::Directory(path) => Ok(path),
            Self::Bucket(_) | Self::Synth(_) | Self::Ebs(_) => Err(NoRepository(self.clone())),
        }
    }

    /// The profile of the AWS configuration that it names.
    pub fn profile(&self) -> Option<&str> {
        match self {
            Self::Ebs(url) => url.profile.as_deref(),
            Self::Bucket(url) => url.profile.as_deref(),
            Self::Directory(_) | Self::Synth(_) => None,
        }
    }

    /// Whether it is a repository, wherever that is.
    pub fn is_repository(&self) -> bool {
        matches!(self, Self::Directory(_) | Self::Bucket(_))
    }

    /// Whether the store can be written at all.
    pub fn is_writable(&self) -> bool {
        match self {
            Self::Directory(_) | Self::Bucket(_) | Self::Ebs(_) => true,
            Self::Synth(_) => false,
        }
    }

    /// Whether this process may write it where it is now, as far as that shows without a write: a repository may be
    /// another user's, or on a file system that is read-only. Waits for the disk.
    pub fn is_writable_here(&self) -> bool {
        let Self::Directory(path) = self else { return self.is_writable() };
        let allowed = access(path, AccessFlags::W_OK | AccessFlags::X_OK);
        !matches!(allowed, Err(Errno::EACCES | Errno::EPERM | Errno::EROFS))
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) if path.is_absolute() => write!(f, "file://{}", path.display()),
            Self::Directory(path) => path.display().fmt(f),
            Self::Synth(recipe) => recipe.fmt(f),
            Self::Ebs(url) => url.fmt(f),
            Self::Bucket(url) => url.fmt(f),
        }
    }
}

/// Whether this is the URL of an endpoint, which everybody may see: it stands in the command line, in `/proc/mounts`
/// and in logs.
///
/// # Errors
///
/// What is wrong with it, without a password that is in it.
pub(super) fn check_endpoint(text: &str) -> Result<(), String> {
    let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    let Some(rest) = rest else {
        let shown = if text.contains('@') { "it".to_owned() } else { format!("{text:?}") };
        return Err(format!("{shown} is not an http or https URL"));
    };
    let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
    if host.contains('@') {
        return Err("it has a user or a password, which everybody could see".to_owned());
    }
    Ok(())
}

/// Writes the options of a URL that are given.
pub(super) fn write_query<'a>(
    f: &mut fmt::Formatter<'_>,
    options: impl IntoIterator<Item = (&'a str, Option<&'a str>)>,
) -> fmt::Result {
    let mut before = '?';
    for (name, value) in options {
        let Some(value) = value else { continue };
        write!(f, "{before}{name}=")?;
        before = '&';
        for character in value.chars() {
            // What would be read as something else; a URL is easier to read as it is.
            match character {
                '&' | '%' | '+' | '#' | ' ' => write!(f, "%{:02X}", u32::from(character))?,
                _ => write!(f, "{character}")?,
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories() {
        for (text, path) in [
            ("/srv/snaps", "/srv/snaps"),
            ("./snaps", "./snaps"),
            ("snaps", "snaps"),
            ("file:///srv/snaps", "/srv/snaps"),
            ("file:/srv/snaps", "/srv/snaps"),
            ("./a:b", "./a:b"),
            ("/a:b", "/a:b"),
        ] {
            assert_eq!(text.parse(), Ok(StoreUrl::Directory(path.into())), "{text}");
        }
    }

    #[test]
    fn synthetic_stores() {
        let text = "synth:?size=16TiB&versions=3";
        let url: StoreUrl = text.parse().unwrap();
        assert_eq!(url, StoreUrl::Synth(text.parse().unwrap()));
        assert_eq!(url.to_string().parse(), Ok(url.clone()));
        assert_eq!(url.absolute().unwrap(), url);
        let error = url.directory().unwrap_err().to_string();
        assert!(error.contains(text) && error.contains("/srv/snaps"), "{error}");
        assert!("synth:?size=x".parse::<StoreUrl>().is_err());
        assert_eq!("./synth:".parse(), Ok(StoreUrl::Directory("./synth:".into())));
    }

    #[test]
    fn refuses_other_store_urls_with_an_example() {
        for text in ["", "gs://bucket/prefix", "file:snaps", "file://host/snaps", "http://x"] {
            let error = text.parse::<StoreUrl>().unwrap_err().to_string();
            assert!(error.contains("/srv/snaps"), "{error}");
        }
    }
}
