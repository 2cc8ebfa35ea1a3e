//! How down matrices of the types with codes ([`codes`](crate::codes)) lie in memory, so that the run of a dead neuron is never touched:
//! permutations of their bits, for every instruction set.
//!
//! For each block of 32 or 256 neurons come first the heads of all outputs, then the run of each neuron. Outputs are taken in chunks of
//! 128. A chunk's heads lie field by field: 128 f16 scales, 128 f16 minima, then 128 bytes for each of the other bytes. A run has the low
//! plane and the high plane of all outputs. A line of 64 bytes of a plane of 4 bits is a chunk, of 2 bits two chunks, of 1 bit four:
//! the first 64 outputs of the first one have the lowest bits of the bytes, then its last 64, then those of the next. Which byte is which
//! output's [`line_byte`] says. For Q4_0 the same order is in `expert_format`.

use std::marker::PhantomData;

use crate::codes::{Coded, Coding, MAX_BLOCK, MAX_HEAD, MAX_SCALES, Scale, Square, scales, transpose, with_coded};
use crate::down_layout::OUTPUT_CHUNK;
use crate::down_layout::{DownGroup, DownLayout, DownPlane, LINE_OUTPUTS, down_head_place, line_bit, line_byte};
use crate::panel::{PanelKind, PanelLayout, PanelMut};
use crate::weight_type::{BLOCK_LEN, R16_ROWS};

/// Fills block `b` of a down region; `canonical` is the whole matrix of `n_embd` rows.
pub(crate) fn pack_block(down: &DownLayout, n_embd: usize, canonical: &[u8], b: usize, block: &mut [u8]) {
    with_coded!(down.ty, T => pack_block_of::<T>(down, n_embd, canonical, b, block, transpose));
}

/// [`pack_block`] for a type, to be compiled for an instruction set: simple loops, and transposing.
#[inline(always)]
pub(crate) fn pack_block_of<T: Coded>(
    down: &DownLayout,
    n_embd: usize,
    canonical: &[u8],
    b: usize,
    block: &mut [u8],
    transpose: impl Fn(&Square) -> Square,
) {
    let (coding, bytes, len) = (Coding::of(T::TY), T::TY.block_bytes(), T::TY.block_len());
    let (low, high) = (coding.low_bits(), coding.high_bits());
    let blocks = down.fb / T::STEPS;
    let (heads, rows) = block.split_at_mut(down.padded * down.head_bytes);
    // Codes of the outputs of a chunk, in the order in which lines have them.
    let mut codes = [[0u8; MAX_BLOCK]; OUTPUT_CHUNK];
    for (chunk, heads) in heads.chunks_exact_mut(OUTPUT_CHUNK * down.head_bytes).enumerate() {
        for sixteen in (0..OUTPUT_CHUNK).step_by(16) {
            let mut narrow: Square = [[0; 16]; 16];
            for (i, narrow) in narrow.iter_mut().enumerate() {
                let (at, mut head) = (sixteen + i, [0; MAX_HEAD]);
                let codes = &mut codes[at / LINE_OUTPUTS * LINE_OUTPUTS + line_byte(at % LINE_OUTPUTS)][..len];
                let o = chunk * OUTPUT_CHUNK + at;
                if o < n_embd {
                    let block = &canonical[(o * blocks + b) * bytes..][..bytes];
                    coding.head(block, &mut head);
                    coding.codes(block, codes);
                } else {
                    codes.fill(0);
                }
                for wide in 0..2 * coding.wide() {
                    heads[down_head_place(coding.wide(), coding.head_bytes(), at, wide)] = head[wide];
                }
                narrow[..coding.narrow()].copy_from_slice(&head[2 * coding.wide()..coding.head_bytes()]);
            }
            if coding.narrow() > 0 {
                let fields = heads[2 * coding.wide() * OUTPUT_CHUNK..].chunks_exact_mut(OUTPUT_CHUNK);
                for (field, bytes) in fields.zip(transpose(&narrow)) {
                    field[sixteen..][..16].copy_from_slice(&bytes);
                }
            }
        }
        for neurons in (0..len).step_by(16) {
            // The codes of 16 neurons: each one's, half by half of the chunk.
            let mut halves = [[[0u8; LINE_OUTPUTS]; 2]; 16];
            for (part, codes) in codes.as_chunks::<16>().0.iter().enumerate() {
                let mut square = [[0; 16]; 16];
                for (to, codes) in square.iter_mut().zip(codes) {
                    to.copy_from_slice(&codes[neurons..neurons + 16]);
                }
                for (halves, codes) in halves.iter_mut().zip(transpose(&square)) {
                    halves[part / 4][part % 4 * 16..][..16].copy_from_slice(&codes);
                }
            }
            for (row, halves) in rows[neurons * down.row_bytes..].chunks_exact_mut(down.row_bytes).zip(&halves) {
                write_line(low, 0, &down.planes[0], chunk, halves, row);
                if high > 0 {
                    write_line(high, low, &down.planes[1], chunk, halves, row);
                }
            }
        }
    }
}

/// Writes the bits from `shift` on of the codes of a chunk to their plane of `width` bits. Chunks come in order: the first one of a line
/// clears what the line held.
#[inline(always)]
fn write_line(
    width: usize,
    shift: usize,
    plane: &DownPlane,
    chunk: usize,
    halves: &[[u8; LINE_OUTPUTS]; 2],
    row: &mut [u8],
) {
    let (mask, bit) = ((1u8 << width) - 1, line_bit(width, chunk, 0));
    let Some(line) = row[plane.line(chunk)..].first_chunk_mut::<LINE_OUTPUTS>() else { return };
    if plane.begins_line(chunk) {
        line.fill(0);
    }
    for (byte, (first, last)) in line.iter_mut().zip(halves[0].iter().zip(&halves[1])) {
        *byte |= ((first >> shift & mask) | (last >> shift & mask) << width) << bit;
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
