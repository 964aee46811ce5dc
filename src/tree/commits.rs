//! Commits that nobody asked for by name, as jobs.

use std::sync::Arc;
use std::time::Duration;

use super::Error;
use crate::image::working::{self, Commit, Watch};
use crate::jobs::{DONE, ExitCode, FAILED, Job, Jobs};

/// How often it is looked how far a commit is.
const LOOK: Duration = Duration::from_millis(200);

/// Makes a job of each commit that it learns of. The job runs nothing: it tells of the commit, and ends with it.
#[derive(Debug)]
pub(super) struct CommitJobs(pub(super) Jobs);

impl Watch for CommitJobs {
    fn commit_begins(&self, name: &str, commit: &Arc<Commit>) {
        // A name has no control characters, which alone cannot be quoted.
        let command = format!("commit {}", shlex::try_quote(name).unwrap_or_default());
        let (name, commit) = (name.to_owned(), Arc::clone(commit));
        self.0.follow(command, |job| follow(job, name, commit));
    }
}

async fn follow(job: Arc<Job>, name: String, commit: Arc<Commit>) -> ExitCode {
    let cancelled = async {
        job.cancelled().await;
        commit.cancel();
        std::future::pending().await
    };
    let shown = async {
        loop {
            show(&job, &commit);
            tokio::time::sleep(LOOK).await;
        }
    };
    let outcome = tokio::select! {
        outcome = commit.wait() => outcome,
        outcome = cancelled => outcome,
        () = shown => unreachable!("it goes on until it is dropped"),
    };
    show(&job, &commit);
    match outcome {
        Ok(id) => {
            job.print(id);
            DONE
        }
        Err(error) => {
            if matches!(error, working::Error::Cancelled) {
                // Also when it was not the job that was asked to end.
                job.cancel();
            }
            job.log(&format!("cannot commit {name}: {}", Error::from(error)));
            FAILED
        }
    }
}

fn show(job: &Job, commit: &Commit) {
    let (done, total) = commit.progress();
    job.set_progress(done, total);
}
