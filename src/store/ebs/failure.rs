//! What a request to AWS can end with, and what may be done about it.
//!
//! Classes are those of <https://docs.aws.amazon.com/ebs/latest/userguide/error-retries.html>.

use std::fmt::{self, Write as _};
use std::time::Duration;

use aws_sdk_ebs::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_ebs::operation::RequestId;
use aws_smithy_runtime_api::client::result::DispatchFailure;

use super::limiter::Outcome;
use crate::store::{Error, ErrorKind, causes};

/// What can be done about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
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
    /// Again, within two minutes of the start of a snapshot, which not all of the service may have
    /// heard of; else there is none.
    NotFound,
    /// The credentials do not work, or there are none: again once they were read anew.
    Credentials,
    /// Not again: the kind says what it is.
    Final(ErrorKind),
}

/// A request that failed.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) class: Class,
    /// Whether it is what the service said.
    pub(super) answered: bool,
    /// Whether nothing came for as long as one waits.
    pub(super) silent: bool,
    text: String,
    request_id: Option<String>,
}

impl Failure {
    /// What is wrong with an answer.
    pub(super) fn new(class: Class, text: impl Into<String>) -> Self {
        Self { class, answered: true, silent: false, text: text.into(), request_id: None }
    }

    /// No answer within the time of one attempt.
    pub(super) fn timed_out(time: Duration) -> Self {
        let text = format!("there was no answer within {:.0} s", time.as_secs_f64());
        Self { answered: false, silent: true, ..Self::new(Class::Transient, text) }
    }

    /// Whether the service says this, in lower case.
    pub(super) fn mentions(&self, what: &str) -> bool {
        self.text.to_ascii_lowercase().contains(what)
    }

    /// What the limiter learns from it.
    pub(super) fn outcome(&self) -> Outcome {
        match self.class {
            _ if self.silent => Outcome::Silence,
            _ if !self.answered => Outcome::Unanswered,
            Class::AccountThrottled => Outcome::AccountThrottled,
            Class::SnapshotThrottled => Outcome::SnapshotThrottled,
            Class::Overloaded => Outcome::Overloaded,
            Class::Transient => Outcome::Failed,
            Class::Corrupt | Class::NotFound | Class::Credentials | Class::Final(_) => {
                Outcome::Answered
            }
        }
    }

    /// An error of an SDK. `reason` is what the service gives beside the code.
    pub(super) fn of_sdk<E>(error: &SdkError<E>, reason: Option<&str>) -> Self
    where
        E: std::error::Error + ProvideErrorMetadata + 'static,
    {
        let request_id = error.request_id().map(str::to_owned);
        let SdkError::ServiceError(service) = error else {
            let text = causes(error);
            // An answer that is not in the form of the service, from something in between.
            if let Some(status) = error.raw_response().map(|raw| raw.status().as_u16())
                && !(200..300).contains(&status)
            {
                let class = classify(status, "", None, "");
                let text = format!("status {status}, and no answer that the service would give");
                return Self { class, answered: true, silent: false, text, request_id };
            }
            // What cannot be built or signed will not be the next time either.
            let class = match error {
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
            let answered = matches!(error, SdkError::ResponseError(_));
            return Self { class, answered, silent: false, text, request_id };
        };
        let (code, message) = (service.err().code(), service.err().message());
        let status = service.raw().status().as_u16();
        let class = classify(status, code.unwrap_or(""), reason, message.unwrap_or(""));
        let code = code.map_or_else(|| format!("status {status}"), str::to_owned);
        let reason = reason.map_or(String::new(), |reason| format!(" ({reason})"));
        // Some services give a message with nothing in it.
        let message = message.filter(|message| !message.is_empty());
        let message = message.map_or(String::new(), |message| format!(": {message}"));
        let text = format!("{code}{reason}{message}");
        Self { class, answered: true, silent: false, text, request_id }
    }

    /// The kind of error that it is for whoever called.
    pub(super) fn kind(&self) -> ErrorKind {
        match self.class {
            Class::AccountThrottled | Class::SnapshotThrottled | Class::Overloaded => {
                ErrorKind::Throttled
            }
            Class::Transient => ErrorKind::Unavailable,
            Class::Corrupt => ErrorKind::Corrupt,
            Class::NotFound => ErrorKind::NotFound,
            Class::Credentials => ErrorKind::Denied,
            Class::Final(kind) => kind,
        }
    }

    /// The error of an operation that tried so often for so long.
    pub(super) fn after(&self, doing: impl fmt::Display, attempts: u32, time: Duration) -> Error {
        let tries = match attempts {
            0 | 1 => String::new(),
            n => format!(" after {n} attempts in {:.1} s", time.as_secs_f64()),
        };
        let cure = match self.class {
            Class::Credentials | Class::Final(ErrorKind::Denied) => {
                "; `fspfs doctor` shows which credentials are used and what they are allowed"
            }
            _ => "",
        };
        Error::new(self.kind(), format!("cannot {doing}{tries}: {self}{cure}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A terminal does what control characters say.
        for character in self.text.chars() {
            f.write_char(if character.is_control() { ' ' } else { character })?;
        }
        match &self.request_id {
            Some(id) => write!(f, " [request {id}]"),
            None => Ok(()),
        }
    }
}

/// Whether there is nobody to sign a request for: no provider has credentials.
fn is_credentials(failure: &DispatchFailure, text: &str) -> bool {
    !failure.is_io() && !failure.is_timeout() && text.contains("redentials")
}

/// Whether the certificate of the server is not trusted, or the proxy wants another password.
fn is_refused_on_the_way(text: &str) -> bool {
    text.contains("invalid peer certificate") || text.contains("proxy authorization required")
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
            | "InvalidClientTokenId"
            | "AuthFailure",
            _,
        ) => Class::Credentials,
        ("ResourceNotFoundException" | "InvalidSnapshot.NotFound", _) => Class::NotFound,
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
}
