//! The embedding: one row for each token, out of memory or out of the file.
//!
//! A token needs one row of it, a few KB of some hundred MB. So where experts are read again and again, and the head does not
//! need the same rows, they stay in the file and experts have the memory.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use st_gguf::ReadAt;
use st_kernels::{WeightType, dequantize_row};

use super::linear::check_finite;
use super::{Compute, Linear, expect};
use crate::activations::Rows;
use crate::error::ModelError;
use crate::weights::{TOKEN_EMBD, TensorSource};

/// Where a model's embedding is.
pub(crate) enum Embedding {
    /// In memory, as a matrix that can be the head, too.
    Memory(Linear),
    /// In the file.
    File(FileRows),
}

/// Rows that are read when they are wanted.
pub(crate) struct FileRows {
    source: Arc<dyn ReadAt>,
    ty: WeightType,
    row_bytes: usize,
    /// Of the first row.
    offset: u64,
    /// A row as the file has it.
    buffer: Mutex<Vec<u8>>,
}

impl fmt::Debug for FileRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileRows").field("ty", &self.ty).field("offset", &self.offset).finish_non_exhaustive()
    }
}

impl Embedding {
    /// The embedding of `source`; in the file where `in_file` says so, compared with the file's checksum all the same.
    ///
    /// # Errors
    /// Where it cannot be read, or its rows are not whole blocks.
    pub(crate) fn load(
        source: &TensorSource<'_>,
        cx: &Compute,
        n_embd: usize,
        in_file: bool,
    ) -> Result<Self, ModelError> {
        if !in_file {
            let name = TOKEN_EMBD.to_owned();
            return Ok(Self::Memory(Linear::load(source, cx, &[(name, source.n_vocab())], n_embd)?));
        }
        let ty = source.weight_type(TOKEN_EMBD)?;
        let blocks = || ModelError::Blocks { name: TOKEN_EMBD.into(), ty: ty.name(), n_in: n_embd };
        let row_bytes = ty.row_bytes(n_embd).ok_or_else(blocks)?;
        let (file, offset) = source.verified(TOKEN_EMBD)?;
        Ok(Self::File(FileRows { source: file, ty, row_bytes, offset, buffer: Mutex::new(vec![0; row_bytes]) }))
    }

    /// The whole matrix, where it is in memory.
    pub(crate) fn matrix(&self) -> Option<&Linear> {
        if let Self::Memory(matrix) = self { Some(matrix) } else { None }
    }

    /// Writes the rows of `tokens` to `x` (`[tokens, n_embd]`).
    ///
    /// # Errors
    /// What reading meets.
    pub(crate) fn forward(&self, tokens: &[u32], x: &mut Rows) -> Result<(), ModelError> {
        match self {
            Self::Memory(matrix) => {
                let row = |token, row: &mut [f32]| {
                    matrix.row_f32(token, row);
                    Ok(())
                };
                embed(row, tokens, x)
            }
            Self::File(rows) => embed(|token, row| rows.row_f32(token, row), tokens, x),
        }
    }
}

impl FileRows {
    /// Row `row` in f32.
    fn row_f32(&self, row: usize, out: &mut [f32]) -> Result<(), ModelError> {
        let mut bytes = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let offset = self.offset + (row * self.row_bytes) as u64;
        let unread = |cause| ModelError::Row { tensor: TOKEN_EMBD, offset, cause };
        self.source.read_exact_at(&mut bytes, offset).map_err(unread)?;
        check_finite(self.ty, TOKEN_EMBD, &bytes)?;
        dequantize_row(self.ty, &bytes, out);
        Ok(())
    }
}

/// Rows of an embedding by token, as `row` gives them, into `x` (`[rows, n_embd]`).
pub(crate) fn embed(
    row: impl Fn(usize, &mut [f32]) -> Result<(), ModelError>,
    tokens: &[u32],
    x: &mut Rows,
) -> Result<(), ModelError> {
    let width = x.dims().1;
    expect("embed", x, (tokens.len(), width))?;
    let rows = x.values_mut()?.chunks_exact_mut(width);
    tokens.iter().zip(rows).try_for_each(|(&token, x)| row(token as usize, x))
}
