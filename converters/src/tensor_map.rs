//! One table: Hugging Face name <-> GGUF name, shape and kind of every tensor of the architecture.
//!
//! Everything that has to know a tensor's name or shape asks here: reading checkpoints, reading and writing GGUF,
//! planning the output. Knows no file and no type.

use crate::config::ModelConfig;

/// Every tensor of the architecture. Those of a layer exist once per layer, those of an expert once per expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tensor {
    /// Token embedding.
    TokenEmbd,
    /// Norm after the last layer.
    OutputNorm,
    /// LM head, where it is not the embedding.
    Output,
    /// Norm before attention.
    AttnNorm,
    /// Query projection.
    AttnQ,
    /// Key projection.
    AttnK,
    /// Value projection.
    AttnV,
    /// Projection of the heads back to the residual stream.
    AttnOutput,
    /// Norm before the experts.
    FfnNorm,
    /// Router.
    FfnGateInp,
    /// Gate matrix of an expert.
    FfnGateExps,
    /// Up matrix of an expert.
    FfnUpExps,
    /// Down matrix of an expert.
    FfnDownExps,
}

/// How a tensor is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One F32 vector.
    Norm,
    /// Stays F32: quantizing it would scramble the choice of experts.
    Router,
    /// A weight matrix of the chosen type.
    Matrix,
    /// Embedding or LM head: a weight matrix that may have a type of its own.
    Embedding,
    /// One matrix per expert, stacked in the output.
    Expert,
}

/// How often a tensor exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Once.
    Model,
    /// Once per layer.
    Layer,
    /// Once per layer and expert.
    Expert,
}

/// A length that the configuration states.
#[derive(Clone, Copy, Debug)]
enum Dim {
    /// The tensor is a vector and has no rows.
    None,
    Vocab,
    Embd,
    Heads,
    KvHeads,
    Experts,
    Ff,
}

impl Dim {
    fn of(self, config: &ModelConfig) -> usize {
        match self {
            Self::None => 1,
            Self::Vocab => config.vocab_size,
            Self::Embd => config.n_embd,
            Self::Heads => config.n_heads * config.head_dim,
            Self::KvHeads => config.n_kv_heads * config.head_dim,
            Self::Experts => config.n_experts,
            Self::Ff => config.n_ff,
        }
    }
}

/// A line of the table.
#[derive(Debug)]
pub struct Rule {
    /// Which tensor.
    pub tensor: Tensor,
    /// How it is treated.
    pub kind: Kind,
    /// Name in a checkpoint, `{L}` for the layer and `{E}` for the expert.
    hf: &'static str,
    /// Name in a GGUF file, `{L}` for the layer.
    gguf: &'static str,
    rows: Dim,
    cols: Dim,
}

const fn rule(tensor: Tensor, kind: Kind, hf: &'static str, gguf: &'static str, rows: Dim, cols: Dim) -> Rule {
    Rule { tensor, kind, hf, gguf, rows, cols }
}

/// The table, in the order of the enum.
#[rustfmt::skip]
pub static TABLE: [Rule; 13] = [
    rule(Tensor::TokenEmbd,   Kind::Embedding, "model.embed_tokens.weight", "token_embd.weight", Dim::Vocab, Dim::Embd),
    rule(Tensor::OutputNorm,  Kind::Norm,      "model.norm.weight", "output_norm.weight", Dim::None, Dim::Embd),
    rule(Tensor::Output,      Kind::Embedding, "lm_head.weight", "output.weight", Dim::Vocab, Dim::Embd),
    rule(Tensor::AttnNorm,    Kind::Norm,      "model.layers.{L}.input_layernorm.weight", "blk.{L}.attn_norm.weight", Dim::None, Dim::Embd),
    rule(Tensor::AttnQ,       Kind::Matrix,    "model.layers.{L}.self_attn.q_proj.weight", "blk.{L}.attn_q.weight", Dim::Heads, Dim::Embd),
    rule(Tensor::AttnK,       Kind::Matrix,    "model.layers.{L}.self_attn.k_proj.weight", "blk.{L}.attn_k.weight", Dim::KvHeads, Dim::Embd),
    rule(Tensor::AttnV,       Kind::Matrix,    "model.layers.{L}.self_attn.v_proj.weight", "blk.{L}.attn_v.weight", Dim::KvHeads, Dim::Embd),
    rule(Tensor::AttnOutput,  Kind::Matrix,    "model.layers.{L}.self_attn.o_proj.weight", "blk.{L}.attn_output.weight", Dim::Embd, Dim::Heads),
    rule(Tensor::FfnNorm,     Kind::Norm,      "model.layers.{L}.post_attention_layernorm.weight", "blk.{L}.ffn_norm.weight", Dim::None, Dim::Embd),
    rule(Tensor::FfnGateInp,  Kind::Router,    "model.layers.{L}.block_sparse_moe.primary_router.weight", "blk.{L}.ffn_gate_inp.weight", Dim::Experts, Dim::Embd),
    rule(Tensor::FfnGateExps, Kind::Expert,    "model.layers.{L}.block_sparse_moe.experts.{E}.gate.weight", "blk.{L}.ffn_gate_exps.weight", Dim::Ff, Dim::Embd),
    rule(Tensor::FfnUpExps,   Kind::Expert,    "model.layers.{L}.block_sparse_moe.experts.{E}.up.weight", "blk.{L}.ffn_up_exps.weight", Dim::Ff, Dim::Embd),
    rule(Tensor::FfnDownExps, Kind::Expert,    "model.layers.{L}.block_sparse_moe.experts.{E}.down.weight", "blk.{L}.ffn_down_exps.weight", Dim::Embd, Dim::Ff),
];

