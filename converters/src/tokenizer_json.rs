//! `tokenizer.json`: the vocabulary, its merges and the added tokens, read without building the rest.
//!
//! Owns the proof that a GGUF file can say what this tokenizer does. One that GGUF's `qwen2` tokenizer would apply
//! differently is refused with the setting named, because its model would answer nonsense without an error; so is a
//! vocabulary that no reader of the file could use.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use st_gguf::StringArray;

use crate::error::ConvertError;
use crate::json::{Members, MembersOf, bounded, read_members};
use crate::vocabulary::{self, CONTROL, NORMAL, UNUSED, USER_DEFINED};

/// The expression by which Qwen2 splits text into words, and what `tokenizer.ggml.pre = "qwen2"` means.
pub(crate) const QWEN2_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How deep sequences of steps may nest.
const MAX_DEPTH: usize = 4;

/// Tokens, their kinds and the merges, as GGUF stores them.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Vocabulary {
    pub(crate) tokens: StringArray,
    pub(crate) types: Vec<i32>,
    pub(crate) merges: StringArray,
}

/// A token that is matched in the text before it is split into words.
#[derive(Debug, Deserialize)]
pub(crate) struct AddedToken {
    id: Option<u64>,
    pub(crate) content: String,
    special: Option<bool>,
    lstrip: Option<bool>,
    rstrip: Option<bool>,
    single_word: Option<bool>,
}

/// What a GGUF file needs of `tokenizer.json`.
pub(crate) struct TokenizerJson {
    pub(crate) vocabulary: Vocabulary,
    pub(crate) added: BTreeMap<u32, AddedToken>,
}

/// Reads the file; `None` where there is none. `decoder` are the added tokens that `tokenizer_config.json` lists by id;
/// a token is special where either says so.
pub(crate) fn read(
    path: &Path,
    decoder: BTreeMap<String, AddedToken>,
    vocab_size: usize,
    warnings: &mut Vec<String>,
) -> Result<Option<TokenizerJson>, ConvertError> {
    let mut file = File::default();
    if !read_members(path, &mut file)? {
        return Ok(None);
    }
    let reader = Reader { path, vocab_size };
    let decoder = decoder.into_iter().map(|(id, token)| AddedToken { id: id.parse().ok(), ..token });
    let added = reader.added_tokens(std::mem::take(&mut file.added).into_iter().chain(decoder))?;
    reader.check_steps(&file.steps, warnings)?;
    reader.check_model(&file.model.settings)?;
    let vocabulary = reader.vocabulary(file.model, &added)?;
    Ok(Some(TokenizerJson { vocabulary, added }))
}

/// What is read of the file.
#[derive(Default)]
struct File {
    added: Vec<AddedToken>,
    /// `normalizer`, `pre_tokenizer`, `post_processor`, `decoder`.
    steps: Map<String, Value>,
    model: Model,
}

impl<'de> Members<'de> for File {
    fn member<A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        match key {
            "added_tokens" => self.added = map.next_value::<Option<_>>()?.unwrap_or_default(),
            "model" => {
                self.model = Model::default();
                map.next_value_seed(MembersOf(&mut self.model))?;
            }
            "normalizer" | "pre_tokenizer" | "post_processor" | "decoder" => {
                self.steps.insert(key.to_owned(), bounded(key, map)?);
            }
            _ => {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

/// What is read of its `model`.
#[derive(Default)]
struct Model {
    tokens: Option<Tokens>,
    merges: Option<Merges>,
    settings: Map<String, Value>,
}

impl<'de> Members<'de> for Model {
    fn member<A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        match key {
            "vocab" => self.tokens = map.next_value()?,
            "merges" => self.merges = map.next_value()?,
            "type" | "dropout" | "ignore_merges" | "continuing_subword_prefix" | "end_of_word_suffix" => {
                self.settings.insert(key.to_owned(), bounded(key, map)?);
            }
            _ => {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

/// The vocabulary in the order of the file.
#[derive(Default)]
struct Tokens {
    texts: StringArray,
    ids: Vec<u64>,
}

impl<'de> Deserialize<'de> for Tokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(TokensVisitor)
    }
}

struct TokensVisitor;

impl<'de> Visitor<'de> for TokensVisitor {
    type Value = Tokens;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a vocabulary, an object of tokens and ids")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tokens, A::Error> {
        let mut tokens = Tokens::default();
        while let Some(text) = map.next_key::<Cow<'_, str>>()? {
            let id = bounded("vocab", &mut map)?;
            let id =
                id.as_u64().ok_or_else(|| A::Error::custom(format!("token {text:?} has id {id}, which is none")))?;
            push(&mut tokens.texts, &text)?;
            tokens.ids.push(id);
        }
        Ok(tokens)
    }
}

/// Merges as `left right`, from either form: one string, or a pair whose spaces then take their byte-level letter.
#[derive(Default)]
struct Merges(StringArray);

impl<'de> Deserialize<'de> for Merges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(MergesVisitor)
    }
}

struct MergesVisitor;

