//! How down matrices of the types with codes ([`codes`](crate::codes)) lie in memory, so that the run of a dead neuron is never touched:
//! permutations of their bits, for every instruction set.
//!
//! For each block of 32 or 256 neurons come first the heads of all outputs, then the run of each neuron. Outputs are taken in chunks of
//! 128. A chunk's heads lie field by field: 128 f16 scales, 128 f16 minima, then 128 bytes for each of the other bytes. A run has the low
//! plane and the high plane of all outputs. A line of 64 bytes of a plane of 4 bits is a chunk, of 2 bits two chunks, of 1 bit four:
//! the first 64 outputs of the first one have the lowest bits of the bytes, then its last 64, then those of the next. Which byte is which
//! output's [`line_byte`] says. For Q4_0 the same order is in `expert_format`.

use std::marker::PhantomData;

use crate::bytes16::{Bytes16, exchange_slots, transpose, transpose_bytes};
use crate::codes::{Coded, Coding, MAX_BLOCK, MAX_HEAD, MAX_SCALES, NO_BLOCK, Plane, Scale, scales, with_coded};
use crate::down_layout::{
    DownGroup, DownLayout, DownPlane, LINE_OUTPUTS, OUTPUT_CHUNK, down_head_place, line_bit, line_byte, line_output,
};
use crate::panel::{PanelKind, PanelLayout, PanelMut};
use crate::weight_type::{BLOCK_LEN, R16_ROWS};

/// Fills block `b` of a down region; `canonical` is the whole matrix of `n_embd` rows.
pub(crate) fn pack_block(down: &DownLayout, n_embd: usize, canonical: &[u8], b: usize, block: &mut [u8]) {
    with_coded!(down.ty, T => pack_block_of::<T, [u8; 16]>(down, n_embd, canonical, b, block));
}

/// [`pack_block`] for a type and an instruction set.
#[inline(always)]
pub(crate) fn pack_block_of<T: Coded, V: Bytes16>(
    down: &DownLayout,
    n_embd: usize,
    canonical: &[u8],
    b: usize,
    block: &mut [u8],
) {
    let (coding, bytes) = (T::CODING, T::TY.block_bytes());
    let (heads, rows) = block.split_at_mut(down.padded * down.head_bytes);
    let blocks = Blocks { canonical: &canonical[b * bytes..], stride: down.fb / T::STEPS * bytes, bytes, n_embd };
    for (chunk, heads) in heads.chunks_exact_mut(OUTPUT_CHUNK * down.head_bytes).enumerate() {
        for first in (0..OUTPUT_CHUNK).step_by(16) {
            let mut narrow = [[0; 16]; 16];
            for (i, narrow) in narrow.iter_mut().enumerate() {
                let mut head = [0; MAX_HEAD];
                coding.head(blocks.of(chunk * OUTPUT_CHUNK + first + i), &mut head);
                for wide in 0..2 * coding.wide() {
                    heads[down_head_place(coding.wide(), coding.head_bytes(), first + i, wide)] = head[wide];
                }
                narrow[..coding.narrow()].copy_from_slice(&head[2 * coding.wide()..coding.head_bytes()]);
            }
            if coding.narrow() > 0 {
                let fields = heads[2 * coding.wide() * OUTPUT_CHUNK..].chunks_exact_mut(OUTPUT_CHUNK);
                for (field, bytes) in fields.zip(transpose_bytes::<V>(&narrow)) {
                    field[first..][..16].copy_from_slice(&bytes);
                }
            }
        }
    }
    for (from, to) in coding.planes().into_iter().zip(&down.planes) {
        match from {
            Some(from) if from.width == 4 => pack_plane::<T, V, 2>(from, down, to, &blocks, rows),
            Some(from) if from.width == 2 => pack_plane::<T, V, 4>(from, down, to, &blocks, rows),
            Some(from) => pack_plane::<T, V, 8>(from, down, to, &blocks, rows),
            None => {}
        }
    }
    V::settle();
}

/// One block of each output: outputs that only fill a chunk have none.
struct Blocks<'a> {
    /// From the block of the first output on.
    canonical: &'a [u8],
    /// Bytes from an output's block to the next one's.
    stride: usize,
    /// Bytes of a block.
    bytes: usize,
    n_embd: usize,
}

