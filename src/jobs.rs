//! Running operations: what was asked, how far they are, and what came of them.
//!
//! A job is a task of its own. Whoever started it may look at it, cancel it or forget it, and never
//! has to wait for it. What is known of a job is kept for later mounts when it starts and when it ends.

use std::collections::{BTreeMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use jiff::Timestamp;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use self::history::History;
use crate::blocking::blocking;
use crate::transfer::engine::ENDS_WITHIN;

pub(crate) use self::job::{DONE, ExitCode, FAILED, Job, State};

mod history;
mod job;
mod log;

/// Jobs that run at the same time at most. Another one is refused.
pub(crate) const MAX_RUNNING: usize = 64;

/// Jobs that are kept after they have ended, and for later mounts. The one that ended first is forgotten first.
pub(crate) const MAX_ENDED: usize = 100;

/// How long a cancelled job may take to end by itself: what a transfer may, and some time for what is before and
/// behind it. After it the job is dropped where it is.
const CANCEL_GRACE: Duration = ENDS_WITHIN.saturating_add(Duration::from_secs(5));

/// How long the end of a mount waits for jobs to notice that what they follow has ended.
const SETTLES: Duration = Duration::from_secs(1);

/// As many jobs run as may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_RUNNING} jobs are running already: wait for one of them to end, or cancel one")]
pub(crate) struct TooMany;

/// The jobs of one mount, by number. The first one is number 1; no number is used twice, also by later mounts.
#[derive(Clone, Debug)]
pub(crate) struct Jobs {
    registry: Arc<Mutex<Registry>>,
    slots: Arc<Semaphore>,
    history: Option<Arc<History>>,
}

#[derive(Debug, Default)]
struct Registry {
    /// The number of the newest job, also when it was forgotten.
    newest: u64,
    known: BTreeMap<u64, Arc<Job>>,
    /// The jobs of `known` that have ended, in the order in which they did.
    ended: VecDeque<u64>,
    /// Jobs that follow something, and have not ended.
    following: usize,
    /// When a job came or went, if one did in this mount.
    changed: Option<Timestamp>,
}

impl Default for Jobs {
    fn default() -> Self {
        let slots = Arc::new(Semaphore::new(MAX_RUNNING));
        Self { registry: Arc::default(), slots, history: None }
    }
}

impl Jobs {
    /// The jobs of a mount of `store`, with those of earlier ones that are kept below `root`. Without a history, if
    /// none can be kept.
    pub(crate) fn with_history(root: &Path, store: &str) -> Self {
        let mut jobs = Self::default();
        match History::open(root, store) {
            Ok((history, earlier)) => {
                let mut registry = jobs.registry();
                registry.newest = history.newest();
                registry.ended = earlier.iter().map(Job::number).collect();
                registry.known =
                    earlier.into_iter().map(|job| (job.number(), Arc::new(job))).collect();
                registry.forget_oldest().into_iter().for_each(|number| history.forget(number));
                drop(registry);
                jobs.history = Some(Arc::new(history));
            }
            Err(error) => history::without(root, &error),
        }
        jobs
    }

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
        Ok(self.begin(command, Some(slot), work))
    }

    /// Starts a job that only follows something which runs by itself, and is bounded elsewhere: it is never refused,
    /// counts for nothing in [`MAX_RUNNING`], and ends when that does, also when it is cancelled.
    pub(crate) fn follow<F>(&self, command: String, work: impl FnOnce(Arc<Job>) -> F) -> Arc<Job>
    where
        F: Future<Output = ExitCode> + Send + 'static,
    {
        self.begin(command, None, work)
    }

    fn begin<F>(
        &self,
        command: String,
        slot: Option<OwnedSemaphorePermit>,
        work: impl FnOnce(Arc<Job>) -> F,
    ) -> Arc<Job>
    where
        F: Future<Output = ExitCode> + Send + 'static,
    {
        let job = {
            let mut registry = self.registry();
            registry.newest += 1;
            registry.following += usize::from(slot.is_none());
            let job = Arc::new(Job::new(registry.newest, command));
            registry.known.insert(job.number(), Arc::clone(&job));
            registry.changed = Some(Timestamp::now());
            job
        };
        let work = work(Arc::clone(&job));
        let (jobs, running) = (self.clone(), Arc::clone(&job));
        let grace = if slot.is_some() { CANCEL_GRACE } else { Duration::MAX };
        tokio::spawn(async move {
            jobs.keep(&running, State::Running).await;
            let state = run(&running, work, grace).await;
            // Whoever sees that it has ended finds it in the next mount.
            jobs.keep(&running, state).await;
            running.end(state);
            jobs.has_ended(running.number()).await;
            if slot.is_none() {
                jobs.registry().following -= 1;
            }
            drop(slot);
        });
        job
    }

    async fn keep(&self, job: &Job, state: State) {
        if let Some(history) = self.history.clone() {
            let (number, record) = (job.number(), job.record(state));
            blocking(move || history.keep(number, &record)).await;
        }
    }

    async fn has_ended(&self, number: u64) {
        let gone = self.registry().has_ended(number);
        self.erase(gone).await;
    }

    async fn erase(&self, numbers: Vec<u64>) {
        if let Some(history) = self.history.clone().filter(|_| !numbers.is_empty()) {
            blocking(move || numbers.into_iter().for_each(|number| history.forget(number))).await;
        }
    }

    /// Waits until the jobs that [follow](Self::follow) something which has ended have ended too.
    pub(crate) async fn settled(&self) {
        let all = async {
            while self.registry().following > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        // Those whose work goes on without the mount do not end.
        let _ = tokio::time::timeout(SETTLES, all).await;
    }

    /// The job of a number, unless it was forgotten.
    pub(crate) fn get(&self, number: u64) -> Option<Arc<Job>> {
        self.registry().known.get(&number).cloned()
    }

    /// The numbers of all jobs that are known, ascending.
    pub(crate) fn numbers(&self) -> Vec<u64> {
        self.registry().known.keys().copied().collect()
    }

    /// When a job came or went, if one did in this mount.
    pub(crate) fn changed(&self) -> Option<Timestamp> {
        self.registry().changed
    }

    /// The number of the newest job that is known.
    pub(crate) fn last(&self) -> Option<u64> {
        self.registry().known.keys().next_back().copied()
    }

    /// Cancels a job if it is running, and forgets it; whether there was one.
    pub(crate) async fn forget(&self, number: u64) -> bool {
        let forgotten = {
            let mut registry = self.registry();
            registry.ended.retain(|&ended| ended != number);
            registry.changed = Some(Timestamp::now());
            registry.known.remove(&number)
        };
        let Some(job) = forgotten else { return false };
        job.cancel();
        self.erase(vec![number]).await;
        true
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registry {
    /// Notes that a job has ended; those that are not known any more.
    fn has_ended(&mut self, number: u64) -> Vec<u64> {
        // It may have been forgotten while it was running.
        if !self.known.contains_key(&number) {
            return vec![number];
        }
        self.ended.push_back(number);
        self.forget_oldest()
    }

    fn forget_oldest(&mut self) -> Vec<u64> {
        let gone: Vec<_> = self.ended.drain(..self.ended.len().saturating_sub(MAX_ENDED)).collect();
        for oldest in &gone {
            self.known.remove(oldest);
            self.changed = Some(Timestamp::now());
        }
        gone
    }
}

/// Runs a job to its end, whatever that is; the state that it ends in.
async fn run(job: &Job, work: impl Future<Output = ExitCode>, grace: Duration) -> State {
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
    let state = job.end_state(code);
    match state {
        State::Failed(_) => tracing::warn!("job {number}: {state}: {}", job.log_text()),
        _ => tracing::info!("job {number}: {state}"),
    }
    state
}

#[cfg(test)]
mod tests;
