//! Collecting garbage: what goes, what stays, and what others do meanwhile.

use std::time::Duration;

use super::memory::Call;
use super::*;
use crate::store::repository::MIN_GRACE;

/// A little more than the grace period.
const LATER: Duration = Duration::from_secs(MIN_GRACE.as_secs() + 1);

/// What is left after everything was deleted and collected.
pub(super) async fn collect_all(space: &Space) {
    let p = space.process();
    for id in p.snapshot_ids().await.unwrap() {
        p.delete(&id).await.unwrap();
    }
    // The record of a run is named after its time.
    space.advance(Duration::from_secs(1));
    p.gc(MIN_GRACE, false).await.unwrap();
    space.advance(LATER);
    p.gc(MIN_GRACE, false).await.unwrap();
    let left: Vec<_> =
        space.names("").into_iter().filter(|name| !name.starts_with("gc/")).collect();
    assert_eq!(left, ["fspfs.json"]);
}

#[test]
fn nothing_is_collected_that_was_not_found_before_the_grace_period() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        let id = make(&p, chosen("snap-0a"), &[(0, 1)]).await;
        p.delete(&id).await.unwrap();
        let before = space.objects();
        let dry = p.gc(MIN_GRACE, true).await.unwrap();
        assert_eq!((dry.deleted_objects, dry.waiting_objects), (0, 3));
        assert_eq!(space.objects(), before);
        space.advance(100 * LATER);
        assert_eq!(p.gc(MIN_GRACE, false).await.unwrap().deleted_objects, 0);
        space.advance(Duration::from_secs(MIN_GRACE.as_secs() - 1));
        assert_eq!(p.gc(MIN_GRACE, false).await.unwrap().deleted_objects, 0);
        space.advance(Duration::from_secs(1));
        assert_eq!(p.gc(MIN_GRACE, true).await.unwrap().deleted_objects, 3);
        assert_eq!(p.gc(MIN_GRACE, false).await.unwrap().deleted_objects, 3);
        assert_eq!(kind(p.gc(Duration::from_secs(3599), false).await), Some(ErrorKind::Invalid));
        assert_eq!(space.names("gc/").len(), 0, "a record of what is gone goes too");
    });
}

#[test]
fn collections_that_begin_at_the_same_time_both_note_what_they_found() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        for name in ["snap-0a", "snap-0b"] {
            let id = make(&p, chosen(name), &[(0, name.as_bytes()[6])]).await;
            p.delete(&id).await.unwrap();
            p.gc(MIN_GRACE, false).await.unwrap();
        }
        assert_eq!(space.names("gc/").len(), 2);
        space.advance(LATER);
        assert_eq!(p.gc(MIN_GRACE, false).await.unwrap().deleted_objects, 6);
        assert_eq!(space.names("gc/").len(), 0);
    });
}

#[test]
fn a_pending_snapshot_that_is_deleted_leaves_no_pack() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        let kept = make(&p, chosen("snap-0a"), &[(0, 1), (1, 2)]).await;
        let packs = space.names("packs/");
        // By two processes.
        let id = start(&p, chosen("snap-0b")).await;
        put(&p, &id, &[(0, 3), (1, 1)]).await;
        p.flush(&id).await.unwrap();
        let q = space.process();
        put(&q, &id, &[(2, 4)]).await;
        q.flush(&id).await.unwrap();
        assert_eq!(space.names("packs/").len(), packs.len() + 2);
        space.process().delete(&id).await.unwrap();
        assert_eq!(space.names("packs/"), packs);
        assert_eq!(read(&p, &kept).await.unwrap(), [(0, 1), (1, 2)]);
        // Of a snapshot that was completed they stay, for others and for a grace period.
        p.delete(&kept).await.unwrap();
        assert_eq!(space.names("packs/"), packs);
    });
}

/// A collection while a snapshot is being completed names its new pages; the name stays in the
/// record, so later only what each run reaches protects them.
async fn with_named_pages(space: &Space) -> SnapshotId {
    let (p, q) = (space.process(), space.process());
    let junk = make(&q, chosen("snap-0bad"), &[(0, 7)]).await;
    q.delete(&junk).await.unwrap();
    let id = start(&p, chosen("snap-0a")).await;
    put(&p, &id, &[(0, 1)]).await;
    p.before(Call::Create, "snapshots/", async move {
        q.gc(MIN_GRACE, false).await.unwrap();
    });
    p.complete(&id, count(1)).await.unwrap();
    assert!(p.hook_ran());
    space.advance(LATER);
    id
}

