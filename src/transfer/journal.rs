//! What of a transfer is done, for a later run that goes on with it.
//!
//! A journal is a directory, named by a digest of the operation and its ends. `transfer.json` says what was begun.
//! `blocks` has a slot of 40 bytes for each block of the volume: the SHA-256 of what was brought there durably, and
//! a check that ties it to its place and to what was begun. A slot that was torn, or is of another attempt, counts
//! for nothing.

use std::fmt::{self, Debug, Display, Formatter};
use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Error, Result};
use crate::model::{BlockIndex, Digest, SnapshotId};
use crate::own;
use crate::store::{ErrorKind, document};

/// The version of what is written here.
const FORMAT: u32 = 1;

const DOCUMENT: &str = "transfer.json";
const BLOCKS: &str = "blocks";
/// There once all was brought.
const FINISHING: &str = "finishing";
const SLOT: usize = 40;

/// In the place of a digest: the block was about to be brought. Nothing has this SHA-256.
const BEGUN: Digest = Digest([0; 32]);

/// Knows what an earlier run has brought to a sink; by default nothing, and there is no going on.
pub(crate) trait Journal: Debug + Send + Sync + 'static {
    /// The SHA-256 of what was brought to a block durably, if anything was.
    fn digest(&self, index: BlockIndex) -> Option<Digest> {
        let _ = index;
        None
    }

    /// Whether an earlier run was about to bring something to a block, and may have.
    fn was_begun(&self, index: BlockIndex) -> bool {
        let _ = index;
        false
    }

    /// Learns of a block that is about to be brought, of a source that may have another one in a later run.
    fn beginning(&self, index: BlockIndex) {
        let _ = index;
    }

    /// Learns that nothing had to be brought to a block that was about to be.
    fn spared(&self, index: BlockIndex) {
        let _ = index;
    }

    /// Learns of a block that was brought, and is not durable yet: a later run of this process has it.
    fn taken(&self, index: BlockIndex) {
        let _ = index;
    }

    /// Learns that all was brought, and the sink is about to be finished.
    fn finishing(&self) {}

    /// Whether an earlier run was about to finish the sink, and may have.
    fn was_finishing(&self) -> bool {
        false
    }

    /// Notes what was brought durably.
    ///
    /// # Errors
    ///
    /// If the transfer must not go on without that being noted.
    fn note(&self, blocks: &[(BlockIndex, Digest)]) -> Result<()> {
        let _ = blocks;
        Ok(())
    }

    /// Whether there is one, and a later run may go on.
    fn is_kept(&self) -> bool {
        false
    }

    /// Whether a later run may go on after this error.
    fn outlasts(&self, error: &Error) -> bool {
        self.is_kept() && error.could_go_on()
    }

    /// Forgets everything: there is nothing to go on with.
    fn forget(&self) {}
}

/// No journal: there is no going on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NoJournal;

impl Journal for NoJournal {}

/// A path as it is told from others, also if it is no text.
pub(crate) fn name_of(path: &Path) -> String {
    let escaped = || path.as_os_str().as_bytes().escape_ascii().to_string();
    path.to_str().map_or_else(escaped, str::to_owned)
}

/// What is transferred where: the name of its journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ends {
    pub(crate) operation: String,
    pub(crate) from: String,
    pub(crate) to: String,
}

impl Display for Ends {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "the {} of {} to {}", self.operation, self.from, self.to)
    }
}

/// `transfer.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Document<T = serde_json::Value> {
    format: u32,
    ends: Ends,
    /// Ties the slots to this attempt.
    salt: Uuid,
    attempt: T,
}

/// A journal in a directory.
#[derive(Debug)]
pub(crate) struct FileJournal {
    directory: PathBuf,
    ends: Ends,
    /// Ties the slots to this attempt.
    salt: Uuid,
    blocks: File,
    /// Slots of an earlier run may be there.
    is_old: bool,
    /// Nothing can be noted any more.
    is_full: AtomicBool,
    /// What was begun is on record.
    is_kept: bool,
    /// An earlier run has sent the completion, and may have been heard.
    was_finishing: bool,
    /// There is nothing to go on with.
    is_forgotten: AtomicBool,
}

