//! A GGUF file as input: F32, F16, BF16 or Q8_0 weights as this tool or llama.cpp's converter writes them.
//!
//! Owns reading the model's shape from GGUF keys and cutting the stacked expert tensors into single matrices. Carries
//! tokenizer and general keys over unchanged. Refuses types that lost too much to be a source, and packed experts.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use st_gguf::{GgmlType, GgufFile, Header, Metadata};

use crate::config::{LLAMA_CPP_PERIOD, ModelConfig};
use crate::error::ConvertError;
use crate::input::{Input, Slot, SourceTensor, SourceType};
use crate::mapped::MappedFile;
use crate::tensor_map::{Scope, TABLE, Tensor};

/// Opens and validates the GGUF file at `path`.
pub(crate) fn open(path: &Path) -> Result<Input, ConvertError> {
    let gguf = GgufFile::open(path)?;
    let header = &gguf.header;
    let keys = Keys { metadata: &header.metadata, path };
    keys.check_architecture()?;
    if header.metadata.str("st.layout.kind")?.is_some_and(|kind| kind != "gguf") {
        return Err(ConvertError::PackedInput { path: path.into() });
    }
    let config = read_config(&keys, header)?;
    let mut warnings = Vec::new();
    let tensors = bind(path, header, &config, &mut warnings)?;
    let carried = carry(&header.metadata);
    if carried.get("tokenizer.ggml.tokens").is_none() {
        warnings.push("the file has no tokenizer: the output takes and gives token ids only".into());
    }
    let mapped = MappedFile::open(path)?;
    if mapped.bytes().len() as u64 != header.file_len {
        let source = std::io::Error::other("the file changed its length while it was opened");
        return Err(ConvertError::Io { path: path.into(), source });
    }
    let files = vec![mapped];
    Ok(Input { path: path.into(), config, carried, files, gguf: Some(gguf), tensors, warnings })
}

/// What describes the weights is written anew; everything else is kept, in its order.
fn carry(metadata: &Metadata) -> Metadata {
    const RENEWED: [&str; 3] = ["general.alignment", "general.file_type", "general.quantization_version"];
    let mut carried = Metadata::new();
    for (key, value) in metadata.iter() {
        let renewed = RENEWED.contains(&key)
            || ["smallthinker.", "st.", "split.", "quantize."].iter().any(|prefix| key.starts_with(prefix));
        if !renewed {
            carried.insert(key, value.clone());
        }
    }
    carried
}

fn read_config(keys: &Keys<'_>, header: &Header) -> Result<ModelConfig, ConvertError> {
    let n_layers = keys.size("block_count", 1 << 12)?;
    let n_embd = keys.size("embedding_length", 1 << 20)?;
    let n_heads = keys.size("attention.head_count", 1 << 12)?;
    let n_ff = match keys.optional_size("expert_feed_forward_length", 1 << 20)? {
        Some(n_ff) => n_ff,
        None => keys.size("feed_forward_length", 1 << 20)?,
    };
    // The embedding is what the vocabulary has to fit; files without a tokenizer may not state its size.
    let vocab_size = header
        .tensor("token_embd.weight")
        .and_then(|tensor| tensor.shape.get(1).copied())
        .and_then(|rows| usize::try_from(rows).ok())
        .ok_or_else(|| ConvertError::MissingTensor { path: keys.path.into(), tensor: "token_embd.weight".into() })?;
    let stated_window = keys.metadata.u64("smallthinker.attention.sliding_window")?.filter(|&window| window > 0);
    let standard = |window: bool| (0..n_layers).map(|layer| window == (layer % LLAMA_CPP_PERIOD != 0)).collect();
    let window_layers = match stated_window {
        None => vec![false; n_layers],
        Some(_) => keys.flags("attention.sliding_window_pattern", n_layers)?.unwrap_or_else(|| standard(true)),
    };
    let window =
        if window_layers.contains(&true) { keys.optional_size("attention.sliding_window", 1 << 30)? } else { None };
    let rope_layers = match keys.flags("rope.layer_pattern", n_layers)? {
        Some(layers) => layers,
        None if stated_window.is_none() => vec![true; n_layers],
        None => standard(true),
    };
    let config = ModelConfig {
        name: keys.metadata.str("general.name")?.map(str::to_owned),
        n_layers,
        n_embd,
        n_heads,
        n_kv_heads: keys.optional_size("attention.head_count_kv", 1 << 12)?.unwrap_or(n_heads),
        head_dim: match keys.optional_size("attention.key_length", 1 << 12)? {
            Some(dim) => dim,
            None => n_embd / n_heads,
        },
        n_experts: keys.size("expert_count", 1 << 16)?,
        n_experts_used: keys.size("expert_used_count", 1 << 16)?,
        n_ff,
        vocab_size,
        context_length: keys.size("context_length", 1 << 30)?,
        rms_eps: keys.positive("attention.layer_norm_rms_epsilon")?,
        rope_theta: keys.positive("rope.freq_base")?,
        rope_layers,
        window_layers,
        window,
        softmax_router: match keys.optional_size("expert_gating_func", 255)? {
            Some(1) => true,
            None | Some(2) => false,
            Some(other) => return Err(keys.bad("expert_gating_func", other, "1 (softmax) or 2 (sigmoid)")),
        },
        tied: Some(header.tensor("output.weight").is_none()),
    };
    config.check(keys.path)?;
    Ok(config)
}

