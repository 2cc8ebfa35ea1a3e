//! Tiles of the types of [`crate::planes`]: times one token or a few, and unpacked for many.

use std::arch::x86_64::*;

use super::lanes::broadcast_quad;
use super::token::{Token, put_outputs};
use crate::activations::{ActRow, Sums};
use crate::codes::{Coded, Meaning, with_coded};
use crate::panel::{PANEL_VALUES, PanelKind, Values};
use crate::planes::{Integers, step_bytes, tile_head_bytes, tile_integers};
use crate::r16::{R16_ROWS, group_bytes};
use crate::weight_type::{BLOCK_LEN, WeightType};
use crate::x86_64::request::request_stream_of;

/// Tokens whose sums stay in registers.
const AT_ONCE: usize = 4;

pub(super) fn gemv(ty: WeightType, kb: usize, tiles: &[u8], acts: &[ActRow<'_>], out: &mut [&mut [f32]]) {
    let group = group_bytes(ty, kb);
    let groups = tiles.len() / group;
    assert!(acts.len() == out.len() && out.iter().all(|out| out.len() == groups * R16_ROWS));
    if acts.len() <= AT_ONCE {
        return with_coded!(ty, T => gemv_few::<T>(kb, tiles, acts, out, 0..groups));
    }
    // 16 rows at a time: the first tokens bring them into cache for the others.
    for i in 0..groups {
        for (acts, out) in acts.chunks(AT_ONCE).zip(out.chunks_mut(AT_ONCE)) {
            with_coded!(ty, T => gemv_few::<T>(kb, &tiles[i * group..(i + 1) * group], acts, out, i..i + 1));
        }
    }
}

/// Up to AT_ONCE tokens and the tiles of the row groups `groups` of their outputs.
fn gemv_few<T: Coded>(
    kb: usize,
    tiles: &[u8],
    acts: &[ActRow<'_>],
    out: &mut [&mut [f32]],
    groups: std::ops::Range<usize>,
) {
    fn tokens<const N: usize>(acts: &[ActRow<'_>], out: &mut [&mut [f32]], first: usize) -> [Token; N] {
        std::array::from_fn(|t| Token::new(acts[t], &mut out[t][first * R16_ROWS..]))
    }
    assert!(tiles.len() >= groups.len() * group_bytes(T::TY, kb));
    let (tiles, first, n) = (tiles.as_ptr(), groups.start, groups.len());
    // SAFETY: the callers of a table's functions have the CPU features, and give activations of kb blocks; the tiles are there, and 16
    // outputs for each row group.
    unsafe {
        match acts.len() {
            1 => gemv_of::<T, 1>(kb, tiles, tokens(acts, out, first), n),
            2 => gemv_of::<T, 2>(kb, tiles, tokens(acts, out, first), n),
            3 => gemv_of::<T, 3>(kb, tiles, tokens(acts, out, first), n),
            4 => gemv_of::<T, AT_ONCE>(kb, tiles, tokens(acts, out, first), n),
            n => unreachable!("{n} tokens"),
        }
    }
}

/// # Safety
/// `tiles` has `groups` row groups of kb blocks, each token kb blocks and 16 outputs for each group.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
unsafe fn gemv_of<T: Coded, const N: usize>(kb: usize, tiles: *const u8, tokens: [Token; N], groups: usize) {
    let table = table::<T>();
    let minus = sums_times::<T>(-offset::<T>());
    let plus = sums_times::<T>(1);
    let mut tile = tiles;
    for group in 0..groups {
        let mut acc = [_mm512_setzero_ps(); N];
        for b in 0..kb / T::STEPS {
            // SAFETY: this is tile `b` of a row group, and its steps are as many blocks of the activations.
            unsafe {
                let scales = Scales::<T>::new(tile);
                request_stream_of(tile, tile_head_bytes(T::TY));
                for step in 0..T::STEPS {
                    let planes = tile.add(tile_head_bytes(T::TY) + step * step_bytes(T::TY));
                    let at = b * T::STEPS + step;
                    request_stream_of(planes, step_bytes(T::TY));
                    let token_sums = std::array::from_fn(|t| broadcast_quad(tokens[t].sums.add(at).cast()));
                    let mut sums = token_sums.map(|sums| start_of::<T>(sums, minus));
                    for g in 0..4 {
                        let (x, y) = (quads::<T>(planes, g, table), quads::<T>(planes, g + 4, table));
                        for (token, sums) in tokens.iter().zip(&mut sums) {
                            let q = token.q.add(at * BLOCK_LEN + g * 4);
                            sums[0] = _mm512_dpbusd_epi32(sums[0], x, broadcast_quad(q));
                            sums[1] = _mm512_dpbusd_epi32(sums[1], y, broadcast_quad(q.add(16)));
                        }
                    }
                    let d_a = std::array::from_fn(|t| _mm512_set1_ps(*tokens[t].d.add(at)));
                    scales.add(step, &mut acc, &sums, &token_sums, &d_a, plus);
                }
                tile = tile.add(R16_ROWS * T::TY.block_bytes());
            }
        }
        // SAFETY: 16 outputs for each group.
        unsafe { put_outputs(acc, &tokens, group) };
    }
}

/// What the two sums of a block of activations ([`Sums`]) are multiplied by, in pairs, to give `by` times the sum of each sub-block.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn sums_times<T: Coded>(by: i32) -> [__m512i; 2] {
    const { assert!(size_of::<Sums>() == 4) };
    let (first, last) = (by & 0xffff, by << 16);
    match T::SUBS {
        1 => [_mm512_set1_epi32(first | last); 2],
        _ => [_mm512_set1_epi32(first), _mm512_set1_epi32(last)],
    }
}

/// What sums of products start from: of the two halves of a block, or of a whole one and nothing.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn start_of<T: Coded>(sums: __m512i, minus: [__m512i; 2]) -> [__m512i; 2] {
    match (offset::<T>(), T::SUBS) {
        (0, _) => [_mm512_setzero_si512(); 2],
        (_, 1) => [_mm512_madd_epi16(sums, minus[0]), _mm512_setzero_si512()],
        _ => minus.map(|minus| _mm512_madd_epi16(sums, minus)),
    }
}

/// What [`quads`] adds to values.
pub(super) const fn offset<T: Coded>() -> i32 {
    match T::CODING.meaning {
        Meaning::Less(offset) => offset,
        Meaning::Table(_) => 128,
    }
}

/// The values of a type of codes for [`quads`], in each lane of 128 bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn table<T: Coded>() -> __m512i {
    match T::CODING.meaning {
        Meaning::Less(_) => _mm512_setzero_si512(),
        // SAFETY: 16 bytes.
        Meaning::Table(values) => unsafe {
            let values = _mm512_broadcast_i32x4(_mm_loadu_si128(values.as_ptr().cast()));
            _mm512_xor_si512(values, _mm512_set1_epi8(-128))
        },
    }
}

