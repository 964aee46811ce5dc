//! What the jobs of a mount do.

use std::sync::Arc;

use super::{Result, Tree};
use crate::arguments::{CloneArgs, CommitArgs, Operation, working_name};
use crate::jobs::{DONE, ExitCode, FAILED, Job};
use crate::model::SnapshotId;

/// What a line in a control file asks for, with nothing left to misunderstand.
pub(super) struct Task {
    /// The working image.
    name: String,
    kind: Kind,
}

enum Kind {
    Commit { wait: bool },
    CancelCommit,
    Clone(SnapshotId),
}

impl Task {
    /// # Errors
    ///
    /// What is wrong with it, for people.
    pub(super) fn new(operation: Operation) -> std::result::Result<Self, String> {
        let (file, kind) = match operation {
            Operation::Commit(CommitArgs { file, cancel: true, .. }) => (file, Kind::CancelCommit),
            Operation::Commit(CommitArgs { file, wait, .. }) => (file, Kind::Commit { wait }),
            Operation::Clone(CloneArgs { snapshot, file }) => (file, Kind::Clone(snapshot)),
        };
        Ok(Self { name: working_name(&file)?.to_owned(), kind })
    }

    /// Does it, and tells the job what came of it.
    pub(super) async fn run(self, tree: Arc<Tree>, job: Arc<Job>) -> ExitCode {
        let name = &self.name;
        let (what, done) = match self.kind {
            Kind::Commit { wait } => ("commit", commit(&tree, &job, name, wait).await.map(Some)),
            Kind::CancelCommit => ("cancel the commit of", tree.cancel_commit(name).map(|()| None)),
            Kind::Clone(id) => {
                let made = tokio::select! {
                    made = tree.clone_working(&id, name) => made.map(|()| Some(id)),
                    () = job.cancelled() => return FAILED,
                };
                ("make", made)
            }
        };
        match done {
            Ok(id) => {
                // The id is the last line of every command that is about a snapshot.
                if let Some(id) = id {
                    job.print(id);
                }
                DONE
            }
            Err(error) => {
                job.log(&format!("cannot {what} {name}: {error}"));
                FAILED
            }
        }
    }
}

async fn commit(tree: &Tree, job: &Arc<Job>, name: &str, wait: bool) -> Result<SnapshotId> {
    let progress = Arc::clone(job);
    let report = Arc::new(move |done, total| progress.set_progress(done, total));
    let mut commit = std::pin::pin!(tree.commit_working(name, wait, report));
    tokio::select! {
        done = &mut commit => return done,
        () = job.cancelled() => {}
    }
    // If there is nothing to cancel any more, only the wait for the snapshot is given up.
    tree.cancel_commit(name)?;
    commit.await
}
