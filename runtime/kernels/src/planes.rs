//! How matrices of the types with codes ([`codes`](crate::codes)) lie in memory: permutations of their bits, for every instruction set.
//!
//! - A *tile* is one block of each of 16 rows. First the heads, byte by byte of the 16 rows (f16 scales: two bytes), then for each
//!   *step* of 32 columns the low plane and the high plane, `64 · width` bytes each. Columns `4g..4g + 4` of the 16 rows are quad
//!   group `g` of 8, 64 bytes when unpacked; byte `i` of its bits is in byte `64 · (g % width) + i` of the plane, at bit
//!   `width · (g / width)`. For 4 bits that is a tile of Q4_0.
//! - A *row* (up) has its heads apart, so that both are runs: f16 scales of all blocks, field by field, then the other bytes block by
//!   block. Its planes follow each other, each in pieces of 128 columns of `16 · width` bytes: codes 0..16 of the four sub-blocks
//!   of 32, then codes 16..32 of the four, make 128 in order; code `i` of them is in byte `i % (16 · width)` at bit
//!   `width · (i / (16 · width))`.

use crate::bytes16::{Bytes16, exchange_slots, transpose_bytes, transpose_quads};
use crate::codes::{
    self, Coded, Coding, MAX_BLOCK, MAX_HEAD, MAX_SCALES, NO_BLOCK, Plane, Scale, scales, weights, with_coded,
};
use crate::panel::{PanelKind, PanelLayout, PanelMut};
use crate::up_layout::UpLayout;
use crate::weight_type::{BLOCK_LEN, R16_ROWS, WeightType};

/// Codes of a step: 32 columns of 16 rows, quad group by quad group.
pub(crate) const STEP_CODES: usize = BLOCK_LEN * R16_ROWS;

/// Bytes of the heads of a tile.
pub(crate) const fn tile_head_bytes(ty: WeightType) -> usize {
    Coding::of(ty).head_bytes() * R16_ROWS
}

/// Bytes of the planes of a step.
pub(crate) const fn step_bytes(ty: WeightType) -> usize {
    Coding::of(ty).bits() * 64
}

/// Where byte `i` of a head lies in the heads of a tile, for row `r`.
#[inline(always)]
fn head_place(wide: usize, i: usize, r: usize) -> usize {
    if i < 2 * wide { i / 2 * 2 * R16_ROWS + 2 * r + i % 2 } else { i * R16_ROWS + r }
}

/// The head of row `r` of a tile.
fn tile_head(ty: WeightType, tile: &[u8], r: usize, head: &mut [u8]) {
    let coding = Coding::of(ty);
    for (i, byte) in head[..coding.head_bytes()].iter_mut().enumerate() {
        *byte = tile[head_place(coding.wide(), i, r)];
    }
}

/// Where code (row `r`, column `c`) of a step lies among its unpacked codes.
#[inline(always)]
const fn quad_place(r: usize, c: usize) -> usize {
    c / 4 * 64 + r * 4 + c % 4
}

/// Adds the bits of a plane of a step to `codes`.
#[inline(always)]
fn read_step_plane(width: usize, shift: usize, plane: &[u8], codes: &mut [u8; STEP_CODES]) {
    let mask = (1 << width) - 1;
    for (g, codes) in codes.as_chunks_mut::<64>().0.iter_mut().enumerate() {
        let (bytes, bit) = (&plane[g % width * 64..][..64], width * (g / width));
        for (code, byte) in codes.iter_mut().zip(bytes) {
            *code |= (byte >> bit & mask) << shift;
        }
    }
}

/// The codes of a step.
#[inline(always)]
pub(crate) fn read_step(coding: &Coding, step: &[u8], codes: &mut [u8; STEP_CODES]) {
    codes.fill(0);
    let (low, high) = step.split_at(coding.low_bits() * 64);
    read_step_plane(coding.low_bits(), 0, low, codes);
    if coding.high_bits() > 0 {
        read_step_plane(coding.high_bits(), coding.low_bits(), high, codes);
    }
}

