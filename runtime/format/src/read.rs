//! A file's metadata and list of tensors become a [`ModelShape`], or the reason why they do not; and back.
//!
//! Owns every `smallthinker.*` key. What a file asks for and this program does not compute is refused by name, since
//! ignoring it would silently give wrong numbers: scaled positions, scaled or capped scores, tensors that have no
//! place. What says nothing about the computation is left to [`ModelShape::ignored`].

use crate::settings::{COMPUTED_ELSEWHERE, Neutral, READ, SCALING, SETTINGS};
use crate::shape::{MAX_WINDOW, Misfit, largest};
use crate::tensor::{Scope, Tensor, tensor_names};
use crate::{Array, FormatError, Gating, ModelShape, RopeScaling, Value};

/// The architecture's name, in `general.architecture` and before each of its keys.
pub const ARCHITECTURE: &str = "smallthinker";

/// With a window present, llama.cpp leaves rotary positions out of every fourth layer, from the first, and the window
/// out of the same where the file states no period.
const PERIOD: usize = 4;

/// What a file says about itself: keys with values, and tensors with shapes.
pub trait Described {
    /// The value of a metadata key.
    fn value(&self, key: &str) -> Option<&Value>;
    /// All metadata keys.
    fn keys(&self) -> Box<dyn Iterator<Item = &str> + '_>;
    /// The shape of a tensor in ggml order, fastest dimension first.
    fn tensor_shape(&self, name: &str) -> Option<&[u64]>;
    /// The names of all tensors.
    fn tensor_names(&self) -> Box<dyn Iterator<Item = &str> + '_>;
}

impl ModelShape {
    /// The shape of the model in a file, of which every tensor that is no expert's is there and has its shape, and no
    /// key or tensor asks for more than is computed. Where experts lie is the expert index's to find out.
    ///
    /// # Errors
    /// Every [`FormatError`].
    pub fn from_metadata(file: &dyn Described) -> Result<Self, FormatError> {
        let keys = Keys(file);
        match keys.text("general.architecture")? {
            Some(ARCHITECTURE) => {}
            Some(other) => return Err(FormatError::Architecture { got: other.to_owned() }),
            None => return Err(FormatError::MissingKey { key: "general.architecture".into() }),
        }
        let n_layers = keys.size("block_count")?;
        let n_embd = keys.size("embedding_length")?;
        let n_heads = keys.size("attention.head_count")?;
        let n_ff = match keys.optional_size("expert_feed_forward_length")? {
            Some(n_ff) => n_ff,
            None => keys.size_or("feed_forward_length", "expert_feed_forward_length")?,
        };
        let embedding = Tensor::TokenEmbd.name(0);
        let rows = file.tensor_shape(&embedding).ok_or(FormatError::MissingTensor { name: embedding })?.get(1);
        let stated_window = keys.window()?;
        let shape = Self {
            n_layers,
            n_embd,
            n_heads,
            n_kv_heads: keys.optional_size("attention.head_count_kv")?.unwrap_or(n_heads),
            head_dim: match keys.optional_size("attention.key_length")? {
                Some(dim) => dim,
                None => n_embd / n_heads,
            },
            n_experts: keys.size("expert_count")?,
            n_experts_used: keys.size("expert_used_count")?,
            n_ff,
            n_vocab: rows.and_then(|&rows| usize::try_from(rows).ok()).unwrap_or(1),
            context_length: keys.size("context_length")?,
            rms_eps: keys.float("attention.layer_norm_rms_epsilon")?,
            rope_theta: keys.float("rope.freq_base")?,
            gating: match keys.integer("expert_gating_func")? {
                Some(1) => Gating::Softmax,
                None | Some(2) => Gating::Sigmoid,
                Some(other) => return Err(bad("expert_gating_func", "1 (softmax) or 2 (sigmoid)", other)),
            },
            rope_layers: keys.flags("rope.layer_pattern", n_layers)?.unwrap_or_else(|| {
                (0..n_layers).map(|layer| stated_window.is_none() || !layer.is_multiple_of(PERIOD)).collect()
            }),
            windows: keys.windows(stated_window, n_layers)?,
        };
        shape.check().map_err(|Misfit { key, expected, got }| bad(key, expected, got))?;
        keys.check_settings(&shape)?;
        shape.check_tensors(file)?;
        Ok(shape)
    }

