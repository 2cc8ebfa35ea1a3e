//! A matrix of which a few rows are wanted at a time: an LM head behind a predictor.
//!
//! Rows lie as those of an expert's up matrix do, each one run of bytes, so that a row that is not wanted is not read. They are cut
//! into chunks, which are filled and multiplied apart. A row's product has the bits that it has in a product with the whole matrix.

use crate::aligned::AlignedBuf;
use crate::dispatch::Kernels;
use crate::expert_format::{Arrangement, ExpertFormat, Matrix, MatrixFormat};
use crate::experts::ExpertInput;
use crate::live::LiveRows;
use crate::pool::Pool;
use crate::weight_type::{BLOCK_LEN, WeightType};

/// Rows of a chunk.
const CHUNK_ROWS: usize = 2048;
/// Rows that are multiplied in one call.
const AT_ONCE: usize = 256;

/// `rows × k` weights of one type.
#[derive(Debug)]
pub struct SomeRows {
    ty: WeightType,
    rows: usize,
    k: usize,
    /// A whole chunk, as the up matrix of an expert of which nothing else is there; and the last one.
    whole: ExpertFormat,
    last: ExpertFormat,
    /// A chunk of as few rows as there can be.
    least: ExpertFormat,
    data: AlignedBuf<u8>,
}

/// An expert whose up matrix has `rows` rows of `k` values.
fn chunk_format(ty: WeightType, rows: usize, k: usize) -> Option<ExpertFormat> {
    let types = [WeightType::F32, ty, WeightType::F32];
    ExpertFormat::with_types(types, k, rows.next_multiple_of(BLOCK_LEN)).ok()
}

fn up_bytes(format: &ExpertFormat) -> usize {
    format.region(Matrix::Up).len()
}

impl SomeRows {
    /// A matrix of zeros; `None` where rows are no whole blocks of 32 values or the size overflows.
    pub fn new(ty: WeightType, rows: usize, k: usize) -> Option<Self> {
        let bytes = Self::bytes_for(ty, rows, k)?;
        Some(Self {
            ty,
            rows,
            k,
            whole: chunk_format(ty, CHUNK_ROWS, k)?,
            last: chunk_format(ty, (rows - 1) % CHUNK_ROWS + 1, k)?,
            least: chunk_format(ty, 1, k)?,
            data: AlignedBuf::zeroed_in_arena(bytes),
        })
    }

    /// Bytes that a matrix takes in memory; `None` where there is none of this shape.
    pub fn bytes_for(ty: WeightType, rows: usize, k: usize) -> Option<usize> {
        if rows == 0 || !k.is_multiple_of(BLOCK_LEN) {
            return None;
        }
        let last = chunk_format(ty, (rows - 1) % CHUNK_ROWS + 1, k)?;
        let whole = up_bytes(&chunk_format(ty, CHUNK_ROWS, k)?).checked_mul((rows - 1) / CHUNK_ROWS)?;
        whole.checked_add(up_bytes(&last))
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Bytes of weights.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// Fills all rows, shared among the threads of a pool: `read` puts the canonical bytes of the rows from `first` on into a buffer of
    /// their length.
    ///
    /// # Errors
    /// One of those of `read`.
    pub fn fill<E: Send>(
        &mut self,
        kernels: Kernels,
        pool: &Pool,
        read: impl Fn(usize, &mut [u8]) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        let failed = std::sync::Mutex::new(None);
        let row_bytes = self.least.canonical_bytes(Matrix::Up) / self.least.n_ff();
        let (rows, whole, last) = (self.rows, &self.whole, &self.last);
        pool.run_chunks(&mut self.data, up_bytes(whole), &|chunk, region| {
            let first = chunk * CHUNK_ROWS;
            let n = CHUNK_ROWS.min(rows - first);
            let format = if n == CHUNK_ROWS { whole } else { last };
            let mut canonical = vec![0; format.canonical_bytes(Matrix::Up)];
            match read(first, &mut canonical[..n * row_bytes]) {
                Ok(()) => kernels.pack_expert(format, Matrix::Up, &canonical, region),
                Err(error) => {
                    let mut failed = failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    failed.get_or_insert(error);
                }
            }
        });
        let failed = failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        failed.map_or(Ok(()), Err)
    }

    /// The format and the bytes of the chunk that row `row` lies in, and its place there.
    fn chunk_of(&self, row: usize) -> (&ExpertFormat, &[u8], usize) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let start = row / CHUNK_ROWS * up_bytes(&self.whole);
        let is_last = row / CHUNK_ROWS == (self.rows - 1) / CHUNK_ROWS;
        let format = if is_last { &self.last } else { &self.whole };
        (format, &self.data[start..start + up_bytes(format)], row % CHUNK_ROWS)
    }

    /// Writes a row as floats.
    ///
    /// # Panics
    /// If there is no such row or `out` is not `k` long.
    pub fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.k, "row length");
        let (format, region, row) = self.chunk_of(row);
        let row_bytes = self.least.canonical_bytes(Matrix::Up) / self.least.n_ff();
        if format.matrix(Matrix::Up).arrangement != Arrangement::Rows {
            return crate::block::dequantize_row(self.ty, &region[row * row_bytes..(row + 1) * row_bytes], out);
        }
        // The first row of a chunk of which the others are zeros.
        let (up, least) = (format.up(), self.least.up());
        let mut alone = vec![0; up_bytes(&self.least)];
        alone[..up.head_bytes].copy_from_slice(&region[row * up.head_bytes..][..up.head_bytes]);
        let bytes = &region[up.scales_bytes + row * up.row_bytes..][..up.row_bytes];
        alone[least.scales_bytes..][..least.row_bytes].copy_from_slice(bytes);
        let mut canonical = vec![0; self.least.canonical_bytes(Matrix::Up)];
        self.least.unpack(Matrix::Up, &alone, &mut canonical);
        crate::block::dequantize_row(self.ty, &canonical[..row_bytes], out);
    }
}

