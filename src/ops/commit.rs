//! `commit`: a working image becomes a snapshot.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::context::Context;
use super::table::{Operation, Report, Words};
use super::{Error, Result};
use crate::arguments::working_name;
use crate::model::SnapshotId;

/// Make a snapshot of a working image, or try again
#[derive(Args, Debug)]
#[command(after_help = "\
It ends when the snapshot is made: everything is stored, and the store has taken over. The id of the
snapshot is the last line on stdout. A commit that failed or was interrupted is tried again. What is
known not to be whole is refused without --as-is. A signal ends the wait and not the commit; --cancel
does.

Examples:
  fspfs commit /mnt/fsp/new/web.img
  fspfs commit --wait /mnt/fsp/new/web.img
  fspfs commit --cancel /mnt/fsp/new/web.img")]
pub(crate) struct CommitArgs {
    /// A file below `new/` of a mount
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Wait until the store calls the snapshot completed, which can take long
    #[arg(long, conflicts_with = "cancel")]
    wait: bool,
    /// Take it as it is, even if it is known not to be whole
    #[arg(long, conflicts_with = "cancel")]
    as_is: bool,
    /// Cancel the commit of this file that is running; what was written stays
    #[arg(long)]
    cancel: bool,
}

/// The snapshot of a working image.
#[derive(Debug, Serialize)]
pub(crate) struct Made {
    id: Option<SnapshotId>,
}

impl Report for Made {
    fn lines(&self) -> Vec<String> {
        self.id.iter().map(SnapshotId::to_string).collect()
    }

    fn ids(&self) -> Vec<String> {
        self.lines()
    }
}

impl Made {
    pub(super) fn of(id: Option<SnapshotId>) -> Self {
        Self { id }
    }
}

impl Operation for CommitArgs {
    const NAME: &'static str = "commit";
    const LINE: Option<&'static str> = Some("web.img");
    type Report = Made;

    async fn run(self, cx: &Context) -> Result<Made> {
        let working = cx.working()?;
        let name = working_name(&self.file).map_err(Error::Refused)?;
        if self.cancel {
            let cancelled = working.cancel_commit(name);
            cancelled.map_err(|e| e.doing(format!("cancel the commit of {name}")))?;
            return Ok(Made::of(None));
        }
        let run = cx.run_showing("Storing", name);
        let commit = working.commit(name, self.wait, self.as_is, run.progress.clone());
        let mut commit = std::pin::pin!(commit);
        let done = tokio::select! {
            done = &mut commit => done,
            () = run.cancel.cancelled() => {
                // If there is nothing to cancel any more, only the wait for the snapshot is given up.
                working.cancel_commit(name).map_err(|e| e.doing(format!("commit {name}")))?;
                commit.await
            }
        };
        done.map(|id| Made::of(Some(id))).map_err(|e| e.doing(format!("commit {name}")))
    }

    fn check(&self) -> std::result::Result<(), String> {
        working_name(&self.file).map(drop)
    }

    fn at_mount(&self) -> Option<(&Path, Words<'_>)> {
        let flags = [(self.wait, "--wait"), (self.as_is, "--as-is"), (self.cancel, "--cancel")];
        let words = move |name: &str| {
            let flags = flags.iter().filter(|(given, _)| *given).map(|(_, flag)| *flag);
            flags.chain(["--", name]).map(str::to_owned).collect()
        };
        Some((&self.file, Box::new(words)))
    }
}
