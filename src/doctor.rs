//! `doctor`: looks whether everything is there that a mount needs, and says how to get what is not.
//!
//! Nothing is changed. Every question has a deadline, so that it ends whatever does not answer; what
//! depends on something that failed is not asked.

use std::path::Path;

use self::report::ReportBuilder;
use crate::store::StoreUrl;

mod aws;
mod bucket;
mod machine;
mod mount_point;
mod report;
mod repository;
mod wait;

pub use report::{Check, Report, Status};

/// Looks at the store, at this machine, and at a place to mount at. `show` is given every check as
/// soon as it is made; the report has all of them.
pub async fn examine(
    url: &StoreUrl,
    mount_point: Option<&Path>,
    staging: Option<&Path>,
    show: impl FnMut(&Check),
) -> Report {
    let mut report = ReportBuilder::new(show);
    examine_store(url, &mut report).await;
    machine::examine(url, staging, &mut report).await;
    if let Some(path) = mount_point {
        mount_point::examine(path, &mut report).await;
    }
    report.finish()
}

/// Looks at the store alone, and at what its credentials may do. As [`examine`].
pub async fn permissions(url: &StoreUrl, show: impl FnMut(&Check)) -> Report {
    let mut report = ReportBuilder::new(show);
    examine_store(url, &mut report).await;
    report.finish()
}

async fn examine_store(url: &StoreUrl, report: &mut impl report::Findings) {
    match url {
        StoreUrl::Ebs(url) => Box::pin(aws::examine(url, report)).await,
        StoreUrl::Directory(path) => repository::examine(path, report).await,
        StoreUrl::Bucket(url) => bucket::examine(url, report).await,
        StoreUrl::Synth(_) => {
            report
                .ok("store", format!("{url} is computed: it needs nothing, and can only be read"));
        }
    }
}
