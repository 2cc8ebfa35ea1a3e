//! The model's shape, as `config.json` or a GGUF header states it, checked against itself.
//!
//! Owns which values are required, which have a default, and which are refused because running them as SmallThinker
//! would silently give wrong numbers. Whether the tensors agree is the business of the input that holds them.

use std::path::Path;

use serde_json::Value;
use st_format::{Gating, Misfit, ModelShape, RopeScaling, largest};

use crate::error::ConvertError;

/// A checkpoint's configuration: the model's shape, and what only `config.json` says.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Shape and constants.
    pub shape: ModelShape,
    /// Name for `general.name`, where the configuration gives one.
    pub name: Option<String>,
    /// Whether the LM head is the embedding; `None` where the configuration is silent and the tensors decide.
    pub tied: Option<bool>,
}

/// The keys of `config.json` that are read here.
pub(crate) const CONFIG_KEYS: [&str; 28] = [
    "architectures",
    "compression_config",
    "head_dim",
    "hidden_size",
    "max_position_embeddings",
    "model_name",
    "model_type",
    "moe_enable_early_router",
    "moe_enable_secondary_experts",
    "moe_ffn_hidden_size",
    "moe_layer_layout",
    "moe_num_active_primary_experts",
    "moe_num_primary_experts",
    "moe_primary_router_apply_softmax",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "partial_rotary_factor",
    "quantization_config",
    "rms_norm_eps",
    "rope_layout",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window_layout",
    "sliding_window_size",
    "tie_word_embeddings",
    "vocab_size",
];

impl ModelConfig {
    /// Reads a parsed `config.json`; `path` is for messages.
    ///
    /// # Errors
    /// [`ConvertError::Architecture`] for another model; [`ConvertError::Config`] for a missing, mistyped or
    /// impossible value.
    pub fn from_json(json: &Value, path: &Path) -> Result<Self, ConvertError> {
        let keys = Keys { json, path };
        keys.check_architecture()?;
        keys.refuse_unknown_variants()?;

        let n_layers = keys.size("num_hidden_layers")?;
        let n_embd = keys.size("hidden_size")?;
        let n_heads = keys.size("num_attention_heads")?;
        let n_kv_heads = keys.optional_size("num_key_value_heads")?.unwrap_or(n_heads);
        let head_dim = match keys.optional_size("head_dim")? {
            Some(dim) => dim,
            None if n_embd % n_heads == 0 => n_embd / n_heads,
            None => {
                return Err(keys.bad("head_dim", "nothing", "a number, as hidden_size is no multiple of the heads"));
            }
        };
        let window_layers = keys.layout("sliding_window_layout", n_layers)?.unwrap_or_else(|| vec![false; n_layers]);
        let window = if window_layers.contains(&true) { Some(keys.size("sliding_window_size")?) } else { None };
        let shape = ModelShape {
            n_layers,
            n_embd,
            n_heads,
            n_kv_heads,
            head_dim,
            n_experts: keys.size("moe_num_primary_experts")?,
            n_experts_used: keys.size("moe_num_active_primary_experts")?,
            n_ff: keys.size("moe_ffn_hidden_size")?,
            n_vocab: keys.size("vocab_size")?,
            context_length: keys.size("max_position_embeddings")?,
            rms_eps: keys.positive("rms_norm_eps")?,
            rope_theta: keys.rope_theta()?,
            rope_layers: keys
                .layout("rope_layout", n_layers)?
                .ok_or_else(|| keys.bad("rope_layout", "nothing", "a list of one 0 or 1 per layer"))?,
            windows: window_layers.into_iter().map(|slides| if slides { window } else { None }).collect(),
            gating: match keys.flag("moe_primary_router_apply_softmax")? {
                Some(true) => Gating::Softmax,
                None | Some(false) => Gating::Sigmoid,
            },
        };
        shape.check().map_err(|Misfit { key, expected, got }| keys.bad(json_key(key), got, expected))?;
        Ok(Self {
            shape,
            name: keys.get("model_name").and_then(Value::as_str).map(str::to_owned),
            tied: keys.flag("tie_word_embeddings")?,
        })
    }
}

