//! A checkpoint folder: `config.json` and the safetensors shards, memory-mapped.
//!
//! Owns the agreement between configuration, index and shards: every tensor that the configuration calls for is in one
//! shard, of a known type and the right shape, and no other tensor claims a place in the model. Refuses the rest by name.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use st_gguf::Metadata;

use crate::config::ModelConfig;
use crate::error::ConvertError;
use crate::input::{Input, Slot, SourceTensor, SourceType};
use crate::mapped::MappedFile;
use crate::tensor_map::{TABLE, Tensor, is_derived};
use crate::tokenizer;

/// Most bytes that a JSON file of a checkpoint may have: far above any tokenizer, far below what would hurt.
const MAX_JSON_BYTES: u64 = 256 << 20;

/// A tensor as its shard describes it.
struct Found {
    file: usize,
    dtype: Dtype,
    shape: Vec<u64>,
    range: std::ops::Range<usize>,
}

/// Opens and validates the checkpoint in `dir`.
pub(crate) fn open(dir: &Path) -> Result<Input, ConvertError> {
    let config_path = dir.join("config.json");
    let json = read_json(&config_path)?
        .ok_or_else(|| ConvertError::Io { path: config_path.clone(), source: std::io::ErrorKind::NotFound.into() })?;
    let mut config = ModelConfig::from_json(&json, &config_path)?;
    let (files, found) = open_shards(dir)?;
    let mut warnings = Vec::new();
    let tensors = bind(dir, &mut config, &files, found, &mut warnings)?;
    let mut carried = Metadata::new();
    tokenizer::read(dir, &json, config.vocab_size, &mut warnings)?.write(&mut carried);
    Ok(Input { path: dir.into(), config, carried, files, tensors, warnings })
}

/// Reads a JSON file of bounded size; `None` where there is none.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>, ConvertError> {
    let fail = |source| ConvertError::Io { path: path.into(), source };
    let length = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fail(error)),
    };
    let invalid = |message: String| ConvertError::Json { path: path.into(), message };
    if length > MAX_JSON_BYTES {
        return Err(invalid(format!("{length} bytes, expected at most {MAX_JSON_BYTES}")));
    }
    let bytes = std::fs::read(path).map_err(fail)?;
    serde_json::from_slice(&bytes).map(Some).map_err(|error| invalid(format!("not valid JSON: {error}")))
}

/// Maps all shards; returns them with every tensor that they hold.
fn open_shards(dir: &Path) -> Result<(Vec<MappedFile>, BTreeMap<String, Found>), ConvertError> {
    let index_path = dir.join("model.safetensors.index.json");
    let single = dir.join("model.safetensors");
    let mut files = Vec::new();
    let mut found = BTreeMap::new();
    // A checkpoint in one file may be accompanied by a stale index, never the other way round.
    if single.is_file() {
        scan_shard(&single, &mut files, &mut found)?;
        return Ok((files, found));
    }
    let Some(index) = read_json(&index_path)? else {
        return Err(ConvertError::NoWeights { path: dir.into() });
    };
    let (weight_map, shards) = read_index(&index, &index_path)?;
    for shard in &shards {
        let path = dir.join(shard);
        if !path.is_file() {
            return Err(ConvertError::MissingShard { path, index: index_path });
        }
        scan_shard(&path, &mut files, &mut found)?;
    }
    for (tensor, shard) in weight_map {
        let path = dir.join(shard);
        match found.get(tensor) {
            Some(found) if files[found.file].path() == path => {}
            _ => return Err(ConvertError::MissingTensor { path, tensor: tensor.into() }),
        }
    }
    Ok((files, found))
}

/// The index's map from tensor to shard, and the shards in order.
#[allow(clippy::type_complexity, reason = "two views of one list")]
fn read_index<'a>(index: &'a Value, path: &Path) -> Result<(Vec<(&'a str, &'a str)>, BTreeSet<&'a str>), ConvertError> {
    let invalid = |message: String| ConvertError::Json { path: path.into(), message };
    let map = index
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| invalid("expected an object `weight_map` from tensor to shard".into()))?;
    let mut entries = Vec::with_capacity(map.len());
    for (tensor, shard) in map {
        let shard = shard.as_str().unwrap_or_default();
        // A shard lies in the folder of its index: a name that leads elsewhere is no shard.
        let plain = Path::new(shard).file_name().is_some_and(|name| name == shard);
        if !plain || !shard.ends_with(".safetensors") {
            return Err(invalid(format!(
                "tensor {tensor}: {shard:?} is no name of a safetensors file beside the index"
            )));
        }
        entries.push((tensor.as_str(), shard));
    }
    let shards = entries.iter().map(|&(_, shard)| shard).collect();
    Ok((entries, shards))
}

