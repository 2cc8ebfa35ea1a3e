//! AVX-512 with VNNI. Every function computes the same bits as its namesake in [`crate::scalar`].
//!
//! `vpdpbusd` multiplies unsigned by signed bytes, so weights enter with their offset (nibble 0..=15, or value + 128 for Q8_0) and
//! sums start at `-offset * Σ a`; sums of integers are exact, so this changes nothing.

mod attention;
mod bf16;
mod experts;
mod float;
mod gemm;
mod gemv;
mod lanes;
mod pack;
mod plane_columns;
mod plane_rows;
mod planes;
mod quantize;
mod token;

use crate::table::{Isa, Table};

pub(crate) static TABLE: Table = VNNI;

pub(crate) static BF16_TABLE: Table =
    Table { isa: Isa::Avx512Bf16, scores: bf16::scores, values: bf16::values, ..VNNI };

const VNNI: Table = Table {
    isa: Isa::Avx512Vnni,
    quantize_q8: quantize::quantize_q8,
    quantize_q4_0: quantize::quantize_q4_0,
    improve_q4_0: quantize::improve_q4_0,
    pack_r16: pack::pack_r16,
    pack_up: pack::pack_up,
    pack_down: pack::pack_down,
    gemv_r16: gemv::gemv_r16,
    up_rows: experts::up_rows,
    q8_rows: gemv::q8_rows,
    down: experts::down,
    panel_r16: gemm::panel_r16,
    panel_up: gemm::panel_up,
    panel_down: gemm::panel_down,
    panel: gemm::LAYOUT,
    gemm: gemm::gemm,
    dots: float::dots,
    rms_norm: float::rms_norm,
    scores: attention::scores,
    softmax: attention::softmax,
    values: attention::values,
    merge: attention::merge,
};
