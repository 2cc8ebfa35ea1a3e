//! Floats to blocks.

use std::arch::x86_64::*;

use crate::activations::Sums;
use crate::search::{self, SquaredErrors};
use crate::weight_type::BLOCK_LEN;
use crate::x86_64::sums::half_sums;

#[inline]
#[target_feature(enable = "avx2")]
fn load(x: &[f32]) -> [__m256; 4] {
    let x = &x[..BLOCK_LEN];
    // SAFETY: 32 floats.
    std::array::from_fn(|i| unsafe { _mm256_loadu_ps(x.as_ptr().add(i * 8)) })
}

#[inline]
#[target_feature(enable = "avx2")]
fn abs(v: __m256) -> __m256 {
    _mm256_andnot_ps(_mm256_set1_ps(-0.0), v)
}

/// Largest |x| of 32, NaN ignored.
#[inline]
#[target_feature(enable = "avx2")]
fn abs_max(v: &[__m256; 4]) -> f32 {
    // The second operand wins where the first is NaN.
    let m = v.iter().fold(_mm256_setzero_ps(), |m, &v| _mm256_max_ps(abs(v), m));
    let m = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps::<1>(m));
    let m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)))
}

/// The low bytes of 32 integers, in order. What did not fit an integer is i32::MIN, whose low byte is 0, as in the reference.
#[inline]
#[target_feature(enable = "avx2")]
fn low_bytes(v: [__m256i; 4]) -> __m256i {
    let v = v.map(|v| _mm256_and_si256(v, _mm256_set1_epi32(0xff)));
    let bytes = _mm256_packus_epi16(_mm256_packus_epi32(v[0], v[1]), _mm256_packus_epi32(v[2], v[3]));
    // Packing works within halves, so groups of four bytes come out in the order 0 2 4 6 1 3 5 7.
    _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quantize_q8(x: &[f32], q: &mut [i8], d: &mut [f32], sums: &mut [Sums]) {
    let blocks = x.chunks_exact(BLOCK_LEN).zip(q.chunks_exact_mut(BLOCK_LEN));
    for ((x, q), (d, sums)) in blocks.zip(d.iter_mut().zip(sums)) {
        let v = load(x);
        let scale = abs_max(&v) / 127.0;
        let id = _mm256_set1_ps(if scale != 0.0 { 1.0 / scale } else { 0.0 });
        // Half away from zero: 0.5 less one ulp is added, towards the sign, and the fraction is dropped.
        let rounded = v.map(|v| {
            let v = _mm256_mul_ps(v, id);
            let sign = _mm256_and_ps(v, _mm256_set1_ps(-0.0));
            let half = _mm256_or_ps(sign, _mm256_set1_ps(0.5f32.next_down()));
            _mm256_cvttps_epi32(_mm256_add_ps(v, half))
        });
        let bytes = low_bytes(rounded);
        // SAFETY: q has 32 bytes.
        unsafe { _mm256_storeu_si256(q.as_mut_ptr().cast(), bytes) };
        *d = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm_set_ss(scale))));
        *sums = half_sums(bytes);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quantize_q4_0(x: &[f32], out: &mut [u8]) {
    for (x, out) in x.chunks_exact(BLOCK_LEN).zip(out.chunks_exact_mut(18)) {
        let v = load(x);
        let amax = _mm256_set1_ps(abs_max(&v));
        let mut is_max = 0u32;
        for (i, &v) in v.iter().enumerate() {
            is_max |= (_mm256_movemask_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(abs(v), amax)) as u32) << (8 * i);
        }
        // Adding +0 makes a negative zero positive and changes nothing else.
        let max = x.get(is_max.trailing_zeros() as usize).copied().unwrap_or(0.0) + 0.0;
        let d = max / -8.0;
        let id = _mm256_set1_ps(if d != 0.0 { 1.0 / d } else { 0.0 });
        let levels = v.map(|v| _mm256_cvttps_epi32(_mm256_add_ps(_mm256_mul_ps(v, id), _mm256_set1_ps(8.5))));
        let q = _mm256_min_epi8(low_bytes(levels), _mm256_set1_epi8(15));
        // Levels fit their byte's low half, so the shift of 16-bit lanes does not mix bytes.
        let qs = _mm_or_si128(_mm256_castsi256_si128(q), _mm_slli_epi16::<4>(_mm256_extracti128_si256::<1>(q)));
        let half = _mm_cvtsi128_si32(_mm_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm_set_ss(d))) as u16;
        out[..2].copy_from_slice(&half.to_le_bytes());
        // SAFETY: out has 18 bytes.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().add(2).cast(), qs) };
    }
}

/// The portable source, compiled for this instruction set.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn improve_q4_0(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) -> SquaredErrors {
    search::improve_q4_0(x, importance, out)
}
