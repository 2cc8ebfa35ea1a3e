//! Attention over one chunk of the KV cache: lanes are positions for the scores and dimensions for the values.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::kv::{KV_CHUNK, KV_TILE, KvType};
use crate::scalar;
use crate::table::SoftmaxState;
use crate::weight_type::BLOCK_LEN;

/// Values `16 * i..` of row `2 * pair + odd`, rows of `width` cached values beginning at `rows`; times `scale` where they are int8.
///
/// # Safety
/// The row must exist; `odd` is 0 or 1.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn load16(
    ty: KvType,
    rows: *const u8,
    width: usize,
    pair: usize,
    odd: usize,
    i: usize,
    scale: [__m256; 2],
) -> [__m256; 2] {
    // SAFETY: the caller's promise; the words of a pair of rows take as much as two rows.
    unsafe {
        let p = rows.add(((2 * pair + odd) * width / 16 + i) * step(ty));
        match ty {
            KvType::Bf16 => {
                let words = rows.add((pair * width / 16 + i) * 2 * step(ty)).cast::<__m256i>();
                [words, words.add(1)].map(|words| {
                    let words = _mm256_loadu_si256(words);
                    _mm256_castsi256_ps(if odd == 0 {
                        _mm256_and_si256(words, _mm256_set1_epi32(0xffff_0000_u32 as i32))
                    } else {
                        _mm256_slli_epi32::<16>(words)
                    })
                })
            }
            KvType::F16 => {
                let (a, b) = (_mm_loadu_si128(p.cast()), _mm_loadu_si128(p.add(16).cast()));
                [_mm256_cvtph_ps(a), _mm256_cvtph_ps(b)]
            }
            KvType::F32 => [_mm256_loadu_ps(p.cast()), _mm256_loadu_ps(p.add(32).cast())],
            KvType::Q8_0 => {
                let (a, b) = (_mm_loadl_epi64(p.cast()), _mm_loadl_epi64(p.add(8).cast()));
                [
                    _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(a)), scale[0]),
                    _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)), scale[1]),
                ]
            }
        }
    }
}

/// Bytes of 16 values without their scales.
const fn step(ty: KvType) -> usize {
    match ty {
        KvType::Bf16 | KvType::F16 => 32,
        KvType::F32 => 64,
        KvType::Q8_0 => 16,
    }
}

/// Runs a function generic over the number of queries for groups of up to four.
macro_rules! by_count {
    ($n:expr, $f:ident($($arg:expr),*)) => {
        match $n {
            1 => $f::<1>($($arg),*),
            2 => $f::<2>($($arg),*),
            3 => $f::<3>($($arg),*),
            _ => $f::<4>($($arg),*),
        }
    };
}

pub(super) fn scores(ty: KvType, dim: usize, keys: &[u8], tiles: Range<usize>, q: &[f32], out: &mut [f32]) {
    assert!(keys.len() == ty.bytes(KV_CHUNK * dim) && tiles.end * KV_TILE <= KV_CHUNK);
    assert!(q.len() * KV_CHUNK == out.len() * dim);
    for (q, out) in q.chunks(4 * dim).zip(out.chunks_mut(4 * KV_CHUNK)) {
        for tile in tiles.clone() {
            // SAFETY: the callers of a table's functions have the CPU features; the sizes are checked.
            unsafe { by_count!(q.len() / dim, scores_of(ty, dim, keys, tile, q, out)) };
        }
    }
}

