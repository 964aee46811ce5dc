//! The names of the objects of a repository.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::model::{Digest, SnapshotId};

pub(super) const INFO: &str = "fspfs.json";
pub(super) const SNAPSHOTS: &str = "snapshots/";
pub(super) const TAGS: &str = "tags/";
pub(super) const PAGES: &str = "pages/";
pub(super) const PACKS: &str = "packs/";
pub(super) const PENDING: &str = "pending/";
pub(super) const GC: &str = "gc/";

/// The id of a page, page list or pack: its digest, and who wrote it.
///
/// The writer keeps anyone from adopting another's garbage: equal objects of two writers are two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct ObjectId {
    pub(super) digest: Digest,
    pub(super) writer: Uuid,
}

impl ObjectId {
    /// Bytes of the binary form: the digest and the writer.
    pub(super) const LEN: usize = 48;

    pub(super) fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..32].copy_from_slice(&self.digest.0);
        bytes[32..].copy_from_slice(self.writer.as_bytes());
        bytes
    }

    /// Reads the binary form.
    ///
    /// # Panics
    ///
    /// If there are not exactly [`Self::LEN`] bytes.
    pub(super) fn from_bytes(bytes: &[u8]) -> Self {
        let (digest, writer) = bytes.split_at(32);
        Self {
            digest: Digest(digest.try_into().expect("32 bytes")),
            writer: Uuid::from_bytes(writer.try_into().expect("16 bytes")),
        }
    }

    pub(super) fn pack_name(self) -> String {
        format!("{PACKS}{}/{self}", &self.digest.to_hex()[..2])
    }

    pub(super) fn page_name(self) -> String {
        format!("{PAGES}{}/{self}", &self.digest.to_hex()[..2])
    }

    /// Reads the name of an object below `prefix`; `None` if it is not ours.
    pub(super) fn from_name(prefix: &str, name: &str) -> Option<Self> {
        let (shard, id) = name.strip_prefix(prefix)?.split_once('/')?;
        (id.starts_with(shard) && shard.len() == 2).then(|| id.parse().ok()).flatten()
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.digest, self.writer.simple())
    }
}

impl FromStr for ObjectId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let id = text.split_once('.').and_then(|(digest, writer)| {
            Some(Self { digest: Digest::from_hex(digest)?, writer: parse_simple(writer)? })
        });
        id.ok_or_else(|| format!("{text:?} is not the id of an object"))
    }
}

impl TryFrom<String> for ObjectId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<ObjectId> for String {
    fn from(id: ObjectId) -> Self {
        id.to_string()
    }
}

/// Reads a number in the one form in which it is written.
fn parse_number<T: FromStr + ToString>(text: &str) -> Option<T> {
    text.parse().ok().filter(|number: &T| number.to_string() == text)
}

fn parse_simple(text: &str) -> Option<Uuid> {
    Uuid::try_parse(text).ok().filter(|uuid| uuid.simple().to_string() == text)
}

/// Whether this is the name of a document, be it one of ours or not.
pub(super) fn is_document(name: &str) -> bool {
    name.strip_suffix(".json").is_some()
}

/// The manifest of a snapshot.
pub(super) fn manifest(id: &SnapshotId) -> String {
    format!("{SNAPSHOTS}{id}.json")
}

/// The snapshot whose manifest has this name.
pub(super) fn manifest_id(name: &str) -> Option<SnapshotId> {
    name.strip_prefix(SNAPSHOTS)?.strip_suffix(".json")?.parse().ok()
}

/// What a pending snapshot was started with.
pub(super) fn start(id: &SnapshotId) -> String {
    format!("{PENDING}{id}/start.json")
}

/// The snapshot whose start has this name.
pub(super) fn start_id(name: &str) -> Option<SnapshotId> {
    name.strip_prefix(PENDING)?.strip_suffix("/start.json")?.parse().ok()
}

/// What one attempt at a snapshot has put.
pub(super) fn attempt(id: &SnapshotId, attempt: Uuid) -> String {
    format!("{PENDING}{id}/{}/", attempt.simple())
}

/// Says that a completion of an attempt is about to decide which records count.
pub(super) fn closing(id: &SnapshotId, attempt: Uuid) -> String {
    format!("{}closing", self::attempt(id, attempt))
}

/// Says which records of an attempt count.
pub(super) fn sealed(id: &SnapshotId, attempt: Uuid) -> String {
    format!("{}sealed", self::attempt(id, attempt))
}

/// Where the writers of an attempt make themselves known that put one block after another durably.
pub(super) fn writers(id: &SnapshotId, attempt: Uuid) -> String {
    format!("{}writers/", self::attempt(id, attempt))
}

/// Makes a writer known.
pub(super) fn writer(id: &SnapshotId, attempt: Uuid, writer: Uuid) -> String {
    format!("{}{}", writers(id, attempt), writer.simple())
}

