//! Opening an input: whether it is a checkpoint or a GGUF file, and which of two equal matrices is left out.

use std::ops::Range;
use std::path::Path;

use st_kernels::WeightType;

use crate::error::ConvertError;
use crate::input::Input;
use crate::tensor_map::Tensor;
use crate::{checkpoint, gguf_input};

impl Input {
    /// Opens a checkpoint folder, or a GGUF file of types that are computed with.
    ///
    /// # Errors
    /// Everything that is wrong with the input short of its weights' values; see [`ConvertError`].
    pub fn open(path: &Path) -> Result<Self, ConvertError> {
        let metadata = std::fs::metadata(path).map_err(|source| ConvertError::Io { path: path.into(), source })?;
        let mut input = if metadata.is_dir() { checkpoint::open(path) } else { gguf_input::open(path) }?;
        input.drop_equal_head();
        Ok(input)
    }

    /// Opens a checkpoint folder whose weights are not all there, so that none is read: whether the LM head is the embedding
    /// is known to the caller.
    pub(crate) fn open_unread(path: &Path, head_is_embedding: bool) -> Result<Self, ConvertError> {
        let mut input = checkpoint::open(path)?;
        if head_is_embedding {
            input.tensors.remove(&(Tensor::Output, 0, 0));
        }
        Ok(input)
    }

    /// Leaves out an LM head that is the embedding once more, byte for byte: one copy computes the same.
    fn drop_equal_head(&mut self) {
        let matrix =
            |tensor| self.tensors.get(&(tensor, 0, 0)).map(|source| (source.ty, source.file, source.range.clone()));
        let (Some(embedding), Some(head)) = (matrix(Tensor::TokenEmbd), matrix(Tensor::Output)) else { return };
        let bytes = |(_, file, range): &(WeightType, usize, Range<usize>)| &self.files[*file].bytes()[range.clone()];
        let equal = embedding.0 == head.0 && bytes(&embedding) == bytes(&head);
        for (_, file, range) in [&embedding, &head] {
            self.files[*file].release(range.clone());
        }
        if equal {
            self.tensors.remove(&(Tensor::Output, 0, 0));
        }
    }
}
