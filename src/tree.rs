//! The tree of the mount: names, inodes, open files. Plain async code, without a type of FUSE in it.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use lru::LruCache;

use self::catalog::{Catalog, IMAGE_SUFFIX};
use self::children::{children, find_child, fixed_directories, link_target};
use self::command::{Control, Conversation};
use self::directories::{Directories, OpenDirectory};
use self::node::{Node, Nodes};
use self::refresh::Listing;
use crate::cache::{Cache, SharedError};
use crate::image::{self, Image, Reader, working};
use crate::jobs::{Job, Jobs};
use crate::model::{BLOCK_SIZE_U64, Snapshot, SnapshotId, SnapshotState};
use crate::ops::context::House;
use crate::store::ebs::EbsUrl;
use crate::store::{Error as StoreError, SharedStore, wrap::Counters};
use crate::store::{StoreOptions, StoreUrl};
use crate::transfer::engine::Memory;

mod caller;
mod catalog;
mod change;
mod children;
mod command;
mod commits;
mod control;
mod directories;
mod escape;
mod job;
mod metrics;
mod new;
mod node;
mod operations;
mod refresh;
#[cfg(test)]
mod tests;
mod xattr;

pub use caller::{cut_short, is_called_away, thread_group};
pub use new::{Allocation, Changes, OpenMode, RenameMode};
pub use node::ROOT;

/// Images that were closed, and are kept with what is known of their blocks.
const CLOSED_IMAGES: std::num::NonZeroUsize = std::num::NonZeroUsize::new(64).expect("not 0");

/// What came of a request.
pub type Result<T> = std::result::Result<T, Error>;

/// What the tree cannot do.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No such file.
    #[error("there is no such file")]
    NotFound,
    /// A file where there must be a directory.
    #[error("it is not a directory")]
    NotADirectory,
    /// A directory where there must be a file.
    #[error("it is a directory")]
    IsADirectory,
    /// Snapshots and their names are not changed by way of the file system.
    #[error("snapshots cannot be changed through the mount")]
    NotPermitted,
    /// Images cannot be opened for writing.
    #[error("it can only be read")]
    Denied,
    /// A seek beyond the end, or to data where there is none.
    #[error("there is nothing beyond")]
    NoSuchOffset,
    /// An extended attribute that the file does not have.
    #[error("it has no such attribute")]
    NoSuchAttribute,
    /// A user has too many directories open.
    #[error("too many directories are open")]
    TooMany,
    /// A handle that is not open, or not of this kind.
    #[error("the handle is not open")]
    BadHandle,
    /// Nothing can be written: the mount is read-only.
    #[error("the mount is read-only")]
    ReadOnly,
    /// There is a file of this name.
    #[error("there is a file of this name")]
    Exists,
    /// A name of more than 255 bytes.
    #[error("the name is too long")]
    NameTooLong,
    /// Files leave `new/` as snapshots, and not by being renamed.
    #[error("a file of new/ can only be renamed within it")]
    CrossDevice,
    /// Something that no file of the mount can do.
    #[error("it cannot do this")]
    Unsupported,
    /// A request that makes no sense.
    #[error("{0}")]
    Refused(String),
    /// What a file of `new/` says.
    #[error("{0}")]
    Working(working::Error),
    /// The caller got a signal while it waited for a commit.
    #[error("a signal came; the commit goes on")]
    CalledAway,
    /// A snapshot that is not completed.
    #[error("{0} is {1}: it can be read once it is completed")]
    NotReady(SnapshotId, &'static str),
    /// What the store says.
    #[error("{0}")]
    Store(SharedError),
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        Self::Store(Arc::new(error))
    }
}

impl From<SharedError> for Error {
    fn from(error: SharedError) -> Self {
        Self::Store(error)
    }
}

/// What kind of file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Link,
}

/// What `stat` tells of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Inode number.
    pub ino: u64,
    /// What kind of file it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length in bytes.
    pub size: u64,
    /// Bytes that it takes, for `st_blocks`.
    pub allocated: u64,
    /// All its times.
    pub time: Timestamp,
    /// Number of names.
    pub links: u32,
    /// How long the kernel may keep this, and the name.
    pub ttl: Duration,
}

/// An entry of a directory.
#[derive(Clone, Debug)]
pub struct DirectoryEntry {
    /// Its name.
    pub name: String,
    /// Inode number.
    pub ino: u64,
    /// What kind of file it is.
    pub kind: Kind,
    /// `None` for `.` and `..`.
    node: Option<Node>,
}

