//! A checkpoint's tokenizer files -> GGUF tokenizer keys, as llama.cpp's converter writes them for Qwen2.
//!
//! Owns the special tokens, the chat templates and how GGUF spells them; `tokenizer.json` itself is `tokenizer_json`'s.
//! Reads files as data and runs no tokenizer.

use std::collections::{BTreeMap, HashSet};
use std::io::ErrorKind;
use std::path::Path;

use serde::de::{IgnoredAny, MapAccess};
use serde_json::Value;
use st_gguf::{Metadata, StringArray};

use crate::error::ConvertError;
use crate::json::{Members, bounded, read_members, read_settings, read_text};
use crate::tokenizer_json::{self, AddedToken, Vocabulary};

/// Special tokens that have a key of their own: the name in Hugging Face files, and the GGUF key.
const SPECIAL_KEYS: [(&str, &str); 6] = [
    ("bos", "tokenizer.ggml.bos_token_id"),
    ("eos", "tokenizer.ggml.eos_token_id"),
    ("unk", "tokenizer.ggml.unknown_token_id"),
    ("sep", "tokenizer.ggml.seperator_token_id"),
    ("pad", "tokenizer.ggml.padding_token_id"),
    ("mask", "tokenizer.ggml.mask_token_id"),
];
/// The keys of `config.json` and `generation_config.json` that state ids.
pub(crate) const ID_KEYS: [&str; 6] =
    ["bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id", "pad_token_id", "mask_token_id"];
/// Tokens by which readers know the end of an answer where no key names it.
const KNOWN_ENDS: [&str; 2] = ["<|im_end|>", "<|endoftext|>"];

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

/// What is read of `tokenizer_config.json`.
#[derive(Default)]
struct TokenizerConfig {
    added: BTreeMap<String, AddedToken>,
    settings: serde_json::Map<String, Value>,
}

impl<'de> Members<'de> for TokenizerConfig {
    fn member<A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        match key {
            "added_tokens_decoder" => self.added = map.next_value::<Option<_>>()?.unwrap_or_default(),
            "chat_template" | "add_bos_token" | "add_eos_token" => {
                self.settings.insert(key.to_owned(), bounded(key, map)?);
            }
            _ if key
                .strip_suffix("_token")
                .is_some_and(|name| SPECIAL_KEYS.iter().any(|(known, _)| *known == name)) =>
            {
                self.settings.insert(key.to_owned(), bounded(key, map)?);
            }
            _ => {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

/// Reads the tokenizer of the checkpoint in `dir`. Without `tokenizer.json` only the ids of special tokens that
/// `config.json` states are known, and a warning says that the model runs on token ids.
pub(crate) fn read(
    dir: &Path,
    config: &Value,
    vocab_size: usize,
    warnings: &mut Vec<String>,
) -> Result<TokenizerKeys, ConvertError> {
    let mut settings = TokenizerConfig::default();
    read_members(&dir.join("tokenizer_config.json"), &mut settings)?;
    let generation = read_settings(&dir.join("generation_config.json"), &ID_KEYS)?.unwrap_or(Value::Null);

    let mut keys = TokenizerKeys::default();
    let mut added = BTreeMap::new();
    if let Some(tokenizer) = tokenizer_json::read(&dir.join("tokenizer.json"), settings.added, vocab_size, warnings)? {
        keys.vocabulary = Some(tokenizer.vocabulary);
        added = tokenizer.added;
        keys.adds = adds(&settings.settings);
        keys.templates = templates(dir, settings.settings.get("chat_template"), warnings)?;
    } else {
        warnings.push("the checkpoint has no tokenizer.json: the output takes and gives token ids only".into());
    }

    let mut ids = Ids { vocab_size, warnings };
    for (name, key) in SPECIAL_KEYS {
        let content = token_text(settings.settings.get(&format!("{name}_token")));
        let by_content = content.and_then(|text| added.iter().find(|(_, token)| token.content == text));
        let id_key = format!("{name}_token_id");
        let from_config = ids.stated("config.json", config, &id_key);
        let from_generation = ids.stated("generation_config.json", &generation, &id_key);
        let single = from_config.first().filter(|_| config[&id_key].is_number());
        let id = by_content.map(|(&id, _)| id).or(single.copied());
        if let Some(id) = id.or(from_generation.first().copied()).or(from_config.first().copied()) {
            keys.special.push((key, id));
        }
        if name == "eos" {
            // The main one, then those of the generation settings, then those of the configuration.
            let mut seen = HashSet::new();
            let all = id.into_iter().chain(from_generation).chain(from_config);
            keys.ends = all.filter(|&id| seen.insert(id)).collect();
        }
    }
    let known = added.values().any(|token| KNOWN_ENDS.contains(&token.content.as_str()));
    if keys.vocabulary.is_some() && keys.ends.is_empty() && !known {
        warnings.push("no file names a token that ends an answer: answers go on until they are cut off".into());
    }
    Ok(keys)
}

/// Reads ids of tokens.
struct Ids<'w> {
    vocab_size: usize,
    warnings: &'w mut Vec<String>,
}

impl Ids<'_> {
    /// The ids that `file` states under `key`: one or a list. What is no token of the vocabulary is told of and left out;
    /// other programs write -1 where there is none.
    fn stated(&mut self, file: &str, json: &Value, key: &str) -> Vec<u32> {
        let list = match json.get(key) {
            None | Some(Value::Null) => &[],
            Some(Value::Array(list)) => list.as_slice(),
            Some(one) => std::slice::from_ref(one),
        };
        let id = |value: &Value| value.as_u64().filter(|&id| id < self.vocab_size as u64).map(|id| id as u32);
        if let Some(other) = list.iter().find(|value| id(value).is_none()) {
            self.warnings.push(format!("{file}: {key} {other} is no token of the vocabulary and was left out"));
        }
        list.iter().filter_map(id).collect()
    }
}

/// The `add_…_token` settings; a Qwen2 tokenizer that is silent about it adds no first token.
fn adds(settings: &serde_json::Map<String, Value>) -> Vec<(&'static str, bool)> {
    let flag = |name: &str| settings.get(name).and_then(Value::as_bool);
    let mut adds = vec![("tokenizer.ggml.add_bos_token", flag("add_bos_token").unwrap_or(false))];
    adds.extend(flag("add_eos_token").map(|value| ("tokenizer.ggml.add_eos_token", value)));
    adds
}

/// The chat templates: of files (`chat_template.jinja`, and the named ones in `additional_chat_templates`), which as in the
/// Hugging Face tools count more than those of the tokenizer's settings; else of `chat_template.json`.
fn templates(
    dir: &Path,
    setting: Option<&Value>,
    warnings: &mut Vec<String>,
) -> Result<Vec<(String, String)>, ConvertError> {
    let more = additional_templates(dir, warnings)?;
    let mut all = default_templates(dir, setting, warnings)?;
    all.retain(|(name, _)| !more.iter().any(|(other, _)| other == name));
    all.extend(more);
    Ok(all)
}

/// The templates `NAME.jinja` in the folder `additional_chat_templates`, by name.
fn additional_templates(dir: &Path, warnings: &mut Vec<String>) -> Result<Vec<(String, String)>, ConvertError> {
    let folder = dir.join("additional_chat_templates");
    let fail = |source| ConvertError::Io { path: folder.clone(), source };
    let entries = match std::fs::read_dir(&folder) {
        Err(error) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&error.kind()) => return Ok(Vec::new()),
        entries => entries.map_err(fail)?,
    };
    let mut templates = BTreeMap::new();
    for entry in entries {
        let path = entry.map_err(fail)?.path();
        if path.extension().is_none_or(|extension| extension != "jinja") {
            continue;
        }
        match path.file_stem().and_then(|stem| stem.to_str()) {
            Some(name) => {
                let name = if name == "default" { "" } else { name };
                templates.insert(name.to_owned(), read_text(&path)?.unwrap_or_default())
            }
            None => {
                warnings.push(format!("{} has a name that is not UTF-8, and was left out", path.display()));
                continue;
            }
        };
    }
    Ok(templates.into_iter().collect())
}

