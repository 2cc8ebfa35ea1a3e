//! Sums of activations.

use std::arch::x86_64::*;

use crate::activations::Sums;

/// The sums of two times 16 signed bytes.
#[inline]
#[target_feature(enable = "ssse3")]
pub(super) fn half_sums(q0: __m128i, q1: __m128i) -> Sums {
    let fours = |q| _mm_madd_epi16(_mm_maddubs_epi16(_mm_set1_epi8(1), q), _mm_set1_epi16(1));
    let twos = _mm_hadd_epi32(fours(q0), fours(q1));
    let sums = _mm_hadd_epi32(twos, twos);
    let sums = _mm_cvtsi128_si32(_mm_packs_epi32(sums, sums));
    [sums as i16, (sums >> 16) as i16]
}
