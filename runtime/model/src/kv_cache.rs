//! Keys and values of the positions that later tokens can still see.
//!
//! Owns how many positions a layer keeps: one that attends to everything has room for the whole context, a window layer
//! is a ring of the window and one batch. Where a position lies in memory is the kernels' matter ([`KvBuffer`]).

use st_kernels::{KV_CHUNK, KvBuffer, KvType, Pool};

use crate::config::ModelConfig;

/// Keys and values of one layer.
#[derive(Debug)]
pub(crate) struct LayerKv {
    buffer: KvBuffer,
    window: Option<usize>,
    /// One past the furthest position stored since [`Self::forget`].
    end: usize,
}

impl LayerKv {
    /// Room for `ctx` positions, or for a window and a batch where the layer slides.
    pub(crate) fn new(config: &ModelConfig, layer: usize, ty: KvType, ctx: usize, batch: usize) -> Self {
        let positions = Self::positions(config, layer, ctx, batch);
        let buffer = KvBuffer::new(ty, config.n_kv_heads, config.head_dim, positions);
        Self { buffer, window: config.windows[layer], end: 0 }
    }

    /// Positions that the layer needs room for.
    pub(crate) fn positions(config: &ModelConfig, layer: usize, ctx: usize, batch: usize) -> usize {
        match config.windows[layer] {
            Some(window) => ctx.min(window.saturating_add(batch)),
            None => ctx,
        }
    }

    /// Bytes of a layer that keeps `positions`.
    pub(crate) fn bytes(config: &ModelConfig, ty: KvType, positions: usize) -> u64 {
        let bytes = KvBuffer::bytes_for(ty, config.n_kv_heads, config.head_dim, positions);
        bytes.map_or(u64::MAX, |bytes| bytes as u64)
    }

    /// Stores the positions from `position` on; each row of `width` floats ends with the keys and the values of one, `n_kv_heads *
    /// head_dim` each.
    pub(crate) fn write(&mut self, pool: &Pool, position: usize, rows: &[f32], width: usize) {
        self.buffer.write_rows(pool, position, rows, width);
        self.end = self.end.max(position + rows.len() / width);
    }

    /// Begins anew: what is stored will not be read again.
    pub(crate) fn forget(&mut self) {
        self.end = 0;
    }

    /// What the kernels read.
    pub(crate) fn buffer(&self) -> &KvBuffer {
        &self.buffer
    }

    /// Positions that a token sees, itself included; `None` where it sees all before it.
    pub(crate) fn window(&self) -> Option<usize> {
        self.window
    }

    /// The fewest positions that a conversation can be cut to: what a ring has overwritten does not come back, even where
    /// the conversation was cut since.
    pub(crate) fn shortest_cut(&self) -> usize {
        match self.window {
            Some(window) if self.end > self.buffer.capacity() => self.end - self.buffer.capacity() + window - 1,
            _ => 0,
        }
    }
}

/// Positions are allocated in multiples of this.
pub(crate) const POSITION_STEP: usize = KV_CHUNK;
