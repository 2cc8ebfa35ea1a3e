//! Rows of up of the types of [`crate::planes`]: those that live for a token, and 16 unpacked for many.
//!
//! Lanes of 128 bits are the four blocks of a piece of 128 columns, their 32-bit parts four rows.

use std::arch::x86_64::*;

use super::experts::{add_quarters, four_floats, load_scales};
use super::gemm::transpose;
use super::planes::{Scales, meant, offset, panel_bytes, powers, put_scales, shifted, table};
use crate::activations::ActRow;
use crate::codes::{Coded, with_coded};
use crate::expert_format::UpLayout;
use crate::live::{self, Ahead, LiveRows};
use crate::panel::PanelKind;
use crate::r16::R16_ROWS;
use crate::weight_type::BLOCK_LEN;
use crate::x86_64::request::prefetch;

pub(super) fn up_rows(up: &UpLayout, region: &[u8], rows: LiveRows<'_>, acts: &[ActRow<'_>], out: &mut [f32]) {
    // SAFETY: the callers of a table's functions have the CPU features.
    with_coded!(up.ty, T => unsafe { up_rows_of::<T>(up, region, rows, acts, out) });
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
fn up_rows_of<T: Coded>(up: &UpLayout, region: &[u8], rows: LiveRows<'_>, acts: &[ActRow<'_>], out: &mut [f32]) {
    live::each_up_block(up, region, rows, acts, out, prefetch, |rows, ahead, a, out| match rows.len().div_ceil(4) {
        1 => up_fours::<T, 1>(up, region, rows, ahead, a, out),
        2 => up_fours::<T, 2>(up, region, rows, ahead, a, out),
        3 => up_fours::<T, 3>(up, region, rows, ahead, a, out),
        _ => up_fours::<T, 4>(up, region, rows, ahead, a, out),
    });
}

/// One row of an up region.
#[derive(Clone, Copy)]
struct Row {
    low: *const u8,
    high: *const u8,
    head: *const u8,
    /// Blocks of the row.
    blocks: usize,
}

impl Row {
    /// Row `row`, whose bounds are checked once: what is read at places within it stays inside.
    #[inline]
    fn new<T: Coded>(up: &UpLayout, region: &[u8], row: usize) -> Self {
        let planes = region[up.scales_bytes + row * up.row_bytes..][..up.row_bytes].as_ptr();
        let head = region[row * up.head_bytes..][..up.head_bytes].as_ptr();
        let high = planes.wrapping_add(up.kb.div_ceil(4) * 16 * T::CODING.low_bits());
        Self { low: planes, high, head, blocks: up.kb / T::STEPS }
    }

    /// f16 scales of a kind from block `b` on.
    #[inline(always)]
    fn wide(self, kind: usize, b: usize) -> *const u8 {
        self.head.wrapping_add((kind * self.blocks + b) * 2)
    }

    /// The other bytes of the head of block `b`.
    #[inline(always)]
    fn narrow<T: Coded>(self, b: usize) -> *const u8 {
        self.head.wrapping_add(2 * T::CODING.wide() * self.blocks + b * T::CODING.narrow())
    }

