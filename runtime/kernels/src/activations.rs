//! Activations quantized to int8: what the integer kernels multiply weights with.
//!
//! Every row of `k` floats becomes `k / 32` Q8_0 blocks (ggml's rounding, the scale rounded through f16), kept in two forms:
//!
//! - *rows*: the int8 values of a row in natural order, padded with zeros to whole groups of 4 blocks (128 columns), beside
//!   one f32 scale and two sums per block. Kernels for a few tokens read these.
//! - *units*: 4 rows together, for the kernels with many tokens. For each block 176 bytes: for each of the 8 column
//!   groups `g` the bytes of columns `4g..4g+4` of row 0, 1, 2, 3; then 4 f32 scales; then the two i16 sums of each of the 4; then 4 i32
//!   `-8 * sum`, where sums of products with an offset of 8 start. Missing rows
//!   are zero. Filled only when there is more than one row.

use crate::aligned::AlignedBuf;
use crate::pool::Pool;
use crate::weight_type::BLOCK_LEN;

/// Rows per unit: where one expert's tokens may begin in a batch that several share.
pub const UNIT_ROWS: usize = 4;
/// Most rows that go through a matrix together at the price of reading it once: the tokens of several conversations, or those
/// that are checked against a draft. More than these are a prompt.
pub const FEW_ROWS: usize = 8;
/// Rows up to which one thread quantizes alone: what a token of each of a few conversations makes, which allocates nothing.
const MAX_ALONE: usize = 8 * FEW_ROWS;
/// Bytes of one block of a unit.
pub(crate) const UNIT_BLOCK: usize = 176;

/// Sums of the first and of the last 16 values of a block: what weights with an offset or a minimum are corrected by.
pub(crate) type Sums = [i16; 2];

/// What sums of products start from where weights have an offset: `-offset` times the sum of a block.
#[inline(always)]
pub(crate) fn start(offset: i32, sums: Sums) -> i32 {
    -offset * (i32::from(sums[0]) + i32::from(sums[1]))
}

/// One quantized row, all slices padded to a multiple of 4 blocks; padding is zero.
#[derive(Clone, Copy)]
pub(crate) struct ActRow<'a> {
    /// int8 values, 32 per block.
    pub q: &'a [i8],
    /// Scale of each block, an f16 value as f32.
    pub d: &'a [f32],
    /// Sums of the values of each block.
    pub sums: &'a [Sums],
}

/// A batch of activation rows quantized to Q8_0. Filled by [`crate::Kernels::quantize_acts`] and
/// [`crate::Kernels::gather_acts_pool`]; refilling allocates only when there are more rows than ever before.
#[derive(Debug, Clone)]
pub struct Q8Acts {
    k: usize,
    rows: usize,
    capacity: usize,
    q: AlignedBuf<i8>,
    d: AlignedBuf<f32>,
    sums: AlignedBuf<Sums>,
    units: AlignedBuf<u8>,
}

impl Q8Acts {
    /// An empty batch for rows of `k` values, with room for `capacity` rows.
    ///
    /// # Panics
    /// If `k` is not a positive multiple of 32.
    pub fn new(k: usize, capacity: usize) -> Self {
        assert!(k > 0 && k.is_multiple_of(BLOCK_LEN), "activation rows of {k} values are not whole blocks of 32");
        let mut acts = Self {
            k,
            rows: 0,
            capacity: 0,
            q: AlignedBuf::default(),
            d: AlignedBuf::default(),
            sums: AlignedBuf::default(),
            units: AlignedBuf::default(),
        };
        acts.reserve(capacity);
        acts
    }

    /// Values per row.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Rows held now.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Bytes that a batch of `rows` rows of `k` values takes.
    pub fn bytes_for(k: usize, rows: usize) -> usize {
        let kbp = padded_blocks(k);
        let units = if rows > 1 { rows.div_ceil(UNIT_ROWS) * (k / BLOCK_LEN) * UNIT_BLOCK } else { 0 };
        rows * kbp * (BLOCK_LEN + 8) + units
    }

    pub(crate) fn blocks(&self) -> usize {
        self.k / BLOCK_LEN
    }

