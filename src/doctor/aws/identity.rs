//! Who AWS takes us for.

use aws_config::SdkConfig;

use super::probe::{Probe, ask_sdk};
use crate::doctor::report::Findings;
use crate::store::ebs::EbsUrl;
use crate::store::ebs::ec2::partition::is_of_aws;

pub(super) async fn examine(
    url: &EbsUrl,
    shared: &SdkConfig,
    ec2: &Probe,
    report: &mut impl Findings,
) {
    const SUBJECT: &str = "identity";
    let mut config = aws_sdk_sts::config::Builder::from(shared);
    // A server that offers EC2 mostly offers this, and the keys of another service are not for AWS to see.
    let given = url.ec2_endpoint.as_ref().or(url.endpoint.as_ref());
    let elsewhere = ec2.endpoint.as_ref().filter(|at| !is_of_aws(at));
    if let Some(endpoint) = given.or(elsewhere) {
        config = config.endpoint_url(endpoint);
    }
    let client = aws_sdk_sts::Client::from_conf(config.build());
    match ask_sdk(client.get_caller_identity().send()).await {
        Ok(found) => {
            let (account, arn) = (found.account().unwrap_or("?"), found.arn().unwrap_or("?"));
            report.ok(SUBJECT, format!("account {account}, {arn}"));
        }
        Err(failure) => report.warn(
            SUBJECT,
            format!("it could not be told: {failure}"),
            "nothing: fspfs does without. In a network without a way out, a VPC endpoint for STS tells it",
        ),
    }
}