/// The template for ordinary chats, and others that are beside it in one file.
fn default_templates(
    dir: &Path,
    setting: Option<&Value>,
    warnings: &mut Vec<String>,
) -> Result<Vec<(String, String)>, ConvertError> {
    let one = |text: &str| vec![(String::new(), text.to_owned())];
    let set = match setting {
        Some(Value::String(text)) => one(text),
        Some(Value::Array(list)) => {
            let pair = |entry: &Value| {
                let name = entry.get("name")?.as_str()?;
                let name = if name == "default" { "" } else { name };
                Some((name.to_owned(), entry.get("template")?.as_str()?.to_owned()))
            };
            list.iter().filter_map(pair).collect()
        }
        _ => Vec::new(),
    };
    if let Some(text) = read_text(&dir.join("chat_template.jinja"))? {
        if set.iter().any(|(name, other)| name.is_empty() && *other != text) {
            warnings.push(
                "there are two chat templates: chat_template.jinja is used, not the chat_template of tokenizer_config.json"
                    .into(),
            );
        }
        let named = set.into_iter().filter(|(name, _)| !name.is_empty());
        return Ok(one(&text).into_iter().chain(named).collect());
    }
    if !set.is_empty() {
        return Ok(set);
    }
    let json = read_settings(&dir.join("chat_template.json"), &["chat_template"])?.unwrap_or(Value::Null);
    Ok(json.get("chat_template").and_then(Value::as_str).map(one).unwrap_or_default())
}

/// A special token is written as its text or as an object that holds its text.
fn token_text(value: Option<&Value>) -> Option<&str> {
    match value? {
        Value::String(text) => Some(text),
        object => object.get("content")?.as_str(),
    }
}

impl TokenizerKeys {
    /// Adds the keys to `metadata`. Without a vocabulary the model is `none`, llama.cpp's word for running on ids.
    pub(crate) fn write(self, metadata: &mut Metadata) {
        match self.vocabulary {
            Some(vocabulary) => {
                metadata.insert("tokenizer.ggml.model", "gpt2");
                metadata.insert("tokenizer.ggml.pre", "qwen2");
                metadata.insert("tokenizer.ggml.tokens", vocabulary.tokens);
                metadata.insert("tokenizer.ggml.token_type", vocabulary.types);
                metadata.insert("tokenizer.ggml.merges", vocabulary.merges);
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
