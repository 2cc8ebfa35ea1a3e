//! The AVX2 kernels where `vpdpbusd` multiplies 256 bits: products of four bytes come added to 32 bits in one instruction instead of
//! three. CPUs have it in one of two encodings, or both: AVX-VNNI's, and AVX-512's for short vectors.

use std::arch::x86_64::*;
use std::ops::Range;

use super::experts::{self, up_rows_of};
use super::gemm::{Sums, by_blocks, start_sums};
use super::gemv::by_fours;
use super::lanes::{broadcast_quad, load_group};
use super::{gemm_parts, plane_columns, plane_rows, planes};
use crate::activations::{ActRow, HiddenGroup, UNIT_ROWS};
use crate::codes::with_coded;
use crate::down_layout::DownLayout;
use crate::live::{self, LiveRows};
use crate::panel::{PanelKind, Values};
use crate::table::{Isa, PanelOutputs, Table};
use crate::up_layout::UpLayout;
use crate::weight_type::WeightType;
use crate::x86_64::request::prefetch;

/// AVX-VNNI's encoding.
pub(crate) static TABLE: Table =
    Table { isa: Isa::AvxVnni, gemv_r16: gemv_vex, up_rows: up_vex, down: down_vex, gemm: gemm_vex, ..super::AVX2 };
