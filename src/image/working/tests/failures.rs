//! Commits that go wrong in ways that need no chance.

use std::sync::Arc;

use rstest::rstest;

use super::trap::{Fault, Plan};
use super::world::{Change, World};
use crate::image::working::commit::Run;
use crate::image::working::{Error, Settings, State};
use crate::model::BLOCK_SIZE_U64;
use crate::store::wrap::Call;

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
    async fn commit(&mut self) {
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

#[tokio::test]
async fn a_failure_with_nothing_staged_does_not_leave_a_commit_under_way() {
    for error in [Error::Cancelled, Error::Empty] {
        let mut world = World::new().await;
        world.create(None).await;
        let image = world.slots[0].image();
        image.state().running = true;
        image.fail(error).await;
        assert!(!image.state().running);
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
    let number = image.state().runs;
    drop(Run { image: Arc::clone(&image), number: number - 1 });
    assert!(image.state().running);
    drop(Run { image: Arc::clone(&image), number });
    assert!(!image.state().running);
    assert!(matches!(waiting.await.unwrap(), Err(Error::Interrupted(_))));
    assert_eq!(image.status().state, State::Failed);
}

#[tokio::test]
async fn a_tag_too_many_is_refused_when_it_is_set() {
    let mut world = written().await;
    let image = world.slots[0].image();
    // Beside the name and the length, which are our own.
    for n in 0..48 {
        image.wish(&format!("tag.k{n}"), Some("v")).await.unwrap();
    }
    let error = image.wish("tag.k48", Some("v")).await.unwrap_err();
    assert!(matches!(error, Error::TooManyTags(51)), "{error}");
    // What takes no more room is fine.
    image.wish("tag.k47", Some("w")).await.unwrap();
    image.wish("tag.Name", Some("web")).await.unwrap();
    image.wish("tag.k0", None).await.unwrap();
    image.wish("tag.k48", Some("v")).await.unwrap();
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
