//! `delete`: snapshots go, and pending ones are aborted.

use clap::Args;
use serde::Serialize;

use super::context::Context;
use super::reference::Reference;
use super::table::{Operation, Report};
use super::{Error, Exit, Result};
use crate::model::SnapshotId;
use crate::shown::one_line;
use crate::store::SharedStore;
use crate::transfer::journal::forget_snapshot;

/// Delete snapshots, or abort pending ones
#[derive(Args, Debug)]
pub(crate) struct DeleteArgs {
    /// The snapshots, named as for `download`; what is no id must fit one snapshot alone
    #[arg(value_name = "SNAP", required = true)]
    snapshots: Vec<Reference>,
    /// Do not ask; where there is no terminal to ask at, nothing is deleted without this
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
        let mut snapshots = Vec::new();
        for reference in &self.snapshots {
            let id = reference.only(&store).await;
            snapshots.push(id.map_err(|error| error.doing(format!("delete {reference}")))?);
        }
        if !self.yes && !cx.dry_run {
            let ids: Vec<_> = snapshots.iter().map(SnapshotId::as_str).collect();
            let asked = cx.console.confirm(&question(cx, &store, &snapshots).await);
            if !asked.map_err(|error| error.doing(format!("delete {}", ids.join(", "))))? {
                return Err(Error::Refused("nothing was deleted".to_owned()));
            }
        }
        let mut report = Deleted::default();
        for id in snapshots {
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
                    if let Some(journals) = &cx.house.journals {
                        forget_snapshot(journals, &id);
                    }
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

/// Asks for these snapshots, each with what people know it by.
async fn question(cx: &Context, store: &SharedStore, ids: &[SnapshotId]) -> String {
    let mut question = String::new();
    for id in ids {
        let known = match store.describe(id).await {
            Ok(found) => format!(
                "{}, {}, {} UTC",
                found.name().map_or_else(|| "without a name".to_owned(), one_line),
                found.volume_size,
                found.start_time.strftime("%Y-%m-%d %H:%M:%S"),
            ),
            Err(error) => error.to_string(),
        };
        question.push_str(&format!("{id}: {known}\n"));
    }
    let which = if ids.len() == 1 { "it".to_owned() } else { format!("these {}", ids.len()) };
    question + &format!("Delete {which} from {}?", cx.house.from)
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