/// Who owns the files of the mount, and who may read them.
#[derive(Clone, Copy, Debug)]
pub struct Ownership {
    /// Owner of the images.
    pub uid: u32,
    /// Group of the images.
    pub gid: u32,
    /// Permission bits of the images; bits for writing are of no use.
    pub file_mode: u16,
    /// The daemon's own user, who owns the control files.
    pub daemon_uid: u32,
    /// The daemon's own group.
    pub daemon_gid: u32,
}

/// An open file or directory.
#[derive(Clone, Debug)]
enum Handle {
    Image(Arc<Reader>),
    Working(Arc<working::Opened>),
    Text(Bytes),
    Command(Arc<Conversation>),
    Cancel(Arc<Job>),
    Directory(Arc<OpenDirectory>),
}

/// The images are immutable: the kernel may keep what it was told of them for as long as a name may
/// take to vanish after its snapshot was deleted.
const IMAGE_TTL: Duration = Duration::from_secs(10);

/// The tree of one mount.
#[derive(Debug)]
pub struct Tree {
    store: SharedStore,
    counters: Option<Arc<Counters>>,
    cache: Arc<Cache>,
    listing: Arc<Listing>,
    ownership: Ownership,
    mounted: Timestamp,
    nodes: Mutex<Nodes>,
    images: Mutex<LruCache<u64, Arc<Image>>>,
    handles: Mutex<HashMap<u64, Handle>>,
    directories: Arc<Directories>,
    next_handle: AtomicU64,
    /// `None` if nothing can be written.
    new: Option<new::New>,
    control: Control,
    /// What operations share.
    house: Arc<House>,
    /// What their blocks take room in.
    memory: Memory,
}

impl Tree {
    /// A tree over a store, of which nothing is listed yet. `counters` count the store's calls.
    pub fn new(
        store: SharedStore,
        counters: Option<Arc<Counters>>,
        cache: Arc<Cache>,
        ownership: Ownership,
    ) -> Self {
        let house = House {
            stores: Arc::default(),
            from: StoreUrl::Ebs(EbsUrl::default()),
            options: StoreOptions::default(),
            opened: Some(Arc::clone(&store)),
            journals: None,
            closed: Vec::new(),
            absolute: true,
        };
        Self {
            house: Arc::new(house),
            memory: Memory::default(),
            listing: Arc::new(Listing::new(Arc::clone(&store), counters.clone())),
            store,
            counters,
            cache,
            ownership,
            mounted: Timestamp::now(),
            nodes: Mutex::default(),
            images: Mutex::new(LruCache::new(CLOSED_IMAGES)),
            handles: Mutex::default(),
            directories: Arc::default(),
            next_handle: AtomicU64::new(1),
            new: None,
            control: Control::default(),
        }
    }

    /// This tree, whose jobs share these.
    pub(crate) fn with_house(mut self, house: House, memory: Memory) -> Self {
        (self.house, self.memory) = (Arc::new(house), memory);
        self
    }

    /// This tree, with the jobs that earlier mounts of `store` have kept below `root`.
    pub(crate) fn with_history(mut self, root: &Path, store: &str) -> Self {
        self.control.jobs = Jobs::with_history(root, store);
        self
    }

    /// Lists the snapshots anew.
    pub async fn refresh(&self) -> Result<()> {
        Ok(self.listing.refresh().await?)
    }

