//! SHA-256, of one message or of many at once.

use std::fmt;
use std::iter::repeat_n;
use std::sync::LazyLock;

use base64::Engine as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};

/// Messages that are hashed at a time at most: with blocks, 16 MiB.
const MAX_LANES: usize = 32;

/// A SHA-256: of a block, of a page, or of the content of a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of [`BLOCK_SIZE`](super::BLOCK_SIZE) zeros.
    pub const OF_ZEROS: Self = Self([
        0x07, 0x85, 0x4d, 0x2f, 0xef, 0x29, 0x7a, 0x06, 0xba, 0x81, 0x68, 0x5e, 0x66, 0x0c, 0x33,
        0x2d, 0xe3, 0x6d, 0x5d, 0x18, 0xd5, 0x46, 0x92, 0x7d, 0x30, 0xda, 0xad, 0x6d, 0x7f, 0xda,
        0x15, 0x41,
    ]);

    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The digests of messages, which takes about half as long as one after the other where there are
    /// [`lanes`](Self::lanes) of them.
    pub fn of_many(messages: &[&[u8]]) -> Vec<Self> {
        if messages.len() > 1 && *MANY_ARE_RIGHT {
            many(messages)
        } else {
            messages.iter().map(|message| Self::of(message)).collect()
        }
    }

    /// How many messages this processor hashes at a time; more are better than fewer up to there.
    pub fn lanes() -> usize {
        if *MANY_ARE_RIGHT { tape_sha256::lane_width().clamp(1, MAX_LANES) } else { 1 }
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

fn many(messages: &[&[u8]]) -> Vec<Digest> {
    let lanes = tape_sha256::lane_width();
    let missing = messages.len().next_multiple_of(lanes) - messages.len();
    // A round that is nearly full would be hashed by instructions for fewer messages, which takes longer.
    let fill = if missing <= lanes / 4 { missing } else { 0 };
    let filled: Vec<&[u8]> = messages.iter().copied().chain(repeat_n(messages[0], fill)).collect();
    let mut digests = vec![[0; 32]; filled.len()];
    tape_sha256::hash_many(&filled, &mut digests);
    digests.truncate(messages.len());
    digests.into_iter().map(Digest).collect()
}

/// Whether hashing many at a time comes to what hashing one does, on this processor. Each has code of its
/// own for it, and not every one of them was seen.
static MANY_ARE_RIGHT: LazyLock<bool> = LazyLock::new(|| {
    let bytes: Vec<u8> = (0..2048_u32).map(|n| (n.wrapping_mul(0x9E37_79B9) >> 24) as u8).collect();
    let check = |count| {
        let messages: Vec<&[u8]> = (0..count).map(|n| &bytes[n * 7..][..1024 + n]).collect();
        let equal: Vec<&[u8]> = (0..count).map(|n| &bytes[n * 7..][..1024]).collect();
        [messages, equal].iter().all(|messages| {
            many(messages).into_iter().eq(messages.iter().map(|message| Digest::of(message)))
        })
    };
    let right = std::panic::catch_unwind(|| (1..=MAX_LANES + 1).all(check)).unwrap_or(false);
    if !right {
        let kind = tape_sha256::backend();
        tracing::warn!("{kind} is wrong about SHA-256 on this processor: hashing one at a time");
    }
    right
});

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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn many_are_hashed_rightly_here() {
        assert!(*MANY_ARE_RIGHT, "{}", tape_sha256::backend());
        assert!(Digest::of_many(&[]).is_empty());
    }

    proptest! {
        #[test]
        fn many_have_the_digests_of_each(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..40),
        ) {
            let messages: Vec<&[u8]> = messages.iter().map(Vec::as_slice).collect();
            let each: Vec<Digest> = messages.iter().map(|message| Digest::of(message)).collect();
            prop_assert_eq!(Digest::of_many(&messages), each);
        }

        #[test]
        fn hexadecimal_goes_there_and_back(bytes in prop::array::uniform32(0u8..)) {
            prop_assert_eq!(Digest::from_hex(&Digest(bytes).to_hex()), Some(Digest(bytes)));
        }
    }
}
