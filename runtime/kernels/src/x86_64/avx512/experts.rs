//! One token or a few through one expert: the rows of up that live, and down by the live neurons.

use std::arch::x86_64::*;
use std::ops::Range;

use super::plane_rows;
use crate::activations::{ActRow, HiddenGroup};
use crate::expert_format::{DownLayout, UpLayout};
use crate::live::{self, Ahead, LiveRows};
use crate::x86_64::request::prefetch;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
pub(super) fn up_rows(up: &UpLayout, region: &[u8], rows: LiveRows<'_>, acts: &[ActRow<'_>], out: &mut [f32]) {
    if up.ty.has_codes() {
        return plane_rows::up_rows(up, region, rows, acts, out);
    }
    live::each_up_block(up, region, rows, acts, out, prefetch, |rows, ahead, a, out| match rows.len().div_ceil(4) {
        1 => up_fours::<1>(up, region, rows, ahead, a, out),
        2 => up_fours::<2>(up, region, rows, ahead, a, out),
        3 => up_fours::<3>(up, region, rows, ahead, a, out),
        _ => up_fours::<4>(up, region, rows, ahead, a, out),
    });
}

/// `F` times four rows, the last ones repeated where there are fewer: with four blocks of each of four rows, the 16 sums fill a vector.
/// Line by line across the rows, as they were requested: reading a row to its end would have the CPU fetch the dead row after it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
fn up_fours<const F: usize>(up: &UpLayout, region: &[u8], rows: &[u32], ahead: &Ahead, a: ActRow<'_>, out: &mut [f32]) {
    let low = _mm512_set1_epi8(15);
    let by_block = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    let transpose = _mm256_setr_epi16(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let (scales, nibbles) = region.split_at(up.scales_bytes);
    let fours = live::in_fours::<F>(rows);
    // Bounds of every row, checked once; the unchecked reads below stay inside them.
    let w = fours.map(|rows| rows.map(|r| nibbles[r * up.row_bytes..][..up.row_bytes].as_ptr()));
    let s = fours.map(|rows| rows.map(|r| scales[r * up.kb * 2..][..up.kb * 2].as_ptr()));
    let mut acc = [_mm_setzero_ps(); F];
    for c in 0..up.kb.div_ceil(4) {
        // SAFETY: rows have 64 bytes of nibbles for each four blocks, and kb scales; the activations are padded to whole fours.
        unsafe {
            let q0 = _mm512_loadu_si512(a.q.as_ptr().add(c * 128).cast());
            let q1 = _mm512_loadu_si512(a.q.as_ptr().add(c * 128 + 64).cast());
            let (q_lo, q_hi) = (_mm512_shuffle_i64x2::<0x88>(q0, q1), _mm512_shuffle_i64x2::<0xdd>(q0, q1));
            let sums = _mm_loadu_si128(a.sums.as_ptr().add(c * 4).cast());
            let start = _mm_madd_epi16(sums, _mm_set1_epi16(-8));
            let start = _mm512_permutexvar_epi32(by_block, _mm512_castsi128_si512(start));
            let d_a = _mm_loadu_ps(a.d.as_ptr().add(c * 4));
            let d_a = _mm512_permutexvar_ps(by_block, _mm512_castps128_ps512(d_a));
            let left = up.kb - c * 4;
            for f in 0..F {
                ahead.request(prefetch);
                // Each lane of 128 bits is a block, each 32 bits of it a quarter of its sum.
                let quarter_sums = |i: usize| {
                    let w = _mm512_loadu_si512(w[f][i].add(c * 64).cast());
                    let lo = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_and_si512(w, low), q_lo);
                    _mm512_dpbusd_epi32(lo, _mm512_and_si512(_mm512_srli_epi16::<4>(w), low), q_hi)
                };
                let sums = add_quarters([quarter_sums(0), quarter_sums(1), quarter_sums(2), quarter_sums(3)]);
                let isum = _mm512_cvtepi32_ps(_mm512_add_epi32(sums, start));
                let d: [i64; 4] = std::array::from_fn(|i| load_scales(s[f][i].add(c * 8), left));
                let d_w = _mm256_permutexvar_epi16(transpose, _mm256_setr_epi64x(d[0], d[1], d[2], d[3]));
                let d = _mm512_mul_ps(_mm512_cvtph_ps(d_w), d_a);
                let sum = _mm_fmadd_ps(_mm512_castps512_ps128(isum), _mm512_castps512_ps128(d), acc[f]);
                let sum = _mm_fmadd_ps(_mm512_extractf32x4_ps::<1>(isum), _mm512_extractf32x4_ps::<1>(d), sum);
                let sum = _mm_fmadd_ps(_mm512_extractf32x4_ps::<2>(isum), _mm512_extractf32x4_ps::<2>(d), sum);
                acc[f] = _mm_fmadd_ps(_mm512_extractf32x4_ps::<3>(isum), _mm512_extractf32x4_ps::<3>(d), sum);
            }
        }
    }
    live::put_fours(acc.map(|v| four_floats(v)), out);
}

