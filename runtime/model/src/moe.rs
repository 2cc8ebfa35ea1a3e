//! The experts of a layer: `x += Σ weight · down · (up·y ⊙ relu(gate·y))` over the chosen ones.
//!
//! Owns the order: experts are computed as they land in the cache, each into a place of its own, and added in the order
//! of the router's ranks, so that the order of arrival never shows in a bit. One token goes through the sparse kernels;
//! a batch is grouped by expert, and each expert is acquired once.

use std::ops::Range;

use candle_core::Tensor;
use st_experts::{ExpertStore, Lease, Waves};
use st_gguf::Matrix;
use st_kernels::{ExpertFormat, ExpertInput, HiddenGroup, OUTPUT_CHUNK, Q8Acts, UNIT_ROWS, WeightType};

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::ops::{self, ActsScratch, Compute};
use crate::router::Routing;
use crate::session::Work;

/// Neurons that one task takes when there are many tokens; and when there is one, at least.
const TASK_NEURONS: usize = 32;
/// Groups of 32 neurons whose rows of up one task takes, at least: a few rows alone are waited for.
const TASK_GROUPS: usize = 3;
/// Outputs that one task takes when there is one token, at least: each pass over the neurons has its price.
const TASK_OUTPUTS: usize = 3 * OUTPUT_CHUNK;

/// The experts of all layers.
#[derive(Debug)]
pub(crate) struct Moe {
    store: ExpertStore,
    format: ExpertFormat,
    n_experts: usize,
    /// Rows of a batch's inputs that are gathered at once, at most.
    rows_at_once: usize,
}

/// Buffers of [`Moe::forward`], reused from layer to layer.
#[derive(Debug, Default)]
pub(crate) struct MoeScratch {
    /// Gates of one token; `[rank, n_ff]`.
    gates: Vec<f32>,
    /// Hidden values of one token; `[rank, groups]`.
    groups: Vec<HiddenGroup>,
    /// What each (expert, token) pair contributes, unweighted; `[pairs, n_embd]`.
    parts: Vec<f32>,
    /// Ranks that can be computed now.
    ready: Vec<usize>,
    batch: BatchScratch,
}

/// What only batches need.
#[derive(Debug, Default)]
struct BatchScratch {
    /// The chosen experts, each once, ascending.
    experts: Vec<u32>,
    /// First pair of each expert, and one past the last pair.
    starts: Vec<usize>,
    /// Token of each pair; pairs of one expert lie together, in the order of tokens.
    tokens: Vec<u32>,
    /// Pair of each (token, rank).
    pair_of: Vec<usize>,
    /// Those that are computed together.
    together: Together,
    /// Their inputs.
    acts: Option<Q8Acts>,
    floats: Vec<f32>,
    /// Their hidden values; `[rows, n_ff]`.
    hidden: Vec<f32>,
    hidden_acts: Option<Q8Acts>,
}

/// Experts of a batch that are computed together, so that threads wait for each other once for all of them.
#[derive(Debug, Default)]
struct Together {
    /// Their ranks in the lease.
    ranks: Vec<usize>,
    /// Pairs of each.
    pairs: Vec<Range<usize>>,
    /// Rows of each among the inputs that are gathered for them, one for each pair.
    rows: Vec<Range<usize>>,
    /// Token of each row; those between two experts' rows belong to nobody.
    tokens: Vec<u32>,
}

/// A layer's experts on their way, from the router's choice to the moment they are needed.
pub(crate) enum Pending<'a> {
    /// One token's: acquired when needed.
    One,
    /// A batch's.
    Batch(Waves<'a>),
}

impl Moe {
    /// Experts of `store`, lying in its slots as `format` has it, for batches of at most `batch` tokens.
    pub(crate) fn new(store: ExpertStore, format: ExpertFormat, config: &ModelConfig, batch: usize) -> Self {
        Self { store, format, n_experts: config.n_experts, rows_at_once: batch.next_multiple_of(UNIT_ROWS) }
    }

    /// The cache.
    pub(crate) fn store(&self) -> &ExpertStore {
        &self.store
    }

    /// Whether the next layer's choice should be guessed: for one token, where not every expert has a slot.
    pub(crate) fn guesses(&self, routing: &Routing) -> bool {
        routing.n_tokens() == 1 && self.store.guesses()
    }

