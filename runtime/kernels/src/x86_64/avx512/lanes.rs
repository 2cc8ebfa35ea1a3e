//! What lies in the lanes of a vector: activations in all of them, weights of several rows side by side.

use std::arch::x86_64::*;

/// 4 bytes of activations in every lane.
///
/// # Safety
/// `q` must be readable for 4 bytes.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn broadcast_quad(q: *const i8) -> __m512i {
    // SAFETY: the caller's promise.
    _mm512_set1_epi32(unsafe { q.cast::<i32>().read_unaligned() })
}

/// What sums start from where weights have an offset, in every lane: `minus` it times the sum of a block, as
/// [`Sums`](crate::activations::Sums) at `sums`.
///
/// # Safety
/// `sums` must be readable for 4 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn start_sums(sums: *const i8, minus: __m512i) -> __m512i {
    // SAFETY: the caller's promise.
    _mm512_madd_epi16(unsafe { broadcast_quad(sums) }, minus)
}

/// Transposes 16 vectors of 16 32-bit values.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(r: [__m512i; 16]) -> [__m512i; 16] {
    let mut t = r;
    for i in (0..16).step_by(2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    let mut u = t;
    for i in (0..16).step_by(4) {
        u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // u[4a + j], lane L: column 4L + j of rows 4a..4a+4. What is left is a transposition of 4 × 4 lanes for each j.
    let mut out = u;
    for j in 0..4 {
        let (a, b, c, d) = (u[j], u[4 + j], u[8 + j], u[12 + j]);
        let (ab0, ab1) = (_mm512_shuffle_i32x4::<0x44>(a, b), _mm512_shuffle_i32x4::<0xee>(a, b));
        let (cd0, cd1) = (_mm512_shuffle_i32x4::<0x44>(c, d), _mm512_shuffle_i32x4::<0xee>(c, d));
        out[j] = _mm512_shuffle_i32x4::<0x88>(ab0, cd0);
        out[4 + j] = _mm512_shuffle_i32x4::<0xdd>(ab0, cd0);
        out[8 + j] = _mm512_shuffle_i32x4::<0x88>(ab1, cd1);
        out[12 + j] = _mm512_shuffle_i32x4::<0xdd>(ab1, cd1);
    }
    out
}

/// # Safety
/// 64 bytes must be readable at `base + rows[i] + line` for four rows.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn load_rows(base: *const u8, rows: &[u32; 4], line: usize) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    std::array::from_fn(|i| unsafe { _mm512_loadu_si512(base.add(rows[i] as usize + line).cast()) })
}

/// Interleaves the bytes of four rows: vector `v`, 32-bit lane `i` of the result holds the four bytes of outputs `16v + i` and
/// `64 + 16v + i` (see `expert_format`).
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn interleave(w: [__m512i; 4]) -> [__m512i; 4] {
    let (ab_lo, ab_hi) = (_mm512_unpacklo_epi8(w[0], w[1]), _mm512_unpackhi_epi8(w[0], w[1]));
    let (cd_lo, cd_hi) = (_mm512_unpacklo_epi8(w[2], w[3]), _mm512_unpackhi_epi8(w[2], w[3]));
    [
        _mm512_unpacklo_epi16(ab_lo, cd_lo),
        _mm512_unpackhi_epi16(ab_lo, cd_lo),
        _mm512_unpacklo_epi16(ab_hi, cd_hi),
        _mm512_unpackhi_epi16(ab_hi, cd_hi),
    ]
}
