//! Whole matrices times one token or a few: each byte of weights is read once, in order.

use std::arch::aarch64::*;

use super::dot::Dot;
use super::neon::{add_block, load_f16, nibbles, prefetch};
use super::planes;
use crate::activations::{ActRow, start};
use crate::r16::{R16_ROWS, tile_bytes};
use crate::weight_type::BLOCK_LEN;
use crate::weight_type::WeightType;

/// How far ahead of the tile in use the next ones are requested, in bytes.
const PREFETCH: usize = 2304;

/// # Safety
/// The CPU must have what `D` needs; tiles are whole and tokens have kb blocks and an output for each row.
#[inline(always)]
pub(super) unsafe fn gemv_r16<D: Dot>(
    ty: WeightType,
    kb: usize,
    tiles: &[u8],
    acts: &[ActRow<'_>],
    out: &mut [&mut [f32]],
) {
    // SAFETY: the caller's promise.
    unsafe {
        if ty.has_codes() {
            return planes::gemv::<D>(ty, kb, tiles, acts, out);
        }
        for (i, group) in tiles.chunks_exact(kb * tile_bytes(ty)).enumerate() {
            for (a, out) in acts.iter().zip(out.iter_mut()) {
                let out = &mut out[i * R16_ROWS..][..R16_ROWS];
                match ty {
                    WeightType::Q4_0 => gemv_of::<288, D>(kb, group, *a, out),
                    _ => gemv_of::<544, D>(kb, group, *a, out),
                }
            }
        }
    }
}

/// # Safety
/// The CPU must have what `D` needs; `tiles` has `kb * TILE` bytes per 16 outputs (288 of Q4_0, 544 of Q8_0), `a` at least kb blocks.
#[inline(always)]
unsafe fn gemv_of<const TILE: usize, D: Dot>(kb: usize, tiles: &[u8], a: ActRow<'_>, out: &mut [f32]) {
    let mut tile = tiles.as_ptr();
    for out in out.chunks_exact_mut(R16_ROWS) {
        // SAFETY: NEON is part of AArch64.
        let mut acc = unsafe { [vdupq_n_f32(0.0); 4] };
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
                                s0 = D::lane::<$g>(s0, lo, q0);
                                s1 = D::lane::<$g>(s1, hi, q1);
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
                                s0 = D::lane::<$g>(s0, vld1q_s8(w($g).cast()), q0);
                                s1 = D::lane::<$g>(s1, vld1q_s8(w($g + 4).cast()), q1);
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
///
/// # Safety
/// The CPU must have what `D` needs.
#[inline(always)]
pub(super) unsafe fn q8_rows<D: Dot>(kb: usize, region: &[u8], rows: &[u32], a: ActRow<'_>, out: &mut [f32]) {
    for (&row, out) in rows.iter().zip(out) {
        let blocks = &region[row as usize * kb * 34..][..kb * 34];
        let mut acc = 0f32;
        for (b, block) in blocks.chunks_exact(34).enumerate() {
            let q = &a.q[b * BLOCK_LEN..][..BLOCK_LEN];
            // SAFETY: the caller's promise; the block has 34 bytes and the activations 32.
            acc = unsafe {
                let w = block.as_ptr().add(2).cast::<i8>();
                let s = D::dot(vdupq_n_s32(0), vld1q_s8(w), vld1q_s8(q.as_ptr()));
                let s = D::dot(s, vld1q_s8(w.add(16)), vld1q_s8(q.as_ptr().add(16)));
                (vaddvq_s32(s) as f32).mul_add(vgetq_lane_f32::<0>(load_f16(block.as_ptr())) * a.d[b], acc)
            };
        }
        *out = acc;
    }
}
