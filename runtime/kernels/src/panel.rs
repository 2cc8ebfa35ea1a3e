//! Panels: 16 rows of weights unpacked for products with many tokens, the only form of weights that such a product knows.
//!
//! A panel is a sequence of blocks of 32 columns. A block holds 512 bytes of values, then 16 f32 scales for each sub-block (16 or
//! 32 columns share one), then, where the type has them, 16 f32 minima for each. The product adds, for each sub-block in order,
//!
//! ```text
//! acc = fma( f32( Σ a·q ),  d_w·d_a,  acc )
//! acc = fma( f32( Σ a   ),  m_w·d_a,  acc )        where there are minima
//! ```
//!
//! A type that has no code of its own for some instruction set needs [`PanelKind::of`] and a way to unpack 16 rows alone.

use half::f16;

use crate::block::level;
use crate::codes::{Coding, Meaning};
use crate::weight_type::{BLOCK_LEN, R16_ROWS, WeightType};

/// Bytes of the values of a block: 32 columns of 16 rows.
pub(crate) const PANEL_VALUES: usize = R16_ROWS * BLOCK_LEN;
/// Bytes of a block that has one scale for each row and no minima.
pub(crate) const PANEL_BLOCK: usize = PANEL_VALUES + R16_ROWS * 4;

/// What the bytes of a panel stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PanelKind {
    /// Sub-blocks of a block, each with its own scale: 1 or 2.
    pub sub_blocks: usize,
    pub has_minima: bool,
    pub values: Values,
}

/// The range of a panel's values, and how bytes hold them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Values {
    /// Bytes 0..=15, each `offset` more than its value.
    Nibbles { offset: i32 },
    /// Any signed byte, stored `Table::panel`'s way.
    Signed,
}

/// How an instruction set has a panel's bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PanelLayout {
    /// Columns of a row that lie together (4 or 8): those of each of the 16 rows, then the next.
    pub columns: usize,
    /// What is added to signed values: 128 where weights are multiplied as unsigned bytes, or 0.
    pub signed_offset: u8,
}

impl PanelKind {
    /// How weights of a quantized type are unpacked.
    ///
    /// # Panics
    /// If the type is a float.
    pub(crate) fn of(ty: WeightType) -> Self {
        let values = match ty {
            WeightType::Q4_0 => Values::Nibbles { offset: 8 },
            WeightType::Q8_0 => Values::Signed,
            WeightType::F32 | WeightType::F16 | WeightType::BF16 => panic!("{ty} has no panels"),
            _ => {
                let coding = Coding::of(ty);
                let values = match coding.meaning {
                    Meaning::Less(offset) if coding.bits() <= 4 => Values::Nibbles { offset },
                    _ => Values::Signed,
                };
                return Self { sub_blocks: BLOCK_LEN / coding.sub_len, has_minima: coding.has_minima, values };
            }
        };
        Self { sub_blocks: 1, has_minima: false, values }
    }

    /// One scale for 32 columns and no minimum.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn is_plain(self) -> bool {
        self.sub_blocks == 1 && !self.has_minima
    }

    /// Bytes of a block.
    pub(crate) fn block_bytes(self) -> usize {
        PANEL_VALUES + self.sub_blocks * R16_ROWS * 4 * (1 + usize::from(self.has_minima))
    }
}

/// A panel while it is unpacked by portable code.
pub(crate) struct PanelMut<'a> {
    layout: PanelLayout,
    kind: PanelKind,
    blocks: &'a mut [u8],
}

impl<'a> PanelMut<'a> {
    /// A panel of zeros in `blocks`.
    pub(crate) fn zeroed(layout: PanelLayout, kind: PanelKind, blocks: &'a mut [u8]) -> Self {
        assert!(blocks.len().is_multiple_of(kind.block_bytes()), "{} bytes are not whole blocks", blocks.len());
        let zero = match kind.values {
            Values::Nibbles { offset } => offset as u8,
            Values::Signed => layout.signed_offset,
        };
        for block in blocks.chunks_exact_mut(kind.block_bytes()) {
            let (values, scales) = block.split_at_mut(PANEL_VALUES);
            values.fill(zero);
            scales.fill(0);
        }
        Self { layout, kind, blocks }
    }

