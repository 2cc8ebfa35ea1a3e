//! Tensors of a GGUF file by the names and shapes that a SmallThinker model must have.
//!
//! Owns the list of tensors a complete model consists of, checked once when the source is made: what is missing or
//! of another shape is refused before any weight is read. Nothing above this module looks a tensor up by name.

use std::ops::ControlFlow;

use st_gguf::{ExpertIndex, GgufFile, Matrix, TensorInfo, tensor_names};
use st_kernels::{ExpertFormat, WeightType, dequantize_row};

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::progress::LoadProgress;

/// The embedding, and the LM head too where the two are tied; `[n_embd, n_vocab]`.
pub(crate) const TOKEN_EMBD: &str = "token_embd.weight";
/// The LM head of an untied model; `[n_embd, n_vocab]`.
pub(crate) const OUTPUT: &str = "output.weight";
/// The norm before the LM head; `[n_embd]`.
pub(crate) const OUTPUT_NORM: &str = "output_norm.weight";

const SUPPORTED: &str = "F32, F16, BF16, Q8_0, Q4_0";

/// GGUF name of a layer's tensor, as `blk.3.attn_q.weight`.
pub(crate) fn layer_tensor(layer: usize, part: &str) -> String {
    format!("blk.{layer}.{part}.weight")
}

/// A complete model in a file: every tensor is there and has its shape.
pub(crate) struct TensorSource<'a> {
    file: &'a GgufFile,
    progress: &'a dyn LoadProgress,
    experts: ExpertIndex,
    format: ExpertFormat,
    expert_type: WeightType,
    n_vocab: usize,
    has_head: bool,
}

impl<'a> TensorSource<'a> {
    /// Checks that `file` holds every tensor that `config` asks for. `progress` is asked before anything is read.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`], [`ModelError::TensorShape`], [`ModelError::TensorType`].
    pub(crate) fn new(
        file: &'a GgufFile,
        config: &ModelConfig,
        progress: &'a dyn LoadProgress,
    ) -> Result<Self, ModelError> {
        let embedding = find(file, TOKEN_EMBD)?;
        let n_vocab = embedding.shape.get(1).copied().unwrap_or(0) as usize;
        let (n_embd, q_dim, kv_dim) = (config.n_embd, config.q_dim(), config.kv_dim());
        let has_head = file.header.tensor(OUTPUT).is_some();
        expect(file, TOKEN_EMBD, &[n_embd, n_vocab.max(1)])?;
        expect(file, OUTPUT_NORM, &[n_embd])?;
        if has_head {
            expect(file, OUTPUT, &[n_embd, n_vocab])?;
        }
        for layer in 0..config.n_layers {
            for (part, shape) in [
                ("attn_norm", &[n_embd][..]),
                ("attn_q", &[n_embd, q_dim]),
                ("attn_k", &[n_embd, kv_dim]),
                ("attn_v", &[n_embd, kv_dim]),
                ("attn_output", &[q_dim, n_embd]),
                ("ffn_gate_inp", &[n_embd, config.n_experts]),
                ("ffn_norm", &[n_embd]),
            ] {
                expect(file, &layer_tensor(layer, part), shape)?;
            }
        }
        let experts = ExpertIndex::from_header(&file.header)?;
        for (key, got, expected) in [
            ("block_count", experts.n_layers(), config.n_layers),
            ("expert_count", experts.n_experts(), config.n_experts),
            ("embedding_length", experts.n_embd() as usize, config.n_embd),
            ("expert_feed_forward_length", experts.n_ff() as usize, config.n_ff),
        ] {
            if got != expected {
                return Err(ModelError::BadKey {
                    key: format!("smallthinker.{key}"),
                    got: expected.to_string(),
                    expected: format!("{got}, as the expert tensors have it"),
                });
            }
        }
        let expert_type =
            WeightType::from_ggml_id(experts.expert_type().id()).ok_or_else(|| ModelError::TensorType {
                name: "blk.0.ffn_gate_exps.weight".into(),
                got: experts.expert_type().name().to_string(),
                expected: SUPPORTED,
            })?;
        let format =
            ExpertFormat::new(expert_type, config.n_embd, config.n_ff).map_err(|cause| ModelError::BadKey {
                key: "smallthinker.expert_feed_forward_length".into(),
                got: config.n_ff.to_string(),
                expected: cause.to_string(),
            })?;
        Ok(Self { file, progress, experts, format, expert_type, n_vocab, has_head })
    }

    /// Rows of the embedding.
    pub(crate) fn n_vocab(&self) -> usize {
        self.n_vocab
    }

    /// Whether the LM head is a matrix of its own.
    pub(crate) fn has_head(&self) -> bool {
        self.has_head
    }

