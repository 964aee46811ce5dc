//! What cannot be read is told, and costs nothing else.

use super::*;
use crate::model::SnapshotState;

async fn states(repository: &Repository) -> Result<Vec<(String, SnapshotState)>> {
    let page = repository.list(None).await?;
    Ok(page.snapshots.into_iter().map(|found| (found.id.to_string(), found.state)).collect())
}

#[test]
fn an_object_that_cannot_be_read_is_no_store_that_cannot() {
    run(async {
        use SnapshotState::{Completed, Error, Pending};
        let space = Space::new(1);
        let p = space.process();
        let one = make(&p, chosen("snap-01"), &[(0, 1)]).await;
        p.set_tags(&one, tags(7)).await.unwrap();
        let two = make(&p, chosen("snap-02"), &[(0, 2), (1000, 3)]).await;
        let id = start(&p, chosen("snap-03")).await;
        put(&p, &id, &[(0, 3)]).await;
        p.flush(&id).await.unwrap();
        let all_well = [Completed, Completed, Pending];
        let first_page = space.names("pages/").remove(0);
        let record = space.names("pending/snap-03/").into_iter().find(|name| name.contains("1-"));
        let pack = space.names("packs/").remove(0);
        for (bad, states_then) in [
            ("snapshots/snap-01.json", [Error, Completed, Pending]),
            ("tags/snap-01/", all_well),
            (&first_page, all_well),
            (&pack, all_well),
            ("pending/snap-03/start.json", [Completed, Completed, Error]),
            (&record.unwrap(), all_well),
        ] {
            p.bad_disk(Some(bad));
            let found = states(&p).await.unwrap();
            assert_eq!(found.iter().map(|(_, state)| *state).collect::<Vec<_>>(), states_then);
            let report = verify(&p, &[]).await;
            // A pack that no completed snapshot has is not read.
            if bad != pack || !report.damage.is_empty() {
                let [damage] = &report.damage[..] else { panic!("{bad}: {report:?}") };
                assert!(damage.object.starts_with(bad), "{bad}: {damage:?}");
                assert!(damage.problem.contains("bad disk"), "{damage:?}");
            }
            assert_eq!(report.snapshots, 3);
        }
        p.bad_disk(Some(""));
        assert_eq!(kind(states(&p).await), Some(ErrorKind::Unavailable));
        let report = p.verify(&[], Arc::new(|_| {})).await;
        assert_eq!(kind(report), Some(ErrorKind::Unavailable));
        p.bad_disk(None);
        assert!(verify(&p, &[one, two]).await.damage.is_empty());
    });
}

#[test]
fn a_damaged_record_of_what_is_pending_is_found() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        let id = start(&p, chosen("snap-01")).await;
        put(&p, &id, &[(0, 3)]).await;
        p.flush(&id).await.unwrap();
        assert!(verify(&p, &[]).await.damage.is_empty());
        let names = space.names("pending/snap-01/");
        let record = names.iter().find(|name| !name.ends_with("start.json")).unwrap();
        space.spoil(record);
        let report = verify(&p, &[]).await;
        assert_eq!(report.damage.len(), 1, "{report:?}");
        assert_eq!(&report.damage[0].object, record);
        assert_eq!(report.damage[0].lost_blocks[&id], None);
    });
}