    fn nodes(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn node(&self, ino: u64) -> Result<Node> {
        let node = self.nodes().get(ino).filter(|node| self.control.has(node));
        node.ok_or(Error::NotFound)
    }

    /// Finds a name in a directory for a user. The kernel is told of what is found, and has to forget it.
    pub async fn lookup(&self, parent: u64, name: &OsStr, uid: u32) -> Result<Attributes> {
        let parent = self.node(parent)?;
        let name = name.to_str().ok_or(Error::NotFound)?;
        let node = match parent {
            Node::Root => self.lookup_in_root(name, uid).await?,
            Node::New => {
                let image = self.new.as_ref().and_then(|new| new.find(name));
                image.map(Node::Working).ok_or(Error::NotFound)?
            }
            Node::Jobs | Node::Job(_) => {
                self.control.find_child(&parent, name).ok_or(Error::NotFound)?
            }
            _ if parent.kind() != Kind::Directory => return Err(Error::NotADirectory),
            _ => self.lookup_in_catalog(&parent, name, uid).await.ok_or(Error::NotFound)?,
        };
        Ok(self.tell(node))
    }

    /// The attributes of a node that the kernel is told of.
    fn tell(&self, node: Node) -> Attributes {
        let attributes = self.attributes(&node);
        self.nodes().remember(node);
        attributes
    }

    async fn lookup_in_root(&self, name: &str, uid: u32) -> Result<Node> {
        if let Some((_, node)) = fixed_directories().into_iter().find(|(fixed, _)| *fixed == name) {
            return Ok(node);
        }
        let id = name.strip_suffix(IMAGE_SUFFIX).and_then(|id| id.parse::<SnapshotId>().ok());
        let id = id.ok_or(Error::NotFound)?;
        let found = match self.is_trusted(uid) {
            true => self.listing.find(&id).await?,
            false => self.listing.find_listed(&id).await?,
        };
        found.map(Node::Image).ok_or(Error::NotFound)
    }

    /// Whether the store may be asked whatever a user wants to know.
    fn is_trusted(&self, uid: u32) -> bool {
        [0, self.ownership.daemon_uid].contains(&uid)
    }

    async fn catalog_for(&self, uid: u32) -> Arc<Catalog> {
        match self.is_trusted(uid) {
            true => self.listing.fresh_catalog().await,
            false => self.listing.recent_catalog().await,
        }
    }

    async fn lookup_in_catalog(&self, parent: &Node, name: &str, uid: u32) -> Option<Node> {
        let catalog = match parent {
            Node::Control => Arc::default(),
            // A name that is there may be that of another snapshot by now, made a moment ago.
            _ => self.catalog_for(uid).await,
        };
        find_child(parent, &catalog, name)
    }

    /// Takes back `count` times that the kernel was told of an inode.
    pub fn forget(&self, ino: u64, count: u64) {
        self.nodes().forget(ino, count);
    }

    /// What `stat` tells; never asks the store.
    pub fn getattr(&self, ino: u64) -> Result<Attributes> {
        Ok(self.attributes(&self.node(ino)?))
    }

    fn attributes(&self, node: &Node) -> Attributes {
        let Ownership { uid, gid, file_mode, daemon_uid, daemon_gid } = self.ownership;
        let ino = node.ino();
        let base = Attributes {
            ino,
            kind: Kind::File,
            mode: file_mode,
            uid,
            gid,
            size: 0,
            allocated: 0,
            time: self.mounted,
            links: 1,
            ttl: Duration::ZERO,
        };
        match node {
            Node::Image(snapshot) => {
                let image = self.images().peek(&ino).cloned();
                Attributes {
                    size: snapshot.image_len(),
                    allocated: match image {
                        Some(image) => image.allocated(),
                        None => image::allocated(snapshot, None),
                    },
                    time: snapshot.start_time,
                    ttl: if snapshot.is_readable() { IMAGE_TTL } else { Duration::ZERO },
                    ..base
                }
            }
            Node::Working(image) => Self::working_attributes(image, base),
            Node::Link(link) => Attributes {
                kind: Kind::Link,
                mode: 0o777,
                size: link_target(link).len() as u64,
                ..base
            },
            Node::File(_) => Attributes { mode: 0o400, uid: daemon_uid, gid: daemon_gid, ..base },
            Node::Control
            | Node::Operation(_)
            | Node::Jobs
            | Node::Job(_)
            | Node::JobFile(..)
            | Node::LastJob(_) => {
                let base = Attributes { uid: daemon_uid, gid: daemon_gid, ..base };
                self.control.attributes(node, base)
            }
            _ => {
                // Whoever may read the images may look for them.
                let mode = 0o700 | (file_mode & 0o044) | ((file_mode & 0o044) >> 2);
                let changed = match node {
                    Node::New => self.new.as_ref().map(new::New::changed),
                    _ => self.listing.catalog().changed(ino),
                };
                let time = changed.unwrap_or(self.mounted);
                Attributes { kind: Kind::Directory, mode, links: 2, time, ..base }
            }
        }
    }

    /// Where a symbolic link leads, relative to its directory.
    pub fn readlink(&self, ino: u64) -> Result<String> {
        match self.node(ino)? {
            Node::Link(link) => Ok(link_target(&link)),
            Node::LastJob(number) => Ok(number.to_string()),
            _ => Err(Error::NotFound),
        }
    }

    /// Opens a directory for a user, and notes what is in it now.
    pub async fn opendir(&self, ino: u64, uid: u32) -> Result<u64> {
        let node = self.node(ino)?;
        if node.kind() != Kind::Directory {
            return Err(Error::NotADirectory);
        }
        let catalog = match node {
            Node::Jobs | Node::Job(_) | Node::Control | Node::New => None,
            _ => Some(self.catalog_for(uid).await),
        };
        let entries = || self.directory_entries(&node, catalog.as_deref());
        let opened = self.directories.open(uid, &node, catalog.as_ref(), entries)?;
        Ok(self.add_handle(Handle::Directory(Arc::new(opened))))
    }

    fn directory_entries(&self, node: &Node, catalog: Option<&Catalog>) -> Vec<DirectoryEntry> {
        let ino = node.ino();
        let children = match (node, catalog) {
            (Node::Jobs | Node::Job(_), _) => self.control.children(node),
            (Node::New, _) => self.new.as_ref().map(new::New::children).unwrap_or_default(),
            (_, Some(catalog)) => children(node, catalog),
            (_, None) => children(node, &Catalog::default()),
        };
        let dots = [".", ".."].map(|name| DirectoryEntry {
            name: name.to_owned(),
            ino,
            kind: Kind::Directory,
            node: None,
        });
        let children = children.into_iter().map(|(name, node)| DirectoryEntry {
            name,
            ino: node.ino(),
            kind: node.kind(),
            node: Some(node),
        });
        dots.into_iter().chain(children).collect()
    }

    /// The entries of an open directory, the same as long as it is open.
    pub fn entries(&self, handle: u64) -> Result<Arc<Vec<DirectoryEntry>>> {
        match self.handle(handle)? {
            Handle::Directory(opened) => Ok(Arc::clone(&opened.entries)),
            _ => Err(Error::BadHandle),
        }
    }

    /// The attributes of an entry, for a reader that wants them along. The kernel is told of it,
    /// and has to forget it; but not of `.`, `..` and what cannot be looked at, which are `None`.
    pub fn entry_attributes(&self, entry: &DirectoryEntry) -> Option<Attributes> {
        match entry.node.as_ref()? {
            Node::Image(snapshot) if snapshot.state == SnapshotState::Error => None,
            node => Some(self.tell(node.clone())),
        }
    }

    /// Opens a file. Answers its handle, and whether the kernel may keep its content.
    pub async fn open(&self, ino: u64, mode: OpenMode) -> Result<(u64, Caching)> {
        let node = self.node(ino)?;
        let for_writing = mode.write || mode.truncate;
        match node {
            Node::Working(image) => self.open_working(&image, mode).await,
            Node::Image(_) | Node::File(_) if for_writing => Err(Error::Denied),
            Node::Image(snapshot) => {
                if !snapshot.is_readable() {
                    return Err(Error::NotReady(snapshot.id.clone(), snapshot.state.as_str()));
                }
                let reader = Reader::new(self.image(ino, &snapshot));
                Ok((self.add_handle(Handle::Image(Arc::new(reader))), Caching::Keep))
            }
            Node::File(file) => {
                let shop = self.new.as_ref().map(|new| new.shop.as_ref());
                let text = file.content(&self.cache, self.counters.as_deref(), &self.store, shop);
                Ok((self.add_handle(Handle::Text(text.into())), Caching::Never))
            }
            Node::Operation(_) | Node::JobFile(..) => {
                let handle = self.control.open(&node, for_writing)?;
                Ok((self.add_handle(handle), Caching::Never))
            }
            Node::Link(_) | Node::LastJob(_) => Err(Error::NotPermitted),
            _ => Err(Error::IsADirectory),
        }
    }

    fn images(&self) -> MutexGuard<'_, LruCache<u64, Arc<Image>>> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn image(&self, ino: u64, snapshot: &Arc<Snapshot>) -> Arc<Image> {
        let new =
            || Image::new(Arc::clone(snapshot), Arc::clone(&self.store), Arc::clone(&self.cache));
        Arc::clone(self.images().get_or_insert(ino, new))
    }

