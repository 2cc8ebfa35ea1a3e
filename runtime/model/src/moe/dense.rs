//! Experts for many rows: whole matrices, each unpacked once for all rows that chose its expert.

use std::ops::Range;

use st_experts::{Lease, MAX_LEASE};
use st_gguf::Matrix;
use st_kernels::{ExpertFormat, ExpertInput, OUTPUT_CHUNK, Q8Acts, RowSplit, UNIT_ROWS};

use super::pairs::Pairs;
use crate::error::ModelError;
use crate::ops::Compute;

/// Neurons that one task takes.
const TASK_NEURONS: usize = 32;

/// Buffers for many rows.
#[derive(Debug, Default)]
pub(super) struct DenseScratch {
    pub(super) group: ExpertGroup,
    /// Inputs of the group.
    acts: Option<Q8Acts>,
    floats: Vec<f32>,
    /// Hidden values; `[rows, n_ff]`.
    hidden: Vec<f32>,
    hidden_acts: Option<Q8Acts>,
}

/// Experts that are computed together, so that threads wait for each other once for all of them.
#[derive(Debug, Default)]
pub(super) struct ExpertGroup {
    /// Their ranks in the lease.
    pub(super) ranks: Vec<usize>,
    /// Pairs of each.
    pairs: Vec<Range<usize>>,
    /// Rows of each among the inputs that are gathered for them, one for each pair.
    rows: Vec<Range<usize>>,
    /// Row of the batch of each row; those between two experts' rows belong to nobody.
    batch_rows: Vec<u32>,
}

impl ExpertGroup {
    /// Chooses who is computed next: the first of `ready` (ranks, their experts ascending), as many as have room for their rows
    /// in `room`, but one at least. Returns how many.
    pub(super) fn fill(
        &mut self,
        ready: &[usize],
        expert_of: impl Fn(usize) -> u32,
        pairs: &Pairs,
        room: usize,
    ) -> usize {
        self.ranks.clear();
        self.pairs.clear();
        self.rows.clear();
        self.batch_rows.clear();
        for &rank in ready {
            let of = pairs.of(expert_of(rank));
            let first = self.batch_rows.len();
            if first > 0 && first + of.len() > room {
                break;
            }
            self.batch_rows.extend_from_slice(&pairs.rows()[of.clone()]);
            self.rows.push(first..self.batch_rows.len());
            let whole = self.batch_rows.len().next_multiple_of(UNIT_ROWS);
            self.batch_rows.resize(whole, pairs.rows()[of.start]);
            self.ranks.push(rank);
            self.pairs.push(of);
        }
        self.ranks.len()
    }
}

impl DenseScratch {
    /// Bytes for `rows` gathered rows.
    pub(super) fn bytes(rows: usize, n_embd: usize, n_ff: usize) -> usize {
        rows * (n_embd + n_ff) * 4 + Q8Acts::bytes_for(n_embd, rows) + Q8Acts::bytes_for(n_ff, rows)
    }

