use serde_json::json;
use st_gguf::{Array, Value as Gguf};

use super::*;
use crate::tokenizer_json::QWEN2_SPLIT;
use crate::vocabulary::{CONTROL, NORMAL, UNUSED, USER_DEFINED, byte_letters};

/// Ids from 0: all bytes, `ab`, `Ġa`, `<|end|>`, `<tool>`.
const AB: u32 = 256;
const END: u32 = 258;
/// Two ids more than there are tokens.
const SIZE: usize = 262;

fn tokenizer_json() -> Value {
    let mut vocab: serde_json::Map<_, _> =
        byte_letters().zip(0..).map(|(letter, id)| (letter.to_string(), json!(id))).collect();
    vocab.insert("ab".into(), json!(AB));
    vocab.insert("Ġa".into(), json!(257));
    json!({
        "added_tokens": [
            {"id": END, "content": "<|end|>", "special": true, "lstrip": false},
            {"id": 259, "content": "<tool>", "special": false},
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false},
        ]},
        "post_processor": {"type": "ByteLevel"},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "ignore_merges": false, "vocab": vocab, "merges": [["a", "b"], "Ġ a"]},
    })
}

type Files<'f> = [(&'f str, Value)];

/// The keys, and what was told.
fn read_with_notes(files: &Files<'_>, config: Value) -> Result<(Metadata, Vec<String>), ConvertError> {
    let dir = tempfile::tempdir().unwrap();
    for (name, json) in files {
        let text = if name.ends_with(".jinja") { json.as_str().unwrap().to_owned() } else { json.to_string() };
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let (mut metadata, mut notes) = (Metadata::new(), Vec::new());
    read(dir.path(), &config, SIZE, &mut notes)?.write(&mut metadata);
    Ok((metadata, notes))
}

fn read_files(files: &Files<'_>, config: Value) -> Result<Metadata, ConvertError> {
    read_with_notes(files, config).map(|(metadata, _)| metadata)
}

/// What is said of a tokenizer in which the value at `pointer` is another.
fn refusal(pointer: &str, value: Value) -> String {
    let mut json = tokenizer_json();
    *json.pointer_mut(pointer).unwrap() = value;
    match read_files(&[("tokenizer.json", json)], json!({})) {
        Ok(_) => panic!("{pointer} is taken"),
        Err(error) => error.to_string(),
    }
}

fn strings<'a>(metadata: &'a Metadata, key: &str) -> Vec<&'a str> {
    match metadata.get(key) {
        Some(Gguf::Array(Array::String(strings))) => strings.iter().collect(),
        other => panic!("{key}: {other:?}"),
    }
}

#[test]
fn writes_what_llama_cpp_writes() {
    let settings = json!({"eos_token": {"content": "<|end|>"}, "pad_token": "<|end|>", "chat_template": "T"});
    let generation = json!({"eos_token_id": [END, 0]});
    let files = [
        ("tokenizer.json", tokenizer_json()),
        ("tokenizer_config.json", settings),
        ("generation_config.json", generation),
    ];
    let config = json!({"bos_token_id": 0, "eos_token_id": [0, END, 1]});
    let (metadata, notes) = read_with_notes(&files, config).unwrap();
    assert_eq!(notes, [""; 0]);
    let tokens = strings(&metadata, "tokenizer.ggml.tokens");
    assert_eq!(tokens[usize::from(b'a')], "a");
    assert_eq!(tokens[256..], ["ab", "Ġa", "<|end|>", "<tool>", "[PAD260]", "[PAD261]"]);
    let mut types = vec![NORMAL; SIZE];
    types[258..].copy_from_slice(&[CONTROL, USER_DEFINED, UNUSED, UNUSED]);
    assert_eq!(metadata.get("tokenizer.ggml.token_type"), Some(&Gguf::from(types)));
    assert_eq!(strings(&metadata, "tokenizer.ggml.merges"), ["a b", "Ġ a"]);
    for (key, id) in [("bos", 0), ("eos", END), ("padding", END)] {
        assert_eq!(metadata.get(&format!("tokenizer.ggml.{key}_token_id")), Some(&Gguf::U32(id)), "{key}");
    }
    assert_eq!(metadata.get("tokenizer.ggml.eos_token_ids"), Some(&Gguf::from(vec![END, 0, 1])));
    assert_eq!(metadata.get("tokenizer.ggml.add_bos_token"), Some(&Gguf::Bool(false)));
    assert_eq!(metadata.get("tokenizer.chat_template"), Some(&Gguf::from("T")));
}

