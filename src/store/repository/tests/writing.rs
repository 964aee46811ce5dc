//! What puts of several writers add up to, and what a writer does when it cannot save.

use futures::FutureExt as _;
use futures::channel::oneshot::{Sender, channel};
use futures::future::join_all;
use uuid::Uuid;

use super::memory::{Call, Process};
use super::*;
use crate::model::{Digest, Digester};
use crate::store::repository::names::RecordId;
use crate::store::repository::table::{Entry, Table};

const ZEROS: Digest = Digest::OF_ZEROS;

#[test]
fn the_later_put_of_one_writer_wins_in_one_batch_or_several() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        let id = start(&p, chosen("snap-0a")).await;
        put(&p, &id, &[(0, 1), (1, 1), (0, 2)]).await;
        p.flush(&id).await.unwrap();
        put(&p, &id, &[(1, 0), (2, 3)]).await;
        p.complete(&id, count(3)).await.unwrap();
        assert_eq!(read(&p, &id).await.unwrap(), [(0, 2), (1, 0), (2, 3)]);
    });
}

#[test]
fn a_child_starts_after_its_parent_by_a_clock_that_stands_still() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        let mut times = Vec::new();
        let mut parent = None;
        for name in ["snap-0c", "snap-0b", "snap-0a"] {
            let id = start(&p, StartRequest { parent, ..chosen(name) }).await;
            p.complete(&id, count(0)).await.unwrap();
            times.push(p.describe(&id).await.unwrap().start_time);
            parent = Some(id);
        }
        assert!(times.is_sorted_by(|a, b| a < b), "{times:?}");
    });
}

#[test]
fn packs_are_as_small_as_what_may_be_unsaved() {
    run(async {
        for (mib, packs) in [(0, 33), (8, 9), (127, 1), (1 << 20, 1)] {
            let space = Space::new(1);
            let mut p = space.process();
            p.repository = p.repository.with_max_unsaved(mib << 20);
            let id = start(&p, chosen("snap-0a")).await;
            let blocks: Vec<_> = (0..33).map(|n| (n, u8::try_from(n).unwrap() + 1)).collect();
            put(&p, &id, &blocks).await;
            p.complete(&id, count(33)).await.unwrap();
            assert_eq!(space.names("packs/").len(), packs, "{mib} MiB");
            assert_eq!(read(&p, &id).await.unwrap(), blocks);
        }
    });
}

#[test]
fn a_writer_that_starts_after_a_flush_has_the_higher_epoch_and_wins() {
    run(async {
        for seed in 0..8 {
            let space = Space::new(seed);
            let (p, q) = (space.process(), space.process());
            let id = start(&p, chosen("snap-0a")).await;
            put(&p, &id, &[(0, 1)]).await;
            p.flush(&id).await.unwrap();
            put(&q, &id, &[(0, 2), (1, 2)]).await;
            q.flush(&id).await.unwrap();
            // Later in time, but of the lower epoch.
            put(&p, &id, &[(0, 3), (2, 3)]).await;
            p.complete(&id, count(3)).await.unwrap();
            assert_eq!(read(&p, &id).await.unwrap(), [(0, 2), (1, 2), (2, 3)]);
        }
    });
}

/// What is told of the writer that put last: the blocks, with the value that each digest is of.
async fn put_before(p: &Repository, id: &SnapshotId) -> Vec<(u32, u8)> {
    let told = std::sync::Mutex::new(Vec::new());
    let value = |digest| (0..9).find(|&value| block(value).digest() == digest).unwrap();
    let tell = |blocks: &[(BlockIndex, Digest)]| {
        told.lock().unwrap().extend(blocks.iter().map(|(index, digest)| (index.0, value(*digest))));
    };
    p.put_before(id, &tell).await.unwrap();
    let mut told = told.into_inner().unwrap();
    told.sort_unstable();
    told
}

