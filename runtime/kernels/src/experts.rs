//! The feed-forward network of one expert, `down · (up·x ⊙ relu(gate·x))`, for one token (sparse) and for many.
//!
//! For quantized experts the hidden values are quantized to Q8_0 in groups of 32 neurons, so that `down` is an integer product
//! as well. Neurons whose gate is not positive are skipped: their rows of up and down are not read. Both forms give the same bits.

use std::ops::Range;

use crate::activations::{ActRow, HiddenGroup, Q8Acts, UNIT_BLOCK, UNIT_ROWS, padded_blocks};
use crate::dispatch::Kernels;
use crate::expert_format::{ExpertFormat, Matrix, OUTPUT_CHUNK};
use crate::linear::units_of;
use crate::out::ColumnsMut;
use crate::r16;
use crate::r16::{R16_ROWS, tile_bytes};
use crate::scratch::{with_bytes, with_floats};
use crate::table::{GEMM_UNITS, PANEL_BLOCK};
use crate::weight_type::BLOCK_LEN;
use crate::weight_type::WeightType;

/// Neuron groups whose live rows of up make one list.
const GROUPS_AT_ONCE: usize = 32;

/// What goes into an expert: rows of `n_embd` values, as floats (read if the expert's type is a float) or quantized (read if it
/// is quantized). The other one may be empty.
#[derive(Debug, Clone, Copy)]
pub struct ExpertInput<'a> {
    /// `rows × n_embd` floats.
    pub floats: &'a [f32],
    /// The same rows as int8 blocks.
    pub acts: &'a Q8Acts,
}

impl Kernels {
    /// Gates of the neurons `neurons` of one expert for row `row` of the input; `out` has one float per neuron.
    ///
    /// # Panics
    /// If the region, the input or `out` has the wrong size, or `neurons` are not whole groups of 16.
    pub fn expert_gate(
        self,
        format: &ExpertFormat,
        gate: &[u8],
        input: ExpertInput<'_>,
        row: usize,
        neurons: Range<usize>,
        out: &mut [f32],
    ) {
        format.check_region(Matrix::Gate, gate.len());
        assert!(neurons.end <= format.n_ff(), "expert_gate: neuron {}", neurons.end);
        assert!(
            neurons.start.is_multiple_of(R16_ROWS)
                && (neurons.end.is_multiple_of(R16_ROWS) || neurons.end == format.n_ff()),
            "expert_gate: neurons {neurons:?} are not whole groups"
        );
        assert_eq!(out.len(), neurons.len(), "expert_gate: output length");
        match format.ty() {
            WeightType::Q4_0 => {
                let kb = format.n_embd() / BLOCK_LEN;
                let group = kb * tile_bytes(WeightType::Q4_0);
                let tiles = &gate[neurons.start / R16_ROWS * group..neurons.end / R16_ROWS * group];
                // SAFETY: the table is of this CPU; n_ff is a multiple of 32, so these are whole row groups of kb tiles.
                unsafe { (self.table.gemv_r16)(WeightType::Q4_0, kb, tiles, act_row(format, input, row), out) };
            }
            _ => {
                for (i, out) in out.chunks_mut(R16_ROWS).enumerate() {
                    let rows: [u32; R16_ROWS] = std::array::from_fn(|j| (neurons.start + i * R16_ROWS + j) as u32);
                    self.canonical_rows(format, gate, &rows[..out.len()], input, row, out);
                }
            }
        }
    }

