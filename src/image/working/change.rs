//! Writing, truncating and punching holes.

use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use jiff::Timestamp;

use super::layer::Source;
use super::{COPY_UPS, Error, Inner, Result, WorkingImage, end_block};
use crate::blocking::blocking;
use crate::image::staging::Files;
use crate::image::staging::files::punch;
use crate::image::staging::map::Mark;
use crate::model::{BLOCK_SIZE, BLOCK_SIZE_U64, BlockIndex, MAX_VOLUME_BYTES, block_parts};

impl WorkingImage {
    /// Writes `data` at `offset`. It is staged when this returns.
    pub async fn write(self: &Arc<Self>, offset: u64, data: Bytes) -> Result<()> {
        let end = end_of(offset, data.len() as u64)?;
        if data.is_empty() {
            return Ok(());
        }
        let (_writing, files) = self.active().await?;
        let over_data = {
            let state = self.state();
            block_parts(offset, data.len() as u64).any(|part| needs_lock(&state, part.index))
        };
        if !over_data {
            return self.put_in_place(files, offset, data).await;
        }
        let mut at = 0;
        for part in block_parts(offset, data.len() as u64) {
            let piece = data.slice(at..at + part.len);
            at += part.len;
            let start = part.index.offset() + part.start as u64;
            let _alone = self.copy_ups[part.index.0 as usize % COPY_UPS].lock().await;
            let (locked, len) = {
                let state = self.state();
                (needs_lock(&state, part.index), state.len)
            };
            let covers =
                part.start == 0 && (part.len == BLOCK_SIZE || start + part.len as u64 >= len);
            if locked && !covers {
                let whole = self.whole(part.index, len.max(end), |block| {
                    block[part.start..part.start + part.len].copy_from_slice(&piece);
                });
                self.put_in_place(Arc::clone(&files), part.index.offset(), whole.await?).await?;
            } else {
                self.put_in_place(Arc::clone(&files), start, piece).await?;
            }
        }
        Ok(())
    }

    /// Writes `data` at `offset`, if that needs to wait for nothing but the local disk; else `None`,
    /// and nothing has happened.
    pub fn write_now(&self, offset: u64, data: &[u8]) -> Option<Result<()>> {
        let end = end_of(offset, data.len() as u64).ok()?;
        let _writing = self.gate.try_read().ok()?;
        let files = {
            let mut state = self.state();
            if state.must_note_change() {
                return None;
            }
            let files = Arc::clone(&state.active()?.files);
            let mut parts = block_parts(offset, data.len() as u64);
            let vouched =
                |index| state.layers.last().is_some_and(|l| l.marks.hashed.contains(index));
            // What is vouched for takes a sync first, and what is beneath may take the store.
            let waits = |index: BlockIndex| needs_lock(&state, index) || vouched(index.0);
            if data.is_empty() || parts.any(|part| waits(part.index)) {
                return None;
            }
            files
        };
        Some(self.put_at(&files, offset, end, data))
    }

    /// The content of a block as it is, changed by `change`, up to the end of an image of `len` bytes.
    async fn whole(
        self: &Arc<Self>,
        index: BlockIndex,
        len: u64,
        change: impl FnOnce(&mut [u8]),
    ) -> Result<Bytes> {
        let source = {
            let state = self.state();
            state.source(index, state.layers.len())
        };
        let mut block = BytesMut::zeroed(BLOCK_SIZE);
        match source {
            Source::Zeros => {}
            Source::Missing(error) => return Err(error),
            Source::Base(base) => {
                let read = base.read(index.offset(), BLOCK_SIZE).await?;
                block[..read.len()].copy_from_slice(&read);
            }
            Source::Staged(staged) => {
                let image = Arc::clone(self);
                block = blocking(move || {
                    image.read_staged(&staged, index.offset(), true, &mut block).map(|()| block)
                })
                .await?;
            }
        }
        change(&mut block);
        let inside = (len - index.offset()).min(BLOCK_SIZE_U64);
        block.truncate(usize::try_from(inside).expect("at most a block"));
        Ok(block.freeze())
    }

    async fn put_in_place(
        self: &Arc<Self>,
        files: Arc<Files>,
        offset: u64,
        data: Bytes,
    ) -> Result<()> {
        let image = Arc::clone(self);
        blocking(move || image.put_at(&files, offset, offset + data.len() as u64, &data)).await
    }