#[test]
fn the_end_token_survives_without_settings() {
    let metadata = read_files(&[("tokenizer.json", tokenizer_json())], json!({"eos_token_id": [END, 0]})).unwrap();
    assert_eq!(metadata.get("tokenizer.ggml.eos_token_id"), Some(&Gguf::U32(END)));
    assert_eq!(metadata.get("tokenizer.ggml.eos_token_ids"), Some(&Gguf::from(vec![END, 0])));
}

#[test]
fn ids_that_are_no_tokens_are_told_of() {
    let files = [
        ("tokenizer.json", tokenizer_json()),
        ("generation_config.json", json!({"eos_token_id": [-1, END], "bos_token_id": null})),
    ];
    let (metadata, notes) = read_with_notes(&files, json!({"bos_token_id": -1, "eos_token_id": SIZE})).unwrap();
    assert_eq!(metadata.get("tokenizer.ggml.bos_token_id"), None);
    assert_eq!(metadata.get("tokenizer.ggml.eos_token_id"), Some(&Gguf::U32(END)));
    assert_eq!(notes.len(), 3, "{notes:?}");
    assert!(notes[0].contains("config.json: bos_token_id -1 is no token"), "{notes:?}");
    let (metadata, notes) = read_with_notes(&files[..1], json!({"eos_token_id": null})).unwrap();
    assert_eq!(metadata.get("tokenizer.ggml.eos_token_id"), None);
    assert!(notes.iter().any(|note| note.contains("ends an answer")), "{notes:?}");
}

#[test]
fn a_checkpoint_without_tokenizer_keeps_its_ids() {
    let metadata = read_files(&[], json!({"eos_token_id": [1, 2], "bos_token_id": 1})).unwrap();
    assert_eq!(metadata.get("tokenizer.ggml.model"), Some(&Gguf::from("none")));
    assert_eq!(metadata.get("tokenizer.ggml.tokens"), None);
    assert_eq!(metadata.get("tokenizer.ggml.eos_token_ids"), Some(&Gguf::from(vec![1u32, 2])));
}

#[test]
fn several_templates_keep_their_names() {
    let list = json!([{"name": "default", "template": "D"}, {"name": "tool_use", "template": "U"}]);
    let files = [
        ("tokenizer.json", tokenizer_json()),
        ("tokenizer_config.json", json!({"chat_template": list})),
        ("chat_template.jinja", json!("\u{feff}F")),
    ];
    for (files, default, told) in [(&files[..2], "D", 0), (&files, "F", 1)] {
        let (metadata, notes) = read_with_notes(files, json!({"eos_token_id": END})).unwrap();
        assert_eq!(metadata.get("tokenizer.chat_template"), Some(&Gguf::from(default)));
        assert_eq!(metadata.get("tokenizer.chat_template.tool_use"), Some(&Gguf::from("U")));
        assert_eq!(strings(&metadata, "tokenizer.chat_templates"), ["tool_use"]);
        assert_eq!(notes.iter().filter(|note| note.contains("chat_template.jinja")).count(), told, "{notes:?}");
    }
}

#[test]
fn templates_in_files_of_their_own_count_more_than_settings() {
    let list = json!([{"name": "default", "template": "D"}, {"name": "tool_use", "template": "U"}]);
    let files = [
        ("tokenizer.json", tokenizer_json()),
        ("tokenizer_config.json", json!({"chat_template": list})),
        ("additional_chat_templates/tool_use.jinja", json!("V")),
        ("additional_chat_templates/rag.jinja", json!("R")),
        ("additional_chat_templates/notes.txt", json!("no template")),
    ];
    let metadata = read_files(&files, json!({"eos_token_id": END})).unwrap();
    let template = |name: &str| metadata.get(&format!("tokenizer.chat_template{name}")).cloned();
    assert_eq!([template(""), template(".tool_use"), template(".rag")], ["D", "V", "R"].map(|t| Some(Gguf::from(t))));
    assert_eq!(strings(&metadata, "tokenizer.chat_templates"), ["rag", "tool_use"]);
}

