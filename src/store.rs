//! Where snapshots live: the trait that every store implements, and its contract.
//!
//! # The contract
//!
//! * **Identity.** A completed snapshot never changes but for its tags. Its blocks are those of its
//!   parent, overlaid with those that were put.
//! * **Atomicity.** A snapshot is `pending` from [`start`](SnapshotStore::start) until
//!   [`complete`](SnapshotStore::complete) returns, and readable only once it is `completed`; no
//!   reader ever sees a part of one. A crash leaves it pending, or completed whole.
//! * **Durability.** What `complete`, `set_tags` and `delete` acknowledged survives a power cut. A
//!   block that was put does so from [`flush`](SnapshotStore::flush) or `complete` on.
//! * **Ordering.** Puts of different blocks may run at the same time, in any order. Of two puts of
//!   the same block by one process the one that began later wins, if the earlier has returned.
//! * **Verification.** A [`Block`] is data whose SHA-256 was checked against what was put. A store
//!   that cannot vouch for a block answers [`ErrorKind::Corrupt`], never other bytes.
//! * **Cancellation.** Dropping a future leaves the store usable; whether the call took effect is
//!   then unknown, as after a lost connection.
//! * **Reading only.** A store that cannot be written answers [`ErrorKind::Unsupported`] to every
//!   call that would change it.
//!
//! `tests/conformance.rs` is this contract as tests; it runs against every store and every wrapper.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;

use crate::model::{Block, BlockIndex, Digest, Snapshot, SnapshotId, Tags, VolumeSize};

pub(crate) mod aws;
pub(crate) mod document;
pub mod ebs;
mod error;
mod fsp;
mod in_use;
pub(crate) mod limiter;
pub(crate) mod listing;
mod options;
pub(crate) mod page;
mod pattern;
mod priority;
pub mod repository;
pub(crate) mod request;
mod stores;
pub mod synth;
mod url;
pub mod wrap;

pub(crate) use error::causes;
pub use error::{Error, ErrorKind, Result};
pub(crate) use fsp::SALVAGED_TAG;
pub use options::{Filter, InvalidFilter, Packing, StoreOptions};
pub(crate) use pattern::matches_pattern;
pub use priority::Priority;
pub use stores::Stores;
pub use url::{InvalidStoreUrl, NoRepository, StoreUrl};

/// A store, shared by everything that uses it.
pub type SharedStore = Arc<dyn SnapshotStore>;

/// Opens the store that `url` names, for one who shares it with nobody.
///
/// # Errors
///
/// As [`Stores::open`].
pub async fn open(url: &StoreUrl, options: &StoreOptions) -> Result<SharedStore> {
    Stores::default().open(url, options).await
}

/// Blocks that one page of a listing has at most, as in the EBS direct APIs.
pub const MAX_PAGE_BLOCKS: usize = 10_000;

/// Blocks that are read or put at the same time for each core, where a disk is waited for.
const BLOCKS_PER_CORE: usize = 3;

/// Requests that are worth having under way where a disk is waited for.
fn disk_parallelism() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from) * BLOCKS_PER_CORE
}