    /// Writes to the data file, and notes that the blocks are there. The caller holds the gate.
    fn put_at(&self, files: &Arc<Files>, offset: u64, end: u64, data: &[u8]) -> Result<()> {
        let blocks = BlockIndex::containing(offset).0..end_block(end);
        let failed = |e| Error::io("stage in", &self.directory, e);
        let (new, vouched) = {
            let state = self.state();
            let marks = &state.layers.last().expect("the caller holds the gate").marks;
            let there = marks.staged.range_cardinality(blocks.clone());
            let vouched: Vec<_> = marks.hashed.range(blocks.clone()).collect();
            (u64::from(blocks.end - blocks.start) - there, vouched)
        };
        for index in vouched.iter().map(|index| BlockIndex(*index)) {
            let covered = offset <= index.offset() && index.next().offset() <= end;
            if !covered {
                self.check_staged(files, index)?;
            }
        }
        self.shop.staging.take(new)?;
        if !vouched.is_empty() {
            // Nothing may vouch for what is about to change.
            for index in vouched {
                self.mark(Mark::Staged, index..index + 1).map_err(failed)?;
            }
            files.sync().map_err(failed)?;
        }
        if let Err(error) = files.data.write_all_at(data, offset) {
            // What it left is inside its own range, of which nothing is promised.
            self.shop.staging.give_back(new);
            return Err(failed(error));
        }
        let really_new = self.mark_staged(offset..end).map_err(failed)?;
        // Two writers of one new block both took room for it.
        self.shop.staging.give_back(new - really_new.min(new));
        Ok(())
    }

    /// Notes bytes that were written, and their blocks; answers how many are new.
    fn mark_staged(&self, bytes: Range<u64>) -> std::io::Result<u64> {
        let blocks = BlockIndex::containing(bytes.start).0..end_block(bytes.end);
        let mut state = self.state();
        state.len = state.len.max(bytes.end);
        state.lost.remove(&bytes);
        state.attributes.modified = Timestamp::now();
        let layer = state.layers.last_mut().expect("the caller holds the gate");
        let count = u64::from(blocks.end - blocks.start);
        let there = layer.marks.staged.range_cardinality(blocks.clone());
        let changed = there < count
            || layer.marks.put.range_cardinality(blocks.clone()) > 0
            || layer.marks.hashed.range_cardinality(blocks.clone()) > 0;
        if changed {
            layer.mark(Mark::Staged, blocks)?;
        }
        Ok(count - there)
    }

    fn mark(&self, mark: Mark, blocks: Range<u32>) -> std::io::Result<()> {
        self.state().layers.last_mut().expect("the caller holds the gate").mark(mark, blocks)
    }

    /// Changes the length.
    pub async fn truncate(self: &Arc<Self>, len: u64) -> Result<()> {
        if len > MAX_VOLUME_BYTES {
            return Err(Error::TooLarge);
        }
        let _alone = self.gate.write().await;
        let old = {
            let mut state = self.state();
            if len == 0 {
                state.lost.clear();
            }
            // Nothing changes, and that is no reason to commit.
            if len == state.len && (len > 0 || (state.layers.is_empty() && !state.base.is_some())) {
                return Ok(());
            }
            state.len
        };
        let files = self.ensure_active().await?;
        let cut = BlockIndex::containing(len);
        let inside = len - cut.offset();
        let keep = {
            let state = self.state();
            len < old && inside > 0 && needs_lock(&state, cut)
        };
        if keep {
            // What is left of the last block must not come back when the image grows again.
            let whole = self.whole(cut, old, |block| {
                block[usize::try_from(inside).expect("less than a block")..].fill(0);
            });
            self.put_in_place(Arc::clone(&files), cut.offset(), whole.await?).await?;
        }
        let image = Arc::clone(self);
        blocking(move || {
            if len < old && inside > 0 {
                image.check_staged(&files, cut)?;
            }
            let failed = |e| Error::io("stage in", &image.directory, e);
            // A file system may not have room for so long a file.
            if len > old {
                files.set_len(len).map_err(failed)?;
            }
            let dropped = {
                let mut state = image.state();
                let blocks = end_block(len)..end_block(old).max(end_block(len));
                let over = state.layers.len() > 1 || state.base.is_some();
                if len < old {
                    state.lost.remove(&(len..u64::MAX));
                }
                let layer = state.layers.last_mut().expect("it was made");
                let before = layer.marks.staged.len();
                if len < old && inside > 0 && layer.marks.staged.contains(cut.0) {
                    // Neither its sum nor what was put of it holds any more.
                    layer.mark(Mark::Staged, cut.0..cut.0 + 1).map_err(failed)?;
                }
                if len == 0 {
                    layer.mark(Mark::CutOff, 0..0).map_err(failed)?;
                } else if !blocks.is_empty() {
                    layer
                        .mark(if over { Mark::Hole } else { Mark::Plain }, blocks)
                        .map_err(failed)?;
                }
                let dropped = before - layer.marks.staged.len();
                state.len = len;
                state.attributes.modified = Timestamp::now();
                dropped
            };
            image.shop.staging.give_back(dropped);
            if len < old { files.set_len(len).map_err(failed) } else { Ok(()) }
        })
        .await
    }

