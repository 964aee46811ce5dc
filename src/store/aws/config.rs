//! The configuration of the AWS SDK: what the user's other AWS tools read.

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
use aws_types::os_shim_internal::{Env, Fs};
use aws_types::service_config::ServiceConfigKey;

use super::http;
use crate::store::url::check_endpoint;
use crate::store::{Error, ErrorKind, Result};

/// Where one is if nothing says so.
pub(crate) const DEFAULT_REGION: &str = "us-east-1";

/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(5);

/// How long the head of an answer may take. An attempt of ours ends earlier; this is for what the SDK
/// asks for itself, such as credentials.
const READ: Duration = Duration::from_secs(30);

/// Profiles that a message lists at most.
const LISTED: usize = 5;

/// Checks what the environment and the store say, before anything is asked: proxy, certificates, and the profile.
///
/// Without its profile the SDK would look for the role of an instance, which takes a minute where there is none.
///
/// # Errors
///
/// `Invalid`, with what is wrong and what to do.
pub(crate) async fn check(profile: Option<&str>) -> Result<()> {
    http::settings().map_err(|why| Error::new(ErrorKind::Invalid, why))?;
    let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let (name, who) = match (profile, set("AWS_ACCESS_KEY_ID"), set("AWS_PROFILE")) {
        (Some(name), ..) => (name.to_owned(), "the store"),
        (None, None, Some(name)) => (name, "AWS_PROFILE"),
        _ => return Ok(()),
    };
    let (fs, env) = (Fs::real(), Env::real());
    #[expect(deprecated, reason = "its new name is in a crate that is the SDK's own")]
    let files = aws_config::profile::profile_file::ProfileFiles::default();
    // What cannot be read the SDK tells.
    let Ok(known) = aws_config::profile::load(&fs, &env, &files, None).await else {
        return Ok(());
    };
    if known.get_profile(&name).is_some() {
        return Ok(());
    }
    let mut others: Vec<_> = known.profiles().collect();
    others.sort_unstable();
    others.truncate(LISTED);
    let there = match others.is_empty() {
        true => "which has none".to_owned(),
        false => format!("which has {}", others.join(", ")),
    };
    let home = || set("HOME").unwrap_or_else(|| "~".to_owned());
    let files = set("AWS_CONFIG_FILE").unwrap_or_else(|| home() + "/.aws/config");
    let message = format!(
        "{who} names the profile {name}, which is not in the AWS configuration ({files}), {there}: \
         `aws configure --profile {name}` makes it"
    );
    Err(Error::new(ErrorKind::Invalid, message))
}

/// Checks where a service is, whoever says so.
///
/// # Errors
///
/// `Invalid`, without a password that is in it.
pub(crate) fn check_configured(service: &str, endpoint: Option<&str>) -> Result<()> {
    endpoint.map_or(Ok(()), check_endpoint).map_err(|why| {
        let message = format!("the endpoint that the AWS configuration gives for {service}: {why}");
        Error::new(ErrorKind::Invalid, message)
    })
}

/// For whom requests are signed: the profile that is named, else what the environment has.
pub(crate) fn whose(profile: Option<&str>, variable: impl Fn(&str) -> Option<String>) -> String {
    let set = |name| variable(name).filter(|value| !value.is_empty());
    match (profile, set("AWS_ACCESS_KEY_ID")) {
        (Some(profile), _) => format!("profile {profile}"),
        (None, Some(key)) => match account_of(&key) {
            Some(account) => format!("account {account:012}"),
            None => format!("key {key}"),
        },
        (None, None) => {
            let profile = set("AWS_PROFILE").unwrap_or_else(|| "default".to_owned());
            format!("profile {profile}")
        }
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
pub(crate) fn configured_endpoint(shared: &SdkConfig, service: &str) -> Option<String> {
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
pub(crate) fn http_client() -> SharedHttpClient {
    http::client(http::settings().unwrap_or(&http::Settings::default()))
}

/// What providers of the SDK that are made by hand have to be given: they know no HTTP client, and
/// die without.
pub(crate) fn provider_config() -> ProviderConfig {
    ProviderConfig::default().with_http_client(http_client())
}

/// What is configured for a store: credentials, region, endpoints; and whether a region is.
pub(crate) async fn config(profile: Option<&str>, region: Option<&str>) -> (SdkConfig, bool) {
    let timeouts = TimeoutConfig::builder().connect_timeout(CONNECT).read_timeout(READ).build();
    let name = AppName::new(concat!("fspfs-", env!("CARGO_PKG_VERSION"))).expect("a valid name");
    let mut loader = aws_config::defaults(BehaviorVersion::latest())
        .http_client(http_client())
        .app_name(name)
        .retry_config(RetryConfig::disabled())
        // An attempt is bounded as a whole.
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        .timeout_config(timeouts);
    if let Some(profile) = profile {
        // Whoever names a profile means it, whatever the environment has for others.
        let provider = ProfileFileCredentialsProvider::builder()
            .configure(&provider_config())
            .profile_name(profile)
            .build();
        loader = loader.profile_name(profile).credentials_provider(provider);
    }
    let chain = match region {
        Some(region) => RegionProviderChain::first_try(Region::new(region.to_owned())),
        None => {
            // The SDK's own chain in its order. That one cannot be given an HTTP client.
            let mut of_profile = ProfileFileRegionProvider::builder();
            if let Some(name) = profile {
                of_profile = of_profile.profile_name(name);
            }
            let metadata = ImdsRegionProvider::builder().configure(&provider_config());
            RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
                .or_else(of_profile.build())
                .or_else(metadata.build())
        }
    };
    let has_region = chain.region().await.is_some();
    (loader.region(chain.or_else(DEFAULT_REGION)).load().await, has_region)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_tells_its_account() {
        // The example of <https://medium.com/@TalBeerySec/a-short-note-on-aws-key-id-f88cc4317489>.
        assert_eq!(account_of("ASIAQNZGKIQY56JQ7WML"), Some(29_608_264_753));
        for other in ["AKIDACCOUNTONE", "AKIAIOSFODNN7EXAMPL1", "AKIA", "bench"] {
            assert_eq!(account_of(other), None, "{other}");
        }
    }
}
