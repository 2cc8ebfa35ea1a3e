//! Canonical matrices to the forms that the kernels read.

use std::arch::x86_64::*;

use crate::codes::{Coded, with_coded};
use crate::columns;
use crate::down_layout::DownLayout;
use crate::down_layout::OUTPUT_CHUNK;
use crate::expert_format;
use crate::planes;
use crate::r16::{self, R16_ROWS};
use crate::up_layout::UpLayout;
use crate::weight_type::BLOCK_LEN;
use crate::weight_type::WeightType;
use crate::x86_64::sse2::Sse2;

pub(super) fn pack_r16(ty: WeightType, kb: usize, canonical: &[u8], tiles: &mut [u8]) {
    if ty == WeightType::Q4_0 {
        // SAFETY: the callers of a table's functions have the CPU features.
        unsafe { pack_r16_q4(kb, canonical, tiles) }
    } else if ty.has_codes() {
        // SAFETY: as above.
        with_coded!(ty, T => unsafe { pack_tiles::<T>(kb, canonical, tiles) });
    } else {
        r16::pack(ty, canonical.len() / r16::group_bytes(ty, kb) * R16_ROWS, kb * BLOCK_LEN, canonical, tiles);
    }
}

/// Compiled for these instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn pack_tiles<T: Coded>(kb: usize, canonical: &[u8], tiles: &mut [u8]) {
    planes::pack_tiles_of::<T, Sse2>(kb, canonical, tiles);
}

pub(super) fn pack_up(up: &UpLayout, canonical: &[u8], region: &mut [u8]) {
    if up.ty.has_codes() {
        // SAFETY: the callers of a table's functions have the CPU features.
        with_coded!(up.ty, T => unsafe { pack_rows::<T>(up, canonical, region) });
    } else if streams(region) && up.kb.is_multiple_of(4) {
        // SAFETY: as above.
        unsafe { pack_up_q4(up, canonical, region) };
    } else {
        expert_format::pack_up(up, canonical, region);
    }
}

/// Whether a region can be written past the caches: nobody reads what it held, so no line of it need be fetched, and who reads it next
/// may be another core.
fn streams(region: &[u8]) -> bool {
    region.as_ptr().cast::<__m512i>().is_aligned()
}

/// Compiled for these instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn pack_rows<T: Coded>(up: &UpLayout, canonical: &[u8], region: &mut [u8]) {
    planes::pack_rows_of::<T>(up, canonical, region);
}

/// Rows of whole fours of blocks into a region that [`streams`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn pack_up_q4(up: &UpLayout, canonical: &[u8], region: &mut [u8]) {
    let (scales, rows) = region.split_at_mut(up.scales_bytes);
    let (blocks, rest) = scales.split_at_mut(canonical.len() / 9);
    rest.fill(0);
    let fours = canonical.chunks_exact(72).zip(blocks.as_chunks_mut::<8>().0).zip(rows.chunks_exact_mut(64));
    for ((four, scales), nibbles) in fours {
        for (scale, block) in scales.as_chunks_mut::<2>().0.iter_mut().zip(four.as_chunks::<18>().0) {
            *scale = [block[0], block[1]];
        }
        // SAFETY: four blocks of 18 bytes each; 64 bytes at a multiple of 64, since the region and all rows begin at one.
        unsafe {
            let first = four.as_ptr().add(2);
            let (a, b) = (_mm_loadu_si128(first.cast()), _mm_loadu_si128(first.add(18).cast()));
            let (c, d) = (_mm_loadu_si128(first.add(36).cast()), _mm_loadu_si128(first.add(54).cast()));
            _mm512_stream_si512(nibbles.as_mut_ptr().cast(), lanes(a, b, c, d));
        }
    }
    _mm_sfence();
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn pack_r16_q4(kb: usize, canonical: &[u8], tiles: &mut [u8]) {
    const TILE: usize = 288;
    let row_bytes = kb * 18;
    // Two tiles are whole lines.
    let streams = streams(tiles) && kb.is_multiple_of(2);
    let groups = canonical.chunks_exact(R16_ROWS * row_bytes).zip(tiles.chunks_exact_mut(R16_ROWS * row_bytes));
    for (rows, tiles) in groups {
        if !streams {
            for (b, tile) in tiles.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
                // SAFETY: 16 rows of `kb` blocks of 18 bytes.
                unsafe { pack_tile(rows.as_ptr().add(b * 18), row_bytes, tile) };
            }
            continue;
        }
        for (i, lines) in tiles.as_chunks_mut::<{ 2 * TILE }>().0.iter_mut().enumerate() {
            let mut pair = [[0; TILE]; 2];
            for (b, tile) in pair.iter_mut().enumerate() {
                // SAFETY: as above.
                unsafe { pack_tile(rows.as_ptr().add((2 * i + b) * 18), row_bytes, tile) };
            }
            for (line, bytes) in lines.as_chunks_mut::<64>().0.iter_mut().zip(pair.as_flattened().as_chunks::<64>().0) {
                // SAFETY: 64 bytes; the region begins at a multiple of 64, and so does every pair of tiles.
                unsafe { _mm512_stream_si512(line.as_mut_ptr().cast(), _mm512_loadu_si512(bytes.as_ptr().cast())) };
            }
        }
    }
    _mm_sfence();
}