    /// Values of piece `c`, [`offset`] more than they are: columns 0..16 of its four blocks, columns 16..32.
    ///
    /// # Safety
    /// The row must have the piece.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn piece<T: Coded>(self, c: usize, table: __m512i) -> [__m512i; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let codes = match T::CODING.low_bits() {
                4 => {
                    let w = _mm512_loadu_si512(self.low.add(c * 64).cast());
                    [w, shifted(w, 4, 0)].map(|w| _mm512_and_si512(w, _mm512_set1_epi8(15)))
                }
                _ => {
                    let w = halves(self.low.add(c * 32));
                    [w, shifted(w, 4, 0)].map(|w| _mm512_and_si512(w, _mm512_set1_epi8(3)))
                }
            };
            let codes = match T::CODING.high_bits() {
                2 => {
                    let w = halves(self.high.add(c * 32));
                    let mask = _mm512_set1_epi8(0x30);
                    // codes | w & mask
                    [
                        _mm512_ternarylogic_epi32::<0xf8>(codes[0], shifted(w, 0, 4), mask),
                        _mm512_ternarylogic_epi32::<0xf8>(codes[1], w, mask),
                    ]
                }
                1 => {
                    let w = _mm512_broadcast_i32x4(_mm_loadu_si128(self.high.add(c * 16).cast()));
                    let lanes = _mm512_setr_epi64(0x01, 0x01, 0x02, 0x02, 0x04, 0x04, 0x08, 0x08);
                    let lanes = _mm512_mullo_epi64(lanes, _mm512_set1_epi64(0x0101_0101_0101_0101));
                    let bit = _mm512_set1_epi8(1 << T::CODING.low_bits());
                    let [first, last] =
                        [lanes, _mm512_slli_epi16::<4>(lanes)].map(|bits| _mm512_test_epi8_mask(w, bits));
                    [
                        _mm512_mask_add_epi8(codes[0], first, codes[0], bit),
                        _mm512_mask_add_epi8(codes[1], last, codes[1], bit),
                    ]
                }
                _ => codes,
            };
            codes.map(|codes| meant::<T>(codes, table))
        }
    }

    /// Scales and minima of a piece, as integers of a byte; `c` is odd for the second piece of a block. Sub-blocks of 32: four scales,
    /// four minima. Sub-blocks of 16: eight scales, and in the second number eight minima.
    ///
    /// # Safety
    /// The row must have the piece.
    #[inline]
    unsafe fn integers<T: Coded>(self, c: usize) -> (u64, u64) {
        use crate::weight_type::WeightType;
        let (narrow, second) = (self.narrow::<T>(c / 2), c % 2);
        // SAFETY: these are bytes of the head of the piece's block.
        let u64_at = |at: usize| unsafe { narrow.add(at).cast::<u64>().read_unaligned() };
        // SAFETY: as above.
        let u32_at = |at: usize| u64::from(unsafe { narrow.add(at).cast::<u32>().read_unaligned() });
        const NIBBLES: u64 = 0x0f0f_0f0f_0f0f_0f0f;
        const TWOS: u64 = 0x0303_0303;
        match T::TY {
            WeightType::Q2_K => {
                let both = u64_at(8 * second);
                (both & NIBBLES, both >> 4 & NIBBLES)
            }
            WeightType::Q3_K => {
                let high = u32_at(8) >> (4 * second);
                (u64_at(0) >> (4 * second) & NIBBLES | (high & TWOS | (high >> 2 & TWOS) << 32) << 4, 0)
            }
            WeightType::Q4_K | WeightType::Q5_K => {
                if second == 0 {
                    return (u64_at(0) & 0x3f3f_3f3f_3f3f_3f3f, 0);
                }
                let low = u32_at(8);
                (u64_at(0) >> 2 & 0x3030_3030_3030_3030 | (low & NIBBLES | (low >> 4 & NIBBLES) << 32), 0)
            }
            WeightType::Q6_K => (u64_at(8 * second), 0),
            WeightType::IQ4_XS => {
                let low = u32_at(2) >> (16 * second) & 0xffff;
                let low = (low | low << 8) & 0x00ff_00ff;
                let high = u32_at(0) >> (8 * second) & 0xff;
                let high = (high | high << 12) & 0x000f_000f;
                ((low | low << 4) & NIBBLES | ((high | high << 6) & TWOS) << 4, 0)
            }
            _ => unreachable!("{} has one scale for a block", T::TY),
        }
    }
}

/// 32 bytes twice: as they are, and two bits further.
///
/// # Safety
/// `p` must be readable for 32 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
unsafe fn halves(p: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    let w = unsafe { _mm256_loadu_si256(p.cast()) };
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(w), _mm256_srli_epi16::<2>(w))
}

/// The scales of a piece of four rows, for each half of its blocks where these have two.
struct PieceScales {
    d: [__m512; 2],
    m: [__m512; 2],
}

/// f16 scales of four blocks of four rows, at `at`; `left` blocks are left.
///
/// # Safety
/// As [`load_scales`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
unsafe fn wide_scales(at: [*const u8; 4], left: usize) -> __m512 {
    let transpose = _mm256_setr_epi16(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    // SAFETY: the caller's promise.
    let d = at.map(|at| unsafe { load_scales(at, left) });
    _mm512_cvtph_ps(_mm256_permutexvar_epi16(transpose, _mm256_setr_epi64x(d[0], d[1], d[2], d[3])))
}

/// Bytes `4 * b + i` of eight bytes of each of four rows, turned to four blocks of four rows: of the first four bytes and of the last
/// (`BY_HALF` false), or of the even and of the odd.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn bytes_by_block<const BY_HALF: bool>(rows: [u64; 4]) -> [__m128i; 2] {
    let rows = _mm256_setr_epi64x(rows[0] as i64, rows[1] as i64, rows[2] as i64, rows[3] as i64);
    let order = match BY_HALF {
        true => _mm_setr_epi8(0, 8, 2, 10, 4, 12, 6, 14, 1, 9, 3, 11, 5, 13, 7, 15),
        false => _mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15),
    };
    let pairs = _mm256_shuffle_epi8(rows, _mm256_broadcastsi128_si256(order));
    let (a, b) = (_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs));
    [_mm_unpacklo_epi16(a, b), _mm_unpackhi_epi16(a, b)]
}

