//! Down of the types of [`crate::columns`]: by the neurons that live for a token, and unpacked for many. Codes of four neurons are
//! interleaved on the way in, so that lanes are outputs.

use std::arch::x86_64::*;
use std::ops::Range;

use super::lanes::{interleave, load_rows};
use super::planes::{meant, offset, panel_bytes, powers, table};
use crate::activations::HiddenGroup;
use crate::codes::{Coded, with_coded};
use crate::columns::{ChunkScales, OfChunk};
use crate::down_layout::OUTPUT_CHUNK;
use crate::down_layout::{DownLayout, line_bit};
use crate::live::{self, LivePlace, LiveToken};
use crate::panel::{PANEL_VALUES, PanelKind};
use crate::x86_64::request::prefetch;

pub(super) fn down(
    down: &DownLayout,
    region: &[u8],
    hidden: &[HiddenGroup],
    chunks: Range<usize>,
    out: &mut [&mut [f32]],
) {
    with_coded!(down.ty, T => {
        live::each_down_chunk(down, region, hidden, chunks, out, prefetch, |group, token, chunk, out| {
            // SAFETY: the callers of a table's functions have the CPU features; the group and the chunk are the layout's.
            unsafe { add_chunk::<T>(down, group, token, chunk, out) };
        });
    });
}

/// Adds what the live neurons of a group do to the outputs of a chunk.
///
/// # Safety
/// The group and the chunk must be the layout's, the token's rows among the group's.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
unsafe fn add_chunk<T: Coded>(
    down: &DownLayout,
    group: LivePlace,
    token: &LiveToken,
    chunk: usize,
    out: &mut [f32; OUTPUT_CHUNK],
) {
    let table = table::<T>();
    let d_a = _mm512_set1_ps(token.d);
    for sub in 0..T::SUBS {
        if token.fours(sub).is_empty() {
            continue;
        }
        let total = token.sum(sub, T::SUBS);
        let mut sums = [_mm512_set1_epi32(-offset::<T>() * total); 8];
        for (rows, quad) in token.fours(sub) {
            let q = _mm512_set1_epi32(*quad);
            // SAFETY: the caller's promise.
            let w = unsafe { fours::<T>(down, group.rows, rows, chunk, table) };
            for (sum, w) in sums.iter_mut().zip(w) {
                *sum = _mm512_dpbusd_epi32(*sum, w, q);
            }
        }
        let total = _mm512_set1_ps(total as f32);
        // SAFETY: the caller's promise; `out` has a float for each of the chunk's 128 outputs.
        unsafe {
            let scales = ChunkScales::<T>::new(group.heads, chunk, group.step * T::SUBS + sub);
            for (v, sum) in sums.into_iter().enumerate() {
                let (d_w, m_w) = scales_of(&scales, v);
                let p = out.as_mut_ptr().add(v * 16);
                let mut acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(d_w, d_a), _mm512_loadu_ps(p));
                if T::CODING.has_minima {
                    acc = _mm512_fmadd_ps(total, _mm512_mul_ps(m_w, d_a), acc);
                }
                _mm512_storeu_ps(p, acc);
            }
        }
    }
}

/// Codes of four neurons, or what the table has for them, as unsigned bytes: vector `v` has outputs `16v..` of the chunk.
///
/// # Safety
/// `base` must have the runs that start at `rows`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn fours<T: Coded>(
    down: &DownLayout,
    base: *const u8,
    rows: &[u32; 4],
    chunk: usize,
    table: __m512i,
) -> [__m512i; 8] {
    let (low, high) = (T::CODING.low_bits(), T::CODING.high_bits());
    let mask = _mm512_set1_epi8((1 << low) - 1);
    let mut out = [_mm512_setzero_si512(); 8];
    // SAFETY: the caller's promise; each plane has a line for the chunk.
    unsafe {
        let w = interleave(load_rows(base, rows, down.planes[0].line(chunk)));
        for (v, out) in out.iter_mut().enumerate() {
            *out = _mm512_and_si512(moved(w[v % 4], line_bit(low, chunk, v / 4), 0), mask);
        }
        if high > 0 {
            let mask = _mm512_set1_epi8(((1 << high) - 1) << low);
            let w = interleave(load_rows(base, rows, down.planes[1].line(chunk)));
            for (v, out) in out.iter_mut().enumerate() {
                // codes | w & mask
                let w = moved(w[v % 4], line_bit(high, chunk, v / 4), low);
                *out = _mm512_ternarylogic_epi32::<0xf8>(*out, w, mask);
            }
        }
    }
    for out in &mut out {
        *out = meant::<T>(*out, table);
    }
    out
}

