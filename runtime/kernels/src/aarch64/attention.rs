//! Attention over one chunk of the KV cache: lanes are positions for the scores and dimensions for the values.

use std::arch::aarch64::*;
use std::ops::Range;

use super::neon::load_f16;
use crate::kv::{KV_CHUNK, KV_TILE, KvType};
use crate::weight_type::BLOCK_LEN;

/// Values `4 * i..` of row `2 * pair + odd`, rows of `width` cached values beginning at `rows`; times `scale` where they are int8.
///
/// # Safety
/// The row must exist; `odd` is 0 or 1.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load4(
    ty: KvType,
    rows: *const u8,
    width: usize,
    pair: usize,
    odd: usize,
    i: usize,
    scale: float32x4_t,
) -> float32x4_t {
    // SAFETY: the caller's promise; the words of a pair of rows take as much as two rows.
    unsafe {
        let p = rows.add(((2 * pair + odd) * width / 4 + i) * step(ty));
        match ty {
            KvType::Bf16 => {
                let words = vld1q_u32(rows.add((pair * width / 4 + i) * 2 * step(ty)).cast());
                vreinterpretq_f32_u32(if odd == 0 {
                    vandq_u32(words, vdupq_n_u32(0xffff_0000))
                } else {
                    vshlq_n_u32::<16>(words)
                })
            }
            KvType::F16 => load_f16(p),
            KvType::F32 => vld1q_f32(p.cast()),
            KvType::Q8_0 => {
                let q = vreinterpret_s8_s32(vdup_n_s32(p.cast::<i32>().read_unaligned()));
                vmulq_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(q)))), scale)
            }
        }
    }
}

/// Bytes of four values without their scales.
const fn step(ty: KvType) -> usize {
    match ty {
        KvType::Bf16 | KvType::F16 => 8,
        KvType::F32 => 16,
        KvType::Q8_0 => 4,
    }
}

#[target_feature(enable = "neon")]
pub(super) fn scores(ty: KvType, dim: usize, keys: &[u8], tiles: Range<usize>, q: &[f32], out: &mut [f32]) {
    assert!(keys.len() == ty.bytes(KV_CHUNK * dim) && tiles.end * KV_TILE <= KV_CHUNK);
    assert!(q.len() * KV_CHUNK == out.len() * dim);
    for (q, out) in q.chunks(4 * dim).zip(out.chunks_mut(4 * KV_CHUNK)) {
        // The last query again where there are fewer than four.
        let last = q.len() / dim - 1;
        let row = |n: usize| &q[n.min(last) * dim..][..dim];
        let q = [row(0), row(1), row(2), row(3)];
        for tile in tiles.clone() {
            let mut acc = [[vdupq_n_f32(0.0); 4]; 4];
            // SAFETY: the tile is in the chunk, and has `dim` dimensions; rows of out have KV_CHUNK floats.
            unsafe {
                let block_bytes = ty.bytes(KV_TILE * BLOCK_LEN);
                let mut block = keys.as_ptr().add(tile * ty.bytes(KV_TILE * dim));
                for b in 0..dim / BLOCK_LEN {
                    let scale: [float32x4_t; 4] = std::array::from_fn(|i| match ty {
                        KvType::Q8_0 => load_f16(block.add(i * 8)),
                        _ => vdupq_n_f32(0.0),
                    });
                    let values = block.add(block_bytes - BLOCK_LEN * 4 * step(ty));
                    for pair in 0..BLOCK_LEN / 2 {
                        for odd in 0..2 {
                            let d = b * BLOCK_LEN + 2 * pair + odd;
                            for i in 0..4 {
                                let k = load4(ty, values, KV_TILE, pair, odd, i, scale[i]);
                                for (acc, q) in acc.iter_mut().zip(q) {
                                    acc[i] = vfmaq_n_f32(acc[i], k, *q.get_unchecked(d));
                                }
                            }
                        }
                    }
                    block = block.add(block_bytes);
                }
                for (n, acc) in acc.into_iter().enumerate().take(last + 1) {
                    for (i, acc) in acc.into_iter().enumerate() {
                        vst1q_f32(out.as_mut_ptr().add(n * KV_CHUNK + tile * KV_TILE + i * 4), acc);
                    }
                }
            }
        }
    }
}

#[target_feature(enable = "neon")]
pub(super) fn values(ty: KvType, dim: usize, values: &[u8], positions: Range<usize>, p: &[f32], acc: &mut [f32]) {
    assert!(values.len() == ty.bytes(KV_CHUNK * dim) && positions.end <= KV_CHUNK);
    assert!(p.len() * dim == acc.len() * KV_CHUNK);
    let scales = if ty == KvType::Q8_0 { 2 * KV_CHUNK } else { 0 };
    for (p, acc) in p.chunks(2 * KV_CHUNK).zip(acc.chunks_mut(2 * dim)) {
        // The last query again where there is only one.
        let last = acc.len() / dim - 1;
        let p = [&p[..KV_CHUNK], &p[last * KV_CHUNK..][..KV_CHUNK]];
        for block in 0..dim / BLOCK_LEN {
            let mut sums = [[vdupq_n_f32(0.0); 8]; 2];
            // SAFETY: blocks of KV_CHUNK positions, as many as dim / 32; positions.end <= KV_CHUNK.
            unsafe {
                let base = values.as_ptr().add(block * ty.bytes(KV_CHUNK * BLOCK_LEN));
                for pair in positions.start / 2..positions.end.div_ceil(2) {
                    for odd in 0..2 {
                        let j = 2 * pair + odd;
                        let scale = match ty {
                            KvType::Q8_0 => {
                                let half = base.add(j * 2).cast::<[u8; 2]>().read();
                                vdupq_n_f32(half::f16::from_le_bytes(half).to_f32())
                            }
                            _ => vdupq_n_f32(0.0),
                        };
                        for i in 0..8 {
                            let v = load4(ty, base.add(scales), BLOCK_LEN, pair, odd, i, scale);
                            for (sums, p) in sums.iter_mut().zip(p) {
                                sums[i] = vfmaq_n_f32(sums[i], v, *p.get_unchecked(j));
                            }
                        }
                    }
                }
                for (n, sums) in sums.into_iter().enumerate().take(last + 1) {
                    for (i, sum) in sums.into_iter().enumerate() {
                        vst1q_f32(acc.as_mut_ptr().add(n * dim + block * BLOCK_LEN + i * 4), sum);
                    }
                }
            }
        }
    }
}