/// AVX-512's.
pub(crate) static EVEX_TABLE: Table =
    Table { isa: Isa::AvxVnni, gemv_r16: gemv_evex, up_rows: up_evex, down: down_evex, gemm: gemm_evex, ..super::AVX2 };

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
fn gemv_vex(ty: WeightType, kb: usize, tiles: &[u8], acts: &[ActRow<'_>], out: &mut [&mut [f32]]) {
    // SAFETY: AVX2, FMA and F16C are among this function's features; lengths are checked by the callers of a table's functions.
    unsafe { gemv(ty, kb, tiles, acts, out, |sums, w, a| _mm256_dpbusd_avx_epi32(sums, w, a)) };
}

#[target_feature(enable = "avx2,fma,f16c,avx512vnni,avx512vl")]
fn gemv_evex(ty: WeightType, kb: usize, tiles: &[u8], acts: &[ActRow<'_>], out: &mut [&mut [f32]]) {
    // SAFETY: as above.
    unsafe { gemv(ty, kb, tiles, acts, out, |sums, w, a| _mm256_dpbusd_epi32(sums, w, a)) };
}

/// # Safety
/// As [`by_fours`].
#[inline(always)]
unsafe fn gemv(
    ty: WeightType,
    kb: usize,
    tiles: &[u8],
    acts: &[ActRow<'_>],
    out: &mut [&mut [f32]],
    dpbusd: impl Fn(__m256i, __m256i, __m256i) -> __m256i + Copy,
) {
    if ty.has_codes() {
        // SAFETY: the caller's promise.
        return unsafe { planes::gemv::<true>(ty, kb, tiles, acts, out, dpbusd) };
    }
    // SAFETY: the caller's promise.
    unsafe {
        match ty {
            WeightType::Q4_0 => by_fours::<288>(kb, tiles, acts, out, 8, dpbusd, |sums| sums),
            _ => by_fours::<544>(kb, tiles, acts, out, 128, dpbusd, |sums| sums),
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
fn up_vex(up: &UpLayout, region: &[u8], rows: LiveRows<'_>, acts: &[ActRow<'_>], out: &mut [f32]) {
    // SAFETY: AVX2, FMA and F16C are among this function's features; lengths are checked by the callers of a table's functions.
    unsafe { up_rows(up, region, rows, acts, out, |sums, w, a| _mm256_dpbusd_avx_epi32(sums, w, a)) };
}

#[target_feature(enable = "avx2,fma,f16c,avx512vnni,avx512vl")]
fn up_evex(up: &UpLayout, region: &[u8], rows: LiveRows<'_>, acts: &[ActRow<'_>], out: &mut [f32]) {
    // SAFETY: as above.
    unsafe { up_rows(up, region, rows, acts, out, |sums, w, a| _mm256_dpbusd_epi32(sums, w, a)) };
}

/// # Safety
/// As [`up_rows_of`].
#[inline(always)]
unsafe fn up_rows(
    up: &UpLayout,
    region: &[u8],
    rows: LiveRows<'_>,
    acts: &[ActRow<'_>],
    out: &mut [f32],
    dpbusd: impl Fn(__m256i, __m256i, __m256i) -> __m256i + Copy,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match up.ty.has_codes() {
            true => plane_rows::up_rows::<true>(up, region, rows, acts, out, dpbusd),
            false => up_rows_of(up, region, rows, acts, out, dpbusd, |sums| sums),
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
fn down_vex(down: &DownLayout, region: &[u8], hidden: &[HiddenGroup], chunks: Range<usize>, out: &mut [&mut [f32]]) {
    if !down.ty.has_codes() {
        return experts::down(down, region, hidden, chunks, out);
    }
    with_coded!(down.ty, T => {
        live::each_down_chunk(down, region, hidden, chunks, out, prefetch, |group, token, chunk, out| {
            // SAFETY: the features are those of this function; the group and the chunk are the layout's.
            unsafe {
                plane_columns::add_chunk::<T, true>(down, group, token, chunk, out, |sums, w, a| _mm256_dpbusd_avx_epi32(sums, w, a));
            }
        });
    });
}

#[target_feature(enable = "avx2,fma,f16c,avx512vnni,avx512vl")]
fn down_evex(down: &DownLayout, region: &[u8], hidden: &[HiddenGroup], chunks: Range<usize>, out: &mut [&mut [f32]]) {
    if !down.ty.has_codes() {
        return experts::down(down, region, hidden, chunks, out);
    }
    with_coded!(down.ty, T => {
        live::each_down_chunk(down, region, hidden, chunks, out, prefetch, |group, token, chunk, out| {
            // SAFETY: the features are those of this function; the group and the chunk are the layout's.
            unsafe {
                plane_columns::add_chunk::<T, true>(down, group, token, chunk, out, |sums, w, a| _mm256_dpbusd_epi32(sums, w, a));
            }
        });
    });
}

#[target_feature(enable = "avx2,fma,avxvnni")]
fn gemm_vex(kind: PanelKind, kb: usize, panel: &[u8], units: &[u8], out: &mut PanelOutputs) {
    gemm(kind, kb, panel, units, out, |sums, w, a| _mm256_dpbusd_avx_epi32(sums, w, a));
}

#[target_feature(enable = "avx2,fma,avx512vnni,avx512vl")]
fn gemm_evex(kind: PanelKind, kb: usize, panel: &[u8], units: &[u8], out: &mut PanelOutputs) {
    gemm(kind, kb, panel, units, out, |sums, w, a| _mm256_dpbusd_epi32(sums, w, a));
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn gemm(
    kind: PanelKind,
    kb: usize,
    panel: &[u8],
    units: &[u8],
    out: &mut PanelOutputs,
    dpbusd: impl Fn(__m256i, __m256i, __m256i) -> __m256i + Copy,
) {
    if !kind.is_plain() {
        // SAFETY: the caller has the features.
        return unsafe { gemm_parts::gemm::<true>(kind, kb, panel, units, out, dpbusd) };
    }
    match kind.values {
        Values::Nibbles { offset } => {
            // SAFETY: blocks of the panel and of a unit.
            by_blocks(kb, panel, units, out, |w, a| unsafe { sums_of::<false>(offset, w, a, &dpbusd) });
        }
        Values::Signed => {
            // SAFETY: as above.
            by_blocks(kb, panel, units, out, |w, a| unsafe { sums_of::<true>(128, w, a, &dpbusd) });
        }
    }
}

/// Sums of bytes that are `offset` more than values; `SIGNED` ones are given it here.
///
/// # Safety
/// `w` must be a panel block, `a` a unit's.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn sums_of<const SIGNED: bool>(
    offset: i32,
    w: *const u8,
    a: *const i8,
    dpbusd: &impl Fn(__m256i, __m256i, __m256i) -> __m256i,
) -> Sums {
    let flip = _mm256_set1_epi8(if SIGNED { -128 } else { 0 });
    // SAFETY: the caller's promise: 8 groups of 4 columns, of 16 rows and of 4 tokens.
    unsafe {
        let mut sums: Sums = std::array::from_fn(|t| [start_sums(a, t, offset); 2]);
        for g in 0..8 {
            let w = load_group(w, g).map(|w| _mm256_xor_si256(w, flip));
            for (t, sums) in sums.iter_mut().enumerate() {
                let q = broadcast_quad(a.add((g * UNIT_ROWS + t) * 4));
                *sums = [dpbusd(sums[0], w[0], q), dpbusd(sums[1], w[1], q)];
            }
        }
        sums
    }
}
