//! Calls found in the text of an answer, as it comes.

use serde_json::Value;

use super::{CLOSE, OPEN};

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// More text that is no call.
    Text(String),
    /// A call begins, by the function's name.
    Begin(String),
    /// More of its arguments, a text of JSON.
    Arguments(String),
    /// It is whole.
    End,
}

/// A whole call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) name: String,
    pub(crate) arguments: String,
}

/// Where in the text it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Outside of calls.
    Text,
    /// Behind where a call begins, before its arguments.
    Head,
    /// In its arguments, at this depth of brackets; within a string; behind a backslash.
    Arguments { depth: usize, quoted: bool, escaped: bool },
    /// Behind its arguments.
    Tail,
}

/// The text of an answer on its way to parts.
#[derive(Debug)]
pub(crate) struct Split {
    /// Whether calls are looked for.
    on: bool,
    place: Place,
    /// What cannot be told yet.
    rest: String,
    /// Whether there was a call.
    pub(crate) called: bool,
}

impl Split {
    /// Before an answer. Where no tools may be called, text is text.
    pub(crate) fn new(on: bool) -> Self {
        Self { on, place: Place::Text, rest: String::new(), called: false }
    }

    /// More text.
    pub(crate) fn push(&mut self, text: &str, out: &mut Vec<Part>) {
        if !self.on {
            if !text.is_empty() {
                out.push(Part::Text(text.to_owned()));
            }
            return;
        }
        self.rest.push_str(text);
        while self.step(out) {}
    }

    /// The text is over.
    pub(crate) fn finish(&mut self, out: &mut Vec<Part>) {
        let rest = std::mem::take(&mut self.rest);
        // Behind calls there is nothing but the beginning of another, cut off.
        if self.place == Place::Text && !self.called && !rest.is_empty() {
            out.push(Part::Text(rest));
        }
    }

    /// Takes what can be told from the rest; whether there may be more.
    fn step(&mut self, out: &mut Vec<Part>) -> bool {
        match self.place {
            Place::Text => self.step_text(out),
            Place::Head => {
                const BEFORE: &str = "\"arguments\": ";
                let Some(at) = self.rest.find(BEFORE) else { return false };
                let head: String = self.rest.drain(..at + BEFORE.len()).collect();
                // The grammar has written `{"name": "NAME", `.
                let object = head
                    .trim_start()
                    .strip_suffix(BEFORE)
                    .map(|head| format!("{}}}", head.trim_end_matches([' ', ','])));
                let object: Option<Value> = object.and_then(|object| serde_json::from_str(&object).ok());
                let name = object.as_ref().and_then(|object| object["name"].as_str()).unwrap_or_default();
                out.push(Part::Begin(name.to_owned()));
                self.called = true;
                self.place = Place::Arguments { depth: 0, quoted: false, escaped: false };
                true
            }
            Place::Arguments { depth, quoted, escaped } => self.step_arguments(depth, quoted, escaped, out),
            Place::Tail => {
                let Some(at) = self.rest.find(CLOSE) else { return false };
                self.rest.drain(..at + CLOSE.len());
                out.push(Part::End);
                self.place = Place::Text;
                true
            }
        }
    }

    fn step_text(&mut self, out: &mut Vec<Part>) -> bool {
        let found = self.rest.find(OPEN);
        let end = found.unwrap_or_else(|| self.rest.len() - self.held_back());
        let text: String = self.rest.drain(..end).collect();
        // The end of the line before a call belongs to the call.
        let text = if found.is_some() { text.strip_suffix('\n').unwrap_or(&text) } else { &text };
        if !text.is_empty() && !self.called {
            out.push(Part::Text(text.to_owned()));
        }
        if found.is_some() {
            self.rest.drain(..OPEN.len());
            self.place = Place::Head;
        }
        found.is_some()
    }