impl PieceScales {
    /// Those of piece `c`; `left` of its blocks are there.
    ///
    /// # Safety
    /// The rows must have the piece.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
    unsafe fn new<T: Coded>(rows: [Row; 4], c: usize, left: usize) -> Self {
        let none = _mm512_setzero_ps();
        if T::STEPS == 1 {
            // SAFETY: as many scales as blocks are left.
            unsafe {
                if T::CODING.wide() == 0 {
                    let exponents = rows.map(|row| load_bytes(row.narrow::<T>(c * 4), left));
                    let [exponents, _] = bytes_by_block::<false>(exponents);
                    return Self { d: [powers(_mm512_cvtepu8_epi32(exponents)), none], m: [none; 2] };
                }
                let wide = |kind: usize| wide_scales(rows.map(|row| row.wide(kind, c * 4)), left);
                return Self { d: [wide(0), none], m: [if T::CODING.has_minima { wide(1) } else { none }, none] };
            }
        }
        // SAFETY: a piece is half of a block.
        let wide = |kind: usize| unsafe {
            let d = rows.map(|row| row.wide(kind, c / 2).cast::<i16>().read_unaligned());
            let d = _mm_cvtph_ps(_mm_setr_epi16(d[0], d[1], d[2], d[3], 0, 0, 0, 0));
            _mm512_broadcast_f32x4(d)
        };
        // SAFETY: the caller's promise.
        let integers = rows.map(|row| unsafe { row.integers::<T>(c) });
        let d = wide(0);
        let minus = |m: __m512| _mm512_xor_ps(m, _mm512_set1_ps(-0.0));
        let times = |scale: __m512, by: __m128i| _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(by)));
        let first = integers.map(|(first, _)| first);
        if T::SUBS == 1 {
            let [by, minima] = bytes_by_block::<false>(first);
            let by = _mm_sub_epi8(by, _mm_set1_epi8(excess::<T>()));
            let m = if T::CODING.has_minima { times(minus(wide(1)), minima) } else { none };
            return Self { d: [times(d, by), none], m: [m, none] };
        }
        let by = bytes_by_block::<true>(first).map(|by| _mm_sub_epi8(by, _mm_set1_epi8(excess::<T>())));
        let mut scales = Self { d: by.map(|by| times(d, by)), m: [none; 2] };
        if T::CODING.has_minima {
            let m = minus(wide(1));
            scales.m = bytes_by_block::<true>(integers.map(|(_, second)| second)).map(|by| times(m, by));
        }
        scales
    }
}

/// What [`Row::integers`] are more than they stand for.
const fn excess<T: Coded>() -> i8 {
    match T::TY {
        crate::weight_type::WeightType::Q3_K | crate::weight_type::WeightType::IQ4_XS => 32,
        _ => 0,
    }
}

/// Up to four bytes, zero where there are no more.
///
/// # Safety
/// `p` must be readable for `min(left, 4)` bytes.
#[inline]
unsafe fn load_bytes(p: *const u8, left: usize) -> u64 {
    let mut bytes = [0; 8];
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(p, bytes.as_mut_ptr(), left.min(4)) };
    u64::from_le_bytes(bytes)
}

