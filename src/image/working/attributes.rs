//! What is told of a working image, and what can be asked of it.

use std::sync::Arc;

use jiff::Timestamp;

use super::phase::{Phase, Remark};
use super::{Error, Inner, Result, WorkingImage};
use crate::model::{
    BLOCK_SIZE_U64, InvalidTags, MAX_DESCRIPTION_CHARS, MAX_TAGS, SnapshotId, Tags, check_tags,
};

/// Who makes a file, and how.
#[derive(Clone, Copy, Debug)]
pub struct Maker {
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Permission bits.
    pub mode: u16,
}

/// What a file system keeps of a file beside its content.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attributes {
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) modified: Timestamp,
}

impl From<Maker> for Attributes {
    fn from(Maker { uid, gid, mode }: Maker) -> Self {
        Self { mode, uid, gid, modified: Timestamp::now() }
    }
}

/// Where a working image is between two snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing was written since the last snapshot.
    Clean,
    /// It holds what no snapshot has.
    Dirty,
    /// A snapshot is being made of it, or the store is still busy with that.
    Committing,
    /// It will be committed when the store is done with the snapshot before.
    Queued,
    /// The last commit failed; it is tried again at the next mount.
    Failed,
    /// A program that wrote to it was killed, or met an error, or it may belong to another store: it waits.
    Interrupted,
}

impl State {
    /// The state in words.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::Dirty => "dirty",
            Self::Committing => "committing",
            Self::Queued => "queued",
            Self::Failed => "failed",
            Self::Interrupted => "interrupted",
        }
    }
}

/// What `stat` and the extended attributes tell.
#[derive(Clone, Debug)]
pub struct Status {
    /// Where it is between two snapshots.
    pub state: State,
    /// What went wrong, or why there is no snapshot.
    pub error: Option<String>,
    /// The last snapshot that was made of it.
    pub snapshot: Option<SnapshotId>,
    /// The snapshot that it is over.
    pub base: Option<SnapshotId>,
    /// Length in bytes.
    pub len: u64,
    /// Bytes that are staged.
    pub staged: u64,
    /// Bytes that hold data, about.
    pub allocated: u64,
    /// When it was changed.
    pub modified: Timestamp,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits.
    pub mode: u16,
    /// Names in `new/`: 1, or 0 if it was removed.
    pub links: u32,
    /// Blocks that a commit under way has done, and all.
    pub progress: Option<(u64, u64)>,
}

/// The attributes that only tell something: nobody can set them, and to remove them changes nothing.
const TOLD: [&str; 6] = ["state", "error", "snapshot", "base", "staged-bytes", "progress"];

impl Inner {
    pub(super) fn status(&self) -> State {
        match &self.phase {
            Phase::Committing { .. } if self.layers.iter().any(|layer| layer.queued.is_some()) => {
                return State::Queued;
            }
            Phase::Committing { .. } => {}
            _ if self.base.missing().is_some() => return State::Failed,
            Phase::Failed(_) => return State::Failed,
            Phase::Idle(Some(Remark::Interrupted(_) | Remark::Elsewhere(..))) => {
                return State::Interrupted;
            }
            Phase::Idle(_) => {}
        }
        match (self.layers.iter().any(|layer| layer.frozen), self.is_dirty()) {
            (false, false) => State::Clean,
            (false, true) => State::Dirty,
            (true, _) => State::Committing,
        }
    }
}

impl WorkingImage {
    /// What is known of it; never waits.
    pub fn status(&self) -> Status {
        let state = self.state();
        let staged: u64 = state.layers.iter().map(|layer| layer.marks.staged.len()).sum();
        let cut_off = state.layers.iter().any(|layer| layer.marks.cut_off);
        let beneath = state.base.known().filter(|_| !cut_off);
        let beneath = beneath.map_or(0, |base| base.image().allocated());
        let missing = state.base.missing().map(|missing| missing.why.as_str());
        let Attributes { mode, uid, gid, modified } = state.attributes;
        Status {
            state: state.status(),
            error: missing.or(state.phase.why()).map(str::to_owned),
            snapshot: state.snapshot.clone(),
            base: state.base.id(),
            len: state.len,
            staged: staged * BLOCK_SIZE_U64,
            allocated: (staged * BLOCK_SIZE_U64 + beneath).min(state.len),
            modified,
            uid,
            gid,
            mode,
            links: u32::from(!state.removed),
            progress: match state.putting() {
                Some(commit) => Some(commit.progress()),
                None => (state.starting > 0).then_some((0, 0)),
            },
        }
    }

