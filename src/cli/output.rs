//! What is printed: results on stdout, progress and messages on stderr.

use std::fmt;
use std::io::{IsTerminal as _, Write as _};
use std::sync::Arc;
use std::time::Duration;

use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::Global;
use crate::model::{BLOCK_SIZE_U64, Snapshot, SnapshotState};
use crate::ops::{self, verify::Finding};
use crate::store::repository::{Damage, GcReport, VerifyReport};
use crate::transfer::{Progress, SharedProgress};

/// Prints as the global options say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Output {
    json: bool,
    quiet: bool,
}

impl Output {
    pub(super) fn new(global: &Global) -> Self {
        Self { json: global.json, quiet: global.quiet }
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

    /// Prints a line that is not the result, on stdout: the original's lines.
    pub(super) fn line(self, line: impl fmt::Display) -> std::io::Result<()> {
        if self.json || self.quiet { Ok(()) } else { print(line) }
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

/// Seconds and bytes per second, as the original prints them.
pub(super) fn rate(elapsed: Duration, bytes: u64) -> String {
    let seconds = elapsed.as_secs_f64();
    #[allow(clippy::cast_precision_loss)]
    let rate = bytes as f64 / seconds.max(0.000_001);
    format!("took {seconds:.2} seconds at {rate:.2} bytes/sec.")
}

/// A table of snapshots.
pub(super) fn table(snapshots: &[Snapshot]) -> Vec<String> {
    let header = ["SNAPSHOT", "STATE", "SIZE", "DATA", "STARTED", "NAME", "DESCRIPTION"];
    columns(header, snapshots.iter().map(row))
}

/// A table: each column as wide as its widest cell.
pub(super) fn columns<const N: usize>(
    header: [&str; N],
    rows: impl Iterator<Item = [String; N]>,
) -> Vec<String> {
    let rows: Vec<_> = std::iter::once(header.map(str::to_owned)).chain(rows).collect();
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |row: &[String; N]| {
        let cell = |(cell, width): (&String, usize)| {
            let missing = width.saturating_sub(cell.chars().count());
            format!("{cell}{}", " ".repeat(missing))
        };
        let cells = row.iter().zip(widths).map(cell);
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

fn row(snapshot: &Snapshot) -> [String; 7] {
    if snapshot.state == SnapshotState::Error {
        let dash = || "-".to_owned();
        let why = one_line(snapshot.state_message.as_deref().unwrap_or_default());
        let state = snapshot.state.as_str().to_owned();
        return [snapshot.id.to_string(), state, dash(), dash(), dash(), dash(), why];
    }
    [
        snapshot.id.to_string(),
        snapshot.state.as_str().to_owned(),
        snapshot.volume_size.to_string(),
        snapshot.data_bytes().map_or_else(|| "-".to_owned(), size),
        snapshot.start_time.strftime("%Y-%m-%d %H:%M:%S").to_string(),
        one_line(snapshot.name().unwrap_or("-")),
        one_line(snapshot.state_message.as_ref().unwrap_or(&snapshot.description)),
    ]
}

pub(super) fn size(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

/// Text of others, without what would move the cursor.
pub(super) fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// What a verification found.
pub(super) fn verified(report: &VerifyReport, elapsed: Duration) -> Vec<String> {
    let mut lines: Vec<String> = report.damage.iter().flat_map(damage).collect();
    let VerifyReport { snapshots, packs, blocks, .. } = report;
    lines.push(format!(
        "Verified {snapshots} snapshots: {blocks} blocks in {packs} packs {}",
        rate(elapsed, report.bytes)
    ));
    lines.push(match report.damage.len() {
        0 => "Everything is intact.".to_owned(),
        n => format!("{n} objects are damaged."),
    });
    lines
}

/// What reading snapshots found.
pub(super) fn was_read(report: &ops::verify::Report, elapsed: Duration) -> Vec<String> {
    let finding = |f: &Finding| format!("{}: block {}: {}", f.snapshot, f.block, f.problem);
    let mut lines: Vec<String> = report.findings.iter().map(finding).collect();
    let ops::verify::Report { snapshots, blocks, bytes, wrong, .. } = report;
    let rate = rate(elapsed, *bytes);
    lines.push(format!("Verified {snapshots} snapshots: {blocks} blocks {rate}"));
    lines.push(match wrong {
        0 => "Everything is intact.".to_owned(),
        n => format!("{n} blocks are not as they should be."),
    });
    lines
}

fn damage(damage: &Damage) -> Vec<String> {
    let mut lines = vec![format!("{}: {}", damage.object, damage.problem)];
    for (id, lost) in &damage.lost_blocks {
        lines.push(match lost {
            Some(0) => format!("  {id} has lost no block"),
            Some(blocks) => format!("  {id} has lost {blocks} blocks"),
            None => format!("  {id} cannot be read at all"),
        });
    }
    lines
}

/// What a collection did.
pub(super) fn collected(report: &GcReport, dry_run: bool) -> Vec<String> {
    let deleted = if dry_run { "would be deleted" } else { "deleted" };
    vec![
        format!("{} objects in use", report.reachable_objects),
        format!("{} objects {deleted}", report.deleted_objects),
        format!("{} objects wait for the grace period to end", report.waiting_objects),
        format!("{} of unfinished files removed", size(report.swept_bytes)),
        format!(
            "{} of {} blocks in the packs in use belong to no snapshot any more",
            report.wasted_blocks, report.packed_blocks
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_as_wide_as_it_has_to_be() {
        let long = "ü".repeat(70_000);
        let rows = [["a".to_owned(), long.clone()], ["bcd".to_owned(), String::new()]];
        let lines = columns(["X", "Y"], rows.into_iter());
        assert_eq!(lines, ["X    Y".to_owned(), format!("a    {long}"), "bcd".to_owned()]);
    }
}
