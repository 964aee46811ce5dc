//! A commit that is asked for while another one goes on waits for its turn, and nobody's writes for it.

use std::sync::Arc;

use rstest::rstest;
use tokio::task::JoinHandle;

use super::trap::{Fault, Plan};
use super::world::{Change, World};
use crate::image::working::{Error, Opened, Result, State, WorkingImage};
use crate::model::{BLOCK_SIZE_U64, SnapshotId};
use crate::store::wrap::Call;

fn write(block: u64, value: u8) -> Change {
    Change::Write { offset: block * BLOCK_SIZE_U64 + 1000, len: 300_000, value }
}

type Asked = JoinHandle<Result<SnapshotId>>;

fn ask(image: &Arc<WorkingImage>) -> Asked {
    let image = Arc::clone(image);
    tokio::spawn(async move { image.commit().await })
}

async fn becomes(image: &WorkingImage, state: State) {
    while image.status().state != state {
        tokio::task::yield_now().await;
    }
}

/// An image whose commit hangs, and which was changed since; the commit.
async fn hanging() -> (World, Arc<WorkingImage>, Asked) {
    let mut world = World::new().await;
    world.create(None).await;
    world.change(0, write(0, 1)).await.unwrap();
    let image = world.slots[0].image();
    world.attempts.push(world.slots[0].content.clone());
    world.life().trap.arm(Plan { call: Call::PutBlock, after: 0, fault: Fault::HangBefore });
    let first = ask(&image);
    world.life().trap.caught.acquire().await.unwrap().forget();
    world.change(0, write(1, 2)).await.unwrap();
    (world, image, first)
}

#[tokio::test]
async fn a_change_after_a_close_waits_for_the_next_close() {
    let (mut world, image, first) = hanging().await;
    assert_eq!(image.commit_closed().await.unwrap(), None);
    assert_eq!(image.status().state, State::Queued);
    world.change(0, write(2, 3)).await.unwrap();
    assert_eq!(image.status().state, State::Committing);
    world.life().trap.release();
    first.await.unwrap().unwrap();
    world.quiet().await;
    assert_eq!(image.status().state, State::Dirty);
    assert_eq!(world.life().told.ended(), 0, "a commit that did not begin is told of");
    world.check_store().await;
    assert_eq!(world.snapshots.len(), 1);
    world.attempts.push(world.slots[0].content.clone());
    image.commit_closed().await.unwrap().unwrap();
    world.quiet().await;
    world.check_store().await;
    assert_eq!(world.snapshots.len(), 2);
}

/// What asks for a commit that takes whatever is there when its turn comes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Asks {
    Name,
    /// By name, for what was closed before.
    NameAfterClose,
    LoopDevice,
}

#[rstest]
#[tokio::test]
async fn a_commit_that_was_asked_for_takes_all_at_its_turn(
    #[values(Asks::Name, Asks::NameAfterClose, Asks::LoopDevice)] asks: Asks,
) {
    let (mut world, image, first) = hanging().await;
    let second = match asks {
        Asks::LoopDevice => {
            image.commit_in_background();
            None
        }
        Asks::Name => Some(ask(&image)),
        Asks::NameAfterClose => {
            image.commit_closed().await.unwrap();
            let asked = ask(&image);
            tokio::task::yield_now().await;
            Some(asked)
        }
    };
    becomes(&image, State::Queued).await;
    if asks == Asks::NameAfterClose {
        while image.state().layers[1].commit.outcome.receiver_count() == 0 {
            tokio::task::yield_now().await;
        }
    }
    for value in 3..6 {
        world.change(0, write(2, value)).await.unwrap();
        assert_eq!(image.status().state, State::Queued);
    }
    world.attempts.push(world.slots[0].content.clone());
    world.life().trap.release();
    first.await.unwrap().unwrap();
    world.quiet().await;
    assert_eq!(image.status().state, State::Clean);
    if let Some(second) = second {
        assert_eq!(Some(second.await.unwrap().unwrap()), image.status().snapshot);
    }
    world.check_store().await;
    assert_eq!(world.snapshots.len(), 2);
}

