//! Lines that come again and again: one damaged block is one line, however often it is read.

use std::io::{self, Write};
use std::time::{Duration, Instant};

/// How long a line that comes again is only counted.
const COUNTED: Duration = Duration::from_mins(1);

/// Lines that are told apart. When there are more, the one that was written first counts no longer.
const LINES: usize = 64;

/// Writes lines that begin with their time; those that are but for it as one written within a minute are counted, and
/// their number is written when that minute is over and there is something to write.
#[derive(Debug)]
pub(super) struct Repeats<W> {
    inner: W,
    /// From old to new.
    written: Vec<Line>,
}

#[derive(Debug)]
struct Line {
    /// Without its time.
    text: Vec<u8>,
    when: Instant,
    again: u64,
}

impl<W: Write> Repeats<W> {
    pub(super) fn new(inner: W) -> Self {
        Self { inner, written: Vec::new() }
    }

    pub(super) fn inner(&mut self) -> &mut W {
        &mut self.inner
    }

    fn line(&mut self, line: &[u8], now: Instant) -> io::Result<()> {
        let end = line.iter().position(|byte| *byte == b' ').unwrap_or(0);
        let (time, text) = line.split_at(end);
        self.settle_until(time, |line| now - line.when >= COUNTED)?;
        if let Some(known) = self.written.iter_mut().find(|known| known.text == text) {
            known.again += 1;
            return Ok(());
        }
        if self.written.len() == LINES {
            let oldest = self.written.remove(0);
            self.count(time, &oldest)?;
        }
        self.written.push(Line { text: text.to_owned(), when: now, again: 0 });
        self.inner.write_all(line)
    }

    /// Writes the counts of those whose minute is over, or of all.
    pub(super) fn settle(&mut self, all: bool) -> io::Result<()> {
        let time = format!("{:.6}", jiff::Timestamp::now());
        let now = Instant::now();
        self.settle_until(time.as_bytes(), |line| all || now - line.when >= COUNTED)
    }

    fn settle_until(&mut self, time: &[u8], is_over: impl Fn(&Line) -> bool) -> io::Result<()> {
        let over = self.written.partition_point(is_over);
        let over: Vec<_> = self.written.drain(..over).collect();
        over.iter().try_for_each(|line| self.count(time, line))
    }

    fn count(&mut self, time: &[u8], Line { text, again, .. }: &Line) -> io::Result<()> {
        if *again == 0 {
            return Ok(());
        }
        let mut line = time.to_owned();
        line.extend(text.trim_ascii_end());
        line.extend(format!(" ({again} times more)\n").as_bytes());
        self.inner.write_all(&line)
    }
}

impl<W: Write> Write for Repeats<W> {
    /// Takes a whole line, as `tracing` gives them.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.line(line, Instant::now())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_comes_again_is_counted() {
        let mut log = Repeats::new(Vec::new());
        let began = Instant::now();
        let mut write = |second: u64, text: &str| {
            let line = format!("00:{second:02} {text}\n");
            log.line(line.as_bytes(), began + Duration::from_secs(second)).unwrap();
        };
        for second in 0..30 {
            write(second, " ERROR one");
            write(second, " ERROR two");
        }
        write(31, " INFO  other");
        write(61, " ERROR one");
        write(62, " ERROR one");
        let text = String::from_utf8(log.inner).unwrap();
        assert_eq!(
            text,
            "00:00  ERROR one\n00:00  ERROR two\n00:31  INFO  other\n\
             00:61  ERROR one (29 times more)\n00:61  ERROR two (29 times more)\n00:61  ERROR one\n"
        );
    }

    #[test]
    fn many_lines_take_bounded_memory() {
        let mut log = Repeats::new(Vec::new());
        let now = Instant::now();
        for n in 0..1000 {
            log.line(format!("t {n}\n").as_bytes(), now).unwrap();
            log.line(format!("t {n}\n").as_bytes(), now).unwrap();
        }
        assert_eq!(log.written.len(), LINES);
        let text = String::from_utf8(log.inner).unwrap();
        assert_eq!(text.lines().count(), 2 * 1000 - LINES);
    }
}