#[test]
fn the_durable_puts_of_the_last_writer_are_told() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        let id = start(&p, chosen("snap-0a")).await;
        assert_eq!(put_before(&p, &id).await, []);
        put(&p, &id, &[(0, 1), (1, 1), (2, 2), (0, 3)]).await;
        p.flush(&id).await.unwrap();
        put(&p, &id, &[(1, 0), (4, 4)]).await;
        p.flush(&id).await.unwrap();
        // It dies with this.
        put(&p, &id, &[(5, 5)]).await;
        let q = space.process();
        assert_eq!(put_before(&q, &id).await, [(0, 3), (1, 0), (2, 2), (4, 4)]);
        put(&q, &id, &[(2, 7)]).await;
        q.flush(&id).await.unwrap();
        assert_eq!(put_before(&space.process(), &id).await, [(2, 7)]);
        q.complete(&id, count(4)).await.unwrap();
        assert_eq!(put_before(&space.process(), &id).await, []);
    });
}

#[test]
fn a_block_that_the_volume_has_not_is_not_told() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        let id = start(&p, chosen("snap-0a")).await;
        let attempt = p.start_of(&id).await.unwrap().unwrap().metadata.attempt;
        let entry = |index| Entry { index: BlockIndex(index), location: None, digest: ZEROS };
        let table = Table::encode(&[entry(1), entry(2048), entry(u32::MAX)]);
        let record = [&table[..], &Digest::of(&table).0].concat();
        let name = RecordId { epoch: 1, writer: Uuid::new_v4(), number: 0 }.name(&id, attempt);
        p.objects.create(&name, record.into()).await.unwrap();
        assert_eq!(put_before(&p, &id).await, [(1, 0)]);
    });
}

#[test]
fn nothing_is_told_of_two_who_put_at_the_same_time() {
    run(async {
        let space = Space::new(1);
        let (p, q) = (space.process(), space.process());
        let id = start(&p, chosen("snap-0a")).await;
        put(&p, &id, &[(0, 1)]).await;
        put(&q, &id, &[(0, 2)]).await;
        p.flush(&id).await.unwrap();
        assert_eq!(put_before(&space.process(), &id).await, [(0, 1)]);
        q.flush(&id).await.unwrap();
        assert_eq!(put_before(&space.process(), &id).await, []);
    });
}

#[test]
fn two_writers_of_one_epoch_conflict_if_their_data_differs() {
    run(async {
        for (theirs, conflict) in [(1, false), (2, true)] {
            let space = Space::new(1);
            let (p, q) = (space.process(), space.process());
            let id = start(&p, chosen("snap-0a")).await;
            put(&p, &id, &[(0, 1), (1, 1)]).await;
            put(&q, &id, &[(1, theirs), (2, 2)]).await;
            p.flush(&id).await.unwrap();
            q.flush(&id).await.unwrap();
            let done = p.complete(&id, count(3)).await;
            if conflict {
                assert_eq!(kind(done), Some(ErrorKind::Conflict));
                assert!(!state(&q, &id).await.unwrap().is_readable());
                p.delete(&id).await.unwrap();
            } else {
                assert_eq!(read(&p, &id).await.unwrap(), [(0, 1), (1, 1), (2, 2)]);
            }
        }
    });
}

/// Whatever the random names of the writers are.
#[test]
fn only_the_last_put_of_each_writer_can_conflict() {
    run(async {
        for seed in 0..12 {
            let space = Space::new(seed);
            let (p, q) = (space.process(), space.process());
            let id = start(&p, chosen("snap-0a")).await;
            put(&p, &id, &[(0, 1)]).await;
            put(&q, &id, &[(0, 2)]).await;
            p.flush(&id).await.unwrap();
            q.flush(&id).await.unwrap();
            put(&p, &id, &[(0, 2)]).await;
            p.complete(&id, count(1)).await.unwrap();
            assert_eq!(read(&p, &id).await.unwrap(), [(0, 2)]);
        }
    });
}

