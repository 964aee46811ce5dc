//! Whether what is about to become a snapshot is a whole, raw image.

use super::context::Context;
use super::image::{Image, STDIN};
use super::{Error, Result, readable};
use crate::claim::{Fault, look_at_blocks};
use crate::model::{Block, SnapshotId, zeros};
use crate::store::SharedStore;
use crate::store::listing::{Listing, read_listed};
use crate::transfer;

impl Image {
    /// Checks that it is as long as what is on it. A stream looks at itself when it has come, and what cannot be read
    /// is not looked at.
    ///
    /// # Errors
    ///
    /// If it is cut or packed, unless it is to be taken `as_is`, is a block device, or its parent has the same fault.
    pub(super) async fn check_whole(
        &self,
        cx: &Context,
        as_is: bool,
        parent: Option<(&SharedStore, &SnapshotId)>,
    ) -> Result<()> {
        if self.is_stream() {
            return Ok(());
        }
        let block = |index| async move {
            let blocks = self.source.read(&[(index, None)]).await?;
            Ok::<_, transfer::Error>(blocks.first().map_or_else(zeros, Block::bytes))
        };
        let looking = cx.run.unless_stopped(look_at_blocks(self.len, block)).await?;
        let Ok(found) = looking else { return Ok(()) };
        found.notes.iter().for_each(|note| cx.note(note));
        let Some(fault) = found.fault else { return Ok(()) };
        let mut is_taken = as_is || self.is_device();
        if let Some((store, id)) = parent
            && let Ok(Some(of_parent)) = cx.run.unless_stopped(fault_of(store, id)).await?
        {
            is_taken |= fault.is_from(&of_parent);
        }
        if is_taken {
            cx.note(format_args!("{fault}; it is taken as it is"));
            return Ok(());
        }
        let name = self.path().to_string_lossy();
        let name = if name == STDIN { "FILE" } else { &name };
        Err(Error::Refused(fault.refusal(name, "--as-is")))
    }
}

/// What is wrong with a snapshot.
async fn fault_of(store: &SharedStore, id: &SnapshotId) -> Result<Option<Fault>> {
    let snapshot = &readable(store, id).await?;
    let block = |index| async move {
        let listed = Listing::blocks(store.clone(), snapshot).find(index).await?;
        match listed {
            Some(listed) => Ok(read_listed(store, id, &listed).await?.bytes()),
            None => Ok::<_, Error>(zeros()),
        }
    };
    Ok(look_at_blocks(snapshot.image_len(), block).await?.fault)
}
