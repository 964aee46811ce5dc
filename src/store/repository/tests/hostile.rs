//! What whoever made a repository put into it is refused within bounded memory and time.

use bytes::Bytes;
use serde_json::{Value, json};

use super::*;
use crate::store::repository::{document, names};

/// A pending snapshot of one record, and what was put in the place of the list of those that count.
async fn sealed(list: impl FnOnce(Value) -> Value) -> Result<Snapshot> {
    let space = Space::new(1);
    let p = space.process();
    let id = start(&p, chosen("snap-01")).await;
    put(&p, &id, &[(0, 3)]).await;
    p.flush(&id).await.unwrap();
    let attempt = p.start_of(&id).await.unwrap().unwrap().metadata.attempt;
    let record = space.names("pending/snap-01/").into_iter().find(|name| name.contains("/1-"));
    let writer = record.unwrap().rsplit_once("/1-").unwrap().1[..32].to_owned();
    let list = list(json!({ "epoch": 1, "writer": writer, "numbers": [[0, 0]] }));
    let name = names::sealed(&id, attempt);
    assert!(p.objects().create(&name, document::encode(&list)).await.unwrap());
    p.complete(&id, count(1)).await
}

#[test]
fn records_that_are_not_there_are_not_counted() {
    run(async {
        let one = sealed(|one| json!([one])).await;
        assert!(one.is_ok(), "{one:?}");
        let many = sealed(|mut one| {
            one["numbers"] = json!([[0, u32::MAX]]);
            json!([one])
        });
        assert_eq!(kind(many.await), Some(ErrorKind::NotFound));
    });
}

#[test]
fn records_that_are_named_twice_are_damage() {
    run(async {
        let twice = sealed(|one| json!([one, one])).await;
        assert_eq!(kind(twice), Some(ErrorKind::Corrupt));
        let runs = sealed(|mut one| {
            one["numbers"] = json!([[0, 0], [0, 0]]);
            json!([one])
        });
        assert_eq!(kind(runs.await), Some(ErrorKind::Corrupt));
    });
}

#[test]
fn documents_of_more_bytes_than_the_format_allows_are_damage() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        let id = make(&p, chosen("snap-01"), &[(0, 1)]).await;
        let name = names::manifest(&id);
        let manifest: Value = document::decode(&name, &space.objects()[&name]).unwrap();
        for (len, is_good) in [(1000, true), (4096, false)] {
            let mut long = manifest.clone();
            long["description"] = json!("x".repeat(len));
            space.lose(&name);
            assert!(p.objects().create(&name, document::encode(&long)).await.unwrap());
            assert_eq!(space.process().describe(&id).await.is_ok(), is_good, "{len}");
        }
    });
}

#[test]
fn more_tags_than_the_format_allows_are_damage() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        let id = make(&p, chosen("snap-01"), &[(0, 1)]).await;
        p.set_tags(&id, tags(1)).await.unwrap();
        let name = space.names("tags/").remove(0);
        let set: Value = document::decode(&name, &space.objects()[&name]).unwrap();
        let many: Tags = (0..51).map(|n| (n.to_string(), String::new())).collect();
        for bad in [json!(many), json!({ "a": "x".repeat(256) })] {
            let mut hostile = set.clone();
            hostile["tags"] = bad;
            space.lose(&name);
            let bytes: Bytes = document::encode(&hostile);
            assert!(p.objects().create(&name, bytes).await.unwrap());
            let found = space.process().describe(&id).await.unwrap();
            assert!(found.tags.is_empty() && found.state_message.is_some(), "{found:?}");
        }
    });
}
