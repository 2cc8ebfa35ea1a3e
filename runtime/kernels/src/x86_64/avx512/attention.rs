//! Attention over one chunk of the KV cache: lanes are positions for the scores and dimensions for the values.

use std::arch::x86_64::*;
use std::ops::Range;

use super::float::reduce;
use crate::kv::{KV_CHUNK, KV_TILE, KvType};
use crate::math::{EXP_MIN, EXP_POLY, LANES, LN2_HI, LN2_LO, LOG2E};
use crate::table::SoftmaxState;
use crate::weight_type::BLOCK_LEN;

/// How one type of cache is read, 16 values of a row at a time.
trait Cache {
    /// Bytes of 16 values; those of scales are apart.
    const STEP: usize;
    /// Values `16 * i..` of row `2 * pair + odd`, rows of `width` values beginning at `rows`.
    ///
    /// # Safety
    /// The row must exist; `odd` is 0 or 1.
    unsafe fn load(rows: *const u8, width: usize, pair: usize, odd: usize, i: usize, scale: __m512) -> __m512;
}

/// # Safety
/// As [`Cache::load`], rows lying one after the other.
#[inline]
unsafe fn row_at<C: Cache>(rows: *const u8, width: usize, pair: usize, odd: usize, i: usize) -> *const u8 {
    // SAFETY: the caller's promise.
    unsafe { rows.add(((2 * pair + odd) * width / 16 + i) * C::STEP) }
}

struct Bf16;
struct F16;
struct F32;
struct Q8;

impl Cache for Bf16 {
    const STEP: usize = 32;
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(rows: *const u8, width: usize, pair: usize, odd: usize, i: usize, _: __m512) -> __m512 {
        // SAFETY: the caller's promise; the words of a pair of rows take as much as two rows.
        let words = unsafe { _mm512_loadu_si512(rows.add((pair * width / 16 + i) * 64).cast()) };
        _mm512_castsi512_ps(if odd == 0 {
            _mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000_u32 as i32))
        } else {
            _mm512_slli_epi32::<16>(words)
        })
    }
}

impl Cache for F16 {
    const STEP: usize = 32;
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(rows: *const u8, width: usize, pair: usize, odd: usize, i: usize, _: __m512) -> __m512 {
        // SAFETY: the caller's promise.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(row_at::<Self>(rows, width, pair, odd, i).cast()) })
    }
}

impl Cache for F32 {
    const STEP: usize = 64;
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(rows: *const u8, width: usize, pair: usize, odd: usize, i: usize, _: __m512) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(row_at::<Self>(rows, width, pair, odd, i).cast()) }
    }
}

impl Cache for Q8 {
    const STEP: usize = 16;
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(rows: *const u8, width: usize, pair: usize, odd: usize, i: usize, scale: __m512) -> __m512 {
        // SAFETY: the caller's promise.
        let q = _mm512_cvtepi8_epi32(unsafe { _mm_loadu_si128(row_at::<Self>(rows, width, pair, odd, i).cast()) });
        _mm512_mul_ps(_mm512_cvtepi32_ps(q), scale)
    }
}

/// Runs a function generic over cache type and number of queries.
macro_rules! by_type_and_count {
    ($ty:expr, $n:expr, $f:ident($($arg:expr),*)) => {
        match $ty {
            KvType::Bf16 => by_count!($n, $f<Bf16>($($arg),*)),
            KvType::F16 => by_count!($n, $f<F16>($($arg),*)),
            KvType::F32 => by_count!($n, $f<F32>($($arg),*)),
            KvType::Q8_0 => by_count!($n, $f<Q8>($($arg),*)),
        }
    };
}

