//! R16: the arrangement of quantized matrices in memory, 16 rows side by side.
//!
//! A matrix of `rows × k` (rows rounded up to a multiple of 16) is a sequence of *tiles*, row group by row group, and within a
//! row group block by block along `k`. A tile holds block `b` of 16 rows:
//!
//! - Q4_0, 288 bytes: 16 f16 scales, then for `g` in 0..4, for each of the 16 rows, bytes `4g..4g+4` of the block's nibbles as
//!   Q4_0 has them (low nibble: column `4g + j`, high: column `16 + 4g + j`).
//! - Q8_0, 544 bytes: 16 f16 scales, then for `g` in 0..8, for each of the 16 rows, values `4g..4g+4`.
//! - Other types: see `planes.rs`. Blocks, and so tiles, may be 256 columns long.
//!
//! It is a permutation of the canonical bytes, so it can be undone bit for bit; rows that pad have scale 0 and values 0.

use std::ops::Range;

use half::f16;

use crate::block::{BlockQ4_0, BlockQ8_0, level};
use crate::planes;
pub use crate::weight_type::R16_ROWS;
use crate::weight_type::{BLOCK_LEN, WeightType};

/// Bytes of the scales at the start of a tile.
pub(crate) const TILE_SCALES: usize = 32;

/// Bytes of one tile.
///
/// # Panics
/// If `ty` is not a quantized type.
pub fn tile_bytes(ty: WeightType) -> usize {
    assert!(ty.is_quantized(), "{ty} has no R16 form");
    R16_ROWS * ty.block_bytes()
}

/// Bytes of the tiles of 16 rows of `kb` times 32 columns.
pub(crate) fn group_bytes(ty: WeightType, kb: usize) -> usize {
    kb * BLOCK_LEN / ty.block_len() * tile_bytes(ty)
}

/// Bytes of a whole matrix in R16; `None` if `ty` has no such form, `k` is not whole blocks or the size overflows.
pub fn packed_bytes(ty: WeightType, rows: usize, k: usize) -> Option<usize> {
    if !ty.is_quantized() {
        return None;
    }
    rows.checked_next_multiple_of(R16_ROWS)?.checked_mul(ty.row_bytes(k)?)
}

fn check(what: &str, ty: WeightType, rows: usize, k: usize, canonical: usize, packed: usize) {
    let want = ty.row_bytes(k).and_then(|b| b.checked_mul(rows));
    assert_eq!(Some(canonical), want, "{what}: canonical bytes of {rows} × {k} {ty}");
    assert_eq!(Some(packed), packed_bytes(ty, rows, k), "{what}: packed bytes of {rows} × {k} {ty}");
}

/// Interleaves canonical rows into tiles.
///
/// # Panics
/// If a length does not fit `rows × k` of `ty`, or `ty` is not quantized.
pub fn pack(ty: WeightType, rows: usize, k: usize, canonical: &[u8], tiles: &mut [u8]) {
    check("r16 pack", ty, rows, k, canonical.len(), tiles.len());
    if ty.has_codes() {
        return planes::pack_tiles(ty, k / BLOCK_LEN, canonical, tiles);
    }
    let (kb, bytes, tile) = (k / BLOCK_LEN, ty.block_bytes(), tile_bytes(ty));
    for (i, out) in tiles.chunks_exact_mut(tile).enumerate() {
        let (group, b) = (i / kb, i % kb);
        for r in 0..R16_ROWS {
            let row = group * R16_ROWS + r;
            if row >= rows {
                out[r * 2..r * 2 + 2].fill(0);
                let pad = if ty == WeightType::Q4_0 { 0x88 } else { 0 };
                for quad in out[TILE_SCALES..].chunks_exact_mut(4).skip(r).step_by(R16_ROWS) {
                    quad.fill(pad);
                }
                continue;
            }
            let block = &canonical[(row * kb + b) * bytes..][..bytes];
            out[r * 2..r * 2 + 2].copy_from_slice(&block[..2]);
            let quads = out[TILE_SCALES..].chunks_exact_mut(4).skip(r).step_by(R16_ROWS);
            for (quad, src) in quads.zip(block[2..].chunks_exact(4)) {
                quad.copy_from_slice(src);
            }
        }
    }
}

