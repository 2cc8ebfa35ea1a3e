//! What every reader of a vocabulary demands of it: the same for one out of a checkpoint and one that a GGUF file brings.
//!
//! Owns the refusal of vocabularies that no reader takes, before hours of work go into a file around one.

use std::collections::HashSet;
use std::path::Path;

use st_gguf::{Metadata, StringArray};

use crate::error::ConvertError;

/// What GGUF calls the kinds of tokens.
pub(crate) const NORMAL: i32 = 1;
pub(crate) const CONTROL: i32 = 3;
pub(crate) const USER_DEFINED: i32 = 4;
pub(crate) const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Refuses the tokenizer of the GGUF file `path`, with these `metadata`, where readers would. A file without one runs on ids.
pub(crate) fn check(path: &Path, metadata: &Metadata) -> Result<(), ConvertError> {
    let bad = |message: String| ConvertError::Tokenizer { path: path.into(), message };
    let model = metadata.str("tokenizer.ggml.model")?.unwrap_or("none");
    if ["none", "no_vocab"].contains(&model) {
        return Ok(());
    }
    let pre = metadata.str("tokenizer.ggml.pre")?.unwrap_or("(absent)");
    for (key, got, expected) in [("model", model, "gpt2"), ("pre", pre, "qwen2")] {
        if got != expected {
            return Err(bad(format!("tokenizer.ggml.{key} is {got:?}; only {expected:?} is implemented")));
        }
    }
    let strings = |key: &str| metadata.strings(key)?.ok_or_else(|| metadata.missing(key));
    let (tokens, merges) = (strings("tokenizer.ggml.tokens")?, strings("tokenizer.ggml.merges")?);
    let kinds = metadata.i32s("tokenizer.ggml.token_type")?.unwrap_or_else(|| vec![NORMAL; tokens.len()]);
    if kinds.len() != tokens.len() {
        return Err(bad(format!("there are {} tokens and {} types of tokens", tokens.len(), kinds.len())));
    }
    if let Some(id) = kinds.iter().position(|kind| !(NORMAL..=BYTE).contains(kind)) {
        return Err(bad(format!("token {id} is of the unknown type {}", kinds[id])));
    }
    let plain = tokens.iter().zip(&kinds).filter(|(_, kind)| [NORMAL, BYTE].contains(kind)).map(|(text, _)| text);
    check_merges(plain, merges).map_err(bad)
}

/// Says what is wrong unless every byte has a token among the `plain` ones, and every merge joins two of them to a third.
pub(crate) fn check_merges<'t>(plain: impl Iterator<Item = &'t str>, merges: &StringArray) -> Result<(), String> {
    let plain: HashSet<&str> = plain.collect();
    let mut utf8 = [0; 4];
    for (byte, letter) in (0..=255u8).zip(byte_letters()) {
        if !plain.contains(&*letter.encode_utf8(&mut utf8)) {
            return Err(format!("the vocabulary has no token for the byte {byte:#04x}, which is {letter:?} there"));
        }
    }
    let mut joined = String::new();
    for merge in merges.iter() {
        let (left, right) = merge.split_once(' ').unwrap_or((merge, ""));
        joined.clear();
        joined.extend([left, right]);
        if let Some(token) = [left, right, &joined].into_iter().find(|token| !plain.contains(token)) {
            return Err(format!("the merge {merge:?} needs {token:?}, which is no token"));
        }
    }
    Ok(())
}

/// The letter that stands for each byte in byte-level BPE: itself where it can be seen, else one from 256 on.
pub(crate) fn byte_letters() -> impl Iterator<Item = char> {
    let mut next = 0x100..;
    (0..=255u8).map(move |byte| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        _ => next.next().and_then(char::from_u32).unwrap_or(char::REPLACEMENT_CHARACTER),
    })
}
