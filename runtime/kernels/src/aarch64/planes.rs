//! Tiles of the types of [`crate::planes`]: times one token or a few, and unpacked for many. 16 rows are four vectors, one after the other.

use std::arch::aarch64::*;

use super::dot::Dot;
use super::neon::{Neon, add_block, load_f16, prefetch};
use crate::activations::{ActRow, FEW_ROWS};
use crate::codes::{Coded, MAX_SCALES, Meaning, half_of_power, with_coded};
use crate::panel::{PANEL_VALUES, PanelKind, PanelLayout, Values, place};
use crate::planes::{Integers, pack_tiles_of, step_bytes, tile_head_bytes, tile_integers};
use crate::r16::{R16_ROWS, group_bytes};
use crate::scalar;
use crate::weight_type::{BLOCK_LEN, WeightType};

/// How far ahead of the bytes in use the next ones are requested.
const AHEAD: usize = 2304;

pub(super) fn pack_r16(ty: WeightType, kb: usize, canonical: &[u8], tiles: &mut [u8]) {
    if !ty.has_codes() {
        return scalar::pack_r16(ty, kb, canonical, tiles);
    }
    with_coded!(ty, T => pack_tiles_of::<T, Neon>(kb, canonical, tiles));
}

/// # Safety
/// The CPU must have what `D` needs; the activations must have kb blocks.
#[inline(always)]
pub(super) unsafe fn gemv<D: Dot>(
    ty: WeightType,
    kb: usize,
    tiles: &[u8],
    acts: &[ActRow<'_>],
    out: &mut [&mut [f32]],
) {
    let groups = tiles.len() / group_bytes(ty, kb);
    assert!(acts.len() == out.len() && acts.len() <= FEW_ROWS);
    assert!(out.iter().all(|out| out.len() == groups * R16_ROWS));
    // SAFETY: the caller's promise.
    with_coded!(ty, T => unsafe { gemv_of::<T, D>(kb, tiles, acts, out) });
}

/// # Safety
/// As [`gemv`].
#[inline(always)]
unsafe fn gemv_of<T: Coded, D: Dot>(kb: usize, tiles: &[u8], acts: &[ActRow<'_>], out: &mut [&mut [f32]]) {
    // SAFETY: the caller's promise; tiles and activations are walked block by block.
    unsafe {
        let table = table::<T>();
        for (group, tiles) in tiles.chunks_exact(group_bytes(T::TY, kb)).enumerate() {
            let mut acc = [[vdupq_n_f32(0.0); 4]; FEW_ROWS];
            for (b, tile) in tiles.chunks_exact(R16_ROWS * T::TY.block_bytes()).enumerate() {
                request(tile.as_ptr(), tile_head_bytes(T::TY));
                let scales = Scales::<T>::of_tile(tile.as_ptr());
                for step in 0..T::STEPS {
                    let planes = tile.as_ptr().add(tile_head_bytes(T::TY) + step * step_bytes(T::TY));
                    request(planes, step_bytes(T::TY));
                    for rows in 0..4 {
                        let quads: [int8x16_t; 8] = [
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
                            scales.add::<D>(step, rows, &quads, *a, b * T::STEPS + step, &mut acc[rows]);
                        }
                    }
                }
            }
            for (acc, out) in acc.iter().zip(out.iter_mut()) {
                for (acc, out) in acc.iter().zip(out[group * R16_ROWS..][..R16_ROWS].chunks_exact_mut(4)) {
                    vst1q_f32(out.as_mut_ptr(), *acc);
                }
            }
        }
    }
}

/// Requests what lies ahead of `len` bytes at `p`.
#[inline(always)]
fn request(p: *const u8, len: usize) {
    (0..len.div_ceil(64)).for_each(|line| prefetch(p.wrapping_add(AHEAD + line * 64)));
}

/// What codes are more than values.
pub(super) const fn offset<T: Coded>() -> i32 {
    match T::CODING.meaning {
        Meaning::Less(offset) => offset,
        Meaning::Table(_) => 0,
    }
}

/// The values of a type of codes.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn table<T: Coded>() -> int8x16_t {
    match T::CODING.meaning {
        Meaning::Less(_) => vdupq_n_s8(0),
        // SAFETY: 16 bytes.
        Meaning::Table(values) => unsafe { vld1q_s8(values.as_ptr()) },
    }
}

/// Codes from the vectors of the low plane and of the high one that have them, at the bits `from`, or what the table has for them.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn codes<T: Coded>(low: uint8x16_t, high: uint8x16_t, from: [usize; 2], table: int8x16_t) -> int8x16_t {
    let (low_bits, high_bits) = (T::CODING.low_bits(), T::CODING.high_bits());
    let bits = |w: uint8x16_t, from: usize, width: usize| {
        vandq_u8(vshlq_u8(w, vdupq_n_s8(-(from as i8))), vdupq_n_u8((1 << width) - 1))
    };
    let mut codes = bits(low, from[0], low_bits);
    if high_bits > 0 {
        let high = bits(high, from[1], high_bits);
        codes = vorrq_u8(codes, vshlq_u8(high, vdupq_n_s8(low_bits as i8)));
    }
    match T::CODING.meaning {
        Meaning::Less(_) => vreinterpretq_s8_u8(codes),
        Meaning::Table(_) => vqtbl1q_s8(table, codes),
    }
}

