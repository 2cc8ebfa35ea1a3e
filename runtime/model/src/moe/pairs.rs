//! The (row, expert) pairs of a batch, those of one expert side by side.

use std::ops::Range;

use crate::router::Routing;

/// Pairs in the order of their experts' numbers, and within an expert in the order of rows.
#[derive(Debug, Default)]
pub(super) struct Pairs {
    /// First pair of every expert of the layer, chosen or not, and one past the last pair.
    starts: Vec<usize>,
    /// Row of each pair.
    rows: Vec<u32>,
    /// Pair of each (row, rank).
    pair_of: Vec<usize>,
    /// The chosen experts, each once: a single row's as its router ranked them, those of several rows ascending.
    experts: Vec<u32>,
    rows_in_all: usize,
}

impl Pairs {
    /// Groups the choices of `routing` among `n_experts` experts.
    pub(super) fn group(&mut self, routing: &Routing, n_experts: usize) {
        let ids = routing.ids();
        self.rows_in_all = routing.n_tokens();
        // Counts, each one place late, so that placing the pairs turns ends into starts.
        self.starts.clear();
        self.starts.resize(n_experts + 1, 0);
        for &id in ids {
            self.starts[id as usize + 1] += 1;
        }
        self.experts.clear();
        if routing.n_tokens() == 1 {
            self.experts.extend_from_slice(ids);
        } else {
            self.experts.extend((0..n_experts as u32).filter(|&id| self.starts[id as usize + 1] > 0));
        }
        for i in 0..n_experts {
            self.starts[i + 1] += self.starts[i];
        }
        self.rows.clear();
        self.rows.resize(ids.len(), 0);
        self.pair_of.clear();
        for (i, &id) in ids.iter().enumerate() {
            let next = &mut self.starts[id as usize];
            self.rows[*next] = (i / routing.n_used()) as u32;
            self.pair_of.push(*next);
            *next += 1;
        }
        self.starts.rotate_right(1);
        self.starts[0] = 0;
    }

    /// Rows of the batch.
    pub(super) fn rows_in_all(&self) -> usize {
        self.rows_in_all
    }

    /// Pairs in all.
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// The chosen experts.
    pub(super) fn experts(&self) -> &[u32] {
        &self.experts
    }

    /// The pairs of one expert.
    pub(super) fn of(&self, expert: u32) -> Range<usize> {
        self.starts[expert as usize]..self.starts[expert as usize + 1]
    }

    /// Row of each pair.
    pub(super) fn rows(&self) -> &[u32] {
        &self.rows
    }

    /// Pair of each (row, rank).
    pub(super) fn pair_of(&self) -> &[usize] {
        &self.pair_of
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use st_format::Gating;

    #[test]
    fn pairs_of_an_expert_lie_together() {
        // Two rows choose experts 5, 1 and 5, 3 of seven.
        let mut routing = Routing::default();
        let row = |best: usize, next: usize| {
            (0..7).map(move |i| if i == best { 2.0 } else { f32::from(u8::from(i == next)) })
        };
        let logits: Vec<f32> = row(5, 1).chain(row(5, 3)).collect();
        routing.choose_best(2, 7, Gating::Sigmoid, &logits);
        let mut pairs = Pairs::default();
        pairs.group(&routing, 7);
        assert_eq!((pairs.experts(), pairs.len()), (&[1, 3, 5][..], 4));
        assert_eq!((pairs.of(0), pairs.of(1), pairs.of(3), pairs.of(5), pairs.of(6)), (0..0, 0..1, 1..2, 2..4, 4..4));
        assert_eq!((pairs.rows(), pairs.pair_of()), (&[0, 1, 0, 1][..], &[2, 0, 3, 1][..]));
        // One row keeps its router's order.
        routing.choose_best(2, 7, Gating::Sigmoid, &logits[..7]);
        pairs.group(&routing, 7);
        assert_eq!((pairs.experts(), pairs.pair_of()), (&[5, 1][..], &[1, 0][..]));
    }
}