    /// Where each expert lies.
    pub(crate) fn experts(&self) -> &ExpertIndex {
        &self.experts
    }

    /// How an expert lies in a cache slot.
    pub(crate) fn format(&self) -> &ExpertFormat {
        &self.format
    }

    /// Type of a matrix.
    pub(crate) fn weight_type(&self, name: &str) -> Result<WeightType, ModelError> {
        weight_type(find(self.file, name)?)
    }

    /// Rows `start..start + n` of a matrix as the file has them, into `buf`.
    pub(crate) fn read_rows(
        &self,
        name: &str,
        start: usize,
        row_bytes: usize,
        buf: &mut [u8],
    ) -> Result<(), ModelError> {
        self.go_on()?;
        let info = find(self.file, name)?;
        Ok(self.file.read_range(info, (start * row_bytes) as u64, buf)?)
    }

    /// A vector in f32.
    pub(crate) fn vector_f32(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        let values = self.matrix_f32(name, 1, len)?;
        // Quantized activations would hide it: a NaN becomes a 0.
        match values.iter().find(|value| !value.is_finite()) {
            Some(&got) => Err(ModelError::NotFinite { name: name.to_owned(), got }),
            None => Ok(values),
        }
    }

    /// A matrix in f32, row by row.
    pub(crate) fn matrix_f32(&self, name: &str, rows: usize, cols: usize) -> Result<Vec<f32>, ModelError> {
        self.go_on()?;
        let info = find(self.file, name)?;
        Ok(dequantize(weight_type(info)?, &self.file.read_tensor(info)?, rows, cols))
    }

    /// Gate and up (`n_ff × n_embd`) and down (`n_embd × n_ff`) of one expert in f32, row by row.
    pub(crate) fn expert_f32(&self, layer: usize, expert: usize) -> Result<[Vec<f32>; 3], ModelError> {
        let (n_ff, n_embd) = (self.format.n_ff(), self.format.n_embd());
        // Whole, so that it can be compared with its checksum.
        let packed = match self.experts.record(layer, expert) {
            None => None,
            Some(record) => {
                self.go_on()?;
                let info = find(self.file, &tensor_names::packed(layer))?;
                let mut packed = vec![0; record.len as usize];
                self.file.read_range(info, record.offset - info.offset, &mut packed)?;
                Some(packed)
            }
        };
        let matrix = |matrix: Matrix, rows, cols| {
            self.go_on()?;
            let in_slot = crate::sizes::of(matrix);
            let mut canonical = vec![0; self.format.canonical_bytes(in_slot)];
            match &packed {
                None => {
                    let info = find(self.file, &tensor_names::stacked(layer, matrix))?;
                    let start = self.experts.matrix(layer, expert, matrix).offset - info.offset;
                    self.file.read_range(info, start, &mut canonical)?;
                }
                Some(packed) => self.format.unpack(in_slot, &packed[self.format.region(in_slot)], &mut canonical),
            }
            Ok::<_, ModelError>(dequantize(self.expert_type, &canonical, rows, cols))
        };
        Ok([
            matrix(Matrix::Gate, n_ff, n_embd)?,
            matrix(Matrix::Up, n_ff, n_embd)?,
            matrix(Matrix::Down, n_embd, n_ff)?,
        ])
    }

    /// Whether more may be read.
    fn go_on(&self) -> Result<(), ModelError> {
        match self.progress.reading() {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(ModelError::Cancelled),
        }
    }
}

fn find<'a>(file: &'a GgufFile, name: &str) -> Result<&'a TensorInfo, ModelError> {
    file.header.tensor(name).ok_or_else(|| ModelError::MissingTensor { name: name.to_owned() })
}

fn weight_type(info: &TensorInfo) -> Result<WeightType, ModelError> {
    WeightType::from_ggml_id(info.ty.id()).ok_or_else(|| ModelError::TensorType {
        name: info.name.clone(),
        got: info.ty.name().to_string(),
        expected: SUPPORTED,
    })
}

fn expect(file: &GgufFile, name: &str, shape: &[usize]) -> Result<(), ModelError> {
    let info = find(file, name)?;
    let expected: Vec<u64> = shape.iter().map(|&n| n as u64).collect();
    // Writers differ in whether they state trailing dimensions of one.
    let significant = |shape: &[u64]| shape.len() - shape.iter().rev().take_while(|&&n| n == 1).count();
    if info.shape[..significant(&info.shape)] != expected[..significant(&expected)] {
        return Err(ModelError::TensorShape { name: name.to_owned(), got: info.shape.clone(), expected });
    }
    weight_type(info).map(|_| ())
}

fn dequantize(ty: WeightType, bytes: &[u8], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; rows * cols];
    dequantize_row(ty, bytes, &mut out);
    out
}
