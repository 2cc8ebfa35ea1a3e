//! Canonical matrices to the forms that the kernels read. Those of the types of [`crate::planes`] by portable loops, compiled for these
//! instructions.

use std::arch::x86_64::*;

use crate::codes::{Coded, with_coded};
use crate::columns;
use crate::down_layout::DownLayout;
use crate::down_layout::OUTPUT_CHUNK;
use crate::expert_format;
use crate::planes;
use crate::r16::R16_ROWS;
use crate::scalar;
use crate::up_layout::UpLayout;
use crate::weight_type::WeightType;
use crate::x86_64::sse2::Sse2;

pub(super) fn pack_r16(ty: WeightType, kb: usize, canonical: &[u8], tiles: &mut [u8]) {
    if ty == WeightType::Q4_0 {
        // SAFETY: the callers of a table's functions have the CPU features.
        return unsafe { pack_r16_q4(kb, canonical, tiles) };
    }
    if !ty.has_codes() {
        return scalar::pack_r16(ty, kb, canonical, tiles);
    }
    // SAFETY: as above.
    with_coded!(ty, T => unsafe { pack_tiles::<T>(kb, canonical, tiles) });
}

#[target_feature(enable = "avx2")]
fn pack_r16_q4(kb: usize, canonical: &[u8], tiles: &mut [u8]) {
    let row_bytes = kb * 18;
    let groups = canonical.chunks_exact(R16_ROWS * row_bytes).zip(tiles.chunks_exact_mut(R16_ROWS * row_bytes));
    for (rows, tiles) in groups {
        for (b, tile) in tiles.as_chunks_mut::<288>().0.iter_mut().enumerate() {
            // SAFETY: 16 rows of `kb` blocks of 18 bytes; a tile has 288.
            unsafe {
                let (first, out) = (rows.as_ptr().add(b * 18), tile.as_mut_ptr());
                for r in 0..R16_ROWS {
                    let d = first.add(r * row_bytes).cast::<u16>().read_unaligned();
                    out.add(r * 2).cast::<u16>().write_unaligned(d);
                }
                for r in (0..R16_ROWS).step_by(4) {
                    let at = first.add(r * row_bytes + 2);
                    let a = _mm_loadu_si128(at.cast());
                    let b = _mm_loadu_si128(at.add(row_bytes).cast());
                    let c = _mm_loadu_si128(at.add(2 * row_bytes).cast());
                    let d = _mm_loadu_si128(at.add(3 * row_bytes).cast());
                    let (ab_lo, ab_hi) = (_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b));
                    let (cd_lo, cd_hi) = (_mm_unpacklo_epi32(c, d), _mm_unpackhi_epi32(c, d));
                    let to = out.add(32 + r * 4);
                    _mm_storeu_si128(to.cast(), _mm_unpacklo_epi64(ab_lo, cd_lo));
                    _mm_storeu_si128(to.add(64).cast(), _mm_unpackhi_epi64(ab_lo, cd_lo));
                    _mm_storeu_si128(to.add(128).cast(), _mm_unpacklo_epi64(ab_hi, cd_hi));
                    _mm_storeu_si128(to.add(192).cast(), _mm_unpackhi_epi64(ab_hi, cd_hi));
                }
            }
        }
    }
}

#[target_feature(enable = "avx2")]
fn pack_tiles<T: Coded>(kb: usize, canonical: &[u8], tiles: &mut [u8]) {
    planes::pack_tiles_of::<T, Sse2>(kb, canonical, tiles);
}

pub(super) fn pack_up(up: &UpLayout, canonical: &[u8], region: &mut [u8]) {
    if !up.ty.has_codes() {
        return expert_format::pack_up(up, canonical, region);
    }
    // SAFETY: the callers of a table's functions have the CPU features.
    with_coded!(up.ty, T => unsafe { pack_rows::<T>(up, canonical, region) });
}

#[target_feature(enable = "avx2")]
fn pack_rows<T: Coded>(up: &UpLayout, canonical: &[u8], region: &mut [u8]) {
    planes::pack_rows_of::<T>(up, canonical, region);
}

