//! Down of the types of [`crate::columns`]: by the neurons that live for a token, and unpacked for many. Codes of four neurons are
//! interleaved on the way in, so that lanes are outputs; half of a line at a time.

use std::arch::x86_64::*;

use super::lanes::{dot_signed, interleave, load_rows};
use super::planes::{codes, meant, offset, panel_bytes, table};
use crate::codes::{Coded, Meaning, half_of_power, with_coded};
use crate::columns::{ChunkScales, OfChunk};
use crate::down_layout::OUTPUT_CHUNK;
use crate::down_layout::{DownLayout, line_bit};
use crate::live::{LivePlace, LiveToken};
use crate::panel::{PANEL_VALUES, PanelKind};

/// Adds what the live neurons of a group do to the outputs of a chunk.
///
/// # Safety
/// The CPU must have AVX2, FMA, F16C and what `dpbusd` needs (which is used where `VNNI` is true). The group and the chunk must be the
/// layout's, the token's rows among the group's.
#[inline(always)]
pub(super) unsafe fn add_chunk<T: Coded, const VNNI: bool>(
    down: &DownLayout,
    group: LivePlace,
    token: &LiveToken,
    chunk: usize,
    out: &mut [f32; OUTPUT_CHUNK],
    dpbusd: impl Fn(__m256i, __m256i, __m256i) -> __m256i + Copy,
) {
    // Sums of 16 bits have room for eight products of pairs of 4 bits.
    let has_pairs = !VNNI && T::CODING.bits() <= 4 && matches!(T::CODING.meaning, Meaning::Less(_));
    // SAFETY: the caller's promise; `out` has a float for each of the chunk's 128 outputs.
    unsafe {
        let (table, ones) = (table::<T, VNNI>(), _mm256_set1_epi16(1));
        let d_a = _mm256_set1_ps(token.d);
        for sub in 0..T::SUBS {
            if token.fours(sub).is_empty() {
                continue;
            }
            let total = token.sum(sub, T::SUBS);
            let scales = ChunkScales::<T>::new(group.heads, chunk, group.step * T::SUBS + sub);
            let start = _mm256_set1_epi32(-offset::<T, VNNI>() * total);
            for half in 0..2 {
                let mut sums = [_mm256_setzero_si256(); 8];
                for (rows, quad) in token.fours(sub) {
                    let q = _mm256_set1_epi32(*quad);
                    let w = fours::<T>(down, group.rows, rows, chunk, half, table);
                    for (sum, w) in sums.iter_mut().zip(w) {
                        *sum = match T::CODING.meaning {
                            _ if VNNI => dpbusd(*sum, w, q),
                            Meaning::Table(_) => _mm256_add_epi32(*sum, dot_signed(w, q)),
                            _ if has_pairs => _mm256_add_epi16(*sum, _mm256_maddubs_epi16(w, q)),
                            _ => _mm256_add_epi32(*sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, q), ones)),
                        };
                    }
                }
                for (v, sum) in sums.into_iter().enumerate() {
                    let at = v * 16 + half * 8;
                    let sum = if has_pairs { _mm256_madd_epi16(sum, ones) } else { sum };
                    let sum = _mm256_cvtepi32_ps(_mm256_add_epi32(sum, start));
                    let (d_w, m_w) = scales_of(&scales, at);
                    let p = out.as_mut_ptr().add(at);
                    let mut acc = _mm256_fmadd_ps(sum, _mm256_mul_ps(d_w, d_a), _mm256_loadu_ps(p));
                    if T::CODING.has_minima {
                        acc = _mm256_fmadd_ps(_mm256_set1_ps(total as f32), _mm256_mul_ps(m_w, d_a), acc);
                    }
                    _mm256_storeu_ps(p, acc);
                }
            }
        }
    }
}

/// Codes of four neurons, or what the table has for them: vector `v` has outputs `16v + 8 half..` of the chunk.
///
/// # Safety
/// `base` must have the runs that start at `rows`; the CPU must have AVX2.
#[inline(always)]
unsafe fn fours<T: Coded>(
    down: &DownLayout,
    base: *const u8,
    rows: &[u32; 4],
    chunk: usize,
    half: usize,
    table: __m256i,
) -> [__m256i; 8] {
    let (low, high) = (T::CODING.low_bits(), T::CODING.high_bits());
    // SAFETY: the caller's promise; each plane has a line for the chunk.
    unsafe {
        let mut out = [_mm256_setzero_si256(); 8];
        let lows = interleave(load_rows(base, rows, down.planes[0].line(chunk) + 32 * half));
        let highs = match high {
            0 => lows,
            _ => interleave(load_rows(base, rows, down.planes[1].line(chunk) + 32 * half)),
        };
        for (v, out) in out.iter_mut().enumerate() {
            let from = [line_bit(low, chunk, v / 4), line_bit(high, chunk, v / 4)];
            *out = meant::<T>(codes::<T>(lows[v % 4], highs[v % 4], from), table);
        }
        out
    }
}

