//! `new/`: the files that become snapshots.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::OsStr;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;

use super::caller::closes_at_sigint;
use super::commits::CommitJobs;
use super::node::Node;
use super::{Attributes, Caching, Error, Handle, Kind, Result, Tree};
use crate::image::working::{Closed, Maker, Opened, WorkingImage, Workshop};
use crate::model::SnapshotId;
use crate::store::{Error as StoreError, ErrorKind};
use crate::transfer::SharedProgress;

/// Longest name of a file in bytes (`NAME_MAX`).
const MAX_NAME: usize = 255;

/// Longest time that opening a file waits for the store to tell of its base.
const FIND_BASE: Duration = Duration::from_secs(5);

/// How often it is looked whether a program that waits for a commit got a signal.
const LOOKS_UP: Duration = Duration::from_millis(300);

/// How a file is opened.
#[derive(Clone, Copy, Debug)]
pub struct OpenMode {
    /// It can be read.
    pub read: bool,
    /// It can be written.
    pub write: bool,
    /// It is made empty.
    pub truncate: bool,
    /// It must not be there yet.
    pub exclusive: bool,
    /// The thread group that opens it; 0 if that cannot be told.
    pub opener: u32,
}

impl OpenMode {
    /// To read only.
    pub const READ: Self =
        Self { read: true, write: false, truncate: false, exclusive: false, opener: 0 };
    /// To write only.
    pub const WRITE: Self =
        Self { read: false, write: true, truncate: false, exclusive: false, opener: 0 };
}

/// What `setattr` changes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Changes {
    /// Length in bytes.
    pub size: Option<u64>,
    /// Permission bits.
    pub mode: Option<u16>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Time of the last change.
    pub modified: Option<Timestamp>,
}

/// What becomes of a file that has the new name already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameMode {
    /// It is replaced.
    Replace,
    /// It stays, and nothing is renamed.
    Keep,
}

/// What `fallocate` is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Room, and the length that goes with it unless that is to stay.
    Room {
        /// The length does not change.
        keep_size: bool,
    },
    /// A hole.
    Punch,
    /// Zeros, and the length that goes with them unless that is to stay.
    Zeros {
        /// The length does not change.
        keep_size: bool,
    },
}

/// The working images of a mount, by name.
#[derive(Debug)]
pub(super) struct New {
    pub(super) shop: Arc<Workshop>,
    images: Mutex<BTreeMap<String, Arc<WorkingImage>>>,
    /// When a name has come or gone.
    changed: Mutex<Timestamp>,
}

impl New {
    fn images(&self) -> MutexGuard<'_, BTreeMap<String, Arc<WorkingImage>>> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When a name has come or gone.
    pub(super) fn changed(&self) -> Timestamp {
        *self.changed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_changed(&self) {
        *self.changed.lock().unwrap_or_else(PoisonError::into_inner) = Timestamp::now();
    }

    pub(super) fn find(&self, name: &str) -> Option<Arc<WorkingImage>> {
        self.images().get(name).cloned()
    }

    /// Gives a new image its name, unless somebody else was faster: then the image goes.
    async fn insert(&self, name: &str, image: &Arc<WorkingImage>) -> Result<()> {
        let free = match self.images().entry(name.to_owned()) {
            Entry::Vacant(entry) => {
                entry.insert(Arc::clone(image));
                true
            }
            Entry::Occupied(_) => false,
        };
        if free {
            self.has_changed();
            return Ok(());
        }
        image.remove().await;
        Err(Error::Exists)
    }

    pub(super) fn children(&self) -> Vec<(String, Node)> {
        self.all().into_iter().map(|(name, image)| (name, Node::Working(image))).collect()
    }

    pub(super) fn all(&self) -> Vec<(String, Arc<WorkingImage>)> {
        self.images().iter().map(|(name, image)| (name.clone(), Arc::clone(image))).collect()
    }
}

impl Tree {
    /// The same tree, with what can be written under `new/`; what an earlier mount has left there
    /// comes back, and commits that were under way go on.
    #[must_use]
    pub async fn with_new(mut self, shop: Arc<Workshop>) -> Self {
        shop.watch(Box::new(CommitJobs(self.control.jobs.clone())));
        let mut images = BTreeMap::new();
        for image in WorkingImage::load_all(&shop).await {
            let mut name = image.name();
            for n in 1.. {
                if !images.contains_key(&name) {
                    break;
                }
                name = format!("{}.{n}", image.name());
            }
            if name != image.name() && image.rename(&name).await.is_err() {
                tracing::error!("two images are named {name:?}");
            }
            tracing::info!("new/{name} is back: {}", image.status().state.as_str());
            image.resume();
            images.insert(name, image);
        }
        let changed = Mutex::new(Timestamp::now());
        self.new = Some(New { shop, images: Mutex::new(images), changed });
        self
    }

