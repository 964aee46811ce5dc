//! The operations that jobs of a mount run.

use std::sync::{Arc, Mutex, PoisonError};

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
        console: Arc::new(Files::of(&job)),
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
struct Files {
    job: Arc<Job>,
    blocks: Arc<Blocks>,
}

impl Files {
    fn of(job: &Arc<Job>) -> Self {
        let blocks = Blocks { job: Arc::clone(job), sinks: Mutex::default() };
        Self { job: Arc::clone(job), blocks: Arc::new(blocks) }
    }
}

impl Console for Files {
    fn line(&self, text: &str) {
        self.job.print(text);
    }

    fn tell(&self, text: &str) {
        self.job.log(text);
    }

    fn progress(&self, _: &str) -> SharedProgress {
        let number = self.blocks.change(|sinks| {
            sinks.push((0, 0));
            sinks.len() - 1
        });
        Arc::new(OfSink { blocks: Arc::clone(&self.blocks), number })
    }

    fn confirm(&self, _: &str) -> ops::Result<bool> {
        Err(Error::unasked())
    }
}

/// The file `progress` of a job: of each sink the blocks that are done, and all.
struct Blocks {
    job: Arc<Job>,
    sinks: Mutex<Vec<(u64, u64)>>,
}

impl Blocks {
    fn change<T>(&self, change: impl FnOnce(&mut Vec<(u64, u64)>) -> T) -> T {
        let mut sinks = self.sinks.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&mut sinks);
        // What is begun anew is done twice.
        let done = sinks.iter().map(|(done, total)| done.min(total)).sum();
        self.job.set_progress(done, sinks.iter().map(|(_, total)| total).sum());
        changed
    }
}

/// Those of one sink.
struct OfSink {
    blocks: Arc<Blocks>,
    number: usize,
}

impl Progress for OfSink {
    fn total(&self, blocks: u64) {
        self.blocks.change(|sinks| sinks[self.number] = (0, blocks));
    }

    fn advance(&self, blocks: u64) {
        self.blocks.change(|sinks| sinks[self.number].0 += blocks);
    }
}

#[async_trait]
impl WorkingImages for Tree {
    async fn commit(
        &self,
        name: &str,
        wait: bool,
        as_is: bool,
        progress: SharedProgress,
    ) -> ops::Result<SnapshotId> {
        self.commit_working(name, wait, as_is, progress).await.map_err(in_mount)
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
