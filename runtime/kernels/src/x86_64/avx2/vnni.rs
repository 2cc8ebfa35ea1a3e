//! The AVX2 kernels where `vpdpbusd` multiplies 256 bits: products of four bytes come added to 32 bits in one instruction instead of
//! three. CPUs have it in one of two encodings, or both: AVX-VNNI's, and AVX-512's for short vectors.

use std::arch::x86_64::*;

use super::gemv::broadcast_quad;
use crate::WeightType;
use crate::activations::{UNIT_BLOCK, UNIT_ROWS};
use crate::dispatch::{GEMM_UNITS, Isa, PANEL_BLOCK, Table};
use crate::r16::R16_ROWS;

/// AVX-VNNI's encoding.
pub(crate) static TABLE: Table = Table { isa: Isa::AvxVnni, gemm: gemm_vex, ..super::AVX2 };
/// AVX-512's.
pub(crate) static EVEX_TABLE: Table = Table { isa: Isa::AvxVnni, gemm: gemm_evex, ..super::AVX2 };

type Outputs = [f32; GEMM_UNITS * UNIT_ROWS * R16_ROWS];

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
    assert!(panel.len() >= kb * PANEL_BLOCK && units.len() <= GEMM_UNITS * kb * UNIT_BLOCK);
    for (unit, out) in units.chunks_exact(kb * UNIT_BLOCK).zip(out.chunks_exact_mut(UNIT_ROWS * R16_ROWS)) {
        // SAFETY: the sizes are checked.
        unsafe {
            match ty {
                WeightType::Q4_0 => tokens::<true>(kb, panel, unit, out, &dpbusd),
                _ => tokens::<false>(kb, panel, unit, out, &dpbusd),
            }
        }
    }
}

/// Four tokens; sums and outputs of 16 rows for each are two vectors. The signed values of Q8_0 enter with an offset of 128.
///
/// # Safety
/// `panel` and `unit` have kb blocks, `out` 64 floats.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn tokens<const NIBBLES: bool>(
    kb: usize,
    panel: &[u8],
    unit: &[u8],
    out: &mut [f32],
    dpbusd: &impl Fn(__m256i, __m256i, __m256i) -> __m256i,
) {
    let offset = _mm256_set1_epi8(if NIBBLES { 0 } else { -128 });
    let mut acc = [[_mm256_setzero_ps(); 2]; UNIT_ROWS];
    for b in 0..kb {
        // SAFETY: block `b` of the panel and of the unit.
        unsafe {
            let w = panel.as_ptr().add(b * PANEL_BLOCK);
            let a: *const i8 = unit.as_ptr().add(b * UNIT_BLOCK).cast();
            let mut sums: [[__m256i; 2]; UNIT_ROWS] = std::array::from_fn(|t| {
                let bias = a.add(144 + t * 4).cast::<i32>().read_unaligned();
                [_mm256_set1_epi32(if NIBBLES { bias } else { 16 * bias }); 2]
            });
            for g in 0..8 {
                let w: [__m256i; 2] = std::array::from_fn(|half| {
                    _mm256_xor_si256(_mm256_loadu_si256(w.add(g * 64 + half * 32).cast()), offset)
                });
                for (t, sums) in sums.iter_mut().enumerate() {
                    let q = broadcast_quad(a.add((g * UNIT_ROWS + t) * 4));
                    *sums = [dpbusd(sums[0], w[0], q), dpbusd(sums[1], w[1], q)];
                }
            }
            for (t, (sums, acc)) in sums.iter().zip(&mut acc).enumerate() {
                let d_a = _mm256_set1_ps(a.add(128 + t * 4).cast::<f32>().read_unaligned());
                for (half, (&sum, acc)) in sums.iter().zip(acc).enumerate() {
                    let d = _mm256_mul_ps(_mm256_loadu_ps(w.add(512 + half * 32).cast()), d_a);
                    *acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), d, *acc);
                }
            }
        }
    }
    for (acc, out) in acc.as_flattened().iter().zip(out.chunks_exact_mut(8)) {
        // SAFETY: out has 8 floats.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), *acc) };
    }
}
