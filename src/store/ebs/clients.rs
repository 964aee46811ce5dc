//! The clients, configured as the user's other AWS tools are.

use std::time::Duration;

use aws_config::environment::EnvironmentVariableRegionProvider;
use aws_config::imds::region::ImdsRegionProvider;
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::ProfileFileCredentialsProvider;
use aws_config::profile::ProfileFileRegionProvider;
use aws_config::provider_config::ProviderConfig;
use aws_config::retry::RetryConfig;
use aws_config::stalled_stream_protection::StalledStreamProtectionConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{AppName, BehaviorVersion, Region, SdkConfig};
use aws_smithy_runtime_api::client::http::SharedHttpClient;
use aws_types::service_config::ServiceConfigKey;

use super::answer::Bounded;
use super::ec2::{Ec2, partition};
use super::{EbsUrl, http};

/// Where one is if nothing says so.
pub(crate) const DEFAULT_REGION: &str = "us-east-1";

/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(5);

/// How long the head of an answer may take. An attempt of ours ends earlier; this is for what the SDK
/// asks for itself, such as credentials.
const READ: Duration = Duration::from_secs(30);

/// Both clients of one store.
#[derive(Clone, Debug)]
pub(crate) struct Clients {
    pub(crate) ebs: aws_sdk_ebs::Client,
    pub(crate) ec2: Ec2,
    /// The region that was found.
    pub(crate) region: String,
    /// Where the blocks are, unless that follows from the region.
    pub(super) endpoint: Option<String>,
    /// Where EC2 is, unless that follows from the region.
    ec2_endpoint: Option<String>,
}

impl Clients {
    /// Reads the configuration: environment, profile, and what they lead to.
    pub(super) async fn new(url: &EbsUrl) -> Self {
        Self::of(&config(url).await, url)
    }

    /// Clients with a configuration that was read.
    pub(crate) fn of(shared: &SdkConfig, url: &EbsUrl) -> Self {
        let region = shared.region().map_or(DEFAULT_REGION, Region::as_ref).to_owned();
        let endpoint = url.endpoint.clone().or_else(|| configured_endpoint(shared, "EBS"));
        // There is one place where a request is sent again, and it is ours.
        let mut ebs = aws_sdk_ebs::config::Builder::from(shared)
            .retry_config(RetryConfig::disabled())
            .interceptor(Bounded);
        ebs.set_endpoint_url(endpoint.clone());
        // A server that offers one mostly offers the other, and never the real EC2 for it.
        let given = url.ec2_endpoint.clone().or_else(|| url.endpoint.clone());
        let ec2_endpoint = given.or_else(|| configured_endpoint(shared, "EC2"));
        let ec2 = Ec2::new(shared, ec2_endpoint.as_deref());
        // Both sign with the credentials that one of them has asked for.
        ebs.set_identity_cache(ec2.identities());
        let ebs = aws_sdk_ebs::Client::from_conf(ebs.build());
        Self { ebs, ec2, region, endpoint, ec2_endpoint }
    }

    /// Where these lead, and for whom: the region, the endpoints, and the profile or the account.
    pub(super) fn place(
        &self,
        profile: Option<&str>,
        variable: impl Fn(&str) -> Option<String>,
    ) -> String {
        let set = |name| variable(name).filter(|value| !value.is_empty());
        let who = match (profile, set("AWS_ACCESS_KEY_ID")) {
            (Some(profile), _) => format!("profile {profile}"),
            (None, Some(key)) => match account_of(&key) {
                Some(account) => format!("account {account:012}"),
                None => format!("key {key}"),
            },
            (None, None) => {
                let profile = set("AWS_PROFILE").unwrap_or_else(|| "default".to_owned());
                format!("profile {profile}")
            }
        };
        let endpoints = [("EBS", &self.endpoint), ("EC2", &self.ec2_endpoint)];
        let endpoints = endpoints.iter().filter_map(|(service, endpoint)| {
            endpoint.as_ref().map(|endpoint| format!(", {service} at {endpoint}"))
        });
        format!("{}, {who}{}", self.region, endpoints.collect::<String>())
    }

    /// Whether the quotas of AWS are to be expected.
    pub(super) fn is_aws(&self) -> bool {
        self.endpoint.as_deref().is_none_or(partition::is_of_aws)
    }
}

/// The account that a key of AWS is of, which is in it (`sts:GetAccessKeyInfo` tells the same): so a key
/// that replaces another is known to be of the same. Other services have keys of other forms.
fn account_of(key: &str) -> Option<u64> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let text = key.strip_prefix("AKIA").or_else(|| key.strip_prefix("ASIA"))?;
    if text.len() != 16 {
        return None;
    }
    let digit = |c: u8| ALPHABET.iter().position(|known| *known == c);
    let digits: Vec<u64> =
        text.bytes().map(|c| digit(c).map(|n| n as u64)).collect::<Option<_>>()?;
    // Ten digits of five bits; the account is in the first 48 but one, and seven more.
    let bits = digits[..10].iter().fold(0, |bits, digit| bits << 5 | digit) >> 2;
    Some((bits & 0x7fff_ffff_ff80) >> 7)
}