impl Kernels {
    /// `out[i] = row ids[i] · row `row` of the input` for ascending `ids`; only these rows are read.
    ///
    /// # Panics
    /// If a row does not exist, or the lengths do not fit.
    pub fn some_rows(self, matrix: &SomeRows, ids: &[u32], input: ExpertInput<'_>, row: usize, out: &mut [f32]) {
        assert_eq!(ids.len(), out.len(), "some_rows: outputs");
        let mut done = 0;
        while let Some(&first) = ids.get(done) {
            let (format, region, _) = matrix.chunk_of(first as usize);
            let start = first as usize / CHUNK_ROWS * CHUNK_ROWS;
            let end = matrix.rows.min(start + CHUNK_ROWS);
            let (mut local, mut n) = ([0u32; AT_ONCE], 0);
            for &id in ids[done..].iter().take(AT_ONCE).take_while(|&&id| (start..end).contains(&(id as usize))) {
                local[n] = id - start as u32;
                n += 1;
            }
            assert!(n > 0, "some_rows: ids that do not ascend");
            self.chunk_rows(format, region, &local[..n], input, row, &mut out[done..done + n]);
            done += n;
        }
    }

    /// Rows of one chunk times row `row` of the input.
    fn chunk_rows(
        self,
        format: &ExpertFormat,
        region: &[u8],
        ids: &[u32],
        input: ExpertInput<'_>,
        row: usize,
        out: &mut [f32],
    ) {
        let MatrixFormat { ty, arrangement } = format.matrix(Matrix::Up);
        let live = LiveRows { ids, masks: &[1; AT_ONCE][..ids.len()] };
        if arrangement == Arrangement::Rows {
            assert_eq!(input.acts.k(), format.n_embd(), "some_rows: k of the activations");
            let acts = input.acts.few(std::iter::once(row));
            // SAFETY: the table is of this CPU; the rows exist, the activations have n_embd values, one output per row.
            unsafe { (self.table.up_rows)(&format.up(), region, live, acts.as_slice(), out) };
        } else {
            self.canonical_live_rows(format, ty, region, live, input, &[row as u32], out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activations::Q8Acts;
    use crate::out::ColumnsMut;
    use crate::r16::{self, R16};
    use crate::table::Isa;

    /// Rows of a matrix of more than one chunk have the bits of a product with the whole matrix, and read back as they were.
    #[test]
    fn some_rows_are_those_of_the_whole_matrix() {
        let (rows, k) = (CHUNK_ROWS + 83, 256);
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 40
        };
        let x: Vec<f32> = (0..k).map(|_| next() as f32 / 1e7 - 0.8).collect();
        let ids: Vec<u32> = (0..rows as u32).filter(|_| next() % 5 == 0).collect();
        let pool = Pool::new(2).unwrap();
        for ty in WeightType::ALL {
            let row_bytes = ty.row_bytes(k).unwrap();
            let mut canonical: Vec<u8> = (0..rows * row_bytes).map(|_| next() as u8).collect();
            // Floats and scales that are numbers.
            canonical.iter_mut().for_each(|byte| *byte &= 0x3b);
            for kernels in Isa::ALL.into_iter().filter_map(Kernels::for_isa) {
                let mut matrix = SomeRows::new(ty, rows, k).unwrap();
                let read = |first: usize, out: &mut [u8]| {
                    out.copy_from_slice(&canonical[first * row_bytes..][..out.len()]);
                    Ok::<_, ()>(())
                };
                matrix.fill(kernels, &pool, read).unwrap();
                let mut acts = Q8Acts::new(k, 1);
                kernels.quantize_acts(&x, &mut acts);
                let mut got = vec![f32::NAN; ids.len()];
                kernels.some_rows(&matrix, &ids, ExpertInput { floats: &x, acts: &acts }, 0, &mut got);
                let mut all = vec![0.0; rows];
                if ty.is_quantized() {
                    let mut tiles = vec![0; r16::packed_bytes(ty, rows, k).unwrap()];
                    r16::pack(ty, rows, k, &canonical, &mut tiles);
                    let weights = R16::new(ty, rows, k, &tiles);
                    kernels.linear_r16(weights, &acts, 0, &mut ColumnsMut::new(&mut all, rows));
                } else {
                    kernels.linear_float(ty, k, &canonical, &x, &mut ColumnsMut::new(&mut all, rows));
                }
                for (&id, got) in ids.iter().zip(&got) {
                    assert_eq!(got.to_bits(), all[id as usize].to_bits(), "{ty} {kernels:?} row {id}");
                }
                for row in [0, 1, CHUNK_ROWS - 1, CHUNK_ROWS, rows - 1] {
                    let (mut got, mut want) = (vec![0.0; k], vec![0.0; k]);
                    matrix.row_to_f32(row, &mut got);
                    crate::block::dequantize_row(ty, &canonical[row * row_bytes..][..row_bytes], &mut want);
                    assert!(got == want, "{ty} row {row}");
                }
            }
        }
        assert!(SomeRows::new(WeightType::Q4_0, 0, 32).is_none() && SomeRows::new(WeightType::Q4_0, 5, 33).is_none());
        assert!(SomeRows::new(WeightType::Q4_0, usize::MAX, 1 << 20).is_none());
    }
}
