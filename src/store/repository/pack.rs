//! Packs: the data of up to 64 blocks.
//!
//! A pack is one zstd frame a block, then a table of them in a zstd skippable frame, so that
//! `zstd -d` gives the raw blocks. All numbers are little-endian.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::{Buf as _, Bytes, BytesMut};
use uuid::Uuid;
use zstd::bulk::{Compressor, Decompressor};

use super::names::ObjectId;
use super::table::{Location, u32_at};
use crate::model::{BLOCK_SIZE, BlockBuffer, DIRECT_ALIGNMENT, Digest};

/// Blocks in a pack at most: 32 MiB of raw data.
pub(super) const PACK_BLOCKS: usize = 64;

/// Fast, and enough for the zeros and text that make up most of what compresses.
pub(super) const LEVEL: i32 = 1;

/// Pieces of a block that are compressed to see whether the rest is worth it, and their bytes.
const SAMPLES: usize = 16;
const SAMPLE_LEN: usize = 1024;

/// A zstd frame, and its descriptor if its content is one segment whose size follows in 4 bytes
/// (RFC 8878, section 3.1.1.1).
const FRAME_MAGIC: u32 = 0xFD2F_B528;
const SINGLE_SEGMENT_WITH_SIZE: u8 = 0b1010_0000;
/// Bytes in a block of a zstd frame at most.
const MAX_RAW_BLOCK: usize = 128 * 1024;

/// A zstd skippable frame (RFC 8878, section 3.1.2).
const SKIPPABLE_MAGIC: u32 = 0x184D_2A50;
const TABLE_MAGIC: &[u8; 4] = b"FSPP";
const VERSION: u8 = 1;
/// Magic, version, a zero, the number of frames.
const TABLE_HEADER_LEN: usize = 4 + 1 + 1 + 2;
/// Offset, length, digest.
const FRAME_LEN: usize = 4 + 4 + 32;
/// The length of the skippable frame, to find it from the end.
const TRAILER_LEN: usize = 4;

/// Bytes of the largest pack, about.
const MAX_LEN: usize = PACK_BLOCKS * (BLOCK_SIZE + 64) + MAX_TABLE_LEN;

/// Bytes at the end of a pack that hold the table of the largest one.
pub(super) const MAX_TABLE_LEN: usize =
    8 + TABLE_HEADER_LEN + PACK_BLOCKS * FRAME_LEN + TRAILER_LEN;

thread_local! {
    /// Making a context costs as much as a good part of using it: each thread keeps its own.
    static COMPRESSOR: RefCell<Compressor<'static>> =
        RefCell::new(Compressor::new(LEVEL).expect("there is memory, and the level is valid"));
    static DECOMPRESSOR: RefCell<Decompressor<'static>> =
        RefCell::new(Decompressor::new().expect("there is memory"));
}

/// One block as a zstd frame.
#[derive(Debug)]
pub(super) enum Encoded {
    /// A frame that zstd made.
    Compressed(BlockBuffer),
    /// Data that does not compress: its frame has the bytes as they are.
    Raw(Bytes),
}

impl Encoded {
    /// Compresses a block, which takes about a millisecond at the lowest level.
    pub(super) fn compressed(raw: &[u8], level: i32) -> Self {
        let bound = zstd::zstd_safe::compress_bound(raw.len());
        let mut frame = BlockBuffer::with_len(bound).expect("a block may grow by less than 4 KiB");
        let len = compress_to(raw, &mut frame[..], level);
        frame.truncate(len);
        Self::Compressed(frame)
    }
}

/// Whether it is worth compressing a block: whether pieces from all over it get smaller by more than zstd
/// itself asks for to compress.
pub(super) fn shrinks(raw: &[u8]) -> bool {
    let mut sample = [0; SAMPLES * SAMPLE_LEN];
    let pieces = raw.chunks_exact((raw.len() / SAMPLES).max(SAMPLE_LEN));
    for (to, from) in sample.chunks_exact_mut(SAMPLE_LEN).zip(pieces) {
        to.copy_from_slice(&from[..SAMPLE_LEN]);
    }
    let mut frame = vec![0; zstd::zstd_safe::compress_bound(sample.len())];
    compress_to(&sample, &mut frame, LEVEL) < sample.len() - sample.len() / 64
}