/// Quad group `g` of rows `4 * rows..` of a step, as [`codes`] has them.
///
/// # Safety
/// `planes` must be readable for the bytes of a step.
#[inline(always)]
unsafe fn quads<T: Coded>(planes: *const u8, g: usize, rows: usize, table: int8x16_t) -> int8x16_t {
    let (low, high) = (T::CODING.low_bits(), T::CODING.high_bits());
    // SAFETY: a plane of some width has as many times 64 bytes.
    unsafe {
        let load = |at: usize| vld1q_u8(planes.add(64 * at + 16 * rows));
        let (upper, bit) = if high == 0 { (vdupq_n_u8(0), 0) } else { (load(low + g % high), high * (g / high)) };
        codes::<T>(load(g % low), upper, [low * (g / low), bit], table)
    }
}

/// The scales of a block of 16 rows.
pub(super) struct Scales<T: Coded> {
    d: [float32x4_t; 4],
    m: [float32x4_t; 4],
    by: (Integers, Integers),
    _type: std::marker::PhantomData<T>,
}

impl<T: Coded> Scales<T> {
    /// # Safety
    /// `tile` must be readable for a tile.
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
        let d = exponents.map(half_of_power);
        let by = [[0; R16_ROWS]; MAX_SCALES];
        // SAFETY: 16 floats; NEON is part of AArch64.
        let (d, m) = unsafe { ([0, 4, 8, 12].map(|at| vld1q_f32(d.as_ptr().add(at))), [vdupq_n_f32(0.0); 4]) };
        Self { d, m, by: (by, by), _type: std::marker::PhantomData }
    }

    /// From f16 scales and minima, and the other bytes of the heads, which only types of 256 columns have.
    #[inline(always)]
    pub(super) fn new(d: &[u16; R16_ROWS], m: &[u16; R16_ROWS], narrow: &[[u8; R16_ROWS]; 16]) -> Self {
        let none = [[0; R16_ROWS]; MAX_SCALES];
        // SAFETY: 16 halves; NEON is part of AArch64.
        unsafe {
            let floats = |halves: &[u16; R16_ROWS]| [0, 4, 8, 12].map(|at| load_f16(halves.as_ptr().add(at).cast()));
            let (d, mut m, mut by) = (floats(d), floats(m), (none, none));
            if T::STEPS > 1 {
                m = m.map(|m| vnegq_f32(m));
                by = tile_integers::<T>(narrow);
            }
            Self { d, m, by, _type: std::marker::PhantomData }
        }
    }

    /// Scale and minimum of a sub-block of rows `4 * rows..`.
    #[inline(always)]
    fn of(&self, sub: usize, rows: usize) -> (float32x4_t, float32x4_t) {
        let (d, m) = (self.d[rows], self.m[rows]);
        if T::STEPS == 1 {
            return (d, m);
        }
        let four = |by: &Integers| [0, 1, 2, 3].map(|i| by[sub][4 * rows + i]);
        // SAFETY: NEON is part of AArch64.
        unsafe {
            let d = times(d, four(&self.by.0));
            (d, if T::CODING.has_minima { times(m, four(&self.by.1)) } else { m })
        }
    }

    /// Adds block `at` of a token, which is step `step` of the scales' block, for rows `4 * rows..`.
    ///
    /// # Safety
    /// The CPU must have what `D` needs; the token must have the block.
    #[inline(always)]
    pub(super) unsafe fn add<D: Dot>(
        &self,
        step: usize,
        rows: usize,
        quads: &[int8x16_t; 8],
        a: ActRow<'_>,
        at: usize,
        acc: &mut float32x4_t,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let q = a.q.as_ptr().add(at * BLOCK_LEN);
            let (q, d_a) = ([vld1q_s8(q), vld1q_s8(q.add(16))], vdupq_n_f32(*a.d.get_unchecked(at)));
            let [first, last] = a.sums.get_unchecked(at).map(i32::from);
            let halves = [half_sums::<D>(&quads[..4], q[0]), half_sums::<D>(&quads[4..], q[1])];
            for sub in 0..T::SUBS {
                let (sum, total) = match (T::SUBS, sub) {
                    (1, _) => (vaddq_s32(halves[0], halves[1]), first + last),
                    (_, 0) => (halves[0], first),
                    _ => (halves[1], last),
                };
                let sum = vaddq_s32(sum, vdupq_n_s32(-offset::<T>() * total));
                let (d_w, m_w) = self.of(step * T::SUBS + sub, rows);
                *acc = add_block(*acc, sum, d_w, d_a);
                if T::CODING.has_minima {
                    *acc = add_block(*acc, vdupq_n_s32(total), m_w, d_a);
                }
            }
        }
    }

    /// Puts the scales of a step's sub-blocks behind its values.
    #[inline(always)]
    pub(super) fn put(&self, step: usize, block: &mut [u8]) {
        for (sub, rows) in (0..T::SUBS).flat_map(|sub| [0, 1, 2, 3].map(|rows| (sub, rows))) {
            let (d, m) = self.of(step * T::SUBS + sub, rows);
            let at = PANEL_VALUES + sub * 64 + rows * 16;
            put_floats(d, &mut block[at..at + 16]);
            if T::CODING.has_minima {
                let at = at + T::SUBS * 64;
                put_floats(m, &mut block[at..at + 16]);
            }
        }
    }
}

