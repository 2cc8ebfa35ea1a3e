//! The AVX2 kernels where `vpdpbusd` multiplies 256 bits: products of four bytes come added to 32 bits in one instruction instead of
//! three. CPUs have it in one of two encodings, or both: AVX-VNNI's, and AVX-512's for short vectors.

use std::arch::x86_64::*;

use super::gemm::{Outputs, Sums, by_blocks, load_bias, load_group};
use super::gemv::broadcast_quad;
use crate::activations::UNIT_ROWS;
use crate::table::{Isa, Table};
use crate::weight_type::WeightType;

/// AVX-VNNI's encoding.
pub(crate) static TABLE: Table = Table { isa: Isa::AvxVnni, gemm: gemm_vex, ..super::AVX2 };
/// AVX-512's.
pub(crate) static EVEX_TABLE: Table = Table { isa: Isa::AvxVnni, gemm: gemm_evex, ..super::AVX2 };

#[target_feature(enable = "avx2,fma,avxvnni")]
fn gemm_vex(ty: WeightType, kb: usize, panel: &[u8], units: &[u8], out: &mut Outputs) {
    gemm(ty, kb, panel, units, out, |sums, w, a| _mm256_dpbusd_avx_epi32(sums, w, a));
}

#[target_feature(enable = "avx2,fma,avx512vnni,avx512vl")]
fn gemm_evex(ty: WeightType, kb: usize, panel: &[u8], units: &[u8], out: &mut Outputs) {
    gemm(ty, kb, panel, units, out, |sums, w, a| _mm256_dpbusd_epi32(sums, w, a));
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn gemm(
    ty: WeightType,
    kb: usize,
    panel: &[u8],
    units: &[u8],
    out: &mut Outputs,
    dpbusd: impl Fn(__m256i, __m256i, __m256i) -> __m256i,
) {
    match ty {
        // SAFETY: blocks of the panel and of a unit.
        WeightType::Q4_0 => by_blocks(kb, panel, units, out, |w, a| unsafe { sums_of::<1>(w, a, &dpbusd) }),
        // SAFETY: as above.
        _ => by_blocks(kb, panel, units, out, |w, a| unsafe { sums_of::<16>(w, a, &dpbusd) }),
    }
}

/// Sums of bytes with an offset of `8 * BIAS`, which the signed ones of Q8_0 (16) are given first.
///
/// # Safety
/// `w` must be a panel block, `a` a unit's.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn sums_of<const BIAS: i32>(
    w: *const u8,
    a: *const i8,
    dpbusd: &impl Fn(__m256i, __m256i, __m256i) -> __m256i,
) -> Sums {
    let offset = _mm256_set1_epi8(if BIAS == 16 { -128 } else { 0 });
    // SAFETY: the caller's promise: 8 groups of 4 columns, of 16 rows and of 4 tokens.
    unsafe {
        let mut sums: Sums = std::array::from_fn(|t| [_mm256_mullo_epi32(load_bias(a, t), _mm256_set1_epi32(BIAS)); 2]);
        for g in 0..8 {
            let w = load_group(w, g).map(|w| _mm256_xor_si256(w, offset));
            for (t, sums) in sums.iter_mut().enumerate() {
                let q = broadcast_quad(a.add((g * UNIT_ROWS + t) * 4));
                *sums = [dpbusd(sums[0], w[0], q), dpbusd(sums[1], w[1], q)];
            }
        }
        sums
    }
}
