//! What commands read besides models: from a file, or from stdin where the name is `-`.
//!
//! A person may have to type it, and a pipe may never give it: Ctrl-C ends the waiting.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use anyhow::Context as _;

use crate::signals::Interrupt;
use crate::text::{self, MAX_PROMPT, MORE_THAN_A_CONTEXT};

/// Whether `path` means stdin.
pub(crate) fn is_stdin(path: &Path) -> bool {
    path == Path::new("-")
}

/// What `path` is called in messages.
pub(crate) fn name(path: &Path) -> String {
    if is_stdin(path) { "stdin".to_owned() } else { path.display().to_string() }
}

/// Hands what is in `path` to `read`, which looks at no flag.
pub(crate) fn with<T, E: Into<anyhow::Error>>(
    path: &Path,
    interrupt: &Interrupt,
    read: impl FnOnce(&mut dyn Read) -> Result<T, E>,
) -> anyhow::Result<T> {
    // Opening a pipe waits for its other end.
    let read = interrupt.while_reading(|| -> anyhow::Result<T> {
        match is_stdin(path) {
            true => read(&mut io::stdin().lock()).map_err(Into::into),
            false => read(&mut File::open(path)?).map_err(Into::into),
        }
    })?;
    read.with_context(|| format!("cannot read {}", name(path)))
}

/// The text in `path`, of which no more than `most` bytes are read; `more` says what more is.
pub(crate) fn text(path: &Path, most: u64, more: &str, interrupt: &Interrupt) -> anyhow::Result<String> {
    with(path, interrupt, |input| text::read(input, most, more))
}

/// The text of a prompt in `path`.
pub(crate) fn prompt(path: &Path, interrupt: &Interrupt) -> anyhow::Result<String> {
    text(path, MAX_PROMPT, MORE_THAN_A_CONTEXT, interrupt)
}
