//! What the live neurons of one token need of up and down, and asking for it before it is used. Computes nothing.

use std::ops::Range;

use crate::expert_format::{DownLayout, OUTPUT_CHUNK, UpLayout};
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
    /// How many rows each step requests.
    n_requested: usize,
}

impl Live {
    const NONE: Self = Self {
        scales: std::ptr::null(),
        rows: std::ptr::null(),
        d: 0.0,
        bias: 0,
        offsets: [0; 32],
        quads: [0; 8],
        n: 0,
        n_requested: 0,
    };

    fn set(&mut self, down: &DownLayout, group: &[u8], hidden: &HiddenGroup, n_chunks: usize) {
        let (scales, rows) = group.split_at(down.padded * 2);
        (self.scales, self.rows) = (scales.as_ptr(), rows.as_ptr());
        (self.d, self.bias) = (hidden.d, hidden.bias);
        let mut acts = [0i8; 32];
        let mut mask = hidden.live;
        self.n = 0;
        while mask != 0 {
            let n = mask.trailing_zeros() as usize;
            mask &= mask - 1;
            self.offsets[self.n] = n * down.row_bytes;
            acts[self.n] = hidden.q[n];
            self.n += 1;
        }
        self.n_requested = self.n.div_ceil(n_chunks.max(1));
        // What fills the last four has activation 0 and a row that is read anyway.
        let last = self.offsets[self.n.saturating_sub(1)];
        self.offsets[self.n..self.n.next_multiple_of(4)].fill(last);
        for (quad, acts) in self.quads.iter_mut().zip(acts.chunks_exact(4)) {
            *quad = i32::from_ne_bytes([acts[0] as u8, acts[1] as u8, acts[2] as u8, acts[3] as u8]);
        }
    }

    /// Four rows and their hidden values at a time.
    #[inline]
    pub(crate) fn quads(&self) -> impl Iterator<Item = (&[usize], &i32)> {
        self.offsets[..self.n.next_multiple_of(4)].chunks_exact(4).zip(&self.quads)
    }

    /// Requests, by `prefetch`, a share of this group at step `i` while another is computed, a step per chunk: some of its rows,
    /// whole so that memory is read in runs, and the chunk's scales.
    #[inline(always)]
    pub(crate) fn request(&self, chunks: &Range<usize>, i: usize, prefetch: impl Fn(*const u8)) {
        let upto = |i: usize| self.n.min(i * self.n_requested);
        for row in &self.offsets[upto(i)..upto(i + 1)] {
            for chunk in chunks.clone() {
                prefetch(self.rows.wrapping_add(row + chunk * 64));
            }
        }
        for line in 0..4 {
            prefetch(self.scales.wrapping_add((chunks.start + i) * OUTPUT_CHUNK * 2 + line * 64));
        }
    }
}

/// The groups of a down region that have live neurons, each requested from memory two groups before it is computed: while the
/// last bytes of one are waited for, those of the next are on their way.
pub(crate) struct LiveGroups<'a> {
    down: &'a DownLayout,
    /// What is left of the region, and of the hidden values.
    region: &'a [u8],
    hidden: &'a [HiddenGroup],
    /// The last three that were drawn, in turn: the one to compute, the one after it, and the one to request meanwhile.
    drawn: [Live; 3],
    n_drawn: usize,
    n_computed: usize,
    n_chunks: usize,
}

impl<'a> LiveGroups<'a> {
    /// Requests the first two groups, as far as outputs of `chunks` need them, by `prefetch`.
    #[inline(always)]
    pub(crate) fn new(
        down: &'a DownLayout,
        region: &'a [u8],
        hidden: &'a [HiddenGroup],
        chunks: &Range<usize>,
        prefetch: impl Fn(*const u8),
    ) -> Self {
        let n_chunks = chunks.len();
        let drawn = [Live::NONE; 3];
        let mut groups = Self { down, region, hidden, drawn, n_drawn: 0, n_computed: 0, n_chunks };
        groups.draw();
        groups.draw();
        for first in &groups.drawn[..groups.n_drawn] {
            (0..n_chunks).for_each(|i| first.request(chunks, i, &prefetch));
        }
        groups
    }

    /// The next group to compute, and the one to request meanwhile.
    #[inline]
    pub(crate) fn advance(&mut self) -> Option<(&Live, Option<&Live>)> {
        self.draw();
        let at = self.n_computed;
        if at == self.n_drawn {
            return None;
        }
        self.n_computed += 1;
        Some((&self.drawn[at % 3], (at + 2 < self.n_drawn).then(|| &self.drawn[(at + 2) % 3])))
    }

    fn draw(&mut self) {
        while let Some((hidden, rest)) = self.hidden.split_first() {
            let (group, region) = self.region.split_at(self.down.group_bytes);
            (self.hidden, self.region) = (rest, region);
            if hidden.live != 0 {
                self.drawn[self.n_drawn % 3].set(self.down, group, hidden, self.n_chunks);
                self.n_drawn += 1;
                return;
            }
        }
    }
}

/// Requests `rows` of up, nibbles and scales, by `prefetch`.
#[inline(always)]
pub(crate) fn request_up(up: &UpLayout, region: &[u8], rows: &[u32], prefetch: impl Fn(*const u8)) {
    let (scales, nibbles) = region.split_at(up.scales_bytes);
    for &row in rows {
        let nibbles = nibbles.as_ptr().wrapping_add(row as usize * up.row_bytes);
        (0..up.kb.div_ceil(4)).for_each(|line| prefetch(nibbles.wrapping_add(line * 64)));
        request_up_scales(up, scales, row as usize, &prefetch);
    }
}

/// Requests the scales of `row` of up, by `prefetch`; `scales` are those of all rows.
#[inline(always)]
pub(crate) fn request_up_scales(up: &UpLayout, scales: &[u8], row: usize, prefetch: impl Fn(*const u8)) {
    let scales = scales.as_ptr().wrapping_add(row * up.kb * 2);
    (0..up.kb.div_ceil(32) + 1).for_each(|line| prefetch(scales.wrapping_add(line * 64)));
}
