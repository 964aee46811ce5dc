//! What is kept of a working image beside its data: one small document.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::files;
use super::lost::Lost;
use crate::model::{SnapshotId, Tags};
use crate::own;
use crate::store::document;

/// Name of the document in the directory of its image.
pub(crate) const RECORD: &str = "image.json";

/// What the image is: the content of `image.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ImageRecord {
    /// The name of its directory: the document of another image is damage.
    pub(crate) id: Uuid,
    /// The name in `new/`.
    pub(crate) name: String,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) modified: Timestamp,
    /// The snapshot beneath all generations.
    pub(crate) base: Option<SnapshotId>,
    /// The last snapshot that was made of it.
    pub(crate) snapshot: Option<SnapshotId>,
    /// Why it waits for somebody, or why the last commit failed.
    pub(crate) trouble: Option<Trouble>,
    /// What programs wrote in vain.
    #[serde(default, skip_serializing_if = "Lost::is_empty")]
    pub(crate) lost: Lost,
    pub(crate) wishes: Wishes,
    /// The run of the machine in which this was written (`boot_id` of the kernel): what was not
    /// synced survives only as long as that.
    pub(crate) boot: String,
    /// From the bottom up.
    pub(crate) generations: Vec<GenerationRecord>,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Trouble {
    /// A commit failed, and is tried again at the next mount.
    Failed(String),
    /// It is not known to be whole, and waits.
    Interrupted(String),
}

/// What its user wants its next snapshot to be.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Wishes {
    pub(crate) description: Option<String>,
    pub(crate) tags: Tags,
    pub(crate) parent: Option<SnapshotId>,
    pub(crate) encrypted: bool,
    pub(crate) kms_key: Option<String>,
    /// What a later version may add is kept.
    #[serde(flatten)]
    pub(crate) others: BTreeMap<String, serde_json::Value>,
}

/// One generation of staging.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct GenerationRecord {
    pub(crate) id: Uuid,
    /// It takes no more writes: it is being committed, or waits for that.
    pub(crate) frozen: bool,
    /// It was synced since it was frozen.
    pub(crate) durable: bool,
    /// It waits for the commit of the one before, and was not changed since: it is to be committed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) queued: bool,
    pub(crate) attempt: Option<Attempt>,
}

/// An attempt to make a snapshot of a generation. Durable before the snapshot is started.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Attempt {
    pub(crate) client_token: String,
    /// Length of the image in bytes.
    pub(crate) len: u64,
    pub(crate) name: String,
    pub(crate) wishes: Wishes,
    /// It has nothing of the base.
    pub(crate) cut_off: bool,
    /// Known once it is started.
    pub(crate) snapshot: Option<SnapshotId>,
    /// The generation was changed since: should the snapshot turn out to be completed, it is of what
    /// was there before.
    pub(crate) changed: bool,
    /// A snapshot that was begun for an earlier attempt, and is of no use any more.
    pub(crate) forsaken: Option<SnapshotId>,
}

/// Which image a directory is of.
pub(crate) fn id_of(directory: &Path) -> Option<Uuid> {
    Uuid::try_parse(directory.file_name()?.to_str()?).ok()
}

/// The run of the machine that this is.
pub(crate) fn boot() -> String {
    // Without one every run looks like another: then what was not synced is not trusted.
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.map_or_else(|_| Uuid::new_v4().to_string(), |id| id.trim().to_owned())
}

impl ImageRecord {
    /// Reads the document of an image.
    ///
    /// # Errors
    ///
    /// As text for people.
    pub(crate) fn read(directory: &Path) -> Result<Self, String> {
        let bytes = own::read(&directory.join(RECORD)).map_err(|e| e.to_string())?;
        document::decode(RECORD, &bytes).map_err(|e| e.to_string())
    }

    /// Replaces the document, whole or not at all; durably if `sync`.
    pub(crate) fn write(&self, directory: &Path, sync: bool) -> io::Result<()> {
        files::replace(&directory.join(RECORD), &document::encode(self), sync)
    }
}