/// Maps one shard and adds its tensors to `found`.
fn scan_shard(
    path: &Path,
    files: &mut Vec<MappedFile>,
    found: &mut BTreeMap<String, Found>,
) -> Result<(), ConvertError> {
    let mapped = MappedFile::open(path)?;
    let (header, metadata) = SafeTensors::read_metadata(mapped.bytes())
        .map_err(|error| ConvertError::BadShard { path: path.into(), message: error.to_string() })?;
    let data = header + size_of::<u64>();
    for (name, info) in metadata.tensors() {
        let entry = Found {
            file: files.len(),
            dtype: info.dtype,
            shape: info.shape.iter().map(|&n| n as u64).collect(),
            range: data + info.data_offsets.0..data + info.data_offsets.1,
        };
        if let Some(previous) = found.insert(name.clone(), entry) {
            let first = files[previous.file].path().to_path_buf();
            return Err(ConvertError::UnexpectedTensor {
                path: path.into(),
                tensor: name,
                why: format!("it is in {} already", first.display()),
            });
        }
    }
    files.push(mapped);
    Ok(())
}

/// Gives every tensor of the model its place in a shard, and refuses what is missing, misshapen or left over.
fn bind(
    dir: &Path,
    config: &mut ModelConfig,
    files: &[MappedFile],
    mut found: BTreeMap<String, Found>,
    warnings: &mut Vec<String>,
) -> Result<HashMap<Slot, SourceTensor>, ConvertError> {
    let head = Tensor::Output.rule().hf_name(0, 0);
    let embedding = Tensor::TokenEmbd.rule().hf_name(0, 0);
    let tied = *config.tied.get_or_insert(!found.contains_key(&head));
    if tied && let Some(extra) = found.remove(&head) {
        // Some writers store the shared matrix under both names. Other contents contradict the configuration.
        let bytes = |found: &Found| &files[found.file].bytes()[found.range.clone()];
        if found.get(&embedding).is_none_or(|embedding| bytes(embedding) != bytes(&extra)) {
            return Err(ConvertError::UnexpectedTensor {
                path: files[extra.file].path().into(),
                tensor: head,
                why: "tie_word_embeddings is true, and its contents are not the embedding's".into(),
            });
        }
        files[extra.file].release(extra.range);
    }
    let mut tensors = HashMap::new();
    for rule in &TABLE {
        if rule.tensor == Tensor::Output && tied {
            continue;
        }
        let expected = rule.hf_shape(config);
        for (layer, expert) in rule.instances(config) {
            let name = rule.hf_name(layer, expert);
            let Some(entry) = found.remove(&name) else {
                return Err(ConvertError::MissingTensor { path: dir.into(), tensor: name });
            };
            let path = || PathBuf::from(files[entry.file].path());
            if entry.shape != expected {
                return Err(ConvertError::Shape { path: path(), tensor: name, got: entry.shape, expected });
            }
            let ty = match entry.dtype {
                Dtype::F32 => SourceType::F32,
                Dtype::F16 => SourceType::F16,
                Dtype::BF16 => SourceType::Bf16,
                other => {
                    return Err(ConvertError::SourceType {
                        path: path(),
                        tensor: name,
                        got: format!("{other:?}"),
                        expected: "BF16, F16 or F32",
                    });
                }
            };
            let source = SourceTensor { name, first_weight: 0, file: entry.file, range: entry.range, ty };
            tensors.insert((rule.tensor, layer, expert), source);
        }
    }
    let mut ignored = 0;
    for (name, entry) in found {
        if is_derived(&name) {
            continue;
        }
        if name.starts_with("model.") || name.starts_with("lm_head.") {
            return Err(ConvertError::UnexpectedTensor {
                path: files[entry.file].path().into(),
                tensor: name,
                why: format!("{} layers of {} experts", config.n_layers, config.n_experts),
            });
        }
        if ignored == 0 {
            warnings.push(format!("tensor {name} and others like it are no part of the model and were left out"));
        }
        ignored += 1;
    }
    Ok(tensors)
}
