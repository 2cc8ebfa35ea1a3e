//! What every weight of a synthetic checkpoint is, row by row.
//!
//! The residual stream is split into four subspaces, each a whole number of quantization blocks:
//! - *constant*: the same value for every token, written by the embedding and by nobody else. Gate rows lean against it,
//!   which sets the neuron sparsity; router rows lean on it, which sets the popularity of experts; topic heads make
//!   their constant queries and keys of it.
//! - *slow*: a little of the token itself, and in rotary layers the topic (see [`super::calibrate`]). The routers read it. The
//!   tokens' own part fades along the model's own text as the topic does: before the first topic is written, a router sees
//!   nothing else, and only so can it repeat experts. (For tokens in any other order, those routers repeat no more than
//!   popularity makes them.)
//! - *code*: what makes the next token (see [`super::successor`]).
//! - *rest*: random embeddings, and what attention and experts add.
//!
//! Attention and experts add little to the stream beside what the embedding put there, so the norms' divisors are known
//! in advance and the statistics hold in every layer.

use std::ops::Range;

use anyhow::{Result, ensure};

use super::calibrate::{Calibration, Routing, active_pairs, calibrate, fast_pairs, kernel};
use super::rng::{Normals, Rng, normal_cdf, normal_pdf, normal_quantile};
use super::shape::Shape;
use super::successor::Codes;
use super::vocab::Vocab;

/// Value of the constant subspace.
const CONSTANT: f64 = 2.0;
/// Variance of the token's own part in the slow subspace, and of the first topic written beside it.
const OWN_SLOW: f64 = 0.04;
const TOPIC: f64 = 1.0;
/// What each later layer adds to the topic: two layers' routers agree mostly, not wholly.
const TOPIC_STEP: f64 = 0.05;
/// Variance that experts and attention add to the stream over all layers.
const FFN_GROWTH: f64 = 0.5;
const ATTENTION_GROWTH: f64 = 0.1;
/// Experts write this fraction of their amplitude into the slow subspace.
const FFN_INTO_SLOW: f64 = 0.3;
/// Neurons differ in how often they live: standard deviation of their thresholds.
const THRESHOLD_SPREAD: f64 = 0.5;
/// Standard deviation of router logits, and how much popularity varies from expert to expert.
const LOGIT_SCALE: f64 = 1.5;
const POPULARITY_SPREAD: f32 = 0.1;
/// Strength of the head that looks only at its own position.
const SELF_STRENGTH: f64 = 8.0;
/// What the successor head adds of the next token's code and takes of this one's.
const NEXT_CODE: f32 = 1.5;
const OLD_CODE: f32 = 0.75;
/// Final norm weights: the code decides the next token, the rest only colours it.
const FINAL_CODE: f32 = 0.1;
const FINAL_REST: f32 = 0.001;

/// The statistics asked for.
#[derive(Clone, Copy, Debug)]
pub struct Statistics {
    /// Share of neurons inside chosen experts whose activation is zero.
    pub sparsity: f64,
    /// The same for the first eighth of the layers.
    pub early_sparsity: f64,
    /// Share of choices that goes to the popular quarter of a layer's experts.
    pub popular_share: f64,
    /// Share of its predecessor's experts that a token repeats.
    pub repeat_share: f64,
    /// Seed of every weight.
    pub seed: u64,
}

/// How many layers the first eighth of `n_layers` is.
pub fn first_eighth(n_layers: usize) -> usize {
    n_layers.div_ceil(8)
}

/// Which weight a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Kind {
    Embedding,
    Head,
    FinalNorm,
    AttentionNorm,
    FfnNorm,
    Query,
    Key,
    Value,
    Output,
    Router,
    Gate,
    Up,
    Down,
}

/// One tensor of the checkpoint.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Hugging Face name.
    pub name: String,
    /// Which weight.
    pub kind: Kind,
    /// Decoder layer (0 outside layers).
    pub layer: usize,
    /// Expert (0 outside experts).
    pub expert: usize,
    /// Rows; 1 for norms.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
}