#[test]
fn a_higher_epoch_settles_a_conflict_below_it() {
    run(async {
        let space = Space::new(1);
        let (p, q, r) = (space.process(), space.process(), space.process());
        let id = start(&p, chosen("snap-0a")).await;
        put(&p, &id, &[(0, 1)]).await;
        put(&q, &id, &[(0, 2)]).await;
        p.flush(&id).await.unwrap();
        q.flush(&id).await.unwrap();
        put(&r, &id, &[(0, 3)]).await;
        r.complete(&id, count(1)).await.unwrap();
        assert_eq!(read(&p, &id).await.unwrap(), [(0, 3)]);
    });
}

#[test]
fn a_wrong_count_leaves_it_pending_and_writable() {
    run(async {
        let space = Space::new(1);
        let (p, q) = (space.process(), space.process());
        let id = start(&p, chosen("snap-0a")).await;
        put(&p, &id, &[(0, 1), (0, 2)]).await;
        for wrong in [0, 2] {
            assert_eq!(kind(p.complete(&id, count(wrong)).await), Some(ErrorKind::Conflict));
        }
        assert_eq!(
            kind(p.list_blocks(&id, ListFrom::Index(BlockIndex(0)), 1).await),
            Some(ErrorKind::NotReady)
        );
        put(&p, &id, &[(1, 3)]).await;
        put(&q, &id, &[(2, 4)]).await;
        q.flush(&id).await.unwrap();
        p.complete(&id, count(3)).await.unwrap();
        assert_eq!(read(&q, &id).await.unwrap(), [(0, 2), (1, 3), (2, 4)]);
    });
}

#[test]
fn the_linear_checksum_is_over_what_was_put_in_order_of_the_blocks() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        let parent = make(&p, chosen("snap-0a"), &[(0, 9), (1, 9)]).await;
        let mut digester = Digester::default();
        for value in [3, 0, 5] {
            digester.update(block(value).digest().0);
        }
        let right = digester.finish();
        for (checksum, fits) in [(right, true), (block(3).digest(), false)] {
            let id = start(&p, child_of(&parent)).await;
            put(&p, &id, &[(9, 5), (1, 7), (4, 0), (1, 3)]).await;
            let request =
                CompleteRequest { changed_blocks: 3, checksum: Some(checksum), started: None };
            let done = p.complete(&id, request).await;
            if fits {
                done.unwrap();
                assert_eq!(read(&p, &id).await.unwrap(), [(0, 9), (1, 3), (4, 0), (9, 5)]);
            } else {
                assert_eq!(kind(done), Some(ErrorKind::Conflict));
                assert_eq!(kind(read(&p, &id).await), Some(ErrorKind::NotReady));
                p.delete(&id).await.unwrap();
            }
        }
    });
}

#[test]
fn a_block_beyond_the_volume_is_refused() {
    run(async {
        let p = Space::new(1).process();
        let id = start(&p, chosen("snap-0a")).await;
        let beyond = p.put_block(&id, BlockIndex(2048), block(1)).await;
        assert_eq!(kind(beyond), Some(ErrorKind::Invalid));
        put(&p, &id, &[(2047, 1)]).await;
        p.complete(&id, count(1)).await.unwrap();
    });
}

