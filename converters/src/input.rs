//! What a conversion reads: a model's shape, its tokenizer, and where each of its weights lies.
//!
//! A checkpoint folder and a GGUF file look the same from here on: every matrix, each expert's by itself, is a run of
//! bytes of a known type in a mapped file.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use st_gguf::{GgufFile, Metadata};
use st_kernels::WeightType;

use crate::error::ConvertError;
use crate::tensor_map::{ModelShape, Tensor, rule_of};
use st_sys::MappedFile;

/// Bytes of `n` weights of a type, which are whole blocks.
pub(crate) fn weight_bytes(ty: WeightType, n: usize) -> usize {
    n / ty.block_len() * ty.block_bytes()
}

/// One matrix or vector of an input.
#[derive(Clone, Debug)]
pub(crate) struct SourceTensor {
    /// Its name in the input, for messages.
    pub(crate) name: String,
    /// Position of its first weight in that tensor (an expert inside a stacked tensor starts later).
    pub(crate) first_weight: u64,
    /// Index of its file.
    pub(crate) file: usize,
    /// Its bytes in the file.
    pub(crate) range: Range<usize>,
    /// How they are stored.
    pub(crate) ty: WeightType,
    /// Whether rows stand for columns: down, as PowerInfer's own files have it.
    pub(crate) transposed: bool,
}

impl SourceTensor {
    /// Whether making weights of type `ty` of it rounds what was rounded to few bits before.
    pub(crate) fn is_requantized_as(&self, ty: WeightType) -> bool {
        let few_bits = self.ty.is_quantized() && self.ty != WeightType::Q8_0;
        few_bits && ty.is_quantized() && (ty != self.ty || self.transposed)
    }
}

/// Which matrix: tensor, layer, expert (0 where the scope has none).
pub(crate) type Slot = (Tensor, usize, usize);

/// A model to convert. Every tensor that its configuration calls for is present, of a known type and the right shape;
/// whether the weights are finite numbers shows when they are read.
#[derive(Debug)]
pub struct Input {
    pub(crate) path: PathBuf,
    pub(crate) shape: ModelShape,
    /// Whether the configuration says that the LM head is the embedding.
    pub(crate) tied: bool,
    /// Tokenizer and general keys to carry into the output.
    pub(crate) carried: Metadata,
    pub(crate) files: Vec<MappedFile>,
    /// The header and the checksums of a GGUF file.
    pub(crate) gguf: Option<GgufFile>,
    pub(crate) tensors: HashMap<Slot, SourceTensor>,
    pub(crate) warnings: Vec<String>,
}

impl Input {
    /// The folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's shape.
    pub fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// Whether an output has an LM head of its own. A model that is tied, but stores a head with other weights than the
    /// embedding's, is run with the embedding by transformers: its head counts only where it is to be kept.
    pub fn has_output(&self, keep_head: bool) -> bool {
        self.tensors.contains_key(&(Tensor::Output, 0, 0)) && (keep_head || !self.tied)
    }

    /// What there is to say about a head that is stored and not used, or asked for and not stored.
    pub(crate) fn head_note(&self, keep_head: bool) -> Option<String> {
        let stored = self.has_output(true);
        let note = match keep_head {
            true if !stored => "there is no LM head to keep: the model stores none that differs from the embedding",
            false if stored != self.has_output(false) => {
                "the model is tied (tie_word_embeddings), and yet lm_head.weight differs from the embedding: the \
                 embedding is the head, as in transformers; llama.cpp takes lm_head.weight"
            }
            _ => return None,
        };
        Some(note.to_owned())
    }

    /// Bytes of `source`, compared with the file's checksums where it has some.
    pub(crate) fn read(&self, source: &SourceTensor, file: usize, range: &Range<usize>) -> Result<&[u8], ConvertError> {
        let bytes = &self.files[file].bytes()[range.clone()];
        if let Some(gguf) = &self.gguf {
            let tensor = gguf.header.require_tensor(&source.name)?;
            // The header counts through all parts of a split file.
            let part = gguf.source.parts().get(file).map_or(0, |part| part.start);
            gguf.verify(tensor, part + range.start as u64 - tensor.offset, bytes)?;
        }
        Ok(bytes)
    }

    /// The matrix at a slot that the configuration calls for.
    pub(crate) fn tensor(&self, slot: Slot) -> Result<&SourceTensor, ConvertError> {
        self.tensors.get(&slot).ok_or_else(|| ConvertError::MissingTensor {
            path: self.path.clone(),
            tensor: rule_of(slot.0).hf_name(slot.1, slot.2),
        })
    }
}
