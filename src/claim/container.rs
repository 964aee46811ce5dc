//! Formats that hold an image, compressed or otherwise packed, by their whole headers.

use super::bytes_at::{
    CRC32, CRC32C, at, crc_without, has, u16_le, u32_be, u32_le, u64_be, u64_le,
};

/// A format that is no raw image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Qcow2,
    Vmdk,
    Vhd,
    Vhdx,
    Vdi,
    Ewf,
    Gzip,
    Xz,
    Zstd,
    Bzip2,
    Zip,
}

impl Format {
    /// What it is, with its article.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "a qcow2 image",
            Self::Vmdk => "a VMDK image",
            Self::Vhd => "a dynamic VHD image",
            Self::Vhdx => "a VHDX image",
            Self::Vdi => "a VDI image",
            Self::Ewf => "an EnCase image (E01)",
            Self::Gzip => "compressed by gzip",
            Self::Xz => "compressed by xz",
            Self::Zstd => "compressed by zstd",
            Self::Bzip2 => "compressed by bzip2",
            Self::Zip => "a zip archive",
        }
    }

    /// The command that makes a raw image of the file of this name. It names the format, so that nothing is guessed
    /// from what others wrote.
    pub(super) fn advice(self, name: &str) -> String {
        let file = shlex::try_quote(name).unwrap_or_default();
        let qemu = |format: &str| format!("qemu-img convert -f {format} -O raw {file} disk.raw");
        let command = match self {
            Self::Qcow2 => qemu("qcow2"),
            Self::Vmdk => qemu("vmdk"),
            Self::Vhd => qemu("vpc"),
            Self::Vhdx => qemu("vhdx"),
            Self::Vdi => qemu("vdi"),
            Self::Ewf => format!("ewfexport -u -f raw -t disk {file}"),
            Self::Gzip => format!("gzip -dc {file} >disk.raw"),
            Self::Xz => format!("xz -dc {file} >disk.raw"),
            Self::Zstd => format!("zstd -dc {file} >disk.raw"),
            Self::Bzip2 => format!("bzip2 -dc {file} >disk.raw"),
            Self::Zip => format!("unzip -p {file} >disk.raw"),
        };
        format!("`{command}` makes one")
    }
}

/// Whether these bytes are a header; `None` if they are too few.
type Test = fn(&[u8]) -> Option<bool>;

/// What the beginning of an image is the header of.
pub(super) fn format(head: &[u8]) -> Option<Format> {
    let all: [(Format, Test); 11] = [
        (Format::Qcow2, qcow2),
        (Format::Vmdk, vmdk),
        (Format::Vhd, vhd),
        (Format::Vhdx, vhdx),
        (Format::Vdi, vdi),
        (Format::Ewf, ewf),
        (Format::Gzip, gzip),
        (Format::Xz, xz),
        (Format::Zstd, zstd),
        (Format::Bzip2, bzip2),
        (Format::Zip, zip),
    ];
    all.iter().find(|(_, is)| is(head) == Some(true)).map(|(format, _)| *format)
}

fn qcow2(head: &[u8]) -> Option<bool> {
    let (version, bits) = (u32_be(head, 4)?, u32_be(head, 20)?);
    let is_table = |offset: u64| offset > 0 && offset.trailing_zeros() >= bits;
    Some(
        has(head, 0, b"QFI\xfb")
            && matches!(version, 2 | 3)
            && (9..=21).contains(&bits)
            && is_table(u64_be(head, 40)?)
            && is_table(u64_be(head, 48)?)
            && (version == 2 || u32_be(head, 100)? >= 104),
    )
}

fn vmdk(head: &[u8]) -> Option<bool> {
    let is_sparse = has(head, 0, b"KDMV")
        && (1..=3).contains(&u32_le(head, 4)?)
        && u64_le(head, 20)?.is_power_of_two()
        && has(head, 73, b"\n \r\n");
    let is_description = head.starts_with(b"# Disk DescriptorFile")
        && head[..head.len().min(1024)].windows(11).any(|part| part == b"createType=");
    Some(is_sparse || is_description)
}

