//! The files of a staged image, made of arbitrary bytes.

use uuid::Uuid;

use super::map::MapFile;
use super::record::ImageRecord;
use crate::store::document;

/// Reads the map of a generation, or the document of an image: a byte tells which. Checksums are put right before.
pub fn staging(data: &[u8]) {
    let Some((&kind, data)) = data.split_first() else { return };
    if kind % 2 == 0 {
        let line = data.iter().copied().filter(|byte| *byte != b'\n').collect();
        drop(document::decode::<ImageRecord>("x", &document::seal(line)));
        return;
    }
    let directory = tempfile::tempdir().expect("there is a directory for temporary files");
    let (path, id) = (directory.path().join("map"), Uuid::nil());
    let mut map = MapFile::create(&path, id).expect("the disk takes a small file");
    map.append_bytes(data).expect("the disk takes a small file");
    for (same_run, over_data) in [(false, false), (true, false), (false, true)] {
        if let Ok((_, marks, _)) = MapFile::open(&path, id, same_run, over_data) {
            assert!(marks.staged.is_disjoint(&marks.holes), "{marks:?}");
        }
    }
}