/// `F` times four rows, the last ones repeated where there are fewer. Line by line across the rows, as they were requested.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
fn up_fours<T: Coded, const F: usize>(
    up: &UpLayout,
    region: &[u8],
    rows: &[u32],
    ahead: &Ahead,
    a: ActRow<'_>,
    out: &mut [f32],
) {
    let table = table::<T>();
    let by_block = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    let rows = live::in_fours::<F>(rows).map(|rows| rows.map(|row| Row::new::<T>(up, region, row)));
    let (lines, pieces) = (up.row_bytes.div_ceil(64), up.kb.div_ceil(4));
    let mut acc = [_mm_setzero_ps(); F];
    for c in 0..pieces {
        // SAFETY: rows have a piece for each four blocks; the activations are padded to whole fours.
        unsafe {
            let q0 = _mm512_loadu_si512(a.q.as_ptr().add(c * 128).cast());
            let q1 = _mm512_loadu_si512(a.q.as_ptr().add(c * 128 + 64).cast());
            let q = [_mm512_shuffle_i64x2::<0x88>(q0, q1), _mm512_shuffle_i64x2::<0xdd>(q0, q1)];
            let sums = _mm_loadu_si128(a.sums.as_ptr().add(c * 4).cast());
            let times = |by: i32| {
                _mm512_permutexvar_epi32(by_block, _mm512_castsi128_si512(_mm_madd_epi16(sums, _mm_set1_epi32(by))))
            };
            // What each sub-block's sums are for, and where they start.
            let halves = |by: i32| match T::SUBS {
                1 => [times(by & 0xffff | by << 16), _mm512_setzero_si512()],
                _ => [times(by & 0xffff), times(by << 16)],
            };
            let (start, sums) = (halves(-offset::<T>()), halves(1).map(|sums| _mm512_cvtepi32_ps(sums)));
            let d_a = _mm_loadu_ps(a.d.as_ptr().add(c * 4));
            let d_a = _mm512_permutexvar_ps(by_block, _mm512_castps128_ps512(d_a));
            let left = up.kb - c * 4;
            for (rows, acc) in rows.iter().zip(&mut acc) {
                (c * lines / pieces..(c + 1) * lines / pieces).for_each(|_| ahead.request(prefetch));
                let scales = PieceScales::new::<T>(*rows, c, left);
                let dots: [[__m512i; 2]; 4] = std::array::from_fn(|i| {
                    let [lo, hi] = rows[i].piece::<T>(c, table);
                    let first = _mm512_dpbusd_epi32(_mm512_setzero_si512(), lo, q[0]);
                    match T::SUBS {
                        1 => [_mm512_dpbusd_epi32(first, hi, q[1]), first],
                        _ => [first, _mm512_dpbusd_epi32(_mm512_setzero_si512(), hi, q[1])],
                    }
                });
                // For each sub-block of a block a product and, with minima, a sum; each of four blocks of four rows.
                let mut terms = [(_mm512_setzero_ps(), _mm512_setzero_ps()); 4];
                for sub in 0..T::SUBS {
                    let isum = add_quarters(dots.map(|dots| dots[sub]));
                    let isum = _mm512_cvtepi32_ps(_mm512_add_epi32(isum, start[sub]));
                    terms[2 * sub] = (isum, _mm512_mul_ps(scales.d[sub], d_a));
                    terms[2 * sub + 1] = (sums[sub], _mm512_mul_ps(scales.m[sub], d_a));
                }
                *acc = add_terms::<T, 0>(*acc, &terms);
                *acc = add_terms::<T, 1>(*acc, &terms);
                *acc = add_terms::<T, 2>(*acc, &terms);
                *acc = add_terms::<T, 3>(*acc, &terms);
            }
        }
    }
    live::put_fours(acc.map(|v| four_floats(v)), out);
}

/// Adds the terms of block `B`.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512vl,fma")]
fn add_terms<T: Coded, const B: i32>(mut acc: __m128, terms: &[(__m512, __m512); 4]) -> __m128 {
    for (a, b) in terms.iter().take(2 * T::SUBS).step_by(if T::CODING.has_minima { 1 } else { 2 }) {
        acc = _mm_fmadd_ps(_mm512_extractf32x4_ps::<B>(*a), _mm512_extractf32x4_ps::<B>(*b), acc);
    }
    acc
}

pub(super) fn panel_rows(up: &UpLayout, region: &[u8], first: usize, panel: &mut [u8]) {
    // SAFETY: the callers of a table's functions have the CPU features.
    with_coded!(up.ty, T => unsafe { panel_rows_of::<T>(up, region, first, panel) });
}

/// A piece of 16 rows at a time: their quads of values are transposed.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
fn panel_rows_of<T: Coded>(up: &UpLayout, region: &[u8], first: usize, panel: &mut [u8]) {
    let table = table::<T>();
    let block_bytes = PanelKind::of(T::TY).block_bytes();
    let rows: [Row; R16_ROWS] = std::array::from_fn(|r| Row::new::<T>(up, region, first + r));
    for (c, blocks) in panel.chunks_mut(4 * block_bytes).enumerate() {
        for half in 0..2 {
            // SAFETY: rows have a piece for each four blocks.
            let quads = transpose(rows.map(|row| unsafe { row.piece::<T>(c, table)[half] }));
            for (b, block) in blocks.chunks_exact_mut(block_bytes).enumerate() {
                for g in 0..4 {
                    let to = &mut block[(half * 4 + g) * 64..][..64];
                    // SAFETY: 64 bytes.
                    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), panel_bytes::<T>(quads[b * 4 + g])) };
                }
            }
        }
    }
    for (b, blocks) in panel.chunks_exact_mut(T::STEPS * block_bytes).enumerate() {
        // SAFETY: the rows have block `b`.
        let scales =
            unsafe { Scales::<T>::of_rows(&rows.map(|row| (row.wide(0, b), row.wide(1, b), row.narrow::<T>(b)))) };
        for (step, block) in blocks.chunks_exact_mut(block_bytes).enumerate() {
            // SAFETY: a panel block.
            unsafe { put_scales(&scales, step, block.as_mut_ptr()) };
        }
    }
    const { assert!(BLOCK_LEN == 32) };
}
