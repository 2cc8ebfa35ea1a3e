//! One expert for a few tokens: only what lives for some of them is read, and once.

use super::ExpertInput;
use crate::activations::{ActRow, FEW_ROWS, Few, HiddenGroup, padded_blocks};
use crate::dispatch::Kernels;
use crate::down_layout::OUTPUT_CHUNK;
use crate::expert_format::{Arrangement, ExpertFormat, Matrix, MatrixFormat};
use crate::live::LiveRows;
use crate::out::ColumnsMut;
use crate::r16::{R16_ROWS, group_bytes};
use crate::scratch::{with_bytes, with_floats, with_sums};
use crate::weight_type::BLOCK_LEN;
use crate::weight_type::WeightType;

/// Neuron groups whose live rows of up make one list; with more than four tokens, as many as fit.
const GROUPS_AT_ONCE: usize = 32;

impl Kernels {
    /// Gates of one expert for the rows `rows` of the input (at most [`FEW_ROWS`]), one row of `out` for each: the columns of `out` are
    /// neurons (`rows × n_ff` in all). Each row of gate is read once. A row's bits are those it has alone.
    ///
    /// # Panics
    /// If the region, the input or `out` has the wrong size, or the columns are not whole groups of 16.
    pub fn expert_gate_rows(
        self,
        format: &ExpertFormat,
        gate: &[u8],
        input: ExpertInput<'_>,
        rows: &[u32],
        out: &mut ColumnsMut<'_>,
    ) {
        let neurons = out.columns();
        format.check_region(Matrix::Gate, gate.len());
        assert!(neurons.end <= format.n_ff(), "expert_gate: neuron {}", neurons.end);
        assert!(
            neurons.start.is_multiple_of(R16_ROWS)
                && (neurons.end.is_multiple_of(R16_ROWS) || neurons.end == format.n_ff()),
            "expert_gate: neurons {neurons:?} are not whole groups"
        );
        assert_eq!(out.rows(), rows.len(), "expert_gate: output rows");
        let MatrixFormat { ty, arrangement } = format.matrix(Matrix::Gate);
        match arrangement {
            Arrangement::Tiles => {
                let kb = format.n_embd() / BLOCK_LEN;
                let group = group_bytes(ty, kb);
                // n_ff is a multiple of 32, so these are whole row groups.
                let tiles = &gate[neurons.start / R16_ROWS * group..neurons.end / R16_ROWS * group];
                let acts = few_rows(format, input, rows);
                self.gemv(ty, kb, tiles, acts.as_slice(), out);
            }
            _ => {
                for start in neurons.clone().step_by(R16_ROWS) {
                    let n = R16_ROWS.min(neurons.end - start);
                    let ids: [u32; R16_ROWS] = std::array::from_fn(|i| (start + i) as u32);
                    for (&row, out) in rows.iter().zip(out.rows_mut()) {
                        let out = &mut out[start - neurons.start..][..n];
                        self.canonical_rows(format, ty, gate, &ids[..n], input, row as usize, out);
                    }
                }
            }
        }
    }