    /// The keys that state this shape, in the order in which they are written; those of llama.cpp, and
    /// `rope.layer_pattern`, which llama.cpp has no key for.
    pub fn to_metadata(&self) -> Vec<(String, Value)> {
        // Every one of these is capped far below 2^32.
        let n = |value: usize| Value::U32(value as u32);
        let mut keys = vec![
            ("block_count", n(self.n_layers)),
            ("context_length", n(self.context_length)),
            ("embedding_length", n(self.n_embd)),
            ("feed_forward_length", n(self.n_ff)),
            ("expert_feed_forward_length", n(self.n_ff)),
            ("expert_count", n(self.n_experts)),
            ("expert_used_count", n(self.n_experts_used)),
            ("expert_gating_func", Value::U32(if self.gating == Gating::Softmax { 1 } else { 2 })),
            ("vocab_size", n(self.n_vocab)),
            ("attention.head_count", n(self.n_heads)),
            ("attention.head_count_kv", n(self.n_kv_heads)),
            ("attention.key_length", n(self.head_dim)),
            ("attention.value_length", n(self.head_dim)),
            ("attention.layer_norm_rms_epsilon", Value::F32(self.rms_eps)),
            ("rope.freq_base", Value::F32(self.rope_theta)),
            ("rope.dimension_count", n(self.head_dim)),
            ("rope.layer_pattern", self.rope_layers.clone().into()),
        ];
        if let Some(window) = self.window() {
            let pattern: Vec<bool> = self.windows.iter().map(Option::is_some).collect();
            keys.push(("attention.sliding_window", n(window)));
            keys.push(("attention.sliding_window_pattern", pattern.into()));
        }
        keys.into_iter().map(|(key, value)| (full(key), value)).collect()
    }

    /// What [`from_metadata`](Self::from_metadata) leaves out of account in a file that it accepts, one sentence each.
    pub fn ignored(&self, file: &dyn Described) -> Vec<String> {
        let known = |key: &str| {
            READ.contains(&key) || key.starts_with(SCALING) || SETTINGS.iter().any(|(other, _)| *other == key)
        };
        let prefix = full("");
        let no_token = |key: &str| {
            key.starts_with("tokenizer.ggml.") && key.ends_with("_token_id") && file.value(key).is_some_and(is_no_token)
        };
        let keys = file.keys().filter(|key| key.strip_prefix(&prefix).is_some_and(|key| !known(key)) || no_token(key));
        let tensors = file.tensor_names().filter(|name| !name.starts_with("blk.") && !is_model_tensor(name));
        let no_text = file.keys().filter(|key| file.value(key).is_some_and(Value::has_octets));
        let was_ignored = ("of those that no SmallThinker model needs", "was ignored");
        [
            ("metadata key", keys.collect::<Vec<_>>(), was_ignored),
            ("tensor", tensors.collect(), was_ignored),
            ("metadata key", no_text.collect(), ("like it", "is not UTF-8 text, and is kept as it is")),
        ]
        .into_iter()
        .filter_map(|(what, names, (of_which, says))| {
            let (first, others) = names.split_first()?;
            let and_others = match others.len() {
                0 => String::new(),
                n => format!(" and {n} more {of_which}"),
            };
            Some(format!("{what} `{first}`{and_others} {says}"))
        })
        .collect()
    }

    /// What llama.cpp would read otherwise than this shape says, one sentence each.
    pub fn llama_cpp_differences(&self) -> Vec<String> {
        /// The window that llama.cpp always uses for this architecture.
        const WINDOW: usize = 4096;
        let mut differences = Vec::new();
        let window = self.window();
        let standard = |layer: usize| window.is_none() || !layer.is_multiple_of(PERIOD);
        if let Some(window) = window {
            if window != WINDOW {
                differences.push(format!(
                    "llama.cpp fixes the sliding window at {WINDOW} positions and would ignore this model's {window}"
                ));
            }
            if !self.windows.iter().enumerate().all(|(layer, window)| window.is_some() == standard(layer)) {
                differences.push(
                    "llama.cpp would put the sliding window on every layer but each fourth, unlike this model's layout"
                        .into(),
                );
            }
        }
        if !self.rope_layers.iter().enumerate().all(|(layer, &rope)| rope == standard(layer)) {
            let rule = if window.is_some() { "on every layer but each fourth" } else { "on every layer" };
            differences.push(format!("llama.cpp would use rotary positions {rule}, unlike this model's layout"));
        }
        differences
    }

