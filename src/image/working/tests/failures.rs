//! Commits that go wrong in ways that need no chance.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rstest::rstest;

use super::trap::{Fault, Plan};
use super::world::{Change, PATIENCE, World};
use crate::image::working::run::Run;
use crate::image::working::{Error, Settings, State, WorkingImage};
use crate::model::{BLOCK_SIZE, BLOCK_SIZE_U64};
use crate::store::ErrorKind;
use crate::store::wrap::Call;
use crate::transfer::run_len;
use crate::tree;

const fn write(block: u64, value: u8) -> Change {
    Change::Write { offset: block * BLOCK_SIZE_U64 + 1000, len: 300_000, value }
}

/// A world with one image in it, which three blocks were written to.
async fn written() -> World {
    let mut world = World::new().await;
    world.create(None).await;
    for block in [0, 1, 4] {
        world.change(0, write(block, block as u8 + 1)).await.unwrap();
    }
    world
}

impl World {
    /// Asks for a commit of the only image, which holds what it should.
    pub(super) async fn commit(&mut self) {
        let content = self.slots[0].content.clone();
        self.attempts.push(content.clone());
        let result = self.slots[0].image().commit().await;
        self.committed(0, content, result, false).await;
        self.quiet().await;
        assert_eq!(self.slots[0].image().status().state, State::Clean);
    }

    /// A commit of the only image that goes wrong.
    async fn commit_in_vain(&mut self, call: Call, fault: Fault) -> Error {
        self.attempts.push(self.slots[0].content.clone());
        self.life().trap.arm(Plan { call, after: 0, fault });
        let error = self.slots[0].image().commit().await.unwrap_err();
        self.quiet().await;
        error
    }
}

#[rstest]
#[case::whose_record_is_whole(false)]
#[case::whose_record_is_damaged(true)]
fn a_commit_whose_mount_was_killed_goes_on(#[case] is_damaged: bool) {
    const BLOCKS: usize = 70;
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let process = runtime();
    let mut world = process.block_on(async {
        let mut world = World::new().await;
        world.create(None).await;
        let len = BLOCKS * BLOCK_SIZE;
        world.change(0, Change::Write { offset: 0, len, value: 1 }).await.unwrap();
        world.attempts.push(world.slots[0].content.clone());
        // Its process dies when a pack of 64 blocks was saved, which nobody has noted yet.
        let plan = Plan { call: Call::PutBlock, after: 65, fault: Fault::HangAll };
        world.life().trap.arm(plan);
        let image = world.slots[0].image();
        tokio::spawn(async move { image.commit().await });
        while world.records().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        world
    });
    drop(process);
    world.die();
    if is_damaged {
        std::fs::write(&world.records()[0], "damaged").unwrap();
    }
    runtime().block_on(async {
        world.live().await;
        // What the repository has is not put again.
        let left = if is_damaged { BLOCKS } else { BLOCKS - 64 };
        assert_eq!(world.puts(), left as u64);
        assert_eq!(world.slots[0].image().status().state, State::Clean);
        world.check_store().await;
        assert_eq!(world.snapshots.len(), 1);
    });
}

#[rstest]
#[tokio::test]
async fn a_commit_that_dies_has_failed(
    #[values(Call::Start, Call::PutBlock, Call::Complete)] call: Call,
) {
    let mut world = written().await;
    world.commit_in_vain(call, Fault::Panic).await;
    let status = world.slots[0].image().status();
    assert_eq!(status.state, State::Failed, "{status:?}");
    world.slots[0].changed = true;
    world.commit().await;
}

/// What `close()` answers is `EACCES`: see the table of errors.
#[rstest]
#[tokio::test]
async fn a_store_that_denies_is_asked_again(
    #[values(Call::Start, Call::PutBlock, Call::Complete)] call: Call,
) {
    let mut world = written().await;
    let error = world.commit_in_vain(call, Fault::Deny).await;
    match tree::Error::from(error) {
        tree::Error::Store(error) => assert_eq!(error.kind(), ErrorKind::Denied),
        error => panic!("{error}"),
    }
    let status = world.slots[0].image().status();
    assert_eq!(status.state, State::Failed);
    assert!(status.error.unwrap().contains("not for you"));
    world.check_images().await;
    world.commit().await;
    assert_eq!(world.life().trap.repeated(), 0);
}

