//! Store URLs: which store the user means.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Where snapshots live, as the user says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreUrl {
    /// A repository in a directory: `file:///srv/snaps`, `/srv/snaps` or `./snaps`.
    Directory(PathBuf),
}

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
        let Self::Directory(path) = self;
        // A repository may not exist yet (`init`): then its path is made absolute as it is.
        path.canonicalize().or_else(|_| std::path::absolute(path)).map(Self::Directory)
    }

    /// The directory of the repository.
    pub fn directory(&self) -> &Path {
        let Self::Directory(path) = self;
        path
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Directory(path) = self;
        if path.is_absolute() {
            write!(f, "file://{}", path.display())
        } else {
            path.display().fmt(f)
        }
    }
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
    fn what_is_no_store_says_what_would_be() {
        for text in
            ["", "ebs:", "s3://bucket/prefix", "file:snaps", "file://host/snaps", "http://x"]
        {
            let error = text.parse::<StoreUrl>().unwrap_err().to_string();
            assert!(error.contains("/srv/snaps"), "{error}");
        }
    }
}