/// Runs a function generic over the number of queries (after `$c`, where given).
macro_rules! by_count {
    ($n:expr, $f:ident<$($c:ty)?>($($arg:expr),*)) => {
        match $n {
            1 => $f::<$($c,)? 1>($($arg),*),
            2 => $f::<$($c,)? 2>($($arg),*),
            3 => $f::<$($c,)? 3>($($arg),*),
            4 => $f::<$($c,)? 4>($($arg),*),
            5 => $f::<$($c,)? 5>($($arg),*),
            6 => $f::<$($c,)? 6>($($arg),*),
            7 => $f::<$($c,)? 7>($($arg),*),
            8 => $f::<$($c,)? 8>($($arg),*),
            9 => $f::<$($c,)? 9>($($arg),*),
            10 => $f::<$($c,)? 10>($($arg),*),
            11 => $f::<$($c,)? 11>($($arg),*),
            12 => $f::<$($c,)? 12>($($arg),*),
            n => unreachable!("{n} queries"),
        }
    };
}
pub(super) use by_count;

pub(super) fn scores(ty: KvType, dim: usize, keys: &[u8], tiles: Range<usize>, q: &[f32], out: &mut [f32]) {
    let n = q.len() / dim;
    assert!(keys.len() == ty.bytes(KV_CHUNK * dim) && tiles.end * KV_TILE <= KV_CHUNK && out.len() == n * KV_CHUNK);
    // SAFETY: the callers of a table's functions have the CPU features; the sizes are checked.
    unsafe { by_type_and_count!(ty, n, scores_of(dim, keys, tiles, q, out)) }
}

/// Two tiles (32 positions) at a time, then the odd one.
///
/// # Safety
/// As checked in [`scores`], N being the number of queries.
#[target_feature(enable = "avx512f")]
unsafe fn scores_of<C: Cache, const N: usize>(
    dim: usize,
    keys: &[u8],
    tiles: Range<usize>,
    q: &[f32],
    out: &mut [f32],
) {
    // Queries of 32 dimensions at a time, dimension by dimension, to be broadcast from one run of memory.
    let mut turned = [[0f32; N]; BLOCK_LEN];
    for block in 0..dim / BLOCK_LEN {
        for (i, turned) in turned.iter_mut().enumerate() {
            for (n, turned) in turned.iter_mut().enumerate() {
                *turned = q[n * dim + block * BLOCK_LEN + i];
            }
        }
        let mut tile = tiles.start;
        // SAFETY: the tiles are in the chunk.
        unsafe {
            while tile + 2 <= tiles.end {
                scores_tiles::<C, N, 2>(dim, keys, tile, block, &turned, out);
                tile += 2;
            }
            if tile < tiles.end {
                scores_tiles::<C, N, 1>(dim, keys, tile, block, &turned, out);
            }
        }
    }
}

