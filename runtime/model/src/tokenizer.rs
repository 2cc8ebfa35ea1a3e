//! Text to token ids and back, from GGUF metadata alone.
//!
//! Owns the reading of the `tokenizer.ggml.*` keys and the pipeline they describe: added tokens, NFC, the Qwen2 split,
//! byte-level BPE. Refuses any tokenizer it does not implement exactly (another model, another `pre`), because nearly
//! right token ids give fluent nonsense. Chat templates are `chat.rs`'s, streaming is `text.rs`'s.

use std::collections::HashSet;
use std::sync::Arc;

use st_gguf::{GgufError, Metadata, StringArray};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, TokenizerImpl};

use crate::added::AddedTokens;
use crate::bpe::{ByteBpe, SharedBpe};
use crate::chat::{self, Rendered};
use crate::cut;
use crate::progress::{LoadProgress, NoProgress};

const KEY_MODEL: &str = "tokenizer.ggml.model";
const KEY_PRE: &str = "tokenizer.ggml.pre";
const KEY_TOKENS: &str = "tokenizer.ggml.tokens";
const KEY_TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
const KEY_MERGES: &str = "tokenizer.ggml.merges";
const KEY_BOS: &str = "tokenizer.ggml.bos_token_id";
const KEY_ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
/// Keys that each name one token that ends an answer.
const KEYS_END: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];
/// Keys that each name one token for something else.
const KEYS_NAMED: [&str; 4] = [
    KEY_BOS,
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.seperator_token_id",
];
/// Every end token of a model that has several, as an array.
const KEY_END_ALL: &str = "tokenizer.ggml.eos_token_ids";

/// Control tokens that end an answer in files that do not list every end token.
const END_TEXTS: [&str; 2] = ["<|im_end|>", "<|endoftext|>"];

/// Bytes of text that go through the pipeline at once.
const PIECE: usize = 8 << 10;

/// How Qwen2 cuts text into the words that merges may not cross.
const QWEN2_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

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

type Pipeline = TokenizerImpl<SharedBpe, NFC, Split, ByteLevel, ByteLevel>;

/// A file's tokenizer. Cheap to share: nothing in it changes after loading.
pub struct Tokenizer {
    bpe: Arc<ByteBpe>,
    kinds: Box<[TokenKind]>,
    /// Text without added tokens to ids.
    pipeline: Pipeline,
    /// What is looked for where control tokens are read.
    added: AddedTokens,
    /// What is looked for where the text of a control token is text like any other.
    user_defined: AddedTokens,
    longest: usize,
    end_ids: Vec<u32>,
    bos_id: Option<u32>,
    add_bos: bool,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("end_ids", &self.end_ids)
            .field("bos_id", &self.bos_id)
            .field("add_bos", &self.add_bos)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads the tokenizer of a file; `None` where the file has none.
    ///
    /// # Errors
    /// Where the file has a tokenizer that is damaged, contradicts itself, or is of a kind not implemented here.
    pub fn from_metadata(metadata: &Metadata) -> Result<Option<Self>, TokenizerError> {
        Self::from_metadata_with(metadata, &NoProgress)
    }

    /// [`Tokenizer::from_metadata`] that `progress` may stop.
    ///
    /// # Errors
    /// As [`Tokenizer::from_metadata`]; [`TokenizerError::Cancelled`] where `progress` breaks.
    pub fn from_metadata_with(
        metadata: &Metadata,
        progress: &dyn LoadProgress,
    ) -> Result<Option<Self>, TokenizerError> {
        let Some(model) = metadata.str(KEY_MODEL)? else {
            return Ok(None);
        };
        if model == "none" || model == "no_vocab" {
            return Ok(None);
        }
        expect(KEY_MODEL, model, "gpt2")?;
        let pre = metadata.str(KEY_PRE)?;
        expect(KEY_PRE, pre.unwrap_or("(absent)"), "qwen2")?;

        let missing = |key| TokenizerError::MissingKey { key };
        let tokens = metadata.strings(KEY_TOKENS)?;
        let tokens = tokens.ok_or_else(|| missing(KEY_TOKENS))?;
        let merges = metadata.strings(KEY_MERGES)?;
        let merges = merges.ok_or_else(|| missing(KEY_MERGES))?;
        let kinds = read_kinds(metadata, tokens)?;

        let bpe = Arc::new(ByteBpe::new(tokens, &kinds, merges, &|| progress.reading())?);
        let pipeline = pipeline(&bpe)?;
        let added = AddedTokens::new(&bpe, &kinds, TokenKind::is_added);
        let user_defined = AddedTokens::new(&bpe, &kinds, |kind| kind == TokenKind::UserDefined);

        let mut end_ids = named_end_ids(metadata, tokens.len())?;
        if metadata.get(KEY_END_ALL).is_none() {
            let control = control_ids(tokens, &kinds);
            end_ids.extend(control.filter(|(_, text)| END_TEXTS.contains(text)).map(|(id, _)| id));
        }
        keep_first(&mut end_ids);
        let bos_id = read_id(metadata, KEY_BOS, tokens.len())?;
        Ok(Some(Self {
            end_ids,
            bos_id,
            add_bos: bos_id.is_some() && metadata.bool(KEY_ADD_BOS)?.unwrap_or(false),
            longest: (0u32..).map_while(|id| bpe.token_bytes(id)).map(<[u8]>::len).max().unwrap_or(0),
            bpe,
            kinds,
            pipeline,
            added,
            user_defined,
        }))
    }

    /// Number of tokens.
    pub fn vocab_size(&self) -> usize {
        self.bpe.len()
    }

