//! The client of a bucket, configured as the user's other AWS tools are.

use std::sync::{Arc, Mutex, PoisonError};

use aws_config::SdkConfig;
use aws_config::retry::RetryConfig;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::{RequestChecksumCalculation, ResponseChecksumValidation};

use super::BucketUrl;
use crate::store::Result;
use crate::store::aws::account::{Account, Shared};
use crate::store::aws::answer::{Bounded, MAX_ANSWER};
use crate::store::aws::config::{check, check_configured, config, configured_endpoint};
use crate::store::limiter::Limiter;

/// Who asks for the objects of a bucket, and where.
#[derive(Debug)]
pub(super) struct BucketAccount {
    url: BucketUrl,
    /// Where the service is, unless that follows from the region.
    endpoint: Option<String>,
    shared: Shared<Client>,
    /// Where the service says that the bucket is.
    region: Mutex<Option<String>>,
}

impl BucketAccount {
    /// Reads the configuration. No request is made yet.
    ///
    /// # Errors
    ///
    /// `Invalid` if the environment names a proxy or certificates that cannot be used, or there is no such profile,
    /// or an endpoint that cannot be used.
    pub(super) async fn of(url: &BucketUrl) -> Result<Self> {
        check(url.profile.as_deref()).await?;
        let shared = read(url, url.region.as_deref()).await;
        check_configured("S3", endpoint(&shared, url).as_deref())?;
        Ok(Self::with_config(&shared, url))
    }

    /// One with a configuration that was read.
    pub(super) fn with_config(shared: &SdkConfig, url: &BucketUrl) -> Self {
        let endpoint = endpoint(shared, url);
        let shared = Shared::new(of_config(shared, url), Arc::new(Limiter::new(false)));
        Self { url: url.clone(), endpoint, shared, region: Mutex::default() }
    }

    /// Where the service is, unless that follows from the region.
    pub(super) fn endpoint(&self) -> Option<&str> {
        self.endpoint.as_deref()
    }

    /// Takes note of the region that the bucket is in; whether that is news.
    pub(super) fn is_in(&self, region: &str) -> bool {
        let mut known = self.region.lock().unwrap_or_else(PoisonError::into_inner);
        let is_news = known.is_none();
        if is_news {
            *known = Some(region.to_owned());
        }
        is_news
    }
}

impl Account for BucketAccount {
    type Clients = Client;

    fn clients(&self) -> Arc<Client> {
        self.shared.clients()
    }

    async fn renew(&self, old: &Arc<Client>) {
        let region = self.region.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let region = region.or_else(|| self.url.region.clone());
        let read = async { of_config(&read(&self.url, region.as_deref()).await, &self.url) };
        self.shared.renew(old, read).await;
    }

    fn limiter(&self) -> Arc<Limiter> {
        self.shared.limiter()
    }

    fn may_warn(&self) -> bool {
        self.shared.may_warn()
    }
}

async fn read(url: &BucketUrl, region: Option<&str>) -> SdkConfig {
    // Where the bucket is S3 says itself.
    // What reads the configuration is large.
    Box::pin(config(url.profile.as_deref(), region)).await.0
}

fn endpoint(shared: &SdkConfig, url: &BucketUrl) -> Option<String> {
    url.endpoint.clone().or_else(|| configured_endpoint(shared, "S3"))
}

fn of_config(shared: &SdkConfig, url: &BucketUrl) -> Client {
    let endpoint = endpoint(shared, url);
    let mut builder = aws_sdk_s3::config::Builder::from(shared)
        // There is one place where a request is sent again, and it is ours.
        .retry_config(RetryConfig::disabled())
        .interceptor(Bounded(MAX_ANSWER))
        // Many services fail on the checksums that the SDK adds. What is put has the SHA-256 of its signature, and
        // blocks, pages and documents have digests of their own.
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
        .force_path_style(url.is_path_style() || (url.style.is_none() && endpoint.is_some()));
    builder.set_endpoint_url(endpoint);
    Client::from_conf(builder.build())
}
