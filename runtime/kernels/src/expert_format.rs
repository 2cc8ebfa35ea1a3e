//! How the three matrices of one expert lie in memory: in a slot of the expert cache and in a record of the `offload` layout.
//!
//! An expert has `gate` and `up` of `n_ff` rows × `n_embd` columns and `down` of `n_embd` rows × `n_ff` columns, each of a type of its
//! own. With `kb = n_embd / 32` and `fb = n_ff / 32`, a matrix of **Q4_0** is a permutation of the canonical bytes:
//!
//! - **gate**: [R16](crate::r16) tiles.
//! - **up**, one run of bytes per neuron, so that dead neurons are not touched: first `n_ff × kb` f16 scales, row-major, padded
//!   to 64 bytes; then for each row the nibbles of its blocks (16 bytes each, as Q4_0 has them) in order, padded with 0x88 to
//!   a multiple of 64 bytes.
//! - **down**, transposed by position: with `E` = `n_embd` rounded up to a multiple of 128, for each block `b` of 32 neurons
//!   `E` f16 scales (one for each output), then 32 rows of `E / 2` bytes, row `n` holding the nibbles of neuron `32b + n` for
//!   all outputs. Each 64 bytes of such a row are 128 outputs: byte `16L + 4v + e` (`L, v, e` in 0..4) holds output
//!   `16v + 4L + e` in its low nibble and output `64 + 16v + 4L + e` in its high one. Outputs that pad have scale 0 and nibble 8.
//!
//! A matrix of Q8_0 or of floats is canonical: row-major blocks. Those of other types are permutations of the canonical bits, arranged
//! alike: tiles for gate, rows for up (`planes.rs`), columns for down (`columns.rs`). Regions start at multiples of 64 bytes, in this
//! order, and the record is padded with zeros to a multiple of 4096 bytes.

use std::ops::Range;

pub use st_format::Matrix;
use thiserror::Error;

use crate::columns;
use crate::down_layout::{DownLayout, OUTPUT_CHUNK, line_byte};
use crate::planes;
use crate::r16;
use crate::up_layout::{REGION_ALIGN, UpLayout};
use crate::weight_type::BLOCK_LEN;
use crate::weight_type::WeightType;

/// Records are padded to a multiple of this.
pub const RECORD_ALIGN: usize = 4096;

/// Why a shape has no expert format.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum FormatError {
    /// A dimension is zero or not whole blocks.
    #[error("expert of n_embd {n_embd}, n_ff {n_ff}: {ty} needs positive multiples of {multiple}")]
    Shape {
        /// Weight type.
        ty: WeightType,
        /// Hidden size.
        n_embd: usize,
        /// Neurons.
        n_ff: usize,
        /// What both must be a multiple of.
        multiple: usize,
    },
    /// The sizes overflow.
    #[error("expert of n_embd {n_embd}, n_ff {n_ff} is too large")]
    TooLarge {
        /// Hidden size.
        n_embd: usize,
        /// Neurons.
        n_ff: usize,
    },
}

/// How the bytes of a matrix lie in its region; see the module documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arrangement {
    /// Row-major blocks, as in a GGUF file.
    Canonical,
    /// 16 rows interleaved: gate.
    Tiles,
    /// All scales, then one run of bytes for each row: up.
    Rows,
    /// For each block of 32 or 256 columns the scales of all rows, then one run of bytes for each column: down.
    Columns,
}

/// The type of a matrix, and how it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MatrixFormat {
    /// Weight type.
    pub ty: WeightType,
    /// How its bytes lie.
    pub arrangement: Arrangement,
}

impl MatrixFormat {
    /// How a matrix of this type lies in a record.
    pub fn of(matrix: Matrix, ty: WeightType) -> Self {
        let arrangement = match (ty, matrix) {
            (WeightType::Q8_0 | WeightType::F32 | WeightType::F16 | WeightType::BF16, _) => Arrangement::Canonical,
            (_, Matrix::Gate) => Arrangement::Tiles,
            (_, Matrix::Up) => Arrangement::Rows,
            (_, Matrix::Down) => Arrangement::Columns,
        };
        Self { ty, arrangement }
    }

