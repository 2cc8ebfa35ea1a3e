//! Shapes of synthetic models: the two published ones and anything else, and their `config.json`.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

/// Every number that makes a SmallThinker model's shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// Written as `model_name` and `general.name`.
    pub name: String,
    /// Decoder layers.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads.
    pub n_kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Experts of a layer.
    pub n_experts: usize,
    /// Experts chosen per token and layer.
    pub n_experts_used: usize,
    /// Neurons of one expert.
    pub n_ff: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Context length.
    pub context: usize,
    /// Per layer: rotary positions.
    pub rope: Vec<bool>,
    /// Per layer: sliding window.
    pub windowed: Vec<bool>,
    /// Length of the sliding window.
    pub window: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Epsilon of RMS norm.
    pub rms_eps: f64,
    /// Router weights by softmax instead of normalised sigmoid.
    pub softmax: bool,
    /// The LM head is the embedding.
    pub tied: bool,
}

impl Shape {
    /// The shape of SmallThinker-4BA0.6B.
    pub fn preset_4b() -> Self {
        Self {
            name: "synthetic_4ba0.6b".into(),
            n_layers: 32,
            n_embd: 1536,
            n_heads: 12,
            n_kv_heads: 2,
            head_dim: 128,
            n_experts: 32,
            n_experts_used: 4,
            n_ff: 768,
            vocab: 151_936,
            context: 32_768,
            rope: vec![true; 32],
            windowed: vec![false; 32],
            window: 4096,
            rope_theta: 1.5e6,
            rms_eps: 1e-6,
            softmax: false,
            tied: true,
        }
    }

    /// The shape of SmallThinker-21BA3B.
    pub fn preset_21b() -> Self {
        let mut shape = Self {
            name: "synthetic_21ba3b".into(),
            n_layers: 52,
            n_embd: 2560,
            n_heads: 28,
            n_kv_heads: 4,
            n_experts: 64,
            n_experts_used: 6,
            context: 16_384,
            softmax: true,
            tied: false,
            ..Self::preset_4b()
        };
        shape.set_period(4);
        shape
    }

    /// One global NoPE layer, then `period - 1` rotary layers with a sliding window, and so on; 0 makes every layer
    /// rotary and global.
    pub fn set_period(&mut self, period: usize) {
        let local = |layer: usize| period == 0 || !layer.is_multiple_of(period);
        self.rope = (0..self.n_layers).map(local).collect();
        self.windowed = (0..self.n_layers).map(|layer| period != 0 && local(layer)).collect();
    }

    /// Refuses shapes that make no model or leave no room for the generator's subspaces.
    ///
    /// # Errors
    /// Names the number that does not fit.
    pub fn validate(&self) -> Result<()> {
        ensure!(self.n_layers > 0, "a model needs at least one layer");
        ensure!(
            self.n_embd >= 128 && self.n_embd.is_multiple_of(32),
            "hidden size {} must be a multiple of 32, at least 128",
            self.n_embd
        );
        ensure!(
            self.n_ff > 0 && self.n_ff.is_multiple_of(32),
            "expert size {} must be a positive multiple of 32",
            self.n_ff
        );
        ensure!(
            self.head_dim >= 32 && self.head_dim.is_multiple_of(32),
            "head size {} must be a multiple of 32",
            self.head_dim
        );
        ensure!(
            self.n_kv_heads > 0 && self.n_heads > 0 && self.n_heads.is_multiple_of(self.n_kv_heads),
            "{} query heads cannot share {} key/value heads",
            self.n_heads,
            self.n_kv_heads
        );
        ensure!(
            self.n_experts_used > 0 && self.n_experts_used <= self.n_experts,
            "{} active of {} experts",
            self.n_experts_used,
            self.n_experts
        );
        ensure!(self.vocab >= 300, "a vocabulary of {} has no room for bytes and special tokens", self.vocab);
        ensure!(
            self.rope.len() == self.n_layers && self.windowed.len() == self.n_layers,
            "layouts must have one entry per layer"
        );
        ensure!(self.window > 0 && self.context > 0, "window and context must be positive");
        Ok(())
    }

    /// Width of all query heads.
    pub fn q_dim(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Width of all key (or value) heads.
    pub fn kv_dim(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// `config.json` with the published models' keys.
    pub fn config_json(&self, end_of_text: usize, turn_end: usize) -> Value {
        let bits = |layers: &[bool]| layers.iter().map(|&on| u8::from(on)).collect::<Vec<_>>();
        json!({
            "architectures": ["SmallThinkerForCausalLM"],
            "model_type": "smallthinker",
            "model_name": self.name,
            "bos_token_id": end_of_text,
            "eos_token_id": [end_of_text, turn_end],
            "head_dim": self.head_dim,
            "hidden_size": self.n_embd,
            "max_position_embeddings": self.context,
            "moe_ffn_hidden_size": self.n_ff,
            "moe_num_active_primary_experts": self.n_experts_used,
            "moe_num_primary_experts": self.n_experts,
            "moe_primary_router_apply_softmax": self.softmax,
            "norm_topk_prob": true,
            "num_attention_heads": self.n_heads,
            "num_hidden_layers": self.n_layers,
            "num_key_value_heads": self.n_kv_heads,
            "rms_norm_eps": self.rms_eps,
            "rope_layout": bits(&self.rope),
            "rope_scaling": null,
            "rope_theta": self.rope_theta,
            "sliding_window_layout": bits(&self.windowed),
            "sliding_window_size": self.window,
            "tie_word_embeddings": self.tied,
            "tokenizer_class": "Qwen2Tokenizer",
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocab,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_valid_and_have_the_published_layouts() {
        Shape::preset_4b().validate().unwrap();
        let large = Shape::preset_21b();
        large.validate().unwrap();
        assert_eq!(large.rope[..5], [false, true, true, true, false]);
        assert_eq!(large.windowed.iter().filter(|&&w| w).count(), 39);
    }

    #[test]
    fn impossible_shapes_are_refused() {
        for spoil in [
            |s: &mut Shape| s.n_embd = 100,
            |s: &mut Shape| s.n_kv_heads = 5,
            |s: &mut Shape| s.n_experts_used = 33,
            |s: &mut Shape| s.rope.truncate(3),
            |s: &mut Shape| s.vocab = 100,
        ] {
            let mut shape = Shape::preset_4b();
            spoil(&mut shape);
            assert!(shape.validate().is_err());
        }
    }
}
