//! What is printed: results on stdout, progress and messages on stderr.

use std::fmt;
use std::io::{IsTerminal as _, Write as _};
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::Global;
use crate::arguments::ScreenArgs;
use crate::model::BLOCK_SIZE_U64;
use crate::ops;
use crate::ops::context::Console;
use crate::transfer::{Progress, SharedProgress};

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

    /// Prints the result: as JSON, or the lines that `text` makes of it.
    pub(super) fn result<T: Serialize>(
        self,
        value: &T,
        text: impl FnOnce() -> Vec<String>,
    ) -> std::io::Result<()> {
        let lines = if self.json {
            vec![serde_json::to_string_pretty(value).map_err(std::io::Error::other)?]
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

    /// Says something to the user that no program wants to read.
    pub(super) fn note(self, note: impl fmt::Display) {
        if !self.quiet {
            tell(note);
        }
    }

    /// A bar on stderr, if somebody is there to see it.
    pub(super) fn progress(self, what: &'static str) -> SharedProgress {
        if self.quiet || self.json || !std::io::stderr().is_terminal() {
            return Arc::new(crate::transfer::Silent);
        }
        Arc::new(Bar::new(what))
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
        let _ = print(text);
    }

    fn tell(&self, text: &str) {
        tell(text);
    }

    fn progress(&self, what: &'static str) -> SharedProgress {
        self.0.progress(what)
    }

    /// A script is not asked.
    fn confirm(&self, question: &str) -> ops::Result<bool> {
        if !std::io::stdin().is_terminal() {
            return Ok(true);
        }
        let mut stderr = std::io::stderr();
        write!(stderr, "{question} [y/N] ")?;
        stderr.flush()?;
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer)?;
        Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
    }
}

/// Says something on stderr, if anybody is there to read it.
pub fn tell(what: impl fmt::Display) {
    let _ = writeln!(std::io::stderr(), "fspfs: {what}");
}

fn print(line: impl fmt::Display) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}")?;
    stdout.flush()
}

struct Bar(ProgressBar);

impl Bar {
    fn new(what: &'static str) -> Self {
        let style = ProgressStyle::with_template(
            "{msg} {bar:30} {binary_bytes} of {binary_total_bytes} ({binary_bytes_per_sec}, {eta} left)",
        )
        .unwrap_or_else(|_| ProgressStyle::default_bar());
        Self(ProgressBar::new(0).with_style(style).with_message(what))
    }
}

impl Progress for Bar {
    fn total(&self, blocks: u64) {
        self.0.set_length(blocks * BLOCK_SIZE_U64);
    }

    fn advance(&self, blocks: u64) {
        self.0.inc(blocks * BLOCK_SIZE_U64);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