/// More than a pack holds, so that packs are saved by puts.
#[test]
fn a_full_disk_loses_nothing_that_was_accepted() {
    run(async {
        for prefix in ["packs/", "pending/"] {
            let space = Space::new(1);
            let p = space.process();
            let id = start(&p, chosen("snap-0a")).await;
            let mut expected = Vec::new();
            p.disk_full(Some(prefix));
            let mut failed = 0;
            for n in 0..70u8 {
                match p.put_block(&id, BlockIndex(u32::from(n)), block(n + 1)).await {
                    Ok(()) => {}
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::NoRoom);
                        failed += 1;
                    }
                }
                expected.push((u32::from(n), n + 1));
            }
            assert_eq!(failed, 7, "the one that fills the pack, and all that follow");
            assert_eq!(kind(p.flush(&id).await), Some(ErrorKind::NoRoom));
            p.disk_full(None);
            // Those that were refused for the batch before them were not accepted: once more.
            for &(index, value) in &expected[63..] {
                put(&p, &id, &[(index, value)]).await;
            }
            p.complete(&id, count(70)).await.unwrap();
            assert_eq!(read(&p, &id).await.unwrap(), expected);
            assert_eq!(verify(&p, &[]).await.damage, []);
        }
    });
}

#[test]
fn a_put_after_a_full_disk_saves_what_was_kept_first() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        let id = start(&p, chosen("snap-0a")).await;
        put(&p, &id, &[(0, 1)]).await;
        p.disk_full(Some("pending/"));
        p.flush(&id).await.unwrap_err();
        p.disk_full(None);
        put(&p, &id, &[(0, 2)]).await;
        let q = space.process();
        // The kept batch is saved, the new one is not yet.
        q.complete(&id, count(1)).await.unwrap();
        assert_eq!(read(&q, &id).await.unwrap(), [(0, 1)]);
    });
}

#[test]
fn equal_blocks_are_stored_once_but_never_in_a_pack_that_is_not_saved() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        let id = start(&p, chosen("snap-0a")).await;
        put(&p, &id, &[(0, 1), (1, 1)]).await;
        p.disk_full(Some("packs/"));
        p.flush(&id).await.unwrap_err();
        // Block 1 is in a pack that is not there, so it cannot be referred to by a record that
        // may be saved before it.
        p.put_block(&id, BlockIndex(2), block(1)).await.unwrap_err();
        p.disk_full(None);
        put(&p, &id, &[(2, 1), (3, 2)]).await;
        p.flush(&id).await.unwrap();
        put(&p, &id, &[(4, 2), (5, 1)]).await;
        p.complete(&id, count(6)).await.unwrap();
        let all = [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 1)];
        assert_eq!(read(&p, &id).await.unwrap(), all);
        let report = verify(&p, &[]).await;
        assert_eq!((report.blocks, report.packs), (2, 2), "{report:?}");
    });
}

/// Those that are put at the same time wait while the batch before is saved once more, in vain.
#[test]
fn a_full_disk_does_not_multiply_what_is_put_again_and_again() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        let id = start(&p, chosen("snap-0a")).await;
        let all: Vec<_> = (0..64u8).map(|n| (u32::from(n), n + 1)).collect();
        let put_all = || {
            join_all(all.iter().map(|&(n, value)| p.put_block(&id, BlockIndex(n), block(value))))
        };
        p.disk_full(Some("packs/"));
        for _ in 0..5 {
            assert!(put_all().await.iter().any(Result::is_err));
        }
        p.disk_full(None);
        assert!(put_all().await.iter().all(Result::is_ok));
        p.complete(&id, count(64)).await.unwrap();
        assert_eq!(read(&p, &id).await.unwrap(), all);
        assert_eq!(space.names("packs/").len(), 1);
    });
}

/// While one batch is being saved, equal data goes into the next pack, which may be saved first.
#[test]
fn dedupe_never_refers_to_a_pack_that_is_still_being_saved() {
    run(async {
        let space = Space::new(1);
        let p = Arc::new(space.process());
        let id = start(&p, chosen("snap-0a")).await;
        for n in 0..63u8 {
            put(&p, &id, &[(u32::from(n), n + 1)]).await;
        }
        let mut expected = vec![(100, 1)];
        expected.extend((101..164u8).map(|n| (u32::from(n), n)));
        let (inner, at, next) = (Arc::clone(&p), id.clone(), expected.clone());
        p.before(Call::Create, "packs/", async move {
            put(&inner, &at, &next).await;
            put(&inner, &at, &[(164, 164)]).await;
            // The first pack never comes.
            inner.crash_after(0);
        });
        p.put_block(&id, BlockIndex(63), block(64)).await.unwrap_err();
        let q = space.process();
        q.complete(&id, count(64)).await.unwrap();
        assert_eq!(read(&q, &id).await.unwrap(), expected);
    });
}

