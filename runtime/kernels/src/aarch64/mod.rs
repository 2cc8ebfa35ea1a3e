//! AArch64 with the dot product instructions. Every function computes the same bits as its namesake in [`crate::scalar`].
//!
//! `sdot` multiplies signed bytes; nibbles enter with their offset (0..=15), which fits, and sums start at `bias = -8 * Σ a`. The 16
//! lanes of the kernels' definitions are four vectors here. What is not here is portable code that compilers vectorize well, fused
//! multiply-add being part of the base instruction set.

mod attention;
mod experts;
mod gemm;
mod gemv;

use std::arch::aarch64::*;
use std::arch::asm;

use crate::dispatch::{Isa, Table};
use crate::scalar;

pub(crate) static TABLE: Table = DOT;

/// With products of two rows and two columns.
pub(crate) static MATRIX_TABLE: Table = Table {
    isa: Isa::NeonI8mm,
    panel_r16: gemm::panel_r16::<{ gemm::MATRIX }>,
    panel_up: gemm::panel_up::<{ gemm::MATRIX }>,
    panel_down: gemm::panel_down::<{ gemm::MATRIX }>,
    gemm: gemm::gemm_matrix,
    ..DOT
};

const DOT: Table = Table {
    isa: Isa::NeonDot,
    quantize_q8: scalar::TABLE.quantize_q8,
    quantize_q4_0: scalar::TABLE.quantize_q4_0,
    improve_q4_0: scalar::TABLE.improve_q4_0,
    pack_r16: scalar::TABLE.pack_r16,
    pack_down_group: scalar::TABLE.pack_down_group,
    gemv_r16: gemv::gemv_r16,
    up_rows: experts::up_rows,
    q8_rows: gemv::q8_rows,
    down: experts::down,
    panel_r16: gemm::panel_r16::<{ gemm::DOT }>,
    panel_up: gemm::panel_up::<{ gemm::DOT }>,
    panel_down: gemm::panel_down::<{ gemm::DOT }>,
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

/// Adds the products of two rows of `a` with two of `b`, 8 signed bytes each: `[a0·b0, a0·b1, a1·b0, a1·b1]`. (The intrinsic is not
/// stable.)
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn smmla(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: registers only.
    unsafe {
        asm!("smmla {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) acc, in(vreg) a, in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// Adds to each 32-bit lane the products of its four signed bytes. (The intrinsic is not stable.)
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: registers only.
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) acc, in(vreg) a, in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// [`sdot`] of every lane of `a` with lane `LANE` of `b`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot_lane<const LANE: i32>(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: registers only.
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{3}]", inout(vreg) acc, in(vreg) a, in(vreg) b, const LANE,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// Four f16 at `p` as floats. (The type of the intrinsic is not stable.)
///
/// # Safety
/// 8 bytes at `p`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load_f16(p: *const u8) -> float32x4_t {
    // SAFETY: the caller's promise.
    let half = unsafe { vld1_u8(p) };
    let mut v: float32x4_t;
    // SAFETY: registers only.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) v, in(vreg) half,
            options(pure, nomem, nostack, preserves_flags));
    }
    v
}

/// Requests the cache line at `p`, which may point anywhere.
#[inline(always)]
fn prefetch(p: *const u8) {
    // SAFETY: a hint without effect on registers or memory.
    unsafe { asm!("prfm pldl1keep, [{0}]", in(reg) p, options(nostack, preserves_flags, readonly)) };
}

/// `acc + f32(isum) * (d_w * d_a)`, the product of integers and scales fused with the sum.
#[inline]
#[target_feature(enable = "neon")]
fn add_block(acc: float32x4_t, isum: int32x4_t, d_w: float32x4_t, d_a: float32x4_t) -> float32x4_t {
    vfmaq_f32(acc, vcvtq_f32_s32(isum), vmulq_f32(d_w, d_a))
}

/// Low and high nibbles of 16 bytes.
#[inline]
#[target_feature(enable = "neon")]
fn nibbles(w: uint8x16_t) -> (int8x16_t, int8x16_t) {
    (vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(15))), vreinterpretq_s8_u8(vshrq_n_u8::<4>(w)))
}