/// Names that checkpoints of this family may carry and that hold no weights.
pub fn is_derived(hf_name: &str) -> bool {
    hf_name.ends_with(".rotary_emb.inv_freq")
}

/// Whether the table has this name, for some layer and expert.
pub fn is_known(hf_name: &str) -> bool {
    let mut numbers = ["{L}", "{E}"].into_iter();
    let number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let parts = hf_name.split('.').map(|part| if number(part) { numbers.next().unwrap_or(part) } else { part });
    let pattern = parts.collect::<Vec<_>>().join(".");
    TABLE.iter().any(|rule| rule.hf == pattern)
}

/// What programs that compile, distribute or checkpoint a model add to names, as parts between dots.
const WRAPPERS: [&str; 4] = ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];

/// The names of all tensors of a checkpoint as the bare model has them: without the parts that wrappers add anywhere, and
/// without what all names begin with beyond the table's. A model that was saved without its head gets its `model.`.
pub fn without_wrappers(names: &[&str]) -> Vec<String> {
    let bare = |name: &&str| name.split('.').filter(|part| !WRAPPERS.contains(part)).collect::<Vec<_>>().join(".");
    let names: Vec<String> = names.iter().map(bare).collect();
    let before = |suffix: &str| names.iter().find_map(|name| name.strip_suffix(suffix));
    let head = before("lm_head.weight");
    let (strip, add) = match (before("model.embed_tokens.weight"), before("embed_tokens.weight"), head) {
        (Some(prefix), ..) | (None, None, Some(prefix)) => (prefix.to_owned(), ""),
        (None, Some(prefix), None) => (prefix.to_owned(), "model."),
        _ => return names,
    };
    if !names.iter().all(|name| name.starts_with(&strip)) {
        return names;
    }
    names.iter().map(|name| format!("{add}{}", &name[strip.len()..])).collect()
}

/// The method that quantized the matrix that a tensor of this name belongs to.
pub fn quantized_by(hf_name: &str) -> Option<&'static str> {
    const SUFFIXES: [(&str, &str); 9] = [
        (".qweight", "gptq or awq"),
        (".qzeros", "gptq or awq"),
        (".weight_packed", "compressed-tensors"),
        (".weight_scale_inv", "fp8"),
        (".weight_scale", "fp8 or compressed-tensors"),
        (".absmax", "bitsandbytes"),
        (".quant_map", "bitsandbytes"),
        (".SCB", "bitsandbytes"),
        (".weight_quantizer._scale", "modelopt"),
    ];
    SUFFIXES.iter().find(|(suffix, _)| hf_name.ends_with(suffix)).map(|&(_, method)| method)
}

impl Tensor {
    /// The tensor's line in the table.
    pub fn rule(self) -> &'static Rule {
        &TABLE[self as usize]
    }
}

impl Rule {
    /// How often the tensor exists.
    pub fn scope(&self) -> Scope {
        if self.hf.contains("{E}") {
            Scope::Expert
        } else if self.hf.contains("{L}") {
            Scope::Layer
        } else {
            Scope::Model
        }
    }

