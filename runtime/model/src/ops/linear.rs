//! Matrices that are used whole: attention projections, router and head.
//!
//! Quantized ones are interleaved by 16 rows while they are read and multiplied with Q8_0 activations; float ones are
//! kept as the file has them and multiplied in f32.

use std::sync::{Mutex, PoisonError};

use candle_core::Error;
use st_kernels::{AlignedBuf, ColumnsMut, Q8Acts, R16, RowSplit, WeightType, dequantize_row, r16};

use super::{Compute, operands};
use crate::activations::Rows;
use crate::error::ModelError;
use crate::weights::TensorSource;

/// Output rows of a float matrix that one task takes: few, since a router has as many as there are experts.
const TASK_ROWS: usize = 16;
/// Rows that one task reads and interleaves at a time.
const LOAD_ROWS: usize = 256;

/// Quantized activations of each width in use, refilled for every product.
#[derive(Debug, Default)]
pub(crate) struct ActsScratch(Vec<Q8Acts>);

impl ActsScratch {
    /// The buffer for rows of `k` values.
    pub(crate) fn of(&mut self, k: usize) -> &mut Q8Acts {
        let i = match self.0.iter().position(|acts| acts.k() == k) {
            Some(i) => i,
            None => {
                self.0.push(Q8Acts::new(k, 1));
                self.0.len() - 1
            }
        };
        &mut self.0[i]
    }
}

/// `out = W · x` for a matrix of `[n_out, n_in]`, which may be several matrices of different types, one below the other.
#[derive(Debug)]
pub(crate) struct Linear {
    parts: Vec<Part>,
    /// Outputs of each part.
    widths: Vec<usize>,
    n_in: usize,
}

/// Rows of one type.
#[derive(Debug)]
struct Part {
    ty: WeightType,
    n_out: usize,
    n_in: usize,
    data: AlignedBuf<u8>,
}

impl Linear {
    /// Reads the matrices `parts` (name and rows each), one below the other. Neighbours of one type become one matrix.
    ///
    /// # Errors
    /// Where their rows are not whole blocks, or reading fails.
    pub(crate) fn load(
        source: &TensorSource<'_>,
        cx: &Compute,
        parts: &[(String, usize)],
        n_in: usize,
    ) -> Result<Self, ModelError> {
        let types = parts.iter().map(|(name, _)| source.weight_type(name)).collect::<Result<Vec<_>, _>>()?;
        let mut loaded = Vec::new();
        let mut start = 0;
        for run in types.chunk_by(|a, b| a == b) {
            loaded.push(Part::load(source, cx, run[0], &parts[start..start + run.len()], n_in)?);
            start += run.len();
        }
        Ok(Self { widths: loaded.iter().map(|part| part.n_out).collect(), parts: loaded, n_in })
    }

    /// A matrix of a quantized type out of its canonical bytes.
    pub(crate) fn from_canonical(cx: &Compute, ty: WeightType, n_out: usize, n_in: usize, canonical: &[u8]) -> Self {
        let mut data = AlignedBuf::zeroed_in_arena(r16::packed_bytes(ty, n_out, n_in).unwrap_or(0));
        cx.kernels.pack_r16(ty, n_out, n_in, canonical, &mut data);
        Self { parts: vec![Part { ty, n_out, n_in, data }], widths: vec![n_out], n_in }
    }

    /// Bytes that a matrix takes in memory.
    pub(crate) fn bytes_for(ty: WeightType, n_out: usize, n_in: usize) -> Option<usize> {
        match ty.is_quantized() {
            true => r16::packed_bytes(ty, n_out, n_in),
            false => ty.row_bytes(n_in)?.checked_mul(n_out),
        }
    }

    /// Outputs.
    pub(crate) fn n_out(&self) -> usize {
        self.widths.iter().sum()
    }

    /// Inputs.
    pub(crate) fn n_in(&self) -> usize {
        self.n_in
    }

