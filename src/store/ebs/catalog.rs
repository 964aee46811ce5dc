//! What EC2 knows of snapshots: their lists, states and tags. A store uses `aws-sdk-ec2` nowhere else.

use std::sync::atomic::{AtomicBool, Ordering};

use aws_sdk_ec2::types::{Filter, SnapshotState as Ec2State, StorageTier, Tag};
use jiff::Timestamp;

use super::failure::{Class, Failure};
use super::request::Kind;
use super::service::{Patience, Request, Service};
use crate::model::{BLOCK_SIZE_U64, Snapshot, SnapshotId, SnapshotState, Tags, VolumeSize};
use crate::store::page::MAX_IDLE_PAGES;
use crate::store::{Error, ErrorKind, ListToken, Result, SnapshotPage, StoreOptions};

/// Snapshots of a page (EC2 allows 5 to 1000).
const PAGE: i32 = 1000;

/// What the list of snapshots is narrowed down to.
#[derive(Clone, Debug)]
pub(super) struct Scope {
    owners: Vec<String>,
    filters: Vec<Filter>,
}

impl Scope {
    pub(super) fn new(options: &StoreOptions) -> Self {
        let owners = match &options.owners[..] {
            [] => vec!["self".to_owned()],
            owners => owners.to_vec(),
        };
        let filter = |filter: &crate::store::Filter| {
            let values = Some(filter.values.clone());
            Filter::builder().name(&filter.name).set_values(values).build()
        };
        Self { owners, filters: options.filters.iter().map(filter).collect() }
    }
}

/// An error of EC2, which has no reasons beside its codes.
macro_rules! failed {
    () => {
        |error| Failure::of_sdk(&error, None)
    };
}

fn request<'a>(kind: Kind, id: &'a SnapshotId, doing: &'a str, patience: Patience) -> Request<'a> {
    Request { kind, snapshot: Some(id), doing, patience }
}

pub(super) async fn describe(
    service: &Service,
    id: &SnapshotId,
    patience: Patience,
) -> Result<Snapshot> {
    let doing = format!("describe {id}");
    let asked = request(Kind::DescribeSnapshots, id, &doing, patience);
    let answer = service.call(asked, |clients| async move {
        let mut token = None;
        for _ in 0..MAX_IDLE_PAGES {
            let request = clients.ec2.describe_snapshots().snapshot_ids(id.as_str());
            let answer = request.set_next_token(token).send().await.map_err(failed!())?;
            let mut found = answer.snapshots.unwrap_or_default().into_iter();
            if let Some(found) = found.find(|found| found.snapshot_id() == Some(id.as_str())) {
                return Ok(found);
            }
            // A page that is empty is not the last one.
            token = answer.next_token.filter(|token| !token.is_empty());
            if token.is_none() {
                return Err(Failure::new(Class::NotFound, "there is no such snapshot"));
            }
        }
        Err(Failure::new(Class::Odd, "the service gave pages without an end"))
    });
    snapshot(answer.await?).map_err(|e| e.context(doing))
}

pub(super) async fn list(
    service: &Service,
    scope: &Scope,
    token: Option<ListToken>,
) -> Result<SnapshotPage> {
    let token = token.map(|token| token.0);
    let asked = Request {
        kind: Kind::DescribeSnapshots,
        snapshot: None,
        doing: "list the snapshots",
        patience: Patience::usual(),
    };
    let answer = service.call(asked, |clients| {
        let token = token.clone();
        async move {
            let request = clients.ec2.describe_snapshots().max_results(PAGE);
            let request = request.set_owner_ids(Some(scope.owners.clone()));
            let filters = (!scope.filters.is_empty()).then(|| scope.filters.clone());
            let request = request.set_filters(filters).set_next_token(token);
            request.send().await.map_err(failed!())
        }
    });
    let answer = answer.await?;
    let snapshots = answer.snapshots.unwrap_or_default().into_iter().filter_map(|found| {
        // One that makes no sense must not hide the others.
        snapshot(found).inspect_err(|e| tracing::warn!("a snapshot is left out: {e}")).ok()
    });
    Ok(SnapshotPage {
        snapshots: snapshots.collect(),
        next: answer.next_token.filter(|token| !token.is_empty()).map(ListToken),
    })
}