impl FileJournal {
    /// The journal of a transfer under `root`, and what was begun, if anything was. Whoever begins anew (`restart`)
    /// takes a damaged one for none.
    ///
    /// # Errors
    ///
    /// If it cannot be made, is that of another process, or is damaged.
    pub(crate) fn open<T: DeserializeOwned>(
        root: &Path,
        ends: Ends,
        restart: bool,
    ) -> Result<(Self, Option<T>)> {
        let name = Digest::of(&serde_json::to_vec(&ends).expect("it has string keys only"));
        let directory = root.join(&name.to_hex()[..32]);
        let failed = |e| Error::io("keep a journal in", &directory, e);
        own::make(root).and_then(|()| own::make(&directory)).map_err(failed)?;
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let blocks = own::open(&directory.join(BLOCKS), &mut options).map_err(failed)?;
        blocks.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => {
                Error::unsuitable(&directory, format!("another process is at {ends}"))
            }
            TryLockError::Error(error) => failed(error),
        })?;
        // Whoever had it before may have removed it meanwhile.
        let here = std::fs::metadata(directory.join(BLOCKS)).map(|found| found.ino()).ok();
        if here != Some(blocks.metadata().map_err(failed)?.ino()) {
            return Err(Error::unsuitable(&directory, "another process was at it; try again"));
        }
        let found = match own::read(&directory.join(DOCUMENT)) {
            Ok(bytes) => match read(&directory, &ends, &bytes) {
                Err(error) if restart => {
                    tracing::warn!("{error}: `fspfs list` shows what an earlier run may have left");
                    None
                }
                found => Some(found?),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        let journal = Self {
            salt: found.as_ref().map_or_else(Uuid::new_v4, |(salt, _)| *salt),
            is_old: found.is_some(),
            is_full: AtomicBool::new(false),
            is_kept: true,
            was_finishing: directory.join(FINISHING).exists(),
            is_forgotten: AtomicBool::new(false),
            directory,
            ends,
            blocks,
        };
        Ok((journal, found.map(|(_, attempt)| attempt)))
    }

    /// Begins anew with this attempt: nothing is done. If that cannot be written there is no going on.
    pub(crate) fn begin<T: Serialize>(&mut self, attempt: &T) {
        (self.salt, self.is_old, self.was_finishing) = (Uuid::new_v4(), false, false);
        let finishing = match std::fs::remove_file(self.directory.join(FINISHING)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        let begun = finishing.and_then(|()| self.blocks.set_len(0));
        if let Err(error) = begun.and_then(|()| self.write(attempt)) {
            self.is_kept = false;
            let place = self.directory.display();
            tracing::warn!(
                "there is no journal, and if this stops it begins anew: {place}: {error}"
            );
        }
    }

    /// Notes more of the same attempt.
    pub(crate) fn update<T: Serialize>(&self, attempt: &T) {
        if self.is_kept()
            && let Err(error) = self.write(attempt)
        {
            // What was begun is found by its client token, too.
            tracing::warn!("cannot write to {}: {error}", self.directory.display());
        }
    }

    fn write<T: Serialize>(&self, attempt: &T) -> io::Result<()> {
        let (ends, salt) = (self.ends.clone(), self.salt);
        let document = Document { format: FORMAT, ends, salt, attempt };
        let mut file = tempfile::NamedTempFile::new_in(&self.directory)?;
        io::Write::write_all(&mut file, &document::encode(&document))?;
        file.as_file().sync_data()?;
        file.persist(self.directory.join(DOCUMENT)).map_err(|e| e.error)?;
        File::open(&self.directory)?.sync_all()
    }

    /// Notes what an earlier run has brought, and did not note before it ended.
    pub(crate) fn catch_up(&self, blocks: &[(BlockIndex, Digest)]) {
        for (index, digest) in blocks {
            self.set(*index, *digest);
        }
    }

    /// What an earlier run has noted of a block.
    fn noted(&self, index: BlockIndex) -> Option<Digest> {
        if !self.is_old {
            return None;
        }
        let mut slot = [0; SLOT];
        self.blocks.read_exact_at(&mut slot, u64::from(index.0) * SLOT as u64).ok()?;
        let digest = Digest(slot[..32].try_into().expect("32 bytes"));
        (self.slot(index, digest) == slot).then_some(digest)
    }

    fn set(&self, index: BlockIndex, digest: Digest) {
        self.write_slot(index, &self.slot(index, digest));
    }

    fn write_slot(&self, index: BlockIndex, slot: &[u8; SLOT]) {
        if self.is_full.load(Ordering::Relaxed) {
            return;
        }
        let at = u64::from(index.0) * SLOT as u64;
        // The rest of the transfer is as good without it.
        if let Err(error) = self.blocks.write_all_at(slot, at)
            && !self.is_full.swap(true, Ordering::Relaxed)
        {
            let place = self.directory.display();
            tracing::warn!(
                "what is done from now on is done again if this stops: {place}: {error}"
            );
        }
    }

    fn slot(&self, index: BlockIndex, digest: Digest) -> [u8; SLOT] {
        let mut slot = [0; SLOT];
        slot[..32].copy_from_slice(&digest.0);
        let mut tied = self.salt.as_bytes().to_vec();
        tied.extend_from_slice(&index.0.to_le_bytes());
        tied.extend_from_slice(&digest.0);
        slot[32..].copy_from_slice(&Digest::of(&tied).0[..SLOT - 32]);
        slot
    }
}

/// The salt and the attempt of a document.
fn read<T: DeserializeOwned>(directory: &Path, ends: &Ends, bytes: &[u8]) -> Result<(Uuid, T)> {
    let bad = |why| Error::unsuitable(directory, format!("{why}; --restart begins anew"));
    let found: serde_json::Value =
        document::decode("the journal of an earlier run", bytes).map_err(|e| bad(e.to_string()))?;
    let format = found.get("format").and_then(serde_json::Value::as_u64);
    if format != Some(FORMAT.into()) {
        return Err(bad("the journal there is of another version of fspfs".to_owned()));
    }
    let found: Document<T> =
        serde_json::from_value(found).map_err(|e| bad(format!("the journal is damaged: {e}")))?;
    if found.ends != *ends {
        return Err(bad(format!("the journal there is of {}", found.ends)));
    }
    Ok((found.salt, found.attempt))
}

impl Journal for FileJournal {
    fn digest(&self, index: BlockIndex) -> Option<Digest> {
        self.noted(index).filter(|digest| *digest != BEGUN)
    }

    fn was_begun(&self, index: BlockIndex) -> bool {
        self.noted(index).is_some()
    }

    fn beginning(&self, index: BlockIndex) {
        self.set(index, BEGUN);
    }

    fn spared(&self, index: BlockIndex) {
        self.write_slot(index, &[0; SLOT]);
    }

    fn finishing(&self) {
        let mut options = File::options();
        options.write(true).create(true).truncate(false).mode(0o600);
        let made = own::open(&self.directory.join(FINISHING), &mut options);
        let made = made.and_then(|file| file.sync_all());
        if let Err(error) = made.and_then(|()| File::open(&self.directory)?.sync_all()) {
            tracing::warn!("cannot write to {}: {error}", self.directory.display());
        }
    }

    fn note(&self, blocks: &[(BlockIndex, Digest)]) -> Result<()> {
        self.catch_up(blocks);
        Ok(())
    }

    fn was_finishing(&self) -> bool {
        self.was_finishing
    }

    /// Of a completion that may have been heard the snapshot stays, whatever is answered to another one.
    fn outlasts(&self, error: &Error) -> bool {
        let may_be_whole = self.was_finishing && error.kind() == Some(ErrorKind::Conflict);
        self.is_kept() && (error.could_go_on() || may_be_whole)
    }

    fn is_kept(&self) -> bool {
        self.is_kept && !self.is_forgotten.load(Ordering::Relaxed)
    }

    fn forget(&self) {
        self.is_forgotten.store(true, Ordering::Relaxed);
        remove(&self.directory);
    }
}

fn remove(directory: &Path) {
    if let Err(error) = std::fs::remove_dir_all(directory) {
        tracing::warn!("{} is of no use any more, and stays: {error}", directory.display());
    }
}

/// Removes the journals of transfers that make the snapshot `id`: it is given up.
pub(crate) fn forget_snapshot(root: &Path, id: &SnapshotId) {
    let is_of_it = |directory: &Path| {
        own::check(directory).ok()?;
        let bytes = own::read(&directory.join(DOCUMENT)).ok()?;
        let document: Document = document::decode(DOCUMENT, &bytes).ok()?;
        Some(document.attempt.get("snapshot")?.as_str()? == id.as_str())
    };
    for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
        if is_of_it(&entry.path()) == Some(true) {
            remove(&entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(to: &str) -> Ends {
        Ends { operation: "upload".to_owned(), from: "/a".to_owned(), to: to.to_owned() }
    }

    fn open(root: &Path) -> Result<(FileJournal, Option<String>)> {
        FileJournal::open(root, ends("b"), false)
    }

    fn digest(n: u8) -> Digest {
        Digest::of(&[n])
    }

    #[test]
    fn a_later_run_finds_the_blocks_that_were_noted() {
        let root = tempfile::tempdir().unwrap();
        let (mut journal, found) = open(root.path()).unwrap();
        assert_eq!(found, None);
        journal.begin(&"first");
        for n in [0, 7, 200_000] {
            journal.note(&[(BlockIndex(n), digest(n as u8))]).unwrap();
            assert_eq!(journal.digest(BlockIndex(n)), None, "it is of this run");
        }
        let other = open(root.path()).unwrap_err().to_string();
        assert!(other.contains("another process"), "{other}");
        drop(journal);
        let (journal, found) = open(root.path()).unwrap();
        assert_eq!(found.as_deref(), Some("first"));
        assert_eq!(journal.digest(BlockIndex(7)), Some(digest(7)));
        assert_eq!(journal.digest(BlockIndex(200_000)), Some(digest(64)));
        assert_eq!(journal.digest(BlockIndex(6)), None);
        assert_eq!(journal.digest(BlockIndex(200_001)), None);
        journal.beginning(BlockIndex(8));
        journal.beginning(BlockIndex(10));
        journal.spared(BlockIndex(10));
        journal.finishing();
        drop(journal);
        let (mut journal, _) = open(root.path()).unwrap();
        assert!(journal.was_begun(BlockIndex(7)) && journal.was_begun(BlockIndex(8)));
        assert!(!journal.was_begun(BlockIndex(9)) && journal.was_finishing);
        assert!(!journal.was_begun(BlockIndex(10)));
        assert_eq!(journal.digest(BlockIndex(8)), None);
        journal.begin(&"second");
        assert!(!journal.was_finishing);
        drop(journal);
        let (journal, found) = open(root.path()).unwrap();
        assert_eq!((found.as_deref(), journal.digest(BlockIndex(7))), (Some("second"), None));
        journal.forget();
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_slot_that_is_torn_or_of_another_attempt_counts_for_nothing() {
        let root = tempfile::tempdir().unwrap();
        let (mut journal, _) = open(root.path()).unwrap();
        journal.begin(&"first");
        journal.note(&[(BlockIndex(1), digest(1)), (BlockIndex(2), digest(2))]).unwrap();
        let path = journal.directory.join(BLOCKS);
        let old = std::fs::read(&path).unwrap();
        for at in [40, 71, 72, 79] {
            let mut torn = old.clone();
            torn[at] ^= 1;
            std::fs::write(&path, torn).unwrap();
            journal.is_old = true;
            assert_eq!(journal.digest(BlockIndex(1)), None, "{at}");
            assert_eq!(journal.digest(BlockIndex(2)), Some(digest(2)), "{at}");
        }
        journal.begin(&"second");
        std::fs::write(&path, old).unwrap();
        journal.is_old = true;
        assert_eq!(journal.digest(BlockIndex(2)), None);
    }

    #[test]
    fn a_journal_that_cannot_be_used_is_told_with_its_cure() {
        let root = tempfile::tempdir().unwrap();
        let (mut journal, _) = open(root.path()).unwrap();
        journal.begin(&"first");
        let path = journal.directory.join(DOCUMENT);
        let bytes = std::fs::read(&path).unwrap();
        drop(journal);
        let told = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            open(root.path()).unwrap_err().to_string()
        };
        let other = |change: fn(&mut Document)| {
            let mut document: Document = document::decode("", &bytes).unwrap();
            change(&mut document);
            document::encode(&document)
        };
        for (bytes, says) in [
            (bytes[..20].to_vec(), "damaged"),
            (other(|d| d.format = 2).to_vec(), "another version"),
            (other(|d| d.ends.to = "c".to_owned()).to_vec(), "of the upload of /a to c"),
            (other(|d| d.attempt = 7.into()).to_vec(), "damaged"),
        ] {
            let told = told(&bytes);
            assert!(told.contains(says) && told.contains("--restart"), "{told}");
        }
        let (_, found) = FileJournal::open::<String>(root.path(), ends("b"), true).unwrap();
        assert_eq!(found, None);
    }

    #[test]
    fn the_journal_of_a_snapshot_that_is_deleted_goes() {
        let root = tempfile::tempdir().unwrap();
        let id = |n| format!("snap-{n:017}").parse::<SnapshotId>().unwrap();
        for n in 0..2 {
            let (mut journal, _) =
                FileJournal::open::<serde_json::Value>(root.path(), ends(&n.to_string()), false)
                    .unwrap();
            journal.begin(&serde_json::json!({ "snapshot": id(n) }));
        }
        forget_snapshot(root.path(), &id(1));
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1);
        forget_snapshot(&root.path().join("none"), &id(0));
    }
}
