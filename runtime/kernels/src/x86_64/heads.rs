//! Bytes of 16 rows that lie apart, side by side.

use super::sse2::Sse2;
use crate::bytes16::transpose_bytes;
use crate::r16::R16_ROWS;

/// Bytes `at..at + 16` of the heads of 16 rows: byte by byte those of all rows.
///
/// # Safety
/// They must be readable.
#[inline(always)]
pub(super) unsafe fn narrow_bytes(heads: [*const u8; R16_ROWS], at: usize) -> [[u8; R16_ROWS]; 16] {
    // SAFETY: the caller's promise.
    transpose_bytes::<Sse2>(&heads.map(|head| unsafe { head.add(at).cast::<[u8; 16]>().read() }))
}
