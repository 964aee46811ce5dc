//! How reports are worded.

use std::time::Duration;

use bytesize::ByteSize;

use super::context::Context;
use crate::model::{BLOCK_SIZE_U64, MAX_DESCRIPTION_CHARS, SnapshotId};

/// Seconds and bytes per second, as the original prints them.
pub(crate) fn rate(elapsed: Duration, bytes: u64) -> String {
    let seconds = elapsed.as_secs_f64();
    #[allow(clippy::cast_precision_loss)]
    let rate = bytes as f64 / seconds.max(0.000_001);
    format!("took {seconds:.2} seconds at {rate:.2} bytes/sec.")
}

/// The original's line.
pub(crate) fn contains(id: &SnapshotId, blocks: u64, seconds: f64) -> String {
    let bytes = blocks * BLOCK_SIZE_U64;
    format!("Snapshot {id} contains {blocks} chunks and {bytes} bytes, took {seconds:.2} seconds.")
}

/// Says what an earlier run had done.
pub(crate) fn tell_kept(cx: &Context, kept: u64, done: &str) {
    if kept > 0 {
        cx.note(format_args!("{kept} chunks were {done} before"));
    }
}

/// As much of a text as a description holds.
pub(crate) fn shortened(text: &str) -> String {
    text.chars().take(MAX_DESCRIPTION_CHARS).collect()
}

/// A table: each column as wide as its widest cell.
pub(crate) fn columns<const N: usize>(
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

pub(crate) fn size(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
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
