//! One step of the accumulation, and the same for a block of a panel.

use crate::panel::{PANEL_VALUES, PanelKind, PanelLayout, Values, place};
use crate::r16::R16_ROWS;
use crate::weight_type::BLOCK_LEN;

/// Values stay signed.
pub(super) const LAYOUT: PanelLayout = PanelLayout { columns: 4, signed_offset: 0 };

/// One step of the accumulation.
#[inline]
pub(super) fn add_block(acc: f32, isum: i32, d_w: f32, d_a: f32) -> f32 {
    (isum as f32).mul_add(d_w * d_a, acc)
}

/// Adds to the sums of a token the products of block `w` of a panel with its values `q`.
#[inline(always)]
pub(super) fn add_panel_block(kind: PanelKind, w: &[u8], q: &[i32; BLOCK_LEN], d_a: f32, out: &mut [f32; R16_ROWS]) {
    let (values, scales) = w.split_at(PANEL_VALUES);
    let value = |byte: u8| match kind.values {
        Values::Nibbles { offset } => i32::from(byte) - offset,
        Values::Signed => i32::from(byte.wrapping_sub(LAYOUT.signed_offset) as i8),
    };
    let columns = BLOCK_LEN / kind.sub_blocks;
    for (sub, q) in q.chunks_exact(columns).enumerate() {
        let sum = q.iter().sum();
        for (r, acc) in out.iter_mut().enumerate() {
            let isum =
                (q.iter().enumerate()).map(|(c, q)| q * value(values[place(LAYOUT, r, sub * columns + c)])).sum();
            *acc = add_block(*acc, isum, float(scales, sub * R16_ROWS + r), d_a);
            if kind.has_minima {
                *acc = add_block(*acc, sum, float(scales, (kind.sub_blocks + sub) * R16_ROWS + r), d_a);
            }
        }
    }
}

/// Float `i` of some bytes.
#[inline(always)]
pub(super) fn float(bytes: &[u8], i: usize) -> f32 {
    f32::from_ne_bytes([bytes[i * 4], bytes[i * 4 + 1], bytes[i * 4 + 2], bytes[i * 4 + 3]])
}
