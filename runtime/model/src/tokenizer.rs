//! Text to token ids and back, from GGUF metadata alone.
//!
//! Owns the pipeline that the `tokenizer.ggml.*` keys describe: added tokens, NFC, the Qwen2 split, byte-level BPE.
//! Refuses any tokenizer it does not implement exactly (another model, another `pre`), because nearly right token ids
//! give fluent nonsense. Tokens' kinds are `vocabulary.rs`'s, streaming is `text.rs`'s.

use std::sync::Arc;

use st_gguf::Metadata;
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, TokenizerImpl};

use crate::added::AddedTokens;
use crate::bpe::{ByteBpe, SharedBpe};
use crate::cut;
use crate::marks::Rendered;
use crate::progress::{LoadProgress, NoProgress};
use crate::vocabulary::{KEY_BOS, KEY_TOKENS, end_ids_among, read_id, read_kinds};
pub use crate::vocabulary::{TokenKind, TokenizerError};

const KEY_MODEL: &str = "tokenizer.ggml.model";
const KEY_PRE: &str = "tokenizer.ggml.pre";
const KEY_MERGES: &str = "tokenizer.ggml.merges";
const KEY_ADD_BOS: &str = "tokenizer.ggml.add_bos_token";

/// Bytes of text that go through the pipeline at once.
const PIECE: usize = 8 << 10;

/// How Qwen2 cuts text into the words that merges may not cross.
const QWEN2_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

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

        let end_ids = end_ids_among(metadata, tokens, &kinds)?;
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

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
mod tests;
