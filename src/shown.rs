//! Text as it is shown: what others wrote must not move the cursor of a terminal, or show other text than there is.

use std::io::{self, Write};

/// Whether a character is not shown itself, but changes how others are: control characters (C0, DEL, C1), what
/// changes the direction of text, and separators of lines and paragraphs.
pub(crate) fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}')
        || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// One line of text, without what [is hidden](is_hidden).
pub(crate) fn one_line(text: &str) -> String {
    text.chars().map(|c| if is_hidden(c) { '\u{fffd}' } else { c }).collect()
}

/// Lines of text, without what else [is hidden](is_hidden).
pub(crate) fn lines(text: &str) -> String {
    text.chars().map(|c| if c != '\n' && is_hidden(c) { '\u{fffd}' } else { c }).collect()
}

/// JSON that means the same, and has escapes for what `is_hidden` in its strings.
pub fn json(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if c != '\n' && is_hidden(c) {
            shown.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            shown.push(c);
        }
    }
    shown
}

/// Writes messages as they are shown: each has to be written at once.
#[derive(Debug)]
pub(crate) struct Shown<W>(pub(crate) W);

impl<W: Write> Write for Shown<W> {
    fn write(&mut self, message: &[u8]) -> io::Result<usize> {
        self.0.write_all(lines(&String::from_utf8_lossy(message)).as_bytes())?;
        Ok(message.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sets a title, clears the screen, does it with C1, and turns text around.
    const HOSTILE: &str = "a\x1b]0;b\x07\x1b[2J\u{9b}2J\r\u{202e}c\u{2066}\u{2028}\nä";

    #[test]
    fn control_and_direction_characters_are_replaced() {
        let shown = lines(HOSTILE);
        assert_eq!(
            shown,
            "a\u{fffd}]0;b\u{fffd}\u{fffd}[2J\u{fffd}2J\u{fffd}\u{fffd}c\u{fffd}\u{fffd}\nä"
        );
        assert_eq!(one_line(HOSTILE), shown.replace('\n', "\u{fffd}"));
        let mut written = Shown(Vec::new());
        written.write_all(HOSTILE.as_bytes()).unwrap();
        assert_eq!(written.0, shown.as_bytes());
    }

    #[test]
    fn json_means_the_same() {
        let value = serde_json::json!({ HOSTILE: [HOSTILE] });
        let text = json(&serde_json::to_string_pretty(&value).unwrap());
        assert!(text.chars().all(|c| c == '\n' || !is_hidden(c)), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }
}
