//! Tables of blocks: index pages and records, which say where the data of blocks is.
//!
//! All numbers are little-endian. `docs/repository-format.md` describes this byte by byte.

use bytes::Bytes;

use super::names::ObjectId;
use crate::model::{BlockIndex, Digest};

/// Blocks that one index page spans: 8 GiB.
pub(super) const PAGE_BLOCKS: u32 = 16_384;

const MAGIC: &[u8; 4] = b"FSPT";
const VERSION: u8 = 1;
/// Magic, version, three bytes of zeros, number of packs, number of entries.
const HEADER_LEN: usize = 4 + 1 + 3 + 4 + 4;
/// Index, pack, offset, length, digest.
const ENTRY_LEN: usize = 4 + 4 + 4 + 4 + 32;
/// Bytes of a frame at most: a block that does not shrink, and what zstd adds.
const MAX_FRAME_LEN: u32 = 512 * 1024 + 4096;
/// In the place of a pack: a zero block, which has none.
const NO_PACK: u32 = u32::MAX;

/// Where the data of a block is: a zstd frame in a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Location {
    pub(super) pack: ObjectId,
    pub(super) offset: u32,
    pub(super) length: u32,
}

/// One block of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) index: BlockIndex,
    /// `None` for a zero block.
    pub(super) location: Option<Location>,
    pub(super) digest: Digest,
}

/// A table in its encoded form, which was checked once.
#[derive(Clone, Debug)]
pub(super) struct Table {
    bytes: Bytes,
    packs: usize,
    entries: usize,
}

