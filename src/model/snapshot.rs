//! What is known of a snapshot without reading a block.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{BLOCK_SIZE_U64, Digest, SnapshotId, VolumeSize};

/// The tags of a snapshot, by key.
pub type Tags = BTreeMap<String, String>;

/// The tag that names a snapshot for people, as in the EC2 console.
pub const NAME_TAG: &str = "Name";

/// The tag that remembers the length in bytes of the file that a snapshot was made from.
///
/// A volume is a whole number of GiB, a file is not: without this the round trip would append zeros.
pub const LENGTH_TAG: &str = "fspfs:length";

/// The tag that remembers the id of the snapshot that a snapshot is a copy of.
pub const ORIGIN_TAG: &str = "fspfs:origin";

/// The tag of a snapshot in a store that keeps no digests: its own id and its content digest. Under another id it says
/// nothing, since tags are copied.
pub const DIGEST_TAG: &str = "fspfs:digest";

/// Tags that a snapshot may have at most (EC2 quota).
pub const MAX_TAGS: usize = 50;
/// Longest tag key in characters (EBS direct service model).
pub const MAX_TAG_KEY_CHARS: usize = 127;
/// Longest tag value in characters (EBS direct service model).
pub const MAX_TAG_VALUE_CHARS: usize = 255;
/// Longest description in characters (EBS direct service model).
pub const MAX_DESCRIPTION_CHARS: usize = 255;

/// Tags that no snapshot can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTags {
    /// More than [`MAX_TAGS`].
    #[error("{0} tags are too many: a snapshot has at most {MAX_TAGS}")]
    TooMany(usize),
    /// A key that is empty, too long or holds a NUL.
    #[error(
        "the tag key {0:?} is not valid: it has 1 to {MAX_TAG_KEY_CHARS} characters, none of them NUL"
    )]
    Key(String),
    /// A value that is too long or holds a NUL.
    #[error(
        "the value of the tag {0:?} is not valid: it has at most {MAX_TAG_VALUE_CHARS} characters, none of them NUL"
    )]
    Value(String),
}

/// Checks `tags` against the limits of the service.
pub fn check_tags(tags: &Tags) -> Result<(), InvalidTags> {
    if tags.len() > MAX_TAGS {
        return Err(InvalidTags::TooMany(tags.len()));
    }
    for (key, value) in tags {
        if key.is_empty() || key.chars().count() > MAX_TAG_KEY_CHARS || key.contains('\0') {
            return Err(InvalidTags::Key(key.clone()));
        }
        if value.chars().count() > MAX_TAG_VALUE_CHARS || value.contains('\0') {
            return Err(InvalidTags::Value(key.clone()));
        }
    }
    Ok(())
}

/// Where a snapshot is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotState {
    /// Being written: its blocks cannot be read.
    Pending,
    /// Complete and immutable.
    Completed,
    /// Complete, and in an archive: it has to be restored before it can be read.
    Archived,
    /// Failed, or damaged: nothing of it can be read.
    Error,
}

impl SnapshotState {
    /// The state in the words of the service.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Completed => "completed",
            Self::Archived => "archived",
            Self::Error => "error",
        }
    }
}

/// A snapshot, as a store describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its name in the store.
    pub id: SnapshotId,
    /// Where it is in its life.
    pub state: SnapshotState,
    /// Why it is in that state, where the store says.
    pub state_message: Option<String>,
    /// Size of the volume that it is an image of.
    #[serde(rename = "volume_size_gib")]
    pub volume_size: VolumeSize,
    /// The snapshot that it was started from.
    pub parent: Option<SnapshotId>,
    /// The first ancestor's id, or its own: snapshots of one lineage can be compared.
    pub lineage: Option<SnapshotId>,
    /// The volume that it was taken of, where there is one.
    pub volume_id: Option<String>,
    /// Text of whoever made it.
    pub description: String,
    /// When it was started.
    pub start_time: Timestamp,
    /// When it was completed, where the store tells.
    pub completion_time: Option<Timestamp>,
    /// Its tags.
    pub tags: Tags,
    /// Whether the store keeps it encrypted.
    pub encrypted: bool,
    /// The digest of its whole content, where the store keeps one.
    pub content_digest: Option<Digest>,
    /// Blocks that hold data, where the store tells without listing. Where `zero_blocks` is `None`,
    /// those that were written with zeros are among them.
    pub data_blocks: Option<u64>,
    /// Blocks that were written with zeros, where the store tells without listing.
    pub zero_blocks: Option<u64>,
}

