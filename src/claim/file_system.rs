//! File systems and LVM physical volumes that begin where the image does.

use sha2::{Digest as _, Sha256};

use super::Claim;
use super::bytes_at::{
    CRC32, CRC32C, crc, crc_without, has, u16_be, u16_le, u32_be, u32_le, u64_be, u64_le,
};

/// What is on the image, if that can be told from its beginning.
pub(super) fn claim(head: &[u8]) -> Option<Claim> {
    let all = [ext, xfs, btrfs, ntfs, exfat, lvm];
    all.iter().find_map(|read| read(head))
}

fn named(name: &str, units: u64, unit: u64) -> Option<Claim> {
    Some(Claim::new(format!("its {name} file system"), units.checked_mul(unit)?))
}

/// ext2, ext3 and ext4: a superblock at 1024.
fn ext(head: &[u8]) -> Option<Claim> {
    const JOURNAL: u32 = 4;
    const EXTENTS: u32 = 0x40;
    const WIDE: u32 = 0x80;
    const CHECKSUM: u32 = 0x400;
    let block = head.get(1024..2048)?;
    let number = |offset| u32_le(block, offset);
    if u16_le(block, 56)? != 0xef53 || number(76)? > 1 || number(24)? > 6 {
        return None;
    }
    let (compatible, incompatible, read_only) = (number(92)?, number(96)?, number(100)?);
    if read_only & CHECKSUM != 0 && crc(CRC32C, u32::MAX, &block[..1020]) != number(1020)? {
        return None;
    }
    let high = if incompatible & WIDE == 0 { 0 } else { number(336)? };
    let blocks = u64::from(high) << 32 | u64::from(number(4)?);
    let (first, per_group) = (u64::from(number(20)?), u64::from(number(32)?));
    let groups = blocks.checked_sub(first)?.checked_add(per_group)?.checked_sub(1)?;
    let groups = groups.checked_div(per_group)?;
    // Each group has as many inodes, which holds for nothing that only looks like a superblock.
    let inodes = u64::from(number(40)?).checked_mul(groups)?;
    if blocks == 0 || inodes == 0 || inodes != u64::from(number(0)?) {
        return None;
    }
    let name = match (compatible & JOURNAL, incompatible & EXTENTS) {
        (_, EXTENTS) => "ext4",
        (JOURNAL, _) => "ext3",
        _ => "ext2",
    };
    named(name, blocks, 1024 << number(24)?)
}

/// xfs: a superblock at 0, with a checksum since version 5.
fn xfs(head: &[u8]) -> Option<Claim> {
    if !has(head, 0, b"XFSB") {
        return None;
    }
    let (unit, blocks) = (u32_be(head, 4)?, u64_be(head, 8)?);
    let (in_group, groups) = (u64::from(u32_be(head, 84)?), u64::from(u32_be(head, 88)?));
    let sector = usize::from(u16_be(head, 102)?);
    let sizes = unit.is_power_of_two() && (512..=65536).contains(&unit);
    let fits = groups > 0
        && blocks <= in_group.checked_mul(groups)?
        && blocks > in_group.checked_mul(groups - 1)?;
    if !sizes || !fits || !(512..=32768).contains(&sector) {
        return None;
    }
    if u16_be(head, 100)? & 0xf == 5
        && u32_le(head, 224)? != crc_without(CRC32C, head.get(..sector)?, 224..228)
    {
        return None;
    }
    named("xfs", blocks, unit.into())
}

/// btrfs: a superblock at 64 KiB, which tells the size of each of its devices.
fn btrfs(head: &[u8]) -> Option<Claim> {
    const AT: usize = 64 << 10;
    const DEVICE: usize = 201;
    let block = head.get(AT..AT + 4096)?;
    if !has(block, 64, b"_BHRfS_M") || u64_le(block, 48)? != AT as u64 {
        return None;
    }
    let is_valid = match u16_le(block, 196)? {
        0 => u32_le(block, 0)? == crc_without(CRC32C, &block[32..], 0..0),
        2 => block[..32] == Sha256::digest(&block[32..])[..],
        // Checksums that nothing else here computes: its device must at least be one of this file system.
        1 | 3 => block[32..48] == block[DEVICE + 82..DEVICE + 98],
        _ => false,
    };
    is_valid.then(|| named("btrfs", u64_le(block, DEVICE + 8)?, 1)).flatten()
}

/// A boot sector, as DOS had it.
fn is_boot_sector(head: &[u8]) -> bool {
    matches!(head.first(), Some(0xeb | 0xe9)) && has(head, 510, &[0x55, 0xaa])
}