/// The copy of the footer that all but fixed ones begin with.
fn vhd(head: &[u8]) -> Option<bool> {
    let sum = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    let footer = head.get(..512)?;
    let expected = !(sum(&footer[..64]) + sum(&footer[68..]));
    Some(
        has(footer, 0, b"conectix")
            && matches!(u32_be(footer, 60)?, 3 | 4)
            && u32_be(footer, 64)? == expected,
    )
}

fn vhdx(head: &[u8]) -> Option<bool> {
    let is_header = |offset: usize| {
        let header = head.get(offset..offset + 4096)?;
        Some(has(header, 0, b"head") && u32_le(header, 4)? == crc_without(CRC32C, header, 4..8))
    };
    let first = is_header(64 << 10)?;
    Some(has(head, 0, b"vhdxfile") && (first || is_header(128 << 10)?))
}

fn vdi(head: &[u8]) -> Option<bool> {
    Some(
        u32_le(head, 64)? == 0xbeda_107f
            && u32_le(head, 68)? == 0x0001_0001
            && (1..=4).contains(&u32_le(head, 76)?),
    )
}

/// The first segment, whose first section has a checksum of its own (Adler-32).
fn ewf(head: &[u8]) -> Option<bool> {
    let section = head.get(13..89)?;
    let (a, b) = section[..72].iter().fold((1_u32, 0_u32), |(a, b), byte| {
        let a = (a + u32::from(*byte)) % 65521;
        (a, (b + a) % 65521)
    });
    Some(
        has(head, 0, b"EVF\x09\x0d\x0a\xff\x00\x01")
            && has(section, 0, b"header")
            && u32_le(section, 72)? == b << 16 | a,
    )
}

fn gzip(head: &[u8]) -> Option<bool> {
    let [one, two, method, flags] = at(head, 0)?;
    let [extra, system] = at(head, 8)?;
    let block = head.get(10)?;
    Some(
        (one, two, method) == (0x1f, 0x8b, 8)
            && flags & 0xe0 == 0
            && matches!(extra, 0 | 2 | 4)
            && matches!(system, 0..=13 | 255)
            // The fourth kind of block does not exist.
            && (flags != 0 || block >> 1 & 3 != 3),
    )
}

fn xz(head: &[u8]) -> Option<bool> {
    let flags = head.get(6..8)?;
    Some(
        has(head, 0, b"\xfd7zXZ\0")
            && flags[0] == 0
            && flags[1] < 16
            && u32_le(head, 8)? == crc_without(CRC32, flags, 0..0),
    )
}

/// A frame header, and that of its first block (RFC 8878).
fn zstd(head: &[u8]) -> Option<bool> {
    let descriptor = *head.get(4)?;
    let single = descriptor >> 5 & 1 == 1;
    let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let content = match (descriptor >> 6, single) {
        (0, false) => 0,
        (0, true) => 1,
        (bits, _) => 1 << bits,
    };
    let block = 5 + usize::from(!single) + dictionary + content;
    let [one, two, three] = at(head, block)?;
    let block = u32::from_le_bytes([one, two, three, 0]);
    Some(
        has(head, 0, b"\x28\xb5\x2f\xfd")
            && descriptor & 8 == 0
            && block >> 1 & 3 != 3
            && block >> 3 <= 128 << 10,
    )
}

fn bzip2(head: &[u8]) -> Option<bool> {
    const BLOCK: [u8; 6] = [0x31, 0x41, 0x59, 0x26, 0x53, 0x59];
    Some(has(head, 0, b"BZh") && matches!(head.get(3)?, b'1'..=b'9') && has(head, 4, &BLOCK))
}

/// The header of the first file of an archive.
fn zip(head: &[u8]) -> Option<bool> {
    let name = usize::from(u16_le(head, 26)?);
    let method = u16_le(head, 8)?;
    Some(
        has(head, 0, b"PK\x03\x04")
            && u16_le(head, 4)? & 0xff <= 63
            && matches!(method, 0..=20 | 93..=99)
            && (1..=1024).contains(&name)
            && !head.get(30..30 + name)?.contains(&0),
    )
}
