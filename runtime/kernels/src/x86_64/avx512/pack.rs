//! Canonical matrices to the forms that the kernels read.

use std::arch::x86_64::*;

use crate::codes::{Coded, with_coded};
use crate::expert_format::{DownLayout, OUTPUT_CHUNK};
use crate::planes;
use crate::r16::{self, R16_ROWS};
use crate::up_layout::UpLayout;
use crate::weight_type::BLOCK_LEN;
use crate::weight_type::WeightType;

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
    planes::pack_tiles_of::<T>(kb, canonical, tiles);
}

pub(super) fn pack_up(up: &UpLayout, canonical: &[u8], region: &mut [u8]) {
    // SAFETY: the callers of a table's functions have the CPU features.
    with_coded!(up.ty, T => unsafe { pack_rows::<T>(up, canonical, region) });
}

/// Compiled for these instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn pack_rows<T: Coded>(up: &UpLayout, canonical: &[u8], region: &mut [u8]) {
    planes::pack_rows_of::<T>(up, canonical, region);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn pack_r16_q4(kb: usize, canonical: &[u8], tiles: &mut [u8]) {
    let row_bytes = kb * 18;
    let groups = canonical.chunks_exact(R16_ROWS * row_bytes).zip(tiles.chunks_exact_mut(R16_ROWS * row_bytes));
    for (rows, tiles) in groups {
        for (b, tile) in tiles.chunks_exact_mut(288).enumerate() {
            let block = |r: usize| rows[r * row_bytes + b * 18..][..18].as_ptr();
            // SAFETY: blocks have 18 bytes, a tile 288.
            unsafe {
                for r in 0..R16_ROWS {
                    let d = block(r).cast::<u16>().read_unaligned();
                    tile.as_mut_ptr().add(r * 2).cast::<u16>().write_unaligned(d);
                }
                let quads = transpose_quads(|r| _mm_loadu_si128(block(r).add(2).cast()));
                for (g, quads) in quads.into_iter().enumerate() {
                    _mm512_storeu_si512(tile.as_mut_ptr().add(32 + g * 64).cast(), quads);
                }
            }
        }
    }
}

/// Quads `g` of 16 bytes of each of 16 rows.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose_quads(row: impl Fn(usize) -> __m128i) -> [__m512i; 4] {
    // Lane L of v[i] is row 4L + i; transposing its quads puts rows in order.
    let v: [__m512i; 4] = std::array::from_fn(|i| lanes(row(i), row(4 + i), row(8 + i), row(12 + i)));
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

/// A block for outputs that do not exist: scale 0, every nibble 8.
static PAD: [u8; 18] =
    [0, 0, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88];

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn pack_down_group(down: &DownLayout, n_embd: usize, canonical: &[u8], b: usize, group: &mut [u8]) {
    let (low, high) = (_mm512_set1_epi8(15), _mm512_set1_epi8(-16));
    let (scales, rows) = group.split_at_mut(down.padded * 2);
    for chunk in 0..down.padded / OUTPUT_CHUNK {
        let block = |o: usize| {
            let o = chunk * OUTPUT_CHUNK + o;
            if o < n_embd { canonical[(o * down.fb + b) * 18..][..18].as_ptr() } else { PAD.as_ptr() }
        };
        for o in 0..OUTPUT_CHUNK {
            // SAFETY: blocks have 18 bytes.
            let d = unsafe { block(o).cast::<u16>().read_unaligned() };
            scales[(chunk * OUTPUT_CHUNK + o) * 2..][..2].copy_from_slice(&d.to_ne_bytes());
        }
        // Vector 4v + e holds in lane L output 16v + 4L + e in low nibbles and the one 64 further in high ones: neurons 0..16 of
        // the group in `first`, 16..32 in `second`.
        let mut first = [_mm512_setzero_si512(); 16];
        let mut second = first;
        for i in 0..16 {
            let (v, e) = (i / 4, i % 4);
            let load = |half: usize| {
                // SAFETY: blocks have 18 bytes.
                let qs = |l: usize| unsafe { _mm_loadu_si128(block(64 * half + 16 * v + 4 * l + e).add(2).cast()) };
                lanes(qs(0), qs(1), qs(2), qs(3))
            };
            let (x, y) = (load(0), load(1));
            // The shifts move bits between bytes; the masks take them away again.
            first[i] = _mm512_or_si512(_mm512_and_si512(x, low), _mm512_and_si512(_mm512_slli_epi16::<4>(y), high));
            second[i] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16::<4>(x), low), _mm512_and_si512(y, high));
        }
        for (n, row) in transpose_bytes(first).into_iter().chain(transpose_bytes(second)).enumerate() {
            let at = n * down.row_bytes + chunk * 64;
            // SAFETY: 64 bytes.
            unsafe { _mm512_storeu_si512(rows[at..at + 64].as_mut_ptr().cast(), row) };
        }
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
