//! A block, its index and its digest, and the arithmetic between bytes and blocks.

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Digest, DigestMismatch};

/// Size of a block in bytes: the unit of the EBS direct APIs.
pub const BLOCK_SIZE: usize = 512 * 1024;

/// [`BLOCK_SIZE`] for arithmetic on offsets.
pub const BLOCK_SIZE_U64: u64 = BLOCK_SIZE as u64;

static ZEROS: [u8; BLOCK_SIZE] = [0; BLOCK_SIZE];

/// The content of a hole or a zero block: [`BLOCK_SIZE`] zeros that are never allocated.
pub fn zeros() -> Bytes {
    Bytes::from_static(&ZEROS)
}

/// Position of a block in its volume, in blocks from the start.
///
/// A volume of 64 TiB has 2^27 blocks, so 32 bits are enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlockIndex(pub u32);

impl BlockIndex {
    /// The first block of a volume.
    pub const ZERO: Self = Self(0);

    /// The block that holds the byte at `offset`.
    ///
    /// # Panics
    ///
    /// If `offset` is beyond 2^32 blocks (2 PiB), 32 times the largest volume.
    pub fn containing(offset: u64) -> Self {
        let index = offset / BLOCK_SIZE_U64;
        Self(u32::try_from(index).expect("offsets are checked against the size of a volume"))
    }

    /// Offset of the first byte of this block.
    pub fn offset(self) -> u64 {
        u64::from(self.0) * BLOCK_SIZE_U64
    }

    /// The block after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for BlockIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The part of one block that a range of bytes covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockPart {
    /// The block.
    pub index: BlockIndex,
    /// First byte of the part, from the start of the block.
    pub start: usize,
    /// Length of the part in bytes, at least 1.
    pub len: usize,
}

/// The parts of blocks that make up the bytes `offset..offset + len`, in order.
pub fn block_parts(offset: u64, len: u64) -> impl Iterator<Item = BlockPart> {
    let end = offset.saturating_add(len);
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let index = BlockIndex::containing(at);
        let stop = end.min(index.offset() + BLOCK_SIZE_U64);
        let part = BlockPart {
            index,
            start: usize::try_from(at - index.offset()).expect("less than a block"),
            len: usize::try_from(stop - at).expect("at most a block"),
        };
        at = stop;
        Some(part)
    })
}

/// The content of one block, with its digest.
///
/// There is no way to make one without hashing the data: whoever holds a `Block` holds bytes that
/// are what its digest says.
#[derive(Clone, PartialEq, Eq)]
pub enum Block {
    /// [`BLOCK_SIZE`] zeros, written as such.
    Zero,
    /// Anything else.
    Data {
        /// [`BLOCK_SIZE`] bytes.
        bytes: VerifiedBytes,
    },
}

/// Bytes whose digest was computed from them.
#[derive(Clone, PartialEq, Eq)]
pub struct VerifiedBytes {
    bytes: Bytes,
    digest: Digest,
}

impl Block {
    /// Hashes `bytes` into a block.
    ///
    /// # Panics
    ///
    /// If there are not exactly [`BLOCK_SIZE`] bytes.
    pub fn new(bytes: Bytes) -> Self {
        assert_eq!(bytes.len(), BLOCK_SIZE, "a block has {BLOCK_SIZE} bytes");
        if bytes[..] == ZEROS[..] {
            return Self::Zero;
        }
        let digest = Digest::of(&bytes);
        Self::Data { bytes: VerifiedBytes { bytes, digest } }
    }

    /// Hashes the bytes of many blocks at once, which is faster than one after the other.
    ///
    /// # Panics
    ///
    /// As [`Block::new`].
    pub fn many(all: Vec<Bytes>) -> Vec<Self> {
        assert!(
            all.iter().all(|bytes| bytes.len() == BLOCK_SIZE),
            "a block has {BLOCK_SIZE} bytes"
        );
        let is_data: Vec<bool> = all.iter().map(|bytes| bytes[..] != ZEROS[..]).collect();
        let data = all.iter().zip(&is_data).filter(|&(_, &is_data)| is_data);
        let mut digests =
            Digest::of_many(&data.map(|(bytes, _)| &bytes[..]).collect::<Vec<_>>()).into_iter();
        let blocks = all.into_iter().zip(is_data).map(|(bytes, is_data)| {
            if !is_data {
                return Self::Zero;
            }
            let digest = digests.next().expect("one for each with data");
            Self::Data { bytes: VerifiedBytes { bytes, digest } }
        });
        blocks.collect()
    }