    /// Sets value `column` (0..32) of row `row` of block `b`.
    #[inline]
    pub(crate) fn put(&mut self, b: usize, row: usize, column: usize, value: i32) {
        let byte = match self.kind.values {
            Values::Nibbles { offset } => (value + offset) as u8,
            Values::Signed => (value as u8).wrapping_add(self.layout.signed_offset),
        };
        self.blocks[b * self.kind.block_bytes() + place(self.layout, row, column)] = byte;
    }

    /// Sets the scale of sub-block `sub` of row `row` of block `b`, and its minimum where the kind has one.
    #[inline]
    pub(crate) fn put_scale(&mut self, b: usize, row: usize, sub: usize, scale: f32, minimum: f32) {
        let at = b * self.kind.block_bytes() + PANEL_VALUES + (sub * R16_ROWS + row) * 4;
        self.blocks[at..at + 4].copy_from_slice(&scale.to_ne_bytes());
        if self.kind.has_minima {
            let at = at + self.kind.sub_blocks * R16_ROWS * 4;
            self.blocks[at..at + 4].copy_from_slice(&minimum.to_ne_bytes());
        }
    }
}

/// Where in a block value `column` of row `row` lies.
#[inline(always)]
pub(crate) fn place(layout: PanelLayout, row: usize, column: usize) -> usize {
    let k = layout.columns;
    column / k * k * R16_ROWS + row * k + column % k
}