#[tokio::test]
#[expect(clippy::await_holding_lock, reason = "nobody else takes it on this thread")]
async fn a_commit_that_is_being_queued_ends_with_the_one_that_is_cancelled() {
    let (mut world, image, first) = hanging().await;
    let second = {
        // It is not written down yet that it is to be committed.
        let _recording = image.recording.lock().unwrap();
        let second = ask(&image);
        becomes(&image, State::Queued).await;
        image.cancel().unwrap();
        becomes(&image, State::Interrupted).await;
        second
    };
    for commit in [first, second] {
        let error = commit.await.unwrap().unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{error}");
    }
    world.life().trap.release();
    world.quiet().await;
    assert_eq!(image.status().state, State::Interrupted);
    world.check_store().await;
    assert_eq!(world.snapshots.len(), 0);
}

#[tokio::test]
async fn an_image_cut_short_meanwhile_is_not_committed() {
    let (mut world, image, first) = hanging().await;
    let second = ask(&image);
    becomes(&image, State::Queued).await;
    let opened = Opened::new(Arc::clone(&image), true, true, 1);
    opened.begin_change();
    world.change(0, write(2, 3)).await.unwrap();
    opened.flush(1, Some("it was killed".to_owned())).unwrap();
    opened.release();
    world.life().trap.release();
    first.await.unwrap().unwrap();
    let error = second.await.unwrap().unwrap_err();
    assert!(matches!(&error, Error::Interrupted(why) if why == "it was killed"), "{error}");
    world.quiet().await;
    assert_eq!(image.status().state, State::Interrupted);
    world.check_store().await;
    assert_eq!(world.snapshots.len(), 1);
}

#[rstest]
#[tokio::test]
async fn as_is_holds_for_a_commit_that_waits(#[values(false, true)] as_is: bool) {
    let (mut world, image, first) = hanging().await;
    world.attempts.push(world.slots[0].content.clone());
    let asked = Arc::clone(&image);
    let second = tokio::spawn(async move { asked.commit_as(as_is).await });
    becomes(&image, State::Queued).await;
    image.state().lost.add(0..1);
    world.life().trap.release();
    first.await.unwrap().unwrap();
    match second.await.unwrap() {
        Ok(_) => assert!(as_is),
        Err(error) => assert!(!as_is && matches!(error, Error::NotWhole(_)), "{error}"),
    }
    world.quiet().await;
    world.check_store().await;
    assert_eq!(world.snapshots.len(), 1 + usize::from(as_is));
}

#[tokio::test]
async fn a_close_after_a_failed_commit_is_told_of_its_own() {
    let (mut world, image, first) = hanging().await;
    world.life().trap.arm(Plan { call: Call::Complete, after: 0, fault: Fault::Fail });
    world.life().trap.release();
    first.await.unwrap().unwrap_err();
    world.quiet().await;
    world.life().trap.arm(Plan { call: Call::Complete, after: 1, fault: Fault::Fail });
    image.commit_closed().await.unwrap_err();
    world.quiet().await;
    world.slots[0].changed = true;
    world.commit().await;
    world.check_store().await;
    assert_eq!(world.snapshots.len(), 2);
}

#[rstest]
fn the_next_mount_commits_what_was_closed_and_not_changed(#[values(false, true)] changed: bool) {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let process = runtime();
    let mut world = process.block_on(async {
        let (mut world, image, _) = hanging().await;
        image.commit_in_background();
        becomes(&image, State::Queued).await;
        while !image.state().layers[1].durable {
            tokio::task::yield_now().await;
        }
        world.attempts.push(world.slots[0].content.clone());
        if changed {
            world.change(0, write(2, 3)).await.unwrap();
        }
        world
    });
    drop(process);
    world.die();
    runtime().block_on(async {
        world.live().await;
        let state = world.slots[0].image().status().state;
        assert_eq!(state, if changed { State::Dirty } else { State::Clean });
        world.check_store().await;
        assert_eq!(world.snapshots.len(), if changed { 1 } else { 2 });
    });
}
