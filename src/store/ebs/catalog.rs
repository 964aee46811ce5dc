//! What EC2 knows of snapshots: their lists, states and tags. All of `aws-sdk-ec2` is here.

use std::collections::BTreeMap;

use aws_sdk_ec2::Client;
use aws_sdk_ec2::types::{Filter, SnapshotState as Ec2State, StorageTier, Tag};
use jiff::Timestamp;

use super::failure::{Class, Failure};
use super::retry::{Patience, retry};
use crate::model::{Snapshot, SnapshotId, SnapshotState, Tags, VolumeSize};
use crate::store::{Error, ErrorKind, ListToken, Result, SnapshotPage};

/// Snapshots of a page (EC2 allows 5 to 1000).
const PAGE: i32 = 1000;

/// The EC2 side of a store.
#[derive(Clone, Debug)]
pub(super) struct Catalog {
    client: Client,
}

macro_rules! failed {
    () => {
        |error| Failure::of_sdk(&error, None)
    };
}

impl Catalog {
    pub(super) fn new(client: Client) -> Self {
        Self { client }
    }

    pub(super) async fn describe(&self, id: &SnapshotId, patience: Patience) -> Result<Snapshot> {
        let doing = format!("describe {id}");
        let answer = retry(&doing, patience, || async {
            let request = self.client.describe_snapshots().snapshot_ids(id.as_str());
            let answer = request.send().await.map_err(failed!())?;
            let gone = || Failure::new(Class::NotFound, "there is no such snapshot");
            answer.snapshots.unwrap_or_default().pop().ok_or_else(gone)
        })
        .await?;
        snapshot(answer).map_err(|e| e.context(doing))
    }

    pub(super) async fn list(&self, token: Option<ListToken>) -> Result<SnapshotPage> {
        let token = token.map(|token| token.0);
        let answer = retry("list the snapshots", Patience::usual(), || async {
            let request = self.client.describe_snapshots().owner_ids("self").max_results(PAGE);
            request.set_next_token(token.clone()).send().await.map_err(failed!())
        })
        .await?;
        let snapshots = answer.snapshots.unwrap_or_default().into_iter().map(snapshot);
        Ok(SnapshotPage {
            snapshots: snapshots.collect::<Result<_>>()?,
            next: answer.next_token.filter(|token| !token.is_empty()).map(ListToken),
        })
    }

    pub(super) async fn delete(&self, id: &SnapshotId) -> Result<()> {
        retry(format!("delete {id}"), Patience::usual(), || async {
            let request = self.client.delete_snapshot().snapshot_id(id.as_str());
            request.send().await.map(|_| ()).map_err(failed!())
        })
        .await
    }

    /// Makes `wanted` the tags, whatever they were. Those that AWS itself has set stay.
    pub(super) async fn set_tags(&self, id: &SnapshotId, wanted: &Tags) -> Result<()> {
        let now = self.describe(id, Patience::usual()).await?.tags;
        let tag = |key: &str, value: &str| Tag::builder().key(key).value(value).build();
        let gone: Vec<_> = now
            .keys()
            .filter(|key| !wanted.contains_key(*key) && !key.starts_with("aws:"))
            .collect();
        let new: Vec<_> =
            wanted.iter().filter(|(key, value)| now.get(*key) != Some(value)).collect();
        if !gone.is_empty() {
            retry(format!("untag {id}"), Patience::usual(), || async {
                let tags =
                    gone.iter().map(|key| Tag::builder().key(key.as_str()).build()).collect();
                let request = self.client.delete_tags().resources(id.as_str()).set_tags(Some(tags));
                request.send().await.map(|_| ()).map_err(failed!())
            })
            .await?;
        }
        if !new.is_empty() {
            retry(format!("tag {id}"), Patience::usual(), || async {
                let tags = new.iter().map(|(key, value)| tag(key, value)).collect();
                let request = self.client.create_tags().resources(id.as_str()).set_tags(Some(tags));
                request.send().await.map(|_| ()).map_err(failed!())
            })
            .await?;
        }
        Ok(())
    }

    /// The first page of those that have all of these tags.
    #[expect(dead_code, reason = "for --filter")]
    fn filters(tags: &BTreeMap<String, String>) -> Vec<Filter> {
        let filter = |(key, value): (&String, &String)| {
            Filter::builder().name(format!("tag:{key}")).values(value).build()
        };
        tags.iter().map(filter).collect()
    }
}

/// A snapshot as EC2 describes it.
fn snapshot(found: aws_sdk_ec2::types::Snapshot) -> Result<Snapshot> {
    let odd = |what: &str| Error::new(ErrorKind::Unavailable, format!("EC2 gave {what}"));
    let text = found.snapshot_id.unwrap_or_default();
    let id: SnapshotId = text.parse().map_err(|_| odd(&format!("the snapshot id {text:?}")))?;
    let gib = found.volume_size.and_then(|gib| u64::try_from(gib).ok());
    let volume_size = gib.and_then(|gib| VolumeSize::from_gib(gib).ok());
    let archived = found.storage_tier == Some(StorageTier::Archive);
    let (state, message) = match found.state {
        Some(Ec2State::Completed) if archived => (
            SnapshotState::Error,
            Some("it is archived: restore it with `aws ec2 restore-snapshot-tier`".to_owned()),
        ),
        Some(Ec2State::Completed) => (SnapshotState::Completed, None),
        Some(Ec2State::Pending) => (SnapshotState::Pending, found.progress),
        state => {
            let state = state.map_or_else(|| "no state".to_owned(), |s| s.as_str().to_owned());
            (SnapshotState::Error, Some(found.state_message.unwrap_or(state)))
        }
    };
    let time = |time: aws_sdk_ec2::primitives::DateTime| {
        Timestamp::new(time.secs(), i32::try_from(time.subsec_nanos()).unwrap_or(0)).ok()
    };
    let tags = found.tags.unwrap_or_default().into_iter();
    Ok(Snapshot {
        volume_size: volume_size
            .ok_or_else(|| odd(&format!("the size {:?} of {id}", found.volume_size)))?,
        id,
        state,
        state_message: message.filter(|message| !message.is_empty()),
        parent: None,
        lineage: None,
        volume_id: found.volume_id.filter(|id| id != "vol-ffffffff"),
        description: found.description.unwrap_or_default(),
        start_time: found.start_time.and_then(time).unwrap_or(Timestamp::UNIX_EPOCH),
        completion_time: found.completion_time.and_then(time),
        tags: tags.filter_map(|tag| Some((tag.key?, tag.value.unwrap_or_default()))).collect(),
        encrypted: found.encrypted.unwrap_or(false),
        content_digest: None,
        data_blocks: None,
        zero_blocks: None,
    })
}
