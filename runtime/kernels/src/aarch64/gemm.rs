//! Many tokens: weights are unpacked once into a panel (16 rows, bytes and f32 scales; nibbles with their offset of 8, Q8_0 signed),
//! which then meets four tokens at a time; of other types as [`crate::panel`] says.
//!
//! A panel's bytes lie in the order that the product takes them: `K` columns of each of the 16 rows, then the next `K`.

use std::arch::aarch64::*;
use std::ops::Range;

use super::dot::Dot;
use super::neon::{add_block, load_f16, nibbles, smmla};
use super::{plane_columns, plane_rows, planes};
use crate::activations::{UNIT_BLOCK, UNIT_ROWS};
use crate::down_layout::DownLayout;
use crate::panel::{PANEL_BLOCK, PANEL_VALUES, PanelKind, PanelLayout, Values};
use crate::r16::{R16_ROWS, tile_bytes};
use crate::table::{GEMM_UNITS, PanelOutputs};
use crate::up_layout::UpLayout;
use crate::weight_type::{BLOCK_LEN, WeightType};

/// Columns that `sdot` takes of a row.
pub(super) const DOT: usize = 4;
/// Columns that `smmla` takes of a row.
pub(super) const MATRIX: usize = 8;

/// Values stay signed.
pub(super) const fn layout<const K: usize>() -> PanelLayout {
    PanelLayout { columns: K, signed_offset: 0 }
}

/// 16 f16 scales to the scales of a panel block.
#[inline]
#[target_feature(enable = "neon")]
fn put_scales(block: &mut [u8], scales: &[u8]) {
    let (scales, block) = (&scales[..32], &mut block[512..PANEL_BLOCK]);
    for i in 0..4 {
        // SAFETY: 32 bytes of scales, 64 of the block.
        unsafe { vst1q_f32(block.as_mut_ptr().add(i * 16).cast(), load_f16(scales.as_ptr().add(i * 8))) };
    }
}

/// Columns `4 * g..` of row `r` of a panel block.
#[inline(always)]
fn put_quad<const K: usize>(block: &mut [u8], g: usize, r: usize, quad: u32) {
    let column = g * 4;
    let at = column / K * K * R16_ROWS + r * K + column % K;
    block[at..at + 4].copy_from_slice(&quad.to_ne_bytes());
}

/// The low nibbles of four bytes as group `g`, the high ones as group `g + 4`.
#[inline(always)]
fn put_nibbles<const K: usize>(block: &mut [u8], g: usize, r: usize, quad: [u8; 4]) {
    let w = u32::from_ne_bytes(quad);
    put_quad::<K>(block, g, r, w & 0x0f0f_0f0f);
    put_quad::<K>(block, g + 4, r, w >> 4 & 0x0f0f_0f0f);
}

#[target_feature(enable = "neon")]
pub(super) fn panel_r16<const K: usize>(ty: WeightType, _kb: usize, tiles: &[u8], panel: &mut [u8]) {
    if ty.has_codes() {
        return planes::panel_tiles(layout::<K>(), ty, tiles, panel);
    }
    for (tile, block) in tiles.chunks_exact(tile_bytes(ty)).zip(panel.chunks_exact_mut(PANEL_BLOCK)) {
        let (scales, values) = tile.split_at(32);
        let groups = if ty == WeightType::Q4_0 { 4 } else { 8 };
        for g in (0..groups).step_by(2) {
            for i in 0..4 {
                // SAFETY: a tile has 64 bytes for each group, and a block for each of 8.
                unsafe {
                    let [a, b] = [g, g + 1].map(|g| vld1q_u8(values.as_ptr().add(g * 64 + i * 16)));
                    if ty == WeightType::Q4_0 {
                        let ((a_lo, a_hi), (b_lo, b_hi)) = (nibbles(a), nibbles(b));
                        put_two_groups::<K>(block, g, i, a_lo, b_lo);
                        put_two_groups::<K>(block, g + 4, i, a_hi, b_hi);
                    } else {
                        put_two_groups::<K>(block, g, i, vreinterpretq_s8_u8(a), vreinterpretq_s8_u8(b));
                    }
                }
            }
        }
        put_scales(block, scales);
    }
}

