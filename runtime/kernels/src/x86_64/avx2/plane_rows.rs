//! Rows of up of the types of [`crate::planes`], 16 at a time: quads of their bytes are transposed on the way in, so that lanes are
//! rows as in tiles.

use std::arch::x86_64::*;

use super::planes::{Scales, codes, meant, panel_bytes, table};
use crate::activations::ActRow;
use crate::codes::{Coded, with_coded};
use crate::live::{self, LiveRows, UP_BLOCK, UpBlock};
use crate::panel::PanelKind;
use crate::r16::R16_ROWS;
use crate::up_layout::{UpLayout, block_place};
use crate::x86_64::heads::narrow_bytes;
use crate::x86_64::request::prefetch;

/// # Safety
/// The CPU must have AVX2, FMA, F16C and what `dpbusd` needs (which is used where `VNNI` is true); the activations must have kb blocks.
#[inline(always)]
pub(super) unsafe fn up_rows<const VNNI: bool>(
    up: &UpLayout,
    region: &[u8],
    rows: LiveRows<'_>,
    acts: &[ActRow<'_>],
    out: &mut [f32],
    dpbusd: impl Fn(__m256i, __m256i, __m256i) -> __m256i + Copy,
) {
    with_coded!(up.ty, T => {
        live::each_tokens_block(up, region, rows, acts, out, prefetch, |block, ahead, a, sums| {
            // SAFETY: the caller's promise.
            *sums = unsafe { up_block::<T, VNNI>(up, block, ahead, a, dpbusd) };
        });
    });
}

/// Products of a block of rows with a token, line by line across the rows, as they were requested.
///
/// # Safety
/// As [`up_rows`].
#[inline(always)]
unsafe fn up_block<T: Coded, const VNNI: bool>(
    up: &UpLayout,
    block: &UpBlock,
    ahead: &UpBlock,
    a: ActRow<'_>,
    dpbusd: impl Fn(__m256i, __m256i, __m256i) -> __m256i + Copy,
) -> [f32; UP_BLOCK] {
    let (lines, pieces) = (up.row_bytes.div_ceil(64), up.kb.div_ceil(4));
    let mut sums = [0.0; UP_BLOCK];
    // SAFETY: the caller's promise; rows have kb blocks and a piece for each four.
    unsafe {
        let table = table::<T, VNNI>();
        let mut acc = [_mm256_setzero_ps(); 2];
        let mut scales = None;
        for c in 0..pieces {
            (c * lines / pieces..(c + 1) * lines / pieces).for_each(|line| ahead.request_line(line, prefetch));
            for b in 0..4.min(up.kb - c * 4) {
                let at = c * 4 + b;
                let scales: &Scales<T> = match at % T::STEPS {
                    0 => scales.insert(block_scales::<T>(up, block, at / T::STEPS)),
                    _ => scales.as_ref().unwrap_unchecked(),
                };
                for (rows, acc) in acc.iter_mut().enumerate().take(block.len.div_ceil(8)) {
                    let quads = block_quads::<T>(up, block, rows, c, b, table);
                    scales.add::<VNNI>(at % T::STEPS, rows, &quads, a, at, acc, dpbusd);
                }
            }
        }
        _mm256_storeu_ps(sums.as_mut_ptr(), acc[0]);
        _mm256_storeu_ps(sums.as_mut_ptr().add(8), acc[1]);
    }
    sums
}

/// Bytes `at..at + 16` of the planes of eight rows: quad `g` of each of them.
///
/// # Safety
/// The rows must have them; the CPU must have AVX2.
#[inline(always)]
unsafe fn chunk(block: &UpBlock, rows: usize, at: usize) -> [__m256i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut v = [_mm256_setzero_si256(); 4];
        for (r, v) in v.iter_mut().enumerate() {
            let first = _mm_loadu_si128(block.rows[8 * rows + r].0.add(at).cast());
            let last = _mm_loadu_si128(block.rows[8 * rows + 4 + r].0.add(at).cast());
            *v = _mm256_set_m128i(last, first);
        }
        let (ab_lo, ab_hi) = (_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[0], v[1]));
        let (cd_lo, cd_hi) = (_mm256_unpacklo_epi32(v[2], v[3]), _mm256_unpackhi_epi32(v[2], v[3]));
        [
            _mm256_unpacklo_epi64(ab_lo, cd_lo),
            _mm256_unpackhi_epi64(ab_lo, cd_lo),
            _mm256_unpacklo_epi64(ab_hi, cd_hi),
            _mm256_unpackhi_epi64(ab_hi, cd_hi),
        ]
    }
}

