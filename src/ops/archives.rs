//! Snapshots in a bucket that keep the ids of their sources.

use super::Result;
use super::check::differ_sampled;
use crate::model::{BlockIndex, Snapshot};
use crate::store::page::list_all;
use crate::store::{Error, ErrorKind, ListFrom, SharedStore};

/// What a store has of a snapshot, and of others like it.
#[derive(Debug)]
pub(super) struct Archives {
    /// The snapshot itself.
    pub(super) there: Option<Snapshot>,
    /// Those of the same lineage, volume or name, the newest first.
    pub(super) parents: Vec<Snapshot>,
}

impl Archives {
    /// Looks through the list of a store for those of a snapshot of another.
    ///
    /// # Errors
    ///
    /// `Conflict` if another snapshot has its id; those of the stores.
    pub(super) async fn of(
        to: &SharedStore,
        (from, snapshot): (&SharedStore, &Snapshot),
    ) -> Result<Self> {
        let mut all = list_all(&**to).await?;
        all.retain(Snapshot::is_readable);
        let there = all.iter().find(|other| other.id == snapshot.id).cloned();
        if let Some(there) = &there
            && !is_one_of((from, snapshot), (to, there)).await?
        {
            let message = format!("{} is there, and is another snapshot", there.id);
            return Err(Error::new(ErrorKind::Conflict, message).into());
        }
        all.retain(|other| {
            let is_of_volume = other.volume_id.is_some() && other.volume_id == snapshot.volume_id;
            let is_named = other.name().is_some() && other.name() == snapshot.name();
            let is_parent = snapshot.parent.as_ref() == Some(&other.id);
            other.id != snapshot.id && (is_of_volume || is_named || is_parent)
        });
        all.sort_by(|a, b| (b.start_time, &b.id).cmp(&(a.start_time, &a.id)));
        Ok(Self { there, parents: all })
    }
}

/// Whether an archive is one of a snapshot: an emulator, or a repository that was made anew, may use an id twice.
async fn is_one_of(
    (from, snapshot): (&SharedStore, &Snapshot),
    (to, archive): (&SharedStore, &Snapshot),
) -> Result<bool> {
    if snapshot.volume_size != archive.volume_size {
        return Ok(false);
    }
    if let (Some(one), Some(other)) = (snapshot.content_digest, archive.content_digest)
        && one != other
    {
        return Ok(false);
    }
    // A digest that a tag tells is a hint.
    let (differs, _) = differ_sampled((from, snapshot), (to, archive)).await?;
    Ok(differs.is_none())
}

/// The snapshot of which `archive` is one, if its store still has it and can tell what was changed from it to
/// `second`.
pub(super) async fn first(
    from: &SharedStore,
    (to, archive): (&SharedStore, &Snapshot),
    second: &Snapshot,
) -> Option<Snapshot> {
    let first = super::readable(from, &archive.id).await.ok()?;
    if !is_one_of((from, &first), (to, archive)).await.ok()? {
        return None;
    }
    let start = ListFrom::Index(BlockIndex::ZERO);
    from.list_changed_blocks(&first.id, &second.id, start, 1).await.ok().map(|_| first)
}