    /// Hidden values of the neuron groups `groups` (32 neurons each) of one expert for row `row` of the input, from their gates
    /// ([`Self::expert_gate`]): only the rows of up of neurons whose gate is positive are read. `out` has one entry per group. Returns
    /// how many gates were positive.
    ///
    /// # Panics
    /// If a region, the gates, the input or `out` has the wrong size.
    #[allow(clippy::too_many_arguments)]
    pub fn expert_hidden(
        self,
        format: &ExpertFormat,
        up: &[u8],
        gates: &[f32],
        input: ExpertInput<'_>,
        row: usize,
        groups: Range<usize>,
        out: &mut [HiddenGroup],
    ) -> usize {
        format.check_region(Matrix::Up, up.len());
        assert!(groups.end <= HiddenGroup::groups(format.n_ff()), "expert_hidden: group {}", groups.end);
        assert_eq!(out.len(), groups.len(), "expert_hidden: output length");
        let neurons = groups.start * BLOCK_LEN..format.n_ff().min(groups.end * BLOCK_LEN);
        assert_eq!(gates.len(), neurons.len(), "expert_hidden: gates");
        const AT_ONCE: usize = GROUPS_AT_ONCE * BLOCK_LEN;
        let mut count = 0;
        let (mut rows, mut ups) = ([0u32; AT_ONCE], [0f32; AT_ONCE]);
        for (i, (out, gates)) in out.chunks_mut(GROUPS_AT_ONCE).zip(gates.chunks(AT_ONCE)).enumerate() {
            let first = neurons.start + i * AT_ONCE;
            let mut n = 0;
            for (i, &gate) in gates.iter().enumerate() {
                rows[n] = (first + i) as u32;
                n += usize::from(gate > 0.0);
            }
            let (rows, ups) = (&rows[..n], &mut ups[..n]);
            match format.ty() {
                // SAFETY: the table is of this CPU; the rows exist, the activations have n_embd values, one output per row.
                WeightType::Q4_0 => unsafe {
                    (self.table.up_rows)(&format.up(), up, rows, act_row(format, input, row), ups);
                },
                _ => self.canonical_rows(format, up, rows, input, row, ups),
            }
            self.hidden_of(format, rows, gates, ups, first, out);
            count += n;
        }
        count
    }

    /// Hidden values of the neurons from `first` on, `rows` of which live.
    fn hidden_of(
        self,
        format: &ExpertFormat,
        rows: &[u32],
        gates: &[f32],
        ups: &[f32],
        first: usize,
        out: &mut [HiddenGroup],
    ) {
        out.fill(HiddenGroup::ZERO);
        for (&row, &up) in rows.iter().zip(ups) {
            let i = row as usize - first;
            let group = &mut out[i / BLOCK_LEN];
            group.active |= 1 << (i % BLOCK_LEN);
            group.h[i % BLOCK_LEN] = gates[i] * up;
        }
        for group in out {
            if group.active == 0 || !format.ty().is_quantized() {
                group.live = group.active;
                continue;
            }
            let (d, bias) = (std::slice::from_mut(&mut group.d), std::slice::from_mut(&mut group.bias));
            // SAFETY: the table is of this CPU; one block.
            unsafe { (self.table.quantize_q8)(&group.h, &mut group.q, d, bias) };
            for (i, &q) in group.q.iter().enumerate() {
                group.live |= u32::from(q != 0) << i;
            }
        }
    }

    /// Products of some rows of a region that is a canonical matrix (any type but Q4_0) with row `row` of the input.
    fn canonical_rows(
        self,
        format: &ExpertFormat,
        region: &[u8],
        rows: &[u32],
        input: ExpertInput<'_>,
        row: usize,
        out: &mut [f32],
    ) {
        let (ty, n_embd) = (format.ty(), format.n_embd());
        if ty.is_quantized() {
            let kb = n_embd / BLOCK_LEN;
            // SAFETY: the table is of this CPU; the region has these rows, and there is an output for each.
            return unsafe { (self.table.q8_rows)(kb, region, rows, act_row(format, input, row), out) };
        }
        let x = &input.floats[row * n_embd..(row + 1) * n_embd];
        let row_bytes = n_embd * ty.block_bytes();
        for (&row, out) in rows.iter().zip(out) {
            let weights = &region[row as usize * row_bytes..(row as usize + 1) * row_bytes];
            // SAFETY: the table is of this CPU; one row of n_embd values.
            unsafe { (self.table.dots)(ty, weights, x, std::slice::from_mut(out)) };
        }
    }

