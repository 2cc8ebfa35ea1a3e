//! What a batch of rows flows through: candle's storage and layouts, allocated once and written in place.
//!
//! A pass owns them, so operations take storage and layout as candle's in-place operations do, without the lock of a `Tensor`
//! and the list of dimensions that it makes for each operation.

use candle_core::{CpuStorage, Error, Layout};
use st_format::ModelShape;

use crate::error::ModelError;

/// `[rows, width]` of f32.
#[derive(Debug)]
pub(crate) struct Rows {
    storage: CpuStorage,
    layout: Layout,
}

impl Rows {
    /// Room for `rows` rows of zeros.
    pub(crate) fn new(rows: usize, width: usize) -> Self {
        Self { storage: CpuStorage::F32(vec![0.0; rows * width]), layout: Layout::contiguous((rows, width)) }
    }

    /// Makes the first `rows` of the rows that there is room for all that there are.
    fn set_rows(&mut self, rows: usize) {
        if let [current, width] = *self.layout.dims()
            && current != rows
        {
            self.layout = Layout::contiguous((rows, width));
        }
    }

    /// Rows and width.
    pub(crate) fn dims(&self) -> (usize, usize) {
        match *self.layout.dims() {
            [rows, width] => (rows, width),
            // Made so in `new` and `set_rows`.
            _ => unreachable!("two dimensions"),
        }
    }

    /// The values, row by row.
    pub(crate) fn values(&self) -> Result<&[f32], ModelError> {
        Ok(self.storage.as_slice::<f32>()?.get(..self.layout.shape().elem_count()).ok_or_else(too_few)?)
    }

    /// The values, to be written.
    pub(crate) fn values_mut(&mut self) -> Result<&mut [f32], ModelError> {
        let len = self.layout.shape().elem_count();
        match &mut self.storage {
            CpuStorage::F32(values) => Ok(values.get_mut(..len).ok_or_else(too_few)?),
            _ => Err(Error::Msg("the destination is not f32".into()).into()),
        }
    }
}

fn too_few() -> Error {
    Error::Msg("a layout reaches beyond its storage".into())
}

/// Activations of a batch.
#[derive(Debug)]
pub(crate) struct Activations {
    /// The residual stream; `[rows, n_embd]`.
    pub(crate) x: Rows,
    /// What a norm makes of it; `[rows, n_embd]`.
    pub(crate) normed: Rows,
    /// Queries, keys and values side by side; `[rows, q_dim + 2 * kv_dim]`.
    pub(crate) qkv: Rows,
    /// What attention gathered; `[rows, q_dim]`.
    pub(crate) attn: Rows,
    /// What a block adds to the residual stream; `[rows, n_embd]`.
    pub(crate) delta: Rows,
    /// Router logits; `[rows, n_experts]`.
    pub(crate) router: Rows,
}

impl Activations {
    /// Room for `rows` rows.
    pub(crate) fn new(config: &ModelShape, rows: usize) -> Self {
        Self {
            x: Rows::new(rows, config.n_embd),
            normed: Rows::new(rows, config.n_embd),
            qkv: Rows::new(rows, config.q_dim() + 2 * config.kv_dim()),
            attn: Rows::new(rows, config.q_dim()),
            delta: Rows::new(rows, config.n_embd),
            router: Rows::new(rows, config.n_experts),
        }
    }

    /// Holds `rows` rows from now on, of those that there is room for.
    pub(crate) fn set_rows(&mut self, rows: usize) {
        let Self { x, normed, qkv, attn, delta, router } = self;
        [x, normed, qkv, attn, delta, router].into_iter().for_each(|buffer| buffer.set_rows(rows));
    }

    /// Bytes that one row takes.
    pub(crate) fn bytes_per_row(config: &ModelShape) -> usize {
        4 * (3 * config.n_embd + 2 * config.q_dim() + 2 * config.kv_dim() + config.n_experts)
    }
}