    /// Proves that the tensors of `file` are those of this shape, its experts apart.
    fn check_tensors(&self, file: &dyn Described) -> Result<(), FormatError> {
        // First what has no place: a fused matrix explains better than the one that is missing for it.
        for name in file.tensor_names() {
            self.check_place(file, name)?;
        }
        for tensor in Tensor::ALL {
            let layers = match tensor.scope() {
                Scope::Model => 1,
                Scope::Layer => self.n_layers,
                Scope::Expert => 0,
            };
            let expected = tensor.ggml_shape(self);
            for name in (0..layers).map(|layer| tensor.name(layer)) {
                if file.tensor_shape(&name).is_none() && self.is_fused(file, &name)? {
                    continue;
                }
                match file.tensor_shape(&name) {
                    Some(got) if same_shape(got, &expected) => {}
                    Some(got) => return Err(FormatError::TensorShape { name, expected, got: got.to_vec() }),
                    None if tensor == Tensor::Output => {}
                    None => return Err(FormatError::MissingTensor { name }),
                }
            }
        }
        Ok(())
    }

    /// Whether a matrix that is missing is part of a fused one, which is as large as it has to be.
    fn is_fused(&self, file: &dyn Described, name: &str) -> Result<bool, FormatError> {
        let Some((name, _)) = tensor_names::fused(name, self) else { return Ok(false) };
        let Some(got) = file.tensor_shape(&name) else { return Ok(false) };
        let expected = [self.n_embd, self.q_dim() + 2 * self.kv_dim()].map(|n| n as u64).to_vec();
        match same_shape(got, &expected) {
            true => Ok(true),
            false => Err(FormatError::TensorShape { name, expected, got: got.to_vec() }),
        }
    }

    /// Refuses a tensor that has no place in the computation.
    fn check_place(&self, file: &dyn Described, name: &str) -> Result<(), FormatError> {
        let refuse = |why: String| Err(FormatError::TensorNotComputed { name: name.to_owned(), why });
        if let Some(rest) = name.strip_prefix("blk.") {
            let (layer, part) = rest.split_once('.').unwrap_or((rest, ""));
            let Ok(layer) = layer.parse::<usize>() else { return refuse("it names no layer".into()) };
            if layer >= self.n_layers {
                return refuse(format!("it has {} layers, 0 to {}", self.n_layers, self.n_layers - 1));
            }
            // Beside a fused matrix its parts have no place.
            let apart = [Tensor::AttnQ, Tensor::AttnK, Tensor::AttnV].map(|tensor| tensor.name(layer));
            if part == tensor_names::FUSED && apart.iter().any(|name| file.tensor_shape(name).is_some()) {
                return refuse("its layer has queries, keys and values apart, too".into());
            }
            let known = part == tensor_names::PACKED
                || part == tensor_names::FUSED
                || Tensor::ALL.iter().any(|tensor| {
                    tensor.scope() != Scope::Model && part.strip_suffix(".weight") == Some(tensor.part())
                });
            return if known { Ok(()) } else { refuse(format!("its layers have no `{part}`")) };
        }
        let stem = name.split('.').next().unwrap_or(name);
        if !is_model_tensor(name) && COMPUTED_ELSEWHERE.contains(&stem) {
            return refuse("no SmallThinker model computes with it".into());
        }
        Ok(())
    }
}

/// Whether two shapes are the same but for trailing dimensions of one, in which writers differ.
pub fn same_shape(a: &[u64], b: &[u64]) -> bool {
    let significant = |shape: &[u64]| shape.len() - shape.iter().rev().take_while(|&&n| n == 1).count();
    a[..significant(a)] == b[..significant(b)]
}

/// Whether a tensor of this shape holds the down matrices of all experts transposed, as files for PowerInfer have them: a row for each
/// neuron. Where there are as many neurons as values of the hidden state nobody can tell.
pub fn is_transposed_down(got: &[u64], shape: &ModelShape) -> bool {
    shape.n_ff != shape.n_embd && same_shape(got, &Tensor::FfnUpExps.ggml_shape(shape))
}

