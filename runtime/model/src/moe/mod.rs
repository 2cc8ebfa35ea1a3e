//! The experts of a layer: `x += Σ weight · down · (up·y ⊙ relu(gate·y))` over the chosen ones.
//!
//! Owns the order: experts are computed as they land in the cache, each (row, expert) pair into a place of its own, and
//! added in the order of the router's ranks, so that the order of arrival never shows in a bit. Each expert is acquired
//! once for all rows; up to [`FEW_ROWS`] rows go through the sparse kernels, more through the dense ones.

mod dense;
mod pairs;
mod sparse;

use std::sync::Arc;
use std::time::Instant;

use st_experts::{ExpertStore, Lease, Use, Waves};
use st_format::ModelShape;
use st_gguf::Matrix;
use st_kernels::{AlignedBuf, BLOCK_LEN, ExpertFormat, ExpertInput, FEW_ROWS, Kernels, UNIT_ROWS};

use crate::activations::Rows;
use crate::batch::BatchKind;
use crate::error::ModelError;
use crate::observer::{Inputs, Observer};
use crate::ops::{self, ActsScratch, Compute};
use crate::router::Routing;
use crate::work::Work;
use dense::DenseScratch;
use pairs::Pairs;
use sparse::SparseScratch;

/// The experts of all layers.
#[derive(Debug)]
pub(crate) struct Moe {
    store: Arc<ExpertStore>,
    /// Per layer.
    formats: Vec<ExpertFormat>,
    n_experts: usize,
    /// Rows of a batch's inputs that are gathered at once, at most.
    rows_at_once: usize,
}

/// Buffers of [`Moe::forward`], reused from layer to layer.
#[derive(Debug, Default)]
pub(crate) struct MoeScratch {
    pairs: Pairs,
    /// What each pair contributes, unweighted; `[pairs, n_embd]`.
    parts: Vec<f32>,
    /// Ranks that can be computed now.
    ready: Vec<usize>,
    sparse: SparseScratch,
    dense: DenseScratch,
    /// Experts of a guess, each once.
    guessed: Vec<u32>,
    /// Live neurons of one expert's rows, for an observer.
    live: Vec<u32>,
}

/// A layer's experts on their way, from the router's choice to the moment they are needed.
pub(crate) enum Pending<'a> {
    /// Few enough to be held at once: acquired when needed.
    Together(Use),
    /// In waves.
    Waves(Waves<'a>),
}

/// One layer of one pass: what its experts are computed with, and who watches.
pub(crate) struct ExpertLayer<'a> {
    pub(crate) layer: usize,
    pub(crate) cx: &'a Compute,
    pub(crate) acts: &'a mut ActsScratch,
    pub(crate) scratch: &'a mut MoeScratch,
    pub(crate) routing: &'a Routing,
    pub(crate) observer: &'a mut dyn Observer,
}

impl Moe {
    /// Experts of `store`, lying in its slots as `formats` has it for each layer, for batches of at most `batch` rows.
    pub(crate) fn new(store: Arc<ExpertStore>, formats: Vec<ExpertFormat>, config: &ModelShape, batch: usize) -> Self {
        Self { store, formats, n_experts: config.n_experts, rows_at_once: batch.next_multiple_of(UNIT_ROWS) }
    }

    /// The cache.
    pub(crate) fn store(&self) -> &ExpertStore {
        &self.store
    }

    /// As [`Engine::arranging_speed`](crate::Engine::arranging_speed).
    pub(crate) fn arranging_speed(&self, kernels: Kernels) -> f64 {
        const EXPERTS: usize = 24;
        let Some(format) = self.formats.first() else { return f64::INFINITY };
        let canonical = Matrix::ALL.map(|matrix| vec![1u8; format.canonical_bytes(matrix)]);
        // Touched before, and more than caches hold.
        let mut slots = AlignedBuf::zeroed(EXPERTS * format.record_bytes());
        slots.fill(1);
        let started = Instant::now();
        for slot in slots.chunks_exact_mut(format.record_bytes()) {
            for (matrix, canonical) in Matrix::ALL.into_iter().zip(&canonical) {
                kernels.pack_expert(format, matrix, canonical, &mut slot[format.region(matrix)]);
            }
        }
        let bytes = EXPERTS * canonical.iter().map(Vec::len).sum::<usize>();
        bytes as f64 / started.elapsed().as_secs_f64()
    }

    /// Whether the next layer's choice should be guessed: for tokens one after the other, where not every expert has a slot.
    pub(crate) fn guesses(&self, kind: BatchKind) -> bool {
        kind != BatchKind::Prompt && self.store.guesses()
    }

    /// Begins to read what the router of `layer` would choose as things stand.
    pub(crate) fn guess(&self, layer: usize, guess: &Routing, scratch: &mut MoeScratch) {
        let ids = &mut scratch.guessed;
        ids.clear();
        for &id in guess.ids() {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        self.store.prefetch_guess(layer, ids);
    }

    /// Bytes of scratch for a batch of `rows`.
    pub(crate) fn scratch_bytes(config: &ModelShape, rows: usize) -> usize {
        let few = rows.min(FEW_ROWS) * config.n_experts_used;
        rows * config.n_experts_used * config.n_embd * 4
            + SparseScratch::bytes(few, config.n_ff)
            + DenseScratch::bytes(rows, config.n_embd, config.n_ff)
    }

    /// Tells the cache what the router chose, before attention runs.
    pub(crate) fn prefetch(
        &self,
        layer: usize,
        kind: BatchKind,
        routing: &Routing,
        scratch: &mut MoeScratch,
    ) -> Pending<'_> {
        scratch.pairs.group(routing, self.n_experts);
        let experts = scratch.pairs.experts();
        let how = kind.use_of_experts();
        if how == Use::Sweep || experts.len() > self.store.capacity() {
            return Pending::Waves(self.store.waves(layer, experts, how));
        }
        self.store.prefetch(layer, experts);
        Pending::Together(how)
    }

