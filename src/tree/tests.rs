//! The tree without a mount, over a repository in a directory.

use std::sync::Arc;

use bytes::Bytes;

use super::{Caching, Error, Kind, OpenMode, Ownership, ROOT, Tree};
use crate::cache::{Cache, MIN_BUDGET};
use crate::model::{
    BLOCK_SIZE, BLOCK_SIZE_U64, Block, BlockIndex, LENGTH_TAG, NAME_TAG, SnapshotId, Tags,
    VolumeSize,
};
use crate::store::repository::Repository;
use crate::store::wrap::{Call, Count, Counters, Fail};
use crate::store::{CompleteRequest, ErrorKind, SharedStore, StartRequest};

mod control;

struct Place {
    _dir: tempfile::TempDir,
    store: SharedStore,
    fail: Arc<Fail>,
    counters: Arc<Counters>,
    tree: Arc<Tree>,
}

async fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let store: SharedStore = Arc::new(Repository::create(&dir.path().join("store")).await.unwrap());
    let fail = Arc::new(Fail::new(Arc::clone(&store)));
    let shared: SharedStore = Arc::clone(&fail) as SharedStore;
    let count = Count::new(shared);
    let counters = count.counters();
    let ownership = Ownership { uid: 7, gid: 8, file_mode: 0o440, daemon_uid: 0, daemon_gid: 0 };
    let cache = Cache::new(MIN_BUDGET);
    let tree = Tree::new(Arc::new(count), Some(Arc::clone(&counters)), cache, ownership);
    let tree = Arc::new(tree);
    tree.refresh().await.unwrap();
    Place { _dir: dir, store, fail, counters, tree }
}

/// A snapshot of 1 GiB whose blocks 0 and 5 repeat `byte`.
async fn snapshot(store: &SharedStore, byte: u8, tags: &[(&str, &str)]) -> SnapshotId {
    let tags: Tags = tags.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let request = StartRequest {
        tags,
        volume_id: Some("vol-0a".to_owned()),
        ..StartRequest::new(VolumeSize::from_gib(1).unwrap())
    };
    let id = store.start(request).await.unwrap().id;
    let block = Block::new(Bytes::from(vec![byte; BLOCK_SIZE]));
    for index in [0, 5] {
        store.put_block(&id, BlockIndex(index), block.clone()).await.unwrap();
    }
    let request = CompleteRequest { changed_blocks: 2, checksum: None, started: None };
    store.complete(&id, request).await.unwrap();
    id
}

impl Place {
    async fn walk(&self, path: &str) -> super::Result<u64> {
        let mut ino = ROOT;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            ino = self.tree.lookup(ino, name.as_ref(), 0).await?.ino;
        }
        Ok(ino)
    }

    async fn names(&self, path: &str) -> Vec<String> {
        let ino = self.walk(path).await.unwrap();
        let handle = self.tree.opendir(ino, 0).await.unwrap();
        let entries = self.tree.entries(handle).unwrap();
        let mut names: Vec<_> = entries.iter().skip(2).map(|entry| entry.name.clone()).collect();
        self.tree.release(handle);
        names.sort();
        names
    }
}

#[tokio::test]
async fn other_users_cannot_have_the_store_asked_for_any_id() {
    let place = place().await;
    let find = |id: SnapshotId, uid| {
        let (tree, name) = (Arc::clone(&place.tree), format!("{id}.img"));
        async move { tree.lookup(ROOT, name.as_ref(), uid).await.is_ok() }
    };
    let later = snapshot(&place.store, 1, &[]).await;
    let asked = || place.counters.calls(Call::Describe) + place.counters.calls(Call::List);
    let before = asked();
    for n in 0..100 {
        assert!(!find(format!("snap-{n:08x}").parse().unwrap(), 1234).await);
    }
    assert!(!find(later.clone(), 1234).await);
    // Nor listed for other names, and for directories.
    let by_name = place.tree.lookup(ROOT, "by-name".as_ref(), 1234).await.unwrap().ino;
    for n in 0..100 {
        let name = n.to_string();
        assert!(place.tree.lookup(by_name, name.as_ref(), 1234).await.is_err());
        place.tree.release(place.tree.opendir(ROOT, 1234).await.unwrap());
    }
    assert_eq!(asked(), before);
    // The user of the mount may.
    assert!(find(later.clone(), 0).await);
    assert_eq!(asked(), before + 1);
    place.tree.refresh().await.unwrap();
    assert!(find(later, 1234).await);
}

