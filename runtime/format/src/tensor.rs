//! The tensors of a SmallThinker model: their names in a GGUF file and their shapes, once.

use crate::{Matrix, ModelShape};

/// Every tensor of the architecture. Those of a layer exist once per layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tensor {
    /// Token embedding; the LM head too, where there is no other.
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
    /// Gate matrices of all experts.
    FfnGateExps,
    /// Up matrices of all experts.
    FfnUpExps,
    /// Down matrices of all experts.
    FfnDownExps,
}

/// How often a tensor exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Once.
    Model,
    /// Once per layer.
    Layer,
    /// Once per layer and expert; a GGUF file stacks the experts of a layer.
    Expert,
}

impl Tensor {
    /// All of them: the model's, a layer's, its experts'.
    pub const ALL: [Self; 13] = [
        Self::TokenEmbd,
        Self::OutputNorm,
        Self::Output,
        Self::AttnNorm,
        Self::AttnQ,
        Self::AttnK,
        Self::AttnV,
        Self::AttnOutput,
        Self::FfnNorm,
        Self::FfnGateInp,
        Self::FfnGateExps,
        Self::FfnUpExps,
        Self::FfnDownExps,
    ];

    /// The tensor that stacks a matrix of all experts.
    pub const fn experts(matrix: Matrix) -> Self {
        match matrix {
            Matrix::Gate => Self::FfnGateExps,
            Matrix::Up => Self::FfnUpExps,
            Matrix::Down => Self::FfnDownExps,
        }
    }

    /// Its name without layer and suffix, such as `attn_q`.
    pub const fn part(self) -> &'static str {
        match self {
            Self::TokenEmbd => "token_embd",
            Self::OutputNorm => "output_norm",
            Self::Output => "output",
            Self::AttnNorm => "attn_norm",
            Self::AttnQ => "attn_q",
            Self::AttnK => "attn_k",
            Self::AttnV => "attn_v",
            Self::AttnOutput => "attn_output",
            Self::FfnNorm => "ffn_norm",
            Self::FfnGateInp => "ffn_gate_inp",
            Self::FfnGateExps => "ffn_gate_exps",
            Self::FfnUpExps => "ffn_up_exps",
            Self::FfnDownExps => "ffn_down_exps",
        }
    }

    /// How often it exists.
    pub const fn scope(self) -> Scope {
        match self {
            Self::TokenEmbd | Self::OutputNorm | Self::Output => Scope::Model,
            Self::FfnGateExps | Self::FfnUpExps | Self::FfnDownExps => Scope::Expert,
            _ => Scope::Layer,
        }
    }

    /// Its name in a GGUF file; `layer` is ignored where the model has one only.
    pub fn name(self, layer: usize) -> String {
        match self.scope() {
            Scope::Model => format!("{}.weight", self.part()),
            Scope::Layer | Scope::Expert => format!("blk.{layer}.{}.weight", self.part()),
        }
    }

    /// Length of a row and number of rows of one matrix; a vector has no number of rows.
    pub const fn dims(self, shape: &ModelShape) -> (usize, Option<usize>) {
        let (n_embd, n_ff) = (shape.n_embd, shape.n_ff);
        match self {
            Self::OutputNorm | Self::AttnNorm | Self::FfnNorm => (n_embd, None),
            Self::TokenEmbd | Self::Output => (n_embd, Some(shape.n_vocab)),
            Self::AttnQ => (n_embd, Some(shape.q_dim())),
            Self::AttnK | Self::AttnV => (n_embd, Some(shape.kv_dim())),
            Self::AttnOutput => (shape.q_dim(), Some(n_embd)),
            Self::FfnGateInp => (n_embd, Some(shape.n_experts)),
            Self::FfnGateExps | Self::FfnUpExps => (n_embd, Some(n_ff)),
            Self::FfnDownExps => (n_ff, Some(n_embd)),
        }
    }

    /// Its shape in a GGUF file, fastest dimension first, all experts of a layer together.
    pub fn ggml_shape(self, shape: &ModelShape) -> Vec<u64> {
        let (columns, rows) = self.dims(shape);
        let experts = (self.scope() == Scope::Expert).then_some(shape.n_experts);
        std::iter::once(columns).chain(rows).chain(experts).map(|n| n as u64).collect()
    }
}

/// Names of the tensors that hold experts.
pub mod tensor_names {
    use super::{Matrix, ModelShape, Tensor};

    /// The stacked matrices of one kind in layer `layer` (`gguf` layout).
    pub fn stacked(layer: usize, matrix: Matrix) -> String {
        Tensor::experts(matrix).name(layer)
    }

    /// The records of layer `layer` (`offload` layout).
    pub fn packed(layer: usize) -> String {
        format!("blk.{layer}.{PACKED}")
    }

    /// Where the matrix of queries, keys or values called `name` lies in a file that has the three as one, below each other in this
    /// order: that one's name, and the first row.
    pub fn fused(name: &str, shape: &ModelShape) -> Option<(String, usize)> {
        let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
        let is = |tensor: Tensor| part.strip_suffix(".weight") == Some(tensor.part());
        let row = match () {
            () if is(Tensor::AttnQ) => 0,
            () if is(Tensor::AttnK) => shape.q_dim(),
            () if is(Tensor::AttnV) => shape.q_dim() + shape.kv_dim(),
            () => return None,
        };
        Some((format!("blk.{layer}.{FUSED}"), row))
    }

    /// What [`fused`] puts behind the layer.
    pub(crate) const FUSED: &str = "attn_qkv.weight";

    /// What [`packed`] puts behind the layer.
    pub(crate) const PACKED: &str = "ffn_exps.packed";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_listed_in_order_with_names_of_their_own() {
        for (index, tensor) in Tensor::ALL.into_iter().enumerate() {
            assert_eq!(tensor as usize, index);
        }
        let mut names = Tensor::ALL.map(|tensor| tensor.name(7));
        names.sort();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
        assert_eq!(Tensor::AttnQ.name(7), "blk.7.attn_q.weight");
        assert_eq!(Tensor::Output.name(7), "output.weight");
        assert_eq!(tensor_names::packed(3), "blk.3.ffn_exps.packed");
    }

    #[test]
    fn shapes_of_the_4b() {
        let shape = ModelShape::published_4b();
        assert_eq!(Tensor::AttnK.ggml_shape(&shape), [1536, 256]);
        assert_eq!(Tensor::AttnOutput.ggml_shape(&shape), [1536, 1536]);
        assert_eq!(Tensor::FfnDownExps.ggml_shape(&shape), [768, 1536, 32]);
        assert_eq!(Tensor::OutputNorm.ggml_shape(&shape), [1536]);
        let fused = |name| tensor_names::fused(name, &shape);
        assert_eq!(fused("blk.3.attn_v.weight"), Some(("blk.3.attn_qkv.weight".into(), 1792)));
        assert_eq!((fused("blk.3.attn_output.weight"), fused("output.weight")), (None, None));
    }
}
