//! One token or a few through one expert: the rows of up that live, and down by the live neurons.

use std::arch::aarch64::*;

use super::dot::Dot;
use super::neon::{add_block, load_f16, nibbles, prefetch};
use crate::activations::{ActRow, start};
use crate::down_layout::OUTPUT_CHUNK;
use crate::live::fours::{self, Ahead};
use crate::live::{LivePlace, LiveToken};
use crate::up_layout::UpLayout;
use crate::weight_type::BLOCK_LEN;

/// Rows of up of Q4_0, at most 16: see [`each_up_block`](crate::live::fours::each_up_block).
///
/// # Safety
/// The CPU must have what `D` needs.
#[inline(always)]
pub(super) unsafe fn up_block<D: Dot>(
    up: &UpLayout,
    region: &[u8],
    rows: &[u32],
    ahead: &Ahead,
    a: ActRow<'_>,
    out: &mut [f32],
) {
    // SAFETY: the caller's promise.
    unsafe {
        match rows.len().div_ceil(4) {
            1 => up_fours::<1, D>(up, region, rows, ahead, a, out),
            2 => up_fours::<2, D>(up, region, rows, ahead, a, out),
            3 => up_fours::<3, D>(up, region, rows, ahead, a, out),
            _ => up_fours::<4, D>(up, region, rows, ahead, a, out),
        }
    }
}

/// `F` times four rows, the last ones repeated where there are fewer; lanes are rows. Line by line across the rows, as they were
/// requested.
///
/// # Safety
/// The CPU must have what `D` needs.
#[inline(always)]
unsafe fn up_fours<const F: usize, D: Dot>(
    up: &UpLayout,
    region: &[u8],
    rows: &[u32],
    ahead: &Ahead,
    a: ActRow<'_>,
    out: &mut [f32],
) {
    let (scales, qs) = region.split_at(up.scales_bytes);
    let fours = fours::in_fours::<F>(rows);
    let w = fours.map(|rows| rows.map(|r| &qs[r * up.row_bytes..][..up.row_bytes]));
    let s = fours.map(|rows| rows.map(|r| &scales[r * up.kb * 2..][..up.kb * 2]));
    // SAFETY: the caller's promise; rows have 16 bytes in each block, the activations 32.
    unsafe {
        let mut acc = [vdupq_n_f32(0.0); F];
        for line in 0..up.kb.div_ceil(4) {
            for (f, acc) in acc.iter_mut().enumerate() {
                ahead.request(prefetch);
                for b in line * 4..up.kb.min(line * 4 + 4) {
                    let q = &a.q[b * BLOCK_LEN..][..BLOCK_LEN];
                    let (q0, q1) = (vld1q_s8(q.as_ptr()), vld1q_s8(q.as_ptr().add(16)));
                    let mut sums = [vdupq_n_s32(0); 4];
                    for (sum, w) in sums.iter_mut().zip(&w[f]) {
                        let (lo, hi) = nibbles(vld1q_u8(w[b * 16..][..16].as_ptr()));
                        *sum = D::dot(D::dot(*sum, lo, q0), hi, q1);
                    }
                    let sums = vpaddq_s32(vpaddq_s32(sums[0], sums[1]), vpaddq_s32(sums[2], sums[3]));
                    let isum = vaddq_s32(sums, vdupq_n_s32(start(8, a.sums[b])));
                    let mut halves = [0u8; 8];
                    for (half, s) in halves.chunks_exact_mut(2).zip(s[f]) {
                        half.copy_from_slice(&s[b * 2..b * 2 + 2]);
                    }
                    *acc = add_block(*acc, isum, load_f16(halves.as_ptr()), vdupq_n_f32(a.d[b]));
                }
            }
        }
        fours::put_fours(acc.map(|v| four_floats(v)), out);
    }
}

/// The floats of a vector.
#[inline]
#[target_feature(enable = "neon")]
fn four_floats(v: float32x4_t) -> [f32; 4] {
    let mut floats = [0.0; 4];
    // SAFETY: 4 floats.
    unsafe { vst1q_f32(floats.as_mut_ptr(), v) };
    floats
}

/// Adds what the live neurons of a group of Q4_0 do to the outputs of a chunk.
///
/// # Safety
/// The CPU must have what `D` needs; the group must have the chunk, the token's rows be among the group's.
#[inline(always)]
pub(super) unsafe fn add_chunk<D: Dot>(
    group: LivePlace,
    token: &LiveToken,
    chunk: usize,
    out: &mut [f32; OUTPUT_CHUNK],
) {
    // SAFETY: the caller's promise: a chunk is 64 bytes of each row, with a scale for each of its 128 outputs.
    unsafe {
        let d_a = vdupq_n_f32(token.d);
        // 16 of the chunk's 64 bytes at a time: sums 0..4 are outputs 16v + 4 part.., 4..8 are 64 + 16v + 4 part..
        for part in 0..4 {
            let mut sums = [vdupq_n_s32(start(8, token.sums)); 8];
            for (at, quad) in token.fours(0) {
                let q = vreinterpretq_s8_s32(vdupq_n_s32(*quad));
                let mut w = [vdupq_n_u8(0); 4];
                for (w, at) in w.iter_mut().zip(at) {
                    *w = vld1q_u8(group.rows.add(*at as usize + chunk * 64 + part * 16));
                }
                for (v, w) in interleave(w).into_iter().enumerate() {
                    let (lo, hi) = nibbles(w);
                    sums[v] = D::dot(sums[v], lo, q);
                    sums[v + 4] = D::dot(sums[v + 4], hi, q);
                }
            }
            for (v, sum) in sums.into_iter().enumerate() {
                let at = v * 16 + part * 4;
                let d_w = load_f16(group.heads.add((chunk * OUTPUT_CHUNK + at) * 2));
                let p = out.as_mut_ptr().add(at);
                vst1q_f32(p, add_block(vld1q_f32(p), sum, d_w, d_a));
            }
        }
    }
}

/// Interleaves the bytes of four rows: vector `v`, 32-bit lane `i` of the result holds byte `4v + i` of each.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn interleave(w: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
    let pairs = |a, b| (vreinterpretq_u16_u8(vzip1q_u8(a, b)), vreinterpretq_u16_u8(vzip2q_u8(a, b)));
    let ((ab_lo, ab_hi), (cd_lo, cd_hi)) = (pairs(w[0], w[1]), pairs(w[2], w[3]));
    [
        vreinterpretq_u8_u16(vzip1q_u16(ab_lo, cd_lo)),
        vreinterpretq_u8_u16(vzip2q_u16(ab_lo, cd_lo)),
        vreinterpretq_u8_u16(vzip1q_u16(ab_hi, cd_hi)),
        vreinterpretq_u8_u16(vzip2q_u16(ab_hi, cd_hi)),
    ]
}