/// Gives every matrix of the model its place in the file, experts one by one.
fn bind(
    path: &Path,
    header: &Header,
    config: &ModelConfig,
    warnings: &mut Vec<String>,
) -> Result<HashMap<Slot, SourceTensor>, ConvertError> {
    let mut tensors = HashMap::new();
    let mut placed = HashSet::new();
    for rule in &TABLE {
        if rule.tensor == Tensor::Output && config.tied == Some(true) {
            continue;
        }
        let expected = rule.gguf_shape(config);
        let weights = rule.rows(config) * rule.cols(config);
        for (layer, expert) in rule.instances(config) {
            let name = rule.gguf_name(layer);
            let Some(info) = header.tensor(&name) else {
                return Err(ConvertError::MissingTensor { path: path.into(), tensor: name });
            };
            if info.shape != expected {
                let got = info.shape.clone();
                return Err(ConvertError::Shape { path: path.into(), tensor: name, got, expected });
            }
            let ty = match info.ty {
                GgmlType::F32 => SourceType::F32,
                GgmlType::F16 => SourceType::F16,
                GgmlType::BF16 => SourceType::Bf16,
                GgmlType::Q8_0 => SourceType::Q8_0,
                other => {
                    return Err(ConvertError::SourceType {
                        path: path.into(),
                        tensor: name,
                        got: other.to_string(),
                        expected: "F32, F16, BF16 or Q8_0",
                    });
                }
            };
            // The header parser has proved that all experts together lie inside the file.
            let bytes = ty.bytes(weights);
            let start = info.offset as usize + expert * bytes;
            let first_weight = if rule.scope() == Scope::Expert { (expert * weights) as u64 } else { 0 };
            placed.insert(name.clone());
            let source = SourceTensor { name, first_weight, file: 0, range: start..start + bytes, ty };
            tensors.insert((rule.tensor, layer, expert), source);
        }
    }
    let mut left = header.tensors.iter().map(|tensor| tensor.name.as_str()).filter(|&name| !placed.contains(name));
    if let Some(name) = left.clone().find(|name| name.starts_with("blk.")) {
        return Err(ConvertError::UnexpectedTensor {
            path: path.into(),
            tensor: name.into(),
            why: format!("{} layers of {} experts", config.n_layers, config.n_experts),
        });
    }
    if let Some(name) = left.next() {
        warnings.push(format!("tensor {name} and others like it are no part of the model and were left out"));
    }
    Ok(tensors)
}

/// Typed access to `smallthinker.*` keys, with errors that name file, key, got and expected.
struct Keys<'a> {
    metadata: &'a Metadata,
    path: &'a Path,
}

impl Keys<'_> {
    fn bad(&self, key: &str, got: impl ToString, expected: impl Into<String>) -> ConvertError {
        let key = format!("smallthinker.{key}");
        ConvertError::Config { path: self.path.into(), key, got: got.to_string(), expected: expected.into() }
    }

    fn check_architecture(&self) -> Result<(), ConvertError> {
        match self.metadata.str("general.architecture")? {
            Some("smallthinker") => Ok(()),
            other => Err(ConvertError::Architecture {
                path: self.path.into(),
                got: other.map_or_else(|| "a file that states none".into(), |name| format!("\"{name}\"")),
            }),
        }
    }

    fn optional_size(&self, key: &str, max: usize) -> Result<Option<usize>, ConvertError> {
        match self.metadata.u64(&format!("smallthinker.{key}"))? {
            None => Ok(None),
            Some(value) => match usize::try_from(value) {
                Ok(n) if n >= 1 && n <= max => Ok(Some(n)),
                _ => Err(self.bad(key, value, format!("a whole number from 1 to {max}"))),
            },
        }
    }

    fn size(&self, key: &str, max: usize) -> Result<usize, ConvertError> {
        self.optional_size(key, max)?.ok_or_else(|| self.bad(key, "nothing", "a whole number"))
    }

    fn positive(&self, key: &str) -> Result<f32, ConvertError> {
        match self.metadata.f32(&format!("smallthinker.{key}"))? {
            Some(x) if x > 0.0 && x.is_finite() => Ok(x),
            Some(x) => Err(self.bad(key, x, "a positive number")),
            None => Err(self.bad(key, "nothing", "a positive number")),
        }
    }

    fn flags(&self, key: &str, n_layers: usize) -> Result<Option<Vec<bool>>, ConvertError> {
        let Some(flags) = self.metadata.bools(&format!("smallthinker.{key}"))? else { return Ok(None) };
        if flags.len() != n_layers {
            return Err(self.bad(
                key,
                format!("{} entries", flags.len()),
                format!("one for each of {n_layers} layers"),
            ));
        }
        Ok(Some(flags.to_vec()))
    }
}
