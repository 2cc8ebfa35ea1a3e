//! Floats to blocks.

use std::arch::x86_64::*;

use crate::activations::Sums;
use crate::search::{self, SquaredErrors};
use crate::weight_type::BLOCK_LEN;
use crate::x86_64::sums::half_sums;

/// Largest |x| of 32, NaN ignored.
#[inline]
#[target_feature(enable = "avx512f")]
fn abs_max(v0: __m512, v1: __m512) -> f32 {
    // The second operand wins where the first is NaN.
    let m = _mm512_max_ps(_mm512_abs_ps(v0), _mm512_setzero_ps());
    _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(v1), m))
}

/// Rounds half away from zero: 0.5 less one ulp is added, towards the sign, and the fraction is dropped.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn round_half_away(v: __m512) -> __m512i {
    let sign = _mm512_and_ps(v, _mm512_set1_ps(-0.0));
    let half = _mm512_or_ps(sign, _mm512_set1_ps(0.5f32.next_down()));
    _mm512_cvttps_epi32(_mm512_add_ps(v, half))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
pub(super) fn quantize_q8(x: &[f32], q: &mut [i8], d: &mut [f32], sums: &mut [Sums]) {
    let blocks = x.chunks_exact(BLOCK_LEN).zip(q.chunks_exact_mut(BLOCK_LEN));
    for ((x, q), (d, sums)) in blocks.zip(d.iter_mut().zip(sums)) {
        // SAFETY: x has 32 floats.
        let (v0, v1) = unsafe { (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16))) };
        let scale = abs_max(v0, v1) / 127.0;
        let id = _mm512_set1_ps(if scale != 0.0 { 1.0 / scale } else { 0.0 });
        // Out of range (an infinite reciprocal) converts to i32::MIN, whose low byte is 0, as in the reference.
        let q0 = _mm512_cvtepi32_epi8(round_half_away(_mm512_mul_ps(v0, id)));
        let q1 = _mm512_cvtepi32_epi8(round_half_away(_mm512_mul_ps(v1, id)));
        // SAFETY: q has 32 bytes.
        unsafe {
            _mm_storeu_si128(q.as_mut_ptr().cast(), q0);
            _mm_storeu_si128(q.as_mut_ptr().add(16).cast(), q1);
        }
        let half = _mm_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm_set_ss(scale));
        *d = _mm_cvtss_f32(_mm_cvtph_ps(half));
        *sums = half_sums(_mm256_set_m128i(q1, q0));
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
pub(super) fn quantize_q4_0(x: &[f32], out: &mut [u8]) {
    let offset = _mm512_set1_ps(8.5);
    let top = _mm_set1_epi8(15);
    for (x, out) in x.chunks_exact(BLOCK_LEN).zip(out.chunks_exact_mut(18)) {
        // SAFETY: x has 32 floats.
        let (v0, v1) = unsafe { (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16))) };
        let amax = _mm512_set1_ps(abs_max(v0, v1));
        let is_max = u32::from(_mm512_cmpeq_ps_mask(_mm512_abs_ps(v0), amax))
            | u32::from(_mm512_cmpeq_ps_mask(_mm512_abs_ps(v1), amax)) << 16;
        // Adding +0 makes a negative zero positive and changes nothing else.
        let max = x.get(is_max.trailing_zeros() as usize).copied().unwrap_or(0.0) + 0.0;
        let d = max / -8.0;
        let id = _mm512_set1_ps(if d != 0.0 { 1.0 / d } else { 0.0 });
        let level = |v| _mm512_cvttps_epi32(_mm512_add_ps(_mm512_mul_ps(v, id), offset));
        let q0 = _mm_min_epi8(_mm512_cvtepi32_epi8(level(v0)), top);
        let q1 = _mm_min_epi8(_mm512_cvtepi32_epi8(level(v1)), top);
        // Levels fit their byte's low half, so the shift of 16-bit lanes does not mix bytes.
        let qs = _mm_or_si128(q0, _mm_slli_epi16::<4>(q1));
        let half = _mm_cvtsi128_si32(_mm_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm_set_ss(d))) as u16;
        out[..2].copy_from_slice(&half.to_le_bytes());
        // SAFETY: out has 18 bytes.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().add(2).cast(), qs) };
    }
}

/// The portable source, compiled for this instruction set.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
pub(super) fn improve_q4_0(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) -> SquaredErrors {
    search::improve_q4_0(x, importance, out)
}