    /// Hidden values of one expert for the rows `rows` of the input (at most [`FEW_ROWS`]), one row of `out` for each: the columns of
    /// `out` are groups of 32 neurons. `gates` are those of all neurons and rows ([`Self::expert_gate_rows`], `rows × n_ff`). Only the
    /// rows of up are read that have a positive gate in some row of the input, each once. A row's bits are those it has alone.
    ///
    /// # Panics
    /// If a region, the gates, the input or `out` has the wrong size.
    pub fn expert_hidden_rows(
        self,
        format: &ExpertFormat,
        up: &[u8],
        gates: &[f32],
        input: ExpertInput<'_>,
        rows: &[u32],
        out: &mut ColumnsMut<'_, HiddenGroup>,
    ) {
        let (groups, n, n_ff) = (out.columns(), rows.len(), format.n_ff());
        format.check_region(Matrix::Up, up.len());
        assert!(groups.end <= HiddenGroup::groups(n_ff), "expert_hidden: group {}", groups.end);
        assert!(out.rows() == n && n <= FEW_ROWS, "expert_hidden: {n} rows");
        assert_eq!(gates.len(), n * n_ff, "expert_hidden: gates");
        if n == 0 {
            return;
        }
        let MatrixFormat { ty, arrangement } = format.matrix(Matrix::Up);
        let acts = ty.is_quantized().then(|| few_rows(format, input, rows));
        let acts = acts.as_ref().map_or(&[][..], |acts| acts.as_slice());
        const NEURONS: usize = GROUPS_AT_ONCE * BLOCK_LEN;
        let (mut ids, mut masks, mut ups) = ([0u32; NEURONS], [0u8; NEURONS], [0f32; 4 * NEURONS]);
        let at_once = (4 * GROUPS_AT_ONCE / n).min(GROUPS_AT_ONCE);
        for start in groups.clone().step_by(at_once) {
            let end = groups.end.min(start + at_once);
            let neurons = start * BLOCK_LEN..n_ff.min(end * BLOCK_LEN);
            masks[..neurons.len()].fill(0);
            for (t, gates) in gates.chunks_exact(n_ff).enumerate() {
                for (mask, &gate) in masks.iter_mut().zip(&gates[neurons.clone()]) {
                    *mask |= u8::from(gate > 0.0) << t;
                }
            }
            // Those that live for somebody move to the front.
            let mut live = 0;
            for (i, neuron) in neurons.clone().enumerate() {
                (ids[live], masks[live]) = (neuron as u32, masks[i]);
                live += usize::from(masks[live] != 0);
            }
            let live = LiveRows { ids: &ids[..live], masks: &masks[..live] };
            let ups = &mut ups[..live.ids.len() * n];
            match arrangement {
                // SAFETY: the table is of this CPU; the rows exist, the activations have n_embd values, one output per row and token.
                Arrangement::Rows => unsafe { (self.table.up_rows)(&format.up(), up, live, acts, ups) },
                _ => self.canonical_live_rows(format, ty, up, live, input, rows, ups),
            }
            for (t, out) in out.rows_mut().enumerate() {
                let out = &mut out[start - groups.start..end - groups.start];
                out.fill(HiddenGroup::ZERO);
                for (i, (&id, &mask)) in live.ids.iter().zip(live.masks).enumerate() {
                    let at = id as usize - neurons.start;
                    if mask >> t & 1 != 0 {
                        let group = &mut out[at / BLOCK_LEN];
                        group.active |= 1 << (at % BLOCK_LEN);
                        group.h[at % BLOCK_LEN] = gates[t * n_ff + id as usize] * ups[i * n + t];
                    }
                }
                out.iter_mut().for_each(|group| self.finish_group(format, group));
            }
        }
    }

    /// Quantizes the hidden values of a group where the type of down asks for it, and notes which of them matter.
    fn finish_group(self, format: &ExpertFormat, group: &mut HiddenGroup) {
        if group.active == 0 || !format.type_of(Matrix::Down).is_quantized() {
            group.live = group.active;
            return;
        }
        let (d, sums) = (std::slice::from_mut(&mut group.d), std::slice::from_mut(&mut group.sums));
        // SAFETY: the table is of this CPU; one block.
        unsafe { (self.table.quantize_q8)(&group.h, &mut group.q, d, sums) };
        for (i, &q) in group.q.iter().enumerate() {
            group.live |= u32::from(q != 0) << i;
        }
    }

