//! Where scales and codes lie in a down region of columns, and where the code of an output lies in a neuron's run.

use crate::codes::Coding;
use crate::weight_type::{BLOCK_LEN, WeightType};

/// Outputs of `down` that are computed together: ranges of outputs start at multiples of this.
pub const OUTPUT_CHUNK: usize = 128;
/// Outputs whose codes lie side by side: half a chunk, a line of a plane.
pub(crate) const LINE_OUTPUTS: usize = OUTPUT_CHUNK / 2;

/// Some bits of the codes of a neuron's run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DownPlane {
    /// Bits of each code: 4, 2, 1, or 0 where there is no such plane.
    pub width: usize,
    /// Where in the run it starts.
    pub at: usize,
    /// Chunks that share a line of 64 bytes.
    per_line: usize,
}

impl DownPlane {
    fn new(width: usize, at: usize) -> Self {
        Self { width, at, per_line: per_line(width) }
    }

    /// Where in the run the line of chunk `chunk` starts.
    #[inline(always)]
    pub(crate) fn line(&self, chunk: usize) -> usize {
        self.at + chunk / self.per_line * 64
    }

    /// Whether chunk `chunk` is the first one of its line.
    #[inline(always)]
    pub(crate) fn begins_line(&self, chunk: usize) -> bool {
        chunk.is_multiple_of(self.per_line)
    }

    fn bytes(&self, chunks: usize) -> usize {
        if self.width == 0 { 0 } else { chunks.div_ceil(self.per_line) * 64 }
    }
}

/// Chunks that share a line of a plane of some width.
const fn per_line(width: usize) -> usize {
    match 4usize.checked_div(width) {
        Some(chunks) => chunks,
        None => 1,
    }
}

/// Where in the bytes of its line a plane of some width has half `half` of chunk `chunk`: the lowest of its bits.
#[inline(always)]
pub(crate) const fn line_bit(width: usize, chunk: usize, half: usize) -> usize {
    width * (half + 2 * (chunk % per_line(width)))
}

/// Sizes inside a down region of columns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DownLayout {
    pub ty: WeightType,
    /// Groups of 32 neurons.
    pub fb: usize,
    /// Groups that share the heads of a block.
    pub steps: usize,
    /// Parts of a group that have scales of their own: 1 or 2.
    pub subs: usize,
    /// Outputs, padding included.
    pub padded: usize,
    /// Bytes of the scales of an output's block.
    pub head_bytes: usize,
    /// Lower and upper bits of codes.
    pub planes: [DownPlane; 2],
    /// Bytes of the run of a neuron.
    pub row_bytes: usize,
    /// Bytes of the heads and the runs of a block.
    pub block_bytes: usize,
}

/// A group of 32 neurons of a down region.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DownGroup<'a> {
    /// Heads of its block, chunk by chunk.
    pub heads: &'a [u8],
    /// Its 32 runs.
    pub rows: &'a [u8],
    /// Which of the groups of its block it is.
    pub step: usize,
}

impl DownLayout {
    /// For `outputs × neurons` of Q4_0 or a type with codes; `None` where sizes overflow.
    pub(crate) fn new(ty: WeightType, outputs: usize, neurons: usize) -> Option<Self> {
        let (head_bytes, low, high, sub_len) = match ty {
            WeightType::Q4_0 => (2, 4, 0, BLOCK_LEN),
            _ => {
                let coding = Coding::of(ty);
                (coding.head_bytes(), coding.low_bits(), coding.high_bits(), coding.sub_len)
            }
        };
        let padded = outputs.checked_next_multiple_of(OUTPUT_CHUNK)?;
        let low = DownPlane::new(low, 0);
        let high = DownPlane::new(high, low.bytes(padded / OUTPUT_CHUNK));
        let row_bytes = high.at + high.bytes(padded / OUTPUT_CHUNK);
        let heads = padded.checked_mul(head_bytes)?;
        let block_bytes = row_bytes.checked_mul(ty.block_len())?.checked_add(heads)?;
        Some(Self {
            ty,
            fb: neurons / BLOCK_LEN,
            steps: ty.block_len() / BLOCK_LEN,
            subs: BLOCK_LEN / sub_len,
            padded,
            head_bytes,
            planes: [low, high],
            row_bytes,
            block_bytes,
        })
    }

    /// Bytes of a region; `None` where they overflow.
    pub(crate) fn region_bytes(&self) -> Option<usize> {
        (self.fb / self.steps).checked_mul(self.block_bytes)
    }

    /// Group `group` of a region.
    #[inline(always)]
    pub(crate) fn group<'a>(&self, region: &'a [u8], group: usize) -> DownGroup<'a> {
        let (block, step) = (group / self.steps, group % self.steps);
        let (heads, rows) =
            region[block * self.block_bytes..][..self.block_bytes].split_at(self.padded * self.head_bytes);
        let group_bytes = BLOCK_LEN * self.row_bytes;
        DownGroup { heads, rows: &rows[step * group_bytes..][..group_bytes], step }
    }
}

/// Byte of a line that holds output `o` of half a chunk. Interleaving the bytes of four runs (`unpack epi8`, then `epi16`, lane by lane)
/// gives in vector `v`, lane `i`, the codes of four neurons for output `16v + i`, in natural order for vectors of 16, 32 and 64 bytes
/// alike.
#[inline(always)]
pub(crate) const fn line_byte(o: usize) -> usize {
    let (v, l, e) = (o / 16, o / 4 % 4, o % 4);
    16 * l + 4 * v + e
}

/// The output of half a chunk whose code is in byte `byte` of a line: undoes [`line_byte`].
#[inline(always)]
pub(crate) const fn line_output(byte: usize) -> usize {
    let (l, v, e) = (byte / 16, byte / 4 % 4, byte % 4);
    16 * v + 4 * l + e
}

/// Where byte `i` of the head of output `o` lies in the heads of a block: chunk by chunk, field by field.
#[inline(always)]
pub(crate) const fn down_head_place(wide: usize, head_bytes: usize, o: usize, i: usize) -> usize {
    let (chunk, o) = (o / OUTPUT_CHUNK, o % OUTPUT_CHUNK);
    let field = if i < 2 * wide { i / 2 * 2 * OUTPUT_CHUNK + 2 * o + i % 2 } else { i * OUTPUT_CHUNK + o };
    chunk * OUTPUT_CHUNK * head_bytes + field
}
