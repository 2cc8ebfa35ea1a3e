//! The feed-forward network of one expert, `down · (up·x ⊙ relu(gate·x))`, for a few tokens (sparse) and for many.
//!
//! For quantized experts the hidden values are quantized to Q8_0 in groups of 32 neurons, so that `down` is an integer product
//! as well. Neurons whose gate is not positive are skipped: their rows of up and down are not read. Both forms give the same bits.

use std::ops::Range;

use crate::activations::{ActRow, FEW_ROWS, Few, HiddenGroup, Q8Acts, UNIT_BLOCK, UNIT_ROWS, padded_blocks};
use crate::dispatch::Kernels;
use crate::down_layout::OUTPUT_CHUNK;
use crate::expert_format::{Arrangement, ExpertFormat, Matrix, MatrixFormat};
use crate::linear::units_of;
use crate::live::LiveRows;
use crate::out::ColumnsMut;
use crate::panel::{PanelKind, unpack16};
use crate::r16::{R16_ROWS, group_bytes};
use crate::scratch::{with_bytes, with_floats, with_sums};
use crate::table::GEMM_UNITS;
use crate::weight_type::BLOCK_LEN;
use crate::weight_type::WeightType;

/// Neuron groups whose live rows of up make one list; with more than four tokens, as many as fit.
const GROUPS_AT_ONCE: usize = 32;