#[tokio::test]
async fn every_directory_shows_what_it_should() {
    let place = place().await;
    let old = snapshot(&place.store, 1, &[(NAME_TAG, "web"), ("Role", "a/b")]).await;
    let new = snapshot(&place.store, 2, &[(NAME_TAG, "web")]).await;
    let (old_img, new_img) = (format!("{old}.img"), format!("{new}.img"));
    let mut root = vec!["by-name", "by-tag", "by-volume", "control", "new", &old_img, &new_img];
    root.sort_unstable();
    assert_eq!(place.names("").await, root);
    assert_eq!(place.names("by-name").await, ["web.img"]);
    assert_eq!(place.names("by-tag").await, ["Name", "Role"]);
    assert_eq!(place.names("by-tag/Role").await, ["a%2Fb"]);
    assert_eq!(place.names("by-tag/Role/a%2Fb").await, ["latest.img", &old_img]);
    assert_eq!(place.names("by-volume/vol-0a").await.len(), 3);
    assert_eq!(
        place.names("control").await,
        [
            "README",
            "clone",
            "commit",
            "copy",
            "damaged",
            "delete",
            "deltadownload",
            "diff",
            "download",
            "fanout",
            "gc",
            "getfroms3",
            "jobs",
            "metrics",
            "movetos3",
            "multiclone",
            "pid",
            "sync",
            "upload",
            "verify",
        ]
    );
    let link = place.walk("by-name/web.img").await.unwrap();
    assert_eq!(place.tree.readlink(link).unwrap(), format!("../{new_img}"));
    let link = place.walk("by-tag/Role/a%2Fb/latest.img").await.unwrap();
    assert_eq!(place.tree.readlink(link).unwrap(), format!("../../../{old_img}"));
}

#[tokio::test]
async fn looking_costs_no_block_and_no_listing() {
    let place = place().await;
    let id = snapshot(&place.store, 1, &[(LENGTH_TAG, "3000000")]).await;
    let ino = place.walk(&format!("{id}.img")).await.unwrap();
    let found = place.tree.getattr(ino).unwrap();
    assert_eq!((found.kind, found.mode, found.uid, found.gid), (Kind::File, 0o440, 7, 8));
    assert_eq!(found.size, 3_000_000);
    assert_eq!(found.allocated, 2 * BLOCK_SIZE_U64);
    let attributes = place.tree.xattrs(ino).unwrap();
    assert!(attributes.contains(&("user.fspfs.id".to_owned(), id.to_string())));
    assert!(place.tree.xattr(ino, "user.fspfs.none".as_ref()).is_err());
    for call in [Call::GetBlock, Call::ListBlocks] {
        assert_eq!(place.counters.calls(call), 0);
    }
}

#[tokio::test]
async fn an_image_reads_as_its_blocks_and_holes_reach_no_store() {
    let place = place().await;
    let id = snapshot(&place.store, 9, &[]).await;
    let ino = place.walk(&format!("{id}.img")).await.unwrap();
    let (handle, caching) = place.tree.open(ino, OpenMode::READ).await.unwrap();
    assert_eq!(caching, Caching::Keep);
    let read = place.tree.read(handle, 5 * BLOCK_SIZE_U64 - 3, 6).await.unwrap();
    assert_eq!(&read[..], [0, 0, 0, 9, 9, 9]);
    assert_eq!(place.counters.calls(Call::GetBlock), 1);
    let hole = place.tree.read_cached(handle, 100 * BLOCK_SIZE_U64, 4096).unwrap().unwrap();
    assert!(hole.iter().all(|&byte| byte == 0));
    assert_eq!(place.tree.seek_data(handle, 1).await.unwrap(), 1);
    assert_eq!(place.tree.seek_hole(handle, 1).await.unwrap(), BLOCK_SIZE_U64);
    assert_eq!(place.tree.seek_data(handle, BLOCK_SIZE_U64).await.unwrap(), 5 * BLOCK_SIZE_U64);
    let end = 1 << 30;
    assert!(place.tree.read(handle, end, 10).await.unwrap().is_empty());
    assert!(matches!(place.tree.seek_hole(handle, end).await, Err(Error::NoSuchOffset)));
    // Equal blocks are one in memory, whichever snapshot they are of.
    assert_eq!(place.tree.read(handle, 0, 1).await.unwrap()[..], [9]);
    assert_eq!(place.counters.calls(Call::GetBlock), 1);
    place.tree.release(handle);
    assert!(matches!(place.tree.read(handle, 0, 1).await, Err(Error::BadHandle)));
}

