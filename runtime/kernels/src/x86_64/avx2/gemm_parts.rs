//! Many tokens times panels whose blocks have two scales, or minima.

use std::arch::x86_64::*;

use super::lanes::{broadcast_quad, dot_signed, load_group};
use crate::activations::{UNIT_BLOCK, UNIT_ROWS};
use crate::panel::{PANEL_VALUES, PanelKind, Values};
use crate::r16::R16_ROWS;
use crate::table::PanelOutputs;

/// # Safety
/// The CPU must have AVX2, FMA and what `dpbusd` needs (which is used where `VNNI` is true).
#[inline(always)]
pub(super) unsafe fn gemm<const VNNI: bool>(
    kind: PanelKind,
    kb: usize,
    panel: &[u8],
    units: &[u8],
    out: &mut PanelOutputs,
    dpbusd: impl Fn(__m256i, __m256i, __m256i) -> __m256i + Copy,
) {
    assert!(
        panel.len() >= kb * kind.block_bytes() && units.len() <= out.len() / (UNIT_ROWS * R16_ROWS) * kb * UNIT_BLOCK
    );
    // SAFETY: the caller's promise.
    unsafe {
        match (kind.sub_blocks, kind.has_minima, kind.values) {
            (1, _, Values::Nibbles { offset }) => of::<VNNI, 1, true, false>(offset, kb, panel, units, out, dpbusd),
            (1, _, Values::Signed) => of::<VNNI, 1, true, true>(0, kb, panel, units, out, dpbusd),
            (_, false, Values::Nibbles { offset }) => {
                of::<VNNI, 2, false, false>(offset, kb, panel, units, out, dpbusd)
            }
            (_, false, Values::Signed) => of::<VNNI, 2, false, true>(0, kb, panel, units, out, dpbusd),
            (_, true, Values::Nibbles { offset }) => of::<VNNI, 2, true, false>(offset, kb, panel, units, out, dpbusd),
            (_, true, Values::Signed) => of::<VNNI, 2, true, true>(0, kb, panel, units, out, dpbusd),
        }
    }
}

/// Four tokens at a time; blocks have `SUBS` scales for each row, nibbles or signed bytes.
///
/// # Safety
/// As [`gemm`]; the panel and the units have kb blocks.
#[inline(always)]
unsafe fn of<const VNNI: bool, const SUBS: usize, const MINIMA: bool, const SIGNED: bool>(
    offset: i32,
    kb: usize,
    panel: &[u8],
    units: &[u8],
    out: &mut PanelOutputs,
    dpbusd: impl Fn(__m256i, __m256i, __m256i) -> __m256i + Copy,
) {
    let block_bytes = PANEL_VALUES + SUBS * 64 * (1 + usize::from(MINIMA));
    let offset = if SIGNED && VNNI { 128 } else { offset };
    for (unit, out) in units.chunks_exact(kb * UNIT_BLOCK).zip(out.chunks_exact_mut(UNIT_ROWS * R16_ROWS)) {
        // SAFETY: the caller's promise: block by block.
        unsafe {
            let mut acc = [[_mm256_setzero_ps(); 2]; UNIT_ROWS];
            for (b, sub) in (0..kb).flat_map(|b| (0..SUBS).map(move |sub| (b, sub))) {
                let w = panel.as_ptr().add(b * block_bytes);
                let a: *const i8 = unit.as_ptr().add(b * UNIT_BLOCK).cast();
                let mut sums = [[_mm256_setzero_si256(); 2]; UNIT_ROWS];
                // A length that is not known is not unrolled, which needs more registers than there are.
                let groups = std::hint::black_box(8 / SUBS);
                for g in sub * groups..(sub + 1) * groups {
                    let w = load_group(w, g);
                    let w = if SIGNED && VNNI { w.map(|w| _mm256_xor_si256(w, _mm256_set1_epi8(-128))) } else { w };
                    for (t, sums) in sums.iter_mut().enumerate() {
                        let q = broadcast_quad(a.add((g * UNIT_ROWS + t) * 4));
                        for (sum, w) in sums.iter_mut().zip(w) {
                            *sum = match (VNNI, SIGNED) {
                                (true, _) => dpbusd(*sum, w, q),
                                (_, true) => _mm256_add_epi32(*sum, dot_signed(w, q)),
                                _ => _mm256_add_epi16(*sum, _mm256_maddubs_epi16(w, q)),
                            };
                        }
                    }
                }
                for (t, (sums, acc)) in sums.iter().zip(&mut acc).enumerate() {
                    let halves = a.add(144 + t * 4).cast::<[i16; 2]>().read_unaligned().map(i32::from);
                    let total = if SUBS == 1 { halves[0] + halves[1] } else { halves[sub] };
                    let d_a = _mm256_set1_ps(a.add(128 + t * 4).cast::<f32>().read_unaligned());
                    for (rows, (&sum, acc)) in sums.iter().zip(acc).enumerate() {
                        let sum = if VNNI || SIGNED { sum } else { _mm256_madd_epi16(sum, _mm256_set1_epi16(1)) };
                        let sum = _mm256_add_epi32(sum, _mm256_set1_epi32(-offset * total));
                        let scale = |i: usize| _mm256_loadu_ps(w.add(PANEL_VALUES + i * 64 + rows * 32).cast());
                        *acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(scale(sub), d_a), *acc);
                        if MINIMA {
                            let total = _mm256_set1_ps(total as f32);
                            *acc = _mm256_fmadd_ps(total, _mm256_mul_ps(scale(SUBS + sub), d_a), *acc);
                        }
                    }
                }
            }
            for (acc, out) in acc.as_flattened().iter().zip(out.chunks_exact_mut(8)) {
                _mm256_storeu_ps(out.as_mut_ptr(), *acc);
            }
        }
    }
}
