//! The rules that decide races, each with the one order of calls that needs it.

use super::collecting::collect_all;
use super::memory::Call;
use super::*;
use crate::model::SnapshotState;

#[test]
fn a_record_behind_the_seal_is_a_conflict() {
    run(async {
        let space = Space::new(1);
        let (p, q) = (Arc::new(space.process()), space.process());
        let id = start(&p, chosen("snap-0a")).await;
        put(&p, &id, &[(0, 1)]).await;
        put(&q, &id, &[(0, 2)]).await;
        // The completion has listed the records behind its seal, and reads them.
        let (inner, at) = (Arc::new(q), id.clone());
        let q = Arc::clone(&inner);
        p.before(Call::Create, "pages/", async move {
            assert_eq!(kind(inner.flush(&at).await), Some(ErrorKind::Conflict));
        });
        p.complete(&id, count(1)).await.unwrap();
        assert!(p.hook_ran());
        assert_eq!(read(&p, &id).await.unwrap(), [(0, 1)]);
        assert_eq!(kind(q.flush(&id).await), Some(ErrorKind::Conflict), "still");
        collect_all(&space).await;
    });
}

/// The record comes after the first look and before the seal: the writer is told that it counts.
#[test]
fn a_record_just_before_the_seal_counts() {
    run(async {
        for (named, fits) in [(1, false), (2, true)] {
            let space = Space::new(1);
            let (p, q) = (space.process(), space.process());
            let id = start(&p, chosen("snap-0a")).await;
            put(&p, &id, &[(0, 1)]).await;
            put(&p, &id, &[(1, 1)]).await;
            put(&q, &id, &[(1, 1), (2, 2)]).await;
            let at = id.clone();
            p.flush(&id).await.unwrap();
            p.before(Call::Create, "pending/", async move { q.flush(&at).await.unwrap() });
            // The first look found two blocks, the second finds three.
            let done = p.complete(&id, count(if fits { 2 } else { named })).await;
            assert_eq!(kind(done), Some(ErrorKind::Conflict));
            assert_eq!(p.hook_ran(), fits, "a wrong count is found before the seal");
            if fits {
                p.complete(&id, count(3)).await.unwrap();
                assert_eq!(read(&p, &id).await.unwrap(), [(0, 1), (1, 1), (2, 2)]);
            }
        }
    });
}

/// Refused data must not count after all when the completion is repeated.
#[test]
fn a_put_refused_for_a_seal_does_not_count_later() {
    run(async {
        let space = Space::new(1);
        let (p, q) = (space.process(), space.process());
        let id = start(&p, chosen("snap-0a")).await;
        put(&p, &id, &[(0, 1)]).await;
        p.flush(&id).await.unwrap();
        p.disk_full(Some("pages/"));
        p.complete(&id, count(1)).await.unwrap_err();
        // Of a higher epoch, so it would win.
        put(&q, &id, &[(0, 2)]).await;
        assert_eq!(kind(q.flush(&id).await), Some(ErrorKind::Conflict));
        space.process().complete(&id, count(1)).await.unwrap();
        assert_eq!(read(&q, &id).await.unwrap(), [(0, 1)]);
    });
}

/// As long as the attempt can still be completed: with other blocks than this process put.
#[test]
fn a_writer_that_was_refused_says_so_until_the_attempt_has_ended() {
    run(async {
        let space = Space::new(1);
        let (p, q) = (space.process(), space.process());
        let id = start(&p, chosen("snap-0a")).await;
        put(&p, &id, &[(0, 1)]).await;
        p.flush(&id).await.unwrap();
        p.disk_full(Some("pages/"));
        p.complete(&id, count(1)).await.unwrap_err();
        put(&q, &id, &[(0, 2)]).await;
        for _ in 0..2 {
            assert_eq!(kind(q.flush(&id).await), Some(ErrorKind::Conflict));
            let more = q.put_block(&id, BlockIndex(1), block(1)).await;
            assert_eq!(kind(more), Some(ErrorKind::Conflict));
            assert_eq!(kind(q.complete(&id, count(1)).await), Some(ErrorKind::Conflict));
        }
        p.delete(&id).await.unwrap();
        start(&p, chosen("snap-0a")).await;
        let for_the_old = q.put_block(&id, BlockIndex(1), block(1)).await;
        assert_eq!(kind(for_the_old), Some(ErrorKind::Conflict));
        put(&q, &id, &[(2, 3)]).await;
        q.flush(&id).await.unwrap();
        p.disk_full(None);
        p.complete(&id, count(1)).await.unwrap();
        assert_eq!(read(&p, &id).await.unwrap(), [(2, 3)]);
    });
}

