//! What a repository needs of the place that it is kept in.

use std::fmt::Debug;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;

use crate::model::Block;
use crate::store::Result;

/// Makes a block of its bytes in an object.
pub(super) type Decode = Box<dyn FnOnce(&[u8]) -> Result<Block> + Send>;

/// A flat space of named, immutable objects: a directory, or a bucket.
///
/// Names are relative, with `/` between their parts, and hold no other special characters.
#[async_trait]
pub(super) trait Objects: Debug + Send + Sync + 'static {
    /// Creates an object that must not exist yet. When this returns it is there whole and survives
    /// a power cut; until then, and after a failure, it is there whole or not at all.
    ///
    /// Answers whether it was created: of several who create one name exactly one did.
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
}
