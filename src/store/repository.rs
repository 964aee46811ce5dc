//! Our own store format, over named objects: those of a directory, or of a bucket.
//!
//! Every object is created once and never changed, and the manifest comes last: a crash leaves
//! garbage, never half a snapshot. `docs/repository-format.md` describes the format byte by byte.
//!
//! Any number of processes may use one repository at once. What makes that safe:
//!
//! * names are created exclusively, and that decides every race: who starts a snapshot, who
//!   completes it, which set of tags is the next;
//! * ids of pages and packs name their writer, so nobody relies on an object that somebody else
//!   may give up;
//! * [`gc`](Repository::gc) deletes only what it found unreachable in two runs, at least a grace
//!   period apart, and whoever takes that long to complete a snapshot checks for it.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use self::bucket::Bucket;
pub use self::bucket::{BucketUrl, InvalidBucketUrl};
pub(crate) use self::bucket::{Foreign, Trial};
use self::describe::RecentManifests;
use self::directory::Directory;
use self::listed::Listed;
use self::objects::Objects;
use self::pack::PACK_BLOCKS;
use self::read::PageCache;
use self::writer::Writer;
use super::{
    BlockPage, BlockToken, ChangedPage, CompleteRequest, Error, ErrorKind, ListFrom, ListToken,
    Packing, Result, SnapshotPage, SnapshotStore, StartRequest, StoreOptions, Tell, Usage,
};
use crate::model::{BLOCK_SIZE_U64, Block, BlockIndex, Snapshot, SnapshotId, Tags};

mod again;
mod bucket;
mod complete;
mod describe;
mod directory;
mod document;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod gc;
mod listed;
mod manifest;
mod names;
mod objects;
mod pack;
mod page_list;
mod read;
mod start;
mod table;
mod tags;
#[cfg(test)]
mod tests;
mod timeout;
mod verify;
mod writer;

pub use gc::{DEFAULT_GRACE, GcReport, MIN_GRACE};
pub use read::Stored;
pub use verify::{Checked, Damage, Progress, VerifyReport};

/// The format that this version writes, and the newest that it reads.
const FORMAT: u32 = 1;

/// `fspfs.json`, which makes a directory a repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Info {
    format: u32,
    requires: Vec<String>,
    block_size: u64,
    id: Uuid,
}

/// A repository: a store of objects, wherever these are kept.
pub struct Repository {
    id: Uuid,
    objects: Arc<dyn Objects>,
    pages: PageCache,
    manifests: RecentManifests,
    listed: Listed,
    writers: Mutex<HashMap<SnapshotId, Arc<Writer>>>,
    /// Held by whoever looks for what a new writer has to know.
    opening_writer: tokio::sync::Mutex<()>,
    /// Blocks in the packs that are written, at most.
    pack_blocks: usize,
    /// How hard zstd compresses them.
    level: i32,
}

impl fmt::Debug for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Repository").field("name", &self.objects.name()).finish_non_exhaustive()
    }
}

impl Repository {
    /// Creates an empty repository in `directory`, which is made if it does not exist.
    ///
    /// # Errors
    ///
    /// If it is a repository already, or holds anything else.
    pub async fn create(directory: &Path) -> Result<Self> {
        Self::make(Arc::new(Directory::make(directory)?)).await
    }

    /// Opens the repository in `directory`.
    ///
    /// # Errors
    ///
    /// If there is none, or one that this version cannot read.
    pub async fn open(directory: &Path) -> Result<Self> {
        Self::over(Arc::new(Directory::open(directory)?)).await
    }

    /// Creates an empty repository below the prefix of a bucket.
    ///
    /// # Errors
    ///
    /// If it is a repository already, or anything else is there; those of the service.
    pub async fn create_in_bucket(url: &BucketUrl, options: &StoreOptions) -> Result<Self> {
        let bucket = Bucket::new(url, options).await?;
        Self::check_free_of(&bucket).await?;
        Self::make(Arc::new(bucket)).await
    }

    /// Checks that a repository can be made below the prefix of a bucket.
    ///
    /// # Errors
    ///
    /// If it is a repository already, or anything else is there; those of the service.
    pub(crate) async fn check_free(url: &BucketUrl, options: &StoreOptions) -> Result<()> {
        Self::check_free_of(&Bucket::new(url, options).await?).await
    }

    async fn check_free_of(bucket: &Bucket) -> Result<()> {
        if bucket.is_free().await? {
            return Ok(());
        }
        if bucket.exists(names::INFO).await? {
            return Err(already_a_repository(&bucket.name()));
        }
        let message = format!("{} holds something else: give a prefix of its own", bucket.name());
        Err(Error::new(ErrorKind::Conflict, message))
    }

