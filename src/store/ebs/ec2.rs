//! EC2: its query protocol, for the few actions that are needed (`action.rs`).
//!
//! A request is a form that is signed, an answer is XML
//! (<https://docs.aws.amazon.com/ec2/latest/devguide/ec2-query-requests.html>). Nothing is sent again here:
//! `service.rs` does that.

use aws_config::identity::IdentityCache;
use aws_config::stalled_stream_protection::StalledStreamProtectionConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{Region, SdkConfig};
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sigv4::http_request::{SignableBody, SignableRequest, SigningSettings, sign};
use aws_sigv4::sign::v4::SigningParams;
use aws_smithy_runtime::client::orchestrator::operation::Operation;
use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::auth::static_resolver::StaticAuthSchemeOptionResolver;
use aws_smithy_runtime_api::client::auth::{
    AuthScheme, AuthSchemeEndpointConfig, AuthSchemeId, AuthSchemeOptionResolverParams, Sign,
};
use aws_smithy_runtime_api::client::http::SharedHttpClient;
use aws_smithy_runtime_api::client::identity::{
    Identity, SharedIdentityCache, SharedIdentityResolver,
};
use aws_smithy_runtime_api::client::interceptors::{Intercept, SharedInterceptor};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse, OrchestratorError};
use aws_smithy_runtime_api::client::runtime_components::{
    GetIdentityResolver, RuntimeComponents, RuntimeComponentsBuilder,
};
use aws_smithy_runtime_api::client::runtime_plugin::StaticRuntimePlugin;
use aws_smithy_types::body::SdkBody;
use aws_smithy_types::config_bag::{ConfigBag, Layer};
use aws_smithy_types::error::metadata::{ErrorMetadata, ProvideErrorMetadata};
use serde::Deserialize;
use serde::de::DeserializeOwned;

pub(crate) use self::action::*;
use crate::store::ErrorKind;
use crate::store::aws::answer::{Bounded, MAX_ANSWER};
use crate::store::aws::config::{DEFAULT_REGION, http_client};
use crate::store::aws::failure::{Class, Failure};

mod action;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub(crate) mod partition;

/// The version of the protocol.
const VERSION: &str = "2016-11-15";

/// What requests are signed with.
const SIGV4: AuthSchemeId = AuthSchemeId::new("sigv4");

/// A client of EC2 in one region.
#[derive(Clone, Debug)]
pub(crate) struct Ec2 {
    /// Where it is, or what is wrong with the configuration.
    endpoint: Result<String, String>,
    signer: Signer,
    http: SharedHttpClient,
    timeouts: TimeoutConfig,
    credentials: Option<SharedCredentialsProvider>,
    /// Where credentials are kept until they expire, together with other clients of this configuration.
    identities: SharedIdentityCache,
    interceptor: Option<SharedInterceptor>,
}

impl Ec2 {
    /// A client with this configuration; at `endpoint`, or where EC2 is in the region.
    pub(crate) fn new(shared: &SdkConfig, endpoint: Option<&str>) -> Self {
        let region = shared.region().cloned().unwrap_or(Region::from_static(DEFAULT_REGION));
        let fips = shared.use_fips().unwrap_or(false);
        let dual_stack = shared.use_dual_stack().unwrap_or(false);
        let endpoint = match endpoint {
            None => partition::ec2(region.as_ref(), fips, dual_stack)
                .ok_or_else(|| format!("{:?} is not the name of a region", region.as_ref())),
            Some(_) if fips || dual_stack => {
                Err("FIPS or dual stack, and an endpoint of one's own, exclude each other"
                    .to_owned())
            }
            Some(endpoint) => Ok(endpoint.to_owned()),
        };
        Self {
            endpoint,
            signer: Signer { region },
            http: shared.http_client().unwrap_or_else(http_client),
            timeouts: shared.timeout_config().cloned().unwrap_or_else(TimeoutConfig::disabled),
            credentials: shared.credentials_provider(),
            identities: shared.identity_cache().unwrap_or_else(|| IdentityCache::lazy().build()),
            interceptor: None,
        }
    }

    /// Where credentials are kept.
    pub(super) fn identities(&self) -> SharedIdentityCache {
        self.identities.clone()
    }

    /// The same, with other credentials.
    pub(crate) fn signing_with(mut self, credentials: SharedCredentialsProvider) -> Self {
        self.credentials = Some(credentials);
        self
    }

    /// The same, with its requests and answers shown to an interceptor.
    pub(crate) fn seen_by(mut self, interceptor: impl Intercept + 'static) -> Self {
        self.interceptor = Some(SharedInterceptor::new(interceptor));
        self
    }

