//! The form of answers.

use axum::body::Body;
use axum::response::Response;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, StatusCode};
use serde::Serialize;

/// An answer of EC2.
#[derive(Serialize)]
pub(super) struct Ec2<'a, T> {
    #[serde(rename = "@xmlns")]
    pub(super) xmlns: &'static str,
    #[serde(rename = "requestId")]
    pub(super) request_id: &'a str,
    #[serde(flatten)]
    pub(super) content: T,
}

/// A list, which has its members in elements named `item`.
#[derive(Serialize)]
pub(super) struct Set<T> {
    pub(super) item: Vec<T>,
}

impl<T> FromIterator<T> for Set<T> {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        Self { item: items.into_iter().collect() }
    }
}

#[derive(Serialize)]
pub(super) struct Ec2Errors<'a> {
    #[serde(rename = "Errors")]
    pub(super) errors: Errors<'a>,
    #[serde(rename = "RequestID")]
    pub(super) request_id: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Errors<'a> {
    pub(super) error: Error<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Error<'a> {
    pub(super) code: &'a str,
    pub(super) message: &'a str,
}

#[derive(Serialize)]
pub(super) struct StsErrors<'a> {
    #[serde(rename = "@xmlns")]
    pub(super) xmlns: &'static str,
    #[serde(rename = "Error")]
    pub(super) error: StsError<'a>,
    #[serde(rename = "RequestId")]
    pub(super) request_id: &'a str,
}

#[derive(Serialize)]
pub(super) struct StsError<'a> {
    #[serde(rename = "Type")]
    pub(super) kind: &'static str,
    #[serde(rename = "Code")]
    pub(super) code: &'a str,
    #[serde(rename = "Message")]
    pub(super) message: &'a str,
}

/// Whether a character may be in XML 1.0 at all, be it escaped or not.
fn is_allowed(c: char) -> bool {
    !matches!(c, '\0'..='\x08' | '\x0B' | '\x0C' | '\x0E'..='\x1F' | '\u{FFFE}' | '\u{FFFF}')
}

/// A response with `value` as the element `root`.
pub(super) fn xml(status: StatusCode, root: &str, value: &impl Serialize) -> Response {
    let body = quick_xml::se::to_string_with_root(root, value).expect("plain data");
    let text = format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n{body}");
    // One such character in one description would make the whole list unreadable.
    let text = text.replace(|c| !is_allowed(c), "\u{FFFD}");
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/xml;charset=UTF-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