#[tokio::test]
async fn nothing_is_written_and_nothing_is_unready() {
    let place = place().await;
    let id = snapshot(&place.store, 1, &[]).await;
    let request = StartRequest::new(VolumeSize::from_gib(1).unwrap());
    let pending = place.store.start(request).await.unwrap().id;
    let ino = place.walk(&format!("{id}.img")).await.unwrap();
    assert!(matches!(place.tree.open(ino, OpenMode::WRITE).await, Err(Error::Denied)));
    assert!(matches!(place.tree.open(ROOT, OpenMode::READ).await, Err(Error::IsADirectory)));
    assert!(!place.names("").await.contains(&format!("{pending}.img")));
    let ino = place.walk(&format!("{pending}.img")).await.unwrap();
    assert!(matches!(place.tree.open(ino, OpenMode::READ).await, Err(Error::NotReady(..))));
    for missing in ["snap-0123.img", "snap-0123", "x", "by-name/x.img", "by-tag/x/y", "control/x"] {
        assert!(matches!(place.walk(missing).await, Err(Error::NotFound)), "{missing}");
    }
    assert!(matches!(place.walk(&format!("{id}.img/x")).await, Err(Error::NotADirectory)));
}

#[tokio::test]
async fn a_store_that_fails_is_shown_as_it_was_and_read_again_later() {
    let place = place().await;
    let id = snapshot(&place.store, 1, &[]).await;
    assert_eq!(place.names("").await.len(), 6);
    place.fail.plan(Call::List, 0, 1000, ErrorKind::Unavailable);
    place.fail.plan(Call::GetBlock, 0, 1, ErrorKind::Unavailable);
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    assert_eq!(place.names("").await.len(), 6);
    let ino = place.walk(&format!("{id}.img")).await.unwrap();
    let (handle, _) = place.tree.open(ino, OpenMode::READ).await.unwrap();
    let error = place.tree.read(handle, 0, 1).await.unwrap_err();
    assert!(matches!(error, Error::Store(error) if error.kind() == ErrorKind::Unavailable));
    assert_eq!(place.tree.read(handle, 0, 1).await.unwrap()[..], [1]);
}

#[tokio::test]
async fn forgets_nodes_that_the_kernel_forgets() {
    let place = place().await;
    let id = snapshot(&place.store, 1, &[(NAME_TAG, "web")]).await;
    let name = format!("{id}.img");
    let ino = place.walk(&name).await.unwrap();
    assert_eq!(place.walk(&name).await.unwrap(), ino);
    place.tree.forget(ino, 1);
    assert!(place.tree.getattr(ino).is_ok());
    place.tree.forget(ino, 1);
    assert!(matches!(place.tree.getattr(ino), Err(Error::NotFound)));
    assert!(place.tree.getattr(ROOT).is_ok());
    // The same object has the same number, also after it was forgotten.
    assert_eq!(place.walk(&name).await.unwrap(), ino);
}

#[tokio::test]
async fn metrics_are_prometheus_text() {
    let place = place().await;
    snapshot(&place.store, 1, &[]).await;
    let ino = place.walk("control/metrics").await.unwrap();
    let (handle, caching) = place.tree.open(ino, OpenMode::READ).await.unwrap();
    assert_eq!(caching, Caching::Never);
    let text = place.tree.read(handle, 0, 1 << 20).await.unwrap();
    let text = std::str::from_utf8(&text).unwrap();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        assert!(name.starts_with("fspfs_") && value.parse::<u64>().is_ok(), "{line}");
    }
    assert!(text.contains("fspfs_store_requests_total{operation=\"list\"} 1\n"), "{text}");
    assert!(text.contains("fspfs_memory_budget_bytes 16777216\n"));
}
