//! Tokens that are matched whole before a text is split into words.
//!
//! Owns the search for them: at each place the leftmost token, of several the longest, as the `tokenizers` crate finds
//! them. It is one sorted list: a file may hold hundreds of thousands of such tokens, and building an automaton of so
//! many takes minutes.

use std::ops::Range;

use crate::bpe::ByteBpe;
use crate::vocabulary::TokenKind;

/// Where such a token stands in a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Match {
    pub(crate) id: u32,
    pub(crate) range: Range<usize>,
}

/// A set of tokens to look for.
#[derive(Debug)]
pub(crate) struct AddedTokens {
    /// Ids in the order of their texts; of several with one text, the first.
    sorted: Box<[u32]>,
    /// Whether some token begins with this byte.
    first: [bool; 256],
}

impl AddedTokens {
    /// The tokens of `bpe` whose kind is `wanted`, the empty ones left out.
    pub(crate) fn new(bpe: &ByteBpe, kinds: &[TokenKind], wanted: impl Fn(TokenKind) -> bool) -> Self {
        let ids = (0u32..).zip(kinds).filter(|&(_, &kind)| wanted(kind)).map(|(id, _)| id);
        let text = |id: &u32| bpe.token_bytes(*id).unwrap_or_default();
        let mut sorted: Vec<u32> = ids.filter(|id| !text(id).is_empty()).collect();
        sorted.sort_by(|a, b| text(a).cmp(text(b)));
        sorted.dedup_by(|b, a| text(a) == text(b));
        let mut first = [false; 256];
        for id in &sorted {
            first[usize::from(text(id)[0])] = true;
        }
        Self { sorted: sorted.into_boxed_slice(), first }
    }

    /// The first match in `text` from byte `from` on.
    pub(crate) fn find(&self, bpe: &ByteBpe, text: &str, from: usize) -> Option<Match> {
        let bytes = text.as_bytes();
        (from..bytes.len())
            .filter(|&at| self.first[usize::from(bytes[at])] && text.is_char_boundary(at))
            .find_map(|at| self.longest(bpe, &bytes[at..]).map(|(id, len)| Match { id, range: at..at + len }))
    }

    /// The longest token that `bytes` begin with.
    fn longest(&self, bpe: &ByteBpe, bytes: &[u8]) -> Option<(u32, usize)> {
        let text = |id: &u32| bpe.token_bytes(*id).unwrap_or_default();
        let mut candidates = &self.sorted[..];
        let mut best = None;
        // All candidates begin with the bytes looked at so far.
        for (k, byte) in bytes.iter().enumerate() {
            let from = candidates.partition_point(|id| text(id).get(k) < Some(byte));
            let to = from + candidates[from..].partition_point(|id| text(id).get(k) == Some(byte));
            candidates = &candidates[from..to];
            match candidates.first() {
                None => break,
                // A text comes before those that it is the beginning of.
                Some(id) if text(id).len() == k + 1 => best = Some((*id, k + 1)),
                Some(_) => {}
            }
        }
        best
    }
}
