//! Tiles of the types of [`crate::planes`]: times one token or a few, and unpacked for many. 16 rows are two vectors, one after the other.

use std::arch::x86_64::*;

use super::lanes::{broadcast_quad, dot_signed};
use crate::activations::{ActRow, FEW_ROWS, Sums};
use crate::codes::{Coded, MAX_SCALES, Meaning, with_coded};
use crate::panel::{PANEL_VALUES, PanelKind, Values};
use crate::planes::{Integers, step_bytes, tile_head_bytes, tile_integers};
use crate::r16::{R16_ROWS, group_bytes};
use crate::weight_type::{BLOCK_LEN, WeightType};
use crate::x86_64::request::request_stream_of;

/// # Safety
/// The CPU must have AVX2, FMA, F16C and what `dpbusd` needs (which is used where `VNNI` is true); the activations must have kb blocks.
#[inline(always)]
pub(super) unsafe fn gemv<const VNNI: bool>(
    ty: WeightType,
    kb: usize,
    tiles: &[u8],
    acts: &[ActRow<'_>],
    out: &mut [&mut [f32]],
    dpbusd: impl Fn(__m256i, __m256i, __m256i) -> __m256i + Copy,
) {
    let groups = tiles.len() / group_bytes(ty, kb);
    assert!(acts.len() == out.len() && acts.len() <= FEW_ROWS);
    assert!(out.iter().all(|out| out.len() == groups * R16_ROWS));
    // SAFETY: the caller's promise.
    with_coded!(ty, T => unsafe { gemv_of::<T, VNNI>(kb, tiles, acts, out, dpbusd) });
}

/// # Safety
/// As [`gemv`].
#[inline(always)]
unsafe fn gemv_of<T: Coded, const VNNI: bool>(
    kb: usize,
    tiles: &[u8],
    acts: &[ActRow<'_>],
    out: &mut [&mut [f32]],
    dpbusd: impl Fn(__m256i, __m256i, __m256i) -> __m256i + Copy,
) {
    // SAFETY: the caller's promise; tiles and activations are walked block by block.
    unsafe {
        let table = table::<T, VNNI>();
        for (group, tiles) in tiles.chunks_exact(group_bytes(T::TY, kb)).enumerate() {
            let mut acc = [[_mm256_setzero_ps(); 2]; FEW_ROWS];
            for (b, tile) in tiles.chunks_exact(R16_ROWS * T::TY.block_bytes()).enumerate() {
                request_stream_of(tile.as_ptr(), tile_head_bytes(T::TY));
                let scales = Scales::<T>::of_tile(tile.as_ptr());
                for step in 0..T::STEPS {
                    let planes = tile.as_ptr().add(tile_head_bytes(T::TY) + step * step_bytes(T::TY));
                    request_stream_of(planes, step_bytes(T::TY));
                    for rows in 0..2 {
                        let quads: [__m256i; 8] = [
                            quads::<T>(planes, 0, rows, table),
                            quads::<T>(planes, 1, rows, table),
                            quads::<T>(planes, 2, rows, table),
                            quads::<T>(planes, 3, rows, table),
                            quads::<T>(planes, 4, rows, table),
                            quads::<T>(planes, 5, rows, table),
                            quads::<T>(planes, 6, rows, table),
                            quads::<T>(planes, 7, rows, table),
                        ];
                        for (a, acc) in acts.iter().zip(&mut acc) {
                            scales.add::<VNNI>(step, rows, &quads, *a, b * T::STEPS + step, &mut acc[rows], dpbusd);
                        }
                    }
                }
            }
            for (acc, out) in acc.iter().zip(out.iter_mut()) {
                let out = out[group * R16_ROWS..][..R16_ROWS].as_mut_ptr();
                _mm256_storeu_ps(out, acc[0]);
                _mm256_storeu_ps(out.add(8), acc[1]);
            }
        }
    }
}

/// What bytes of codes are more than values.
pub(super) const fn offset<T: Coded, const VNNI: bool>() -> i32 {
    match T::CODING.meaning {
        Meaning::Less(offset) => offset,
        Meaning::Table(_) if VNNI => 128,
        Meaning::Table(_) => 0,
    }
}

/// The values of a type of codes, in each lane of 128 bits; with `VNNI` 128 more.
///
/// # Safety
/// The CPU must have AVX2.
#[inline(always)]
pub(super) unsafe fn table<T: Coded, const VNNI: bool>() -> __m256i {
    // SAFETY: 16 bytes.
    unsafe {
        match T::CODING.meaning {
            Meaning::Less(_) => _mm256_setzero_si256(),
            Meaning::Table(values) => {
                let values = _mm256_broadcastsi128_si256(_mm_loadu_si128(values.as_ptr().cast()));
                _mm256_xor_si256(values, _mm256_set1_epi8(if VNNI { -128 } else { 0 }))
            }
        }
    }
}

/// Codes, or what the table has for them.
///
/// # Safety
/// The CPU must have AVX2.
#[inline(always)]
pub(super) unsafe fn meant<T: Coded>(codes: __m256i, table: __m256i) -> __m256i {
    match T::CODING.meaning {
        Meaning::Less(_) => codes,
        // SAFETY: the caller's promise.
        Meaning::Table(_) => unsafe { _mm256_shuffle_epi8(table, codes) },
    }
}

/// Moves bit `from` of each byte to bit `to`; what crosses bytes is for a mask to take away.
///
/// # Safety
/// The CPU must have AVX2.
#[inline(always)]
pub(super) unsafe fn shifted(w: __m256i, from: usize, to: usize) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        if from >= to {
            _mm256_srl_epi16(w, _mm_cvtsi32_si128((from - to) as i32))
        } else {
            _mm256_sll_epi16(w, _mm_cvtsi32_si128((to - from) as i32))
        }
    }
}

