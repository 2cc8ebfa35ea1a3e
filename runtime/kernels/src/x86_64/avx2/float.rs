//! Floats: two vectors are the 16 lanes that the definition of every sum speaks of.

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::math::{LANES, reduce_add};
use crate::weight_type::WeightType;

#[inline]
#[target_feature(enable = "avx2")]
fn lanes(v: [__m256; 2]) -> [f32; LANES] {
    let mut lanes = [0f32; LANES];
    // SAFETY: 16 floats.
    unsafe {
        _mm256_storeu_ps(lanes.as_mut_ptr(), v[0]);
        _mm256_storeu_ps(lanes.as_mut_ptr().add(8), v[1]);
    }
    lanes
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dots(ty: WeightType, rows: &[u8], x: &[f32], out: &mut [f32]) {
    for (row, out) in rows.chunks_exact(x.len() * ty.block_bytes()).zip(out) {
        *out = match ty {
            WeightType::F16 => dot_of::<2>(
                row,
                x,
                // SAFETY: 16 bytes.
                |w| unsafe { _mm256_cvtph_ps(_mm_loadu_si128(w.as_ptr().cast())) },
                |w| f16::from_le_bytes([w[0], w[1]]).to_f32(),
            ),
            WeightType::BF16 => dot_of::<2>(
                row,
                x,
                // SAFETY: 16 bytes.
                |w| unsafe {
                    let w = _mm256_cvtepu16_epi32(_mm_loadu_si128(w.as_ptr().cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w))
                },
                |w| bf16::from_le_bytes([w[0], w[1]]).to_f32(),
            ),
            _ => dot_of::<4>(
                row,
                x,
                // SAFETY: 32 bytes.
                |w| unsafe { _mm256_loadu_ps(w.as_ptr().cast()) },
                |w| f32::from_le_bytes([w[0], w[1], w[2], w[3]]),
            ),
        };
    }
}

/// One row of values of `BYTES` bytes; `load` reads 8 of them, `one` a single one.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_of<const BYTES: usize>(
    row: &[u8],
    x: &[f32],
    load: impl Fn(&[u8]) -> __m256,
    one: impl Fn(&[u8]) -> f32,
) -> f32 {
    let mut acc = [_mm256_setzero_ps(); 2];
    let whole = x.len() / LANES * LANES;
    for (w, x) in row.chunks_exact(LANES * BYTES).zip(x.chunks_exact(LANES)) {
        let (w0, w1) = w.split_at(8 * BYTES);
        // SAFETY: 16 floats.
        let (x0, x1) = unsafe { (_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))) };
        acc[0] = _mm256_fmadd_ps(load(w0), x0, acc[0]);
        acc[1] = _mm256_fmadd_ps(load(w1), x1, acc[1]);
    }
    let mut lanes = lanes(acc);
    let rest = row[whole * BYTES..].chunks_exact(BYTES).zip(&x[whole..]);
    for (lane, (w, &x)) in lanes.iter_mut().zip(rest) {
        *lane = one(w).mul_add(x, *lane);
    }
    reduce_add(&lanes)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mut lanes = [0f32; LANES];
    for x in x.chunks(LANES) {
        for (lane, &v) in lanes.iter_mut().zip(x) {
            *lane = v.mul_add(v, *lane);
        }
    }
    let scale = 1.0 / (reduce_add(&lanes) / x.len() as f32 + eps).sqrt();
    for ((o, &v), &w) in out.iter_mut().zip(x).zip(weight) {
        *o = v * scale * w;
    }
}
