//! What stands in place of a file that was never fetched, told by its first bytes.
//!
//! Owns the recognition, so that every reader of large files says the same of them. Reads nothing itself.

use std::fmt;

/// A small file that passes for a large one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placeholder {
    /// What a clone without Git LFS leaves: a text with the hash and the size of the file.
    LfsPointer,
    /// What the address of a web page gives where the address of a file was meant.
    WebPage,
}

impl Placeholder {
    /// First bytes of a file that [`Placeholder::of`] needs to decide.
    pub const PREFIX_BYTES: usize = 256;

    /// What a file is that begins with `start`, if it is a placeholder.
    pub fn of(start: &[u8]) -> Option<Self> {
        let start = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(start).trim_ascii_start();
        let begins =
            |word: &str| start.get(..word.len()).is_some_and(|start| start.eq_ignore_ascii_case(word.as_bytes()));
        if begins("version https://git-lfs.github.com/spec/") || begins("version https://hawser.github.com/spec/") {
            return Some(Self::LfsPointer);
        }
        ["<!doctype html", "<html", "<head", "<?xml"].into_iter().any(begins).then_some(Self::WebPage)
    }
}

impl fmt::Display for Placeholder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LfsPointer => "a Git LFS pointer, not the file that it stands for",
            Self::WebPage => "a web page (HTML), not the file that it may show",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pointers_and_pages_are_told_from_files() {
        let pointer = Some(Placeholder::LfsPointer);
        assert_eq!(Placeholder::of(b"version https://git-lfs.github.com/spec/v1\noid sha256:00"), pointer);
        let page = Some(Placeholder::WebPage);
        for start in
            ["<!doctype html>", "\n <!DOCTYPE HTML PUBLIC", "\u{feff}<html lang=en>", "<?xml version='1.0'?><Error>"]
        {
            assert_eq!(Placeholder::of(start.as_bytes()), page, "{start}");
        }
        for start in ["", "GGUF\x03\0\0\0", "{\"a\": 0}", "version 2", "<|im_start|>", "<"] {
            assert_eq!(Placeholder::of(start.as_bytes()), None, "{start}");
        }
    }
}