/// Numbers of the shape: what GGUF files keep them under, and what `config.json` calls them.
const NUMBERS: [(&str, &str); 15] = [
    ("block_count", "num_hidden_layers"),
    ("embedding_length", "hidden_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.key_length", "head_dim"),
    ("expert_count", "moe_num_primary_experts"),
    ("expert_used_count", "moe_num_active_primary_experts"),
    ("expert_feed_forward_length", "moe_ffn_hidden_size"),
    ("context_length", "max_position_embeddings"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("rope.freq_base", "rope_theta"),
    ("rope.layer_pattern", "rope_layout"),
    ("attention.sliding_window", "sliding_window_size"),
    ("attention.sliding_window_pattern", "sliding_window_layout"),
    ("vocab_size", "vocab_size"),
];

/// What `config.json` calls a number of the shape that GGUF files keep under `key`.
fn json_key(key: &'static str) -> &'static str {
    NUMBERS.iter().find(|(gguf, _)| *gguf == key).map_or(key, |(_, json)| json)
}

/// The largest value of a number of the shape that `config.json` calls `key`.
fn largest_of(key: &str) -> u64 {
    let gguf = NUMBERS.iter().find(|(_, json)| *json == key);
    gguf.and_then(|(gguf, _)| largest(gguf)).unwrap_or(1 << 20) as u64
}

/// Typed access to `config.json`, with errors that name file, key, got and expected.
struct Keys<'a> {
    json: &'a Value,
    path: &'a Path,
}

impl<'a> Keys<'a> {
    /// The value of a key; JSON null counts as absent.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    fn bad(&self, key: &str, got: impl ToString, expected: impl Into<String>) -> ConvertError {
        let mut got = got.to_string();
        if got.len() > 80 {
            got = got.chars().take(80).chain("…".chars()).collect();
        }
        ConvertError::Config { path: self.path.into(), key: key.into(), got, expected: expected.into() }
    }

    fn check_architecture(&self) -> Result<(), ConvertError> {
        let architectures = self.get("architectures").and_then(Value::as_array);
        let named = architectures.is_some_and(|list| list.iter().any(|name| name == "SmallThinkerForCausalLM"));
        let typed = architectures.is_none() && self.get("model_type").is_some_and(|name| name == "smallthinker");
        if named || typed {
            return Ok(());
        }
        let got = self.get("architectures").or_else(|| self.get("model_type"));
        Err(ConvertError::Architecture {
            path: self.path.into(),
            got: got.map_or_else(|| "a config.json without architectures".into(), Value::to_string),
        })
    }

    /// Members of the family that this project does not implement must not be converted as if they were ordinary.
    fn refuse_unknown_variants(&self) -> Result<(), ConvertError> {
        let quantized = ["quantization_config", "compression_config"].into_iter().filter_map(|key| self.get(key));
        if let Some(method) = quantized.filter_map(quantization).next() {
            return Err(ConvertError::Quantized { path: self.path.into(), method });
        }
        if let Some(part) = self.get("partial_rotary_factor").filter(|part| part.as_f64() != Some(1.0)) {
            return Err(self.bad("partial_rotary_factor", part, "1 (all of a head is rotated)"));
        }
        if self.flag("moe_enable_secondary_experts")? == Some(true) {
            return Err(self.bad("moe_enable_secondary_experts", true, "false (only primary experts are supported)"));
        }
        if self.flag("moe_enable_early_router")? == Some(false) {
            return Err(self.bad("moe_enable_early_router", false, "true (the router reads the layer's input)"));
        }
        if let Some(Value::Array(layout)) = self.get("moe_layer_layout")
            && layout.iter().any(|layer| layer != 1)
        {
            return Err(self.bad("moe_layer_layout", "a layer without experts", "1 for every layer"));
        }
        Ok(())
    }

    /// The base of the rotary frequencies, from its own key or, as transformers 5 writes it, from `rope_parameters`.
    /// What else these say of rotary positions has to be nothing.
    fn rope_theta(&self) -> Result<f32, ConvertError> {
        let mut theta = self.get("rope_theta").map(|value| self.positive_value("rope_theta", value)).transpose()?;
        for key in ["rope_scaling", "rope_parameters"] {
            let Some(value) = self.get(key) else { continue };
            let object = value.as_object().ok_or_else(|| self.bad(key, value, "an object"))?;
            // The parameters may be given for each kind of layer.
            let nested =
                ["full_attention", "sliding_attention"].into_iter().filter_map(|kind| object.get(kind)?.as_object());
            for parameters in std::iter::once(object).chain(nested) {
                let get = |name: &str| parameters.get(name).filter(|value| !value.is_null());
                let kind =
                    get("rope_type").or_else(|| get("type")).map(|kind| kind.as_str().unwrap_or("of no known type"));
                let number = |name| get(name).map(|factor| factor.as_f64().unwrap_or(f64::NAN));
                let (factor, attention_factor) = (number("factor"), number("attention_factor"));
                if !(RopeScaling { kind, factor, attention_factor }).is_plain() {
                    return Err(self.bad(key, value, "none (scaled rotary positions are not computed)"));
                }
                if get("partial_rotary_factor").is_some_and(|part| part.as_f64() != Some(1.0)) {
                    return Err(self.bad(key, value, "a partial_rotary_factor of 1 (all of a head is rotated)"));
                }
                let Some(base) = get("rope_theta") else { continue };
                let base = self.positive_value(&format!("{key}.rope_theta"), base)?;
                if theta.is_some_and(|theta| theta != base) {
                    let expected = format!("the base {}, which is stated beside it", theta.unwrap_or_default());
                    return Err(self.bad(&format!("{key}.rope_theta"), base, expected));
                }
                theta = Some(base);
            }
        }
        theta.ok_or_else(|| self.bad("rope_theta", "nothing", "a positive number"))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, ConvertError> {
        let max = largest_of(key);
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if n >= 1 && n <= max => Ok(Some(n as usize)),
            _ => Err(self.bad(key, value, format!("a whole number from 1 to {max}"))),
        }
    }

    fn size(&self, key: &str) -> Result<usize, ConvertError> {
        self.optional_size(key)?.ok_or_else(|| self.bad(key, "nothing", "a whole number"))
    }

    fn positive(&self, key: &str) -> Result<f32, ConvertError> {
        let value = self.get(key).ok_or_else(|| self.bad(key, "nothing", "a positive number"))?;
        self.positive_value(key, value)
    }

    fn positive_value(&self, key: &str, value: &Value) -> Result<f32, ConvertError> {
        match value.as_f64().map(|x| x as f32) {
            Some(x) if x > 0.0 && x.is_finite() => Ok(x),
            _ => Err(self.bad(key, value, "a positive number")),
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, ConvertError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.bad(key, other, "true or false")),
        }
    }

    fn layout(&self, key: &str, n_layers: usize) -> Result<Option<Vec<bool>>, ConvertError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let list = value.as_array().ok_or_else(|| self.bad(key, value, "a list of one 0 or 1 per layer"))?;
        if list.len() != n_layers {
            return Err(self.bad(key, format!("{} entries", list.len()), format!("one for each of {n_layers} layers")));
        }
        let flags = list.iter().map(|entry| match entry.as_u64() {
            Some(0) => Ok(false),
            Some(1) => Ok(true),
            _ => Err(self.bad(key, entry, "only 0 and 1")),
        });
        flags.collect::<Result<_, _>>().map(Some)
    }
}

