//! Whole matrices times one token or a few: each byte of weights is read once, in order.

use std::arch::x86_64::*;

use super::lanes::{add_pairs, broadcast_quad, dot_signed, finish_pairs};
use super::planes;
use crate::activations::{ActRow, start};
use crate::r16::R16_ROWS;
use crate::weight_type::BLOCK_LEN;
use crate::weight_type::WeightType;
use crate::x86_64::request::{request_lines, request_stream};

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn gemv_r16(ty: WeightType, kb: usize, tiles: &[u8], acts: &[ActRow<'_>], out: &mut [&mut [f32]]) {
    if ty.has_codes() {
        // SAFETY: the features are those of this function; lengths are checked by the callers of a table's functions.
        return unsafe { planes::gemv::<false>(ty, kb, tiles, acts, out, |sums, _, _| sums) };
    }
    let add_signed = |sums, w, q| _mm256_add_epi32(sums, dot_signed(w, q));
    // SAFETY: the features are those of this function; lengths are checked by the callers of a table's functions.
    unsafe {
        match ty {
            WeightType::Q4_0 => {
                by_fours::<288>(kb, tiles, acts, out, 8, |sums, w, q| add_pairs(sums, w, q), |sums| finish_pairs(sums))
            }
            _ => by_fours::<544>(kb, tiles, acts, out, 0, add_signed, |sums| sums),
        }
    }
}

/// Sum of 8 integers.
#[inline]
#[target_feature(enable = "avx2")]
fn add_lanes(v: __m256i) -> i32 {
    let v = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b01_00_11_10>(v));
    _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32::<0b10_11_00_01>(v)))
}

/// Row groups of tiles of `TILE` bytes times tokens, four at a time: as many sums as there are registers for. `add(sums, w, q)` adds
/// products of bytes, and `finish` makes of its sums such of 32 bits. Weights are `offset` less than their bytes, those of 8 bits less
/// than theirs with the sign bit flipped where there is one.
///
/// # Safety
/// The CPU must have AVX2, FMA, F16C and what `add` needs; tiles must be whole groups, tokens have `kb` blocks.
#[inline(always)]
pub(super) unsafe fn by_fours<const TILE: usize>(
    kb: usize,
    tiles: &[u8],
    acts: &[ActRow<'_>],
    out: &mut [&mut [f32]],
    offset: i32,
    add: impl Fn(__m256i, __m256i, __m256i) -> __m256i,
    finish: impl Fn(__m256i) -> __m256i,
) {
    for (i, group) in tiles.chunks_exact(kb * TILE).enumerate() {
        for (acts, out) in acts.chunks(4).zip(out.chunks_mut(4)) {
            // SAFETY: the caller's promise.
            unsafe {
                match acts.len() {
                    1 => tokens::<1, TILE>(group, acts, out, i, offset, &add, &finish),
                    2 => tokens::<2, TILE>(group, acts, out, i, offset, &add, &finish),
                    3 => tokens::<3, TILE>(group, acts, out, i, offset, &add, &finish),
                    _ => tokens::<4, TILE>(group, acts, out, i, offset, &add, &finish),
                }
            }
        }
    }
}

/// [`by_fours`] for row group `i` and `N` tokens.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn tokens<const N: usize, const TILE: usize>(
    group: &[u8],
    acts: &[ActRow<'_>],
    out: &mut [&mut [f32]],
    i: usize,
    offset: i32,
    add: &impl Fn(__m256i, __m256i, __m256i) -> __m256i,
    finish: &impl Fn(__m256i) -> __m256i,
) {
    assert!(acts.len() == N && out.len() == N);
    // SAFETY: the caller's promise: tile `b` of the row group and block `b` of the activations, and 16 outputs for the group.
    unsafe {
        let low = _mm256_set1_epi8(15);
        let flip = _mm256_set1_epi8(if offset == 0 { 0 } else { -128 });
        let mut acc = [[_mm256_setzero_ps(); N]; 2];
        for (b, tile) in group.chunks_exact(TILE).map(<[u8]>::as_ptr).enumerate() {
            if N == 1 {
                request_stream::<TILE>(tile);
            } else {
                request_lines::<TILE>(tile);
            }
            for (half, acc) in acc.iter_mut().enumerate() {
                let mut sums = [_mm256_setzero_si256(); N];
                for g in 0..(TILE - 32) / 64 {
                    let w = _mm256_loadu_si256(tile.add(32 + g * 64 + half * 32).cast());
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(w), low);
                    for t in 0..N {
                        let q = acts[t].q.as_ptr().add(b * BLOCK_LEN + g * 4);
                        if TILE == 288 {
                            sums[t] = add(sums[t], _mm256_and_si256(w, low), broadcast_quad(q));
                            sums[t] = add(sums[t], high, broadcast_quad(q.add(16)));
                        } else {
                            sums[t] = add(sums[t], _mm256_xor_si256(w, flip), broadcast_quad(q));
                        }
                    }
                }
                let d_w = _mm256_cvtph_ps(_mm_loadu_si128(tile.add(half * 16).cast()));
                for t in 0..N {
                    let start = _mm256_set1_epi32(start(offset, *acts[t].sums.get_unchecked(b)));
                    let d = _mm256_mul_ps(d_w, _mm256_set1_ps(*acts[t].d.get_unchecked(b)));
                    let sums = _mm256_cvtepi32_ps(_mm256_add_epi32(finish(sums[t]), start));
                    acc[t] = _mm256_fmadd_ps(sums, d, acc[t]);
                }
            }
        }
        for (t, out) in out.iter_mut().enumerate() {
            let out = &mut out[i * R16_ROWS..][..R16_ROWS];
            _mm256_storeu_ps(out.as_mut_ptr(), acc[0][t]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), acc[1][t]);
        }
    }
}

/// Canonical Q8_0 rows, one block at a time.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn q8_rows(kb: usize, region: &[u8], rows: &[u32], a: ActRow<'_>, out: &mut [f32]) {
    for (&row, out) in rows.iter().zip(out) {
        let blocks = &region[row as usize * kb * 34..][..kb * 34];
        let mut acc = 0f32;
        for (b, block) in blocks.chunks_exact(34).enumerate() {
            // SAFETY: the block has 34 bytes and the activations 32 in block `b`.
            let (w, q) = unsafe {
                _mm_prefetch::<_MM_HINT_T0>(block.as_ptr().wrapping_add(1024).cast());
                (
                    _mm256_loadu_si256(block.as_ptr().add(2).cast()),
                    _mm256_loadu_si256(a.q[b * BLOCK_LEN..][..BLOCK_LEN].as_ptr().cast()),
                )
            };
            let isum = add_lanes(dot_signed(w, q));
            let d_w = _mm_cvtss_f32(_mm_cvtph_ps(_mm_set1_epi16(i16::from_le_bytes([block[0], block[1]]))));
            acc = (isum as f32).mul_add(d_w * a.d[b], acc);
        }
        *out = acc;
    }
}