impl<'a> Blocks<'a> {
    /// The block of output `o`.
    #[inline(always)]
    fn of(&self, o: usize) -> &'a [u8] {
        if o < self.n_embd { &self.canonical[o * self.stride..][..self.bytes] } else { &NO_BLOCK[..self.bytes] }
    }
}

/// Turns a plane of the blocks into that of the runs. A byte of a line has `P` slots of `8 / P` bits, each for another output of
/// 64; a byte of a block as many, each for another neuron: so 16 bytes of the blocks of `P` times 16 outputs first exchange their slots, and
/// then rows and columns.
#[inline(always)]
fn pack_plane<T: Coded, V: Bytes16, const P: usize>(
    from: Plane,
    down: &DownLayout,
    to: &DownPlane,
    blocks: &Blocks<'_>,
    rows: &mut [u8],
) {
    let plane_bytes = T::TY.block_len() / P;
    let some = plane_bytes.min(16);
    for line in 0..down.padded.div_ceil(P * LINE_OUTPUTS) {
        for byte in (0..plane_bytes).step_by(16) {
            // For each slot of a byte of a block, 16 lines, a quarter of each at a time.
            let mut lines = [[[V::load(&[0; 16]); 16]; 4]; P];
            for part in 0..4 {
                let mut squares = [[V::load(&[0; 16]); 16]; P];
                for i in 0..16 {
                    let mut slots = [V::load(&[0; 16]); P];
                    for (slot, bytes) in slots.iter_mut().enumerate() {
                        let o = (line * P + slot) * LINE_OUTPUTS + line_output(16 * part + i);
                        let block = &blocks.of(o)[from.at + byte..];
                        *bytes = match block.first_chunk() {
                            Some(all) if some == 16 => V::load(all),
                            _ => V::load(&std::array::from_fn(|i| if i < some { block[i] } else { 0 })),
                        };
                    }
                    exchange_slots(&mut slots);
                    slots.into_iter().zip(&mut squares).for_each(|(row, square)| square[i] = row);
                }
                for (square, lines) in squares.iter().zip(&mut lines) {
                    transpose(square, &mut lines[part]);
                }
            }
            for (slot, [first, second, third, fourth]) in lines.iter().enumerate() {
                for (i, (((a, b), c), d)) in first.iter().zip(second).zip(third).zip(fourth).enumerate().take(some) {
                    let run = from.code(byte + i, slot) * down.row_bytes;
                    if let Some(line) = rows[run + to.at + line * LINE_OUTPUTS..].first_chunk_mut() {
                        V::stream([*a, *b, *c, *d], line);
                    }
                }
            }
        }
    }
}

/// The code of output `o` in the run of a neuron.
#[inline(always)]
fn code(down: &DownLayout, row: &[u8], o: usize) -> u8 {
    let (chunk, half, byte) = (o / OUTPUT_CHUNK, o / LINE_OUTPUTS % 2, line_byte(o % LINE_OUTPUTS));
    let (mut code, mut shift) = (0, 0);
    for plane in down.planes.iter().filter(|plane| plane.width > 0) {
        let bits = row[plane.line(chunk) + byte] >> line_bit(plane.width, chunk, half);
        code |= (bits & ((1 << plane.width) - 1)) << shift;
        shift += plane.width;
    }
    code
}

/// The codes of an output in a group of 32 neurons.
#[inline(always)]
pub(crate) fn group_codes(down: &DownLayout, group: DownGroup<'_>, o: usize) -> [u8; BLOCK_LEN] {
    std::array::from_fn(|n| code(down, &group.rows[n * down.row_bytes..][..down.row_bytes], o))
}

/// The head of an output's block.
fn head(down: &DownLayout, heads: &[u8], o: usize) -> [u8; MAX_HEAD] {
    let (mut head, wide) = ([0; MAX_HEAD], Coding::of(down.ty).wide());
    for (i, byte) in head[..down.head_bytes].iter_mut().enumerate() {
        *byte = heads[down_head_place(wide, down.head_bytes, o, i)];
    }
    head
}

/// The scales of an output's block.
pub(crate) fn block_scales(down: &DownLayout, heads: &[u8], o: usize) -> [Scale; MAX_SCALES] {
    scales(down.ty, &head(down, heads, o))
}

