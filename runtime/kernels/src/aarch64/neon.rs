//! Instructions that `std::arch` lacks, and what the kernels share.

use std::arch::aarch64::*;
use std::arch::asm;

use crate::bytes16::Bytes16;

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

/// 16 bytes.
#[derive(Clone, Copy)]
pub(crate) struct Neon(uint8x16_t);

// SAFETY of all blocks: NEON is part of AArch64; loads and stores are of arrays of 16 bytes.
impl Bytes16 for Neon {
    #[inline(always)]
    fn load(bytes: &[u8; 16]) -> Self {
        // SAFETY: as above.
        Self(unsafe { vld1q_u8(bytes.as_ptr()) })
    }

    #[inline(always)]
    fn store(self, to: &mut [u8; 16]) {
        // SAFETY: as above.
        unsafe { vst1q_u8(to.as_mut_ptr(), self.0) }
    }

    #[inline(always)]
    fn or(self, other: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { vorrq_u8(self.0, other.0) })
    }

    #[inline(always)]
    fn and(self, mask: u8) -> Self {
        // SAFETY: as above.
        Self(unsafe { vandq_u8(self.0, vdupq_n_u8(mask)) })
    }

    #[inline(always)]
    fn up<const BITS: i32>(self) -> Self {
        // SAFETY: as above.
        Self(unsafe { vshlq_n_u8::<BITS>(self.0) })
    }

    #[inline(always)]
    fn down<const BITS: i32>(self) -> Self {
        // SAFETY: as above.
        Self(unsafe { vshrq_n_u8::<BITS>(self.0) })
    }

    #[inline(always)]
    fn zip8(self, other: Self) -> (Self, Self) {
        // SAFETY: as above.
        unsafe { (Self(vzip1q_u8(self.0, other.0)), Self(vzip2q_u8(self.0, other.0))) }
    }

    #[inline(always)]
    fn zip32(self, other: Self) -> (Self, Self) {
        // SAFETY: as above.
        unsafe {
            let (a, b) = (vreinterpretq_u32_u8(self.0), vreinterpretq_u32_u8(other.0));
            (Self(vreinterpretq_u8_u32(vzip1q_u32(a, b))), Self(vreinterpretq_u8_u32(vzip2q_u32(a, b))))
        }
    }
}
