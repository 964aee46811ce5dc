//! What EC2 knows of snapshots: their lists, states and tags.

use std::sync::atomic::{AtomicBool, Ordering};

use jiff::Timestamp;

use super::kinds;
use super::{Account, ec2};
use crate::model::{BLOCK_SIZE_U64, Snapshot, SnapshotId, SnapshotState, Tags, VolumeSize};
use crate::store::aws::failure::{Class, Failure};
use crate::store::aws::service::{Request, RetryPolicy, Service};
use crate::store::listing::MAX_IDLE_PAGES;
use crate::store::request::Kind;
use crate::store::{Error, ErrorKind, Filter, ListToken, Result, SnapshotPage, StoreOptions};

/// Snapshots of a page (EC2 allows 5 to 1000).
const PAGE: u32 = 1000;

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
        Self { owners, filters: options.filters.clone() }
    }
}

fn request<'a>(
    kind: &'static Kind,
    id: &'a SnapshotId,
    doing: &'a str,
    policy: RetryPolicy,
) -> Request<'a> {
    Request { kind, snapshot: Some(id), doing, policy }
}

pub(super) async fn describe(
    service: &Service<Account>,
    id: &SnapshotId,
    policy: RetryPolicy,
) -> Result<Snapshot> {
    let doing = format!("describe {id}");
    let asked = request(&kinds::DESCRIBE_SNAPSHOTS, id, &doing, policy);
    let answer = service.call(asked, |clients| async move {
        let mut token: Option<String> = None;
        for _ in 0..MAX_IDLE_PAGES {
            let request = ec2::describe_snapshot(id.as_str()).page(token.as_deref());
            let mut page = clients.ec2.send(request).await?;
            // A page that is empty is not the last one.
            token = page.next();
            if let Some(found) = page.snapshots.into_iter().find(|s| s.snapshot_id == id.as_str()) {
                return Ok(found);
            }
            if token.is_none() {
                return Err(Failure::new(Class::NotFound, "there is no such snapshot"));
            }
        }
        Err(Failure::new(Class::Foreign, "the service gave pages without an end"))
    });
    snapshot(answer.await?).map_err(|e| e.context(doing))
}

pub(super) async fn list(
    service: &Service<Account>,
    scope: &Scope,
    token: Option<ListToken>,
) -> Result<SnapshotPage> {
    let token = token.map(|token| token.0);
    let asked = Request {
        kind: &kinds::DESCRIBE_SNAPSHOTS,
        snapshot: None,
        doing: "list the snapshots",
        policy: RetryPolicy::standard(),
    };
    let token = token.as_deref();
    let page = service.call(asked, |clients| async move {
        let request = ec2::describe_snapshots(&scope.owners, &scope.filters);
        clients.ec2.send(request.max_results(PAGE).page(token)).await
    });
    let mut page = page.await?;
    let next = page.next().map(ListToken);
    let snapshots = page.snapshots.into_iter().filter_map(|found| {
        // One that makes no sense must not hide the others.
        snapshot(found).inspect_err(|e| tracing::warn!("a snapshot is left out: {e}")).ok()
    });
    Ok(SnapshotPage { snapshots: snapshots.collect(), next })
}

