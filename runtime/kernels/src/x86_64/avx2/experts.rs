//! One token or a few through one expert: the rows of up that live, and down by the live neurons.

use std::arch::x86_64::*;
use std::ops::Range;

use super::lanes::{add_pairs, broadcast_quad, finish_pairs, interleave, load_rows};
use super::{plane_columns, plane_rows};
use crate::activations::{ActRow, HiddenGroup, start};
use crate::codes::with_coded;
use crate::down_layout::DownLayout;
use crate::down_layout::OUTPUT_CHUNK;
use crate::live::{self, LiveRows};
use crate::up_layout::UpLayout;
use crate::weight_type::BLOCK_LEN;
use crate::x86_64::request::prefetch;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn up_rows(up: &UpLayout, region: &[u8], rows: LiveRows<'_>, acts: &[ActRow<'_>], out: &mut [f32]) {
    if up.ty.has_codes() {
        // SAFETY: the features are those of this function; lengths are checked by the callers of a table's functions.
        return unsafe { plane_rows::up_rows::<false>(up, region, rows, acts, out, |sums, _, _| sums) };
    }
    let add = |sums, w, q| add_pairs(sums, w, q);
    // SAFETY: the features are those of this function; lengths are checked by the callers of a table's functions.
    unsafe { up_rows_of(up, region, rows, acts, out, add, |sums| finish_pairs(sums)) };
}

/// Rows of up; `add` and `finish` as [`super::gemv::by_fours`] has them.
///
/// # Safety
/// The CPU must have AVX2, FMA, F16C and what `add` needs; the activations must have kb blocks.
#[inline(always)]
pub(super) unsafe fn up_rows_of(
    up: &UpLayout,
    region: &[u8],
    rows: LiveRows<'_>,
    acts: &[ActRow<'_>],
    out: &mut [f32],
    add: impl Fn(__m256i, __m256i, __m256i) -> __m256i,
    finish: impl Fn(__m256i) -> __m256i,
) {
    live::each_tokens_block(up, region, rows, acts, out, prefetch, |block, ahead, a, sums| {
        // SAFETY: the caller's promise; rows have 64 bytes of nibbles for each four blocks, and scales for kb.
        unsafe {
            let mut acc = [_mm256_setzero_ps(); 2];
            // Line by line across the rows, as they were requested: reading a row to its end would have the CPU fetch the dead row after it.
            for line in 0..up.kb.div_ceil(4) {
                ahead.request_line(line, prefetch);
                for b in (line * 4..up.kb.min(line * 4 + 4)).step_by(2) {
                    for (rows, acc) in block.rows.as_chunks::<8>().0.iter().zip(&mut acc).take(block.len.div_ceil(8)) {
                        add_two_blocks(rows, b, up.kb - b, a, acc, &add, &finish);
                    }
                }
            }
            _mm256_storeu_ps(sums.as_mut_ptr(), acc[0]);
            _mm256_storeu_ps(sums.as_mut_ptr().add(8), acc[1]);
        }
    });
}

/// Adds the products of two blocks of eight rows from block `b` on, or of the last one where one is `left`; lanes are rows.
///
/// # Safety
/// As [`up_rows_of`]; rows must have 32 bytes of nibbles from block `b` on, and `left` scales.
#[inline(always)]
unsafe fn add_two_blocks(
    rows: &[(*const u8, *const u8); 8],
    b: usize,
    left: usize,
    a: ActRow<'_>,
    acc: &mut __m256,
    add: &impl Fn(__m256i, __m256i, __m256i) -> __m256i,
    finish: &impl Fn(__m256i) -> __m256i,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let low = _mm256_set1_epi8(15);
        let (mut w, mut d) = ([_mm256_setzero_si256(); 8], [0; 8]);
        for ((w, d), (nibbles, scales)) in w.iter_mut().zip(&mut d).zip(rows) {
            *w = _mm256_loadu_si256(nibbles.add(b * 16).cast());
            let scales = scales.add(b * 2);
            *d = match left {
                1 => scales.cast::<u16>().read_unaligned().into(),
                _ => scales.cast::<i32>().read_unaligned(),
            };
        }
        let quads = transpose(w);
        let d = _mm256_setr_epi32(d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]);
        let d = _mm256_packus_epi32(_mm256_and_si256(d, _mm256_set1_epi32(0xffff)), _mm256_srli_epi32::<16>(d));
        let d = _mm256_permute4x64_epi64::<0b11_01_10_00>(d);
        let d = [_mm256_castsi256_si128(d), _mm256_extracti128_si256::<1>(d)];
        for i in 0..left.min(2) {
            let mut sums = _mm256_setzero_si256();
            for g in 0..4 {
                let (w, q) = (quads[i * 4 + g], a.q.as_ptr().add((b + i) * BLOCK_LEN + g * 4));
                sums = add(sums, _mm256_and_si256(w, low), broadcast_quad(q));
                sums = add(sums, _mm256_and_si256(_mm256_srli_epi16::<4>(w), low), broadcast_quad(q.add(16)));
            }
            let start = _mm256_set1_epi32(start(8, *a.sums.get_unchecked(b + i)));
            let d = _mm256_mul_ps(_mm256_cvtph_ps(d[i]), _mm256_set1_ps(*a.d.get_unchecked(b + i)));
            *acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(finish(sums), start)), d, *acc);
        }
    }
}

