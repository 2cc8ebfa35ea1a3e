//! Token ids on the command line: `1,2,3`, or `@FILE` with the same in a file (`@-`: on stdin).

use std::ffi::OsStr;
use std::path::Path;

use crate::input;
use crate::report::Advice;
use crate::signals::Interrupt;

/// Reads a list of token ids; whitespace counts as a separator.
pub(crate) fn parse(list: &OsStr, interrupt: &Interrupt) -> anyhow::Result<Vec<u32>> {
    let text = match st_sys::strip_prefix(list, "@") {
        Some(path) => input::prompt(Path::new(path), interrupt)?,
        None => list.to_string_lossy().into_owned(),
    };
    ids(&text)
}

/// The token ids in a text.
pub(crate) fn ids(text: &str) -> anyhow::Result<Vec<u32>> {
    let words = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|word| !word.is_empty());
    words
        .map(|word| {
            word.parse().map_err(|_| {
                let word: String = word.chars().take(40).collect();
                Advice::new(format!("{word:?} is no token id"), "write ids as 1,2,3 or put them in a file: @FILE")
                    .into()
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(list: &str) -> anyhow::Result<Vec<u32>> {
        super::parse(list.as_ref(), &Interrupt::default())
    }

    #[test]
    fn lists_and_files_are_read() {
        assert_eq!(parse("1,2, 3\n").expect("a list"), [1, 2, 3]);
        assert_eq!(parse("").expect("a list"), [0u32; 0]);
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "7\n8,9").expect("written");
        assert_eq!(parse(&format!("@{}", file.path().display())).expect("a list"), [7, 8, 9]);
    }

    #[test]
    fn what_is_no_id_is_named() {
        for list in ["1,x", "-1", "4294967296", "1.5"] {
            assert!(parse(list).is_err(), "{list}");
        }
        assert!(parse("@/no/such/file").is_err());
    }
}