    /// Opens the repository below the prefix of a bucket.
    ///
    /// # Errors
    ///
    /// If there is none, or one that this version cannot read; those of the service.
    pub async fn open_in_bucket(url: &BucketUrl, options: &StoreOptions) -> Result<Self> {
        Self::over(Arc::new(Bucket::new(url, options).await?)).await
    }

    /// The repository below the prefix of a bucket, which is made if there is none, behind a configuration of the AWS
    /// SDK, for programs that have one themselves.
    ///
    /// # Errors
    ///
    /// If it is one that this version cannot read; those of the service.
    pub async fn in_bucket(
        shared: &aws_config::SdkConfig,
        url: &BucketUrl,
        options: &StoreOptions,
    ) -> Result<Self> {
        let bucket = Arc::new(Bucket::with_config(shared, url, options));
        match Self::over(bucket.clone()).await {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            opened => return opened,
        }
        match Self::make(bucket.clone()).await {
            // Somebody else has made it meanwhile.
            Err(error) if error.kind() == ErrorKind::Conflict => Self::over(bucket).await,
            made => made,
        }
    }

    /// Makes a repository of objects, of which there are none yet.
    ///
    /// # Errors
    ///
    /// `Conflict` if it is a repository already.
    async fn make(objects: Arc<dyn Objects>) -> Result<Self> {
        let info = Info {
            format: FORMAT,
            requires: vec![],
            block_size: BLOCK_SIZE_U64,
            id: Uuid::new_v4(),
        };
        let mut text = serde_json::to_vec(&info).expect("plain data");
        text.push(b'\n');
        if !objects.create_own(names::INFO, text.into()).await? {
            return Err(already_a_repository(&objects.name()));
        }
        Ok(Self::with_objects(info.id, objects))
    }

    /// The repository that these objects are, wherever they are kept.
    ///
    /// # Errors
    ///
    /// If they are none, or one that this version cannot read.
    async fn over(objects: Arc<dyn Objects>) -> Result<Self> {
        let name = objects.name();
        let text = match objects.read(names::INFO).await {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(objects.no_repository().await);
            }
            Err(error) => return Err(error.context(format!("cannot open the store {name}"))),
        };
        let info = read_info(&name, &text)?;
        Ok(Self::with_objects(info.id, objects))
    }

    fn with_objects(id: Uuid, objects: Arc<dyn Objects>) -> Self {
        Self {
            id,
            objects,
            pages: PageCache::default(),
            manifests: RecentManifests::default(),
            listed: Listed::default(),
            writers: Mutex::default(),
            opening_writer: tokio::sync::Mutex::default(),
            pack_blocks: PACK_BLOCKS,
            level: pack::LEVEL,
        }
    }

    /// The same, with packs so small that what a writer has not saved takes at most about `bytes`.
    #[must_use]
    pub fn with_max_unsaved(self, bytes: usize) -> Self {
        Self { pack_blocks: writer::pack_blocks(bytes), ..self }
    }

    /// The same, as far as these options say something of it.
    pub(in crate::store) fn with_options(self, options: &StoreOptions) -> Self {
        let Packing { level, blocks } = options.packing;
        let packed = match options.max_unsaved {
            Some(bytes) => self.with_max_unsaved(bytes),
            None => self,
        };
        Self {
            pack_blocks: packed.pack_blocks.min(blocks.map_or(PACK_BLOCKS, usize::from).max(1)),
            level: level.map_or(packed.level, i32::from),
            ..packed
        }
    }

    /// The id that the repository was created with.
    pub fn id(&self) -> Uuid {
        self.id
    }
}

impl Repository {
    async fn put(
        &self,
        id: &SnapshotId,
        index: BlockIndex,
        block: Block,
        durably: bool,
    ) -> Result<()> {
        let failed = |e: Error| e.context(format_args!("cannot put block {index} of {id}"));
        let writer = self.writer(id).await.map_err(failed)?;
        if writer.is_late()
            && let Some(start) = self.start_of(id).await.map_err(failed)?
        {
            self.check_in_time(&start).await.map_err(failed)?;
        }
        let put = if durably {
            writer.put_durably(index, block).await
        } else {
            writer.put(index, block).await
        };
        if put.as_ref().is_err_and(|e| e.kind() == ErrorKind::Conflict) {
            self.forget_ended_writer(id, writer.attempt()).await;
        }
        put.map_err(failed)
    }
}