/// Transposes 8 vectors of 8 32-bit values.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(r: [__m256i; 8]) -> [__m256i; 8] {
    let (mut t, mut u, mut out) = (r, r, r);
    for i in (0..8).step_by(2) {
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for i in (0..8).step_by(4) {
        u[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for i in 0..4 {
        out[i] = _mm256_permute2x128_si256::<0x20>(u[i], u[4 + i]);
        out[4 + i] = _mm256_permute2x128_si256::<0x31>(u[i], u[4 + i]);
    }
    out
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn down(
    down: &DownLayout,
    region: &[u8],
    hidden: &[HiddenGroup],
    chunks: Range<usize>,
    out: &mut [&mut [f32]],
) {
    if down.ty.has_codes() {
        // Closures have the features of the function that they are in, and so must be in it.
        return with_coded!(down.ty, T => {
            live::each_down_chunk(down, region, hidden, chunks, out, prefetch, |group, token, chunk, out| {
                // SAFETY: the features are those of this function; the group and the chunk are the layout's.
                unsafe { plane_columns::add_chunk::<T, false>(down, group, token, chunk, out, |sums, _, _| sums) };
            })
        });
    }
    let low = _mm256_set1_epi8(15);
    live::each_down_chunk(down, region, hidden, chunks, out, prefetch, |group, token, chunk, out| {
        let d_a = _mm256_set1_ps(token.d);
        let bias = _mm256_set1_epi32(start(8, token.sums));
        // Half of the chunk's bytes at a time: sums 0..4 are outputs 16v + 8 half.., 4..8 are 64 + 16v + 8 half..
        for half in 0..2 {
            let mut pairs = [_mm256_setzero_si256(); 8];
            for (at, quad) in token.fours(0) {
                let q = _mm256_set1_epi32(*quad);
                // SAFETY: the rows are within the group's 32, and a chunk is 64 bytes of each.
                let w = unsafe { load_rows(group.rows, at, chunk * 64 + half * 32) };
                for (v, w) in interleave(w).into_iter().enumerate() {
                    let lo = _mm256_maddubs_epi16(_mm256_and_si256(w, low), q);
                    pairs[v] = _mm256_add_epi16(pairs[v], lo);
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(w), low);
                    pairs[v + 4] = _mm256_add_epi16(pairs[v + 4], _mm256_maddubs_epi16(high, q));
                }
            }
            for (v, pairs) in pairs.into_iter().enumerate() {
                let sum = _mm256_add_epi32(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)), bias);
                let at = v * 16 + half * 8;
                // SAFETY: the group has a scale, and `out` a float, for each of the chunk's 128 outputs.
                unsafe {
                    let d_w = _mm_loadu_si128(group.heads.add((chunk * OUTPUT_CHUNK + at) * 2).cast());
                    let d = _mm256_mul_ps(_mm256_cvtph_ps(d_w), d_a);
                    let p = out.as_mut_ptr().add(at);
                    _mm256_storeu_ps(p, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), d, _mm256_loadu_ps(p)));
                }
            }
        }
    });
}