/// Canonical rows (up to 16 for each group; others are zeros) of `kb` times 32 columns to tiles.
pub(crate) fn pack_tiles(ty: WeightType, kb: usize, canonical: &[u8], tiles: &mut [u8]) {
    with_coded!(ty, T => pack_tiles_of::<T, [u8; 16]>(kb, canonical, tiles));
}

/// [`pack_tiles`] for a type and an instruction set.
#[inline(always)]
pub(crate) fn pack_tiles_of<T: Coded, V: Bytes16>(kb: usize, canonical: &[u8], tiles: &mut [u8]) {
    let (ty, blocks) = (T::TY, kb / T::STEPS);
    let (coding, bytes) = (Coding::of(ty), ty.block_bytes());
    let heads = tile_head_bytes(ty);
    for (i, tile) in tiles.chunks_exact_mut(bytes * R16_ROWS).enumerate() {
        let (group, b) = (i / blocks, i % blocks);
        let blocks: [&[u8]; R16_ROWS] = std::array::from_fn(|r| {
            let block =
                canonical.get(((group * R16_ROWS + r) * blocks + b) * bytes..).and_then(|block| block.get(..bytes));
            block.unwrap_or(&NO_BLOCK[..bytes])
        });
        let mut narrow = [[0; 16]; R16_ROWS];
        let (head_bytes, steps) = tile.split_at_mut(heads);
        let (wide_bytes, narrow_bytes) = head_bytes.split_at_mut(2 * coding.wide() * R16_ROWS);
        for (r, narrow) in narrow.iter_mut().enumerate() {
            let mut head = [0; MAX_HEAD];
            coding.head(blocks[r], &mut head);
            for i in 0..2 * coding.wide() {
                wide_bytes[head_place(coding.wide(), i, r)] = head[i];
            }
            narrow[..coding.narrow()].copy_from_slice(&head[2 * coding.wide()..coding.head_bytes()]);
        }
        if coding.narrow() > 0 {
            let narrow = transpose_bytes::<V>(&narrow);
            narrow_bytes.copy_from_slice(narrow[..coding.narrow()].as_flattened());
        }
        let mut at = 0;
        for plane in coding.planes().into_iter().flatten() {
            match plane.width {
                4 => pack_tile_plane::<T, V, 2>(plane, at, &blocks, steps),
                2 => pack_tile_plane::<T, V, 4>(plane, at, &blocks, steps),
                _ => pack_tile_plane::<T, V, 8>(plane, at, &blocks, steps),
            }
            at += plane.width * 64;
        }
    }
}

/// Single bits in order, of which byte `i` of the result has those whose number is `i` above a multiple of 4.
#[inline(always)]
fn every_fourth_bit(all: u32) -> [u8; 4] {
    std::array::from_fn(|i| {
        let bits = all >> i & 0x1111_1111;
        let pairs = (bits | bits >> 3) & 0x0303_0303;
        let nibbles = (pairs | pairs >> 6) & 0x000f_000f;
        (nibbles | nibbles >> 12) as u8
    })
}

