//! Bytes of 16 rows that lie apart, side by side.

use std::arch::x86_64::*;

use crate::r16::R16_ROWS;

/// Bytes `at..at + 16` of the heads of 16 rows: byte by byte those of all rows.
///
/// # Safety
/// They must be readable.
#[inline(always)]
pub(super) unsafe fn narrow_bytes(heads: [*const u8; R16_ROWS], at: usize) -> [[u8; R16_ROWS]; 16] {
    // SAFETY: the caller's promise.
    transpose16(&heads.map(|head| unsafe { head.add(at).cast::<[u8; 16]>().read() }))
}

/// Byte by byte those of all rows.
#[inline(always)]
pub(super) fn transpose16(rows: &[[u8; 16]; R16_ROWS]) -> [[u8; R16_ROWS]; 16] {
    let mut out = [[0u8; R16_ROWS]; 16];
    // SAFETY: 16 bytes each; SSE2 is part of x86-64.
    unsafe {
        let mut v = [_mm_setzero_si128(); 16];
        for (v, row) in v.iter_mut().zip(rows) {
            *v = _mm_loadu_si128(row.as_ptr().cast());
        }
        // With the row number as the upper and the byte number as the lower four bits of an index, each round rotates it by one bit.
        for _ in 0..4 {
            let mut t = v;
            for i in 0..8 {
                t[2 * i] = _mm_unpacklo_epi8(v[i], v[i + 8]);
                t[2 * i + 1] = _mm_unpackhi_epi8(v[i], v[i + 8]);
            }
            v = t;
        }
        for (bytes, out) in v.into_iter().zip(&mut out) {
            _mm_storeu_si128(out.as_mut_ptr().cast(), bytes);
        }
    }
    out
}
