//! Byte-level byte-pair encoding over a GGUF vocabulary.
//!
//! Owns the token texts and the merge table, in a few megabytes for 150 000 tokens: texts lie in one buffer of
//! decoded bytes, merges in one table from a pair of ids to rank and result. The string-keyed map that resolves the
//! merge list lives only while loading. Splitting text into words is the caller's business; a word given here is
//! merged exactly as the `tokenizers` crate's `BPE` would (the tests hold the two against each other).

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use st_gguf::StringArray;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::{Model, Token};

use crate::vocabulary::{TokenKind, TokenizerError};

/// Entries of a list that are read between two looks at whether to go on.
const STRETCH: usize = 1 << 12;

/// The vocabulary and its merges; answers for one word at a time.
pub(crate) struct ByteBpe {
    /// Decoded bytes of all tokens, one after the other in id order.
    bytes: Box<[u8]>,
    /// End of each token's bytes in `bytes`; starts where the previous one ends.
    ends: Box<[u32]>,
    /// The single-byte token of each byte value.
    byte_ids: [u32; 256],
    /// (left id, right id) -> (rank, id of the joined token). Lower ranks merge first.
    merges: HashMap<(u32, u32), (u32, u32)>,
}

impl ByteBpe {
    /// Builds the tables from the file's token list, token kinds and merge list (`"left right"` per entry).
    ///
    /// # Errors
    /// Where the lists contradict each other, or `go_on` breaks.
    pub(crate) fn new(
        tokens: &StringArray,
        kinds: &[TokenKind],
        merges: &StringArray,
        go_on: &dyn Fn() -> ControlFlow<()>,
    ) -> Result<Self, TokenizerError> {
        let look_up = |n: usize| match n.is_multiple_of(STRETCH) && go_on().is_break() {
            true => Err(TokenizerError::Cancelled),
            false => Ok(()),
        };
        let alphabet = ByteAlphabet::new();
        let mut bytes = Vec::with_capacity(tokens.iter().map(str::len).sum());
        let mut ends = Vec::with_capacity(tokens.len());
        let mut by_text: HashMap<&str, u32> = HashMap::with_capacity(tokens.len());
        for (id, (text, kind)) in (0u32..).zip(tokens.iter().zip(kinds)) {
            look_up(id as usize)?;
            if kind.is_plain() {
                alphabet.decode_into(text, &mut bytes);
                by_text.entry(text).or_insert(id);
            } else {
                bytes.extend_from_slice(text.as_bytes());
            }
            let end = u32::try_from(bytes.len()).map_err(|_| TokenizerError::VocabularyTooLarge)?;
            ends.push(end);
        }

        let mut byte_ids = [0; 256];
        let mut utf8 = [0; 4];
        for byte in 0..=255u8 {
            let text: &str = alphabet.char_of(byte).encode_utf8(&mut utf8);
            byte_ids[usize::from(byte)] = *by_text.get(text).ok_or(TokenizerError::MissingByte { byte })?;
        }

        let mut table = HashMap::with_capacity(merges.len());
        let mut joined = String::new();
        for (rank, entry) in merges.iter().enumerate() {
            look_up(rank)?;
            let malformed = || TokenizerError::MalformedMerge { rank, merge: entry.to_owned() };
            let (left, right) = entry.split_once(' ').ok_or_else(malformed)?;
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            let id_of = |text: &str| {
                by_text
                    .get(text)
                    .copied()
                    .ok_or_else(|| TokenizerError::UnknownMergeToken { rank, token: text.to_owned() })
            };
            let rank_u32 = u32::try_from(rank).map_err(|_| TokenizerError::VocabularyTooLarge)?;
            table.insert((id_of(left)?, id_of(right)?), (rank_u32, id_of(&joined)?));
        }

        Ok(Self { bytes: bytes.into_boxed_slice(), ends: ends.into_boxed_slice(), byte_ids, merges: table })
    }