fn compress_to(raw: &[u8], frame: &mut [u8], level: i32) -> usize {
    let compress = |zstd: &mut Compressor<'static>| {
        zstd.set_compression_level(level)?;
        zstd.compress_to_buffer(raw, frame)
    };
    COMPRESSOR.with_borrow_mut(compress).expect("zstd compresses whatever it is given")
}

/// Appends `raw` as a zstd frame of blocks that are not compressed (RFC 8878, section 3.1.1).
fn push_raw_frame(data: &mut BytesMut, raw: &[u8]) {
    data.extend_from_slice(&FRAME_MAGIC.to_le_bytes());
    data.extend_from_slice(&[SINGLE_SEGMENT_WITH_SIZE]);
    data.extend_from_slice(&u32::try_from(raw.len()).expect("one block").to_le_bytes());
    let mut blocks = raw.chunks(MAX_RAW_BLOCK).peekable();
    while let Some(block) = blocks.next() {
        let last = u32::from(blocks.peek().is_none());
        // The type of raw blocks is 0.
        let header = last | u32::try_from(block.len()).expect("128 KiB at most") << 3;
        data.extend_from_slice(&header.to_le_bytes()[..3]);
        data.extend_from_slice(block);
    }
}

/// Decompresses one frame into the bytes of a block, which are not checked yet; what is wrong with it
/// otherwise.
pub(super) fn decompress(frame: &[u8]) -> Result<Bytes, String> {
    let mut raw = BlockBuffer::block();
    match DECOMPRESSOR.with_borrow_mut(|zstd| zstd.decompress_to_buffer(frame, &mut raw[..])) {
        Ok(BLOCK_SIZE) => Ok(raw.freeze()),
        Ok(len) => Err(format!("a frame holds {len} bytes, not a block")),
        Err(error) => Err(format!("a frame cannot be decompressed: {error}")),
    }
}

/// Where a frame is, in a pack that may not be finished yet.
#[derive(Clone, Debug)]
pub(super) struct Frame {
    /// Set once the pack is durable.
    pub(super) pack: Arc<OnceLock<ObjectId>>,
    pub(super) offset: u32,
    pub(super) length: u32,
}

impl Frame {
    /// Where the frame is; `None` until its pack is durable.
    pub(super) fn location(&self) -> Option<Location> {
        let pack = *self.pack.get()?;
        Some(Location { pack, offset: self.offset, length: self.length })
    }
}

/// A pack that is being filled.
#[derive(Debug, Default)]
pub(super) struct PackBuilder {
    /// Becomes the pack's id.
    pub(super) id: Arc<OnceLock<ObjectId>>,
    data: BytesMut,
    frames: Vec<(u32, u32, Digest)>,
}