/// Codes from the vectors of the low plane and of the high one that have them, at the bits `from`.
///
/// # Safety
/// The CPU must have AVX2.
#[inline(always)]
pub(super) unsafe fn codes<T: Coded>(low: __m256i, high: __m256i, from: [usize; 2]) -> __m256i {
    let (low_bits, high_bits) = (T::CODING.low_bits(), T::CODING.high_bits());
    // SAFETY: the caller's promise.
    unsafe {
        let codes = _mm256_and_si256(shifted(low, from[0], 0), _mm256_set1_epi8((1 << low_bits) - 1));
        if high_bits == 0 {
            return codes;
        }
        let mask = _mm256_set1_epi8(((1 << high_bits) - 1) << low_bits);
        _mm256_or_si256(codes, _mm256_and_si256(shifted(high, from[1], low_bits), mask))
    }
}

/// Quad group `g` of eight rows of a step, codes or values of the table.
///
/// # Safety
/// `planes` must be readable for the bytes of a step; the CPU must have AVX2.
#[inline(always)]
unsafe fn quads<T: Coded>(planes: *const u8, g: usize, rows: usize, table: __m256i) -> __m256i {
    let (low, high) = (T::CODING.low_bits(), T::CODING.high_bits());
    // SAFETY: a plane of some width has as many times 64 bytes.
    unsafe {
        let load = |at: usize| _mm256_loadu_si256(planes.add(64 * at + 32 * rows).cast());
        let (upper, bit) =
            if high == 0 { (_mm256_setzero_si256(), 0) } else { (load(low + g % high), high * (g / high)) };
        meant::<T>(codes::<T>(load(g % low), upper, [low * (g / low), bit]), table)
    }
}

/// The sums of four quads of eight rows with as many of a token.
///
/// # Safety
/// `q` must be readable for 16 bytes; the CPU must have AVX2 and what `dpbusd` needs.
#[inline(always)]
unsafe fn half_sums<T: Coded, const VNNI: bool>(
    w: &[__m256i],
    q: *const i8,
    dpbusd: impl Fn(__m256i, __m256i, __m256i) -> __m256i,
) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let q = [0, 4, 8, 12].map(|at| broadcast_quad(q.add(at)));
        let ones = _mm256_set1_epi16(1);
        if VNNI {
            let mut sums = _mm256_setzero_si256();
            for (w, q) in w.iter().zip(q) {
                sums = dpbusd(sums, *w, q);
            }
            return sums;
        }
        if let Meaning::Table(_) = T::CODING.meaning {
            let mut sums = _mm256_setzero_si256();
            for (w, q) in w.iter().zip(q) {
                sums = _mm256_add_epi32(sums, dot_signed(*w, q));
            }
            return sums;
        }
        // Sums of 16 bits have room for four products of pairs of 5 bits, and for two of 6.
        let pair =
            |i: usize| _mm256_add_epi16(_mm256_maddubs_epi16(w[i], q[i]), _mm256_maddubs_epi16(w[i + 1], q[i + 1]));
        if T::CODING.bits() > 5 {
            return _mm256_add_epi32(_mm256_madd_epi16(pair(0), ones), _mm256_madd_epi16(pair(2), ones));
        }
        _mm256_madd_epi16(_mm256_add_epi16(pair(0), pair(2)), ones)
    }
}