/// What is known of one layer in advance.
#[derive(Clone, Debug)]
struct LayerPlan {
    /// Divisor of the norms.
    rms: f64,
    /// Standard deviation of the slow subspace where the router reads it.
    slow_std: f64,
    /// Amplitude with which the topic head writes, where there is one.
    topic: Option<f64>,
    /// Whether the last key/value group applies the turn to the next token.
    successor: bool,
    /// Mean threshold of gate neurons, in standard deviations of their input, and its spread.
    threshold: (f64, f64),
    /// Standard deviation of down weights.
    down_sigma: f64,
    /// Router bias per expert, in standard deviations of a logit.
    popularity: Vec<f32>,
}

/// Makes any row of any tensor.
#[derive(Debug)]
pub struct Recipe {
    shape: Shape,
    vocab: Vocab,
    seed: u64,
    normals: Normals,
    codes: Option<Codes>,
    calibration: Calibration,
    /// How much a token's own slow part has of each token before it in the model's own text, itself first.
    trail: Vec<f32>,
    constant: Range<usize>,
    slow: Range<usize>,
    code: Range<usize>,
    rest: Range<usize>,
    layers: Vec<LayerPlan>,
}

impl Recipe {
    /// Plans a model of `shape` with the given statistics.
    ///
    /// # Errors
    /// Shapes and statistics that no model can have.
    pub fn new(shape: Shape, statistics: &Statistics) -> Result<Self> {
        shape.validate()?;
        for (what, share) in [
            ("sparsity", statistics.sparsity),
            ("early sparsity", statistics.early_sparsity),
            ("popular share", statistics.popular_share),
            ("repeat share", statistics.repeat_share),
        ] {
            ensure!((0.0..=0.99).contains(&share), "{what} {share} is not between 0 and 0.99");
        }
        let n = shape.n_embd;
        let n_slow = shape.head_dim.min((n / 8 / 32 * 32).max(32));
        let vocab = Vocab::sizes(shape.n_vocab);
        let codes = Codes::new(vocab.n_regular, shape.n_vocab, shape.head_dim.min(n / 4));
        let n_code = codes.as_ref().map_or(0, |c| c.len().next_multiple_of(32));
        let constant = 0..32;
        let slow = 32..32 + n_slow;
        let code = slow.end..slow.end + n_code;
        let rest = code.end..n;
        let target = Routing {
            n_experts: shape.n_experts,
            n_used: shape.n_experts_used,
            n_popular: (shape.n_experts / 4).max(1),
            popular_share: statistics.popular_share,
            repeat_share: statistics.repeat_share,
        };
        let slow_share = TOPIC / (TOPIC + OWN_SLOW);
        // A sum of squares of k normals varies by √(2k); the root halves that.
        let wobble = 0.5 * (2.0 * rest.len() as f64).sqrt() / n as f64;
        let calibration =
            calibrate(&target, shape.head_dim, shape.rope_theta.into(), slow_share, wobble, statistics.seed);
        let trail = trail(&kernel(calibration.strength, shape.head_dim, shape.rope_theta.into()));
        let mut recipe = Self {
            shape,
            vocab,
            seed: statistics.seed,
            normals: Normals::new(),
            codes,
            calibration,
            trail,
            constant,
            slow,
            code,
            rest,
            layers: Vec::new(),
        };
        recipe.plan_layers(statistics, &target);
        Ok(recipe)
    }

    /// The shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Sizes of the vocabulary.
    pub fn vocab(&self) -> Vocab {
        self.vocab
    }

    /// The knobs that the simulation found.
    pub fn calibration(&self) -> &Calibration {
        &self.calibration
    }

    /// Whether greedy text walks through the vocabulary (it repeats one token where codes do not fit).
    pub fn has_successors(&self) -> bool {
        self.codes.is_some()
    }

    /// Whether `expert` was made a popular one of `layer`.
    pub fn is_popular(&self, layer: usize, expert: usize) -> bool {
        self.layers[layer].popularity[expert] > 3.0 * POPULARITY_SPREAD
    }

