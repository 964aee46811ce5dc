//! What another run of the machine has left, in the staging directory of a mount that is gone.

use std::sync::Arc;

use rstest::rstest;
use tokio::runtime::Runtime;

use super::trap::{Fault, Plan};
use super::world::{Change, STORE, World};
use crate::image::staging::Staging;
use crate::image::staging::record::ImageRecord;
use crate::image::working::State;
use crate::model::{BLOCK_SIZE_U64, Digest};
use crate::store::wrap::Call;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// Synced by its program.
    Synced,
    /// A commit of it failed.
    Failed,
    /// It was being committed, and nobody was told that it is safe.
    Committing,
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn write(block: u64, value: u8) -> Change {
    Change::Write { offset: block * BLOCK_SIZE_U64 + 1000, len: 300_000, value }
}

async fn leave(left: Left) -> World {
    let mut world = World::new().await;
    world.create(None).await;
    for block in [0, 1, 4] {
        world.change(0, write(block, block as u8 + 1)).await.unwrap();
    }
    let image = world.slots[0].image();
    world.attempts.push(world.slots[0].content.clone());
    let trap = Arc::clone(&world.life().trap);
    let plan = |fault| Plan { call: Call::Complete, after: 0, fault };
    match left {
        Left::Synced => image.sync().await.unwrap(),
        Left::Failed => {
            trap.arm(plan(Fault::Fail));
            image.commit().await.unwrap_err();
        }
        Left::Committing => {
            trap.arm(plan(Fault::HangBefore));
            tokio::spawn(async move { image.commit().await });
            trap.caught.acquire().await.unwrap().forget();
        }
    }
    world
}

#[rstest]
#[case(Left::Synced, State::Dirty)]
#[case(Left::Failed, State::Clean)]
#[case(Left::Committing, State::Interrupted)]
fn what_another_run_has_left_is_taken_over(#[case] left: Left, #[case] becomes: State) {
    let process = runtime();
    let mut world = process.block_on(leave(left));
    drop(process);
    world.die();
    let root = world.staging().with_file_name("places");
    let key = &Digest::of(STORE.as_bytes()).to_hex()[..16];
    let place = |n: u32| root.join(format!("{key}-{n}"));
    std::fs::create_dir(&root).unwrap();
    std::fs::rename(world.staging(), place(3)).unwrap();
    let images = || std::fs::read_dir(place(3).join("images")).unwrap();
    for image in images() {
        let directory = image.unwrap().path();
        let mut record = ImageRecord::read(&directory).unwrap();
        record.boot = "another one".to_owned();
        record.write(&directory, true).unwrap();
    }
    runtime().block_on(async {
        let staging = Staging::open_default(&root, STORE, u64::MAX).unwrap();
        assert_eq!(staging.path(), place(0));
        assert_eq!(images().count(), 0);
        let image = world.begin_in(staging).await.remove(0);
        let content = world.slots[0].content.clone();
        assert_eq!(image.len(), content.len);
        let len = usize::try_from(content.len).unwrap();
        assert!(image.read(0, len).await.unwrap() == content.read(0, len));
        image.resume();
        world.quiet().await;
        assert_eq!(image.status().state, becomes);
        image.commit().await.unwrap();
        world.quiet().await;
        world.check_store().await;
        assert_eq!(world.snapshots.len(), 1);
        assert!(world.snapshots.values().all(|snapshot| *snapshot == content));
    });
}

#[test]
fn what_a_mount_still_uses_is_not_taken_over() {
    let process = runtime();
    let mut world = process.block_on(leave(Left::Synced));
    drop(process);
    world.die();
    let root = world.staging().with_file_name("places");
    let key = &Digest::of(STORE.as_bytes()).to_hex()[..16];
    std::fs::create_dir(&root).unwrap();
    std::fs::rename(world.staging(), root.join(format!("{key}-0"))).unwrap();
    let used = Staging::open_default(&root, STORE, u64::MAX).unwrap();
    let other = Staging::open_default(&root, STORE, u64::MAX).unwrap();
    assert_eq!((used.images().unwrap().len(), other.images().unwrap().len()), (1, 0));
    drop(used);
    drop(other);
    let staging = Staging::open_default(&root, STORE, u64::MAX).unwrap();
    assert_eq!(staging.images().unwrap().len(), 1);
}