/// Columns of groups `g` (even) and `g + 1` of rows `4 * i..` of a panel block.
///
/// # Safety
/// `block` must have these groups and rows.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn put_two_groups<const K: usize>(block: &mut [u8], g: usize, i: usize, a: int8x16_t, b: int8x16_t) {
    // SAFETY: the caller's promise.
    unsafe {
        let p = block.as_mut_ptr().add(g * 64 + i * 4 * K);
        if K == MATRIX {
            vst2q_s32(p.cast(), int32x4x2_t(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
        } else {
            vst1q_s8(p.cast(), a);
            vst1q_s8(p.add(64).cast(), b);
        }
    }
}

#[target_feature(enable = "neon")]
pub(super) fn panel_up<const K: usize>(up: &UpLayout, region: &[u8], first: usize, panel: &mut [u8]) {
    if up.ty.has_codes() {
        return plane_rows::panel_rows(layout::<K>(), up, region, first, panel);
    }
    let (scales, nibbles) = region.split_at(up.scales_bytes);
    for (b, block) in panel.chunks_exact_mut(PANEL_BLOCK).enumerate() {
        let mut d = [0; 2 * R16_ROWS];
        for (r, d) in d.chunks_exact_mut(2).enumerate() {
            d.copy_from_slice(&scales[((first + r) * up.kb + b) * 2..][..2]);
            let qs = &nibbles[(first + r) * up.row_bytes + b * 16..][..16];
            for (g, quad) in qs.as_chunks().0.iter().enumerate() {
                put_nibbles::<K>(block, g, r, *quad);
            }
        }
        put_scales(block, &d);
    }
}

#[target_feature(enable = "neon")]
pub(super) fn panel_down<const K: usize>(down: &DownLayout, region: &[u8], chunk: usize, panels: &mut [u8]) {
    if down.ty.has_codes() {
        return plane_columns::panel_down(layout::<K>(), down, region, chunk, panels);
    }
    for b in 0..down.fb {
        let group = down.group(region, b);
        let (scales, rows) = (group.heads, group.rows);
        for v in 0..8 {
            let block = &mut panels[(v * down.fb + b) * PANEL_BLOCK..][..PANEL_BLOCK];
            for quad in 0..8 {
                let row = |i: usize| &rows[(quad * 4 + i) * down.row_bytes + chunk * 64..][..64];
                let w = [row(0), row(1), row(2), row(3)];
                for r in 0..R16_ROWS {
                    // Output 16v + r of the chunk is in byte 16L + 4v + e, where r = 4L + e.
                    let at = r / 4 * 16 + v % 4 * 4 + r % 4;
                    let w = u32::from_ne_bytes(w.map(|w| w[at]));
                    put_quad::<K>(block, quad, r, w >> (v / 4 * 4) & 0x0f0f_0f0f);
                }
            }
            put_scales(block, &scales[chunk * 256 + v * 32..]);
        }
    }
}

/// Sums of integers of four tokens and 16 rows.
pub(super) type Sums = [[int32x4_t; 4]; UNIT_ROWS];

/// What [`gemm`] asks for, four columns at a time.
///
/// # Safety
/// The CPU must have what `D` needs; `w` must be a panel block and `a` a unit's, which have the groups.
#[inline(always)]
pub(super) unsafe fn dot_sums<D: Dot>(w: *const i8, a: *const i8, groups: Range<usize>, start: int32x4_t) -> Sums {
    // SAFETY: the caller's promise: groups of 4 columns, of 16 rows and of 4 tokens.
    unsafe {
        let mut sums: Sums = [
            [vdupq_laneq_s32::<0>(start); 4],
            [vdupq_laneq_s32::<1>(start); 4],
            [vdupq_laneq_s32::<2>(start); 4],
            [vdupq_laneq_s32::<3>(start); 4],
        ];
        for g in groups {
            let q = vld1q_s8(a.add(g * 16));
            for i in 0..4 {
                let w = vld1q_s8(w.add(g * 64 + i * 16));
                sums[0][i] = D::lane::<0>(sums[0][i], w, q);
                sums[1][i] = D::lane::<1>(sums[1][i], w, q);
                sums[2][i] = D::lane::<2>(sums[2][i], w, q);
                sums[3][i] = D::lane::<3>(sums[3][i], w, q);
            }
        }
        sums
    }
}

/// Two tokens and two rows of the panel to an instruction.
#[target_feature(enable = "neon,i8mm")]
pub(super) fn gemm_matrix(kind: PanelKind, kb: usize, panel: &[u8], units: &[u8], out: &mut PanelOutputs) {
    gemm::<MATRIX>(kind, kb, panel, units, out, |w, a, groups, start| {
        // Of tokens 0 and 1, and of 2 and 3: two rows for the first, two for the second.
        let mut sums = [[vzip1q_s32(start, start); 8], [vzip2q_s32(start, start); 8]];
        for g in groups {
            // SAFETY: a block has groups of 8 columns, of 16 rows and of 4 tokens.
            unsafe {
                let q = [0, 16].map(|i| vld1q_s32(a.add(g * 32 + i).cast()));
                let q = [vzip1q_s32(q[0], q[1]), vzip2q_s32(q[0], q[1])].map(|q| vreinterpretq_s8_s32(q));
                for i in 0..8 {
                    let w = vld1q_s8(w.add(g * 128 + i * 16));
                    sums[0][i] = smmla(sums[0][i], q[0], w);
                    sums[1][i] = smmla(sums[1][i], q[1], w);
                }
            }
        }
        std::array::from_fn(|t| {
            std::array::from_fn(|i| {
                let [a, b] = [2 * i, 2 * i + 1].map(|i| vreinterpretq_s64_s32(sums[t / 2][i]));
                vreinterpretq_s32_s64(if t % 2 == 0 { vzip1q_s64(a, b) } else { vzip2q_s64(a, b) })
            })
        })
    });
}

/// Four tokens at a time; `sums` takes the bytes of one block of the panel and of the unit, the groups of `K` columns of a sub-block, and
/// what the sums of the tokens start from.
#[inline(always)]
pub(super) fn gemm<const K: usize>(
    kind: PanelKind,
    kb: usize,
    panel: &[u8],
    units: &[u8],
    out: &mut PanelOutputs,
    sums: impl Fn(*const i8, *const i8, Range<usize>, int32x4_t) -> Sums,
) {
    match (kind.sub_blocks, kind.has_minima) {
        (1, false) => gemm_of::<K, 1, false>(kind, kb, panel, units, out, sums),
        (1, true) => gemm_of::<K, 1, true>(kind, kb, panel, units, out, sums),
        (_, false) => gemm_of::<K, 2, false>(kind, kb, panel, units, out, sums),
        (_, true) => gemm_of::<K, 2, true>(kind, kb, panel, units, out, sums),
    }
}

/// [`gemm`] for blocks of `SUBS` scales for each row.
#[inline(always)]
fn gemm_of<const K: usize, const SUBS: usize, const MINIMA: bool>(
    kind: PanelKind,
    kb: usize,
    panel: &[u8],
    units: &[u8],
    out: &mut PanelOutputs,
    sums: impl Fn(*const i8, *const i8, Range<usize>, int32x4_t) -> Sums,
) {
    let block_bytes = kind.block_bytes();
    assert!(panel.len() >= kb * block_bytes && units.len() <= GEMM_UNITS * kb * UNIT_BLOCK);
    let offset = match kind.values {
        Values::Nibbles { offset } => offset,
        Values::Signed => 0,
    };
    let groups = BLOCK_LEN / K / SUBS;
    for (unit, out) in units.chunks_exact(kb * UNIT_BLOCK).zip(out.chunks_exact_mut(UNIT_ROWS * R16_ROWS)) {
        out.fill(0.0);
        for (b, sub) in (0..kb).flat_map(|b| (0..SUBS).map(move |sub| (b, sub))) {
            // SAFETY: block `b` of the panel and of the unit; out has 64 floats; NEON is part of AArch64.
            unsafe {
                let w = panel.as_ptr().add(b * block_bytes);
                let a = unit.as_ptr().add(b * UNIT_BLOCK);
                let d_a: [f32; UNIT_ROWS] = a.add(128).cast::<[f32; UNIT_ROWS]>().read_unaligned();
                let halves = vld1q_s16(a.add(144).cast());
                let totals = match (SUBS, sub) {
                    (1, _) => vpaddlq_s16(halves),
                    (_, 0) => vmovl_s16(vget_low_s16(vuzp1q_s16(halves, halves))),
                    _ => vmovl_s16(vget_low_s16(vuzp2q_s16(halves, halves))),
                };
                let mut total = [0; UNIT_ROWS];
                vst1q_s32(total.as_mut_ptr(), totals);
                let start = vmulq_n_s32(totals, -offset);
                let sums = sums(w.cast(), a.cast(), sub * groups..(sub + 1) * groups, start);
                for (t, sums) in sums.into_iter().enumerate() {
                    for (i, sum) in sums.into_iter().enumerate() {
                        let scale = |at: usize| vld1q_f32(w.add(PANEL_VALUES + at * 64 + i * 16).cast());
                        let p = out.as_mut_ptr().add(t * R16_ROWS + i * 4);
                        let d_a = vdupq_n_f32(d_a[t]);
                        let mut acc = add_block(vld1q_f32(p), sum, scale(sub), d_a);
                        if MINIMA {
                            acc = add_block(acc, vdupq_n_s32(total[t]), scale(SUBS + sub), d_a);
                        }
                        vst1q_f32(p, acc);
                    }
                }
            }
        }
    }
}
