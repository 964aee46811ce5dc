//! `gc`: what no snapshot of a repository needs any more goes.

use clap::Args;
use serde::Serialize;

use super::Result;
use super::context::Context;
use super::table::{Operation, Report};
use super::text::size;
use crate::arguments::values;
use crate::store::repository::{DEFAULT_GRACE, GcReport};

/// Remove what no snapshot needs any more
#[derive(Args, Debug)]
#[command(after_help = "\
A first run finds what is not needed, and a later one deletes it: what a writer has just made looks
the same. So run this now and then, say once a week.")]
pub(crate) struct GcArgs {
    /// How long something must have been of no use, as 7d or 12h; at least 1h
    #[arg(long, value_name = "TIME", value_parser = values::grace)]
    #[arg(default_value_t = humantime::Duration::from(DEFAULT_GRACE))]
    grace: humantime::Duration,
    /// Remove it at once. Refused while another process has the repository open, and where that cannot
    /// be told: on network file systems, and in buckets
    #[arg(long, conflicts_with = "grace")]
    now: bool,
}

/// What a collection did.
#[derive(Debug, Serialize)]
pub(crate) struct Collected {
    #[serde(flatten)]
    report: GcReport,
    #[serde(skip)]
    dry_run: bool,
}

impl Operation for GcArgs {
    const NAME: &'static str = "gc";
    const LINE: Option<&'static str> = Some("--grace 7d");
    const DRY_RUN: bool = true;
    type Report = Collected;

    fn check(&self) -> std::result::Result<(), String> {
        match self.now {
            true => Err("--now is not for a job: the mount has the repository open".to_owned()),
            false => Ok(()),
        }
    }

    async fn run(self, cx: &Context) -> Result<Collected> {
        let repository = cx.repository().await?;
        let collecting = async {
            match self.now {
                true => repository.gc_now(cx.dry_run).await,
                false => repository.gc(*self.grace, cx.dry_run).await,
            }
        };
        let report = cx.run.unless_stopped(collecting).await??;
        Ok(Collected { report, dry_run: cx.dry_run })
    }
}

impl Report for Collected {
    fn lines(&self) -> Vec<String> {
        let Self { report, dry_run } = self;
        let deleted = if *dry_run { "would be deleted" } else { "deleted" };
        vec![
            format!("{} objects in use", report.reachable_objects),
            format!("{} objects {deleted}", report.deleted_objects),
            format!("{} objects wait for the grace period to end", report.waiting_objects),
            format!("{} of unfinished files removed", size(report.swept_bytes)),
            format!(
                "{} of {} blocks in the packs in use belong to no snapshot any more",
                report.wasted_blocks, report.packed_blocks
            ),
        ]
    }

    fn ids(&self) -> Vec<String> {
        Vec::new()
    }
}
