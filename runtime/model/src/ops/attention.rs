//! Attention over the KV cache: store the new positions, then gather what each query sees.

use candle_core::Tensor;
use st_kernels::{kv_chunks, partial_len, visible_range};

use super::{Compute, in_place};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::kv_cache::LayerKv;

/// Tokens of a batch that one task takes.
const TASK_TOKENS: usize = 8;

/// Buffers that attention needs besides its operands.
#[derive(Debug, Default)]
pub(crate) struct AttentionScratch {
    /// What each chunk of positions adds to the output of one token; `[n_kv_heads, chunks, partial_len]`.
    partials: Vec<f32>,
}

/// Attention of one layer for the tokens from `position` on.
pub(crate) struct Attention<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) position: usize,
    pub(crate) kv: &'a mut LayerKv,
}

impl Attention<'_> {
    /// `qkv` is `[tokens, q_dim + 2 * kv_dim]`, `out` is `[tokens, q_dim]`.
    pub(crate) fn forward(
        self,
        cx: &Compute,
        scratch: &mut AttentionScratch,
        qkv: &Tensor,
        out: &Tensor,
    ) -> Result<(), ModelError> {
        let state = std::cell::RefCell::new((self, scratch));
        in_place("attention", out, qkv, |out, qkv| {
            let (this, scratch) = &mut *state.borrow_mut();
            let width = this.width();
            this.kv.write(&cx.pool, this.position, qkv, width);
            match qkv.len() / width {
                1 => this.one(cx, scratch, qkv, out),
                _ => this.many(cx, qkv, out),
            }
            Ok(())
        })
    }

    fn width(&self) -> usize {
        self.config.q_dim() + 2 * self.config.kv_dim()
    }

    fn scale(&self) -> f32 {
        1.0 / (self.config.head_dim as f32).sqrt()
    }

    /// One token: threads share the positions that it sees.
    fn one(&self, cx: &Compute, scratch: &mut AttentionScratch, qkv: &[f32], out: &mut [f32]) {
        let (c, buffer) = (self.config, self.kv.buffer());
        let group = c.n_heads / c.n_kv_heads * c.head_dim;
        let visible = visible_range(self.position, self.kv.window());
        let chunks = kv_chunks(&visible);
        let len = partial_len(c.n_heads / c.n_kv_heads, c.head_dim);
        let needed = c.n_kv_heads * chunks.len() * len;
        if scratch.partials.len() < needed {
            scratch.partials.resize(needed.next_power_of_two(), 0.0);
        }
        let partials = &mut scratch.partials[..needed];
        cx.pool.run_chunks(partials, len, &|i, partial| {
            let (head, chunk) = (i / chunks.len(), chunks.start + i % chunks.len());
            let q = &qkv[head * group..(head + 1) * group];
            cx.kernels.attend_chunk(buffer, head, q, visible.clone(), chunk, self.scale(), partial);
        });
        for (partials, out) in partials.chunks_exact(chunks.len() * len).zip(out.chunks_exact_mut(group)) {
            cx.kernels.attend_merge(partials, c.head_dim, out);
        }
    }

    /// A batch: threads share tokens and KV heads.
    fn many(&self, cx: &Compute, qkv: &[f32], out: &mut [f32]) {
        let (c, buffer) = (self.config, self.kv.buffer());
        let (q_dim, width) = (c.q_dim(), self.width());
        let group = c.n_heads / c.n_kv_heads * c.head_dim;
        cx.pool.run_tiles(out, q_dim, TASK_TOKENS, group, &|mut out| {
            let head = out.columns().start / group;
            let window = self.kv.window();
            cx.kernels.attend_batch(buffer, head, qkv, width, self.position, window, self.scale(), &mut out);
        });
    }
}
