//! One expert for many tokens: 16 rows at a time are unpacked, and multiplied with all of them.

use std::ops::Range;

use super::ExpertInput;
use crate::activations::{UNIT_BLOCK, UNIT_ROWS};
use crate::dispatch::Kernels;
use crate::down_layout::OUTPUT_CHUNK;
use crate::expert_format::{Arrangement, ExpertFormat, Matrix, MatrixFormat};
use crate::linear::units_of;
use crate::out::ColumnsMut;
use crate::panel::{PanelKind, unpack16};
use crate::r16::{R16_ROWS, group_bytes};
use crate::scratch::with_bytes;
use crate::table::GEMM_UNITS;
use crate::weight_type::BLOCK_LEN;
use crate::weight_type::WeightType;

/// 16 rows of a matrix as products with several tokens take them.
#[derive(Clone, Copy)]
enum Sixteen<'a> {
    Panel(PanelKind, &'a [u8]),
    Floats(WeightType, &'a [u8]),
}

/// Tokens that 16 rows are multiplied with at once.
const AT_ONCE: usize = GEMM_UNITS * UNIT_ROWS;

impl Kernels {
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

/// `h = relu(h) * u`, without letting a dead neuron's `u` through.
fn relu_times(h: &mut [f32], u: &[f32]) {
    for (h, &u) in h.iter_mut().zip(u) {
        *h = if *h > 0.0 { *h * u } else { 0.0 };
    }
}
