//! Text to token ids and back, from GGUF metadata alone.
//!
//! Owns the reading of the `tokenizer.ggml.*` keys and the pipeline they describe: added tokens, NFC, the Qwen2 split,
//! byte-level BPE. Refuses any tokenizer it does not implement exactly (another model, another `pre`), because nearly
//! right token ids give fluent nonsense. Chat templates are `chat.rs`'s, streaming is `text.rs`'s.

use std::collections::HashSet;
use std::sync::Arc;

use st_gguf::{GgufError, Metadata};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, TokenizerImpl};

use crate::bpe::{ByteBpe, SharedBpe};
use crate::cut;

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
    /// The splitting rule or the added tokens could not be compiled or applied.
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
    /// Recognises control tokens in the text.
    with_special: Pipeline,
    /// Encodes the text of control tokens like any other text.
    without_special: Pipeline,
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
        let kinds = read_kinds(metadata, tokens.len())?;

        let bpe = Arc::new(ByteBpe::new(tokens, &kinds, merges)?);
        let with_special = pipeline(&bpe, &kinds)?;
        let mut without_special = with_special.clone();
        without_special.set_encode_special_tokens(true);

        let mut end_ids = named_end_ids(metadata, tokens.len())?;
        if metadata.get(KEY_END_ALL).is_none() {
            let known = bpe.added().iter().filter(|(text, id)| {
                END_TEXTS.contains(&text.as_str()) && kinds.get(*id as usize) == Some(&TokenKind::Control)
            });
            end_ids.extend(known.map(|(_, id)| id));
        }
        keep_first(&mut end_ids);
        let bos_id = read_id(metadata, KEY_BOS, tokens.len())?;
        Ok(Some(Self {
            end_ids,
            bos_id,
            add_bos: bos_id.is_some() && metadata.bool(KEY_ADD_BOS)?.unwrap_or(false),
            bpe,
            kinds,
            with_special,
            without_special,
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
        let pipeline = match allow_special {
            true => &self.with_special,
            false => &self.without_special,
        };
        self.encode_in_pieces(pipeline, text, PIECE)
    }

    fn encode_in_pieces(&self, pipeline: &Pipeline, text: &str, target: usize) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::with_capacity(text.len() / 4);
        for piece in cut::pieces(text, target, self.bpe.added()) {
            let encoding = pipeline.encode_fast(piece, false).map_err(pipeline_error)?;
            ids.extend_from_slice(encoding.get_ids());
        }
        Ok(ids)
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

fn pipeline(bpe: &Arc<ByteBpe>, kinds: &[TokenKind]) -> Result<Pipeline, TokenizerError> {
    let mut pipeline = Pipeline::new(SharedBpe(Arc::clone(bpe)));
    pipeline.with_normalizer(Some(NFC)).map_err(pipeline_error)?;
    let split = Split::new(SplitPattern::Regex(QWEN2_SPLIT.to_owned()), SplitDelimiterBehavior::Isolated, false);
    // The byte-level step that usually follows is part of the model, which works on the word's bytes.
    pipeline.with_pre_tokenizer(Some(split.map_err(pipeline_error)?));
    let added = (0u32..).zip(kinds).filter(|(_, kind)| kind.is_added());
    let added = added.filter_map(|(id, kind)| {
        let text = std::str::from_utf8(bpe.token_bytes(id)?).ok()?;
        let special = *kind == TokenKind::Control;
        Some(AddedToken::from(text, special).normalized(false))
    });
    pipeline.add_tokens(added).map_err(pipeline_error)?;
    Ok(pipeline)
}

fn read_kinds(metadata: &Metadata, n_tokens: usize) -> Result<Box<[TokenKind]>, TokenizerError> {
    let Some(types) = metadata.i32s(KEY_TOKEN_TYPE)? else {
        return Ok(vec![TokenKind::Normal; n_tokens].into_boxed_slice());
    };
    if types.len() != n_tokens {
        return Err(TokenizerError::LengthMismatch { key: KEY_TOKEN_TYPE, got: types.len(), expected: n_tokens });
    }
    let kinds = types
        .into_iter()
        .enumerate()
        .map(|(id, got)| TokenKind::from_gguf(got).ok_or(TokenizerError::UnknownTokenType { id, got }));
    kinds.collect()
}

fn read_id(metadata: &Metadata, key: &'static str, vocab: usize) -> Result<Option<u32>, TokenizerError> {
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