    /// Bytes of weights.
    pub(crate) fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.data.len()).sum()
    }

    /// Writes the products of `x` (`[rows, n_in]`) to `out` (`[rows, n_out]`).
    pub(crate) fn forward(
        &self,
        cx: &Compute,
        scratch: &mut ActsScratch,
        x: &Rows,
        out: &mut Rows,
    ) -> Result<(), ModelError> {
        self.forward_while(cx, scratch, x, out, || ())
    }

    /// [`Linear::forward`], while the calling thread first runs `own` and the others begin; with several rows `own` comes before.
    /// Returns what `own` returned.
    pub(crate) fn forward_while<R>(
        &self,
        cx: &Compute,
        scratch: &mut ActsScratch,
        x: &Rows,
        out: &mut Rows,
        own: impl FnOnce() -> R,
    ) -> Result<R, ModelError> {
        let (x, out) = operands("linear", x, self.n_in, out, self.n_out())?;
        let mut result = None;
        self.apply(cx, scratch, x, out, || result = Some(own()));
        result.ok_or_else(|| Error::Msg("an operation was not run".into()).into())
    }

    /// [`Linear::forward_while`] on plain slices.
    pub(crate) fn apply(
        &self,
        cx: &Compute,
        scratch: &mut ActsScratch,
        x: &[f32],
        out: &mut [f32],
        own: impl FnOnce(),
    ) {
        let acts = scratch.of(self.n_in);
        let quantized = self.parts.iter().filter(|part| part.ty.is_quantized()).count();
        if quantized > 0 {
            cx.kernels.quantize_acts_pool(&cx.pool, x, acts);
        }
        let acts = &*acts;
        match &self.parts[..] {
            [part] if quantized == 1 => cx.kernels.linear_r16_pool(&cx.pool, part.tiles(), acts, out, own),
            [part] => {
                own();
                cx.pool.run_tiles(out, part.n_out, RowSplit::All, TASK_ROWS, &|_, mut out| {
                    part.columns(cx, x, acts, &mut out)
                });
            }
            parts => cx.pool.run_parts(out, &self.widths, TASK_ROWS, own, &|i, mut out| {
                parts[i].columns(cx, x, acts, &mut out);
            }),
        }
    }

    /// Row `row` in f32.
    pub(crate) fn row_f32(&self, mut row: usize, out: &mut [f32]) {
        for part in &self.parts {
            if row < part.n_out {
                return part.row_f32(row, out);
            }
            row -= part.n_out;
        }
    }
}

impl Part {
    /// Reads the matrices `parts`, all of type `ty`, one below the other.
    fn load(
        source: &TensorSource<'_>,
        cx: &Compute,
        ty: WeightType,
        parts: &[(String, usize)],
        n_in: usize,
    ) -> Result<Self, ModelError> {
        let n_out = parts.iter().map(|(_, rows)| rows).sum();
        let size = |bytes: Option<usize>| {
            bytes.ok_or_else(|| ModelError::Blocks { name: parts[0].0.clone(), ty: ty.name(), n_in })
        };
        let row_bytes = size(ty.row_bytes(n_in))?;
        let chunk_bytes = size(Linear::bytes_for(ty, LOAD_ROWS, n_in))?;
        let mut data = AlignedBuf::zeroed_in_arena(size(Linear::bytes_for(ty, n_out, n_in))?);
        let failed = Mutex::new(None);
        cx.pool.run_chunks(&mut data, chunk_bytes, &|chunk, out| {
            let first = chunk * LOAD_ROWS;
            let rows = LOAD_ROWS.min(n_out - first);
            let mut read = || -> Result<(), ModelError> {
                if !ty.is_quantized() {
                    read_rows(source, parts, row_bytes, first, out)?;
                    return check_finite(ty, &parts[0].0, out);
                }
                let mut canonical = vec![0; rows * row_bytes];
                read_rows(source, parts, row_bytes, first, &mut canonical)?;
                cx.kernels.pack_r16(ty, rows, n_in, &canonical, out);
                Ok(())
            };
            if let Err(error) = read() {
                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        });
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(Self { ty, n_out, n_in, data }),
        }
    }

    /// The matrix of a quantized type.
    fn tiles(&self) -> R16<'_> {
        R16::new(self.ty, self.n_out, self.n_in, &self.data)
    }

    /// The outputs that are the columns of `out`, for all rows of `x`, which `acts` holds quantized where a part is.
    fn columns(&self, cx: &Compute, x: &[f32], acts: &Q8Acts, out: &mut ColumnsMut<'_>) {
        match self.ty.is_quantized() {
            true => cx.kernels.linear_r16(self.tiles(), acts, 0, out),
            false => cx.kernels.linear_float(self.ty, self.n_in, &self.data, x, out),
        }
    }

    /// Row `row` in f32.
    fn row_f32(&self, row: usize, out: &mut [f32]) {
        if self.ty.is_quantized() {
            self.tiles().row_to_f32(row, out);
        } else {
            let bytes = self.data.len() / self.n_out;
            dequantize_row(self.ty, &self.data[row * bytes..(row + 1) * bytes], out);
        }
    }
}

/// Refuses f32 weights that are no numbers: a router's would only show as strange choices.
pub(super) fn check_finite(ty: WeightType, name: &str, bytes: &[u8]) -> Result<(), ModelError> {
    if ty != WeightType::F32 {
        return Ok(());
    }
    let mut values = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
    match values.find(|value| !value.is_finite()) {
        Some(got) => Err(ModelError::NotFinite { name: name.to_owned(), got }),
        None => Ok(()),
    }
}

/// Rows from `first` on of `parts` one below the other, as many as `out` holds.
fn read_rows(
    source: &TensorSource<'_>,
    parts: &[(String, usize)],
    row_bytes: usize,
    first: usize,
    mut out: &mut [u8],
) -> Result<(), ModelError> {
    let mut part_start = 0;
    for (name, rows) in parts {
        let start = first.max(part_start);
        let here = (part_start + rows).saturating_sub(start).min(out.len() / row_bytes);
        if here > 0 {
            let (now, later) = out.split_at_mut(here * row_bytes);
            source.read_rows(name, start - part_start, row_bytes, now)?;
            out = later;
        }
        part_start += rows;
    }
    Ok(())
}