    fn add_handle(&self, handle: Handle) -> u64 {
        let number = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.handles.lock().unwrap_or_else(PoisonError::into_inner).insert(number, handle);
        number
    }

    fn handle(&self, number: u64) -> Result<Handle> {
        let handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        handles.get(&number).cloned().ok_or(Error::BadHandle)
    }

    /// Closes a file or directory.
    pub fn release(&self, number: u64) {
        let handle = self.handles.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
        if let Some(Handle::Working(opened)) = handle {
            Self::release_working(&opened);
        }
    }

    /// Closes everything: the kernel may not have said so of what was closed last.
    pub fn release_all(&self) {
        let open: Vec<u64> = {
            let handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
            handles.keys().copied().collect()
        };
        for handle in open {
            self.release(handle);
        }
    }

    /// Up to `len` bytes of an open file from `offset` on, if that needs no waiting.
    pub fn read_cached(&self, handle: u64, offset: u64, len: usize) -> Result<Option<Bytes>> {
        match self.handle(handle)? {
            Handle::Image(reader) => Ok(reader.read_cached(offset, len)),
            Handle::Working(_) => Ok(None),
            Handle::Text(text) => Ok(Some(part(&text, offset, len))),
            Handle::Command(conversation) => Ok(Some(conversation.read(offset, len))),
            Handle::Cancel(_) => Ok(Some(Bytes::new())),
            Handle::Directory(_) => Err(Error::IsADirectory),
        }
    }