    /// Bytes of scratch for a batch of `tokens`.
    pub(crate) fn scratch_bytes(config: &ModelConfig, tokens: usize) -> usize {
        let pairs = tokens * config.n_experts_used;
        pairs * config.n_embd * 4
            + tokens * (config.n_embd + config.n_ff) * 4
            + Q8Acts::bytes_for(config.n_embd, tokens)
            + Q8Acts::bytes_for(config.n_ff, tokens)
    }

    /// Tells the cache what the router chose, before attention runs.
    pub(crate) fn prefetch(&self, layer: usize, routing: &Routing, scratch: &mut MoeScratch) -> Pending<'_> {
        if routing.n_tokens() == 1 {
            self.store.prefetch(layer, routing.ids());
            return Pending::One;
        }
        scratch.batch.group(routing, self.n_experts);
        Pending::Batch(self.store.waves(layer, &scratch.batch.experts))
    }

    /// Adds the experts' part to the residual stream `x` for the normed input `y`; both `[tokens, n_embd]`.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn forward(
        &self,
        layer: usize,
        cx: &Compute,
        acts: &mut ActsScratch,
        scratch: &mut MoeScratch,
        pending: Pending<'_>,
        routing: &Routing,
        y: &Tensor,
        x: &Tensor,
    ) -> Result<Work, ModelError> {
        let mut work = Work::default();
        let n_embd = self.format.n_embd();
        ops::with_slice(y, |floats| {
            let acts = acts.of(n_embd);
            if self.format.ty().is_quantized() {
                cx.kernels.quantize_acts_pool(&cx.pool, floats, acts);
            }
            let needed = routing.ids().len() * n_embd;
            if scratch.parts.len() < needed {
                scratch.parts.resize(needed, 0.0);
            }
            let input = ExpertInput { floats, acts };
            work = match pending {
                Pending::One => self.one(layer, cx, scratch, routing, input)?,
                Pending::Batch(waves) => self.batch(cx, scratch, waves, input)?,
            };
            Ok(())
        })?;
        let pair_of = (routing.n_tokens() > 1).then_some(&scratch.batch.pair_of[..]);
        ops::add_experts(cx, x, &scratch.parts, pair_of, routing)?;
        Ok(work)
    }

    /// One token: the experts that are there first, then the others as they land.
    fn one(
        &self,
        layer: usize,
        cx: &Compute,
        scratch: &mut MoeScratch,
        routing: &Routing,
        input: ExpertInput<'_>,
    ) -> Result<Work, ModelError> {
        let n_groups = HiddenGroup::groups(self.format.n_ff());
        scratch.groups.resize(routing.ids().len() * n_groups, HiddenGroup::ZERO);
        scratch.gates.resize(routing.ids().len() * self.format.n_ff(), 0.0);
        let lease = self.store.acquire(layer, routing.ids())?;
        let mut landing = lease.as_they_land(Matrix::Up);
        loop {
            scratch.ready.clear();
            landing.next_batch(&mut scratch.ready)?;
            if scratch.ready.is_empty() {
                break;
            }
            self.some(cx, &lease, scratch, input)?;
        }
        Ok(self.work_of(&scratch.groups, routing.ids().len()))
    }

    /// The experts of `scratch.ready`, for one token.
    fn some(
        &self,
        cx: &Compute,
        lease: &Lease<'_>,
        scratch: &mut MoeScratch,
        input: ExpertInput<'_>,
    ) -> Result<(), ModelError> {
        let MoeScratch { gates, groups, parts, ready, .. } = scratch;
        let (format, n_ff, n_embd) = (&self.format, self.format.n_ff(), self.format.n_embd());
        let n_groups = HiddenGroup::groups(n_ff);
        for &rank in ready.iter() {
            lease.wait(rank, Matrix::Gate)?;
        }
        // One matrix after the other: a gate is read as one long stream, which memory answers faster than pieces between the
        // scattered rows of up. Experts still on their way have nothing to do.
        let matrix = |rank: usize, matrix| ready.contains(&rank).then(|| lease.get(rank, matrix)).flatten();
        cx.pool.run_ranges(gates, n_ff, TASK_NEURONS, &|rank, mut out| {
            if let Some(gate) = matrix(rank, Matrix::Gate) {
                cx.kernels.expert_gate_rows(format, gate, input, &[0], &mut out);
            }
        });
        let gates = &*gates;
        cx.pool.run_ranges(groups, n_groups, TASK_GROUPS, &|rank, mut out| {
            if let Some(up) = matrix(rank, Matrix::Up) {
                let gates = &gates[rank * n_ff..(rank + 1) * n_ff];
                cx.kernels.expert_hidden_rows(format, up, gates, input, &[0], &mut out);
            }
        });
        for &rank in ready.iter() {
            lease.wait(rank, Matrix::Down)?;
        }
        let groups = &*groups;
        cx.pool.run_ranges(&mut parts[..lease.len() * n_embd], n_embd, TASK_OUTPUTS, &|rank, mut out| {
            if let Some(down) = matrix(rank, Matrix::Down) {
                let hidden = &groups[rank * n_groups..(rank + 1) * n_groups];
                cx.kernels.expert_down_rows(format, down, hidden, &mut out);
            }
        });
        Ok(())
    }

    /// A batch, wave after wave.
    fn batch(
        &self,
        cx: &Compute,
        scratch: &mut MoeScratch,
        mut waves: Waves<'_>,
        input: ExpertInput<'_>,
    ) -> Result<Work, ModelError> {
        let mut work = Work::default();
        while let Some(lease) = waves.next_wave()? {
            let mut landing = lease.as_they_land(Matrix::Up);
            loop {
                scratch.ready.clear();
                landing.next_batch(&mut scratch.ready)?;
                if scratch.ready.is_empty() {
                    break;
                }
                scratch.ready.sort_unstable_by_key(|&rank| lease.id(rank));
                let mut done = 0;
                while done < scratch.ready.len() {
                    done += scratch.batch.take(&scratch.ready[done..], |rank| lease.id(rank), self.rows_at_once);
                    self.together(cx, &lease, scratch, input)?;
                }
                work.weight_bytes += done as u64 * Matrix::ALL.map(|m| self.canonical_bytes(m)).iter().sum::<u64>();
            }
        }
        Ok(work)
    }

    /// Some experts, for all tokens of a batch that chose them.
    fn together(
        &self,
        cx: &Compute,
        lease: &Lease<'_>,
        scratch: &mut MoeScratch,
        input: ExpertInput<'_>,
    ) -> Result<(), ModelError> {
        let MoeScratch { parts, batch, .. } = scratch;
        let BatchScratch { together, acts, floats, hidden, hidden_acts, .. } = batch;
        let (format, n_embd, n_ff) = (&self.format, self.format.n_embd(), self.format.n_ff());
        let acts = acts.get_or_insert_with(|| Q8Acts::new(n_embd, 1));
        let hidden_acts = hidden_acts.get_or_insert_with(|| Q8Acts::new(n_ff, 1));
        if format.ty().is_quantized() {
            cx.kernels.gather_acts_pool(&cx.pool, input.acts, &together.tokens, acts);
        } else {
            floats.clear();
            for &token in &together.tokens {
                floats.extend_from_slice(&input.floats[token as usize * n_embd..][..n_embd]);
            }
        }
        if hidden.len() < together.tokens.len() * n_ff {
            hidden.resize(together.tokens.len() * n_ff, 0.0);
        }
        let hidden = &mut hidden[..together.tokens.len() * n_ff];
        let landed =
            |matrix| -> Result<Vec<&[u8]>, _> { together.ranks.iter().map(|&rank| lease.wait(rank, matrix)).collect() };
        let (gates, ups) = (landed(Matrix::Gate)?, landed(Matrix::Up)?);
        let gathered = ExpertInput { floats, acts };
        cx.pool.run_columns_of(hidden, n_ff, &together.rows, TASK_NEURONS, &|i, mut out| {
            cx.kernels.expert_gate_up_batch(format, gates[i], ups[i], gathered, together.rows[i].start, &mut out);
        });
        if format.ty().is_quantized() {
            cx.kernels.quantize_acts_pool(&cx.pool, hidden, hidden_acts);
        }
        let downs = landed(Matrix::Down)?;
        let hidden = ExpertInput { floats: hidden, acts: hidden_acts };
        cx.pool.run_columns_of(parts, n_embd, &together.pairs, OUTPUT_CHUNK, &|i, mut out| {
            cx.kernels.expert_down_batch(format, downs[i], hidden, together.rows[i].start, &mut out);
        });
        Ok(())
    }

    fn canonical_bytes(&self, matrix: Matrix) -> u64 {
        self.format.canonical_bytes(matrix) as u64
    }

    /// What one token touched: gates whole, up and down only where a neuron lives (the scales of down always).
    fn work_of(&self, groups: &[HiddenGroup], n_used: usize) -> Work {
        let (n_embd, n_ff) = (self.format.n_embd() as u64, self.format.n_ff() as u64);
        let neurons = n_used as u64 * n_ff;
        let live_neurons = groups.iter().map(|group| u64::from(group.active.count_ones())).sum();
        let [gate, up, down] = Matrix::ALL.map(|m| self.canonical_bytes(m));
        let weight_bytes = match self.format.ty() {
            WeightType::Q4_0 => {
                let live_groups = groups.iter().filter(|group| group.live != 0).count() as u64;
                let live_down: u64 = groups.iter().map(|group| u64::from(group.live.count_ones())).sum();
                n_used as u64 * gate + live_neurons * up / n_ff + live_groups * 2 * n_embd + live_down * n_embd / 2
            }
            // Other types skip the rows of up alone.
            _ => n_used as u64 * (gate + down) + live_neurons * up / n_ff,
        };
        Work { tokens: 0, weight_bytes, neurons, live_neurons }
    }
}

