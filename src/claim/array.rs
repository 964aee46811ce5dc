//! Members of arrays, whose first one begins as the array does, which is longer.

use super::bytes_at::{has, u32_le};

/// How much of the end is read.
pub(super) const TAIL: u64 = 128 << 10;

/// What an image of `len` bytes is a member of; `tail` is its last [`TAIL`] bytes.
pub(super) fn member(head: &[u8], tail: &[u8], len: u64) -> Option<&'static str> {
    const LINUX: u32 = 0xa92b_4efc;
    let start = len - tail.len() as u64;
    let from_end = |offset: u64| usize::try_from(offset.checked_sub(start)?).ok();
    // Versions 1.1 and 1.2 are at the beginning, 1.0 and 0.90 at the end.
    let places = [
        Some(0).filter(|_| u32_le(head, 0) == Some(LINUX)),
        Some(0).filter(|_| u32_le(head, 4096) == Some(LINUX)),
        from_end((len / 512).saturating_sub(16) / 8 * 4096)
            .filter(|at| u32_le(tail, *at) == Some(LINUX)),
        from_end((len / 65536).saturating_sub(1) * 65536)
            .filter(|at| u32_le(tail, *at) == Some(LINUX)),
    ];
    if places.iter().any(Option::is_some) {
        return Some("a Linux array");
    }
    let sector = |from_last: u64| from_end((len / 512).checked_sub(from_last)? * 512);
    if sector(2).is_some_and(|at| has(tail, at, b"Intel Raid ISM Cfg Sig. ")) {
        return Some("an Intel array");
    }
    sector(1)
        .is_some_and(|at| has(tail, at, &[0xde, 0x11, 0xde, 0x11]))
        .then_some("an array of a controller")
}
