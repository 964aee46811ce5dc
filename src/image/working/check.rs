//! Staged blocks that are vouched for are what they were then, or nobody sees them.

use std::sync::Arc;

use super::{Error, Result, WorkingImage};
use crate::image::staging::Files;
use crate::image::staging::files::read_padded;
use crate::image::staging::map::Mark;
use crate::model::{BLOCK_SIZE, Block, BlockBuffer, BlockIndex, Digest, Digester, zeros};

/// Data of a generation, and whether that vouches for the block.
#[derive(Clone, Debug)]
pub(super) struct Staged {
    pub(super) files: Arc<Files>,
    pub(super) vouched: bool,
}

impl WorkingImage {
    /// Reads what is staged at `offset`; `whole` says that this is a block up to the end of the image.
    /// Such a block is checked, if it is vouched for; of any other, all of it when a part of it is read first.
    /// Waits for the disk.
    ///
    /// # Errors
    ///
    /// [`Error::Damaged`] if it is not what was written.
    pub(super) fn read_staged(
        &self,
        staged: &Staged,
        offset: u64,
        whole: bool,
        buffer: &mut [u8],
    ) -> Result<()> {
        let failed = |e| Error::io("read", &self.directory, e);
        let (files, index) = (&staged.files, BlockIndex::containing(offset));
        // Twice, for it may have been changed and vouched for anew meanwhile.
        for _ in 0..2 {
            read_padded(&files.data, buffer, offset).map_err(failed)?;
            if !staged.vouched {
                return Ok(());
            }
            let is_as_written = match whole {
                true => files.is_sum(index.0, padded(buffer)),
                false => files.was_vouched_for(index.0),
            };
            let is_as_written = is_as_written.map_err(failed)?;
            // Who changes a block takes back first what vouches for it.
            if is_as_written || !self.vouches(files, index) {
                return Ok(());
            }
        }
        Err(self.damaged(index))
    }

    /// Checks a block that is about to be changed in part, if it is vouched for: nothing may vouch for
    /// the rest of it anew if it is damaged. Waits for the disk.
    pub(super) fn check_staged(&self, files: &Arc<Files>, index: BlockIndex) -> Result<()> {
        if !self.vouches(files, index) {
            return Ok(());
        }
        let staged = Staged { files: Arc::clone(files), vouched: true };
        self.read_staged(&staged, index.offset(), true, &mut BlockBuffer::block())
    }

    /// Notes the SHA-256 of a staged block, as it is.
    pub(super) fn vouch(&self, files: &Files, index: u32) -> Result<()> {
        let failed = |e| Error::io("stage in", &self.directory, e);
        let mut buffer = BlockBuffer::block();
        read_padded(&files.data, &mut buffer, BlockIndex(index).offset()).map_err(failed)?;
        files.write_sum(index, Block::new(buffer.freeze()).digest()).map_err(failed)?;
        let mut state = self.state();
        let layer = state.layer_with(files);
        match layer {
            Some(layer) => layer.mark(Mark::Hashed, index..index + 1).map_err(failed),
            None => Ok(()),
        }
    }

    pub(super) fn damaged(&self, index: BlockIndex) -> Error {
        let why = format!("block {index} is not what was written");
        Error::Damaged { path: self.directory.display().to_string(), why }
    }

    fn vouches(&self, files: &Files, index: BlockIndex) -> bool {
        let mut state = self.state();
        let layer = state.layer_with(files);
        layer.is_some_and(|layer| layer.marks.hashed.contains(index.0))
    }
}

/// The SHA-256 of the beginning of a block, and of zeros up to its end.
fn padded(bytes: &[u8]) -> Digest {
    let mut digester = Digester::default();
    digester.update(bytes);
    digester.update(&zeros()[..BLOCK_SIZE - bytes.len()]);
    digester.finish()
}