pub(super) async fn delete(
    service: &Service<Account>,
    id: &SnapshotId,
    policy: RetryPolicy,
) -> Result<()> {
    let doing = format!("delete {id}");
    // Whether an attempt, the answer to which was lost, may have done it.
    let lost = &AtomicBool::new(false);
    let asked = request(&kinds::DELETE_SNAPSHOT, id, &doing, policy);
    let deleted = service.call(asked, |clients| async move {
        let before = lost.swap(true, Ordering::Relaxed);
        match clients.ec2.send(ec2::delete_snapshot(id.as_str())).await {
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
    service: &Service<Account>,
    id: &SnapshotId,
    wanted: &Tags,
    policy: RetryPolicy,
) -> Result<()> {
    let now = describe(service, id, policy).await?.tags;
    let of_aws = |key: &str| key.starts_with("aws:");
    let gone = now.keys().filter(|key| !wanted.contains_key(*key) && !of_aws(key));
    let gone: &Vec<_> = &gone.collect();
    let new = wanted.iter().filter(|(key, value)| now.get(*key) != Some(value) && !of_aws(key));
    let new: &Vec<_> = &new.collect();
    if !gone.is_empty() {
        let doing = format!("untag {id}");
        let asked = request(&kinds::DELETE_TAGS, id, &doing, policy);
        let untagged = service.call(asked, |clients| async move {
            clients.ec2.send(ec2::delete_tags(id.as_str(), gone.iter().copied())).await
        });
        untagged.await?;
    }
    if !new.is_empty() {
        let doing = format!("tag {id}");
        let asked = request(&kinds::CREATE_TAGS, id, &doing, policy);
        let tagged = service.call(asked, |clients| async move {
            clients.ec2.send(ec2::create_tags(id.as_str(), new.iter().copied())).await
        });
        tagged.await?;
    }
    Ok(())
}

/// Tags for what EC2 does not keep of a snapshot that was not taken of a volume: the volume that it
/// is an image of, and its parent. They are shown as that, and not as tags.
pub(super) const VOLUME_TAG: &str = "fspfs:volume";
pub(super) const PARENT_TAG: &str = "fspfs:parent";

/// What EC2 gives for a snapshot that was not taken of a volume (EC2 user guide).
const NO_VOLUME: &str = "vol-ffffffff";

/// Tags of a snapshot at most: 50, and those of AWS itself.
const MAX_TAGS: usize = 100;

/// Characters of a description, of a value of a tag, and of a message about a state at most (EC2 has 255, 256, and
/// shorter ones).
const MAX_TEXT: usize = 1024;

/// A snapshot as EC2 describes it.
pub(super) fn snapshot(found: ec2::Snapshot) -> Result<Snapshot> {
    let unreadable = |what: String| Error::new(ErrorKind::Unavailable, format!("EC2 gave {what}"));
    let text = &found.snapshot_id;
    let id: SnapshotId = text.parse().map_err(|_| {
        unreadable(format!("the snapshot id {:?}", text.chars().take(64).collect::<String>()))
    })?;
    let tags = found.tags.iter().flat_map(|tag| [Some(&tag.key), tag.value.as_ref()]);
    let about = [&found.description, &found.status_message, &found.volume_id, &found.progress];
    let texts = tags.chain(about.map(Option::as_ref)).flatten().chain([&found.status]);
    if found.tags.len() > MAX_TAGS || texts.into_iter().any(|text| text.len() > 4 * MAX_TEXT) {
        return Err(unreadable(format!("more about {id} than any snapshot has")));
    }
    let number = |text: &Option<String>| text.as_ref().and_then(|text| text.parse::<u64>().ok());
    let time =
        |text: &Option<String>| text.as_ref().and_then(|text| text.parse::<Timestamp>().ok());
    let volume_size = number(&found.volume_size).and_then(|gib| VolumeSize::from_gib(gib).ok());
    let volume_size = volume_size
        .ok_or_else(|| unreadable(format!("the size {:?} of {id}", found.volume_size)))?;
    let (state, state_message) = match &*found.status {
        "completed" if found.is_archived() => (
            SnapshotState::Archived,
            Some("restore it first, with `aws ec2 restore-snapshot-tier`".to_owned()),
        ),
        "completed" => (SnapshotState::Completed, None),
        "pending" => (SnapshotState::Pending, found.progress.filter(|progress| progress != "0%")),
        "" => (SnapshotState::Error, Some("no state".to_owned())),
        other => (SnapshotState::Error, found.status_message.or(Some(other.to_owned()))),
    };
    // Zeros that were written are in it too, and only a listing tells how many.
    let full = number(&found.full_snapshot_size_in_bytes).filter(|bytes| *bytes > 0);
    let full = full.map(|bytes| bytes.div_ceil(BLOCK_SIZE_U64));
    let (start_time, completion_time) = (time(&found.start_time), time(&found.completion_time));
    let tags = found.tags.into_iter().filter(|tag| !tag.key.is_empty());
    let tags = tags.map(|tag| (tag.key, tag.value.unwrap_or_default()));
    let mut tags: Tags = tags.collect();
    let volume = tags.remove(VOLUME_TAG);
    let parent = tags.remove(PARENT_TAG).and_then(|id| id.parse().ok());
    let mut snapshot = Snapshot {
        id,
        state,
        state_message: state_message.filter(|message| !message.is_empty()),
        volume_size,
        parent,
        lineage: None,
        volume_id: found.volume_id.filter(|id| !id.is_empty() && id != NO_VOLUME).or(volume),
        description: found.description.unwrap_or_default(),
        start_time: start_time.unwrap_or(Timestamp::UNIX_EPOCH),
        completion_time,
        tags,
        encrypted: found.encrypted.as_deref() == Some("true"),
        content_digest: None,
        data_blocks: full.filter(|_| state == SnapshotState::Completed),
        zero_blocks: None,
    };
    snapshot.content_digest = snapshot.noted_digest();
    Ok(snapshot)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(more: &str) -> Result<Snapshot> {
        let text = format!(
            "<DescribeSnapshotsResponse><snapshotSet><item><snapshotId>snap-01</snapshotId>\
             <status>completed</status><volumeSize>8</volumeSize>{more}</item></snapshotSet>\
             </DescribeSnapshotsResponse>"
        );
        let mut found: ec2::Snapshots = quick_xml::de::from_str(&text).unwrap();
        snapshot(found.snapshots.remove(0))
    }

    #[test]
    fn more_about_a_snapshot_than_there_can_be_is_refused() {
        let tags = |count: usize, value: usize| {
            let tag =
                |n| format!("<item><key>{n}</key><value>{}</value></item>", "v".repeat(value));
            format!("<tagSet>{}</tagSet>", (0..count).map(tag).collect::<String>())
        };
        let text = |len: usize| format!("<description>{}</description>", "d".repeat(len));
        for good in [tags(60, 256), text(255), String::new()] {
            assert!(described(&good).is_ok(), "{good}");
        }
        for bad in [tags(101, 1), tags(1, 5000), text(5000)] {
            let error = described(&bad).unwrap_err();
            assert!(error.to_string().len() < 200, "{error}");
        }
    }
}
