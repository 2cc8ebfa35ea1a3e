//! What the pages of a model have in common: types, chunks and tiles.

use crate::weight_type::BLOCK_LEN;

/// Positions per chunk. Partial sums of attention are formed per chunk at absolute boundaries, so that their bits do not
/// depend on how the work is split.
pub const KV_CHUNK: usize = 256;
/// Positions per key tile.
pub(crate) const KV_TILE: usize = 16;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum KvType {
    /// 2 bytes per value, with the range of f32 and 8 significant bits. Queries and weights of the softmax are rounded alike, as
    /// the published code does when it runs in its own type; sums are f32.
    #[default]
    Bf16,
    /// 2 bytes per value.
    F16,
    /// 34 bytes per 32 values, blocks along the head dimension.
    Q8_0,
    /// 4 bytes per value.
    F32,
}

impl KvType {
    /// Bytes of `values` values, a multiple of 32.
    pub(crate) fn bytes(self, values: usize) -> usize {
        match self {
            Self::Bf16 | Self::F16 => values * 2,
            Self::Q8_0 => values / 32 * 34,
            Self::F32 => values * 4,
        }
    }
}

/// What the pages of a model have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvFormat {
    pub(super) ty: KvType,
    pub(super) n_heads: usize,
    pub(super) head_dim: usize,
}

impl KvFormat {
    /// Pages for `n_heads` KV heads of `head_dim` values.
    ///
    /// # Panics
    /// If a dimension is 0 or a page's size overflows.
    pub fn new(ty: KvType, n_heads: usize, head_dim: usize) -> Self {
        let padded = head_dim.checked_next_multiple_of(BLOCK_LEN);
        let values = padded.and_then(|dim| dim.checked_mul(n_heads)?.checked_mul(16 * KV_CHUNK));
        assert!(values.is_some_and(|values| values > 0), "KV pages of {n_heads} heads of {head_dim}");
        Self { ty, n_heads, head_dim }
    }

    /// How values are stored.
    pub fn ty(&self) -> KvType {
        self.ty
    }

    /// Values per head and position.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        self.n_heads * self.head_bytes()
    }

    /// Bytes of keys and values that a query reads for one position, all heads.
    pub fn bytes_per_position(&self) -> usize {
        self.page_bytes() / KV_CHUNK
    }

    pub(crate) fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(BLOCK_LEN)
    }

    /// Bytes of a head's keys and values in a page.
    pub(super) fn head_bytes(&self) -> usize {
        2 * self.ty.bytes(KV_CHUNK * self.padded_dim())
    }
}
