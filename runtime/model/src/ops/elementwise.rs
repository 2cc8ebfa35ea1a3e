//! RMS norm, rotary positions, and the residual add.

use candle_core::Tensor;

use super::{Compute, in_place, slice_mut};
use crate::batch::Run;
use crate::error::ModelError;
use crate::router::Routing;
use st_format::ModelShape;

/// Rows that one task takes: enough to outweigh handing it out.
const ROWS: usize = 16;

/// `x / sqrt(mean(x²) + eps) * weight`, row by row.
#[derive(Debug)]
pub(crate) struct RmsNorm {
    /// `[n_embd]`.
    pub(crate) weight: Vec<f32>,
    pub(crate) eps: f32,
}

impl RmsNorm {
    /// Writes the norm of `x` to `out`; both `[tokens, n_embd]`.
    pub(crate) fn forward(&self, cx: &Compute, x: &Tensor, out: &Tensor) -> Result<(), ModelError> {
        let width = self.weight.len();
        in_place("rms-norm", out, x, |out, x| {
            cx.pool.run_chunks(out, ROWS * width, &|chunk, out| {
                for (i, out) in out.chunks_exact_mut(width).enumerate() {
                    self.row(cx, &x[(chunk * ROWS + i) * width..][..width], out);
                }
            });
            Ok(())
        })
    }

    /// The norm of one row.
    pub(crate) fn row(&self, cx: &Compute, x: &[f32], out: &mut [f32]) {
        cx.kernels.rms_norm(x, &self.weight, self.eps, out);
    }
}

/// Adds `delta` to `x`; both `[tokens, n_embd]`.
pub(crate) fn add(cx: &Compute, x: &Tensor, delta: &Tensor) -> Result<(), ModelError> {
    let chunk = ROWS * x.dim(1)?;
    in_place("add", x, delta, |x, delta| {
        cx.pool.run_chunks(x, chunk, &|i, x| {
            for (x, delta) in x.iter_mut().zip(&delta[i * chunk..]) {
                *x += delta;
            }
        });
        Ok(())
    })
}

/// Adds the weighted parts of the chosen experts to `x` (`[rows, n_embd]`), rank after rank: for each row and rank, row
/// `pair_of[row * n_used + rank]` of `parts` (`[pairs, n_embd]`).
pub(crate) fn add_experts(
    cx: &Compute,
    x: &Tensor,
    parts: &[f32],
    pair_of: &[usize],
    routing: &Routing,
) -> Result<(), ModelError> {
    Ok(x.inplace_op1(&AddExperts { cx, parts, pair_of, routing })?)
}

struct AddExperts<'a> {
    cx: &'a Compute,
    parts: &'a [f32],
    pair_of: &'a [usize],
    routing: &'a Routing,
}

impl candle_core::InplaceOp1 for AddExperts<'_> {
    fn name(&self) -> &'static str {
        "add-experts"
    }

    fn cpu_fwd(&self, x: &mut candle_core::CpuStorage, layout: &candle_core::Layout) -> candle_core::Result<()> {
        let x = slice_mut(x, layout)?;
        let (n_tokens, n_used) = (self.routing.n_tokens(), self.routing.n_used());
        let width = x.len() / n_tokens;
        self.cx.pool.run_chunks(x, ROWS * width, &|chunk, x| {
            for (i, x) in x.chunks_exact_mut(width).enumerate() {
                for rank in 0..n_used {
                    let at = (chunk * ROWS + i) * n_used + rank;
                    let part = self.pair_of[at];
                    let weight = self.routing.weights()[at];
                    self.cx.kernels.add_scaled(x, weight, &self.parts[part * width..(part + 1) * width]);
                }
            }
        });
        Ok(())
    }
}

/// Rotary positions, rotate-half: a head `[a, b]` becomes `[a cos - b sin, b cos + a sin]`, with the angle
/// `position * theta^(-2i / head_dim)` for element `i` of a half. Angles are computed once for a batch.
#[derive(Debug)]
pub(crate) struct Rope {
    head_dim: usize,
    /// Heads to rotate: those of the queries and of the keys.
    n_heads: usize,
    /// Width of a row of queries, keys and values.
    width: usize,
    inv_freq: Vec<f32>,
    /// Cosines of the batch; `[tokens, head_dim / 2]`.
    cos: Vec<f32>,
    /// Sines of the batch; `[tokens, head_dim / 2]`.
    sin: Vec<f32>,
}

impl Rope {
    pub(crate) fn new(config: &ModelShape) -> Self {
        let dim = config.head_dim;
        Self {
            head_dim: dim,
            n_heads: config.n_heads + config.n_kv_heads,
            width: config.q_dim() + 2 * config.kv_dim(),
            inv_freq: (0..dim / 2).map(|i| 1.0 / config.rope_theta.powf((2 * i) as f32 / dim as f32)).collect(),
            cos: Vec::new(),
            sin: Vec::new(),
        }
    }

    /// Computes the angles of the rows of `runs`.
    pub(crate) fn prepare(&mut self, runs: &[Run]) {
        self.cos.clear();
        self.sin.clear();
        for position in runs.iter().flat_map(|run| run.position..run.position + run.rows.len()) {
            for frequency in &self.inv_freq {
                let (sin, cos) = (position as f32 * frequency).sin_cos();
                self.cos.push(cos);
                self.sin.push(sin);
            }
        }
    }

    /// Rotates the queries and keys of `[tokens, q_dim + 2 * kv_dim]`, for which [`Rope::prepare`] was called.
    pub(crate) fn forward(&self, cx: &Compute, qkv: &Tensor) -> Result<(), ModelError> {
        Ok(qkv.inplace_op1(&Rotate { rope: self, cx })?)
    }
}

struct Rotate<'a> {
    rope: &'a Rope,
    cx: &'a Compute,
}

impl candle_core::InplaceOp1 for Rotate<'_> {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, qkv: &mut candle_core::CpuStorage, layout: &candle_core::Layout) -> candle_core::Result<()> {
        let (width, half) = (self.rope.width, self.rope.head_dim / 2);
        self.cx.pool.run_chunks(slice_mut(qkv, layout)?, ROWS * width, &|chunk, rows| {
            for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                let angles = (chunk * ROWS + i) * half..(chunk * ROWS + i + 1) * half;
                let (cos, sin) = (&self.rope.cos[angles.clone()], &self.rope.sin[angles]);
                self.cx.kernels.rope(&mut row[..self.rope.n_heads * self.rope.head_dim], cos, sin);
            }
        });
        Ok(())
    }
}
