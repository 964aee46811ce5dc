use super::bytes_at::{CRC32, crc, crc_without};
use super::*;

/// What is found on an image that begins with these bytes.
fn found(image: &[u8], len: u64) -> Found {
    let read = |offset: u64, bytes: usize| {
        let end = len.min(offset + bytes as u64);
        let byte = |at| usize::try_from(at).ok().and_then(|at| image.get(at)).copied().unwrap_or(0);
        let bytes: Bytes = (offset..end).map(byte).collect();
        std::future::ready(Ok::<_, std::convert::Infallible>(bytes))
    };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(look(len, read)).unwrap()
}

fn put(image: &mut [u8], offset: usize, what: &[u8]) {
    image[offset..offset + what.len()].copy_from_slice(what);
}

/// It ends at `end`, and an image that is shorter by a sector is cut.
fn ends(image: &[u8], end: u64, what: &str) {
    assert_eq!(found(image, end), Found::default(), "{what}");
    let cut = Fault::Cut { what: format!("its {what}"), end, len: end - 512 };
    assert_eq!(found(image, end - 512).fault, Some(cut));
}

#[test]
fn the_ends_of_what_no_tool_here_makes() {
    let mut ntfs = vec![0; 4096];
    put(&mut ntfs, 0, b"\xeb\x52\x90NTFS    \x00\x02\x08");
    ntfs[21] = 0xf8;
    put(&mut ntfs, 40, &40959_u64.to_le_bytes());
    put(&mut ntfs, 48, &4_u64.to_le_bytes());
    put(&mut ntfs, 56, &2_u64.to_le_bytes());
    put(&mut ntfs, 510, &[0x55, 0xaa]);
    ends(&ntfs, 40959 * 512, "NTFS file system");

    let mut fat = vec![0; 8192];
    put(&mut fat, 0, b"\xeb\x3c\x90mkfs.fat\x00\x02\x04\x04\x00\x02\x00\x02");
    put(&mut fat, 19, &40960_u16.to_le_bytes());
    fat[21] = 0xf8;
    put(&mut fat, 54, b"FAT16   ");
    put(&mut fat, 510, &[0x55, 0xaa]);
    assert_eq!(found(&fat, 8192), Found::default(), "its table is not there");
    put(&mut fat, 2048, &[0xf8, 0xff]);
    ends(&fat, 40960 * 512, "FAT file system");

    ends(&lvm(64 << 20), 64 << 20, "LVM physical volume");

    let mut iso = vec![0; 40 << 10];
    put(&mut iso, 32 << 10, b"\x01CD001\x01");
    put(&mut iso, (32 << 10) + 80, &[0, 0x10, 0, 0, 0, 0, 0x10, 0]);
    put(&mut iso, (32 << 10) + 128, &[0, 8, 8, 0]);
    ends(&iso, 8 << 20, "ISO 9660 file system");
    // A partition table over it says nothing.
    put_mbr(&mut iso, 0x17, 1 << 16);
    ends(&iso, 8 << 20, "ISO 9660 file system");
}

/// An LVM physical volume of this length.
fn lvm(len: u64) -> Vec<u8> {
    let mut lvm = vec![0; 4096];
    put(&mut lvm, 512, b"LABELONE\x01\0\0\0\0\0\0\0____\x20\0\0\0LVM2 001");
    put(&mut lvm, 512 + 64, &len.to_le_bytes());
    let sum = crc(CRC32, 0xf597_a6cf, &lvm[532..1024]);
    put(&mut lvm, 528, &sum.to_le_bytes());
    lvm
}

/// A partition table of the old kind, with one partition that ends at this sector.
fn put_mbr(image: &mut [u8], kind: u8, end: u32) {
    put(image, 446, &[0x80, 0, 0, 0, kind, 0, 0, 0, 1, 0, 0, 0]);
    put(image, 458, &(end - 1).to_le_bytes());
    put(image, 510, &[0x55, 0xaa]);
}

