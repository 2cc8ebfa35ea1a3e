//! Whole matrices times one token or a few: each byte of weights is read once, in order.

use std::arch::x86_64::*;

use crate::activations::{ActRow, start};
use crate::live;
use crate::r16::{R16_ROWS, tile_bytes};
use crate::scalar;
use crate::weight_type::BLOCK_LEN;
use crate::weight_type::WeightType;
use crate::x86_64::request::request_stream;

pub(super) fn gemv_r16(ty: WeightType, kb: usize, tiles: &[u8], acts: &[ActRow<'_>], out: &mut [&mut [f32]]) {
    if ty.has_codes() {
        return scalar::planes::gemv(ty, kb, tiles, acts, out);
    }
    // SAFETY: the callers of a table's functions have the CPU features; tiles are whole and tokens have kb blocks and an output for
    // each row.
    live::each_row_group(kb * tile_bytes(ty), tiles, acts, out, |group, a, out| unsafe {
        match ty {
            WeightType::Q4_0 => gemv_of::<288>(kb, group, a, out, |tile, half, q, bias| q4_sum(tile, half, q, bias)),
            _ => gemv_of::<544>(kb, group, a, out, |tile, half, q, _| q8_sum(tile, half, q)),
        }
    });
}

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

/// Sum of 8 integers.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn add_lanes(v: __m256i) -> i32 {
    let v = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b01_00_11_10>(v));
    _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32::<0b10_11_00_01>(v)))
}

/// `Σ w · a` in pairs of 16-bit products added to 32 bits, for signed bytes; `w` may be -128, `a` may not.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn dot_signed(w: __m256i, a: __m256i) -> __m256i {
    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
    _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
}

/// Sums of half a tile (8 rows) of Q4_0.
///
/// # Safety
/// A tile of 288 bytes and 32 activations.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn q4_sum(tile: *const u8, half: usize, q: *const i8, bias: i32) -> __m256i {
    let low = _mm256_set1_epi8(15);
    let mut pairs = _mm256_setzero_si256();
    for g in 0..4 {
        // SAFETY: the caller's promise.
        unsafe {
            let w = _mm256_loadu_si256(tile.add(32 + g * 64 + half * 32).cast());
            let lo = _mm256_maddubs_epi16(_mm256_and_si256(w, low), broadcast_quad(q.add(g * 4)));
            let w = _mm256_and_si256(_mm256_srli_epi16::<4>(w), low);
            let hi = _mm256_maddubs_epi16(w, broadcast_quad(q.add(16 + g * 4)));
            pairs = _mm256_add_epi16(pairs, _mm256_add_epi16(lo, hi));
        }
    }
    _mm256_add_epi32(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)), _mm256_set1_epi32(bias))
}

/// Sums of half a tile (8 rows) of Q8_0.
///
/// # Safety
/// A tile of 544 bytes and 32 activations.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn q8_sum(tile: *const u8, half: usize, q: *const i8) -> __m256i {
    let mut sum = _mm256_setzero_si256();
    for g in 0..8 {
        // SAFETY: the caller's promise.
        unsafe {
            let w = _mm256_loadu_si256(tile.add(32 + g * 64 + half * 32).cast());
            sum = _mm256_add_epi32(sum, dot_signed(w, broadcast_quad(q.add(g * 4))));
        }
    }
    sum
}

/// # Safety
/// `tiles` has `kb * TILE` bytes per 16 outputs, `a` at least kb blocks.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn gemv_of<const TILE: usize>(
    kb: usize,
    tiles: &[u8],
    a: ActRow<'_>,
    out: &mut [f32],
    sum: impl Fn(*const u8, usize, *const i8, i32) -> __m256i,
) {
    let mut tile = tiles.as_ptr();
    for out in out.chunks_exact_mut(R16_ROWS) {
        let mut acc = [_mm256_setzero_ps(); 2];
        for b in 0..kb {
            // SAFETY: this is tile `b` of a row group, and block `b` of the activations.
            unsafe {
                request_stream::<TILE>(tile);
                let q = a.q.as_ptr().add(b * BLOCK_LEN);
                let d_a = _mm256_set1_ps(*a.d.get_unchecked(b));
                for (half, acc) in acc.iter_mut().enumerate() {
                    let isum = sum(tile, half, q, start(8, *a.sums.get_unchecked(b)));
                    let d_w = _mm256_cvtph_ps(_mm_loadu_si128(tile.add(half * 16).cast()));
                    *acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(isum), _mm256_mul_ps(d_w, d_a), *acc);
                }
                tile = tile.add(TILE);
            }
        }
        // SAFETY: out has 16 floats.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), acc[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), acc[1]);
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
