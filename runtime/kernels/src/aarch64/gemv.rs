//! Whole matrices times one token or a few: each byte of weights is read once, in order.

use std::arch::aarch64::*;

use super::neon::{add_block, load_f16, nibbles, prefetch, sdot, sdot_lane};
use crate::activations::{ActRow, start};
use crate::live;
use crate::r16::{R16_ROWS, tile_bytes};
use crate::scalar;
use crate::weight_type::BLOCK_LEN;
use crate::weight_type::WeightType;

/// How far ahead of the tile in use the next ones are requested, in bytes.
const PREFETCH: usize = 2304;

pub(super) fn gemv_r16(ty: WeightType, kb: usize, tiles: &[u8], acts: &[ActRow<'_>], out: &mut [&mut [f32]]) {
    if ty.has_codes() {
        return scalar::planes::gemv(ty, kb, tiles, acts, out);
    }
    // SAFETY: the callers of a table's functions have the CPU features; tiles are whole and tokens have kb blocks and an output for
    // each row.
    live::each_row_group(kb * tile_bytes(ty), tiles, acts, out, |group, a, out| unsafe {
        match ty {
            WeightType::Q4_0 => gemv_of::<288>(kb, group, a, out),
            _ => gemv_of::<544>(kb, group, a, out),
        }
    });
}

/// # Safety
/// `tiles` has `kb * TILE` bytes per 16 outputs (288 of Q4_0, 544 of Q8_0), `a` at least kb blocks.
#[target_feature(enable = "neon,dotprod")]
unsafe fn gemv_of<const TILE: usize>(kb: usize, tiles: &[u8], a: ActRow<'_>, out: &mut [f32]) {
    let mut tile = tiles.as_ptr();
    for out in out.chunks_exact_mut(R16_ROWS) {
        let mut acc = [vdupq_n_f32(0.0); 4];
        for b in 0..kb {
            // SAFETY: this is tile `b` of a row group, and block `b` of the activations.
            unsafe {
                for line in 0..TILE.div_ceil(64) {
                    prefetch(tile.wrapping_add(PREFETCH + line * 64));
                }
                let q = a.q.as_ptr().add(b * BLOCK_LEN);
                let (q0, q1) = (vld1q_s8(q), vld1q_s8(q.add(16)));
                let d_a = vdupq_n_f32(*a.d.get_unchecked(b));
                for (i, acc) in acc.iter_mut().enumerate() {
                    let w = |g: usize| tile.add(32 + g * 64 + i * 16);
                    let isum = if TILE == 288 {
                        let mut s0 = vdupq_n_s32(start(8, *a.sums.get_unchecked(b)));
                        let mut s1 = vdupq_n_s32(0);
                        macro_rules! group {
                            ($g:literal) => {
                                let (lo, hi) = nibbles(vld1q_u8(w($g)));
                                s0 = sdot_lane::<$g>(s0, lo, q0);
                                s1 = sdot_lane::<$g>(s1, hi, q1);
                            };
                        }
                        group!(0);
                        group!(1);
                        group!(2);
                        group!(3);
                        vaddq_s32(s0, s1)
                    } else {
                        let (mut s0, mut s1) = (vdupq_n_s32(0), vdupq_n_s32(0));
                        macro_rules! group {
                            ($g:literal) => {
                                s0 = sdot_lane::<$g>(s0, vld1q_s8(w($g).cast()), q0);
                                s1 = sdot_lane::<$g>(s1, vld1q_s8(w($g + 4).cast()), q1);
                            };
                        }
                        group!(0);
                        group!(1);
                        group!(2);
                        group!(3);
                        vaddq_s32(s0, s1)
                    };
                    *acc = add_block(*acc, isum, load_f16(tile.add(i * 8)), d_a);
                }
                tile = tile.add(TILE);
            }
        }
        for (i, acc) in acc.into_iter().enumerate() {
            // SAFETY: out has 16 floats.
            unsafe { vst1q_f32(out.as_mut_ptr().add(i * 4), acc) };
        }
    }
}

/// Canonical Q8_0 rows, one block at a time.
#[target_feature(enable = "neon,dotprod")]
pub(super) fn q8_rows(kb: usize, region: &[u8], rows: &[u32], a: ActRow<'_>, out: &mut [f32]) {
    for (&row, out) in rows.iter().zip(out) {
        let blocks = &region[row as usize * kb * 34..][..kb * 34];
        let mut acc = 0f32;
        for (b, block) in blocks.chunks_exact(34).enumerate() {
            let q = &a.q[b * BLOCK_LEN..][..BLOCK_LEN];
            // SAFETY: the block has 34 bytes and the activations 32.
            let (s, d_w) = unsafe {
                let w = block.as_ptr().add(2).cast::<i8>();
                let s = sdot(vdupq_n_s32(0), vld1q_s8(w), vld1q_s8(q.as_ptr()));
                (sdot(s, vld1q_s8(w.add(16)), vld1q_s8(q.as_ptr().add(16))), load_f16(block.as_ptr()))
            };
            acc = (vaddvq_s32(s) as f32).mul_add(vgetq_lane_f32::<0>(d_w) * a.d[b], acc);
        }
        *out = acc;
    }
}