/// The tile of the blocks at `first` and each `row_bytes` further.
///
/// # Safety
/// There are 16 blocks of 18 bytes.
#[inline(always)]
unsafe fn pack_tile(first: *const u8, row_bytes: usize, tile: &mut [u8; 288]) {
    // SAFETY: blocks as the caller promises; a tile has 288 bytes. The features are those of the only caller.
    unsafe {
        for r in 0..R16_ROWS {
            let d = first.add(r * row_bytes).cast::<u16>().read_unaligned();
            tile.as_mut_ptr().add(r * 2).cast::<u16>().write_unaligned(d);
        }
        let mut rows = [_mm512_setzero_si512(); 4];
        for (i, rows) in rows.iter_mut().enumerate() {
            *rows = every_fourth(first.add(i * row_bytes + 2), row_bytes);
        }
        for (g, quads) in transpose_lanes(rows).into_iter().enumerate() {
            _mm512_storeu_si512(tile.as_mut_ptr().add(32 + g * 64).cast(), quads);
        }
    }
}

/// Quads `g` of 16 bytes of each of 16 rows.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose_quads(row: impl Fn(usize) -> __m128i) -> [__m512i; 4] {
    transpose_lanes(std::array::from_fn(|i| lanes(row(i), row(4 + i), row(8 + i), row(12 + i))))
}

/// Quads `g` of 16 rows, where lane L of vector i is row 4L + i.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose_lanes(v: [__m512i; 4]) -> [__m512i; 4] {
    let (ab_lo, ab_hi) = (_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    let (cd_lo, cd_hi) = (_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    [
        _mm512_unpacklo_epi64(ab_lo, cd_lo),
        _mm512_unpackhi_epi64(ab_lo, cd_lo),
        _mm512_unpacklo_epi64(ab_hi, cd_hi),
        _mm512_unpackhi_epi64(ab_hi, cd_hi),
    ]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn lanes(a: __m128i, b: __m128i, c: __m128i, d: __m128i) -> __m512i {
    let v = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(a), b);
    _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(v, c), d)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn pack_down(down: &DownLayout, n_embd: usize, canonical: &[u8], region: &mut [u8]) {
    if down.ty.has_codes() {
        return with_coded!(down.ty, T => pack_columns::<T>(down, n_embd, canonical, region));
    }
    // Blocks for outputs that do not exist: scale 0, every nibble 8.
    let mut padded = [0x88; OUTPUT_CHUNK * 18];
    let (row_bytes, streams) = (down.fb * 18, streams(region));
    for first in (0..down.padded).step_by(OUTPUT_CHUNK) {
        for b in 0..down.fb {
            let (blocks, stride) = if first + OUTPUT_CHUNK <= n_embd {
                (canonical[(first * down.fb + b) * 18..][..(OUTPUT_CHUNK - 1) * row_bytes + 18].as_ptr(), row_bytes)
            } else {
                for (o, block) in padded.as_chunks_mut::<18>().0.iter_mut().enumerate() {
                    match canonical.get(((first + o) * down.fb + b) * 18..) {
                        Some(canonical) if first + o < n_embd => block.copy_from_slice(&canonical[..18]),
                        _ => block[..2].fill(0),
                    }
                }
                (padded.as_ptr(), 18)
            };
            let (scales, rows) = region[b * down.block_bytes..][..down.block_bytes].split_at_mut(down.padded * 2);
            let scales = &mut scales[first * 2..][..OUTPUT_CHUNK * 2];
            let rows = &mut rows[first / 2..][..31 * down.row_bytes + 64];
            // SAFETY: 128 blocks of 18 bytes, 128 scales, and 64 bytes of each of 32 rows, which lie on lines where the region does.
            unsafe { pack_down_chunk(blocks, stride, scales.as_mut_ptr(), rows.as_mut_ptr(), down.row_bytes, streams) };
        }
    }
    _mm_sfence();
}

/// Compiled for these instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn pack_columns<T: Coded>(down: &DownLayout, n_embd: usize, canonical: &[u8], region: &mut [u8]) {
    for (b, block) in region.chunks_exact_mut(down.block_bytes).enumerate() {
        columns::pack_block_of::<T, Sse2>(down, n_embd, canonical, b, block);
    }
}