/// Turns a plane of the blocks of 16 rows into that of the steps of their tile, `at` in each step. A byte has `P` slots of `8 / P` bits. What
/// 32 bytes of a run hold in one slot is a step, of `8 / P` quads, where slot `i` is of the quads after those of slot `i - 1`: so the
/// quads of the 32 bytes exchange their slots. Shorter runs are what a step is, but for single bits in order.
#[inline(always)]
fn pack_tile_plane<T: Coded, V: Bytes16, const P: usize>(
    plane: Plane,
    at: usize,
    blocks: &[&[u8]; R16_ROWS],
    steps: &mut [u8],
) {
    let (quads, plane_bytes, step_bytes) = (8 / P, T::TY.block_len() / P, step_bytes(T::TY));
    let mut put = |step: usize, quad: usize, line: [V; 4]| {
        if let Some(to) = steps[step * step_bytes + at + 64 * quad..].first_chunk_mut() {
            V::store_line(line, to);
        }
    };
    if plane.run == 0 {
        let mut line = [V::load(&[0; 16]); 4];
        for (four, blocks) in line.iter_mut().zip(blocks.as_chunks::<4>().0) {
            let mut bytes = [0; 16];
            for (to, block) in bytes.as_chunks_mut().0.iter_mut().zip(blocks) {
                *to = every_fourth_bit(block[plane.at..].first_chunk().map_or(0, |bits| u32::from_le_bytes(*bits)));
            }
            *four = V::load(&bytes);
        }
        return put(0, 0, line);
    }
    // Quads of 16 bytes of all rows, each a line.
    let quads_at = |first: usize, lines: &mut [[V; 4]; 4]| {
        for (four, blocks) in blocks.as_chunks::<4>().0.iter().enumerate() {
            let mut rows = [V::load(&[0; 16]); 4];
            for (row, block) in rows.iter_mut().zip(blocks) {
                *row = V::load(block[plane.at + first..].first_chunk().expect("whole runs"));
            }
            let quads = transpose_quads(rows);
            for (line, quad) in lines.iter_mut().zip(quads) {
                line[four] = quad;
            }
        }
    };
    let mut lines = [[[V::load(&[0; 16]); 4]; 4]; 2];
    if plane.run == 16 {
        for step in 0..T::STEPS {
            quads_at(step * 16, &mut lines[0]);
            lines[0].iter().enumerate().for_each(|(quad, line)| put(step, quad, *line));
        }
        return;
    }
    for first in (0..plane_bytes).step_by(BLOCK_LEN) {
        quads_at(first, &mut lines[0]);
        quads_at(first + 16, &mut lines[1]);
        let lines = lines.as_flattened_mut();
        for quad in 0..quads {
            for four in 0..4 {
                let mut slots = [lines[0][0]; P];
                for (slot, of_rows) in slots.iter_mut().enumerate() {
                    *of_rows = lines[slot * quads + quad][four];
                }
                exchange_slots(&mut slots);
                for (slot, of_rows) in slots.iter().enumerate() {
                    lines[slot * quads + quad][four] = *of_rows;
                }
            }
        }
        for (i, line) in lines.iter().enumerate() {
            put(plane.code(first, i / quads) / BLOCK_LEN, i % quads, *line);
        }
    }
}

/// Undoes [`pack_tiles`].
pub(crate) fn unpack_tiles(ty: WeightType, blocks: usize, tiles: &[u8], canonical: &mut [u8]) {
    let (coding, bytes) = (Coding::of(ty), ty.block_bytes());
    for (i, block) in canonical.chunks_exact_mut(bytes).enumerate() {
        let (row, b) = (i / blocks, i % blocks);
        let tile = &tiles[(row / R16_ROWS * blocks + b) * bytes * R16_ROWS..][..bytes * R16_ROWS];
        let (mut head, mut codes) = ([0; MAX_HEAD], [0; MAX_BLOCK]);
        tile_row(ty, tile, row % R16_ROWS, &mut head, &mut codes[..ty.block_len()]);
        coding.set_head(&head, block);
        coding.set_codes(&codes[..ty.block_len()], block);
    }
}

/// Head and codes of row `r` of a tile.
fn tile_row(ty: WeightType, tile: &[u8], r: usize, head: &mut [u8], codes: &mut [u8]) {
    let coding = Coding::of(ty);
    tile_head(ty, tile, r, head);
    let steps = tile[tile_head_bytes(ty)..].chunks_exact(step_bytes(ty));
    for (step, codes) in steps.zip(codes.chunks_exact_mut(BLOCK_LEN)) {
        let mut all = [0; STEP_CODES];
        read_step(&coding, step, &mut all);
        codes.iter_mut().enumerate().for_each(|(c, code)| *code = all[quad_place(r, c)]);
    }
}