impl<'de> Visitor<'de> for MergesVisitor {
    type Value = Merges;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of merges")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Merges, A::Error> {
        let mut merges = Merges::default();
        while seq.next_element_seed(MergeSeed(&mut merges.0))?.is_some() {}
        Ok(merges)
    }
}

/// Takes one merge.
struct MergeSeed<'m>(&'m mut StringArray);

impl<'de> DeserializeSeed<'de> for MergeSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for MergeSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a merge of two tokens")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        // The list of another format, whose first line states its version; every reader skips it.
        if text.starts_with("#version") {
            return Ok(());
        }
        match text.split_once(' ') {
            Some((left, right)) if !left.is_empty() && !right.is_empty() && !right.contains(' ') => push(self.0, text),
            _ => Err(E::custom(format!("{text:?} is no merge of two tokens"))),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let mut next = || seq.next_element::<Cow<'_, str>>();
        match (next()?, next()?, next()?) {
            (Some(left), Some(right), None) => {
                push(self.0, &format!("{} {}", left.replace(' ', "Ġ"), right.replace(' ', "Ġ")))
            }
            (left, ..) => Err(A::Error::custom(format!("the list with {left:?} is no merge of two tokens"))),
        }
    }
}

fn push<E: Error>(strings: &mut StringArray, text: &str) -> Result<(), E> {
    if strings.push(text) { Ok(()) } else { Err(E::custom("more than 4 GiB of text")) }
}

/// The file's path and the model's vocabulary, which its errors need.
struct Reader<'a> {
    path: &'a Path,
    vocab_size: usize,
}

