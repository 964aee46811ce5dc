//! The files below `control/`.

use super::metrics;
use crate::arguments::DAMAGED;
use crate::cache::Cache;
use crate::image::working::{Damaged, Workshop};
use crate::ops::table;
use crate::shown;
use crate::store::SharedStore;
use crate::store::wrap::Counters;

/// A file below `control/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ControlFile {
    Readme,
    Metrics,
    Pid,
    Damaged,
}

/// What stands below the list of the operations.
const README: &str = "  \
  jobs/       what was started, and what came of it
  metrics     what the mount has done so far, in the text format of Prometheus:
              requests to the store, bytes, hits and misses of the cache
  pid         the process that serves the mount
  damaged     what is staged and cannot be used: a line of JSON each

Reading the file of an operation shows how to word a line for it. Writing the
line starts a job and does not wait for it:

  echo --wait web.img > control/commit
  cat control/jobs/last/state

A line that is not understood cannot be written (EINVAL); reading the file then
shows why. Reading the same open file after a good line gives the job's number:

  exec 3<>control/commit; echo web.img >&3; read job <&3; exec 3>&-

Of each job, jobs/<n>/ has

  command   what was asked for
  state     running; or done, failed, cancelled or interrupted (by the end of
            its mount), and the exit code behind it: 0 done, 1 failed, 2 wrong
            usage, 3 done in part
  progress  blocks done/blocks in all, as far as is known
  result    what the command would have printed: the snapshot id is the last line
  log       what it would have printed on stderr; of much, the end
  cancel    writing anything to it cancels the job

jobs/last is the newest one. Removing jobs/<n> cancels and forgets the job; of
those that have ended, the last 100 are kept, also when this is unmounted. A
commit by close() is a job, too. `fspfs jobs` shows and awaits jobs.

The images are one directory up. Each has extended attributes:

  getfattr -d -m user.fspfs snap-0123456789abcdef0.img
";

impl ControlFile {
    pub(super) const ALL: [Self; 4] = [Self::Readme, Self::Metrics, Self::Pid, Self::Damaged];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Readme => "README",
            Self::Metrics => "metrics",
            Self::Pid => "pid",
            Self::Damaged => DAMAGED,
        }
    }

    pub(super) fn content(
        self,
        cache: &Cache,
        calls: Option<&Counters>,
        store: &SharedStore,
        shop: Option<&Workshop>,
    ) -> String {
        match self {
            Self::Readme => readme(),
            Self::Metrics => {
                metrics::text(cache, calls, store, shop.map(|shop| shop.staging().staged()))
            }
            Self::Damaged => damaged(&shop.map(Workshop::damaged).unwrap_or_default()),
            Self::Pid => format!("{}\n", std::process::id()),
        }
    }
}

fn readme() -> String {
    let mut text = "This directory is about the mount itself.\n\n".to_owned();
    for entry in table::in_control() {
        text.push_str(&format!("  {:11} {}\n", entry.name, entry.about()));
    }
    text + README
}

fn damaged(images: &[Damaged]) -> String {
    let json = |image| serde_json::to_string(image).expect("it is made of strings");
    let line = |image| shown::json(&json(image)) + "\n";
    images.iter().map(line).collect()
}
