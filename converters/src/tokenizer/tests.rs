use serde_json::json;
use st_gguf::{Array, Value as Gguf};

use super::*;

fn tokenizer_json() -> Value {
    json!({
        "added_tokens": [
            {"id": 4, "content": "<|end|>", "special": true},
            {"id": 5, "content": "<tool>", "special": false},
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel"},
        ]},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "Ġa": 3}, "merges": [["a", "b"], "Ġ a"]},
    })
}

fn read_files(files: &[(&str, Value)], config: Value, vocab: usize) -> Result<Metadata, ConvertError> {
    let dir = tempfile::tempdir().unwrap();
    for (name, json) in files {
        std::fs::write(dir.path().join(name), json.to_string()).unwrap();
    }
    let mut metadata = Metadata::new();
    read(dir.path(), &config, vocab, &mut Vec::new())?.write(&mut metadata);
    Ok(metadata)
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
    let generation = json!({"eos_token_id": [4, 0]});
    let files = [
        ("tokenizer.json", tokenizer_json()),
        ("tokenizer_config.json", settings),
        ("generation_config.json", generation),
    ];
    let metadata = read_files(&files, json!({"bos_token_id": 0, "eos_token_id": [0, 4, 1]}), 8).unwrap();
    assert_eq!(
        strings(&metadata, "tokenizer.ggml.tokens"),
        ["a", "b", "ab", "Ġa", "<|end|>", "<tool>", "[PAD6]", "[PAD7]"]
    );
    let types = vec![NORMAL, NORMAL, NORMAL, NORMAL, CONTROL, USER_DEFINED, UNUSED, UNUSED];
    assert_eq!(metadata.get("tokenizer.ggml.token_type"), Some(&Gguf::from(types)));
    assert_eq!(strings(&metadata, "tokenizer.ggml.merges"), ["a b", "Ġ a"]);
    for (key, id) in [("bos", 0u32), ("eos", 4), ("padding", 4)] {
        assert_eq!(metadata.get(&format!("tokenizer.ggml.{key}_token_id")), Some(&Gguf::U32(id)), "{key}");
    }
    assert_eq!(metadata.get("tokenizer.ggml.eos_token_ids"), Some(&Gguf::from(vec![4u32, 0, 1])));
    assert_eq!(metadata.get("tokenizer.ggml.add_bos_token"), Some(&Gguf::Bool(false)));
    assert_eq!(metadata.get("tokenizer.chat_template"), Some(&Gguf::from("T")));
}

#[test]
fn the_end_token_survives_without_settings() {
    let metadata = read_files(&[("tokenizer.json", tokenizer_json())], json!({"eos_token_id": [4, 0]}), 8).unwrap();
    assert_eq!(metadata.get("tokenizer.ggml.eos_token_id"), Some(&Gguf::U32(4)));
    assert_eq!(metadata.get("tokenizer.ggml.eos_token_ids"), Some(&Gguf::from(vec![4u32, 0])));
}

#[test]
fn a_checkpoint_without_tokenizer_keeps_its_ids() {
    let metadata = read_files(&[], json!({"eos_token_id": [1, 2], "bos_token_id": 1}), 8).unwrap();
    assert_eq!(metadata.get("tokenizer.ggml.model"), Some(&Gguf::from("none")));
    assert_eq!(metadata.get("tokenizer.ggml.tokens"), None);
    assert_eq!(metadata.get("tokenizer.ggml.eos_token_ids"), Some(&Gguf::from(vec![1u32, 2])));
}

#[test]
fn several_templates_keep_their_names() {
    let list = json!([{"name": "default", "template": "D"}, {"name": "tool_use", "template": "U"}]);
    let files = [("tokenizer.json", tokenizer_json()), ("tokenizer_config.json", json!({"chat_template": list}))];
    let metadata = read_files(&files, json!({}), 8).unwrap();
    assert_eq!(metadata.get("tokenizer.chat_template"), Some(&Gguf::from("D")));
    assert_eq!(metadata.get("tokenizer.chat_template.tool_use"), Some(&Gguf::from("U")));
    assert_eq!(strings(&metadata, "tokenizer.chat_templates"), ["tool_use"]);
}

#[test]
fn refuses_what_gguf_cannot_say() {
    let edit = |pointer: &str, value: Value| {
        let mut json = tokenizer_json();
        *json.pointer_mut(pointer).unwrap() = value;
        read_files(&[("tokenizer.json", json)], json!({}), 8).unwrap_err().to_string()
    };
    assert!(edit("/model/vocab/a", json!(8)).contains("id 8"));
    assert!(edit("/model/vocab/a", json!(1)).contains("share id 1"));
    assert!(edit("/model/vocab/a", json!("x")).contains("id \"x\""));
    assert!(edit("/added_tokens/0/id", json!(99)).contains("id 99"));
    assert!(edit("/added_tokens/0/id", json!(2)).contains("share id 2"));
    assert!(edit("/model/merges", json!([["a"]])).contains("no merge"));
    assert!(edit("/model/merges", json!(["ab"])).contains("no merge"));
    assert!(edit("/model/type", json!("Unigram")).contains("BPE"));
    assert!(edit("/model/vocab", json!([])).contains("no vocabulary"));
    assert!(edit("/pre_tokenizer/pretokenizers/0/pattern/Regex", json!(r"\s+")).contains("splitting rule"));
    assert!(edit("/pre_tokenizer", json!({"type": "ByteLevel"})).contains("splitting rule"));
}
