//! Running operations: what was asked, how far they are, and what came of them.
//!
//! A job is a task of its own. Whoever started it may look at it, cancel it or forget it, and never
//! has to wait for it.

use std::collections::{BTreeMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use tokio::sync::Semaphore;

use crate::transfer::engine::ENDS_WITHIN;

pub(crate) use self::job::{ExitCode, FAILED, Job, State};

mod job;
mod log;

/// Jobs that run at the same time at most. Another one is refused.
pub(crate) const MAX_RUNNING: usize = 64;

/// Jobs that are kept after they have ended. The one that ended first is forgotten first.
pub(crate) const MAX_ENDED: usize = 100;

/// How long a cancelled job may take to end by itself: what a transfer may, and some time for what is before and
/// behind it. After it the job is dropped where it is.
const CANCEL_GRACE: Duration = ENDS_WITHIN.saturating_add(Duration::from_secs(5));

/// As many jobs run as may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_RUNNING} jobs are running already: wait for one of them to end, or cancel one")]
pub(crate) struct TooMany;

/// The jobs of one mount, by number. The first one is number 1; no number is used twice.
#[derive(Debug)]
pub(crate) struct Jobs {
    registry: Arc<Mutex<Registry>>,
    slots: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct Registry {
    /// The number of the newest job, also when it was forgotten.
    newest: u64,
    known: BTreeMap<u64, Arc<Job>>,
    /// The jobs of `known` that have ended, in the order in which they did.
    ended: VecDeque<u64>,
}

impl Default for Jobs {
    fn default() -> Self {
        Self { registry: Arc::default(), slots: Arc::new(Semaphore::new(MAX_RUNNING)) }
    }
}

impl Jobs {
    /// Starts a job on the runtime of the caller. `command` is how the user worded it.
    ///
    /// `work` gets the job to report to, and answers the exit code. It should end soon after
    /// [`Job::cancelled`] does; one that does not is dropped.
    ///
    /// # Errors
    ///
    /// If [`MAX_RUNNING`] jobs are running.
    pub(crate) fn start<F>(
        &self,
        command: String,
        work: impl FnOnce(Arc<Job>) -> F,
    ) -> Result<Arc<Job>, TooMany>
    where
        F: Future<Output = ExitCode> + Send + 'static,
    {
        let slot = Arc::clone(&self.slots).try_acquire_owned().map_err(|_| TooMany)?;
        let job = {
            let mut registry = self.registry();
            registry.newest += 1;
            let job = Arc::new(Job::new(registry.newest, command));
            registry.known.insert(job.number(), Arc::clone(&job));
            job
        };
        let work = work(Arc::clone(&job));
        let running = Arc::clone(&job);
        let registry = Arc::clone(&self.registry);
        tokio::spawn(async move {
            run(&running, work, CANCEL_GRACE).await;
            lock(&registry).has_ended(running.number());
            drop(slot);
        });
        Ok(job)
    }

    /// The job of a number, unless it was forgotten.
    pub(crate) fn get(&self, number: u64) -> Option<Arc<Job>> {
        self.registry().known.get(&number).cloned()
    }

    /// The numbers of all jobs that are known, ascending.
    pub(crate) fn numbers(&self) -> Vec<u64> {
        self.registry().known.keys().copied().collect()
    }

    /// The number of the newest job that is known.
    pub(crate) fn last(&self) -> Option<u64> {
        self.registry().known.keys().next_back().copied()
    }

    /// Cancels a job if it is running, and forgets it; whether there was one.
    pub(crate) fn forget(&self, number: u64) -> bool {
        let forgotten = {
            let mut registry = self.registry();
            registry.ended.retain(|&ended| ended != number);
            registry.known.remove(&number)
        };
        forgotten.map(|job| job.cancel()).is_some()
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        lock(&self.registry)
    }
}

impl Registry {
    fn has_ended(&mut self, number: u64) {
        // It may have been forgotten while it was running.
        if self.known.contains_key(&number) {
            self.ended.push_back(number);
        }
        while self.ended.len() > MAX_ENDED {
            if let Some(oldest) = self.ended.pop_front() {
                self.known.remove(&oldest);
            }
        }
    }
}

fn lock(registry: &Mutex<Registry>) -> MutexGuard<'_, Registry> {
    registry.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a job to its end, whatever that is.
async fn run(job: &Job, work: impl Future<Output = ExitCode>, grace: Duration) {
    let (number, command) = (job.number(), job.command());
    tracing::info!("job {number}: {command}");
    let too_late = async {
        job.cancelled().await;
        tokio::time::sleep(grace).await;
    };
    let code = tokio::select! {
        // One that has ended has not been too late.
        biased;
        ended = AssertUnwindSafe(work).catch_unwind() => ended.unwrap_or_else(|panic| {
            let why = panic.downcast_ref::<String>().map(String::as_str);
            let why = why.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            job.log(&format!("this is a bug in fspfs: {why}"));
            FAILED
        }),
        () = too_late => {
            job.log(&format!("it was cancelled, and did not stop within {grace:?}"));
            FAILED
        }
    };
    job.end(code);
    match job.state() {
        state @ State::Failed(_) => tracing::warn!("job {number}: {state}: {}", job.log_text()),
        state => tracing::info!("job {number}: {state}"),
    }
}

#[cfg(test)]
mod tests;