    /// Number of tokens.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The bytes token `id` stands for; `None` where the id is out of range.
    pub(crate) fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        let end = *self.ends.get(id)? as usize;
        let start = match id {
            0 => 0,
            _ => self.ends[id - 1] as usize,
        };
        Some(&self.bytes[start..end])
    }

    /// Merges one word, calling `emit` with each resulting id in order.
    fn merge_word(&self, word: &[u8], mut emit: impl FnMut(u32)) {
        /// One symbol of the word, linked to its neighbours; `NONE` ends the list.
        struct Symbol {
            id: u32,
            prev: usize,
            next: usize,
        }
        const NONE: usize = usize::MAX;

        let mut symbols: Vec<Symbol> = word
            .iter()
            .enumerate()
            .map(|(i, &byte)| Symbol {
                id: self.byte_ids[usize::from(byte)],
                prev: i.wrapping_sub(1),
                next: if i + 1 < word.len() { i + 1 } else { NONE },
            })
            .collect();

        // Lowest rank first, then leftmost; an entry is stale when its symbols have changed since it was queued.
        let mut queue = BinaryHeap::new();
        let push = |queue: &mut BinaryHeap<_>, left: u32, right: u32, at: usize| {
            if let Some(&(rank, joined)) = self.merges.get(&(left, right)) {
                queue.push(Reverse((rank, at, left, right, joined)));
            }
        };
        for at in 1..symbols.len() {
            push(&mut queue, symbols[at - 1].id, symbols[at].id, at - 1);
        }
        let mut removed = vec![false; symbols.len()];
        while let Some(Reverse((_, at, left, right, joined))) = queue.pop() {
            let next = symbols[at].next;
            if removed[at] || symbols[at].id != left || next == NONE || symbols[next].id != right {
                continue;
            }
            symbols[at].id = joined;
            symbols[at].next = symbols[next].next;
            removed[next] = true;
            let after = symbols[at].next;
            if after != NONE {
                symbols[after].prev = at;
                push(&mut queue, joined, symbols[after].id, at);
            }
            let before = symbols[at].prev;
            if before != NONE {
                push(&mut queue, symbols[before].id, joined, before);
            }
        }
        for (symbol, removed) in symbols.iter().zip(&removed) {
            if !removed {
                emit(symbol.id);
            }
        }
    }
}

/// A shared [`ByteBpe`] in the shape the `tokenizers` pipeline expects of a model.
#[derive(Clone)]
pub(crate) struct SharedBpe(pub(crate) std::sync::Arc<ByteBpe>);

impl Model for SharedBpe {
    type Trainer = BpeTrainer;

    fn tokenize(&self, sequence: &str) -> tokenizers::Result<Vec<Token>> {
        let mut tokens = Vec::with_capacity(sequence.len() / 3 + 1);
        // Only ids are read from the result, so neither text nor offsets are filled in.
        self.0.merge_word(sequence.as_bytes(), |id| {
            tokens.push(Token::new(id, String::new(), (0, 0)));
        });
        Ok(tokens)
    }

    /// The pipeline has no added tokens, which alone are looked up by their text.
    fn token_to_id(&self, _token: &str) -> Option<u32> {
        None
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        let bytes = self.0.token_bytes(id)?;
        Some(String::from_utf8_lossy(bytes).into_owned())
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        (0u32..).take(self.0.len()).filter_map(|id| Some((self.id_to_token(id)?, id))).collect()
    }

    fn get_vocab_size(&self) -> usize {
        self.0.len()
    }

    fn save(&self, _folder: &Path, _prefix: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        Err("a vocabulary read from a GGUF file cannot be saved as tokenizer.json".into())
    }

    fn get_trainer(&self) -> BpeTrainer {
        BpeTrainer::default()
    }
}

/// GPT-2's printable stand-ins for the 256 byte values.
struct ByteAlphabet {
    /// byte -> stand-in
    chars: [char; 256],
    /// stand-in (all below U+0144) -> byte
    bytes: [Option<u8>; 0x144],
}

impl ByteAlphabet {
    fn new() -> Self {
        let mut chars = ['\0'; 256];
        let mut bytes = [None; 0x144];
        let mut moved = 0x100;
        for byte in 0..=255u8 {
            let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
            let stand_in = if printable {
                char::from(byte)
            } else {
                moved += 1;
                char::from_u32(moved - 1).unwrap_or_default()
            };
            chars[usize::from(byte)] = stand_in;
            bytes[stand_in as usize] = Some(byte);
        }
        Self { chars, bytes }
    }

    fn char_of(&self, byte: u8) -> char {
        self.chars[usize::from(byte)]
    }

    /// Appends the bytes `text` stands for; a text outside the alphabet stands for itself.
    fn decode_into(&self, text: &str, out: &mut Vec<u8>) {
        let start = out.len();
        for c in text.chars() {
            match self.bytes.get(c as usize).copied().flatten() {
                Some(byte) => out.push(byte),
                None => {
                    out.truncate(start);
                    out.extend_from_slice(text.as_bytes());
                    return;
                }
            }
        }
    }
}