    /// The token ids of `text`. With `allow_special`, the text of a control token (`<|im_end|>`) becomes that token,
    /// as in a rendered chat; without, it is text like any other.
    ///
    /// # Errors
    /// Where the splitting rule gives up on the text.
    pub fn encode(&self, text: &str, allow_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::with_capacity(text.len() / 4);
        self.encode_in_pieces(text, allow_special, PIECE, &mut ids)?;
        Ok(ids)
    }

    /// The token ids of a rendered chat. Control tokens are those that the template wrote; their text in a message is
    /// text like any other.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_chat(&self, chat: &Rendered) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::with_capacity(chat.marked().len() / 4);
        let (text, mut plain_from, mut from) = (chat.marked(), 0, 0);
        while let Some(found) = self.added.find(&self.bpe, text, from) {
            if self.kind(found.id) == Some(TokenKind::Control) && chat.is_written(found.range.clone()) {
                let plain = chat.unmarked(&text[plain_from..found.range.start]);
                self.encode_in_pieces(&plain, false, PIECE, &mut ids)?;
                ids.push(found.id);
                plain_from = found.range.end;
            }
            from = found.range.end;
        }
        self.encode_in_pieces(&chat.unmarked(&text[plain_from..]), false, PIECE, &mut ids)?;
        Ok(ids)
    }

    /// How many tokens `text` has, control tokens not read; counting ends soon after `most`.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn count_to(&self, text: &str, most: usize) -> Result<usize, TokenizerError> {
        let (mut count, mut ids) = (0, Vec::new());
        for piece in cut::pieces(text, PIECE) {
            self.encode_in_pieces(piece, false, PIECE, &mut ids)?;
            count += ids.len();
            ids.clear();
            if count >= most {
                break;
            }
        }
        Ok(count)
    }

    fn encode_in_pieces(
        &self,
        text: &str,
        allow_special: bool,
        target: usize,
        ids: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        let added = if allow_special { &self.added } else { &self.user_defined };
        let mut rest = 0;
        while rest < text.len() {
            let found = added.find(&self.bpe, text, rest);
            let plain = found.as_ref().map_or(text.len(), |found| found.range.start);
            for piece in cut::pieces(&text[rest..plain], target) {
                let encoding = self.pipeline.encode_fast(piece, false).map_err(pipeline_error)?;
                ids.extend_from_slice(encoding.get_ids());
            }
            rest = plain;
            if let Some(found) = found {
                ids.push(found.id);
                rest = found.range.end;
            }
        }
        Ok(())
    }

    /// The most bytes of text that one token stands for. No `n` tokens stand for more than `n` times as many.
    pub fn longest_token(&self) -> usize {
        self.longest
    }

    /// [`Tokenizer::encode`], led by the beginning-of-text token where the file asks for one.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str, allow_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = self.encode(text, allow_special)?;
        if let Some(bos) = self.bos_id.filter(|_| self.add_bos)
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// The bytes token `id` stands for: perhaps a part of a UTF-8 character. `None` where the id is out of range.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.bpe.token_bytes(id)
    }

    /// What token `id` is for. `None` where the id is out of range.
    pub fn kind(&self, id: u32) -> Option<TokenKind> {
        self.kinds.get(id as usize).copied()
    }

    /// The bytes a reader sees for token `id`: none for control tokens and ids out of range.
    pub fn visible_bytes(&self, id: u32) -> &[u8] {
        match self.kind(id) {
            Some(TokenKind::Control) | None => &[],
            Some(_) => self.token_bytes(id).unwrap_or_default(),
        }
    }

    /// The text of `ids`, control tokens included where `show_control`; broken UTF-8 becomes U+FFFD.
    pub fn decode(&self, ids: &[u32], show_control: bool) -> String {
        let bytes: Vec<u8> = ids
            .iter()
            .flat_map(|&id| match show_control {
                true => self.token_bytes(id).unwrap_or_default(),
                false => self.visible_bytes(id),
            })
            .copied()
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Every token that ends an answer, each once.
    pub fn end_ids(&self) -> &[u32] {
        &self.end_ids
    }

    /// The beginning-of-text token, where the file names one.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }
}

fn expect(key: &'static str, got: &str, expected: &'static str) -> Result<(), TokenizerError> {
    if got == expected {
        return Ok(());
    }
    Err(TokenizerError::Unsupported { key, got: got.to_owned(), expected })
}

fn pipeline_error(error: tokenizers::Error) -> TokenizerError {
    TokenizerError::Pipeline(error.to_string())
}

fn pipeline(bpe: &Arc<ByteBpe>) -> Result<Pipeline, TokenizerError> {
    let mut pipeline = Pipeline::new(SharedBpe(Arc::clone(bpe)));
    pipeline.with_normalizer(Some(NFC)).map_err(pipeline_error)?;
    let split = Split::new(SplitPattern::Regex(QWEN2_SPLIT.to_owned()), SplitDelimiterBehavior::Isolated, false);
    // The byte-level step that usually follows is part of the model, which works on the word's bytes.
    pipeline.with_pre_tokenizer(Some(split.map_err(pipeline_error)?));
    Ok(pipeline)
}

fn read_kinds(metadata: &Metadata, tokens: &StringArray) -> Result<Box<[TokenKind]>, TokenizerError> {
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
    let templates = chat::templates(metadata)?;
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

fn read_id(metadata: &Metadata, key: &'static str, vocab: usize) -> Result<Option<u32>, TokenizerError> {
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

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
mod tests;