#[rstest]
#[tokio::test]
async fn a_store_that_answers_nothing_for_a_minute_is_not_waited_for(
    #[values(Call::Start, Call::PutBlock, Call::Complete)] call: Call,
    #[values(Fault::HangBefore, Fault::HangAfter)] fault: Fault,
) {
    let mut world = written().await;
    let image = world.slots[0].image();
    world.attempts.push(world.slots[0].content.clone());
    world.life().trap.arm(Plan { call, after: 0, fault });
    let committing = tokio::spawn({
        let image = Arc::clone(&image);
        async move { image.commit().await }
    });
    world.life().trap.caught.acquire().await.unwrap().forget();
    // From here on nothing goes on but the clock.
    tokio::time::pause();
    let begun = tokio::time::Instant::now();
    let error = committing.await.unwrap().unwrap_err();
    let waited = begun.elapsed();
    tokio::time::resume();
    assert!(matches!(error, Error::Stalled(_)), "{error}");
    assert!((59..65).contains(&waited.as_secs()), "{waited:?}");
    world.quiet().await;
    assert_eq!(image.status().state, State::Failed);
    world.slots[0].changed = true;
    world.commit().await;
}

#[tokio::test]
async fn a_failure_with_nothing_staged_does_not_leave_a_commit_under_way() {
    for error in [Error::Cancelled, Error::Empty] {
        let mut world = World::new().await;
        world.create(None).await;
        let image = world.slots[0].image();
        image.state().phase.begin();
        image.fail(error).await;
        assert!(!image.state().phase.is_committing());
        assert_eq!(image.status().state, State::Clean);
        world.change(0, write(0, 1)).await.unwrap();
        world.commit().await;
    }
}

#[tokio::test]
async fn a_run_that_is_given_up_is_not_under_way_and_tells_who_waits() {
    let world = written().await;
    let image = world.slots[0].image();
    world.life().trap.arm(Plan { call: Call::Start, after: 0, fault: Fault::HangBefore });
    let waiting = tokio::spawn({
        let image = Arc::clone(&image);
        async move { image.commit().await }
    });
    world.life().trap.caught.acquire().await.unwrap().forget();
    let number = image.state().phase.run().unwrap();
    drop(Run { image: Arc::clone(&image), number: number - 1 });
    assert!(image.state().phase.is_committing());
    drop(Run { image: Arc::clone(&image), number });
    assert!(!image.state().phase.is_committing());
    assert!(matches!(waiting.await.unwrap(), Err(Error::Interrupted(_))));
    assert_eq!(image.status().state, State::Failed);
}

#[tokio::test]
async fn a_tag_too_many_is_refused_when_it_is_set() {
    let mut world = written().await;
    let image = world.slots[0].image();
    // Beside the name and the length, which are our own.
    for n in 0..48 {
        image.wish(&format!("tag.k{n}"), Some("v"), 0).await.unwrap();
    }
    let error = image.wish("tag.k48", Some("v"), 0).await.unwrap_err();
    assert!(matches!(error, Error::TooManyTags(51)), "{error}");
    // What takes no more room is fine.
    image.wish("tag.k47", Some("w"), 0).await.unwrap();
    image.wish("tag.Name", Some("web"), 0).await.unwrap();
    image.wish("tag.k0", None, 0).await.unwrap();
    image.wish("tag.k48", Some("v"), 0).await.unwrap();
    assert_eq!(image.wishes().len(), 49);
    world.commit().await;
}

#[test]
fn default_tags_need_room_beside_our_own() {
    let with = |count: usize| {
        let tags = (0..count).map(|n| (format!("k{n}"), String::new())).collect();
        Settings { tags, ..Settings::default() }
    };
    assert!(with(48).check().is_ok());
    assert!(with(49).check().unwrap_err().contains("too many"));
    let long = Settings { description: Some("d".repeat(256)), ..Settings::default() };
    assert!(long.check().unwrap_err().contains("description"));
}