/// The scales of a block of 16 rows.
pub(super) struct Scales<T: Coded> {
    d: [__m256; 2],
    m: [__m256; 2],
    by: (Integers, Integers),
    _type: std::marker::PhantomData<T>,
}

impl<T: Coded> Scales<T> {
    /// # Safety
    /// `tile` must be readable for a tile; the CPU must have AVX2 and F16C.
    #[inline(always)]
    unsafe fn of_tile(tile: *const u8) -> Self {
        // SAFETY: the heads of a tile are f16 scales of 16 rows, one or two, and then other bytes, 16 for each; in a tile of 256 columns
        // 256 bytes follow the f16 scales.
        unsafe {
            let wide = |i: usize| tile.add(i * 32).cast::<[u16; R16_ROWS]>().read_unaligned();
            if T::CODING.wide() == 0 {
                return Self::of_powers(&tile.cast::<[u8; R16_ROWS]>().read());
            }
            let m = if T::CODING.has_minima { wide(1) } else { [0; R16_ROWS] };
            let narrow = if T::STEPS > 1 { &*tile.add(32 * T::CODING.wide()).cast() } else { &[[0; R16_ROWS]; 16] };
            Self::new(&wide(0), &m, narrow)
        }
    }

    /// Of a type whose scales are powers of two.
    #[inline(always)]
    pub(super) fn of_powers(exponents: &[u8; R16_ROWS]) -> Self {
        let d = exponents.map(crate::codes::half_of_power);
        // SAFETY: eight floats each.
        let d = unsafe { [_mm256_loadu_ps(d.as_ptr()), _mm256_loadu_ps(d.as_ptr().add(8))] };
        let by = [[0; R16_ROWS]; MAX_SCALES];
        // SAFETY: all features of AVX2 kernels.
        Self { d, m: unsafe { [_mm256_setzero_ps(); 2] }, by: (by, by), _type: std::marker::PhantomData }
    }

    /// From f16 scales and minima, and the other bytes of the heads, which only types of 256 columns have.
    ///
    /// # Safety
    /// The CPU must have AVX2 and F16C.
    #[inline(always)]
    pub(super) unsafe fn new(d: &[u16; R16_ROWS], m: &[u16; R16_ROWS], narrow: &[[u8; R16_ROWS]; 16]) -> Self {
        // SAFETY: the caller's promise; 16 bytes each.
        unsafe {
            let floats = |halves: &[u16; R16_ROWS]| {
                [0, 8].map(|at| _mm256_cvtph_ps(_mm_loadu_si128(halves.as_ptr().add(at).cast())))
            };
            let none = [[0; R16_ROWS]; MAX_SCALES];
            let (d, mut m, mut by) = (floats(d), floats(m), (none, none));
            if T::STEPS > 1 {
                m = m.map(|m| _mm256_xor_ps(m, _mm256_set1_ps(-0.0)));
                by = tile_integers::<T>(narrow);
            }
            Self { d, m, by, _type: std::marker::PhantomData }
        }
    }

