//! One table: the Hugging Face name and the kind of every tensor of the architecture; names and shapes in GGUF files
//! are st-format's.
//!
//! Everything that has to know a tensor's name or shape asks here: reading checkpoints, reading and writing GGUF,
//! planning the output. Knows no file and no type.

pub use st_format::{ModelShape, Scope, Tensor};

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

/// A line of the table.
#[derive(Debug)]
pub struct Rule {
    /// Which tensor.
    pub tensor: Tensor,
    /// How it is treated.
    pub kind: Kind,
    /// Name in a checkpoint, `{L}` for the layer and `{E}` for the expert.
    hf: &'static str,
}

const fn rule(tensor: Tensor, kind: Kind, hf: &'static str) -> Rule {
    Rule { tensor, kind, hf }
}

/// The table, in the order of the enum.
#[rustfmt::skip]
pub static TABLE: [Rule; 13] = [
    rule(Tensor::TokenEmbd,   Kind::Embedding, "model.embed_tokens.weight"),
    rule(Tensor::OutputNorm,  Kind::Norm,      "model.norm.weight"),
    rule(Tensor::Output,      Kind::Embedding, "lm_head.weight"),
    rule(Tensor::AttnNorm,    Kind::Norm,      "model.layers.{L}.input_layernorm.weight"),
    rule(Tensor::AttnQ,       Kind::Matrix,    "model.layers.{L}.self_attn.q_proj.weight"),
    rule(Tensor::AttnK,       Kind::Matrix,    "model.layers.{L}.self_attn.k_proj.weight"),
    rule(Tensor::AttnV,       Kind::Matrix,    "model.layers.{L}.self_attn.v_proj.weight"),
    rule(Tensor::AttnOutput,  Kind::Matrix,    "model.layers.{L}.self_attn.o_proj.weight"),
    rule(Tensor::FfnNorm,     Kind::Norm,      "model.layers.{L}.post_attention_layernorm.weight"),
    rule(Tensor::FfnGateInp,  Kind::Router,    "model.layers.{L}.block_sparse_moe.primary_router.weight"),
    rule(Tensor::FfnGateExps, Kind::Expert,    "model.layers.{L}.block_sparse_moe.experts.{E}.gate.weight"),
    rule(Tensor::FfnUpExps,   Kind::Expert,    "model.layers.{L}.block_sparse_moe.experts.{E}.up.weight"),
    rule(Tensor::FfnDownExps, Kind::Expert,    "model.layers.{L}.block_sparse_moe.experts.{E}.down.weight"),
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

/// The tensor's line in the table.
pub fn rule_of(tensor: Tensor) -> &'static Rule {
    &TABLE[tensor as usize]
}

impl Rule {
    /// How often the tensor exists.
    pub fn scope(&self) -> Scope {
        self.tensor.scope()
    }

    /// Name in a checkpoint; `layer` and `expert` are ignored where the scope has none.
    pub fn hf_name(&self, layer: usize, expert: usize) -> String {
        self.hf.replace("{L}", &layer.to_string()).replace("{E}", &expert.to_string())
    }

    /// Name in a GGUF file, where the experts of a layer share one tensor.
    pub fn gguf_name(&self, layer: usize) -> String {
        self.tensor.name(layer)
    }

    /// Rows of one matrix (1 for a vector).
    pub fn rows(&self, shape: &ModelShape) -> usize {
        self.tensor.dims(shape).1.unwrap_or(1)
    }

    /// Length of a row.
    pub fn cols(&self, shape: &ModelShape) -> usize {
        self.tensor.dims(shape).0
    }

    /// Shape in a checkpoint, slowest dimension first, of one expert where there are several.
    pub fn hf_shape(&self, shape: &ModelShape) -> Vec<u64> {
        let (cols, rows) = self.tensor.dims(shape);
        rows.into_iter().chain([cols]).map(|n| n as u64).collect()
    }

    /// Every (layer, expert) for which the tensor exists in a checkpoint; 0 stands for "none".
    pub fn instances(&self, shape: &ModelShape) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (layers, experts) = match self.scope() {
            Scope::Model => (1, 1),
            Scope::Layer => (shape.n_layers, 1),
            Scope::Expert => (shape.n_layers, shape.n_experts),
        };
        (0..layers).flat_map(move |layer| (0..experts).map(move |expert| (layer, expert)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_in_the_order_of_the_enum_and_marks_what_its_scope_has() {
        for (index, rule) in TABLE.iter().enumerate() {
            assert_eq!(rule.tensor as usize, index);
        }
        for rule in &TABLE {
            assert_eq!(rule.hf.contains("{L}"), rule.scope() != Scope::Model, "{}", rule.hf);
            assert_eq!(rule.hf.contains("{E}"), rule.scope() == Scope::Expert, "{}", rule.hf);
        }
        let mut names: Vec<_> = TABLE.iter().map(|rule| rule.hf_name(1, 2)).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), TABLE.len());
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
        let down = rule_of(Tensor::FfnDownExps);
        assert_eq!(down.hf_name(3, 17), "model.layers.3.block_sparse_moe.experts.17.down.weight");
        assert_eq!(down.scope(), Scope::Expert);
        assert_eq!(rule_of(Tensor::AttnQ).scope(), Scope::Layer);
        assert_eq!(rule_of(Tensor::Output).scope(), Scope::Model);
    }
}