impl Reader<'_> {
    fn bad(&self, message: impl Into<String>) -> ConvertError {
        ConvertError::Tokenizer { path: self.path.into(), message: message.into() }
    }

    /// The added tokens by id. What GGUF cannot say of them is refused.
    fn added_tokens(
        &self,
        tokens: impl Iterator<Item = AddedToken>,
    ) -> Result<BTreeMap<u32, AddedToken>, ConvertError> {
        let mut added: BTreeMap<u32, AddedToken> = BTreeMap::new();
        for token in tokens {
            let id = token.id.ok_or_else(|| self.bad(format!("the added token {:?} has no id", token.content)))?;
            let id = self.known_id(&token.content, id)? as u32;
            let flags = [("lstrip", token.lstrip), ("rstrip", token.rstrip), ("single_word", token.single_word)];
            if let Some((flag, _)) = flags.into_iter().find(|(_, set)| *set == Some(true)) {
                let expected = "which a GGUF file cannot say: it would be found in other places of a text";
                return Err(self.bad(format!("the added token {:?} has {flag}, {expected}", token.content)));
            }
            match added.get_mut(&id) {
                Some(known) if known.content == token.content => {
                    known.special = Some(known.special == Some(true) || token.special == Some(true));
                }
                Some(known) => {
                    return Err(self.bad(format!("token {id} is both {:?} and {:?}", known.content, token.content)));
                }
                None => {
                    added.insert(id, token);
                }
            }
        }
        Ok(added)
    }

    /// Only Qwen2's way from a text to words has the GGUF name that is written.
    fn check_steps(&self, steps: &Map<String, Value>, warnings: &mut Vec<String>) -> Result<(), ConvertError> {
        let steps = |key: &str, list: &str| self.flatten(steps.get(key).unwrap_or(&Value::Null), key, list);
        let normalizers = steps("normalizer", "normalizers")?;
        if let Some(other) = normalizers.iter().find(|step| step["type"] != "NFC") {
            return Err(self.unlike("normalizer", "NFC", other));
        }
        if normalizers.is_empty() {
            warnings
                .push("tokenizer.json has no normalizer: texts are brought to NFC all the same, as Qwen2's are".into());
        }
        let mut words = steps("pre_tokenizer", "pretokenizers")?.into_iter();
        match words.next() {
            Some(split) if is(split, "Split", &[("behavior", "Isolated".into()), ("invert", false.into())]) => {
                let got = &split["pattern"]["Regex"];
                if got != QWEN2_SPLIT {
                    return Err(self.bad(format!("expected Qwen2's splitting rule, got {}", shown(got))));
                }
            }
            first => {
                return Err(self.unlike(
                    "pre_tokenizer",
                    "Qwen2's splitting rule first",
                    first.unwrap_or(&Value::Null),
                ));
            }
        }
        let bytes = [("add_prefix_space", false.into()), ("use_regex", false.into())];
        let nothing = Value::Null;
        let step = words.next().unwrap_or(&nothing);
        if !is(step, "ByteLevel", &bytes) {
            return Err(self.unlike("pre_tokenizer", "ByteLevel without rules of its own after that rule", step));
        }
        if let Some(step) = words.next() {
            return Err(self.unlike("pre_tokenizer", "no step after ByteLevel", step));
        }
        for step in steps("post_processor", "processors")? {
            let adds = step["type"] == "TemplateProcessing" && !adds_tokens(&step["single"]);
            if step["type"] != "ByteLevel" && !adds {
                return Err(self.unlike("post_processor", "one that adds no tokens", step));
            }
        }
        match steps("decoder", "decoders")?.into_iter().find(|step| step["type"] != "ByteLevel") {
            Some(other) => Err(self.unlike("decoder", "ByteLevel", other)),
            None => Ok(()),
        }
    }

    /// A step as the list of steps that it stands for.
    fn flatten<'v>(&self, step: &'v Value, key: &str, list: &str) -> Result<Vec<&'v Value>, ConvertError> {
        let mut steps = vec![step];
        for _ in 0..MAX_DEPTH {
            steps = steps
                .into_iter()
                .flat_map(|step| match step.get(list) {
                    Some(Value::Array(inner)) if step["type"] == "Sequence" => inner.iter().collect(),
                    _ => vec![step],
                })
                .filter(|step| !step.is_null())
                .collect();
        }
        if steps.iter().any(|step| step["type"] == "Sequence") {
            return Err(
                self.bad(format!("{key}: a sequence without steps, or more than {MAX_DEPTH} inside each other"))
            );
        }
        Ok(steps)
    }

    fn unlike(&self, key: &str, expected: &str, got: &Value) -> ConvertError {
        let got = if got.is_null() { "nothing".into() } else { shown(got) };
        self.bad(format!("{key}: expected {expected}, got {got}"))
    }

    /// Settings of the model that change which tokens a word becomes.
    fn check_model(&self, settings: &Map<String, Value>) -> Result<(), ConvertError> {
        for (key, value) in settings {
            let plain = match key.as_str() {
                "type" => value.is_null() || value == "BPE",
                "dropout" => value.is_null() || value.as_f64() == Some(0.0),
                "ignore_merges" => value.is_null() || value == false,
                _ => value.is_null() || value == "",
            };
            if !plain {
                let expected = if key == "type" { "BPE" } else { "a model without it" };
                return Err(self.unlike(&format!("model.{key}"), expected, value));
            }
        }
        Ok(())
    }

    fn vocabulary(&self, model: Model, added: &BTreeMap<u32, AddedToken>) -> Result<Vocabulary, ConvertError> {
        let listed = model.tokens.ok_or_else(|| self.bad("the model has no vocabulary"))?;
        let Merges(merges) = model.merges.ok_or_else(|| self.bad("the model has no merges"))?;
        let mut tokens: Vec<Option<(&str, i32)>> = vec![None; self.vocab_size];
        let listed = listed.texts.iter().zip(&listed.ids).map(|(text, &id)| (text, id, NORMAL));
        let added = added.iter().map(|(&id, token)| {
            let special = token.special == Some(true) || looks_special(&token.content);
            (token.content.as_str(), u64::from(id), if special { CONTROL } else { USER_DEFINED })
        });
        for (text, id, ty) in listed.chain(added) {
            match tokens[self.known_id(text, id)?].replace((text, ty)) {
                Some((other, _)) if other != text || ty == NORMAL => {
                    return Err(self.bad(format!("tokens {other:?} and {text:?} share id {id}")));
                }
                _ => {}
            }
        }
        let plain = tokens.iter().flatten().filter(|(_, ty)| *ty == NORMAL).map(|&(text, _)| text);
        vocabulary::check_merges(plain, &merges).map_err(|problem| self.bad(problem))?;
        let mut vocabulary = Vocabulary { merges, ..Vocabulary::default() };
        for (id, token) in tokens.into_iter().enumerate() {
            let (text, ty) = match token {
                Some((text, USER_DEFINED)) => (Cow::from(text.replace('▁', " ")), USER_DEFINED),
                Some((text, ty)) => (text.into(), ty),
                None => (format!("[PAD{id}]").into(), UNUSED),
            };
            if !vocabulary.tokens.push(&text) {
                return Err(self.bad("the tokens are longer than 4 GiB"));
            }
            vocabulary.types.push(ty);
        }
        Ok(vocabulary)
    }

    /// The id as a position in the vocabulary.
    fn known_id(&self, token: &str, id: u64) -> Result<usize, ConvertError> {
        let size = self.vocab_size;
        usize::try_from(id).ok().filter(|&id| id < size).ok_or_else(|| {
            self.bad(format!("token {token:?} has id {id}, expected one below the model's vocabulary size {size}"))
        })
    }
}

/// Whether a step is of type `ty` and has all of `settings`.
fn is(step: &Value, ty: &str, settings: &[(&str, Value)]) -> bool {
    step["type"] == ty && settings.iter().all(|(key, value)| step[*key] == *value)
}

/// Whether a template of a post-processor holds more than the text's own tokens.
fn adds_tokens(template: &Value) -> bool {
    template.as_array().is_none_or(|parts| parts.iter().any(|part| part.get("Sequence").is_none()))
}

/// A value, cut where it is long.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(320) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Tokens of this form are control tokens even where their file forgets to say so; llama.cpp's converter holds the same.
fn looks_special(text: &str) -> bool {
    let wrapped = |start: &str, end: &str| text.starts_with(start) && text.ends_with(end);
    wrapped("<|", "|>") || wrapped("<｜", "｜>") || wrapped("<unused", ">") || matches!(text, "<pad>" | "<mask>")
}
