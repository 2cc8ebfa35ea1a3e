//! What a file says of its tokens: their kinds, which of them end an answer, which control text, and why that is wrong.
//!
//! Owns the keys that tokenizer and chat template both depend on. Encoding is `tokenizer.rs`'s, rendering `chat.rs`'s.

use std::collections::HashSet;

use st_gguf::{GgufError, Metadata, StringArray};

pub(crate) const KEY_TOKENS: &str = "tokenizer.ggml.tokens";
pub(crate) const KEY_TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
pub(crate) const KEY_BOS: &str = "tokenizer.ggml.bos_token_id";
/// Keys that each name one token that ends an answer.
pub(crate) const KEYS_END: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];
/// Keys that each name one token for something else.
const KEYS_NAMED: [&str; 4] = [
    KEY_BOS,
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.seperator_token_id",
];
/// Every end token of a model that has several, as an array.
pub(crate) const KEY_END_ALL: &str = "tokenizer.ggml.eos_token_ids";
/// The chat template, as its source.
pub(crate) const KEY_TEMPLATE: &str = "tokenizer.chat_template";
/// The names of further templates, each under `tokenizer.chat_template.NAME`.
const KEY_NAMES: &str = "tokenizer.chat_templates";

/// Control tokens that end an answer in files that do not list every end token.
const END_TEXTS: [&str; 2] = ["<|im_end|>", "<|endoftext|>"];

/// Why a file's tokenizer cannot be used, or a text cannot be encoded.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A key has the wrong type.
    #[error(transparent)]
    Metadata(#[from] GgufError),
    /// A key that the others need is absent.
    #[error("the file has a tokenizer but no `{key}`")]
    MissingKey {
        /// The absent key.
        key: &'static str,
    },
    /// A model or splitting rule that is not implemented.
    #[error("unsupported tokenizer: `{key}` is `{got}`, expected `{expected}`")]
    Unsupported {
        /// The key that names it.
        key: &'static str,
        /// Its value in the file.
        got: String,
        /// The one value that is implemented.
        expected: &'static str,
    },
    /// Two arrays that run in parallel differ in length.
    #[error("`{key}` has {got} entries, expected {expected}, one per token")]
    LengthMismatch {
        /// The array that disagrees with the token list.
        key: &'static str,
        /// Its length.
        got: usize,
        /// The number of tokens.
        expected: usize,
    },
    /// A token type outside llama.cpp's 1..=6.
    #[error("token {id} has the unknown type {got}")]
    UnknownTokenType {
        /// The token.
        id: usize,
        /// Its type in the file.
        got: i32,
    },
    /// A key names a token that does not exist.
    #[error("`{key}` is {id}, but the vocabulary has {vocab} tokens")]
    IdOutOfRange {
        /// The key.
        key: &'static str,
        /// The id it names.
        id: u32,
        /// The number of tokens.
        vocab: usize,
    },
    /// A merge entry that is not two tokens separated by a space.
    #[error("merge {rank} is not a pair of tokens: `{merge}`")]
    MalformedMerge {
        /// Position in the merge list.
        rank: usize,
        /// The entry as it stands.
        merge: String,
    },
    /// A merge whose left, right or joined text is no token.
    #[error("merge {rank} needs the token `{token}`, which is not in the vocabulary")]
    UnknownMergeToken {
        /// Position in the merge list.
        rank: usize,
        /// The text that is no token.
        token: String,
    },
    /// Byte-level BPE needs a token for each byte value.
    #[error("the vocabulary has no token for the byte {byte:#04x}")]
    MissingByte {
        /// The byte without a token.
        byte: u8,
    },
    /// More token text or merges than 32-bit positions can address.
    #[error("the vocabulary is too large")]
    VocabularyTooLarge,
    /// The caller asked to stop.
    #[error("interrupted")]
    Cancelled,
    /// The splitting rule could not be compiled or applied.
    #[error("cannot tokenize: {0}")]
    Pipeline(String),
}

/// What a token is for, as `tokenizer.ggml.token_type` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// Text.
    Normal,
    /// Stands for text the vocabulary cannot write.
    Unknown,
    /// Structure, such as `<|im_end|>`: matched only where special tokens are allowed, never shown.
    Control,
    /// Added text, such as `<tool_call>`: always matched whole, and shown.
    UserDefined,
    /// A filler id that no text maps to.
    Unused,
    /// A single byte.
    Byte,
}

