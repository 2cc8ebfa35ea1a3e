//! Products of signed bytes, four to a lane of 32 bits: with the dot product instruction, and on CPUs that lack it.

use std::arch::aarch64::*;

use super::neon::{sdot, sdot_lane};

/// How the products of four signed bytes are added to each 32-bit lane.
pub(super) trait Dot {
    /// Adds to each lane of `acc` the products of its four bytes of `a` and `b`.
    ///
    /// # Safety
    /// The CPU must have the instructions.
    unsafe fn dot(acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t;

    /// [`Self::dot`] of every lane of `a` with lane `LANE` of `b`.
    ///
    /// # Safety
    /// As [`Self::dot`].
    unsafe fn lane<const LANE: i32>(acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t;
}

/// The instruction.
pub(super) struct Sdot;

impl Dot for Sdot {
    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    unsafe fn dot(acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        sdot(acc, a, b)
    }

    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    unsafe fn lane<const LANE: i32>(acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        sdot_lane::<LANE>(acc, a, b)
    }
}

/// Products of 16 bits, added in pairs and then to 32 bits. A pair has room, since activations are never -128.
pub(super) struct Pairs;

impl Dot for Pairs {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn dot(acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        let (first, last) = (vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
        vpadalq_s16(acc, vpaddq_s16(first, last))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn lane<const LANE: i32>(acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        let b = vreinterpretq_s8_s32(vdupq_laneq_s32::<LANE>(vreinterpretq_s32_s8(b)));
        // SAFETY: the caller's promise.
        unsafe { Self::dot(acc, a, b) }
    }
}