/// Codes, or what the table has for them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn meant<T: Coded>(codes: __m512i, table: __m512i) -> __m512i {
    match T::CODING.meaning {
        Meaning::Less(_) => codes,
        Meaning::Table(_) => _mm512_shuffle_epi8(table, codes),
    }
}

/// Quad group `g` of a step as unsigned bytes, each [`offset`] more than its value.
///
/// # Safety
/// `planes` must be readable for the bytes of a step.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn quads<T: Coded>(planes: *const u8, g: usize, table: __m512i) -> __m512i {
    let (low, high) = (T::CODING.low_bits(), T::CODING.high_bits());
    // SAFETY: a plane of some width has as many times 64 bytes.
    unsafe {
        let w = _mm512_loadu_si512(planes.add(64 * (g % low)).cast());
        let codes = _mm512_and_si512(shifted(w, low * (g / low), 0), _mm512_set1_epi8((1 << low) - 1));
        if high == 0 {
            return meant::<T>(codes, table);
        }
        let w = _mm512_loadu_si512(planes.add(64 * (low + g % high)).cast());
        let mask = _mm512_set1_epi8(((1 << high) - 1) << low);
        // codes | w & mask
        _mm512_ternarylogic_epi32::<0xf8>(codes, shifted(w, high * (g / high), low), mask)
    }
}