    /// Scale and minimum of a sub-block of eight rows.
    ///
    /// # Safety
    /// The CPU must have AVX2.
    #[inline(always)]
    unsafe fn of(&self, sub: usize, rows: usize) -> (__m256, __m256) {
        let (d, m) = (self.d[rows], self.m[rows]);
        if T::STEPS == 1 {
            return (d, m);
        }
        // SAFETY: eight bytes.
        let times = |scale: __m256, by: &Integers| unsafe {
            let by = _mm_loadl_epi64(by[sub].as_ptr().add(8 * rows).cast());
            _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(by)))
        };
        (times(d, &self.by.0), if T::CODING.has_minima { times(m, &self.by.1) } else { m })
    }

    /// Adds block `at` of a token, which is step `step` of the scales' block, for eight rows.
    ///
    /// # Safety
    /// The CPU must have AVX2, FMA and what `dpbusd` needs; the token must have the block.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    pub(super) unsafe fn add<const VNNI: bool>(
        &self,
        step: usize,
        rows: usize,
        quads: &[__m256i; 8],
        a: ActRow<'_>,
        at: usize,
        acc: &mut __m256,
        dpbusd: impl Fn(__m256i, __m256i, __m256i) -> __m256i + Copy,
    ) {
        const { assert!(size_of::<Sums>() == 4) };
        // SAFETY: the caller's promise.
        unsafe {
            let q = a.q.as_ptr().add(at * BLOCK_LEN);
            let [first, last] = *a.sums.get_unchecked(at);
            let d_a = _mm256_set1_ps(*a.d.get_unchecked(at));
            let halves =
                [half_sums::<T, VNNI>(&quads[..4], q, dpbusd), half_sums::<T, VNNI>(&quads[4..], q.add(16), dpbusd)];
            for sub in 0..T::SUBS {
                let (sum, total) = match (T::SUBS, sub) {
                    (1, _) => (_mm256_add_epi32(halves[0], halves[1]), i32::from(first) + i32::from(last)),
                    (_, 0) => (halves[0], i32::from(first)),
                    _ => (halves[1], i32::from(last)),
                };
                let start = -offset::<T, VNNI>() * total;
                let (d_w, m_w) = self.of(step * T::SUBS + sub, rows);
                let sum = _mm256_cvtepi32_ps(_mm256_add_epi32(sum, _mm256_set1_epi32(start)));
                *acc = _mm256_fmadd_ps(sum, _mm256_mul_ps(d_w, d_a), *acc);
                if T::CODING.has_minima {
                    *acc = _mm256_fmadd_ps(_mm256_set1_ps(total as f32), _mm256_mul_ps(m_w, d_a), *acc);
                }
            }
        }
    }

    /// Puts the scales of a step's sub-blocks behind its values.
    ///
    /// # Safety
    /// `block` must be writable for a panel block; the CPU must have AVX2.
    #[inline(always)]
    pub(super) unsafe fn put(&self, step: usize, block: *mut u8) {
        for (sub, rows) in (0..T::SUBS).flat_map(|sub| [(sub, 0), (sub, 1)]) {
            // SAFETY: the caller's promise.
            unsafe {
                let (d, m) = self.of(step * T::SUBS + sub, rows);
                _mm256_storeu_ps(block.add(PANEL_VALUES + sub * 64 + rows * 32).cast(), d);
                if T::CODING.has_minima {
                    _mm256_storeu_ps(block.add(PANEL_VALUES + (T::SUBS + sub) * 64 + rows * 32).cast(), m);
                }
            }
        }
    }
}

/// Bytes as a panel has them: signed ones without their offset.
///
/// # Safety
/// The CPU must have AVX2.
#[inline(always)]
pub(super) unsafe fn panel_bytes<T: Coded>(quads: __m256i) -> __m256i {
    match (PanelKind::of(T::TY).values, T::CODING.meaning) {
        // SAFETY: the caller's promise.
        (Values::Signed, Meaning::Less(offset)) => unsafe { _mm256_sub_epi8(quads, _mm256_set1_epi8(offset as i8)) },
        _ => quads,
    }
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn panel_tiles(ty: WeightType, tiles: &[u8], panel: &mut [u8]) {
    // SAFETY: the features are those of this function.
    with_coded!(ty, T => unsafe { panel_tiles_of::<T>(tiles, panel) });
}

/// # Safety
/// The CPU must have AVX2 and F16C.
#[inline(always)]
unsafe fn panel_tiles_of<T: Coded>(tiles: &[u8], panel: &mut [u8]) {
    let block_bytes = PanelKind::of(T::TY).block_bytes();
    let tiles = tiles.chunks_exact(R16_ROWS * T::TY.block_bytes());
    // SAFETY: the caller's promise; a tile has its heads and steps, and each step has a panel block.
    unsafe {
        let table = table::<T, false>();
        for (tile, blocks) in tiles.zip(panel.chunks_exact_mut(T::STEPS * block_bytes)) {
            let scales = Scales::<T>::of_tile(tile.as_ptr());
            for (step, block) in blocks.chunks_exact_mut(block_bytes).enumerate() {
                let planes = tile.as_ptr().add(tile_head_bytes(T::TY) + step * step_bytes(T::TY));
                for (g, rows) in (0..8).flat_map(|g| [(g, 0), (g, 1)]) {
                    let quads = panel_bytes::<T>(quads::<T>(planes, g, rows, table));
                    _mm256_storeu_si256(block.as_mut_ptr().add(g * 64 + rows * 32).cast(), quads);
                }
                scales.put(step, block.as_mut_ptr());
            }
        }
    }
}
