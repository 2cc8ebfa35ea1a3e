//! A model's tokens as llguidance takes them.

use std::sync::Arc;

use llguidance::toktrie::{TokRxInfo, TokTrie, TokenId, TokenizerEnv};
use st_model::Engine;
use st_model::tokenizer::{TokenKind, Tokenizer};

/// The tokens of an engine, which has a tokenizer.
pub(crate) struct Vocabulary {
    engine: Arc<Engine>,
    trie: TokTrie,
}

impl Vocabulary {
    /// `None` where the engine has no tokenizer, or names no token that ends an answer.
    pub(crate) fn new(engine: &Arc<Engine>) -> Option<Self> {
        let tokenizer = engine.tokenizer()?;
        let n = u32::try_from(tokenizer.vocab_size()).ok()?;
        let end_ids: Vec<u32> = engine.end_ids().iter().copied().filter(|&id| id < n).collect();
        let words: Vec<Vec<u8>> = (0..n).map(|id| word(tokenizer, id)).collect();
        let info = TokRxInfo::new(n, *end_ids.first()?);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(&end_ids);
        Some(Self { engine: Arc::clone(engine), trie })
    }
}

/// What a token stands for in a text. Control tokens are no text, and what stands for nothing is never chosen.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    match tokenizer.kind(id) {
        Some(TokenKind::Control) => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
        // No text has this byte, so the mark means what it says.
        Some(TokenKind::Normal | TokenKind::UserDefined | TokenKind::Byte)
            if bytes.first() != Some(&TokTrie::SPECIAL_TOKEN_MARKER) =>
        {
            bytes.to_vec()
        }
        _ => Vec::new(),
    }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        let encode = |text: &str| {
            let ids = self.engine.tokenizer().and_then(|tokenizer| tokenizer.encode(text, false).ok());
            // The tokenizer composes characters; a grammar means the bytes that it says.
            match ids.filter(|ids| self.trie.decode_raw(ids) == text.as_bytes()) {
                Some(ids) => ids,
                None => self.trie.greedy_tokenize(text.as_bytes()),
            }
        };
        self.trie.tokenize_with_greedy_fallback(bytes, encode)
    }
}
