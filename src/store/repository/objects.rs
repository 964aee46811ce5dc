//! What a repository needs of the place that it is kept in.

use std::fmt::Debug;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;

use super::manifest::MAX_MANIFEST_LEN;
use super::names;
use crate::model::Block;
use crate::store::{Error, ErrorKind, Result, Usage, disk_parallelism};

/// Makes a block of its bytes in an object.
pub(super) type Decode = Box<dyn FnOnce(&[u8]) -> Result<Block> + Send>;

/// Bytes of an object that is read whole, at most: pages, records, and lists of records have less than a tenth of it.
const MAX_WHOLE: u64 = 16 << 20;

/// Those of a set of tags: 50 of 127 and 255 characters, with the longest escapes, have 116 KiB.
const MAX_TAGS: u64 = 128 << 10;

/// Those of a start: a manifest's, with the parent's pages.
const MAX_START: u64 = 8 << 10;

/// Those of what a collection found: a million names of at most 110 bytes.
const MAX_FOUND: u64 = 128 << 20;

/// Bytes of an object of this name at most, where it is read whole: one with more is damaged.
pub(super) fn most_bytes(name: &str) -> u64 {
    match name {
        _ if name.starts_with(names::SNAPSHOTS) => MAX_MANIFEST_LEN as u64,
        _ if name.starts_with(names::TAGS) => MAX_TAGS,
        _ if name.starts_with(names::GC) => MAX_FOUND,
        _ if names::start_id(name).is_some() => MAX_START,
        _ => MAX_WHOLE,
    }
}

/// Names of a list at most: with packs of 32 MiB, 300 TiB of them.
pub(super) const MAX_NAMES: usize = 10_000_000;

/// The error of a list with more names.
pub(super) fn too_many(prefix: &str) -> Error {
    let message = format!("cannot list {prefix}: there are more than {MAX_NAMES} names");
    Error::new(ErrorKind::Unavailable, message)
}

/// A flat space of named, immutable objects: a directory, or a bucket.
///
/// Names are relative, with `/` between their parts, and hold no other special characters.
#[async_trait]
pub(super) trait Objects: Debug + Send + Sync + 'static {
    /// What people call this place: a path, or a URL.
    fn name(&self) -> String;

    /// What to tell somebody who looked for a repository here, where `fspfs.json` is not found: what there is
    /// instead, and what to do.
    async fn no_repository(&self) -> Error {
        let message =
            format!("the store {} is not a repository: it has no fspfs.json", self.name());
        Error::new(ErrorKind::NotFound, message)
    }

    /// How many requests are worth having under way: a few for each core, where a disk is waited for; many more,
    /// where a network is.
    fn parallelism(&self) -> usize {
        disk_parallelism()
    }

    /// What was asked of a service that counts requests, and is paid for them; `None` for others.
    fn usage(&self) -> Option<Usage> {
        None
    }

    /// Frames in a row that are worth reading at the same time: one request brings them, where each request costs.
    fn neighbours(&self) -> usize {
        1
    }

    /// How long a manifest that was read is taken to be there still when blocks are listed: no time, unless each
    /// look costs.
    fn manifests_last(&self) -> Duration {
        Duration::ZERO
    }

    /// Creates an object that must not exist yet. When this returns it is there whole and survives
    /// a power cut.
    ///
    /// Answers whether this call has created it: of several who create one name exactly one is told so, and the
    /// others that it was another. No call is told that its own object is another's: a place that sends a request
    /// again after it got no answer, and then finds the name taken, does not know, and fails.
    ///
    /// # Errors
    ///
    /// After a failure the object is there whole, or not at all. `Unavailable` and `Timeout` say that the answer
    /// was lost: it may be there, not yet durably, and where requests go over a network it may still come.
    /// `create_own` and `ensure` find out what became of it.
    async fn create(&self, name: &str, data: Bytes) -> Result<bool>;

    /// Reads an object, whole.
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::store::ErrorKind::NotFound) if there is none.
    async fn read(&self, name: &str) -> Result<Bytes>;

    /// Reads exactly `len` bytes of an object from `offset` on, and decodes them: both on one
    /// thread that may wait and compute, since changing threads costs as much as a small block.
    ///
    /// # Errors
    ///
    /// `NotFound` if there is no such object, `Corrupt` if it ends before; those of `decode`.
    async fn read_range(
        &self,
        name: &str,
        offset: u64,
        len: usize,
        decode: Decode,
    ) -> Result<Block>;

    /// Reads the last `len` bytes of an object, or all of it if it is shorter.
    ///
    /// # Errors
    ///
    /// `NotFound` if there is no such object.
    async fn read_tail(&self, name: &str, len: usize) -> Result<Bytes>;

    /// Whether there is an object of this name.
    async fn exists(&self, name: &str) -> Result<bool>;

    /// The names of all objects whose names begin with `prefix`, which ends in `/`.
    ///
    /// What was created before the call began is in it; what others create meanwhile may be.
    async fn list(&self, prefix: &str) -> Result<Vec<String>>;

    /// As [`list`](Self::list), with what tells one content of a name from another, where a list says that.
    async fn list_versions(&self, prefix: &str) -> Result<Vec<(String, Option<String>)>> {
        Ok(self.list(prefix).await?.into_iter().map(|name| (name, None)).collect())
    }

    /// When an object was made, by the clock of this place.
    ///
    /// # Errors
    ///
    /// `NotFound` if there is no such object.
    async fn modified(&self, name: &str) -> Result<Timestamp>;

    /// Deletes objects, in order; those that are not there are ignored. When this returns they do not
    /// come back, not even after a power cut.
    async fn delete(&self, names: &[String]) -> Result<()>;

    /// Removes what crashed writers left behind and no name refers to, if it is older than
    /// `before`. Answers the number of bytes.
    async fn sweep(&self, before: Timestamp) -> Result<u64>;

    /// The time by the clock of this place, which all who use it share.
    async fn now(&self) -> Result<Timestamp>;

    /// The same without a change to anything; by the clock of this host, where nothing else tells.
    async fn now_by_reading(&self) -> Result<Timestamp> {
        Ok(Timestamp::now())
    }

    /// Keeps all others from it until the answer is dropped.
    ///
    /// # Errors
    ///
    /// `Conflict` if others have it open, `Unsupported` if that cannot be told.
    async fn alone(&self) -> Result<Box<dyn Send + Sync>> {
        let message = format!("it is not known who else has {} open", self.name());
        Err(Error::new(ErrorKind::Unsupported, message))
    }
}

