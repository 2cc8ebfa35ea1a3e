//! Down of the types of [`crate::columns`]: by the neurons that live for a token, and unpacked for many. Codes of four neurons are
//! interleaved on the way in, so that lanes are outputs; a quarter of a line at a time.

use std::arch::aarch64::*;

use super::dot::Dot;
use super::experts::interleave;
use super::neon::{Neon, add_block, load_f16};
use super::planes::{codes, offset, put_floats, put_quads, table, times};
use crate::codes::{Coded, half_of_power, with_coded};
use crate::columns::{self, ChunkScales, OfChunk};
use crate::down_layout::OUTPUT_CHUNK;
use crate::down_layout::{DownLayout, line_bit};
use crate::expert_format;
use crate::live::{LivePlace, LiveToken};
use crate::panel::{PANEL_VALUES, PanelKind, PanelLayout};

pub(super) fn pack_down(down: &DownLayout, n_embd: usize, canonical: &[u8], region: &mut [u8]) {
    if !down.ty.has_codes() {
        return expert_format::pack_down(down, n_embd, canonical, region);
    }
    for (b, block) in region.chunks_exact_mut(down.block_bytes).enumerate() {
        with_coded!(down.ty, T => columns::pack_block_of::<T, Neon>(down, n_embd, canonical, b, block));
    }
}

/// Adds what the live neurons of a group do to the outputs of a chunk.
///
/// # Safety
/// The CPU must have what `D` needs; the group and the chunk must be the layout's, the token's rows among the group's.
#[inline(always)]
pub(super) unsafe fn add_chunk<T: Coded, D: Dot>(
    down: &DownLayout,
    group: LivePlace,
    token: &LiveToken,
    chunk: usize,
    out: &mut [f32; OUTPUT_CHUNK],
) {
    // SAFETY: the caller's promise; `out` has a float for each of the chunk's 128 outputs.
    unsafe {
        let table = table::<T>();
        let d_a = vdupq_n_f32(token.d);
        for sub in 0..T::SUBS {
            if token.fours(sub).is_empty() {
                continue;
            }
            let total = token.sum(sub, T::SUBS);
            let scales = ChunkScales::<T>::new(group.heads, chunk, group.step * T::SUBS + sub);
            for part in 0..4 {
                let mut sums = [vdupq_n_s32(-offset::<T>() * total); 8];
                for (rows, quad) in token.fours(sub) {
                    let q = vreinterpretq_s8_s32(vdupq_n_s32(*quad));
                    let w = fours::<T>(down, group.rows, rows, chunk, part, table);
                    for (sum, w) in sums.iter_mut().zip(w) {
                        *sum = D::dot(*sum, w, q);
                    }
                }
                for (v, sum) in sums.into_iter().enumerate() {
                    let at = v * 16 + part * 4;
                    let (d_w, m_w) = scales_of(&scales, at);
                    let p = out.as_mut_ptr().add(at);
                    let mut acc = add_block(vld1q_f32(p), sum, d_w, d_a);
                    if T::CODING.has_minima {
                        acc = add_block(acc, vdupq_n_s32(total), m_w, d_a);
                    }
                    vst1q_f32(p, acc);
                }
            }
        }
    }
}

/// Codes of four neurons, or what the table has for them: vector `v` has outputs `16v + 4 part..` of the chunk.
///
/// # Safety
/// `base` must have the runs that start at `rows`.
#[inline(always)]
unsafe fn fours<T: Coded>(
    down: &DownLayout,
    base: *const u8,
    rows: &[u32; 4],
    chunk: usize,
    part: usize,
    table: int8x16_t,
) -> [int8x16_t; 8] {
    let (low, high) = (T::CODING.low_bits(), T::CODING.high_bits());
    // SAFETY: the caller's promise; each plane has a line for the chunk.
    unsafe {
        let load = |line: usize| rows.map(|row| vld1q_u8(base.add(row as usize + line + 16 * part)));
        let lows = interleave(load(down.planes[0].line(chunk)));
        let highs = if high == 0 { lows } else { interleave(load(down.planes[1].line(chunk))) };
        let mut out = [vdupq_n_s8(0); 8];
        for (v, out) in out.iter_mut().enumerate() {
            let from = [line_bit(low, chunk, v / 4), line_bit(high, chunk, v / 4)];
            *out = codes::<T>(lows[v % 4], highs[v % 4], from, table);
        }
        out
    }
}

/// Scales and minima of outputs `at..at + 4`.
///
/// # Safety
/// What [`ChunkScales::new`] was promised must still hold, and the chunk have the outputs.
#[inline(always)]
unsafe fn scales_of<T: Coded>(scales: &ChunkScales<T>, at: usize) -> (float32x4_t, float32x4_t) {
    let four = |by: &OfChunk| [0, 1, 2, 3].map(|i| by[at + i]);
    // SAFETY: the caller's promise.
    unsafe {
        if T::CODING.wide() == 0 {
            let d = [0, 1, 2, 3].map(|i| half_of_power(*scales.head.add(at + i)));
            return (vld1q_f32(d.as_ptr()), vdupq_n_f32(0.0));
        }
        let wide = |i: usize| load_f16(scales.head.add((i * OUTPUT_CHUNK + at) * 2));
        let m = if T::CODING.has_minima { wide(1) } else { vdupq_n_f32(0.0) };
        if T::STEPS == 1 {
            return (wide(0), m);
        }
        let m = if T::CODING.has_minima { times(vnegq_f32(m), four(&scales.by.1)) } else { m };
        (times(wide(0), four(&scales.by.0)), m)
    }
}

pub(super) fn panel_down(layout: PanelLayout, down: &DownLayout, region: &[u8], chunk: usize, panels: &mut [u8]) {
    with_coded!(down.ty, T => panel_down_of::<T>(layout, down, region, chunk, panels));
}

fn panel_down_of<T: Coded>(layout: PanelLayout, down: &DownLayout, region: &[u8], chunk: usize, panels: &mut [u8]) {
    let block_bytes = PanelKind::of(T::TY).block_bytes();
    assert!(panels.len() == 8 * down.fb * block_bytes && chunk < down.padded / OUTPUT_CHUNK);
    // SAFETY: each group has the chunk; NEON is part of AArch64.
    unsafe {
        let table = table::<T>();
        for b in 0..down.fb {
            let group = down.group(region, b);
            let block = |v: usize| (v * down.fb + b) * block_bytes;
            for (quad, part) in (0..8).flat_map(|quad| [0, 1, 2, 3].map(|part| (quad, part))) {
                let rows = [0, 1, 2, 3].map(|i| ((quad * 4 + i) * down.row_bytes) as u32);
                let codes = fours::<T>(down, group.rows.as_ptr(), &rows, chunk, part, table);
                for (v, codes) in codes.into_iter().enumerate() {
                    put_quads::<T>(layout, &mut panels[block(v)..][..PANEL_VALUES], quad, part, codes);
                }
            }
            for sub in 0..T::SUBS {
                let scales = ChunkScales::<T>::new(group.heads.as_ptr(), chunk, group.step * T::SUBS + sub);
                for at in (0..OUTPUT_CHUNK).step_by(4) {
                    let (d, m) = scales_of(&scales, at);
                    let to = block(at / 16) + PANEL_VALUES + at % 16 * 4;
                    put_floats(d, &mut panels[to + sub * 64..]);
                    if T::CODING.has_minima {
                        put_floats(m, &mut panels[to + (T::SUBS + sub) * 64..]);
                    }
                }
            }
        }
    }
}