/// The floats of a vector.
#[inline]
#[target_feature(enable = "sse")]
pub(super) fn four_floats(v: __m128) -> [f32; 4] {
    let mut floats = [0.0; 4];
    // SAFETY: 4 floats.
    unsafe { _mm_storeu_ps(floats.as_mut_ptr(), v) };
    floats
}

/// Up to four f16 scales, zero where there are no more (`left` counts them).
///
/// # Safety
/// `p` must be readable for `2 * min(left, 4)` bytes.
#[inline]
pub(super) unsafe fn load_scales(p: *const u8, left: usize) -> i64 {
    if left >= 4 {
        // SAFETY: the caller's promise.
        return unsafe { p.cast::<i64>().read_unaligned() };
    }
    let mut bytes = [0; 8];
    // SAFETY: the caller's promise; at most 6 bytes.
    unsafe { std::ptr::copy_nonoverlapping(p, bytes.as_mut_ptr(), 2 * left) };
    i64::from_le_bytes(bytes)
}

/// Adds the four 32-bit parts of each 128-bit lane of four vectors: lane `b` of the result holds `[v0, v1, v2, v3]`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn add_quarters(v: [__m512i; 4]) -> __m512i {
    let halves = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let (a, b) = (halves(v[0], v[1]), halves(v[2], v[3]));
    _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
pub(super) fn down(
    down: &DownLayout,
    region: &[u8],
    hidden: &[HiddenGroup],
    chunks: Range<usize>,
    out: &mut [&mut [f32]],
) {
    let low = _mm512_set1_epi8(15);
    live::each_down_chunk(down, region, hidden, chunks, out, prefetch, |rows, scales, token, chunk, out| {
        let d_a = _mm512_set1_ps(token.d);
        // Vectors 0..4 are outputs 16v.. of the chunk, 4..8 are 64 + 16v..
        let mut sums = [_mm512_set1_epi32(token.bias); 8];
        for (at, &quad) in token.quads() {
            let q = _mm512_set1_epi32(quad);
            // SAFETY: the rows are within the group's 32, and a chunk is 64 bytes of each.
            let w = unsafe { load_rows(rows, at, chunk) };
            for (v, w) in interleave(w).into_iter().enumerate() {
                sums[v] = _mm512_dpbusd_epi32(sums[v], _mm512_and_si512(w, low), q);
                let high = _mm512_and_si512(_mm512_srli_epi16::<4>(w), low);
                sums[v + 4] = _mm512_dpbusd_epi32(sums[v + 4], high, q);
            }
        }
        for (v, sum) in sums.into_iter().enumerate() {
            // SAFETY: the group has a scale, and `out` a float, for each of the chunk's 128 outputs.
            unsafe {
                let d_w = _mm256_loadu_si256(scales.add(chunk * 256 + v * 32).cast());
                let d = _mm512_mul_ps(_mm512_cvtph_ps(d_w), d_a);
                let p = out.as_mut_ptr().add(v * 16);
                _mm512_storeu_ps(p, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), d, _mm512_loadu_ps(p)));
            }
        }
    });
}

/// # Safety
/// 64 bytes must be readable at `base + rows[i] + chunk * 64` for four rows.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn load_rows(base: *const u8, rows: &[u32; 4], chunk: usize) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    std::array::from_fn(|i| unsafe { _mm512_loadu_si512(base.add(rows[i] as usize + chunk * 64).cast()) })
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