/// Scales and minima of outputs `at..at + 8`.
///
/// # Safety
/// What [`ChunkScales::new`] was promised must still hold, and the chunk have the outputs; the CPU must have AVX2 and F16C.
#[inline(always)]
unsafe fn scales_of<T: Coded>(scales: &ChunkScales<T>, at: usize) -> (__m256, __m256) {
    // SAFETY: the caller's promise.
    unsafe {
        if T::CODING.wide() == 0 {
            let mut d = scales.head.add(at).cast::<[u8; 8]>().read().map(f32::from);
            for (i, d) in d.iter_mut().enumerate() {
                *d = half_of_power(*scales.head.add(at + i));
            }
            return (_mm256_loadu_ps(d.as_ptr()), _mm256_setzero_ps());
        }
        let d = wide(scales.head, 0, at);
        let m = if T::CODING.has_minima { wide(scales.head, 1, at) } else { _mm256_setzero_ps() };
        if T::STEPS == 1 {
            return (d, m);
        }
        let m = match T::CODING.has_minima {
            true => times(_mm256_xor_ps(m, _mm256_set1_ps(-0.0)), &scales.by.1, at),
            false => m,
        };
        (times(d, &scales.by.0, at), m)
    }
}

/// f16 scales `at..at + 8` of field `i` of a chunk's heads.
///
/// # Safety
/// They must be there; the CPU must have F16C.
#[inline(always)]
unsafe fn wide(head: *const u8, i: usize, at: usize) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(head.add((i * OUTPUT_CHUNK + at) * 2).cast())) }
}

/// Scales times the integers of outputs `at..at + 8`.
///
/// # Safety
/// The chunk must have the outputs; the CPU must have AVX2.
#[inline(always)]
unsafe fn times(scale: __m256, by: &OfChunk, at: usize) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let by = _mm_loadl_epi64(by.as_ptr().add(at).cast());
        _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(by)))
    }
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn panel_down(down: &DownLayout, region: &[u8], chunk: usize, panels: &mut [u8]) {
    // SAFETY: the features are those of this function.
    with_coded!(down.ty, T => unsafe { panel_down_of::<T>(down, region, chunk, panels) });
}

/// # Safety
/// The CPU must have AVX2 and F16C.
#[inline(always)]
unsafe fn panel_down_of<T: Coded>(down: &DownLayout, region: &[u8], chunk: usize, panels: &mut [u8]) {
    let block_bytes = PanelKind::of(T::TY).block_bytes();
    assert!(panels.len() == 8 * down.fb * block_bytes && chunk < down.padded / OUTPUT_CHUNK);
    let panels = panels.as_mut_ptr();
    // SAFETY: the caller's promise; each of the 8 panels has a block `b` of 8 quad groups and scales; each group has the chunk.
    unsafe {
        let table = table::<T, false>();
        for b in 0..down.fb {
            let group = down.group(region, b);
            let block = |v: usize| panels.add((v * down.fb + b) * block_bytes);
            for (quad, half) in (0..8).flat_map(|quad| [(quad, 0), (quad, 1)]) {
                let row = |i: usize| ((quad * 4 + i) * down.row_bytes) as u32;
                let rows = [row(0), row(1), row(2), row(3)];
                let codes = fours::<T>(down, group.rows.as_ptr(), &rows, chunk, half, table);
                for (v, codes) in codes.into_iter().enumerate() {
                    _mm256_storeu_si256(block(v).add(quad * 64 + half * 32).cast(), panel_bytes::<T>(codes));
                }
            }
            for sub in 0..T::SUBS {
                let scales = ChunkScales::<T>::new(group.heads.as_ptr(), chunk, group.step * T::SUBS + sub);
                for at in (0..OUTPUT_CHUNK).step_by(8) {
                    let (d, m) = scales_of(&scales, at);
                    let to = block(at / 16).add(PANEL_VALUES + at % 16 * 4);
                    _mm256_storeu_ps(to.add(sub * 64).cast(), d);
                    if T::CODING.has_minima {
                        _mm256_storeu_ps(to.add((T::SUBS + sub) * 64).cast(), m);
                    }
                }
            }
        }
    }
}
