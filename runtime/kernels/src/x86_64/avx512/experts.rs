//! One token or a few through one expert: the rows of up that live, and down by the live neurons.

use std::arch::x86_64::*;
use std::ops::Range;

use super::lanes::{broadcast_quad, interleave, load_rows, start_sums, transpose};
use super::{plane_columns, plane_rows};
use crate::activations::{ActRow, HiddenGroup, start};
use crate::down_layout::DownLayout;
use crate::live::{self, LiveRows, UP_BLOCK, UpBlock};
use crate::up_layout::UpLayout;
use crate::weight_type::BLOCK_LEN;
use crate::x86_64::request::prefetch;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
pub(super) fn up_rows(up: &UpLayout, region: &[u8], rows: LiveRows<'_>, acts: &[ActRow<'_>], out: &mut [f32]) {
    if up.ty.has_codes() {
        return plane_rows::up_rows(up, region, rows, acts, out);
    }
    live::each_tokens_block(up, region, rows, acts, out, prefetch, |block, ahead, a, sums| {
        *sums = up_block(up, block, ahead, a);
    });
}

/// Products of a block of rows, lanes being rows. Line by line across the rows, as they were requested: reading a row to its end would
/// have the CPU fetch the dead row after it. A line of all rows is transposed, so that it is computed as tiles are.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
fn up_block(up: &UpLayout, block: &UpBlock, ahead: &UpBlock, a: ActRow<'_>) -> [f32; UP_BLOCK] {
    let low = _mm512_set1_epi8(15);
    let minus = _mm512_set1_epi16(-8);
    let mut acc = _mm512_setzero_ps();
    for line in 0..up.kb.div_ceil(4) {
        ahead.request_line(line, prefetch);
        // SAFETY: rows have 64 bytes of nibbles for each four blocks, and kb scales; the activations are padded to whole fours.
        unsafe {
            let mut rows = [_mm512_setzero_si512(); UP_BLOCK];
            for (row, (nibbles, _)) in rows.iter_mut().zip(&block.rows) {
                *row = _mm512_loadu_si512(nibbles.add(line * 64).cast());
            }
            let quads = transpose(rows);
            let scales = line_scales(block, line, up.kb - line * 4);
            for (b, d_w) in scales.into_iter().enumerate() {
                let at = line * 4 + b;
                let mut sums = [start_sums(a.sums.as_ptr().add(at).cast(), minus), _mm512_setzero_si512()];
                for g in 0..4 {
                    let (w, q) = (quads[b * 4 + g], a.q.as_ptr().add(at * BLOCK_LEN + g * 4));
                    sums[0] = _mm512_dpbusd_epi32(sums[0], _mm512_and_si512(w, low), broadcast_quad(q));
                    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(w), low);
                    sums[1] = _mm512_dpbusd_epi32(sums[1], high, broadcast_quad(q.add(16)));
                }
                let d = _mm512_mul_ps(d_w, _mm512_set1_ps(*a.d.get_unchecked(at)));
                acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(sums[0], sums[1])), d, acc);
            }
        }
    }
    let mut sums = [0.0; UP_BLOCK];
    // SAFETY: 16 floats.
    unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), acc) };
    sums
}

/// Scales of the four blocks of a line, for each block those of all rows; 0 for blocks that are not `left`.
///
/// # Safety
/// Each row must have scales for `min(left, 4)` blocks from the line on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
unsafe fn line_scales(block: &UpBlock, line: usize, left: usize) -> [__m512; 4] {
    let mut d = [0; UP_BLOCK];
    for (d, (_, scales)) in d.iter_mut().zip(&block.rows) {
        // SAFETY: the caller's promise.
        *d = unsafe { load_scales(scales.add(line * 8), left) };
    }
    let first = _mm512_setr_epi64(d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]);
    let last = _mm512_setr_epi64(d[8], d[9], d[10], d[11], d[12], d[13], d[14], d[15]);
    // Word `b` of each row: those of `first` are 0.., those of `last` 32..
    let words = _mm512_set_epi16(
        61, 57, 53, 49, 45, 41, 37, 33, 29, 25, 21, 17, 13, 9, 5, 1, 60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16,
        12, 8, 4, 0,
    );
    let two = _mm512_permutex2var_epi16(first, words, last);
    let others = _mm512_permutex2var_epi16(first, _mm512_add_epi16(words, _mm512_set1_epi16(2)), last);
    [
        _mm512_cvtph_ps(_mm512_castsi512_si256(two)),
        _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(two)),
        _mm512_cvtph_ps(_mm512_castsi512_si256(others)),
        _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(others)),
    ]
}

/// Up to four f16 scales, zero where there are no more (`left` counts them).
///
/// # Safety
/// `p` must be readable for `2 * min(left, 4)` bytes.
#[inline]
unsafe fn load_scales(p: *const u8, left: usize) -> i64 {
    if left >= 4 {
        // SAFETY: the caller's promise.
        return unsafe { p.cast::<i64>().read_unaligned() };
    }
    let mut bytes = [0; 8];
    // SAFETY: the caller's promise; at most 6 bytes.
    unsafe { std::ptr::copy_nonoverlapping(p, bytes.as_mut_ptr(), 2 * left) };
    i64::from_le_bytes(bytes)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
pub(super) fn down(
    down: &DownLayout,
    region: &[u8],
    hidden: &[HiddenGroup],
    chunks: Range<usize>,
    out: &mut [&mut [f32]],
) {
    if down.ty.has_codes() {
        return plane_columns::down(down, region, hidden, chunks, out);
    }
    let low = _mm512_set1_epi8(15);
    live::each_down_chunk(down, region, hidden, chunks, out, prefetch, |group, token, chunk, out| {
        let d_a = _mm512_set1_ps(token.d);
        // Vectors 0..4 are outputs 16v.. of the chunk, 4..8 are 64 + 16v..
        let mut sums = [_mm512_set1_epi32(start(8, token.sums)); 8];
        for (at, quad) in token.fours(0) {
            let q = _mm512_set1_epi32(*quad);
            // SAFETY: the rows are within the group's 32, and a chunk is 64 bytes of each.
            let w = unsafe { load_rows(group.rows, at, chunk * 64) };
            for (v, w) in interleave(w).into_iter().enumerate() {
                sums[v] = _mm512_dpbusd_epi32(sums[v], _mm512_and_si512(w, low), q);
                let high = _mm512_and_si512(_mm512_srli_epi16::<4>(w), low);
                sums[v + 4] = _mm512_dpbusd_epi32(sums[v + 4], high, q);
            }
        }
        for (v, sum) in sums.into_iter().enumerate() {
            // SAFETY: the group has a scale, and `out` a float, for each of the chunk's 128 outputs.
            unsafe {
                let d_w = _mm256_loadu_si256(group.heads.add(chunk * 256 + v * 32).cast());
                let d = _mm512_mul_ps(_mm512_cvtph_ps(d_w), d_a);
                let p = out.as_mut_ptr().add(v * 16);
                _mm512_storeu_ps(p, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), d, _mm512_loadu_ps(p)));
            }
        }
    });
}
