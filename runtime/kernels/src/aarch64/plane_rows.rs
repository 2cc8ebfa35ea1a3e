//! Rows of up of the types of [`crate::planes`], 16 at a time: quads of their bytes are transposed on the way in, so that lanes are
//! rows as in tiles.

use std::arch::aarch64::*;

use super::dot::Dot;
use super::neon::{Neon, prefetch};
use super::planes::{Scales, codes, put_quads, table};
use crate::activations::ActRow;
use crate::bytes16::transpose_bytes;
use crate::codes::{Coded, with_coded};
use crate::live::{UP_BLOCK, UpBlock};
use crate::panel::{PanelKind, PanelLayout};
use crate::r16::R16_ROWS;
use crate::up_layout::{UpLayout, block_place};

/// Products of a block of rows with a token, line by line across the rows, as they were requested.
///
/// # Safety
/// The CPU must have what `D` needs; the rows and the token must have the blocks of the layout.
#[inline(always)]
pub(super) unsafe fn up_block<T: Coded, D: Dot>(
    up: &UpLayout,
    block: &UpBlock,
    ahead: &UpBlock,
    a: ActRow<'_>,
) -> [f32; UP_BLOCK] {
    let (lines, pieces) = (up.row_bytes.div_ceil(64), up.kb.div_ceil(4));
    let mut sums = [0.0; UP_BLOCK];
    // SAFETY: the caller's promise; rows have kb blocks and a piece for each four.
    unsafe {
        let table = table::<T>();
        let mut acc = [vdupq_n_f32(0.0); 4];
        let mut scales = None;
        for c in 0..pieces {
            (c * lines / pieces..(c + 1) * lines / pieces).for_each(|line| ahead.request_line(line, prefetch));
            for b in 0..4.min(up.kb - c * 4) {
                let at = c * 4 + b;
                let scales: &Scales<T> = match at % T::STEPS {
                    0 => scales.insert(block_scales::<T>(up, block, at / T::STEPS)),
                    _ => scales.as_ref().unwrap_unchecked(),
                };
                for (rows, acc) in acc.iter_mut().enumerate().take(block.len.div_ceil(4)) {
                    let quads = block_quads::<T>(up, block, rows, c, b, table);
                    scales.add::<D>(at % T::STEPS, rows, &quads, a, at, acc);
                }
            }
        }
        for (acc, sums) in acc.into_iter().zip(sums.chunks_exact_mut(4)) {
            vst1q_f32(sums.as_mut_ptr(), acc);
        }
    }
    sums
}

/// Bytes `at..at + 16` of the planes of rows `4 * rows..`: quad `g` of each of them.
///
/// # Safety
/// The rows must have them.
#[inline(always)]
unsafe fn chunk(block: &UpBlock, rows: usize, at: usize) -> [uint8x16_t; 4] {
    // SAFETY: the caller's promise; NEON is part of AArch64.
    unsafe {
        let mut v = [vdupq_n_u32(0); 4];
        for (v, (planes, _)) in v.iter_mut().zip(&block.rows[4 * rows..]) {
            *v = vreinterpretq_u32_u8(vld1q_u8(planes.add(at)));
        }
        let pairs = |a, b| (vreinterpretq_u64_u32(vzip1q_u32(a, b)), vreinterpretq_u64_u32(vzip2q_u32(a, b)));
        // Quads 0 and 1, then 2 and 3, of rows 0 and 1, and of rows 2 and 3.
        let ((ab_lo, ab_hi), (cd_lo, cd_hi)) = (pairs(v[0], v[1]), pairs(v[2], v[3]));
        [
            vreinterpretq_u8_u64(vzip1q_u64(ab_lo, cd_lo)),
            vreinterpretq_u8_u64(vzip2q_u64(ab_lo, cd_lo)),
            vreinterpretq_u8_u64(vzip1q_u64(ab_hi, cd_hi)),
            vreinterpretq_u8_u64(vzip2q_u64(ab_hi, cd_hi)),
        ]
    }
}

