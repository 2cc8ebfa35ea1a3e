//! Finds the two knobs behind routing statistics by simulating the router alone.
//!
//! Routing in a synthetic model follows a *topic*: an average of what recent tokens carry, written into a subspace of
//! the residual stream by attention heads with constant queries and keys. Under rotary positions such a head scores a
//! distance `Δ` by `a · Σ cos(θ_i Δ)`, so the one number `a` (the strength) says how fast the past fades, and with it
//! how many experts a token shares with its predecessor. The other knob is the head start that popular experts have.
//! Both are found here by bisection on a simulated router; what the weights then really do is measured on the model.

use std::ops::Range;

use super::rng::{Normals, Rng};

/// Rotary pairs faster than this (radians per token) stay silent, or the past would fade within one token.
const FASTEST: f64 = 0.45;
/// Rotary pairs slower than this never turn within a context and would only add a constant.
const SLOWEST: f64 = 2e-4;
/// Rotary pairs slower than this hardly tell a position from the next.
const SLOWEST_OF_SELF: f64 = 0.05;
/// Distances the simulated kernel reaches; the real one has faded long before.
const REACH: usize = 96;
/// Simulated tokens.
const TOKENS: usize = 3000;

/// Which rotary pairs of a head a topic head uses.
pub fn active_pairs(head_dim: usize, theta: f64) -> Vec<usize> {
    pairs(head_dim, theta, SLOWEST..FASTEST)
}

/// Which rotary pairs a head uses that looks at its own position only: those that turn visibly from one token to the next.
/// Slower ones would add to every score alike, and more than the next position takes away as soon as keys differ in length.
pub fn fast_pairs(head_dim: usize, theta: f64) -> Vec<usize> {
    pairs(head_dim, theta, SLOWEST_OF_SELF..f64::INFINITY)
}

/// Rotary pairs that turn by so many radians per token.
fn pairs(head_dim: usize, theta: f64, speeds: Range<f64>) -> Vec<usize> {
    (0..head_dim / 2).filter(|i| speeds.contains(&theta.powf(-2.0 * *i as f64 / head_dim as f64))).collect()
}

/// What the chosen routing should look like.
#[derive(Clone, Copy, Debug)]
pub struct Routing {
    /// Experts of a layer.
    pub n_experts: usize,
    /// Experts chosen per token.
    pub n_used: usize,
    /// How many experts are popular.
    pub n_popular: usize,
    /// The share of choices that goes to popular experts.
    pub popular_share: f64,
    /// The share of a token's experts that its predecessor also chose.
    pub repeat_share: f64,
}

/// The knobs, and what the simulation says they give.
#[derive(Clone, Copy, Debug)]
pub struct Calibration {
    /// Weight of each rotary pair in the topic heads' scores.
    pub strength: f64,
    /// Head start of popular experts, in standard deviations of a router logit.
    pub head_start: f64,
    /// Sum of squared attention weights of a topic head: the variance left after averaging.
    pub kernel_energy: f64,
    /// Simulated share of choices that went to popular experts.
    pub popular_share: f64,
    /// Simulated share of repeated experts.
    pub repeat_share: f64,
}

/// Attention weights of a topic head by distance.
pub fn kernel(strength: f64, head_dim: usize, theta: f64) -> Vec<f64> {
    let pairs = active_pairs(head_dim, theta);
    let score = |distance: usize| -> f64 {
        pairs.iter().map(|&i| strength * (theta.powf(-2.0 * i as f64 / head_dim as f64) * distance as f64).cos()).sum()
    };
    let top = score(0);
    let weights: Vec<f64> = (0..REACH).map(|d| (score(d) - top).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|w| w / sum).collect()
}

/// Finds the knobs for `target`. `slow` is the share of the router input's variance that the topic makes up; `wobble` how
/// much the divisor of the norms, and with it the length of a constant key, varies from token to token (standard
/// deviation over mean): scores are large, so a little of it shows in the attention weights.
pub fn calibrate(target: &Routing, head_dim: usize, theta: f64, slow: f64, wobble: f64, seed: u64) -> Calibration {
    let simulation = Simulation::new(target, slow, wobble, seed);
    let (mut low, mut high) = (0.15_f64, 12.0_f64);
    let mut best = simulation.run(low, head_dim, theta);
    for _ in 0..12 {
        let middle = (low * high).sqrt();
        best = simulation.run(middle, head_dim, theta);
        if best.repeat_share > target.repeat_share { low = middle } else { high = middle }
    }
    best
}

/// Random inputs, drawn once so that the bisection sees a smooth function.
struct Simulation<'a> {
    target: &'a Routing,
    slow: f64,
    wobble: f64,
    past: Vec<f32>,
    fresh: Vec<f32>,
    /// How much longer than the mean each past token's key is, in units of `wobble`.
    lengths: Vec<f32>,
}

