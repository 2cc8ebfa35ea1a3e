//! Text from files and pipes: UTF-8, with or without the byte-order mark of editors on Windows, and UTF-16 with one.

use std::io::Read;

use anyhow::{Context as _, ensure};

use crate::size::show_size;

/// More than any context holds: 32 768 tokens, each of the longest kind, are 8 MiB.
pub(crate) const MAX_PROMPT: u64 = 16 << 20;

/// More than a prompt may be.
pub(crate) const MORE_THAN_A_CONTEXT: &str = "more text than any context holds";

/// What `input` holds, of which no more than `most` bytes are read; `more` says what more is.
pub(crate) fn read(input: &mut dyn Read, most: u64, more: &str) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    input.take(most.saturating_add(1)).read_to_end(&mut bytes)?;
    ensure!(bytes.len() as u64 <= most, "it is longer than {}, {more}", show_size(most));
    decode(bytes)
}

/// The text that `bytes` encode.
pub(crate) fn decode(mut bytes: Vec<u8>) -> anyhow::Result<String> {
    let units = |from: fn([u8; 2]) -> u16| {
        let (pairs, rest) = bytes[2..].as_chunks::<2>();
        ensure!(rest.is_empty(), "it begins like UTF-16 text, but ends within a character");
        let units = pairs.iter().map(|pair| from(*pair));
        char::decode_utf16(units).collect::<Result<String, _>>().context("it begins like UTF-16 text, but is none")
    };
    match bytes.as_slice() {
        [0xff, 0xfe, ..] => return units(u16::from_le_bytes),
        [0xfe, 0xff, ..] => return units(u16::from_be_bytes),
        [0xef, 0xbb, 0xbf, ..] => drop(bytes.drain(..3)),
        _ => {}
    }
    String::from_utf8(bytes).map_err(|error| anyhow::anyhow!("it is not UTF-8 text: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_say_how_text_is_encoded_and_are_no_part_of_it() {
        let text = "h\u{e9} \u{1f98a}\n";
        let utf16 = |to: fn(u16) -> [u8; 2]| -> Vec<u8> {
            std::iter::once(0xfeff).chain(text.encode_utf16()).flat_map(to).collect()
        };
        let utf8 = [b"\xef\xbb\xbf", text.as_bytes()].concat();
        for bytes in [text.as_bytes().to_vec(), utf8, utf16(u16::to_le_bytes), utf16(u16::to_be_bytes)] {
            assert_eq!(decode(bytes).expect("text"), text);
        }
        for bytes in [&b"\xff\xfea"[..], b"\xff\xfe\x00\xd8", b"\xff", b"a\xe9"] {
            let error = decode(bytes.to_vec()).expect_err("no text").to_string();
            assert!(error.contains("UTF-"), "{error}");
        }
    }

    #[test]
    fn no_more_is_read_than_may_be() {
        assert_eq!(read(&mut &b"abc"[..], 3, "").expect("text"), "abc");
        let mut input = std::io::repeat(b'a').take(1 << 40);
        assert!(read(&mut input, 1 << 20, "").is_err());
        assert!(input.limit() > (1 << 40) - (2 << 20));
    }
}
