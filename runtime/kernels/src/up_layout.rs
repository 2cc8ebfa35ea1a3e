//! Where scales and codes lie in an up region of rows.

use crate::codes::Coding;
use crate::weight_type::{BLOCK_LEN, WeightType};

pub(crate) const REGION_ALIGN: usize = 64;

/// Sizes inside an up region of rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UpLayout {
    pub ty: WeightType,
    /// Times 32 columns: blocks of a row of Q4_0.
    pub kb: usize,
    /// Bytes of the scales of a neuron.
    pub head_bytes: usize,
    /// Bytes of all scales, padding included: where the rows of nibbles or planes start.
    pub scales_bytes: usize,
    /// Bytes of the nibbles or planes of a neuron, padding included.
    pub row_bytes: usize,
}

impl UpLayout {
    /// For `rows × columns` of a quantized type; `None` where sizes overflow.
    pub(crate) fn new(ty: WeightType, rows: usize, columns: usize) -> Option<Self> {
        let kb = columns / BLOCK_LEN;
        let (head, bits) = match ty {
            WeightType::Q4_0 => (2, 4),
            _ => (Coding::of(ty).head_bytes(), Coding::of(ty).bits()),
        };
        let head_bytes = (columns / ty.block_len()).checked_mul(head)?;
        let scales_bytes = rows.checked_mul(head_bytes)?.checked_next_multiple_of(REGION_ALIGN)?;
        // Whole nibbles for each block of Q4_0; of other types whole pieces of 128 columns.
        let pieces = if bits == 4 { kb } else { kb.checked_next_multiple_of(4)? };
        let row_bytes = pieces.checked_mul(4 * bits)?.checked_next_multiple_of(64)?;
        Some(Self { ty, kb, head_bytes, scales_bytes, row_bytes })
    }
}

/// Where a plane of `width` bits has block `b` (of four) of a piece of 128 columns: at which byte its 16 bytes begin, and at which bits of
/// them its codes 0..16 and 16..32 are.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
pub(crate) const fn block_place(width: usize, b: usize) -> (usize, [usize; 2]) {
    match width {
        4 => (b * 16, [0, 4]),
        2 => (b % 2 * 16, [b / 2 * 2, b / 2 * 2 + 4]),
        _ => (0, [b, b + 4]),
    }
}