    /// Bytes of a region of `rows × columns`; `None` where they overflow or rows are not whole blocks.
    fn region_bytes(self, rows: usize, columns: usize) -> Option<usize> {
        match self.arrangement {
            Arrangement::Canonical | Arrangement::Tiles => self.ty.row_bytes(columns)?.checked_mul(rows),
            Arrangement::Rows => {
                let up = UpLayout::new(self.ty, rows, columns)?;
                rows.checked_mul(up.row_bytes)?.checked_add(up.scales_bytes)
            }
            Arrangement::Columns => DownLayout::new(self.ty, rows, columns)?.region_bytes(),
        }
    }
}

/// The layout of one expert's record; see the module documentation. Layers whose experts differ have one each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertFormat {
    /// Gate, up, down.
    matrices: [MatrixFormat; 3],
    n_embd: usize,
    n_ff: usize,
    /// Offset and length of each.
    regions: [(usize, usize); 3],
    record_bytes: usize,
}

impl ExpertFormat {
    /// The format for experts of this shape, all of whose matrices are of one type.
    ///
    /// # Errors
    /// As [`Self::with_types`].
    pub fn new(ty: WeightType, n_embd: usize, n_ff: usize) -> Result<Self, FormatError> {
        Self::with_types([ty; 3], n_embd, n_ff)
    }

    /// The format for experts of this shape, with the types of gate, up and down.
    ///
    /// # Errors
    /// If a dimension is 0, not a multiple of 32 where one of the types is quantized, or too large.
    pub fn with_types(types: [WeightType; 3], n_embd: usize, n_ff: usize) -> Result<Self, FormatError> {
        let ty = types.into_iter().max_by_key(|ty| ty.block_len()).unwrap_or(types[0]);
        let multiple = ty.block_len().min(BLOCK_LEN);
        let fits = |matrix: Matrix| {
            let columns = if matrix == Matrix::Down { n_ff } else { n_embd };
            columns.is_multiple_of(types[matrix as usize].block_len())
        };
        if n_embd == 0 || n_ff == 0 || !n_embd.is_multiple_of(multiple) || !n_ff.is_multiple_of(multiple) {
            return Err(FormatError::Shape { ty, n_embd, n_ff, multiple });
        }
        if let Some(matrix) = Matrix::ALL.into_iter().find(|&matrix| !fits(matrix)) {
            let ty = types[matrix as usize];
            return Err(FormatError::Shape { ty, n_embd, n_ff, multiple: ty.block_len() });
        }
        Self::layout(types, n_embd, n_ff).ok_or(FormatError::TooLarge { n_embd, n_ff })
    }

    fn layout(types: [WeightType; 3], n_embd: usize, n_ff: usize) -> Option<Self> {
        let matrices = Matrix::ALL.map(|matrix| MatrixFormat::of(matrix, types[matrix as usize]));
        let mut format = Self { matrices, n_embd, n_ff, regions: [(0, 0); 3], record_bytes: 0 };
        let mut at = 0usize;
        for matrix in Matrix::ALL {
            let (rows, columns) = format.shape(matrix);
            let bytes = matrices[matrix as usize].region_bytes(rows, columns)?;
            format.regions[matrix as usize] = (at, bytes);
            at = at.checked_add(bytes)?.checked_next_multiple_of(REGION_ALIGN)?;
        }
        format.record_bytes = at.checked_next_multiple_of(RECORD_ALIGN)?;
        Some(format)
    }

    /// Type and arrangement of a matrix.
    pub fn matrix(&self, matrix: Matrix) -> MatrixFormat {
        self.matrices[matrix as usize]
    }

    /// Weight type of a matrix.
    pub fn type_of(&self, matrix: Matrix) -> WeightType {
        self.matrix(matrix).ty
    }

    /// Whether gate or up is multiplied with quantized activations.
    pub fn takes_acts(&self) -> bool {
        self.type_of(Matrix::Gate).is_quantized() || self.type_of(Matrix::Up).is_quantized()
    }

    /// Whether gate or up is multiplied with floats.
    pub fn takes_floats(&self) -> bool {
        !(self.type_of(Matrix::Gate).is_quantized() && self.type_of(Matrix::Up).is_quantized())
    }

    /// Hidden size: columns of gate and up, rows of down.
    pub fn n_embd(&self) -> usize {
        self.n_embd
    }

    /// Neurons: rows of gate and up, columns of down.
    pub fn n_ff(&self) -> usize {
        self.n_ff
    }

