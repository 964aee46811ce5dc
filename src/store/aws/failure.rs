//! What a request to AWS can end with, and what may be done about it.
//!
//! Classes are those of <https://docs.aws.amazon.com/ebs/latest/userguide/error-retries.html>.

use std::error::Error as StdError;
use std::fmt::{self, Write as _};
use std::io;
use std::time::Duration;

use aws_sdk_ebs::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_ebs::operation::RequestId;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::client::result::DispatchFailure;

use crate::shown::is_hidden;
use crate::store::request::Outcome;
use crate::store::{Error, ErrorKind, causes};

/// Reasons that lie with the key of an encrypted snapshot: it is gone, disabled, or not for us.
const OF_THE_KEY: [&str; 4] = [
    "INVALID_CUSTOMER_KEY",
    "DEPENDENCY_RESOURCE_NOT_FOUND",
    "DEPENDENCY_ACCESS_DENIED",
    "GRANT_NOT_FOUND",
];

/// Characters of an answer of something else that are shown.
const MAX_SHOWN: usize = 120;

/// What to do where nothing is answered, and where nothing is taken, as the end of a message.
pub(crate) const SILENT: &str = "; `fspfs doctor` shows whether the service can be reached";
pub(crate) const TOO_MUCH: &str =
    "; something else may use up what the account may send: try again when it is done";

/// What can be done about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// The account had too many requests: slower, and again.
    AccountThrottled,
    /// The snapshot had too many.
    SnapshotThrottled,
    /// There were too many at the same time.
    Overloaded,
    /// Again, as it is.
    Transient,
    /// Data that is not what its checksum says: again, it may have been spoilt on the way.
    Corrupt,
    /// An answer that is none of the service's: again, but not often, since something else may answer
    /// in its place.
    Foreign,
    /// Again, within two minutes of the start of a snapshot, which not all of the service may have
    /// heard of; else there is none.
    NotFound,
    /// The credentials do not work, or there are none: again once they were read anew.
    Credentials,
    /// Not again: the kind says what it is.
    Final(ErrorKind),
}

/// Why there was no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoAnswer {
    /// The name of the host leads nowhere.
    Name,
    /// Nobody listens.
    Nobody,
    /// No connection came about in time.
    Connection,
    /// A connection came about, and nothing came for as long as one waits.
    Silence,
    /// Not the TLS that is asked for, or nobody to be trusted.
    Tls,
    /// The proxy refused.
    Proxy,
    /// Something else.
    Other,
}

/// A request that failed.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) class: Class,
    /// Why the service said nothing; `None` if it answered.
    pub(crate) no_answer: Option<NoAnswer>,
    /// The code of a refusal, or its status.
    code: Option<String>,
    /// Whether something else than the service seems to have refused.
    foreign: bool,
    text: String,
    request_id: Option<String>,
}

impl Failure {
    /// What is wrong with an answer.
    pub(crate) fn new(class: Class, text: impl Into<String>) -> Self {
        let text = text.into();
        Self { class, no_answer: None, code: None, foreign: false, text, request_id: None }
    }

    /// No answer within the time of one attempt.
    pub(crate) fn timed_out(time: Duration) -> Self {
        let text = format!("there was no answer within {:.0} s", time.as_secs_f64());
        Self { no_answer: Some(NoAnswer::Silence), ..Self::new(Class::Transient, text) }
    }

    /// The code with which the service refused, or the status where it gave none.
    pub(crate) fn code(&self) -> Option<&str> {
        self.code.as_deref()
    }

    /// A refusal with this code.
    #[cfg(test)]
    pub(crate) fn refused(code: &str) -> Self {
        let class = classify(400, code, None, "");
        Self { code: Some(code.to_owned()), ..Self::new(class, code) }
    }

    /// Whether the service says that this is not allowed.
    pub(crate) fn is_denial(&self) -> bool {
        self.code().is_some_and(|c| c.contains("AccessDenied") || c == "UnauthorizedOperation")
    }

    /// Whether nothing came for as long as one waits.
    pub(crate) fn is_silence(&self) -> bool {
        self.no_answer == Some(NoAnswer::Silence)
    }

    /// Whether the service says this, in lower case.
    pub(crate) fn mentions(&self, what: &str) -> bool {
        self.text.to_ascii_lowercase().contains(what)
    }

