//! Floats: one vector is the 16 lanes that the definition of every sum speaks of.

use std::arch::x86_64::*;

use crate::math::{LANES, reduce_add};
use crate::weight_type::WeightType;

/// Sum of the lanes in the order of [`reduce_add`].
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn reduce(v: __m512) -> f32 {
    let mut lanes = [0f32; LANES];
    // SAFETY: 16 floats.
    unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), v) };
    reduce_add(&lanes)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
pub(super) fn dots(ty: WeightType, rows: &[u8], x: &[f32], out: &mut [f32]) {
    debug_assert!(rows.len() == out.len() * x.len() * ty.block_bytes());
    // SAFETY: one row per output, as checked by the callers.
    unsafe {
        match ty {
            WeightType::F16 => dots_of::<2>(rows, x, out, |p| load_f16(p), |p, m| load_f16_masked(p, m)),
            WeightType::BF16 => dots_of::<2>(rows, x, out, |p| load_bf16(p), |p, m| load_bf16_masked(p, m)),
            _ => dots_of::<4>(rows, x, out, |p| load_f32(p), |p, m| load_f32_masked(p, m)),
        }
    }
}

/// # Safety
/// 64 bytes at `p`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_f32(p: *const u8) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_loadu_ps(p.cast()) }
}

/// # Safety
/// 4 bytes at `p` for each lane of the mask.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_f32_masked(p: *const u8, m: __mmask16) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_maskz_loadu_ps(m, p.cast()) }
}

/// # Safety
/// 32 bytes at `p`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_f16(p: *const u8) -> __m512 {
    // SAFETY: the caller's promise.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(p.cast()) })
}

/// # Safety
/// 2 bytes at `p` for each lane of the mask.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn load_f16_masked(p: *const u8, m: __mmask16) -> __m512 {
    // SAFETY: the caller's promise.
    _mm512_cvtph_ps(unsafe { _mm256_maskz_loadu_epi16(m, p.cast()) })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn widen_bf16(v: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(v)))
}

/// # Safety
/// 32 bytes at `p`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_bf16(p: *const u8) -> __m512 {
    // SAFETY: the caller's promise.
    widen_bf16(unsafe { _mm256_loadu_si256(p.cast()) })
}

/// # Safety
/// 2 bytes at `p` for each lane of the mask.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn load_bf16_masked(p: *const u8, m: __mmask16) -> __m512 {
    // SAFETY: the caller's promise.
    widen_bf16(unsafe { _mm256_maskz_loadu_epi16(m, p.cast()) })
}

/// Rows of values of `BYTES` bytes, four rows at a time.
///
/// # Safety
/// `rows` has a row of `x.len()` values for each output; the loaders read 16 values, or those of the mask.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
unsafe fn dots_of<const BYTES: usize>(
    rows: &[u8],
    x: &[f32],
    out: &mut [f32],
    load: impl Fn(*const u8) -> __m512 + Copy,
    load_masked: impl Fn(*const u8, __mmask16) -> __m512 + Copy,
) {
    let row_bytes = x.len() * BYTES;
    for (rows, out) in rows.chunks(4 * row_bytes).zip(out.chunks_mut(4)) {
        let n = out.len();
        let row: [*const u8; 4] = std::array::from_fn(|i| rows[i.min(n - 1) * row_bytes..].as_ptr());
        let mut acc = [_mm512_setzero_ps(); 4];
        for (c, x) in x.chunks(LANES).enumerate() {
            let at = c * LANES * BYTES;
            if x.len() == LANES {
                // SAFETY: 16 floats.
                let x = unsafe { _mm512_loadu_ps(x.as_ptr()) };
                for (acc, row) in acc.iter_mut().zip(row) {
                    _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(at + 1024).cast());
                    *acc = _mm512_fmadd_ps(load(row.wrapping_add(at)), x, *acc);
                }
            } else {
                let mask = (1u16 << x.len()) - 1;
                // SAFETY: as many floats as the mask has bits.
                let x = unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr()) };
                for (acc, row) in acc.iter_mut().zip(row) {
                    *acc = _mm512_mask3_fmadd_ps(load_masked(row.wrapping_add(at), mask), x, *acc, mask);
                }
            }
        }
        for (out, acc) in out.iter_mut().zip(acc) {
            *out = reduce(acc);
        }
    }
}

#[target_feature(enable = "avx512f")]
pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mut acc = _mm512_setzero_ps();
    for x in x.chunks(LANES) {
        let mask = (u32::MAX >> (32 - x.len())) as u16;
        // SAFETY: as many floats as the mask has bits.
        let v = unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr()) };
        acc = _mm512_mask3_fmadd_ps(v, v, acc, mask);
    }
    let scale = _mm512_set1_ps(1.0 / (reduce(acc) / x.len() as f32 + eps).sqrt());
    let parts = out.chunks_mut(LANES).zip(x.chunks(LANES)).zip(weight.chunks(LANES));
    for ((out, x), weight) in parts {
        let mask = (u32::MAX >> (32 - x.len())) as u16;
        // SAFETY: the three have as many floats as the mask has bits.
        unsafe {
            let v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x.as_ptr()), scale);
            let v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, weight.as_ptr()));
            _mm512_mask_storeu_ps(out.as_mut_ptr(), mask, v);
        }
    }
}
