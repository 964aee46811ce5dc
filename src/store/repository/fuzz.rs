//! The objects of a repository, made of arbitrary bytes.

use uuid::Uuid;

use super::complete::Sealed;
use super::manifest::{Manifest, Start};
use super::names::{self, ObjectId, RecordId, TagsId};
use super::table::Table;
use super::tags::TagSet;
use super::{document, gc, pack, page_list, writer};
use crate::model::{BlockIndex, Digest, SnapshotId};
use crate::store::document::seal;

/// Reads what a bucket answers.
pub(crate) fn bucket(data: &[u8]) -> bool {
    super::bucket::fuzz::objects(data)
}

/// Reads an object: a byte that tells of which kind, then what is in it. Checksums are put right before.
pub fn format(data: &[u8]) {
    let Some((&kind, data)) = data.split_first() else { return };
    let document = seal(data.iter().copied().filter(|byte| *byte != b'\n').collect());
    match kind % 12 {
        0 => drop(document::decode::<Manifest>("x", &document)),
        1 => drop(document::decode::<Start>("x", &document)),
        2 => drop(document::decode::<TagSet>("x", &document)),
        3 => {
            if let Ok(sealed) = document::decode::<Sealed>("x", &document)
                && sealed.ascends()
            {
                let records: Vec<_> = sealed.records().take(1000).collect();
                assert!(records.is_sorted_by(|a, b| a > b), "{records:?}");
                assert!(records.iter().all(|record| sealed.contains(*record)), "{records:?}");
            }
        }
        4 => drop(document::decode::<gc::Found>("x", &document)),
        5 => {
            if let Ok(table) = Table::decode(data.to_vec().into()) {
                let entries: Vec<_> = table.entries().collect();
                assert!(entries.is_sorted_by(|a, b| a.index < b.index), "{entries:?}");
                assert_eq!(table.position(BlockIndex(u32::MAX)), entries.len());
                drop(Table::encode(&entries));
            }
        }
        6 => {
            let record = [data, &Digest::of(data).0].concat();
            drop(writer::read_record(&record.into()));
        }
        7 => drop(page_list::decode(data)),
        8 => {
            // Of the table that is there the name has the digest.
            let digest = pack::table_bytes(data).map_or(Digest([0; 32]), Digest::of);
            drop(pack::read_table(ObjectId { digest, writer: Uuid::nil() }, data));
        }
        9 => drop(pack::decompress(data)),
        10 => {
            let names = String::from_utf8_lossy(data);
            let names: Vec<_> = names.lines().map(str::to_owned).collect();
            crate::store::fsp::archives_of(&names);
        }
        _ => name(&String::from_utf8_lossy(data)),
    }
}

fn name(name: &str) {
    let id: SnapshotId = "snap-01".parse().expect("it is one");
    if let Some(tags) = TagsId::from_name(name) {
        assert_eq!(tags.name(), name);
    }
    if let Some(record) = RecordId::from_name(&id, Uuid::nil(), name) {
        assert_eq!(record.name(&id, Uuid::nil()), name);
    }
    if let Some(id) = names::manifest_id(name) {
        assert_eq!(names::manifest(&id), name);
    }
    if let Some(id) = names::start_id(name) {
        assert_eq!(names::start(&id), name);
    }
    if let Some(pack) = ObjectId::from_name(names::PACKS, name) {
        assert_eq!(pack.pack_name(), name);
    }
    let _ = (names::is_found(name), names::is_of_attempt(name), names::is_document(name));
}
