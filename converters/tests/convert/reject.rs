//! Broken inputs: one clear error that names what is wrong, and nothing left behind.

use crate::common::{Checkpoint, failure, mini, options, run, tiny};
use safetensors::Dtype;
use serde_json::json;
use st_convert::{Cancel, ConvertError, Input, Layout, NoProgress, Progress, WeightType, convert};

const UP: &str = "model.layers.1.block_sparse_moe.experts.3.up.weight";

pub(crate) fn contains(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "expected {part:?} in: {message}");
    }
}

/// A folder with a copy of a reference checkpoint's files, and one of them changed.
pub(crate) fn copy(of: &std::path::Path, change: impl Fn(&std::path::Path)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(of).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    change(dir.path());
    dir
}

#[test]
fn a_missing_shard_is_named() {
    let shard = "model-00002-of-00002.safetensors";
    let dir = copy(&mini("mini-21b"), |dir| std::fs::remove_file(dir.join(shard)).unwrap());
    contains(&failure(dir.path()), &["missing shard", shard, "index.json"]);
}

#[test]
fn a_shard_without_a_listed_tensor_is_named() {
    let dir = copy(&mini("mini-21b"), |dir| {
        let path = dir.join("model.safetensors.index.json");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replacen("\"lm_head.weight\"", "\"lm_head.extra\"", 1)).unwrap();
    });
    contains(&failure(dir.path()), &["lm_head.extra", "missing"]);
}

#[test]
fn an_index_that_leads_elsewhere_is_refused() {
    for shard in ["../model.safetensors", "/etc/passwd", "", "model.bin"] {
        let dir = copy(&mini("mini-21b"), |dir| {
            let index = json!({"weight_map": {"lm_head.weight": shard}});
            std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
        });
        contains(&failure(dir.path()), &["index.json", "lm_head.weight"]);
    }
}

#[test]
fn a_folder_without_weights_or_configuration_is_named() {
    let dir = copy(&mini("mini-4b"), |dir| std::fs::remove_file(dir.join("model.safetensors")).unwrap());
    contains(&failure(dir.path()), &["neither model.safetensors nor"]);
    let dir = copy(&mini("mini-4b"), |dir| std::fs::remove_file(dir.join("config.json")).unwrap());
    contains(&failure(dir.path()), &["config.json"]);
    let dir = copy(&mini("mini-4b"), |dir| std::fs::write(dir.join("config.json"), "{").unwrap());
    contains(&failure(dir.path()), &["config.json", "not valid JSON"]);
    contains(&failure(&mini("nowhere")), &["nowhere"]);
}

#[test]
fn a_truncated_or_lying_shard_is_named() {
    let whole = std::fs::read(mini("mini-4b").join("model.safetensors")).unwrap();
    for length in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        let dir =
            copy(&mini("mini-4b"), |dir| std::fs::write(dir.join("model.safetensors"), &whole[..length]).unwrap());
        contains(&failure(dir.path()), &["model.safetensors"]);
    }
    for lie in [0u64, 3, u64::MAX, 1 << 40, 90_000_000] {
        let mut bytes = whole.clone();
        bytes[..8].copy_from_slice(&lie.to_le_bytes());
        let dir = copy(&mini("mini-4b"), |dir| std::fs::write(dir.join("model.safetensors"), &bytes).unwrap());
        contains(&failure(dir.path()), &["model.safetensors is not a complete safetensors file"]);
    }
}

#[test]
fn a_missing_tensor_is_named() {
    let mut checkpoint = Checkpoint::load(&mini("mini-4b"));
    checkpoint.tensors.retain(|(name, _)| name != UP);
    contains(&checkpoint.failure(), &[UP, "missing"]);
}

