//! Rows of up of the types of [`crate::planes`], 16 at a time: quads of their bytes are transposed on the way in, so that lanes are
//! rows as in tiles. Those that live for some tokens are multiplied, or 16 in order unpacked for many.

use std::arch::x86_64::*;

use super::lanes::broadcast_quad;
use super::pack::transpose_quads;
use super::planes::{Scales, meant, offset, panel_bytes, put_scales, shifted, start_of, sums_times, table};
use crate::activations::ActRow;
use crate::codes::{Coded, with_coded};
use crate::live::{self, LiveRows, UP_BLOCK, UpBlock};
use crate::panel::PanelKind;
use crate::r16::R16_ROWS;
use crate::up_layout::UpLayout;
use crate::weight_type::BLOCK_LEN;
use crate::x86_64::heads::narrow_bytes;
use crate::x86_64::request::prefetch;

pub(super) fn up_rows(up: &UpLayout, region: &[u8], rows: LiveRows<'_>, acts: &[ActRow<'_>], out: &mut [f32]) {
    with_coded!(up.ty, T => {
        live::each_tokens_block(up, region, rows, acts, out, prefetch, |block, ahead, a, sums| {
            // SAFETY: the callers of a table's functions have the CPU features; rows and activations have kb blocks.
            *sums = unsafe { up_block::<T>(up, block, ahead, a) };
        });
    });
}

/// 16 rows of an up region.
struct Rows {
    planes: [*const u8; R16_ROWS],
    heads: [*const u8; R16_ROWS],
    /// Where the high planes begin.
    high: usize,
    /// Blocks of a row.
    blocks: usize,
}

impl Rows {
    /// The rows of a block.
    #[inline]
    fn new<T: Coded>(up: &UpLayout, block: &UpBlock) -> Self {
        Self {
            planes: block.rows.map(|(planes, _)| planes),
            heads: block.rows.map(|(_, heads)| heads),
            high: up.kb.div_ceil(4) * 16 * T::CODING.low_bits(),
            blocks: up.kb / T::STEPS,
        }
    }

    /// Bytes `at..at + 16` of the planes of the 16 rows: quad `g` of each of them.
    ///
    /// # Safety
    /// The rows must have them.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn chunk(&self, at: usize) -> [__m512i; 4] {
        // SAFETY: the caller's promise.
        transpose_quads(|r| unsafe { _mm_loadu_si128(self.planes[r].add(at).cast()) })
    }

    /// The scales of block `b`.
    ///
    /// # Safety
    /// The rows must have it.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
    unsafe fn scales<T: Coded>(&self, b: usize) -> Scales<T> {
        let wide = |kind: usize| {
            let at = (kind * self.blocks + b) * 2;
            // SAFETY: the caller's promise.
            let halves = self.heads.map(|head| unsafe { head.add(at).cast::<u16>().read_unaligned() });
            // SAFETY: 32 bytes.
            _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(halves.as_ptr().cast()) })
        };
        let at = 2 * T::CODING.wide() * self.blocks + b * T::CODING.narrow();
        if T::CODING.wide() == 0 {
            // SAFETY: the caller's promise.
            let exponents = self.heads.map(|head| unsafe { *head.add(at) });
            return Scales::of_powers(exponents);
        }
        // SAFETY: planes follow the heads of all rows, so 16 bytes are readable at each.
        let narrow = if T::STEPS > 1 { unsafe { narrow_bytes(self.heads, at) } } else { [[0; R16_ROWS]; 16] };
        let m = if T::CODING.has_minima { wide(1) } else { _mm512_setzero_ps() };
        Scales::with(wide(0), m, &narrow)
    }
}

/// A piece of 128 columns of 16 rows: the planes that its four blocks of 32 share.
struct Piece {
    /// Of a low plane of 2 bits.
    low: [[__m512i; 4]; 2],
    /// Of a high plane of 2 bits, or (the first) of 1.
    high: [[__m512i; 4]; 2],
}

impl Piece {
    /// Piece `c` of the rows.
    ///
    /// # Safety
    /// The rows must have it.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn new<T: Coded>(rows: &Rows, c: usize) -> Self {
        let mut piece = Self { low: [[_mm512_setzero_si512(); 4]; 2], high: [[_mm512_setzero_si512(); 4]; 2] };
        // SAFETY: a piece has 16 bytes for each bit of a plane.
        unsafe {
            if T::CODING.low_bits() == 2 {
                piece.low = [rows.chunk(c * 32), rows.chunk(c * 32 + 16)];
            }
            match T::CODING.high_bits() {
                2 => piece.high = [0, 16].map(|at| rows.chunk(rows.high + c * 32 + at)),
                1 => piece.high[0] = rows.chunk(rows.high + c * 16),
                _ => (),
            }
        }
        piece
    }

    /// Quads of block `b` of piece `c`, [`offset`] more than their values: quad groups 0 to 3, and 4 to 7.
    ///
    /// # Safety
    /// The rows must have the piece.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn block<T: Coded>(&self, rows: &Rows, c: usize, b: usize, table: __m512i) -> [[__m512i; 4]; 2] {
        let (low, high) = (T::CODING.low_bits(), T::CODING.high_bits());
        let quads = match low {
            // SAFETY: the caller's promise.
            4 => unsafe { rows.chunk(c * 64 + b * 16) },
            _ => self.low[b % 2],
        };
        // Where a plane of 2 bits has the codes 0..16 of a block, and codes 16..32.
        let two = |half: usize| 2 * (b / 2 + 2 * half);
        let mask = _mm512_set1_epi8((1 << low) - 1);
        let high_mask = _mm512_set1_epi8(((1 << high) - 1) << low);
        let mut out = [[_mm512_setzero_si512(); 4]; 2];
        for (half, out) in out.iter_mut().enumerate() {
            let from = if low == 4 { 4 * half } else { two(half) };
            for (g, out) in out.iter_mut().enumerate() {
                let codes = _mm512_and_si512(shifted(quads[g], from, 0), mask);
                // codes | w & mask
                let codes = match high {
                    2 => {
                        let w = shifted(self.high[b % 2][g], two(half), low);
                        _mm512_ternarylogic_epi32::<0xf8>(codes, w, high_mask)
                    }
                    1 => {
                        let w = shifted(self.high[0][g], b + 4 * half, low);
                        _mm512_ternarylogic_epi32::<0xf8>(codes, w, high_mask)
                    }
                    _ => codes,
                };
                *out = meant::<T>(codes, table);
            }
        }
        out
    }
}