/// Lets an operation begin such a call, and drops it there. The call goes on when the answer is
/// used: what was accepted is being saved, whoever waits for it.
async fn cancel_in(
    p: &Process,
    call: Call,
    prefix: &str,
    operation: impl Future<Output = Result<()>>,
) -> Sender<()> {
    let (go_on, wait) = channel();
    p.before(call, prefix, async move { wait.await.unwrap() });
    let mut operation = Box::pin(operation);
    while !p.hook_ran() {
        assert!((&mut operation).now_or_never().is_none());
        tokio::task::yield_now().await;
    }
    go_on
}

/// A put that is cancelled while it saves a batch must not take along what others put in it.
#[test]
fn cancelling_a_put_loses_no_other_block() {
    run(async {
        for (call, prefix) in [
            (Call::Create, "packs/"),
            (Call::Create, "pending/"),
            (Call::Read, "pending/snap-0a/start.json"),
        ] {
            let space = Space::new(1);
            let p = space.process();
            let id = start(&p, chosen("snap-0a")).await;
            for n in 0..63u8 {
                put(&p, &id, &[(u32::from(n), n + 1)]).await;
            }
            let last = p.put_block(&id, BlockIndex(63), block(64));
            let go_on = cancel_in(&p, call, prefix, last).await;
            // Of the next batch.
            put(&p, &id, &[(0, 99), (63, 64)]).await;
            let mut flush = Box::pin(p.flush(&id));
            assert!((&mut flush).now_or_never().is_none(), "it is not saved yet");
            go_on.send(()).unwrap();
            flush.await.unwrap();
            space.process().complete(&id, count(64)).await.unwrap();
            let mut expected: Vec<_> = (0..64u8).map(|n| (u32::from(n), n + 1)).collect();
            expected[0].1 = 99;
            assert_eq!(read(&p, &id).await.unwrap(), expected);
        }
    });
}

#[test]
fn cancelling_a_flush_loses_nothing() {
    run(async {
        for prefix in ["packs/", "pending/"] {
            let space = Space::new(1);
            let p = space.process();
            let id = start(&p, chosen("snap-0a")).await;
            put(&p, &id, &[(0, 1), (1, 0)]).await;
            let go_on = cancel_in(&p, Call::Create, prefix, p.flush(&id)).await;
            let mut complete = Box::pin(p.complete(&id, count(2)));
            for _ in 0..10 {
                assert!((&mut complete).now_or_never().is_none());
                tokio::task::yield_now().await;
            }
            go_on.send(()).unwrap();
            complete.await.unwrap();
            assert_eq!(read(&p, &id).await.unwrap(), [(0, 1), (1, 0)]);
        }
    });
}

/// What a cancelled flush could not save is saved by the next one.
#[test]
fn a_cancelled_flush_that_fails_later_keeps_what_was_put() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        let id = start(&p, chosen("snap-0a")).await;
        put(&p, &id, &[(0, 1), (1, 0)]).await;
        let go_on = cancel_in(&p, Call::Create, "pending/", p.flush(&id)).await;
        p.disk_full(Some("pending/"));
        go_on.send(()).unwrap();
        assert_eq!(kind(p.flush(&id).await), Some(ErrorKind::NoRoom));
        p.disk_full(None);
        p.flush(&id).await.unwrap();
        space.process().complete(&id, count(2)).await.unwrap();
        assert_eq!(read(&p, &id).await.unwrap(), [(0, 1), (1, 0)]);
    });
}