#[test]
fn a_configuration_that_contradicts_its_tensors_is_refused() {
    let edits = [
        ("hidden_size", json!(160), "model.embed_tokens.weight"),
        ("vocab_size", json!(511), "model.embed_tokens.weight"),
        ("head_dim", json!(64), "q_proj"),
        ("num_key_value_heads", json!(4), "k_proj"),
        ("moe_ffn_hidden_size", json!(64), "experts.0.gate"),
        ("moe_num_primary_experts", json!(9), "primary_router"),
        ("tie_word_embeddings", json!(false), "lm_head.weight"),
    ];
    for (key, value, tensor) in edits {
        let mut checkpoint = Checkpoint::load(&mini("mini-4b"));
        checkpoint.config[key] = value;
        contains(&checkpoint.failure(), &[tensor]);
    }
    let mut fewer = Checkpoint::load(&mini("mini-4b"));
    fewer.config["num_hidden_layers"] = json!(3);
    fewer.config["rope_layout"] = json!([1, 1, 1]);
    fewer.config["sliding_window_layout"] = json!([0, 0, 0]);
    contains(&fewer.failure(), &["model.layers.3", "has no place"]);
}

#[test]
fn a_tensor_of_the_wrong_shape_or_type_is_named() {
    let mut checkpoint = Checkpoint::load(&mini("mini-4b"));
    checkpoint.tensor(UP).shape.reverse();
    contains(&checkpoint.failure(), &[UP, "[128, 96]", "[96, 128]"]);
    let mut checkpoint = Checkpoint::load(&mini("mini-4b"));
    checkpoint.tensor(UP).dtype = Dtype::I16;
    contains(&checkpoint.failure(), &[UP, "I16", "BF16"]);
}

#[test]
fn a_weight_that_is_no_number_is_named() {
    for (bits, word) in [(0x7fc0u16, "NaN"), (0x7f80, "inf"), (0xff80, "-inf")] {
        for name in [UP, "model.norm.weight", "model.layers.0.block_sparse_moe.primary_router.weight"] {
            let mut checkpoint = Checkpoint::load(&mini("mini-4b"));
            checkpoint.tensor(name).data[10..12].copy_from_slice(&bits.to_le_bytes());
            contains(&checkpoint.failure(), &[name, "weight 5", word]);
        }
    }
}

#[test]
fn rows_that_are_no_whole_blocks_are_refused() {
    let mut checkpoint = Checkpoint::load(&mini("mini-4b"));
    checkpoint.config["moe_ffn_hidden_size"] = json!(48);
    for (name, tensor) in &mut checkpoint.tensors {
        if name.contains(".experts.") {
            let shape = if name.contains(".down.") { vec![128, 48] } else { vec![48, 128] };
            *tensor = crate::common::Owned { dtype: Dtype::BF16, shape, data: vec![0; 128 * 48 * 2] };
        }
    }
    contains(&checkpoint.failure(), &["ffn_down_exps", "48", "Q4_0", "32"]);
}

#[test]
fn an_unfit_gguf_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("in.gguf");
    std::fs::write(&path, "not a model").unwrap();
    contains(&failure(&path), &["in.gguf", "not a GGUF file"]);
    std::fs::remove_file(&path).unwrap();
    run(&mini("mini-4b"), &options(WeightType::F32, Layout::Offload), &path).unwrap();
    contains(&failure(&path), &["in.gguf", "offload"]);
    std::fs::remove_file(&path).unwrap();
    run(&mini("mini-4b"), &options(WeightType::Q4_0, Layout::Gguf), &path).unwrap();
    let again = run(&path, &options(WeightType::Q8_0, Layout::Gguf), &dir.path().join("again.gguf")).unwrap_err();
    contains(&again.to_string(), &["token_embd.weight", "Q4_0", "Q8_0", "below 8 bits"]);
    let whole = crate::common::bytes(&mini("mini-4b"), &options(WeightType::F32, Layout::Gguf));
    std::fs::write(&path, &whole[..whole.len() - 5000]).unwrap();
    contains(&failure(&path), &["in.gguf", "truncated"]);
    let architecture = whole.windows(12).position(|bytes| bytes == b"smallthinker").unwrap();
    let mut other = whole.clone();
    other[architecture..architecture + 12].copy_from_slice(b"largethinker");
    std::fs::write(&path, other).unwrap();
    contains(&failure(&path), &["largethinker"]);
}