fn read_info(store: &str, text: &[u8]) -> Result<Info> {
    if text.trim_ascii_start().starts_with(b"<") {
        let message = format!(
            "cannot open the store {store}: a page of HTML or XML came in the place of fspfs.json; does something else \
             answer in the place of the service?"
        );
        return Err(Error::new(ErrorKind::Unavailable, message));
    }
    // What a later format adds must not keep us from telling that it is later.
    let value: serde_json::Value = serde_json::from_slice(text).map_err(|e| {
        Error::with_source(ErrorKind::Corrupt, format!("fspfs.json of {store} is damaged"), e)
    })?;
    let newer = |what: String| {
        Error::new(
            ErrorKind::Unsupported,
            format!("the store {store} {what}: use a newer version of fspfs"),
        )
    };
    match value.get("format").and_then(serde_json::Value::as_u64) {
        Some(format) if format == u64::from(FORMAT) => {}
        Some(format) if format > u64::from(FORMAT) => {
            return Err(newer(format!(
                "has the format {format}, and this version reads up to {FORMAT}"
            )));
        }
        _ => {
            let message = format!("fspfs.json of {store} is damaged: it names no known format");
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
    }
    let info: Info = serde_json::from_value(value).map_err(|e| {
        Error::with_source(ErrorKind::Corrupt, format!("fspfs.json of {store} is damaged"), e)
    })?;
    if let Some(unknown) = info.requires.first() {
        return Err(newer(format!("requires {unknown:?}, which this version does not know")));
    }
    if info.block_size != BLOCK_SIZE_U64 {
        let size = info.block_size;
        let message = format!("fspfs.json of {store} is damaged: it says a block has {size} bytes");
        return Err(Error::new(ErrorKind::Corrupt, message));
    }
    Ok(info)
}

fn already_a_repository(name: &str) -> Error {
    Error::new(ErrorKind::Conflict, format!("{name} is a repository already"))
}

#[async_trait]
impl SnapshotStore for Repository {
    async fn describe(&self, id: &SnapshotId) -> Result<Snapshot> {
        self.describe_snapshot(id).await
    }

    async fn list(&self, token: Option<ListToken>) -> Result<SnapshotPage> {
        self.list_snapshots(token).await
    }

    async fn list_blocks(&self, id: &SnapshotId, from: ListFrom, max: usize) -> Result<BlockPage> {
        self.list_page(id, &from, max).await
    }

    async fn list_changed_blocks(
        &self,
        first: &SnapshotId,
        second: &SnapshotId,
        from: ListFrom,
        max: usize,
    ) -> Result<ChangedPage> {
        self.list_changed_page(first, second, &from, max).await
    }

    async fn get_block(
        &self,
        id: &SnapshotId,
        index: BlockIndex,
        token: &BlockToken,
    ) -> Result<Block> {
        self.read_block(id, index, token).await
    }

    async fn start(&self, request: StartRequest) -> Result<Snapshot> {
        self.start_snapshot(request).await
    }

    async fn put_block(&self, id: &SnapshotId, index: BlockIndex, block: Block) -> Result<()> {
        self.put(id, index, block, false).await
    }

    async fn put_block_durably(
        &self,
        id: &SnapshotId,
        index: BlockIndex,
        block: Block,
    ) -> Result<()> {
        self.put(id, index, block, true).await
    }

    async fn put_before(&self, id: &SnapshotId, tell: Tell<'_>) -> Result<()> {
        self.tell_last_writer(id, tell).await
    }

    async fn flush(&self, id: &SnapshotId) -> Result<()> {
        match self.existing_writer(id) {
            Some(writer) => {
                let failed = |e: Error| e.context(format_args!("cannot flush {id}"));
                writer.flush().await.map_err(failed)
            }
            None => Ok(()),
        }
    }

    async fn complete(&self, id: &SnapshotId, request: CompleteRequest) -> Result<Snapshot> {
        self.complete_snapshot(id, request)
            .await
            .map_err(|e| e.context(format_args!("cannot complete {id}")))
    }

    async fn delete(&self, id: &SnapshotId) -> Result<()> {
        self.delete_snapshot(id).await.map_err(|e| e.context(format_args!("cannot delete {id}")))
    }

    async fn set_tags(&self, id: &SnapshotId, tags: Tags) -> Result<()> {
        self.replace_tags(id, tags).await
    }

    fn parallelism(&self) -> usize {
        self.objects.parallelism()
    }

    fn neighbours(&self) -> usize {
        self.objects.neighbours()
    }

    fn place(&self) -> String {
        format!("repository {}", self.id)
    }

    fn usage(&self) -> Option<Usage> {
        self.objects.usage()
    }
}

/// The clock for "how long ago did this process do that", which goes on while the machine sleeps.
fn since_boot() -> Duration {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .expect("every Linux since 2.6.39 has this clock");
    time.into()
}
