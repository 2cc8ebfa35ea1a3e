//! Rows of up four at a time, line by line: how an instruction set walks them whose sums of four rows fill a vector.

use std::cell::Cell;

use super::{LiveRows, UP_BLOCK, UpBlock};
use crate::activations::{ActRow, FEW_ROWS};
use crate::up_layout::UpLayout;

impl UpBlock {
    /// Requests, by `prefetch`, a line of four of the rows; each of the rows has four steps for 64 bytes of it.
    #[inline(always)]
    fn request(&self, step: usize, prefetch: impl Fn(*const u8)) {
        if self.len == 0 {
            return;
        }
        let (line, first) = (step / 4, step % 4 * 4);
        for (nibbles, scales) in &self.rows[first..first + 4] {
            prefetch(nibbles.wrapping_add(line * 64));
            if line == 0 {
                (0..self.scale_lines).for_each(|line| prefetch(scales.wrapping_add(line * 64)));
            }
        }
    }
}

/// A block of rows of up that is requested while the one before it is computed: line by line across the rows, as in
/// [`LiveGroup::request`], evenly over all that is computed meanwhile.
pub(crate) struct Ahead {
    block: UpBlock,
    /// Steps that are due, in parts of 2^16.
    due: Cell<usize>,
    /// What each call of [`Self::request`] adds to them.
    rate: usize,
}

impl Ahead {
    /// Requests the next lines. Called once for each line of each four rows that are computed.
    #[inline(always)]
    pub(crate) fn request(&self, prefetch: impl Fn(*const u8)) {
        let from = self.due.get();
        let to = from + self.rate;
        self.due.set(to);
        (from >> 16..to >> 16).for_each(|step| self.block.request(step, &prefetch));
    }
}

/// Runs `compute(rows, ahead, token, out)` for the rows of up that each token needs, at most [`UP_BLOCK`] at a time; `out` as
/// `Table::up_rows` has it.
#[inline(always)]
pub(crate) fn each_up_block(
    up: &UpLayout,
    region: &[u8],
    rows: LiveRows<'_>,
    acts: &[ActRow<'_>],
    out: &mut [f32],
    prefetch: impl Fn(*const u8),
    compute: impl Fn(&[u32], &Ahead, ActRow<'_>, &mut [f32]),
) {
    let n = acts.len();
    assert!(n <= FEW_ROWS && rows.masks.len() == rows.ids.len() && out.len() == rows.ids.len() * n);
    let mut blocks = rows.ids.chunks(UP_BLOCK);
    let first = UpBlock::new(up, region, blocks.next().unwrap_or_default());
    (0..4 * first.lines).for_each(|step| first.request(step, &prefetch));
    let all = rows.ids.chunks(UP_BLOCK).zip(rows.masks.chunks(UP_BLOCK)).zip(out.chunks_mut(UP_BLOCK * n));
    for ((ids, masks), out) in all {
        let block = UpBlock::new(up, region, blocks.next().unwrap_or_default());
        let ahead = |fours: usize| Ahead { block, due: Cell::new(0), rate: (4usize << 16).div_ceil(fours.max(1)) };
        if let [a] = acts {
            compute(ids, &ahead(ids.len().div_ceil(4)), *a, out);
            continue;
        }
        let mut lists = [[0; UP_BLOCK]; FEW_ROWS];
        let mut places = [[0u8; UP_BLOCK]; FEW_ROWS];
        let mut lens = [0; FEW_ROWS];
        for (i, (&id, &mask)) in ids.iter().zip(masks).enumerate() {
            for t in (0..n).filter(|t| mask >> t & 1 != 0) {
                lists[t][lens[t]] = id;
                places[t][lens[t]] = i as u8;
                lens[t] += 1;
            }
        }
        let ahead = ahead(lens.iter().map(|len| len.div_ceil(4)).sum());
        for t in (0..n).filter(|&t| lens[t] != 0) {
            let mut sums = [0f32; UP_BLOCK];
            compute(&lists[t][..lens[t]], &ahead, acts[t], &mut sums[..lens[t]]);
            for (&place, sum) in places[t][..lens[t]].iter().zip(sums) {
                out[usize::from(place) * n + t] = sum;
            }
        }
    }
}

/// Rows, `F` times four of them, the last one repeated where there are fewer.
#[inline(always)]
pub(crate) fn in_fours<const F: usize>(rows: &[u32]) -> [[usize; 4]; F] {
    std::array::from_fn(|f| std::array::from_fn(|i| rows[(f * 4 + i).min(rows.len() - 1)] as usize))
}

/// The first of `sums`, four to a vector, as many as `out` has.
#[inline(always)]
pub(crate) fn put_fours<const F: usize>(sums: [[f32; 4]; F], out: &mut [f32]) {
    out.copy_from_slice(&sums.as_flattened()[..out.len()]);
}