    pub(crate) fn row(&self, row: usize) -> ActRow<'_> {
        assert!(row < self.rows, "activation row {row} of {}", self.rows);
        let kbp = padded_blocks(self.k);
        let blocks = row * kbp..(row + 1) * kbp;
        ActRow {
            q: &self.q[blocks.start * BLOCK_LEN..blocks.end * BLOCK_LEN],
            d: &self.d[blocks.clone()],
            sums: &self.sums[blocks],
        }
    }

    /// Some rows, at most [`FEW_ROWS`].
    pub(crate) fn few(&self, rows: impl ExactSizeIterator<Item = usize>) -> Few<'_> {
        let mut few = Few { rows: [ActRow { q: &[], d: &[], sums: &[] }; FEW_ROWS], n: rows.len() };
        assert!(few.n <= FEW_ROWS, "{} rows are more than a few", few.n);
        few.rows.iter_mut().zip(rows).for_each(|(to, row)| *to = self.row(row));
        few
    }

    /// The units that hold the rows, each of `blocks() * UNIT_BLOCK` bytes. Only valid with more than one row.
    pub(crate) fn units(&self) -> &[u8] {
        debug_assert!(self.rows > 1);
        &self.units[..self.rows.div_ceil(UNIT_ROWS) * self.unit_bytes()]
    }

    pub(crate) fn unit_bytes(&self) -> usize {
        self.blocks() * UNIT_BLOCK
    }

    /// Sets the number of rows and gives the parts to fill, cut into units of 4 rows.
    pub(crate) fn begin(&mut self, rows: usize) -> RowsMut<'_> {
        self.reserve(rows);
        self.rows = rows;
        let kbp = padded_blocks(self.k);
        let n_units = if rows > 1 { rows.div_ceil(UNIT_ROWS) } else { 0 };
        let unit_bytes = self.unit_bytes();
        RowsMut {
            k: self.k,
            q: &mut self.q[..rows * kbp * BLOCK_LEN],
            d: &mut self.d[..rows * kbp],
            sums: &mut self.sums[..rows * kbp],
            units: &mut self.units[..n_units * unit_bytes],
        }
    }

    fn reserve(&mut self, rows: usize) {
        if rows <= self.capacity {
            return;
        }
        // In steps, so that batches of about one size settle soon.
        let rows = if rows > 1 { rows.next_multiple_of(MAX_ALONE) } else { rows };
        let kbp = padded_blocks(self.k);
        let blocks = rows.checked_mul(kbp).expect("activation buffer size overflows");
        self.q = AlignedBuf::zeroed(blocks.checked_mul(BLOCK_LEN).expect("activation buffer size overflows"));
        self.d = AlignedBuf::zeroed(blocks);
        self.sums = AlignedBuf::zeroed(blocks);
        if rows > 1 {
            self.units = AlignedBuf::zeroed(rows.div_ceil(UNIT_ROWS) * self.unit_bytes());
        }
        self.capacity = rows;
    }
}

/// Up to [`FEW_ROWS`] rows of a batch.
pub(crate) struct Few<'a> {
    rows: [ActRow<'a>; FEW_ROWS],
    n: usize,
}

impl<'a> Few<'a> {
    pub(crate) fn as_slice(&self) -> &[ActRow<'a>] {
        &self.rows[..self.n]
    }
}

/// Some rows of a batch while it is filled.
pub(crate) struct RowsMut<'a> {
    k: usize,
    q: &'a mut [i8],
    d: &'a mut [f32],
    sums: &'a mut [Sums],
    units: &'a mut [u8],
}

impl<'a> RowsMut<'a> {
    fn rows(&self) -> usize {
        self.d.len() / padded_blocks(self.k)
    }

    /// Cuts off the first `rows` rows, a whole number of units unless it takes all.
    fn split(self, rows: usize) -> (RowsMut<'a>, RowsMut<'a>) {
        let kbp = padded_blocks(self.k);
        let unit_bytes = self.k / BLOCK_LEN * UNIT_BLOCK;
        let units = if self.units.is_empty() { 0 } else { rows.div_ceil(UNIT_ROWS) * unit_bytes };
        let (q0, q1) = self.q.split_at_mut(rows * kbp * BLOCK_LEN);
        let (d0, d1) = self.d.split_at_mut(rows * kbp);
        let (s0, s1) = self.sums.split_at_mut(rows * kbp);
        let (u0, u1) = self.units.split_at_mut(units);
        let k = self.k;
        (RowsMut { k, q: q0, d: d0, sums: s0, units: u0 }, RowsMut { k, q: q1, d: d1, sums: s1, units: u1 })
    }