#[test]
fn leftovers_of_a_former_use_of_the_disk_say_nothing() {
    let mut lvm = lvm(64 << 20);
    put_mbr(&mut lvm, 0x83, 256 << 11);
    assert_eq!(found(&lvm, 64 << 20), Found::default());
    assert!(found(&lvm, 63 << 20).fault.is_some());
    put_mbr(&mut lvm, 0x83, 32 << 11);
    assert_eq!(found(&lvm, 32 << 20), Found::default());
}

/// A disk whose last partition ends at 8 MiB.
fn gpt(sector: usize) -> Vec<u8> {
    let mut disk = vec![0; 6 * 4096];
    put(&mut disk, 446, &[0, 0, 0, 0, 0xee, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0, 0]);
    put(&mut disk, 510, &[0x55, 0xaa]);
    put(&mut disk, 2 * sector, &[7; 16]);
    let last = (8 << 20) / sector as u64 - 1;
    put(&mut disk, 2 * sector + 40, &last.to_le_bytes());
    let entries = crc_without(CRC32, &disk[2 * sector..2 * sector + 512], 0..0);
    let mut header = vec![0; 92];
    put(&mut header, 0, b"EFI PART\0\0\x01\0\x5c");
    header[24] = 1;
    put(&mut header, 32, &last.to_le_bytes());
    header[72] = 2;
    header[80] = 4;
    header[84] = 128;
    put(&mut header, 88, &entries.to_le_bytes());
    let sum = crc_without(CRC32, &header, 16..20);
    put(&mut header, 16, &sum.to_le_bytes());
    put(&mut disk, sector, &header);
    disk
}

#[test]
fn a_partition_table_counts_if_its_checksums_do() {
    for sector in [512, 4096] {
        let disk = gpt(sector);
        ends(&disk, 8 << 20, "partition table");
        let longer = found(&disk, 9 << 20);
        assert!(longer.fault.is_none() && longer.notes[0].contains("backup"), "{longer:?}");
        // In the header, in its entries, and in the protective record.
        for (damaged, bits) in [(sector + 60, 1), (2 * sector + 40, 1), (450, 0xee)] {
            let mut disk = disk.clone();
            disk[damaged] ^= bits;
            assert_eq!(found(&disk, 4 << 20).fault, None, "byte {damaged}");
        }
    }
}

#[test]
fn a_member_of_an_array_is_only_told_of() {
    const LEN: usize = (4 << 20) + (40 << 10);
    let linux = &0xa92b_4efc_u32.to_le_bytes();
    for (at, mark) in [
        // Of version 1.0, and of 0.90.
        (LEN - 8192, linux),
        ((4 << 20) - 65536, linux),
        (LEN - 1024, b"Intel Raid ISM Cfg Sig. "),
        (LEN - 512, &[0xde, 0x11, 0xde, 0x11]),
    ] as [(usize, &[u8]); 4]
    {
        let mut disk = gpt(512);
        disk.resize(LEN, 0);
        put(&mut disk, at, mark);
        let member = found(&disk, LEN as u64);
        assert!(member.fault.is_none() && member.notes[0].contains("member"), "{at}: {member:?}");
        disk[at] ^= 1;
        assert!(found(&disk, LEN as u64).fault.is_some(), "{at}");
    }
}

#[test]
fn nothing_is_on_an_image_that_is_empty_or_all_zeros() {
    for len in [0, 1, 511, 512, 1 << 20] {
        assert_eq!(found(&[], len), Found::default(), "{len}");
    }
}

#[test]
fn a_fault_is_told_in_plain_words_and_known_from_a_base() {
    let cut = |end, len| Fault::Cut { what: "its partition table".to_owned(), end, len };
    let told = cut(8 << 30, 3 << 30).to_string();
    assert_eq!(told, "its partition table ends at 8 GiB, the image at 3 GiB");
    assert!(cut(8, 5).is_from(&cut(8, 4)) && !cut(8, 3).is_from(&cut(8, 4)));
    assert!(!cut(8, 4).is_from(&Fault::Packed(Format::Zip)));
    assert!(Fault::Packed(Format::Gzip).refusal("a b", "x").contains("gzip -dc 'a b'"));
}
