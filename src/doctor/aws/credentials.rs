//! Who signs.

use std::time::{Duration, SystemTime};

use aws_config::SdkConfig;
use aws_credential_types::Credentials;
use aws_credential_types::credential_feature::AwsCredentialFeature as Feature;
use aws_credential_types::provider::ProvideCredentials as _;
use aws_credential_types::provider::error::CredentialsError;
use jiff::Timestamp;

use super::sudo::Caller;
use crate::doctor::report::Findings;
use crate::store::causes;

const SUBJECT: &str = "credentials";

/// How long finding them may take: a program of the user's, SSO, the metadata of the instance.
const FIND: Duration = Duration::from_secs(10);

/// Less than this is soon.
const SOON: Duration = Duration::from_mins(15);

/// Characters of an access key that are shown.
const SHOWN: usize = 4;

/// Reports the credentials, of the profile that the store names, if it names one; whether there are any to sign with.
pub(in crate::doctor) async fn examine(
    profile: Option<&str>,
    shared: &SdkConfig,
    report: &mut impl Findings,
) -> bool {
    let Some(provider) = shared.credentials_provider() else {
        report.fail(SUBJECT, "there is no provider of any", "`aws configure`, or `aws sso login`");
        return false;
    };
    match tokio::time::timeout(FIND, provider.provide_credentials()).await {
        Ok(Ok(found)) => {
            found_some(&found, report);
            true
        }
        Ok(Err(error)) => {
            let why = match &error {
                CredentialsError::CredentialsNotLoaded(_) => none_loaded(profile),
                // None of the causes holds a secret: a provider that fails has none.
                error => causes(error),
            };
            missing(&why, report);
            false
        }
        Err(_) => {
            missing(&format!("none were found within {} s", FIND.as_secs()), report);
            false
        }
    }
}

fn none_loaded(profile: Option<&str>) -> String {
    if let Some(profile) = profile {
        return format!("there are none in the profile {profile}, which the store names");
    }
    let profile = std::env::var("AWS_PROFILE")
        .map_or_else(|_| "a profile".to_owned(), |name| format!("the profile {name}"));
    format!(
        "there are none: not in the environment, in {profile}, or from the role of a container or an instance"
    )
}

fn missing(why: &str, report: &mut impl Findings) {
    let cure = Caller::find().and_then(|caller| caller.advice()).unwrap_or_else(|| {
        "`aws configure` or `aws configure sso`, then `aws sso login`; or AWS_PROFILE, or the profile in the store: ebs://PROFILE@REGION, s3://BUCKET?profile=PROFILE; docs/aws.md begins with it".to_owned()
    });
    report.fail(SUBJECT, why, cure);
}

fn found_some(found: &Credentials, report: &mut impl Findings) {
    let features = found.get_property::<Vec<Feature>>();
    let features = features.map_or(&[][..], Vec::as_slice);
    let kind = if found.session_token().is_some() { "a session" } else { "a static key" };
    let whose = format!("{}: {kind}, {}", origin(features), shown(found.access_key_id()));
    let now = SystemTime::now();
    match found.expiry() {
        Some(end) if end <= now => report.fail(
            SUBJECT,
            format!("{whose}, expired at {}", time(end)),
            "get new ones, as with `aws sso login`",
        ),
        Some(end) if end < now + SOON => report.warn(
            SUBJECT,
            format!("{whose}, until {}", time(end)),
            "a mount asks for new ones before that; where these come from has to have some by then",
        ),
        Some(end) => report.ok(SUBJECT, format!("{whose}, until {}", time(end))),
        None => report.ok(SUBJECT, whose),
    }
}

/// Where credentials come from, as far as the SDK tells. What it adds last is the outermost.
fn origin(features: &[Feature]) -> &'static str {
    let of = |feature: &Feature| {
        Some(match feature {
            Feature::CredentialsEnvVars => "from the environment",
            Feature::CredentialsSso | Feature::CredentialsProfileSso => {
                "from IAM Identity Center, by a profile"
            }
            Feature::CredentialsImds => "from the role of this instance",
            Feature::CredentialsHttp => "from the role of this container",
            Feature::CredentialsProcess | Feature::CredentialsProfileProcess => {
                "from the credential_process of a profile"
            }
            Feature::CredentialsStsAssumeRole => "from a role that is assumed",
            Feature::CredentialsStsAssumeRoleWebId
            | Feature::CredentialsEnvVarsStsWebIdToken
            | Feature::CredentialsProfileStsWebIdToken => "from a role, by a web identity",
            Feature::CredentialsLogin | Feature::CredentialsProfileLogin => "from `aws login`",
            _ => return None,
        })
    };
    features.iter().rev().find_map(of).unwrap_or({
        if features.contains(&Feature::CredentialsProfile) { "from a profile" } else { "found" }
    })
}

/// The end of an access key: enough to know it again.
fn shown(key: &str) -> String {
    let count = key.chars().count();
    if count < 3 * SHOWN {
        return "of a short name".to_owned();
    }
    let end: String = key.chars().skip(count - SHOWN).collect();
    format!("…{end}")
}

fn time(time: SystemTime) -> String {
    let time = Timestamp::try_from(time).unwrap_or_default();
    time.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_of_a_key_is_shown() {
        assert_eq!(shown("AKIAIOSFODNN7EXAMPLE"), "…MPLE");
        assert_eq!(shown("none"), "of a short name");
        assert!(!shown("shortkey").contains("key"));
    }

    #[test]
    fn where_they_come_from() {
        assert_eq!(origin(&[Feature::CredentialsEnvVars]), "from the environment");
        assert_eq!(origin(&[Feature::CredentialsProfile]), "from a profile");
        let sso = [Feature::CredentialsSso, Feature::CredentialsProfile];
        assert_eq!(origin(&sso), "from IAM Identity Center, by a profile");
        assert_eq!(origin(&[]), "found");
    }

    #[test]
    fn expired_ones_are_a_failure() {
        use crate::doctor::report::{Check, ReportBuilder, Status};
        let status = |expiry: Option<SystemTime>| {
            let found = Credentials::new("AKIAIOSFODNN7EXAMPLE", "secret", None, expiry, "test");
            let mut report = ReportBuilder::new(|_: &Check| {});
            found_some(&found, &mut report);
            let report = report.finish();
            let json = serde_json::to_string(&report).unwrap();
            assert!(!json.contains("secret") && !json.contains("AKIA"), "{json}");
            report.checks[0].status
        };
        let now = SystemTime::now();
        assert_eq!(status(None), Status::Ok);
        assert_eq!(status(Some(now - Duration::from_secs(1))), Status::Failure);
        assert_eq!(status(Some(now + Duration::from_mins(1))), Status::Warning);
        assert_eq!(status(Some(now + Duration::from_hours(1))), Status::Ok);
    }
}
