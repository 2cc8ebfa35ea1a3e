//! AArch64 with the dot product instructions. Every function computes the same bits as its namesake in [`crate::scalar`].
//!
//! `sdot` multiplies signed bytes; nibbles enter with their offset (0..=15), which fits, and sums start at `-8 * Σ a`. The 16
//! lanes of the kernels' definitions are four vectors here. What is not here is portable code that compilers vectorize well, fused
//! multiply-add being part of the base instruction set.

mod attention;
mod experts;
mod gemm;
mod gemv;
mod neon;

use crate::scalar;
use crate::table::{Isa, Table};

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

const DOT: Table = Table {
    isa: Isa::NeonDot,
    quantize_q8: scalar::TABLE.quantize_q8,
    quantize_q4_0: scalar::TABLE.quantize_q4_0,
    improve_q4_0: scalar::TABLE.improve_q4_0,
    pack_r16: scalar::TABLE.pack_r16,
    pack_up: scalar::TABLE.pack_up,
    pack_down: scalar::TABLE.pack_down,
    gemv_r16: gemv::gemv_r16,
    up_rows: experts::up_rows,
    q8_rows: gemv::q8_rows,
    down: experts::down,
    panel_r16: gemm::panel_r16::<{ gemm::DOT }>,
    panel_up: gemm::panel_up::<{ gemm::DOT }>,
    panel_down: gemm::panel_down::<{ gemm::DOT }>,
    panel: gemm::layout::<{ gemm::DOT }>(),
    gemm: gemm::gemm_dot,
    dots: scalar::TABLE.dots,
    rms_norm: scalar::TABLE.rms_norm,
    scores: attention::scores,
    softmax: scalar::TABLE.softmax,
    values: attention::values,
    merge: scalar::TABLE.merge,
};

/// Whether this CPU runs the NEON kernels.
pub(crate) fn has_neon_dot() -> bool {
    std::arch::is_aarch64_feature_detected!("neon") && std::arch::is_aarch64_feature_detected!("dotprod")
}

/// Whether this CPU runs the NEON kernels and multiplies int8 matrices.
pub(crate) fn has_neon_i8mm() -> bool {
    has_neon_dot() && std::arch::is_aarch64_feature_detected!("i8mm")
}
