//! What is printed: results on stdout, progress and messages on stderr.

use std::fmt;
use std::io::{IsTerminal as _, Write as _};
use std::sync::Arc;

use serde::Serialize;

use super::Global;
use super::bars::{self, Bar};
use crate::arguments::ScreenArgs;
use crate::ops;
use crate::ops::context::Console;
use crate::shown;
use crate::transfer::{SharedProgress, Silent};

/// Prints as the global options say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Output {
    json: bool,
    quiet: bool,
}

impl Output {
    pub(super) fn new(global: &Global) -> Self {
        let ScreenArgs { json, quiet, .. } = global.screen;
        Self { json, quiet }
    }

    /// Prints the result: as JSON, its ids alone, or the lines that `text` makes of it.
    pub(super) fn result<T: Serialize>(
        self,
        value: &T,
        ids: impl FnOnce() -> Vec<String>,
        text: impl FnOnce() -> Vec<String>,
    ) -> std::io::Result<()> {
        let lines = if self.json {
            vec![shown::json(&serde_json::to_string_pretty(value).map_err(std::io::Error::other)?)]
        } else if self.quiet {
            ids()
        } else {
            text()
        };
        lines.iter().try_for_each(print)
    }

    /// Prints a line before the result, unless that is wanted alone.
    pub(super) fn line(self, line: impl fmt::Display) -> std::io::Result<()> {
        if self.json || self.quiet { Ok(()) } else { print(line) }
    }

    /// Prints lines as they are.
    #[allow(clippy::unused_self, reason = "what is printed is printed by it")]
    pub(super) fn lines(self, lines: &[String]) -> std::io::Result<()> {
        lines.iter().try_for_each(print)
    }

    /// Prints lines about what was made: where nobody gets them, its ids are told on stderr, since without them it
    /// is hard to find.
    pub(super) fn made(self, lines: &[String], ids: &[String]) -> std::io::Result<()> {
        self.lines(lines).inspect_err(|_| ids.iter().for_each(tell))
    }

    /// Says what is wrong, where the result would have said it.
    pub(super) fn error(self, error: impl fmt::Display) {
        if self.quiet && !self.json {
            tell(error);
        }
    }

    /// Says something to the user that no program wants to read.
    pub(super) fn note(self, note: impl fmt::Display) {
        if !self.quiet {
            tell(note);
        }
    }

    /// Shows on stderr how far something is, unless the result is wanted alone.
    pub(super) fn progress(self, what: &str) -> SharedProgress {
        if self.quiet || self.json { Arc::new(Silent) } else { Arc::new(Bar::new(what)) }
    }
}

/// The terminal of a command, or what its output is led to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terminal(Output);

impl Terminal {
    pub(super) fn new(out: Output) -> Self {
        Self(out)
    }
}

impl Console for Terminal {
    fn line(&self, text: &str) {
        // A closed pipe shows again when the result is printed.
        let _ = bars::aside(|| print(text));
    }

    fn tell(&self, text: &str) {
        tell(text);
    }

    fn progress(&self, what: &str) -> SharedProgress {
        self.0.progress(what)
    }

    fn confirm(&self, question: &str) -> ops::Result<bool> {
        // What is piped in is no answer: nobody has read the question.
        if !std::io::stdin().is_terminal() {
            return Err(ops::Error::unasked());
        }
        let mut stderr = std::io::stderr();
        write!(stderr, "{} [y/N] ", shown::lines(question))?;
        stderr.flush()?;
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer)?;
        Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
    }
}

/// Says something on stderr, if anybody is there to read it.
pub fn tell(what: impl fmt::Display) {
    bars::write(&format!("fspfs: {what}"));
}

/// Prints lines.
pub(super) fn print(lines: impl fmt::Display) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{}", shown::lines(&lines.to_string()))?;
    stdout.flush()
}