    /// Adds the experts' part to the residual stream `x` for the normed input `y`; both `[rows, n_embd]`.
    pub(crate) fn forward(
        &self,
        pass: ExpertLayer<'_>,
        pending: Pending<'_>,
        y: &Rows,
        x: &mut Rows,
    ) -> Result<Work, ModelError> {
        let ExpertLayer { layer, cx, acts, scratch, routing, observer } = pass;
        let mut work = Work::default();
        let format = &self.formats[layer];
        let n_embd = format.n_embd();
        let floats = y.values()?;
        let acts = acts.of(n_embd);
        if format.takes_acts() {
            cx.kernels.quantize_acts_pool(&cx.pool, floats, acts);
        }
        let needed = scratch.pairs.len() * n_embd;
        if scratch.parts.len() < needed {
            scratch.parts.resize(needed, 0.0);
        }
        let input = ExpertInput { floats, acts };
        match pending {
            Pending::Together(how) => {
                let lease = self.store.acquire_for(layer, scratch.pairs.experts(), how)?;
                work.add(&self.compute(layer, cx, &lease, scratch, input, observer)?);
            }
            Pending::Waves(mut waves) => {
                while let Some(lease) = waves.next_wave()? {
                    work.add(&self.compute(layer, cx, &lease, scratch, input, observer)?);
                }
            }
        }
        ops::add_experts(cx, x, &scratch.parts, scratch.pairs.pair_of(), routing)?;
        Ok(work)
    }

    /// The experts of a lease as they land, for all rows that chose them.
    fn compute(
        &self,
        layer: usize,
        cx: &Compute,
        lease: &Lease<'_>,
        scratch: &mut MoeScratch,
        input: ExpertInput<'_>,
        observer: &mut dyn Observer,
    ) -> Result<Work, ModelError> {
        let MoeScratch { pairs, parts, ready, sparse, dense, live, .. } = scratch;
        let format = &self.formats[layer];
        let n_ff = format.n_ff();
        let bytes = Matrix::ALL.map(|matrix| format.canonical_bytes(matrix) as u64);
        let (watched, inputs) = (observer.watches_neurons(), observer.watches_inputs());
        let mut work = Work::default();
        let mut landing = lease.as_they_land(Matrix::Up);
        loop {
            ready.clear();
            landing.next_batch(ready)?;
            if ready.is_empty() {
                return Ok(work);
            }
            ready.sort_unstable_by_key(|&rank| lease.id(rank));
            if pairs.rows_in_all() <= FEW_ROWS {
                sparse.compute(cx, format, lease, ready, pairs, input, parts)?;
                for expert in ready.iter().map(|&rank| lease.id(rank)) {
                    let of = pairs.of(expert);
                    work.add(&sparse.work(format, of.clone(), bytes));
                    if watched {
                        let hidden = sparse.hidden(of.clone(), n_ff);
                        show(observer, layer, expert, &pairs.rows()[of.clone()], hidden, live)?;
                    }
                    if inputs {
                        let hidden: Vec<f32> = sparse.hidden(of, n_ff).flatten().copied().collect();
                        show_inputs(observer, layer, expert, &hidden)?;
                    }
                }
                continue;
            }
            let mut done = 0;
            while done < ready.len() {
                done += dense.group.fill(&ready[done..], |rank| lease.id(rank), pairs, self.rows_at_once);
                dense.compute(cx, format, lease, input, parts)?;
                if watched {
                    for (rank, of, hidden) in dense.hidden(n_ff) {
                        let hidden = hidden.chunks(n_ff).flat_map(|row| row.chunks(BLOCK_LEN));
                        show(observer, layer, lease.id(rank), &pairs.rows()[of], hidden, live)?;
                    }
                }
                if inputs {
                    for (rank, _, hidden) in dense.hidden(n_ff) {
                        show_inputs(observer, layer, lease.id(rank), hidden)?;
                    }
                }
            }
            work.weight_bytes += done as u64 * bytes.iter().sum::<u64>();
        }
    }
}

/// Shows an observer which neurons of one expert are not 0, `hidden` being groups of up to 32 of them, row after row.
fn show<'h>(
    observer: &mut dyn Observer,
    layer: usize,
    expert: u32,
    rows: &[u32],
    hidden: impl Iterator<Item = &'h [f32]>,
    live: &mut Vec<u32>,
) -> Result<(), ModelError> {
    live.clear();
    let bit = |(i, value): (usize, &f32)| u32::from(*value != 0.0) << i;
    live.extend(hidden.map(|group| group.iter().enumerate().map(bit).fold(0, |mask, bit| mask | bit)));
    observer.neurons(layer, expert, rows, live).map_err(|cause| ModelError::Observer { what: "live neurons", cause })
}

/// Shows an observer what down of one expert is multiplied with.
fn show_inputs(observer: &mut dyn Observer, layer: usize, expert: u32, hidden: &[f32]) -> Result<(), ModelError> {
    let shown = observer.inputs(layer, Inputs::Down(expert), hidden);
    shown.map_err(|cause| ModelError::Observer { what: "inputs", cause })
}