/// What 128 outputs have in a group: their blocks begin at `first` and each `stride` further.
///
/// # Safety
/// 128 blocks of 18 bytes; room for 128 scales; 64 bytes of each of 32 rows that begin `row_bytes` apart, on lines where `streams`.
#[inline(always)]
unsafe fn pack_down_chunk(
    first: *const u8,
    stride: usize,
    scales: *mut u8,
    rows: *mut u8,
    row_bytes: usize,
    streams: bool,
) {
    // SAFETY: as the caller promises. The features are those of the only caller.
    unsafe {
        let (low, high) = (_mm512_set1_epi8(15), _mm512_set1_epi8(-16));
        for o in 0..OUTPUT_CHUNK {
            let d = first.add(o * stride).cast::<u16>().read_unaligned();
            scales.cast::<u16>().add(o).write_unaligned(d);
        }
        // Vector 4v + e holds in lane L output 16v + 4L + e in low nibbles and the one 64 further in high ones: neurons 0..16 of
        // the group in `a`, 16..32 in `b`.
        let (mut a, mut b) = ([_mm512_setzero_si512(); 16], [_mm512_setzero_si512(); 16]);
        for i in 0..16 {
            let at = first.add((i / 4 * 16 + i % 4) * stride + 2);
            let (x, y) = (every_fourth(at, stride), every_fourth(at.add(64 * stride), stride));
            // The shifts move bits between bytes; the masks take them away again.
            a[i] = _mm512_or_si512(_mm512_and_si512(x, low), _mm512_and_si512(_mm512_slli_epi16::<4>(y), high));
            b[i] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16::<4>(x), low), _mm512_and_si512(y, high));
        }
        let (a, b) = (transpose_bytes(a), transpose_bytes(b));
        for n in 0..16 {
            let (at, after) = (rows.add(n * row_bytes), rows.add((16 + n) * row_bytes));
            if streams {
                _mm512_stream_si512(at.cast(), a[n]);
                _mm512_stream_si512(after.cast(), b[n]);
            } else {
                _mm512_storeu_si512(at.cast(), a[n]);
                _mm512_storeu_si512(after.cast(), b[n]);
            }
        }
    }
}

/// 16 bytes at `first` and at 4, 8 and 12 times `stride` further.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn every_fourth(first: *const u8, stride: usize) -> __m512i {
    // SAFETY: as the caller promises. The features are those of the callers.
    unsafe {
        let at = |l: usize| _mm_loadu_si128(first.add(4 * l * stride).cast());
        lanes(at(0), at(1), at(2), at(3))
    }
}

/// Transposes, in each lane of 128 bits, the 16 × 16 bytes that 16 vectors hold there.
///
/// With the row number as the upper and the byte number as the lower four bits of an index, each round rotates it by one bit.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn transpose_bytes(mut v: [__m512i; 16]) -> [__m512i; 16] {
    for _ in 0..4 {
        let mut t = v;
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi8(v[i], v[i + 8]);
            t[2 * i + 1] = _mm512_unpackhi_epi8(v[i], v[i + 8]);
        }
        v = t;
    }
    v
}