    pub(super) fn new_dir(&self) -> Result<&New> {
        self.new.as_ref().ok_or(Error::ReadOnly)
    }

    /// The working image of this name.
    pub(super) fn working(&self, name: &str) -> Result<Arc<WorkingImage>> {
        self.new_dir()?.find(name).ok_or(Error::NotFound)
    }

    /// Makes a file in `new/`, and opens it.
    pub async fn create(
        &self,
        parent: u64,
        name: &OsStr,
        maker: Maker,
        mode: OpenMode,
    ) -> Result<(Attributes, u64, Caching)> {
        let image = self.find_or_make(parent, name, maker, mode.exclusive).await?;
        let (handle, caching) = self.open_working(&image, mode).await?;
        Ok((self.tell(Node::Working(image)), handle, caching))
    }

    /// Makes a file in `new/`, as `mknod` does, which tar uses to set attributes before data.
    pub async fn make(&self, parent: u64, name: &OsStr, maker: Maker) -> Result<Attributes> {
        let image = self.find_or_make(parent, name, maker, true).await?;
        Ok(self.tell(Node::Working(image)))
    }

    async fn find_or_make(
        &self,
        parent: u64,
        name: &OsStr,
        maker: Maker,
        exclusive: bool,
    ) -> Result<Arc<WorkingImage>> {
        self.check_is_new(parent)?;
        let name = check_name(name)?;
        let new = self.new_dir()?;
        match new.find(name) {
            // Somebody else was faster.
            Some(_) if exclusive => Err(Error::Exists),
            Some(image) => Ok(image),
            None => {
                let image = WorkingImage::create(&new.shop, name, maker).await?;
                new.insert(name, &image).await?;
                Ok(image)
            }
        }
    }

    pub(super) async fn open_working(
        &self,
        image: &Arc<WorkingImage>,
        mode: OpenMode,
    ) -> Result<(u64, Caching)> {
        // Without it what is staged can be read all the same.
        let _ = tokio::time::timeout(FIND_BASE, image.find_base()).await;
        let opened = Opened::new(Arc::clone(image), mode.read, mode.write, mode.opener);
        if mode.truncate && mode.write {
            opened.begin_change();
            let result = image.truncate(0).await;
            opened.end_change(&result);
            if let Err(error) = result {
                opened.release();
                return Err(error.into());
            }
        }
        let caching = if opened.is_direct() { Caching::Direct } else { Caching::Until };
        Ok((self.add_handle(Handle::Working(Arc::new(opened))), caching))
    }

    fn opened(&self, handle: u64) -> Result<Arc<Opened>> {
        match self.handle(handle)? {
            Handle::Working(opened) => Ok(opened),
            _ => Err(Error::BadHandle),
        }
    }

    pub(super) async fn write_working(opened: &Opened, offset: u64, data: Bytes) -> Result<()> {
        opened.begin_change();
        let range = offset..offset.saturating_add(data.len() as u64);
        let mut unended = Unended(Some((opened, range)));
        let result = opened.image().write(offset, data).await;
        unended.end(&result);
        Ok(result?)
    }

    /// Changes what is allocated of an open file of `new/`.
    pub async fn fallocate(
        &self,
        handle: u64,
        offset: u64,
        len: u64,
        what: Allocation,
    ) -> Result<()> {
        let opened = self.opened(handle)?;
        opened.begin_change();
        let image = opened.image();
        let result = match what {
            Allocation::Room { keep_size } => image.allocate(offset, len, keep_size).await,
            Allocation::Punch | Allocation::Zeros { keep_size: true } => {
                image.punch(offset, len).await
            }
            Allocation::Zeros { keep_size: false } => match image.punch(offset, len).await {
                Ok(()) => image.grow(offset.saturating_add(len)).await,
                failed => failed,
            },
        };
        opened.end_change(&result);
        Ok(result?)
    }

    pub(super) async fn change_working(
        &self,
        image: &Arc<WorkingImage>,
        handle: Option<u64>,
        changes: Changes,
    ) -> Result<()> {
        if let Some(size) = changes.size {
            let opened = handle.and_then(|handle| self.opened(handle).ok());
            match opened {
                Some(opened) => {
                    opened.begin_change();
                    let result = image.truncate(size).await;
                    opened.end_change(&result);
                    result?;
                }
                // `truncate()` without opening: like an open and a close.
                None => {
                    image.truncate(size).await?;
                    image.commit_if_closed();
                }
            }
        }
        let Changes { mode, uid, gid, modified, .. } = changes;
        if mode.is_some() || uid.is_some() || gid.is_some() || modified.is_some() {
            image.set_attributes(mode, uid, gid, modified).await?;
        }
        Ok(())
    }