    /// Changes owner, permissions or time, as far as they are given.
    pub async fn set_attributes(
        self: &Arc<Self>,
        mode: Option<u16>,
        uid: Option<u32>,
        gid: Option<u32>,
        modified: Option<Timestamp>,
    ) -> Result<()> {
        {
            let attributes = &mut self.state().attributes;
            attributes.mode = mode.unwrap_or(attributes.mode);
            attributes.uid = uid.unwrap_or(attributes.uid);
            attributes.gid = gid.unwrap_or(attributes.gid);
            attributes.modified = modified.unwrap_or(attributes.modified);
        }
        self.recorded(false).await
    }

    /// What was asked for its next snapshot, by the names of the attributes.
    pub fn wishes(&self) -> Vec<(String, String)> {
        let state = self.state();
        let wishes = &state.wishes;
        let mut list = Vec::new();
        let mut add = |name: &str, value: Option<String>| {
            list.extend(value.map(|value| (name.to_owned(), value)));
        };
        add("description", wishes.description.clone());
        add("parent", wishes.parent.as_ref().map(ToString::to_string));
        add("encrypted", wishes.encrypted.then(|| "true".to_owned()));
        add("kms-key", wishes.kms_key.clone());
        for (key, value) in &wishes.tags {
            add(&format!("tag.{key}"), Some(value.clone()));
        }
        list
    }

    /// Asks something of its next snapshot; `None` takes it back. `by` is the thread that does.
    ///
    /// A program that copies the attributes of a snapshot (`cp -a`, `mv`, `rsync -X`) tries its id as well, the
    /// shortest name and so the first. It does not copy what makes that snapshot what it is: its name, parent
    /// and encryption.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] if there is no such attribute, if the value cannot be, or if it is too late;
    /// [`Error::TooManyTags`] if no snapshot could have all of its tags.
    pub async fn wish(self: &Arc<Self>, name: &str, value: Option<&str>, by: u32) -> Result<()> {
        {
            let mut state = self.state();
            let refuse = |why: String| Err(Error::Refused(why));
            let late = state.base.is_some() || state.layers.iter().any(|layer| layer.frozen);
            let mut wishes = state.wishes.clone();
            let copies = value.is_some() && state.copier == Some(by);
            match name {
                "tag.Name" | "parent" | "encrypted" | "kms-key" if copies => {
                    return refuse(format!("{name} is not copied from one image to another"));
                }
                "description" => {
                    check_description(value).map_err(Error::Refused)?;
                    wishes.description = value.map(str::to_owned);
                }
                "parent" | "encrypted" | "kms-key" if late => {
                    return refuse(format!(
                        "{name} is too late: a snapshot was made of it, or is being made"
                    ));
                }
                "parent" => {
                    wishes.parent = value.map(str::parse).transpose().map_err(
                        |e: crate::model::InvalidSnapshotId| Error::Refused(e.to_string()),
                    )?;
                }
                "encrypted" => {
                    wishes.encrypted = match value {
                        None | Some("false" | "0") => false,
                        Some("true" | "1") => true,
                        Some(other) => {
                            return refuse(format!("encrypted is true or false, not {other:?}"));
                        }
                    };
                }
                "kms-key" => wishes.kms_key = value.map(str::to_owned),
                _ => match name.strip_prefix("tag.") {
                    Some(key) => {
                        set_tag(&mut wishes.tags, key, value)?;
                        let all = self.shop.settings.tags_of(&state.name, &wishes.tags).len();
                        if value.is_some() && all > MAX_TAGS {
                            return Err(Error::TooManyTags(all));
                        }
                    }
                    // As `rsync -X` does with what the file that it copies does not have.
                    None if value.is_none() && TOLD.contains(&name) => return Ok(()),
                    None => {
                        if name == "id" {
                            state.copier = Some(by);
                        }
                        return refuse(format!("there is no attribute {name:?} to set"));
                    }
                },
            }
            state.wishes = wishes;
        }
        self.recorded(false).await
    }
}

fn set_tag(tags: &mut Tags, key: &str, value: Option<&str>) -> Result<()> {
    if key.starts_with("fspfs:") {
        return Err(Error::Refused("tags that begin with fspfs: are our own".to_owned()));
    }
    match value {
        Some(value) => tags.insert(key.to_owned(), value.to_owned()),
        None => tags.remove(key),
    };
    match check_tags(tags) {
        // They are counted with those that are not the image's own.
        Ok(()) | Err(InvalidTags::TooMany(_)) => Ok(()),
        Err(error) => Err(Error::Refused(error.to_string())),
    }
}

pub(super) fn check_description(text: Option<&str>) -> std::result::Result<(), String> {
    if text.is_some_and(|text| text.chars().count() > MAX_DESCRIPTION_CHARS) {
        return Err(format!("a description has at most {MAX_DESCRIPTION_CHARS} characters"));
    }
    Ok(())
}