/// By what method a `quantization_config` says that the weights are quantized.
fn quantization(config: &Value) -> Option<String> {
    let flag = |name: &str| config.get(name) == Some(&Value::Bool(true));
    match config.get("quant_method") {
        Some(Value::String(method)) => Some(method.clone()),
        _ if flag("load_in_4bit") || flag("load_in_8bit") => Some("bitsandbytes".into()),
        _ if config.as_object().is_some_and(|config| !config.is_empty() && !config.contains_key("load_in_4bit")) => {
            Some("by a method without a name".into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn minimal() -> Value {
        json!({
            "architectures": ["SmallThinkerForCausalLM"], "num_hidden_layers": 4, "hidden_size": 64,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "moe_num_primary_experts": 8,
            "moe_num_active_primary_experts": 2, "moe_ffn_hidden_size": 32, "vocab_size": 100,
            "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 1.5e6, "rope_layout": [0, 1, 1, 1],
            "sliding_window_layout": [0, 1, 1, 1], "sliding_window_size": 4096, "tie_word_embeddings": true,
        })
    }

    fn parse(json: &Value) -> Result<ModelConfig, ConvertError> {
        ModelConfig::from_json(json, Path::new("config.json"))
    }

    #[test]
    fn reads_the_published_form() {
        let config = parse(&minimal()).unwrap();
        assert_eq!(config.shape.window(), Some(4096));
        assert_eq!(config.shape.rope_layers, [false, true, true, true]);
        assert_eq!(config.shape.gating, Gating::Sigmoid);
        assert_eq!(config.tied, Some(true));
        assert!(config.shape.llama_cpp_differences().is_empty());
    }

    #[test]
    fn refuses_values_that_make_no_model() {
        let cases = [
            ("num_hidden_layers", json!(5), "one for each of 5 layers"),
            ("num_hidden_layers", json!(1e12), "num_hidden_layers"),
            ("hidden_size", json!(-1), "hidden_size"),
            ("hidden_size", json!("64"), "hidden_size"),
            ("num_key_value_heads", json!(3), "divisor"),
            ("head_dim", json!(15), "even"),
            ("moe_num_active_primary_experts", json!(9), "at most 8"),
            ("rope_layout", json!([0, 1, 2, 1]), "only 0 and 1"),
            ("rope_layout", json!(null), "rope_layout"),
            ("sliding_window_size", json!(0), "sliding_window_size"),
            ("rms_norm_eps", json!(0), "positive"),
            ("rope_scaling", json!({"type": "yarn"}), "rope_scaling"),
            ("moe_layer_layout", json!([1, 1, 0, 1]), "moe_layer_layout"),
            ("moe_enable_secondary_experts", json!(true), "primary"),
            ("architectures", json!(["LlamaForCausalLM"]), "LlamaForCausalLM"),
        ];
        for (key, value, expected) in cases {
            let mut json = minimal();
            json[key] = value;
            let message = parse(&json).unwrap_err().to_string();
            assert!(message.contains(expected), "{key}: {message}");
        }
    }

    #[test]
    fn warns_of_layouts_that_llama_cpp_reads_otherwise() {
        let with = |edits: &[(&str, Value)]| {
            let mut json = minimal();
            for (key, value) in edits {
                json[*key] = value.clone();
            }
            parse(&json).unwrap().shape.llama_cpp_differences()
        };
        assert!(with(&[("sliding_window_size", json!(64))])[0].contains("64"));
        assert_eq!(with(&[("rope_layout", json!([1, 1, 1, 1]))]).len(), 1);
        assert_eq!(with(&[("sliding_window_layout", json!([1, 1, 1, 1]))]).len(), 1);
        assert_eq!(with(&[("sliding_window_layout", json!([0, 0, 0, 0]))]).len(), 1);
        let everywhere = [("sliding_window_layout", json!([0, 0, 0, 0])), ("rope_layout", json!([1, 1, 1, 1]))];
        assert!(with(&everywhere).is_empty());
    }
}
