//! Shapes of synthetic models: the two published ones and anything else, and their `config.json`.

use std::ops::{Deref, DerefMut};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use st_format::{Gating, ModelShape};

/// The shape of a synthetic model, and what its configuration says besides.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// Written as `model_name` and `general.name`.
    pub name: String,
    /// The LM head is the embedding.
    pub tied: bool,
    /// Length of the sliding window, should a layer have one.
    pub window: usize,
    /// The numbers that make the model.
    pub model: ModelShape,
}

impl Shape {
    /// A tied model of this shape.
    pub fn of(name: &str, model: ModelShape) -> Self {
        Self { name: name.into(), tied: true, window: model.window().unwrap_or(4096), model }
    }

    /// The shape of SmallThinker-4BA0.6B.
    pub fn preset_4b() -> Self {
        Self::of("synthetic_4ba0.6b", ModelShape::published_4b())
    }

    /// The shape of SmallThinker-21BA3B.
    pub fn preset_21b() -> Self {
        Self { tied: false, ..Self::of("synthetic_21ba3b", ModelShape::published_21b()) }
    }

    /// One global NoPE layer, then `period - 1` rotary layers with a sliding window, and so on; 0 makes every layer
    /// rotary and global.
    pub fn set_period(&mut self, period: usize) {
        let local = |layer: usize| period == 0 || !layer.is_multiple_of(period);
        let slides = |layer: usize| (period != 0 && local(layer)).then_some(self.window);
        self.model.windows = (0..self.model.n_layers).map(slides).collect();
        self.model.rope_layers = (0..self.model.n_layers).map(local).collect();
    }

    /// Refuses shapes that make no model or leave no room for the generator's subspaces.
    ///
    /// # Errors
    /// Names the number that does not fit.
    pub fn validate(&self) -> Result<()> {
        let misfit =
            |misfit: st_format::Misfit| anyhow::anyhow!("{} {}: expected {}", misfit.key, misfit.got, misfit.expected);
        self.model.check().map_err(misfit)?;
        ensure!(
            self.n_embd >= 128 && self.n_embd.is_multiple_of(32),
            "hidden size {} must be a multiple of 32, at least 128",
            self.n_embd
        );
        ensure!(self.n_ff.is_multiple_of(32), "expert size {} must be a multiple of 32", self.n_ff);
        ensure!(self.head_dim.is_multiple_of(32), "head size {} must be a multiple of 32", self.head_dim);
        ensure!(self.n_vocab >= 300, "a vocabulary of {} has no room for bytes and special tokens", self.n_vocab);
        ensure!(self.window > 0, "the window must be positive");
        Ok(())
    }

    /// `config.json` with the published models' keys.
    pub fn config_json(&self, end_of_text: usize, turn_end: usize) -> Value {
        let bits = |layers: &mut dyn Iterator<Item = bool>| layers.map(u8::from).collect::<Vec<_>>();
        // The number that people write, not the nearest one of 32 bits in 64.
        let written = |x: f32| x.to_string().parse::<f64>().unwrap_or(x.into());
        json!({
            "architectures": ["SmallThinkerForCausalLM"],
            "model_type": "smallthinker",
            "model_name": self.name,
            "bos_token_id": end_of_text,
            "eos_token_id": [end_of_text, turn_end],
            "head_dim": self.head_dim,
            "hidden_size": self.n_embd,
            "max_position_embeddings": self.context_length,
            "moe_ffn_hidden_size": self.n_ff,
            "moe_num_active_primary_experts": self.n_experts_used,
            "moe_num_primary_experts": self.n_experts,
            "moe_primary_router_apply_softmax": self.gating == Gating::Softmax,
            "norm_topk_prob": true,
            "num_attention_heads": self.n_heads,
            "num_hidden_layers": self.n_layers,
            "num_key_value_heads": self.n_kv_heads,
            "rms_norm_eps": written(self.rms_eps),
            "rope_layout": bits(&mut self.rope_layers.iter().copied()),
            "rope_scaling": null,
            "rope_theta": written(self.rope_theta),
            "sliding_window_layout": bits(&mut self.windows.iter().map(Option::is_some)),
            "sliding_window_size": self.window,
            "tie_word_embeddings": self.tied,
            "tokenizer_class": "Qwen2Tokenizer",
            "torch_dtype": "bfloat16",
            "vocab_size": self.n_vocab,
        })
    }
}

impl Deref for Shape {
    type Target = ModelShape;

    fn deref(&self) -> &ModelShape {
        &self.model
    }
}

impl DerefMut for Shape {
    fn deref_mut(&mut self) -> &mut ModelShape {
        &mut self.model
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
        assert_eq!(large.rope_layers[..5], [false, true, true, true, false]);
        assert_eq!(large.windows.iter().flatten().count(), 39);
        let mut periodic = large.clone();
        periodic.set_period(4);
        assert_eq!(periodic, large);
        let config = large.config_json(1, 2);
        assert_eq!((&config["rms_norm_eps"], &config["rope_theta"]), (&json!(1e-6), &json!(1.5e6)));
    }

    #[test]
    fn impossible_shapes_are_refused() {
        for spoil in [
            |s: &mut Shape| s.n_embd = 100,
            |s: &mut Shape| s.n_kv_heads = 5,
            |s: &mut Shape| s.n_experts_used = 33,
            |s: &mut Shape| s.rope_layers.truncate(3),
            |s: &mut Shape| s.n_vocab = 100,
        ] {
            let mut shape = Shape::preset_4b();
            spoil(&mut shape);
            assert!(shape.validate().is_err());
        }
    }
}