#[target_feature(enable = "avx2")]
pub(super) fn pack_down(down: &DownLayout, n_embd: usize, canonical: &[u8], region: &mut [u8]) {
    if down.ty.has_codes() {
        return with_coded!(down.ty, T => pack_columns::<T>(down, n_embd, canonical, region));
    }
    if !n_embd.is_multiple_of(OUTPUT_CHUNK) {
        return expert_format::pack_down(down, n_embd, canonical, region);
    }
    let row_bytes = down.fb * 18;
    for first in (0..n_embd).step_by(OUTPUT_CHUNK) {
        for b in 0..down.fb {
            let blocks = &canonical[(first * down.fb + b) * 18..][..(OUTPUT_CHUNK - 1) * row_bytes + 18];
            let (scales, rows) = region[b * down.block_bytes..][..down.block_bytes].split_at_mut(down.padded * 2);
            let rows = &mut rows[first / 2..][..31 * down.row_bytes + 64];
            for (o, scale) in scales[first * 2..][..OUTPUT_CHUNK * 2].as_chunks_mut::<2>().0.iter_mut().enumerate() {
                *scale = [blocks[o * row_bytes], blocks[o * row_bytes + 1]];
            }
            for half in 0..2 {
                // SAFETY: 128 blocks of 18 bytes; 64 bytes of each of 32 rows.
                unsafe { pack_down_half(blocks.as_ptr(), row_bytes, half, rows.as_mut_ptr(), down.row_bytes) };
            }
        }
    }
}

/// Two of the four lanes of what 128 outputs have in a group, as `avx512::pack` has it.
///
/// # Safety
/// 128 blocks of 18 bytes that begin `stride` apart; 64 bytes of each of 32 rows that begin `row_bytes` apart.
#[inline(always)]
unsafe fn pack_down_half(first: *const u8, stride: usize, half: usize, rows: *mut u8, row_bytes: usize) {
    // SAFETY: as the caller promises. The features are those of the only caller.
    unsafe {
        let (low, high) = (_mm256_set1_epi8(15), _mm256_set1_epi8(-16));
        let (mut a, mut b) = ([_mm256_setzero_si256(); 16], [_mm256_setzero_si256(); 16]);
        for i in 0..16 {
            let at = first.add((i / 4 * 16 + i % 4 + 8 * half) * stride + 2);
            let (x, y) = (and_fourth(at, stride), and_fourth(at.add(64 * stride), stride));
            a[i] = _mm256_or_si256(_mm256_and_si256(x, low), _mm256_and_si256(_mm256_slli_epi16::<4>(y), high));
            b[i] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16::<4>(x), low), _mm256_and_si256(y, high));
        }
        for (after, vectors) in [a, b].into_iter().enumerate() {
            for (n, row) in transpose_bytes(vectors).into_iter().enumerate() {
                _mm256_storeu_si256(rows.add((16 * after + n) * row_bytes + 32 * half).cast(), row);
            }
        }
    }
}

/// 16 bytes at `first` and 4 times `stride` further.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn and_fourth(first: *const u8, stride: usize) -> __m256i {
    // SAFETY: as the caller promises. The features are those of the callers.
    unsafe {
        let one = _mm256_castsi128_si256(_mm_loadu_si128(first.cast()));
        _mm256_inserti128_si256::<1>(one, _mm_loadu_si128(first.add(4 * stride).cast()))
    }
}

/// Transposes, in each lane of 128 bits, the 16 × 16 bytes that 16 vectors hold there.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose_bytes(mut v: [__m256i; 16]) -> [__m256i; 16] {
    for _ in 0..4 {
        let mut t = v;
        for i in 0..8 {
            t[2 * i] = _mm256_unpacklo_epi8(v[i], v[i + 8]);
            t[2 * i + 1] = _mm256_unpackhi_epi8(v[i], v[i + 8]);
        }
        v = t;
    }
    v
}

#[target_feature(enable = "avx2")]
fn pack_columns<T: Coded>(down: &DownLayout, n_embd: usize, canonical: &[u8], region: &mut [u8]) {
    for (b, block) in region.chunks_exact_mut(down.block_bytes).enumerate() {
        columns::pack_block_of::<T, Sse2>(down, n_embd, canonical, b, block);
    }
}
