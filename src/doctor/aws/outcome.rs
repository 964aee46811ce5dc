//! What became of a request.

use std::error::Error as StdError;

use crate::store::causes;
use std::io;
use std::time::Duration;

use aws_sdk_ebs::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_ebs::operation::RequestId as _;

/// How long one request may take. A connection that is not made in 5 s is told before.
pub(super) const REQUEST: Duration = Duration::from_secs(7);

/// Why there is no result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// The service refused.
    Refused {
        /// Its code, or the status.
        code: String,
        /// What else it says, with the request id.
        text: String,
    },
    /// There was no answer.
    Silent(Silence, String),
}

/// Why there was no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Silence {
    /// The name leads nowhere.
    Name,
    /// Nobody listens.
    Nobody,
    /// No connection came about in time.
    Connection,
    /// A connection came about, and no answer in time.
    Answer,
    /// Not the TLS that is asked for, or nobody to be trusted.
    Tls,
    /// The proxy refused.
    Proxy,
    /// Something else.
    Other,
}

impl Trouble {
    /// Whether the service says that this is not allowed.
    pub(super) fn is_denial(&self) -> bool {
        matches!(self, Self::Refused { code, .. }
            if code.contains("AccessDenied") || code == "UnauthorizedOperation")
    }

    /// What to say of it.
    pub(super) fn text(&self) -> String {
        match self {
            Self::Refused { code, text } if text.is_empty() => code.clone(),
            Self::Refused { code, text } => format!("{code}: {text}"),
            Self::Silent(_, text) => text.clone(),
        }
    }
}

/// Makes a request.
pub(super) async fn ask<T, E>(
    request: impl Future<Output = Result<T, SdkError<E>>>,
) -> Result<T, Trouble>
where
    E: StdError + ProvideErrorMetadata + 'static,
{
    match tokio::time::timeout(REQUEST, request).await {
        Ok(answer) => answer.map_err(|error| trouble(&error)),
        Err(_) => {
            let text = format!("no answer within {} s", REQUEST.as_secs());
            Err(Trouble::Silent(Silence::Answer, text))
        }
    }
}

fn trouble<E>(error: &SdkError<E>) -> Trouble
where
    E: StdError + ProvideErrorMetadata + 'static,
{
    if let SdkError::ServiceError(service) = error {
        let status = service.raw().status().as_u16();
        let code = service.err().code().map_or_else(|| format!("status {status}"), str::to_owned);
        let message = service.err().message().unwrap_or_default();
        let id = error.request_id().map_or_else(String::new, |id| format!(" [request {id}]"));
        return Trouble::Refused { code, text: format!("{message}{id}").trim_start().to_owned() };
    }
    let is_timeout = match error {
        SdkError::TimeoutError(_) => true,
        SdkError::DispatchFailure(failure) => failure.is_timeout(),
        _ => false,
    };
    Trouble::Silent(silence(error, is_timeout), causes(error))
}

/// Looks through the causes of an error for one that tells.
fn silence(error: &(dyn StdError + 'static), is_timeout: bool) -> Silence {
    let mut found = if is_timeout { Silence::Answer } else { Silence::Other };
    let mut cause = Some(error);
    while let Some(error) = cause {
        let text = error.to_string();
        if text.contains("dns error") || text.contains("lookup address") {
            return Silence::Name;
        }
        if text.contains("connect timeout") {
            return Silence::Connection;
        }
        if text.contains("tunnel error") || text.contains("proxy authorization") {
            return Silence::Proxy;
        }
        if text.contains("certificate") || text.contains("corrupt message") {
            return Silence::Tls;
        }
        match error.downcast_ref::<io::Error>().map(io::Error::kind) {
            Some(io::ErrorKind::ConnectionRefused) => return Silence::Nobody,
            Some(io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable) => {
                found = Silence::Connection;
            }
            Some(io::ErrorKind::NetworkUnreachable) => found = Silence::Connection,
            _ => {}
        }
        cause = error.source();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        source: Option<io::Error>,
    }

    fn of(text: &'static str, kind: Option<io::ErrorKind>) -> Silence {
        silence(&Layer { text, source: kind.map(io::Error::from) }, false)
    }

    #[test]
    fn what_keeps_an_answer_away_is_told_apart() {
        assert_eq!(
            of("tcp connect error", Some(io::ErrorKind::ConnectionRefused)),
            Silence::Nobody
        );
        assert_eq!(of("dns error", None), Silence::Name);
        assert_eq!(of("HTTP connect timeout occurred after 5s", None), Silence::Connection);
        assert_eq!(of("tunnel error: unsuccessful", None), Silence::Proxy);
        assert_eq!(of("invalid peer certificate: UnknownIssuer", None), Silence::Tls);
        assert_eq!(of("tcp connect error", Some(io::ErrorKind::TimedOut)), Silence::Connection);
        assert_eq!(of("unexpected end", None), Silence::Other);
        assert_eq!(silence(&Layer { text: "x", source: None }, true), Silence::Answer);
    }

    #[test]
    fn denials_are_known() {
        let refused = |code: &str| Trouble::Refused { code: code.to_owned(), text: String::new() };
        assert!(refused("UnauthorizedOperation").is_denial());
        assert!(refused("AccessDeniedException").is_denial());
        assert!(!refused("AuthFailure").is_denial());
        assert!(!Trouble::Silent(Silence::Name, "AccessDenied".to_owned()).is_denial());
    }
}