/// Block `block` of dimensions of `T` tiles; sums go on from what `out` holds, except for the first block.
///
/// # Safety
/// The tiles must be in the chunk.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn scores_tiles<C: Cache, const N: usize, const T: usize>(
    dim: usize,
    keys: &[u8],
    tile: usize,
    block: usize,
    q: &[[f32; N]; BLOCK_LEN],
    out: &mut [f32],
) {
    let scaled = C::STEP == 16;
    let scales = if scaled { 2 * KV_TILE } else { 0 };
    let block_bytes = scales + C::STEP * BLOCK_LEN;
    let tile_bytes = dim / BLOCK_LEN * block_bytes;
    // SAFETY: tiles in the chunk, `block` among the blocks of a tile; scores of each query have KV_CHUNK floats.
    unsafe {
        let at: [*const u8; T] =
            std::array::from_fn(|t| keys.as_ptr().add((tile + t) * tile_bytes + block * block_bytes));
        let scale: [__m512; T] = std::array::from_fn(|t| {
            if scaled { _mm512_cvtph_ps(_mm256_loadu_si256(at[t].cast())) } else { _mm512_setzero_ps() }
        });
        let at = at.map(|p| p.add(scales));
        let mut acc = [[_mm512_setzero_ps(); T]; N];
        let out = out.as_mut_ptr().add(tile * KV_TILE);
        if block > 0 {
            for (n, acc) in acc.iter_mut().enumerate() {
                for (t, acc) in acc.iter_mut().enumerate() {
                    *acc = _mm512_loadu_ps(out.add(n * KV_CHUNK + t * KV_TILE));
                }
            }
        }
        for (pair, q) in q.as_chunks::<2>().0.iter().enumerate() {
            for (odd, q) in q.iter().enumerate() {
                let k: [__m512; T] = std::array::from_fn(|t| {
                    _mm_prefetch::<_MM_HINT_T0>(at[t].wrapping_add((2 * pair + odd) * C::STEP + 4096).cast());
                    C::load(at[t], KV_TILE, pair, odd, 0, scale[t])
                });
                for (acc, &q) in acc.iter_mut().zip(q) {
                    for (acc, k) in acc.iter_mut().zip(k) {
                        *acc = _mm512_fmadd_ps(k, _mm512_set1_ps(q), *acc);
                    }
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

#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn softmax(
    ty: KvType,
    s: &mut [f32],
    tiles: Range<usize>,
    visible: Range<usize>,
    scale: f32,
) -> SoftmaxState {
    if visible == (tiles.start * KV_TILE..tiles.end * KV_TILE) {
        softmax_of::<true>(ty, s, tiles, visible, scale)
    } else {
        softmax_of::<false>(ty, s, tiles, visible, scale)
    }
}

/// With `WHOLE` every position of the tiles is visible.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn softmax_of<const WHOLE: bool>(
    ty: KvType,
    s: &mut [f32],
    tiles: Range<usize>,
    visible: Range<usize>,
    scale: f32,
) -> SoftmaxState {
    assert!(s.len() == KV_CHUNK && tiles.end * KV_TILE <= KV_CHUNK);
    let positions = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let seen = |tile: usize| {
        if WHOLE {
            return !0;
        }
        let p = _mm512_add_epi32(positions, _mm512_set1_epi32((tile * KV_TILE) as i32));
        _mm512_cmpge_epi32_mask(p, _mm512_set1_epi32(visible.start as i32))
            & _mm512_cmplt_epi32_mask(p, _mm512_set1_epi32(visible.end as i32))
    };
    let mut max = _mm512_set1_ps(f32::NEG_INFINITY);
    for tile in tiles.clone() {
        // SAFETY: the tile is within the scores.
        unsafe {
            let p = s.as_mut_ptr().add(tile * KV_TILE);
            let v = _mm512_mul_ps(_mm512_loadu_ps(p), _mm512_set1_ps(scale));
            _mm512_storeu_ps(p, v);
            // The second operand wins where the first is NaN.
            max = _mm512_mask_max_ps(max, seen(tile), v, max);
        }
    }
    let max = _mm512_reduce_max_ps(max);
    let mut sum = _mm512_setzero_ps();
    for tile in tiles {
        // SAFETY: the tile is within the scores.
        unsafe {
            let p = s.as_mut_ptr().add(tile * KV_TILE);
            let v = exp(_mm512_sub_ps(_mm512_loadu_ps(p), _mm512_set1_ps(max)));
            let mut v = _mm512_maskz_mov_ps(seen(tile), v);
            if ty == KvType::Bf16 {
                v = round_bf16(v);
            }
            sum = _mm512_add_ps(sum, v);
            _mm512_storeu_ps(p, v);
        }
    }
    SoftmaxState { max, sum: reduce(sum) }
}

/// [`crate::math::round_bf16`] of numbers.
#[inline]
#[target_feature(enable = "avx512f")]
fn round_bf16(x: __m512) -> __m512 {
    let bits = _mm512_castps_si512(x);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(0xffff_0000_u32 as i32)))
}

/// [`crate::math::exp`].
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn exp(x: __m512) -> __m512 {
    let in_range = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, _mm512_set1_ps(EXP_MIN));
    let n = _mm512_roundscale_ps::<_MM_FROUND_TO_NEAREST_INT>(_mm512_mul_ps(x, _mm512_set1_ps(LOG2E)));
    let r = _mm512_fmadd_ps(n, _mm512_set1_ps(-LN2_HI), x);
    let r = _mm512_fmadd_ps(n, _mm512_set1_ps(-LN2_LO), r);
    let mut p = _mm512_set1_ps(EXP_POLY[0]);
    for c in &EXP_POLY[1..] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
    }
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0));
    let n = _mm512_slli_epi32::<23>(_mm512_cvtps_epi32(n));
    _mm512_maskz_mov_ps(in_range, _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), n)))
}

