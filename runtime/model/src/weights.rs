//! Tensors of a GGUF file by the names and shapes that a SmallThinker model must have.
//!
//! Owns which of the file's types are computed with, checked once when the source is made; that every tensor is there
//! and has its shape, the file's own description has proved. Nothing above this module looks a tensor up by name.

use std::ops::ControlFlow;
use std::sync::Arc;

use st_format::{Matrix, ModelShape, Scope, Tensor, tensor_names};
use st_gguf::{ExpertIndex, GgmlType, GgufFile, ReadAt, TensorInfo};
use st_kernels::{ExpertFormat, UnsupportedType, WeightType, dequantize_row};

use crate::error::ModelError;
use crate::options::LoadOptions;
use crate::predictor::Predictor;
use crate::progress::LoadProgress;
use crate::vocabulary::KEY_TEMPLATE;

/// The embedding, and the LM head too where the two are tied; `[n_embd, n_vocab]`.
pub(crate) const TOKEN_EMBD: &str = "token_embd.weight";
/// The LM head of an untied model; `[n_embd, n_vocab]`.
pub(crate) const OUTPUT: &str = "output.weight";
/// The norm before the LM head; `[n_embd]`.
pub(crate) const OUTPUT_NORM: &str = "output_norm.weight";

/// GGUF name of a layer's tensor, as `blk.3.attn_q.weight`.
pub(crate) fn layer_tensor(layer: usize, part: &str) -> String {
    format!("blk.{layer}.{part}.weight")
}

/// A complete model in a file: every tensor is there and has its shape.
pub(crate) struct TensorSource<'a> {
    file: &'a GgufFile,
    progress: &'a dyn LoadProgress,
    experts: ExpertIndex,
    /// Per layer.
    formats: Vec<ExpertFormat>,
    shape: ModelShape,
    has_head: bool,
}

impl<'a> TensorSource<'a> {
    /// Checks that the tensors of `file`, whose shape `config` is, are of types that are computed with. `progress` is
    /// asked before anything is read.
    ///
    /// # Errors
    /// [`ModelError::TensorType`]; where the experts are not all there, of [`ModelError::Gguf`].
    pub(crate) fn new(
        file: &'a GgufFile,
        config: &ModelShape,
        progress: &'a dyn LoadProgress,
    ) -> Result<Self, ModelError> {
        let has_head = has_head_of_its_own(file, progress)?;
        for tensor in Tensor::ALL.into_iter().filter(|&tensor| tensor != Tensor::Output || has_head) {
            let layers = match tensor.scope() {
                Scope::Model => 1,
                Scope::Layer => config.n_layers,
                Scope::Expert => 0,
            };
            for layer in 0..layers {
                weight_type(file.header.place_of(&tensor.name(layer), config)?.0)?;
            }
        }
        let experts = ExpertIndex::from_header(&file.header, config)?;
        let formats = (0..config.n_layers).map(|layer| expert_format(&experts, layer, config));
        let formats = formats.collect::<Result<_, _>>()?;
        Ok(Self { file, progress, experts, formats, shape: config.clone(), has_head })
    }

    /// Rows of the embedding.
    pub(crate) fn n_vocab(&self) -> usize {
        self.shape.n_vocab
    }

    /// Whether the LM head is a matrix of its own: where the file has the embedding a second time as the head, one copy serves.
    pub(crate) fn has_head(&self) -> bool {
        self.has_head
    }

    /// Whether the file has a format for chats.
    pub(crate) fn has_chat_template(&self) -> bool {
        self.file.header.metadata.get(KEY_TEMPLATE).is_some()
    }

