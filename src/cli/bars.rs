//! How far something is, on stderr: a bar on a terminal, else a line every ten seconds.

use std::fmt;
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressState, ProgressStyle};

use crate::model::BLOCK_SIZE_U64;
use crate::ops::text::size;
use crate::shown::{self, one_line};
use crate::transfer::Progress;

/// How often a line is written where there is no terminal.
const EVERY: Duration = Duration::from_secs(10);

/// Characters of the name of a bar. With what stands beside it, a bar has less than 60.
const NAME: usize = 11;

/// Every bar, so that what else is written to the terminal stands above them.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// How many of them can be seen.
static SEEN: AtomicUsize = AtomicUsize::new(0);

/// Writes lines to stderr, above the bars. If nobody can read them, they are lost.
pub(super) fn write(text: &str) {
    let text = shown::lines(text);
    if SEEN.load(Ordering::Relaxed) == 0 {
        let _ = writeln!(std::io::stderr(), "{text}");
    } else {
        let _ = BARS.println(&text);
    }
}

/// Writes to stdout, which may be the terminal that the bars are on.
pub(super) fn aside<T>(write: impl FnOnce() -> T) -> T {
    if SEEN.load(Ordering::Relaxed) == 0 { write() } else { BARS.suspend(write) }
}

/// Stderr, above the bars, for a log that writes a whole message at once.
#[derive(Debug)]
pub(super) struct AboveBars;

