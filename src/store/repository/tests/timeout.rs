//! Pending snapshots that are left alone.

use std::time::Duration;

use super::memory::Space;
use super::{block, chosen, count, kind, put, run, state};
use crate::model::{BlockIndex, SnapshotState};
use crate::store::{ErrorKind, SnapshotStore as _, StartRequest};

const MINUTE: Duration = Duration::from_mins(1);

#[test]
fn an_abandoned_snapshot_turns_to_error_and_stays_so() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        let request = StartRequest { timeout: Some(10 * MINUTE), ..chosen("snap-0a") };
        let id = p.start(request).await.unwrap().id;
        put(&p, &id, &[(0, 1)]).await;
        p.flush(&id).await.unwrap();
        // Another process: what the first one does in memory it cannot see, but its records.
        let other = space.process();
        space.advance(9 * MINUTE);
        assert_eq!(state(&other, &id).await.unwrap().state, SnapshotState::Pending);
        put(&other, &id, &[(1, 2)]).await;
        other.flush(&id).await.unwrap();
        space.advance(9 * MINUTE);
        let third = space.process();
        assert_eq!(state(&third, &id).await.unwrap().state, SnapshotState::Pending);
        space.advance(2 * MINUTE);
        let third = space.process();
        let found = state(&third, &id).await.unwrap();
        assert_eq!(found.state, SnapshotState::Error);
        assert!(found.state_message.unwrap().contains("10 minutes"));
        let late = third.put_block(&id, BlockIndex(2), block(3)).await;
        assert_eq!(kind(late), Some(ErrorKind::Conflict));
        assert_eq!(kind(third.complete(&id, count(2)).await), Some(ErrorKind::Conflict));
        third.delete(&id).await.unwrap();
        assert!(state(&third, &id).await.is_none());
    });
}

#[test]
fn without_a_timeout_it_waits_for_ever() {
    run(async {
        let space = Space::new(1);
        let id = space.process().start(chosen("snap-0a")).await.unwrap().id;
        space.advance(100_000 * MINUTE);
        assert_eq!(state(&space.process(), &id).await.unwrap().state, SnapshotState::Pending);
    });
}

#[test]
fn a_completion_in_time_is_not_undone() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        let request = StartRequest { timeout: Some(10 * MINUTE), ..chosen("snap-0a") };
        let id = p.start(request).await.unwrap().id;
        p.complete(&id, count(0)).await.unwrap();
        space.advance(20 * MINUTE);
        assert_eq!(state(&p, &id).await.unwrap().state, SnapshotState::Completed);
    });
}