    /// The name of the matrix that makes logits.
    pub(crate) fn head(&self) -> &'static str {
        if self.has_head { OUTPUT } else { TOKEN_EMBD }
    }

    /// The predictor of the head, where `options` ask for one: theirs, or the file's.
    ///
    /// # Errors
    /// [`ModelError::NoPredictor`] where neither is there; those of [`Predictor::in_gguf`].
    pub(crate) fn predictor(&self, options: &LoadOptions) -> Result<Option<Predictor>, ModelError> {
        let Some(sparse) = &options.sparse_head else { return Ok(None) };
        if let Some(given) = &sparse.predictor {
            return Ok(Some(given.clone()));
        }
        let found = Predictor::in_gguf(self.file, &self.shape)?;
        found.map(Some).ok_or_else(|| ModelError::NoPredictor { file: self.file.header.file_name().to_owned() })
    }

    /// Where each expert lies.
    pub(crate) fn experts(&self) -> &ExpertIndex {
        &self.experts
    }

    /// How the experts of each layer lie in cache slots.
    pub(crate) fn formats(&self) -> &[ExpertFormat] {
        &self.formats
    }

    /// Whether any matrix of any expert is quantized.
    pub(crate) fn is_quantized(&self) -> bool {
        self.formats.iter().any(|format| Matrix::ALL.iter().any(|&matrix| format.type_of(matrix).is_quantized()))
    }

    /// Type of a matrix.
    pub(crate) fn weight_type(&self, name: &str) -> Result<WeightType, ModelError> {
        weight_type(self.place_of(name)?.0)
    }

    /// The tensor that a matrix lies in, and its first row there.
    fn place_of(&self, name: &str) -> Result<(&TensorInfo, usize), ModelError> {
        Ok(self.file.header.place_of(name, &self.shape)?)
    }

    /// Rows `start..start + n` of a matrix as the file has them, into `buf`.
    pub(crate) fn read_rows(
        &self,
        name: &str,
        start: usize,
        row_bytes: usize,
        buf: &mut [u8],
    ) -> Result<(), ModelError> {
        go_on(self.progress)?;
        let (info, first) = self.place_of(name)?;
        self.file.read_range(info, ((first + start) * row_bytes) as u64, buf)?;
        self.progress.loaded(buf.len() as u64);
        Ok(())
    }

    /// Where a matrix begins, for whoever reads its rows later: compared with the file's checksum now, where there is one.
    pub(crate) fn verified(&self, name: &str) -> Result<(Arc<dyn ReadAt>, u64), ModelError> {
        const CHUNK: u64 = 4 << 20;
        let (info, _) = self.place_of(name)?;
        if !self.file.checksums().of(&info.name).is_empty() {
            let mut bytes = vec![0; CHUNK.min(info.n_bytes) as usize];
            for start in (0..info.n_bytes).step_by(CHUNK as usize) {
                go_on(self.progress)?;
                let len = CHUNK.min(info.n_bytes - start) as usize;
                self.file.read_range(info, start, &mut bytes[..len])?;
            }
        }
        Ok((Arc::clone(&self.file.source), info.offset))
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
        let ty = self.weight_type(name)?;
        let blocks = || ModelError::Blocks { name: name.to_owned(), ty: ty.name(), n_in: cols };
        let row_bytes = ty.row_bytes(cols).ok_or_else(blocks)?;
        let mut bytes = vec![0; rows * row_bytes];
        self.read_rows(name, 0, row_bytes, &mut bytes)?;
        Ok(dequantize(ty, &bytes, rows, cols))
    }

    /// Gate and up (`n_ff × n_embd`) and down (`n_embd × n_ff`) of one expert in f32, row by row.
    pub(crate) fn expert_f32(&self, layer: usize, expert: usize) -> Result<[Vec<f32>; 3], ModelError> {
        let format = &self.formats[layer];
        let canonical = self.expert_canonical(layer, expert)?;
        Ok(Matrix::ALL.map(|matrix| {
            let (rows, columns) = format.shape(matrix);
            dequantize(format.type_of(matrix), &canonical[matrix as usize], rows, columns)
        }))
    }

    /// Gate, up and down of one expert as a file in the default layout has them: rows of blocks.
    pub(crate) fn expert_canonical(&self, layer: usize, expert: usize) -> Result<[Vec<u8>; 3], ModelError> {
        let format = &self.formats[layer];
        // Whole, so that it can be compared with its checksum.
        let packed = match self.experts.record(layer, expert) {
            None => None,
            Some(record) => {
                go_on(self.progress)?;
                let info = find(self.file, &tensor_names::packed(layer))?;
                let mut packed = vec![0; record.len as usize];
                self.file.read_range(info, record.offset - info.offset, &mut packed)?;
                Some(packed)
            }
        };
        let matrix = |matrix: Matrix| {
            go_on(self.progress)?;
            let mut canonical = vec![0; format.canonical_bytes(matrix)];
            match &packed {
                None => {
                    let info = find(self.file, &tensor_names::stacked(layer, matrix))?;
                    let start = self.experts.matrix(layer, expert, matrix).offset - info.offset;
                    self.file.read_range(info, start, &mut canonical)?;
                }
                Some(packed) => format.unpack(matrix, &packed[format.region(matrix)], &mut canonical),
            }
            Ok::<_, ModelError>(canonical)
        };
        Ok([matrix(Matrix::Gate)?, matrix(Matrix::Up)?, matrix(Matrix::Down)?])
    }
}