    /// Sends a request once.
    pub(crate) async fn send<A: Answer>(&self, request: Request<A>) -> Result<A, Failure> {
        let invalid = |why| Failure::new(Class::Final(ErrorKind::Invalid), why);
        let endpoint = self.endpoint.as_ref().map_err(invalid)?;
        let (action, form) = request.into_form();
        let operation = Operation::builder()
            .service_name("EC2")
            .operation_name(action)
            .http_client(self.http.clone())
            .endpoint_url(endpoint)
            .no_retry()
            .timeout_config(self.timeouts.clone())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .interceptor(Bounded(MAX_ANSWER))
            .runtime_plugin(self.plugin())
            .serializer(post)
            .deserializer(move |answer| read(action, answer))
            .build();
        operation.invoke(form).await.map_err(|error| Failure::of_sdk(&error, None))
    }

    /// Who signs.
    fn plugin(&self) -> StaticRuntimePlugin {
        let mut parts = RuntimeComponentsBuilder::new("EC2")
            .with_auth_scheme(self.signer.clone())
            .with_auth_scheme_option_resolver(Some(StaticAuthSchemeOptionResolver::new(vec![
                SIGV4,
            ])))
            .with_identity_cache(Some(self.identities.clone()));
        if let Some(credentials) = &self.credentials {
            parts.set_identity_resolver(SIGV4, credentials.clone());
        }
        if let Some(interceptor) = &self.interceptor {
            parts.push_interceptor(interceptor.clone());
        }
        let mut config = Layer::new("EC2");
        config.store_put(AuthSchemeOptionResolverParams::new(()));
        StaticRuntimePlugin::new().with_config(config.freeze()).with_runtime_components(parts)
    }
}

/// What an answer can be read as.
pub(crate) trait Answer: DeserializeOwned + std::fmt::Debug + Send + Sync + 'static {}

impl<T: DeserializeOwned + std::fmt::Debug + Send + Sync + 'static> Answer for T {}

fn post(form: String) -> Result<HttpRequest, BoxError> {
    let mut request = HttpRequest::new(SdkBody::from(form));
    request.set_method("POST")?;
    request.set_uri("/")?;
    let headers = request.headers_mut();
    headers.insert("content-type", "application/x-www-form-urlencoded; charset=utf-8");
    headers.insert("user-agent", concat!("fspfs/", env!("CARGO_PKG_VERSION")));
    Ok(request)
}

/// Signs for EC2.
#[derive(Clone, Debug)]
struct Signer {
    region: Region,
}

impl AuthScheme for Signer {
    fn scheme_id(&self) -> AuthSchemeId {
        SIGV4
    }

    fn identity_resolver(
        &self,
        resolvers: &dyn GetIdentityResolver,
    ) -> Option<SharedIdentityResolver> {
        resolvers.identity_resolver(SIGV4)
    }

    fn signer(&self) -> &dyn Sign {
        self
    }
}

impl Sign for Signer {
    fn sign_http_request(
        &self,
        request: &mut HttpRequest,
        identity: &Identity,
        _: AuthSchemeEndpointConfig<'_>,
        components: &RuntimeComponents,
        _: &ConfigBag,
    ) -> Result<(), BoxError> {
        let params = SigningParams::builder()
            .identity(identity)
            .region(self.region.as_ref())
            .name("ec2")
            .time(components.time_source().unwrap_or_default().now())
            .settings(SigningSettings::default())
            .build()?
            .into();
        let body = SignableBody::Bytes(request.body().bytes().unwrap_or_default());
        let (method, headers) = (request.method(), request.headers().iter());
        let signable = SignableRequest::new(method, request.uri(), headers, body)?;
        let (signed, _) = sign(signable, &params)?.into_parts();
        for (name, value) in signed.headers() {
            request.headers_mut().try_insert(name.to_owned(), value.to_owned())?;
        }
        Ok(())
    }
}

/// What EC2 says when it refuses.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(ErrorMetadata);

impl ProvideErrorMetadata for Refusal {
    fn meta(&self) -> &ErrorMetadata {
        &self.0
    }
}

fn read<A: Answer>(action: &str, answer: &HttpResponse) -> Result<A, OrchestratorError<Refusal>> {
    let body = answer.body().bytes().unwrap_or_default();
    if answer.status().is_success() {
        parse(action, body).map_err(OrchestratorError::response)
    } else {
        Err(match refusal(body) {
            Some(refusal) => OrchestratorError::operation(refusal),
            None => OrchestratorError::response("the refusal is none of EC2".into()),
        })
    }
}

/// Reads an answer that says that all is well. XML that has no end, or a page of HTML that something in
/// between gave, is no empty list, and a deletion that was not done is no success.
fn parse<A: Answer>(action: &str, body: &[u8]) -> Result<A, BoxError> {
    let text = std::str::from_utf8(body)?;
    if !text.trim_end().ends_with(&format!("{action}Response>")) {
        return Err("it is none of EC2, or was cut short".into());
    }
    if text.len() < 1000 && text.contains("<return>false</return>") {
        return Err("EC2 answers that it has not done it".into());
    }
    Ok(quick_xml::de::from_str(text)?)
}

