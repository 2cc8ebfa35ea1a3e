//! Matrix products with whole matrices, activation quantization, norms and the small vector operations between them.

use crate::activations::{ActRow, FEW_ROWS, Q8Acts, UNIT_BLOCK, UNIT_ROWS};
use crate::dispatch::Kernels;
use crate::expert_format::{Arrangement, ExpertFormat, Matrix, MatrixFormat};
use crate::out::ColumnsMut;
use crate::panel::PanelKind;
use crate::pool::{Pool, RowSplit};
use crate::r16::{R16, R16_ROWS, group_bytes, packed_bytes};
use crate::scratch::with_bytes;
use crate::search::SquaredErrors;
use crate::table::GEMM_UNITS;
use crate::weight_type::BLOCK_LEN;
use crate::weight_type::WeightType;

/// Weight rows per task when a pool shares a matrix product with several tokens.
const ROWS_PER_TASK: usize = 64;

impl Kernels {
    /// Quantizes rows of floats (`x` is `rows × acts.k()`) into `acts`, replacing what it held.
    ///
    /// # Panics
    /// If `x` is not whole rows.
    pub fn quantize_acts(self, x: &[f32], acts: &mut Q8Acts) {
        let k = acts.k();
        assert!(x.len().is_multiple_of(k), "quantize_acts: {} floats are not rows of {k}", x.len());
        acts.begin(x.len() / k).fill(|row, q, d, sums| {
            // SAFETY: the table is of this CPU; x has k floats for the row, q k values, d and sums k / 32 each.
            unsafe { (self.table.quantize_q8)(&x[row * k..(row + 1) * k], q, d, sums) };
        });
    }

    /// [`Self::quantize_acts`] shared among the threads of a pool.
    ///
    /// # Panics
    /// As [`Self::quantize_acts`].
    pub fn quantize_acts_pool(self, pool: &Pool, x: &[f32], acts: &mut Q8Acts) {
        let k = acts.k();
        assert!(x.len().is_multiple_of(k), "quantize_acts: {} floats are not rows of {k}", x.len());
        acts.begin(x.len() / k).fill_pool(pool, &|row, q, d, sums| {
            // SAFETY: as in `quantize_acts`.
            unsafe { (self.table.quantize_q8)(&x[row * k..(row + 1) * k], q, d, sums) };
        });
    }

    /// Copies some rows of a batch, in the order of `rows`, shared among the threads of a pool: the tokens that go to one expert.
    ///
    /// # Panics
    /// If the two differ in `k` or a row does not exist.
    pub fn gather_acts_pool(self, pool: &Pool, src: &Q8Acts, rows: &[u32], dst: &mut Q8Acts) {
        assert_eq!(src.k(), dst.k(), "gather_acts: k");
        let kb = src.blocks();
        dst.begin(rows.len()).fill_pool(pool, &|i, q, d, sums| {
            let from = src.row(rows[i] as usize);
            q.copy_from_slice(&from.q[..kb * BLOCK_LEN]);
            d.copy_from_slice(&from.d[..kb]);
            sums.copy_from_slice(&from.sums[..kb]);
        });
    }

    /// `out[t][r] = Σ_k w[r][k] * acts[first + t][k]` for the columns `r` of `out`, one row of `out` per token.
    ///
    /// With up to [`FEW_ROWS`] tokens this streams the weights, once for all of them; with more it unpacks each 16 rows once and
    /// multiplies blocks of tokens. Same bits either way.
    ///
    /// # Panics
    /// If `acts.k()` is not `w.k()`, rows or columns are missing, the first column is not a multiple of 16, or more than [`FEW_ROWS`]
    /// tokens start elsewhere than at a multiple of 4.
    pub fn linear_r16(self, w: R16<'_>, acts: &Q8Acts, first: usize, out: &mut ColumnsMut<'_>) {
        let (columns, tokens) = (out.columns(), out.rows());
        assert_eq!(acts.k(), w.k(), "linear_r16: k of activations and weights");
        assert!(columns.end <= w.rows(), "linear_r16: output {} of {}", columns.end, w.rows());
        assert!(columns.start.is_multiple_of(R16_ROWS), "linear_r16: columns start at {}", columns.start);
        let kb = acts.blocks();
        let groups = columns.start / R16_ROWS..columns.end.div_ceil(R16_ROWS);
        if tokens <= FEW_ROWS {
            return self.gemv(w.ty(), kb, w.groups(groups), acts.few(first..first + tokens).as_slice(), out);
        }
        let units = units_of(acts, first, tokens);
        let kind = PanelKind::of(w.ty());
        with_bytes(kb * kind.block_bytes(), |panel| {
            for group in groups {
                // SAFETY: the table is of this CPU; a group has kb tiles and the panel kb blocks.
                unsafe { (self.table.panel_r16)(w.ty(), kb, w.groups(group..group + 1), panel) };
                self.gemm_panel(kind, kb, panel, units, group * R16_ROWS, out);
            }
        });
    }