    /// Makes what was written to an open file durable on the local disk.
    pub async fn fsync(&self, handle: u64) -> Result<()> {
        match self.handle(handle)? {
            Handle::Working(opened) => Ok(opened.image().sync().await?),
            _ => Ok(()),
        }
    }

    /// A write through an open file begins, by a thread.
    pub fn begin_write(&self, handle: u64, thread: u32) {
        if let Ok(Handle::Working(opened)) = self.handle(handle) {
            opened.begin_write(|| closes_at_sigint(thread));
        }
    }

    /// A descriptor of an open file is closed, by the thread group `closer`; `dying` says why that may be cut
    /// short, if it is told whether it would have closed the file at SIGINT. Waits for the commit that this
    /// may call for.
    pub async fn flush(
        &self,
        handle: u64,
        closer: u32,
        dying: impl FnOnce(bool) -> Option<String>,
        is_called_away: impl Fn() -> bool,
    ) -> Result<()> {
        let Handle::Working(opened) = self.handle(handle)? else { return Ok(()) };
        let closed = opened.flush(closer, dying(opened.closes_at_sigint()));
        if let Ok(Closed::Commit) = closed {
            let image = Arc::clone(opened.image());
            // It goes on when nobody waits for it any more.
            let mut committing = tokio::spawn(async move { image.commit_closed().await });
            loop {
                match tokio::time::timeout(LOOKS_UP, &mut committing).await {
                    Ok(Ok(committed)) => {
                        committed?;
                        break;
                    }
                    Ok(Err(ended)) => match ended.try_into_panic() {
                        Ok(panic) => resume_unwind(panic),
                        // The mount has ended.
                        Err(_) => return Err(Error::CalledAway),
                    },
                    Err(_) if is_called_away() => {
                        let name = opened.image().name();
                        tracing::info!("{name}: its close was interrupted; the commit goes on");
                        return Err(Error::CalledAway);
                    }
                    Err(_) => {}
                }
            }
        } else {
            opened.image().record_interruption().await;
        }
        closed.map(drop).map_err(Into::into)
    }

    pub(super) fn release_working(opened: &Opened) {
        match opened.release() {
            Closed::Commit => opened.image().commit_in_background(),
            Closed::Nothing => {
                opened.image().tidy();
                opened.image().record_interruption_in_background();
            }
        }
    }

    pub(super) async fn unlink_working(&self, name: &str) -> Result<()> {
        let new = self.new_dir()?;
        let image = new.images().remove(name).ok_or(Error::NotFound)?;
        new.has_changed();
        image.remove().await;
        Ok(())
    }

    /// Renames a file within `new/`.
    pub async fn rename(
        &self,
        parent: u64,
        name: &OsStr,
        new_parent: u64,
        new_name: &OsStr,
        how: Option<RenameMode>,
    ) -> Result<()> {
        self.check_is_new(parent)?;
        let how = how.ok_or_else(|| Error::Refused("two files cannot be exchanged".to_owned()))?;
        if !matches!(self.node(new_parent)?, Node::New) {
            return Err(Error::CrossDevice);
        }
        let (name, new_name) = (name.to_str().ok_or(Error::NotFound)?, check_name(new_name)?);
        let new = self.new_dir()?;
        let image = self.working(name)?;
        if name == new_name {
            return Ok(());
        }
        let replaced = {
            let mut images = new.images();
            if how == RenameMode::Keep && images.contains_key(new_name) {
                return Err(Error::Exists);
            }
            images.remove(name);
            images.insert(new_name.to_owned(), Arc::clone(&image))
        };
        new.has_changed();
        if let Some(replaced) = replaced {
            replaced.remove().await;
        }
        Ok(image.rename(new_name).await?)
    }

    /// Sets an extended attribute, or removes it.
    pub async fn set_xattr(
        &self,
        ino: u64,
        name: &OsStr,
        value: Option<&[u8]>,
        by: u32,
    ) -> Result<()> {
        let Node::Working(image) = self.node(ino)? else { return Err(Error::NotPermitted) };
        let name = name.to_str().and_then(|name| name.strip_prefix(super::xattr::PREFIX));
        let name = name.ok_or(Error::Unsupported)?;
        let value = value.map(std::str::from_utf8).transpose();
        let value = value.map_err(|_| Error::Refused("a value has to be UTF-8".to_owned()))?;
        Ok(image.wish(name, value, by).await?)
    }

