//! CreateTags, DeleteTags and DescribeTags.

use serde::Serialize;

use super::filter::Filters;
use super::snapshots::{parse_id, visible_tags};
use super::xml::Set;
use super::{Answer, Call, bad, of_store};
use crate::model::{MAX_TAGS, SnapshotId, Tags, check_tags};
use crate::serve::direct::is_reserved;
use crate::serve::direct::token::About;
use crate::serve::endpoint::KMS_TAG;
use crate::serve::refusal::Refusal;
use crate::store::page::list_all;

#[derive(Serialize)]
struct Described {
    #[serde(rename = "tagSet")]
    tags: Set<Item>,
    #[serde(rename = "nextToken", skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Item {
    resource_id: String,
    resource_type: &'static str,
    key: String,
    value: String,
}

/// The snapshots that are to be tagged, each of which has to be there.
async fn resources(call: &Call<'_>) -> Result<Vec<SnapshotId>, Refusal> {
    let ids = call.form.list("ResourceId")?;
    if ids.is_empty() {
        let message = "The request must contain the parameter resourceIdSet";
        return Err(bad("MissingParameter", message));
    }
    let mut found = Vec::with_capacity(ids.len());
    for text in ids {
        if !text.starts_with("snap-") {
            return Err(bad("InvalidID", format!("The ID '{text}' is not valid")));
        }
        let id = parse_id(text)?;
        call.endpoint.store.describe(&id).await.map_err(|e| of_store(&e, &id))?;
        found.push(id);
    }
    Ok(found)
}

fn check_key(key: &str) -> Result<(), Refusal> {
    if is_reserved(key) || key == KMS_TAG {
        let message = format!(
            "Tag keys starting with 'aws:' are reserved for internal use, and so is '{KMS_TAG}'"
        );
        return Err(bad("InvalidParameterValue", message));
    }
    Ok(())
}

/// Changes the tags of each of `ids`.
async fn change(
    call: &Call<'_>,
    ids: Vec<SnapshotId>,
    with: impl Fn(&mut Tags),
) -> Result<(), Refusal> {
    let _one_at_a_time = call.endpoint.tagging.lock().await;
    for id in ids {
        let failed = |e: crate::store::Error| of_store(&e, &id);
        let mut tags = call.endpoint.store.describe(&id).await.map_err(failed)?.tags;
        let before = tags.clone();
        with(&mut tags);
        if tags.len() > MAX_TAGS {
            let message = format!("The maximum number of tags per resource is {MAX_TAGS}.");
            return Err(bad("TagLimitExceeded", message));
        }
        check_tags(&tags).map_err(|e| bad("InvalidParameterValue", format!("{e}")))?;
        if tags != before {
            call.endpoint.store.set_tags(&id, tags).await.map_err(failed)?;
            call.endpoint.forget(&id);
        }
    }
    Ok(())
}

pub(super) async fn create(call: &Call<'_>) -> Answer {
    let tags = call.form.tags("Tag")?;
    if tags.is_empty() {
        return Err(bad("MissingParameter", "The request must contain the parameter tagSet"));
    }
    for (key, _) in &tags {
        check_key(key)?;
    }
    let ids = resources(call).await?;
    call.check_dry_run()?;
    let add = |all: &mut Tags| {
        all.extend(tags.iter().map(|(k, v)| (k.clone(), v.clone().unwrap_or_default())));
    };
    change(call, ids, add).await?;
    Ok(call.done("CreateTagsResponse"))
}

pub(super) async fn delete(call: &Call<'_>) -> Answer {
    let tags = call.form.tags("Tag")?;
    for (key, _) in &tags {
        check_key(key)?;
    }
    let ids = resources(call).await?;
    call.check_dry_run()?;
    let remove = |all: &mut Tags| {
        // Without a list all go; without a value, whatever it is.
        let goes = |key: &String, value: &String| {
            let named = |(k, v): &(String, Option<String>)| {
                k == key && v.as_ref().is_none_or(|v| v == value)
            };
            key != KMS_TAG && (tags.is_empty() || tags.iter().any(named))
        };
        all.retain(|key, value| !goes(key, value));
    };
    change(call, ids, remove).await?;
    Ok(call.done("DeleteTagsResponse"))
}

pub(super) async fn describe(call: &Call<'_>) -> Answer {
    let known = |name: &str| {
        ["key", "resource-id", "resource-type", "value"].contains(&name) || name.starts_with("tag:")
    };
    let filters = Filters::of(&call.form, known)?;
    let max = call.form.max_results()?.unwrap_or(usize::MAX);
    call.check_dry_run()?;
    let about = About::Query("DescribeTags");
    let behind = match call.form.get("NextToken").filter(|token| !token.is_empty()) {
        Some(token) => {
            let inner = call.endpoint.tokens.open(about, token);
            let text = inner.and_then(|inner| String::from_utf8(inner).ok());
            let place = text.as_deref().and_then(|text| text.split_once(' '));
            let (id, nth) = place.ok_or_else(|| {
                bad("InvalidParameterValue", "The nextToken is not valid, or has expired.")
            })?;
            Some((id.to_owned(), nth.parse::<usize>().unwrap_or(0)))
        }
        None => None,
    };
    let mut items = Vec::new();
    let mut last = None;
    for snapshot in all(call).await? {
        for (nth, (key, value)) in visible_tags(&snapshot).enumerate() {
            let place = (snapshot.id.to_string(), nth);
            if behind.as_ref().is_some_and(|behind| place <= *behind) {
                continue;
            }
            let values = |name: &str| match name {
                "key" => vec![key.clone()],
                "value" => vec![value.clone()],
                "resource-id" => vec![snapshot.id.to_string()],
                "resource-type" => vec!["snapshot".to_owned()],
                _ => name
                    .strip_prefix("tag:")
                    .filter(|wanted| wanted == key)
                    .map_or_else(Vec::new, |_| vec![value.clone()]),
            };
            if !filters.match_all(values) {
                continue;
            }
            if items.len() == max {
                let next = last.and_then(|(id, nth): (String, usize)| {
                    call.endpoint.tokens.seal(about, format!("{id} {nth}").as_bytes())
                });
                let described = Described { tags: Set { item: items }, next };
                return Ok(call.xml("DescribeTagsResponse", described));
            }
            items.push(Item {
                resource_id: place.0.clone(),
                resource_type: "snapshot",
                key: key.clone(),
                value: value.clone(),
            });
            last = Some(place);
        }
    }
    Ok(call.xml("DescribeTagsResponse", Described { tags: Set { item: items }, next: None }))
}

/// All snapshots with tags, in the order of their ids.
async fn all(call: &Call<'_>) -> Result<Vec<crate::model::Snapshot>, Refusal> {
    let mut found = list_all(&*call.endpoint.store).await.map_err(|e| of_store(&e, "?"))?;
    found.retain(|snapshot| !snapshot.tags.is_empty());
    found.sort_unstable_by(|a, b| a.id.cmp(&b.id));
    Ok(found)
}
