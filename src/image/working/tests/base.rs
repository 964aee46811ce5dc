//! A base that the store does not tell of when an image comes back.

use std::sync::Arc;

use bytes::Bytes;
use rstest::rstest;
use tokio::runtime::Runtime;

use super::content::{Content, difference};
use super::trap::{Fault, Plan};
use super::world::{Change, World};
use crate::image::staging::record::ImageRecord;
use crate::image::working::{Error, State, WorkingImage};
use crate::model::{BLOCK_SIZE, BLOCK_SIZE_U64, SnapshotId};
use crate::store::wrap::Call;

const fn write(block: u64, value: u8) -> Change {
    Change::Write { offset: block * BLOCK_SIZE_U64 + 1000, len: 300_000, value }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// A process leaves an image with a base, of which it has changed block 1, or failed to commit that.
fn left(failed: bool) -> (World, SnapshotId) {
    let process = runtime();
    let (mut world, base) = process.block_on(async {
        let mut world = World::new().await;
        world.create(None).await;
        for block in [0, 1, 4] {
            world.change(0, write(block, block as u8 + 1)).await.unwrap();
        }
        let image = world.slots[0].image();
        world.attempts.push(world.slots[0].content.clone());
        let base = image.commit().await.unwrap();
        world.quiet().await;
        world.change(0, write(1, 9)).await.unwrap();
        if failed {
            world.attempts.push(world.slots[0].content.clone());
            world.life().trap.arm(Plan { call: Call::Complete, after: 0, fault: Fault::Fail });
            image.commit().await.unwrap_err();
            world.quiet().await;
        }
        (world, base)
    });
    drop(process);
    world.die();
    (world, base)
}

async fn holds(image: &Arc<WorkingImage>, content: &Content, block: u64) {
    let read = image.read(block * BLOCK_SIZE_U64, BLOCK_SIZE).await.unwrap();
    assert_eq!(difference(&read, &content.read(block * BLOCK_SIZE_U64, BLOCK_SIZE)), None);
}

/// What is staged can be read, and nothing else, nor can anything depend on that.
async fn lacks_its_base(image: &Arc<WorkingImage>, content: &Content, base: &SnapshotId) {
    let status = image.status();
    assert_eq!((status.state, status.base.as_ref()), (State::Failed, Some(base)));
    assert!(status.error.unwrap().contains(base.as_str()));
    assert_eq!(status.len, content.len);
    holds(image, content, 1).await;
    for block in [0, 4] {
        let offset = block * BLOCK_SIZE_U64;
        let error = image.read(offset, BLOCK_SIZE).await.unwrap_err();
        assert!(matches!(error, Error::NoBase(_)), "{error}");
        assert_eq!(image.seek_data(offset).await.unwrap(), Some(offset));
        let part = image.write(offset + 1, Bytes::from_static(b"x")).await;
        assert!(matches!(part, Err(Error::NoBase(_))), "{part:?}");
    }
}

#[test]
fn what_is_not_staged_comes_back_with_the_base() {
    let (mut world, base) = left(false);
    runtime().block_on(async {
        world.at_begin = Some(Plan { call: Call::Describe, after: 0, fault: Fault::Fail });
        let image = world.begin().await.remove(0);
        image.resume();
        let mut content = world.slots[0].content.clone();
        lacks_its_base(&image, &content, &base).await;
        image.sync().await.unwrap();
        // A whole block needs nothing of it.
        let whole = vec![7; BLOCK_SIZE];
        image.write(2 * BLOCK_SIZE_U64, Bytes::from(whole.clone())).await.unwrap();
        content.write(2 * BLOCK_SIZE_U64, &whole);
        image.find_base().await.unwrap();
        assert_eq!(image.status().state, State::Dirty);
        for block in 0..5 {
            holds(&image, &content, block).await;
        }
        world.attempts.push(content);
        let id = image.commit().await.unwrap();
        world.quiet().await;
        world.check_store().await;
        assert!(world.snapshots.contains_key(&id));
    });
}

#[test]
fn a_store_that_does_not_answer_is_not_waited_for_long() {
    let (mut world, base) = left(false);
    runtime().block_on(async {
        world.at_begin = Some(Plan { call: Call::Describe, after: 0, fault: Fault::HangBefore });
        // What goes on beside the clock is waited for.
        tokio::time::pause();
        let begun = tokio::time::Instant::now();
        let image = world.begin().await.remove(0);
        let waited = begun.elapsed();
        tokio::time::resume();
        assert!(waited.as_secs() < 10, "{waited:?}");
        lacks_its_base(&image, &world.slots[0].content, &base).await;
        image.find_base().await.unwrap();
        assert_eq!(image.status().state, State::Dirty);
    });
}

#[test]
fn a_commit_looks_for_the_base_again() {
    let (mut world, base) = left(true);
    runtime().block_on(async {
        world.at_begin = Some(Plan { call: Call::Describe, after: 0, fault: Fault::Fail });
        let image = world.begin().await.remove(0);
        let content = world.slots[0].content.clone();
        holds(&image, &content, 1).await;
        assert_eq!(image.status().state, State::Failed);
        image.resume();
        world.quiet().await;
        assert_eq!(image.status().state, State::Clean);
        assert_ne!(image.status().base, Some(base));
        world.check_store().await;
        assert!(world.snapshots.values().any(|snapshot| *snapshot == content));
    });
}

#[test]
fn a_base_that_was_deleted_costs_nothing_that_is_staged() {
    let (mut world, base) = left(true);
    let process = runtime();
    process.block_on(async {
        world.begin().await;
        world.life().shop.store.delete(&base).await.unwrap();
    });
    drop(process);
    world.die();
    for _ in 0..2 {
        runtime().block_on(async {
            let image = world.begin().await.remove(0);
            let content = world.slots[0].content.clone();
            lacks_its_base(&image, &content, &base).await;
            image.resume();
            world.quiet().await;
            let error = image.commit().await.unwrap_err();
            assert!(matches!(error, Error::NoBase(_)), "{error}");
            lacks_its_base(&image, &content, &base).await;
        });
        world.die();
    }
    runtime().block_on(async {
        let image = world.begin().await.remove(0);
        let mut content = world.slots[0].content.clone();
        // Truncated to nothing it does not need it any more.
        for change in [Change::Truncate(0), write(1, 20)] {
            change.apply(&mut content);
        }
        image.truncate(0).await.unwrap();
        let bytes = content.read(BLOCK_SIZE_U64 + 1000, 300_000);
        image.write(BLOCK_SIZE_U64 + 1000, Bytes::from(bytes)).await.unwrap();
        world.attempts.push(content.clone());
        image.commit().await.unwrap();
        world.quiet().await;
        assert_eq!(image.status().state, State::Clean);
        holds(&image, &content, 0).await;
        world.snapshots.remove(&base);
        world.check_store().await;
        assert!(world.snapshots.values().any(|snapshot| *snapshot == content));
    });
}

/// What tells that a snapshot was begun elsewhere: the store may be a copy of the one that it was begun in.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Lacks {
    Pending,
    /// Nothing of it is in the image any more.
    Base,
}

