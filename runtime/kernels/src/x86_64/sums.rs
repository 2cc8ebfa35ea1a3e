//! Sums of activations.

use std::arch::x86_64::*;

use crate::activations::Sums;

/// The sums of the two times 16 signed bytes of a block.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn half_sums(q: __m256i) -> Sums {
    let v = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), q), _mm256_set1_epi16(1));
    let v = _mm256_add_epi32(v, _mm256_shuffle_epi32::<0b01_00_11_10>(v));
    let v = _mm256_add_epi32(v, _mm256_shuffle_epi32::<0b10_11_00_01>(v));
    [_mm256_cvtsi256_si32(v) as i16, _mm_cvtsi128_si32(_mm256_extracti128_si256::<1>(v)) as i16]
}