    /// Outputs `outputs` of one expert from its hidden values (all groups); dead neurons are not read. `out` has one float per output.
    ///
    /// # Panics
    /// If a size is wrong, or `outputs` does not start at a multiple of [`OUTPUT_CHUNK`] and end at one or at `n_embd`.
    pub fn expert_down(
        self,
        format: &ExpertFormat,
        down: &[u8],
        hidden: &[HiddenGroup],
        outputs: Range<usize>,
        out: &mut [f32],
    ) {
        format.check_region(Matrix::Down, down.len());
        let (n_embd, n_ff) = (format.n_embd(), format.n_ff());
        assert_eq!(hidden.len(), HiddenGroup::groups(n_ff), "expert_down: hidden groups");
        assert_eq!(out.len(), outputs.len(), "expert_down: output length");
        assert!(outputs.end <= n_embd, "expert_down: output {} of {n_embd}", outputs.end);
        assert!(
            outputs.start.is_multiple_of(OUTPUT_CHUNK)
                && (outputs.end == n_embd || outputs.end.is_multiple_of(OUTPUT_CHUNK)),
            "expert_down: outputs {outputs:?} are not whole chunks"
        );
        let ty = format.ty();
        match ty {
            WeightType::Q4_0 => {
                let layout = format.down();
                let whole = outputs.len() / OUTPUT_CHUNK;
                let chunk = outputs.start / OUTPUT_CHUNK;
                let (head, tail) = out.split_at_mut(whole * OUTPUT_CHUNK);
                // SAFETY: the table is of this CPU; the region has the size of the format, which has these chunks (its
                // outputs are padded to whole ones), hidden has fb groups and the output 128 floats per chunk.
                unsafe { (self.table.down)(&layout, down, hidden, chunk..chunk + whole, head) };
                if !tail.is_empty() {
                    let mut last = [0f32; OUTPUT_CHUNK];
                    // SAFETY: as above.
                    unsafe { (self.table.down)(&layout, down, hidden, chunk + whole..chunk + whole + 1, &mut last) };
                    tail.copy_from_slice(&last[..tail.len()]);
                }
            }
            WeightType::Q8_0 => {
                let fb = n_ff / BLOCK_LEN;
                let kbp = padded_blocks(n_ff);
                let mut rows = [0u32; OUTPUT_CHUNK];
                with_floats(kbp, |d| {
                    with_bytes(kbp * BLOCK_LEN, |q| {
                        let mut bias = vec![0i32; kbp];
                        d.fill(0.0);
                        q.fill(0);
                        for (b, hidden) in hidden.iter().enumerate() {
                            d[b] = hidden.d;
                            bias[b] = hidden.bias;
                            for (q, &h) in q[b * BLOCK_LEN..].iter_mut().zip(&hidden.q) {
                                *q = h as u8;
                            }
                        }
                        // SAFETY: bytes seen as signed bytes.
                        let q = unsafe { std::slice::from_raw_parts(q.as_ptr().cast::<i8>(), q.len()) };
                        let a = ActRow { q, d, bias: &bias };
                        for (i, out) in out.chunks_mut(OUTPUT_CHUNK).enumerate() {
                            for (j, row) in rows.iter_mut().enumerate() {
                                *row = (outputs.start + i * OUTPUT_CHUNK + j) as u32;
                            }
                            // SAFETY: the table is of this CPU; the rows exist since outputs.end <= n_embd.
                            unsafe { (self.table.q8_rows)(fb, down, &rows[..out.len()], a, out) };
                        }
                    });
                });
            }
            _ => with_floats(hidden.len() * BLOCK_LEN, |h| {
                for (dst, src) in h.chunks_exact_mut(BLOCK_LEN).zip(hidden) {
                    dst.copy_from_slice(&src.h);
                }
                let row_bytes = n_ff * ty.block_bytes();
                let rows = &down[outputs.start * row_bytes..outputs.end * row_bytes];
                // SAFETY: the table is of this CPU; one row of n_ff values per output.
                unsafe { (self.table.dots)(ty, rows, &h[..n_ff], out) };
            }),
        }
    }

