//! The keys that requests are signed with.

use std::collections::HashMap;
use std::fmt;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use configparser::ini::Ini;
use uuid::Uuid;

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeysError {
    /// The file cannot be read or made.
    #[error("cannot use the keys in {}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: std::io::Error,
    },
    /// Others can read the file.
    #[error("{} can be read by others: `chmod 600` it", path.display())]
    Open {
        /// The file.
        path: PathBuf,
    },
    /// The file holds no keys.
    #[error(
        "{} holds no keys: write aws_access_key_id and aws_secret_access_key below [default], as in ~/.aws/credentials",
        path.display()
    )]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// A key, and what its owner knows.
#[derive(Clone, PartialEq, Eq)]
pub struct Pair {
    /// The access key id, which is no secret.
    pub id: String,
    /// The secret access key.
    pub secret: String,
    /// The session token, for a temporary key.
    pub session: Option<String>,
}

impl Pair {
    /// One of the form that AWS gives out.
    fn random() -> Self {
        let (one, two) = (Uuid::new_v4(), Uuid::new_v4());
        let mut secret = [0; 30];
        secret[..15].copy_from_slice(&one.as_bytes()[..15]);
        secret[15..].copy_from_slice(&two.as_bytes()[..15]);
        let id = Uuid::new_v4().simple().to_string().to_uppercase();
        Self {
            id: format!("AKIA{}", &id[..16]),
            secret: base64::engine::general_purpose::STANDARD.encode(secret),
            session: None,
        }
    }
}

impl fmt::Debug for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pair").field("id", &self.id).finish_non_exhaustive()
    }
}

/// The keys that are accepted, and where they are from.
#[derive(Clone, Debug)]
pub struct Keys {
    pairs: HashMap<String, Pair>,
    /// The first one, for people.
    first: Pair,
    origin: String,
}

impl Keys {
    /// The keys of `file`, if one is given; else the pair in the environment, where that may be
    /// used; else the pair of this user, which is made in `own` if it is not there.
    ///
    /// # Errors
    ///
    /// If a file cannot be read or made, can be read by others, or holds no keys.
    pub fn find(file: Option<&Path>, environment: bool, own: &Path) -> Result<Self, KeysError> {
        if let Some(file) = file {
            return Self::in_file(file);
        }
        if let Some(pair) = environment.then(pair_in_environment).flatten() {
            return Ok(Self::new(vec![pair], "the environment".to_owned()).expect("there is one"));
        }
        let failed = |error| KeysError::Io { path: own.to_owned(), error };
        make_pair(own).map_err(failed)?;
        crate::own::open(own, std::fs::File::options().read(true)).map_err(failed)?;
        Self::in_file(own)
    }

    /// The keys in a file of the form of `~/.aws/credentials`, all of its profiles.
    fn in_file(path: &Path) -> Result<Self, KeysError> {
        let failed = |error| KeysError::Io { path: path.to_owned(), error };
        let mut file = std::fs::File::open(path).map_err(failed)?;
        let found = file.metadata().map_err(failed)?;
        if !is_from_systemd(path) {
            if found.permissions().mode() & 0o077 != 0 {
                return Err(KeysError::Open { path: path.to_owned() });
            }
            if ![0, nix::unistd::geteuid().as_raw()].contains(&found.uid()) {
                let why = format!("it belongs to another user, {}: `chown` it", found.uid());
                return Err(failed(std::io::Error::other(why)));
            }
        }
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(failed)?;
        let pairs = parse(&text).map_err(|why| failed(std::io::Error::other(why)))?;
        let origin = path.display().to_string();
        Self::new(pairs, origin).ok_or_else(|| KeysError::Empty { path: path.to_owned() })
    }

    fn new(pairs: Vec<Pair>, origin: String) -> Option<Self> {
        let first = pairs.first()?.clone();
        let pairs = pairs.into_iter().map(|pair| (pair.id.clone(), pair)).collect();
        Some(Self { pairs, first, origin })
    }

    /// A key that everybody knows.
    #[cfg(any(test, fuzzing))]
    pub(super) fn for_tests() -> Self {
        let pair = Pair { id: "AKIAFUZZ".to_owned(), secret: "secret".to_owned(), session: None };
        Self::new(vec![pair], "the tests".to_owned()).expect("there is one")
    }

