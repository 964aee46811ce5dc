//! A repository in a bucket.

use std::time::Duration;

use super::report::Findings;
use crate::store::StoreOptions;
use crate::store::repository::{BucketUrl, Repository};

/// How long opening may take: the configuration is read, and one small object.
const OPEN: Duration = Duration::from_secs(30);

pub(super) async fn examine(url: &BucketUrl, report: &mut impl Findings) {
    let options = StoreOptions::default();
    let why = match tokio::time::timeout(OPEN, Repository::open_in_bucket(url, &options)).await {
        Ok(Ok(repository)) => {
            report.ok("repository", format!("{url} opens: format 1, id {}", repository.id()));
            return;
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("{url} does not answer within {} s", OPEN.as_secs()),
    };
    report.fail(
        "repository",
        why,
        format!("name the bucket and the prefix that hold fspfs.json; `fspfs init {url}` makes an empty repository"),
    );
}
