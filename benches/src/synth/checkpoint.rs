//! Writes a synthetic model as a Hugging Face folder: BF16 safetensors, sharded, with index, config and tokenizer.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::recipe::{Kind, Recipe, Tensor};
use super::stream::{encode_rows, parts, pipeline};
use super::vocab::Pieces;
use st_gguf::GgmlType;

/// Writes the folder `dir`, which must be empty or absent; shards hold at most `shard_bytes` of tensor data each (but
/// at least one tensor).
///
/// # Errors
/// A folder that is not empty, and whatever the file system says.
pub fn write_checkpoint(recipe: &Recipe, dir: &Path, shard_bytes: u64, progress: &(dyn Fn(u64) + Sync)) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    ensure!(fs::read_dir(dir)?.next().is_none(), "{} is not empty", dir.display());

    let tensors = recipe.tensors();
    let mut shards: Vec<Vec<&Tensor>> = Vec::new();
    let mut room = 0;
    for tensor in &tensors {
        let bytes = tensor_bytes(tensor);
        if shards.is_empty() || bytes > room {
            shards.push(Vec::new());
            room = shard_bytes;
        }
        room = room.saturating_sub(bytes);
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    let file_name = |i: usize| match shards.len() {
        1 => "model.safetensors".to_owned(),
        n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
    };
    let mut weight_map = Map::new();
    for (i, shard) in shards.iter().enumerate() {
        let name = file_name(i);
        write_shard(recipe, shard, &dir.join(&name), progress)?;
        weight_map.extend(shard.iter().map(|t| (t.name.clone(), json!(name))));
    }
    if shards.len() > 1 {
        let total: u64 = tensors.iter().map(tensor_bytes).sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write_json(&dir.join("model.safetensors.index.json"), &index)?;
    }
    let (shape, vocab) = (recipe.shape(), recipe.vocab());
    let pieces = Pieces::build(vocab, 0);
    write_json(&dir.join("tokenizer.json"), &pieces.tokenizer_json())?;
    write_json(&dir.join("tokenizer_config.json"), &pieces.tokenizer_config_json(shape.context_length))?;
    let generation = json!({
        "bos_token_id": vocab.end_of_text(),
        "do_sample": false,
        "eos_token_id": [vocab.turn_end(), vocab.end_of_text()],
        "pad_token_id": vocab.end_of_text(),
    });
    write_json(&dir.join("generation_config.json"), &generation)?;
    write_json(&dir.join("config.json"), &shape.config_json(vocab.end_of_text(), vocab.turn_end()))
}

fn tensor_bytes(tensor: &Tensor) -> u64 {
    (tensor.rows * tensor.cols * 2) as u64
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}

fn write_shard(recipe: &Recipe, tensors: &[&Tensor], path: &Path, progress: &(dyn Fn(u64) + Sync)) -> Result<()> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut at = 0;
    for tensor in tensors {
        let norm = matches!(tensor.kind, Kind::AttentionNorm | Kind::FfnNorm | Kind::FinalNorm);
        let shape = if norm { vec![tensor.cols] } else { vec![tensor.rows, tensor.cols] };
        let end = at + tensor_bytes(tensor);
        header.insert(tensor.name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}));
        at = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let file = File::create_new(path).with_context(|| format!("cannot create {}", path.display()))?;
    let mut file = BufWriter::with_capacity(1 << 20, file);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    pipeline(
        tensors.iter().flat_map(|tensor| parts(tensor, GgmlType::BF16)),
        |part, buffer| encode_rows(recipe, part.tensor, part.rows, part.ty, buffer),
        |bytes| {
            progress(bytes.len() as u64);
            file.write_all(bytes).with_context(|| format!("cannot write {}", path.display()))
        },
    )?;
    file.flush().with_context(|| format!("cannot write {}", path.display()))
}
