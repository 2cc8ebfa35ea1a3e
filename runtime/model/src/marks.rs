//! What a template wrote, told from what it was given.
//!
//! A control token in a message is text. A template works on the text itself (it trims, compares, splits), so that a
//! message cannot be replaced by something else while it renders. Instead a *marker*, a character that occurs nowhere in
//! the conversation, is put inside everything that could become part of a control token, and taken out once control
//! tokens have been found. Text without such parts, which is nearly all text, reaches the template unchanged.
//!
//! Control tokens have a bar in them, as `<|im_end|>` has: every bar of a message is followed by a marker, so that
//! however a template cuts a text and puts the pieces together, no such token comes out unless the template wrote its
//! bars itself. Where it does, the name between them must not be a message: a text that is the inside of a control token
//! is marked. Tokens without a bar (`</s>`) are marked where a text has their first two characters or their last two,
//! those of one character on both sides.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Range;

use serde_json::{Map, Value};

/// Where markers are looked for: letters that no chat needs, and that are printed as they are.
const FIRST_MARKER: char = '\u{20000}';
/// What control tokens are told by.
const BARS: [char; 2] = ['|', '\u{ff5c}'];
/// A text of more bytes is not compared with the insides of control tokens.
const INSIDE: usize = 64;

/// A rendered chat, in which what the template wrote is told from what it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    text: String,
    marker: char,
}

impl Rendered {
    pub(crate) fn new(text: String, marker: char) -> Self {
        Self { text, marker }
    }

    /// The text, as the template would have made it of the messages as they are.
    pub fn text(&self) -> Cow<'_, str> {
        self.unmarked(&self.text)
    }

    /// Whether the control token at `range` was written by the template. One of a single character has no inside for a
    /// marker: in a message it has markers around it.
    pub(crate) fn is_written(&self, range: Range<usize>) -> bool {
        let (before, after) = (&self.text[..range.start], &self.text[range.end..]);
        let single = self.text[range].chars().count() == 1;
        !(single && before.ends_with(self.marker) && after.starts_with(self.marker))
    }

    /// The text with the markers in it.
    pub(crate) fn marked(&self) -> &str {
        &self.text
    }

    #[cfg(test)]
    pub(crate) fn marker(&self) -> char {
        self.marker
    }

    pub(crate) fn unmarked<'t>(&self, part: &'t str) -> Cow<'t, str> {
        match part.contains(self.marker) {
            true => Cow::Owned(part.replace(self.marker, "")),
            false => Cow::Borrowed(part),
        }
    }
}

/// What could become part of a control token.
#[derive(Debug, Default)]
pub(crate) struct ControlTexts {
    texts: Vec<String>,
    /// The bars that control tokens have.
    bars: HashSet<char>,
    /// First two characters, and last two, of those without one.
    pairs: HashSet<(char, char)>,
    first: HashSet<char>,
    /// Control tokens of one character.
    single: HashSet<char>,
}

impl ControlTexts {
    pub(crate) fn new<'t>(texts: impl IntoIterator<Item = &'t str>) -> Self {
        let mut all = Self::default();
        for text in texts {
            let mut chars = text.chars();
            let bar = BARS.into_iter().find(|bar| text.contains(*bar) && text.chars().count() > 1);
            all.bars.extend(bar);
            match (chars.next(), chars.next()) {
                (None, _) => continue,
                (Some(only), None) => drop(all.single.insert(only)),
                _ if bar.is_some() => {}
                (Some(first), Some(second)) => {
                    all.first.insert(first);
                    all.pairs.insert((first, second));
                    let mut back = text.chars().rev();
                    if let (Some(last), Some(before)) = (back.next(), back.next()) {
                        all.pairs.insert((before, last));
                    }
                }
            }
            all.texts.push(text.to_owned());
        }
        all
    }

    /// A character that is in none of `values` and none of `texts`.
    pub(crate) fn marker_for<'v>(
        &self,
        values: impl IntoIterator<Item = &'v Value>,
        texts: impl IntoIterator<Item = &'v str>,
    ) -> char {
        let mut used = HashSet::new();
        let mut note = |text: &str| used.extend(text.chars().filter(|c| *c >= FIRST_MARKER));
        texts.into_iter().for_each(&mut note);
        self.texts.iter().map(String::as_str).for_each(&mut note);
        for value in values {
            for_each_text(value, &mut note);
        }
        // No conversation has all of them: they are 40 000 letters, and others after them.
        (FIRST_MARKER..=char::MAX).find(|c| !used.contains(c)).unwrap_or(char::MAX)
    }

    /// `value` with all its texts marked, keys too.
    pub(crate) fn mark_value(&self, value: &Value, marker: char) -> Value {
        match value {
            Value::String(text) => Value::String(self.mark(text, marker).into_owned()),
            Value::Array(items) => items.iter().map(|item| self.mark_value(item, marker)).collect(),
            Value::Object(entries) => {
                let mark = |(key, value): (&String, &Value)| {
                    (self.mark(key, marker).into_owned(), self.mark_value(value, marker))
                };
                Value::Object(entries.iter().map(mark).collect::<Map<_, _>>())
            }
            other => other.clone(),
        }
    }

    /// Whether a text that ends so may be continued to a control token.
    fn ends(&self, last: char) -> bool {
        self.bars.contains(&last) || self.first.contains(&last) || self.single.contains(&last)
    }

    /// `text` with the marker wherever it could become part of a control token.
    pub(crate) fn mark<'t>(&self, text: &'t str, marker: char) -> Cow<'t, str> {
        let mut out = String::new();
        let mut copied = 0;
        let mut before = None;
        for (at, c) in text.char_indices() {
            let joins = before.is_some_and(|before| self.bars.contains(&before) || self.pairs.contains(&(before, c)));
            let beside_single = self.single.contains(&c) || before.is_some_and(|before| self.single.contains(&before));
            if joins || beside_single {
                out.push_str(&text[copied..at]);
                out.push(marker);
                copied = at;
            }
            before = Some(c);
        }
        let at_end = before.is_some_and(|last| self.ends(last));
        let inside = copied == 0
            && !at_end
            && out.is_empty()
            && !text.is_empty()
            && text.len() <= INSIDE
            && self.texts.iter().any(|control| control.contains(text));
        if copied == 0 && !at_end && !inside {
            return Cow::Borrowed(text);
        }
        if inside && let Some(first) = text.chars().next() {
            out.push(first);
            out.push(marker);
            copied = first.len_utf8();
        }
        out.push_str(&text[copied..]);
        if at_end {
            out.push(marker);
        }
        Cow::Owned(out)
    }
}

fn for_each_text(value: &Value, note: &mut impl FnMut(&str)) {
    match value {
        Value::String(text) => note(text),
        Value::Array(items) => items.iter().for_each(|item| for_each_text(item, note)),
        Value::Object(entries) => entries.iter().for_each(|(key, value)| {
            note(key);
            for_each_text(value, note);
        }),
        _ => {}
    }
}