/// Whether a token id is -1, as a signed or an unsigned number: how writers say that there is no such token.
pub fn is_no_token(id: &Value) -> bool {
    matches!(id.as_integer(), Some(-1)) || *id == Value::U32(u32::MAX)
}

fn is_model_tensor(name: &str) -> bool {
    Tensor::ALL.iter().any(|tensor| tensor.scope() == Scope::Model && tensor.name(0) == name)
}

fn full(key: &str) -> String {
    format!("{ARCHITECTURE}.{key}")
}

fn bad(key: &str, expected: impl Into<String>, got: impl ToString) -> FormatError {
    FormatError::BadKey { key: full(key), expected: expected.into(), got: got.to_string() }
}

/// Typed access to the keys of a file.
struct Keys<'a>(&'a dyn Described);

impl<'a> Keys<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.value(&full(key))
    }

    fn missing(&self, key: &str) -> FormatError {
        FormatError::MissingKey { key: full(key) }
    }

    /// A text under its whole key.
    fn text(&self, key: &str) -> Result<Option<&'a str>, FormatError> {
        let Some(value) = self.0.value(key) else { return Ok(None) };
        let wrong = || FormatError::BadKey { key: key.into(), expected: "a string".into(), got: value.type_name() };
        value.as_str().map(Some).ok_or_else(wrong)
    }

    /// An integer; a list of the same one for each layer counts.
    fn integer(&self, key: &str) -> Result<Option<i128>, FormatError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let uniform = |array: &Array| {
            let first = array.integer(0)?;
            (1..array.len()).all(|i| array.integer(i) == Some(first)).then_some(first)
        };
        let integer = match value {
            Value::Array(array) => uniform(array),
            scalar => scalar.as_integer(),
        };
        integer.map(Some).ok_or_else(|| bad(key, "a whole number, the same for all layers", value.type_name()))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, FormatError> {
        let max = largest(key).unwrap_or(1 << 20);
        let Some(value) = self.integer(key)? else { return Ok(None) };
        match usize::try_from(value) {
            Ok(n) if n >= 1 && n <= max => Ok(Some(n)),
            _ => Err(bad(key, format!("a whole number from 1 to {max}"), value)),
        }
    }

    fn size(&self, key: &str) -> Result<usize, FormatError> {
        self.size_or(key, key)
    }

    /// The size under `key`; `wanted` is the key that is missing where there is none.
    fn size_or(&self, key: &str, wanted: &str) -> Result<usize, FormatError> {
        self.optional_size(key)?.ok_or_else(|| self.missing(wanted))
    }

    fn optional_float(&self, key: &str) -> Result<Option<f32>, FormatError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f32().map(Some).ok_or_else(|| bad(key, "f32", value.type_name()))
    }

    fn float(&self, key: &str) -> Result<f32, FormatError> {
        self.optional_float(key)?.ok_or_else(|| self.missing(key))
    }

    /// One truth value for each layer, as such or as 0 and 1.
    fn flags(&self, key: &str, n_layers: usize) -> Result<Option<Vec<bool>>, FormatError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let Value::Array(array) = value else { return Err(bad(key, "array of bool", value.type_name())) };
        if array.len() != n_layers {
            let expected = format!("one for each of {n_layers} layers");
            return Err(bad(key, expected, format!("{} entries", array.len())));
        }
        if let Array::Bool(flags) = array {
            return Ok(Some(flags.clone()));
        }
        let flag = |i| match array.integer(i) {
            Some(0) => Ok(false),
            Some(1) => Ok(true),
            Some(other) => Err(bad(key, "only 0 and 1", other)),
            None => Err(bad(key, "array of bool", value.type_name())),
        };
        (0..n_layers).map(flag).collect::<Result<_, _>>().map(Some)
    }

    /// The window that the file states; 0 states none.
    fn window(&self) -> Result<Option<usize>, FormatError> {
        let key = "attention.sliding_window";
        match self.integer(key)? {
            None | Some(0) => Ok(None),
            Some(value) => match usize::try_from(value) {
                Ok(window) if window <= MAX_WINDOW => Ok(Some(window)),
                _ => Err(bad(key, format!("a number of positions up to {MAX_WINDOW}"), value)),
            },
        }
    }

    /// Which layers slide: those that a pattern lists, or all but each n-th, from the first, of a period n.
    fn windows(&self, window: Option<usize>, n_layers: usize) -> Result<Vec<Option<usize>>, FormatError> {
        let key = "attention.sliding_window_pattern";
        if window.is_none() {
            return Ok(vec![None; n_layers]);
        }
        let slides: Vec<bool> = match self.get(key) {
            Some(Value::Array(_)) => self.flags(key, n_layers)?.unwrap_or_default(),
            Some(_) => {
                let period = self.integer(key)?.and_then(|period| usize::try_from(period).ok());
                let period =
                    period.ok_or_else(|| bad(key, "a period or one entry for each layer", "another number"))?;
                (0..n_layers).map(|layer| period == 0 || layer % period != 0).collect()
            }
            None => (0..n_layers).map(|layer| layer % PERIOD != 0).collect(),
        };
        Ok(slides.into_iter().map(|slides| if slides { window } else { None }).collect())
    }

    /// Refuses settings that ask for what is not computed.
    fn check_settings(&self, shape: &ModelShape) -> Result<(), FormatError> {
        self.check_rope_scaling()?;
        for (key, neutral) in SETTINGS {
            let Some(value) = self.get(key) else { continue };
            let not_computed = |computed: String| {
                let got = shown(value);
                Err(FormatError::KeyNotComputed { key: full(key), got, computed })
            };
            let number = value.as_number();
            let is = |wanted: &[f64]| number.is_some_and(|number| wanted.contains(&number));
            let head_dim = shape.head_dim as f64;
            match neutral {
                Neutral::Zero if !is(&[0.0]) => return not_computed("0".into()),
                Neutral::ZeroOrOne if !is(&[0.0, 1.0]) => return not_computed("0 or 1".into()),
                Neutral::Factor if !is(&[0.0, 1.0]) => return not_computed("a factor of 1".into()),
                Neutral::HeadDim if !is(&[head_dim]) => {
                    return not_computed(format!("the key length {}", shape.head_dim));
                }
                Neutral::Flag(wanted) if value != &Value::Bool(wanted) => return not_computed(wanted.to_string()),
                Neutral::RopeBase if number != Some(f64::from(shape.rope_theta)) => {
                    return not_computed(format!("the base {} of all layers", shape.rope_theta));
                }
                Neutral::ScoreScale => {
                    let scale = 1.0 / head_dim.sqrt();
                    let near = number.is_some_and(|got| got == 0.0 || (got - scale).abs() <= 1e-6 * scale);
                    if !near {
                        return not_computed(format!("one over the root of the key length, {scale}"));
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn check_rope_scaling(&self) -> Result<(), FormatError> {
        let kind_key = "rope.scaling.type";
        let kind = self.text(&full(kind_key))?;
        let number = |key: &'static str| self.get(key).map(|value| (key, value));
        let factor = number("rope.scaling.factor").or_else(|| number("rope.scale_linear"));
        let attention = number("rope.scaling.attn_factor");
        // What is no number is none that could be 1.
        let amount = |stated: Option<(&str, &Value)>| stated.map(|(_, value)| value.as_number().unwrap_or(f64::NAN));
        let scaling = RopeScaling { kind, factor: amount(factor), attention_factor: amount(attention) };
        if scaling.is_plain() {
            return Ok(());
        }
        let (key, got, computed) = match (kind, factor.or(attention)) {
            (None, Some((key, value))) => (key, shown(value), "a factor of 1"),
            (kind, stated) => {
                let factor = stated.map(|(_, value)| format!(" with a factor of {}", shown(value)));
                (kind_key, format!("{}{}", kind.unwrap_or_default(), factor.unwrap_or_default()), "`none`")
            }
        };
        Err(FormatError::KeyNotComputed { key: full(key), got, computed: computed.into() })
    }
}

/// A value as messages show it: a number or a flag as it is, anything else by its type.
fn shown(value: &Value) -> String {
    match (value.as_number(), value) {
        (Some(number), _) => number.to_string(),
        (None, Value::Bool(flag)) => flag.to_string(),
        (None, other) => other.type_name(),
    }
}

#[cfg(test)]
#[path = "read_tests.rs"]
mod tests;