/// The endpoint that the environment or the profile gives for a service. An empty one is none; the SDK
/// would panic.
fn configured_endpoint(shared: &SdkConfig, service: &str) -> Option<String> {
    let key = ServiceConfigKey::builder()
        .service_id(service)
        .env("AWS_ENDPOINT_URL")
        .profile("endpoint_url")
        .build()
        .ok()?;
    let of_service = shared.service_config().and_then(|config| config.load_config(key));
    let endpoint = of_service.or_else(|| shared.endpoint_url().map(str::to_owned));
    endpoint.filter(|endpoint| !endpoint.is_empty())
}

/// A store is opened, and examined, only with settings that are right.
pub(super) fn http_client() -> SharedHttpClient {
    http::client(http::settings().unwrap_or(&http::Settings::default()))
}

/// What providers of the SDK that are made by hand have to be given: they know no HTTP client, and
/// die without.
pub(crate) fn provider_config() -> ProviderConfig {
    ProviderConfig::default().with_http_client(http_client())
}

/// What is configured for a store: credentials, region, endpoints.
pub(crate) async fn config(url: &EbsUrl) -> SdkConfig {
    let timeouts = TimeoutConfig::builder().connect_timeout(CONNECT).read_timeout(READ).build();
    let name = AppName::new(concat!("fspfs-", env!("CARGO_PKG_VERSION"))).expect("a valid name");
    let mut loader = aws_config::defaults(BehaviorVersion::latest())
        .http_client(http_client())
        .app_name(name)
        .retry_config(RetryConfig::disabled())
        // An attempt is bounded as a whole.
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        .timeout_config(timeouts);
    if let Some(profile) = &url.profile {
        // Whoever names a profile means it, whatever the environment has for others.
        let provider = ProfileFileCredentialsProvider::builder()
            .configure(&provider_config())
            .profile_name(profile)
            .build();
        loader = loader.profile_name(profile).credentials_provider(provider);
    }
    let chain = match &url.region {
        Some(region) => RegionProviderChain::first_try(Region::new(region.clone())),
        None => {
            // The SDK's own chain in its order. That one cannot be given an HTTP client.
            let mut profile = ProfileFileRegionProvider::builder();
            if let Some(name) = &url.profile {
                profile = profile.profile_name(name);
            }
            let metadata = ImdsRegionProvider::builder().configure(&provider_config());
            RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
                .or_else(profile.build())
                .or_else(metadata.build())
        }
    };
    if chain.region().await.is_none() {
        tracing::warn!(
            "no region is configured: {DEFAULT_REGION} is used; name one as ebs://{DEFAULT_REGION}"
        );
    }
    loader.region(chain.or_else(DEFAULT_REGION)).load().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::ebs::ec2;

    #[test]
    fn a_key_tells_its_account() {
        // The example of <https://medium.com/@TalBeerySec/a-short-note-on-aws-key-id-f88cc4317489>.
        assert_eq!(account_of("ASIAQNZGKIQY56JQ7WML"), Some(29_608_264_753));
        for other in ["AKIDACCOUNTONE", "AKIAIOSFODNN7EXAMPL1", "AKIA", "bench"] {
            assert_eq!(account_of(other), None, "{other}");
        }
    }

    #[tokio::test]
    async fn an_endpoint_that_is_empty_is_none() {
        let shared = SdkConfig::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new(DEFAULT_REGION))
            .http_client(aws_smithy_http_client::Builder::new().build_http())
            .endpoint_url("")
            .build();
        let clients = Clients::of(&shared, &"ebs:".parse().unwrap());
        assert_eq!((&clients.endpoint, &clients.ec2_endpoint), (&None, &None));
        // Without credentials nothing is sent, and with an empty endpoint the SDK panics.
        clients.ec2.send(ec2::describe_snapshot("snap-0")).await.unwrap_err();
        clients.ebs.list_snapshot_blocks().snapshot_id("snap-0").send().await.unwrap_err();
    }

    #[tokio::test]
    async fn each_account_and_region_has_a_place_of_its_own() {
        let place = async |url: &str, profile: Option<&str>, key: &str| {
            let shared = SdkConfig::builder().behavior_version(BehaviorVersion::latest());
            let url: EbsUrl = url.parse().unwrap();
            let region = url.region.clone().unwrap_or_else(|| DEFAULT_REGION.to_owned());
            let clients = Clients::of(&shared.region(Region::new(region)).build(), &url);
            let key = key.to_owned();
            clients.place(profile, |name| (name == "AWS_ACCESS_KEY_ID").then(|| key.clone()))
        };
        let one = place("ebs:", None, "ASIAQNZGKIQY56JQ7WML").await;
        assert_eq!(one, "us-east-1, account 029608264753");
        let others = [
            place("ebs:", None, "another").await,
            place("ebs:", None, "").await,
            place("ebs:", Some("work"), "another").await,
            place("ebs://eu-west-2", None, "another").await,
            place("ebs:?endpoint=http://127.0.0.1:1", None, "another").await,
            place("ebs:?ec2-endpoint=http://127.0.0.1:1", None, "another").await,
        ];
        let all: std::collections::HashSet<_> = others.iter().collect();
        assert_eq!(all.len(), others.len(), "{others:?}");
    }
}