    fn plan_layers(&mut self, statistics: &Statistics, target: &Routing) {
        let s = &self.shape;
        let n = s.n_embd as f64;
        let n_layers = s.n_layers as f64;
        let last_rotary = s.rope_layers.iter().rposition(|&r| r).filter(|_| self.codes.is_some());
        let code_len = self.codes.as_ref().map_or(0, Codes::len) as f64;
        let mut slow_variance = OWN_SLOW;
        let mut wrote_topic = false;
        for layer in 0..s.n_layers {
            let grown = layer as f64 / n_layers * (FFN_GROWTH + ATTENTION_GROWTH);
            let into_slow = layer as f64 / n_layers * FFN_GROWTH * FFN_INTO_SLOW * FFN_INTO_SLOW;
            let energy = self.constant.len() as f64 * CONSTANT * CONSTANT
                + self.slow.len() as f64 * (slow_variance + into_slow)
                + code_len
                + self.code.len() as f64 * grown
                + self.rest.len() as f64 * (1.0 + grown);
            let rms = (energy / n).sqrt();
            let successor = last_rotary == Some(layer);
            let topic = (s.rope_layers[layer] && !(successor && s.n_kv_heads == 1)).then(|| {
                let variance = if wrote_topic { TOPIC_STEP } else { TOPIC };
                (variance / ((1.0 + grown) * self.calibration.kernel_energy)).sqrt()
            });
            let early = layer < first_eighth(s.n_layers);
            let sparsity = if early { statistics.early_sparsity } else { statistics.sparsity };
            // Nothing sparse: every threshold far below every input.
            let (mean, spread) =
                if sparsity < 1e-3 { (-5.0, 0.0) } else { (normal_quantile(sparsity), THRESHOLD_SPREAD) };
            let widened = 1.0 + spread * spread;
            let live_square = widened
                * ((1.0 + mean * mean) * normal_cdf(-mean) - mean * normal_pdf(mean))
                * self.gate_sigma(rms).powi(2);
            let per_expert = FFN_GROWTH / n_layers * s.n_experts_used as f64;
            let mut rng = Rng::for_row(self.seed, "popularity", layer as u64);
            let mut popularity = vec![0.0; s.n_experts];
            self.normals.fill(&mut rng, POPULARITY_SPREAD, &mut popularity);
            let mut order: Vec<usize> = (0..s.n_experts).collect();
            for i in 0..target.n_popular {
                let j = i + rng.below(s.n_experts - i);
                order.swap(i, j);
                popularity[order[i]] += self.calibration.head_start as f32;
            }
            self.layers.push(LayerPlan {
                rms,
                slow_std: (slow_variance + into_slow).sqrt(),
                topic,
                successor,
                threshold: (mean * widened.sqrt(), spread),
                down_sigma: (per_expert / (s.n_ff as f64 * live_square)).sqrt(),
                popularity,
            });
            if topic.is_some() {
                slow_variance += if wrote_topic { TOPIC_STEP } else { TOPIC };
                wrote_topic = true;
            }
        }
    }

    /// Standard deviation of a gate neuron's input, the constant part left out, for weights of variance 1/n.
    fn gate_sigma(&self, rms: f64) -> f64 {
        let n = self.shape.n_embd as f64;
        ((n - self.constant.len() as f64 * (CONSTANT / rms).powi(2)) / n).sqrt()
    }