/// A completion that seals after it looked crashed: the next record decides, and counts.
#[test]
fn a_record_after_a_completion_that_crashed_while_closing_counts() {
    run(async {
        let space = Space::new(1);
        let (p, q, r) = (space.process(), Arc::new(space.process()), space.process());
        let id = start(&p, chosen("snap-0a")).await;
        put(&p, &id, &[(0, 1)]).await;
        p.flush(&id).await.unwrap();
        let dying = Arc::clone(&q);
        q.before(Call::List, "pending/", async move {
            // Its first look, the mark that it is closing, and then it looks for the seal.
            dying.crash_after(3);
        });
        q.complete(&id, count(1)).await.unwrap_err();
        let ends = |name: &str| space.names("pending/").iter().any(|n| n.ends_with(name));
        assert!(ends("/closing") && !ends("/sealed"));
        put(&r, &id, &[(1, 2)]).await;
        r.flush(&id).await.unwrap();
        assert!(ends("/sealed"));
        // It has decided for everybody.
        put(&p, &id, &[(2, 3)]).await;
        assert_eq!(kind(p.flush(&id).await), Some(ErrorKind::Conflict));
        let s = space.process();
        assert_eq!(kind(s.complete(&id, count(1)).await), Some(ErrorKind::Conflict));
        s.complete(&id, count(2)).await.unwrap();
        assert_eq!(read(&s, &id).await.unwrap(), [(0, 1), (1, 2)]);
        collect_all(&space).await;
    });
}

/// A put that is refused late, when the same process writes the next snapshot of the id already.
#[test]
fn a_put_for_the_last_attempt_does_not_take_along_what_the_next_has_accepted() {
    run(async {
        let space = Space::new(1);
        let p = Arc::new(space.process());
        let id = start(&p, chosen("snap-0a")).await;
        for n in 0..63u8 {
            put(&p, &id, &[(u32::from(n), n + 1)]).await;
        }
        let (same, at) = (Arc::clone(&p), id.clone());
        p.before(Call::Create, "packs/", async move {
            same.delete(&at).await.unwrap();
            start(&same, chosen("snap-0a")).await;
            put(&same, &at, &[(7, 7)]).await;
        });
        let late = p.put_block(&id, BlockIndex(63), block(64)).await;
        assert_eq!(kind(late), Some(ErrorKind::Conflict));
        p.complete(&id, count(1)).await.unwrap();
        assert_eq!(read(&p, &id).await.unwrap(), [(7, 7)]);
    });
}

#[test]
fn refuses_a_flush_after_a_completion_or_an_abort() {
    run(async {
        for complete in [true, false] {
            let space = Space::new(1);
            let (p, q) = (space.process(), space.process());
            let id = start(&p, chosen("snap-0a")).await;
            put(&q, &id, &[(0, 2)]).await;
            if complete {
                p.complete(&id, count(0)).await.unwrap();
            } else {
                p.delete(&id).await.unwrap();
            }
            assert_eq!(kind(q.flush(&id).await), Some(ErrorKind::Conflict));
            assert!(q.complete(&id, count(1)).await.is_err());
            collect_all(&space).await;
        }
    });
}

#[test]
fn an_abort_wins_over_a_completion_that_is_about_to_publish() {
    run(async {
        for prefix in ["pending/", "pages/", "snapshots/"] {
            let space = Space::new(1);
            let (p, q) = (space.process(), space.process());
            let id = start(&p, chosen("snap-0a")).await;
            put(&p, &id, &[(0, 1)]).await;
            p.flush(&id).await.unwrap();
            let at = id.clone();
            p.before(Call::Create, prefix, async move { q.delete(&at).await.unwrap() });
            p.complete(&id, count(1)).await.unwrap_err();
            assert!(p.hook_ran());
            assert_eq!(state(&p, &id).await, None, "{prefix}");
            collect_all(&space).await;
        }
    });
}