    /// Bytes of a record, a multiple of [`RECORD_ALIGN`].
    pub fn record_bytes(&self) -> usize {
        self.record_bytes
    }

    /// Where in the record this matrix lies.
    pub fn region(&self, matrix: Matrix) -> Range<usize> {
        let (start, len) = self.regions[matrix as usize];
        start..start + len
    }

    /// Rows and columns of this matrix.
    pub fn shape(&self, matrix: Matrix) -> (usize, usize) {
        match matrix {
            Matrix::Gate | Matrix::Up => (self.n_ff, self.n_embd),
            Matrix::Down => (self.n_embd, self.n_ff),
        }
    }

    /// Bytes of this matrix as a GGUF file holds it: row-major blocks.
    pub fn canonical_bytes(&self, matrix: Matrix) -> usize {
        let (rows, columns) = self.shape(matrix);
        rows * self.type_of(matrix).row_bytes(columns).expect("checked on construction")
    }

    /// Arranges the canonical bytes of a matrix in its region. [`crate::Kernels::pack_expert`] is the fast version.
    ///
    /// # Panics
    /// If a length is not [`Self::canonical_bytes`] or that of [`Self::region`].
    pub fn pack(&self, matrix: Matrix, canonical: &[u8], region: &mut [u8]) {
        self.check(matrix, canonical.len(), region.len());
        let MatrixFormat { ty, arrangement } = self.matrix(matrix);
        let (n_rows, n_columns) = self.shape(matrix);
        match arrangement {
            Arrangement::Canonical => region.copy_from_slice(canonical),
            Arrangement::Tiles => r16::pack(ty, n_rows, n_columns, canonical, region),
            Arrangement::Rows => pack_up(&self.up(), canonical, region),
            Arrangement::Columns => pack_down(&self.down(), n_rows, canonical, region),
        }
    }

    /// Undoes [`Self::pack`]: the canonical bytes of a matrix from its region.
    ///
    /// # Panics
    /// As [`Self::pack`].
    pub fn unpack(&self, matrix: Matrix, region: &[u8], canonical: &mut [u8]) {
        self.check(matrix, canonical.len(), region.len());
        let MatrixFormat { ty, arrangement } = self.matrix(matrix);
        let (n_rows, n_columns) = self.shape(matrix);
        match arrangement {
            Arrangement::Canonical => canonical.copy_from_slice(region),
            Arrangement::Tiles => r16::unpack(ty, n_rows, n_columns, region, canonical),
            Arrangement::Rows if ty.has_codes() => planes::unpack_rows(&self.up(), region, canonical),
            Arrangement::Rows => {
                let up = self.up();
                let (scales, rows) = region.split_at(up.scales_bytes);
                for (scale, block) in scales.chunks_exact(2).zip(canonical.chunks_exact_mut(18)) {
                    block[..2].copy_from_slice(scale);
                }
                for (row, canonical) in rows.chunks_exact(up.row_bytes).zip(canonical.chunks_exact_mut(up.kb * 18)) {
                    for (qs, block) in row.chunks_exact(16).zip(canonical.chunks_exact_mut(18)) {
                        block[2..].copy_from_slice(qs);
                    }
                }
            }
            Arrangement::Columns if ty.has_codes() => columns::unpack(&self.down(), region, canonical),
            Arrangement::Columns => {
                let down = self.down();
                for (i, block) in canonical.chunks_exact_mut(18).enumerate() {
                    let (o, b) = (i / down.fb, i % down.fb);
                    let group = down.group(region, b);
                    block[..2].copy_from_slice(&group.heads[o * 2..o * 2 + 2]);
                    for (j, byte) in block[2..].iter_mut().enumerate() {
                        let nibble = |n: usize| down_nibble(&group.rows[n * down.row_bytes..], o);
                        *byte = nibble(j) | nibble(j + 16) << 4;
                    }
                }
            }
        }
    }

