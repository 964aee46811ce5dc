//! Who AWS takes us for.

use aws_config::SdkConfig;

use super::outcome::ask;
use crate::doctor::report::Findings;
use crate::store::ebs::EbsUrl;

pub(super) async fn examine(url: &EbsUrl, shared: &SdkConfig, report: &mut impl Findings) {
    const SUBJECT: &str = "identity";
    let mut config = aws_sdk_sts::config::Builder::from(shared);
    // As with EC2: a server that offers the one mostly offers the other.
    if let Some(endpoint) = url.ec2_endpoint.as_ref().or(url.endpoint.as_ref()) {
        config = config.endpoint_url(endpoint);
    }
    let client = aws_sdk_sts::Client::from_conf(config.build());
    match ask(client.get_caller_identity().send()).await {
        Ok(found) => {
            let (account, arn) = (found.account().unwrap_or("?"), found.arn().unwrap_or("?"));
            report.ok(SUBJECT, format!("account {account}, {arn}"));
        }
        Err(trouble) => report.warn(
            SUBJECT,
            format!("it could not be told: {}", trouble.text()),
            "nothing: fspfs does without. In a network without a way out, a VPC endpoint for STS tells it",
        ),
    }
}