/// Whether the file has an LM head that is not, byte for byte, its embedding.
fn has_head_of_its_own(file: &GgufFile, progress: &dyn LoadProgress) -> Result<bool, ModelError> {
    const CHUNK: usize = 1 << 20;
    let (Some(head), Some(embedding)) = (file.header.tensor(OUTPUT), file.header.tensor(TOKEN_EMBD)) else {
        return Ok(file.header.tensor(OUTPUT).is_some());
    };
    if (head.ty, head.n_bytes) != (embedding.ty, embedding.n_bytes) {
        return Ok(true);
    }
    let mut chunks = [vec![0; CHUNK], vec![0; CHUNK]];
    for start in (0..head.n_bytes).step_by(CHUNK) {
        go_on(progress)?;
        let len = (head.n_bytes - start).min(CHUNK as u64) as usize;
        for (tensor, chunk) in [head, embedding].into_iter().zip(&mut chunks) {
            // Compared with checksums when it is loaded.
            file.read_unchecked(tensor, start, &mut chunk[..len])?;
        }
        if chunks[0][..len] != chunks[1][..len] {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether more may be read.
fn go_on(progress: &dyn LoadProgress) -> Result<(), ModelError> {
    match progress.reading() {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(ModelError::Cancelled),
    }
}

fn find<'a>(file: &'a GgufFile, name: &str) -> Result<&'a TensorInfo, ModelError> {
    file.header.tensor(name).ok_or_else(|| ModelError::MissingTensor { name: name.to_owned() })
}

fn weight_type(info: &TensorInfo) -> Result<WeightType, ModelError> {
    computed(info.ty, || info.name.clone())
}

/// A type as one that is computed with, or the error that names the tensor.
fn computed(ty: GgmlType, name: impl FnOnce() -> String) -> Result<WeightType, ModelError> {
    WeightType::try_from(ty).map_err(|UnsupportedType(got)| ModelError::TensorType {
        name: name(),
        got: got.to_string(),
        expected: WeightType::names(),
    })
}

/// How the experts of a layer lie in cache slots.
fn expert_format(experts: &ExpertIndex, layer: usize, config: &ModelShape) -> Result<ExpertFormat, ModelError> {
    let types = experts.types(layer);
    let [gate, up, down] =
        Matrix::ALL.map(|matrix| computed(types[matrix as usize], || tensor_names::stacked(layer, matrix)));
    ExpertFormat::with_types([gate?, up?, down?], config.n_embd, config.n_ff).map_err(|cause| ModelError::BadKey {
        key: "smallthinker.expert_feed_forward_length".into(),
        got: config.n_ff.to_string(),
        expected: cause.to_string(),
    })
}

fn dequantize(ty: WeightType, bytes: &[u8], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; rows * cols];
    dequantize_row(ty, bytes, &mut out);
    out
}