    /// Whether the service itself has refused: else what was asked for may be done all the same.
    pub(crate) fn is_verdict(&self) -> bool {
        self.no_answer.is_none()
            && !self.foreign
            && !matches!(self.class, Class::Transient | Class::Foreign)
    }

    /// What the limiter learns from it.
    pub(crate) fn outcome(&self) -> Outcome {
        match self.class {
            _ if self.is_silence() => Outcome::Silence,
            _ if self.no_answer.is_some() => Outcome::Unanswered,
            Class::AccountThrottled => Outcome::AccountThrottled,
            Class::SnapshotThrottled => Outcome::SnapshotThrottled,
            Class::Overloaded => Outcome::Overloaded,
            Class::Transient | Class::Foreign => Outcome::Failed,
            Class::Corrupt | Class::NotFound | Class::Credentials | Class::Final(_) => {
                Outcome::Answered
            }
        }
    }

    /// An error of an SDK. `reason` is what the service gives beside the code.
    pub(crate) fn of_sdk<E>(error: &SdkError<E>, reason: Option<&str>) -> Self
    where
        E: StdError + ProvideErrorMetadata + 'static,
    {
        let request_id = error.request_id().map(str::to_owned);
        let raw = error.raw_response();
        // What is left of an answer with a status of success cannot be read.
        let unread = raw.is_some_and(|raw| raw.status().is_success());
        let SdkError::ServiceError(service) = error else {
            if let Some(raw) = raw.filter(|_| !unread) {
                return Self { request_id, ..Self::of_foreign(raw) };
            }
            if unread && !is_cut(error) {
                return Self::unreadable(error, request_id);
            }
            let text = causes(error);
            let no_answer = match error {
                SdkError::ResponseError(_) => None,
                SdkError::TimeoutError(_) => Some(no_answer(error, NoAnswer::Silence)),
                SdkError::DispatchFailure(failure) if failure.is_timeout() => {
                    Some(no_answer(error, NoAnswer::Silence))
                }
                _ => Some(no_answer(error, NoAnswer::Other)),
            };
            let class = match error {
                // What cannot be built or signed will not be the next time either.
                SdkError::ConstructionFailure(_) => Class::Final(ErrorKind::Denied),
                SdkError::DispatchFailure(failure) if failure.is_user() => {
                    Class::Final(ErrorKind::Invalid)
                }
                SdkError::DispatchFailure(failure) if is_credentials(failure, &text) => {
                    Class::Credentials
                }
                SdkError::DispatchFailure(_) if is_refused_on_the_way(&text) => {
                    Class::Final(ErrorKind::Unavailable)
                }
                _ => Class::Transient,
            };
            return Self { no_answer, request_id, ..Self::new(class, text) };
        };
        if unread {
            return Self::unreadable(error, request_id);
        }
        let (code, message) = (service.err().code(), service.err().message());
        let status = service.raw().status().as_u16();
        let class = classify(status, code.unwrap_or(""), reason, message.unwrap_or(""));
        let code = code.map_or_else(|| format!("status {status}"), str::to_owned);
        let reason = reason.map_or(String::new(), |reason| format!(" ({reason})"));
        // Some services give a message with nothing in it.
        let message = message.filter(|message| !message.is_empty());
        let message = message.map_or(String::new(), |message| format!(": {message}"));
        let text = format!("{code}{reason}{message}");
        Self { code: Some(code), request_id, ..Self::new(class, text) }
    }

