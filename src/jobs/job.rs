//! One job.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::log::Log;

/// What a command ends with: 0 done, 1 failed, 2 wrong usage, 3 done in part.
pub(crate) type ExitCode = u8;

/// Everything was done.
pub(crate) const DONE: ExitCode = 0;

/// It was not done.
pub(crate) const FAILED: ExitCode = 1;

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// It has not ended.
    Running,
    /// It has done everything.
    Done,
    /// It has not, and ended with this code.
    Failed(ExitCode),
    /// It was cancelled before everything was done.
    Cancelled,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Running => f.write_str("running"),
            Self::Done => write!(f, "done {DONE}"),
            Self::Failed(code) => write!(f, "failed {code}"),
            Self::Cancelled => write!(f, "cancelled {FAILED}"),
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
#[derive(Debug)]
struct Status {
    state: State,
    done: u64,
    total: u64,
    result: String,
    log: Log,
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
        Self {
            number,
            command,
            started: Timestamp::now(),
            status: Mutex::new(status),
            cancel: CancellationToken::new(),
        }
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
        result.push_str(&line.to_string());
        result.push('\n');
    }

    /// Adds lines to its log.
    pub(crate) fn log(&self, text: &str) {
        let log = &mut self.status().log;
        text.lines().for_each(|line| log.add(line));
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

    pub(super) fn end(&self, code: ExitCode) {
        let cancelled = self.cancel.is_cancelled();
        self.status().state = match code {
            DONE => State::Done,
            _ if cancelled => State::Cancelled,
            code => State::Failed(code),
        };
    }
}