    /// Every tensor, in the order in which checkpoints hold them.
    pub fn tensors(&self) -> Vec<Tensor> {
        let s = &self.shape;
        let n = s.n_embd;
        let mut all = Vec::new();
        let mut add = |name: String, kind, layer, expert, rows, cols| {
            all.push(Tensor { name, kind, layer, expert, rows, cols });
        };
        add("model.embed_tokens.weight".into(), Kind::Embedding, 0, 0, s.n_vocab, n);
        for layer in 0..s.n_layers {
            let name = |rest: &str| format!("model.layers.{layer}.{rest}.weight");
            add(name("input_layernorm"), Kind::AttentionNorm, layer, 0, 1, n);
            add(name("self_attn.q_proj"), Kind::Query, layer, 0, s.q_dim(), n);
            add(name("self_attn.k_proj"), Kind::Key, layer, 0, s.kv_dim(), n);
            add(name("self_attn.v_proj"), Kind::Value, layer, 0, s.kv_dim(), n);
            add(name("self_attn.o_proj"), Kind::Output, layer, 0, n, s.q_dim());
            add(name("post_attention_layernorm"), Kind::FfnNorm, layer, 0, 1, n);
            add(name("block_sparse_moe.primary_router"), Kind::Router, layer, 0, s.n_experts, n);
            for expert in 0..s.n_experts {
                let name = |part: &str| name(&format!("block_sparse_moe.experts.{expert}.{part}"));
                add(name("up"), Kind::Up, layer, expert, s.n_ff, n);
                add(name("gate"), Kind::Gate, layer, expert, s.n_ff, n);
                add(name("down"), Kind::Down, layer, expert, n, s.n_ff);
            }
        }
        add("model.norm.weight".into(), Kind::FinalNorm, 0, 0, 1, n);
        if !s.tied {
            add("lm_head.weight".into(), Kind::Head, 0, 0, s.n_vocab, n);
        }
        all
    }

    /// Writes row `row` of `tensor` into `out` (one value per column), each value exact in BF16.
    pub fn fill_row(&self, tensor: &Tensor, row: usize, out: &mut [f32]) {
        debug_assert_eq!(out.len(), tensor.cols);
        let mut rng = Rng::for_row(self.seed, &tensor.name, row as u64);
        let plan = &self.layers[tensor.layer];
        match tensor.kind {
            Kind::Embedding | Kind::Head => self.embedding_row(row, &mut rng, out),
            Kind::AttentionNorm | Kind::FfnNorm => {
                out.fill(1.0);
                self.normals.fill(&mut rng, 0.05, &mut out[self.rest.clone()]);
                out[self.rest.clone()].iter_mut().for_each(|x| *x += 1.0);
            }
            Kind::FinalNorm => {
                out.fill(FINAL_REST);
                out[self.code.clone()].fill(FINAL_CODE);
            }
            Kind::Query | Kind::Key => self.query_or_key_row(tensor, row, plan, &mut rng, out),
            Kind::Value => self.value_row(row, plan, &mut rng, out),
            Kind::Output => self.output_row(row, plan, &mut rng, out),
            Kind::Router => {
                out.fill(0.0);
                let slow = &mut out[self.slow.clone()];
                self.normals.fill(&mut rng, 1.0, slow);
                let norm = slow.iter().map(|x| x * x).sum::<f32>().sqrt();
                let scale = (LOGIT_SCALE / plan.slow_std) as f32 / norm;
                slow.iter_mut().for_each(|x| *x *= scale);
                let bias = f64::from(plan.popularity[row]) * LOGIT_SCALE;
                out[self.constant.clone()].fill((bias / (self.constant.len() as f64 * CONSTANT)) as f32);
            }
            Kind::Gate => {
                let sigma = (self.shape.n_embd as f64).sqrt().recip();
                self.normals.fill(&mut rng, sigma as f32, out);
                let (mean, spread) = plan.threshold;
                let threshold = mean + spread * f64::from(self.normals.sample(&mut rng));
                let seen = self.constant.len() as f64 * CONSTANT / plan.rms;
                out[self.constant.clone()].fill((-threshold * self.gate_sigma(plan.rms) / seen) as f32);
            }
            Kind::Up => self.normals.fill(&mut rng, (self.shape.n_embd as f32).sqrt().recip(), out),
            Kind::Down if self.constant.contains(&row) => out.fill(0.0),
            Kind::Down => {
                let into_slow = if self.slow.contains(&row) { FFN_INTO_SLOW } else { 1.0 };
                self.normals.fill(&mut rng, (plan.down_sigma * into_slow) as f32, out);
            }
        }
        out.iter_mut().for_each(|x| *x = round_to_bf16(*x));
    }