/// Quads of block `b` of piece `c` of eight rows, as `planes` has them.
///
/// # Safety
/// The rows must have the piece; the CPU must have AVX2.
#[inline(always)]
unsafe fn block_quads<T: Coded>(
    up: &UpLayout,
    block: &UpBlock,
    rows: usize,
    c: usize,
    b: usize,
    table: __m256i,
) -> [__m256i; 8] {
    let (low, high) = (T::CODING.low_bits(), T::CODING.high_bits());
    // SAFETY: the caller's promise.
    unsafe {
        let (at, low_bits) = block_place(low, b);
        let lows = chunk(block, rows, c * 16 * low + at);
        let (at, high_bits) = block_place(high, b);
        let highs = match high {
            0 => [_mm256_setzero_si256(); 4],
            _ => chunk(block, rows, up.kb.div_ceil(4) * 16 * low + c * 16 * high + at),
        };
        let mut quads = [_mm256_setzero_si256(); 8];
        for half in 0..2 {
            for (g, (low, high)) in lows.iter().zip(&highs).enumerate() {
                let codes = codes::<T>(*low, *high, [low_bits[half], high_bits[half]]);
                quads[4 * half + g] = meant::<T>(codes, table);
            }
        }
        quads
    }
}

/// The scales of block `b` of the rows.
///
/// # Safety
/// The rows must have the block; the CPU must have AVX2 and F16C.
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
        let narrow = if T::STEPS > 1 { narrow_bytes(heads, at) } else { [[0; R16_ROWS]; 16] };
        let m = if T::CODING.has_minima { wide(1) } else { [0; R16_ROWS] };
        Scales::new(&wide(0), &m, &narrow)
    }
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn panel_rows(up: &UpLayout, region: &[u8], first: usize, panel: &mut [u8]) {
    // SAFETY: the features are those of this function.
    with_coded!(up.ty, T => unsafe { panel_rows_of::<T>(up, region, first, panel) });
}

/// # Safety
/// The CPU must have AVX2 and F16C.
#[inline(always)]
unsafe fn panel_rows_of<T: Coded>(up: &UpLayout, region: &[u8], first: usize, panel: &mut [u8]) {
    let block_bytes = PanelKind::of(T::TY).block_bytes();
    let ids: [u32; R16_ROWS] = std::array::from_fn(|r| (first + r) as u32);
    let rows = UpBlock::new(up, region, &ids);
    let mut scales = None;
    // SAFETY: the caller's promise; rows have kb blocks, and a panel block has 512 bytes before its scales.
    unsafe {
        let table = table::<T, false>();
        for (at, block) in panel.chunks_exact_mut(block_bytes).enumerate() {
            let scales: &Scales<T> = match at % T::STEPS {
                0 => scales.insert(block_scales::<T>(up, &rows, at / T::STEPS)),
                _ => scales.as_ref().unwrap_unchecked(),
            };
            for half in 0..2 {
                let quads = block_quads::<T>(up, &rows, half, at / 4, at % 4, table);
                for (g, quads) in quads.into_iter().enumerate() {
                    let to = block.as_mut_ptr().add(g * 64 + half * 32);
                    _mm256_storeu_si256(to.cast(), panel_bytes::<T>(quads));
                }
            }
            scales.put(at % T::STEPS, block.as_mut_ptr());
        }
    }
}
