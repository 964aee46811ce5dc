//! StartSnapshot.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use http::StatusCode;
use serde::{Deserialize, Serialize};

use super::super::endpoint::{Endpoint, KMS_TAG};
use super::super::gate::Payload;
use super::super::refusal::Refusal;
use super::{Answer, epoch, json, parameter, snapshot_id};
use crate::model::{
    BLOCK_SIZE_U64, Digester, MAX_DESCRIPTION_CHARS, Snapshot, Tags, VolumeSize, check_tags,
};
use crate::store::{ErrorKind, StartRequest};

/// Minutes without a put after which a snapshot turns to `error` (service model).
const TIMEOUTS: std::ops::RangeInclusive<u32> = 10..=4320;
const DEFAULT_TIMEOUT: u32 = 60;

/// Longest client token that a store takes; the service's own clients send 36.
const MAX_CLIENT_TOKEN: usize = 64;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Asked {
    volume_size: Option<i64>,
    parent_snapshot_id: Option<String>,
    tags: Option<Vec<Tag>>,
    description: Option<String>,
    client_token: Option<String>,
    encrypted: Option<bool>,
    kms_key_arn: Option<String>,
    timeout: Option<i64>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Tag {
    key: Option<String>,
    value: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Started<'a> {
    snapshot_id: &'a str,
    owner_id: &'a str,
    status: &'static str,
    start_time: f64,
    volume_size: u64,
    block_size: u64,
    description: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tags: Vec<Tag>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent_snapshot_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kms_key_arn: Option<&'a str>,
    sse_type: &'static str,
}

pub(in crate::serve) async fn start(
    State(endpoint): State<Arc<Endpoint>>,
    request: Request,
) -> Answer {
    let (mut parts, _) = request.into_parts();
    let body =
        parts.extensions.remove::<Payload>().map(|payload| payload.bytes).unwrap_or_default();
    let odd = |why: &dyn std::fmt::Display| {
        let message = format!("The body is not what StartSnapshot takes: {why}.");
        Refusal::new(StatusCode::BAD_REQUEST, "SerializationException", message)
    };
    // An array would do for a struct.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(odd(&"it is no JSON object"));
    }
    let asked: Asked = serde_json::from_slice(&body).map_err(|e| odd(&e))?;
    let mut request = asked.check(&endpoint)?;
    if let Some(parent) = &request.parent {
        let parent = endpoint.readable(parent).await?;
        // A child is encrypted as its parent is.
        if let Some(key) = parent.snapshot.tags.get(KMS_TAG) {
            request.tags.insert(KMS_TAG.to_owned(), key.clone());
        }
    }
    let mut started = endpoint.store.start(request.clone()).await;
    if let (Err(error), Some(key)) = (&started, &request.kms_key)
        && error.kind() == ErrorKind::Unsupported
    {
        // The store does not encrypt: then only the answers say so, as `docs/serve.md` tells.
        request.tags.insert(KMS_TAG.to_owned(), key.clone());
        request.encrypted = false;
        request.kms_key = None;
        started = endpoint.store.start(request.clone()).await;
    }
    let snapshot = started.map_err(|e| match e.kind() {
        ErrorKind::NotFound => match &request.parent {
            Some(parent) => Refusal::no_snapshot(parent),
            None => Refusal::of_store(&e, "INVALID_PARAMETER_VALUE"),
        },
        ErrorKind::Conflict => {
            let message = "The client token was used with other parameters.";
            Refusal::new(StatusCode::CONFLICT, "ConflictException", message)
        }
        _ => Refusal::of_store(&e, "INVALID_PARAMETER_VALUE"),
    })?;
    endpoint.forget(&snapshot.id);
    if let Some(faults) = &endpoint.faults {
        faults.started(&snapshot.id);
    }
    Ok(json(StatusCode::CREATED, &endpoint.describe_start(&snapshot)))
}

impl Endpoint {
    fn describe_start<'a>(&'a self, snapshot: &'a Snapshot) -> Started<'a> {
        let visible = snapshot.tags.iter().filter(|(key, _)| *key != KMS_TAG);
        let tag = |(key, value): (&String, &String)| Tag {
            key: Some(key.clone()),
            value: Some(value.clone()),
        };
        let kms_key_arn = snapshot.tags.get(KMS_TAG).map(String::as_str);
        Started {
            snapshot_id: snapshot.id.as_str(),
            owner_id: &self.account,
            status: self.state(snapshot).as_str(),
            start_time: epoch(snapshot.start_time),
            volume_size: snapshot.volume_size.gib(),
            block_size: BLOCK_SIZE_U64,
            description: &snapshot.description,
            tags: visible.map(tag).collect(),
            parent_snapshot_id: snapshot.parent.as_ref().map(crate::model::SnapshotId::as_str),
            sse_type: if kms_key_arn.is_some() { "sse-kms" } else { "none" },
            kms_key_arn,
        }
    }
}

