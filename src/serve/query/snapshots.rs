//! DescribeSnapshots and DeleteSnapshot.

use axum::response::Response;
use jiff::Timestamp;
use serde::Serialize;

use super::filter::Filters;
use super::xml::Set;
use super::{Answer, Call, bad, of_store};
use crate::model::{BLOCK_SIZE_U64, Snapshot, SnapshotId, SnapshotState};
use crate::serve::direct::token::About;
use crate::serve::endpoint::{Endpoint, KMS_TAG};
use crate::serve::refusal::Refusal;
use crate::store::{ErrorKind, ListToken};

/// Filters by name; `tag:<key>` beside them.
const FILTERS: [&str; 14] = [
    "description",
    "encrypted",
    "owner-alias",
    "owner-id",
    "progress",
    "snapshot-id",
    "start-time",
    "status",
    "storage-tier",
    "tag-key",
    "transfer-type",
    "volume-id",
    "volume-size",
    "completion-time",
];

#[derive(Serialize)]
struct Described {
    #[serde(rename = "snapshotSet")]
    snapshots: Set<Item>,
    #[serde(rename = "nextToken", skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Item {
    snapshot_id: String,
    volume_id: String,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    status_message: Option<String>,
    start_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    completion_time: Option<String>,
    progress: &'static str,
    owner_id: String,
    volume_size: u64,
    description: String,
    encrypted: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    kms_key_id: Option<String>,
    storage_tier: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    full_snapshot_size_in_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tag_set: Option<Set<Tag>>,
}

#[derive(Serialize)]
struct Tag {
    key: String,
    value: String,
}

/// The volume of a snapshot that was not taken of one (EC2 user guide: an arbitrary id that should
/// not be used for any purpose).
const NO_VOLUME: &str = "vol-ffffffff";

/// A time as EC2 writes it.
fn iso(time: Timestamp) -> String {
    format!("{time:.3}")
}

/// Tags that clients see.
pub(super) fn visible_tags(snapshot: &Snapshot) -> impl Iterator<Item = (&String, &String)> {
    snapshot.tags.iter().filter(|(key, _)| *key != KMS_TAG)
}

impl Item {
    fn of(snapshot: &Snapshot, endpoint: &Endpoint) -> Self {
        let state = endpoint.state(snapshot);
        let done = state == SnapshotState::Completed;
        let tag = |(key, value): (&String, &String)| Tag { key: key.clone(), value: value.clone() };
        let tags: Set<Tag> = visible_tags(snapshot).map(tag).collect();
        Self {
            snapshot_id: snapshot.id.to_string(),
            volume_id: snapshot.volume_id.clone().unwrap_or_else(|| NO_VOLUME.to_owned()),
            status: state.as_str(),
            status_message: snapshot
                .state_message
                .clone()
                .filter(|_| state == SnapshotState::Error),
            start_time: iso(snapshot.start_time),
            completion_time: snapshot.completion_time.filter(|_| done).map(iso),
            progress: if done { "100%" } else { "0%" },
            owner_id: endpoint.account.clone(),
            volume_size: snapshot.volume_size.gib(),
            description: snapshot.description.clone(),
            encrypted: snapshot.encrypted || snapshot.tags.contains_key(KMS_TAG),
            kms_key_id: snapshot.tags.get(KMS_TAG).cloned(),
            storage_tier: "standard",
            full_snapshot_size_in_bytes: snapshot
                .data_blocks
                .map(|blocks| (blocks + snapshot.zero_blocks.unwrap_or(0)) * BLOCK_SIZE_U64)
                .filter(|_| done),
            tag_set: (!tags.item.is_empty()).then_some(tags),
        }
    }

    /// The values that a filter looks at.
    fn values(&self, filter: &str) -> Vec<String> {
        let tags = || self.tag_set.iter().flat_map(|set| &set.item);
        let one = |text: &str| vec![text.to_owned()];
        match filter {
            "description" => one(&self.description),
            "encrypted" => one(&self.encrypted.to_string()),
            "owner-id" => one(&self.owner_id),
            "progress" => one(self.progress),
            "snapshot-id" => one(&self.snapshot_id),
            "start-time" => one(&self.start_time),
            "completion-time" => self.completion_time.iter().cloned().collect(),
            "status" => one(self.status),
            "storage-tier" => one(self.storage_tier),
            "transfer-type" => one("standard"),
            "volume-id" => one(&self.volume_id),
            "volume-size" => one(&self.volume_size.to_string()),
            "tag-key" => tags().map(|tag| tag.key.clone()).collect(),
            _ => match filter.strip_prefix("tag:") {
                Some(key) => {
                    tags().filter(|tag| tag.key == key).map(|tag| tag.value.clone()).collect()
                }
                // `owner-alias`: nobody here has one.
                None => Vec::new(),
            },
        }
    }
}

/// A snapshot id in a form.
pub(super) fn parse_id(text: &str) -> Result<SnapshotId, Refusal> {
    text.parse().map_err(|_| bad("InvalidSnapshotID.Malformed", format!("Invalid id: \"{text}\"")))
}

