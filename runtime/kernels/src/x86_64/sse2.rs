//! 16 bytes in a register of SSE2, which every x86-64 has.

use std::arch::x86_64::*;

use crate::bytes16::Bytes16;

/// 16 bytes.
#[derive(Clone, Copy)]
pub(crate) struct Sse2(__m128i);

// SAFETY of all blocks: SSE2 is part of x86-64; loads and stores are of arrays of 16 bytes.
impl Bytes16 for Sse2 {
    #[inline(always)]
    fn load(bytes: &[u8; 16]) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
    }

    #[inline(always)]
    fn store(self, to: &mut [u8; 16]) {
        // SAFETY: as above.
        unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), self.0) }
    }

    #[inline(always)]
    fn stream(line: [Self; 4], to: &mut [u8; 64]) {
        let place = to.as_mut_ptr().cast::<__m128i>();
        for (i, part) in line.into_iter().enumerate() {
            // SAFETY: four times 16 bytes; where they are streamed, each is at a multiple of 16.
            unsafe {
                if place.is_aligned() {
                    _mm_stream_si128(place.add(i), part.0);
                } else {
                    _mm_storeu_si128(place.add(i), part.0);
                }
            }
        }
    }

    #[inline(always)]
    fn settle() {
        // SAFETY: as above.
        unsafe { _mm_sfence() }
    }

    #[inline(always)]
    fn or(self, other: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm_or_si128(self.0, other.0) })
    }

    #[inline(always)]
    fn and(self, mask: u8) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm_and_si128(self.0, _mm_set1_epi8(mask as i8)) })
    }

    #[inline(always)]
    fn up<const BITS: i32>(self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm_slli_epi16::<BITS>(self.0) })
    }

    #[inline(always)]
    fn down<const BITS: i32>(self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm_srli_epi16::<BITS>(self.0) })
    }

    #[inline(always)]
    fn zip8(self, other: Self) -> (Self, Self) {
        // SAFETY: as above.
        unsafe { (Self(_mm_unpacklo_epi8(self.0, other.0)), Self(_mm_unpackhi_epi8(self.0, other.0))) }
    }

    #[inline(always)]
    fn zip32(self, other: Self) -> (Self, Self) {
        // SAFETY: as above.
        unsafe { (Self(_mm_unpacklo_epi32(self.0, other.0)), Self(_mm_unpackhi_epi32(self.0, other.0))) }
    }
}