/// Moves bit `from` of each byte to bit `to`; what crosses bytes is for a mask to take away. With constants one shift at most.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn shifted(w: __m512i, from: usize, to: usize) -> __m512i {
    if from >= to {
        _mm512_srl_epi16(w, _mm_cvtsi32_si128((from - to) as i32))
    } else {
        _mm512_sll_epi16(w, _mm_cvtsi32_si128((to - from) as i32))
    }
}

/// The scales of a tile.
pub(super) struct Scales<T: Coded> {
    d: __m512,
    m: __m512,
    by: (Integers, Integers),
    _type: std::marker::PhantomData<T>,
}

impl<T: Coded> Scales<T> {
    /// # Safety
    /// `tile` must be readable for a tile.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
    unsafe fn new(tile: *const u8) -> Self {
        // SAFETY: the heads of a tile are f16 scales of 16 rows, one or two, and then other bytes, 16 for each; in a tile of 256 columns
        // 256 bytes follow the f16 scales.
        unsafe {
            let wide = |i: usize| _mm512_cvtph_ps(_mm256_loadu_si256(tile.add(i * 32).cast()));
            let d = match T::CODING.wide() {
                0 => powers(_mm512_cvtepu8_epi32(_mm_loadu_si128(tile.cast()))),
                _ => wide(0),
            };
            let m = if T::CODING.has_minima { wide(1) } else { _mm512_setzero_ps() };
            let narrow = if T::STEPS > 1 { &*tile.add(32 * T::CODING.wide()).cast() } else { &[[0; R16_ROWS]; 16] };
            Self::with(d, m, narrow)
        }
    }

    /// From f16 scales and minima, and the other bytes of the heads, which only types of 256 columns have.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
    pub(super) fn with(d: __m512, m: __m512, narrow: &[[u8; R16_ROWS]; 16]) -> Self {
        let none = [[0; R16_ROWS]; crate::codes::MAX_SCALES];
        let (mut m, mut by) = (m, (none, none));
        if T::STEPS > 1 {
            m = _mm512_xor_ps(m, _mm512_set1_ps(-0.0));
            by = tile_integers::<T>(narrow);
        }
        Self { d, m, by, _type: std::marker::PhantomData }
    }

    /// Of a type whose scales are powers of two.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn of_powers(exponents: [u8; R16_ROWS]) -> Self {
        // SAFETY: 16 bytes.
        let exponents = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(exponents.as_ptr().cast()) });
        let by = [[0; R16_ROWS]; crate::codes::MAX_SCALES];
        Self { d: powers(exponents), m: _mm512_setzero_ps(), by: (by, by), _type: std::marker::PhantomData }
    }

    /// Scale and minimum of a sub-block.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
    fn of(&self, sub: usize) -> (__m512, __m512) {
        if T::STEPS == 1 {
            return (self.d, self.m);
        }
        let times = |scale: __m512, by: &Integers| {
            // SAFETY: 16 bytes.
            let by = unsafe { _mm_loadu_si128(by[sub].as_ptr().cast()) };
            _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(by)))
        };
        (times(self.d, &self.by.0), if T::CODING.has_minima { times(self.m, &self.by.1) } else { self.m })
    }
}

