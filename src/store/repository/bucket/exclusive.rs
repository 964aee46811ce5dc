//! Whether a service creates a name for one alone: some answer as if they did, and overwrite.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use aws_sdk_s3::error::ProvideErrorMetadata as _;
use bytes::Bytes;
use uuid::Uuid;

use super::{Bucket, PROBES, kinds};
use crate::blocking::blocking;
use crate::model::Digest;
use crate::own;
use crate::store::repository::objects::Objects as _;
use crate::store::{Error, ErrorKind, Result};

/// What came of creating a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attempt {
    Created,
    Taken,
    /// The service takes no such condition.
    Refused,
}

/// How long what was learnt of a service is taken for true.
const KNOWN_FOR: Duration = Duration::from_hours(24);

/// Whether this file says so, and is not old.
fn is_known(path: &Path) -> bool {
    let age = || path.metadata()?.modified()?.elapsed().map_err(std::io::Error::other);
    own::read(path).is_ok() && age().is_ok_and(|age| age < KNOWN_FOR)
}

impl Bucket {
    /// Whether the service keeps to the condition. It is tried once a day, and remembered if it does: at an endpoint
    /// may be another service tomorrow.
    ///
    /// # Errors
    ///
    /// If it cannot be tried.
    pub(super) async fn is_exclusive(&self) -> Result<bool> {
        let is_exclusive = self.exclusive.get_or_try_init(|| async {
            let known = self.known();
            let at = known.clone();
            if let Some(path) = at
                && blocking(move || is_known(&path)).await
            {
                return Ok(true);
            }
            let is_exclusive = self.probe().await?;
            if is_exclusive && let Some(path) = known {
                let place = format!("{}\n", self.place());
                let kept = blocking(move || {
                    own::make(path.parent().expect("it is in a directory"))?;
                    let mut options = File::options();
                    options.write(true).create(true).truncate(false).mode(0o600);
                    own::open(&path, &mut options)?.write_all(place.as_bytes())
                });
                if let Err(error) = kept.await {
                    tracing::debug!("it is tried again by the next process: {error}");
                }
            }
            Ok(is_exclusive)
        });
        is_exclusive.await.copied()
    }

    /// The endpoint and the bucket.
    fn place(&self) -> String {
        format!("{} {}", self.service.account.endpoint().unwrap_or("S3"), self.url.bucket)
    }

    /// The file that says so.
    fn known(&self) -> Option<PathBuf> {
        let digest = Digest::of(self.place().as_bytes()).to_hex();
        self.state.as_ref().map(|state| state.join("buckets").join(&digest[..16]))
    }

    /// Creates a name twice.
    async fn probe(&self) -> Result<bool> {
        let name = format!("{PROBES}{}", Uuid::new_v4().simple());
        let (first, second) = (Bytes::from_static(b"first\n"), Bytes::from_static(b"second\n"));
        let tried = async {
            // One whose answer was lost is sent again, and finds itself.
            Ok(self.attempt(&name, &first).await? != Attempt::Refused
                && self.attempt(&name, &second).await? == Attempt::Taken
                && self.read(&name).await? == first)
        };
        let tried = tried.await;
        // What was not to be made is not there.
        if tried.as_ref().is_err_and(|error: &Error| error.kind() == ErrorKind::Denied) {
            return tried;
        }
        if let Err(error) = self.delete_one(&name).await {
            tracing::warn!("{name} stays in {}: {error}", self.url);
        }
        tried
    }

    pub(super) async fn attempt(&self, name: &str, data: &Bytes) -> Result<Attempt> {
        self.call(&kinds::PUT, "write to the bucket", |client| {
            let put = self.put(&client, name, data).if_none_match("*");
            async move {
                let Err(error) = put.send().await else { return Ok(Attempt::Created) };
                match error.raw_response().map(|raw| raw.status().as_u16()) {
                    Some(412) => Ok(Attempt::Taken),
                    Some(501) => Ok(Attempt::Refused),
                    _ if error.code() == Some("NotImplemented") => Ok(Attempt::Refused),
                    _ => Err(self.failed(&client, &error)),
                }
            }
        })
        .await
        .map_err(|error| match error.kind() {
            ErrorKind::Denied => error.context("it cannot be tried whether a name is created once"),
            _ => error,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_on_a_service_lasts_for_a_day() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("known");
        assert!(!is_known(&path));
        let mut options = File::options();
        let file = own::open(&path, options.write(true).create(true).mode(0o600)).unwrap();
        assert!(is_known(&path));
        for hours in [25, 24 * 365] {
            let then = std::time::SystemTime::now() - Duration::from_hours(hours);
            file.set_modified(then).unwrap();
            assert!(!is_known(&path), "{hours}");
        }
        // A clock that was set back.
        file.set_modified(std::time::SystemTime::now() + Duration::from_hours(1)).unwrap();
        assert!(!is_known(&path));
    }
}