    /// [`Self::canonical_rows`] for each row of the input and the rows that live for it, as `Table::up_rows` has them.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn canonical_live_rows(
        self,
        format: &ExpertFormat,
        ty: WeightType,
        region: &[u8],
        live: LiveRows<'_>,
        input: ExpertInput<'_>,
        rows: &[u32],
        out: &mut [f32],
    ) {
        let n = rows.len();
        let parts = live.ids.chunks(R16_ROWS).zip(live.masks.chunks(R16_ROWS)).zip(out.chunks_mut(R16_ROWS * n));
        for ((ids, masks), out) in parts {
            for (t, &row) in rows.iter().enumerate() {
                let (mut list, mut places, mut len) = ([0; R16_ROWS], [0; R16_ROWS], 0);
                for (i, (&id, &mask)) in ids.iter().zip(masks).enumerate() {
                    (list[len], places[len]) = (id, i);
                    len += usize::from(mask >> t & 1 != 0);
                }
                let mut sums = [0f32; R16_ROWS];
                self.canonical_rows(format, ty, region, &list[..len], input, row as usize, &mut sums[..len]);
                for (&place, sum) in places[..len].iter().zip(sums) {
                    out[place * n + t] = sum;
                }
            }
        }
    }

    /// Products of some rows of a region that is a canonical matrix of type `ty` (gate or up) with row `row` of the input.
    #[allow(clippy::too_many_arguments)]
    fn canonical_rows(
        self,
        format: &ExpertFormat,
        ty: WeightType,
        region: &[u8],
        rows: &[u32],
        input: ExpertInput<'_>,
        row: usize,
        out: &mut [f32],
    ) {
        let n_embd = format.n_embd();
        if ty.is_quantized() {
            let kb = n_embd / BLOCK_LEN;
            let acts = few_rows(format, input, &[row as u32]);
            // SAFETY: the table is of this CPU; the region has these rows, and there is an output for each.
            return unsafe { (self.table.q8_rows)(kb, region, rows, acts.as_slice()[0], out) };
        }
        let x = &input.floats[row * n_embd..(row + 1) * n_embd];
        let row_bytes = n_embd * ty.block_bytes();
        for (&row, out) in rows.iter().zip(out) {
            let weights = &region[row as usize * row_bytes..(row as usize + 1) * row_bytes];
            // SAFETY: the table is of this CPU; one row of n_embd values.
            unsafe { (self.table.dots)(ty, weights, x, std::slice::from_mut(out)) };
        }
    }

    /// Outputs of one expert for a few tokens (at most [`FEW_ROWS`], one row of `out` for each) from their hidden values (`rows × groups`,
    /// [`Self::expert_hidden_rows`]): the columns of `out` are outputs (`rows × n_embd` in all). Only the neurons are read that
    /// live in some row, each once, but of Q8_0 and floats all. A row's bits are those it has alone.
    ///
    /// # Panics
    /// If a size is wrong, or the columns do not start at a multiple of [`OUTPUT_CHUNK`] and end at one or at `n_embd`.
    pub fn expert_down_rows(
        self,
        format: &ExpertFormat,
        down: &[u8],
        hidden: &[HiddenGroup],
        out: &mut ColumnsMut<'_>,
    ) {
        format.check_region(Matrix::Down, down.len());
        let (n_embd, n_ff) = (format.n_embd(), format.n_ff());
        let (outputs, n, groups) = (out.columns(), out.rows(), HiddenGroup::groups(n_ff));
        assert!(hidden.len() == n * groups && n <= FEW_ROWS, "expert_down: {} hidden groups of {n} rows", hidden.len());
        assert!(outputs.end <= n_embd, "expert_down: output {} of {n_embd}", outputs.end);
        assert!(
            outputs.start.is_multiple_of(OUTPUT_CHUNK)
                && (outputs.end == n_embd || outputs.end.is_multiple_of(OUTPUT_CHUNK)),
            "expert_down: outputs {outputs:?} are not whole chunks"
        );
        if n == 0 {
            return;
        }
        let MatrixFormat { ty, arrangement } = format.matrix(Matrix::Down);
        match arrangement {
            Arrangement::Columns => {
                let layout = format.down();
                let (whole, chunk) = (outputs.len() / OUTPUT_CHUNK, outputs.start / OUTPUT_CHUNK);
                let mut rows: [&mut [f32]; FEW_ROWS] = Default::default();
                let mut tails: [&mut [f32]; FEW_ROWS] = Default::default();
                for ((row, tail), out) in rows.iter_mut().zip(&mut tails).zip(out.rows_mut()) {
                    (*row, *tail) = out.split_at_mut(whole * OUTPUT_CHUNK);
                }
                // SAFETY: the table is of this CPU; the region has the size of the format, which has these chunks (its outputs are padded to
                // whole ones), hidden has fb groups and the output 128 floats per chunk, for each of n tokens.
                unsafe { (self.table.down)(&layout, down, hidden, chunk..chunk + whole, &mut rows[..n]) };
                if !tails[0].is_empty() {
                    let mut last = [[0f32; OUTPUT_CHUNK]; FEW_ROWS];
                    let mut rows = last.each_mut().map(|row| &mut row[..]);
                    let chunks = chunk + whole..chunk + whole + 1;
                    // SAFETY: as above.
                    unsafe { (self.table.down)(&layout, down, hidden, chunks, &mut rows[..n]) };
                    for (tail, last) in tails.iter_mut().zip(&last) {
                        tail.copy_from_slice(&last[..tail.len()]);
                    }
                }
            }
            _ if ty.is_quantized() => {
                let fb = n_ff / BLOCK_LEN;
                let kbp = padded_blocks(n_ff);
                with_hidden_rows(hidden, fb, kbp, |rows| {
                    for start in outputs.clone().step_by(R16_ROWS) {
                        let len = R16_ROWS.min(outputs.end - start);
                        let ids: [u32; R16_ROWS] = std::array::from_fn(|i| (start + i) as u32);
                        for (&a, out) in rows.iter().zip(out.rows_mut()) {
                            let out = &mut out[start - outputs.start..][..len];
                            // SAFETY: the table is of this CPU; the rows exist since outputs.end <= n_embd.
                            unsafe { (self.table.q8_rows)(fb, down, &ids[..len], a, out) };
                        }
                    }
                });
            }
            _ => with_floats(hidden.len() * BLOCK_LEN, |h| {
                for (dst, src) in h.chunks_exact_mut(BLOCK_LEN).zip(hidden) {
                    dst.copy_from_slice(&src.h);
                }
                let row_bytes = n_ff * ty.block_bytes();
                for start in outputs.clone().step_by(R16_ROWS) {
                    let end = outputs.end.min(start + R16_ROWS);
                    let rows = &down[start * row_bytes..end * row_bytes];
                    for (h, out) in h.chunks_exact(groups * BLOCK_LEN).zip(out.rows_mut()) {
                        let out = &mut out[start - outputs.start..end - outputs.start];
                        // SAFETY: the table is of this CPU; one row of n_ff values per output.
                        unsafe { (self.table.dots)(ty, rows, &h[..n_ff], out) };
                    }
                }
            }),
        }
    }
}

