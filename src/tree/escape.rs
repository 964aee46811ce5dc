//! File names for texts that are not file names.

use crate::model::Digest;
use crate::shown::is_hidden;

/// Longest file name in bytes on Linux.
const MAX_NAME: usize = 255;

/// A file name for `text`, ending in `suffix`: different ones for different texts, and none that
/// leads out of its directory or looks like another file.
///
/// `/`, `%`, what is not shown itself, and a dot in front, become `%` and two hexadecimal digits for
/// each byte. The empty text is `%`. A name that would be too long is cut, and ends in `%` and the
/// first 16 digits of the SHA-256 of the whole text.
pub(super) fn file_name(text: &str, suffix: &str) -> String {
    let mut name = String::with_capacity(text.len() + suffix.len());
    for (at, c) in text.char_indices() {
        if c == '/' || c == '%' || is_hidden(c) || (at == 0 && c == '.') {
            let mut bytes = [0; 4];
            for byte in c.encode_utf8(&mut bytes).bytes() {
                name.push_str(&format!("%{byte:02X}"));
            }
        } else {
            name.push(c);
        }
    }
    if name.is_empty() {
        name.push('%');
    }
    if name.len() + suffix.len() > MAX_NAME {
        let hash = &Digest::of(text.as_bytes()).to_hex()[..16];
        let mut end = MAX_NAME - suffix.len() - hash.len() - 1;
        while !name.is_char_boundary(end) {
            end -= 1;
        }
        name.truncate(end);
        name.push('%');
        name.push_str(hash);
    }
    name.push_str(suffix);
    name
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn examples() {
        for (text, name) in [
            ("web", "web"),
            ("Web server 1", "Web server 1"),
            ("a/b", "a%2Fb"),
            ("..", "%2E."),
            (".", "%2E"),
            (".hidden", "%2Ehidden"),
            ("", "%"),
            ("100%", "100%25"),
            ("line\nfeed", "line%0Afeed"),
            ("grün", "grün"),
        ] {
            assert_eq!(file_name(text, ""), name);
            assert_eq!(file_name(text, ".img"), format!("{name}.img"));
        }
    }

    #[test]
    fn long_texts_stay_apart() {
        let (a, b) = ("ü".repeat(200), format!("{}x", "ü".repeat(199)));
        assert!(file_name(&a, ".img").len() <= MAX_NAME);
        assert_ne!(file_name(&a, ".img"), file_name(&b, ".img"));
    }

    proptest! {
        #[test]
        fn every_name_is_one(text in ".{0,300}", suffix in prop::sample::select(vec!["", ".img"])) {
            let name = file_name(&text, suffix);
            prop_assert!(!name.is_empty() && name.len() <= MAX_NAME);
            prop_assert!(!name.contains('/') && !name.contains('\0'));
            prop_assert!(!name.starts_with('.') || !suffix.is_empty());
            prop_assert!(name != "." && name != "..");
        }

        #[test]
        fn different_texts_have_different_names(a in "[./%a]{0,5}", b in "[./%a]{0,5}") {
            prop_assert_eq!(a == b, file_name(&a, "") == file_name(&b, ""));
        }
    }
}