impl BatchScratch {
    /// Groups (token, rank) pairs by expert.
    fn group(&mut self, routing: &Routing, n_experts: usize) {
        self.starts.clear();
        self.starts.resize(n_experts, 0);
        for &id in routing.ids() {
            self.starts[id as usize] += 1;
        }
        self.experts.clear();
        self.experts.extend((0..n_experts as u32).filter(|&id| self.starts[id as usize] > 0));
        // Counts to first pairs, in place.
        let mut next = 0;
        for start in &mut self.starts {
            next += std::mem::replace(start, next);
        }
        self.tokens.clear();
        self.tokens.resize(routing.ids().len(), 0);
        self.pair_of.clear();
        for (i, &id) in routing.ids().iter().enumerate() {
            let pair = self.starts[id as usize];
            self.starts[id as usize] += 1;
            self.tokens[pair] = (i / routing.n_used()) as u32;
            self.pair_of.push(pair);
        }
        // Every start now stands at its end: keep those of chosen experts, led by 0.
        let ends: Vec<usize> = self.experts.iter().map(|&id| self.starts[id as usize]).collect();
        self.starts.clear();
        self.starts.push(0);
        self.starts.extend(ends);
    }

    /// Chooses who is computed next: the first of `ready` (ranks, their experts ascending), as many as have room for their tokens
    /// in `rows`, but one at least. Returns how many.
    fn take(&mut self, ready: &[usize], expert_of: impl Fn(usize) -> u32, rows: usize) -> usize {
        let Together { ranks, pairs, rows: rows_of, tokens } = &mut self.together;
        ranks.clear();
        pairs.clear();
        rows_of.clear();
        tokens.clear();
        for &rank in ready {
            let slot = self.experts.partition_point(|&expert| expert < expert_of(rank));
            let range = self.starts[slot]..self.starts[slot + 1];
            let first = tokens.len();
            if first > 0 && first + range.len() > rows {
                break;
            }
            tokens.extend_from_slice(&self.tokens[range.clone()]);
            rows_of.push(first..tokens.len());
            let whole = tokens.len().next_multiple_of(UNIT_ROWS);
            tokens.resize(whole, self.tokens[range.start]);
            ranks.push(rank);
            pairs.push(range);
        }
        ranks.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_are_computed_together_as_far_as_there_is_room() {
        // Experts 1, 4, 5 and 7 with 3, 1, 9 and 2 tokens; ranks are in another order than experts.
        let mut batch = BatchScratch {
            experts: vec![1, 4, 5, 7],
            starts: vec![0, 3, 4, 13, 15],
            tokens: (100..115).collect(),
            ..Default::default()
        };
        let expert_of = |rank: usize| [7, 1, 5, 4][rank];
        let ready = [1, 3, 2, 0];
        assert_eq!(batch.take(&ready, expert_of, 8), 2);
        assert_eq!(batch.together.ranks, [1, 3]);
        assert_eq!(batch.together.pairs, [0..3, 3..4]);
        assert_eq!(batch.together.rows, [0..3, 4..5]);
        assert_eq!(batch.together.tokens, [100, 101, 102, 100, 103, 103, 103, 103]);
        // One that has no room at all is computed alone.
        assert_eq!(batch.take(&ready[2..], expert_of, 8), 1);
        assert_eq!(batch.together.ranks, [2]);
        assert_eq!((batch.together.rows[0].clone(), batch.together.pairs[0].clone()), (0..9, 4..13));
        assert_eq!(batch.take(&ready[3..], expert_of, 8), 1);
        assert_eq!(batch.together.ranks, [0]);
        assert_eq!((batch.together.rows[0].clone(), batch.together.pairs[0].clone()), (0..2, 13..15));
    }
}