    fn check_is_new(&self, ino: u64) -> Result<()> {
        match self.node(ino)? {
            Node::New => self.new_dir().map(drop),
            _ => Err(Error::NotPermitted),
        }
    }

    pub(super) fn working_attributes(image: &WorkingImage, base: Attributes) -> Attributes {
        let status = image.status();
        Attributes {
            kind: Kind::File,
            mode: status.mode,
            uid: status.uid,
            gid: status.gid,
            size: status.len,
            allocated: status.allocated,
            time: status.modified,
            links: status.links,
            ..base
        }
    }

    /// Commits a file, as asked for; waits until the store has accepted the snapshot, or, if
    /// `completed`, until it calls it completed. `as_is` takes one that is known not to be whole, too.
    pub(crate) async fn commit_working(
        &self,
        name: &str,
        completed: bool,
        as_is: bool,
        progress: SharedProgress,
    ) -> Result<SnapshotId> {
        let image = self.working(name)?;
        image.show_commits(&progress);
        let id = image.commit_as(as_is).await?;
        if completed {
            image.until_completed().await?;
        }
        Ok(id)
    }

    /// Ends the commit of a file that is under way.
    pub(crate) fn cancel_commit_of(&self, name: &str) -> Result<()> {
        Ok(self.working(name)?.cancel()?)
    }

    /// Makes a file in `new/` that begins as a snapshot is. Copies nothing.
    pub(crate) async fn clone_working(&self, snapshot: &SnapshotId, name: &str) -> Result<()> {
        let new = self.new_dir()?;
        let name = check_name(OsStr::new(name))?;
        let found = self.store.describe(snapshot).await?;
        if !found.is_readable() {
            return Err(Error::NotReady(found.id, found.state.as_str()));
        }
        if new.find(name).is_some() {
            return Err(Error::Exists);
        }
        let base = crate::image::Image::new(
            Arc::new(found),
            Arc::clone(&self.store),
            Arc::clone(&self.cache),
        );
        let owner = self.ownership;
        let maker = Maker { uid: owner.uid, gid: owner.gid, mode: 0o600 };
        let image = WorkingImage::create_over(&new.shop, name, maker, Some(base)).await?;
        new.insert(name, &image).await
    }

    /// The files whose commits put blocks.
    pub fn commits_under_way(&self) -> Vec<String> {
        let Some(new) = &self.new else { return Vec::new() };
        let images = new.all().into_iter();
        images.filter(|(_, image)| image.is_putting()).map(|(name, _)| name).collect()
    }

    /// Waits until no commit puts blocks.
    pub async fn commits_done(&self) {
        for (_, image) in self.new.as_ref().map(New::all).unwrap_or_default() {
            image.put_down().await;
        }
    }

    /// The end of the mount: clean images go, the others stay for the next one.
    pub async fn close_new(&self) {
        for (name, image) in self.new.as_ref().map(New::all).unwrap_or_default() {
            if let Err(error) = image.sync().await {
                tracing::error!(
                    "what is staged of new/{name} may not survive a power cut: {error}"
                );
            }
            image.leave();
        }
        // The jobs of commits are kept as they ended.
        self.control.jobs.settled().await;
    }
}

/// A write that has not ended. One that is given up, since it took too long, has failed.
struct Unended<'a>(Option<(&'a Opened, Range<u64>)>);

impl Unended<'_> {
    fn end(&mut self, result: &crate::image::working::Result<()>) {
        if let Some((opened, range)) = self.0.take() {
            opened.end_write(range, result);
        }
    }
}

impl Drop for Unended<'_> {
    fn drop(&mut self) {
        self.end(&Err(crate::image::working::Error::TimedOut));
    }
}

fn check_name(name: &OsStr) -> Result<&str> {
    let invalid = |why: &str| {
        Err(Error::Refused(format!("{} cannot be the name of an image: {why}", name.display())))
    };
    if name.len() > MAX_NAME {
        return Err(Error::NameTooLong);
    }
    match name.to_str() {
        None => invalid("it is not UTF-8"),
        Some("" | "." | "..") => invalid("it means something else"),
        Some(text) if text.chars().any(|c| c == '/' || c.is_control()) => {
            invalid("it has a slash, a newline or the like in it")
        }
        Some(text) => Ok(text),
    }
}

impl From<crate::image::working::Error> for Error {
    fn from(error: crate::image::working::Error) -> Self {
        use crate::image::working::Error as Working;
        match error {
            Working::Store(error) => Self::Store(error),
            Working::Refused(why) => Self::Refused(why),
            Working::Stalled(_) => {
                Self::Store(Arc::new(StoreError::new(ErrorKind::Timeout, error.to_string())))
            }
            error => Self::Working(error),
        }
    }
}
