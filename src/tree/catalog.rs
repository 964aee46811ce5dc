//! The names of all listed snapshots, as they were at one moment.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use jiff::Timestamp;

use super::escape::file_name;
use super::node::Node;
use crate::model::{Snapshot, SnapshotId, SnapshotState};

/// The suffix of an image's name.
pub(super) const IMAGE_SUFFIX: &str = ".img";

/// Links in a directory, by their names.
pub(super) type Links = BTreeMap<String, SnapshotId>;

/// What the directories of the mount hold.
#[derive(Debug, Default)]
pub(super) struct Catalog {
    /// Snapshots that can be read, or are damaged: what the root directory shows.
    pub(super) snapshots: BTreeMap<SnapshotId, Arc<Snapshot>>,
    /// `by-name/`
    pub(super) names: Links,
    /// `by-volume/<volume>/`
    pub(super) volumes: BTreeMap<String, Links>,
    /// `by-tag/<key>/<value>/`
    pub(super) tags: BTreeMap<String, BTreeMap<String, Links>>,
    /// The directories that have changed since the first list, by inode number, and when.
    changed: HashMap<u64, (Node, Timestamp)>,
}

impl Catalog {
    pub(super) fn new(snapshots: Vec<Snapshot>) -> Self {
        let shown = snapshots.into_iter().filter(|s| s.state != SnapshotState::Pending);
        let snapshots: BTreeMap<_, _> = shown.map(|s| (s.id.clone(), Arc::new(s))).collect();
        let mut catalog = Self { snapshots, ..Self::default() };
        // From old to new, so that the newest is the one that a name ends up at.
        let mut by_age: Vec<_> =
            catalog.snapshots.values().filter(|s| s.is_readable()).cloned().collect();
        by_age.sort_by(|a, b| (a.start_time, &a.id).cmp(&(b.start_time, &b.id)));
        for snapshot in by_age {
            catalog.link(&snapshot);
        }
        catalog
    }

    /// This, after the catalog `before`: what differs has changed `now`.
    pub(super) fn following(mut self, before: &Self, now: Timestamp) -> Self {
        let mut changed = before.changed.clone();
        changed.retain(|_, (directory, _)| self.has(directory));
        let mut note = |directory: Node, same: bool| {
            if !same {
                changed.insert(directory.ino(), (directory, now));
            }
        };
        note(Node::Root, self.snapshots.keys().eq(before.snapshots.keys()));
        note(Node::ByName, self.names == before.names);
        note(Node::ByVolume, self.volumes.keys().eq(before.volumes.keys()));
        for (name, links) in &self.volumes {
            note(Node::Volume(name.clone()), before.volumes.get(name) == Some(links));
        }
        note(Node::ByTag, self.tags.keys().eq(before.tags.keys()));
        for (key, values) in &self.tags {
            let earlier = before.tags.get(key);
            let same = earlier.is_some_and(|earlier| values.keys().eq(earlier.keys()));
            note(Node::TagKey(key.clone()), same);
            for (value, links) in values {
                let same = earlier.and_then(|earlier| earlier.get(value)) == Some(links);
                note(Node::TagValue(key.clone(), value.clone()), same);
            }
        }
        self.changed = changed;
        self
    }

    fn has(&self, directory: &Node) -> bool {
        match directory {
            Node::Volume(name) => self.volumes.contains_key(name),
            Node::TagKey(key) => self.tags.contains_key(key),
            Node::TagValue(key, value) => {
                self.tags.get(key).is_some_and(|values| values.contains_key(value))
            }
            _ => true,
        }
    }

    /// When the directory with this inode number has changed, if it has since the first list.
    pub(super) fn changed(&self, ino: u64) -> Option<Timestamp> {
        self.changed.get(&ino).map(|&(_, when)| when)
    }

    fn link(&mut self, snapshot: &Snapshot) {
        let id = &snapshot.id;
        if let Some(name) = snapshot.name() {
            self.names.insert(file_name(name, IMAGE_SUFFIX), id.clone());
        }
        if let Some(volume) = &snapshot.volume_id {
            let links = self.volumes.entry(file_name(volume, "")).or_default();
            let time = snapshot.start_time.strftime("%Y%m%dT%H%M%SZ");
            links.insert(format!("{time}-{id}{IMAGE_SUFFIX}"), id.clone());
            links.insert(latest(), id.clone());
        }
        // Our own bookkeeping is no way to look for a snapshot.
        for (key, value) in snapshot.tags.iter().filter(|(key, _)| !key.starts_with("fspfs:")) {
            let values = self.tags.entry(file_name(key, "")).or_default();
            let links = values.entry(file_name(value, "")).or_default();
            links.insert(image_name(id), id.clone());
            links.insert(latest(), id.clone());
        }
    }
}

