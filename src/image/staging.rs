//! The staging directory of a mount: what was written to working images, on the local disk.
//!
//! Each working image has a directory with one document and two files a generation: the data, at the
//! offsets of the image, and the map of which blocks are there. `docs/staging-format.md` is the
//! description for others.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use roaring::RoaringBitmap;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::model::{BLOCK_SIZE_U64, Block, BlockBuffer, BlockIndex, Digest};
use crate::own;
use crate::store::{StoreUrl, document};

pub(crate) mod files;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub(crate) mod lost;
pub(crate) mod map;
pub(crate) mod record;

/// The format that this version writes, and the newest that it reads.
const FORMAT: u32 = 1;

/// Mounts of one store at the same time that each have a staging directory of their own.
const MAX_PLACES: u32 = 16;

/// What is left of the disk for others: a twentieth, and at most a GiB.
const RESERVE: u64 = 1 << 30;

/// Ends the name of a directory that is being removed.
const GONE: &str = "gone";

/// Blocks that may be staged between two looks at how full the disk is.
const BETWEEN_LOOKS: i64 = 32;

/// `staging.json`: whose it is.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Owner {
    format: u32,
    store: String,
    /// Where the store was last, if it says something else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    url: Option<String>,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.url {
            Some(url) => write!(f, "{} ({url})", self.store),
            None => f.write_str(&self.store),
        }
    }
}

/// What is staged in a directory that no mount uses.
#[derive(Debug)]
pub(crate) struct Kept {
    /// The store that it is for.
    pub(crate) store: String,
    /// Where that was last.
    pub(crate) url: Option<String>,
    /// How many images there are.
    pub(crate) images: usize,
    path: PathBuf,
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let images = if self.images == 1 { "image is" } else { "images are" };
        write!(f, "{} {images} staged for {}", self.images, self.store)?;
        if let Some(url) = &self.url {
            write!(f, ", which was {url}")?;
        }
        write!(f, ", in {}", self.path.display())
    }
}

/// What can be wrong with a staging directory.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// The system does not let us use it.
    #[error(
        "cannot stage in {path}: {cause}; --staging names another directory, --read-only does without"
    )]
    Io {
        /// The directory.
        path: String,
        /// What the system says.
        cause: io::Error,
    },
    /// It is not ours to use.
    #[error("cannot stage in {path}: {why}")]
    Taken {
        /// The directory.
        path: String,
        /// By whom it is used, and what to do.
        why: String,
    },
}

/// An open staging directory, locked.
#[derive(Debug)]
pub struct Staging {
    path: PathBuf,
    limit: u64,
    staged: AtomicU64,
    /// Blocks until the next look at how full the disk is.
    unlooked: AtomicI64,
    /// Held while it is in use.
    _lock: Flock<File>,
}

/// Why nothing more can be staged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoRoom {
    Limit(u64),
    Disk,
}