/// A place where snapshots live. See the [module](self) for the contract.
#[async_trait]
pub trait SnapshotStore: Debug + Send + Sync + 'static {
    /// Describes one snapshot, in whatever state it is, also one that [`list`](Self::list) leaves
    /// out because somebody else owns it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Corrupt`] if what the store knows of it is damaged.
    async fn describe(&self, id: &SnapshotId) -> Result<Snapshot>;

    /// Lists snapshots in all states, a page at a time, in no particular order: `None` starts, and
    /// the token of a page leads to the next one. A page may be empty; only the absence of a token
    /// ends the list. A snapshot that is damaged is listed in the state `error`, with the reason.
    async fn list(&self, token: Option<ListToken>) -> Result<SnapshotPage>;

    /// Lists blocks of a completed snapshot in ascending order: those that were ever written, with
    /// data or zeros, here or in an ancestor. Holes are not listed.
    ///
    /// A page holds at most `max` blocks (1 to [`MAX_PAGE_BLOCKS`]), and may hold fewer, or none.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotReady`] if the snapshot is not completed; [`ErrorKind::ExpiredToken`] for a
    /// page token that no longer works: start again from an index.
    async fn list_blocks(&self, id: &SnapshotId, from: ListFrom, max: usize) -> Result<BlockPage>;

    /// Lists the blocks in which `second` differs from `first`, as [`list_blocks`](Self::list_blocks).
    ///
    /// A hole and a zero block are equal, since they read the same.
    ///
    /// # Errors
    ///
    /// As `list_blocks`. [`ErrorKind::Invalid`] if the store can compare only snapshots of one
    /// lineage and these are of two; a repository compares any two.
    async fn list_changed_blocks(
        &self,
        first: &SnapshotId,
        second: &SnapshotId,
        from: ListFrom,
        max: usize,
    ) -> Result<ChangedPage>;

    /// Reads one block with the token that a listing gave for it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ExpiredToken`] if the token does not work, no longer, or not for this block:
    /// list the block again. A store may do that itself. [`ErrorKind::Corrupt`] if the data is not what was put.
    async fn get_block(
        &self,
        id: &SnapshotId,
        index: BlockIndex,
        token: &BlockToken,
    ) -> Result<Block>;

    /// Starts a snapshot. Its blocks are those of the parent until others are put.
    ///
    /// Starting twice with one client token gives the same snapshot, if all else is equal.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] or [`ErrorKind::NotReady`] for the parent; [`ErrorKind::Conflict`]
    /// if the chosen id exists, or the client token was used with other parameters;
    /// [`ErrorKind::Unsupported`] if the store cannot do what is asked (a chosen id, encryption).
    async fn start(&self, request: StartRequest) -> Result<Snapshot>;

    /// Puts one block of a pending snapshot, over one that was put before or that the parent has.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if the volume has no such block; [`ErrorKind::Conflict`] if the
    /// snapshot is not pending any more.
    async fn put_block(&self, id: &SnapshotId, index: BlockIndex, block: Block) -> Result<()>;

    /// Puts one block so that it is durable when this returns, visible to a completion by another
    /// process, and over whatever any process had put of it when this was called.
    ///
    /// # Errors
    ///
    /// As [`put_block`](Self::put_block).
    async fn put_block_durably(
        &self,
        id: &SnapshotId,
        index: BlockIndex,
        block: Block,
    ) -> Result<()> {
        self.put_block(id, index, block).await?;
        self.flush(id).await
    }

    /// Tells what the last one who put to a pending snapshot has got durably: blocks, and the SHA-256 of each. Who
    /// goes on with it need not bring that again. A store that cannot tell says nothing.
    ///
    /// # Errors
    ///
    /// Those of reading it; what was told before holds.
    async fn put_before(&self, id: &SnapshotId, tell: Tell<'_>) -> Result<()> {
        let _ = (id, tell);
        Ok(())
    }

    /// Makes every block that this process put durable, and visible to a completion by another.
    async fn flush(&self, id: &SnapshotId) -> Result<()>;

    /// Completes a pending snapshot. A store may go on for a while after this returns: then
    /// [`describe`](Self::describe) says `pending` until it is done.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Conflict`] if the store has other blocks than the request says: the snapshot
    /// stays pending, and can be aborted with [`delete`](Self::delete).
    async fn complete(&self, id: &SnapshotId, request: CompleteRequest) -> Result<Snapshot>;

    /// Deletes a completed snapshot, or aborts a pending one. Others are not affected, whatever
    /// they share with it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if there is none.
    async fn delete(&self, id: &SnapshotId) -> Result<()>;

    /// Replaces the whole set of tags of a snapshot in any state.
    async fn set_tags(&self, id: &SnapshotId, tags: Tags) -> Result<()>;

    /// Blocks that are worth reading or putting at the same time: a few for each core, where a disk
    /// is what one waits for; many more, where a network is.
    fn parallelism(&self) -> usize {
        disk_parallelism()
    }

    /// Blocks in a row that are worth asking for at the same time, since one request may bring them.
    fn neighbours(&self) -> usize {
        1
    }

    /// How long after its start a snapshot may not be known to all of the store: calls about it wait
    /// for that by themselves.
    fn settling(&self) -> Duration {
        Duration::ZERO
    }

    /// Whether a block that was put may be lost until [`flush`](Self::flush) returns.
    fn needs_flush(&self) -> bool {
        true
    }

    /// What tells it from others that the same URL leads to, at another time or for another user; nothing, if
    /// it is always the same one. That of a repository tells it from all others, whatever path leads to it.
    fn place(&self) -> String {
        String::new()
    }

    /// What was asked of a service that counts requests, and is paid for them; `None` for others.
    fn usage(&self) -> Option<Usage> {
        None
    }
}

/// Learns which blocks a pending snapshot has, with their SHA-256.
pub type Tell<'a> = &'a (dyn Fn(&[(BlockIndex, Digest)]) + Send + Sync);

/// Requests to a service, and what they cost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Requests that were sent, by the name of the operation.
    pub requests: Vec<(&'static str, u64)>,
    /// How many of them were sent again, after a failure.
    pub again: u64,
    /// Their price in billionths of a dollar, in the example region of the price list.
    pub nanodollars: u64,
    /// Blocks that may be under way at the same time, at present.
    pub in_flight_limit: u64,
}

impl Usage {
    /// Requests that were sent, of all kinds.
    pub fn sent(&self) -> u64 {
        self.requests.iter().map(|(_, sent)| sent).sum()
    }