impl<T: Coded> Scales<T> {
    /// Adds a step to the sums of `N` tokens: its integers by halves (`sums`), and where there are minima those of the activations.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
    pub(super) fn add<const N: usize>(
        &self,
        step: usize,
        acc: &mut [__m512; N],
        sums: &[[__m512i; 2]; N],
        token_sums: &[__m512i; N],
        d_a: &[__m512; N],
        plus: [__m512i; 2],
    ) {
        for sub in 0..T::SUBS {
            let (d_w, m_w) = self.of(step * T::SUBS + sub);
            for (t, acc) in acc.iter_mut().enumerate() {
                let sum = if T::SUBS == 1 { _mm512_add_epi32(sums[t][0], sums[t][1]) } else { sums[t][sub] };
                *acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(d_w, d_a[t]), *acc);
                if T::CODING.has_minima {
                    let sum = _mm512_cvtepi32_ps(_mm512_madd_epi16(token_sums[t], plus[sub]));
                    *acc = _mm512_fmadd_ps(sum, _mm512_mul_ps(m_w, d_a[t]), *acc);
                }
            }
        }
    }
}

/// Half of the powers of two whose biased exponents these are ([`crate::codes::half_of_power`]).
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn powers(exponents: __m512i) -> __m512 {
    let normal = _mm512_slli_epi32::<23>(_mm512_sub_epi32(exponents, _mm512_set1_epi32(1)));
    let small = _mm512_sllv_epi32(_mm512_set1_epi32(0x0020_0000), exponents);
    let is_small = _mm512_cmplt_epi32_mask(exponents, _mm512_set1_epi32(2));
    _mm512_castsi512_ps(_mm512_mask_blend_epi32(is_small, normal, small))
}

/// Bytes as a panel has them: what a signed value needs beside [`offset`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn panel_bytes<T: Coded>(quads: __m512i) -> __m512i {
    match PanelKind::of(T::TY).values {
        Values::Nibbles { .. } => quads,
        Values::Signed => _mm512_add_epi8(quads, _mm512_set1_epi8((128 - offset::<T>()) as i8)),
    }
}

/// Puts the scales of a step's sub-blocks behind its values.
///
/// # Safety
/// `block` must be writable for a panel block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
pub(super) unsafe fn put_scales<T: Coded>(scales: &Scales<T>, step: usize, block: *mut u8) {
    for sub in 0..T::SUBS {
        let (d, m) = scales.of(step * T::SUBS + sub);
        // SAFETY: the caller's promise.
        unsafe {
            _mm512_storeu_ps(block.add(PANEL_VALUES + sub * 64).cast(), d);
            if T::CODING.has_minima {
                _mm512_storeu_ps(block.add(PANEL_VALUES + (T::SUBS + sub) * 64).cast(), m);
            }
        }
    }
}

pub(super) fn panel_tiles(ty: WeightType, tiles: &[u8], panel: &mut [u8]) {
    // SAFETY: the callers of a table's functions have the CPU features.
    with_coded!(ty, T => unsafe { panel_tiles_of::<T>(tiles, panel) });
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
fn panel_tiles_of<T: Coded>(tiles: &[u8], panel: &mut [u8]) {
    let table = table::<T>();
    let block_bytes = PanelKind::of(T::TY).block_bytes();
    let tiles = tiles.chunks_exact(R16_ROWS * T::TY.block_bytes());
    for (tile, blocks) in tiles.zip(panel.chunks_exact_mut(T::STEPS * block_bytes)) {
        // SAFETY: a tile has its heads and steps, and each step has a panel block.
        unsafe {
            let scales = Scales::<T>::new(tile.as_ptr());
            for (step, block) in blocks.chunks_exact_mut(block_bytes).enumerate() {
                let planes = tile.as_ptr().add(tile_head_bytes(T::TY) + step * step_bytes(T::TY));
                let block = block.as_mut_ptr();
                for g in 0..8 {
                    let quads = panel_bytes::<T>(quads::<T>(planes, g, table));
                    _mm512_storeu_si512(block.add(g * 64).cast(), quads);
                }
                put_scales(&scales, step, block);
            }
        }
    }
}
