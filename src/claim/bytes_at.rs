//! Numbers in the bytes of an image, and checksums over them. What lies behind the end is `None`.

pub(super) fn at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

pub(super) fn u16_le(bytes: &[u8], offset: usize) -> Option<u16> {
    at(bytes, offset).map(u16::from_le_bytes)
}

pub(super) fn u32_le(bytes: &[u8], offset: usize) -> Option<u32> {
    at(bytes, offset).map(u32::from_le_bytes)
}

pub(super) fn u64_le(bytes: &[u8], offset: usize) -> Option<u64> {
    at(bytes, offset).map(u64::from_le_bytes)
}

pub(super) fn u16_be(bytes: &[u8], offset: usize) -> Option<u16> {
    at(bytes, offset).map(u16::from_be_bytes)
}

pub(super) fn u32_be(bytes: &[u8], offset: usize) -> Option<u32> {
    at(bytes, offset).map(u32::from_be_bytes)
}

pub(super) fn u64_be(bytes: &[u8], offset: usize) -> Option<u64> {
    at(bytes, offset).map(u64::from_be_bytes)
}

pub(super) fn has(bytes: &[u8], offset: usize, what: &[u8]) -> bool {
    bytes.get(offset..offset + what.len()) == Some(what)
}

/// The polynomial of GPT, LVM and xz; reflected.
pub(super) const CRC32: u32 = 0xedb8_8320;

/// The polynomial of ext4, xfs, btrfs and VHDX; reflected.
pub(super) const CRC32C: u32 = 0x82f6_3b78;

/// A CRC that goes on from `seed`, neither of which is inverted. A few KiB are hashed, so it needs no table.
pub(super) fn crc(polynomial: u32, seed: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(seed, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 { crc >> 1 ^ polynomial } else { crc >> 1 }
        })
    })
}

/// The usual CRC: it begins with ones, and is inverted at the end. Bytes of `blank` count as zeros.
pub(super) fn crc_without(polynomial: u32, bytes: &[u8], blank: std::ops::Range<usize>) -> u32 {
    let first = crc(polynomial, u32::MAX, bytes.get(..blank.start).unwrap_or(bytes));
    let middle = crc(polynomial, first, &vec![0; blank.len()]);
    !crc(polynomial, middle, bytes.get(blank.end..).unwrap_or_default())
}
