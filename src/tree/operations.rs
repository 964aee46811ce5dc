//! The operations that jobs of a mount run.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;

use super::Tree;
use crate::jobs::{ExitCode, FAILED, Job};
use crate::model::SnapshotId;
use crate::ops::context::{Console, Context, WorkingImages};
use crate::ops::table::Line;
use crate::ops::{self, Error};
use crate::transfer::engine::Run;
use crate::transfer::{Progress, SharedProgress};

/// Runs an operation, and tells the job what came of it.
pub(super) async fn run(tree: Arc<Tree>, job: Arc<Job>, line: Line) -> ExitCode {
    let Line { asked, screen, dry_run } = line;
    let cx = Context {
        house: Arc::clone(&tree.house),
        screen,
        dry_run,
        console: Arc::new(Files(Arc::clone(&job))),
        run: Run { memory: tree.memory.clone(), cancel: job.cancel_token(), ..Run::default() },
        working: Some(tree),
    };
    match asked.run(cx).await {
        Ok(outcome) => {
            outcome.lines.iter().for_each(|line| job.print(line));
            outcome.exit.code()
        }
        Err(error) => {
            job.log(&format!("{:#}", anyhow::Error::from(error)));
            FAILED
        }
    }
}

/// The files of a job.
struct Files(Arc<Job>);

impl Console for Files {
    fn line(&self, text: &str) {
        self.0.print(text);
    }

    fn tell(&self, text: &str) {
        self.0.log(text);
    }

    fn progress(&self, _: &'static str) -> SharedProgress {
        Arc::new(Blocks::of(&self.0))
    }

    fn confirm(&self, question: &str) -> ops::Result<bool> {
        Err(Error::Refused(format!("{question} Nobody can be asked here: give --yes")))
    }
}

/// The file `progress` of a job.
struct Blocks {
    job: Arc<Job>,
    done: AtomicU64,
    total: AtomicU64,
}

impl Blocks {
    fn of(job: &Arc<Job>) -> Self {
        Self { job: Arc::clone(job), done: AtomicU64::new(0), total: AtomicU64::new(0) }
    }

    fn show(&self) {
        self.job
            .set_progress(self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed));
    }
}

impl Progress for Blocks {
    fn total(&self, blocks: u64) {
        self.total.store(blocks, Ordering::Relaxed);
        self.show();
    }

    fn advance(&self, blocks: u64) {
        self.done.fetch_add(blocks, Ordering::Relaxed);
        self.show();
    }
}

#[async_trait]
impl WorkingImages for Tree {
    async fn commit(
        &self,
        name: &str,
        wait: bool,
        progress: SharedProgress,
    ) -> ops::Result<SnapshotId> {
        self.commit_working(name, wait, progress).await.map_err(in_mount)
    }

    fn cancel_commit(&self, name: &str) -> ops::Result<()> {
        self.cancel_commit_of(name).map_err(in_mount)
    }

    async fn clone_of(&self, snapshot: &SnapshotId, name: &str) -> ops::Result<()> {
        self.clone_working(snapshot, name).await.map_err(in_mount)
    }
}

fn in_mount(error: super::Error) -> Error {
    Error::Mount(Box::new(error))
}
