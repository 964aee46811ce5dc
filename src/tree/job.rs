//! The files of a job, below `control/jobs/<n>/`.

use crate::jobs::Job;

/// A file below `control/jobs/<n>/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum JobFile {
    Command,
    State,
    Progress,
    Result,
    Log,
    Cancel,
}

impl JobFile {
    pub(super) const ALL: [Self; 6] =
        [Self::Command, Self::State, Self::Progress, Self::Result, Self::Log, Self::Cancel];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Command => "command",
            Self::State => "state",
            Self::Progress => "progress",
            Self::Result => "result",
            Self::Log => "log",
            Self::Cancel => "cancel",
        }
    }

    pub(super) fn mode(self) -> u16 {
        if self == Self::Cancel { 0o600 } else { 0o400 }
    }

    /// What is in it now.
    pub(super) fn content(self, job: &Job) -> String {
        match self {
            Self::Command => format!("{}\n", job.command()),
            Self::State => format!("{}\n", job.state()),
            Self::Progress => {
                let (done, total) = job.progress();
                format!("{done}/{total}\n")
            }
            Self::Result => job.result(),
            Self::Log => job.log_text(),
            Self::Cancel => String::new(),
        }
    }
}
