//! Reading a working image.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::base::Base;
use super::layer::Source;
use super::{Result, WorkingImage, end_block};
use crate::blocking::blocking;
use crate::image::staging::map::Mark;
use crate::model::{BLOCK_SIZE, BLOCK_SIZE_U64, BlockIndex, BlockPart, block_parts};

impl WorkingImage {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.state().len
    }

    /// Whether it has no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Up to `len` bytes from `offset` on; fewer only at the end.
    pub async fn read(self: &Arc<Self>, offset: u64, len: usize) -> Result<Bytes> {
        let (end, sources): (u64, Vec<(BlockPart, Source)>) = {
            let state = self.state();
            let len =
                usize::try_from(state.len.saturating_sub(offset)).map_or(len, |rest| rest.min(len));
            let part = |part: BlockPart| (part, state.source(part.index, state.layers.len()));
            (state.len, block_parts(offset, len as u64).map(part).collect())
        };
        if let Some(error) = sources.iter().find_map(|(_, source)| source.error()) {
            return Err(error.clone());
        }
        let len = sources.iter().map(|(part, _)| part.len).sum();
        // A block that is cached whole needs no copy.
        if let [(part, Source::Base(base))] = &sources[..]
            && let Some(bytes) = base.read_cached(part.index.offset() + part.start as u64, len)
            && bytes.len() == len
        {
            return Ok(bytes);
        }
        let mut bytes = BytesMut::zeroed(len);
        let mut at = 0;
        for (part, source) in &sources {
            if let Source::Base(base) = source {
                let offset = part.index.offset() + part.start as u64;
                let read = base.read(offset, part.len).await?;
                // What is behind the end of the base is zeros.
                bytes[at..at + read.len()].copy_from_slice(&read);
            }
            at += part.len;
        }
        if !sources.iter().any(|(_, source)| matches!(source, Source::Staged(_))) {
            return Ok(bytes.freeze());
        }
        let image = Arc::clone(self);
        blocking(move || {
            let mut at = 0;
            for (part, source) in sources {
                if let Source::Staged(staged) = source {
                    let offset = part.index.offset() + part.start as u64;
                    let upto = offset + part.len as u64;
                    let whole = part.start == 0 && (part.len == BLOCK_SIZE || upto == end);
                    image.read_staged(&staged, offset, whole, &mut bytes[at..at + part.len])?;
                }
                at += part.len;
            }
            Ok(bytes.freeze())
        })
        .await
    }

    /// The first offset from `offset` on that may hold data; `None` if there is none.
    pub async fn seek_data(self: &Arc<Self>, offset: u64) -> Result<Option<u64>> {
        self.seek(offset, true).await
    }

    /// The first offset from `offset` on that is in a hole; the end is one. `None` beyond it.
    pub async fn seek_hole(self: &Arc<Self>, offset: u64) -> Result<Option<u64>> {
        self.seek(offset, false).await
    }

    async fn seek(self: &Arc<Self>, offset: u64, data: bool) -> Result<Option<u64>> {
        let len = self.len();
        let mut at = offset;
        while at < len {
            let (source, end) = self.run(BlockIndex::containing(at), len);
            let found = match source {
                Source::Zeros => (!data).then_some(at),
                // Reading tells what is wrong.
                Source::Staged(_) | Source::Missing(_) => data.then_some(at),
                Source::Base(base) if data => base.image().seek_data(at).await?,
                Source::Base(base) => base.image().seek_hole(at).await?,
            };
            match found {
                Some(found) if found < end.min(len) => return Ok(Some(found)),
                _ => at = end,
            }
        }
        Ok(if data || offset >= len { None } else { Some(len) })
    }

    /// Where the content at a block is, and where the run of blocks ends that are all there.
    fn run(&self, index: BlockIndex, len: u64) -> (Source, u64) {
        let state = self.state();
        let mut end = end_block(len);
        for layer in state.layers.iter().rev() {
            let (mark, run_end) = layer.marks.run(index.0, end);
            end = end.min(run_end);
            let source = match mark {
                Some(Mark::Staged) => Source::Staged(layer.staged(index.0)),
                None if !layer.marks.cut_off => continue,
                _ => Source::Zeros,
            };
            return (source, u64::from(end) * BLOCK_SIZE_U64);
        }
        let end = u64::from(end) * BLOCK_SIZE_U64;
        match &state.base {
            Base::Missing(missing) => (Source::Missing(missing.error()), end),
            Base::Known(base) if index.offset() < base.image().len() => {
                let base_end = base.image().len().next_multiple_of(BLOCK_SIZE_U64);
                (Source::Base(Arc::clone(base)), end.min(base_end))
            }
            _ => (Source::Zeros, end),
        }
    }
}