    /// The outputs that are the columns of `out`, for as many tokens as it has rows (at most [`FEW_ROWS`]), from the row groups `tiles`:
    /// each byte is read once, in order.
    pub(crate) fn gemv(self, ty: WeightType, kb: usize, tiles: &[u8], acts: &[ActRow<'_>], out: &mut ColumnsMut<'_>) {
        let (n, tokens) = (out.columns().len(), acts.len());
        assert!(tokens == out.rows() && tokens <= FEW_ROWS, "gemv: {tokens} tokens");
        if n == 0 || tokens == 0 {
            return;
        }
        let group = group_bytes(ty, kb);
        assert_eq!(tiles.len(), n.div_ceil(R16_ROWS) * group, "gemv: tiles of {n} rows");
        let (whole, last) = (n / R16_ROWS * R16_ROWS, n % R16_ROWS);
        let mut rows: [&mut [f32]; FEW_ROWS] = Default::default();
        let mut tails: [&mut [f32]; FEW_ROWS] = Default::default();
        for ((row, tail), out) in rows.iter_mut().zip(&mut tails).zip(out.rows_mut()) {
            (*row, *tail) = out.split_at_mut(whole);
        }
        let (tiles, last_tiles) = tiles.split_at(whole / R16_ROWS * group);
        // SAFETY: the table is of this CPU; the tiles are those of `whole` outputs and the tokens have kb blocks.
        unsafe { (self.table.gemv_r16)(ty, kb, tiles, acts, &mut rows[..tokens]) };
        if last > 0 {
            let mut outputs = [[0f32; R16_ROWS]; FEW_ROWS];
            let mut rows = outputs.each_mut().map(|row| &mut row[..]);
            // SAFETY: as above, for the last row group.
            unsafe { (self.table.gemv_r16)(ty, kb, last_tiles, acts, &mut rows[..tokens]) };
            for (tail, outputs) in tails.iter_mut().zip(&outputs) {
                tail.copy_from_slice(&outputs[..tail.len()]);
            }
        }
    }

    /// Multiplies one weight panel with all tokens of `out`, columns `column..column + 16` (cut to those that `out` has).
    pub(crate) fn gemm_panel(
        self,
        kind: PanelKind,
        kb: usize,
        panel: &[u8],
        units: &[u8],
        column: usize,
        out: &mut ColumnsMut<'_>,
    ) {
        let mut block = [0f32; GEMM_UNITS * UNIT_ROWS * R16_ROWS];
        let at = column - out.columns().start;
        for (i, units) in units.chunks(GEMM_UNITS * kb * UNIT_BLOCK).enumerate() {
            // SAFETY: the table is of this CPU; the panel has kb blocks, and there are 1 to GEMM_UNITS whole units.
            unsafe { (self.table.gemm)(kind, kb, panel, units, &mut block) };
            let first = i * GEMM_UNITS * UNIT_ROWS;
            for (t, values) in block.as_chunks().0.iter().enumerate().take(out.rows() - first) {
                out.put(first + t, at, values);
            }
        }
    }

    /// `out[t][r] = Σ_k w[r][k] * acts[t][k]` for all rows of `acts` and all of `w`, shared among the threads of a pool, while the calling
    /// thread first runs `own` (with more than [`FEW_ROWS`] tokens: before). `out` is `acts.rows() × w.rows()`.
    ///
    /// Up to [`FEW_ROWS`] tokens cost about the time of reading the weights once. A token's bits do not depend on the others.
    ///
    /// # Panics
    /// If a length does not fit, and as `own`.
    pub fn linear_r16_pool(self, pool: &Pool, w: R16<'_>, acts: &Q8Acts, out: &mut [f32], own: impl FnOnce()) {
        assert_eq!(out.len(), acts.rows() * w.rows(), "linear_r16_pool: output length");
        assert_eq!(acts.k(), w.k(), "linear_r16_pool: k of activations and weights");
        if acts.rows() <= FEW_ROWS {
            let job = |_, mut out: ColumnsMut<'_>| self.linear_r16(w, acts, 0, &mut out);
            pool.run_ranges(out, w.rows(), RowSplit::All, R16_ROWS, own, &job);
        } else {
            own();
            pool.run_tiles(out, w.rows(), RowSplit::All, ROWS_PER_TASK, &|_, mut out| {
                self.linear_r16(w, acts, 0, &mut out)
            });
        }
    }

    /// `out[t][r] = Σ_k w[r][k] * x[t][k]` for the columns `r` of `out`; `w` holds row-major rows of `k` values of a float type.
    ///
    /// # Panics
    /// If `ty` is quantized, `w` is not whole rows, columns are missing or `x` is not `out.rows() × k`.
    pub fn linear_float(self, ty: WeightType, k: usize, w: &[u8], x: &[f32], out: &mut ColumnsMut<'_>) {
        assert!(!ty.is_quantized(), "linear_float: {ty}");
        let row_bytes = k * ty.block_bytes();
        let columns = out.columns();
        assert!(k > 0 && w.len().is_multiple_of(row_bytes), "linear_float: {} bytes are not rows", w.len());
        assert!(columns.end <= w.len() / row_bytes, "linear_float: output {} is missing", columns.end);
        assert_eq!(x.len(), out.rows() * k, "linear_float: input length");
        // A few rows at a time stay in cache for all tokens.
        for start in columns.clone().step_by(R16_ROWS) {
            let end = columns.end.min(start + R16_ROWS);
            let rows = &w[start * row_bytes..end * row_bytes];
            for (t, x) in x.chunks_exact(k).enumerate() {
                let out = &mut out.row_mut(t)[start - columns.start..end - columns.start];
                // SAFETY: the table is of this CPU; there is one row of k values for each output.
                unsafe { (self.table.dots)(ty, rows, x, out) };
            }
        }
    }

    /// `out[i] = x[i] / sqrt(mean(x²) + eps) * weight[i]`.
    ///
    /// # Panics
    /// If the lengths differ or are 0.
    pub fn rms_norm(self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        assert!(!x.is_empty() && x.len() == weight.len() && x.len() == out.len(), "rms_norm: lengths");
        // SAFETY: the table is of this CPU; the lengths are equal.
        unsafe { (self.table.rms_norm)(x, weight, eps, out) };
    }

    /// Rotates each head of `x` (`n × head_dim`) in place: halves `(a, b)` become `(a cos - b sin, b cos + a sin)`, with
    /// `head_dim / 2` cosines and sines of the position.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn rope(self, x: &mut [f32], cos: &[f32], sin: &[f32]) {
        let half = cos.len();
        assert!(half > 0 && sin.len() == half && x.len().is_multiple_of(2 * half), "rope: lengths");
        for head in x.chunks_exact_mut(2 * half) {
            let (a, b) = head.split_at_mut(half);
            for (((a, b), &c), &s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
            }
        }
    }