    /// Hidden values `relu(gate·x) ⊙ (up·x)` of as many rows of the input as `hidden` has, from row `first` on, for the neurons that
    /// are its columns (`rows × n_ff` floats in all).
    ///
    /// # Panics
    /// If a size is wrong, the columns do not start at a multiple of 16, or more than one row starts elsewhere than at a multiple
    /// of [`UNIT_ROWS`].
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
        let (n_embd, n_ff, ty) = (format.n_embd(), format.n_ff(), format.ty());
        let (neurons, tokens) = (hidden.columns(), hidden.rows());
        assert!(neurons.end <= n_ff && neurons.start.is_multiple_of(R16_ROWS), "expert_gate_up_batch: {neurons:?}");
        let mut ups = [0f32; R16_ROWS];
        if !ty.is_quantized() {
            // Products first, then gates into the same place, 16 neurons at a time.
            let row_bytes = n_embd * ty.block_bytes();
            let floats = &input.floats[first * n_embd..(first + tokens) * n_embd];
            for start in neurons.clone().step_by(R16_ROWS) {
                let end = neurons.end.min(start + R16_ROWS);
                let rows = start * row_bytes..end * row_bytes;
                for (t, x) in floats.chunks_exact(n_embd).enumerate() {
                    let h = &mut hidden.row_mut(t)[start - neurons.start..end - neurons.start];
                    let ups = &mut ups[..end - start];
                    // SAFETY: the table is of this CPU; one row of n_embd values per output, twice.
                    unsafe {
                        (self.table.dots)(ty, &gate[rows.clone()], x, h);
                        (self.table.dots)(ty, &up[rows.clone()], x, ups);
                    }
                    relu_times(h, ups);
                }
            }
            return;
        }
        assert_eq!(input.acts.k(), n_embd, "expert_gate_up_batch: k of the activations");
        let kb = n_embd / BLOCK_LEN;
        if tokens == 1 {
            let groups = neurons.start / BLOCK_LEN..neurons.end.div_ceil(BLOCK_LEN);
            let mut gates = [0f32; BLOCK_LEN];
            let mut group = HiddenGroup::ZERO;
            for i in groups {
                let whole = i * BLOCK_LEN..(i + 1) * BLOCK_LEN;
                self.expert_gate(format, gate, input, first, whole.clone(), &mut gates);
                self.expert_hidden(format, up, &gates, input, first, i..i + 1, std::slice::from_mut(&mut group));
                let part = neurons.start.max(whole.start)..neurons.end.min(whole.end);
                hidden.row_mut(0)[part.start - neurons.start..part.end - neurons.start]
                    .copy_from_slice(&group.h[part.start - whole.start..part.end - whole.start]);
            }
            return;
        }
        let units = units_of(input.acts, first, tokens);
        let panel_bytes = kb * PANEL_BLOCK;
        with_bytes(2 * panel_bytes, |panels| {
            let (gate_panel, up_panel) = panels.split_at_mut(panel_bytes);
            for start in neurons.clone().step_by(R16_ROWS) {
                self.row_panel(format, gate, true, start, gate_panel);
                self.row_panel(format, up, false, start, up_panel);
                self.gate_up_panels(ty, kb, gate_panel, up_panel, units, start, hidden);
            }
        });
    }

    #[allow(clippy::too_many_arguments)]
    fn gate_up_panels(
        self,
        ty: WeightType,
        kb: usize,
        gate: &[u8],
        up: &[u8],
        units: &[u8],
        column: usize,
        hidden: &mut ColumnsMut<'_>,
    ) {
        let mut g = [0f32; GEMM_UNITS * UNIT_ROWS * R16_ROWS];
        let mut u = g;
        let at = column - hidden.columns().start;
        for (i, units) in units.chunks(GEMM_UNITS * kb * UNIT_BLOCK).enumerate() {
            // SAFETY: the table is of this CPU; panels of kb blocks and 1 to GEMM_UNITS whole units.
            unsafe {
                (self.table.gemm)(ty, kb, gate, units, &mut g);
                (self.table.gemm)(ty, kb, up, units, &mut u);
            }
            let first = i * GEMM_UNITS * UNIT_ROWS;
            relu_times(&mut g, &u);
            for (t, h) in g.as_chunks().0.iter().enumerate().take(hidden.rows() - first) {
                hidden.put(first + t, at, h);
            }
        }
    }

    /// 16 rows of gate or up as a weight panel.
    fn row_panel(self, format: &ExpertFormat, region: &[u8], is_gate: bool, first: usize, panel: &mut [u8]) {
        let kb = format.n_embd() / BLOCK_LEN;
        match format.ty() {
            WeightType::Q4_0 if is_gate => {
                let bytes = kb * tile_bytes(WeightType::Q4_0);
                let group = first / R16_ROWS;
                // SAFETY: the table is of this CPU; kb tiles and kb panel blocks.
                unsafe {
                    (self.table.panel_r16)(WeightType::Q4_0, kb, &region[group * bytes..(group + 1) * bytes], panel);
                }
            }
            // SAFETY: the table is of this CPU; 16 rows exist since n_ff is a multiple of 32, and kb panel blocks.
            WeightType::Q4_0 => unsafe { (self.table.panel_up)(&format.up(), region, first, panel) },
            ty => self.canonical_panel(ty, format.n_embd(), region, first, panel),
        }
    }

    /// 16 canonical rows of a quantized type as a weight panel.
    fn canonical_panel(self, ty: WeightType, k: usize, region: &[u8], first: usize, panel: &mut [u8]) {
        let kb = k / BLOCK_LEN;
        let row_bytes = kb * ty.block_bytes();
        let mut tiles = vec![0; R16_ROWS * row_bytes];
        let rows = &region[first * row_bytes..region.len().min((first + R16_ROWS) * row_bytes)];
        r16::pack(ty, rows.len() / row_bytes, k, rows, &mut tiles);
        // SAFETY: the table is of this CPU; kb tiles and kb panel blocks.
        unsafe { (self.table.panel_r16)(ty, kb, &tiles, panel) };
    }

    /// Outputs of one expert for many tokens: the columns of `out` (`rows × n_embd` in all) from as many rows of hidden values, from row
    /// `first` on, as floats (`rows × n_ff`, read if the type is a float) or quantized.
    ///
    /// # Panics
    /// If a size is wrong, the columns do not start at a multiple of [`OUTPUT_CHUNK`], or more than one row starts elsewhere than at a
    /// multiple of [`UNIT_ROWS`].
    pub fn expert_down_batch(
        self,
        format: &ExpertFormat,
        down: &[u8],
        hidden: ExpertInput<'_>,
        first: usize,
        out: &mut ColumnsMut<'_>,
    ) {
        format.check_region(Matrix::Down, down.len());
        let (n_embd, n_ff, ty) = (format.n_embd(), format.n_ff(), format.ty());
        let (outputs, tokens) = (out.columns(), out.rows());
        assert!(outputs.end <= n_embd && outputs.start.is_multiple_of(OUTPUT_CHUNK), "expert_down_batch: {outputs:?}");
        if !ty.is_quantized() {
            return self.linear_float(ty, n_ff, down, &hidden.floats[first * n_ff..(first + tokens) * n_ff], out);
        }
        assert_eq!(hidden.acts.k(), n_ff, "expert_down_batch: k of the hidden values");
        let fb = n_ff / BLOCK_LEN;
        if tokens == 1 {
            let groups = hidden_groups(hidden.acts.row(first), fb);
            return self.expert_down(format, down, &groups, outputs, out.row_mut(0));
        }
        let units = units_of(hidden.acts, first, tokens);
        let panel_bytes = fb * PANEL_BLOCK;
        let layout = format.down();
        with_bytes(8 * panel_bytes, |panels| {
            for start in outputs.clone().step_by(OUTPUT_CHUNK) {
                if ty == WeightType::Q4_0 {
                    // SAFETY: the table is of this CPU; the chunk exists since n_embd is padded to whole ones, and there
                    // are 8 panels of fb blocks.
                    unsafe { (self.table.panel_down)(&layout, down, start / OUTPUT_CHUNK, panels) };
                }
                let columns = (start..outputs.end.min(start + OUTPUT_CHUNK)).step_by(R16_ROWS);
                for (column, panel) in columns.zip(panels.chunks_exact_mut(panel_bytes)) {
                    if ty != WeightType::Q4_0 {
                        self.canonical_panel(ty, n_ff, down, column, panel);
                    }
                    self.gemm_panel(ty, fb, panel, units, column, out);
                }
            }
        });
    }
}

/// Row `row` of a quantized input.
fn act_row<'a>(format: &ExpertFormat, input: ExpertInput<'a>, row: usize) -> ActRow<'a> {
    assert_eq!(input.acts.k(), format.n_embd(), "k of the activations");
    input.acts.row(row)
}

/// `h = relu(h) * u`, without letting a dead neuron's `u` through.
fn relu_times(h: &mut [f32], u: &[f32]) {
    for (h, &u) in h.iter_mut().zip(u) {
        *h = if *h > 0.0 { *h * u } else { 0.0 };
    }
}

fn hidden_groups(a: ActRow<'_>, fb: usize) -> Vec<HiddenGroup> {
    let group = |b: usize| {
        let mut group = HiddenGroup { d: a.d[b], bias: a.bias[b], ..HiddenGroup::ZERO };
        group.q.copy_from_slice(&a.q[b * BLOCK_LEN..(b + 1) * BLOCK_LEN]);
        for (i, &q) in group.q.iter().enumerate() {
            group.live |= u32::from(q != 0) << i;
        }
        group
    };
    (0..fb).map(group).collect()
}
