//! Checkpoints in the forms in which they are found: converted as the usual one, with a note where something was
//! decided, or refused with what is there.

use crate::common::{Checkpoint, failure, mini, options, run};
use crate::reject::{contains, copy};
use safetensors::Dtype;
use serde_json::{Value, json};
use st_convert::{ConvertOptions, Layout, WeightType};
use st_gguf::GgufFile;

const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";
const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3842048\n";
const PAGE: &str = "<!DOCTYPE html>\n<html></html>\n";

fn f16() -> ConvertOptions {
    options(WeightType::F16, Layout::Gguf)
}

fn tells(notes: &[String], word: &str) -> bool {
    notes.iter().any(|note| note.contains(word))
}

#[test]
fn a_head_that_is_the_embedding_is_stored_once() {
    let mut checkpoint = Checkpoint::load(&mini("mini-4b"));
    let (usual, notes) = checkpoint.converted(&f16());
    assert!(!tells(&notes, "head"), "{notes:?}");
    let head = checkpoint.tensor(EMBEDDING).clone();
    checkpoint.tensors.push((HEAD.into(), head));
    for (tied, keep_head) in [(json!(true), false), (json!(false), false), (json!(true), true)] {
        checkpoint.config["tie_word_embeddings"] = tied;
        let (file, notes) = checkpoint.converted(&ConvertOptions { keep_head, ..f16() });
        assert!(file == usual);
        assert_eq!(tells(&notes, "no LM head to keep"), keep_head, "{notes:?}");
    }
    // Some savers keep the other name of the two.
    checkpoint.tensors.retain(|(name, _)| name != EMBEDDING);
    for tied in [json!(true), json!(null)] {
        checkpoint.config["tie_word_embeddings"] = tied;
        assert!(checkpoint.converted(&f16()).0 == usual);
    }
    checkpoint.config["tie_word_embeddings"] = json!(false);
    contains(&checkpoint.failure(), &[EMBEDDING, "missing"]);
}

#[test]
fn another_head_of_a_tied_model_counts_where_it_is_kept() {
    let mut checkpoint = Checkpoint::load(&mini("mini-4b"));
    let (usual, _) = checkpoint.converted(&f16());
    let mut head = checkpoint.tensor(EMBEDDING).clone();
    head.data[0] ^= 1;
    checkpoint.tensors.push((HEAD.into(), head));
    let (file, notes) = checkpoint.converted(&f16());
    assert!(file == usual);
    assert!(tells(&notes, HEAD) && tells(&notes, "as in transformers"), "{notes:?}");

    let keep = ConvertOptions { keep_head: true, ..f16() };
    let (kept, notes) = checkpoint.converted(&keep);
    assert!(!tells(&notes, "head"), "{notes:?}");
    checkpoint.config["tie_word_embeddings"] = json!(false);
    assert!(checkpoint.converted(&f16()).0 == kept);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kept.gguf");
    std::fs::write(&path, &kept).unwrap();
    assert!(GgufFile::open(&path).unwrap().header.tensor("output.weight").is_some());
}

#[test]
fn what_wrappers_add_to_names_is_taken_off() {
    for model in ["mini-4b", "mini-21b"] {
        let checkpoint = Checkpoint::load(&mini(model));
        let usual = checkpoint.converted(&f16()).0;
        for prefix in ["_orig_mod.", "module.", "module._orig_mod.", "model.", "base_model.model.", "language_model."] {
            let (file, notes) = checkpoint.renamed(|name| format!("{prefix}{name}")).converted(&f16());
            assert!(file == usual, "{prefix}");
            assert!(tells(&notes, &format!("tensor {prefix}")), "{notes:?}");
        }
        let inside = checkpoint.renamed(|name| name.replace(".self_attn.", "._orig_mod.self_attn."));
        assert!(inside.converted(&f16()).0 == usual);
    }
    let checkpoint = Checkpoint::load(&mini("mini-4b"));
    let headless = checkpoint.renamed(|name| name.trim_start_matches("model.").to_owned());
    assert!(headless.converted(&f16()).0 == checkpoint.converted(&f16()).0);
}