    /// `out[i] += weight * x[i]`, product and sum rounded apart.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add_scaled(self, out: &mut [f32], weight: f32, x: &[f32]) {
        assert_eq!(out.len(), x.len(), "add_scaled: lengths");
        for (o, &v) in out.iter_mut().zip(x) {
            *o += weight * v;
        }
    }

    /// [`crate::quantize_row_q4_0`], faster: the same bytes.
    ///
    /// # Panics
    /// As that.
    pub fn quantize_row_q4_0(self, x: &[f32], out: &mut [u8]) {
        assert_eq!(WeightType::Q4_0.row_bytes(x.len()), Some(out.len()), "quantize_row_q4_0: lengths");
        // SAFETY: the table is of this CPU; `out` has 18 bytes for each 32 floats.
        unsafe { (self.table.quantize_q4_0)(x, out) };
    }

    /// [`Self::quantize_row_q4_0`], then for each block the scale of least squared error, where it beats the reference's: never
    /// worse for any block. Returns what the errors were and are.
    ///
    /// # Panics
    /// As that.
    pub fn quantize_row_q4_0_search(self, x: &[f32], out: &mut [u8]) -> SquaredErrors {
        self.quantize_row_q4_0(x, out);
        // SAFETY: the table is of this CPU; `out` has the 18 bytes of each 32 floats.
        unsafe { (self.table.improve_q4_0)(x, None, out) }
    }

    /// The same, where the squared error of each weight counts as often as `importance` says, numbers from 0. The errors that are returned
    /// are so weighed.
    ///
    /// # Panics
    /// As that, and where `importance` is not as long as `x`.
    pub fn quantize_row_q4_0_weighed(self, x: &[f32], importance: &[f32], out: &mut [u8]) -> SquaredErrors {
        assert_eq!(x.len(), importance.len(), "quantize_row_q4_0_weighed: lengths");
        self.quantize_row_q4_0(x, out);
        // SAFETY: the table is of this CPU; `out` has the 18 bytes of each 32 floats.
        unsafe { (self.table.improve_q4_0)(x, Some(importance), out) }
    }

    /// [`crate::r16::pack`], faster: the same bytes.
    ///
    /// # Panics
    /// As that.
    pub fn pack_r16(self, ty: WeightType, rows: usize, k: usize, canonical: &[u8], tiles: &mut [u8]) {
        assert_eq!(
            ty.row_bytes(k).and_then(|b| b.checked_mul(rows)),
            Some(canonical.len()),
            "pack_r16: canonical bytes"
        );
        assert_eq!(packed_bytes(ty, rows, k), Some(tiles.len()), "pack_r16: packed bytes");
        if canonical.is_empty() {
            return;
        }
        let row_bytes = canonical.len() / rows;
        let at = rows / R16_ROWS * R16_ROWS * row_bytes;
        let (whole, last) = tiles.split_at_mut(at);
        // SAFETY: the table is of this CPU; a multiple of 16 rows and as many bytes of tiles.
        unsafe { (self.table.pack_r16)(ty, k / BLOCK_LEN, &canonical[..at], whole) };
        if !rows.is_multiple_of(R16_ROWS) {
            crate::r16::pack(ty, rows % R16_ROWS, k, &canonical[at..], last);
        }
    }

    /// [`ExpertFormat::pack`], faster: the same bytes. This is what filling a cache slot from a canonical file costs.
    ///
    /// # Panics
    /// As that.
    pub fn pack_expert(self, format: &ExpertFormat, matrix: Matrix, canonical: &[u8], region: &mut [u8]) {
        format.check(matrix, canonical.len(), region.len());
        let MatrixFormat { ty, arrangement } = format.matrix(matrix);
        let (rows, columns) = format.shape(matrix);
        match arrangement {
            Arrangement::Tiles => self.pack_r16(ty, rows, columns, canonical, region),
            Arrangement::Canonical => format.pack(matrix, canonical, region),
            // SAFETY: the table is of this CPU; the lengths are those of the format.
            Arrangement::Rows => unsafe { (self.table.pack_up)(&format.up(), canonical, region) },
            // SAFETY: as above.
            Arrangement::Columns => unsafe { (self.table.pack_down)(&format.down(), rows, canonical, region) },
        }
    }
}

/// The units of tokens `first..first + tokens`.
///
/// # Panics
/// If `first` is not a multiple of 4, there are not as many tokens, or only one in all.
pub(crate) fn units_of(acts: &Q8Acts, first: usize, tokens: usize) -> &[u8] {
    assert!(first.is_multiple_of(UNIT_ROWS), "tokens start at {first}, not at a multiple of 4");
    assert!(acts.rows() > 1, "a single row has no units");
    assert!(tokens <= acts.rows() && first <= acts.rows() - tokens, "token {first}+{tokens} of {}", acts.rows());
    let bytes = acts.unit_bytes();
    &acts.units()[first / UNIT_ROWS * bytes..(first + tokens).div_ceil(UNIT_ROWS) * bytes]
}
