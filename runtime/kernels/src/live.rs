//! Which neurons of a group `down` has to read.

use std::ops::Range;

use crate::expert_format::{DownLayout, OUTPUT_CHUNK};
use crate::experts::HiddenGroup;

/// The live neurons of a group of 32, in fours.
pub(crate) struct Live {
    /// The group's f16 scales, one per output.
    pub scales: *const u8,
    /// The group's 32 rows of nibbles.
    pub rows: *const u8,
    /// Scale of the hidden values.
    pub d: f32,
    /// -8 times their sum.
    pub bias: i32,
    /// Where the rows of the live neurons start, relative to `rows`.
    offsets: [usize; 32],
    /// Four hidden values each.
    quads: [i32; 8],
    n: usize,
}

impl Live {
    fn new(down: &DownLayout, group: &[u8], hidden: &HiddenGroup) -> Self {
        let (scales, rows) = group.split_at(down.padded * 2);
        let mut live = Self {
            scales: scales.as_ptr(),
            rows: rows.as_ptr(),
            d: hidden.d,
            bias: hidden.bias,
            offsets: [0; 32],
            quads: [0; 8],
            n: 0,
        };
        let mut acts = [0i8; 32];
        let mut mask = hidden.live;
        while mask != 0 {
            let n = mask.trailing_zeros() as usize;
            mask &= mask - 1;
            live.offsets[live.n] = n * down.row_bytes;
            acts[live.n] = hidden.q[n];
            live.n += 1;
        }
        // What fills the last four has activation 0 and a row that is read anyway.
        let last = live.offsets[live.n.saturating_sub(1)];
        live.offsets[live.n..live.n.next_multiple_of(4)].fill(last);
        for (quad, acts) in live.quads.iter_mut().zip(acts.chunks_exact(4)) {
            *quad = i32::from_ne_bytes([acts[0] as u8, acts[1] as u8, acts[2] as u8, acts[3] as u8]);
        }
        live
    }

    /// The groups of a down region that have live neurons.
    pub(crate) fn groups(down: &DownLayout, region: &[u8], hidden: &[HiddenGroup]) -> impl Iterator<Item = Live> {
        let groups = region.chunks_exact(down.group_bytes).zip(hidden).filter(|(_, hidden)| hidden.live != 0);
        groups.map(|(group, hidden)| Live::new(down, group, hidden))
    }

    /// Four rows and their hidden values at a time.
    #[inline]
    pub(crate) fn quads(&self) -> impl Iterator<Item = (&[usize], &i32)> {
        self.offsets[..self.n.next_multiple_of(4)].chunks_exact(4).zip(&self.quads)
    }

    /// Requests, by `prefetch`, a share of this group at step `i` while the one before it is computed, a step per chunk: some of its
    /// rows, whole so that memory is read in runs, and the chunk's scales.
    #[inline(always)]
    pub(crate) fn request(&self, chunks: &Range<usize>, i: usize, prefetch: impl Fn(*const u8)) {
        let n = chunks.len();
        for row in &self.offsets[self.n * i / n..self.n * (i + 1) / n] {
            for chunk in chunks.clone() {
                prefetch(self.rows.wrapping_add(row + chunk * 64));
            }
        }
        for line in 0..4 {
            prefetch(self.scales.wrapping_add((chunks.start + i) * OUTPUT_CHUNK * 2 + line * 64));
        }
    }
}