/// Undoes [`pack`].
///
/// # Panics
/// As [`pack`].
pub fn unpack(ty: WeightType, rows: usize, k: usize, tiles: &[u8], canonical: &mut [u8]) {
    check("r16 unpack", ty, rows, k, canonical.len(), tiles.len());
    if ty.has_codes() {
        return planes::unpack_tiles(ty, k / ty.block_len(), tiles, canonical);
    }
    let (kb, bytes, tile) = (k / BLOCK_LEN, ty.block_bytes(), tile_bytes(ty));
    for (i, block) in canonical.chunks_exact_mut(bytes).enumerate() {
        let (row, b) = (i / kb, i % kb);
        let src = &tiles[(row / R16_ROWS * kb + b) * tile..][..tile];
        read_block(src, row % R16_ROWS, block);
    }
}

/// The canonical bytes of row `r` of a tile.
fn read_block(tile: &[u8], r: usize, block: &mut [u8]) {
    block[..2].copy_from_slice(&tile[r * 2..r * 2 + 2]);
    let quads = tile[TILE_SCALES..].chunks_exact(4).skip(r).step_by(R16_ROWS);
    for (dst, quad) in block[2..].chunks_exact_mut(4).zip(quads) {
        dst.copy_from_slice(quad);
    }
}

/// A borrowed matrix in R16: `rows × k` of a quantized type.
#[derive(Debug, Clone, Copy)]
pub struct R16<'a> {
    ty: WeightType,
    rows: usize,
    k: usize,
    tiles: &'a [u8],
}

impl<'a> R16<'a> {
    /// Views `tiles` as a matrix of `rows` outputs and `k` inputs.
    ///
    /// # Panics
    /// If `tiles` is not exactly [`packed_bytes`] long.
    pub fn new(ty: WeightType, rows: usize, k: usize, tiles: &'a [u8]) -> Self {
        assert_eq!(Some(tiles.len()), packed_bytes(ty, rows, k), "R16 bytes of {rows} × {k} {ty}");
        Self { ty, rows, k, tiles }
    }

    /// Stored type.
    pub fn ty(&self) -> WeightType {
        self.ty
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The bytes.
    pub fn tiles(&self) -> &'a [u8] {
        self.tiles
    }

    /// The tiles of some groups of 16 rows.
    pub(crate) fn groups(&self, groups: Range<usize>) -> &'a [u8] {
        let bytes = group_bytes(self.ty, self.k / BLOCK_LEN);
        &self.tiles[groups.start * bytes..groups.end * bytes]
    }

    /// Writes row `row` as floats: the embedding of a token.
    ///
    /// # Panics
    /// If there is no such row or `out` is not `k` long.
    pub fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(out.len(), self.k, "row length");
        let group = self.groups(row / R16_ROWS..row / R16_ROWS + 1);
        let r = row % R16_ROWS;
        if self.ty.has_codes() {
            return planes::tile_row_to_f32(self.ty, group, r, out);
        }
        for (tile, out) in group.chunks_exact(tile_bytes(self.ty)).zip(out.chunks_exact_mut(BLOCK_LEN)) {
            if self.ty == WeightType::Q4_0 {
                let mut block = [0; size_of::<BlockQ4_0>()];
                read_block(tile, r, &mut block);
                out.copy_from_slice(&BlockQ4_0::from_bytes(&block).dequantize());
            } else {
                let mut block = [0; size_of::<BlockQ8_0>()];
                read_block(tile, r, &mut block);
                out.copy_from_slice(&BlockQ8_0::from_bytes(&block).dequantize());
            }
        }
    }
}

/// Scale `r` of a tile as f32.
#[inline]
pub(crate) fn tile_scale(tile: &[u8], r: usize) -> f32 {
    f16::from_le_bytes([tile[r * 2], tile[r * 2 + 1]]).to_f32()
}

/// The signed integer at (`row` r, `column` c) of a tile.
#[inline]
pub(crate) fn tile_value(ty: WeightType, tile: &[u8], r: usize, c: usize) -> i32 {
    let at = |g: usize, j: usize| TILE_SCALES + (g * R16_ROWS + r) * 4 + j;
    match ty {
        WeightType::Q4_0 => {
            let j = c % 16;
            let mut qs = [0; 16];
            qs[j] = tile[at(j / 4, j % 4)];
            level(&qs, c)
        }
        _ => i32::from(tile[at(c / 4, c % 4)] as i8),
    }
}