#[test]
fn other_names_are_told() {
    let mut checkpoint = Checkpoint::load(&mini("mini-4b"));
    let fused = checkpoint.renamed(|name| name.replace("experts.0.gate", "experts.gate_up_proj"));
    contains(&fused.failure(), &["experts.0.gate.weight is missing", "experts.gate_up_proj.weight"]);
    let vision = checkpoint.tensor("model.norm.weight").clone();
    checkpoint = checkpoint.renamed(|name| format!("text.{name}"));
    checkpoint.tensors.push(("vision.norm.weight".into(), vision));
    contains(&checkpoint.failure(), &[EMBEDDING, "missing", "text.model.embed_tokens.weight"]);
}

#[test]
fn weights_that_are_not_computed_are_named() {
    let extra = [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.4.input_layernorm.weight",
        "model.layers.0.block_sparse_moe.experts.8.up.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "lm_head.bias",
    ];
    for name in extra {
        for prefix in ["", "module."] {
            let mut checkpoint = Checkpoint::load(&mini("mini-4b"));
            let norm = checkpoint.tensor("model.norm.weight").clone();
            checkpoint.tensors.push((name.into(), norm));
            contains(&checkpoint.renamed(|name| format!("{prefix}{name}")).failure(), &[name, "has no place"]);
        }
    }
}

#[test]
fn checkpoints_that_are_quantized_already_are_named() {
    let settings = [
        ("quantization_config", json!({"quant_method": "gptq", "bits": 4}), "gptq"),
        ("quantization_config", json!({"quant_method": "awq"}), "awq"),
        ("quantization_config", json!({"load_in_4bit": true}), "bitsandbytes"),
        ("quantization_config", json!({"quant_method": "fp8"}), "fp8"),
        ("compression_config", json!({"quant_method": "compressed-tensors"}), "compressed-tensors"),
    ];
    for (key, value, method) in settings {
        let mut checkpoint = Checkpoint::load(&mini("mini-4b"));
        checkpoint.config[key] = value;
        contains(&checkpoint.failure(), &["config.json", "quantized already", method]);
    }
    let mut plain = Checkpoint::load(&mini("mini-4b"));
    plain.config["quantization_config"] = json!({"load_in_4bit": false, "load_in_8bit": false});
    plain.converted(&f16());
    // Where the configuration is silent, the tensors are not.
    for (suffix, method) in [
        ("qweight", "gptq or awq"),
        ("weight_packed", "compressed-tensors"),
        ("weight_scale_inv", "fp8"),
        ("weight.absmax", "bitsandbytes"),
    ] {
        let checkpoint = Checkpoint::load(&mini("mini-4b")).renamed(|name| match name.strip_suffix("q_proj.weight") {
            Some(layer) => format!("{layer}q_proj.{suffix}"),
            None => name.to_owned(),
        });
        contains(&checkpoint.failure(), &["model.safetensors", "quantized already", method]);
    }
    let mut checkpoint = Checkpoint::load(&mini("mini-4b"));
    let matrix = checkpoint.tensor("model.layers.0.self_attn.q_proj.weight");
    (matrix.dtype, matrix.data) = (Dtype::F8_E4M3, matrix.data.iter().step_by(2).copied().collect());
    contains(&checkpoint.failure(), &["q_proj", "F8_E4M3"]);
}

/// The reference checkpoint of two shards with its files changed.
fn sharded(change: impl Fn(&std::path::Path)) -> tempfile::TempDir {
    copy(&mini("mini-21b"), change)
}

fn notes_of(dir: &std::path::Path) -> (Vec<u8>, Vec<String>) {
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("out.gguf");
    let plan = run(dir, &f16(), &path).unwrap();
    (std::fs::read(path).unwrap(), plan.warnings)
}