    /// Makes the image at least `len` bytes long.
    pub async fn grow(self: &Arc<Self>, len: u64) -> Result<()> {
        if len > self.len() { self.truncate(len).await } else { Ok(()) }
    }

    /// Makes a range read as zeros, and gives its space back. It may reach beyond the end, which
    /// does not move.
    pub async fn punch(self: &Arc<Self>, offset: u64, len: u64) -> Result<()> {
        let upto = end_of(offset, len)?;
        loop {
            let len = self.len();
            // Somebody may make it longer meanwhile: then its last block is another one.
            if offset >= len || self.punch_within(offset, upto.min(len), len).await? {
                return Ok(());
            }
        }
    }

    /// Punches a hole in an image of `len` bytes; answers whether it still has that length.
    async fn punch_within(self: &Arc<Self>, offset: u64, end: u64, len: u64) -> Result<bool> {
        let first = end_block(offset);
        // The last block of the image counts as whole up to its end.
        let last = if end == len { end_block(end) } else { BlockIndex::containing(end).0 };
        if first >= last {
            return self.write_zeros(offset, end).await.map(|()| true);
        }
        self.write_zeros(offset, BlockIndex(first).offset()).await?;
        self.write_zeros(BlockIndex(last).offset(), end).await?;
        let _alone = self.gate.write().await;
        if self.len() != len {
            return Ok(false);
        }
        let files = self.ensure_active().await?;
        let image = Arc::clone(self);
        blocking(move || {
            let failed = |e| Error::io("stage in", &image.directory, e);
            let (dropped, vouched) = {
                let mut state = image.state();
                let over = state.layers.len() > 1 || state.base.is_some();
                let layer = state.layers.last_mut().expect("it was made");
                let before = layer.marks.staged.len();
                let vouched = layer.marks.hashed.range_cardinality(first..last) > 0;
                layer
                    .mark(if over { Mark::Hole } else { Mark::Plain }, first..last)
                    .map_err(failed)?;
                state.attributes.modified = Timestamp::now();
                state.lost.remove(&(BlockIndex(first).offset()..end));
                let layer = state.layers.last().expect("it was made");
                (before - layer.marks.staged.len(), vouched)
            };
            image.shop.staging.give_back(dropped);
            if vouched {
                // Nothing may vouch for what is about to go.
                files.sync().map_err(failed)?;
            }
            punch(&files.data, BlockIndex(first).offset(), BlockIndex(last).offset())
                .map(|()| true)
                .map_err(failed)
        })
        .await
    }

    /// Writes zeros where there is anything else: to parts of blocks.
    async fn write_zeros(self: &Arc<Self>, start: u64, end: u64) -> Result<()> {
        if start >= end {
            return Ok(());
        }
        for part in block_parts(start, end - start) {
            let source = {
                let state = self.state();
                state.source(part.index, state.layers.len())
            };
            if !matches!(source, Source::Zeros) {
                let zeros = crate::model::zeros().slice(..part.len);
                self.write(part.index.offset() + part.start as u64, zeros).await?;
            }
        }
        Ok(())
    }

    /// Grows the image to `end`, if it is shorter, and checks that so much more can be staged.
    pub async fn allocate(self: &Arc<Self>, offset: u64, len: u64, keep_size: bool) -> Result<()> {
        let end = end_of(offset, len)?;
        let missing = {
            let state = self.state();
            let blocks = BlockIndex::containing(offset).0..end_block(end);
            let staged = state.layers.last().filter(|layer| !layer.frozen);
            let there =
                staged.map_or(0, |layer| layer.marks.staged.range_cardinality(blocks.clone()));
            u64::from(blocks.end - blocks.start) - there
        };
        self.shop.staging.take(missing)?;
        self.shop.staging.give_back(missing);
        if !keep_size && end > self.len() {
            self.truncate(end).await?;
        }
        Ok(())
    }
}

/// Whether a partial write to a block needs what is there, and so excludes other writers: it is not
/// in the active generation, and something is beneath.
fn needs_lock(state: &Inner, index: BlockIndex) -> bool {
    let top = state.layers.last().expect("the caller holds the gate");
    !top.marks.staged.contains(index.0)
        && !top.marks.holes.contains(index.0)
        && state.is_over_data(index)
}

fn end_of(offset: u64, len: u64) -> Result<u64> {
    offset.checked_add(len).filter(|end| *end <= MAX_VOLUME_BYTES).ok_or(Error::TooLarge)
}
