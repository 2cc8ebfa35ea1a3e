//! A checkpoint folder: `config.json`, the tokenizer's files and the safetensors shards.
//!
//! Owns the agreement between configuration and shards: every tensor that the configuration calls for is in one shard,
//! of a known type and the right shape, and no other tensor claims a place in the model. Refuses the rest by name.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::Dtype;
use st_gguf::Metadata;
use st_kernels::WeightType;

use crate::config::{CONFIG_KEYS, ModelConfig};
use crate::error::ConvertError;
use crate::input::{Input, Slot, SourceTensor};
use crate::json::read_settings;
use crate::shards::{self, Found, Shards};
use crate::tensor_map::{TABLE, Tensor, is_derived, is_known, quantized_by, rule_of, without_wrappers};
use crate::tokenizer::{self, ID_KEYS};

/// Opens and validates the checkpoint in `dir`.
pub(crate) fn open(dir: &Path) -> Result<Input, ConvertError> {
    let config_path = dir.join("config.json");
    let keys = [&CONFIG_KEYS[..], &ID_KEYS].concat();
    let json = read_settings(&config_path, &keys)?
        .ok_or_else(|| ConvertError::Io { path: config_path.clone(), source: std::io::ErrorKind::NotFound.into() })?;
    let mut config = ModelConfig::from_json(&json, &config_path)?;
    let mut warnings = Vec::new();
    let mut shards = shards::open(dir, &mut warnings)?;
    unwrap_names(&mut shards, &mut warnings)?;
    let tensors = bind(dir, &mut config, &mut shards, &mut warnings)?;
    let mut carried = Metadata::new();
    if let Some(name) = config.name {
        carried.insert("general.name", name);
    }
    tokenizer::read(dir, &json, config.shape.n_vocab, &mut warnings)?.write(&mut carried);
    Ok(Input {
        path: dir.into(),
        shape: config.shape,
        tied: config.tied == Some(true),
        carried,
        files: shards.files,
        gguf: None,
        tensors,
        warnings,
    })
}

/// Takes from the tensors' names what programs that wrap models have added.
fn unwrap_names(shards: &mut Shards, warnings: &mut Vec<String>) -> Result<(), ConvertError> {
    let names: Vec<&str> = shards.found.keys().map(String::as_str).collect();
    let renamed = without_wrappers(&names);
    if let Some((name, new)) = names.iter().zip(&renamed).find(|(name, new)| *name != new) {
        warnings.push(format!("tensor {name} and others like it are read as {new} and the like"));
    }
    let mut found: BTreeMap<String, Found> = BTreeMap::new();
    for (entry, name) in std::mem::take(&mut shards.found).into_values().zip(renamed) {
        let (file, tensor) = (entry.file, entry.name.clone());
        if let Some(first) = found.insert(name, entry) {
            let why = format!("{} is the same one", first.name);
            return Err(ConvertError::UnexpectedTensor { path: shards.path(file), tensor, why });
        }
    }
    shards.found = found;
    Ok(())
}

/// Gives every tensor of the model its place in a shard, and refuses what is missing, misshapen or left over.
fn bind(
    dir: &Path,
    config: &mut ModelConfig,
    shards: &mut Shards,
    warnings: &mut Vec<String>,
) -> Result<HashMap<Slot, SourceTensor>, ConvertError> {
    let mut found = std::mem::take(&mut shards.found);
    if let Some((entry, method)) = found.values().find_map(|entry| Some((entry, quantized_by(&entry.name)?))) {
        return Err(ConvertError::Quantized { path: shards.path(entry.file), method: method.into() });
    }
    let head = rule_of(Tensor::Output).hf_name(0, 0);
    let embedding = rule_of(Tensor::TokenEmbd).hf_name(0, 0);
    // Savers that drop one of two names of a matrix may drop the embedding's.
    if config.tied != Some(false)
        && !found.contains_key(&embedding)
        && let Some(shared) = found.remove(&head)
    {
        found.insert(embedding, shared);
    }
    let tied = *config.tied.get_or_insert(!found.contains_key(&head));
    let mut tensors = HashMap::new();
    for rule in &TABLE {
        // Some writers store the shared matrix under both names; which one counts is decided later.
        if rule.tensor == Tensor::Output && tied && !found.contains_key(&head) {
            continue;
        }
        let expected = rule.hf_shape(&config.shape);
        for (layer, expert) in rule.instances(&config.shape) {
            let name = rule.hf_name(layer, expert);
            let Some(entry) = found.remove(&name) else { return Err(missing(dir, name, &found)) };
            let path = || shards.path(entry.file);
            if entry.shape != expected {
                return Err(ConvertError::Shape { path: path(), tensor: entry.name, got: entry.shape, expected });
            }
            let ty = match entry.dtype {
                Dtype::F32 => WeightType::F32,
                Dtype::F16 => WeightType::F16,
                Dtype::BF16 => WeightType::BF16,
                other => {
                    return Err(ConvertError::SourceType {
                        path: path(),
                        tensor: entry.name,
                        got: format!("{other:?}"),
                        expected: "BF16, F16 or F32",
                    });
                }
            };
            let source = SourceTensor {
                name: entry.name,
                first_weight: 0,
                file: entry.file,
                range: entry.range,
                ty,
                transposed: false,
            };
            tensors.insert((rule.tensor, layer, expert), source);
        }
    }
    let left = found.into_iter().filter(|(name, _)| !is_derived(name));
    let (claimed, foreign): (Vec<_>, Vec<_>) =
        left.partition(|(name, _)| name.starts_with("model.") || name.starts_with("lm_head."));
    if let Some((_, entry)) = claimed.into_iter().next() {
        return Err(ConvertError::UnexpectedTensor {
            path: shards.path(entry.file),
            tensor: entry.name,
            why: format!("{} layers of {} experts", config.shape.n_layers, config.shape.n_experts),
        });
    }
    if let Some((name, _)) = foreign.first() {
        warnings.push(format!("tensor {name} and others like it are no part of the model and were left out"));
    }
    Ok(tensors)
}

/// The error for a tensor that is not there. A name of the same place that is none of the table's tells how the others
/// are named.
fn missing(dir: &Path, tensor: String, found: &BTreeMap<String, Found>) -> ConvertError {
    let suffix = tensor.trim_start_matches("model.");
    let common = |name: &str| name.bytes().zip(tensor.bytes()).take_while(|(a, b)| a == b).count();
    let of_layer = tensor.find(|c: char| c.is_ascii_digit()).map_or(tensor.len(), |digit| digit + 2);
    let others = || found.iter().filter(|(name, _)| !is_known(name));
    let like = others().find(|(name, _)| name.ends_with(suffix));
    let like =
        like.or_else(|| others().filter(|(name, _)| common(name) >= of_layer).max_by_key(|(name, _)| common(name)));
    match like {
        Some((_, like)) => ConvertError::OtherNames { path: dir.into(), tensor, there: like.name.clone() },
        None => ConvertError::MissingTensor { path: dir.into(), tensor },
    }
}
