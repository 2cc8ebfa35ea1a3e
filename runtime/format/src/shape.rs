//! The shape of a SmallThinker model: every number that says what its tensors are and how they are computed.

/// How router logits of the chosen experts become weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gating {
    /// `softmax` over the chosen logits (`expert_gating_func` 1).
    Softmax,
    /// `sigmoid` of each, divided by their sum (`expert_gating_func` 2).
    Sigmoid,
}

/// Shape and constants of one SmallThinker model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelShape {
    /// Decoder layers.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Experts of a layer.
    pub n_experts: usize,
    /// Experts chosen per token and layer.
    pub n_experts_used: usize,
    /// Neurons of one expert.
    pub n_ff: usize,
    /// Rows of the embedding.
    pub n_vocab: usize,
    /// Tokens the model was trained to see at once.
    pub context_length: usize,
    /// Epsilon inside the root of RMS norm.
    pub rms_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Weights of the chosen experts.
    pub gating: Gating,
    /// Per layer: rotary positions (true) or none (NoPE).
    pub rope_layers: Vec<bool>,
    /// Per layer: the attention window in positions, the token itself included; `None` attends to all. All windows of
    /// a model are of one length.
    pub windows: Vec<Option<usize>>,
}

/// A number of a shape that makes no model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misfit {
    /// The metadata key behind `smallthinker.` that states it.
    pub key: &'static str,
    /// What it has to be.
    pub expected: String,
    /// What it is.
    pub got: String,
}

/// The largest values that are accepted, far above any real model, far below what would overflow.
pub(crate) const CAPS: [(&str, usize); 10] = [
    ("block_count", 1 << 12),
    ("embedding_length", 1 << 20),
    ("attention.head_count", 1 << 12),
    ("attention.head_count_kv", 1 << 12),
    ("attention.key_length", 1 << 12),
    ("expert_count", 1 << 16),
    ("expert_used_count", 1 << 10),
    ("expert_feed_forward_length", 1 << 20),
    ("vocab_size", 1 << 26),
    ("context_length", 1 << 30),
];
/// The largest sliding window.
pub(crate) const MAX_WINDOW: usize = 1 << 30;

/// The largest value that is accepted of a number of the shape, by its metadata key behind `smallthinker.`; `None` for other keys.
pub fn largest(key: &str) -> Option<usize> {
    match key {
        "attention.sliding_window" => Some(MAX_WINDOW),
        _ => CAPS.iter().find(|(capped, _)| *capped == key).map(|&(_, max)| max),
    }
}

impl ModelShape {
    /// The shape of SmallThinker-4BA0.6B.
    pub fn published_4b() -> Self {
        Self {
            n_layers: 32,
            n_embd: 1536,
            n_heads: 12,
            n_kv_heads: 2,
            head_dim: 128,
            n_experts: 32,
            n_experts_used: 4,
            n_ff: 768,
            n_vocab: 151_936,
            context_length: 32_768,
            rms_eps: 1e-6,
            rope_theta: 1.5e6,
            gating: Gating::Sigmoid,
            rope_layers: vec![true; 32],
            windows: vec![None; 32],
        }
    }

    /// The shape of SmallThinker-21BA3B.
    pub fn published_21b() -> Self {
        let local = |layer: usize| !layer.is_multiple_of(4);
        Self {
            n_layers: 52,
            n_embd: 2560,
            n_heads: 28,
            n_kv_heads: 4,
            n_experts: 64,
            n_experts_used: 6,
            context_length: 16_384,
            gating: Gating::Softmax,
            rope_layers: (0..52).map(local).collect(),
            windows: (0..52).map(|layer| local(layer).then_some(4096)).collect(),
            ..Self::published_4b()
        }
    }

