//! A repository in a bucket: who signs, whether the service answers, and what it lets these credentials do.

use std::time::{Duration, SystemTime};

use super::aws::{clock, configuration, credentials, endpoint};
use super::report::Findings;
use crate::store::repository::{BucketUrl, Trial};
use crate::store::{Error, ErrorKind, Result};

/// How long one question may take.
const ANSWER: Duration = Duration::from_secs(15);

const LISTING: &str = "s3:ListBucket";
const READING: &str = "s3:GetObject";
const WRITING: &str = "s3:PutObject";
const DELETING: &str = "s3:DeleteObject";
const REPOSITORY: &str = "repository";

/// What needs an answer of the service, in the order in which it is asked.
const CHECKS: &[&str] = &[LISTING, REPOSITORY, WRITING, DELETING];

pub(super) async fn examine(url: &BucketUrl, report: &mut impl Findings) {
    if let Err((left, because)) = ask(url, report).await {
        for check in left {
            report.skip(check, format!("because {because}"));
        }
    }
}

/// Asks one thing after the other.
///
/// # Errors
///
/// What is not asked, and why.
async fn ask(
    url: &BucketUrl,
    report: &mut impl Findings,
) -> std::result::Result<(), (&'static [&'static str], &'static str)> {
    let (profile, region) = (url.profile.as_deref(), url.region.as_deref());
    if !endpoint::way(report) {
        return Err((CHECKS, "no connection can be made as it is configured"));
    }
    let shared = configuration(profile, region, report).await;
    let shared = shared.ok_or((CHECKS, "the configuration cannot be read"))?;
    let bucket = match within(Trial::open(url)).await {
        Ok(bucket) => bucket,
        Err(error) => {
            report.fail("bucket", told(&error), cure(&error));
            return Err((CHECKS, "no request can be made"));
        }
    };
    if !credentials::examine(profile, &shared, report).await {
        return Err((CHECKS, "there are no credentials"));
    }
    match within(bucket.time()).await {
        Ok(theirs) => {
            clock::tell(SystemTime::now(), theirs.into(), clock::REFUSED_BY_S3, report);
        }
        Err(error) => {
            report.fail("bucket", format!("{url}: {}", told(&error)), cure(&error));
            return Err((CHECKS, "the service does not answer"));
        }
    }
    match within(bucket.list()).await {
        Ok(()) => report.ok(LISTING, "allowed: the bucket was listed"),
        Err(error) => {
            report.fail(LISTING, told(&error), cure(&error));
            if !matches!(error.kind(), ErrorKind::Denied) {
                return Err((&CHECKS[1..], "the bucket cannot be used"));
            }
        }
    }
    match within(bucket.repository()).await {
        Ok(repository) => {
            let id = repository.id();
            report.ok(REPOSITORY, format!("{url} opens: format 1, id {id}"));
            report.ok(READING, "allowed: fspfs.json was read");
        }
        Err(error) => {
            let cure = match error.kind() {
                ErrorKind::NotFound => {
                    "name the bucket and the prefix that hold fspfs.json, or make a repository there"
                }
                _ => cure(&error),
            };
            let check = if error.kind() == ErrorKind::Denied { READING } else { REPOSITORY };
            report.fail(check, told(&error), cure);
            return Err((&CHECKS[2..], "the repository does not open"));
        }
    }
    match within(bucket.write()).await {
        Ok(true) => report.ok(WRITING, "not refused: fspfs.json is there, and was not made anew"),
        Ok(false) => report.warn(
            WRITING,
            "the service does not keep to If-None-Match: two writers could take each other's names",
            "nothing, to read; to write, --single-writer, where nobody else does",
        ),
        Err(error) if error.kind() == ErrorKind::Denied => report.warn(
            WRITING,
            told(&error),
            "nothing, to read; else the policy for writing in docs/iam.md",
        ),
        Err(error) => report.warn(WRITING, told(&error), cure(&error)),
    }
    report.skip(
        DELETING,
        "not tried: to try it is to delete; the policy for writing in docs/iam.md has it",
    );
    Ok(())
}

async fn within<T>(answer: impl Future<Output = Result<T>>) -> Result<T> {
    let late = |_| {
        let message = format!("there was no answer within {} s", ANSWER.as_secs());
        Error::new(ErrorKind::Timeout, message)
    };
    tokio::time::timeout(ANSWER, answer).await.map_err(late).flatten()
}

/// What went wrong, without the advice to ask the doctor.
fn told(error: &Error) -> String {
    let told = error.to_string();
    let end = told.find("; `fspfs doctor`").unwrap_or(told.len());
    told[..end].to_owned()
}

fn cure(error: &Error) -> &'static str {
    match error.kind() {
        _ if error.to_string().contains("NoSuchBucket") => {
            "name a bucket that there is: `aws s3 ls` lists those of the account"
        }
        ErrorKind::Denied => {
            "the policy of these credentials, and that of the bucket, have to allow it: docs/iam.md"
        }
        ErrorKind::Credentials => {
            "keys that this service knows: AWS_PROFILE names a profile, or `profile=` in the URL; `aws sso login` renews those of SSO"
        }
        ErrorKind::Corrupt | ErrorKind::Unsupported | ErrorKind::Invalid => {
            "as it says; docs/troubleshooting.md has more"
        }
        _ => {
            "check the endpoint and the region in the URL, that the service runs, and that this machine reaches it"
        }
    }
}
