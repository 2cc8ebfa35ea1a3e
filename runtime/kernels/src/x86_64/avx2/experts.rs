//! One token or a few through one expert: the rows of up that live, and down by the live neurons.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::activations::{ActRow, HiddenGroup, start};
use crate::expert_format::{DownLayout, OUTPUT_CHUNK, UpLayout};
use crate::live::{self, Ahead, LiveRows};
use crate::scalar;
use crate::weight_type::BLOCK_LEN;
use crate::x86_64::request::prefetch;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn up_rows(up: &UpLayout, region: &[u8], rows: LiveRows<'_>, acts: &[ActRow<'_>], out: &mut [f32]) {
    if up.ty.has_codes() {
        return scalar::planes::up_rows(up, region, rows, acts, out);
    }
    live::each_up_block(up, region, rows, acts, out, prefetch, |rows, ahead, a, out| match rows.len().div_ceil(4) {
        1 => up_fours::<1>(up, region, rows, ahead, a, out),
        2 => up_fours::<2>(up, region, rows, ahead, a, out),
        3 => up_fours::<3>(up, region, rows, ahead, a, out),
        _ => up_fours::<4>(up, region, rows, ahead, a, out),
    });
}

/// `F` times four rows, the last ones repeated where there are fewer; lanes are rows. Line by line across the rows, as they were
/// requested: reading a row to its end would have the CPU fetch the dead row after it.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn up_fours<const F: usize>(up: &UpLayout, region: &[u8], rows: &[u32], ahead: &Ahead, a: ActRow<'_>, out: &mut [f32]) {
    let low = _mm_set1_epi8(15);
    let ones = _mm256_set1_epi16(1);
    let (scales, nibbles) = region.split_at(up.scales_bytes);
    let fours = live::in_fours::<F>(rows);
    let w = fours.map(|rows| rows.map(|r| &nibbles[r * up.row_bytes..][..up.row_bytes]));
    let s = fours.map(|rows| rows.map(|r| &scales[r * up.kb * 2..][..up.kb * 2]));
    let mut acc = [_mm_setzero_ps(); F];
    for line in 0..up.kb.div_ceil(4) {
        for (f, acc) in acc.iter_mut().enumerate() {
            ahead.request(prefetch);
            for b in line * 4..up.kb.min(line * 4 + 4) {
                // SAFETY: the activations have 32 bytes in block `b`.
                let q = unsafe { _mm256_loadu_si256(a.q[b * BLOCK_LEN..][..BLOCK_LEN].as_ptr().cast()) };
                let sums: [__m256i; 4] = std::array::from_fn(|i| {
                    // SAFETY: the row has 16 bytes in block `b`.
                    let qs = unsafe { _mm_loadu_si128(w[f][i][b * 16..][..16].as_ptr().cast()) };
                    let high = _mm_and_si128(_mm_srli_epi16::<4>(qs), low);
                    let w = _mm256_set_m128i(high, _mm_and_si128(qs, low));
                    _mm256_madd_epi16(_mm256_maddubs_epi16(w, q), ones)
                });
                let sums = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
                let sums = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
                let isum = _mm_cvtepi32_ps(_mm_add_epi32(sums, _mm_set1_epi32(start(8, a.sums[b]))));
                let half = |i: usize| i16::from_le_bytes([s[f][i][b * 2], s[f][i][b * 2 + 1]]);
                let d_w = _mm_cvtph_ps(_mm_setr_epi16(half(0), half(1), half(2), half(3), 0, 0, 0, 0));
                *acc = _mm_fmadd_ps(isum, _mm_mul_ps(d_w, _mm_set1_ps(a.d[b])), *acc);
            }
        }
    }
    live::put_fours(acc.map(|v| four_floats(v)), out);
}

/// The floats of a vector.
#[inline]
#[target_feature(enable = "sse")]
fn four_floats(v: __m128) -> [f32; 4] {
    let mut floats = [0.0; 4];
    // SAFETY: 4 floats.
    unsafe { _mm_storeu_ps(floats.as_mut_ptr(), v) };
    floats
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn down(
    down: &DownLayout,
    region: &[u8],
    hidden: &[HiddenGroup],
    chunks: Range<usize>,
    out: &mut [&mut [f32]],
) {
    let low = _mm256_set1_epi8(15);
    live::each_down_chunk(down, region, hidden, chunks, out, prefetch, |rows, scales, token, chunk, out| {
        let d_a = _mm256_set1_ps(token.d);
        let bias = _mm256_set1_epi32(token.bias);
        // Half of the chunk's bytes at a time: sums 0..4 are outputs 16v + 8 half.., 4..8 are 64 + 16v + 8 half..
        for half in 0..2 {
            let mut pairs = [_mm256_setzero_si256(); 8];
            for (at, &quad) in token.quads() {
                let q = _mm256_set1_epi32(quad);
                // SAFETY: the rows are within the group's 32, and a chunk is 64 bytes of each.
                let w = unsafe { load_rows(rows, at, chunk, half) };
                for (v, w) in interleave(w).into_iter().enumerate() {
                    let lo = _mm256_maddubs_epi16(_mm256_and_si256(w, low), q);
                    pairs[v] = _mm256_add_epi16(pairs[v], lo);
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(w), low);
                    pairs[v + 4] = _mm256_add_epi16(pairs[v + 4], _mm256_maddubs_epi16(high, q));
                }
            }
            for (v, pairs) in pairs.into_iter().enumerate() {
                let sum = _mm256_add_epi32(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)), bias);
                let at = v * 16 + half * 8;
                // SAFETY: the group has a scale, and `out` a float, for each of the chunk's 128 outputs.
                unsafe {
                    let d_w = _mm_loadu_si128(scales.add((chunk * OUTPUT_CHUNK + at) * 2).cast());
                    let d = _mm256_mul_ps(_mm256_cvtph_ps(d_w), d_a);
                    let p = out.as_mut_ptr().add(at);
                    _mm256_storeu_ps(p, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), d, _mm256_loadu_ps(p)));
                }
            }
        }
    });
}

/// # Safety
/// 64 bytes must be readable at `base + rows[i] + chunk * 64` for four rows.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn load_rows(base: *const u8, rows: &[u32; 4], chunk: usize, half: usize) -> [__m256i; 4] {
    // SAFETY: the caller's promise.
    std::array::from_fn(|i| unsafe { _mm256_loadu_si256(base.add(rows[i] as usize + chunk * 64 + half * 32).cast()) })
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
