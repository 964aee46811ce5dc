//! The first request to each endpoint: where it went, what came back, and when.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sdk_ebs::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::interceptors::Intercept;
use aws_smithy_runtime_api::client::interceptors::context::{
    BeforeDeserializationInterceptorContextRef, BeforeTransmitInterceptorContextRef,
};
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::config_bag::ConfigBag;

use super::clock;
use crate::doctor::report::Findings;
use crate::store::aws::failure::Failure;
use crate::store::ebs::clients::Clients;
use crate::store::ebs::ec2;

/// How long one request may take. A connection that is not made in 5 s is told before.
const REQUEST: Duration = Duration::from_secs(7);

/// A snapshot that is not there, to ask for.
pub(super) const NO_SNAPSHOT: &str = "snap-00000000000000000";

/// A service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Service {
    Ec2,
    Ebs,
}

impl Service {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ec2 => "EC2",
            Self::Ebs => "EBS direct APIs",
        }
    }
}

/// What became of the first request to a service.
#[derive(Debug)]
pub(super) struct Probe {
    pub(super) service: Service,
    /// Scheme, host and port, once a request was about to be sent.
    pub(super) endpoint: Option<String>,
    /// Our time and that of the service, at the answer.
    pub(super) times: Option<(SystemTime, SystemTime)>,
    pub(super) took: Duration,
    pub(super) result: Result<(), Failure>,
}

/// Sees requests and answers pass.
#[derive(Clone, Debug, Default)]
struct Witness(Arc<Mutex<Seen>>);

#[derive(Clone, Debug, Default)]
struct Seen {
    endpoint: Option<String>,
    times: Option<(SystemTime, SystemTime)>,
}

impl Witness {
    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Intercept for Witness {
    fn name(&self) -> &'static str {
        "Witness"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        self.seen().endpoint = origin(context.request().uri());
        Ok(())
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let date = context.response().headers().get("date").and_then(clock::parse);
        self.seen().times = date.map(|theirs| (SystemTime::now(), theirs));
        Ok(())
    }
}

/// Scheme, host and port of a URL.
pub(super) fn origin(url: &str) -> Option<String> {
    let uri: http::Uri = url.parse().ok()?;
    Some(format!("{}://{}", uri.scheme_str()?, uri.authority()?))
}

/// Signs what only has to be answered, when there is nothing to sign with.
fn nobody() -> Credentials {
    Credentials::new("none", "none", None, None, "nobody")
}

/// Asks EC2 for a snapshot that is not there.
pub(super) async fn ec2(clients: &Clients, signs: bool) -> Probe {
    let witness = Witness::default();
    let mut client = clients.ec2.clone().seen_by(witness.clone());
    if !signs {
        client = client.signing_with(SharedCredentialsProvider::new(nobody()));
    }
    let request = ec2::describe_snapshots(&["self".to_owned()], &[]).max_results(5);
    let began = Instant::now();
    let result = ask(client.send(request)).await.map(drop);
    made(Service::Ec2, &witness, began, result)
}

/// Asks the EBS direct APIs for the blocks of a snapshot that is not there.
pub(super) async fn ebs(clients: &Clients, signs: bool) -> Probe {
    let witness = Witness::default();
    let request = clients.ebs.list_snapshot_blocks().snapshot_id(NO_SNAPSHOT).max_results(100);
    let mut request = request.customize().interceptor(witness.clone());
    if !signs {
        let config = aws_sdk_ebs::config::Config::builder().credentials_provider(nobody());
        request = request.config_override(config);
    }
    let began = Instant::now();
    let result = ask_sdk(request.send()).await.map(drop);
    made(Service::Ebs, &witness, began, result)
}

/// Makes a request, which may take so long.
pub(super) async fn ask<T>(
    request: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let late = |_| Err(Failure::timed_out(REQUEST));
    tokio::time::timeout(REQUEST, request).await.unwrap_or_else(late)
}

/// The same, of a client of the SDK, whose futures are large.
pub(super) fn ask_sdk<'a, T, E>(
    request: impl Future<Output = Result<T, SdkError<E>>> + 'a,
) -> Pin<Box<dyn Future<Output = Result<T, Failure>> + 'a>>
where
    E: std::error::Error + ProvideErrorMetadata + 'static,
    T: 'a,
{
    let request = async { request.await.map_err(|error| Failure::of_sdk(&error, None)) };
    Box::pin(ask(request))
}

fn made(service: Service, witness: &Witness, began: Instant, result: Result<(), Failure>) -> Probe {
    let Seen { endpoint, times } = witness.seen().clone();
    Probe { service, endpoint, times, took: began.elapsed(), result }
}

/// Whether those who answered know who asks.
pub(super) fn accepted(probes: &[&Probe], report: &mut impl Findings) -> bool {
    const SUBJECT: &str = "signature";
    for probe in probes {
        let Err(failure) = &probe.result else { continue };
        if let Some(cure) = failure.code().and_then(refused_signature) {
            let found = format!("{} does not accept it: {failure}", probe.service.name());
            report.fail(SUBJECT, found, cure);
            return false;
        }
    }
    report.ok(SUBJECT, "it is accepted");
    true
}

/// What to do about a refusal that has to do with who asks, not with what for.
fn refused_signature(code: &str) -> Option<&'static str> {
    Some(match code {
        "ExpiredToken" | "ExpiredTokenException" | "RequestExpired" => {
            "the credentials have expired, or the clock is off: get new ones, as with `aws sso login`"
        }
        "SignatureDoesNotMatch" | "InvalidSignatureException" | "IncompleteSignature" => {
            "the secret does not belong to the access key, or the clock is off: check both, where the credentials come from"
        }
        "AuthFailure"
        | "UnrecognizedClientException"
        | "InvalidClientTokenId"
        | "MissingAuthenticationToken"
        | "MissingAuthenticationTokenException" => {
            "the access key is not known there, its secret is another one, or the session token is missing: check the credentials, and that they are for this endpoint"
        }
        "OptInRequired" => "enable the region, or EC2, for the account",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_shown_without_its_path() {
        let url = "http://127.0.0.1:4560/snapshots/snap-0/blocks?maxResults=100";
        assert_eq!(origin(url).as_deref(), Some("http://127.0.0.1:4560"));
        let url = "https://ec2.us-east-1.amazonaws.com/";
        assert_eq!(origin(url).as_deref(), Some("https://ec2.us-east-1.amazonaws.com"));
        assert_eq!(origin("/x"), None);
    }

    #[test]
    fn who_asks_and_what_for_are_told_apart() {
        assert!(refused_signature("AuthFailure").is_some());
        assert!(refused_signature("UnrecognizedClientException").is_some());
        for code in ["UnauthorizedOperation", "ResourceNotFoundException", "AccessDeniedException"]
        {
            assert_eq!(refused_signature(code), None, "{code}");
        }
    }
}