/// A completion that stalls after its manifest, until the id is another snapshot's.
#[test]
fn a_completion_that_wakes_up_late_leaves_the_next_snapshot_of_its_id_alone() {
    run(async {
        for completed in [true, false] {
            // At its look at start.json; at the cleaning up.
            for call in [Call::Read, Call::List] {
                let space = Space::new(1);
                let (p, q) = (Arc::new(space.process()), Arc::new(space.process()));
                let id = start(&p, chosen("snap-0a")).await;
                put(&p, &id, &[(0, 1)]).await;
                p.flush(&id).await.unwrap();
                let (other, at, slow) = (Arc::clone(&q), id.clone(), Arc::clone(&p));
                let replace = async move {
                    other.delete(&at).await.unwrap();
                    let id = start(&other, chosen("snap-0a")).await;
                    put(&other, &id, &[(0, 2), (1, 2)]).await;
                    other.flush(&id).await.unwrap();
                    if completed {
                        other.complete(&id, count(2)).await.unwrap();
                    }
                };
                p.before(Call::Create, "snapshots/", async move {
                    slow.before(call, "pending/snap-0a/", replace);
                });
                let done = p.complete(&id, count(1)).await;
                assert!(p.hook_ran());
                if call == Call::Read {
                    assert_eq!(kind(done), Some(ErrorKind::Conflict));
                }
                if !completed {
                    q.complete(&id, count(2)).await.unwrap();
                }
                assert_eq!(read(&q, &id).await.unwrap(), [(0, 2), (1, 2)], "{call:?}");
            }
        }
    });
}

#[test]
fn a_second_completion_of_one_attempt_is_a_conflict_or_done() {
    run(async {
        for (call, prefix) in [
            (Call::Create, "pending/"),
            (Call::List, "pending/"),
            (Call::Read, "pending/snap-0a/"),
            (Call::Create, "pages/"),
            (Call::Create, "snapshots/"),
        ] {
            let space = Space::new(1);
            let (p, q) = (space.process(), space.process());
            let id = start(&p, chosen("snap-0a")).await;
            put(&p, &id, &[(0, 1)]).await;
            p.flush(&id).await.unwrap();
            let at = id.clone();
            p.before(call, prefix, async move {
                q.complete(&at, count(1)).await.unwrap();
            });
            let done = p.complete(&id, count(1)).await;
            assert!(p.hook_ran());
            assert!(matches!(kind(done), None | Some(ErrorKind::Conflict)), "{call:?} {prefix}");
            assert_eq!(read(&p, &id).await.unwrap(), [(0, 1)]);
            collect_all(&space).await;
        }
    });
}

/// The first has made the manifest, and has not yet looked whether it was aborted.
#[test]
fn a_second_completion_does_not_look_like_an_abort_to_the_first() {
    run(async {
        let space = Space::new(1);
        let (p, q) = (Arc::new(space.process()), space.process());
        let id = start(&p, chosen("snap-0a")).await;
        put(&p, &id, &[(0, 1)]).await;
        p.flush(&id).await.unwrap();
        let (slow, at) = (Arc::clone(&p), id.clone());
        p.before(Call::Create, "snapshots/", async move {
            slow.before(Call::Read, "pending/snap-0a/", async move {
                q.complete(&at, count(1)).await.unwrap();
            });
        });
        p.complete(&id, count(1)).await.unwrap();
        assert!(p.hook_ran());
        assert_eq!(read(&p, &id).await.unwrap(), [(0, 1)]);
        collect_all(&space).await;
    });
}

#[test]
fn a_completion_is_of_the_attempt_that_was_started() {
    run(async {
        let space = Space::new(1);
        let (p, q) = (space.process(), space.process());
        let begun = p.start(chosen("snap-0a")).await.unwrap();
        q.delete(&begun.id).await.unwrap();
        space.advance(std::time::Duration::from_secs(1));
        let again = q.start(chosen("snap-0a")).await.unwrap();
        let of = |snapshot: &Snapshot| CompleteRequest {
            started: Some(snapshot.start_time),
            ..count(0)
        };
        assert_eq!(kind(p.complete(&begun.id, of(&begun)).await), Some(ErrorKind::Conflict));
        assert_eq!(p.describe(&begun.id).await.unwrap().state, SnapshotState::Pending);
        q.complete(&begun.id, of(&again)).await.unwrap();
    });
}

