//! What is vouched for is not read when it is not what was written.

use std::os::unix::fs::FileExt as _;

use bytes::Bytes;

use super::content::Content;
use super::trap::{Fault, Plan};
use super::world::{Change, World};
use crate::image::working::{Error, State};
use crate::model::{BLOCK_SIZE, BLOCK_SIZE_U64};
use crate::store::wrap::Call;

const fn write(block: u64, value: u8) -> Change {
    Change::Write { offset: block * BLOCK_SIZE_U64 + 1000, len: 300_000, value }
}

/// A world with an image that could not be committed, whose blocks 1 and 4, the last one, are damaged.
async fn damaged() -> World {
    let mut world = World::new().await;
    world.create(None).await;
    for block in [0, 1, 4] {
        world.change(0, write(block, block as u8 + 1)).await.unwrap();
    }
    let image = world.slots[0].image();
    world.attempts.push(world.slots[0].content.clone());
    world.life().trap.arm(Plan { call: Call::Complete, after: 0, fault: Fault::Fail });
    image.commit().await.unwrap_err();
    world.quiet().await;
    for block in [1, 4] {
        let offset = block * BLOCK_SIZE_U64 + 5000;
        let files = std::sync::Arc::clone(&image.state().lowest().files);
        files.data.write_all_at(b"damage", offset).unwrap();
    }
    world
}

fn is_damage<T: std::fmt::Debug>(result: &Result<T, Error>) {
    assert!(matches!(result, Err(Error::Damaged { .. })), "{result:?}");
}

async fn reads_are_checked(world: &World, content: &Content) {
    let image = world.slots[0].image();
    let read = async |block: u64, len| image.read(block * BLOCK_SIZE_U64, len).await;
    for block in [0, 2] {
        let expected = content.read(block * BLOCK_SIZE_U64, BLOCK_SIZE);
        assert!(read(block, BLOCK_SIZE).await.unwrap() == expected);
    }
    is_damage(&read(1, BLOCK_SIZE).await);
    is_damage(&read(0, 3 * BLOCK_SIZE).await);
    is_damage(&read(4, BLOCK_SIZE).await);
    let len = usize::try_from(content.len).unwrap();
    is_damage(&read(0, len).await);
    // Whatever part of it.
    for (offset, len) in [(0, 4096), (200_000, 10), (BLOCK_SIZE_U64 - 1, 1)] {
        is_damage(&image.read(BLOCK_SIZE_U64 + offset, len).await);
        let read = image.read(offset, len).await.unwrap();
        assert!(read == content.read(offset, len));
    }
}

#[tokio::test]
async fn a_damaged_block_is_not_read() {
    let world = damaged().await;
    reads_are_checked(&world, &world.slots[0].content).await;
}

#[tokio::test]
async fn damage_is_not_vouched_for_anew() {
    let mut world = damaged().await;
    let image = world.slots[0].image();
    let mut content = world.slots[0].content.clone();
    for block in [1, 4] {
        let offset = block * BLOCK_SIZE_U64;
        is_damage(&image.write(offset, Bytes::from_static(b"x")).await);
        is_damage(&image.punch(offset + 10, 20).await);
    }
    is_damage(&image.truncate(BLOCK_SIZE_U64 + 7).await);
    is_damage(&image.truncate(content.len - 1).await);
    reads_are_checked(&world, &content).await;
    is_damage(&image.commit().await);
    world.quiet().await;
    assert_eq!(image.status().state, State::Failed);
    // What is written whole is fine.
    let whole = Bytes::from(vec![8; BLOCK_SIZE]);
    for block in [1, 4] {
        content.write(block * BLOCK_SIZE_U64, &whole);
        image.write(block * BLOCK_SIZE_U64, whole.clone()).await.unwrap();
    }
    image.write(3, Bytes::from_static(b"x")).await.unwrap();
    content.write(3, b"x");
    world.attempts.push(content.clone());
    image.commit().await.unwrap();
    world.quiet().await;
    world.check_store().await;
    assert!(world.snapshots.values().any(|snapshot| *snapshot == content));
}

#[tokio::test]
async fn damage_beneath_is_not_copied_up() {
    let world = damaged().await;
    let image = world.slots[0].image();
    world.life().trap.arm(Plan { call: Call::Start, after: 0, fault: Fault::HangBefore });
    let committing = std::sync::Arc::clone(&image);
    tokio::spawn(async move { committing.commit().await });
    world.life().trap.caught.acquire().await.unwrap().forget();
    for block in [1, 4] {
        is_damage(&image.write(block * BLOCK_SIZE_U64, Bytes::from_static(b"x")).await);
    }
    image.write(0, Bytes::from_static(b"x")).await.unwrap();
}
