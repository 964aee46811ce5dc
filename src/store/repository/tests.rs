//! Tests of the format over objects in memory: crashes at every call, and races in every order.

mod collecting;
mod crashes;
mod durably;
mod hostile;
mod lost;
mod memory;
mod model;
mod over;
mod property;
mod races;
mod timeout;
mod unreadable;
mod writing;

use std::sync::{Arc, OnceLock};

use self::memory::Space;
use super::{Repository, VerifyReport};
use crate::model::{BLOCK_SIZE, Block, BlockIndex, Snapshot, SnapshotId, Tags, VolumeSize};
use crate::store::{
    CompleteRequest, ErrorKind, ListFrom, Result, SnapshotStore as _, StartRequest,
};

/// Runs a test on one thread, so that only what a test interleaves runs at the same time.
fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(test)
}

/// The block that `value` stands for: 0 is the zero block.
fn block(value: u8) -> Block {
    static BLOCKS: OnceLock<Vec<Block>> = OnceLock::new();
    let new = |value| Block::new(vec![value; BLOCK_SIZE].into());
    BLOCKS.get_or_init(|| (0..=u8::MAX).map(new).collect())[usize::from(value)].clone()
}

fn tags(value: u8) -> Tags {
    if value == 0 { Tags::new() } else { Tags::from([("Name".to_owned(), value.to_string())]) }
}

fn size(gib: u64) -> VolumeSize {
    VolumeSize::from_gib(gib).unwrap()
}

/// A start of 1 GiB with a chosen id.
fn chosen(id: &str) -> StartRequest {
    StartRequest { id: Some(id.parse().unwrap()), ..StartRequest::new(size(1)) }
}

fn child_of(parent: &SnapshotId) -> StartRequest {
    StartRequest { parent: Some(parent.clone()), ..StartRequest::new(size(1)) }
}

fn count(changed_blocks: u64) -> CompleteRequest {
    CompleteRequest { changed_blocks, checksum: None, started: None }
}

async fn start(repository: &Repository, request: StartRequest) -> SnapshotId {
    repository.start(request).await.unwrap().id
}

async fn put(repository: &Repository, id: &SnapshotId, blocks: &[(u32, u8)]) {
    for &(index, value) in blocks {
        repository.put_block(id, BlockIndex(index), block(value)).await.unwrap();
    }
}

/// Makes a completed snapshot with these blocks, each named once.
async fn make(repository: &Repository, request: StartRequest, blocks: &[(u32, u8)]) -> SnapshotId {
    let id = start(repository, request).await;
    put(repository, &id, blocks).await;
    repository.complete(&id, count(blocks.len() as u64)).await.unwrap();
    id
}

/// All blocks of a completed snapshot, each read: the value that its data repeats.
async fn read(repository: &Repository, id: &SnapshotId) -> Result<Vec<(u32, u8)>> {
    let mut blocks = Vec::new();
    let mut from = Some(ListFrom::Index(BlockIndex::ZERO));
    while let Some(at) = from {
        let page = repository.list_blocks(id, at, 1000).await?;
        for listed in page.blocks {
            let read = repository.get_block(id, listed.index, &listed.token).await?;
            let value = read.bytes()[0];
            assert_eq!(read, block(value));
            blocks.push((listed.index.0, value));
        }
        from = page.next.map(ListFrom::Page);
    }
    Ok(blocks)
}

async fn verify(repository: &Repository, ids: &[SnapshotId]) -> VerifyReport {
    repository.verify(ids, Arc::new(|_| {})).await.unwrap()
}

fn kind<T>(result: Result<T>) -> Option<ErrorKind> {
    result.err().map(|error| error.kind())
}

async fn state(repository: &Repository, id: &SnapshotId) -> Option<Snapshot> {
    match repository.describe(id).await {
        Ok(snapshot) => Some(snapshot),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => panic!("{error}"),
    }
}