    fn embedding_row(&self, token: usize, rng: &mut Rng, out: &mut [f32]) {
        out[self.constant.clone()].fill(CONSTANT as f32);
        self.own_slow(token, &mut out[self.slow.clone()]);
        out[self.code.clone()].fill(0.0);
        if let Some(codes) = &self.codes {
            codes.write(token, &mut out[self.code.clone()]);
        }
        self.normals.fill(rng, 1.0, &mut out[self.rest.clone()]);
    }

    /// The token's own part of the slow subspace: a fading sum over the steps that lead to it in the model's own text.
    fn own_slow(&self, token: usize, out: &mut [f32]) {
        let place = self.codes.as_ref().map_or(token, |codes| codes.step_of(token));
        let mut step = vec![0.0; out.len()];
        out.fill(0.0);
        for (distance, &weight) in self.trail.iter().enumerate() {
            let mut rng = Rng::for_row(self.seed, "slow", (place + self.trail.len() - distance) as u64);
            self.normals.fill(&mut rng, weight * OWN_SLOW.sqrt() as f32, &mut step);
            out.iter_mut().zip(&step).for_each(|(x, s)| *x += s);
        }
    }

    /// Strength and rotary pairs of the constant-query head that key/value group `group` is in this layer, if it is one.
    fn constant_head(&self, plan: &LayerPlan, group: usize) -> Option<(f64, Vec<usize>)> {
        let (head_dim, theta) = (self.shape.head_dim, f64::from(self.shape.rope_theta));
        if plan.successor && group == self.shape.n_kv_heads - 1 {
            return Some((SELF_STRENGTH, fast_pairs(head_dim, theta)));
        }
        (plan.topic.is_some() && group == 0).then(|| (self.calibration.strength, active_pairs(head_dim, theta)))
    }

    fn query_or_key_row(&self, tensor: &Tensor, row: usize, plan: &LayerPlan, rng: &mut Rng, out: &mut [f32]) {
        let hd = self.shape.head_dim;
        let per_group = if tensor.kind == Kind::Query { self.shape.n_heads / self.shape.n_kv_heads } else { 1 };
        let Some((strength, pairs)) = self.constant_head(plan, row / hd / per_group) else {
            self.normals.fill(rng, (self.shape.n_embd as f32).sqrt().recip(), out);
            out[self.constant.clone()].fill(0.0);
            return;
        };
        out.fill(0.0);
        if pairs.contains(&(row % hd)) {
            // The query times the key of one pair is strength·√head_dim, before attention divides by √head_dim.
            let amplitude = (strength * (hd as f64).sqrt()).sqrt();
            let seen = self.constant.len() as f64 * CONSTANT / plan.rms;
            out[self.constant.clone()].fill((amplitude / seen) as f32);
        }
    }

    fn value_row(&self, row: usize, plan: &LayerPlan, rng: &mut Rng, out: &mut [f32]) {
        let (group, i) = (row / self.shape.head_dim, row % self.shape.head_dim);
        out.fill(0.0);
        if plan.successor && group == self.shape.n_kv_heads - 1 {
            if i < self.codes.as_ref().map_or(0, Codes::len) {
                out[self.code.start + i] = plan.rms as f32;
            }
        } else if plan.topic.is_some() && group == 0 {
            let sigma = plan.rms / (self.rest.len() as f64).sqrt();
            self.normals.fill(rng, sigma as f32, &mut out[self.rest.clone()]);
        } else {
            self.normals.fill(rng, (self.shape.n_embd as f32).sqrt().recip(), out);
        }
    }

