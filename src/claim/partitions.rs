//! Partition tables.

use super::Claim;
use super::bytes_at::{CRC32, crc_without, has, u32_le, u64_le};

const WHAT: &str = "its partition table";

/// Offset of the four entries of a master boot record, and length of one.
const MBR_ENTRIES: usize = 446;
const MBR_ENTRY: usize = 16;

/// The type of the entry that stands for a GPT.
const PROTECTIVE: u8 = 0xee;

/// The header of a GUID partition table (UEFI 2.10, 5.3).
pub(super) struct Gpt {
    sector: u64,
    backup: u64,
    entries: u64,
    count: u32,
    entry: u32,
    entries_crc: u32,
}

impl Gpt {
    /// The header, if there is a valid one for sectors of this size, behind a protective master boot record: a
    /// disk that was made anew without one may still have the rest of it.
    pub(super) fn read(head: &[u8], sector: usize) -> Option<Self> {
        if !entries(head)?.any(|entry| entry[4] == PROTECTIVE) {
            return None;
        }
        let header = head.get(sector..2 * sector)?;
        let size = usize::try_from(u32_le(header, 12)?).ok()?;
        if !has(header, 0, b"EFI PART") || size < 92 || u64_le(header, 24)? != 1 {
            return None;
        }
        if u32_le(header, 16)? != crc_without(CRC32, header.get(..size)?, 16..20) {
            return None;
        }
        let entry = u32_le(header, 84)?;
        (entry >= 128 && entry.is_power_of_two()).then_some(())?;
        Some(Self {
            sector: sector as u64,
            backup: u64_le(header, 32)?,
            entries: u64_le(header, 72)?,
            count: u32_le(header, 80)?,
            entry,
            entries_crc: u32_le(header, 88)?,
        })
    }

    pub(super) fn entries_at(&self) -> u64 {
        self.entries.saturating_mul(self.sector)
    }

    pub(super) fn entry_bytes(&self) -> Option<usize> {
        usize::try_from(u64::from(self.count) * u64::from(self.entry)).ok()
    }

    /// Where its backup ends, which is the end of the disk.
    pub(super) fn backup_end(&self) -> u64 {
        self.backup.saturating_add(1).saturating_mul(self.sector)
    }

    /// Where the last partition ends, if these are its entries.
    pub(super) fn claim(&self, entries: &[u8]) -> Option<Claim> {
        if self.entry_bytes() != Some(entries.len())
            || crc_without(CRC32, entries, 0..0) != self.entries_crc
        {
            return None;
        }
        let used = entries.chunks_exact(self.entry as usize).filter(|entry| entry[..16] != [0; 16]);
        let last = used.filter_map(|entry| u64_le(entry, 40)).max()?;
        Some(Claim::new(WHAT, last.saturating_add(1).saturating_mul(self.sector)))
    }
}

/// The entries of a master boot record, which a boot sector need not have.
fn entries(head: &[u8]) -> Option<impl Iterator<Item = &[u8]>> {
    has(head, 510, &[0x55, 0xaa]).then(|| head[MBR_ENTRIES..510].chunks_exact(MBR_ENTRY))
}

/// Where the last partition of a master boot record ends.
pub(super) fn mbr(head: &[u8]) -> Option<Claim> {
    // A file system may begin with a boot sector of its own, where other things are in that place.
    let is_boot_sector = [&b"NTFS    "[..], b"EXFAT   "].iter().any(|name| has(head, 3, name))
        || has(head, 54, b"FAT")
        || has(head, 82, b"FAT32");
    let is_entry = |entry: &[u8]| matches!(entry[0], 0 | 0x80) && entry[4] != PROTECTIVE;
    if is_boot_sector || !entries(head)?.all(is_entry) {
        return None;
    }
    let mut end = 0;
    for entry in entries(head)?.filter(|entry| entry[4] != 0) {
        let (start, sectors) = (u64::from(u32_le(entry, 8)?), u64::from(u32_le(entry, 12)?));
        if start == 0 || sectors == 0 {
            return None;
        }
        end = end.max((start + sectors) * 512);
    }
    (end > 0).then(|| Claim::new(WHAT, end))
}
