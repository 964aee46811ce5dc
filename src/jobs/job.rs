//! One job.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::log::Log;
use crate::shown;

/// What a command ends with: 0 done, 1 failed, 2 wrong usage, 3 done in part.
pub(crate) type ExitCode = u8;

/// Everything was done.
pub(crate) const DONE: ExitCode = 0;

/// It was not done.
pub(crate) const FAILED: ExitCode = 1;

/// Bytes of a result that is kept for later mounts. A longer one is not.
const MAX_RESULT: usize = 64 << 10;

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    /// It has not ended.
    Running,
    /// It has done everything.
    Done,
    /// It has not, and ended with this code.
    Failed(ExitCode),
    /// It was cancelled before everything was done.
    Cancelled,
    /// Its mount ended first.
    Interrupted,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Running => f.write_str("running"),
            Self::Done => write!(f, "done {DONE}"),
            Self::Failed(code) => write!(f, "failed {code}"),
            Self::Cancelled => write!(f, "cancelled {FAILED}"),
            Self::Interrupted => write!(f, "interrupted {FAILED}"),
        }
    }
}

/// One running or ended operation.
#[derive(Debug)]
pub(crate) struct Job {
    number: u64,
    command: String,
    started: Timestamp,
    status: Mutex<Status>,
    cancel: CancellationToken,
}

/// What a job has told of itself.
#[derive(Debug, Serialize, Deserialize)]
struct Status {
    state: State,
    done: u64,
    total: u64,
    result: String,
    log: Log,
}

/// What of a job is kept for later mounts.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    command: String,
    started: Timestamp,
    status: Status,
}

impl Job {
    pub(super) fn new(number: u64, command: String) -> Self {
        let status = Status {
            state: State::Running,
            done: 0,
            total: 0,
            result: String::new(),
            log: Log::default(),
        };
        Self::with(number, Record { command, started: Timestamp::now(), status })
    }

    fn with(number: u64, record: Record) -> Self {
        let Record { command, started, status } = record;
        let (status, cancel) = (Mutex::new(status), CancellationToken::new());
        Self { number, command, started, status, cancel }
    }

    /// A job of an earlier mount.
    pub(super) fn of_earlier(number: u64, mut record: Record) -> Self {
        let status = &mut record.status;
        if status.state == State::Running {
            status.state = State::Interrupted;
            status.log.add("the mount ended before the job did");
        }
        Self::with(number, record)
    }

    /// What of it is kept, once it is in this state.
    pub(super) fn record(&self, state: State) -> Record {
        let status = self.status();
        let Status { done, total, result, log, .. } = &*status;
        let (mut result, mut log) = (result.as_str(), log.clone());
        if result.len() > MAX_RESULT {
            log.add(&format!("its result of {} bytes did not outlast its mount", result.len()));
            result = "";
        }
        let (done, total, result) = (*done, *total, result.to_owned());
        let status = Status { state, done, total, result, log };
        Record { command: self.command.clone(), started: self.started, status }
    }

    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its number.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// How the user worded it.
    pub(crate) fn command(&self) -> &str {
        &self.command
    }

    /// When it was started.
    pub(crate) fn started(&self) -> Timestamp {
        self.started
    }

    /// Where it is.
    pub(crate) fn state(&self) -> State {
        self.status().state
    }

    /// Blocks done, and blocks in all as far as is known.
    pub(crate) fn progress(&self) -> (u64, u64) {
        let status = self.status();
        (status.done, status.total)
    }

    /// What the command would have printed on stdout.
    pub(crate) fn result(&self) -> String {
        self.status().result.clone()
    }

    /// What the command would have printed on stderr; of much, the end.
    pub(crate) fn log_text(&self) -> String {
        self.status().log.to_string()
    }

    /// Notes how far it is, in blocks.
    pub(crate) fn set_progress(&self, done: u64, total: u64) {
        let mut status = self.status();
        (status.done, status.total) = (done, total);
    }

    /// Adds a line to its result.
    pub(crate) fn print(&self, line: impl fmt::Display) {
        let result = &mut self.status().result;
        result.push_str(&shown::lines(&line.to_string()));
        result.push('\n');
    }

    /// Adds lines to its log.
    pub(crate) fn log(&self, text: &str) {
        let log = &mut self.status().log;
        text.lines().for_each(|line| log.add(&shown::one_line(line)));
    }

    /// Asks it to end. One that has ended stays as it is.
    pub(crate) fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Ends when somebody asks it to end.
    pub(crate) async fn cancelled(&self) {
        self.cancel.cancelled().await;
    }

    /// What tells its work that it is to end.
    pub(crate) fn cancel_token(&self) -> CancellationToken {
        self.cancel.clone()
    }

    /// The state that it ends in with this code.
    pub(super) fn end_state(&self, code: ExitCode) -> State {
        match code {
            DONE => State::Done,
            _ if self.cancel.is_cancelled() => State::Cancelled,
            code => State::Failed(code),
        }
    }

    pub(super) fn end(&self, state: State) {
        self.status().state = state;
    }
}