impl std::io::Write for AboveBars {
    fn write(&mut self, message: &[u8]) -> std::io::Result<usize> {
        write(String::from_utf8_lossy(message).trim_end_matches('\n'));
        Ok(message.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// One bar, or the lines in its place. It is gone once it has ended.
#[derive(Debug)]
pub(super) struct Bar {
    shown: ProgressBar,
    /// Where it is drawn, and whether it has been.
    drawn: Option<(MultiProgress, AtomicBool)>,
    /// What writes lines ends with this.
    lines: Mutex<Option<mpsc::Sender<()>>>,
}

impl Bar {
    pub(super) fn new(what: &str) -> Self {
        match BARS.is_hidden() {
            true => Self::lines(what, EVERY, write),
            false => Self::drawn(what, BARS.clone()),
        }
    }

    fn drawn(what: &str, bars: MultiProgress) -> Self {
        let text = |state: &ProgressState, line: &mut dyn fmt::Write| {
            let total = state.len().unwrap_or(0);
            let _ = line.write_str(&text(state.pos(), total, state.per_sec(), state.eta()));
        };
        let style = ProgressStyle::with_template("{prefix} {bar:10} {text}")
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .with_key("text", text)
            .progress_chars("##-");
        let bar = ProgressBar::hidden().with_style(style).with_prefix(name(what));
        Self { shown: bar, drawn: Some((bars, AtomicBool::new(false))), lines: Mutex::default() }
    }

    fn lines(what: &str, every: Duration, write: impl Fn(&str) + Send + 'static) -> Self {
        let bar = ProgressBar::hidden();
        let (lines, ended) = mpsc::channel();
        let (what, shown) = (one_line(what), bar.clone());
        // Without a thread there are no lines.
        let _ = crate::threads::aside(move || {
            while ended.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                if let Some(total) = shown.length().filter(|total| *total > 0) {
                    let text = text(shown.position(), total, shown.per_sec(), shown.eta());
                    write(&format!("fspfs: {what}: {}", text.trim_start()));
                }
            }
        });
        Self { shown: bar, drawn: None, lines: Mutex::new(Some(lines)) }
    }
}

impl Progress for Bar {
    fn total(&self, blocks: u64) {
        self.shown.set_position(0);
        self.shown.set_length(blocks * BLOCK_SIZE_U64);
        if let Some((bars, is_drawn)) = &self.drawn
            && blocks > 0
            && !is_drawn.swap(true, Ordering::Relaxed)
        {
            bars.add(self.shown.clone()).force_draw();
            SEEN.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn advance(&self, blocks: u64) {
        self.shown.inc(blocks * BLOCK_SIZE_U64);
    }

    fn end(&self) {
        self.shown.finish_and_clear();
        if let Some((bars, is_drawn)) = &self.drawn
            && is_drawn.swap(false, Ordering::Relaxed)
        {
            bars.remove(&self.shown);
            SEEN.fetch_sub(1, Ordering::Relaxed);
        }
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.end();
    }
}

/// The name of a bar: of a longer one, the end.
fn name(what: &str) -> String {
    let what = one_line(what);
    let left_out = what.chars().count().saturating_sub(NAME);
    if left_out == 0 {
        return format!("{what:NAME$}");
    }
    std::iter::once('…').chain(what.chars().skip(left_out + 1)).collect()
}

/// How much of how many bytes is done, how many a second, and how long it takes from here.
fn text(done: u64, total: u64, per_second: f64, left: Duration) -> String {
    let percent = (done.min(total) * 100).checked_div(total).unwrap_or(0);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let per_second = per_second as u64;
    let left = match left.as_secs() {
        _ if per_second == 0 => "-".to_owned(),
        seconds @ 0..=99 => format!("{seconds}s"),
        seconds @ 100..=5999 => format!("{}m", seconds / 60),
        seconds @ 6000..=359_999 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", (seconds / 86400).min(999)),
    };
    format!("{percent:3}% of {} {}/s {left}", size(total), size(per_second))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use indicatif::{ProgressDrawTarget, TermLike};

    use super::*;

    #[test]
    fn a_bar_fits_60_columns() {
        assert_eq!(name("Copying"), "Copying    ");
        assert_eq!(name("/srv/images/web.img"), "…es/web.img");
        let mut longest = 0;
        for bits in 9..47 {
            let rate = 2_f64.powi(bits) * 1.999;
            for total in [1 << bits, 3 << (bits - 1), (2 << bits) - 1] {
                for seconds in [0, 59, 99, 5999, 359_999, 1 << 40] {
                    let text = text(total, total, rate, Duration::from_secs(seconds));
                    longest = longest.max(text.chars().count());
                }
            }
        }
        assert!((30..=36).contains(&longest), "{longest}");
        assert!(NAME + 1 + 10 + 1 + longest < 60);
    }

    #[test]
    fn a_bar_says_how_much_is_done_and_how_long_the_rest_takes() {
        let text = |done, rate, left| text(done, 8 << 30, rate, Duration::from_secs(left));
        assert_eq!(text(0, 0.0, 0), "  0% of 8.0 GiB 0 B/s -");
        assert_eq!(text(2 << 30, f64::from(100 << 20), 61), " 25% of 8.0 GiB 100.0 MiB/s 61s");
        assert_eq!(text(9 << 30, f64::from(1 << 20), 0), "100% of 8.0 GiB 1.0 MiB/s 0s");
        assert_eq!(super::text(0, 0, 0.0, Duration::ZERO), "  0% of 0 B 0 B/s -");
    }

    /// A terminal of 60 columns.
    #[derive(Clone, Debug, Default)]
    struct Screen(Arc<Mutex<State>>);

    #[derive(Debug, Default)]
    struct State {
        lines: Vec<String>,
        row: usize,
    }

    impl Screen {
        fn text(&self) -> Vec<String> {
            let lines = &self.0.lock().unwrap().lines;
            lines.iter().map(|line| line.trim_end().to_owned()).filter(|l| !l.is_empty()).collect()
        }

        fn with(&self, change: impl FnOnce(&mut State)) {
            let state = &mut *self.0.lock().unwrap();
            change(state);
            state.lines.resize(state.lines.len().max(state.row + 1), String::new());
        }
    }

    impl TermLike for Screen {
        fn width(&self) -> u16 {
            60
        }

        fn move_cursor_up(&self, n: usize) -> std::io::Result<()> {
            self.with(|state| state.row -= n);
            Ok(())
        }

        fn move_cursor_down(&self, n: usize) -> std::io::Result<()> {
            self.with(|state| state.row += n);
            Ok(())
        }

        fn move_cursor_right(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }

        fn move_cursor_left(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }

        fn write_line(&self, text: &str) -> std::io::Result<()> {
            self.write_str(text)?;
            self.with(|state| state.row += 1);
            Ok(())
        }

        fn write_str(&self, text: &str) -> std::io::Result<()> {
            for c in text.chars() {
                self.with(|state| {
                    let is_full = |line: &String| line.chars().count() == 60;
                    state.row += usize::from(state.lines.get(state.row).is_some_and(is_full));
                });
                self.with(|state| state.lines[state.row].push(c));
            }
            Ok(())
        }

        fn clear_line(&self) -> std::io::Result<()> {
            self.with(|state| state.lines[state.row].clear());
            Ok(())
        }

        fn flush(&self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn bars_stand_below_what_is_told_and_are_gone_at_the_end() {
        let screen = Screen::default();
        let target = ProgressDrawTarget::term_like(Box::new(screen.clone()));
        let bars = MultiProgress::with_draw_target(target);
        let shown = [Bar::drawn("one", bars.clone()), Bar::drawn("two", bars.clone())];
        assert!(screen.text().is_empty());
        for bar in &shown {
            bar.total(4);
        }
        shown[0].advance(1);
        shown[1].advance(4);
        bars.println("told").unwrap();
        let text = screen.text();
        assert_eq!(text.len(), 3, "{text:?}");
        assert_eq!(text[0], "told");
        assert!(text[1].starts_with("one         ###-------  25% of 2.0 MiB"), "{text:?}");
        assert!(text[2].starts_with("two         ########## 100% of 2.0 MiB"), "{text:?}");
        let [one, two] = shown;
        one.end();
        drop(one);
        assert_eq!(screen.text().len(), 2, "{:?}", screen.text());
        drop(two);
        assert_eq!(screen.text(), ["told"]);
    }

    #[test]
    fn without_a_terminal_lines_are_written_until_it_ends() {
        let (said, lines) = mpsc::channel();
        let write = move |line: &str| said.send(line.to_owned()).unwrap();
        let bar = Bar::lines("new/web.img", Duration::from_millis(20), write);
        assert!(lines.recv_timeout(Duration::from_millis(60)).is_err(), "nothing is known yet");
        bar.total(8);
        bar.advance(2);
        let line = lines.recv_timeout(Duration::from_secs(10)).unwrap();
        assert!(line.starts_with("fspfs: new/web.img: 25% of 4.0 MiB "), "{line}");
        bar.end();
        // Ends, since nobody is left to write.
        assert!(lines.iter().count() < 100);
    }
}
