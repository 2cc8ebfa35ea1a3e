//! Settings of other models that may stand in a file: which values ask for nothing, and which for arithmetic that is
//! not done here.

/// The value of a setting that leaves the computation as it is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Neutral {
    /// 0: none of it.
    Zero,
    /// 0 or 1: none of it, or one of it that is everything.
    ZeroOrOne,
    /// A factor of 1; 0 means that it is not stated.
    Factor,
    /// This truth value.
    Flag(bool),
    /// The width of a head.
    HeadDim,
    /// The scale of scores, one over the root of the width of a head; 0 means that it is not stated.
    ScoreScale,
    /// The base of the rotary frequencies.
    RopeBase,
}

/// Keys behind `smallthinker.` whose value has to be neutral.
#[rustfmt::skip]
pub(crate) const SETTINGS: [(&str, Neutral); 40] = [
    ("attention.value_length", Neutral::HeadDim),
    ("attention.key_length_swa", Neutral::HeadDim),
    ("attention.value_length_swa", Neutral::HeadDim),
    ("rope.dimension_count", Neutral::HeadDim),
    ("rope.dimension_count_swa", Neutral::HeadDim),
    ("rope.freq_base_swa", Neutral::RopeBase),
    ("attention.scale", Neutral::ScoreScale),
    ("attention.causal", Neutral::Flag(true)),
    ("attention.max_alibi_bias", Neutral::Zero),
    ("attention.clamp_kqv", Neutral::Zero),
    ("attention.q_lora_rank", Neutral::Zero),
    ("attention.kv_lora_rank", Neutral::Zero),
    ("attention.key_length_mla", Neutral::Zero),
    ("attention.value_length_mla", Neutral::Zero),
    ("attention.relative_buckets_count", Neutral::Zero),
    ("attention.shared_kv_layers", Neutral::Zero),
    ("attention.chunk_size", Neutral::Zero),
    ("attention.temperature_length", Neutral::Zero),
    ("attention.temperature_scale", Neutral::Zero),
    ("attention.output_scale", Neutral::Factor),
    ("attention.value_scale", Neutral::Factor),
    ("attn_logit_softcapping", Neutral::Zero),
    ("router_logit_softcapping", Neutral::Zero),
    ("final_logit_softcapping", Neutral::Zero),
    ("logit_scale", Neutral::Factor),
    ("residual_scale", Neutral::Factor),
    ("embedding_scale", Neutral::Factor),
    ("expert_weights_scale", Neutral::Factor),
    ("expert_weights_norm", Neutral::Flag(true)),
    ("expert_shared_count", Neutral::Zero),
    ("expert_shared_feed_forward_length", Neutral::Zero),
    ("expert_group_count", Neutral::ZeroOrOne),
    ("expert_group_used_count", Neutral::ZeroOrOne),
    ("leading_dense_block_count", Neutral::Zero),
    ("interleave_moe_layer_step", Neutral::ZeroOrOne),
    ("moe_every_n_layers", Neutral::ZeroOrOne),
    ("nextn_predict_layers", Neutral::Zero),
    ("use_parallel_residual", Neutral::Flag(false)),
    ("swin_norm", Neutral::Flag(false)),
    ("pooling_type", Neutral::Zero),
];

/// Keys behind `smallthinker.` that are read, or that say nothing about the computation.
#[rustfmt::skip]
pub(crate) const READ: [&str; 25] = [
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "expert_count", "expert_used_count", "expert_feed_forward_length", "expert_gating_func",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon",
    "attention.sliding_window", "attention.sliding_window_pattern",
    "rope.freq_base", "rope.layer_pattern",
    "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "tensor_data_layout", "attention.layer_norm_epsilon",
];

/// Beginnings of keys that only say how positions are scaled, where they are.
pub(crate) const SCALING: &str = "rope.scaling.";

/// Names of model-level tensors, up to their first dot, that ggml computes with in some architecture. A file that has
/// one means it to be used.
#[rustfmt::skip]
pub(crate) const COMPUTED_ELSEWHERE: [&str; 24] = [
    "token_embd", "output", "output_norm", "token_embd_norm", "token_types", "position_embd", "rope_freqs",
    "rope_factors_long", "rope_factors_short", "cls", "output_scale", "per_layer_token_embd",
    "per_layer_model_proj", "per_layer_proj_norm", "altup_proj", "altup_unembd_proj", "output_hc_base",
    "output_hc_fn", "output_hc_scale", "enc", "dec", "nextn", "dense_2", "dense_3",
];
