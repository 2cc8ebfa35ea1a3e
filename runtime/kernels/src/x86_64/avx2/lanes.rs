//! What lies in the lanes of a vector: activations in all of them, weights of several rows side by side, products and their sums.

use std::arch::x86_64::*;

/// 4 bytes of activations in every lane.
///
/// # Safety
/// `q` must be readable for 4 bytes.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn broadcast_quad(q: *const i8) -> __m256i {
    // SAFETY: the caller's promise.
    _mm256_set1_epi32(unsafe { q.cast::<i32>().read_unaligned() })
}

/// Adds products of nibbles and activations: sums of 16 bits, which have room for eight.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn add_pairs(sums: __m256i, w: __m256i, q: __m256i) -> __m256i {
    _mm256_add_epi16(sums, _mm256_maddubs_epi16(w, q))
}

/// Sums of 32 bits from those of [`add_pairs`].
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn finish_pairs(sums: __m256i) -> __m256i {
    _mm256_madd_epi16(sums, _mm256_set1_epi16(1))
}

/// `Σ w · a` in pairs of 16-bit products added to 32 bits, for signed bytes; `w` may be -128, `a` may not.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn dot_signed(w: __m256i, a: __m256i) -> __m256i {
    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
    _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
}

/// Columns `4 * g..` of a panel block's 16 rows.
///
/// # Safety
/// `w` must be a panel block, `g` one of 8.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn load_group(w: *const u8, g: usize) -> [__m256i; 2] {
    // SAFETY: the caller's promise.
    std::array::from_fn(|half| unsafe { _mm256_loadu_si256(w.add(g * 64 + half * 32).cast()) })
}

/// # Safety
/// 32 bytes must be readable at `base + rows[i] + from` for four rows.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn load_rows(base: *const u8, rows: &[u32; 4], from: usize) -> [__m256i; 4] {
    // SAFETY: the caller's promise.
    std::array::from_fn(|i| unsafe { _mm256_loadu_si256(base.add(rows[i] as usize + from).cast()) })
}

/// Interleaves the bytes of four rows: vector `v`, 32-bit lane `i` of the result holds the four bytes of outputs
/// `16v + 8 half + i` and 64 further (see `expert_format`).
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn interleave(w: [__m256i; 4]) -> [__m256i; 4] {
    let (ab_lo, ab_hi) = (_mm256_unpacklo_epi8(w[0], w[1]), _mm256_unpackhi_epi8(w[0], w[1]));
    let (cd_lo, cd_hi) = (_mm256_unpacklo_epi8(w[2], w[3]), _mm256_unpackhi_epi8(w[2], w[3]));
    [
        _mm256_unpacklo_epi16(ab_lo, cd_lo),
        _mm256_unpackhi_epi16(ab_lo, cd_lo),
        _mm256_unpacklo_epi16(ab_hi, cd_hi),
        _mm256_unpackhi_epi16(ab_hi, cd_hi),
    ]
}
