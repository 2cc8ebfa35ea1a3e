//! RMS norm, rotary positions, and the residual add.

use st_format::ModelShape;

use super::{Compute, expect, operands};
use crate::activations::Rows;
use crate::batch::Run;
use crate::error::ModelError;
use crate::router::Routing;

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
    /// Writes the norm of `x` to `out`; both `[rows, n_embd]`.
    pub(crate) fn forward(&self, cx: &Compute, x: &Rows, out: &mut Rows) -> Result<(), ModelError> {
        let width = self.weight.len();
        let (x, out) = operands("rms-norm", x, width, out, width)?;
        cx.pool.run_chunks(out, ROWS * width, &|chunk, out| {
            for (i, out) in out.chunks_exact_mut(width).enumerate() {
                self.row(cx, &x[(chunk * ROWS + i) * width..][..width], out);
            }
        });
        Ok(())
    }

    /// The norm of one row.
    pub(crate) fn row(&self, cx: &Compute, x: &[f32], out: &mut [f32]) {
        cx.kernels.rms_norm(x, &self.weight, self.eps, out);
    }
}

/// Adds `delta` to `x`; both `[rows, n_embd]`.
pub(crate) fn add(cx: &Compute, x: &mut Rows, delta: &Rows) -> Result<(), ModelError> {
    let width = x.dims().1;
    let (delta, x) = operands("add", delta, width, x, width)?;
    let chunk = ROWS * width;
    cx.pool.run_chunks(x, chunk, &|i, x| {
        for (x, delta) in x.iter_mut().zip(&delta[i * chunk..]) {
            *x += delta;
        }
    });
    Ok(())
}

/// Adds the weighted parts of the chosen experts to `x` (`[rows, n_embd]`), rank after rank: for each row and rank, row
/// `pair_of[row * n_used + rank]` of `parts` (`[pairs, n_embd]`).
pub(crate) fn add_experts(
    cx: &Compute,
    x: &mut Rows,
    parts: &[f32],
    pair_of: &[usize],
    routing: &Routing,
) -> Result<(), ModelError> {
    let (n_used, width) = (routing.n_used(), x.dims().1);
    expect("add-experts", x, (routing.n_tokens(), width))?;
    cx.pool.run_chunks(x.values_mut()?, ROWS * width, &|chunk, x| {
        for (i, x) in x.chunks_exact_mut(width).enumerate() {
            for rank in 0..n_used {
                let at = (chunk * ROWS + i) * n_used + rank;
                let part = pair_of[at];
                cx.kernels.add_scaled(x, routing.weights()[at], &parts[part * width..(part + 1) * width]);
            }
        }
    });
    Ok(())
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
    /// Cosines of the batch; `[rows, head_dim / 2]`.
    cos: Vec<f32>,
    /// Sines of the batch; `[rows, head_dim / 2]`.
    sin: Vec<f32>,
}

impl Rope {
    pub(crate) fn new(config: &ModelShape) -> Self {
        let dim = config.head_dim;
        Self {
            head_dim: dim,
            n_heads: config.n_heads + config.n_kv_heads,
            width: config.q_dim() + 2 * config.kv_dim(),
            inv_freq: (0..dim / 2).map(|i| 1.0 / power(config.rope_theta, (2 * i) as f32 / dim as f32)).collect(),
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
                let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
                self.cos.push(cos as f32);
                self.sin.push(sin as f32);
            }
        }
    }

    /// Rotates the queries and keys of `[rows, q_dim + 2 * kv_dim]`, for which [`Rope::prepare`] was called.
    pub(crate) fn forward(&self, cx: &Compute, qkv: &mut Rows) -> Result<(), ModelError> {
        let (width, half) = (self.width, self.head_dim / 2);
        expect("rope", qkv, (self.cos.len() / half, width))?;
        cx.pool.run_chunks(qkv.values_mut()?, ROWS * width, &|chunk, rows| {
            for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                let angles = (chunk * ROWS + i) * half..(chunk * ROWS + i + 1) * half;
                let (cos, sin) = (&self.cos[angles.clone()], &self.sin[angles]);
                cx.kernels.rope(&mut row[..self.n_heads * self.head_dim], cos, sin);
            }
        });
        Ok(())
    }
}

/// Computed in 64 bits, as the angles' sines are, so that what mathematical libraries differ by is rounded away.
fn power(base: f32, exponent: f32) -> f32 {
    f64::from(base).powf(f64::from(exponent)) as f32
}