/// Undoes [`pack_block`] for a whole region.
pub(crate) fn unpack(down: &DownLayout, region: &[u8], canonical: &mut [u8]) {
    let coding = Coding::of(down.ty);
    let (blocks, len) = (down.fb / down.steps, down.ty.block_len());
    for (i, block) in canonical.chunks_exact_mut(down.ty.block_bytes()).enumerate() {
        let (o, b) = (i / blocks, i % blocks);
        let mut codes = [0; MAX_BLOCK];
        for (step, codes) in codes[..len].as_chunks_mut::<BLOCK_LEN>().0.iter_mut().enumerate() {
            *codes = group_codes(down, down.group(region, b * down.steps + step), o);
        }
        coding.set_head(&head(down, down.group(region, b * down.steps).heads, o), block);
        coding.set_codes(&codes[..len], block);
    }
}

/// Chunk `chunk` of a down region as 8 panels.
#[inline(always)]
pub(crate) fn panels_of_chunk(layout: PanelLayout, down: &DownLayout, region: &[u8], chunk: usize, panels: &mut [u8]) {
    let (coding, kind) = (Coding::of(down.ty), PanelKind::of(down.ty));
    for (v, panel) in panels.chunks_exact_mut(down.fb * kind.block_bytes()).enumerate() {
        let mut panel = PanelMut::zeroed(layout, kind, panel);
        for r in 0..R16_ROWS {
            let o = chunk * OUTPUT_CHUNK + v * R16_ROWS + r;
            for b in 0..down.fb {
                let group = down.group(region, b);
                let codes = group_codes(down, group, o);
                codes.iter().enumerate().for_each(|(n, &code)| panel.put(b, r, n, coding.value(code)));
                let scales = block_scales(down, group.heads, o);
                for sub in 0..down.subs {
                    let (scale, minimum) = scales[group.step * down.subs + sub];
                    panel.put_scale(b, r, sub, scale, minimum);
                }
            }
        }
    }
}

/// Bytes for each output of a chunk.
pub(crate) type OfChunk = [i8; OUTPUT_CHUNK];

/// The integers that scales and minima of sub-block `sub` are multiplied by, for the outputs of a chunk whose heads' other bytes are
/// `narrow`, for a type of blocks of 256. Simple loops, which compilers turn into vector instructions.
#[inline(always)]
fn chunk_integers<T: Coded>(narrow: &[[u8; OUTPUT_CHUNK]], sub: usize) -> (OfChunk, OfChunk) {
    let mut integers = ([0; OUTPUT_CHUNK], [0; OUTPUT_CHUNK]);
    for (o, (scale, minimum)) in integers.0.iter_mut().zip(&mut integers.1).enumerate() {
        (*scale, *minimum) = crate::codes::integers(T::TY, |i| narrow[i][o], sub);
    }
    integers
}

/// What the scales of a sub-block are made of, for the outputs of a chunk.
pub(crate) struct ChunkScales<T: Coded> {
    /// The chunk's part of the heads.
    pub(crate) head: *const u8,
    /// What f16 scales and minima are multiplied by in blocks of 256.
    pub(crate) by: (OfChunk, OfChunk),
    _type: PhantomData<T>,
}

impl<T: Coded> ChunkScales<T> {
    /// Of sub-block `sub`.
    ///
    /// # Safety
    /// `heads` must be those of a block, and have the chunk.
    #[inline(always)]
    pub(crate) unsafe fn new(heads: *const u8, chunk: usize, sub: usize) -> Self {
        let mut by = ([0; OUTPUT_CHUNK], [0; OUTPUT_CHUNK]);
        // SAFETY: the caller's promise: the other bytes of the heads follow the f16 scales, 128 of each.
        let head = unsafe { heads.add(chunk * OUTPUT_CHUNK * T::CODING.head_bytes()) };
        if T::STEPS > 1 {
            // SAFETY: as above.
            let narrow = unsafe {
                let narrow = head.add(2 * T::CODING.wide() * OUTPUT_CHUNK).cast::<[u8; OUTPUT_CHUNK]>();
                std::slice::from_raw_parts(narrow, T::CODING.narrow())
            };
            by = chunk_integers::<T>(narrow, sub);
        }
        Self { head, by, _type: PhantomData }
    }
}
