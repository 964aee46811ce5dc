//! What an inode number stands for.

use std::collections::HashMap;
use std::sync::Arc;

use super::Kind;
use super::control::ControlFile;
use super::job::JobFile;
use crate::image::working::WorkingImage;
use crate::model::{Digest, Snapshot, SnapshotId};
use crate::ops::table;

/// The inode number of the root directory (`FUSE_ROOT_ID`).
pub const ROOT: u64 = 1;

/// An object of the tree.
#[derive(Clone, Debug)]
pub(super) enum Node {
    Root,
    ByName,
    ByVolume,
    ByTag,
    Control,
    /// `by-volume/<name>`
    Volume(String),
    /// `by-tag/<key>`
    TagKey(String),
    /// `by-tag/<key>/<value>`
    TagValue(String, String),
    Image(Arc<Snapshot>),
    New,
    /// `new/<name>`
    Working(Arc<WorkingImage>),
    Link(Link),
    File(ControlFile),
    /// `control/<operation>`
    Operation(&'static table::Entry),
    /// `control/jobs`
    Jobs,
    /// `control/jobs/<n>`
    Job(u64),
    /// `control/jobs/<n>/<file>`
    JobFile(u64, JobFile),
    /// `control/jobs/last`
    LastJob(u64),
}

/// A symbolic link to an image.
#[derive(Clone, Debug)]
pub(super) struct Link {
    /// The directories that it is below, as text.
    pub(super) directory: String,
    pub(super) name: String,
    pub(super) target: SnapshotId,
}

impl Node {
    /// A number that is the same for the same object, in every mount, at every time.
    ///
    /// A link whose target changes gets another one, since the kernel caches links; so does an
    /// image whose id was used again.
    pub(super) fn ino(&self) -> u64 {
        let identity = match self {
            Self::Root => return ROOT,
            Self::ByName => "by-name".to_owned(),
            Self::ByVolume => "by-volume".to_owned(),
            Self::ByTag => "by-tag".to_owned(),
            Self::Control => "control".to_owned(),
            Self::New => "new".to_owned(),
            Self::Working(image) => format!("new/{}", image.number()),
            Self::Volume(name) => format!("by-volume/{name}"),
            Self::TagKey(key) => format!("by-tag/{key}"),
            Self::TagValue(key, value) => format!("by-tag/{key}/{value}"),
            Self::Image(s) => format!("{} {} {}", s.id, s.start_time, s.image_len()),
            Self::Link(link) => format!("{}/{}\0{}", link.directory, link.name, link.target),
            Self::File(file) => format!("control/{}", file.name()),
            Self::Operation(entry) => format!("control/{}", entry.name),
            Self::Jobs => "control/jobs".to_owned(),
            Self::Job(number) => format!("control/jobs/{number}"),
            Self::JobFile(number, file) => format!("control/jobs/{number}/{}", file.name()),
            Self::LastJob(number) => format!("control/jobs/last\0{number}"),
        };
        let Digest(bytes) = Digest::of(identity.as_bytes());
        let (first, _) = bytes.split_first_chunk().expect("32 bytes");
        // Not 0 or 1, which mean something; and no negative number, for old programs.
        (u64::from_le_bytes(*first) >> 1).max(ROOT + 1)
    }

    /// What kind of file it is.
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Image(_)
            | Self::Working(_)
            | Self::File(_)
            | Self::Operation(_)
            | Self::JobFile(..) => Kind::File,
            Self::Link(_) | Self::LastJob(_) => Kind::Link,
            _ => Kind::Directory,
        }
    }

    /// Whether this is one of the objects that are always there.
    fn is_fixed(&self) -> bool {
        matches!(
            self,
            Self::Root
                | Self::ByName
                | Self::ByVolume
                | Self::ByTag
                | Self::Control
                | Self::New
                | Self::File(_)
                | Self::Operation(_)
                | Self::Jobs
        )
    }
}

/// The objects that the kernel knows, by inode number.
#[derive(Debug, Default)]
pub(super) struct Nodes(HashMap<u64, Entry>);

#[derive(Debug)]
struct Entry {
    node: Node,
    /// How often the kernel was told of it and has not forgotten it.
    lookups: u64,
}

impl Nodes {
    /// Remembers a node that the kernel is told of, once more.
    pub(super) fn remember(&mut self, node: Node) -> u64 {
        let ino = node.ino();
        let entry = self.0.entry(ino).or_insert(Entry { node: node.clone(), lookups: 0 });
        entry.node = node;
        entry.lookups += 1;
        ino
    }

    /// Takes back `count` times that the kernel was told of an inode.
    pub(super) fn forget(&mut self, ino: u64, count: u64) {
        if let Some(entry) = self.0.get_mut(&ino) {
            entry.lookups = entry.lookups.saturating_sub(count);
            if entry.lookups == 0 && !entry.node.is_fixed() {
                self.0.remove(&ino);
            }
        }
    }

    pub(super) fn get(&self, ino: u64) -> Option<Node> {
        if ino == ROOT {
            return Some(Node::Root);
        }
        self.0.get(&ino).map(|entry| entry.node.clone())
    }
}