/// Row `r` of a row group as floats.
pub(crate) fn tile_row_to_f32(ty: WeightType, group: &[u8], r: usize, out: &mut [f32]) {
    let tiles = group.chunks_exact(ty.block_bytes() * R16_ROWS);
    for (tile, out) in tiles.zip(out.chunks_exact_mut(ty.block_len())) {
        let (mut head, mut codes) = ([0; MAX_HEAD], [0; MAX_BLOCK]);
        tile_row(ty, tile, r, &mut head, &mut codes[..ty.block_len()]);
        weights(ty, &head, &codes[..ty.block_len()], out);
    }
}

/// Scales of a tile for each of its rows.
#[inline(always)]
fn tile_scales(ty: WeightType, tile: &[u8]) -> [[Scale; MAX_SCALES]; R16_ROWS] {
    std::array::from_fn(|r| {
        let mut head = [0; MAX_HEAD];
        tile_head(ty, tile, r, &mut head);
        scales(ty, &head)
    })
}

/// A row group of tiles as a panel.
#[inline(always)]
pub(crate) fn panel_of_tiles(layout: PanelLayout, ty: WeightType, tiles: &[u8], panel: &mut [u8]) {
    let coding = Coding::of(ty);
    let mut panel = PanelMut::zeroed(layout, PanelKind::of(ty), panel);
    let mut b = 0;
    for tile in tiles.chunks_exact(ty.block_bytes() * R16_ROWS) {
        let scales = tile_scales(ty, tile);
        let subs = BLOCK_LEN / coding.sub_len;
        for (i, step) in tile[tile_head_bytes(ty)..].chunks_exact(step_bytes(ty)).enumerate() {
            let mut codes = [0; STEP_CODES];
            read_step(&coding, step, &mut codes);
            for (r, scales) in scales.iter().enumerate() {
                (0..BLOCK_LEN).for_each(|c| panel.put(b, r, c, coding.value(codes[quad_place(r, c)])));
                for sub in 0..subs {
                    let (scale, minimum) = scales[i * subs + sub];
                    panel.put_scale(b, r, sub, scale, minimum);
                }
            }
            b += 1;
        }
    }
}

/// Canonical rows to an up region.
pub(crate) fn pack_rows(up: &UpLayout, canonical: &[u8], region: &mut [u8]) {
    with_coded!(up.ty, T => pack_rows_of::<T>(up, canonical, region));
}

/// [`pack_rows`] for a type, to be compiled for an instruction set: simple loops.
#[inline(always)]
pub(crate) fn pack_rows_of<T: Coded>(up: &UpLayout, canonical: &[u8], region: &mut [u8]) {
    let (coding, bytes, len) = (Coding::of(T::TY), T::TY.block_bytes(), T::TY.block_len());
    let (low, high) = (coding.low_bits(), coding.high_bits());
    let blocks = up.kb * BLOCK_LEN / len;
    let (heads, rows) = region.split_at_mut(up.scales_bytes);
    heads[canonical.len() / (blocks * bytes) * up.head_bytes..].fill(0);
    let heads = heads.chunks_exact_mut(up.head_bytes);
    // The codes of a row, whole pieces of 128 columns.
    let mut codes = vec![0; up.kb.next_multiple_of(4) * BLOCK_LEN];
    for ((row, heads), canonical) in
        rows.chunks_exact_mut(up.row_bytes).zip(heads).zip(canonical.chunks_exact(blocks * bytes))
    {
        for (b, (block, codes)) in canonical.chunks_exact(bytes).zip(codes.chunks_exact_mut(len)).enumerate() {
            let mut head = [0; MAX_HEAD];
            coding.head(block, &mut head);
            (0..coding.head_bytes()).for_each(|i| heads[row_head_place(&coding, blocks, b, i)] = head[i]);
            coding.codes(block, codes);
        }
        let (low_plane, rest) = row.split_at_mut(codes.len() / 8 * low);
        write_row_plane(low, 0, &codes, low_plane);
        let (high_plane, padding) = rest.split_at_mut(codes.len() / 8 * high);
        if high > 0 {
            write_row_plane(high, low, &codes, high_plane);
        }
        padding.fill(0);
    }
}

