//! What becomes of objects that were created, when the answer was lost.

use bytes::Bytes;

use super::memory::Call;
use super::*;

#[test]
fn any_answer_may_get_lost_and_the_snapshot_is_as_it_should_be() {
    run(async {
        for creates in 0.. {
            let space = Space::new(1);
            let p = space.process();
            p.lose_answer(creates);
            let request = StartRequest { tags: tags(1), ..StartRequest::new(size(16)) };
            let id = start(&p, request).await;
            put(&p, &id, &[(0, 1), (20_000, 2)]).await;
            p.put_block_durably(&id, BlockIndex(1), block(3)).await.unwrap();
            p.complete(&id, count(3)).await.unwrap();
            p.set_tags(&id, tags(2)).await.unwrap();
            assert_eq!(read(&p, &id).await.unwrap(), [(0, 1), (1, 3), (20_000, 2)]);
            assert_eq!(state(&p, &id).await.unwrap().tags, tags(2));
            // The completion knows that it was its own, and has tidied up.
            assert_eq!(space.names("pending/"), Vec::<String>::new(), "{creates}");
            if !p.has_lost() {
                // start.json, tags, the writer, its pack and record, closing, sealed, pages, their list, manifest, tags
                assert!(creates >= 11, "{creates}");
                break;
            }
        }
    });
}

#[test]
fn a_lost_answer_does_not_claim_the_object_of_another() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        let objects = p.objects();
        let [ours, theirs] = [Bytes::from_static(b"ours"), Bytes::from_static(b"theirs")];
        assert!(objects.create("a/x", theirs.clone()).await.unwrap());
        for (name, own) in [("a/x", false), ("a/y", true)] {
            p.lose_answer(0);
            assert_eq!(objects.create_own(name, ours.clone()).await.unwrap(), own);
            assert!(p.has_lost());
        }
        assert_eq!(objects.read("a/x").await.unwrap(), theirs);
        assert_eq!(objects.read("a/y").await.unwrap(), ours);
        // An answer that came is what it is.
        assert!(!objects.create_own("a/y", ours).await.unwrap());
    });
}

#[test]
fn a_start_that_another_was_faster_than_is_refused_when_its_answer_is_lost() {
    run(async {
        let space = Space::new(1);
        let (p, q) = (space.process(), Arc::new(space.process()));
        let faster = Arc::clone(&q);
        p.before(Call::Create, "pending/", async move {
            start(&faster, chosen("snap-0a")).await;
        });
        p.lose_answer(0);
        assert_eq!(kind(p.start(chosen("snap-0a")).await), Some(ErrorKind::Conflict));
        assert!(p.hook_ran() && p.has_lost());
        // It is the other's, and goes on.
        let id = "snap-0a".parse().unwrap();
        put(&q, &id, &[(0, 1)]).await;
        q.complete(&id, count(1)).await.unwrap();
        assert_eq!(read(&p, &id).await.unwrap(), [(0, 1)]);
    });
}

#[test]
fn a_manifest_that_may_be_anothers_is_left_alone() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        let id = start(&p, chosen("snap-0a")).await;
        // `closing` and `sealed` come before it. The snapshot has no pages, and its manifest nothing of its own.
        p.lose_answer(2);
        assert_eq!(kind(p.complete(&id, count(0)).await), Some(ErrorKind::Timeout));
        assert_eq!(space.names("snapshots/").len(), 1);
        assert!(p.complete(&id, count(0)).await.unwrap().is_readable());
        assert!(read(&p, &id).await.unwrap().is_empty());
    });
}
