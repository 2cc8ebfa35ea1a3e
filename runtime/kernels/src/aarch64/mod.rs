//! AArch64: with the dot product instructions, with products of int8 matrices, and with neither. Every function computes the same bits as
//! its namesake in [`crate::scalar`].
//!
//! `sdot` multiplies signed bytes; codes enter with their offset (0..=63), which fits, and sums start at `-offset * Σ a`. The 16
//! lanes of the kernels' definitions are four vectors here. What differs between CPUs is how bytes are multiplied ([`dot`]). What is not
//! here is portable code that compilers vectorize well, fused multiply-add being part of the base instruction set.

mod attention;
mod dot;
mod experts;
mod gemm;
mod gemv;
pub(crate) mod neon;
mod plane_columns;
mod plane_rows;
mod planes;

use std::ops::Range;

use dot::{Pairs, Sdot};
use neon::prefetch;

use crate::activations::{ActRow, HiddenGroup};
use crate::codes::with_coded;
use crate::down_layout::DownLayout;
use crate::live::{self, LiveRows, fours};
use crate::panel::PanelKind;
use crate::scalar;
use crate::table::{Isa, PanelOutputs, Table};
use crate::up_layout::UpLayout;
use crate::weight_type::WeightType;

/// The base instruction set.
pub(crate) static BASE_TABLE: Table = BASE;

/// With the dot product instructions.
pub(crate) static TABLE: Table = DOT;

/// With products of two rows and two columns.
pub(crate) static MATRIX_TABLE: Table = Table {
    isa: Isa::NeonI8mm,
    panel_r16: gemm::panel_r16::<{ gemm::MATRIX }>,
    panel_up: gemm::panel_up::<{ gemm::MATRIX }>,
    panel_down: gemm::panel_down::<{ gemm::MATRIX }>,
    panel: gemm::layout::<{ gemm::MATRIX }>(),
    gemm: gemm::gemm_matrix,
    ..DOT
};

/// The functions that multiply bytes by `$dot`, compiled for `$features`. Closures have the features of the function that they are in, so
/// they are here.
macro_rules! products {
    ($module:ident, $dot:ty, $features:literal) => {
        mod $module {
            use super::*;

            #[target_feature(enable = $features)]
            pub(super) fn gemv_r16(
                ty: WeightType,
                kb: usize,
                tiles: &[u8],
                acts: &[ActRow<'_>],
                out: &mut [&mut [f32]],
            ) {
                // SAFETY: the features are those of this function; lengths are checked by the callers of a table's functions.
                unsafe { gemv::gemv_r16::<$dot>(ty, kb, tiles, acts, out) };
            }

            #[target_feature(enable = $features)]
            pub(super) fn up_rows(
                up: &UpLayout,
                region: &[u8],
                rows: LiveRows<'_>,
                acts: &[ActRow<'_>],
                out: &mut [f32],
            ) {
                if !up.ty.has_codes() {
                    return fours::each_up_block(up, region, rows, acts, out, prefetch, |rows, ahead, a, out| {
                        // SAFETY: as above.
                        unsafe { experts::up_block::<$dot>(up, region, rows, ahead, a, out) };
                    });
                }
                with_coded!(up.ty, T => {
                    live::each_tokens_block(up, region, rows, acts, out, prefetch, |block, ahead, a, sums| {
                        // SAFETY: as above.
                        *sums = unsafe { plane_rows::up_block::<T, $dot>(up, block, ahead, a) };
                    });
                });
            }

            #[target_feature(enable = $features)]
            pub(super) fn q8_rows(kb: usize, region: &[u8], rows: &[u32], a: ActRow<'_>, out: &mut [f32]) {
                // SAFETY: as above.
                unsafe { gemv::q8_rows::<$dot>(kb, region, rows, a, out) };
            }

            #[target_feature(enable = $features)]
            pub(super) fn down(
                down: &DownLayout,
                region: &[u8],
                hidden: &[HiddenGroup],
                chunks: Range<usize>,
                out: &mut [&mut [f32]],
            ) {
                if !down.ty.has_codes() {
                    let add = |group, token: &_, chunk, out: &mut _| {
                        // SAFETY: as above; the group and the chunk are the layout's.
                        unsafe { experts::add_chunk::<$dot>(group, token, chunk, out) };
                    };
                    return live::each_down_chunk(down, region, hidden, chunks, out, prefetch, add);
                }
                with_coded!(down.ty, T => {
                    live::each_down_chunk(down, region, hidden, chunks, out, prefetch, |group, token, chunk, out| {
                        // SAFETY: as above; the group and the chunk are the layout's.
                        unsafe { plane_columns::add_chunk::<T, $dot>(down, group, token, chunk, out) };
                    });
                });
            }

            #[target_feature(enable = $features)]
            pub(super) fn gemm(kind: PanelKind, kb: usize, panel: &[u8], units: &[u8], out: &mut PanelOutputs) {
                super::gemm::gemm::<{ super::gemm::DOT }>(kind, kb, panel, units, out, |w, a, groups, start| {
                    // SAFETY: as above.
                    unsafe { super::gemm::dot_sums::<$dot>(w, a, groups, start) }
                });
            }
        }
    };
}

products!(base, Pairs, "neon");
products!(with_dot, Sdot, "neon,dotprod");

const DOT: Table = Table {
    isa: Isa::NeonDot,
    gemv_r16: with_dot::gemv_r16,
    up_rows: with_dot::up_rows,
    q8_rows: with_dot::q8_rows,
    down: with_dot::down,
    gemm: with_dot::gemm,
    ..BASE
};

const BASE: Table = Table {
    isa: Isa::Neon,
    quantize_q8: scalar::TABLE.quantize_q8,
    quantize_q4_0: scalar::TABLE.quantize_q4_0,
    improve_q4_0: scalar::TABLE.improve_q4_0,
    pack_r16: planes::pack_r16,
    pack_up: scalar::TABLE.pack_up,
    pack_down: plane_columns::pack_down,
    gemv_r16: base::gemv_r16,
    up_rows: base::up_rows,
    q8_rows: base::q8_rows,
    down: base::down,
    panel_r16: gemm::panel_r16::<{ gemm::DOT }>,
    panel_up: gemm::panel_up::<{ gemm::DOT }>,
    panel_down: gemm::panel_down::<{ gemm::DOT }>,
    panel: gemm::layout::<{ gemm::DOT }>(),
    gemm: base::gemm,
    dots: scalar::TABLE.dots,
    rms_norm: scalar::TABLE.rms_norm,
    scores: attention::scores,
    softmax: scalar::TABLE.softmax,
    values: attention::values,
    merge: scalar::TABLE.merge,
};

/// Whether this CPU runs the NEON kernels.
pub(crate) fn has_neon() -> bool {
    std::arch::is_aarch64_feature_detected!("neon")
}

/// Whether this CPU has the dot product instructions.
pub(crate) fn has_neon_dot() -> bool {
    has_neon() && std::arch::is_aarch64_feature_detected!("dotprod")
}

/// Whether this CPU multiplies int8 matrices.
pub(crate) fn has_neon_i8mm() -> bool {
    has_neon_dot() && std::arch::is_aarch64_feature_detected!("i8mm")
}