/// What goes into an expert: rows of `n_embd` values, as floats ([`ExpertFormat::takes_floats`]) or quantized
/// ([`ExpertFormat::takes_acts`]). What is not taken may be empty.
#[derive(Debug, Clone, Copy)]
pub struct ExpertInput<'a> {
    /// `rows × n_embd` floats.
    pub floats: &'a [f32],
    /// The same rows as int8 blocks.
    pub acts: &'a Q8Acts,
}

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

    /// Hidden values `relu(gate·x) ⊙ (up·x)` of as many rows of the input as `hidden` has, from row `first` on, for the neurons that
    /// are its columns (`rows × n_ff` floats in all).
    ///
    /// # Panics
    /// If a size is wrong, the columns do not start at a multiple of 16, the rows do not start at one of [`UNIT_ROWS`], or a quantized input
    /// has a single row.
    pub fn expert_gate_up_batch(
        self,
        format: &ExpertFormat,
        gate: &[u8],
        up: &[u8],
        input: ExpertInput<'_>,
        first: usize,
        hidden: &mut ColumnsMut<'_>,
    ) {
        format.check_region(Matrix::Gate, gate.len());
        format.check_region(Matrix::Up, up.len());
        let (n_embd, n_ff) = (format.n_embd(), format.n_ff());
        let (neurons, tokens) = (hidden.columns(), hidden.rows());
        assert!(neurons.end <= n_ff && neurons.start.is_multiple_of(R16_ROWS), "expert_gate_up_batch: {neurons:?}");
        let floats = if format.takes_floats() { &input.floats[first * n_embd..(first + tokens) * n_embd] } else { &[] };
        let units = if format.takes_acts() {
            assert_eq!(input.acts.k(), n_embd, "expert_gate_up_batch: k of the activations");
            units_of(input.acts, first, tokens)
        } else {
            &[]
        };
        let kb = n_embd / BLOCK_LEN;
        let panel_bytes = |matrix| match format.type_of(matrix) {
            ty if ty.is_quantized() => kb * PanelKind::of(ty).block_bytes(),
            _ => 0,
        };
        let (gate_bytes, up_bytes) = (panel_bytes(Matrix::Gate), panel_bytes(Matrix::Up));
        with_bytes(gate_bytes + up_bytes, |panels| {
            let (gate_panel, up_panel) = panels.split_at_mut(gate_bytes);
            for start in neurons.clone().step_by(R16_ROWS) {
                let rows = start..neurons.end.min(start + R16_ROWS);
                let gate = self.sixteen(format, Matrix::Gate, gate, rows.clone(), gate_panel);
                let up = self.sixteen(format, Matrix::Up, up, rows, up_panel);
                let (mut g, mut u) = ([0f32; AT_ONCE * R16_ROWS], [0f32; AT_ONCE * R16_ROWS]);
                for at in (0..tokens).step_by(AT_ONCE) {
                    let n = AT_ONCE.min(tokens - at);
                    let units = units.chunks(GEMM_UNITS * kb.max(1) * UNIT_BLOCK).nth(at / AT_ONCE).unwrap_or_default();
                    let floats = if floats.is_empty() { floats } else { &floats[at * n_embd..(at + n) * n_embd] };
                    self.times(gate, kb, units, floats, n_embd, &mut g);
                    self.times(up, kb, units, floats, n_embd, &mut u);
                    relu_times(&mut g, &u);
                    for (t, h) in g.as_chunks().0.iter().enumerate().take(n) {
                        hidden.put(at + t, start - neurons.start, h);
                    }
                }
            }
        });
    }

    /// Rows `rows` (at most 16) of gate or up, ready to be multiplied with several tokens: unpacked to `panel`, or as they are.
    fn sixteen<'a>(
        self,
        format: &ExpertFormat,
        matrix: Matrix,
        region: &'a [u8],
        rows: Range<usize>,
        panel: &'a mut [u8],
    ) -> Sixteen<'a> {
        let ty = format.type_of(matrix);
        if ty.is_quantized() {
            self.row_panel(format, matrix, region, rows.start, panel);
            return Sixteen::Panel(PanelKind::of(ty), panel);
        }
        let row_bytes = format.n_embd() * ty.block_bytes();
        Sixteen::Floats(ty, &region[rows.start * row_bytes..rows.end * row_bytes])
    }

    /// `out[t * 16 + r]` = row `r` times token `t`, for up to GEMM_UNITS units of quantized tokens, or as many of floats.
    fn times(
        self,
        rows: Sixteen<'_>,
        kb: usize,
        units: &[u8],
        floats: &[f32],
        n_embd: usize,
        out: &mut [f32; AT_ONCE * R16_ROWS],
    ) {
        match rows {
            // SAFETY: the table is of this CPU; a panel of kb blocks and 1 to GEMM_UNITS whole units.
            Sixteen::Panel(kind, panel) => unsafe { (self.table.gemm)(kind, kb, panel, units, out) },
            Sixteen::Floats(ty, rows) => {
                let n = rows.len() / (n_embd * ty.block_bytes());
                for (x, out) in floats.chunks_exact(n_embd).zip(out.chunks_exact_mut(R16_ROWS)) {
                    // SAFETY: the table is of this CPU; one row of n_embd values per output.
                    unsafe { (self.table.dots)(ty, rows, x, &mut out[..n]) };
                }
            }
        }
    }

    /// 16 rows of gate or up, of a quantized type, as a panel.
    fn row_panel(self, format: &ExpertFormat, matrix: Matrix, region: &[u8], first: usize, panel: &mut [u8]) {
        let kb = format.n_embd() / BLOCK_LEN;
        let MatrixFormat { ty, arrangement } = format.matrix(matrix);
        match arrangement {
            Arrangement::Tiles => {
                self.tile_panel(ty, kb, region, first, panel);
            }
            // SAFETY: the table is of this CPU; 16 rows exist since n_ff is a multiple of 32, and kb panel blocks.
            Arrangement::Rows => unsafe { (self.table.panel_up)(&format.up(), region, first, panel) },
            _ => self.canonical_panel(ty, format.n_embd(), region, first, panel),
        }
    }

    /// 16 rows of a region of tiles as a weight panel of `kb` blocks.
    fn tile_panel(self, ty: WeightType, kb: usize, region: &[u8], first: usize, panel: &mut [u8]) {
        let (bytes, group) = (group_bytes(ty, kb), first / R16_ROWS);
        // SAFETY: the table is of this CPU; the tiles of kb blocks and as many panel blocks.
        unsafe { (self.table.panel_r16)(ty, kb, &region[group * bytes..(group + 1) * bytes], panel) };
    }

    /// 16 canonical rows of Q8_0 as a weight panel.
    fn canonical_panel(self, ty: WeightType, k: usize, region: &[u8], first: usize, panel: &mut [u8]) {
        let kb = k / BLOCK_LEN;
        let row_bytes = kb * ty.block_bytes();
        let rows = &region[first * row_bytes..region.len().min((first + R16_ROWS) * row_bytes)];
        unpack16(ty, kb, rows, self.table.panel, panel);
    }

    /// Outputs of one expert for many tokens: the columns of `out` (`rows × n_embd` in all) from as many rows of hidden values, from row
    /// `first` on, as floats (`rows × n_ff`, read if the type is a float) or quantized.
    ///
    /// # Panics
    /// If a size is wrong, the columns do not start at a multiple of [`OUTPUT_CHUNK`], the rows do not start at one of [`UNIT_ROWS`], or a
    /// quantized input has a single row.
    pub fn expert_down_batch(
        self,
        format: &ExpertFormat,
        down: &[u8],
        hidden: ExpertInput<'_>,
        first: usize,
        out: &mut ColumnsMut<'_>,
    ) {
        format.check_region(Matrix::Down, down.len());
        let (n_embd, n_ff) = (format.n_embd(), format.n_ff());
        let MatrixFormat { ty, arrangement } = format.matrix(Matrix::Down);
        let (outputs, tokens) = (out.columns(), out.rows());
        assert!(outputs.end <= n_embd && outputs.start.is_multiple_of(OUTPUT_CHUNK), "expert_down_batch: {outputs:?}");
        if !ty.is_quantized() {
            return self.linear_float(ty, n_ff, down, &hidden.floats[first * n_ff..(first + tokens) * n_ff], out);
        }
        assert_eq!(hidden.acts.k(), n_ff, "expert_down_batch: k of the hidden values");
        let fb = n_ff / BLOCK_LEN;
        let units = units_of(hidden.acts, first, tokens);
        let kind = PanelKind::of(ty);
        let panel_bytes = fb * kind.block_bytes();
        let is_packed = arrangement == Arrangement::Columns;
        with_bytes(8 * panel_bytes, |panels| {
            for start in outputs.clone().step_by(OUTPUT_CHUNK) {
                if is_packed {
                    // SAFETY: the table is of this CPU; the chunk exists since n_embd is padded to whole ones, and there
                    // are 8 panels of fb blocks.
                    unsafe { (self.table.panel_down)(&format.down(), down, start / OUTPUT_CHUNK, panels) };
                }
                let columns = (start..outputs.end.min(start + OUTPUT_CHUNK)).step_by(R16_ROWS);
                for (column, panel) in columns.zip(panels.chunks_exact_mut(panel_bytes)) {
                    match arrangement {
                        Arrangement::Columns => (),
                        _ => self.canonical_panel(ty, n_ff, down, column, panel),
                    }
                    self.gemm_panel(kind, fb, panel, units, column, out);
                }
            }
        });
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

/// 16 rows of a matrix as products with several tokens take them.
#[derive(Clone, Copy)]
enum Sixteen<'a> {
    Panel(PanelKind, &'a [u8]),
    Floats(WeightType, &'a [u8]),
}

/// Tokens that 16 rows are multiplied with at once.
const AT_ONCE: usize = GEMM_UNITS * UNIT_ROWS;

/// `h = relu(h) * u`, without letting a dead neuron's `u` through.
fn relu_times(h: &mut [f32], u: &[f32]) {
    for (h, &u) in h.iter_mut().zip(u) {
        *h = if *h > 0.0 { *h * u } else { 0.0 };
    }
}
