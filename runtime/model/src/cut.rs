//! Where a text without added tokens may be cut in two so that the parts give the same token ids as the whole.
//!
//! Owns one rule, derived from the Qwen2 split and from NFC. The tokenizer pipeline takes some 300 bytes of memory per
//! byte of text; cutting first keeps that to a few megabytes however long the text is.

/// Splits `text` into pieces of about `target` bytes; longer only where no safe place is found.
pub(crate) fn pieces(text: &str, target: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (piece, after) = rest.split_at(next_cut(rest, target));
        rest = after;
        Some(piece)
    })
}

/// The first safe place from `target` bytes on, or the end of `text`.
fn next_cut(text: &str, target: usize) -> usize {
    let mut from = target.min(text.len());
    while !text.is_char_boundary(from) {
        from += 1;
    }
    let mut before = text[..from].chars().next_back();
    for (offset, after) in text[from..].char_indices() {
        let at = from + offset;
        if before.is_some_and(|before| is_boundary(before, after)) {
            return at;
        }
        before = Some(after);
    }
    text.len()
}

/// Whether the split always divides `before` from `after`, and normalization never joins them.
///
/// No word of the split goes on after a letter unless with a letter, nor after a digit at all. The sets are smaller
/// than Unicode's: what is not listed is only never cut at.
fn is_boundary(before: char, after: char) -> bool {
    let ends_word = before.is_ascii_alphanumeric()
        || matches!(before, '\u{3041}'..='\u{3096}' | '\u{30a1}'..='\u{30fa}' | '\u{4e00}'..='\u{9fff}' | '\u{ac00}'..='\u{d7a3}');
    let starts_word = (after.is_ascii() && !after.is_ascii_alphabetic())
        || matches!(after, '\u{3000}'..='\u{3003}' | '\u{3008}'..='\u{3011}' | '\u{ff01}'..='\u{ff0f}');
    ends_word && starts_word
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &str, target: usize) -> Vec<&str> {
        pieces(text, target).collect()
    }

    #[test]
    fn pieces_make_up_the_text() {
        let text = "Hello world, it's 42.  Next\n\n你好。再见 e\u{301} x y";
        for target in 0..text.len() + 2 {
            assert_eq!(cut(text, target.max(1)).concat(), text);
        }
    }

    #[test]
    fn words_and_marks_stay_whole() {
        assert_eq!(cut("aa bb cc", 1), ["aa", " bb", " cc"]);
        assert_eq!(cut("e\u{301}e\u{301} e", 1), ["e\u{301}e\u{301} e"]);
        assert_eq!(cut("a<|im_end|", 1), ["a", "<|im", "_end", "|"]);
        assert_eq!(cut("", 1), Vec::<&str>::new());
    }
}
