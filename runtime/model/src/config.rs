//! The model's shape, read from GGUF metadata once and checked against itself.
//!
//! Owns every number that the metadata states; nothing about the published models is assumed. Refuses values that
//! make no model, with the key, what was found and what was expected.

use st_gguf::Metadata;

use crate::error::ModelError;

/// How router logits of the chosen experts become weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gating {
    /// `softmax` over the chosen logits (`expert_gating_func` 1).
    Softmax,
    /// `sigmoid` of each, divided by their sum (`expert_gating_func` 2).
    Sigmoid,
}

/// Shape and constants of one SmallThinker model.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Decoder layers.
    pub n_layers: usize,
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
    /// Per layer: the attention window in positions, the token itself included; `None` attends to all.
    pub windows: Vec<Option<usize>>,
}

/// Longest period of NoPE layers in files that state no layout of their own: llama.cpp's rule for this architecture.
const NOPE_PERIOD: usize = 4;

impl ModelConfig {
    /// Reads the configuration from the metadata of a GGUF file.
    ///
    /// # Errors
    /// [`ModelError::Architecture`] for another model, [`ModelError::MissingKey`] and [`ModelError::BadKey`] for
    /// metadata that describes no model.
    pub fn from_metadata(metadata: &Metadata) -> Result<Self, ModelError> {
        let architecture = metadata
            .str("general.architecture")?
            .ok_or_else(|| ModelError::MissingKey { key: "general.architecture".into() })?;
        if architecture != "smallthinker" {
            return Err(ModelError::Architecture { got: architecture.to_owned() });
        }
        let keys = Keys(metadata);
        let n_layers = keys.size("block_count", 1 << 12)?;
        let n_embd = keys.size("embedding_length", 1 << 20)?;
        let n_heads = keys.size("attention.head_count", 1 << 12)?;
        let n_kv_heads = match keys.optional_size("attention.head_count_kv", 1 << 12)? {
            Some(n) => n,
            None => n_heads,
        };
        let head_dim = match keys.optional_size("attention.key_length", 1 << 12)? {
            Some(n) => n,
            None => n_embd / n_heads,
        };
        let value_dim = keys.optional_size("attention.value_length", 1 << 12)?.unwrap_or(head_dim);
        let n_experts = keys.size("expert_count", 1 << 16)?;
        let n_experts_used = keys.size("expert_used_count", 1 << 10)?;
        let n_ff = match keys.optional_size("expert_feed_forward_length", 1 << 20)? {
            Some(n) => n,
            None => keys.size("feed_forward_length", 1 << 20)?,
        };
        let rope_dim = keys.optional_size("rope.dimension_count", 1 << 12)?.unwrap_or(head_dim);

        if n_heads % n_kv_heads != 0 {
            return Err(keys.bad("attention.head_count_kv", n_kv_heads, format!("a divisor of {n_heads} query heads")));
        }
        if head_dim % 2 != 0 || head_dim == 0 {
            return Err(keys.bad("attention.key_length", head_dim, "an even number"));
        }
        if value_dim != head_dim {
            return Err(keys.bad("attention.value_length", value_dim, format!("the key length {head_dim}")));
        }
        if rope_dim != head_dim {
            return Err(keys.bad("rope.dimension_count", rope_dim, format!("the key length {head_dim}")));
        }
        if n_experts_used > n_experts {
            return Err(keys.bad("expert_used_count", n_experts_used, format!("at most {n_experts} experts")));
        }
        let gating = match keys.optional_size("expert_gating_func", u32::MAX as usize)? {
            None | Some(2) => Gating::Sigmoid,
            Some(1) => Gating::Softmax,
            Some(other) => return Err(keys.bad("expert_gating_func", other, "1 (softmax) or 2 (sigmoid)")),
        };
        let rms_eps = keys.positive("attention.layer_norm_rms_epsilon")?;
        let rope_theta = keys.positive("rope.freq_base")?;
        let windows = keys.windows(n_layers)?;
        let rope_layers = keys.rope_layers(n_layers, windows.iter().any(Option::is_some))?;
        Ok(Self {
            n_embd,
            n_layers,
            n_heads,
            n_kv_heads,
            head_dim,
            n_experts,
            n_experts_used,
            n_ff,
            context_length: keys.size("context_length", 1 << 30)?,
            rms_eps,
            rope_theta,
            gating,
            rope_layers,
            windows,
        })
    }

    /// Width of all query heads together.
    pub fn q_dim(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_dim(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }
}

/// Typed access to the `smallthinker.*` keys, with the errors of this crate.
struct Keys<'a>(&'a Metadata);

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("smallthinker.{name}")
    }

    fn bad(&self, name: &str, got: impl ToString, expected: impl Into<String>) -> ModelError {
        ModelError::BadKey { key: self.key(name), got: got.to_string(), expected: expected.into() }
    }

    fn optional_size(&self, name: &str, max: usize) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.0.u64(&self.key(name))? else { return Ok(None) };
        match usize::try_from(value) {
            Ok(n) if n >= 1 && n <= max => Ok(Some(n)),
            _ => Err(self.bad(name, value, format!("a number from 1 to {max}"))),
        }
    }

    fn size(&self, name: &str, max: usize) -> Result<usize, ModelError> {
        self.optional_size(name, max)?.ok_or_else(|| ModelError::MissingKey { key: self.key(name) })
    }

    fn positive(&self, name: &str) -> Result<f32, ModelError> {
        let value = self.0.f32(&self.key(name))?.ok_or_else(|| ModelError::MissingKey { key: self.key(name) })?;
        if value > 0.0 && value.is_finite() { Ok(value) } else { Err(self.bad(name, value, "a positive number")) }
    }

    fn flags(&self, name: &str, n_layers: usize) -> Result<Option<Vec<bool>>, ModelError> {
        let Some(flags) = self.0.bools(&self.key(name))? else { return Ok(None) };
        if flags.len() != n_layers {
            return Err(self.bad(
                name,
                format!("{} entries", flags.len()),
                format!("one for each of {n_layers} layers"),
            ));
        }
        Ok(Some(flags.to_vec()))
    }

    fn windows(&self, n_layers: usize) -> Result<Vec<Option<usize>>, ModelError> {
        let Some(window) = self.0.u64(&self.key("attention.sliding_window"))?.filter(|&w| w > 0) else {
            return Ok(vec![None; n_layers]);
        };
        let window = usize::try_from(window)
            .map_err(|_| self.bad("attention.sliding_window", window, "a number of positions"))?;
        let slides = self
            .flags("attention.sliding_window_pattern", n_layers)?
            .unwrap_or_else(|| (0..n_layers).map(|layer| layer % NOPE_PERIOD != 0).collect());
        Ok(slides.into_iter().map(|slides| slides.then_some(window)).collect())
    }

    /// The layout that st-tool's converter states; else llama.cpp's rule: with a window present, every fourth layer
    /// from the first has no positions.
    fn rope_layers(&self, n_layers: usize, any_window: bool) -> Result<Vec<bool>, ModelError> {
        Ok(self
            .flags("rope.layer_pattern", n_layers)?
            .unwrap_or_else(|| (0..n_layers).map(|layer| !any_window || layer % NOPE_PERIOD != 0).collect()))
    }
}
