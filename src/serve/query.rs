//! The actions of EC2 and STS that clients of snapshots need: forms in, XML out.
//!
//! <https://docs.aws.amazon.com/AWSEC2/latest/APIReference/>, version 2016-11-15, and
//! <https://docs.aws.amazon.com/STS/latest/APIReference/>, version 2011-06-15.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use http::header::AUTHORIZATION;
use http::{HeaderMap, StatusCode};
use serde::Serialize;

use self::form::Form;
use self::xml::xml;
use super::endpoint::Endpoint;
use super::gate::{Action, Payload, RequestId};
use super::refusal::Refusal;
use crate::store::{Error, ErrorKind};

mod filter;
mod form;
mod regions;
mod snapshots;
mod tags;
mod xml;

/// What an action answers.
type Answer = Result<Response, Refusal>;

/// An action under way.
struct Call<'a> {
    endpoint: &'a Endpoint,
    form: Form,
    request: &'a RequestId,
}

/// Whether a request is signed for STS: its errors have a form of their own.
pub(super) fn is_sts(headers: &HeaderMap) -> bool {
    let header = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    header.is_some_and(|header| header.contains("/sts/aws4_request"))
}

pub(super) async fn answer(State(endpoint): State<Arc<Endpoint>>, request: Request) -> Response {
    let (mut parts, _) = request.into_parts();
    let bytes = parts.extensions.remove::<Payload>().map(|payload| payload.bytes);
    let request = parts.extensions.remove::<RequestId>().unwrap_or(RequestId(String::new()));
    let form = Form::of(parts.uri.query().unwrap_or(""), &bytes.unwrap_or_default());
    let name = form.get("Action").unwrap_or("").to_owned();
    let call = Call { endpoint: &endpoint, form, request: &request };
    let (action, answer) = match name.as_str() {
        "DescribeSnapshots" => ("DescribeSnapshots", snapshots::describe(&call).await),
        "DeleteSnapshot" => ("DeleteSnapshot", snapshots::delete(&call).await),
        "CreateTags" => ("CreateTags", tags::create(&call).await),
        "DeleteTags" => ("DeleteTags", tags::delete(&call).await),
        "DescribeTags" => ("DescribeTags", tags::describe(&call).await),
        "DescribeRegions" => ("DescribeRegions", regions::describe(&call)),
        "GetCallerIdentity" => ("GetCallerIdentity", regions::caller(&call)),
        "" => ("Query", Err(bad("MissingAction", "The request is missing the Action parameter."))),
        name => {
            let message = format!("The action {name} is not valid for this web service.");
            ("Query", Err(bad("InvalidAction", message)))
        }
    };
    let sts = name == "GetCallerIdentity" || is_sts(&parts.headers);
    let mut response = answer.unwrap_or_else(|refusal| {
        let mut response = refuse(&refusal, &request, sts);
        // The gate counts and logs it, and leaves its form.
        response.extensions_mut().insert(Refused(refusal));
        response
    });
    response.extensions_mut().insert(Action(action));
    response
}

/// A refusal that has its form already.
#[derive(Clone, Debug)]
pub(super) struct Refused(pub(super) Refusal);

fn bad(code: &'static str, message: impl Into<String>) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, code, message)
}

fn no_snapshot(id: impl std::fmt::Display) -> Refusal {
    bad("InvalidSnapshot.NotFound", format!("The snapshot '{id}' does not exist."))
}

fn of_store(error: &Error, id: impl std::fmt::Display) -> Refusal {
    match error.kind() {
        ErrorKind::NotFound => no_snapshot(id),
        ErrorKind::Invalid | ErrorKind::Unsupported => {
            bad("InvalidParameterValue", error.to_string())
        }
        ErrorKind::Conflict | ErrorKind::NotReady => bad("IncorrectState", error.to_string()),
        _ => Refusal::of_store(error, ""),
    }
}

impl Call<'_> {
    /// Refuses what is to be tried only, once everything about it was checked.
    fn check_dry_run(&self) -> Result<(), Refusal> {
        if self.form.flag("DryRun")? {
            let message = "Request would have succeeded, but DryRun flag is set.";
            return Err(Refusal::new(StatusCode::PRECONDITION_FAILED, "DryRunOperation", message));
        }
        Ok(())
    }

    fn xml(&self, root: &'static str, content: impl Serialize) -> Response {
        let answer = xml::Ec2 {
            xmlns: "http://ec2.amazonaws.com/doc/2016-11-15/",
            request_id: &self.request.0,
            content,
        };
        xml(StatusCode::OK, root, &answer)
    }

    /// The answer of an action that answers nothing else.
    fn done(&self, root: &'static str) -> Response {
        #[derive(Serialize)]
        struct Done {
            #[serde(rename = "return")]
            done: bool,
        }
        self.xml(root, Done { done: true })
    }
}

/// The form of an error. What all APIs have in common has other names here.
pub(super) fn refuse(refusal: &Refusal, request: &RequestId, sts: bool) -> Response {
    let (status, code) = match refusal.code.as_str() {
        "RequestThrottledException" | "ThrottlingException" if sts => (400, "Throttling"),
        "RequestThrottledException" | "ThrottlingException" => (503, "RequestLimitExceeded"),
        "InternalServerException" if sts => (500, "InternalFailure"),
        "InternalServerException" => (500, "InternalError"),
        "ServiceUnavailable" => (503, "Unavailable"),
        "AccessDeniedException" if sts => (403, "AccessDenied"),
        "AccessDeniedException" => (403, "UnauthorizedOperation"),
        "ResourceNotFoundException" => (400, "InvalidSnapshot.NotFound"),
        "ServiceQuotaExceededException" => (400, "ResourceLimitExceeded"),
        "ExpiredTokenException" if sts => (403, "ExpiredToken"),
        "ExpiredTokenException" => (400, "RequestExpired"),
        "MissingAuthenticationTokenException" if sts => (403, "MissingAuthenticationToken"),
        "UnrecognizedClientException" if sts => (403, "InvalidClientTokenId"),
        "InvalidSignatureException" if sts => (403, "SignatureDoesNotMatch"),
        "IncompleteSignatureException" if sts => (400, "IncompleteSignature"),
        "MissingAuthenticationTokenException"
        | "UnrecognizedClientException"
        | "InvalidSignatureException"
        | "IncompleteSignatureException" => (401, "AuthFailure"),
        code => (refusal.status.as_u16(), code),
    };
    let status = StatusCode::from_u16(status).expect("it is one of those above");
    let message = &refusal.message;
    if sts {
        let kind = if status.is_server_error() { "Receiver" } else { "Sender" };
        let error = xml::StsError { kind, code, message };
        let xmlns = "https://sts.amazonaws.com/doc/2011-06-15/";
        return xml(
            status,
            "ErrorResponse",
            &xml::StsErrors { xmlns, error, request_id: &request.0 },
        );
    }
    let errors = xml::Errors { error: xml::Error { code, message } };
    xml(status, "Response", &xml::Ec2Errors { errors, request_id: &request.0 })
}