pub(super) fn values(ty: KvType, dim: usize, values: &[u8], positions: Range<usize>, p: &[f32], acc: &mut [f32]) {
    let n = acc.len() / dim;
    assert!(values.len() == ty.bytes(KV_CHUNK * dim) && positions.end <= KV_CHUNK && p.len() == n * KV_CHUNK);
    // SAFETY: the callers of a table's functions have the CPU features; the sizes are checked.
    unsafe { by_type_and_count!(ty, n, values_of(dim, values, positions, p, acc)) }
}

/// 32 dimensions at a time, all positions.
///
/// # Safety
/// As checked in [`values`], N being the number of queries.
#[target_feature(enable = "avx512f")]
unsafe fn values_of<C: Cache, const N: usize>(
    dim: usize,
    values: &[u8],
    positions: Range<usize>,
    p: &[f32],
    acc: &mut [f32],
) {
    let scaled = C::STEP == 16;
    let scales = if scaled { 2 * KV_CHUNK } else { 0 };
    for block in 0..dim / BLOCK_LEN {
        let mut sums = [[_mm512_setzero_ps(); 2]; N];
        // SAFETY: blocks of KV_CHUNK positions, as many as dim / 32; positions.end <= KV_CHUNK.
        unsafe {
            let base = values.as_ptr().add(block * (2 * C::STEP * KV_CHUNK + scales));
            let rows = base.add(scales);
            for pair in positions.start / 2..positions.end.div_ceil(2) {
                for odd in 0..2 {
                    let j = 2 * pair + odd;
                    _mm_prefetch::<_MM_HINT_T0>(rows.wrapping_add(j * 2 * C::STEP + 2048).cast());
                    let scale = if scaled {
                        let half = base.add(j * 2).cast::<i16>().read_unaligned();
                        _mm512_cvtph_ps(_mm256_set1_epi16(half))
                    } else {
                        _mm512_setzero_ps()
                    };
                    let v: [__m512; 2] = std::array::from_fn(|i| C::load(rows, BLOCK_LEN, pair, odd, i, scale));
                    for (n, sums) in sums.iter_mut().enumerate() {
                        let p = _mm512_set1_ps(*p.get_unchecked(n * KV_CHUNK + j));
                        for (sum, v) in sums.iter_mut().zip(v) {
                            *sum = _mm512_fmadd_ps(v, p, *sum);
                        }
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

#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn merge(state: SoftmaxState, acc: &mut [f32], part: SoftmaxState, values: &[f32]) -> SoftmaxState {
    let max = state.max.max(part.max);
    let a = exp(_mm512_set1_ps(state.max - max));
    let b = exp(_mm512_set1_ps(part.max - max));
    for (acc, values) in acc.chunks_mut(LANES).zip(values.chunks(LANES)) {
        let mask = (u32::MAX >> (32 - acc.len())) as u16;
        // SAFETY: both have as many floats as the mask has bits.
        unsafe {
            let v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, values.as_ptr()), b);
            let v = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, acc.as_ptr()), a, v);
            _mm512_mask_storeu_ps(acc.as_mut_ptr(), mask, v);
        }
    }
    SoftmaxState { max, sum: state.sum * _mm512_cvtss_f32(a) + part.sum * _mm512_cvtss_f32(b) }
}