/// Rows of a quantized input.
fn few_rows<'a>(format: &ExpertFormat, input: ExpertInput<'a>, rows: &[u32]) -> Few<'a> {
    assert_eq!(input.acts.k(), format.n_embd(), "k of the activations");
    input.acts.few(rows.iter().map(|&row| row as usize))
}

/// Runs `f` with hidden values (`fb` groups of each row) as activations of `kbp` blocks.
fn with_hidden_rows(hidden: &[HiddenGroup], fb: usize, kbp: usize, f: impl FnOnce(&[ActRow<'_>])) {
    let n = hidden.len() / fb;
    with_bytes(n * kbp * BLOCK_LEN, |q| {
        with_floats(n * kbp, |d| {
            with_sums(n * kbp, |sums| {
                let rows =
                    q.chunks_exact_mut(kbp * BLOCK_LEN).zip(d.chunks_exact_mut(kbp)).zip(sums.chunks_exact_mut(kbp));
                for (((q, d), sums), hidden) in rows.zip(hidden.chunks_exact(fb)) {
                    q[fb * BLOCK_LEN..].fill(0);
                    d[fb..].fill(0.0);
                    sums[fb..].fill([0; 2]);
                    for (b, hidden) in hidden.iter().enumerate() {
                        (d[b], sums[b]) = (hidden.d, hidden.sums);
                        q[b * BLOCK_LEN..][..BLOCK_LEN].copy_from_slice(&hidden.q.map(|q| q as u8));
                    }
                }
                // SAFETY: bytes seen as signed bytes.
                let q = unsafe { std::slice::from_raw_parts(q.as_ptr().cast::<i8>(), q.len()) };
                let row = |t: usize| ActRow {
                    q: &q[t * kbp * BLOCK_LEN..(t + 1) * kbp * BLOCK_LEN],
                    d: &d[t * kbp..(t + 1) * kbp],
                    sums: &sums[t * kbp..(t + 1) * kbp],
                };
                let rows: [ActRow<'_>; FEW_ROWS] = std::array::from_fn(|t| row(t.min(n - 1)));
                f(&rows[..n]);
            });
        });
    });
}