#[test]
fn refuses_what_gguf_cannot_say() {
    assert!(refusal("/model/vocab/a", json!(SIZE)).contains("id 262"));
    assert!(refusal("/model/vocab/a", json!(1)).contains("share id 1"));
    assert!(refusal("/model/vocab/a", json!("x")).contains("id \"x\""));
    assert!(refusal("/added_tokens/0/id", json!(999)).contains("id 999"));
    assert!(refusal("/added_tokens/0/id", json!(null)).contains("no id"));
    assert!(refusal("/added_tokens/0/id", json!(2)).contains("share id 2"));
    assert!(refusal("/added_tokens/1/id", json!(END)).contains("both"));
    assert!(refusal("/model/merges", json!([["a"]])).contains("no merge"));
    assert!(refusal("/model/merges", json!(["ab"])).contains("no merge"));
    assert!(refusal("/model/merges", json!(["a b ab"])).contains("no merge"));
    assert!(refusal("/model/type", json!("Unigram")).contains("BPE"));
    assert!(refusal("/model/vocab", json!([])).contains("expected a vocabulary"));
    assert!(refusal("/model/vocab", json!(null)).contains("no vocabulary"));
    assert!(refusal("/pre_tokenizer/pretokenizers/0/pattern/Regex", json!(r"\s+")).contains("splitting rule"));
    assert!(refusal("/pre_tokenizer", json!({"type": "ByteLevel"})).contains("splitting rule"));
}

#[test]
fn refuses_settings_that_change_tokens() {
    let lowercase = json!({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]});
    assert!(refusal("/normalizer", lowercase).contains("Lowercase"));
    let split = tokenizer_json()["pre_tokenizer"]["pretokenizers"][0].clone();
    let bytes = tokenizer_json()["pre_tokenizer"]["pretokenizers"][1].clone();
    let steps = |steps: &[&Value]| refusal("/pre_tokenizer/pretokenizers", json!(steps));
    let punctuation = json!({"type": "Punctuation"});
    assert!(steps(&[&punctuation, &split, &bytes]).contains("Punctuation"));
    assert!(steps(&[&split, &punctuation, &bytes]).contains("Punctuation"));
    assert!(steps(&[&split, &bytes, &punctuation]).contains("Punctuation"));
    assert!(steps(&[&split]).contains("ByteLevel"));
    assert!(steps(&[]).contains("splitting rule"));
    let set = |pointer: &str, value: Value| refusal(&format!("/pre_tokenizer/pretokenizers/{pointer}"), value);
    assert!(set("0/invert", json!(true)).contains("splitting rule"));
    assert!(set("0/behavior", json!("Removed")).contains("Removed"));
    assert!(set("1/use_regex", json!(true)).contains("use_regex"));
    assert!(set("1/add_prefix_space", json!(true)).contains("add_prefix_space"));
    let template = |parts: Value| json!({"type": "TemplateProcessing", "single": parts});
    let first = json!([{"SpecialToken": {"id": "<|end|>"}}, {"Sequence": {"id": "A"}}]);
    assert!(refusal("/post_processor", template(first)).contains("adds no tokens"));
    assert!(refusal("/decoder", json!({"type": "Metaspace"})).contains("Metaspace"));
    assert!(refusal("/model/ignore_merges", json!(true)).contains("ignore_merges"));
    assert!(refusal("/added_tokens/0/lstrip", json!(true)).contains("\"<|end|>\" has lstrip"));

    // What changes nothing is taken.
    let mut json = tokenizer_json();
    json["normalizer"] = json!({"type": "Sequence", "normalizers": [{"type": "NFC"}]});
    json["post_processor"] = template(json!([{"Sequence": {"id": "A"}}]));
    json["decoder"] = json!(null);
    json["model"]["end_of_word_suffix"] = json!("");
    json["truncation"] = json!({"max_length": 512});
    read_files(&[("tokenizer.json", json)], json!({})).unwrap();
    // The settings beside it count, too.
    let decoder = json!({"added_tokens_decoder": {"258": {"content": "<|end|>", "rstrip": true}}});
    let files = [("tokenizer.json", tokenizer_json()), ("tokenizer_config.json", decoder)];
    assert!(read_files(&files, json!({})).unwrap_err().to_string().contains("rstrip"));
}

#[test]
fn a_vocabulary_that_no_reader_takes_is_refused() {
    let mut json = tokenizer_json();
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    let id = vocab.remove("Ē").unwrap();
    vocab.insert("unused".into(), id);
    let message = read_files(&[("tokenizer.json", json)], json!({})).unwrap_err().to_string();
    assert!(message.contains("the byte 0x12"), "{message}");
    assert!(refusal("/model/merges", json!(["a b", "b b"])).contains("\"bb\", which is no token"));
    assert!(refusal("/model/merges/0", json!(["a", "xy"])).contains("\"xy\""));
}

#[test]
fn the_version_line_is_no_merge() {
    let mut json = tokenizer_json();
    json["model"]["merges"] = json!(["#version: 0.2", "a b"]);
    let metadata = read_files(&[("tokenizer.json", json)], json!({})).unwrap();
    assert_eq!(strings(&metadata, "tokenizer.ggml.merges"), ["a b"]);
}
