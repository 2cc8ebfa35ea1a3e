//! The output's metadata: the keys by which llama.cpp and this project's runtime know a SmallThinker file.

use st_gguf::{Metadata, Value};
use st_kernels::WeightType;

use crate::config::ModelConfig;
use crate::layout::ALIGNMENT;

/// The version of ggml's block formats that this project writes.
const QUANTIZATION_VERSION: u32 = 2;

/// llama.cpp's number for "mostly this type".
fn file_type(ty: WeightType) -> u32 {
    match ty {
        WeightType::F32 => 0,
        WeightType::F16 => 1,
        WeightType::Q4_0 => 2,
        WeightType::Q8_0 => 7,
        WeightType::BF16 => 32,
    }
}

/// All keys of an output whose matrices are of type `ty`; `carried` holds the tokenizer and what the input brought
/// along. Nothing depends on where the input lies.
pub(crate) fn describe(config: &ModelConfig, carried: &Metadata, ty: WeightType) -> Metadata {
    let mut out = Metadata::new();
    out.insert("general.architecture", "smallthinker");
    out.insert("general.type", "model");
    out.insert("general.name", config.name.as_deref().unwrap_or("SmallThinker"));
    let (general, rest): (Vec<_>, Vec<_>) = carried.iter().partition(|(key, _)| key.starts_with("general."));
    for (key, value) in general {
        out.insert(key, value.clone());
    }
    // Stated here so that its place does not depend on who writes the file; the writer keeps it.
    out.insert("general.alignment", ALIGNMENT as u32);
    out.insert("general.file_type", file_type(ty));
    out.insert("general.quantization_version", QUANTIZATION_VERSION);
    model_keys(config, &mut out);
    for (key, value) in rest {
        out.insert(key, value.clone());
    }
    out
}

fn model_keys(config: &ModelConfig, out: &mut Metadata) {
    let mut put = |key: &str, value: Value| out.insert(format!("smallthinker.{key}"), value);
    // The configuration caps every one of these far below 2^32.
    let n = |value: usize| Value::U32(value as u32);
    put("block_count", n(config.n_layers));
    put("context_length", n(config.context_length));
    put("embedding_length", n(config.n_embd));
    put("feed_forward_length", n(config.n_ff));
    put("expert_feed_forward_length", n(config.n_ff));
    put("expert_count", n(config.n_experts));
    put("expert_used_count", n(config.n_experts_used));
    put("expert_gating_func", Value::U32(if config.softmax_router { 1 } else { 2 }));
    put("vocab_size", n(config.vocab_size));
    put("attention.head_count", n(config.n_heads));
    put("attention.head_count_kv", n(config.n_kv_heads));
    put("attention.key_length", n(config.head_dim));
    put("attention.value_length", n(config.head_dim));
    put("attention.layer_norm_rms_epsilon", Value::F32(config.rms_eps));
    put("rope.freq_base", Value::F32(config.rope_theta));
    put("rope.dimension_count", n(config.head_dim));
    put("rope.layer_pattern", config.rope_layers.clone().into());
    if let Some(window) = config.window {
        put("attention.sliding_window", n(window));
        put("attention.sliding_window_pattern", config.window_layers.clone().into());
    }
}