#[rstest]
fn staging_that_may_be_of_another_store_waits(#[values(Lacks::Pending, Lacks::Base)] lacks: Lacks) {
    let (mut world, base) = left(lacks == Lacks::Pending);
    let process = runtime();
    process.block_on(async {
        let image = world.begin().await.remove(0);
        let gone = match lacks {
            Lacks::Pending => image.state().lowest().pending().unwrap(),
            Lacks::Base => {
                image.truncate(0).await.unwrap();
                image.write(0, Bytes::from_static(b"anew")).await.unwrap();
                world.life().trap.arm(Plan { call: Call::Start, after: 0, fault: Fault::Fail });
                image.commit().await.unwrap_err();
                world.quiet().await;
                base
            }
        };
        world.life().shop.store.delete(&gone).await.unwrap();
        world.snapshots.remove(&gone);
    });
    drop(process);
    world.die();
    runtime().block_on(async {
        for _ in 0..2 {
            let image = world.begin().await.remove(0);
            image.resume();
            world.quiet().await;
            let status = image.status();
            let (state, why) = match lacks {
                Lacks::Pending => (State::Interrupted, "copy of the store"),
                Lacks::Base => (State::Failed, "base"),
            };
            assert_eq!(status.state, state, "{status:?}");
            assert!(status.error.unwrap().contains(why));
            image.sync().await.unwrap();
            world.die();
        }
        let image = world.begin().await.remove(0);
        image.resume();
        assert!(ImageRecord::read(&image.directory).unwrap().trouble.is_some(), "it forgot");
        image.commit().await.unwrap();
        world.quiet().await;
        assert_eq!(image.status().state, State::Clean);
    });
}