impl<'a> Simulation<'a> {
    fn new(target: &'a Routing, slow: f64, wobble: f64, seed: u64) -> Self {
        let normals = Normals::new();
        let mut past = vec![0.0; (TOKENS + REACH) * target.n_experts];
        normals.fill(&mut Rng::for_row(seed, "calibration.past", 0), 1.0, &mut past);
        let mut fresh = vec![0.0; TOKENS * target.n_experts];
        normals.fill(&mut Rng::for_row(seed, "calibration.fresh", 0), 1.0, &mut fresh);
        let mut lengths = vec![0.0; TOKENS + REACH];
        normals.fill(&mut Rng::for_row(seed, "calibration.lengths", 0), 1.0, &mut lengths);
        Self { target, slow, wobble, past, fresh, lengths }
    }

    fn run(&self, strength: f64, head_dim: usize, theta: f64) -> Calibration {
        let weights = kernel(strength, head_dim, theta);
        let exponent = strength * active_pairs(head_dim, theta).len() as f64 * self.wobble;
        let attention = |token: usize| -> Vec<f64> {
            let length = |distance: usize| f64::from(self.lengths[token + REACH - 1 - distance]);
            let raw: Vec<f64> = weights.iter().enumerate().map(|(d, w)| w * (exponent * length(d)).exp()).collect();
            let sum: f64 = raw.iter().sum();
            raw.iter().map(|w| w / sum).collect()
        };
        let square = |token| attention(token).iter().map(|w| w * w).sum::<f64>();
        let energy = (0..TOKENS).map(square).sum::<f64>() / TOKENS as f64;
        let n = self.target.n_experts;
        let scale = (self.slow / energy).sqrt();
        let mut logits: Vec<f32> = self.fresh.iter().map(|x| (1.0 - self.slow).sqrt() as f32 * x).collect();
        for (token, row) in logits.chunks_exact_mut(n).enumerate() {
            for (distance, w) in attention(token).into_iter().enumerate() {
                let w = (scale * w) as f32;
                let start = (token + REACH - 1 - distance) * n;
                for (x, p) in row.iter_mut().zip(&self.past[start..start + n]) {
                    *x += w * p;
                }
            }
        }
        let (mut low, mut high) = (0.0_f64, 6.0_f64);
        let mut result = self.measure(&logits, 0.0);
        let mut head_start = 0.0;
        for _ in 0..12 {
            head_start = 0.5 * (low + high);
            result = self.measure(&logits, head_start as f32);
            if result.0 < self.target.popular_share { low = head_start } else { high = head_start }
        }
        Calibration { strength, head_start, kernel_energy: energy, popular_share: result.0, repeat_share: result.1 }
    }

    /// Shares of popular choices and of repeated ones.
    fn measure(&self, logits: &[f32], head_start: f32) -> (f64, f64) {
        let Routing { n_experts, n_used, n_popular, .. } = *self.target;
        let mut order: Vec<usize> = Vec::with_capacity(n_experts);
        let mut previous = vec![false; n_experts];
        let (mut popular, mut repeated) = (0_usize, 0_usize);
        for row in logits.chunks_exact(n_experts) {
            let value = |e: usize| row[e] + if e < n_popular { head_start } else { 0.0 };
            order.clear();
            order.extend(0..n_experts);
            if n_used < n_experts {
                order.select_nth_unstable_by(n_used, |&a, &b| value(b).total_cmp(&value(a)));
            }
            let chosen = &order[..n_used];
            popular += chosen.iter().filter(|&&e| e < n_popular).count();
            repeated += chosen.iter().filter(|&&e| previous[e]).count();
            previous.fill(false);
            for &e in chosen {
                previous[e] = true;
            }
        }
        let choices = (TOKENS * n_used) as f64;
        (popular as f64 / choices, repeated as f64 / (choices - n_used as f64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_is_a_fading_average() {
        let weights = kernel(0.5, 128, 1.5e6);
        assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        assert!(weights.windows(2).take(6).all(|w| w[0] > w[1]));
        assert!(weights[40..].iter().sum::<f64>() < 0.02);
    }

    #[test]
    fn calibration_reaches_its_targets() {
        for (n_experts, n_used) in [(32, 4), (64, 6)] {
            let target = Routing { n_experts, n_used, n_popular: n_experts / 4, popular_share: 0.6, repeat_share: 0.5 };
            let found = calibrate(&target, 128, 1.5e6, 0.87, 0.016, 1);
            assert!((found.popular_share - 0.6).abs() < 0.01, "{found:?}");
            assert!((found.repeat_share - 0.5).abs() < 0.02, "{found:?}");
        }
    }
}
