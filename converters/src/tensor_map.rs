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
    fn names_and_scopes() {
        let down = rule_of(Tensor::FfnDownExps);
        assert_eq!(down.hf_name(3, 17), "model.layers.3.block_sparse_moe.experts.17.down.weight");
        assert_eq!(down.scope(), Scope::Expert);
        assert_eq!(rule_of(Tensor::AttnQ).scope(), Scope::Layer);
        assert_eq!(rule_of(Tensor::Output).scope(), Scope::Model);
    }
}
