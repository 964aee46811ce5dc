//! The log of a job, which is bounded.

use std::collections::VecDeque;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes of a log. Beyond them the oldest lines are left out, and the log says so.
const MAX_LOG: usize = 64 << 10;

/// Lines, of which the newest are kept.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Log {
    lines: VecDeque<String>,
    bytes: usize,
    left_out: u64,
}

impl Log {
    pub(super) fn add(&mut self, line: &str) {
        let fits = (0..MAX_LOG.min(line.len() + 1)).rev();
        let end = fits.into_iter().find(|&end| line.is_char_boundary(end)).unwrap_or(0);
        self.lines.push_back(line[..end].to_owned());
        self.bytes += end + 1;
        while self.bytes > MAX_LOG {
            let Some(oldest) = self.lines.pop_front() else { break };
            self.bytes -= oldest.len() + 1;
            self.left_out += 1;
        }
    }
}

impl fmt::Display for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.left_out > 0 {
            writeln!(f, "({} earlier lines are left out)", self.left_out)?;
        }
        self.lines.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_lines_are_kept() {
        let mut log = Log::default();
        log.add("first");
        assert_eq!(log.to_string(), "first\n");
        for number in 0..100_000 {
            log.add(&format!("line {number}"));
        }
        let text = log.to_string();
        assert!(text.starts_with('(') && text.ends_with("line 99999\n"));
        assert!(text.len() < MAX_LOG + 100);
        assert_eq!(log.left_out + log.lines.len() as u64, 100_001);
        log.add(&"ä".repeat(MAX_LOG));
        assert!(log.to_string().len() < MAX_LOG + 100);
    }
}
