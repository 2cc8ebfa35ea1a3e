//! Many tokens: weights are unpacked once into a panel (16 rows, bytes and f32 scales; nibbles with their offset of 8, Q8_0 signed),
//! which then meets four tokens at a time.

use std::arch::aarch64::*;

use half::f16;

use super::{add_block, sdot_lane};
use crate::WeightType;
use crate::activations::{UNIT_BLOCK, UNIT_ROWS};
use crate::dispatch::{GEMM_UNITS, PANEL_BLOCK};
use crate::expert_format::{DownLayout, UpLayout};
use crate::r16::{R16_ROWS, tile_bytes};

/// f16 scale `from` bytes into `scales` as scale `r` of a panel block.
fn put_scale(block: &mut [u8], r: usize, scales: &[u8], from: usize) {
    let d = f16::from_le_bytes([scales[from], scales[from + 1]]).to_f32();
    block[512 + r * 4..][..4].copy_from_slice(&d.to_ne_bytes());
}

pub(super) fn panel_r16(ty: WeightType, _kb: usize, tiles: &[u8], panel: &mut [u8]) {
    for (tile, block) in tiles.chunks_exact(tile_bytes(ty)).zip(panel.chunks_exact_mut(PANEL_BLOCK)) {
        let (scales, values) = tile.split_at(32);
        if ty == WeightType::Q4_0 {
            let (lo, hi) = block[..512].split_at_mut(256);
            for ((w, lo), hi) in values.iter().zip(lo).zip(hi) {
                (*lo, *hi) = (w & 15, w >> 4);
            }
        } else {
            block[..512].copy_from_slice(values);
        }
        for r in 0..R16_ROWS {
            put_scale(block, r, scales, r * 2);
        }
    }
}

pub(super) fn panel_up(up: &UpLayout, region: &[u8], first: usize, panel: &mut [u8]) {
    let (scales, nibbles) = region.split_at(up.scales_bytes);
    for (b, block) in panel.chunks_exact_mut(PANEL_BLOCK).enumerate() {
        for r in 0..R16_ROWS {
            let qs = &nibbles[(first + r) * up.row_bytes + b * 16..][..16];
            for (g, quad) in qs.chunks_exact(4).enumerate() {
                put_quad(block, g, r, [quad[0], quad[1], quad[2], quad[3]], 0);
                put_quad(block, g + 4, r, [quad[0], quad[1], quad[2], quad[3]], 4);
            }
            put_scale(block, r, scales, ((first + r) * up.kb + b) * 2);
        }
    }
}

/// The low (`shift` 0) or high (4) nibbles of four bytes as group `g` of row `r` of a panel block.
#[inline(always)]
fn put_quad(block: &mut [u8], g: usize, r: usize, quad: [u8; 4], shift: u32) {
    let w = u32::from_ne_bytes(quad) >> shift & 0x0f0f_0f0f;
    block[(g * R16_ROWS + r) * 4..][..4].copy_from_slice(&w.to_ne_bytes());
}

pub(super) fn panel_down(down: &DownLayout, region: &[u8], chunk: usize, panels: &mut [u8]) {
    for (b, group) in region.chunks_exact(down.group_bytes).enumerate() {
        let (scales, rows) = group.split_at(down.padded * 2);
        for v in 0..8 {
            let block = &mut panels[(v * down.fb + b) * PANEL_BLOCK..][..PANEL_BLOCK];
            for quad in 0..8 {
                let row = |i: usize| &rows[(quad * 4 + i) * down.row_bytes + chunk * 64..][..64];
                let w = [row(0), row(1), row(2), row(3)];
                for r in 0..R16_ROWS {
                    // Output 16v + r of the chunk is in byte 16L + 4v + e, where r = 4L + e.
                    let at = r / 4 * 16 + v % 4 * 4 + r % 4;
                    put_quad(block, quad, r, w.map(|w| w[at]), if v < 4 { 0 } else { 4 });
                }
            }
            for r in 0..R16_ROWS {
                put_scale(block, r, scales, (chunk * 128 + v * 16 + r) * 2);
            }
        }
    }
}

pub(super) fn gemm(
    ty: WeightType,
    kb: usize,
    panel: &[u8],
    units: &[u8],
    out: &mut [f32; GEMM_UNITS * UNIT_ROWS * R16_ROWS],
) {
    assert!(panel.len() >= kb * PANEL_BLOCK && units.len() <= GEMM_UNITS * kb * UNIT_BLOCK);
    for (unit, out) in units.chunks_exact(kb * UNIT_BLOCK).zip(out.chunks_exact_mut(UNIT_ROWS * R16_ROWS)) {
        // SAFETY: the callers of a table's functions have the CPU features; the sizes are checked.
        unsafe { tokens(kb, panel, unit, i32::from(ty == WeightType::Q4_0), out) };
    }
}

/// Four tokens; `bias` is 1 if the panel's values have an offset of 8, else 0.
///
/// # Safety
/// `panel` and `unit` have kb blocks, `out` 64 floats.
#[target_feature(enable = "neon,dotprod")]
unsafe fn tokens(kb: usize, panel: &[u8], unit: &[u8], bias: i32, out: &mut [f32]) {
    out.fill(0.0);
    for b in 0..kb {
        // SAFETY: block `b` of the panel and of the unit; out has 64 floats.
        unsafe {
            let w = panel.as_ptr().add(b * PANEL_BLOCK);
            let a = unit.as_ptr().add(b * UNIT_BLOCK);
            let d_a: [f32; UNIT_ROWS] = a.add(128).cast::<[f32; UNIT_ROWS]>().read_unaligned();
            let start: [i32; UNIT_ROWS] = a.add(144).cast::<[i32; UNIT_ROWS]>().read_unaligned();
            let mut sums: [[int32x4_t; 4]; UNIT_ROWS] = std::array::from_fn(|t| [vdupq_n_s32(start[t] * bias); 4]);
            for g in 0..8 {
                let q = vld1q_s8(a.add(g * 16).cast());
                for i in 0..4 {
                    let w = vld1q_s8(w.add(g * 64 + i * 16).cast());
                    sums[0][i] = sdot_lane::<0>(sums[0][i], w, q);
                    sums[1][i] = sdot_lane::<1>(sums[1][i], w, q);
                    sums[2][i] = sdot_lane::<2>(sums[2][i], w, q);
                    sums[3][i] = sdot_lane::<3>(sums[3][i], w, q);
                }
            }
            for (t, sums) in sums.into_iter().enumerate() {
                for (i, sum) in sums.into_iter().enumerate() {
                    let d_w = vld1q_f32(w.add(512 + i * 16).cast());
                    let p = out.as_mut_ptr().add(t * R16_ROWS + i * 4);
                    vst1q_f32(p, add_block(vld1q_f32(p), sum, d_w, vdupq_n_f32(d_a[t])));
                }
            }
        }
    }
}