    /// Lays the three canonical matrices out as one record, padding zeroed.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn pack_record(&self, gate: &[u8], up: &[u8], down: &[u8], record: &mut [u8]) {
        assert_eq!(record.len(), self.record_bytes, "expert record length");
        record.fill(0);
        for (matrix, canonical) in Matrix::ALL.into_iter().zip([gate, up, down]) {
            self.pack(matrix, canonical, &mut record[self.region(matrix)]);
        }
    }

    pub(crate) fn check(&self, matrix: Matrix, canonical: usize, region: usize) {
        assert_eq!(canonical, self.canonical_bytes(matrix), "{matrix:?}: canonical bytes");
        self.check_region(matrix, region);
    }

    pub(crate) fn check_region(&self, matrix: Matrix, region: usize) {
        assert_eq!(region, self.regions[matrix as usize].1, "{matrix:?}: region bytes");
    }

    /// Sizes inside an up region of rows.
    pub(crate) fn up(&self) -> UpLayout {
        UpLayout::new(self.type_of(Matrix::Up), self.n_ff, self.n_embd).expect("checked on construction")
    }

    /// Sizes inside a down region of columns.
    pub(crate) fn down(&self) -> DownLayout {
        DownLayout::new(self.type_of(Matrix::Down), self.n_embd, self.n_ff).expect("checked on construction")
    }

    /// What a product with the live neurons of down reads: the scales of each block of neurons of which one lives, and the run of each
    /// that does. `None` where it reads down whole.
    pub fn down_parts(&self) -> Option<DownParts> {
        (self.matrix(Matrix::Down).arrangement == Arrangement::Columns).then(|| {
            let down = self.down();
            let bits: usize = down.planes.iter().map(|plane| plane.width).sum();
            DownParts {
                block_groups: down.steps,
                scales: self.n_embd * down.head_bytes,
                neuron: self.n_embd * bits / 8,
            }
        })
    }
}

/// Bytes of the parts of down; padding does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DownParts {
    /// Groups of 32 neurons that share scales.
    pub block_groups: usize,
    /// Scales of such a block.
    pub scales: usize,
    /// The run of a neuron.
    pub neuron: usize,
}

/// Byte of a down row of Q4_0 that holds output `o`, and whether in its high nibble.
#[inline]
pub(crate) fn down_position(o: usize) -> (usize, bool) {
    (o / OUTPUT_CHUNK * 64 + line_byte(o % 64), o % OUTPUT_CHUNK >= 64)
}

/// Nibble of output `o` in a down row.
#[inline]
pub(crate) fn down_nibble(row: &[u8], o: usize) -> u8 {
    let (byte, high) = down_position(o);
    if high { row[byte] >> 4 } else { row[byte] & 15 }
}

/// Canonical rows to an up region.
pub(crate) fn pack_up(up: &UpLayout, canonical: &[u8], region: &mut [u8]) {
    if up.ty.has_codes() {
        return planes::pack_rows(up, canonical, region);
    }
    let (scales, rows) = region.split_at_mut(up.scales_bytes);
    let blocks = canonical.as_chunks::<18>().0;
    scales[2 * blocks.len()..].fill(0);
    let scales = scales.as_chunks_mut::<2>().0.chunks_exact_mut(up.kb);
    for ((row, scales), blocks) in rows.chunks_exact_mut(up.row_bytes).zip(scales).zip(blocks.chunks_exact(up.kb)) {
        let (nibbles, padding) = row.split_at_mut(up.kb * 16);
        for ((qs, scale), [d0, d1, block @ ..]) in nibbles.as_chunks_mut::<16>().0.iter_mut().zip(scales).zip(blocks) {
            (*qs, *scale) = (*block, [*d0, *d1]);
        }
        padding.fill(0x88);
    }
}

/// A canonical matrix of `n_embd` rows to a down region.
pub(crate) fn pack_down(down: &DownLayout, n_embd: usize, canonical: &[u8], region: &mut [u8]) {
    for (b, block) in region.chunks_exact_mut(down.block_bytes).enumerate() {
        match down.ty.has_codes() {
            true => columns::pack_block(down, n_embd, canonical, b, block),
            false => pack_down_group(down, n_embd, canonical, b, block),
        }
    }
}