impl Asked {
    fn check(self, endpoint: &Endpoint) -> Result<StartRequest, Refusal> {
        let invalid = |message: &str| Refusal::invalid("INVALID_PARAMETER_VALUE", message);
        let gib = self.volume_size.ok_or_else(|| invalid("VolumeSize is required."))?;
        let bad_size = || {
            let message = format!("The volume size {gib} is invalid; expected 1 to 65536 GiB.");
            Refusal::invalid("INVALID_VOLUME_SIZE", message)
        };
        let volume_size = u64::try_from(gib).ok().and_then(|gib| VolumeSize::from_gib(gib).ok());
        let timeout = self.timeout.unwrap_or(DEFAULT_TIMEOUT.into());
        let minutes = u32::try_from(timeout).ok().filter(|minutes| TIMEOUTS.contains(minutes));
        let minutes = minutes
            .ok_or_else(|| parameter("Timeout", &timeout.to_string(), "10 to 4320 minutes"))?;
        let description = self.description.unwrap_or_default();
        if description.chars().count() > MAX_DESCRIPTION_CHARS {
            return Err(invalid("Description has at most 255 characters."));
        }
        if let Some(token) = &self.client_token
            && (token.is_empty() || token.len() > MAX_CLIENT_TOKEN || !token.is_ascii())
        {
            return Err(parameter("ClientToken", token, "1 to 64 ASCII characters"));
        }
        let parent = self.parent_snapshot_id.as_deref().map(snapshot_id).transpose()?;
        let encrypted = self.encrypted.unwrap_or(false);
        if encrypted && parent.is_some() {
            return Err(invalid(
                "Encrypted cannot be given with ParentSnapshotId: a child is encrypted as its parent is.",
            ));
        }
        if let Some(key) = &self.kms_key_arn {
            if !encrypted {
                return Err(invalid("KmsKeyArn needs Encrypted to be true."));
            }
            if !is_key_arn(key) {
                let message = format!("The KMS key {key:?} is not the ARN of a key.");
                return Err(Refusal::invalid("INVALID_CUSTOMER_KEY", message));
            }
        }
        let by_default = || {
            let Endpoint { region, account, .. } = endpoint;
            format!("arn:aws:kms:{region}:{account}:key/00000000-0000-0000-0000-000000000000")
        };
        let mut request = StartRequest {
            parent,
            tags: tags(self.tags.unwrap_or_default())?,
            description,
            client_token: self.client_token,
            encrypted,
            kms_key: encrypted.then(|| self.kms_key_arn.unwrap_or_else(by_default)),
            timeout: Some(Duration::from_secs(60 * u64::from(minutes))),
            ..StartRequest::new(volume_size.ok_or_else(bad_size)?)
        };
        // A second start with the client token has to be for the same in every parameter.
        request.origin = Some(format!("StartSnapshot {}", digest(&request)));
        Ok(request)
    }
}

/// Tells requests apart, whatever else their client tokens say.
fn digest(request: &StartRequest) -> String {
    let StartRequest {
        volume_size, parent, tags, description, encrypted, kms_key, timeout, ..
    } = request;
    let minutes = timeout.map(|timeout| timeout.as_secs() / 60);
    let all = (volume_size, parent, tags, description, encrypted, kms_key, minutes);
    let mut digester = Digester::default();
    digester.update(serde_json::to_vec(&all).expect("plain data"));
    digester.finish().to_hex()[..32].to_owned()
}

fn tags(asked: Vec<Tag>) -> Result<Tags, Refusal> {
    let invalid = |message: String| Refusal::invalid("INVALID_TAG", message);
    let mut tags = Tags::new();
    for Tag { key, value } in asked {
        let key = key.ok_or_else(|| invalid("A tag needs a key.".to_owned()))?;
        if is_reserved(&key) || key.starts_with("fspfs:serve:") {
            return Err(invalid(format!("The tag key {key:?} is reserved.")));
        }
        if tags.insert(key.clone(), value.unwrap_or_default()).is_some() {
            return Err(invalid(format!("The tag key {key:?} is there twice.")));
        }
    }
    check_tags(&tags).map_err(|e| invalid(format!("{e}.")))?;
    Ok(tags)
}

/// Keys that AWS keeps for itself, however they are written.
pub(in crate::serve) fn is_reserved(key: &str) -> bool {
    key.get(..4).is_some_and(|prefix| prefix.eq_ignore_ascii_case("aws:"))
}

fn is_key_arn(text: &str) -> bool {
    let parts: Vec<_> = text.splitn(6, ':').collect();
    matches!(parts[..], ["arn", partition, "kms", _, _, key]
        if partition.starts_with("aws") && (key.starts_with("key/") || key.starts_with("alias/")))
        && text.len() <= crate::model::MAX_TAG_VALUE_CHARS
}