    /// An answer that the service says is a success, and that is not in its form.
    fn unreadable(error: &(dyn StdError + 'static), request_id: Option<String>) -> Self {
        let why = chain(error).last().map_or(String::new(), |cause| format!(": {cause}"));
        // It means its own parser.
        let why = why.replace(" This is likely a bug in the SDK.", "");
        let text = format!("the answer cannot be read{why}");
        Self { request_id, ..Self::new(Class::Foreign, text) }
    }

    /// A refusal that is not in the form of the service, from something in between.
    fn of_foreign(raw: &HttpResponse) -> Self {
        let status = raw.status().as_u16();
        let body = String::from_utf8_lossy(raw.body().bytes().unwrap_or_default());
        // Other services of AWS, and what speaks for them, refuse in XML.
        let [code, message] = ["Code", "Message"].map(|name| element(&body, name));
        let class = classify(status, code.unwrap_or(""), None, message.unwrap_or(""));
        let mut text = format!("status {status}, and no answer that the service would give");
        if let Some(place) = raw.headers().get("location") {
            text.push_str(&format!(" (it leads to {place})"));
        }
        let said: String = match (code, message) {
            (Some(code), message) => [code, message.unwrap_or("")].join(" "),
            (None, _) => body.split_whitespace().collect::<Vec<_>>().join(" "),
        };
        if !said.trim().is_empty() {
            let shown: String = said.trim().chars().take(MAX_SHOWN).collect();
            text.push_str(&format!(": {shown}"));
        }
        // What makes no sense to somebody else may be fine with the service.
        let class = if class == Class::Final(ErrorKind::Invalid) { Class::Foreign } else { class };
        Self { foreign: true, ..Self::new(class, text) }
    }

    /// The kind of error that it is for whoever called.
    pub(crate) fn kind(&self) -> ErrorKind {
        match self.class {
            Class::AccountThrottled | Class::SnapshotThrottled | Class::Overloaded => {
                ErrorKind::Throttled
            }
            Class::Transient | Class::Foreign => ErrorKind::Unavailable,
            Class::Corrupt => ErrorKind::Corrupt,
            Class::NotFound => ErrorKind::NotFound,
            Class::Credentials => ErrorKind::Credentials,
            Class::Final(kind) => kind,
        }
    }

    /// The error of an operation that tried so often for so long.
    pub(crate) fn after(&self, doing: impl fmt::Display, attempts: u32, time: Duration) -> Error {
        let told = self.told(doing, attempts, time);
        Error::new(self.kind(), format!("{told}{}", self.cure()))
    }

    /// What failed like this, without what to do about it.
    pub(crate) fn told(&self, doing: impl fmt::Display, attempts: u32, time: Duration) -> String {
        let tries = match attempts {
            0 | 1 => String::new(),
            n => format!(" after {n} attempts in {:.1} s", time.as_secs_f64()),
        };
        format!("cannot {doing}{tries}: {self}")
    }

    /// What one may do about it, as the end of a message.
    fn cure(&self) -> &'static str {
        match self.class {
            _ if self.code() == Some("InvalidObjectState") => {
                "; it is of an archive class, and can be read when it was restored there"
            }
            _ if self.code() == Some("RequestTimeTooSkewed") => "; set the clock of this host",
            _ if self.code() == Some("NoSuchBucket") => {
                "; name a bucket that there is: fspfs makes none"
            }
            Class::Final(ErrorKind::Denied) if OF_THE_KEY.iter().any(|r| self.text.contains(r)) => {
                "; it is about the KMS key of the snapshot, which has to be enabled, with the rights that docs/iam.md names"
            }
            Class::Credentials | Class::Final(ErrorKind::Denied) => {
                "; `fspfs doctor` shows which credentials are used and what they are allowed"
            }
            Class::Foreign => {
                "; does something else answer in the place of the service? `fspfs doctor` shows where it is"
            }
            Class::SnapshotThrottled => {
                "; something else may read or write this snapshot: try again when it is done"
            }
            Class::AccountThrottled | Class::Overloaded => TOO_MUCH,
            Class::Transient if self.no_answer.is_some() => SILENT,
            Class::Transient => "; the service has trouble: try again later",
            Class::NotFound => "; `fspfs list` shows what there is in this region and account",
            Class::Final(ErrorKind::Quota) => {
                "; delete what is not needed any more, or ask AWS for a higher quota"
            }
            Class::Corrupt | Class::Final(_) => "",
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A terminal does what control characters say.
        for character in self.text.chars() {
            f.write_char(if is_hidden(character) { ' ' } else { character })?;
        }
        match &self.request_id {
            Some(id) => write!(f, " [request {id}]"),
            None => Ok(()),
        }
    }
}

fn chain<'a>(
    error: &'a (dyn StdError + 'static),
) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(error.source(), |error| (*error).source())
}

/// Whether the connection ended before the answer did.
fn is_cut(error: &(dyn StdError + 'static)) -> bool {
    chain(error).any(|cause| cause.is::<hyper::Error>() || cause.is::<std::io::Error>())
}

/// The text of the first element of this name.
fn element<'a>(xml: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    Some(rest.split_once('<')?.0)
}