    /// Computes the group's experts for all rows that chose them, into the rows of `parts` that are their pairs.
    pub(super) fn compute(
        &mut self,
        cx: &Compute,
        format: &ExpertFormat,
        lease: &Lease<'_>,
        input: ExpertInput<'_>,
        parts: &mut [f32],
    ) -> Result<(), ModelError> {
        let Self { group, acts, floats, hidden, hidden_acts } = self;
        let (n_embd, n_ff) = (format.n_embd(), format.n_ff());
        let acts = acts.get_or_insert_with(|| Q8Acts::new(n_embd, 1));
        let hidden_acts = hidden_acts.get_or_insert_with(|| Q8Acts::new(n_ff, 1));
        if format.takes_acts() {
            cx.kernels.gather_acts_pool(&cx.pool, input.acts, &group.batch_rows, acts);
        }
        if format.takes_floats() {
            floats.clear();
            for &row in &group.batch_rows {
                floats.extend_from_slice(&input.floats[row as usize * n_embd..][..n_embd]);
            }
        }
        if hidden.len() < group.batch_rows.len() * n_ff {
            hidden.resize(group.batch_rows.len() * n_ff, 0.0);
        }
        let hidden = &mut hidden[..group.batch_rows.len() * n_ff];
        // In place: a list of them would be allocated for each group.
        let landed = |matrix| {
            let mut bytes = [&[][..]; MAX_LEASE];
            let waits = group.ranks.iter().zip(&mut bytes);
            waits.into_iter().try_for_each(|(&rank, bytes)| lease.wait(rank, matrix).map(|landed| *bytes = landed))?;
            Ok::<_, ModelError>(bytes)
        };
        let (gates, ups) = (landed(Matrix::Gate)?, landed(Matrix::Up)?);
        let gathered = ExpertInput { floats, acts };
        cx.pool.run_tiles(hidden, n_ff, RowSplit::Ranges(&group.rows), TASK_NEURONS, &|i, mut out| {
            cx.kernels.expert_gate_up_batch(format, gates[i], ups[i], gathered, group.rows[i].start, &mut out);
        });
        if format.type_of(Matrix::Down).is_quantized() {
            cx.kernels.quantize_acts_pool(&cx.pool, hidden, hidden_acts);
        }
        let downs = landed(Matrix::Down)?;
        let hidden = ExpertInput { floats: hidden, acts: hidden_acts };
        cx.pool.run_tiles(parts, n_embd, RowSplit::Ranges(&group.pairs), OUTPUT_CHUNK, &|i, mut out| {
            cx.kernels.expert_down_batch(format, downs[i], hidden, group.rows[i].start, &mut out);
        });
        Ok(())
    }

    /// For each expert of the group that was computed: its place in the lease, its pairs, and the hidden values of those.
    pub(super) fn hidden(&self, n_ff: usize) -> impl Iterator<Item = (usize, Range<usize>, &[f32])> {
        let experts = self.group.ranks.iter().zip(&self.group.pairs).zip(&self.group.rows);
        experts
            .map(move |((&rank, pairs), rows)| (rank, pairs.clone(), &self.hidden[rows.start * n_ff..rows.end * n_ff]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::router::Routing;
    use st_format::Gating;

    #[test]
    fn experts_are_computed_together_as_far_as_there_is_room() {
        // Fifteen rows that choose one expert each: 1, 4, 5 and 7 are chosen by 3, 1, 9 and 2 of them.
        let chosen = [(1, 3), (4, 1), (5, 9), (7, 2)].map(|(id, n)| vec![id; n]).concat();
        let logits: Vec<f32> =
            chosen.iter().flat_map(|&id| (0..8).map(move |i| f32::from(u8::from(i == id)))).collect();
        let mut routing = Routing::default();
        routing.choose_best(1, 8, Gating::Sigmoid, &logits);
        let mut pairs = Pairs::default();
        pairs.group(&routing, 8);
        // Ranks are in another order than experts.
        let expert_of = |rank: usize| [7, 1, 5, 4][rank];
        let ready = [1, 3, 2, 0];
        let mut group = ExpertGroup::default();
        assert_eq!(group.fill(&ready, expert_of, &pairs, 8), 2);
        assert_eq!(group.ranks, [1, 3]);
        assert_eq!(group.pairs, [0..3, 3..4]);
        assert_eq!(group.rows, [0..3, 4..5]);
        assert_eq!(group.batch_rows, [0, 1, 2, 0, 3, 3, 3, 3]);
        // One that has no room at all is computed alone.
        assert_eq!(group.fill(&ready[2..], expert_of, &pairs, 8), 1);
        assert_eq!(group.ranks, [2]);
        assert_eq!((group.rows[0].clone(), group.pairs[0].clone()), (0..9, 4..13));
        assert_eq!(group.fill(&ready[3..], expert_of, &pairs, 8), 1);
        assert_eq!(group.ranks, [0]);
        assert_eq!((group.rows[0].clone(), group.pairs[0].clone()), (0..2, 13..15));
    }
}
