//! The LM head behind a predictor: only the rows whose score is above a threshold are computed. Approximate by nature.
//!
//! Owns the rule: `score = fc2 · (fc1 · h)`, h being quantized before each product as for any other matrix. Rows that score no more than
//! the threshold are -inf; the one that scores best is always computed, whatever it scores. A row that is computed has the bits that the
//! whole head gives it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use st_kernels::{ExpertInput, RowSplit, SomeRows, WeightType, r16};

use super::Compute;
use super::linear::{ActsScratch, Linear};
use crate::error::ModelError;
use crate::predictor::Predictor;
use crate::weights::TensorSource;

/// Rows of the head that one task takes at a time.
const TASK_ROWS: usize = 1024;

/// What a sparse head did since the model was loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct HeadStats {
    /// Scores above this are computed.
    pub threshold: f32,
    /// Rows of logits that were asked for.
    pub positions: u64,
    /// Rows of the head that all of them together would have taken.
    pub rows: u64,
    /// Those of them that were computed.
    pub computed: u64,
    /// How often the likeliest token of the whole head was not among them; `None` where nobody checks.
    pub lost: Option<u64>,
}

impl HeadStats {
    /// Rows that were computed, of all.
    pub fn computed_share(&self) -> f64 {
        self.computed as f64 / self.rows.max(1) as f64
    }

    /// Positions whose likeliest token was lost, of all.
    pub fn lost_share(&self) -> Option<f64> {
        self.lost.map(|lost| lost as f64 / self.positions.max(1) as f64)
    }
}

/// A head and its predictor.
#[derive(Debug)]
pub(crate) struct SparseHead {
    rows: SomeRows,
    fc1: Linear,
    fc2: Linear,
    threshold: f32,
    /// Computes every row as well, to see what is lost.
    check: bool,
    positions: AtomicU64,
    computed: AtomicU64,
    lost: AtomicU64,
}

impl SparseHead {
    /// Reads the matrix `name` (`[n_vocab, n_embd]`), whose rows `predictor` scores.
    ///
    /// # Errors
    /// Where its rows are no whole blocks, or reading fails.
    pub(crate) fn load(
        source: &TensorSource<'_>,
        cx: &Compute,
        name: &str,
        (n_vocab, n_embd): (usize, usize),
        predictor: &Predictor,
        (threshold, check): (f32, bool),
    ) -> Result<Self, ModelError> {
        let ty = source.weight_type(name)?;
        let blocks = || ModelError::Blocks { name: name.to_owned(), ty: ty.name(), n_in: n_embd };
        let row_bytes = ty.row_bytes(n_embd).ok_or_else(blocks)?;
        let mut rows = SomeRows::new(ty, n_vocab, n_embd).ok_or_else(blocks)?;
        rows.fill(cx.kernels, &cx.pool, |first, bytes| source.read_rows(name, first, row_bytes, bytes))?;
        let hidden = predictor.hidden();
        let (first, second) = predictor.bytes().split_at(hidden * n_embd / 32 * WeightType::Q4_0.block_bytes());
        let q4_0 = |rows, columns, bytes| Linear::from_canonical(cx, WeightType::Q4_0, rows, columns, bytes);
        let (fc1, fc2) = (q4_0(hidden, n_embd, first), q4_0(n_vocab, hidden, second));
        let [positions, computed, lost] = std::array::from_fn(|_| AtomicU64::new(0));
        Ok(Self { rows, fc1, fc2, threshold, check, positions, computed, lost })
    }

    /// Bytes that it takes in memory.
    pub(crate) fn bytes_for(ty: WeightType, n_vocab: usize, n_embd: usize, hidden: usize) -> Option<usize> {
        let predictor = [(hidden, n_embd), (n_vocab, hidden)]
            .map(|(rows, columns)| r16::packed_bytes(WeightType::Q4_0, rows, columns));
        SomeRows::bytes_for(ty, n_vocab, n_embd)?.checked_add(predictor[0]?)?.checked_add(predictor[1]?)
    }

    /// Row `row` of the head as floats.
    pub(crate) fn row_f32(&self, row: usize, out: &mut [f32]) {
        self.rows.row_to_f32(row, out);
    }