    fn output_row(&self, row: usize, plan: &LayerPlan, rng: &mut Rng, out: &mut [f32]) {
        let s = &self.shape;
        let per_group = s.n_heads / s.n_kv_heads;
        out.fill(0.0);
        if self.constant.contains(&row) {
        } else if self.slow.contains(&row) {
            let Some(amplitude) = plan.topic else { return };
            for head in 0..per_group {
                out[head * s.head_dim + row - self.slow.start] = amplitude as f32 / per_group as f32;
            }
        } else if plan.successor && self.code.contains(&row) {
            let Some(codes) = self.codes.as_ref().filter(|c| row - self.code.start < c.len()) else { return };
            let i = row - self.code.start;
            for head in (s.n_kv_heads - 1) * per_group..s.n_heads {
                out[head * s.head_dim + i] -= OLD_CODE / per_group as f32;
                out[head * s.head_dim + codes.source_of(i)] += NEXT_CODE / per_group as f32;
            }
        } else {
            let sigma = (ATTENTION_GROWTH / s.n_layers as f64 / s.q_dim() as f64).sqrt();
            self.normals.fill(rng, sigma as f32, out);
        }
    }
}

/// Attention weights as those of a sum with variance 1, without the faint end.
fn trail(kernel: &[f64]) -> Vec<f32> {
    let faint = 0.02 * kernel[0];
    let kept = kernel.iter().rposition(|&weight| weight > faint).map_or(1, |last| last + 1);
    let energy: f64 = kernel[..kept].iter().map(|weight| weight * weight).sum();
    kernel[..kept].iter().map(|weight| (weight / energy.sqrt()) as f32).collect()
}

/// Rounds to the nearest BF16, ties to even; finite input only.
fn round_to_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}

#[cfg(test)]
mod tests {
    use st_gguf::ModelShape;

    use super::*;

    fn statistics() -> Statistics {
        Statistics { sparsity: 0.65, early_sparsity: 0.92, popular_share: 0.6, repeat_share: 0.5, seed: 1 }
    }

    fn small() -> Shape {
        let model = ModelShape {
            n_layers: 8,
            n_embd: 256,
            n_heads: 4,
            head_dim: 64,
            n_experts: 8,
            n_experts_used: 2,
            n_ff: 64,
            n_vocab: 2048,
            ..ModelShape::published_4b()
        };
        let mut shape = Shape { window: 64, ..Shape::of("small", model) };
        shape.set_period(4);
        shape
    }

    #[test]
    fn rows_are_finite_bf16_and_repeatable() {
        let recipe = Recipe::new(small(), &statistics()).unwrap();
        for tensor in recipe.tensors() {
            let mut row = vec![f32::NAN; tensor.cols];
            let mut again = vec![1.0; tensor.cols];
            for i in [0, tensor.rows / 2, tensor.rows - 1] {
                recipe.fill_row(&tensor, i, &mut row);
                recipe.fill_row(&tensor, i, &mut again);
                assert_eq!(row, again, "{}", tensor.name);
                assert!(row.iter().all(|x| x.is_finite() && x.to_bits() & 0xffff == 0), "{}", tensor.name);
            }
        }
    }

    #[test]
    fn gate_thresholds_give_the_stated_sparsity() {
        let recipe = Recipe::new(small(), &statistics()).unwrap();
        let tensors = recipe.tensors();
        let mut x = vec![0.0; 256];
        for (layer, expected) in [(0, 0.92), (7, 0.65)] {
            let embedding = &tensors[0];
            let mut row = vec![0.0; 256];
            let (mut zeros, mut all) = (0_usize, 0_usize);
            for token in 0..20 {
                recipe.fill_row(embedding, token, &mut x);
                let rms = recipe.layers[layer].rms as f32;
                for gate in tensors.iter().filter(|t| t.kind == Kind::Gate && t.layer == layer) {
                    for j in 0..gate.rows {
                        recipe.fill_row(gate, j, &mut row);
                        let sum: f32 = row.iter().zip(&x).map(|(a, b)| a * b / rms).sum();
                        zeros += usize::from(sum <= 0.0);
                        all += 1;
                    }
                }
            }
            let got = zeros as f64 / all as f64;
            assert!((got - expected).abs() < 0.05, "layer {layer}: {got}");
        }
    }

    #[test]
    fn statistics_outside_their_range_are_refused() {
        assert!(Recipe::new(small(), &Statistics { sparsity: 1.5, ..statistics() }).is_err());
    }
}
