//! What a repository keeps of a snapshot besides its blocks.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::names::ObjectId;
use crate::model::{Digest, Snapshot, SnapshotId, SnapshotState, Tags, VolumeSize};
use crate::store::StartRequest;

/// Bytes of a manifest at most, so that one read gets it.
pub(super) const MAX_MANIFEST_LEN: usize = 4096;

/// What a snapshot was started with, and keeps for ever.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Metadata {
    pub(super) id: SnapshotId,
    /// Names the attempt that made it: an id that is used again gets another one.
    pub(super) attempt: Uuid,
    #[serde(rename = "volume_size_gib")]
    pub(super) volume_size: VolumeSize,
    pub(super) parent: Option<SnapshotId>,
    pub(super) lineage: SnapshotId,
    pub(super) volume_id: Option<String>,
    pub(super) origin: Option<String>,
    pub(super) description: String,
    pub(super) start_time: Timestamp,
    pub(super) client_token: Option<String>,
}

/// `pending/<snap-id>/start.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Start {
    #[serde(flatten)]
    pub(super) metadata: Metadata,
    /// The parent's page list, which this keeps alive; `None` without a parent, or if it is empty.
    pub(super) parent_pages: Option<ObjectId>,
    /// How long it may be left alone; `None` for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) timeout_minutes: Option<u32>,
}

/// `snapshots/<snap-id>.json`: a completed snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    #[serde(flatten)]
    pub(super) metadata: Metadata,
    pub(super) completed_time: Timestamp,
    pub(super) content_digest: Digest,
    pub(super) data_blocks: u64,
    pub(super) zero_blocks: u64,
    /// Its page list; `None` if it has no block at all.
    pub(super) pages: Option<ObjectId>,
}

impl Metadata {
    fn snapshot(&self, state: SnapshotState, tags: Tags) -> Snapshot {
        Snapshot {
            id: self.id.clone(),
            state,
            state_message: None,
            volume_size: self.volume_size,
            parent: self.parent.clone(),
            lineage: Some(self.lineage.clone()),
            volume_id: self.volume_id.clone(),
            description: self.description.clone(),
            start_time: self.start_time,
            completion_time: None,
            tags,
            encrypted: false,
            content_digest: None,
            data_blocks: None,
            zero_blocks: None,
        }
    }

    /// Whether it was started with the same client token, and for the same.
    pub(super) fn is_of(&self, other: &StartRequest) -> bool {
        let Self { volume_size, parent, volume_id, origin, description, client_token, .. } = self;
        client_token.is_some()
            && *client_token == other.client_token
            && (volume_size, parent, volume_id, origin, description)
                == (
                    &other.volume_size,
                    &other.parent,
                    &other.volume_id,
                    &other.origin,
                    &other.description,
                )
    }
}

impl Start {
    pub(super) fn snapshot(&self, tags: Tags) -> Snapshot {
        self.metadata.snapshot(SnapshotState::Pending, tags)
    }
}

impl Manifest {
    pub(super) fn snapshot(&self, tags: Tags) -> Snapshot {
        Snapshot {
            content_digest: Some(self.content_digest),
            data_blocks: Some(self.data_blocks),
            zero_blocks: Some(self.zero_blocks),
            completion_time: Some(self.completed_time),
            ..self.metadata.snapshot(SnapshotState::Completed, tags)
        }
    }
}