#[test]
fn shards_are_known_by_their_numbers() {
    const INDEX: &str = "model.safetensors.index.json";
    const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let remove = |dir: &std::path::Path, name: &str| std::fs::remove_file(dir.join(name)).unwrap();
    let rename = |dir: &std::path::Path, from: &str, to: &str| std::fs::rename(dir.join(from), dir.join(to)).unwrap();
    let (usual, _) = notes_of(&mini("mini-21b"));

    let without = sharded(|dir| remove(dir, INDEX));
    assert!(notes_of(without.path()).0 == usual);
    let odd = sharded(|dir| {
        remove(dir, INDEX);
        rename(dir, SHARDS[0], "Model-1-of-2.SAFETENSORS");
        rename(dir, SHARDS[1], "model-002-of-02.safetensors");
        #[cfg(target_os = "linux")]
        {
            use std::os::unix::ffi::OsStrExt as _;
            std::fs::write(dir.join(std::ffi::OsStr::from_bytes(b"\xff.safetensors")), "").unwrap();
        }
    });
    assert!(notes_of(odd.path()).0 == usual);
    let other_case = sharded(|dir| rename(dir, SHARDS[1], "MODEL-00002-of-00002.safetensors"));
    assert!(notes_of(other_case.path()).0 == usual);

    let one = sharded(|dir| {
        remove(dir, INDEX);
        remove(dir, SHARDS[1]);
    });
    contains(&failure(one.path()), &[INDEX, "is not there", SHARDS[0]]);

    // An index wins where all that it lists is there, a whole file where it is not.
    let stray = sharded(|dir| std::fs::write(dir.join("model.safetensors"), "junk").unwrap());
    let (file, notes) = notes_of(stray.path());
    assert!(file == usual && tells(&notes, "model.safetensors lies beside"), "{notes:?}");
    let stale = sharded(|dir| {
        Checkpoint::load(dir).save(dir);
        remove(dir, SHARDS[1]);
    });
    let (file, notes) = notes_of(stale.path());
    assert!(file == usual && tells(&notes, SHARDS[1]), "{notes:?}");

    let other = copy(&mini("mini-4b"), |dir| rename(dir, "model.safetensors", "pytorch_model.bin"));
    contains(&failure(other.path()), &["neither model.safetensors nor", "pytorch_model.bin"]);
}

#[test]
fn what_stands_in_place_of_a_file_is_named() {
    for (text, word) in [(POINTER, "Git LFS pointer"), (PAGE, "web page")] {
        for name in ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"] {
            let dir = copy(&crate::common::tiny(), |dir| std::fs::write(dir.join(name), text).unwrap());
            contains(&failure(dir.path()), &[name, word]);
        }
        let dir = sharded(|dir| std::fs::write(dir.join("model-00002-of-00002.safetensors"), text).unwrap());
        contains(&failure(dir.path()), &["model-00002-of-00002.safetensors", word]);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        std::fs::write(&path, text).unwrap();
        contains(&failure(&path), &["m.gguf", word]);
    }
}

#[test]
fn a_configuration_may_be_newer_or_marked() {
    let usual = notes_of(&mini("mini-4b")).0;
    let with = |edits: &[(&str, Value)]| {
        let mut checkpoint = Checkpoint::load(&mini("mini-4b"));
        for (key, value) in edits {
            checkpoint.config[*key] = value.clone();
        }
        checkpoint
    };
    let theta = with(&[]).config["rope_theta"].clone();
    let moved = json!({"rope_theta": theta, "rope_type": "default"});
    for edits in [
        vec![("rope_theta", json!(null)), ("rope_parameters", moved.clone()), ("dtype", json!("bfloat16"))],
        vec![
            ("rope_theta", json!(null)),
            ("rope_parameters", json!({"full_attention": moved, "sliding_attention": null})),
        ],
        vec![("rope_scaling", json!({"rope_type": "default"}))],
        vec![("rope_scaling", json!({"type": "linear", "factor": 1.0}))],
    ] {
        assert!(with(&edits).converted(&f16()).0 == usual, "{edits:?}");
    }
    for (key, value) in [
        ("rope_scaling", json!({"type": "yarn", "factor": 4.0})),
        ("rope_scaling", json!({"factor": 4.0})),
        ("rope_scaling", json!("yarn")),
        ("rope_parameters", json!({"rope_theta": theta, "rope_type": "linear", "factor": 4.0})),
        ("rope_parameters", json!({"full_attention": {"rope_type": "longrope", "factor": 1.0}})),
        ("rope_parameters", json!({"rope_theta": 10.5, "rope_type": "default"})),
        ("rope_parameters", json!({"rope_type": "default", "partial_rotary_factor": 0.5})),
        ("partial_rotary_factor", json!(0.5)),
    ] {
        contains(&with(&[(key, value)]).failure(), &["config.json", key]);
    }
    let marked = copy(&mini("mini-4b"), |dir| {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).unwrap();
        let constants = text.trim_end().trim_end_matches('}').to_owned() + ", \"router_jitter\": [NaN, -Infinity]}";
        std::fs::write(&path, format!("\u{feff}{constants}")).unwrap();
    });
    assert!(notes_of(marked.path()).0 == usual);
}