/// Whether this is the name of a record, of what closes or seals them, or of a writer.
pub(super) fn is_of_attempt(name: &str) -> bool {
    let mut parts = name.strip_prefix(PENDING).into_iter().flat_map(|rest| rest.split('/'));
    let id = parts.next().and_then(|id| id.parse().ok());
    let (Some(id), Some(attempt)) = (id, parts.next().and_then(parse_simple)) else { return false };
    name == sealed(&id, attempt)
        || name == closing(&id, attempt)
        || RecordId::from_name(&id, attempt, name).is_some()
        || name.strip_prefix(&writers(&id, attempt)).is_some_and(|w| parse_simple(w).is_some())
}

/// A record: blocks that one writer has put durably.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct RecordId {
    pub(super) epoch: u32,
    pub(super) writer: Uuid,
    pub(super) number: u32,
}

impl RecordId {
    pub(super) fn name(self, id: &SnapshotId, attempt: Uuid) -> String {
        let Self { epoch, writer, number } = self;
        format!("{}{epoch}-{}-{number}", self::attempt(id, attempt), writer.simple())
    }

    /// Reads the name of a record of this attempt.
    pub(super) fn from_name(id: &SnapshotId, attempt: Uuid, name: &str) -> Option<Self> {
        let mut parts = name.strip_prefix(&self::attempt(id, attempt))?.split('-');
        let record = Self {
            epoch: parse_number(parts.next()?)?,
            writer: parse_simple(parts.next()?)?,
            number: parse_number(parts.next()?)?,
        };
        parts.next().is_none().then_some(record)
    }
}

/// A set of tags of a snapshot, of which the one with the highest number is valid.
///
/// The attempt is that of the snapshot: what was left of an earlier one of the same id is not its own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct TagsId {
    pub(super) id: SnapshotId,
    pub(super) attempt: Uuid,
    pub(super) number: u64,
}

impl TagsId {
    pub(super) fn name(&self) -> String {
        format!("{}{}.json", all_tags(&self.id, self.attempt), self.number)
    }

    pub(super) fn from_name(name: &str) -> Option<Self> {
        let mut parts = name.strip_prefix(TAGS)?.strip_suffix(".json")?.split('/');
        let tags = Self {
            id: parts.next()?.parse().ok()?,
            attempt: parse_simple(parts.next()?)?,
            number: parse_number(parts.next()?)?,
        };
        parts.next().is_none().then_some(tags)
    }
}

/// All sets of tags of a snapshot.
pub(super) fn all_tags(id: &SnapshotId, attempt: Uuid) -> String {
    format!("{TAGS}{id}/{}/", attempt.simple())
}

/// The record of a collection.
pub(super) fn found(time: Timestamp) -> String {
    format!("{GC}{}.json", time.as_nanosecond())
}

/// Whether this is the name of the record of a collection.
pub(super) fn is_found(name: &str) -> bool {
    let number = name.strip_prefix(GC).and_then(|rest| rest.strip_suffix(".json"));
    number.is_some_and(|number| parse_number::<i128>(number).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        let snapshot: SnapshotId = "snap-0123456789abcdef0".parse().unwrap();
        let uuid = Uuid::new_v4();
        let object = ObjectId { digest: Digest::OF_ZEROS, writer: uuid };
        assert_eq!(ObjectId::from_name(PACKS, &object.pack_name()), Some(object));
        assert_eq!(ObjectId::from_name(PAGES, &object.page_name()), Some(object));
        assert_eq!(ObjectId::from_bytes(&object.to_bytes()), object);
        assert_eq!(manifest_id(&manifest(&snapshot)), Some(snapshot.clone()));
        assert_eq!(start_id(&start(&snapshot)), Some(snapshot.clone()));
        let tags = TagsId { id: snapshot.clone(), attempt: uuid, number: 17 };
        assert_eq!(TagsId::from_name(&tags.name()), Some(tags));
        assert!(is_found(&found(Timestamp::UNIX_EPOCH)));
        let record = RecordId { epoch: 3, writer: uuid, number: 12 };
        let name = record.name(&snapshot, uuid);
        assert_eq!(RecordId::from_name(&snapshot, uuid, &name), Some(record));
        for name in [name, closing(&snapshot, uuid), sealed(&snapshot, uuid)] {
            assert!(is_of_attempt(&name), "{name}");
        }
    }

    #[test]
    fn foreign_names_are_no_object_names() {
        for name in ["packs/07/readme", "packs/lost+found", "packs/zz/x.y", "packs/x"] {
            assert_eq!(ObjectId::from_name(PACKS, name), None, "{name}");
        }
        for name in ["snapshots/x.json", "snapshots/snap-0.json~", "snapshots/.snap-0.json"] {
            assert_eq!(manifest_id(name), None, "{name}");
        }
        let attempt = "0123456789abcdef0123456789abcdef";
        for name in
            ["x/sealed", &format!("{attempt}/1-{attempt}-01"), &format!("{attempt}/sub/sealed")]
        {
            assert!(!is_of_attempt(&format!("pending/snap-0/{name}")), "{name}");
        }
        assert!(is_of_attempt(&format!("pending/snap-0/{attempt}/1-{attempt}-1")));
        assert!(!is_found("gc/+7.json") && !is_found("gc/x.json") && !is_found("gc/a/7.json"));
        assert_eq!(TagsId::from_name(&format!("tags/snap-0/{attempt}/+7.json")), None);
        assert_eq!(start_id("pending/snap-0/x/start.json"), None);
    }
}