    /// The block, if it has the digest `expected`.
    ///
    /// # Errors
    ///
    /// If it has another one: then it must not be used.
    pub fn expect(self, expected: Digest) -> Result<Self, DigestMismatch> {
        let actual = self.digest();
        if actual == expected { Ok(self) } else { Err(DigestMismatch { expected, actual }) }
    }

    /// The digest of the content.
    pub fn digest(&self) -> Digest {
        match self {
            Self::Zero => Digest::OF_ZEROS,
            Self::Data { bytes } => bytes.digest,
        }
    }

    /// The content, [`BLOCK_SIZE`] bytes.
    pub fn bytes(&self) -> Bytes {
        match self {
            Self::Zero => zeros(),
            Self::Data { bytes } => bytes.bytes.clone(),
        }
    }

    /// Whether the content is all zeros.
    pub fn is_zero(&self) -> bool {
        matches!(self, Self::Zero)
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero => f.write_str("Zero"),
            Self::Data { bytes } => write!(f, "Data({})", bytes.digest),
        }
    }
}

impl fmt::Debug for VerifiedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.digest)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_digest_of_zeros_is_the_digest_of_zeros() {
        assert_eq!(Digest::of(&ZEROS), Digest::OF_ZEROS);
        assert_eq!(Digest::OF_ZEROS.to_base64(), "B4VNL+8pega6gWheZgwzLeNtXRjVRpJ9MNqtbX/aFUE=");
    }

    #[test]
    fn a_block_of_zeros_is_zero_and_one_bit_makes_it_data() {
        assert_eq!(Block::new(zeros()), Block::Zero);
        let mut bytes = vec![0; BLOCK_SIZE];
        bytes[BLOCK_SIZE - 1] = 1;
        let block = Block::new(bytes.into());
        assert!(!block.is_zero());
        assert_ne!(block.digest(), Digest::OF_ZEROS);
    }

    #[test]
    fn a_flipped_bit_is_refused() {
        let bytes = vec![7; BLOCK_SIZE];
        let digest = Digest::of(&bytes);
        assert!(Block::new(bytes.clone().into()).expect(digest).is_ok());
        let mut flipped = bytes;
        flipped[12345] ^= 4;
        let error = Block::new(flipped.into()).expect(digest).unwrap_err();
        assert_eq!(error.expected, digest);
        assert!(Block::new(zeros()).expect(digest).is_err());
    }

    #[test]
    fn many_are_what_each_of_them_is() {
        let bytes = |n: usize| match n % 3 {
            0 => zeros(),
            _ => Bytes::from(vec![n as u8; BLOCK_SIZE]),
        };
        let all: Vec<Bytes> = (0..20).map(bytes).collect();
        let each: Vec<Block> = all.iter().cloned().map(Block::new).collect();
        assert_eq!(Block::many(all), each);
        assert!(Block::many(Vec::new()).is_empty());
    }

    proptest! {
        #[test]
        fn parts_cover_the_range_in_order(offset in 0u64..(1 << 46), len in 0u64..(5 << 19)) {
            let mut at = offset;
            for part in block_parts(offset, len) {
                prop_assert_eq!(part.index.offset() + part.start as u64, at);
                prop_assert!(part.len > 0 && part.start + part.len <= BLOCK_SIZE);
                at += part.len as u64;
            }
            prop_assert_eq!(at, offset + len);
        }

        #[test]
        fn the_containing_block_contains(offset in 0u64..(1 << 46)) {
            let index = BlockIndex::containing(offset);
            prop_assert!(index.offset() <= offset && offset < index.next().offset());
        }
    }
}
