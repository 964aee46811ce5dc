//! Tags: a whole set in each object, of which the one with the highest number is valid.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::describe::not_found;
use super::names::TagsId;
use super::read::damaged;
use super::{Repository, document, names};
use crate::model::{SnapshotId, Tags, check_tags};
use crate::store::{Error, ErrorKind, Result};

/// How often a set is made again because somebody else made one at the same time.
const ATTEMPTS: usize = 100;

/// `tags/<snap-id>/<attempt>/<n>.json`: the whole set, and whose it is.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct TagSet {
    id: SnapshotId,
    attempt: Uuid,
    number: u64,
    tags: Tags,
}

/// The valid sets of tags of many snapshots, as they were at one moment.
#[derive(Debug, Default)]
pub(super) struct AllTags {
    /// The highest number, by snapshot and attempt.
    newest: HashMap<(SnapshotId, Uuid), u64>,
    /// Snapshots of any attempt.
    tagged: HashSet<SnapshotId>,
}

/// What a list tells of the set of tags that is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Newest {
    Untagged,
    /// Its number.
    Set(u64),
    /// Another attempt may have been made meanwhile, or they may be changing.
    Unknown,
}

impl AllTags {
    /// Which set of a snapshot is valid.
    pub(super) fn newest(&self, id: &SnapshotId, attempt: Uuid) -> Newest {
        match self.newest.get(&(id.clone(), attempt)) {
            Some(&number) => Newest::Set(number),
            None if self.tagged.contains(id) => Newest::Unknown,
            None => Newest::Untagged,
        }
    }

    /// These may have got tags meanwhile.
    pub(super) fn are_changing(&mut self, ids: HashSet<SnapshotId>) {
        self.newest.retain(|(id, _), _| !ids.contains(id));
        self.tagged.extend(ids);
    }
}

impl TagSet {
    /// The tags, if this is the set of that name.
    fn of(self, name: &TagsId) -> Result<Tags> {
        if (&self.id, self.attempt, self.number) == (&name.id, name.attempt, name.number) {
            check_tags(&self.tags).map_err(|e| damaged(&name.name(), &e.to_string()))?;
            return Ok(self.tags);
        }
        let why = format!("it is number {} of {}", self.number, self.id);
        Err(damaged(&name.name(), &why))
    }
}

impl Repository {
    /// The valid set of tags of a snapshot, by its name.
    pub(super) async fn newest_tags(
        &self,
        id: &SnapshotId,
        attempt: Uuid,
    ) -> Result<Option<TagsId>> {
        let names = self.objects.list(&names::all_tags(id, attempt)).await?;
        Ok(names.iter().filter_map(|name| TagsId::from_name(name)).max_by_key(|tags| tags.number))
    }

    pub(super) async fn tags(&self, id: &SnapshotId, attempt: Uuid) -> Result<Tags> {
        for _ in 0..ATTEMPTS {
            let Some(newest) = self.newest_tags(id, attempt).await? else { return Ok(Tags::new()) };
            // A set that is gone was replaced, and then collected: look again.
            if let Some(set) = self.read_document::<TagSet>(&newest.name()).await? {
                return set.of(&newest);
            }
        }
        Err(busy(id))
    }

    /// The sets of tags of all snapshots that are valid now.
    pub(super) async fn all_tags(&self) -> Result<AllTags> {
        let mut all = AllTags::default();
        for name in self.objects.list(names::TAGS).await? {
            let Some(tags) = TagsId::from_name(&name) else { continue };
            all.tagged.insert(tags.id.clone());
            let newest = all.newest.entry((tags.id.clone(), tags.attempt)).or_insert(tags.number);
            *newest = tags.number.max(*newest);
        }
        Ok(all)
    }

    /// The tags of a snapshot that was listed together with `all`.
    pub(super) async fn listed_tags(
        &self,
        id: &SnapshotId,
        attempt: Uuid,
        all: &AllTags,
    ) -> Result<Tags> {
        let newest = match all.newest(id, attempt) {
            Newest::Unknown => return self.tags(id, attempt).await,
            Newest::Untagged => return Ok(Tags::new()),
            Newest::Set(number) => TagsId { id: id.clone(), attempt, number },
        };
        match self.read_document::<TagSet>(&newest.name()).await? {
            Some(set) => set.of(&newest),
            None => self.tags(id, attempt).await,
        }
    }

    pub(super) async fn replace_tags(&self, id: &SnapshotId, tags: Tags) -> Result<()> {
        let failed = |e: Error| e.context(format_args!("cannot tag {id}"));
        check_tags(&tags).map_err(|e| failed(Error::new(ErrorKind::Invalid, e.to_string())))?;
        let attempt =
            self.attempt_of(id).await.and_then(|found| found.ok_or_else(|| not_found(id)));
        self.add_tags(id, attempt.map_err(failed)?, &tags).await.map_err(failed)
    }

    /// Makes the next set of tags.
    pub(super) async fn add_tags(&self, id: &SnapshotId, attempt: Uuid, tags: &Tags) -> Result<()> {
        for _ in 0..ATTEMPTS {
            let newest = self.newest_tags(id, attempt).await?.map_or(0, |newest| newest.number);
            let number = newest.checked_add(1).ok_or_else(|| busy(id))?;
            let next = TagsId { id: id.clone(), attempt, number };
            let set = TagSet { id: id.clone(), attempt, number, tags: tags.clone() };
            // Two who make the same set at the same time may both be told that they did.
            if self.objects.create_own(&next.name(), document::encode(&set)).await? {
                // Deleted meanwhile: then nobody is to see them, and `gc` will not.
                return match self.attempt_of(id).await? {
                    Some(now) if now == attempt => Ok(()),
                    _ => Err(not_found(id)),
                };
            }
        }
        Err(busy(id))
    }

    pub(super) async fn delete_tags(&self, id: &SnapshotId, attempt: Uuid) -> Result<()> {
        let names = self.objects.list(&names::all_tags(id, attempt)).await?;
        let ours = names.into_iter().filter(|name| TagsId::from_name(name).is_some());
        self.objects.delete(&ours.collect::<Vec<_>>()).await
    }
}

fn busy(id: &SnapshotId) -> Error {
    let message = format!("others keep changing the tags of {id}; try again");
    Error::new(ErrorKind::Conflict, message)
}
