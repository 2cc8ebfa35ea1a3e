//! Whole matrices times one token or a few: each byte of weights is read once, in order.

use std::arch::x86_64::*;

use super::lanes::{broadcast_quad, start_sums};
use super::planes;
use super::token::{Token, put_outputs};
use crate::activations::{ActRow, start};
use crate::r16::R16_ROWS;
use crate::weight_type::BLOCK_LEN;
use crate::weight_type::WeightType;
use crate::x86_64::request::{request_lines, request_stream};

pub(super) fn gemv_r16(ty: WeightType, kb: usize, tiles: &[u8], acts: &[ActRow<'_>], out: &mut [&mut [f32]]) {
    if ty.has_codes() {
        return planes::gemv(ty, kb, tiles, acts, out);
    }
    match acts.len() {
        1 => gemv::<1>(ty, kb, tiles, acts, out),
        2 => gemv::<2>(ty, kb, tiles, acts, out),
        3 => gemv::<3>(ty, kb, tiles, acts, out),
        4 => gemv::<4>(ty, kb, tiles, acts, out),
        5 => gemv::<5>(ty, kb, tiles, acts, out),
        6 => gemv::<6>(ty, kb, tiles, acts, out),
        7 => gemv::<7>(ty, kb, tiles, acts, out),
        8 => gemv::<8>(ty, kb, tiles, acts, out),
        n => unreachable!("{n} tokens"),
    }
}

/// `N` tokens: every sum of all of them stays in registers.
fn gemv<const N: usize>(ty: WeightType, kb: usize, tiles: &[u8], acts: &[ActRow<'_>], out: &mut [&mut [f32]]) {
    let groups = tiles.len() / (kb * crate::r16::tile_bytes(ty));
    assert!(acts.len() == N && out.len() == N && out.iter().all(|out| out.len() == groups * R16_ROWS));
    let tokens = std::array::from_fn(|t| Token::new(acts[t], out[t]));
    // SAFETY: the callers of a table's functions have the CPU features, and give activations of kb blocks; the outputs have 16 floats
    // for each group of tiles.
    unsafe {
        match ty {
            WeightType::Q4_0 => gemv_q4::<N>(kb, tiles, tokens, groups),
            _ => gemv_q8::<N>(kb, tiles, tokens, groups),
        }
    }
}

/// Requests what comes after a tile; up to three tokens are computed as fast as it can be read.
#[inline(always)]
fn request<const BYTES: usize, const N: usize>(tile: *const u8) {
    if N > 3 {
        request_lines::<BYTES>(tile);
    } else {
        request_stream::<BYTES>(tile);
    }
}

/// # Safety
/// `tiles` has `kb * 288` bytes for each group, each token kb blocks and 16 outputs for each group.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
unsafe fn gemv_q4<const N: usize>(kb: usize, tiles: &[u8], tokens: [Token; N], groups: usize) {
    let low = _mm512_set1_epi8(15);
    let minus = _mm512_set1_epi16(-8);
    let mut tile = tiles.as_ptr();
    for group in 0..groups {
        let mut acc = [_mm512_setzero_ps(); N];
        for b in 0..kb {
            // SAFETY: this is tile `b` of a row group, and block `b` of the activations.
            unsafe {
                request::<288, N>(tile);
                let mut sums: [[__m512i; 2]; N] =
                    std::array::from_fn(|t| [start_sums(tokens[t].sums.add(b).cast(), minus), _mm512_setzero_si512()]);
                for g in 0..4 {
                    let w = _mm512_loadu_si512(tile.add(32 + g * 64).cast());
                    let (lo, hi) = (_mm512_and_si512(w, low), _mm512_and_si512(_mm512_srli_epi16::<4>(w), low));
                    for (token, sums) in tokens.iter().zip(&mut sums) {
                        let q = token.q.add(b * BLOCK_LEN + g * 4);
                        sums[0] = _mm512_dpbusd_epi32(sums[0], lo, broadcast_quad(q));
                        sums[1] = _mm512_dpbusd_epi32(sums[1], hi, broadcast_quad(q.add(16)));
                    }
                }
                add_blocks(&mut acc, sums, tile, &tokens, b);
                tile = tile.add(288);
            }
        }
        // SAFETY: 16 outputs for each group.
        unsafe { put_outputs(acc, &tokens, group) };
    }
}

/// # Safety
/// `tiles` has `kb * 544` bytes for each group, each token kb blocks and 16 outputs for each group.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
unsafe fn gemv_q8<const N: usize>(kb: usize, tiles: &[u8], tokens: [Token; N], groups: usize) {
    let offset = _mm512_set1_epi8(-128);
    let minus = _mm512_set1_epi16(-128);
    let mut tile = tiles.as_ptr();
    for group in 0..groups {
        let mut acc = [_mm512_setzero_ps(); N];
        for b in 0..kb {
            // SAFETY: this is tile `b` of a row group, and block `b` of the activations.
            unsafe {
                request::<544, N>(tile);
                let mut sums: [[__m512i; 2]; N] =
                    std::array::from_fn(|t| [start_sums(tokens[t].sums.add(b).cast(), minus), _mm512_setzero_si512()]);
                for g in [0, 2, 4, 6] {
                    let w = [0, 64].map(|at| _mm512_loadu_si512(tile.add(32 + g * 64 + at).cast()));
                    let w = w.map(|w| _mm512_xor_si512(w, offset));
                    for (token, sums) in tokens.iter().zip(&mut sums) {
                        let q = token.q.add(b * BLOCK_LEN + g * 4);
                        sums[0] = _mm512_dpbusd_epi32(sums[0], w[0], broadcast_quad(q));
                        sums[1] = _mm512_dpbusd_epi32(sums[1], w[1], broadcast_quad(q.add(4)));
                    }
                }
                add_blocks(&mut acc, sums, tile, &tokens, b);
                tile = tile.add(544);
            }
        }
        // SAFETY: 16 outputs for each group.
        unsafe { put_outputs(acc, &tokens, group) };
    }
}

/// Adds block `b`: its sums of integers, times the scales that the tile begins with and the token's.
///
/// # Safety
/// A tile, and tokens that have block `b`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
unsafe fn add_blocks<const N: usize>(
    acc: &mut [__m512; N],
    sums: [[__m512i; 2]; N],
    tile: *const u8,
    tokens: &[Token; N],
    b: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let d_w = _mm512_cvtph_ps(_mm256_loadu_si256(tile.cast()));
        for ((acc, sums), token) in acc.iter_mut().zip(sums).zip(tokens) {
            let d = _mm512_mul_ps(d_w, _mm512_set1_ps(*token.d.add(b)));
            *acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(sums[0], sums[1])), d, *acc);
        }
    }
}