    /// Width of all query heads together.
    pub const fn q_dim(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub const fn kv_dim(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// The length of the windows, where any layer has one.
    pub fn window(&self) -> Option<usize> {
        self.windows.iter().copied().flatten().next()
    }

    /// Checks every number against its bounds and against the others, wherever they were read.
    ///
    /// # Errors
    /// The first one that makes no model.
    pub fn check(&self) -> Result<(), Misfit> {
        let values = [
            self.n_layers,
            self.n_embd,
            self.n_heads,
            self.n_kv_heads,
            self.head_dim,
            self.n_experts,
            self.n_experts_used,
            self.n_ff,
            self.n_vocab,
            self.context_length,
        ];
        for ((key, max), got) in CAPS.into_iter().zip(values) {
            ensure((1..=max).contains(&got), key, got, || format!("a whole number from 1 to {max}"))?;
        }
        let divides = self.n_heads.is_multiple_of(self.n_kv_heads);
        ensure(divides, "attention.head_count_kv", self.n_kv_heads, || {
            format!("a divisor of {} query heads", self.n_heads)
        })?;
        let even = self.head_dim.is_multiple_of(2);
        ensure(even, "attention.key_length", self.head_dim, || "an even number".into())?;
        ensure(self.n_experts_used <= self.n_experts, "expert_used_count", self.n_experts_used, || {
            format!("at most {} experts", self.n_experts)
        })?;
        let positive = |x: f32| x > 0.0 && x.is_finite();
        let number = || "a positive number".into();
        ensure(positive(self.rms_eps), "attention.layer_norm_rms_epsilon", self.rms_eps, number)?;
        ensure(positive(self.rope_theta), "rope.freq_base", self.rope_theta, number)?;
        for (key, len) in
            [("rope.layer_pattern", self.rope_layers.len()), ("attention.sliding_window_pattern", self.windows.len())]
        {
            ensure(len == self.n_layers, key, format!("{len} entries"), || {
                format!("one for each of {} layers", self.n_layers)
            })?;
        }
        let window = self.window();
        for got in self.windows.iter().copied().flatten() {
            let one = Some(got) == window && (1..=MAX_WINDOW).contains(&got);
            ensure(one, "attention.sliding_window", got, || {
                format!("one window for all layers, from 1 to {MAX_WINDOW}")
            })?;
        }
        Ok(())
    }
}

fn ensure(holds: bool, key: &'static str, got: impl ToString, expected: impl FnOnce() -> String) -> Result<(), Misfit> {
    if holds { Ok(()) } else { Err(Misfit { key, expected: expected(), got: got.to_string() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_shapes_are_whole() {
        ModelShape::published_4b().check().unwrap();
        let large = ModelShape::published_21b();
        large.check().unwrap();
        assert_eq!((large.q_dim(), large.kv_dim(), large.window()), (3584, 512, Some(4096)));
        assert_eq!(large.rope_layers[..5], [false, true, true, true, false]);
    }

    #[test]
    fn impossible_shapes_name_the_key() {
        type Spoil = fn(&mut ModelShape);
        let cases: [(Spoil, &str); 10] = [
            (|s| s.n_layers = 0, "block_count"),
            (|s| s.n_embd = 1 << 21, "embedding_length"),
            (|s| s.n_kv_heads = 5, "attention.head_count_kv"),
            (|s| s.head_dim = 127, "attention.key_length"),
            (|s| s.n_experts_used = 33, "expert_used_count"),
            (|s| s.n_experts_used = 1 << 11, "expert_used_count"),
            (|s| s.rms_eps = f32::NAN, "attention.layer_norm_rms_epsilon"),
            (|s| s.rope_layers.truncate(3), "rope.layer_pattern"),
            (|s| s.windows[3] = Some(0), "attention.sliding_window"),
            (|s| (s.windows[3], s.windows[4]) = (Some(5), Some(6)), "attention.sliding_window"),
        ];
        for (spoil, key) in cases {
            let mut shape = ModelShape::published_4b();
            spoil(&mut shape);
            assert_eq!(shape.check().unwrap_err().key, key);
        }
    }
}