/// # Safety
/// As checked in [`scores`]; `q` and `out` have N rows.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scores_of<const N: usize>(ty: KvType, dim: usize, keys: &[u8], tile: usize, q: &[f32], out: &mut [f32]) {
    let mut acc = [[_mm256_setzero_ps(); 2]; N];
    // SAFETY: the tile is in the chunk, and has `dim` dimensions; rows of q have `dim` floats, rows of out KV_CHUNK.
    unsafe {
        let block_bytes = ty.bytes(KV_TILE * BLOCK_LEN);
        let mut block = keys.as_ptr().add(tile * ty.bytes(KV_TILE * dim));
        for b in 0..dim / BLOCK_LEN {
            let mut scale = [_mm256_setzero_ps(); 2];
            if ty == KvType::Q8_0 {
                scale = load16(KvType::F16, block, KV_TILE, 0, 0, 0, scale);
            }
            let values = block.add(block_bytes - BLOCK_LEN * step(ty));
            for pair in 0..BLOCK_LEN / 2 {
                for odd in 0..2 {
                    let k = load16(ty, values, KV_TILE, pair, odd, 0, scale);
                    for (n, acc) in acc.iter_mut().enumerate() {
                        let q = _mm256_set1_ps(*q.get_unchecked(n * dim + b * BLOCK_LEN + 2 * pair + odd));
                        acc[0] = _mm256_fmadd_ps(k[0], q, acc[0]);
                        acc[1] = _mm256_fmadd_ps(k[1], q, acc[1]);
                    }
                }
            }
            block = block.add(block_bytes);
        }
        for (n, acc) in acc.iter().enumerate() {
            let out = out.as_mut_ptr().add(n * KV_CHUNK + tile * KV_TILE);
            _mm256_storeu_ps(out, acc[0]);
            _mm256_storeu_ps(out.add(8), acc[1]);
        }
    }
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn softmax(
    ty: KvType,
    s: &mut [f32],
    tiles: Range<usize>,
    visible: Range<usize>,
    scale: f32,
) -> SoftmaxState {
    scalar::softmax(ty, s, tiles, visible, scale)
}

pub(super) fn values(ty: KvType, dim: usize, values: &[u8], positions: Range<usize>, p: &[f32], acc: &mut [f32]) {
    assert!(values.len() == ty.bytes(KV_CHUNK * dim) && positions.end <= KV_CHUNK);
    assert!(p.len() * dim == acc.len() * KV_CHUNK);
    for (p, acc) in p.chunks(2 * KV_CHUNK).zip(acc.chunks_mut(2 * dim)) {
        // SAFETY: the callers of a table's functions have the CPU features; the sizes are checked.
        unsafe {
            match acc.len() / dim {
                1 => values_of::<1>(ty, dim, values, positions.clone(), p, acc),
                _ => values_of::<2>(ty, dim, values, positions.clone(), p, acc),
            }
        }
    }
}

/// 32 dimensions at a time, all positions.
///
/// # Safety
/// As checked in [`values`]; `p` and `acc` have N rows.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn values_of<const N: usize>(
    ty: KvType,
    dim: usize,
    values: &[u8],
    positions: Range<usize>,
    p: &[f32],
    acc: &mut [f32],
) {
    let scales = if ty == KvType::Q8_0 { 2 * KV_CHUNK } else { 0 };
    for block in 0..dim / BLOCK_LEN {
        let mut sums = [[[_mm256_setzero_ps(); 2]; 2]; N];
        // SAFETY: blocks of KV_CHUNK positions, as many as dim / 32; positions.end <= KV_CHUNK.
        unsafe {
            let base = values.as_ptr().add(block * ty.bytes(KV_CHUNK * BLOCK_LEN));
            for pair in positions.start / 2..positions.end.div_ceil(2) {
                for odd in 0..2 {
                    let j = 2 * pair + odd;
                    let mut scale = [_mm256_setzero_ps(); 2];
                    if ty == KvType::Q8_0 {
                        let half = base.add(j * 2).cast::<i16>().read_unaligned();
                        scale = [_mm256_cvtph_ps(_mm_set1_epi16(half)); 2];
                    }
                    let v = [0, 1].map(|i| load16(ty, base.add(scales), BLOCK_LEN, pair, odd, i, scale));
                    for (n, sums) in sums.iter_mut().enumerate() {
                        let p = _mm256_set1_ps(*p.get_unchecked(n * KV_CHUNK + j));
                        for (sums, v) in sums.iter_mut().zip(v) {
                            sums[0] = _mm256_fmadd_ps(v[0], p, sums[0]);
                            sums[1] = _mm256_fmadd_ps(v[1], p, sums[1]);
                        }
                    }
                }
            }
            for (n, sums) in sums.iter().enumerate() {
                let out = acc.as_mut_ptr().add(n * dim + block * BLOCK_LEN);
                for (i, &sum) in sums.as_flattened().iter().enumerate() {
                    _mm256_storeu_ps(out.add(i * 8), sum);
                }
            }
        }
    }
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn merge(state: SoftmaxState, acc: &mut [f32], part: SoftmaxState, values: &[f32]) -> SoftmaxState {
    scalar::merge(state, acc, part, values)
}