impl TokenKind {
    fn from_gguf(value: i32) -> Option<Self> {
        Some(match value {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }

    /// Whether the token's text is written in the byte-level alphabet and takes part in merges.
    pub(crate) fn is_plain(self) -> bool {
        matches!(self, Self::Normal | Self::Byte)
    }

    /// Whether the token is looked for in the text before it is split into words.
    pub(crate) fn is_added(self) -> bool {
        matches!(self, Self::Control | Self::UserDefined)
    }
}

/// The sources of all chat templates of a file, the one for ordinary chats first.
fn templates(metadata: &Metadata) -> Result<Vec<&str>, GgufError> {
    let mut sources: Vec<&str> = metadata.str(KEY_TEMPLATE)?.into_iter().collect();
    for name in metadata.strings(KEY_NAMES)?.into_iter().flat_map(|names| names.iter()) {
        sources.extend(metadata.str(&format!("{KEY_TEMPLATE}.{name}"))?);
    }
    Ok(sources)
}

/// What each token is for.
pub(crate) fn read_kinds(metadata: &Metadata, tokens: &StringArray) -> Result<Box<[TokenKind]>, TokenizerError> {
    let Some(types) = metadata.i32s(KEY_TOKEN_TYPE)? else {
        return unmarked_kinds(metadata, tokens);
    };
    if types.len() != tokens.len() {
        return Err(TokenizerError::LengthMismatch { key: KEY_TOKEN_TYPE, got: types.len(), expected: tokens.len() });
    }
    let kinds = types
        .into_iter()
        .enumerate()
        .map(|(id, got)| TokenKind::from_gguf(got).ok_or(TokenizerError::UnknownTokenType { id, got }));
    kinds.collect()
}

/// Kinds for a file that does not say: a token of the form `<|…|>` that the file's keys or chat templates use is control.
fn unmarked_kinds(metadata: &Metadata, tokens: &StringArray) -> Result<Box<[TokenKind]>, TokenizerError> {
    let mut named: Vec<u32> = named_end_ids(metadata, tokens.len())?;
    for key in KEYS_NAMED {
        named.extend(metadata.u32(key)?);
    }
    let templates = templates(metadata)?;
    let is_control = |id: u32, text: &str| {
        let bare = text.strip_prefix("<|").and_then(|rest| rest.strip_suffix("|>"));
        bare.is_some() && (named.contains(&id) || templates.iter().any(|template| template.contains(text)))
    };
    let kinds = (0u32..).zip(tokens.iter()).map(|(id, text)| match is_control(id, text) {
        true => TokenKind::Control,
        false => TokenKind::Normal,
    });
    Ok(kinds.collect())
}

/// The control tokens with their texts.
fn control_ids<'t>(tokens: &'t StringArray, kinds: &[TokenKind]) -> impl Iterator<Item = (u32, &'t str)> {
    let all = (0u32..).zip(tokens.iter()).zip(kinds);
    all.filter(|(_, kind)| **kind == TokenKind::Control).map(|(token, _)| token)
}

/// The texts of the control tokens of a file.
pub(crate) fn control_texts(metadata: &Metadata) -> Result<Vec<&str>, TokenizerError> {
    let Some(tokens) = metadata.strings(KEY_TOKENS)? else {
        return Ok(Vec::new());
    };
    let kinds = read_kinds(metadata, tokens)?;
    Ok(control_ids(tokens, &kinds).map(|(_, text)| text).collect())
}

/// The token that `key` names, where it names one.
pub(crate) fn read_id(metadata: &Metadata, key: &'static str, vocab: usize) -> Result<Option<u32>, TokenizerError> {
    // -1, in whatever width, is how writers say that there is none.
    if metadata.get(key).is_some_and(st_format::is_no_token) {
        return Ok(None);
    }
    let id = metadata.u32(key)?;
    id.map(|id| in_vocabulary(key, id, vocab)).transpose()
}

fn in_vocabulary(key: &'static str, id: u32, vocab: usize) -> Result<u32, TokenizerError> {
    match (id as usize) < vocab {
        true => Ok(id),
        false => Err(TokenizerError::IdOutOfRange { key, id, vocab }),
    }
}

/// Every token of a vocabulary that ends an answer, each once.
pub(crate) fn end_ids_among(
    metadata: &Metadata,
    tokens: &StringArray,
    kinds: &[TokenKind],
) -> Result<Vec<u32>, TokenizerError> {
    let mut ids = named_end_ids(metadata, tokens.len())?;
    if metadata.get(KEY_END_ALL).is_none() {
        let control = control_ids(tokens, kinds);
        ids.extend(control.filter(|(_, text)| END_TEXTS.contains(text)).map(|(id, _)| id));
    }
    keep_first(&mut ids);
    Ok(ids)
}

/// The end tokens that a file names, for files whose tokens have no texts. Nothing says here how many tokens there are.
pub(crate) fn end_ids(metadata: &Metadata) -> Result<Vec<u32>, TokenizerError> {
    let mut ids = named_end_ids(metadata, usize::MAX)?;
    keep_first(&mut ids);
    Ok(ids)
}

fn named_end_ids(metadata: &Metadata, vocab: usize) -> Result<Vec<u32>, TokenizerError> {
    let mut ids = Vec::new();
    for key in KEYS_END {
        ids.extend(read_id(metadata, key, vocab)?);
    }
    for id in metadata.u32s(KEY_END_ALL)?.unwrap_or_default() {
        ids.push(in_vocabulary(KEY_END_ALL, id, vocab)?);
    }
    Ok(ids)
}

/// Drops repetitions.
fn keep_first(ids: &mut Vec<u32>) {
    let mut seen = HashSet::new();
    ids.retain(|id| seen.insert(*id));
}