impl dyn Objects + '_ {
    /// Creates an object, and finds out whose it is if the answer is lost. Answers whether it is one's own.
    ///
    /// An object of these very bytes counts as one's own. So what must be told from an equal one of another has
    /// something in it that nobody else writes, as the attempt in a `start.json`.
    ///
    /// # Errors
    ///
    /// Those of [`create`](Objects::create): if they say that the answer was lost, it was lost twice, or what is
    /// there cannot be read.
    pub(super) async fn create_own(&self, name: &str, data: Bytes) -> Result<bool> {
        match self.create_again_if_lost(name, &data).await? {
            (false, Some(lost)) => match self.read(name).await {
                Ok(found) => Ok(found == data),
                Err(_) => Err(lost),
            },
            (created, _) => Ok(created),
        }
    }

    /// Creates an object unless it is there, under a name of which it does not matter who has created it: nobody
    /// else uses it, or all would create the same.
    ///
    /// # Errors
    ///
    /// Those of [`create`](Objects::create): if they say that the answer was lost, it was lost twice.
    pub(super) async fn ensure(&self, name: &str, data: Bytes) -> Result<()> {
        self.create_again_if_lost(name, &data).await.map(drop)
    }

    /// Creates an object, once more if the answer is lost: whatever is there is durable then. With the second
    /// answer comes the loss of the first.
    async fn create_again_if_lost(
        &self,
        name: &str,
        data: &Bytes,
    ) -> Result<(bool, Option<Error>)> {
        match self.create(name, data.clone()).await {
            Ok(created) => Ok((created, None)),
            Err(lost) if matches!(lost.kind(), ErrorKind::Unavailable | ErrorKind::Timeout) => {
                tracing::debug!("{name} is created once more: {lost}");
                match self.create(name, data.clone()).await {
                    Ok(created) => Ok((created, Some(lost))),
                    Err(_) => Err(lost),
                }
            }
            Err(error) => Err(error),
        }
    }
}