/// The name of an image in the root directory.
pub(super) fn image_name(id: &SnapshotId) -> String {
    format!("{id}{IMAGE_SUFFIX}")
}

fn latest() -> String {
    format!("latest{IMAGE_SUFFIX}")
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::model::{NAME_TAG, Tags, VolumeSize};

    fn snapshot(id: &str, second: i64, tags: &[(&str, &str)]) -> Snapshot {
        Snapshot {
            id: id.parse().unwrap(),
            state: SnapshotState::Completed,
            state_message: None,
            volume_size: VolumeSize::from_gib(1).unwrap(),
            parent: None,
            lineage: None,
            volume_id: Some("vol-01".to_owned()),
            description: String::new(),
            start_time: Timestamp::from_second(second).unwrap(),
            completion_time: None,
            tags: tags.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<Tags>(),
            encrypted: false,
            content_digest: None,
            data_blocks: None,
            zero_blocks: None,
        }
    }

    #[test]
    fn a_directory_has_changed_when_what_is_in_it_has() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let list = |snapshots: &[(&str, i64, &str)]| {
            let of = |&(id, second, role): &_| {
                snapshot(id, second, &[(NAME_TAG, "web"), ("Role", role)])
            };
            Catalog::new(snapshots.iter().map(of).collect())
        };
        let (key, value) = (|| "Role".to_owned(), |value: &str| value.to_owned());
        let directories = [
            Node::Root,
            Node::ByName,
            Node::ByVolume,
            Node::Volume(value("vol-01")),
            Node::ByTag,
            Node::TagKey(key()),
            Node::TagValue(key(), value("db")),
            Node::TagValue(key(), value("www")),
        ];
        let times = |catalog: &Catalog| {
            let of = |node: &Node| catalog.changed(node.ino()).map_or(0, Timestamp::as_second);
            directories.each_ref().map(of)
        };
        let first = list(&[("snap-0a", 100, "db")]);
        assert_eq!(times(&first), [0; 8]);
        let same = list(&[("snap-0a", 100, "db")]).following(&first, at(1));
        assert_eq!(times(&same), [0; 8]);
        let more = list(&[("snap-0a", 100, "db"), ("snap-0b", 200, "www")]).following(&same, at(2));
        assert_eq!(times(&more), [2, 2, 0, 2, 0, 2, 0, 2]);
        // The name leads to the newer one still.
        let less = list(&[("snap-0b", 200, "www")]).following(&more, at(3));
        assert_eq!(times(&less), [3, 2, 0, 3, 0, 3, 0, 2]);
        // What is not there any more is forgotten.
        let none = list(&[]).following(&less, at(4));
        assert_eq!(times(&none), [4, 4, 4, 0, 4, 0, 0, 0]);
    }

    #[test]
    fn the_newest_readable_one_gets_the_name() {
        let mut pending = snapshot("snap-0c", 300, &[(NAME_TAG, "web")]);
        pending.state = SnapshotState::Pending;
        let mut damaged = snapshot("snap-0d", 400, &[(NAME_TAG, "web")]);
        damaged.state = SnapshotState::Error;
        let catalog = Catalog::new(vec![
            snapshot("snap-0b", 200, &[(NAME_TAG, "web")]),
            pending,
            damaged,
            snapshot("snap-0a", 100, &[(NAME_TAG, "web"), ("Role", "a/b")]),
        ]);
        assert_eq!(catalog.names["web.img"].as_str(), "snap-0b");
        let volume: Vec<_> =
            catalog.volumes["vol-01"].iter().map(|(n, id)| (&n[..], id.as_str())).collect();
        assert_eq!(
            volume,
            [
                ("19700101T000140Z-snap-0a.img", "snap-0a"),
                ("19700101T000320Z-snap-0b.img", "snap-0b"),
                ("latest.img", "snap-0b"),
            ]
        );
        assert_eq!(catalog.tags["Role"]["a%2Fb"].len(), 2);
        let shown: Vec<_> = catalog.snapshots.keys().map(SnapshotId::as_str).collect();
        assert_eq!(shown, ["snap-0a", "snap-0b", "snap-0d"]);
    }
}