/// Whether there is nobody to sign a request for: no provider has credentials.
fn is_credentials(failure: &DispatchFailure, text: &str) -> bool {
    !failure.is_io() && !failure.is_timeout() && text.contains("redentials")
}

/// Whether the certificate of the server is not trusted, or the proxy wants another password.
fn is_refused_on_the_way(text: &str) -> bool {
    text.contains("invalid peer certificate") || text.contains("proxy authorization required")
}

/// Looks through the causes of an error for one that tells why there is no answer.
fn no_answer(error: &(dyn StdError + 'static), otherwise: NoAnswer) -> NoAnswer {
    let mut found = otherwise;
    for error in std::iter::once(error).chain(chain(error)) {
        let text = error.to_string();
        let says = |parts: [&str; 2]| parts.iter().any(|part| text.contains(part));
        if says(["dns error", "lookup address"]) {
            return NoAnswer::Name;
        }
        if text.contains("connect timeout") {
            return NoAnswer::Connection;
        }
        if says(["tunnel error", "proxy authorization"]) {
            return NoAnswer::Proxy;
        }
        if says(["certificate", "corrupt message"]) {
            return NoAnswer::Tls;
        }
        match error.downcast_ref::<io::Error>().map(io::Error::kind) {
            Some(io::ErrorKind::ConnectionRefused) => return NoAnswer::Nobody,
            Some(
                io::ErrorKind::TimedOut
                | io::ErrorKind::HostUnreachable
                | io::ErrorKind::NetworkUnreachable,
            ) => found = NoAnswer::Connection,
            _ => {}
        }
    }
    found
}

fn classify(status: u16, code: &str, reason: Option<&str>, message: &str) -> Class {
    use ErrorKind as Kind;
    match (code, reason) {
        (_, Some("RESOURCE_LEVEL_THROTTLE")) => Class::SnapshotThrottled,
        (
            "RequestThrottledException"
            | "ThrottlingException"
            | "Throttling"
            | "RequestLimitExceeded"
            | "ThrottledException"
            | "EC2ThrottledException"
            | "TooManyRequestsException"
            | "BandwidthLimitExceeded"
            | "PriorRequestNotComplete"
            | "SlowDown",
            _,
        ) => Class::AccountThrottled,
        ("ConcurrentLimitExceededException", _) => Class::Overloaded,
        (_, Some("INVALID_BLOCK_TOKEN" | "INVALID_PAGE_TOKEN")) => Class::Final(Kind::ExpiredToken),
        (_, Some("WRITE_REQUEST_TIMEOUT")) | ("RequestTimeout" | "RequestTimeoutException", _) => {
            Class::Transient
        }
        // The clock was off, the signature spoilt, or the key is another by now: signed again, with
        // what is valid then, it may be right.
        (
            "InvalidSignatureException"
            | "SignatureDoesNotMatch"
            | "ExpiredTokenException"
            | "ExpiredToken"
            | "RequestExpired"
            | "UnrecognizedClientException"
            | "InvalidAccessKeyId"
            | "InvalidToken"
            | "RequestTimeTooSkewed"
            | "InvalidClientTokenId"
            | "AuthFailure",
            _,
        ) => Class::Credentials,
        (_, Some(reason)) if OF_THE_KEY.contains(&reason) => Class::Final(Kind::Denied),
        (
            "ResourceNotFoundException" | "InvalidSnapshot.NotFound" | "NoSuchKey" | "NotFound",
            _,
        ) => Class::NotFound,
        ("NoSuchBucket", _) => Class::Final(Kind::Invalid),
        // A 400 that is none: documented as worth repeating.
        ("ValidationException", _) if message.contains("Failed to read block data") => {
            Class::Transient
        }
        ("ValidationException", Some("INVALID_SNAPSHOT_ID")) => Class::Final(Kind::NotReady),
        ("ConflictException" | "IncorrectState" | "InvalidSnapshot.InUse", _) => {
            Class::Final(Kind::Conflict)
        }
        (
            "ServiceQuotaExceededException"
            | "SnapshotLimitExceeded"
            | "PendingSnapshotLimitExceeded",
            _,
        ) => Class::Final(Kind::Quota),
        (_, _) if status >= 500 || status == 408 || status == 429 => Class::Transient,
        (_, _) if status == 401 || status == 403 => Class::Final(Kind::Denied),
        ("UnauthorizedOperation" | "OptInRequired" | "AccessDeniedException", _) => {
            Class::Final(Kind::Denied)
        }
        (_, _) if status == 402 => Class::Final(Kind::Quota),
        _ => Class::Final(Kind::Invalid),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_those_of_the_documentation() {
        use ErrorKind as Kind;
        for (status, code, reason, message, class) in [
            (500, "InternalServerException", None, "", Class::Transient),
            (
                400,
                "RequestThrottledException",
                Some("ACCOUNT_THROTTLED"),
                "",
                Class::AccountThrottled,
            ),
            (
                400,
                "RequestThrottledException",
                Some("RESOURCE_LEVEL_THROTTLE"),
                "",
                Class::SnapshotThrottled,
            ),
            (400, "ConcurrentLimitExceededException", None, "", Class::Overloaded),
            (400, "ThrottlingException", None, "", Class::AccountThrottled),
            (503, "RequestLimitExceeded", None, "", Class::AccountThrottled),
            (400, "ValidationException", None, "Failed to read block data", Class::Transient),
            (400, "ValidationException", Some("INVALID_BLOCK"), "x", Class::Final(Kind::Invalid)),
            (
                400,
                "ValidationException",
                Some("INVALID_PAGE_TOKEN"),
                "",
                Class::Final(Kind::ExpiredToken),
            ),
            (404, "ResourceNotFoundException", Some("SNAPSHOT_NOT_FOUND"), "", Class::NotFound),
            (
                404,
                "ResourceNotFoundException",
                Some("DEPENDENCY_RESOURCE_NOT_FOUND"),
                "",
                Class::Final(Kind::Denied),
            ),
            (
                400,
                "ValidationException",
                Some("INVALID_CUSTOMER_KEY"),
                "",
                Class::Final(Kind::Denied),
            ),
            (400, "InvalidSnapshot.NotFound", None, "", Class::NotFound),
            (403, "AccessDeniedException", None, "", Class::Final(Kind::Denied)),
            (401, "AuthFailure", None, "", Class::Credentials),
            (403, "ExpiredTokenException", None, "", Class::Credentials),
            (403, "UnauthorizedOperation", None, "", Class::Final(Kind::Denied)),
            (402, "ServiceQuotaExceededException", None, "", Class::Final(Kind::Quota)),
            (409, "ConflictException", None, "", Class::Final(Kind::Conflict)),
            (403, "InvalidSignatureException", None, "", Class::Credentials),
            (502, "", None, "", Class::Transient),
            (403, "", None, "", Class::Final(Kind::Denied)),
            (301, "", None, "", Class::Final(Kind::Invalid)),
            (400, "SomethingNew", None, "", Class::Final(Kind::Invalid)),
        ] {
            assert_eq!(classify(status, code, reason, message), class, "{code} {reason:?}");
        }
    }

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        source: Option<io::Error>,
    }

    #[test]
    fn tells_reasons_for_no_answer_apart() {
        let of = |text: &'static str, kind: Option<io::ErrorKind>| {
            let layer = Layer { text, source: kind.map(io::Error::from) };
            no_answer(&layer, NoAnswer::Other)
        };
        let refused = Some(io::ErrorKind::ConnectionRefused);
        assert_eq!(of("tcp connect error", refused), NoAnswer::Nobody);
        assert_eq!(of("dns error", None), NoAnswer::Name);
        assert_eq!(of("HTTP connect timeout occurred after 5s", None), NoAnswer::Connection);
        assert_eq!(of("tunnel error: unsuccessful", None), NoAnswer::Proxy);
        assert_eq!(of("invalid peer certificate: UnknownIssuer", None), NoAnswer::Tls);
        let late = Some(io::ErrorKind::TimedOut);
        assert_eq!(of("tcp connect error", late), NoAnswer::Connection);
        assert_eq!(of("unexpected end", None), NoAnswer::Other);
        let layer = Layer { text: "x", source: None };
        assert_eq!(no_answer(&layer, NoAnswer::Silence), NoAnswer::Silence);
    }

    #[test]
    fn denials_are_known() {
        let refused = Failure::refused;
        assert!(refused("UnauthorizedOperation").is_denial());
        assert!(refused("AccessDeniedException").is_denial());
        assert!(!refused("AuthFailure").is_denial());
        assert!(!Failure::new(Class::Transient, "AccessDenied").is_denial());
    }
}
