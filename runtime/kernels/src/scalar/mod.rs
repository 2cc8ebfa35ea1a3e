//! Portable versions of every kernel: plain loops that say what the SIMD versions must compute, bit for bit.

mod float;
mod planes;
mod quantized;
mod step;

#[cfg(target_arch = "x86_64")]
pub(crate) use float::merge;
pub(crate) use float::softmax;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) use quantized::pack_r16;

use crate::table::{Isa, Table};

pub(crate) static TABLE: Table = Table {
    isa: Isa::Scalar,
    quantize_q8: quantized::quantize_q8,
    quantize_q4_0: quantized::quantize_q4_0,
    improve_q4_0: crate::search::improve_q4_0,
    pack_r16: quantized::pack_r16,
    pack_up: crate::expert_format::pack_up,
    pack_down: crate::expert_format::pack_down,
    gemv_r16: quantized::gemv_r16,
    up_rows: quantized::up_rows,
    q8_rows: quantized::q8_rows,
    down: quantized::down,
    panel_r16: quantized::panel_r16,
    panel_up: quantized::panel_up,
    panel_down: quantized::panel_down,
    panel: step::LAYOUT,
    gemm: quantized::gemm,
    dots: float::dots,
    rms_norm: float::rms_norm,
    scores: float::scores,
    softmax,
    values: float::values,
    merge: float::merge,
};
