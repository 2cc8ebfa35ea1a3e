//! Values of options: numbers and their bounds.

use std::str::FromStr;

use crate::size::parse_size;

/// A number, or none where it is -1: what the option is by default, as other tools of this kind write it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unless<T>(pub(crate) Option<T>);

pub(super) fn unless<T: FromStr>(text: &str) -> Result<Unless<T>, String> {
    match text {
        "-1" => Ok(Unless(None)),
        _ => text
            .parse()
            .map(|number| Unless(Some(number)))
            .map_err(|_| "it must be a whole number from 0, or -1".into()),
    }
}

/// More threads than the largest machines have are a slip.
const MAX_THREADS: usize = 1024;

pub(super) fn threads(text: &str) -> Result<Unless<usize>, String> {
    match unless(text)? {
        Unless(Some(0)) => Err("it must be at least 1".into()),
        Unless(Some(many)) if many > MAX_THREADS => Err(format!("it must be at most {MAX_THREADS}")),
        number => Ok(number),
    }
}

/// More conversations than any machine of this kind serves are a slip.
const MAX_CONVERSATIONS: usize = 64;

pub(super) fn conversations(text: &str) -> Result<usize, String> {
    match positive(text)? {
        many if many > MAX_CONVERSATIONS => Err(format!("it must be at most {MAX_CONVERSATIONS}")),
        number => Ok(number),
    }
}

pub(super) fn size_or_none(text: &str) -> Result<u64, String> {
    if text.trim() == "0" { Ok(0) } else { parse_size(text) }
}

pub(super) fn count(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| "it must be a whole number from 0".into())
}

pub(super) fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("it must be at least 1".into()),
        Ok(number) => Ok(number),
        Err(_) => Err("it must be a whole number from 1".into()),
    }
}
