//! AVX2 with FMA and F16C. Every function computes the same bits as its namesake in [`crate::scalar`].
//!
//! `vpmaddubsw` multiplies unsigned by signed bytes and adds pairs to 16 bits. Nibbles (0..=15) leave room to add eight such
//! results before they must be widened; Q8_0 values enter as |w| with the sign moved to the activation, which fits just once.
//! The 16 lanes of the kernels' definitions are two vectors here.

mod attention;
mod experts;
mod float;
mod gemm;
mod gemm_parts;
mod gemv;
mod lanes;
mod pack;
mod plane_columns;
mod plane_rows;
mod planes;
mod quantize;
pub(crate) mod vnni;

use crate::table::{Isa, Table};

pub(crate) static TABLE: Table = AVX2;

const AVX2: Table = Table {
    isa: Isa::Avx2,
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
