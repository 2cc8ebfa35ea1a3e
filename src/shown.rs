//! Text on its way to a terminal.
//!
//! What a model says, and what files hold, may contain what a terminal obeys: sequences that set its title, write the
//! clipboard, clear the screen or turn the direction of text around. Here such characters become ones that are only seen.

use std::borrow::Cow;

/// Whether a terminal may take `c` for more than a character to show: controls of 7 and 8 bits, and the format characters
/// that reorder or annotate what stands around them. Those that scripts and emoji are joined with are none.
fn steers(c: char) -> bool {
    c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{206f}' | '\u{fff9}'..='\u{fffb}')
}

/// The text with U+FFFD for each character that steers, but for line breaks and tabs.
pub(crate) fn harmless(text: &str) -> Cow<'_, str> {
    if !text.contains(|c| steers(c) && !matches!(c, '\n' | '\t')) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\n' | '\t' => out.push(c),
            // A part of the line break. Alone it leads back over what was written.
            '\r' if chars.peek() == Some(&'\n') => {}
            c if steers(c) => out.push(char::REPLACEMENT_CHARACTER),
            c => out.push(c),
        }
    }
    out.into()
}

/// The text as one line, with U+FFFD for each character that steers.
pub(crate) fn one_line(text: &str) -> String {
    let words: Vec<&str> = text.split(['\n', '\r']).map(str::trim).filter(|part| !part.is_empty()).collect();
    words.join(" ").chars().map(|c| if steers(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// The text as one line that tells every character: those that steer are escaped.
pub(crate) fn escaped(text: &str) -> String {
    text.chars().map(|c| if steers(c) { c.escape_default().to_string() } else { c.to_string() }).collect()
}

/// JSON that means the same, without a character that steers: JSON has an escape for each.
pub(crate) fn harmless_json(json: &str) -> String {
    let escape = |c: char| match c {
        // Between values; in texts they are escaped already.
        '\n' => "\n".to_owned(),
        c if steers(c) => format!("\\u{:04x}", u32::from(c)),
        c => c.to_string(),
    };
    json.chars().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_steers_a_terminal_is_only_seen() {
        for (text, shown) in [
            ("plain\ttext\r\nof two lines\n", "plain\ttext\nof two lines\n"),
            ("\x1b]52;c;aGk=\x07", "\u{fffd}]52;c;aGk=\u{fffd}"),
            ("\u{9b}2J\x7f\0", "\u{fffd}2J\u{fffd}\u{fffd}"),
            ("safe\rover", "safe\u{fffd}over"),
            ("abc\u{202e}cba", "abc\u{fffd}cba"),
            // Joined by a character of no width.
            ("👩\u{200d}👩 نعم", "👩\u{200d}👩 نعم"),
        ] {
            assert_eq!(harmless(text), shown, "{text:?}");
        }
        assert_eq!(one_line("a\n\n b\tc\x1b"), "a b\u{fffd}c\u{fffd}");
        assert_eq!(escaped("\x1b[1m\u{9b}"), "\\u{1b}[1m\\u{9b}");
    }

    #[test]
    fn json_means_the_same_without_what_steers() {
        let value = serde_json::json!({"text": "\x1b\u{9b}2J\x7f\u{202e}\n\"", "n": 1});
        let shown = harmless_json(&format!("{value}\n"));
        assert!(!shown.trim_end().contains(steers));
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).expect("JSON"), value);
    }
}