#[test]
fn a_child_that_is_started_while_a_collection_lists_keeps_what_its_parent_had() {
    run(async {
        for prefix in ["tags/", "pending/", "snapshots/", "pages/", "packs/", "gc/"] {
            let space = Space::new(1);
            let parent = with_named_pages(&space).await;
            let (p, q) = (Arc::new(space.process()), space.process());
            let (other, at) = (Arc::clone(&p), parent.clone());
            q.before(Call::List, prefix, async move {
                let child = StartRequest { id: "snap-0c".parse().ok(), ..child_of(&at) };
                start(&other, child).await;
                other.delete(&at).await.unwrap();
            });
            q.gc(MIN_GRACE, false).await.unwrap();
            assert!(q.hook_ran());
            let child = "snap-0c".parse().unwrap();
            p.complete(&child, count(0)).await.unwrap();
            let fresh = space.process();
            assert_eq!(read(&fresh, &child).await.unwrap(), [(0, 1)], "{prefix}");
        }
    });
}

/// The name of `start.json` comes again with the id, unlike all others.
#[test]
fn a_collection_spares_what_got_a_name_that_was_garbage_before() {
    run(async {
        for prefix in ["snapshots/", "pages/", "packs/", "gc/", "tags/", "pending/"] {
            let space = Space::new(1);
            let (p, q) = (space.process(), space.process());
            let request = || StartRequest { tags: tags(1), ..chosen("snap-0a") };
            // The first set of tags is named as garbage, since another set replaced it. start.json
            // is of no use any more, since the completion crashed before it cleaned up.
            let id = start(&p, request()).await;
            p.set_tags(&id, tags(2)).await.unwrap();
            put(&p, &id, &[(0, 1)]).await;
            p.flush(&id).await.unwrap();
            for calls in 0.. {
                let crashing = space.process();
                crashing.crash_after(calls);
                let _ = crashing.complete(&id, count(1)).await;
                if !space.names("snapshots/").is_empty() {
                    break;
                }
            }
            assert!(!space.names("pending/snap-0a/start.json").is_empty());
            p.gc(MIN_GRACE, false).await.unwrap();
            space.advance(LATER);
            let r = Arc::new(space.process());
            let (other, at) = (Arc::clone(&r), id.clone());
            if prefix == "gc/" {
                // It is gone before the collection begins.
                r.delete(&id).await.unwrap();
            }
            q.before(Call::List, prefix, async move {
                let _ = other.delete(&at).await;
                start(&other, request()).await;
            });
            q.gc(MIN_GRACE, false).await.unwrap();
            assert!(q.hook_ran());
            let there = state(&r, &id).await.unwrap_or_else(|| panic!("it is gone: {prefix}"));
            assert_eq!((there.state.as_str(), there.tags), ("pending", tags(1)), "{prefix}");
        }
    });
}

#[test]
fn a_damaged_page_keeps_anything_from_being_collected() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        let junk = make(&p, chosen("snap-0bad"), &[(0, 7)]).await;
        p.delete(&junk).await.unwrap();
        p.gc(MIN_GRACE, false).await.unwrap();
        let junk = space.names("pages/");
        make(&p, chosen("snap-0a"), &[(0, 1)]).await;
        space.advance(LATER);
        let lost = space.names("pages/").into_iter().find(|name| !junk.contains(name)).unwrap();
        space.lose(&lost);
        let before = space.objects();
        let q = space.process();
        assert_eq!(kind(q.gc(MIN_GRACE, false).await), Some(ErrorKind::Corrupt));
        assert_eq!(space.objects(), before);
    });
}

#[test]
fn verify_finds_what_is_lost_although_the_process_has_read_it() {
    run(async {
        for prefix in ["pages/", "packs/"] {
            let space = Space::new(1);
            let p = space.process();
            let id = make(&p, chosen("snap-0a"), &[(0, 1)]).await;
            read(&p, &id).await.unwrap();
            for name in space.names(prefix) {
                space.lose(&name);
                let report = verify(&p, &[]).await;
                assert_eq!(report.damage.len(), 1, "{name}");
                assert_eq!(report.damage[0].lost_blocks[&id], Some(1));
            }
        }
    });
}