impl Staging {
    /// The staging directory of a store in `root`, for one of possibly several mounts of it; what
    /// mounts that are gone have left in others is moved into it.
    ///
    /// # Errors
    ///
    /// If it cannot be used.
    pub fn open_default(root: &Path, store: &str, limit: u64) -> Result<Self, Unusable> {
        let key = &Digest::of(store.as_bytes()).to_hex()[..16];
        let place = |n: u32| root.join(format!("{key}-{n}"));
        let mut taken = None;
        for n in 0..MAX_PLACES {
            match Self::open(&place(n), store, limit) {
                Ok(staging) => {
                    for other in (0..MAX_PLACES).filter(|other| *other != n) {
                        staging.adopt(&place(other), store);
                    }
                    return Ok(staging);
                }
                Err(error @ Unusable::Taken { .. }) => taken = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(taken.expect("there was at least one"))
    }

    /// What is staged below `root`, and used by no mount.
    pub(crate) fn kept(root: &Path) -> Vec<Kept> {
        let places = std::fs::read_dir(root).into_iter().flatten().flatten();
        let kept = |path: PathBuf| {
            own::check(&path).ok()?;
            let lock = own::open(&path.join("lock"), File::options().read(true)).ok()?;
            Flock::lock(lock, FlockArg::LockSharedNonblock).ok()?;
            let bytes = own::read(&path.join("staging.json")).ok()?;
            let Owner { store, url, .. } = document::decode("staging.json", &bytes).ok()?;
            let images = std::fs::read_dir(path.join("images")).ok()?.flatten();
            let images = images.filter(|image| record::id_of(&image.path()).is_some()).count();
            (images > 0).then_some(Kept { store, url, images, path })
        };
        places.filter_map(|place| kept(place.path())).collect()
    }

    /// Notes where its store is, for who looks for it later. If that cannot be noted nothing is lost.
    pub(crate) fn note_url(&self, url: &StoreUrl) {
        let document = self.path.join("staging.json");
        let url = url.to_string();
        let noted = own::read(&document).and_then(|bytes| {
            let found = document::decode("staging.json", &bytes);
            let owner: Owner = found.map_err(io::Error::other)?;
            if owner.store.starts_with(&url) || owner.url.as_ref() == Some(&url) {
                return Ok(());
            }
            let owner = Owner { url: Some(url), ..owner };
            files::replace(&document, &document::encode(&owner), true)
        });
        if let Err(error) = noted {
            tracing::warn!("cannot note in {} where the store is: {error}", document.display());
        }
    }

    /// The staging directory at `path`, which is made if it is not there.
    ///
    /// # Errors
    ///
    /// If it cannot be used, is used by another mount, is that of another store, or others can change it.
    pub fn open(path: &Path, store: &str, limit: u64) -> Result<Self, Unusable> {
        let failed = |cause| Unusable::Io { path: path.display().to_string(), cause };
        let taken = |why: String| Unusable::Taken { path: path.display().to_string(), why };
        own::make(path).and_then(|()| own::make(&path.join("images"))).map_err(failed)?;
        let lock = lock(&path.join("lock"), failed, taken)?;
        let document = path.join("staging.json");
        let owner = Owner { format: FORMAT, store: store.to_owned(), url: None };
        match own::read(&document) {
            Ok(bytes) => {
                let found: Owner = document::decode("staging.json", &bytes)
                    .map_err(|e| taken(format!("{e}; what is staged there is still there")))?;
                if found.format > FORMAT {
                    return Err(taken(format!(
                        "it has the format {}, of a newer fspfs",
                        found.format
                    )));
                }
                if found.store != owner.store {
                    return Err(taken(format!(
                        "it belongs to the store {found}; give another --staging"
                    )));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if std::fs::read_dir(path.join("images")).map_err(failed)?.next().is_some() {
                    return Err(taken(
                        "staging.json is gone, and nothing says to which store the images there belong"
                            .to_owned(),
                    ));
                }
                files::replace(&document, &document::encode(&owner), true).map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
        }
        if !files::has_sparse_files(path).map_err(failed)? {
            return Err(taken(
                "files there cannot have holes; give a --staging on ext4, xfs, btrfs or tmpfs"
                    .to_owned(),
            ));
        }
        let staging = Self {
            path: path.to_owned(),
            limit,
            staged: AtomicU64::new(0),
            unlooked: AtomicI64::new(0),
            _lock: lock,
        };
        staging.sweep().map_err(failed)?;
        Ok(staging)
    }

    /// Takes over the images of a mount that is gone. What cannot be had now is there the next time.
    fn adopt(&self, other: &Path, store: &str) {
        if !other.join("staging.json").exists() {
            return;
        }
        let Ok(left) = Self::open(other, store, 0) else { return };
        for image in left.images().unwrap_or_default() {
            let Some(name) = image.file_name() else { continue };
            match std::fs::rename(&image, self.path.join("images").join(name)) {
                Ok(()) => tracing::info!("took over what was staged in {}", image.display()),
                Err(error) => tracing::warn!("{} stays where it is: {error}", image.display()),
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directories of the images that are there.
    pub(crate) fn images(&self) -> io::Result<Vec<PathBuf>> {
        let mut images = Vec::new();
        for entry in std::fs::read_dir(self.path.join("images"))? {
            let entry = entry?;
            if record::id_of(&entry.path()).is_some() && entry.file_type()?.is_dir() {
                images.push(entry.path());
            }
        }
        Ok(images)
    }

    /// Removes what is staged of an image: whole, as far as any later mount can see.
    pub(crate) fn discard(image: &Path) -> io::Result<()> {
        let gone = image.with_extension(GONE);
        std::fs::rename(image, &gone)?;
        std::fs::remove_dir_all(&gone)
    }

    /// Removes what a process was about to remove when it ended.
    fn sweep(&self) -> io::Result<()> {
        for entry in std::fs::read_dir(self.path.join("images"))? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == GONE)
                && record::id_of(&path.with_extension("")).is_some()
            {
                std::fs::remove_dir_all(&path)?;
            }
        }
        Ok(())
    }

    /// A new directory for an image.
    pub(crate) fn new_image(&self) -> io::Result<PathBuf> {
        let path = self.path.join("images").join(Uuid::new_v4().to_string());
        own::make(&path)?;
        Ok(path)
    }

    /// Makes the directory of an image durable.
    pub(crate) fn sync_image(&self, image: &Path) -> io::Result<()> {
        files::sync_directory(image)?;
        files::sync_directory(&self.path.join("images"))
    }

    /// Takes room for `blocks` more blocks, to be given back with [`give_back`](Self::give_back).
    pub(crate) fn take(&self, blocks: u64) -> Result<(), NoRoom> {
        let bytes = blocks * BLOCK_SIZE_U64;
        if self.staged.fetch_add(bytes, Ordering::Relaxed) + bytes > self.limit {
            self.give_back(blocks);
            return Err(NoRoom::Limit(self.limit));
        }
        let blocks_signed = i64::try_from(blocks).unwrap_or(i64::MAX);
        if self.unlooked.fetch_sub(blocks_signed, Ordering::Relaxed) <= blocks_signed {
            match self.spare_on_disk() {
                Some(spare) if spare < bytes => {
                    self.give_back(blocks);
                    self.unlooked.store(0, Ordering::Relaxed);
                    return Err(NoRoom::Disk);
                }
                // Close to the end every block is looked at.
                Some(spare) => {
                    let safe = i64::try_from(spare / BLOCK_SIZE_U64 / 8).unwrap_or(i64::MAX);
                    self.unlooked.store(safe.min(BETWEEN_LOOKS), Ordering::Relaxed);
                }
                None => {}
            }
        }
        Ok(())
    }

    /// Counts blocks that were staged before this mount, whatever the limit.
    pub(crate) fn count(&self, blocks: u64) {
        self.staged.fetch_add(blocks * BLOCK_SIZE_U64, Ordering::Relaxed);
    }

    pub(crate) fn give_back(&self, blocks: u64) {
        self.staged.fetch_sub(blocks * BLOCK_SIZE_U64, Ordering::Relaxed);
    }

    /// Bytes that are staged.
    pub fn staged(&self) -> u64 {
        self.staged.load(Ordering::Relaxed)
    }

    /// Bytes that may still be staged; `None` if the file system does not tell.
    pub(crate) fn spare(&self) -> Option<u64> {
        let spare = self.spare_on_disk()?;
        Some(spare.min(self.limit.saturating_sub(self.staged())))
    }

    fn spare_on_disk(&self) -> Option<u64> {
        let disk = nix::sys::statvfs::statvfs(&self.path).ok()?;
        let unit = disk.fragment_size();
        let reserve = (disk.blocks() * unit / 20).min(RESERVE);
        Some((disk.blocks_available() * unit).saturating_sub(reserve))
    }
}

fn lock(
    path: &Path,
    failed: impl Fn(io::Error) -> Unusable,
    taken: impl Fn(String) -> Unusable,
) -> Result<Flock<File>, Unusable> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = own::open(path, &mut options).map_err(&failed)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, Errno::EWOULDBLOCK)) => {
            Err(taken("another mount uses it; unmount that, or give another --staging".to_owned()))
        }
        Err((_, error)) => Err(failed(error.into())),
    }
}

/// The files of one generation.
#[derive(Debug)]
pub(crate) struct Files {
    pub(crate) id: Uuid,
    pub(crate) data: File,
    pub(crate) map: Mutex<map::MapFile>,
    /// 32 bytes a block: the SHA-256 of those that are vouched for.
    sums: File,
    paths: [PathBuf; 3],
    /// Blocks that were seen to be what their sums say.
    checked: Mutex<RoaringBitmap>,
}

impl Files {
    /// New files, for an image of `len` bytes.
    pub(crate) fn create(image: &Path, len: u64) -> io::Result<Arc<Self>> {
        let id = Uuid::new_v4();
        let paths = paths(image, id);
        let [data_path, map_path, sums_path] = &paths;
        let mut options = File::options();
        options.read(true).write(true).create_new(true).mode(0o600);
        let data = options.open(data_path)?;
        set_len(&data, len)?;
        let sums = options.open(sums_path)?;
        let map = map::MapFile::create(map_path, id)?;
        Ok(Arc::new(Self { id, data, map: map.into(), sums, paths, checked: Mutex::default() }))
    }

