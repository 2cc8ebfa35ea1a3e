//! A complete byte-level BPE vocabulary of any size, Qwen2's in form: 256 bytes, made-up merges of letters, three special
//! tokens and unused padding. Any text encodes and decodes; the pieces mean nothing.

use std::collections::{HashSet, VecDeque};

use serde_json::{Map, Value, json};

use super::rng::Rng;

/// Special tokens, in id order.
pub const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
/// Padding that large vocabularies end with, as in Qwen2's 151 936.
const PADDING: usize = 290;
/// Longest made-up piece in letters.
const LONGEST: usize = 12;
/// ChatML.
pub const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + \
     message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}\
     {{ '<|im_start|>assistant\n' }}{% endif %}";
/// Qwen2's splitting rule.
const SPLIT: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

/// Sizes of a vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vocab {
    /// Bytes and merged pieces.
    pub n_regular: usize,
    /// All tokens, special and padding ones included.
    pub total: usize,
}

impl Vocab {
    /// How `total` tokens divide; `total` is at least 300.
    pub fn sizes(total: usize) -> Self {
        let padding = if total > 10_000 { PADDING } else { 0 };
        Self { n_regular: total - padding - SPECIAL.len(), total }
    }

    /// Id of `<|endoftext|>`.
    pub fn end_of_text(&self) -> usize {
        self.n_regular
    }

    /// Id of `<|im_end|>`.
    pub fn turn_end(&self) -> usize {
        self.n_regular + 2
    }
}

/// The pieces of a vocabulary.
#[derive(Clone, Debug)]
pub struct Pieces {
    vocab: Vocab,
    /// Regular tokens in byte-level spelling, by id.
    pub tokens: Vec<String>,
    /// Merges in rank order; merge `r` makes token `256 + r`.
    pub merges: Vec<(usize, usize)>,
}

impl Pieces {
    /// Makes up the pieces.
    pub fn build(vocab: Vocab, seed: u64) -> Self {
        let mut tokens: Vec<String> = byte_alphabet().into_iter().map(String::from).collect();
        let mut seen: HashSet<String> = tokens.iter().cloned().collect();
        let id = |c: char| tokens.iter().position(|t| t.chars().eq([c]));
        let mut words: Vec<usize> = ('a'..='z').filter_map(id).collect();
        let mut starts: Vec<usize> = id('Ġ').into_iter().collect();
        let mut merges = Vec::new();
        let mut rng = Rng::for_row(seed, "merges", 0);
        // First every pair of letters and every letter that starts a word, so that text shrinks; then what chance brings.
        let letters = words.clone();
        let lefts = starts.iter().map(|&left| (true, left)).chain(letters.iter().map(|&left| (false, left)));
        let mut pairs: VecDeque<_> =
            lefts.flat_map(|(starting, left)| letters.iter().map(move |&right| (starting, left, right))).collect();
        while tokens.len() < vocab.n_regular {
            let (starting, left, right) = pairs.pop_front().unwrap_or_else(|| {
                let starting = rng.below(3) == 0;
                let lefts = if starting { &starts } else { &words };
                (starting, lefts[rng.below(lefts.len())], words[rng.below(words.len().min(2000))])
            });
            let merged = format!("{}{}", tokens[left], tokens[right]);
            if merged.chars().count() > LONGEST || !seen.insert(merged.clone()) {
                continue;
            }
            if starting {
                starts.push(tokens.len())
            } else {
                words.push(tokens.len())
            }
            tokens.push(merged);
            merges.push((left, right));
        }
        Self { vocab, tokens, merges }
    }

    /// Merges as `left right`.
    pub fn merge_lines(&self) -> impl Iterator<Item = String> {
        self.merges.iter().map(|&(l, r)| format!("{} {}", self.tokens[l], self.tokens[r]))
    }

    /// Every token and its GGUF type (1 normal, 3 control, 5 unused), padding as converters name it.
    pub fn typed(&self) -> impl Iterator<Item = (String, i32)> {
        let regular = self.tokens.iter().map(|t| (t.clone(), 1));
        let special = SPECIAL.iter().map(|t| ((*t).to_owned(), 3));
        let padding = (self.vocab.n_regular + SPECIAL.len()..self.vocab.total).map(|id| (format!("[PAD{id}]"), 5));
        regular.chain(special).chain(padding)
    }

    /// `tokenizer.json`.
    pub fn tokenizer_json(&self) -> Value {
        let vocab: Map<String, Value> = self.tokens.iter().enumerate().map(|(id, t)| (t.clone(), json!(id))).collect();
        let merges: Vec<[&str; 2]> =
            self.merges.iter().map(|&(l, r)| [self.tokens[l].as_str(), self.tokens[r].as_str()]).collect();
        let added: Vec<Value> = self.special().map(|(id, content)| json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true,
        })).collect();
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": false},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
            ]},
            "post_processor": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
                "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": merges,
            },
        })
    }

    /// `tokenizer_config.json`.
    pub fn tokenizer_config_json(&self, context: usize) -> Value {
        let decoder: Map<String, Value> = self
            .special()
            .map(|(id, content)| {
                let entry = json!({
                    "content": content, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false,
                    "special": true,
                });
                (id.to_string(), entry)
            })
            .collect();
        json!({
            "add_bos_token": false,
            "add_prefix_space": false,
            "added_tokens_decoder": decoder,
            "additional_special_tokens": [SPECIAL[1], SPECIAL[2]],
            "bos_token": null,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": false,
            "eos_token": SPECIAL[2],
            "errors": "replace",
            "model_max_length": context,
            "pad_token": SPECIAL[0],
            "split_special_tokens": false,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": null,
        })
    }

    fn special(&self) -> impl Iterator<Item = (usize, &'static str)> {
        SPECIAL.iter().enumerate().map(|(i, content)| (self.vocab.n_regular + i, *content))
    }
}

/// The 256 characters that byte-level BPE spells bytes with, in id order: printable bytes as themselves, then the rest.
fn byte_alphabet() -> Vec<char> {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let plain = (0..256).filter(|&b| printable(b));
    let shifted = (0..(0..256).filter(|&b| !printable(b)).count() as u32).map(|i| 256 + i);
    plain.chain(shifted).filter_map(char::from_u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_size_has_its_published_special_ids() {
        let vocab = Vocab::sizes(151_936);
        assert_eq!((vocab.end_of_text(), vocab.turn_end()), (151_643, 151_645));
    }

    #[test]
    fn pieces_are_unique_and_made_by_their_merges() {
        let pieces = Pieces::build(Vocab::sizes(2048), 3);
        assert_eq!(pieces.tokens.len(), 2045);
        assert_eq!(pieces.tokens.iter().collect::<HashSet<_>>().len(), 2045);
        for (rank, &(l, r)) in pieces.merges.iter().enumerate() {
            assert!(l < 256 + rank && r < 256 + rank);
            assert_eq!(pieces.tokens[256 + rank], format!("{}{}", pieces.tokens[l], pieces.tokens[r]));
        }
        assert_eq!(pieces.typed().count(), 2048);
        assert_eq!(Pieces::build(Vocab::sizes(2048), 3).tokens, pieces.tokens);
    }

    #[test]
    fn the_alphabet_is_gpt2s() {
        let alphabet = byte_alphabet();
        assert_eq!(alphabet.len(), 256);
        assert_eq!(alphabet[0], '!');
        assert!(alphabet.contains(&'Ġ') && alphabet.contains(&'Ċ'));
    }
}
