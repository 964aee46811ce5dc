//! The bytes of a block.

use bytes::Bytes;

use super::mix::{key, nth};
use super::recipe::{Content, Recipe};
use crate::model::{BLOCK_SIZE, BlockIndex};

/// Bytes after which compressible content begins to repeat itself, and how often they are there.
const PIECE: usize = 1024;
const REPEATS: usize = 4;

const _: () = assert!(BLOCK_SIZE.is_multiple_of(PIECE * REPEATS));

/// The content of a block of a family since this version has changed it.
///
/// It begins with the index (8 bytes, little-endian), the version and the family (4 bytes each), so
/// that no two blocks of a store are equal and none is a zero block.
pub(super) fn bytes(recipe: &Recipe, family: u32, index: BlockIndex, version: u32) -> Bytes {
    let of = [recipe.seed.into(), family.into(), version.into(), index.0.into()];
    let key = key(of);
    let mut bytes = vec![0; BLOCK_SIZE];
    match recipe.content {
        Content::Random => fill(&mut bytes, key, 0),
        Content::Compressible => {
            for (n, part) in bytes.chunks_exact_mut(PIECE * REPEATS).enumerate() {
                let (piece, copies) = part.split_at_mut(PIECE);
                fill(piece, key, (n * PIECE / 8) as u64);
                copies.chunks_exact_mut(PIECE).for_each(|copy| copy.copy_from_slice(piece));
            }
        }
    }
    bytes[..8].copy_from_slice(&u64::from(index.0).to_le_bytes());
    bytes[8..12].copy_from_slice(&version.to_le_bytes());
    bytes[12..16].copy_from_slice(&family.to_le_bytes());
    bytes.into()
}

/// Fills whole words with the numbers of a sequence from the `first` on.
fn fill(bytes: &mut [u8], key: u64, first: u64) {
    for (word, n) in bytes.chunks_exact_mut(8).zip(first..) {
        word.copy_from_slice(&nth(key, n).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(text: &str) -> Recipe {
        text.parse().unwrap()
    }

    #[test]
    fn content_compresses_as_the_url_says() {
        let percent = |text: &str| {
            let bytes = bytes(&recipe(text), 1, BlockIndex(5), 1);
            100 * BLOCK_SIZE / zstd::bulk::compress(&bytes, 1).unwrap().len()
        };
        let random = percent("synth:");
        assert!(random <= 100, "{random}");
        let compressible = percent("synth:?content=compressible");
        assert!((350..450).contains(&compressible), "{compressible}");
    }

    #[test]
    fn content_depends_on_everything() {
        let of = |text: &str, family, index, version| {
            bytes(&recipe(text), family, BlockIndex(index), version)
        };
        let all = [
            of("synth:", 1, 0, 1),
            of("synth:?seed=1", 1, 0, 1),
            of("synth:", 2, 0, 1),
            of("synth:", 1, 1, 1),
            of("synth:", 1, 0, 2),
        ];
        for (n, one) in all.iter().enumerate() {
            for other in &all[n + 1..] {
                let equal = one[16..].iter().zip(&other[16..]).filter(|(a, b)| a == b).count();
                assert!((BLOCK_SIZE / 512..BLOCK_SIZE / 128).contains(&equal), "{equal} equal");
            }
        }
        assert_eq!(of("synth:?size=1GiB&density=0.5", 1, 0, 1), all[0], "nor on anything else");
    }

    #[test]
    fn content_begins_with_what_it_is() {
        let bytes = bytes(&recipe("synth:"), 3, BlockIndex(0x0102_0304), 500);
        assert_eq!(bytes[..16], [4, 3, 2, 1, 0, 0, 0, 0, 0xf4, 1, 0, 0, 3, 0, 0, 0]);
    }
}
