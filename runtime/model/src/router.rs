//! The pre-attention router: which experts a token goes to, and how much each counts.
//!
//! Owns the choice: the `n_experts_used` best logits (the lower index first where two are equal), then softmax over
//! them or sigmoid divided by the sum (the technical report, section 2; `expert_gating_func`).

use st_format::{Gating, ModelShape};

/// Chosen experts and weights of a batch of tokens; reused from batch to batch.
#[derive(Debug, Default)]
pub struct Routing {
    n_used: usize,
    ids: Vec<u32>,
    weights: Vec<f32>,
}

impl Routing {
    /// Chooses for each row of `logits` (`[tokens, n_experts]`).
    pub fn choose(&mut self, config: &ModelShape, logits: &[f32]) {
        self.choose_best(config.n_experts_used, config.n_experts, config.gating, logits);
    }

    /// Chooses the `k` best of each row of `n_experts` logits.
    pub(crate) fn choose_best(&mut self, k: usize, n_experts: usize, gating: Gating, logits: &[f32]) {
        self.n_used = k;
        self.ids.clear();
        self.weights.clear();
        for row in logits.chunks_exact(n_experts) {
            let start = self.ids.len();
            for _ in 0..k {
                let taken = &self.ids[start..];
                let mut best = None;
                for (id, &logit) in row.iter().enumerate() {
                    let better = best.is_none_or(|best: usize| logit.total_cmp(&row[best]).is_gt());
                    if better && !taken.contains(&(id as u32)) {
                        best = Some(id);
                    }
                }
                // There are at least `k` experts, so one is always left.
                self.ids.push(best.unwrap_or_default() as u32);
            }
            self.weigh(gating, row, start);
        }
    }

    fn weigh(&mut self, gating: Gating, row: &[f32], start: usize) {
        let chosen = &self.ids[start..];
        let top = row[chosen[0] as usize];
        // In 64 bits, so that what mathematical libraries differ by is rounded away.
        let exp = |x: f32| f64::from(x).exp() as f32;
        self.weights.extend(chosen.iter().map(|&id| match gating {
            Gating::Softmax => exp(row[id as usize] - top),
            Gating::Sigmoid => 1.0 / (1.0 + exp(-row[id as usize])),
        }));
        let sum: f32 = self.weights[start..].iter().sum();
        for weight in &mut self.weights[start..] {
            *weight /= sum;
        }
    }

    /// Experts per token.
    pub fn n_used(&self) -> usize {
        self.n_used
    }

    /// Tokens routed.
    pub fn n_tokens(&self) -> usize {
        self.ids.len() / self.n_used.max(1)
    }

    /// Chosen experts, best first; `[tokens * n_used]`.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Weights in the order of [`Routing::ids`]; those of one token sum to 1.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }
}
