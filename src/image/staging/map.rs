//! The map of a generation: which of its blocks are staged, as a log on disk.
//!
//! `docs/staging-format.md` describes it byte by byte. A record is valid only in its place in its own
//! file; what a sync vouched for must be there, and what was appended since may be torn.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use roaring::RoaringBitmap;
use uuid::Uuid;

use crate::model::{BLOCK_SIZE_U64, Digest, MAX_VOLUME_BYTES};
use crate::own;

/// Where the records begin; before them are two headers, of which the later valid one counts.
const RECORDS: u64 = 4096;
const HEADERS: [u64; 2] = [0, 2048];
const HEADER_LEN: usize = 64;
const RECORD_LEN: usize = 32;
const MAGIC: &[u8; 8] = b"FSPSMAP1";

/// Blocks of the largest image.
#[allow(clippy::cast_possible_truncation)]
const MAX_BLOCKS: u32 = (MAX_VOLUME_BYTES / BLOCK_SIZE_U64) as u32;

/// What a record says of a run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// They are in the data file, whole.
    Staged = 1,
    /// They read as zeros, whatever is beneath.
    Hole = 2,
    /// Nothing is said of them: what is beneath counts.
    Plain = 3,
    /// They are in the snapshot that is being made, durably.
    Put = 4,
    /// Nothing is said of any block, and nothing is beneath: the image was empty at this point.
    CutOff = 5,
    /// No block is in the snapshot that is being made: it is another one.
    Restarted = 6,
    /// Their SHA-256 is in the file of sums.
    Hashed = 7,
}

const MARKS: [Mark; 7] =
    [Mark::Staged, Mark::Hole, Mark::Plain, Mark::Put, Mark::CutOff, Mark::Restarted, Mark::Hashed];

/// A run of blocks and what is said of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) mark: Mark,
    pub(crate) start: u32,
    pub(crate) count: u32,
}

/// What all records together say.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Marks {
    pub(crate) staged: RoaringBitmap,
    pub(crate) holes: RoaringBitmap,
    /// Blocks, staged or not, that the pending snapshot has as they are.
    pub(crate) put: RoaringBitmap,
    /// Staged blocks whose content is vouched for.
    pub(crate) hashed: RoaringBitmap,
    pub(crate) cut_off: bool,
}

impl Marks {
    pub(crate) fn apply(&mut self, record: Record) {
        let run = record.start..record.start.saturating_add(record.count);
        match record.mark {
            Mark::Staged | Mark::Hole | Mark::Plain => {
                let is = |mark| record.mark == mark;
                set(&mut self.staged, run.clone(), is(Mark::Staged));
                set(&mut self.holes, run.clone(), is(Mark::Hole));
                set(&mut self.put, run.clone(), false);
                set(&mut self.hashed, run, false);
            }
            Mark::Hashed => set(&mut self.hashed, run, true),
            Mark::Put => set(&mut self.put, run, true),
            Mark::CutOff => {
                self.staged.clear();
                self.holes.clear();
                self.put.clear();
                self.hashed.clear();
                self.cut_off = true;
            }
            Mark::Restarted => self.put.clear(),
        }
    }

    /// The end of the run of blocks from `index` on that are all staged, all holes, or neither.
    pub(crate) fn run(&self, index: u32, end: u32) -> (Option<Mark>, u32) {
        let run_in = |marks: &RoaringBitmap| {
            let run = marks.range(index..end).next_range();
            run.map_or(index + 1, |run| *run.end() + 1)
        };
        if self.staged.contains(index) {
            return (Some(Mark::Staged), run_in(&self.staged));
        }
        if self.holes.contains(index) {
            return (Some(Mark::Hole), run_in(&self.holes));
        }
        let next = |marks: &RoaringBitmap| marks.range(index..end).next().unwrap_or(end);
        (None, next(&self.staged).min(next(&self.holes)))
    }
}

fn set(marks: &mut RoaringBitmap, run: std::ops::Range<u32>, on: bool) {
    if on {
        marks.insert_range(run);
    } else {
        marks.remove_range(run);
    }
}

/// The log, open for appending.
#[derive(Debug)]
pub(crate) struct MapFile {
    file: File,
    id: Uuid,
    /// Bytes of records.
    len: u64,
    sequence: u64,
}

