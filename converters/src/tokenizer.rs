//! `tokenizer.json` and its companions -> GGUF tokenizer keys, as llama.cpp's converter writes them for Qwen2.
//!
//! Reads files as data and runs no tokenizer. A tokenizer that GGUF's `qwen2` pre-tokenizer would split differently is
//! refused, because its model would answer nonsense without an error.

use std::path::Path;

use serde_json::Value;
use st_gguf::{Metadata, StringArray};

use crate::checkpoint::read_json;
use crate::error::ConvertError;

/// The expression by which Qwen2 splits text into words, and what `tokenizer.ggml.pre = "qwen2"` means.
const QWEN2_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What GGUF calls the kinds of tokens.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// Special tokens that have a key of their own: the name in Hugging Face files, and the GGUF key.
const SPECIAL_KEYS: [(&str, &str); 6] = [
    ("bos", "tokenizer.ggml.bos_token_id"),
    ("eos", "tokenizer.ggml.eos_token_id"),
    ("unk", "tokenizer.ggml.unknown_token_id"),
    ("sep", "tokenizer.ggml.seperator_token_id"),
    ("pad", "tokenizer.ggml.padding_token_id"),
    ("mask", "tokenizer.ggml.mask_token_id"),
];

/// Everything that GGUF stores about a tokenizer.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct TokenizerKeys {
    vocabulary: Option<Vocabulary>,
    /// GGUF key and id, in the order of [`SPECIAL_KEYS`].
    special: Vec<(&'static str, u32)>,
    /// Every end token, the one of `eos_token_id` first.
    ends: Vec<u32>,
    /// GGUF key and value of `add_bos_token` and the like.
    adds: Vec<(&'static str, bool)>,
    /// Name (empty for the default) and text.
    templates: Vec<(String, String)>,
}

#[derive(Debug, Default, PartialEq)]
struct Vocabulary {
    tokens: Vec<String>,
    types: Vec<i32>,
    merges: Vec<String>,
}

/// Reads the tokenizer of the checkpoint in `dir`. Without `tokenizer.json` only the ids of special tokens that
/// `config.json` states are known, and a warning says that the model runs on token ids.
pub(crate) fn read(
    dir: &Path,
    config: &Value,
    vocab_size: usize,
    warnings: &mut Vec<String>,
) -> Result<TokenizerKeys, ConvertError> {
    let path = dir.join("tokenizer.json");
    let tokenizer = read_json(&path)?;
    let settings = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or(Value::Null);
    let generation = read_json(&dir.join("generation_config.json"))?.unwrap_or(Value::Null);

    let mut keys = TokenizerKeys::default();
    let mut added = Vec::new();
    if let Some(tokenizer) = &tokenizer {
        let reader = Reader { path: &path, vocab_size };
        added = reader.added_tokens(tokenizer, &settings)?;
        reader.check_pre_tokenizer(tokenizer)?;
        keys.vocabulary = Some(reader.vocabulary(tokenizer, &added)?);
        keys.adds = adds(&settings);
        keys.templates = templates(dir, &settings)?;
    } else {
        warnings.push("the checkpoint has no tokenizer.json: the output takes and gives token ids only".into());
    }

    for (name, key) in SPECIAL_KEYS {
        let content = token_text(settings.get(format!("{name}_token")));
        let by_content =
            content.and_then(|text| added.iter().find(|token| token.content == text)).map(|token| token.id);
        let stated = |json: &Value| match json.get(format!("{name}_token_id"))? {
            Value::Array(list) => list.first().and_then(Value::as_u64),
            one => one.as_u64(),
        };
        let single = config.get(format!("{name}_token_id")).and_then(Value::as_u64);
        let id = by_content.or(single).or_else(|| stated(&generation)).or_else(|| stated(config));
        if let Some(id) = id.filter(|&id| id < vocab_size as u64) {
            keys.special.push((key, id as u32));
        }
    }
    keys.ends = end_tokens(&keys, &generation, config, vocab_size);
    Ok(keys)
}

/// All ids that end an answer: the main one, then those of the generation settings, then those of the configuration.
fn end_tokens(keys: &TokenizerKeys, generation: &Value, config: &Value, vocab_size: usize) -> Vec<u32> {
    let main = keys.special.iter().find(|(key, _)| *key == "tokenizer.ggml.eos_token_id").map(|&(_, id)| id);
    let mut ends: Vec<u32> = main.into_iter().collect();
    for json in [generation, config] {
        let stated =
            json.get("eos_token_id").map(|value| value.as_array().map_or(vec![value], |list| list.iter().collect()));
        for id in stated.into_iter().flatten().filter_map(Value::as_u64) {
            if id < vocab_size as u64 && !ends.contains(&(id as u32)) {
                ends.push(id as u32);
            }
        }
    }
    ends
}

/// The `add_…_token` settings; a Qwen2 tokenizer that is silent about it adds no first token.
fn adds(settings: &Value) -> Vec<(&'static str, bool)> {
    let flag = |name: &str| settings.get(name).and_then(Value::as_bool);
    let mut adds = vec![("tokenizer.ggml.add_bos_token", flag("add_bos_token").unwrap_or(false))];
    adds.extend(flag("add_eos_token").map(|value| ("tokenizer.ggml.add_eos_token", value)));
    adds
}

/// The chat templates: of the tokenizer's settings, else of `chat_template.jinja` or `chat_template.json`.
fn templates(dir: &Path, settings: &Value) -> Result<Vec<(String, String)>, ConvertError> {
    let one = |text: &str| vec![(String::new(), text.to_owned())];
    match settings.get("chat_template") {
        Some(Value::String(text)) => return Ok(one(text)),
        Some(Value::Array(list)) => {
            let pair = |entry: &Value| {
                let name = entry.get("name")?.as_str()?;
                let name = if name == "default" { "" } else { name };
                Some((name.to_owned(), entry.get("template")?.as_str()?.to_owned()))
            };
            return Ok(list.iter().filter_map(pair).collect());
        }
        _ => {}
    }
    let jinja = dir.join("chat_template.jinja");
    match std::fs::read_to_string(&jinja) {
        Ok(text) => return Ok(one(&text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(source) => return Err(ConvertError::Io { path: jinja, source }),
    }
    let json = read_json(&dir.join("chat_template.json"))?.unwrap_or(Value::Null);
    Ok(json.get("chat_template").and_then(Value::as_str).map(one).unwrap_or_default())
}

/// A special token is written as its text or as an object that holds its text.
fn token_text(value: Option<&Value>) -> Option<&str> {
    match value? {
        Value::String(text) => Some(text),
        object => object.get("content")?.as_str(),
    }
}

/// A token that is matched in the text before it is split into words.
struct AddedToken {
    id: u64,
    content: String,
    special: bool,
}

/// `tokenizer.json` and what its errors need.
struct Reader<'a> {
    path: &'a Path,
    vocab_size: usize,
}

impl Reader<'_> {
    fn bad(&self, message: impl Into<String>) -> ConvertError {
        ConvertError::Tokenizer { path: self.path.into(), message: message.into() }
    }

    /// The added tokens of both files; a token is special where either says so.
    fn added_tokens(&self, tokenizer: &Value, settings: &Value) -> Result<Vec<AddedToken>, ConvertError> {
        let mut added: Vec<AddedToken> = Vec::new();
        let listed = tokenizer.get("added_tokens").and_then(Value::as_array).into_iter().flatten();
        let listed = listed.map(|token| (token.get("id").and_then(Value::as_u64), token));
        let decoder = settings.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten();
        let decoder = decoder.map(|(id, token)| (id.parse().ok(), token));
        for (id, token) in listed.chain(decoder) {
            let content = token.get("content").and_then(Value::as_str);
            let (Some(id), Some(content)) = (id, content) else {
                return Err(self.bad("an added token has no id or no content"));
            };
            let special = token.get("special").and_then(Value::as_bool).unwrap_or(false);
            match added.iter_mut().find(|known| known.id == id) {
                Some(known) if known.content == content => known.special |= special,
                Some(known) => {
                    return Err(self.bad(format!("token {id} is both {:?} and {content:?}", known.content)));
                }
                None => added.push(AddedToken { id, content: content.to_owned(), special }),
            }
        }
        Ok(added)
    }

    /// Only Qwen2's way of splitting has the GGUF name that is written.
    fn check_pre_tokenizer(&self, tokenizer: &Value) -> Result<(), ConvertError> {
        let pre = tokenizer.get("pre_tokenizer").unwrap_or(&Value::Null);
        let steps = match pre.get("pretokenizers") {
            Some(Value::Array(steps)) => steps.iter().collect(),
            _ => vec![pre],
        };
        let split = steps.iter().find_map(|step| step.get("pattern")?.get("Regex")?.as_str());
        match split {
            Some(QWEN2_SPLIT) => Ok(()),
            Some(other) => Err(self.bad(format!("expected Qwen2's splitting rule, got {other:?}"))),
            None => Err(self.bad("expected Qwen2's splitting rule, got a pre-tokenizer without one")),
        }
    }

    fn vocabulary(&self, tokenizer: &Value, added: &[AddedToken]) -> Result<Vocabulary, ConvertError> {
        let model = tokenizer.get("model").unwrap_or(&Value::Null);
        if model.get("type").is_some_and(|ty| ty != "BPE") {
            return Err(self.bad(format!("expected a BPE model, got {}", model["type"])));
        }
        let vocab =
            model.get("vocab").and_then(Value::as_object).ok_or_else(|| self.bad("the model has no vocabulary"))?;
        let mut tokens: Vec<Option<(&str, i32)>> = vec![None; self.vocab_size];
        for (token, id) in vocab {
            let slot = id.as_u64().and_then(|id| tokens.get_mut(usize::try_from(id).ok()?));
            let slot = slot.ok_or_else(|| self.out_of_range(token, id))?;
            if let Some((other, _)) = slot.replace((token, NORMAL)) {
                return Err(self.bad(format!("tokens {other:?} and {token:?} share id {id}")));
            }
        }
        for AddedToken { id, content, special } in added {
            let slot = usize::try_from(*id).ok().and_then(|id| tokens.get_mut(id));
            let slot = slot.ok_or_else(|| self.out_of_range(content, id))?;
            let ty = if *special || looks_special(content) { CONTROL } else { USER_DEFINED };
            match slot.replace((content, ty)) {
                Some((other, _)) if other != content => {
                    return Err(self.bad(format!("tokens {other:?} and {content:?} share id {id}")));
                }
                _ => {}
            }
        }
        let merges = self.merges(model)?;
        let mut vocabulary = Vocabulary { merges, ..Vocabulary::default() };
        for (id, token) in tokens.into_iter().enumerate() {
            let (text, ty) = match token {
                Some((text, USER_DEFINED)) => (text.replace('▁', " "), USER_DEFINED),
                Some((text, ty)) => (text.to_owned(), ty),
                None => (format!("[PAD{id}]"), UNUSED),
            };
            vocabulary.tokens.push(text);
            vocabulary.types.push(ty);
        }
        Ok(vocabulary)
    }

    fn out_of_range(&self, token: &str, id: impl ToString) -> ConvertError {
        let (id, size) = (id.to_string(), self.vocab_size);
        self.bad(format!("token {token:?} has id {id}, expected one below the model's vocabulary size {size}"))
    }

    /// Merges as `left right`, from either form: one string, or a pair whose spaces then take their byte-level letter.
    fn merges(&self, model: &Value) -> Result<Vec<String>, ConvertError> {
        let list = model.get("merges").and_then(Value::as_array).ok_or_else(|| self.bad("the model has no merges"))?;
        let merge = |entry: &Value| match entry {
            Value::String(text) if text.contains(' ') => Some(text.clone()),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(left), Value::String(right)] => {
                    Some(format!("{} {}", left.replace(' ', "Ġ"), right.replace(' ', "Ġ")))
                }
                _ => None,
            },
            _ => None,
        };
        let merges = list.iter().map(|entry| merge(entry).ok_or_else(|| self.bad(format!("{entry} is no merge"))));
        merges.collect()
    }
}

