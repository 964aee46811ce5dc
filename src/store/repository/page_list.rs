//! Page lists: the index pages of one snapshot.

use bytes::Bytes;

use super::names::ObjectId;
use super::table::{Entry, PAGE_BLOCKS, u32_at};
use crate::model::{BlockIndex, Digest, Digester, VolumeSize};

const MAGIC: &[u8; 4] = b"FSPL";
const VERSION: u8 = 1;
const HEADER_LEN: usize = 4 + 1 + 3 + 4;
/// Span, id, content digest, number of data blocks, number of zero blocks.
const ENTRY_LEN: usize = 4 + ObjectId::LEN + 32 + 4 + 4;

/// Spans of the largest volume, of 64 TiB.
const MAX_SPANS: u32 = 8192;

/// An index page in a page list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct PageRef {
    /// Which 8 GiB of the volume it is for, counted from 0.
    pub(super) span: u32,
    pub(super) page: ObjectId,
    pub(super) content: Digest,
    pub(super) data_blocks: u32,
    pub(super) zero_blocks: u32,
}

impl PageRef {
    /// Describes a page with these entries.
    pub(super) fn new(span: u32, page: ObjectId, entries: &[Entry]) -> Self {
        let data = entries.iter().filter(|entry| entry.location.is_some());
        let mut digester = Digester::default();
        let mut data_blocks = 0;
        for entry in data {
            digester.update(entry.index.0.to_le_bytes());
            digester.update(entry.digest.0);
            data_blocks += 1;
        }
        let all = u32::try_from(entries.len()).expect("a page has at most 16,384");
        Self { span, page, content: digester.finish(), data_blocks, zero_blocks: all - data_blocks }
    }
}

/// The first block of a span.
pub(super) fn span_start(span: u32) -> BlockIndex {
    BlockIndex(span * PAGE_BLOCKS)
}

/// The span that a block is in.
pub(super) fn span_of(index: BlockIndex) -> u32 {
    index.0 / PAGE_BLOCKS
}

/// The digest of the content of a snapshot: equal for equal images of equal size, however packed.
pub(super) fn content_digest(size: VolumeSize, pages: &[PageRef]) -> Digest {
    let mut digester = Digester::default();
    digester.update(size.bytes().to_le_bytes());
    // A page without data reads as if it were not there, and counts so.
    for page in pages.iter().filter(|page| page.data_blocks > 0) {
        digester.update(page.span.to_le_bytes());
        digester.update(page.content.0);
    }
    digester.finish()
}

/// Encodes pages whose spans ascend strictly.
pub(super) fn encode(pages: &[PageRef]) -> Bytes {
    let mut bytes = Vec::with_capacity(HEADER_LEN + pages.len() * ENTRY_LEN);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&[VERSION, 0, 0, 0]);
    let count = u32::try_from(pages.len()).expect("a volume has at most 8,192 spans");
    bytes.extend_from_slice(&count.to_le_bytes());
    for page in pages {
        bytes.extend_from_slice(&page.span.to_le_bytes());
        bytes.extend_from_slice(&page.page.to_bytes());
        bytes.extend_from_slice(&page.content.0);
        bytes.extend_from_slice(&page.data_blocks.to_le_bytes());
        bytes.extend_from_slice(&page.zero_blocks.to_le_bytes());
    }
    bytes.into()
}

/// Reads a page list; what is wrong with it otherwise.
pub(super) fn decode(bytes: &[u8]) -> Result<Vec<PageRef>, &'static str> {
    if bytes.len() < HEADER_LEN || &bytes[..4] != MAGIC {
        return Err("it is not a page list");
    }
    if bytes[4..8] != [VERSION, 0, 0, 0] {
        return Err("it is of an unknown version");
    }
    if bytes.len() != HEADER_LEN + u32_at(bytes, 8) as usize * ENTRY_LEN {
        return Err("its length does not match its count");
    }
    let page = |entry: &[u8]| PageRef {
        span: u32_at(entry, 0),
        page: ObjectId::from_bytes(&entry[4..4 + ObjectId::LEN]),
        content: Digest(entry[4 + ObjectId::LEN..][..32].try_into().expect("32 bytes")),
        data_blocks: u32_at(entry, ENTRY_LEN - 8),
        zero_blocks: u32_at(entry, ENTRY_LEN - 4),
    };
    let pages: Vec<_> = bytes[HEADER_LEN..].chunks_exact(ENTRY_LEN).map(page).collect();
    if pages.last().is_some_and(|page| page.span >= MAX_SPANS) {
        return Err("it names a span beyond the largest volume");
    }
    if pages.windows(2).any(|pair| pair[0].span >= pair[1].span) {
        return Err("its spans do not ascend");
    }
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::store::repository::table::tests::entries;

    fn page(span: u32, entries: &[Entry]) -> PageRef {
        PageRef::new(span, ObjectId { digest: Digest::OF_ZEROS, writer: Uuid::new_v4() }, entries)
    }

    proptest! {
        #[test]
        fn goes_there_and_back(spans in prop::collection::btree_set(0..8192u32, 0..9), e in entries()) {
            let pages: Vec<_> = spans.into_iter().map(|span| page(span, &e)).collect();
            prop_assert_eq!(decode(&encode(&pages)), Ok(pages));
        }

        #[test]
        fn zero_blocks_and_packing_do_not_count(e in entries()) {
            let size = VolumeSize::from_gib(8).unwrap();
            let data: Vec<_> = e.iter().copied().filter(|entry| entry.location.is_some()).collect();
            let with = content_digest(size, &[page(0, &e)]);
            prop_assert_eq!(with, content_digest(size, &[page(0, &data)]));
            let zeros: Vec<_> = e.iter().copied().filter(|entry| entry.location.is_none()).collect();
            prop_assert_eq!(with, content_digest(size, &[page(0, &data), page(1, &zeros)]));
            prop_assert_ne!(with, content_digest(VolumeSize::from_gib(9).unwrap(), &[page(0, &e)]));
        }
    }

    #[test]
    fn garbage_is_refused() {
        let good = encode(&[page(0, &[]), page(1, &[])]);
        assert!(decode(&good).is_ok());
        for len in 0..good.len() {
            assert!(decode(&good[..len]).is_err());
        }
        assert!(decode(&encode(&[page(1, &[]), page(1, &[])])).is_err());
    }
}