/// A world with an image whose commit went wrong after it was closed once more.
async fn failed_with_another_behind(cancelled: bool) -> World {
    let mut world = written().await;
    let image = world.slots[0].image();
    let trap = Arc::clone(&world.life().trap);
    let first = world.slots[0].content.clone();
    world.attempts.push(first);
    trap.arm(Plan { call: Call::PutBlock, after: 1, fault: Fault::HangBefore });
    let committing = tokio::spawn({
        let image = Arc::clone(&image);
        async move { image.commit().await }
    });
    trap.caught.acquire().await.unwrap().forget();
    world.change(0, write(1, 50)).await.unwrap();
    let second = world.slots[0].content.clone();
    world.attempts.push(second);
    assert_eq!(image.commit_closed().await.unwrap(), None);
    assert_eq!(image.status().state, State::Queued);
    if cancelled {
        image.cancel().unwrap();
    } else {
        trap.arm(Plan { call: Call::Complete, after: 0, fault: Fault::Fail });
        trap.release();
    }
    committing.await.unwrap().unwrap_err();
    world.quiet().await;
    world
}

/// Cancels a commit as soon as it shows, and then does something before what the snapshot will be is made
/// durable: that takes a while, and all the while it is `committing`. What comes of the commit.
async fn cancelled_early(image: &Arc<WorkingImage>, then: impl FnOnce()) -> Error {
    let slow_disk = image.recording.lock().unwrap();
    let committing = tokio::spawn({
        let image = Arc::clone(image);
        async move { image.commit().await }
    });
    let end = std::time::Instant::now() + PATIENCE;
    while image.status().state != State::Committing {
        assert!(std::time::Instant::now() < end, "it never shows");
        std::thread::sleep(Duration::from_millis(1));
    }
    image.cancel().unwrap();
    then();
    drop(slow_disk);
    committing.await.unwrap().unwrap_err()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_is_cancelled_as_soon_as_it_shows() {
    let mut world = written().await;
    let image = world.slots[0].image();
    world.attempts.push(world.slots[0].content.clone());
    let error = cancelled_early(&image, || {}).await;
    assert!(matches!(error, Error::Cancelled), "{error}");
    world.quiet().await;
    assert_eq!(image.status().state, State::Interrupted);
    world.slots[0].changed = true;
    world.commit().await;
}

#[tokio::test]
async fn a_commit_that_does_not_begin_has_ended_for_who_was_told_of_it() {
    let mut world = written().await;
    let image = world.slots[0].image();
    let (staging, away) = (world.staging(), world.staging().with_extension("away"));
    world.attempts.push(world.slots[0].content.clone());
    std::fs::rename(&staging, &away).unwrap();
    image.commit_closed().await.unwrap_err();
    std::fs::rename(&away, &staging).unwrap();
    world.quiet().await;
    assert_eq!(world.life().told.ended(), 1);
    image.commit().await.unwrap();
    world.quiet().await;
    assert_eq!(world.life().told.ended(), 1, "nobody is told of what was asked for by name");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_ends_nothing_that_began_later() {
    let mut world = written().await;
    let image = world.slots[0].image();
    let (staging, away) = (world.staging(), world.staging().with_extension("away"));
    // It does not come to what was cancelled.
    let error = cancelled_early(&image, || std::fs::rename(&staging, &away).unwrap()).await;
    assert!(matches!(error, Error::Io { .. }), "{error}");
    std::fs::rename(&away, &staging).unwrap();
    world.quiet().await;
    world.slots[0].changed = true;
    world.commit().await;
}

/// The answer to the start of a snapshot comes when nobody waits for it any more.
#[rstest]
#[tokio::test]
async fn a_snapshot_that_is_started_too_late_does_not_stay(#[values(false, true)] removed: bool) {
    let mut world = written().await;
    let image = world.slots[0].image();
    let trap = Arc::clone(&world.life().trap);
    world.attempts.push(world.slots[0].content.clone());
    trap.arm(Plan { call: Call::Start, after: 0, fault: Fault::HangAfter });
    let committing = tokio::spawn({
        let image = Arc::clone(&image);
        async move { image.commit().await }
    });
    trap.caught.acquire().await.unwrap().forget();
    image.cancel().unwrap();
    assert!(matches!(committing.await.unwrap(), Err(Error::Cancelled)));
    while image.state().phase.is_committing() {
        tokio::task::yield_now().await;
    }
    if removed {
        image.remove().await;
    }
    let store = Arc::clone(&world.life().shop.store);
    let pending = async || store.list(None).await.unwrap().snapshots.len();
    trap.release();
    let end = std::time::Instant::now() + PATIENCE;
    if removed {
        while pending().await > 0 {
            assert!(std::time::Instant::now() < end, "it stays");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        return;
    }
    // It is gone, or it is what the next attempt goes on with.
    world.quiet().await;
    world.slots[0].changed = true;
    world.commit().await;
    assert_eq!(pending().await, 1);
}

/// An image of blocks that each have something in them.
async fn dense(world: &mut World, blocks: u64) -> Arc<WorkingImage> {
    world.create(None).await;
    let image = Arc::clone(&world.slots.last().unwrap().image());
    for block in 0..blocks {
        let bytes = Bytes::from(vec![block as u8 + 1; 1000]);
        image.write(block * BLOCK_SIZE_U64, bytes).await.unwrap();
    }
    image
}

#[tokio::test]
async fn what_is_read_ahead_of_a_slow_store_keeps_to_the_budget() {
    let mut world = World::new().await;
    let image = dense(&mut world, 150).await;
    world.life().trap.arm(Plan { call: Call::PutBlock, after: 0, fault: Fault::HangAll });
    let committing = tokio::spawn({
        let image = Arc::clone(&image);
        async move { image.commit().await }
    });
    world.life().trap.caught.acquire().await.unwrap().forget();
    let read = || image.state().lowest().marks.hashed.len() as usize;
    let (mut before, mut now) = (0, read());
    while before < now {
        tokio::time::sleep(Duration::from_millis(200)).await;
        (before, now) = (now, read());
    }
    // A run is being put, and another may be kept for when it was.
    assert!((run_len()..=2 * run_len()).contains(&now), "{now} blocks");
    image.cancel().unwrap();
    assert!(matches!(committing.await.unwrap(), Err(Error::Cancelled)));
}

/// Whatever is read, compared, and need not be put goes on in its own time.
#[tokio::test]
async fn a_parent_on_a_slow_line_is_compared_to_its_end() {
    let mut world = World::new().await;
    let parent = dense(&mut world, 112).await.commit().await.unwrap();
    let image = dense(&mut world, 112).await;
    image.wish("parent", Some(parent.as_str()), 0).await.unwrap();
    world.life().trap.be_far(Duration::from_secs(50));
    tokio::time::pause();
    let begun = tokio::time::Instant::now();
    let committing = tokio::spawn(async move { image.commit().await });
    while !committing.is_finished() {
        // What is read is hashed by a thread, of which the clock knows nothing.
        let real = || std::thread::sleep(Duration::from_millis(40));
        tokio::task::spawn_blocking(real).await.unwrap();
        tokio::time::advance(Duration::from_secs(10)).await;
    }
    let elapsed = begun.elapsed();
    tokio::time::resume();
    committing.await.unwrap().unwrap();
    assert!(elapsed > Duration::from_mins(5), "{elapsed:?}");
    assert_eq!(world.life().counters.calls(Call::PutBlock), 112);
}

#[rstest]
#[tokio::test]
async fn what_waits_for_a_commit_that_went_wrong_can_be_written(
    #[values(false, true)] cancelled: bool,
) {
    let mut world = failed_with_another_behind(cancelled).await;
    let expected = if cancelled { State::Interrupted } else { State::Failed };
    assert_eq!(world.slots[0].image().status().state, expected);
    world.change(0, write(1, 70)).await.unwrap();
    world.change(0, Change::Punch { offset: 0, len: BLOCK_SIZE_U64 }).await.unwrap();
    world.change(0, Change::Truncate(3 * BLOCK_SIZE_U64)).await.unwrap();
    assert_eq!(world.slots[0].image().status().state, expected);
    world.slots[0].changed = true;
    world.commit().await;
    world.check_store().await;
    // What was there when the first commit was asked for is a snapshot of its own.
    assert_eq!(world.snapshots.len(), 2);
}

#[rstest]
fn what_was_written_there_and_not_closed_is_not_committed(#[values(false, true)] closed: bool) {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let process = runtime();
    let mut world = process.block_on(async {
        let mut world = failed_with_another_behind(false).await;
        if !closed {
            world.change(0, write(1, 70)).await.unwrap();
        }
        world
    });
    drop(process);
    world.die();
    runtime().block_on(async {
        world.live().await;
        let state = world.slots[0].image().status().state;
        assert_eq!(state, if closed { State::Clean } else { State::Dirty });
        world.check_images().await;
        world.commit().await;
    });
}