    /// Writes the logits of the rows of `x` (`[rows, n_embd]`) to `logits` (`[rows, n_vocab]`); returns the bytes of weights read.
    pub(crate) fn apply(
        &self,
        cx: &Compute,
        scratch: &mut ActsScratch,
        x: &[f32],
        hidden: &mut Vec<f32>,
        logits: &mut [f32],
    ) -> u64 {
        let (n_vocab, n_embd) = (self.rows.rows(), self.fc1.n_in());
        let positions = x.len() / n_embd;
        hidden.resize(positions * self.fc1.n_out(), 0.0);
        self.fc1.apply(cx, scratch, x, hidden, || ());
        self.fc2.apply(cx, scratch, hidden, logits, || ());
        let best: Vec<usize> = logits.chunks_exact(n_vocab).map(highest).collect();
        let acts = scratch.of(n_embd);
        cx.kernels.quantize_acts_pool(&cx.pool, x, acts);
        let input = ExpertInput { floats: x, acts };
        let computed = AtomicU64::new(0);
        // Per position: the likeliest token of the whole head.
        let likeliest: Vec<_> = best.iter().map(|_| Mutex::new((f32::NEG_INFINITY, usize::MAX))).collect();
        cx.pool.run_ranges(logits, n_vocab, RowSplit::Every(1), TASK_ROWS, || (), &|position, mut out| {
            let first = out.columns().start;
            for (i, part) in out.row_mut(0).chunks_mut(TASK_ROWS).enumerate() {
                let start = first + i * TASK_ROWS;
                let wanted = |(i, score): (usize, f32)| score > self.threshold || start + i == best[position];
                let (mut ids, mut n) = ([0u32; TASK_ROWS], 0);
                for (i, &score) in part.iter().enumerate() {
                    ids[n] = (start + i) as u32;
                    n += usize::from(wanted((i, score)));
                }
                let mut values = [0f32; TASK_ROWS];
                cx.kernels.some_rows(&self.rows, &ids[..n], input, position, &mut values[..n]);
                if self.check {
                    self.look_for_likeliest(cx, (start, part.len()), input, position, &likeliest[position]);
                }
                part.fill(f32::NEG_INFINITY);
                ids[..n].iter().zip(values).for_each(|(&id, value)| part[id as usize - start] = value);
                computed.fetch_add(n as u64, Ordering::Relaxed);
            }
        });
        let computed = computed.into_inner();
        self.positions.fetch_add(positions as u64, Ordering::Relaxed);
        self.computed.fetch_add(computed, Ordering::Relaxed);
        let is_lost = |(likeliest, logits): (Mutex<(f32, usize)>, &[f32])| {
            let (_, id) = likeliest.into_inner().unwrap_or_else(PoisonError::into_inner);
            logits.get(id) == Some(&f32::NEG_INFINITY)
        };
        let lost = likeliest.into_iter().zip(logits.chunks_exact(n_vocab)).map(is_lost).filter(|&lost| lost).count();
        self.lost.fetch_add(lost as u64, Ordering::Relaxed);
        (self.fc1.bytes() + self.fc2.bytes()) as u64 + computed * (self.rows.bytes() / n_vocab) as u64
    }

    /// Computes all of `len` rows from `start` on, and remembers the highest (of equal ones the first).
    fn look_for_likeliest(
        &self,
        cx: &Compute,
        (start, len): (usize, usize),
        input: ExpertInput<'_>,
        position: usize,
        likeliest: &Mutex<(f32, usize)>,
    ) {
        let ids: [u32; TASK_ROWS] = std::array::from_fn(|i| (start + i) as u32);
        let mut values = [0f32; TASK_ROWS];
        cx.kernels.some_rows(&self.rows, &ids[..len], input, position, &mut values[..len]);
        let at = highest(&values[..len]);
        let mut likeliest = likeliest.lock().unwrap_or_else(PoisonError::into_inner);
        if values[at] > likeliest.0 || values[at] == likeliest.0 && start + at < likeliest.1 {
            *likeliest = (values[at], start + at);
        }
    }

    /// What it did so far.
    pub(crate) fn stats(&self) -> HeadStats {
        let positions = self.positions.load(Ordering::Relaxed);
        HeadStats {
            threshold: self.threshold,
            positions,
            rows: positions * self.rows.rows() as u64,
            computed: self.computed.load(Ordering::Relaxed),
            lost: self.check.then(|| self.lost.load(Ordering::Relaxed)),
        }
    }
}

/// The place of the highest value, the first where several are equal.
fn highest(values: &[f32]) -> usize {
    let better = |best: usize, (i, value): (usize, &f32)| if *value > values[best] { i } else { best };
    values.iter().enumerate().fold(0, better)
}