    /// A new pair, which is kept nowhere.
    pub fn for_once() -> Self {
        Self::new(vec![Pair::random()], "this process".to_owned()).expect("there is one")
    }

    /// The key with this id.
    pub fn get(&self, id: &str) -> Option<&Pair> {
        self.pairs.get(id)
    }

    /// One of them, for a client.
    pub fn first(&self) -> &Pair {
        &self.first
    }

    /// Where they are from.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// All secrets, always in the same order.
    pub(super) fn secrets(&self) -> Vec<&str> {
        let mut secrets: Vec<_> = self.pairs.values().map(|pair| pair.secret.as_str()).collect();
        secrets.sort_unstable();
        secrets
    }
}

/// Whether systemd has made this file for this process: who may read it is in its ACL, which shows
/// as a permission of its group.
fn is_from_systemd(path: &Path) -> bool {
    std::env::var_os("CREDENTIALS_DIRECTORY")
        .is_some_and(|directory| !directory.is_empty() && path.starts_with(directory))
}

fn pair_in_environment() -> Option<Pair> {
    let value = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    Some(Pair {
        id: value("AWS_ACCESS_KEY_ID")?,
        secret: value("AWS_SECRET_ACCESS_KEY")?,
        session: value("AWS_SESSION_TOKEN"),
    })
}

/// The profiles in the order of the file.
fn parse(text: &str) -> Result<Vec<Pair>, String> {
    let mut ini = Ini::new_cs();
    // A secret may hold any character, also one that begins a comment elsewhere.
    ini.set_inline_comment_symbols(Some(&[]));
    ini.read(text.to_owned())?;
    let pair = |profile: &String| {
        let value = |key| ini.get(profile, key).filter(|value| !value.is_empty());
        Some(Pair {
            id: value("aws_access_key_id")?,
            secret: value("aws_secret_access_key")?,
            session: value("aws_session_token"),
        })
    };
    let mut profiles = ini.sections();
    profiles.sort_by_key(|profile| (profile != "default", profile.clone()));
    Ok(profiles.iter().filter_map(pair).collect())
}

/// Makes a file with a new pair, readable by its owner alone, unless there is one.
fn make_pair(path: &Path) -> std::io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    crate::own::make(directory)?;
    if path.symlink_metadata().is_ok() {
        return Ok(());
    }
    let Pair { id, secret, .. } = Pair::random();
    let text = format!("[default]\naws_access_key_id = {id}\naws_secret_access_key = {secret}\n");
    let mut file = tempfile::Builder::new()
        .permissions(std::fs::Permissions::from_mode(0o600))
        .tempfile_in(directory)?;
    file.write_all(text.as_bytes())?;
    file.as_file().sync_all()?;
    match file.persist_noclobber(path) {
        Ok(_) => Ok(()),
        // Another server was faster, and its pair is as good.
        Err(error) if error.error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error.error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_is_made_once_and_for_its_owner_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b/credentials");
        let made = Keys::find(None, false, &path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(made.first().id.len(), 20);
        assert_eq!(made.first().secret.len(), 40);
        let again = Keys::find(None, false, &path).unwrap();
        assert_eq!(made.first(), again.first());
        assert!(!format!("{made:?}").contains(&made.first().secret));
    }

    #[test]
    fn a_file_holds_several_keys_and_nobody_else_reads_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("credentials");
        let text = "[other]\naws_access_key_id=B\naws_secret_access_key=s#;e=c/r+t\n\n# a comment\n[default]\naws_access_key_id = A\naws_secret_access_key = x\naws_session_token = t\n[empty]\nregion = us-west-2\n";
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let open = Keys::find(Some(&path), true, Path::new("/nonexistent")).unwrap_err();
        assert!(open.to_string().contains("chmod 600"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let keys = Keys::find(Some(&path), true, Path::new("/nonexistent")).unwrap();
        assert_eq!(keys.first().id, "A");
        assert_eq!(keys.first().session.as_deref(), Some("t"));
        assert_eq!(keys.get("B").unwrap().secret, "s#;e=c/r+t");
        assert!(keys.get("C").is_none());
        std::fs::write(&path, "[default]\n").unwrap();
        assert!(matches!(
            Keys::find(Some(&path), true, Path::new("/nonexistent")),
            Err(KeysError::Empty { .. })
        ));
    }
}