#[test]
fn a_process_does_not_complete_what_another_started_under_its_id() {
    run(async {
        let space = Space::new(1);
        let (p, q) = (space.process(), space.process());
        let id = start(&p, chosen("snap-0a")).await;
        put(&p, &id, &[(0, 1)]).await;
        p.flush(&id).await.unwrap();
        q.delete(&id).await.unwrap();
        start(&q, chosen("snap-0a")).await;
        put(&q, &id, &[(0, 2)]).await;
        q.flush(&id).await.unwrap();
        assert_eq!(kind(p.complete(&id, count(1)).await), Some(ErrorKind::Conflict));
        q.complete(&id, count(1)).await.unwrap();
        assert_eq!(read(&q, &id).await.unwrap(), [(0, 2)]);
    });
}

#[test]
fn an_id_is_used_again_after_an_abort_that_left_things_behind() {
    run(async {
        for crash in 0.. {
            let space = Space::new(crash as u64);
            let (p, q) = (space.process(), space.process());
            let id = start(&p, StartRequest { tags: tags(7), ..chosen("snap-0a") }).await;
            put(&p, &id, &[(0, 1), (5, 1)]).await;
            p.flush(&id).await.unwrap();
            q.crash_after(crash);
            let done = q.delete(&id).await.is_ok();
            let p2 = space.process();
            if state(&p2, &id).await.is_some() {
                p2.delete(&id).await.unwrap();
            }
            // The first process still holds its writer.
            assert_eq!(start(&p, chosen("snap-0a")).await, id);
            assert_eq!(state(&p2, &id).await.unwrap().tags, tags(0), "crash at {crash}");
            put(&p, &id, &[(0, 2)]).await;
            p.complete(&id, count(1)).await.unwrap();
            let fresh = space.process();
            assert_eq!(read(&fresh, &id).await.unwrap(), [(0, 2)]);
            collect_all(&space).await;
            if done {
                break;
            }
        }
    });
}

#[test]
fn tags_of_a_deleted_snapshot_do_not_wait_for_the_next_of_its_id() {
    run(async {
        for crash in 0.. {
            let space = Space::new(crash as u64);
            let (p, q) = (space.process(), space.process());
            let id = make(&p, StartRequest { tags: tags(7), ..chosen("snap-0a") }, &[]).await;
            q.crash_after(crash);
            let done = q.delete(&id).await.is_ok();
            let _ = p.delete(&id).await;
            start(&p, chosen("snap-0a")).await;
            assert_eq!(state(&p, &id).await.unwrap().tags, tags(0), "crash at {crash}");
            if done {
                break;
            }
        }
    });
}

#[test]
fn a_start_whose_parent_goes_meanwhile_fails_and_leaves_nothing() {
    run(async {
        let space = Space::new(1);
        let (p, q) = (space.process(), space.process());
        let parent = make(&p, chosen("snap-0a"), &[(0, 1)]).await;
        let at = parent.clone();
        p.before(Call::Create, "pending/", async move { q.delete(&at).await.unwrap() });
        let child = p.start(child_of(&parent)).await;
        assert_eq!(kind(child), Some(ErrorKind::NotFound));
        assert_eq!(p.snapshot_ids().await.unwrap(), []);
        collect_all(&space).await;
    });
}

#[test]
fn a_start_whose_parent_is_another_snapshot_by_now_fails() {
    run(async {
        let space = Space::new(1);
        let (p, q) = (space.process(), space.process());
        let parent = make(&p, chosen("snap-0a"), &[(0, 1)]).await;
        let at = parent.clone();
        p.before(Call::Create, "pending/", async move {
            q.delete(&at).await.unwrap();
            make(&q, chosen("snap-0a"), &[(0, 2)]).await;
        });
        assert_eq!(kind(p.start(child_of(&parent)).await), Some(ErrorKind::NotFound));
    });
}