/// Undoes [`pack_rows`].
pub(crate) fn unpack_rows(up: &UpLayout, region: &[u8], canonical: &mut [u8]) {
    let (coding, bytes, len) = (Coding::of(up.ty), up.ty.block_bytes(), up.ty.block_len());
    let blocks = up.kb * BLOCK_LEN / len;
    for (i, block) in canonical.chunks_exact_mut(bytes).enumerate() {
        let (row, b) = (i / blocks, i % blocks);
        let mut codes = [0; MAX_BLOCK];
        for (s, codes) in codes[..len].as_chunks_mut::<BLOCK_LEN>().0.iter_mut().enumerate() {
            *codes = row_codes(up, region, row, b * (len / BLOCK_LEN) + s);
        }
        coding.set_head(&row_head(up, region, row, b), block);
        coding.set_codes(&codes[..len], block);
    }
}

/// Where byte `i` of the head of block `b` lies in the heads of a row.
#[inline(always)]
pub(crate) fn row_head_place(coding: &Coding, blocks: usize, b: usize, i: usize) -> usize {
    let wide = coding.wide();
    if i < 2 * wide {
        i / 2 * 2 * blocks + 2 * b + i % 2
    } else {
        2 * wide * blocks + b * coding.narrow() + i - 2 * wide
    }
}

/// The head of block `b` of a row of an up region.
#[inline(always)]
fn row_head(up: &UpLayout, region: &[u8], row: usize, b: usize) -> [u8; MAX_HEAD] {
    let coding = Coding::of(up.ty);
    let blocks = up.kb * BLOCK_LEN / up.ty.block_len();
    let heads = &region[row * up.head_bytes..][..up.head_bytes];
    let mut head = [0; MAX_HEAD];
    for (i, byte) in head[..coding.head_bytes()].iter_mut().enumerate() {
        *byte = heads[row_head_place(&coding, blocks, b, i)];
    }
    head
}

/// The scales of block `b` of a row of an up region.
pub(crate) fn row_scales(up: &UpLayout, region: &[u8], row: usize, b: usize) -> [Scale; MAX_SCALES] {
    scales(up.ty, &row_head(up, region, row, b))
}

/// Where the first 16 codes of columns `32 s..` lie in a plane of a row, and at which bit; then the last 16.
#[inline(always)]
const fn row_places(width: usize, s: usize) -> [(usize, usize); 2] {
    let bytes = 16 * width;
    let piece = s / 4 * bytes;
    let (first, last) = (s % 4 * 16, 64 + s % 4 * 16);
    [(piece + first % bytes, first / bytes * width), (piece + last % bytes, last / bytes * width)]
}

/// Undoes [`read_row_codes`] for the codes of a row, whole pieces.
#[inline(always)]
fn write_row_plane(width: usize, shift: usize, codes: &[u8], plane: &mut [u8]) {
    match width {
        4 => write_row_plane_of::<4>(shift, codes, plane),
        2 => write_row_plane_of::<2>(shift, codes, plane),
        _ => write_row_plane_of::<1>(shift, codes, plane),
    }
}