    /// The files of a generation from an earlier mount, in the `same_run` of the machine or not, and
    /// what its map says.
    pub(crate) fn open(
        image: &Path,
        id: Uuid,
        same_run: bool,
        over_data: bool,
    ) -> Result<(Arc<Self>, map::Marks), map::Unusable> {
        let paths = paths(image, id);
        let [data_path, map_path, sums_path] = &paths;
        let (map, marks, data_len) = map::MapFile::open(map_path, id, same_run, over_data)?;
        let data = own::open(data_path, File::options().read(true).write(true))?;
        let sums = own::open(sums_path, File::options().read(true).write(true))?;
        if data.metadata()?.len() < data_len {
            return Err(map::Unusable::Damaged("its data was cut off"));
        }
        let strays = files::strays(&data, &marks)?;
        let files = Self { id, data, map: map.into(), sums, paths, checked: Mutex::default() };
        // A data file that is another one's must not lose anything by what this map says.
        if !strays.is_empty() {
            // What another run did not sync may be missing: that is no reason to refuse the rest.
            let (_, synced, _) = map::MapFile::open(&files.paths[1], id, same_run, true)?;
            for index in &marks.hashed & &synced.hashed {
                if !files.is_vouched_for(index)? {
                    return Err(map::Unusable::Damaged("a block is not what was written"));
                }
            }
        }
        files.lock_map().trim()?;
        // A crash may have left bytes that no record speaks of; what is written next to them would
        // bring them to light.
        for stray in strays {
            files::punch(&files.data, stray.start, stray.end)?;
        }
        Ok((Arc::new(files), marks))
    }