    /// [`Self::fill`] shared among the threads of a pool.
    pub(crate) fn fill_pool(self, pool: &Pool, fill: &(impl Fn(usize, &mut [i8], &mut [f32], &mut [Sums]) + Sync)) {
        let rows = self.rows();
        if pool.n_threads() == 1 || rows <= MAX_ALONE {
            return self.fill(fill);
        }
        let per_task = rows.div_ceil(pool.n_threads()).next_multiple_of(UNIT_ROWS);
        let (mut tasks, mut rest) = (Vec::with_capacity(pool.n_threads()), self);
        while rest.rows() > per_task {
            let (first, others) = rest.split(per_task);
            tasks.push(Some(first));
            rest = others;
        }
        tasks.push(Some(rest));
        pool.run_chunks(&mut tasks, 1, &|i, task| {
            if let Some(part) = task[0].take() {
                part.fill(|row, q, d, sums| fill(i * per_task + row, q, d, sums));
            }
        });
    }

    /// Fills every row by `fill(row, q, d, sums)`, slices without padding, then the units.
    pub(crate) fn fill(self, mut fill: impl FnMut(usize, &mut [i8], &mut [f32], &mut [Sums])) {
        let (kb, kbp) = (self.k / BLOCK_LEN, padded_blocks(self.k));
        for row in 0..self.rows() {
            let at = row * kbp;
            fill(
                row,
                &mut self.q[at * BLOCK_LEN..at * BLOCK_LEN + self.k],
                &mut self.d[at..at + kb],
                &mut self.sums[at..at + kb],
            );
        }
        if self.units.is_empty() {
            return;
        }
        for (u, unit) in self.units.chunks_exact_mut(kb * UNIT_BLOCK).enumerate() {
            for t in 0..UNIT_ROWS {
                let row = u * UNIT_ROWS + t;
                let present = (row + 1) * kbp <= self.d.len();
                for (b, block) in unit.chunks_exact_mut(UNIT_BLOCK).enumerate() {
                    let (values, scales) = block.split_at_mut(128);
                    let at = if present { row * kbp + b } else { 0 };
                    let q = &self.q[at * BLOCK_LEN..(at + 1) * BLOCK_LEN];
                    let quads = values.as_chunks_mut::<4>().0.iter_mut().skip(t).step_by(UNIT_ROWS);
                    for (quad, q) in quads.zip(q.as_chunks::<4>().0) {
                        *quad = if present { q.map(|q| q as u8) } else { [0; 4] };
                    }
                    let (d, sums) = if present { (self.d[at], self.sums[at]) } else { (0.0, [0; 2]) };
                    scales[t * 4..][..4].copy_from_slice(&d.to_ne_bytes());
                    scales[16 + t * 4..][..2].copy_from_slice(&sums[0].to_ne_bytes());
                    scales[18 + t * 4..][..2].copy_from_slice(&sums[1].to_ne_bytes());
                    scales[32 + t * 4..][..4].copy_from_slice(&start(8, sums).to_ne_bytes());
                }
            }
        }
    }
}

/// The hidden values of 32 neurons of one expert for one token.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy)]
pub struct HiddenGroup {
    /// Values as int8 (quantized experts).
    pub q: [i8; BLOCK_LEN],
    /// Their scale, an f16 value.
    pub d: f32,
    /// Their sums.
    pub sums: Sums,
    /// Bit `n`: `q[n]` is not 0, so neuron `n` matters to the output.
    pub live: u32,
    /// Bit `n`: the gate of neuron `n` was positive.
    pub active: u32,
    /// Values as floats (float experts).
    pub h: [f32; BLOCK_LEN],
}

impl HiddenGroup {
    /// A group in which every neuron is dead.
    pub const ZERO: Self = Self { q: [0; BLOCK_LEN], d: 0.0, sums: [0; 2], live: 0, active: 0, h: [0.0; BLOCK_LEN] };

    /// Groups of 32 that hold `n_ff` neurons.
    pub fn groups(n_ff: usize) -> usize {
        n_ff.div_ceil(BLOCK_LEN)
    }
}

impl Default for HiddenGroup {
    fn default() -> Self {
        Self::ZERO
    }
}

/// Blocks of a row of `k` values, rounded up to a multiple of 4.
pub(crate) fn padded_blocks(k: usize) -> usize {
    (k / BLOCK_LEN).next_multiple_of(4)
}