    /// The price in dollars.
    #[expect(clippy::cast_precision_loss, reason = "it is a price")]
    pub fn dollars(&self) -> f64 {
        self.nanodollars as f64 / 1e9
    }
}

/// Leads to the next page of a list of snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListToken(pub String);

/// A page of snapshots.
#[derive(Clone, Debug, Default)]
pub struct SnapshotPage {
    /// The snapshots of this page.
    pub snapshots: Vec<Snapshot>,
    /// Leads to the next page; `None` on the last.
    pub next: Option<ListToken>,
}

/// Leads to the next page of a list of blocks. Opaque, and valid for a limited time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageToken(pub String);

/// Where a page of blocks begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListFrom {
    /// At this block, or the first one behind it.
    Index(BlockIndex),
    /// Where the page with this token ended.
    Page(PageToken),
}

/// What a store needs to find one block. Opaque, and valid for a limited time, for one block of one
/// snapshot. It says nothing about the content: equal blocks have different ones.
#[derive(Clone, PartialEq, Eq)]
pub struct BlockToken(pub Bytes);

impl std::fmt::Debug for BlockToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockToken({} bytes)", self.0.len())
    }
}

/// One block in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedBlock {
    /// Its position.
    pub index: BlockIndex,
    /// What to read it with.
    pub token: BlockToken,
    /// Its digest, where the store knows it before reading; [`Digest::OF_ZEROS`] for a zero block.
    pub digest: Option<Digest>,
}

/// A page of blocks.
#[derive(Clone, Debug)]
pub struct BlockPage {
    /// Ascending, each block once.
    pub blocks: Vec<ListedBlock>,
    /// Every block below this one is listed by now, since the index where the list began: what is
    /// missing there is a hole. `None` if this page adds nothing to what is known.
    pub covered: Option<BlockIndex>,
    /// Leads to the next page; `None` on the last.
    pub next: Option<PageToken>,
    /// When the snapshot was started that is listed, where the store tells: another one may have got its id meanwhile.
    pub started: Option<Timestamp>,
}

/// A block in which two snapshots differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangedBlock {
    /// Its position.
    pub index: BlockIndex,
    /// The block in the first snapshot; `None` if it is a hole there.
    pub first: Option<ListedBlock>,
    /// The block in the second snapshot; `None` if it is a hole there.
    pub second: Option<ListedBlock>,
}

/// A page of differences.
#[derive(Clone, Debug)]
pub struct ChangedPage {
    /// Ascending, each block once.
    pub blocks: Vec<ChangedBlock>,
    /// Leads to the next page; `None` on the last.
    pub next: Option<PageToken>,
    /// As in a [`BlockPage`], of the first and of the second.
    pub started: Option<(Timestamp, Timestamp)>,
}

/// What a snapshot is started with.
#[derive(Clone, Debug)]
pub struct StartRequest {
    /// Size of its volume.
    pub volume_size: VolumeSize,
    /// The snapshot whose blocks it begins with.
    pub parent: Option<SnapshotId>,
    /// Its tags.
    pub tags: Tags,
    /// Text for people, at most 255 characters.
    pub description: String,
    /// Names this attempt, at most 64 ASCII characters: starting again with it is harmless.
    pub client_token: Option<String>,
    /// Whether to encrypt it; a child is encrypted as its parent is.
    pub encrypted: bool,
    /// The key to encrypt it with.
    pub kms_key: Option<String>,
    /// How long it stays pending without a put or a completion: then its state is `error`, and it
    /// takes neither. `None` leaves that to the store; a repository waits for ever.
    pub timeout: Option<Duration>,
    /// The id it must have, so that an archive keeps the name of its source.
    pub id: Option<SnapshotId>,
    /// The volume that it is an image of.
    pub volume_id: Option<String>,
    /// Where its content comes from, for people: a store and a snapshot, or a path.
    pub origin: Option<String>,
}

impl StartRequest {
    /// A plain snapshot of a volume of this size, without a parent.
    pub fn new(volume_size: VolumeSize) -> Self {
        Self {
            volume_size,
            parent: None,
            tags: Tags::new(),
            description: String::new(),
            client_token: None,
            encrypted: false,
            kms_key: None,
            timeout: None,
            id: None,
            volume_id: None,
            origin: None,
        }
    }
}

/// What the caller of a completion believes it has put; the store checks it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompleteRequest {
    /// Number of distinct blocks that were put, by all processes.
    pub changed_blocks: u64,
    /// SHA-256 over their digests in ascending order of the blocks (the service's LINEAR method).
    pub checksum: Option<Digest>,
    /// When the snapshot was started that they were put to: a repository may have started another one under its id
    /// since. `None` if that is not known; EBS uses no id twice.
    pub started: Option<Timestamp>,
}