#[inline(always)]
fn write_row_plane_of<const W: usize>(shift: usize, codes: &[u8], plane: &mut [u8]) {
    const PIECE: usize = 128;
    let mask = (1u8 << W) - 1;
    for (codes, bytes) in codes.as_chunks::<PIECE>().0.iter().zip(plane.chunks_exact_mut(16 * W)) {
        // Sixteens in the order of the piece: the first halves of the four sub-blocks, then the last.
        let halves = codes.as_chunks::<16>().0;
        for (i, bytes) in bytes.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let mut all = [0u8; 16];
            for m in (0..8 / W).rev() {
                let half = W * m + i;
                for (byte, code) in all.iter_mut().zip(&halves[half % 4 * 2 + half / 4]) {
                    *byte = *byte << W | (code >> shift & mask);
                }
            }
            *bytes = all;
        }
    }
}

#[inline(always)]
fn read_row_codes(width: usize, shift: usize, s: usize, plane: &[u8], codes: &mut [u8; BLOCK_LEN]) {
    let mask = (1 << width) - 1;
    for ((at, bit), codes) in row_places(width, s).into_iter().zip(codes.as_chunks_mut::<16>().0) {
        for (code, byte) in codes.iter_mut().zip(&plane[at..at + 16]) {
            *code |= (byte >> bit & mask) << shift;
        }
    }
}

/// The codes of columns `32 s..` of a row of an up region.
#[inline(always)]
pub(crate) fn row_codes(up: &UpLayout, region: &[u8], row: usize, s: usize) -> [u8; BLOCK_LEN] {
    let coding = Coding::of(up.ty);
    let row = &region[up.scales_bytes + row * up.row_bytes..][..up.row_bytes];
    let (low, high) = row.split_at(up.kb.div_ceil(4) * 16 * coding.low_bits());
    let mut codes = [0; BLOCK_LEN];
    read_row_codes(coding.low_bits(), 0, s, low, &mut codes);
    if coding.high_bits() > 0 {
        read_row_codes(coding.high_bits(), coding.low_bits(), s, high, &mut codes);
    }
    codes
}

/// Rows `first..first + 16` of an up region as a panel.
#[inline(always)]
pub(crate) fn panel_of_rows(layout: PanelLayout, up: &UpLayout, region: &[u8], first: usize, panel: &mut [u8]) {
    let coding = Coding::of(up.ty);
    let mut panel = PanelMut::zeroed(layout, PanelKind::of(up.ty), panel);
    let (steps, subs) = (up.ty.block_len() / BLOCK_LEN, BLOCK_LEN / coding.sub_len);
    for r in 0..R16_ROWS {
        for b in 0..up.kb / steps {
            let scales = row_scales(up, region, first + r, b);
            for step in 0..steps {
                let s = b * steps + step;
                let codes = row_codes(up, region, first + r, s);
                codes.iter().enumerate().for_each(|(c, &code)| panel.put(s, r, c, coding.value(code)));
                for sub in 0..subs {
                    let (scale, minimum) = scales[step * subs + sub];
                    panel.put_scale(s, r, sub, scale, minimum);
                }
            }
        }
    }
}

/// The integers that the scales and the minima of a tile are multiplied by: for each sub-block those of 16 rows.
pub(crate) type Integers = [[i8; R16_ROWS]; MAX_SCALES];

/// Those of a tile whose heads' other bytes are `narrow`, for a type of blocks of 256. Simple loops, which compilers turn into vector
/// instructions.
#[inline(always)]
pub(crate) fn tile_integers<T: Coded>(narrow: &[[u8; R16_ROWS]; 16]) -> (Integers, Integers) {
    let mut integers = ([[0; R16_ROWS]; MAX_SCALES], [[0; R16_ROWS]; MAX_SCALES]);
    let rows = integers.0.iter_mut().zip(&mut integers.1).enumerate();
    for (sub, (scales, minima)) in rows.take(T::STEPS * T::SUBS) {
        for (r, (scale, minimum)) in scales.iter_mut().zip(minima).enumerate() {
            (*scale, *minimum) = codes::integers(T::TY, |i| narrow[i][r], sub);
        }
    }
    integers
}