/// Fills group `b` of the down region of Q4_0; `canonical` is the whole matrix of `n_embd` rows.
fn pack_down_group(down: &DownLayout, n_embd: usize, canonical: &[u8], b: usize, group: &mut [u8]) {
    let (scales, rows) = group.split_at_mut(down.padded * 2);
    let block = |o: usize| -> [u8; 18] {
        let mut block = [0x88; 18];
        if o < n_embd {
            block.copy_from_slice(&canonical[(o * down.fb + b) * 18..][..18]);
        } else {
            block[..2].fill(0);
        }
        block
    };
    for chunk in 0..down.padded / OUTPUT_CHUNK {
        // The chunk's 64 bytes of each neuron.
        let mut columns = [[0u8; OUTPUT_CHUNK / 2]; BLOCK_LEN];
        for i in 0..OUTPUT_CHUNK / 2 {
            let o = chunk * OUTPUT_CHUNK + i;
            let (low, high) = (block(o), block(o + 64));
            let (byte, _) = down_position(i);
            for j in 0..16 {
                let (l, h) = (low[2 + j], high[2 + j]);
                columns[j][byte] = (l & 0x0f) | h << 4;
                columns[j + 16][byte] = l >> 4 | (h & 0xf0);
            }
            scales[o * 2..o * 2 + 2].copy_from_slice(&low[..2]);
            scales[(o + 64) * 2..(o + 64) * 2 + 2].copy_from_slice(&high[..2]);
        }
        for (row, column) in rows.chunks_exact_mut(down.row_bytes).zip(&columns) {
            row[chunk * 64..(chunk + 1) * 64].copy_from_slice(column);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn published_shapes_have_no_padding() {
        for (n_embd, n_ff, bytes) in [(1536, 768, 663_552), (2560, 768, 1_105_920)] {
            let format = ExpertFormat::new(WeightType::Q4_0, n_embd, n_ff).unwrap();
            assert_eq!(format.record_bytes(), 3 * bytes);
            for (i, matrix) in Matrix::ALL.into_iter().enumerate() {
                assert_eq!(format.region(matrix), i * bytes..(i + 1) * bytes);
                assert_eq!(format.canonical_bytes(matrix), bytes);
            }
        }
    }

    #[test]
    fn bad_shapes_are_refused() {
        assert!(matches!(ExpertFormat::new(WeightType::Q4_0, 48, 32), Err(FormatError::Shape { multiple: 32, .. })));
        let mixed = [WeightType::F32, WeightType::F32, WeightType::Q8_0];
        assert!(matches!(
            ExpertFormat::with_types(mixed, 32, 48),
            Err(FormatError::Shape { ty: WeightType::Q8_0, .. })
        ));
        // Gate and up need whole blocks of n_embd, down of n_ff.
        let k = [WeightType::Q4_K, WeightType::Q4_K, WeightType::Q5_0];
        assert!(ExpertFormat::with_types(k, 256, 32).is_ok());
        assert!(matches!(
            ExpertFormat::new(WeightType::Q6_K, 256, 32),
            Err(FormatError::Shape { ty: WeightType::Q6_K, multiple: 256, .. })
        ));
        assert!(matches!(ExpertFormat::new(WeightType::F32, 0, 32), Err(FormatError::Shape { multiple: 1, .. })));
        let huge = usize::MAX / 32 * 32;
        assert!(matches!(ExpertFormat::new(WeightType::Q4_0, huge, 64), Err(FormatError::TooLarge { .. })));
    }

    proptest! {
        #[test]
        fn unpack_undoes_pack(
            eb in 1usize..10, fb in 1usize..5, types in prop::array::uniform3(prop::sample::select(&WeightType::ALL)), seed: u64,
        ) {
            let len = types.into_iter().map(WeightType::block_len).max().unwrap_or(1);
            let format = ExpertFormat::with_types(types, (eb * 32).next_multiple_of(len), (fb * 32).next_multiple_of(len)).unwrap();
            let mut state = seed | 1;
            for matrix in Matrix::ALL {
                let canonical: Vec<u8> = (0..format.canonical_bytes(matrix))
                    .map(|_| {
                        state ^= state << 13;
                        state ^= state >> 7;
                        state ^= state << 17;
                        state as u8
                    })
                    .collect();
                let range = format.region(matrix);
                prop_assert!(range.start.is_multiple_of(64) && range.end <= format.record_bytes());
                let mut region = vec![0x5a; range.len()];
                format.pack(matrix, &canonical, &mut region);
                let mut back = vec![0; canonical.len()];
                format.unpack(matrix, &region, &mut back);
                prop_assert!(back == canonical, "{matrix:?}");
            }
        }
    }
}