/// NTFS: a boot sector without what FAT has in it.
fn ntfs(head: &[u8]) -> Option<Claim> {
    if !is_boot_sector(head) || !has(head, 3, b"NTFS    ") {
        return None;
    }
    let sector = u64::from(u16_le(head, 11)?);
    let sectors = u64_le(head, 40)?;
    let cluster = match head[13] {
        n @ 1..=0x80 if n.is_power_of_two() => u64::from(n),
        n @ 0xe0.. => 1 << (256 - u32::from(n)),
        _ => return None,
    };
    let is_ntfs = sector.is_power_of_two()
        && (256..=4096).contains(&sector)
        && has(head, 14, &[0; 7])
        && head[21] == 0xf8
        && u16_le(head, 22)? == 0;
    let is_inside = |table: u64| table.checked_mul(cluster).is_some_and(|at| at < sectors);
    (is_ntfs && is_inside(u64_le(head, 48)?) && is_inside(u64_le(head, 56)?))
        .then(|| named("NTFS", sectors, sector))
        .flatten()
}

/// exFAT: a boot region of twelve sectors, the last of which is a checksum of the others.
fn exfat(head: &[u8]) -> Option<Claim> {
    if !is_boot_sector(head) || !has(head, 3, b"EXFAT   ") {
        return None;
    }
    let shift = u32::from(head[108]);
    if !(9..=12).contains(&shift) {
        return None;
    }
    let region = head.get(..11 << shift)?;
    let bytes = region.iter().enumerate().filter(|(at, _)| ![106, 107, 112].contains(at));
    let sum = bytes.fold(0_u32, |sum, (_, byte)| sum.rotate_right(1).wrapping_add((*byte).into()));
    (u32_le(head, region.len())? == sum).then(|| named("exFAT", u64_le(head, 72)?, 1 << shift))?
}

/// An LVM physical volume: a label in one of the first four sectors, then the size of the device.
fn lvm(head: &[u8]) -> Option<Claim> {
    const SEED: u32 = 0xf597_a6cf;
    (0..4_usize).find_map(|number| {
        let sector = head.get(number * 512..(number + 1) * 512)?;
        if !has(sector, 0, b"LABELONE")
            || !has(sector, 24, b"LVM2 001")
            || u64_le(sector, 8)? != number as u64
            || u32_le(sector, 16)? != crc(CRC32, SEED, &sector[20..])
        {
            return None;
        }
        let header = usize::try_from(u32_le(sector, 20)?).ok()?;
        let size = u64_le(sector, header.checked_add(32)?)?;
        (size > 0).then(|| Claim::new("its LVM physical volume", size))
    })
}

/// ISO 9660: a descriptor at 32 KiB that has its numbers in both orders.
pub(super) fn iso(head: &[u8]) -> Option<Claim> {
    let volume = head.get(32 << 10..34 << 10)?;
    if !has(volume, 0, b"\x01CD001\x01") {
        return None;
    }
    let (blocks, unit) = (u32_le(volume, 80)?, u16_le(volume, 128)?);
    let is_both = u32_be(volume, 84)? == blocks && u16_be(volume, 130)? == unit;
    (is_both && unit.is_power_of_two() && unit >= 512)
        .then(|| named("ISO 9660", blocks.into(), unit.into()))?
}

/// The boot sector of a FAT, of which the first table has to be there.
pub(super) struct Fat {
    sector: u64,
    reserved: u64,
    sectors: u64,
    media: u8,
}

impl Fat {
    pub(super) fn read(head: &[u8]) -> Option<Self> {
        let is_named = ["FAT12   ", "FAT16   "].iter().any(|name| has(head, 54, name.as_bytes()))
            || has(head, 82, b"FAT32   ");
        if !is_boot_sector(head) || !is_named {
            return None;
        }
        let sector = u64::from(u16_le(head, 11)?);
        let reserved = u64::from(u16_le(head, 14)?);
        let sectors = match u16_le(head, 19)? {
            0 => u64::from(u32_le(head, 32)?),
            few => u64::from(few),
        };
        let media = head[21];
        let is_fat = sector.is_power_of_two()
            && (512..=4096).contains(&sector)
            && head[13].is_power_of_two()
            && reserved > 0
            && matches!(head[16], 1 | 2)
            && matches!(media, 0xf0 | 0xf8..)
            && sectors > reserved;
        is_fat.then_some(Self { sector, reserved, sectors, media })
    }

    pub(super) fn table_at(&self) -> u64 {
        self.reserved * self.sector
    }

    /// Where it ends, if its table begins so.
    pub(super) fn claim(&self, table: &[u8]) -> Option<Claim> {
        (table == [self.media, 0xff]).then(|| named("FAT", self.sectors, self.sector))?
    }
}
