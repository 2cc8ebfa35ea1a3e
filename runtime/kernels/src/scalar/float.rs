//! Floating-point kernels. Sums run in 16 lanes (element `i` in lane `i % 16`), fused, and end with [`reduce_add`].

use std::ops::Range;

use half::{bf16, f16};

use crate::kv::{KV_CHUNK, KV_TILE, KvType, key_at, value_at};
use crate::math::{LANES, exp, reduce_add, round_bf16, scale_and_max};
use crate::table::SoftmaxState;
use crate::weight_type::WeightType;

#[inline]
fn lanes_dot(w: impl Fn(usize) -> f32, x: &[f32]) -> f32 {
    let mut acc = [0f32; LANES];
    for (c, x) in x.chunks(LANES).enumerate() {
        for (lane, (acc, &x)) in acc.iter_mut().zip(x).enumerate() {
            *acc = w(c * LANES + lane).mul_add(x, *acc);
        }
    }
    reduce_add(&acc)
}

pub(crate) fn dots(ty: WeightType, rows: &[u8], x: &[f32], out: &mut [f32]) {
    let row_bytes = x.len() * ty.block_bytes();
    for (row, out) in rows.chunks_exact(row_bytes).zip(out) {
        *out = match ty {
            WeightType::F16 => lanes_dot(|i| f16::from_le_bytes([row[i * 2], row[i * 2 + 1]]).to_f32(), x),
            WeightType::BF16 => lanes_dot(|i| bf16::from_le_bytes([row[i * 2], row[i * 2 + 1]]).to_f32(), x),
            _ => lanes_dot(|i| f32::from_le_bytes([row[i * 4], row[i * 4 + 1], row[i * 4 + 2], row[i * 4 + 3]]), x),
        };
    }
}

pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let squares = lanes_dot(|i| x[i], x);
    let scale = 1.0 / (squares / x.len() as f32 + eps).sqrt();
    for ((o, &v), &w) in out.iter_mut().zip(x).zip(weight) {
        *o = v * scale * w;
    }
}

pub(crate) fn scores(ty: KvType, dim: usize, keys: &[u8], tiles: Range<usize>, q: &[f32], out: &mut [f32]) {
    for (q, out) in q.chunks_exact(dim).zip(out.chunks_exact_mut(KV_CHUNK)) {
        let positions = tiles.start * KV_TILE..tiles.end * KV_TILE;
        for (p, out) in positions.clone().zip(&mut out[positions]) {
            *out = 0.0;
            for (i, &q) in q.iter().enumerate() {
                *out = key_at(ty, keys, dim, p, i).mul_add(q, *out);
            }
        }
    }
}

#[inline(always)]
pub(crate) fn softmax(
    ty: KvType,
    s: &mut [f32],
    tiles: Range<usize>,
    visible: Range<usize>,
    scale: f32,
) -> SoftmaxState {
    let max = scale_and_max(&mut s[visible.clone()], scale);
    let seen = tiles.start * KV_TILE..tiles.end * KV_TILE;
    s[seen.start..visible.start].fill(f32::NEG_INFINITY);
    s[visible.end..seen.end].fill(f32::NEG_INFINITY);
    let mut sum = [0f32; LANES];
    for lanes in s[seen].as_chunks_mut::<LANES>().0 {
        for (s, sum) in lanes.iter_mut().zip(&mut sum) {
            let e = exp(*s - max);
            *s = if ty == KvType::Bf16 { round_bf16(e) } else { e };
            *sum += *s;
        }
    }
    SoftmaxState { max, sum: reduce_add(&sum) }
}

pub(crate) fn values(ty: KvType, dim: usize, values: &[u8], positions: Range<usize>, p: &[f32], acc: &mut [f32]) {
    for (p, acc) in p.chunks_exact(KV_CHUNK).zip(acc.chunks_exact_mut(dim)) {
        acc.fill(0.0);
        for j in positions.clone() {
            for (i, acc) in acc.iter_mut().enumerate() {
                *acc = value_at(ty, values, j, i).mul_add(p[j], *acc);
            }
        }
    }
}

#[inline(always)]
pub(crate) fn merge(state: SoftmaxState, acc: &mut [f32], part: SoftmaxState, values: &[f32]) -> SoftmaxState {
    let max = state.max.max(part.max);
    let (a, b) = (exp(state.max - max), exp(part.max - max));
    for (acc, &v) in acc.iter_mut().zip(values) {
        *acc = acc.mul_add(a, v * b);
    }
    SoftmaxState { max, sum: state.sum * a + part.sum * b }
}