/// Tokens of this form are control tokens even where their file forgets to say so; llama.cpp's converter holds the same.
fn looks_special(text: &str) -> bool {
    let wrapped = |start: &str, end: &str| text.starts_with(start) && text.ends_with(end);
    wrapped("<|", "|>") || wrapped("<｜", "｜>") || wrapped("<unused", ">") || matches!(text, "<pad>" | "<mask>")
}

impl TokenizerKeys {
    /// Adds the keys to `metadata`. Without a vocabulary the model is `none`, llama.cpp's word for running on ids.
    pub(crate) fn write(self, metadata: &mut Metadata) {
        match self.vocabulary {
            Some(vocabulary) => {
                metadata.insert("tokenizer.ggml.model", "gpt2");
                metadata.insert("tokenizer.ggml.pre", "qwen2");
                metadata.insert("tokenizer.ggml.tokens", vocabulary.tokens.iter().collect::<StringArray>());
                metadata.insert("tokenizer.ggml.token_type", vocabulary.types);
                metadata.insert("tokenizer.ggml.merges", vocabulary.merges.iter().collect::<StringArray>());
            }
            None => {
                metadata.insert("tokenizer.ggml.model", "none");
            }
        }
        for (key, id) in self.special {
            metadata.insert(key, id);
        }
        if self.ends.len() > 1 {
            metadata.insert("tokenizer.ggml.eos_token_ids", self.ends);
        }
        for (key, value) in self.adds {
            metadata.insert(key, value);
        }
        let named: Vec<_> = self.templates.iter().filter(|(name, _)| !name.is_empty()).map(|(name, _)| name).collect();
        if !named.is_empty() {
            metadata.insert("tokenizer.chat_templates", named.into_iter().collect::<StringArray>());
        }
        for (name, text) in &self.templates {
            let dot = if name.is_empty() { "" } else { "." };
            metadata.insert(format!("tokenizer.chat_template{dot}{name}"), text.as_str());
        }
    }
}

#[cfg(test)]
mod tests;