/// The sums of four quads of four rows with as many of a token.
///
/// # Safety
/// The CPU must have what `D` needs.
#[inline(always)]
unsafe fn half_sums<D: Dot>(w: &[int8x16_t], q: int8x16_t) -> int32x4_t {
    // SAFETY: the caller's promise.
    unsafe {
        let sum = D::lane::<1>(D::lane::<0>(vdupq_n_s32(0), w[0], q), w[1], q);
        D::lane::<3>(D::lane::<2>(sum, w[2], q), w[3], q)
    }
}

/// Scales times integers.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn times(scales: float32x4_t, by: [i8; 4]) -> float32x4_t {
    let by = vcreate_s8(u64::from(u32::from_le_bytes(by.map(|by| by as u8))));
    vmulq_f32(scales, vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(by)))))
}

/// Four floats as bytes.
#[inline(always)]
pub(super) fn put_floats(v: float32x4_t, to: &mut [u8]) {
    assert!(to.len() >= 16);
    // SAFETY: 16 bytes; NEON is part of AArch64.
    unsafe { vst1q_f32(to.as_mut_ptr().cast(), v) };
}

/// Quad group `g` of rows `4 * rows..` of a panel block whose bytes lie as `layout` says.
#[inline(always)]
pub(super) fn put_quads<T: Coded>(layout: PanelLayout, block: &mut [u8], g: usize, rows: usize, quads: int8x16_t) {
    // SAFETY: 16 bytes; NEON is part of AArch64.
    let bytes = unsafe {
        let quads = match (PanelKind::of(T::TY).values, T::CODING.meaning) {
            (Values::Signed, Meaning::Less(offset)) => vsubq_s8(quads, vdupq_n_s8(offset as i8)),
            _ => quads,
        };
        let mut bytes = [0u8; 16];
        vst1q_s8(bytes.as_mut_ptr().cast(), quads);
        bytes
    };
    for (i, quad) in bytes.as_chunks::<4>().0.iter().enumerate() {
        let at = place(layout, 4 * rows + i, 4 * g);
        block[at..at + 4].copy_from_slice(quad);
    }
}

pub(super) fn panel_tiles(layout: PanelLayout, ty: WeightType, tiles: &[u8], panel: &mut [u8]) {
    with_coded!(ty, T => panel_tiles_of::<T>(layout, tiles, panel));
}

fn panel_tiles_of<T: Coded>(layout: PanelLayout, tiles: &[u8], panel: &mut [u8]) {
    let block_bytes = PanelKind::of(T::TY).block_bytes();
    let tiles = tiles.chunks_exact(R16_ROWS * T::TY.block_bytes());
    // SAFETY: a tile has its heads and steps; NEON is part of AArch64.
    unsafe {
        let table = table::<T>();
        for (tile, blocks) in tiles.zip(panel.chunks_exact_mut(T::STEPS * block_bytes)) {
            let scales = Scales::<T>::of_tile(tile.as_ptr());
            for (step, block) in blocks.chunks_exact_mut(block_bytes).enumerate() {
                let planes = tile.as_ptr().add(tile_head_bytes(T::TY) + step * step_bytes(T::TY));
                for (g, rows) in (0..8).flat_map(|g| [0, 1, 2, 3].map(|rows| (g, rows))) {
                    put_quads::<T>(layout, block, g, rows, quads::<T>(planes, g, rows, table));
                }
                scales.put(step, block);
            }
        }
    }
}
