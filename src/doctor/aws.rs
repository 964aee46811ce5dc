//! EBS: credentials, region, endpoints, the clock, and what the credentials may do.

use std::time::Duration;

use aws_config::SdkConfig;

use super::report::Findings;
use crate::store::aws::config::config;
use crate::store::ebs::EbsUrl;
use crate::store::ebs::clients::Clients;

pub(super) mod clock;
pub(super) mod credentials;
pub(super) mod endpoint;
mod identity;
mod keys;
mod probe;
mod reads;
mod region;
mod sudo;
mod writes;

/// How long reading the configuration may take. Off EC2, finding out that there is no instance
/// metadata takes a while.
const CONFIGURATION: Duration = Duration::from_secs(15);

/// Checks that need an answer of the service.
const NEEDS_ANSWERS: [&str; 5] =
    ["identity", "reading", "writing", "encryption by default", "quotas"];

pub(super) async fn examine(url: &EbsUrl, report: &mut impl Findings) {
    if !endpoint::way(report) {
        skip_all("no connection can be made as it is configured", report);
        return;
    }
    let read = configuration(url.profile.as_deref(), url.region.as_deref(), report).await;
    let Some(shared) = read else {
        skip_all("the configuration cannot be read", report);
        return;
    };
    let clients = Clients::of(&shared, url);
    if let Err(error) = clients.check() {
        report.fail("configuration", error.to_string(), "name the endpoint without them");
        skip_all("the endpoint cannot be used", report);
        return;
    }
    region::examine(url, &shared, report).await;
    let signs = credentials::examine(url.profile.as_deref(), &shared, report).await;
    let (ec2, ebs) = tokio::join!(probe::ec2(&clients, signs), probe::ebs(&clients, signs));
    let answers = [endpoint::examine(url, &ec2, report), endpoint::examine(url, &ebs, report)];
    clock::examine(&[&ec2, &ebs], report);
    if !signs {
        return skip_all("there are no credentials", report);
    }
    if !answers[0] {
        return skip_all("EC2 does not answer", report);
    }
    if !probe::accepted(&[&ec2, &ebs], report) {
        return skip_all("the signature was not accepted", report);
    }
    identity::examine(url, &shared, &ec2, report).await;
    if answers[1] {
        reads::examine(&clients, report).await;
    } else {
        report.skip("reading", "because the EBS direct APIs do not answer");
    }
    Box::pin(writes::examine(&clients, report)).await;
    keys::examine(&clients, report).await;
    quotas(report);
}

/// Reads the configuration of AWS's tools; `None` if that takes too long, which is reported.
pub(super) async fn configuration(
    profile: Option<&str>,
    region: Option<&str>,
    report: &mut impl Findings,
) -> Option<SdkConfig> {
    let read = tokio::time::timeout(CONFIGURATION, config(profile, region)).await;
    if read.is_err() {
        report.fail(
            "configuration",
            format!("it was not read within {} s", CONFIGURATION.as_secs()),
            "off EC2, set AWS_EC2_METADATA_DISABLED=true, and name the region: ebs://us-east-1, s3://BUCKET?region=us-east-1, or AWS_REGION",
        );
    }
    read.ok().map(|(shared, _)| shared)
}

fn skip_all(because: &str, report: &mut impl Findings) {
    for check in NEEDS_ANSWERS {
        report.skip(check, format!("because {because}"));
    }
}

/// Those that are documented. The live ones take a service of their own to ask.
fn quotas(report: &mut impl Findings) {
    report.ok(
        "quotas",
        "by default 1,000 blocks a second are read and as many written, for an account and for a snapshot, and 50 pages listed; `aws service-quotas list-service-quotas --service-code ebs` shows those of this account",
    );
}
