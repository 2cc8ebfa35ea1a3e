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

    /// Four rows and their hidden values at a time.
    #[inline]
    pub(crate) fn quads(&self) -> impl Iterator<Item = (&[usize], &i32)> {
        self.offsets[..self.n.next_multiple_of(4)].chunks_exact(4).zip(&self.quads)
    }

    /// Requests, by `prefetch`, a share of this group at step `i` while another is computed, a step per chunk: some of its rows,
    /// whole so that memory is read in runs, and the chunk's scales.
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

/// The groups of a down region that have live neurons, each requested from memory two groups before it is computed: while the
/// last bytes of one are waited for, those of the next are on their way.
pub(crate) struct LiveGroups<'a> {
    down: &'a DownLayout,
    /// What is left of the region, and of the hidden values.
    region: &'a [u8],
    hidden: &'a [HiddenGroup],
    /// The group to compute, the one after it, and the one to request meanwhile.
    queue: [Option<Live>; 3],
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
        let mut groups = Self { down, region, hidden, queue: [None, None, None] };
        groups.queue = [None, groups.draw(), groups.draw()];
        for first in groups.queue.iter().flatten() {
            (0..chunks.len()).for_each(|i| first.request(chunks, i, &prefetch));
        }
        groups
    }

    /// The next group to compute, and the one to request meanwhile.
    #[inline]
    pub(crate) fn advance(&mut self) -> Option<(&Live, Option<&Live>)> {
        self.queue = [self.queue[1].take(), self.queue[2].take(), self.draw()];
        let [current, _, ahead] = &self.queue;
        current.as_ref().map(|current| (current, ahead.as_ref()))
    }

    fn draw(&mut self) -> Option<Live> {
        while let Some((hidden, rest)) = self.hidden.split_first() {
            let (group, region) = self.region.split_at(self.down.group_bytes);
            (self.hidden, self.region) = (rest, region);
            if hidden.live != 0 {
                return Some(Live::new(self.down, group, hidden));
            }
        }
        None
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