pub(super) async fn describe(call: &Call<'_>) -> Answer {
    let form = &call.form;
    let filters = Filters::of(form, |name| FILTERS.contains(&name) || name.starts_with("tag:"))?;
    let ids: Vec<_> =
        form.list("SnapshotId")?.into_iter().map(parse_id).collect::<Result<_, _>>()?;
    let max = form.max_results()?;
    if !ids.is_empty() && max.is_some() {
        let message = "The parameter snapshotSet cannot be used with the parameter maxResults";
        return Err(bad("InvalidParameterCombination", message));
    }
    call.check_dry_run()?;
    if !is_ours(call)? {
        return Ok(answer(call, Vec::new(), None));
    }
    let wanted = |item: &Item| filters.match_all(|name| item.values(name));
    if !ids.is_empty() {
        let mut items = Vec::with_capacity(ids.len());
        for id in ids {
            let snapshot = describe_one(call, &id).await?;
            items.push(Item::of(&snapshot, call.endpoint));
        }
        items.retain(wanted);
        return Ok(answer(call, items, None));
    }
    let (items, next) = list(call, max, wanted).await?;
    Ok(answer(call, items, next))
}

/// Describes a snapshot; one that is damaged as the list does.
async fn describe_one(call: &Call<'_>, id: &SnapshotId) -> Result<Snapshot, Refusal> {
    let error = match call.endpoint.store.describe(id).await {
        Err(error) if error.kind() == ErrorKind::Corrupt => error,
        described => return described.map_err(|e| of_store(&e, id)),
    };
    let mut token = None;
    loop {
        let page = call.endpoint.store.list(token).await.map_err(|e| of_store(&e, id))?;
        if let Some(found) = page.snapshots.into_iter().find(|snapshot| snapshot.id == *id) {
            return Ok(found);
        }
        token = Some(page.next.ok_or_else(|| of_store(&error, id))?);
    }
}

fn answer(call: &Call<'_>, items: Vec<Item>, next: Option<String>) -> Response {
    let described = Described { snapshots: Set { item: items }, next };
    call.xml("DescribeSnapshotsResponse", described)
}

/// Whether the owners that are asked for include the only one there is.
fn is_ours(call: &Call<'_>) -> Result<bool, Refusal> {
    let account = &call.endpoint.account;
    let is_us = |name: &&str| *name == "self" || *name == account.as_str();
    let owners = call.form.list("Owner")?;
    let restorable = call.form.list("RestorableBy")?;
    Ok((owners.is_empty() || owners.iter().any(is_us))
        && (restorable.is_empty() || restorable.iter().any(|name| is_us(name) || *name == "all")))
}

/// Where a list goes on: in the page of the store with this token, behind this snapshot.
#[derive(Default)]
struct Place {
    page: Option<ListToken>,
    behind: Option<SnapshotId>,
}

impl Place {
    fn encode(&self) -> Vec<u8> {
        let page = self.page.as_ref().map_or("", |page| page.0.as_str());
        let behind = self.behind.as_ref().map_or("", SnapshotId::as_str);
        format!("{behind} {page}").into_bytes()
    }

    fn decode(bytes: Vec<u8>) -> Option<Self> {
        let text = String::from_utf8(bytes).ok()?;
        let (behind, page) = text.split_once(' ')?;
        Some(Self {
            page: (!page.is_empty()).then(|| ListToken(page.to_owned())),
            behind: (!behind.is_empty()).then(|| behind.parse().ok()).flatten(),
        })
    }
}

/// The next `max` snapshots that are `wanted`, and what leads to the rest.
async fn list(
    call: &Call<'_>,
    max: Option<usize>,
    wanted: impl Fn(&Item) -> bool,
) -> Result<(Vec<Item>, Option<String>), Refusal> {
    let about = About::Query("DescribeSnapshots");
    let invalid = || bad("InvalidParameterValue", "The nextToken is not valid, or has expired.");
    let mut place = match call.form.get("NextToken").filter(|token| !token.is_empty()) {
        Some(token) => {
            let inner = call.endpoint.tokens.open(about, token).ok_or_else(invalid)?;
            Place::decode(inner).ok_or_else(invalid)?
        }
        None => Place::default(),
    };
    let max = max.unwrap_or(usize::MAX);
    let mut items = Vec::new();
    loop {
        let page = call.endpoint.store.list(place.page.clone()).await;
        let page = page.map_err(|e| of_store(&e, "?"))?;
        let mut snapshots = page.snapshots;
        snapshots.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        if let Some(behind) = &place.behind {
            snapshots.retain(|snapshot| snapshot.id > *behind);
        }
        for snapshot in &snapshots {
            let item = Item::of(snapshot, call.endpoint);
            if !wanted(&item) {
                continue;
            }
            if items.len() == max {
                let token = call.endpoint.tokens.seal(about, &place.encode());
                let too_long = || Refusal::internal("a list token of the store is too long");
                return Ok((items, Some(token.ok_or_else(too_long)?)));
            }
            items.push(item);
            place.behind = Some(snapshot.id.clone());
        }
        match page.next {
            Some(next) => place = Place { page: Some(next), behind: None },
            None => return Ok((items, None)),
        }
    }
}

pub(super) async fn delete(call: &Call<'_>) -> Answer {
    let missing = || bad("MissingParameter", "The request must contain the parameter snapshotId");
    let id = parse_id(call.form.get("SnapshotId").ok_or_else(missing)?)?;
    describe_one(call, &id).await?;
    call.check_dry_run()?;
    let deleted = call.endpoint.store.delete(&id).await;
    call.endpoint.forget(&id);
    deleted.map_err(|e| of_store(&e, &id))?;
    Ok(call.done("DeleteSnapshotResponse"))
}