/// Products of a block of rows with a token, line by line across the rows, as they were requested.
///
/// # Safety
/// The rows and the token must have the blocks of the layout.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
unsafe fn up_block<T: Coded>(up: &UpLayout, block: &UpBlock, ahead: &UpBlock, a: ActRow<'_>) -> [f32; UP_BLOCK] {
    let rows = Rows::new::<T>(up, block);
    let table = table::<T>();
    let minus = sums_times::<T>(-offset::<T>());
    let plus = sums_times::<T>(1);
    let (lines, pieces) = (up.row_bytes.div_ceil(64), up.kb.div_ceil(4));
    let mut acc = [_mm512_setzero_ps()];
    let mut scales = None;
    for c in 0..pieces {
        (c * lines / pieces..(c + 1) * lines / pieces).for_each(|line| ahead.request_line(line, prefetch));
        // SAFETY: the caller's promise.
        let piece = unsafe { Piece::new::<T>(&rows, c) };
        for b in 0..4 {
            let at = c * 4 + b;
            if at >= up.kb {
                break;
            }
            // SAFETY: the caller's promise.
            unsafe {
                let quads = piece.block::<T>(&rows, c, b, table);
                let scales: &Scales<T> = match at % T::STEPS {
                    0 => scales.insert(rows.scales::<T>(at / T::STEPS)),
                    _ => scales.as_ref().unwrap_unchecked(),
                };
                let token_sums = broadcast_quad(a.sums.as_ptr().add(at).cast());
                let mut sums = start_of::<T>(token_sums, minus);
                for (g, (x, y)) in quads[0].into_iter().zip(quads[1]).enumerate() {
                    let q = a.q.as_ptr().add(at * BLOCK_LEN + g * 4);
                    sums[0] = _mm512_dpbusd_epi32(sums[0], x, broadcast_quad(q));
                    sums[1] = _mm512_dpbusd_epi32(sums[1], y, broadcast_quad(q.add(16)));
                }
                let d_a = _mm512_set1_ps(*a.d.as_ptr().add(at));
                scales.add(at % T::STEPS, &mut acc, &[sums], &[token_sums], &[d_a], plus);
            }
        }
    }
    let mut sums = [0.0; UP_BLOCK];
    // SAFETY: 16 floats.
    unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), acc[0]) };
    sums
}

pub(super) fn panel_rows(up: &UpLayout, region: &[u8], first: usize, panel: &mut [u8]) {
    // SAFETY: the callers of a table's functions have the CPU features.
    with_coded!(up.ty, T => unsafe { panel_rows_of::<T>(up, region, first, panel) });
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
fn panel_rows_of<T: Coded>(up: &UpLayout, region: &[u8], first: usize, panel: &mut [u8]) {
    let table = table::<T>();
    let block_bytes = PanelKind::of(T::TY).block_bytes();
    let rows =
        Rows::new::<T>(up, &UpBlock::new(up, region, &std::array::from_fn::<_, R16_ROWS, _>(|r| (first + r) as u32)));
    let mut scales = None;
    for (c, blocks) in panel.chunks_mut(4 * block_bytes).enumerate() {
        // SAFETY: rows have a piece for each four blocks.
        let piece = unsafe { Piece::new::<T>(&rows, c) };
        for (b, block) in blocks.chunks_exact_mut(block_bytes).enumerate() {
            let at = c * 4 + b;
            // SAFETY: the rows have block `at`, and a panel block has 512 bytes before its scales.
            unsafe {
                let quads = piece.block::<T>(&rows, c, b, table);
                for (g, quads) in quads.as_flattened().iter().enumerate() {
                    _mm512_storeu_si512(block.as_mut_ptr().add(g * 64).cast(), panel_bytes::<T>(*quads));
                }
                let scales: &Scales<T> = match at % T::STEPS {
                    0 => scales.insert(rows.scales::<T>(at / T::STEPS)),
                    _ => scales.as_ref().unwrap_unchecked(),
                };
                put_scales(scales, at % T::STEPS, block.as_mut_ptr());
            }
        }
    }
}
