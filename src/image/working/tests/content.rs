//! The model: the bytes of an image, in pages, of which those that are zeros are left out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::model::{BLOCK_SIZE, BLOCK_SIZE_U64};

const PAGE: usize = 4096;
const PAGE_U64: u64 = PAGE as u64;

/// What an image holds.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Content {
    pub(super) len: u64,
    pages: BTreeMap<u64, Arc<[u8]>>,
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes, data in blocks {:?}", self.len, self.blocks())
    }
}

impl Content {
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        self.len = self.len.max(offset + data.len() as u64);
        let mut at = 0;
        while at < data.len() {
            let (page, inside) = ((offset + at as u64) / PAGE_U64, offset as usize + at);
            let inside = inside % PAGE;
            let step = (PAGE - inside).min(data.len() - at);
            let piece = &data[at..at + step];
            let mut bytes = match self.pages.get(&page) {
                Some(old) => old.to_vec(),
                None => vec![0; PAGE],
            };
            bytes[inside..inside + step].copy_from_slice(piece);
            if bytes.iter().any(|&byte| byte != 0) {
                self.pages.insert(page, bytes.into());
            } else {
                self.pages.remove(&page);
            }
            at += step;
        }
    }

    /// Zeros a range, as far as it is inside.
    pub(super) fn zero(&mut self, offset: u64, len: u64) {
        let end = (offset + len).min(self.len);
        let pages: Vec<u64> =
            self.pages.range(offset / PAGE_U64..).map(|(page, _)| *page).collect();
        for page in pages {
            let (start, stop) = (page * PAGE_U64, (page + 1) * PAGE_U64);
            let (from, to) = (start.max(offset), stop.min(end));
            if from < to {
                let len = self.len;
                self.write(from, &vec![0; (to - from) as usize]);
                self.len = len;
            }
        }
    }

    pub(super) fn truncate(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len - len);
        }
        self.len = len;
    }

    /// Blocks with data that is not zeros.
    pub(super) fn blocks(&self) -> BTreeSet<u32> {
        self.pages.keys().map(|page| (page * PAGE_U64 / BLOCK_SIZE_U64) as u32).collect()
    }

    /// The first offsets of the pages with data that is not zeros.
    pub(super) fn data(&self) -> impl Iterator<Item = u64> {
        self.pages.keys().map(|page| page * PAGE_U64)
    }

    /// The bytes of a range, as far as it is inside.
    pub(super) fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let len = (self.len.saturating_sub(offset)).min(len as u64) as usize;
        let mut bytes = vec![0; len];
        let end = offset + len as u64;
        for (page, data) in self.pages.range(offset / PAGE_U64..end.div_ceil(PAGE_U64)) {
            let start = page * PAGE_U64;
            let (from, to) = (start.max(offset), (start + PAGE_U64).min(end));
            if from < to {
                bytes[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&data[(from - start) as usize..(to - start) as usize]);
            }
        }
        bytes
    }

    /// The bytes of a block, as far as it is inside.
    pub(super) fn block(&self, index: u32) -> Vec<u8> {
        self.read(u64::from(index) * BLOCK_SIZE_U64, BLOCK_SIZE)
    }
}

/// Where two runs of bytes differ, for a message.
pub(super) fn difference(a: &[u8], b: &[u8]) -> Option<String> {
    if a.len() != b.len() {
        return Some(format!("{} bytes instead of {}", a.len(), b.len()));
    }
    let at = (0..a.len()).find(|&at| a[at] != b[at])?;
    let count = (0..a.len()).filter(|&at| a[at] != b[at]).count();
    Some(format!("{} instead of {} at {at}, and {count} in all", a[at], b[at]))
}