    fn lock_map(&self) -> std::sync::MutexGuard<'_, map::MapFile> {
        self.map.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) fn append(&self, records: &[map::Record]) -> io::Result<()> {
        self.lock_map().append(records)
    }

    /// Notes the SHA-256 of a block, to be vouched for by a record of the map.
    pub(crate) fn write_sum(&self, index: u32, sum: Digest) -> io::Result<()> {
        self.sums.write_all_at(&sum.0, u64::from(index) * 32)
    }

    /// The SHA-256 that was noted of a block.
    pub(crate) fn read_sum(&self, index: u32) -> io::Result<Digest> {
        let mut sum = [0; 32];
        self.sums.read_exact_at(&mut sum, u64::from(index) * 32)?;
        Ok(Digest(sum))
    }

    /// Whether a block is what its sum says, which the map vouches for.
    pub(crate) fn is_vouched_for(&self, index: u32) -> io::Result<bool> {
        let mut buffer = BlockBuffer::block();
        files::read_padded(&self.data, &mut buffer, BlockIndex(index).offset())?;
        self.is_sum(index, Block::new(buffer.freeze()).digest())
    }

    /// The same, and true without looking again if it was so before.
    pub(crate) fn was_vouched_for(&self, index: u32) -> io::Result<bool> {
        let checked = || self.checked.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if checked().contains(index) {
            return Ok(true);
        }
        let is_as_written = self.is_vouched_for(index)?;
        if is_as_written {
            checked().insert(index);
        }
        Ok(is_as_written)
    }

    /// Whether this is the sum of a block, as it was noted.
    pub(crate) fn is_sum(&self, index: u32, sum: Digest) -> io::Result<bool> {
        match self.read_sum(index) {
            // The sums were cut off.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            noted => Ok(noted? == sum),
        }
    }

    /// Makes data, sums and map durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        // What somebody appends meanwhile is not vouched for.
        let len = self.data.metadata()?.len();
        self.data.sync_data()?;
        self.sums.sync_data()?;
        self.lock_map().sync(len)
    }

    /// Changes the length of the data.
    pub(crate) fn set_len(&self, len: u64) -> io::Result<()> {
        if len < self.data.metadata()?.len() {
            // First the map, which vouches for a length.
            self.lock_map().sync(len)?;
        }
        set_len(&self.data, len)
    }

    /// Removes the files.
    pub(crate) fn remove(&self) {
        for path in &self.paths {
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!("{} is of no use any more, and stays: {error}", path.display());
            }
        }
    }
}

/// Changes the length of a file, if it has another one: ext4 writes a file that was ever cut to nothing to the
/// disk when it is closed, also if nothing can ever read it again.
fn set_len(file: &File, len: u64) -> io::Result<()> {
    if file.metadata()?.len() == len { Ok(()) } else { file.set_len(len) }
}

fn paths(image: &Path, id: Uuid) -> [PathBuf; 3] {
    ["data", "map", "sums"].map(|kind| image.join(format!("{id}.{kind}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_staging_is_told_with_the_place_of_its_store() {
        let root = tempfile::tempdir().unwrap();
        let kept = || Staging::kept(root.path());
        let open =
            |n: u32| Staging::open_default(root.path(), &format!("repository {n}"), u64::MAX);
        let url = |path: &str| StoreUrl::Directory(path.into());
        let staging = open(1).unwrap();
        staging.note_url(&url("/mnt/a"));
        staging.note_url(&url("/mnt/b"));
        staging.new_image().unwrap();
        drop(open(2).unwrap());
        assert!(kept().is_empty(), "it is in use, or nothing is in it");
        let path = staging.path().to_owned();
        drop(staging);
        let text = kept()[0].to_string();
        let place = path.display();
        let expected =
            format!("1 image is staged for repository 1, which was file:///mnt/b, in {place}");
        assert_eq!((kept().len(), text), (1, expected));
        let refused = Staging::open(&path, "repository 2", u64::MAX).unwrap_err().to_string();
        assert!(refused.contains("repository 1 (file:///mnt/b)"), "{refused}");
        assert_eq!(open(1).unwrap().images().unwrap().len(), 1);
    }
}