    /// Up to `len` bytes of an open file from `offset` on; fewer only at its end.
    pub async fn read(&self, handle: u64, offset: u64, len: usize) -> Result<Bytes> {
        if let Some(bytes) = self.read_cached(handle, offset, len)? {
            return Ok(bytes);
        }
        match self.handle(handle)? {
            Handle::Image(reader) => Ok(reader.read(offset, len).await?),
            Handle::Working(opened) => Ok(opened.image().read(offset, len).await?),
            _ => Err(Error::BadHandle),
        }
    }

    /// The first data at or behind `offset`.
    pub async fn seek_data(&self, handle: u64, offset: u64) -> Result<u64> {
        match self.handle(handle)? {
            Handle::Image(reader) => {
                reader.image().seek_data(offset).await?.ok_or(Error::NoSuchOffset)
            }
            Handle::Working(opened) => {
                opened.image().seek_data(offset).await?.ok_or(Error::NoSuchOffset)
            }
            Handle::Text(text) if offset < text.len() as u64 => Ok(offset),
            _ => Err(Error::NoSuchOffset),
        }
    }

    /// The first hole at or behind `offset`; the end of a file is one.
    pub async fn seek_hole(&self, handle: u64, offset: u64) -> Result<u64> {
        match self.handle(handle)? {
            Handle::Image(reader) => {
                reader.image().seek_hole(offset).await?.ok_or(Error::NoSuchOffset)
            }
            Handle::Working(opened) => {
                opened.image().seek_hole(offset).await?.ok_or(Error::NoSuchOffset)
            }
            Handle::Text(text) if offset < text.len() as u64 => Ok(text.len() as u64),
            _ => Err(Error::NoSuchOffset),
        }
    }

    /// The extended attributes of a file, by name.
    pub fn xattrs(&self, ino: u64) -> Result<Vec<(String, String)>> {
        match self.node(ino)? {
            Node::Image(snapshot) => {
                // Tags change; the catalog has the latest that is known.
                let latest = self.listing.catalog().snapshots.get(&snapshot.id).cloned();
                let same = latest.filter(|latest| latest.start_time == snapshot.start_time);
                Ok(xattr::attributes(&same.unwrap_or(snapshot)))
            }
            Node::Working(image) => Ok(xattr::of_working(&image)),
            _ => Ok(Vec::new()),
        }
    }

    /// One extended attribute.
    pub fn xattr(&self, ino: u64, name: &OsStr) -> Result<String> {
        let attributes = self.xattrs(ino)?.into_iter();
        let found = attributes.into_iter().find(|(key, _)| name == key.as_str());
        found.map(|(_, value)| value).ok_or(Error::NoSuchAttribute)
    }

    /// Bytes that can still be written, for `df`.
    pub fn spare(&self) -> u64 {
        self.new.as_ref().map_or(0, |new| new.shop.spare())
    }

    /// Bytes of all images, and their number, for `df`.
    pub fn totals(&self) -> (u64, u64) {
        let catalog = self.listing.catalog();
        let images = catalog.snapshots.values();
        let bytes = images.map(|snapshot| image::allocated(snapshot, None));
        (bytes.fold(0, u64::saturating_add), catalog.snapshots.len() as u64)
    }
}

/// Up to `len` bytes of a text from `offset` on.
fn part(text: &Bytes, offset: u64, len: usize) -> Bytes {
    let start = usize::try_from(offset).map_or(text.len(), |at| at.min(text.len()));
    text.slice(start..start.saturating_add(len).min(text.len()))
}

/// Whether the kernel may keep what it read of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caching {
    /// For ever: the content never changes.
    Keep,
    /// Until it is opened again.
    Until,
    /// Not at all, and a program that closes it has to be told of.
    Direct,
    /// Not at all: every read comes to the tree.
    Never,
}

/// The preferred size of a read in bytes: a block.
pub const PREFERRED_READ: u64 = BLOCK_SIZE_U64;