/// Moves bit `from` of each byte to bit `to`; what crosses bytes is for a mask to take away.
#[inline]
#[target_feature(enable = "avx512f")]
fn moved(w: __m512i, from: usize, to: usize) -> __m512i {
    _mm512_rorv_epi32(w, _mm512_set1_epi32((from as i32 - to as i32) & 31))
}

/// Scales and minima of outputs `16v..`.
///
/// # Safety
/// What [`ChunkScales::new`] was promised must still hold, and `v` be less than 8.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
unsafe fn scales_of<T: Coded>(scales: &ChunkScales<T>, v: usize) -> (__m512, __m512) {
    // SAFETY: the caller's promise.
    unsafe {
        let wide =
            |i: usize| _mm512_cvtph_ps(_mm256_loadu_si256(scales.head.add((i * OUTPUT_CHUNK + v * 16) * 2).cast()));
        let times = |scale: __m512, by: &OfChunk| {
            let by = _mm_loadu_si128(by.as_ptr().add(v * 16).cast());
            _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(by)))
        };
        if T::CODING.wide() == 0 {
            let exponents = _mm_loadu_si128(scales.head.add(v * 16).cast());
            return (powers(_mm512_cvtepu8_epi32(exponents)), _mm512_setzero_ps());
        }
        let m = if T::CODING.has_minima { wide(1) } else { _mm512_setzero_ps() };
        if T::STEPS == 1 {
            return (wide(0), m);
        }
        let m = if T::CODING.has_minima { times(_mm512_xor_ps(m, _mm512_set1_ps(-0.0)), &scales.by.1) } else { m };
        (times(wide(0), &scales.by.0), m)
    }
}

pub(super) fn panel_down(down: &DownLayout, region: &[u8], chunk: usize, panels: &mut [u8]) {
    // SAFETY: the callers of a table's functions have the CPU features.
    with_coded!(down.ty, T => unsafe { panel_down_of::<T>(down, region, chunk, panels) });
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
fn panel_down_of<T: Coded>(down: &DownLayout, region: &[u8], chunk: usize, panels: &mut [u8]) {
    let (table, block_bytes) = (table::<T>(), PanelKind::of(T::TY).block_bytes());
    assert!(panels.len() == 8 * down.fb * block_bytes && chunk < down.padded / OUTPUT_CHUNK);
    let panels = panels.as_mut_ptr();
    for b in 0..down.fb {
        let group = down.group(region, b);
        // SAFETY: each of the 8 panels has a block `b` of 8 quad groups and scales; the group has the chunk.
        unsafe {
            let block = |v: usize| panels.add((v * down.fb + b) * block_bytes);
            for quad in 0..8 {
                let rows: [u32; 4] = std::array::from_fn(|i| ((quad * 4 + i) * down.row_bytes) as u32);
                let codes = fours::<T>(down, group.rows.as_ptr(), &rows, chunk, table);
                for (v, codes) in codes.into_iter().enumerate() {
                    _mm512_storeu_si512(block(v).add(quad * 64).cast(), panel_bytes::<T>(codes));
                }
            }
            for sub in 0..T::SUBS {
                let scales = ChunkScales::<T>::new(group.heads.as_ptr(), chunk, group.step * T::SUBS + sub);
                for v in 0..8 {
                    let (d, m) = scales_of(&scales, v);
                    _mm512_storeu_ps(block(v).add(PANEL_VALUES + sub * 64).cast(), d);
                    if T::CODING.has_minima {
                        _mm512_storeu_ps(block(v).add(PANEL_VALUES + (T::SUBS + sub) * 64).cast(), m);
                    }
                }
            }
        }
    }
}