/// Why a map cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unusable {
    /// It is not what was synced.
    #[error("{0}")]
    Damaged(&'static str),
    /// It cannot be read.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl MapFile {
    /// A new, empty map.
    pub(crate) fn create(path: &Path, id: Uuid) -> io::Result<Self> {
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(path)?;
        // A file that is shorter was cut off, and may have lost the later header with its records.
        file.set_len(RECORDS)?;
        let mut map = Self { file, id, len: 0, sequence: 0 };
        map.write_header(0)?;
        Ok(map)
    }

    /// Reads a map. Answers it, what it says, and the length in bytes that the data file must have
    /// at least. Changes nothing.
    ///
    /// A killed process leaves whole records, and at most a part of one behind them; in another run
    /// of the machine anything may be behind what was synced. A record of then may speak of data that
    /// never came to the disk: `over_data`, zeros would show in its place, so it does not count.
    pub(crate) fn open(
        path: &Path,
        id: Uuid,
        same_run: bool,
        over_data: bool,
    ) -> Result<(Self, Marks, u64), Unusable> {
        let file = own::open(path, File::options().read(true).write(true))?;
        if file.metadata()?.len() < RECORDS {
            return Err(Unusable::Damaged("its map was cut off"));
        }
        let header = HEADERS
            .into_iter()
            .filter_map(|at| read_header(&file, id, at))
            .max_by_key(|header| header.sequence)
            .ok_or(Unusable::Damaged("its map has no valid header"))?;
        let mut map = Self { file, id, len: 0, sequence: header.sequence };
        let mut marks = Marks::default();
        let mut bytes = [0; RECORD_LEN];
        while same_run || !over_data || map.len < header.len {
            match map.file.read_exact_at(&mut bytes, RECORDS + map.len) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => break,
                Err(error) => return Err(error.into()),
            }
            let Some(record) = decode(&bytes, id, map.len) else {
                if same_run {
                    return Err(Unusable::Damaged("a record of its map is not what was written"));
                }
                break;
            };
            marks.apply(record);
            map.len += RECORD_LEN as u64;
        }
        if map.len < header.len {
            return Err(Unusable::Damaged("its map is not what was synced"));
        }
        Ok((map, marks, header.data_len))
    }

    /// Removes what is behind the records: it was torn, and would be in the way of what comes next.
    pub(crate) fn trim(&self) -> io::Result<()> {
        self.file.set_len(RECORDS + self.len)
    }

    /// Appends records; they survive a killed process, but not yet a power cut.
    pub(crate) fn append(&mut self, records: &[Record]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(records.len() * RECORD_LEN);
        for record in records {
            let at = self.len + bytes.len() as u64;
            bytes.extend_from_slice(&encode(*record, self.id, at));
        }
        self.file.write_all_at(&bytes, RECORDS + self.len)?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Appends records of arbitrary bytes.
    #[cfg(any(test, fuzzing))]
    pub(super) fn append_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        for said in bytes.chunks_exact(RECORD_LEN / 2) {
            let record = [said, &checksum(said, self.id, self.len)].concat();
            self.file.write_all_at(&record, RECORDS + self.len)?;
            self.len += RECORD_LEN as u64;
        }
        Ok(())
    }

    /// Makes everything that was appended durable, and vouches for it, and for `data_len` bytes of
    /// the data file.
    pub(crate) fn sync(&mut self, data_len: u64) -> io::Result<()> {
        self.file.sync_data()?;
        self.write_header(data_len)?;
        self.file.sync_data()
    }

    fn write_header(&mut self, data_len: u64) -> io::Result<()> {
        self.sequence += 1;
        let mut header = Vec::with_capacity(HEADER_LEN);
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(self.id.as_bytes());
        for number in [self.sequence, self.len, data_len] {
            header.extend_from_slice(&number.to_le_bytes());
        }
        header.extend_from_slice(&Digest::of(&header).0[..16]);
        self.file.write_all_at(&header, HEADERS[usize::from(self.sequence.is_multiple_of(2))])
    }
}

struct Header {
    sequence: u64,
    len: u64,
    data_len: u64,
}

fn read_header(file: &File, id: Uuid, at: u64) -> Option<Header> {
    let mut bytes = [0; HEADER_LEN];
    file.read_exact_at(&mut bytes, at).ok()?;
    let (said, check) = bytes.split_at(48);
    let ours = said.starts_with(MAGIC) && said[8..24] == *id.as_bytes();
    if !ours || Digest::of(said).0[..16] != *check {
        return None;
    }
    let number = |at: usize| u64::from_le_bytes(said[at..at + 8].try_into().expect("8 bytes"));
    Some(Header { sequence: number(24), len: number(32), data_len: number(40) })
}

fn encode(record: Record, id: Uuid, at: u64) -> [u8; RECORD_LEN] {
    let mut bytes = [0; RECORD_LEN];
    bytes[0] = record.mark as u8;
    bytes[4..8].copy_from_slice(&record.start.to_le_bytes());
    bytes[8..12].copy_from_slice(&record.count.to_le_bytes());
    let check = checksum(&bytes[..16], id, at);
    bytes[16..].copy_from_slice(&check);
    bytes
}

