//! What was found, check by check.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::shown;

/// Characters of a message of others that are shown: EC2 adds long encoded ones.
const MAX_MESSAGE: usize = 300;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// As it should be.
    Ok,
    /// Something works less well, or not for everybody.
    Warning,
    /// Something that is needed does not work.
    Failure,
    /// It was not tried; what was found says why.
    Skipped,
}

impl Status {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failure => "FAILURE",
            Self::Skipped => "skipped",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl Serialize for Status {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.as_str().to_lowercase())
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub check: String,
    /// How it is.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What to do about it; with every warning and every failure.
    pub cure: Option<String>,
}

/// All checks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Report {
    /// In the order in which they were made.
    pub checks: Vec<Check>,
}

impl Report {
    /// Whether nothing failed. Warnings are no failures.
    pub fn is_healthy(&self) -> bool {
        self.count(Status::Failure) == 0
    }

    /// How many checks ended so.
    pub fn count(&self, status: Status) -> usize {
        self.checks.iter().filter(|check| check.status == status).count()
    }
}

/// A report that is being made.
#[derive(Debug)]
pub(super) struct ReportBuilder<F> {
    report: Report,
    show: F,
}

/// Takes what is found.
pub(super) trait Findings {
    fn add(&mut self, check: Check);

    fn ok(&mut self, check: &str, found: impl Into<String>) {
        self.add(made(check, Status::Ok, &found.into(), None));
    }

    fn warn(&mut self, check: &str, found: impl Into<String>, cure: impl Into<String>) {
        self.add(made(check, Status::Warning, &found.into(), Some(cure.into())));
    }

    fn fail(&mut self, check: &str, found: impl Into<String>, cure: impl Into<String>) {
        self.add(made(check, Status::Failure, &found.into(), Some(cure.into())));
    }

    fn skip(&mut self, check: &str, why: impl Into<String>) {
        self.add(made(check, Status::Skipped, &why.into(), None));
    }
}

impl<F: FnMut(&Check)> Findings for ReportBuilder<F> {
    fn add(&mut self, check: Check) {
        (self.show)(&check);
        self.report.checks.push(check);
    }
}

impl<F: FnMut(&Check)> ReportBuilder<F> {
    pub(super) fn new(show: F) -> Self {
        Self { report: Report::default(), show }
    }

    pub(super) fn finish(self) -> Report {
        self.report
    }
}

fn made(check: &str, status: Status, found: &str, cure: Option<String>) -> Check {
    Check { check: check.to_owned(), status, found: one_line(found), cure }
}

/// Text of others: on one line, and not endless.
pub(super) fn one_line(text: &str) -> String {
    let clean = shown::one_line(text.trim());
    match clean.char_indices().nth(MAX_MESSAGE) {
        Some((end, _)) => format!("{}…", &clean[..end]),
        None => clean,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_healthy_unless_something_failed() {
        let mut shown = Vec::new();
        let mut builder = ReportBuilder::new(|check: &Check| shown.push(check.check.clone()));
        builder.ok("a", "fine");
        builder.warn("b", "so so", "do this");
        builder.skip("c", "because of b");
        assert!(builder.report.is_healthy());
        builder.fail("d", "bad\nnews", "do that");
        let report = builder.finish();
        assert!(!report.is_healthy());
        assert_eq!(shown, ["a", "b", "c", "d"]);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json[3]["status"], "failure");
        assert_eq!(json[3]["found"], "bad\u{fffd}news");
        assert_eq!(json[3]["cure"], "do that");
        assert_eq!(json[0]["cure"], serde_json::Value::Null);
    }

    #[test]
    fn long_messages_are_cut() {
        let text = one_line(&"ä".repeat(2 * MAX_MESSAGE));
        assert_eq!(text.chars().count(), MAX_MESSAGE + 1);
        assert!(text.ends_with('…'));
    }
}
