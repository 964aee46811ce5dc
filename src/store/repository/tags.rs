//! Tags: a whole set in each object, of which the one with the highest number is valid.

use std::collections::HashSet;

use super::describe::not_found;
use super::{Repository, document, names};
use crate::model::{SnapshotId, Tags, check_tags};
use crate::store::{Error, ErrorKind, Result};

/// How often a set is made again because somebody else made one at the same time.
const ATTEMPTS: usize = 100;

impl Repository {
    /// The numbers of the sets of tags of a snapshot, ascending.
    async fn tag_numbers(&self, id: &SnapshotId) -> Result<Vec<u64>> {
        let names = self.objects.list(&names::all_tags(id)).await?;
        let mut numbers: Vec<u64> = names
            .iter()
            .filter_map(|name| names::tags_of(name))
            .map(|(_, number)| number)
            .collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    pub(super) async fn tags(&self, id: &SnapshotId) -> Result<Tags> {
        for _ in 0..ATTEMPTS {
            let Some(number) = self.tag_numbers(id).await?.pop() else { return Ok(Tags::new()) };
            // A set that is gone was replaced, and then collected: look again.
            if let Some(tags) = self.read_document(&names::tags(id, number)).await? {
                return Ok(tags);
            }
        }
        Err(busy(id))
    }

    /// The snapshots that have tags.
    pub(super) async fn tagged(&self) -> Result<HashSet<SnapshotId>> {
        let names = self.objects.list(names::TAGS).await?;
        Ok(names.iter().filter_map(|name| names::tags_of(name)).map(|(id, _)| id).collect())
    }

    pub(super) async fn replace_tags(&self, id: &SnapshotId, tags: Tags) -> Result<()> {
        let failed = |e: Error| e.context(format_args!("cannot tag {id}"));
        check_tags(&tags).map_err(|e| failed(Error::new(ErrorKind::Invalid, e.to_string())))?;
        self.describe_snapshot(id).await.map_err(failed)?;
        self.add_tags(id, &tags).await.map_err(failed)
    }

    /// Makes the next set of tags.
    pub(super) async fn add_tags(&self, id: &SnapshotId, tags: &Tags) -> Result<()> {
        let data = document::encode(tags);
        for _ in 0..ATTEMPTS {
            let next = self.tag_numbers(id).await?.pop().map_or(1, |number| number + 1);
            if self.objects.create(&names::tags(id, next), data.clone()).await? {
                // Deleted meanwhile: its tags must not wait for the next snapshot of this id.
                if !self.is_there(id).await? {
                    self.objects.delete(&[names::tags(id, next)]).await?;
                    return Err(not_found(id));
                }
                return Ok(());
            }
        }
        Err(busy(id))
    }

    async fn is_there(&self, id: &SnapshotId) -> Result<bool> {
        // A snapshot goes from pending to completed, so this order never misses it.
        Ok(self.objects.exists(&names::start(id)).await?
            || self.objects.exists(&names::manifest(id)).await?)
    }

    pub(super) async fn delete_tags(&self, id: &SnapshotId) -> Result<()> {
        let names = self.objects.list(&names::all_tags(id)).await?;
        let ours: Vec<_> =
            names.into_iter().filter(|name| names::tags_of(name).is_some()).collect();
        self.objects.delete(&ours).await
    }
}

fn busy(id: &SnapshotId) -> Error {
    let message = format!("others keep changing the tags of {id}; try again");
    Error::new(ErrorKind::Conflict, message)
}