impl Snapshot {
    /// Length of the image in bytes: that of the file it was made from where [`LENGTH_TAG`] says
    /// one that fits the volume, else the size of the volume.
    pub fn image_len(&self) -> u64 {
        self.tags
            .get(LENGTH_TAG)
            .filter(|length| length.bytes().all(|byte| byte.is_ascii_digit()))
            .and_then(|length| length.parse().ok())
            .filter(|&length| VolumeSize::holding(length) == Ok(self.volume_size))
            .unwrap_or_else(|| self.volume_size.bytes())
    }

    /// The content digest that a tag tells, if that was made for this snapshot.
    pub fn noted_digest(&self) -> Option<Digest> {
        let (id, digest) = self.tags.get(DIGEST_TAG)?.split_once(' ')?;
        (id == self.id.as_str()).then(|| Digest::from_hex(digest)).flatten()
    }

    /// The name that people gave it.
    pub fn name(&self) -> Option<&str> {
        self.tags.get(NAME_TAG).map(String::as_str).filter(|name| !name.is_empty())
    }

    /// Whether its blocks can be read.
    pub fn is_readable(&self) -> bool {
        self.state == SnapshotState::Completed
    }

    /// Bytes that its data takes, in whole blocks; `None` until that is known.
    pub fn data_bytes(&self) -> Option<u64> {
        self.data_blocks.map(|blocks| blocks * BLOCK_SIZE_U64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::GIB;

    fn snapshot(length: &str) -> Snapshot {
        Snapshot {
            id: "snap-0a".parse().unwrap(),
            state: SnapshotState::Completed,
            state_message: None,
            volume_size: VolumeSize::from_gib(2).unwrap(),
            parent: None,
            lineage: None,
            volume_id: None,
            description: String::new(),
            start_time: Timestamp::UNIX_EPOCH,
            completion_time: None,
            tags: Tags::from([(LENGTH_TAG.to_owned(), length.to_owned())]),
            encrypted: false,
            content_digest: None,
            data_blocks: None,
            zero_blocks: None,
        }
    }

    #[test]
    fn a_length_that_does_not_fit_the_volume_is_ignored() {
        assert_eq!(snapshot(&(GIB + 1).to_string()).image_len(), GIB + 1);
        assert_eq!(snapshot(&(2 * GIB).to_string()).image_len(), 2 * GIB);
        for bad in
            ["", "0", "x", "+2147483648", "1073741824", "2147483649", "-1", "99999999999999999999"]
        {
            assert_eq!(snapshot(bad).image_len(), 2 * GIB, "{bad:?}");
        }
    }

    #[test]
    fn tags_have_limits() {
        let tags = |key: &str, value: &str| Tags::from([(key.to_owned(), value.to_owned())]);
        assert!(check_tags(&tags("a/b\n..", &"ü".repeat(255))).is_ok());
        assert!(check_tags(&tags("", "x")).is_err());
        assert!(check_tags(&tags(&"k".repeat(128), "x")).is_err());
        assert!(check_tags(&tags("k", &"v".repeat(256))).is_err());
        assert!(check_tags(&tags("k", "a\0b")).is_err());
        let many: Tags = (0..51).map(|n| (n.to_string(), String::new())).collect();
        assert_eq!(check_tags(&many), Err(InvalidTags::TooMany(51)));
    }
}