    /// Name in a checkpoint; `layer` and `expert` are ignored where the scope has none.
    pub fn hf_name(&self, layer: usize, expert: usize) -> String {
        self.hf.replace("{L}", &layer.to_string()).replace("{E}", &expert.to_string())
    }

    /// Name in a GGUF file, where the experts of a layer share one tensor.
    pub fn gguf_name(&self, layer: usize) -> String {
        self.gguf.replace("{L}", &layer.to_string())
    }

    /// The GGUF name without layer and suffix, such as `attn_q`.
    pub fn kind_name(&self) -> &'static str {
        self.gguf.trim_start_matches("blk.{L}.").trim_end_matches(".weight")
    }

    /// Rows of one matrix (1 for a vector).
    pub fn rows(&self, config: &ModelConfig) -> usize {
        self.rows.of(config)
    }

    /// Length of a row.
    pub fn cols(&self, config: &ModelConfig) -> usize {
        self.cols.of(config)
    }

    /// Shape in a checkpoint, slowest dimension first, of one expert where there are several.
    pub fn hf_shape(&self, config: &ModelConfig) -> Vec<u64> {
        let mut shape = vec![self.cols(config) as u64];
        if !matches!(self.rows, Dim::None) {
            shape.insert(0, self.rows(config) as u64);
        }
        shape
    }

    /// Shape in a GGUF file, fastest dimension first, all experts of a layer together.
    pub fn gguf_shape(&self, config: &ModelConfig) -> Vec<u64> {
        let mut shape = self.hf_shape(config);
        shape.reverse();
        if self.scope() == Scope::Expert {
            shape.push(config.n_experts as u64);
        }
        shape
    }

    /// Every (layer, expert) for which the tensor exists in a checkpoint; 0 stands for "none".
    pub fn instances(&self, config: &ModelConfig) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (layers, experts) = match self.scope() {
            Scope::Model => (1, 1),
            Scope::Layer => (config.n_layers, 1),
            Scope::Expert => (config.n_layers, config.n_experts),
        };
        (0..layers).flat_map(move |layer| (0..experts).map(move |expert| (layer, expert)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_in_the_order_of_the_enum_and_names_are_unique() {
        for (index, rule) in TABLE.iter().enumerate() {
            assert_eq!(rule.tensor as usize, index);
        }
        let mut names: Vec<_> = TABLE.iter().flat_map(|rule| [rule.hf_name(1, 2), rule.gguf_name(1)]).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 2 * TABLE.len());
    }

    #[test]
    fn names_of_the_table_are_known() {
        for rule in &TABLE {
            assert!(is_known(&rule.hf_name(12, 3)));
        }
        for name in ["model.layers.0.self_attn.q_proj.bias", "model.layers..input_layernorm.weight", ""] {
            assert!(!is_known(name), "{name}");
        }
    }

    #[test]
    fn wrappers_are_taken_from_names() {
        let bare = ["lm_head.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"];
        let wrapped = |prefix: &str| bare.map(|name| format!("{prefix}{name}"));
        for prefix in
            ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "base_model.model.", "language_model."]
        {
            let names = wrapped(prefix);
            assert_eq!(without_wrappers(&names.each_ref().map(String::as_str)), bare, "{prefix}");
        }
        let inside = ["model._orig_mod.embed_tokens.weight", "model.layers.0._orig_mod.mlp.weight"];
        assert_eq!(without_wrappers(&inside), ["model.embed_tokens.weight", "model.layers.0.mlp.weight"]);
        assert_eq!(
            without_wrappers(&["embed_tokens.weight", "norm.weight"]),
            ["model.embed_tokens.weight", "model.norm.weight"]
        );
        let mixed = ["text.model.embed_tokens.weight", "vision.weight"];
        assert_eq!(without_wrappers(&mixed), mixed);
    }

    #[test]
    fn names_and_scopes() {
        let down = Tensor::FfnDownExps.rule();
        assert_eq!(down.hf_name(3, 17), "model.layers.3.block_sparse_moe.experts.17.down.weight");
        assert_eq!(down.gguf_name(3), "blk.3.ffn_down_exps.weight");
        assert_eq!(down.scope(), Scope::Expert);
        assert_eq!(Tensor::AttnQ.rule().scope(), Scope::Layer);
        assert_eq!(Tensor::Output.rule().scope(), Scope::Model);
    }
}