#[test]
fn starting_again_with_a_token_meets_the_first_start() {
    run(async {
        let space = Space::new(1);
        let (p, q) = (space.process(), space.process());
        let parent = make(&p, chosen("snap-0a"), &[(0, 1)]).await;
        let request =
            StartRequest { client_token: Some("t".to_owned()), tags: tags(1), ..child_of(&parent) };
        let id = start(&p, request.clone()).await;
        assert_eq!(start(&q, request.clone()).await, id);
        let other = StartRequest { description: "x".to_owned(), ..request.clone() };
        assert_eq!(kind(q.start(other).await), Some(ErrorKind::Conflict));
        q.set_tags(&id, tags(2)).await.unwrap();
        assert_eq!(q.start(request.clone()).await.unwrap().tags, tags(2));
        // The parent is not needed any more.
        p.delete(&parent).await.unwrap();
        assert_eq!(start(&q, request.clone()).await, id);
        q.complete(&id, count(0)).await.unwrap();
        assert_eq!(q.start(request).await.unwrap().state.as_str(), "completed");
        assert_eq!(read(&q, &id).await.unwrap(), [(0, 1)]);
    });
}

#[test]
fn a_start_that_crashed_is_finished_by_the_next_with_its_token() {
    run(async {
        let request = StartRequest {
            client_token: Some("t".to_owned()),
            tags: tags(1),
            ..StartRequest::new(size(1))
        };
        for crash in 0.. {
            let space = Space::new(crash as u64);
            let p = space.process();
            p.crash_after(crash);
            let done = p.start(request.clone()).await.is_ok();
            let q = space.process();
            let id = start(&q, request.clone()).await;
            assert_eq!(state(&q, &id).await.unwrap().tags, tags(1), "crash at {crash}");
            if done {
                break;
            }
        }
    });
}

#[test]
fn a_token_of_a_completion_whose_cleaning_up_crashed_gives_a_completed_snapshot() {
    run(async {
        let request =
            StartRequest { client_token: Some("t".to_owned()), ..StartRequest::new(size(1)) };
        for crash in 0.. {
            let space = Space::new(crash as u64);
            let p = space.process();
            let id = start(&p, request.clone()).await;
            put(&p, &id, &[(0, 1)]).await;
            p.flush(&id).await.unwrap();
            let q = space.process();
            q.crash_after(crash);
            let done = q.complete(&id, count(1)).await.is_ok();
            let r = space.process();
            let there = state(&r, &id).await.unwrap();
            assert_eq!(r.start(request.clone()).await.unwrap().state, there.state);
            if done {
                break;
            }
        }
    });
}

#[test]
fn of_two_sets_of_tags_the_later_number_wins_and_none_is_lost() {
    run(async {
        let space = Space::new(1);
        let (p, q) = (space.process(), space.process());
        let id = make(&p, chosen("snap-0a"), &[]).await;
        let at = id.clone();
        p.before(Call::Create, "tags/", async move { q.set_tags(&at, tags(2)).await.unwrap() });
        p.set_tags(&id, tags(3)).await.unwrap();
        assert_eq!(state(&p, &id).await.unwrap().tags, tags(3));
        assert_eq!(space.names("tags/").len(), 2);
    });
}

/// The set stays, but it names its attempt: nobody sees it again.
#[test]
fn tags_of_a_snapshot_that_is_deleted_meanwhile_are_not_those_of_the_next() {
    run(async {
        let space = Space::new(1);
        let (p, q) = (space.process(), Arc::new(space.process()));
        let id = make(&p, chosen("snap-0a"), &[]).await;
        let (other, at) = (Arc::clone(&q), id.clone());
        p.before(Call::Create, "tags/", async move { other.delete(&at).await.unwrap() });
        assert_eq!(kind(p.set_tags(&id, tags(3)).await), Some(ErrorKind::NotFound));
        let (other, at) = (Arc::clone(&q), id.clone());
        start(&p, chosen("snap-0a")).await;
        assert_eq!(state(&p, &id).await.unwrap().tags, tags(0));
        // Also if it is there already when the tags are about to be made.
        p.before(Call::Create, "tags/", async move {
            other.delete(&at).await.unwrap();
            start(&other, chosen("snap-0a")).await;
        });
        assert_eq!(kind(p.set_tags(&id, tags(3)).await), Some(ErrorKind::NotFound));
        assert_eq!(state(&p, &id).await.unwrap().tags, tags(0));
        collect_all(&space).await;
    });
}