/// Quads of block `b` of piece `c` of rows `4 * rows..`, as `planes` has them.
///
/// # Safety
/// The rows must have the piece.
#[inline(always)]
unsafe fn block_quads<T: Coded>(
    up: &UpLayout,
    block: &UpBlock,
    rows: usize,
    c: usize,
    b: usize,
    table: int8x16_t,
) -> [int8x16_t; 8] {
    let (low, high) = (T::CODING.low_bits(), T::CODING.high_bits());
    // SAFETY: the caller's promise; NEON is part of AArch64.
    unsafe {
        let (at, low_bits) = block_place(low, b);
        let lows = chunk(block, rows, c * 16 * low + at);
        let (at, high_bits) = block_place(high, b);
        let highs = match high {
            0 => lows,
            _ => chunk(block, rows, up.kb.div_ceil(4) * 16 * low + c * 16 * high + at),
        };
        let mut quads = [vdupq_n_s8(0); 8];
        for half in 0..2 {
            for (g, (low, high)) in lows.iter().zip(&highs).enumerate() {
                quads[4 * half + g] = codes::<T>(*low, *high, [low_bits[half], high_bits[half]], table);
            }
        }
        quads
    }
}

/// The scales of block `b` of the rows.
///
/// # Safety
/// The rows must have the block.
#[inline(always)]
unsafe fn block_scales<T: Coded>(up: &UpLayout, block: &UpBlock, b: usize) -> Scales<T> {
    let blocks = up.kb / T::STEPS;
    let heads = block.rows.map(|(_, heads)| heads);
    let at = 2 * T::CODING.wide() * blocks + b * T::CODING.narrow();
    // SAFETY: the caller's promise; planes follow the heads of all rows, so 16 bytes are readable at each.
    unsafe {
        let wide = |kind: usize| heads.map(|head| head.add((kind * blocks + b) * 2).cast::<u16>().read_unaligned());
        if T::CODING.wide() == 0 {
            return Scales::of_powers(&heads.map(|head| *head.add(at)));
        }
        let mut narrow = [[0; R16_ROWS]; 16];
        if T::STEPS > 1 {
            narrow = transpose_bytes::<Neon>(&heads.map(|head| head.add(at).cast::<[u8; 16]>().read()));
        }
        let m = if T::CODING.has_minima { wide(1) } else { [0; R16_ROWS] };
        Scales::new(&wide(0), &m, &narrow)
    }
}

pub(super) fn panel_rows(layout: PanelLayout, up: &UpLayout, region: &[u8], first: usize, panel: &mut [u8]) {
    with_coded!(up.ty, T => panel_rows_of::<T>(layout, up, region, first, panel));
}

fn panel_rows_of<T: Coded>(layout: PanelLayout, up: &UpLayout, region: &[u8], first: usize, panel: &mut [u8]) {
    let block_bytes = PanelKind::of(T::TY).block_bytes();
    let ids: [u32; R16_ROWS] = std::array::from_fn(|r| (first + r) as u32);
    let rows = UpBlock::new(up, region, &ids);
    let mut scales = None;
    // SAFETY: rows have kb blocks; NEON is part of AArch64.
    unsafe {
        let table = table::<T>();
        for (at, block) in panel.chunks_exact_mut(block_bytes).enumerate() {
            let scales: &Scales<T> = match at % T::STEPS {
                0 => scales.insert(block_scales::<T>(up, &rows, at / T::STEPS)),
                _ => scales.as_ref().unwrap_unchecked(),
            };
            for four in 0..4 {
                let quads = block_quads::<T>(up, &rows, four, at / 4, at % 4, table);
                for (g, quads) in quads.into_iter().enumerate() {
                    put_quads::<T>(layout, block, g, four, quads);
                }
            }
            scales.put(at % T::STEPS, block);
        }
    }
}