/// Up to 16 canonical rows of `kb` blocks of Q4_0 or Q8_0 as a panel; rows that are missing are zero.
pub(crate) fn unpack16(ty: WeightType, kb: usize, canonical: &[u8], layout: PanelLayout, panel: &mut [u8]) {
    let mut panel = PanelMut::zeroed(layout, PanelKind::of(ty), panel);
    let bytes = ty.block_bytes();
    for (row, blocks) in canonical.chunks_exact(kb * bytes).enumerate() {
        for (b, block) in blocks.chunks_exact(bytes).enumerate() {
            panel.put_scale(b, row, 0, f16::from_le_bytes([block[0], block[1]]).to_f32(), 0.0);
            let values = &block[2..];
            for column in 0..BLOCK_LEN {
                let value = match values.first_chunk() {
                    Some(nibbles) if ty == WeightType::Q4_0 => level(nibbles, column),
                    _ => i32::from(values[column] as i8),
                };
                panel.put(b, row, column, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activations::Q8Acts;
    use crate::dispatch::Kernels;
    use crate::table::{GEMM_UNITS, Isa};
    use proptest::prelude::*;

    fn isas() -> impl Iterator<Item = Kernels> {
        Isa::ALL.into_iter().filter_map(Kernels::for_isa)
    }

    fn bytes(n: usize, mut state: u64) -> Vec<u8> {
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        };
        (0..n).map(|_| next()).collect()
    }

    proptest! {
        /// Sub-blocks of 16 or 32, with and without minima, of nibbles and bytes: what the next type may need.
        #[test]
        fn every_kind_is_multiplied_alike(
            kb in 1usize..6, tokens in 2usize..=GEMM_UNITS * 4, sub_blocks in 1usize..=2, has_minima: bool,
            values in prop::sample::select(&[Values::Nibbles { offset: 0 }, Values::Nibbles { offset: 8 }, Values::Signed][..]),
            seed in 1u64..,
        ) {
            let kind = PanelKind { sub_blocks, has_minima, values };
            let weights: Vec<i32> = (bytes(16 * kb * 32, seed).iter())
                .map(|&byte| match values {
                    Values::Nibbles { offset } => i32::from(byte & 15) - offset,
                    Values::Signed => i32::from(byte as i8),
                })
                .collect();
            let scales: Vec<f32> = bytes(4 * 16 * kb * 2, seed ^ 1).iter().map(|&b| f32::from(b as i8) / 100.0).collect();
            let k = kb * 32;
            let x: Vec<f32> = bytes(tokens * k, seed ^ 2).iter().map(|&b| f32::from(b as i8) / 8.0).collect();
            let per = BLOCK_LEN / sub_blocks;
            for kernels in isas() {
                let table = kernels.table;
                let mut blocks = vec![0xff; kb * kind.block_bytes()];
                let mut panel = PanelMut::zeroed(table.panel, kind, &mut blocks);
                let scale = |b: usize, row: usize, sub: usize| {
                    let at = (((b * 16) + row) * 2 + sub) * 2;
                    (scales[at], scales[at + 1])
                };
                for b in 0..kb {
                    for row in 0..16 {
                        (0..sub_blocks).for_each(|sub| panel.put_scale(b, row, sub, scale(b, row, sub).0, scale(b, row, sub).1));
                        (0..32).for_each(|c| panel.put(b, row, c, weights[row * k + b * 32 + c]));
                    }
                }
                let mut acts = Q8Acts::new(k, tokens);
                kernels.quantize_acts(&x, &mut acts);
                let mut out = [f32::NAN; GEMM_UNITS * 4 * 16];
                // SAFETY: the table is of this CPU; a panel of kb blocks and 1 to GEMM_UNITS units of as many.
                unsafe { (table.gemm)(kind, kb, &blocks, acts.units(), &mut out) };
                for t in 0..tokens {
                    let a = acts.few(t..t + 1);
                    let a = a.as_slice()[0];
                    for row in 0..16 {
                        let mut want = 0f32;
                        for sub in 0..kb * sub_blocks {
                            let columns = sub * per..(sub + 1) * per;
                            let (b, s) = (sub / sub_blocks, sub % sub_blocks);
                            let dot: i32 = columns.clone().map(|c| i32::from(a.q[c]) * weights[row * k + c]).sum();
                            let sum: i32 = columns.map(|c| i32::from(a.q[c])).sum();
                            want = (dot as f32).mul_add(scale(b, row, s).0 * a.d[b], want);
                            if has_minima {
                                want = (sum as f32).mul_add(scale(b, row, s).1 * a.d[b], want);
                            }
                        }
                        let got = out[t * 16 + row];
                        prop_assert_eq!(got.to_bits(), want.to_bits(), "{:?} {:?}: {} {}", kernels, kind, got, want);
                    }
                }
            }
        }

        #[test]
        fn unpacking_rows_gives_the_panel_of_their_tiles(
            kb in 1usize..4, rows in 1usize..=16, ty in prop::sample::select(&[WeightType::Q4_0, WeightType::Q8_0][..]), seed in 1u64..,
        ) {
            let mut canonical = bytes(rows * kb * ty.block_bytes(), seed);
            // A scale that is no number has several forms.
            canonical.chunks_exact_mut(ty.block_bytes()).for_each(|block| block[1] &= 0x3f);
            let mut tiles = vec![0; 16 * kb * ty.block_bytes()];
            crate::r16::pack(ty, rows, kb * 32, &canonical, &mut tiles);
            for kernels in isas() {
                let (mut want, mut got) = (vec![0; kb * PANEL_BLOCK], vec![0; kb * PANEL_BLOCK]);
                // SAFETY: the table is of this CPU; kb tiles and blocks.
                unsafe { (kernels.table.panel_r16)(ty, kb, &tiles, &mut want) };
                unpack16(ty, kb, &canonical, kernels.table.panel, &mut got);
                prop_assert!(got == want, "{kernels:?}");
            }
        }
    }
}