fn decode(bytes: &[u8; RECORD_LEN], id: Uuid, at: u64) -> Option<Record> {
    if bytes[16..] != checksum(&bytes[..16], id, at) {
        return None;
    }
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    let mark = MARKS.into_iter().find(|mark| *mark as u8 == bytes[0])?;
    let (start, count) = (number(4), number(8));
    // No image is larger, and what is said of more blocks would take long to note.
    (start.checked_add(count)? <= MAX_BLOCKS).then_some(Record { mark, start, count })
}

fn checksum(said: &[u8], id: Uuid, at: u64) -> [u8; 16] {
    let bytes = [said, id.as_bytes(), &at.to_le_bytes()].concat();
    Digest::of(&bytes).0[..16].try_into().expect("16 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: Uuid = Uuid::from_u128(7);

    fn record(mark: Mark, start: u32, count: u32) -> Record {
        Record { mark, start, count }
    }

    fn synced(dir: &Path) -> Marks {
        let mut map = MapFile::create(&dir.join("map"), ID).unwrap();
        map.append(&[record(Mark::Staged, 0, 10), record(Mark::Hole, 4, 2)]).unwrap();
        map.append(&[record(Mark::Plain, 9, 1), record(Mark::Put, 0, 3)]).unwrap();
        map.sync(5000).unwrap();
        let (_, marks, data_len) = MapFile::open(&dir.join("map"), ID, true, true).unwrap();
        assert_eq!(data_len, 5000);
        marks
    }

    #[test]
    fn what_was_appended_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let marks = synced(dir.path());
        assert_eq!(marks.staged, [0, 1, 2, 3, 6, 7, 8].into_iter().collect());
        assert_eq!(marks.holes, [4, 5].into_iter().collect());
        assert_eq!(marks.put, [0, 1, 2].into_iter().collect());
        assert_eq!(marks.run(0, 100), (Some(Mark::Staged), 4));
        assert_eq!(marks.run(4, 100), (Some(Mark::Hole), 6));
        assert_eq!(marks.run(9, 100), (None, 100));
        let (mut map, mut marks, _) =
            MapFile::open(&dir.path().join("map"), ID, true, true).unwrap();
        map.append(&[record(Mark::CutOff, 0, 0)]).unwrap();
        marks.apply(record(Mark::CutOff, 0, 0));
        assert_eq!(MapFile::open(&dir.path().join("map"), ID, true, true).unwrap().1, marks);
    }

    #[test]
    fn a_record_of_more_blocks_than_an_image_has_is_not_valid() {
        let valid = |start, count| {
            let said = record(Mark::Staged, start, count);
            decode(&encode(said, ID, 32), ID, 32).is_some()
        };
        assert!(valid(0, 1 << 27) && valid((1 << 27) - 1, 1));
        for (start, count) in [(1, 1 << 27), (1 << 27, 1), (u32::MAX, 1), (0, u32::MAX)] {
            assert!(!valid(start, count), "{start}, {count}");
        }
    }

    #[test]
    fn a_torn_tail_is_dropped_and_a_torn_head_is_damage() {
        let dir = tempfile::tempdir().unwrap();
        let marks = synced(dir.path());
        let path = dir.path().join("map");
        let (mut map, ..) = MapFile::open(&path, ID, true, true).unwrap();
        map.append(&[record(Mark::Staged, 50, 1)]).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for cut in 1..RECORD_LEN {
            std::fs::write(&path, &whole[..whole.len() - cut]).unwrap();
            assert_eq!(MapFile::open(&path, ID, true, true).unwrap().1, marks, "cut by {cut}");
        }
        let records = usize::try_from(RECORDS).unwrap();
        for at in (records..records + 4 * RECORD_LEN).filter(|at| at % 3 == 0) {
            let mut flipped = whole.clone();
            flipped[at] ^= 4;
            std::fs::write(&path, &flipped).unwrap();
            let error = MapFile::open(&path, ID, true, true).unwrap_err();
            assert!(matches!(error, Unusable::Damaged(_)), "flipped at {at}");
            std::fs::write(&path, &whole[..at]).unwrap();
            assert!(MapFile::open(&path, ID, true, true).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn over_data_another_run_counts_only_what_was_synced() {
        let dir = tempfile::tempdir().unwrap();
        let marks = synced(dir.path());
        let path = dir.path().join("map");
        let (mut map, ..) = MapFile::open(&path, ID, true, true).unwrap();
        map.append(&[record(Mark::Staged, 50, 1)]).unwrap();
        assert_eq!(MapFile::open(&path, ID, false, true).unwrap().1, marks);
        for (same_run, over_data) in [(true, true), (false, false)] {
            let (_, marks, _) = MapFile::open(&path, ID, same_run, over_data).unwrap();
            assert!(marks.staged.contains(50));
        }
    }

    #[test]
    fn a_map_of_another_generation_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        synced(dir.path());
        assert!(MapFile::open(&dir.path().join("map"), Uuid::from_u128(8), true, true).is_err());
    }
}