impl PackBuilder {
    /// An empty pack in memory that was used for another one before: fresh memory costs more than
    /// what is written to it.
    pub(super) fn reusing(mut memory: BytesMut) -> Self {
        memory.clear();
        let fits = memory.as_ptr().align_offset(DIRECT_ALIGNMENT) == 0;
        Self { data: if fits { memory } else { BytesMut::new() }, ..Self::default() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Blocks in it.
    pub(super) fn len(&self) -> usize {
        self.frames.len()
    }

    pub(super) fn push(&mut self, encoded: &Encoded, digest: Digest) -> Frame {
        if self.data.capacity() == 0 {
            self.data = aligned(MAX_LEN);
        }
        let offset = self.data.len();
        match encoded {
            Encoded::Compressed(frame) => self.data.extend_from_slice(frame),
            Encoded::Raw(raw) => push_raw_frame(&mut self.data, raw),
        }
        self.note_frame(offset, digest)
    }

    /// Notes what was appended since `offset` as a frame.
    fn note_frame(&mut self, offset: usize, digest: Digest) -> Frame {
        let small = |n: usize| u32::try_from(n).expect("a pack is less than 4 GiB");
        let (offset, length) = (small(offset), small(self.data.len() - offset));
        self.frames.push((offset, length, digest));
        Frame { pack: Arc::clone(&self.id), offset, length }
    }

    /// Puts frames into the order in which they are given here, where they are told their new places. Those that are
    /// not given are left out. They go into the memory of `spare`, where that is given. Answers the frames that there
    /// were, with their new places, and the memory that was used.
    pub(super) fn arrange<'a>(
        &mut self,
        frames: impl Iterator<Item = (&'a mut Frame, Digest)>,
        spare: Option<Spare>,
    ) -> (Vec<(Digest, Option<Frame>)>, BytesMut) {
        let mut arranged = spare.map(Spare::take).map(Self::reusing).unwrap_or_default();
        arranged.id = Arc::clone(&self.id);
        if arranged.data.capacity() == 0 {
            arranged.data = aligned(MAX_LEN);
        }
        let mut places = HashMap::new();
        for (frame, digest) in frames.filter(|(frame, _)| Arc::ptr_eq(&frame.pack, &self.id)) {
            let place = places.entry(frame.offset).or_insert_with(|| {
                let (start, offset) = (frame.offset as usize, arranged.data.len());
                let bytes = &self.data[start..start + frame.length as usize];
                arranged.data.extend_from_slice(bytes);
                arranged.note_frame(offset, digest)
            });
            *frame = place.clone();
        }
        let before = std::mem::replace(self, arranged);
        let places = before.frames.iter().map(|(at, _, digest)| (*digest, places.get(at).cloned()));
        (places.collect(), before.data)
    }

    /// The pack, under the id that it gets in the hands of `writer`.
    pub(super) fn finish(mut self, writer: Uuid) -> (ObjectId, Bytes) {
        let mut table = Vec::with_capacity(TABLE_HEADER_LEN + self.frames.len() * FRAME_LEN);
        table.extend_from_slice(TABLE_MAGIC);
        table.extend_from_slice(&[VERSION, 0]);
        let count = u16::try_from(self.frames.len()).expect("at most 64");
        table.extend_from_slice(&count.to_le_bytes());
        for (offset, length, digest) in &self.frames {
            table.extend_from_slice(&offset.to_le_bytes());
            table.extend_from_slice(&length.to_le_bytes());
            table.extend_from_slice(&digest.0);
        }
        let id = ObjectId { digest: Digest::of(&table), writer };
        let content = u32::try_from(table.len() + TRAILER_LEN).expect("a few KiB");
        self.data.extend_from_slice(&SKIPPABLE_MAGIC.to_le_bytes());
        self.data.extend_from_slice(&content.to_le_bytes());
        self.data.extend_from_slice(&table);
        self.data.extend_from_slice(&(content + 8).to_le_bytes());
        (id, self.data.freeze())
    }
}

/// Packs whose memory all writers of this process keep for further ones, at most: 96 MiB.
const MAX_SPARE: usize = 3;

static SPARE: AtomicUsize = AtomicUsize::new(0);

/// Memory of a pack that was saved, for another one.
#[derive(Debug)]
pub(super) struct Spare(BytesMut);

impl Spare {
    /// `None` if enough is kept.
    pub(super) fn keep(memory: BytesMut) -> Option<Self> {
        let one_more = |kept| (kept < MAX_SPARE).then_some(kept + 1);
        SPARE.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok()?;
        Some(Self(memory))
    }

    pub(super) fn take(mut self) -> BytesMut {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        SPARE.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Memory of at least `capacity` bytes that can be written to a disk directly.
fn aligned(capacity: usize) -> BytesMut {
    let mut memory = BytesMut::with_capacity(capacity + DIRECT_ALIGNMENT);
    let skip = memory.as_ptr().align_offset(DIRECT_ALIGNMENT);
    memory.resize(skip, 0);
    memory.advance(skip);
    memory
}

/// One block in a pack: where its frame is, and its digest.
pub(super) type FrameEntry = (u32, u32, Digest);

/// Reads the table of a pack, or of its end, which must be the one that `id` names; what is wrong with it
/// otherwise.
pub(super) fn read_table(id: ObjectId, pack: &[u8]) -> Result<Vec<FrameEntry>, &'static str> {
    let table = table_bytes(pack).ok_or("its table is missing")?;
    if Digest::of(table) != id.digest {
        return Err("its table is not the one that its name says");
    }
    if table.len() < TABLE_HEADER_LEN || &table[..4] != TABLE_MAGIC || table[4..6] != [VERSION, 0] {
        return Err("its table is of an unknown version");
    }
    let frames = table[TABLE_HEADER_LEN..].chunks_exact(FRAME_LEN);
    let count = u16::from_le_bytes([table[6], table[7]]);
    if frames.len() != usize::from(count) || !frames.remainder().is_empty() {
        return Err("its table has the wrong length");
    }
    let entry = |frame: &[u8]| {
        let digest = Digest(frame[8..].try_into().expect("32 bytes"));
        (u32_at(frame, 0), u32_at(frame, 4), digest)
    };
    Ok(frames.map(entry).collect())
}

pub(super) fn table_bytes(pack: &[u8]) -> Option<&[u8]> {
    let trailer = pack.len().checked_sub(TRAILER_LEN)?;
    let start = pack.len().checked_sub(u32_at(pack, trailer) as usize)?;
    let frame = pack.get(start..trailer)?;
    let header = frame.get(..8)?;
    let content = frame.len() - 8 + TRAILER_LEN;
    let valid = u32_at(header, 0) == SKIPPABLE_MAGIC && u32_at(header, 4) as usize == content;
    valid.then(|| &frame[8..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack() -> (ObjectId, Bytes, Vec<Vec<u8>>) {
        let blocks: Vec<Vec<u8>> = (1..4u8).map(|n| vec![n; BLOCK_SIZE]).collect();
        let mut builder = PackBuilder::default();
        for block in &blocks {
            builder.push(&Encoded::compressed(block, LEVEL), Digest::of(block));
        }
        let (id, bytes) = builder.finish(Uuid::new_v4());
        (id, bytes, blocks)
    }

    #[test]
    fn zstd_restores_the_raw_run() {
        let (_, bytes, blocks) = pack();
        let mut raw = Vec::new();
        zstd::stream::copy_decode(&bytes[..], &mut raw).unwrap();
        assert_eq!(raw, blocks.concat());
    }

    #[test]
    fn every_frame_is_found_through_the_table() {
        let (id, bytes, blocks) = pack();
        let table = read_table(id, &bytes).unwrap();
        assert_eq!(table.len(), blocks.len());
        for ((offset, length, digest), block) in table.into_iter().zip(blocks) {
            assert_eq!(digest, Digest::of(&block));
            let frame = &bytes[offset as usize..][..length as usize];
            assert_eq!(decompress(frame).unwrap(), block);
        }
    }

    #[test]
    fn no_cut_or_flip_of_the_table_goes_unseen() {
        let (id, bytes, _) = pack();
        for len in 0..bytes.len() {
            assert!(read_table(id, &bytes[..len]).is_err(), "cut at {len}");
        }
        let (table_start, end) =
            (bytes.len() - (8 + TABLE_HEADER_LEN + 3 * FRAME_LEN + 4), bytes.len());
        for at in table_start..end {
            let mut flipped = bytes.to_vec();
            flipped[at] ^= 1;
            assert!(read_table(id, &flipped).is_err(), "flipped at {at}");
        }
    }

    #[test]
    fn frames_are_put_in_order() {
        let blocks: Vec<Vec<u8>> = (1..4u8).map(|n| vec![n; BLOCK_SIZE]).collect();
        let digests: Vec<_> = blocks.iter().map(|block| Digest::of(block)).collect();
        let mut builder = PackBuilder::default();
        let push = |n: &usize| builder.push(&Encoded::compressed(&blocks[*n], LEVEL), digests[*n]);
        let mut frames: Vec<_> = [2, 0, 1].iter().map(push).collect();
        let other = frames[0].clone();
        let mut elsewhere = Frame { pack: Arc::default(), ..other.clone() };
        let [second, first, _] = &mut frames[..] else { unreachable!() };
        let mut again = other;
        let order = [
            (&mut *first, digests[0]),
            (&mut elsewhere, digests[1]),
            (&mut *second, digests[2]),
            (&mut again, digests[2]),
        ];
        let (places, _) = builder.arrange(order.into_iter(), None);
        let kept: Vec<_> = places.iter().map(|(digest, at)| (*digest, at.is_some())).collect();
        assert_eq!(kept, [(digests[2], true), (digests[0], true), (digests[1], false)]);
        assert_eq!((first.offset, second.offset), (0, first.length));
        assert_eq!(again.offset, second.offset);
        assert_eq!(elsewhere.offset, 0);
        let (id, bytes) = builder.finish(Uuid::new_v4());
        let table = read_table(id, &bytes).unwrap();
        assert_eq!(table.len(), 2);
        for ((offset, length, digest), n) in table.into_iter().zip([0, 2]) {
            assert_eq!(digest, digests[n]);
            let frame = &bytes[offset as usize..][..length as usize];
            assert_eq!(decompress(frame).unwrap(), blocks[n]);
        }
    }

    #[test]
    fn a_frame_that_is_not_a_block_is_refused() {
        let frame = |len| zstd::bulk::compress(&vec![1; len], 1).unwrap();
        assert!(decompress(&frame(100)).unwrap_err().contains("100 bytes"));
        assert!(decompress(b"not zstd at all").is_err());
        assert!(decompress(&frame(BLOCK_SIZE + 1)).is_err());
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 1u64;
        let next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        };
        std::iter::repeat_with(next).take(len).collect()
    }

    /// The length of its frame, which must hold it.
    fn stored(raw: &[u8]) -> usize {
        let mut builder = PackBuilder::default();
        let encoded = match shrinks(raw) {
            true => Encoded::compressed(raw, LEVEL),
            false => Encoded::Raw(raw.to_owned().into()),
        };
        let frame = builder.push(&encoded, Digest::of(raw));
        let (_, bytes) = builder.finish(Uuid::new_v4());
        let len = frame.length as usize;
        assert_eq!(decompress(&bytes[..len]).unwrap(), raw);
        // Readers that know of zstd alone see the same.
        assert_eq!(zstd::bulk::decompress(&bytes[..len], BLOCK_SIZE).unwrap(), raw);
        len
    }

    #[test]
    fn incompressible_data_grows_by_the_headers_of_a_raw_frame() {
        assert!(!shrinks(&noise(BLOCK_SIZE)));
        assert_eq!(stored(&noise(BLOCK_SIZE)), BLOCK_SIZE + 4 + 1 + 4 + 4 * 3);
    }

    #[test]
    fn a_block_is_compressed_where_a_part_of_it_can_be() {
        for at in 0..8 {
            let mut raw = noise(BLOCK_SIZE);
            let part = BLOCK_SIZE / 8;
            raw[at * part..][..part].fill(0);
            assert!(stored(&raw) < BLOCK_SIZE * 7 / 8 + 1000, "zeros in part {at}");
        }
        let text = b"every block of a disk image has its own line of text\n".iter().copied();
        assert!(stored(&text.cycle().take(BLOCK_SIZE).collect::<Vec<_>>()) < BLOCK_SIZE / 100);
    }
}
