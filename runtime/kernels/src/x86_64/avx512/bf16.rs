//! Attention over a BF16 cache by products of pairs: `vdpbf16ps` adds the product of the upper halves of two words and then that of
//! the lower ones, each rounded to f32 as a fused multiply-add is. So the bits are those of the other kernels, except that sums
//! below 2^-126 become 0.

use std::arch::x86_64::*;
use std::ops::Range;

use super::attention::{self, by_count};
use crate::kv::{KV_CHUNK, KV_TILE, KvType};
use crate::weight_type::BLOCK_LEN;
use crate::x86_64::request::prefetch;

/// Dimensions whose sums stay in registers.
const DIMS: usize = 128;
/// How far ahead of the bytes in use the next ones are requested: what follows the keys of a chunk is its values.
const AHEAD: usize = 8192;

pub(super) fn scores(ty: KvType, dim: usize, keys: &[u8], tiles: Range<usize>, q: &[f32], out: &mut [f32]) {
    if ty != KvType::Bf16 {
        return attention::scores(ty, dim, keys, tiles, q, out);
    }
    let n = q.len() / dim;
    assert!(keys.len() == ty.bytes(KV_CHUNK * dim) && tiles.end * KV_TILE <= KV_CHUNK && out.len() == n * KV_CHUNK);
    // SAFETY: the callers of a table's functions have the CPU features; the sizes are checked.
    unsafe { by_count!(n, scores_of<>(dim, keys, tiles, q, out)) }
}

/// Two tiles (32 positions) at a time, then the odd one.
///
/// # Safety
/// As checked in [`scores`], N being the number of queries.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn scores_of<const N: usize>(dim: usize, keys: &[u8], tiles: Range<usize>, q: &[f32], out: &mut [f32]) {
    let mut paired = [[0; DIMS / 2]; N];
    for first in (0..dim).step_by(DIMS) {
        let dims = first..dim.min(first + DIMS);
        for (paired, q) in paired.iter_mut().zip(q.chunks_exact(dim)) {
            pair_up(&q[dims.clone()], paired);
        }
        let mut tile = tiles.start;
        // SAFETY: the tiles are in the chunk.
        unsafe {
            while tile + 2 <= tiles.end {
                scores_tiles::<N, 2>(dim, keys, tile, dims.clone(), &paired, out);
                tile += 2;
            }
            if tile < tiles.end {
                scores_tiles::<N, 1>(dim, keys, tile, dims, &paired, out);
            }
        }
    }
}

/// The dimensions `dims` of `T` tiles; sums go on from what `out` holds, except for the first.
///
/// # Safety
/// The tiles must be in the chunk, and the dimensions in a tile.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn scores_tiles<const N: usize, const T: usize>(
    dim: usize,
    keys: &[u8],
    tile: usize,
    dims: Range<usize>,
    q: &[[i32; DIMS / 2]; N],
    out: &mut [f32],
) {
    // SAFETY: tiles in the chunk, dimensions in a tile, no more than DIMS of them taken; scores of each query have KV_CHUNK
    // floats.
    unsafe {
        let at: [*const u8; T] =
            std::array::from_fn(|t| keys.as_ptr().add(KvType::Bf16.bytes(KV_TILE * ((tile + t) * dim + dims.start))));
        let mut acc = [[_mm512_setzero_ps(); T]; N];
        let out = out.as_mut_ptr().add(tile * KV_TILE);
        if dims.start > 0 {
            for (n, acc) in acc.iter_mut().enumerate() {
                for (t, acc) in acc.iter_mut().enumerate() {
                    *acc = _mm512_loadu_ps(out.add(n * KV_CHUNK + t * KV_TILE));
                }
            }
        }
        for i in 0..dims.len().min(DIMS) / 2 {
            let k: [__m512i; T] = std::array::from_fn(|t| {
                prefetch(at[t].wrapping_add(i * 4 * KV_TILE + AHEAD));
                _mm512_loadu_si512(at[t].add(i * 4 * KV_TILE).cast())
            });
            for (acc, q) in acc.iter_mut().zip(q) {
                let q = _mm512_set1_epi32(*q.get_unchecked(i));
                for (acc, k) in acc.iter_mut().zip(k) {
                    *acc = add_products(*acc, k, q);
                }
            }
        }
        for (n, acc) in acc.iter().enumerate() {
            for (t, acc) in acc.iter().enumerate() {
                _mm512_storeu_ps(out.add(n * KV_CHUNK + t * KV_TILE), *acc);
            }
        }
    }
}

pub(super) fn values(ty: KvType, dim: usize, values: &[u8], positions: Range<usize>, p: &[f32], acc: &mut [f32]) {
    if ty != KvType::Bf16 {
        return attention::values(ty, dim, values, positions, p, acc);
    }
    let n = acc.len() / dim;
    assert!(values.len() == ty.bytes(KV_CHUNK * dim) && positions.end <= KV_CHUNK && p.len() == n * KV_CHUNK);
    let pairs = positions.start / 2..positions.end.div_ceil(2);
    // SAFETY: the callers of a table's functions have the CPU features; the sizes are checked.
    unsafe { by_count!(n, values_of<>(dim, values, pairs, p, acc)) }
}

/// 32 dimensions at a time, all pairs of positions.
///
/// # Safety
/// As checked in [`values`], N being the number of queries.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn values_of<const N: usize>(dim: usize, values: &[u8], pairs: Range<usize>, p: &[f32], acc: &mut [f32]) {
    let mut paired = [[0; KV_CHUNK / 2]; N];
    for (paired, p) in paired.iter_mut().zip(p.chunks_exact(KV_CHUNK)) {
        pair_up(p, paired);
    }
    for block in 0..dim / BLOCK_LEN {
        let mut sums = [[_mm512_setzero_ps(); 2]; N];
        // SAFETY: blocks of KV_CHUNK positions, as many as dim / 32; pairs.end <= KV_CHUNK / 2.
        unsafe {
            let base = values.as_ptr().add(block * KvType::Bf16.bytes(KV_CHUNK * BLOCK_LEN));
            for j in pairs.clone() {
                let at = base.add(j * 4 * BLOCK_LEN);
                prefetch(at.wrapping_add(AHEAD));
                prefetch(at.wrapping_add(AHEAD + 64));
                let v = [_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(64).cast())];
                for (sums, p) in sums.iter_mut().zip(&paired) {
                    let p = _mm512_set1_epi32(*p.get_unchecked(j));
                    for (sum, v) in sums.iter_mut().zip(v) {
                        *sum = add_products(*sum, v, p);
                    }
                }
            }
            for (n, sums) in sums.iter().enumerate() {
                let out = acc.as_mut_ptr().add(n * dim + block * BLOCK_LEN);
                _mm512_storeu_ps(out, sums[0]);
                _mm512_storeu_ps(out.add(16), sums[1]);
            }
        }
    }
}

/// Values, already rounded, two to a word: the first in the upper half.
#[inline(always)]
fn pair_up(values: &[f32], words: &mut [i32]) {
    for (word, [first, second]) in words.iter_mut().zip(values.as_chunks().0) {
        *word = (first.to_bits() | second.to_bits() >> 16) as i32;
    }
}

/// `acc + upper halves' products + lower halves' products`, lane by lane and in this order.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn add_products(acc: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: both types are 512 bits without meaning of their own.
    let [a, b] = [a, b].map(|v| unsafe { std::mem::transmute::<__m512i, __m512bh>(v) });
    _mm512_dpbf16_ps(acc, a, b)
}