    /// Bytes at the end that may be the beginning of a call.
    fn held_back(&self) -> usize {
        let holds = |len: &usize| self.rest.ends_with(&OPEN[..*len]);
        let open = (1..OPEN.len()).rev().find(holds).unwrap_or(0);
        open + usize::from(self.rest[..self.rest.len() - open].ends_with('\n'))
    }

    fn step_arguments(&mut self, mut depth: usize, mut quoted: bool, mut escaped: bool, out: &mut Vec<Part>) -> bool {
        let mut end = None;
        for (at, byte) in self.rest.bytes().enumerate() {
            match byte {
                _ if escaped => escaped = false,
                b'\\' if quoted => escaped = true,
                b'"' => quoted = !quoted,
                b'{' | b'[' if !quoted => depth += 1,
                b'}' | b']' if !quoted => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth == 0 && !quoted && matches!(byte, b'}' | b']') {
                end = Some(at + 1);
                break;
            }
        }
        let text: String = self.rest.drain(..end.unwrap_or(self.rest.len())).collect();
        if !text.is_empty() {
            out.push(Part::Arguments(text));
        }
        self.place = match end {
            Some(_) => Place::Tail,
            None => Place::Arguments { depth, quoted, escaped },
        };
        end.is_some()
    }
}

/// A whole answer: its text, and its calls.
pub(crate) fn collect(text: &str, may_call: bool) -> (String, Vec<Call>) {
    let (mut split, mut parts) = (Split::new(may_call), Vec::new());
    split.push(text, &mut parts);
    split.finish(&mut parts);
    let (mut text, mut calls) = (String::new(), Vec::<Call>::new());
    for part in parts {
        match (part, calls.last_mut()) {
            (Part::Text(more), _) => text.push_str(&more),
            (Part::Begin(name), _) => calls.push(Call { name, arguments: String::new() }),
            (Part::Arguments(more), Some(call)) => call.arguments.push_str(&more),
            (Part::Arguments(_) | Part::End, _) => {}
        }
    }
    (text, calls)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::prompt::call_text;

    #[test]
    fn calls_are_found_however_the_text_is_cut() {
        let arguments = [r#"{"a": "} \" </tool_call> {"}"#, "{}", r#"{"b": [1, {"é": 2}]}"#];
        let calls: Vec<String> = arguments.iter().map(|arguments| call_text("look", arguments)).collect();
        let whole = format!("I <b> look < here. \n\n{}", calls.join("\n"));
        let expected: Vec<Call> =
            arguments.iter().map(|a| Call { name: "look".to_owned(), arguments: (*a).to_owned() }).collect();
        assert_eq!(collect(&whole, true), ("I <b> look < here. \n".to_owned(), expected.clone()));
        for size in 1..20 {
            let (mut split, mut parts) = (Split::new(true), Vec::new());
            let chars: Vec<char> = whole.chars().collect();
            for piece in chars.chunks(size) {
                split.push(&piece.iter().collect::<String>(), &mut parts);
            }
            split.finish(&mut parts);
            let text: String =
                parts.iter().filter_map(|p| if let Part::Text(t) = p { Some(t.as_str()) } else { None }).collect();
            let args: String =
                parts.iter().filter_map(|p| if let Part::Arguments(t) = p { Some(t.as_str()) } else { None }).collect();
            assert_eq!((text.as_str(), args), ("I <b> look < here. \n", arguments.concat()), "{size}");
            assert_eq!(parts.iter().filter(|part| **part == Part::End).count(), 3);
            assert!(split.called);
        }
    }

    #[test]
    fn text_stays_as_it_is() {
        for text in ["", " a \n", "<tool", "<tool_cal l>", "a <tool_"] {
            assert_eq!(collect(text, true), (text.to_owned(), Vec::new()), "{text:?}");
        }
        let call = call_text("x", "{}");
        assert_eq!(collect(&call, false), (call.clone(), Vec::new()));
        // A call that is cut off is as far as it came.
        let cut = &call_text("look", r#"{"a": "b"}"#)[..50];
        assert_eq!(collect(cut, true).1[0].name, "look");
    }
}