/// Reads a refusal; `None` if it is none of EC2.
fn refusal(body: &[u8]) -> Option<Refusal> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Response {
        errors: Errors,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Errors {
        error: Vec<Error>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Error {
        code: String,
        message: Option<String>,
    }
    let response: Response = quick_xml::de::from_str(std::str::from_utf8(body).ok()?).ok()?;
    let Error { code, message } = response.errors.error.into_iter().next()?;
    Some(Refusal(ErrorMetadata::builder().code(code).message(message.unwrap_or_default()).build()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use aws_config::BehaviorVersion;
    use aws_credential_types::Credentials;
    use aws_credential_types::provider::{ProvideCredentials, future};

    use super::*;
    use crate::store::ebs::clients::Clients;

    #[test]
    fn reads_only_whole_answers_of_ec2() {
        let read = |text: &str| parse::<Snapshots>("DescribeSnapshots", text.as_bytes());
        read("<DescribeSnapshotsResponse><snapshotSet/></DescribeSnapshotsResponse>\n").unwrap();
        for wrong in [
            "",
            "<html><body>Please log in</body></html>",
            "<DescribeSnapshotsResponse><snapshotSet><item>",
            "<snapshotSet/></DescribeSnapshotsResponse>",
            "<DescribeSnapshotsResponse></DescribeSnapshotsResponse>",
            "<DescribeTagsResponse><tagSet/></DescribeTagsResponse>",
        ] {
            read(wrong).unwrap_err();
        }
        let done = |what: &str| {
            let text = format!("<DeleteSnapshotResponse>{what}</DeleteSnapshotResponse>");
            parse::<Done>("DeleteSnapshot", text.as_bytes()).is_ok()
        };
        assert!(done("<return>true</return>") && done("") && !done("<return>false</return>"));
    }

    #[test]
    fn reads_refusals_of_ec2() {
        let read = |text: &str| {
            let Refusal(meta) = refusal(text.as_bytes())?;
            Some((meta.code()?.to_owned(), meta.message().unwrap_or("").to_owned()))
        };
        let refused = |message: &str| {
            format!(
                "<?xml version=\"1.0\"?>\n<Response><Errors><Error><Code>AuthFailure</Code>{message}\
                 </Error></Errors><RequestID>r</RequestID></Response>"
            )
        };
        let given = ("AuthFailure".to_owned(), "not <you>".to_owned());
        assert_eq!(read(&refused("<Message>not &lt;you></Message>")), Some(given));
        assert_eq!(read(&refused("<Message/>")), Some(("AuthFailure".to_owned(), String::new())));
        assert_eq!(read(&refused("")).unwrap().0, "AuthFailure");
        let two = refused("").replace("</Error><", "</Error><Error><Code>Other</Code></Error><");
        assert_eq!(read(&two).unwrap().0, "AuthFailure");
        for other in ["", "<html/>", "<Error><Code>AccessDenied</Code></Error>"] {
            assert_eq!(read(other), None, "{other}");
        }
    }

    /// Counts how often it is asked.
    #[derive(Debug)]
    struct Counting(Arc<AtomicU32>);

    impl ProvideCredentials for Counting {
        fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
        where
            Self: 'a,
        {
            self.0.fetch_add(1, Ordering::Relaxed);
            future::ProvideCredentials::ready(Ok(Credentials::for_tests()))
        }
    }

    #[tokio::test]
    async fn an_endpoint_of_ones_own_is_no_endpoint_of_fips() {
        let shared = SdkConfig::builder().region(Region::from_static("us-east-1")).use_fips(true);
        let ec2 = Ec2::new(&shared.build(), Some("http://127.0.0.1:9"));
        let failure = ec2.send(delete_snapshot("snap-0")).await.unwrap_err();
        assert!(failure.to_string().contains("FIPS"), "{failure}");
    }

    #[tokio::test]
    async fn asks_for_credentials_once_for_all_requests_of_both_clients() {
        let asked = Arc::new(AtomicU32::new(0));
        // Nobody listens: a request is signed before that shows.
        let shared = SdkConfig::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::from_static("us-east-1"))
            .endpoint_url("http://127.0.0.1:9")
            .credentials_provider(SharedCredentialsProvider::new(Counting(Arc::clone(&asked))))
            .http_client(http_client())
            .build();
        let clients = Clients::of(&shared, &"ebs:".parse().unwrap());
        for _ in 0..3 {
            clients.ec2.send(get_ebs_encryption_by_default()).await.unwrap_err();
            clients.ec2.send(delete_snapshot("snap-0")).await.unwrap_err();
            clients.ebs.list_snapshot_blocks().snapshot_id("snap-0").send().await.unwrap_err();
        }
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }
}