pub(super) async fn delete(service: &Service, id: &SnapshotId, patience: Patience) -> Result<()> {
    let doing = format!("delete {id}");
    // Whether an attempt, the answer to which was lost, may have done it.
    let lost = &AtomicBool::new(false);
    let asked = request(Kind::DeleteSnapshot, id, &doing, patience);
    let deleted = service.call(asked, |clients| async move {
        let before = lost.swap(true, Ordering::Relaxed);
        let request = clients.ec2.delete_snapshot().snapshot_id(id.as_str());
        match request.send().await.map_err(failed!()) {
            // An attempt whose answer was lost has done it.
            Err(failure) if before && failure.class == Class::NotFound => Ok(()),
            Err(failure) => {
                if failure.is_verdict() {
                    lost.store(before, Ordering::Relaxed);
                }
                Err(failure)
            }
            Ok(_) => Ok(()),
        }
    });
    deleted.await
}

/// Makes `wanted` the tags, whatever they were. Those that AWS itself has set stay.
pub(super) async fn set_tags(
    service: &Service,
    id: &SnapshotId,
    wanted: &Tags,
    patience: Patience,
) -> Result<()> {
    let now = describe(service, id, patience).await?.tags;
    let of_aws = |key: &str| key.starts_with("aws:");
    let gone = now.keys().filter(|key| !wanted.contains_key(*key) && !of_aws(key));
    let gone: Vec<_> = gone.map(|key| Tag::builder().key(key).build()).collect();
    let new = wanted.iter().filter(|(key, value)| now.get(*key) != Some(value) && !of_aws(key));
    let new: Vec<_> =
        new.map(|(key, value)| Tag::builder().key(key).value(value).build()).collect();
    if !gone.is_empty() {
        let doing = format!("untag {id}");
        let gone = &gone;
        let call =
            service.call(request(Kind::DeleteTags, id, &doing, patience), |clients| async move {
                let request = clients.ec2.delete_tags().resources(id.as_str());
                request.set_tags(Some(gone.clone())).send().await.map(|_| ()).map_err(failed!())
            });
        call.await?;
    }
    if !new.is_empty() {
        let doing = format!("tag {id}");
        let new = &new;
        let call =
            service.call(request(Kind::CreateTags, id, &doing, patience), |clients| async move {
                let request = clients.ec2.create_tags().resources(id.as_str());
                request.set_tags(Some(new.clone())).send().await.map(|_| ()).map_err(failed!())
            });
        call.await?;
    }
    Ok(())
}

/// Tags for what EC2 does not keep of a snapshot that was not taken of a volume: the volume that it
/// is an image of, and its parent. They are shown as that, and not as tags.
pub(super) const VOLUME_TAG: &str = "fspfs:volume";
pub(super) const PARENT_TAG: &str = "fspfs:parent";

/// What EC2 gives for a snapshot that was not taken of a volume (EC2 user guide).
const NO_VOLUME: &str = "vol-ffffffff";

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
            SnapshotState::Archived,
            Some("restore it first, with `aws ec2 restore-snapshot-tier`".to_owned()),
        ),
        Some(Ec2State::Completed) => (SnapshotState::Completed, None),
        Some(Ec2State::Pending) => {
            (SnapshotState::Pending, found.progress.filter(|progress| progress != "0%"))
        }
        state => {
            let state = state.map_or_else(|| "no state".to_owned(), |s| s.as_str().to_owned());
            (SnapshotState::Error, Some(found.state_message.unwrap_or(state)))
        }
    };
    let time = |time: aws_sdk_ec2::primitives::DateTime| {
        Timestamp::new(time.secs(), i32::try_from(time.subsec_nanos()).unwrap_or(0)).ok()
    };
    let tags = found.tags.unwrap_or_default().into_iter();
    let mut tags: Tags =
        tags.filter_map(|tag| Some((tag.key?, tag.value.unwrap_or_default()))).collect();
    let volume = tags.remove(VOLUME_TAG);
    // Zeros that were written are in it too, and only a listing tells how many.
    let full = found.full_snapshot_size_in_bytes.and_then(|bytes| u64::try_from(bytes).ok());
    let full = full.filter(|bytes| *bytes > 0).map(|bytes| bytes.div_ceil(BLOCK_SIZE_U64));
    let parent = tags.remove(PARENT_TAG).and_then(|id| id.parse().ok());
    Ok(Snapshot {
        volume_size: volume_size
            .ok_or_else(|| odd(&format!("the size {:?} of {id}", found.volume_size)))?,
        id,
        state,
        state_message: message.filter(|message| !message.is_empty()),
        parent,
        lineage: None,
        volume_id: found.volume_id.filter(|id| id != NO_VOLUME).or(volume),
        description: found.description.unwrap_or_default(),
        start_time: found.start_time.and_then(time).unwrap_or(Timestamp::UNIX_EPOCH),
        completion_time: found.completion_time.and_then(time),
        tags,
        encrypted: found.encrypted.unwrap_or(false),
        content_digest: None,
        data_blocks: full.filter(|_| state == SnapshotState::Completed),
        zero_blocks: None,
    })
}
