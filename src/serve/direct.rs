//! The EBS direct APIs: six operations, version 2019-11-02 of the service.
//!
//! Paths, headers, limits and errors are those of the service's model and its reference:
//! <https://docs.aws.amazon.com/ebs/latest/APIReference/>.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::response::{IntoResponse as _, Response};
use http::header::CONTENT_TYPE;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, StatusCode, Uri};
use serde::Serialize;

use super::refusal::Refusal;
use crate::model::{BlockIndex, Digest, SnapshotId};

mod blocks;
mod complete;
mod list;
mod start;
pub(super) mod token;

pub(super) use blocks::{get_block, put_block};
pub(super) use complete::complete;
pub(super) use list::{list_blocks, list_changed_blocks};
pub(super) use start::{is_reserved, start};

const CHECKSUM: &str = "x-amz-checksum";
const CHECKSUM_ALGORITHM: &str = "x-amz-checksum-algorithm";
const DATA_LENGTH: &str = "x-amz-data-length";

/// The only algorithm.
const SHA256: &str = "SHA256";

/// What an operation answers.
type Answer = Result<Response, Refusal>;

/// What is none of the operations.
pub(super) async fn unknown() -> Response {
    unknown_operation().into_response()
}

pub(super) fn unknown_operation() -> Refusal {
    let message = "The requested operation is not one of the EBS direct APIs.";
    Refusal::new(StatusCode::NOT_FOUND, "UnknownOperationException", message)
}

/// The form of an error: the code in a header, the message and the reason in JSON.
pub(super) fn refuse(refusal: &Refusal) -> Response {
    #[derive(Serialize)]
    #[serde(rename_all = "PascalCase")]
    struct Body<'a> {
        message: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<&'static str>,
    }
    let body = Body { message: &refusal.message, reason: refusal.reason };
    let mut response = json(refusal.status, &body);
    if let Ok(code) = HeaderValue::from_str(&refusal.code) {
        response.headers_mut().insert("x-amzn-errortype", code);
    }
    response
}

fn json(status: StatusCode, value: &impl Serialize) -> Response {
    let text = serde_json::to_vec(value).expect("plain data");
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The snapshot that a path names.
fn snapshot_id(text: &str) -> Result<SnapshotId, Refusal> {
    text.parse().map_err(|_| {
        let message = format!(
            "The value ({text:?}) for parameter snapshotId is invalid. Expected: 'snap-...'."
        );
        Refusal::invalid("INVALID_SNAPSHOT_ID", message)
    })
}

/// The block that a path or a parameter names.
fn block_index(text: &str) -> Result<BlockIndex, Refusal> {
    // The service has indexes up to 2^31 - 1; more than the largest volume has.
    match text.parse::<u32>() {
        Ok(index) if i32::try_from(index).is_ok() && text.bytes().all(|b| b.is_ascii_digit()) => {
            Ok(BlockIndex(index))
        }
        _ => Err(parameter("blockIndex", text, "a number, 0 or more")),
    }
}

/// A parameter that makes no sense.
fn parameter(name: &str, value: &str, expected: &str) -> Refusal {
    let message =
        format!("The value ({value:?}) for parameter {name} is invalid; expected {expected}.");
    Refusal::invalid("INVALID_PARAMETER_VALUE", message)
}

/// The parameters behind the question mark. The first one of a name counts.
struct Parameters(BTreeMap<String, String>);

impl Parameters {
    fn of(uri: &Uri) -> Self {
        let mut found = BTreeMap::new();
        for (name, value) in form_urlencoded::parse(uri.query().unwrap_or("").as_bytes()) {
            found.entry(name.into_owned()).or_insert(value.into_owned());
        }
        Self(found)
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }
}

/// A header that has to be ASCII text.
fn header<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>, Refusal> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    value.to_str().map(|text| Some(text.trim())).map_err(|_| parameter(name, "", "ASCII text"))
}

fn required<'a>(parts: &'a Parts, name: &str) -> Result<&'a str, Refusal> {
    header(&parts.headers, name)?.ok_or_else(|| {
        let message = format!("The header {name} is required.");
        Refusal::invalid("INVALID_PARAMETER_VALUE", message)
    })
}

/// A checksum, with the algorithm that must come with it.
fn checksum(parts: &Parts) -> Result<Digest, Refusal> {
    let algorithm = required(parts, CHECKSUM_ALGORITHM)?;
    if algorithm != SHA256 {
        return Err(parameter(CHECKSUM_ALGORITHM, algorithm, SHA256));
    }
    let text = required(parts, CHECKSUM)?;
    Digest::from_base64(text)
        .ok_or_else(|| parameter(CHECKSUM, text, "a SHA-256 in base64, 44 characters"))
}

/// Seconds since 1970, with milliseconds, as the service writes a time in JSON.
fn epoch(time: jiff::Timestamp) -> f64 {
    // Exact: today's times in milliseconds need 41 of 53 bits.
    #[expect(clippy::cast_precision_loss, reason = "see above")]
    let millis = time.as_millisecond() as f64;
    millis / 1000.0
}