#[test]
fn an_existing_output_stays() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    std::fs::write(&out, "GGUF, precious").unwrap();
    let wanted = options(WeightType::Q4_0, Layout::Gguf);
    let error = run(&mini("mini-4b"), &wanted, &out).unwrap_err();
    contains(&error.to_string(), &["out.gguf", "exists"]);
    assert_eq!(std::fs::read(&out).unwrap(), b"GGUF, precious");
    let input = Input::open(&mini("mini-4b")).unwrap();
    convert(&input, &wanted, &out, true, &NoProgress, &Cancel::new()).unwrap();
    assert!(std::fs::read(&out).unwrap().starts_with(b"GGUF\x03"));
}

/// Asks to stop after some bytes.
struct StopAfter(u64, std::sync::atomic::AtomicU64, Cancel);

impl Progress for StopAfter {
    fn start(&self, _total_bytes: u64) {}
    fn advance(&self, bytes: u64) {
        if self.1.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed) > self.0 {
            self.2.cancel();
        }
    }
    fn finish(&self) {}
}

#[test]
fn a_request_to_stop_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let input = Input::open(&tiny()).unwrap();
    for after in [0, 1 << 20, 6 << 20] {
        let cancel = Cancel::new();
        let progress = StopAfter(after, 0.into(), cancel.clone());
        let wanted = options(WeightType::F32, Layout::Gguf);
        let error = convert(&input, &wanted, &dir.path().join("out.gguf"), false, &progress, &cancel).unwrap_err();
        assert!(matches!(error, ConvertError::Cancelled), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

/// Damages a few bytes of a header again and again: whatever comes of it, it is an error or a conversion, never a panic.
fn damage(whole: &[u8], header: usize, path: &std::path::Path, input: &std::path::Path) {
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed % below as u64) as usize
    };
    let (mut opened, mut refused) = (0, 0);
    for _ in 0..150 {
        let mut bytes = whole.to_vec();
        for _ in 0..=random(3) {
            bytes[random(header)] = random(256) as u8;
        }
        if random(8) == 0 {
            bytes.truncate(random(whole.len()));
        }
        std::fs::write(path, &bytes).unwrap();
        match Input::open(input) {
            Err(_) => refused += 1,
            Ok(_) if opened > 10 => {}
            Ok(_) => {
                opened += 1;
                let dir = tempfile::tempdir().unwrap();
                let _ = run(input, &options(WeightType::Q4_0, Layout::Offload), &dir.path().join("out.gguf"));
            }
        }
    }
    assert!(refused > 10, "{refused} refused");
}

#[test]
fn damaged_headers_never_panic() {
    let whole = std::fs::read(mini("mini-4b").join("model.safetensors")).unwrap();
    let dir = copy(&mini("mini-4b"), |_| ());
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    damage(&whole, header, &dir.path().join("model.safetensors"), dir.path());

    let dir = copy(&mini("mini-4b"), |_| ());
    let config = std::fs::read(mini("mini-4b").join("config.json")).unwrap();
    damage(&config, config.len(), &dir.path().join("config.json"), dir.path());

    let dir = copy(&tiny(), |_| ());
    let tokenizer = std::fs::read(tiny().join("tokenizer_config.json")).unwrap();
    damage(&tokenizer, tokenizer.len(), &dir.path().join("tokenizer_config.json"), dir.path());

    let whole = crate::common::bytes(&mini("mini-4b"), &options(WeightType::Q8_0, Layout::Gguf));
    let path = dir.path().join("in.gguf");
    damage(&whole, 1200, &path, &path);
}
