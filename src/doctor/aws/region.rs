//! Which region, and who said so.

use std::time::Duration;

use aws_config::meta::region::ProvideRegion as _;
use aws_config::profile::ProfileFileRegionProvider;
use aws_config::{Region, SdkConfig};

use crate::doctor::report::Findings;
use crate::store::aws::config::{DEFAULT_REGION, provider_config};
use crate::store::ebs::EbsUrl;

/// How long the metadata of the instance may take. Most answer at once.
const METADATA: Duration = Duration::from_secs(3);

pub(super) async fn examine(url: &EbsUrl, shared: &SdkConfig, report: &mut impl Findings) {
    const SUBJECT: &str = "region";
    let region = shared.region().map_or(DEFAULT_REGION, Region::as_ref);
    match source(url, region).await {
        Some(source) => report.ok(SUBJECT, format!("{region}, {source}")),
        None => report.warn(
            SUBJECT,
            format!("{region}, since nothing names one"),
            "name it in the store, as ebs://us-west-2, or as AWS_REGION, or in the profile",
        ),
    }
}

async fn source(url: &EbsUrl, region: &str) -> Option<String> {
    if url.region.is_some() {
        return Some("as the store says".to_owned());
    }
    let is_set = |name: &&str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    if let Some(name) = ["AWS_REGION", "AWS_DEFAULT_REGION"].into_iter().find(|name| is_set(name)) {
        return Some(format!("of {name}"));
    }
    let mut profile = ProfileFileRegionProvider::builder();
    if let Some(name) = &url.profile {
        profile = profile.profile_name(name);
    }
    if profile.build().region().await.is_some() {
        return Some("of the profile".to_owned());
    }
    let metadata = aws_config::imds::region::ImdsRegionProvider::builder();
    let metadata = metadata.configure(&provider_config()).build();
    let found = tokio::time::timeout(METADATA, metadata.region()).await;
    // Another one can only have come from there.
    let found = region != DEFAULT_REGION || found.ok().flatten().is_some();
    found.then(|| "of this instance".to_owned())
}
