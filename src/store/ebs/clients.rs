//! The clients, configured as the user's other AWS tools are.

use aws_config::retry::RetryConfig;
use aws_config::{Region, SdkConfig};

use super::EbsUrl;
use super::ec2::{Ec2, partition};
use crate::store::Result;
use crate::store::aws::answer::{Bounded, MAX_ANSWER};
use crate::store::aws::config::{
    DEFAULT_REGION, check_configured, config, configured_endpoint, whose,
};

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
        let (shared, has_region) = config(url.profile.as_deref(), url.region.as_deref()).await;
        if !has_region {
            tracing::warn!(
                "no region is configured: {DEFAULT_REGION} is used; name one as ebs://{DEFAULT_REGION}"
            );
        }
        Self::of(&shared, url)
    }

    /// Clients with a configuration that was read.
    pub(crate) fn of(shared: &SdkConfig, url: &EbsUrl) -> Self {
        let region = shared.region().map_or(DEFAULT_REGION, Region::as_ref).to_owned();
        let endpoint = url.endpoint.clone().or_else(|| configured_endpoint(shared, "EBS"));
        // There is one place where a request is sent again, and it is ours.
        let mut ebs = aws_sdk_ebs::config::Builder::from(shared)
            .retry_config(RetryConfig::disabled())
            .interceptor(Bounded(MAX_ANSWER));
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

    /// Checks where the services are.
    ///
    /// # Errors
    ///
    /// `Invalid` if an endpoint cannot be used.
    pub(crate) fn check(&self) -> Result<()> {
        check_configured("EBS", self.endpoint.as_deref())?;
        check_configured("EC2", self.ec2_endpoint.as_deref())
    }

    /// Where these lead, and for whom: the region, the endpoints, and the profile or the account.
    pub(super) fn place(
        &self,
        profile: Option<&str>,
        variable: impl Fn(&str) -> Option<String>,
    ) -> String {
        let endpoints = [("EBS", &self.endpoint), ("EC2", &self.ec2_endpoint)];
        let endpoints = endpoints.iter().filter_map(|(service, endpoint)| {
            endpoint.as_ref().map(|endpoint| format!(", {service} at {endpoint}"))
        });
        let who = whose(profile, variable);
        format!("{}, {who}{}", self.region, endpoints.collect::<String>())
    }

    /// Whether the quotas of AWS are to be expected.
    pub(super) fn is_aws(&self) -> bool {
        self.endpoint.as_deref().is_none_or(partition::is_of_aws)
    }
}

#[cfg(test)]
mod tests {
    use aws_config::BehaviorVersion;

    use super::*;
    use crate::store::ebs::ec2;

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
