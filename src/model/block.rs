//! A block, its index and its digest, and the arithmetic between bytes and blocks.

use std::fmt;

use super::BlockBuffer;
use base64::Engine as _;
use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};

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

/// A SHA-256: of a block, of a page, or of the content of a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of [`BLOCK_SIZE`] zeros.
    pub const OF_ZEROS: Self = Self([
        0x07, 0x85, 0x4d, 0x2f, 0xef, 0x29, 0x7a, 0x06, 0xba, 0x81, 0x68, 0x5e, 0x66, 0x0c, 0x33,
        0x2d, 0xe3, 0x6d, 0x5d, 0x18, 0xd5, 0x46, 0x92, 0x7d, 0x30, 0xda, 0xad, 0x6d, 0x7f, 0xda,
        0x15, 0x41,
    ]);

    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// Lower-case hexadecimal, 64 characters.
    pub fn to_hex(self) -> String {
        use fmt::Write as _;
        self.0.iter().fold(String::with_capacity(64), |mut hex, byte| {
            write!(hex, "{byte:02x}").expect("writing to a string does not fail");
            hex
        })
    }

    /// Reads what [`to_hex`](Self::to_hex) writes; anything else is `None`.
    pub fn from_hex(hex: &str) -> Option<Self> {
        if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        {
            return None;
        }
        let mut digest = [0; 32];
        for (byte, pair) in digest.iter_mut().zip(hex.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Self(digest))
    }

    /// Standard base64, as the EBS direct APIs write a checksum.
    pub fn to_base64(self) -> String {
        base64::engine::general_purpose::STANDARD.encode(self.0)
    }

    /// Reads what [`to_base64`](Self::to_base64) writes; anything else is `None`.
    pub fn from_base64(text: &str) -> Option<Self> {
        let bytes = base64::engine::general_purpose::STANDARD.decode(text).ok()?;
        bytes.try_into().ok().map(Self)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_hex())
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_hex())
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let hex = String::deserialize(deserializer)?;
        Self::from_hex(&hex).ok_or_else(|| serde::de::Error::custom("not a SHA-256 in hexadecimal"))
    }
}

/// A digest that is computed piece by piece.
#[derive(Clone, Debug, Default)]
pub struct Digester(Sha256);

impl Digester {
    /// Appends `bytes` to what is hashed.
    pub fn update(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.update(bytes);
    }

    /// The digest of everything that was appended.
    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

/// Data that is not what its digest says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the data has the SHA-256 {actual}, not {expected}")]
pub struct DigestMismatch {
    /// What the data should have had.
    pub expected: Digest,
    /// What it has.
    pub actual: Digest,
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

    /// Hashes `bytes` into a block that must have the digest `expected`.
    ///
    /// # Errors
    ///
    /// If it has another one: then the bytes must not be used.
    ///
    /// # Panics
    ///
    /// As [`Block::new`].
    pub fn verified(bytes: Bytes, expected: Digest) -> Result<Self, DigestMismatch> {
        Self::new(bytes).expect(expected)
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

/// Bytes that are copied before they are hashed.
const COPIED_AT_ONCE: usize = 4096;

/// Makes a block of pieces as they come, and hashes each while it is in the processor's cache.
#[derive(Debug)]
pub struct BlockHasher {
    buffer: BlockBuffer,
    len: usize,
    digester: Digester,
}

/// More data than a block has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("more than the {BLOCK_SIZE} bytes of a block")]
pub struct MoreThanABlock;

impl BlockHasher {
    /// One without data.
    #[must_use]
    pub fn new() -> Self {
        Self { buffer: BlockBuffer::block(), len: 0, digester: Digester::default() }
    }

    /// Bytes that were pushed.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing was pushed.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends a piece.
    ///
    /// # Errors
    ///
    /// If that is more than a block has.
    pub fn push(&mut self, piece: &[u8]) -> Result<(), MoreThanABlock> {
        let end = self.len + piece.len();
        let room = self.buffer.get_mut(self.len..end).ok_or(MoreThanABlock)?;
        // So little at a time that the copy is written back while the next piece is hashed.
        for (room, piece) in room.chunks_mut(COPIED_AT_ONCE).zip(piece.chunks(COPIED_AT_ONCE)) {
            room.copy_from_slice(piece);
            self.digester.update(piece);
        }
        self.len = end;
        Ok(())
    }

    /// The block; `None` if that is less than one.
    pub fn finish(self) -> Option<Block> {
        let Self { buffer, len, digester } = self;
        if len != BLOCK_SIZE {
            return None;
        }
        match digester.finish() {
            Digest::OF_ZEROS => Some(Block::Zero),
            digest => Some(Block::Data { bytes: VerifiedBytes { bytes: buffer.freeze(), digest } }),
        }
    }
}

impl Default for BlockHasher {
    fn default() -> Self {
        Self::new()
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
        assert!(Block::verified(bytes.clone().into(), digest).is_ok());
        let mut flipped = bytes;
        flipped[12345] ^= 4;
        let error = Block::verified(flipped.into(), digest).unwrap_err();
        assert_eq!(error.expected, digest);
        assert!(Block::verified(zeros(), digest).is_err());
    }

    #[test]
    fn pieces_make_the_block_that_the_whole_makes() {
        let bytes: Vec<u8> = (0..BLOCK_SIZE).map(|n| (n / 7) as u8).collect();
        for size in [1000, 65_536, BLOCK_SIZE] {
            for whole in [&bytes[..], &ZEROS[..]] {
                let mut hasher = BlockHasher::new();
                whole.chunks(size).for_each(|piece| hasher.push(piece).unwrap());
                assert_eq!(hasher.finish(), Some(Block::new(whole.to_vec().into())));
            }
        }
        let mut hasher = BlockHasher::new();
        hasher.push(&bytes[1..]).unwrap();
        assert_eq!(hasher.push(b"ab"), Err(MoreThanABlock));
        assert!(hasher.finish().is_none());
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

        #[test]
        fn hexadecimal_goes_there_and_back(bytes in prop::array::uniform32(0u8..)) {
            prop_assert_eq!(Digest::from_hex(&Digest(bytes).to_hex()), Some(Digest(bytes)));
        }
    }
}
