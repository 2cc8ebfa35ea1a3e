//! Instructions that `std::arch` lacks, and what the kernels share.

use std::arch::aarch64::*;
use std::arch::asm;

/// Adds the products of two rows of `a` with two of `b`, 8 signed bytes each: `[a0·b0, a0·b1, a1·b0, a1·b1]`. (The intrinsic is not
/// stable.)
#[inline]
#[target_feature(enable = "neon,i8mm")]
pub(super) fn smmla(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
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
pub(super) fn sdot(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
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
pub(super) fn sdot_lane<const LANE: i32>(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
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
pub(super) unsafe fn load_f16(p: *const u8) -> float32x4_t {
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
pub(super) fn prefetch(p: *const u8) {
    // SAFETY: a hint without effect on registers or memory.
    unsafe { asm!("prfm pldl1keep, [{0}]", in(reg) p, options(nostack, preserves_flags, readonly)) };
}

/// `acc + f32(isum) * (d_w * d_a)`, the product of integers and scales fused with the sum.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn add_block(acc: float32x4_t, isum: int32x4_t, d_w: float32x4_t, d_a: float32x4_t) -> float32x4_t {
    vfmaq_f32(acc, vcvtq_f32_s32(isum), vmulq_f32(d_w, d_a))
}

/// Low and high nibbles of 16 bytes.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn nibbles(w: uint8x16_t) -> (int8x16_t, int8x16_t) {
    (vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(15))), vreinterpretq_s8_u8(vshrq_n_u8::<4>(w)))
}

/// Byte by byte those of all rows.
#[inline(always)]
pub(super) fn transpose16(rows: &[[u8; 16]; 16]) -> [[u8; 16]; 16] {
    let mut out = [[0; 16]; 16];
    // SAFETY: 16 bytes each; NEON is part of AArch64.
    unsafe {
        let mut v = [vdupq_n_u8(0); 16];
        for (v, row) in v.iter_mut().zip(rows) {
            *v = vld1q_u8(row.as_ptr());
        }
        // With the row number as the upper and the byte number as the lower four bits of an index, each round rotates it by one bit.
        for _ in 0..4 {
            let mut t = v;
            for i in 0..8 {
                t[2 * i] = vzip1q_u8(v[i], v[i + 8]);
                t[2 * i + 1] = vzip2q_u8(v[i], v[i + 8]);
            }
            v = t;
        }
        for (v, out) in v.into_iter().zip(&mut out) {
            vst1q_u8(out.as_mut_ptr(), v);
        }
    }
    out
}