impl Table {
    /// Encodes entries that ascend strictly.
    pub(super) fn encode(entries: &[Entry]) -> Bytes {
        debug_assert!(entries.windows(2).all(|pair| pair[0].index < pair[1].index));
        let mut packs: Vec<ObjectId> =
            entries.iter().filter_map(|entry| entry.location.map(|l| l.pack)).collect();
        packs.sort_unstable();
        packs.dedup();
        let count = |n: usize| u32::try_from(n).expect("a table has few entries").to_le_bytes();
        let len = HEADER_LEN + packs.len() * ObjectId::LEN + entries.len() * ENTRY_LEN;
        let mut bytes = Vec::with_capacity(len);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&[VERSION, 0, 0, 0]);
        bytes.extend_from_slice(&count(packs.len()));
        bytes.extend_from_slice(&count(entries.len()));
        for pack in &packs {
            bytes.extend_from_slice(&pack.to_bytes());
        }
        for entry in entries {
            let (pack, offset, length) = match entry.location {
                None => (NO_PACK.to_le_bytes(), 0, 0),
                Some(Location { pack, offset, length }) => {
                    let number = packs.binary_search(&pack).expect("it was collected above");
                    (count(number), offset, length)
                }
            };
            bytes.extend_from_slice(&entry.index.0.to_le_bytes());
            bytes.extend_from_slice(&pack);
            bytes.extend_from_slice(&offset.to_le_bytes());
            bytes.extend_from_slice(&length.to_le_bytes());
            bytes.extend_from_slice(&entry.digest.0);
        }
        bytes.into()
    }

    /// Checks the form of a table; what is wrong with it otherwise.
    pub(super) fn decode(bytes: Bytes) -> Result<Self, &'static str> {
        if bytes.len() < HEADER_LEN || &bytes[..4] != MAGIC {
            return Err("it is not a table of blocks");
        }
        if bytes[4..8] != [VERSION, 0, 0, 0] {
            return Err("it is of an unknown version");
        }
        let (packs, entries) = (u32_at(&bytes, 8) as usize, u32_at(&bytes, 12) as usize);
        if bytes.len() != HEADER_LEN + packs * ObjectId::LEN + entries * ENTRY_LEN {
            return Err("its length does not match its counts");
        }
        let table = Self { bytes, packs, entries };
        let mut last = None;
        for n in 0..entries {
            let at = table.entry_at(n);
            let (index, pack) = (u32_at(&table.bytes, at), u32_at(&table.bytes, at + 4));
            if last >= Some(index) {
                return Err("its blocks do not ascend");
            }
            let (length, digest) = (u32_at(&table.bytes, at + 12), &table.bytes[at + 16..][..32]);
            if pack == NO_PACK {
                if digest != Digest::OF_ZEROS.0 {
                    return Err("a block without data is not one of zeros");
                }
            } else if pack as usize >= packs {
                return Err("a block names a pack that is not in it");
            } else if length == 0 || length > MAX_FRAME_LEN {
                return Err("a block has an impossible length");
            }
            last = Some(index);
        }
        Ok(table)
    }

    pub(super) fn len(&self) -> usize {
        self.entries
    }

    /// Bytes that it takes in memory.
    pub(super) fn size(&self) -> usize {
        self.bytes.len()
    }

    fn entry_at(&self, n: usize) -> usize {
        HEADER_LEN + self.packs * ObjectId::LEN + n * ENTRY_LEN
    }

    pub(super) fn index(&self, n: usize) -> BlockIndex {
        BlockIndex(u32_at(&self.bytes, self.entry_at(n)))
    }

    pub(super) fn entry(&self, n: usize) -> Entry {
        let bytes = &self.bytes[self.entry_at(n)..][..ENTRY_LEN];
        let location = match u32_at(bytes, 4) {
            NO_PACK => None,
            number => Some(Location {
                pack: self.pack(number as usize),
                offset: u32_at(bytes, 8),
                length: u32_at(bytes, 12),
            }),
        };
        let digest = Digest(bytes[16..].try_into().expect("32 bytes"));
        Entry { index: BlockIndex(u32_at(bytes, 0)), location, digest }
    }

    fn pack(&self, number: usize) -> ObjectId {
        ObjectId::from_bytes(&self.bytes[HEADER_LEN + number * ObjectId::LEN..][..ObjectId::LEN])
    }

    /// The packs that its blocks are in.
    pub(super) fn packs(&self) -> impl Iterator<Item = ObjectId> + '_ {
        (0..self.packs).map(|number| self.pack(number))
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        (0..self.entries).map(|n| self.entry(n))
    }

    /// The position of the first entry at or behind `index`.
    pub(super) fn position(&self, index: BlockIndex) -> usize {
        let (mut low, mut high) = (0, self.entries);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.index(middle) < index { low = middle + 1 } else { high = middle }
        }
        low
    }
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    fn location() -> impl Strategy<Value = Location> {
        (0..4u8, 0..2u128, any::<u32>(), 1..=MAX_FRAME_LEN).prop_map(
            |(digest, writer, offset, length)| Location {
                pack: ObjectId { digest: Digest([digest; 32]), writer: Uuid::from_u128(writer) },
                offset,
                length,
            },
        )
    }

    pub(in super::super) fn entries() -> impl Strategy<Value = Vec<Entry>> {
        let content = prop_oneof![
            Just((None, Digest::OF_ZEROS)),
            (location(), any::<u8>()).prop_map(|(at, digest)| (Some(at), Digest([digest; 32]))),
        ];
        prop::collection::btree_map(any::<u32>(), content, 0..40).prop_map(|map| {
            let entry =
                |(index, (location, digest))| Entry { index: BlockIndex(index), location, digest };
            map.into_iter().map(entry).collect()
        })
    }

    proptest! {
        #[test]
        fn goes_there_and_back(entries in entries(), probe in any::<u32>()) {
            let table = Table::decode(Table::encode(&entries)).unwrap();
            prop_assert_eq!(table.entries().collect::<Vec<_>>(), entries.clone());
            let position = entries.partition_point(|entry| entry.index.0 < probe);
            prop_assert_eq!(table.position(BlockIndex(probe)), position);
        }

        #[test]
        fn garbage_is_refused_not_believed(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Table::decode(bytes.into()).is_err());
        }

        #[test]
        fn a_cut_is_seen(entries in entries(), cut in 1..100usize) {
            let bytes = Table::encode(&entries);
            let short = bytes.slice(..bytes.len().saturating_sub(cut));
            prop_assert!(Table::decode(short).is_err());
        }
    }
}
