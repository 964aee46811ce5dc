//! `delete`: snapshots go, and pending ones are aborted.

use clap::Args;
use serde::Serialize;

use super::context::Context;
use super::table::{Operation, Report};
use super::{Error, Exit, Result};
use crate::model::SnapshotId;
use crate::transfer::journal::forget_snapshot;

/// Delete snapshots, or abort pending ones
#[derive(Args, Debug)]
pub(crate) struct DeleteArgs {
    /// The snapshots
    #[arg(value_name = "SNAP", required = true)]
    snapshots: Vec<SnapshotId>,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

/// Which ones went.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Deleted {
    deleted: Vec<SnapshotId>,
    failed: Vec<SnapshotId>,
}

impl Operation for DeleteArgs {
    const NAME: &'static str = "delete";
    const LINE: Option<&'static str> = Some("--yes snap-0123456789abcdef0");
    const DRY_RUN: bool = true;
    type Report = Deleted;

    async fn run(self, cx: &Context) -> Result<Deleted> {
        let store = cx.open().await?;
        let ids: Vec<_> = self.snapshots.iter().map(SnapshotId::as_str).collect();
        if !self.yes
            && !cx.dry_run
            && !cx.console.confirm(&format!("Delete {}?", ids.join(", ")))?
        {
            return Err(Error::Refused("nothing was deleted".to_owned()));
        }
        let mut report = Deleted::default();
        for id in self.snapshots {
            let done = match cx.dry_run {
                true => store.describe(&id).await.map(drop),
                false => store.delete(&id).await,
            };
            match done {
                Ok(()) if cx.dry_run => {
                    cx.note(format_args!("{id} would be deleted"));
                    report.deleted.push(id);
                }
                Ok(()) => {
                    // Nothing goes on with it.
                    forget_snapshot(&cx.house.journals, &id);
                    report.deleted.push(id);
                }
                Err(error) => {
                    cx.warn(error);
                    report.failed.push(id);
                }
            }
        }
        Ok(report)
    }
}

impl Report for Deleted {
    fn lines(&self) -> Vec<String> {
        self.deleted.iter().map(SnapshotId::to_string).collect()
    }

    fn ids(&self) -> Vec<String> {
        self.lines()
    }

    fn exit(&self) -> Exit {
        match (self.deleted.is_empty(), self.failed.is_empty()) {
            (_, true) => Exit::Done,
            (true, false) => Exit::Failed,
            (false, false) => Exit::Partly,
        }
    }
}
