//! What the kernels of every instruction set share: the order in which weights are walked, and asking memory for them before they are
//! used. Computes nothing; the instruction sets bring closures that do.
//!
//! Several tokens (1..=FEW_ROWS) go through a matrix together: what any of them needs comes from memory once, then each is computed as it
//! would be alone, from cache.

use std::ops::Range;

use crate::activations::{ActRow, FEW_ROWS, HiddenGroup, Sums};
use crate::down_layout::OUTPUT_CHUNK;
use crate::down_layout::{DownGroup, DownLayout};
use crate::r16::R16_ROWS;
use crate::up_layout::UpLayout;

#[cfg(target_arch = "aarch64")]
pub(crate) mod fours;

/// Runs `gemv(group of tiles, token, its 16 outputs)` for every 16 rows of `tiles` and every token.
#[inline(always)]
pub(crate) fn each_row_group(
    group_bytes: usize,
    tiles: &[u8],
    acts: &[ActRow<'_>],
    out: &mut [&mut [f32]],
    gemv: impl Fn(&[u8], ActRow<'_>, &mut [f32]),
) {
    for (i, group) in tiles.chunks_exact(group_bytes).enumerate() {
        for (a, out) in acts.iter().zip(out.iter_mut()) {
            gemv(group, *a, &mut out[i * R16_ROWS..][..R16_ROWS]);
        }
    }
}

/// Runs `row(id, token, its output)` for each row and each token that it lives for, as `Table::up_rows` has them.
#[inline(always)]
pub(crate) fn each_live_row(
    rows: LiveRows<'_>,
    acts: &[ActRow<'_>],
    out: &mut [f32],
    row: impl Fn(usize, ActRow<'_>, &mut f32),
) {
    for ((&id, mask), out) in rows.ids.iter().zip(rows.masks).zip(out.chunks_exact_mut(acts.len())) {
        for (_, (a, out)) in acts.iter().zip(out).enumerate().filter(|(t, _)| mask >> t & 1 != 0) {
            row(id as usize, *a, out);
        }
    }
}

/// Where the rows of the live neurons of a group of 32 start.
#[derive(Clone, Copy)]
struct Offsets {
    at: [u32; 32],
    n: usize,
}

impl Offsets {
    const NONE: Self = Self { at: [0; 32], n: 0 };

    #[inline]
    fn set(&mut self, mut mask: u32, row_bytes: usize) {
        self.n = 0;
        while mask != 0 {
            self.at[self.n] = mask.trailing_zeros() * row_bytes as u32;
            mask &= mask - 1;
            self.n += 1;
        }
    }
}

/// The live neurons of a group of 32 for one token, in fours.
#[derive(Clone, Copy)]
pub(crate) struct LiveToken {
    /// Scale of the hidden values.
    pub d: f32,
    /// Their sums.
    pub sums: Sums,
    offsets: Offsets,
    /// Rows and hidden values of four neurons each: those of the first part of the group that has scales of its own, then the others.
    fours: [([u32; 4], i32); 8],
    /// Where the fours of each part end.
    ends: [usize; 2],
}

impl LiveToken {
    const NONE: Self = Self { d: 0.0, sums: [0; 2], offsets: Offsets::NONE, fours: [([0; 4], 0); 8], ends: [0; 2] };

    fn set(&mut self, down: &DownLayout, hidden: &HiddenGroup) {
        (self.d, self.sums) = (hidden.d, hidden.sums);
        self.offsets.set(hidden.live, down.row_bytes);
        let mut n = 0;
        for (part, end) in self.ends.iter_mut().enumerate().take(down.subs) {
            let mut mask = if down.subs == 1 { hidden.live } else { hidden.live & 0xffff << (16 * part) };
            while mask != 0 {
                // What fills the last four has activation 0 and a row that is read anyway.
                let mut neuron = mask.trailing_zeros();
                let (mut rows, mut acts) = ([0; 4], [0; 4]);
                for (row, act) in rows.iter_mut().zip(&mut acts) {
                    if mask != 0 {
                        neuron = mask.trailing_zeros();
                        *act = hidden.q[neuron as usize] as u8;
                        mask &= mask - 1;
                    }
                    *row = neuron * down.row_bytes as u32;
                }
                self.fours[n] = (rows, i32::from_ne_bytes(acts));
                n += 1;
            }
            *end = n;
        }
    }

    /// Four rows and their hidden values at a time, of the part of the group that has the scales `sub`.
    #[inline]
    pub(crate) fn fours(&self, sub: usize) -> &[([u32; 4], i32)] {
        let start = if sub == 0 { 0 } else { self.ends[sub - 1] };
        &self.fours[start..self.ends[sub]]
    }

    /// Sum of the hidden values of the part that has the scales `sub` of `subs`.
    #[inline]
    pub(crate) fn sum(&self, sub: usize, subs: usize) -> i32 {
        let [first, last] = self.sums.map(i32::from);
        if subs == 1 { first + last } else { [first, last][sub] }
    }
}

/// A group of 32 neurons of down that some of the tokens need.
struct LiveGroup<const N: usize> {
    /// Where it lies.
    place: LivePlace,
    /// Whether it is the first one of its block that anybody needs, and requests the heads.
    is_first: bool,
    /// The rows that any token needs, where there are several.
    union: Offsets,
    tokens: [LiveToken; N],
}

/// Where a group of 32 neurons of down lies: [`DownGroup`] without its lengths.
#[derive(Clone, Copy)]
pub(crate) struct LivePlace {
    /// The heads of its block.
    pub heads: *const u8,
    /// Its 32 runs.
    pub rows: *const u8,
    /// Which of the groups of its block it is.
    pub step: usize,
}

impl<const N: usize> LiveGroup<N> {
    const NONE: Self = Self {
        place: LivePlace { heads: std::ptr::null(), rows: std::ptr::null(), step: 0 },
        is_first: false,
        union: Offsets::NONE,
        tokens: [LiveToken::NONE; N],
    };

    fn set<'a>(&mut self, down: &DownLayout, group: DownGroup<'_>, hidden: impl Iterator<Item = &'a HiddenGroup>) {
        self.place = LivePlace { heads: group.heads.as_ptr(), rows: group.rows.as_ptr(), step: group.step };
        let mut union = 0;
        for (token, hidden) in self.tokens.iter_mut().zip(hidden) {
            token.set(down, hidden);
            union |= hidden.live;
        }
        if N > 1 {
            self.union.set(union, down.row_bytes);
        }
    }

    /// Requests, by `prefetch`, what chunk `chunk` needs of this group, while another group's is computed; `is_start` where the one before
    /// it is not asked for. Line by line across the rows is faster than row by row: 1.1 to 1.3 x on Zen 4.
    #[inline(always)]
    fn request(&self, down: &DownLayout, chunk: usize, is_start: bool, prefetch: impl Fn(*const u8)) {
        let needed = if N > 1 { &self.union } else { &self.tokens[0].offsets };
        for plane in down.planes.iter().filter(|plane| plane.width > 0 && (is_start || plane.begins_line(chunk))) {
            let line = plane.line(chunk);
            for row in &needed.at[..needed.n] {
                prefetch(self.place.rows.wrapping_add(*row as usize + line));
            }
        }
        if self.is_first {
            for line in 0..2 * down.head_bytes {
                prefetch(self.place.heads.wrapping_add(chunk * OUTPUT_CHUNK * down.head_bytes + line * 64));
            }
        }
    }
}

/// The groups of a down region that have live neurons, each requested from memory two groups before it is computed: while the
/// last bytes of one are waited for, those of the next are on their way.
struct LiveGroups<'a, const N: usize> {
    down: &'a DownLayout,
    region: &'a [u8],
    /// Hidden values of all tokens, `fb` groups each.
    hidden: &'a [HiddenGroup],
    /// The group to look at.
    next: usize,
    /// The block that the last group that was drawn is of.
    block: Option<usize>,
    /// The last three that were drawn, in turn: the one to compute, the one after it, and the one to request meanwhile.
    drawn: [LiveGroup<N>; 3],
    n_drawn: usize,
    n_computed: usize,
}

impl<'a, const N: usize> LiveGroups<'a, N> {
    /// Requests the first two groups, as far as outputs of `chunks` need them, by `prefetch`.
    #[inline(always)]
    fn new(
        down: &'a DownLayout,
        region: &'a [u8],
        hidden: &'a [HiddenGroup],
        chunks: &Range<usize>,
        prefetch: impl Fn(*const u8),
    ) -> Self {
        let drawn = [LiveGroup::NONE; 3];
        let mut groups = Self { down, region, hidden, next: 0, block: None, drawn, n_drawn: 0, n_computed: 0 };
        groups.draw();
        groups.draw();
        for first in &groups.drawn[..groups.n_drawn] {
            chunks.clone().for_each(|chunk| first.request(down, chunk, chunk == chunks.start, &prefetch));
        }
        groups
    }

    /// The next group to compute, and the one to request meanwhile.
    #[inline]
    fn advance(&mut self) -> Option<(&LiveGroup<N>, Option<&LiveGroup<N>>)> {
        self.draw();
        let at = self.n_computed;
        if at == self.n_drawn {
            return None;
        }
        self.n_computed += 1;
        Some((&self.drawn[at % 3], (at + 2 < self.n_drawn).then(|| &self.drawn[(at + 2) % 3])))
    }

    fn draw(&mut self) {
        while self.next < self.down.fb {
            let at = self.next;
            let hidden = self.hidden[at..].iter().step_by(self.down.fb);
            self.next += 1;
            if hidden.clone().any(|hidden| hidden.live != 0) {
                let block = Some(at / self.down.steps);
                let group = &mut self.drawn[self.n_drawn % 3];
                group.set(self.down, self.down.group(self.region, at), hidden);
                group.is_first = self.block != block;
                self.block = block;
                self.n_drawn += 1;
                return;
            }
        }
    }
}

/// Runs `compute(group, token, chunk, 128 sums so far)` for every group that has live neurons, every chunk of outputs and every token that
/// the group lives for.
#[inline(always)]
pub(crate) fn each_down_chunk(
    down: &DownLayout,
    region: &[u8],
    hidden: &[HiddenGroup],
    chunks: Range<usize>,
    out: &mut [&mut [f32]],
    prefetch: impl Fn(*const u8),
    compute: impl Fn(LivePlace, &LiveToken, usize, &mut [f32; OUTPUT_CHUNK]),
) {
    match out.len() {
        1 => down_chunks_of::<1>(down, region, hidden, chunks, out, prefetch, compute),
        _ => down_chunks_of::<FEW_ROWS>(down, region, hidden, chunks, out, prefetch, compute),
    }
}

/// [`each_down_chunk`] for up to `N` tokens.
#[inline(always)]
fn down_chunks_of<const N: usize>(
    down: &DownLayout,
    region: &[u8],
    hidden: &[HiddenGroup],
    chunks: Range<usize>,
    out: &mut [&mut [f32]],
    prefetch: impl Fn(*const u8),
    compute: impl Fn(LivePlace, &LiveToken, usize, &mut [f32; OUTPUT_CHUNK]),
) {
    assert!(chunks.end * OUTPUT_CHUNK <= down.padded && hidden.len() == out.len() * down.fb && out.len() <= N);
    assert!(down.region_bytes() == Some(region.len()));
    for out in out.iter_mut() {
        assert_eq!(out.len(), chunks.len() * OUTPUT_CHUNK);
        out.fill(0.0);
    }
    let mut groups = LiveGroups::<N>::new(down, region, hidden, &chunks, &prefetch);
    while let Some((group, ahead)) = groups.advance() {
        for (i, chunk) in chunks.clone().enumerate() {
            if let Some(ahead) = ahead {
                ahead.request(down, chunk, i == 0, &prefetch);
            }
            for (token, out) in group.tokens.iter().zip(out.iter_mut()) {
                if token.offsets.n != 0 {
                    compute(group.place, token, chunk, &mut out.as_chunks_mut().0[i]);
                }
            }
        }
    }
}

/// Rows of up that are on their way from memory while as many are computed.
pub(crate) const UP_BLOCK: usize = 16;

/// Rows of up that some of the tokens need.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LiveRows<'a> {
    pub ids: &'a [u32],
    /// Bit `t` for each of them: token `t` needs it.
    pub masks: &'a [u8],
}

/// A block of rows of up.
pub(crate) struct UpBlock {
    /// Nibbles and scales of each row; the last row's where there are fewer.
    pub rows: [(*const u8, *const u8); UP_BLOCK],
    /// How many rows there are.
    pub len: usize,
    /// Cache lines of a row's scales.
    scale_lines: usize,
    /// Cache lines of a row's nibbles.
    lines: usize,
}

impl UpBlock {
    /// The rows `rows` (at most UP_BLOCK) of a region.
    #[inline(always)]
    pub(crate) fn new(up: &UpLayout, region: &[u8], rows: &[u32]) -> Self {
        let (scales, nibbles) = region.split_at(up.scales_bytes);
        let rows_at = |i: usize| {
            let row = rows.get(i).or(rows.last()).map_or(0, |&row| row as usize);
            (nibbles.as_ptr().wrapping_add(row * up.row_bytes), scales.as_ptr().wrapping_add(row * up.head_bytes))
        };
        Self {
            rows: std::array::from_fn(rows_at),
            len: rows.len(),
            scale_lines: up.head_bytes.div_ceil(64) + 1,
            lines: up.row_bytes.div_ceil(64),
        }
    }

    /// Requests, by `prefetch`, line `line` of each of the rows.
    #[inline(always)]
    pub(crate) fn request_line(&self, line: usize, prefetch: impl Fn(*const u8)) {
        if self.len == 0 {
            return;
        }
        for (nibbles, scales) in &self.rows {
            prefetch(nibbles.wrapping_add(line * 64));
            if line < self.scale_lines {
                prefetch(scales.wrapping_add(line * 64));
            }
        }
    }
}

/// The next 16 of `places`, or as many as are left, and the rows of up that those name. A function of its own: inlined into a kernel it would
/// leave the kernel's loop fewer registers and twice as many instructions.
#[inline(never)]
fn next_rows(
    up: &UpLayout,
    region: &[u8],
    ids: &[u32],
    places: &mut impl Iterator<Item = usize>,
) -> ([usize; UP_BLOCK], UpBlock) {
    let (mut at, mut of_block, mut len) = ([0; UP_BLOCK], [0; UP_BLOCK], 0);
    for place in places.take(UP_BLOCK) {
        (at[len], of_block[len]) = (place, ids[place]);
        len += 1;
    }
    (at, UpBlock::new(up, region, &of_block[..len]))
}

/// Runs `compute(block, the one to request meanwhile, token, 16 sums)` for the rows of up that each token needs, [`UP_BLOCK`] at a time or
/// as many as are left; `out` as `Table::up_rows` has it. `compute` requests each line of the next block when it takes that line of its
/// own, as in [`LiveGroup::request`]. Tokens go one after the other: where neurons live independently, sharing rows costs more products
/// than it saves unpacking, and what two of them need is in the cache when the second one comes.
#[inline(always)]
pub(crate) fn each_tokens_block(
    up: &UpLayout,
    region: &[u8],
    rows: LiveRows<'_>,
    acts: &[ActRow<'_>],
    out: &mut [f32],
    prefetch: impl Fn(*const u8),
    compute: impl Fn(&UpBlock, &UpBlock, ActRow<'_>, &mut [f32; UP_BLOCK]),
) {
    let n = acts.len();
    assert!(n <= FEW_ROWS && rows.masks.len() == rows.ids.len() && out.len() == rows.ids.len() * n);
    if let Some(&last) = rows.ids.iter().max() {
        // Checked once for all rows.
        let last = last as usize + 1;
        assert!(last * up.head_bytes <= up.scales_bytes && up.scales_bytes + last * up.row_bytes <= region.len());
    }
    for (t, a) in acts.iter().enumerate() {
        let mut places = (0..rows.ids.len()).filter(|&i| rows.masks[i] >> t & 1 != 0);
        let mut draw = || next_rows(up, region, rows.ids, &mut places);
        let (mut at, mut block) = draw();
        (0..block.lines).for_each(|line| block.request_line(line, &prefetch));
        while block.len > 0 {
            let (next, ahead) = draw();
            let mut sums = [0.0; UP_BLOCK];
            compute(&block, &ahead, *a, &mut sums);
            for (&place, sum) in at[..block.len].iter().zip(sums) {
                out[place * n + t] = sum;
            }
            (at, block) = (next, ahead);
        }
    }
}