/// Canonical Q8_0 rows, one block at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
pub(super) fn q8_rows(kb: usize, region: &[u8], rows: &[u32], a: ActRow<'_>, out: &mut [f32]) {
    let offset = _mm256_set1_epi8(-128);
    for (&row, out) in rows.iter().zip(out) {
        let blocks = &region[row as usize * kb * 34..][..kb * 34];
        let mut acc = _mm_setzero_ps();
        for (b, block) in blocks.chunks_exact(34).enumerate() {
            // SAFETY: the block has 34 bytes and the activations 32 in block `b`.
            let (w, q) = unsafe {
                _mm_prefetch::<_MM_HINT_T0>(block.as_ptr().wrapping_add(1024).cast());
                (
                    _mm256_loadu_si256(block.as_ptr().add(2).cast()),
                    _mm256_loadu_si256(a.q[b * BLOCK_LEN..][..BLOCK_LEN].as_ptr().cast()),
                )
            };
            let dots = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_xor_si256(w, offset), q);
            let v = _mm_add_epi32(_mm256_castsi256_si128(dots), _mm256_extracti128_si256::<1>(dots));
            let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b01_00_11_10>(v));
            let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b10_11_00_01>(v));
            let isum = _mm_add_epi32(v, _mm_set1_epi32(start(128, a.sums[b])));
            let d_w = _mm_cvtph_ps(_mm_set1_epi16(i16::from_le_bytes([block[0], block[1]])));
            let d = _mm_mul_ps(d_w, _mm_set1_ps(a.d[b]));
            acc = _mm_fmadd_ps(_mm_cvtepi32_ps(isum), d, acc);
        }
        *out = _mm_cvtss_f32(acc);
    }
}
