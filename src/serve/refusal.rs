//! What a client gets instead of what it asked for.

use axum::response::{IntoResponse, Response};
use http::StatusCode;

use crate::store::{Error, ErrorKind};

/// An error of the service: its status, its code and, for some, the reason in one word.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) code: String,
    pub(super) message: String,
    pub(super) reason: Option<&'static str>,
    /// What the client need not know, for the log.
    pub(super) detail: Option<String>,
}

impl Refusal {
    pub(super) fn new(
        status: StatusCode,
        code: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        Self { status, code: code.into(), message: message.into(), reason: None, detail: None }
    }

    #[must_use]
    pub(super) fn because(mut self, reason: &'static str) -> Self {
        self.reason = Some(reason);
        self
    }

    /// A request that breaks a rule of the service.
    pub(super) fn invalid(reason: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "ValidationException", message).because(reason)
    }

    /// Data of a block that is not what its checksum says.
    pub(super) fn spoilt_block() -> Self {
        Self::invalid("INVALID_BLOCK", "The checksum does not match that of the data.")
    }

    pub(super) fn no_snapshot(id: impl std::fmt::Display) -> Self {
        let message = format!("The snapshot '{id}' does not exist.");
        Self::new(StatusCode::NOT_FOUND, "ResourceNotFoundException", message)
            .because("SNAPSHOT_NOT_FOUND")
    }

    /// A fault of ours. What it is goes to the log alone.
    pub(super) fn internal(detail: impl std::fmt::Display) -> Self {
        let message = "An internal error has occurred.";
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        let detail = Some(detail.to_string());
        Self { detail, ..Self::new(status, "InternalServerException", message) }
    }

    /// What an error of the store is in the EBS direct APIs. `Conflict`, `Invalid` and
    /// `ExpiredToken` mean something else in each operation; here they are `otherwise`.
    pub(super) fn of_store(error: &Error, otherwise: &'static str) -> Self {
        let detail = error.to_string();
        let refusal = match error.kind() {
            ErrorKind::NotFound => {
                Self::new(StatusCode::NOT_FOUND, "ResourceNotFoundException", detail.as_str())
                    .because("SNAPSHOT_NOT_FOUND")
            }
            ErrorKind::Denied | ErrorKind::Credentials => {
                let message = "You are not authorized to perform this operation.";
                Self::new(StatusCode::FORBIDDEN, "AccessDeniedException", message)
                    .because("UNAUTHORIZED_ACCOUNT")
            }
            ErrorKind::Throttled => {
                let message = "The number of API requests has exceeded the maximum allowed.";
                Self::new(StatusCode::BAD_REQUEST, "RequestThrottledException", message)
                    .because("DEPENDENCY_REQUEST_THROTTLED")
            }
            ErrorKind::Quota | ErrorKind::NoRoom => {
                let message = "Your current service quotas do not allow this.";
                Self::new(StatusCode::PAYMENT_REQUIRED, "ServiceQuotaExceededException", message)
                    .because("DEPENDENCY_SERVICE_QUOTA_EXCEEDED")
            }
            ErrorKind::ExpiredToken
            | ErrorKind::NotReady
            | ErrorKind::Conflict
            | ErrorKind::Unsupported
            | ErrorKind::Invalid => Self::invalid(otherwise, detail.as_str()),
            ErrorKind::Corrupt | ErrorKind::Unavailable | ErrorKind::Timeout => {
                return Self::internal(detail);
            }
        };
        Self { detail: Some(detail), ..refusal }
    }
}

/// The gate gives it the form of the API that was asked.
impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}
