//! The safetensors files of a checkpoint: which they are, and every tensor in them.
//!
//! Owns the choice between an index, one file and numbered files without an index, and the agreement of index and
//! files. Knows no tensor of the model.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde::de::{IgnoredAny, MapAccess};

use crate::error::ConvertError;
use crate::json::{Members, read_members};
use crate::mapped::map_weights;
use st_sys::MappedFile;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Most files that are named in a message.
const MAX_NAMED: usize = 4;

/// A tensor as its shard describes it.
pub(crate) struct Found {
    /// Its name there.
    pub(crate) name: String,
    /// Index of its file.
    pub(crate) file: usize,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    /// Its bytes in the file.
    pub(crate) range: Range<usize>,
}

/// All shards of a checkpoint, mapped, and their tensors in the order of their names.
#[derive(Default)]
pub(crate) struct Shards {
    pub(crate) files: Vec<MappedFile>,
    pub(crate) found: BTreeMap<String, Found>,
}

/// Maps the shards of the checkpoint in `dir`.
pub(crate) fn open(dir: &Path, warnings: &mut Vec<String>) -> Result<Shards, ConvertError> {
    let names = names(dir, warnings)?;
    let there = |wanted: &str| {
        let same = |name: &&String| name.eq_ignore_ascii_case(wanted);
        names.iter().find(|name| *name == wanted).or_else(|| names.iter().find(same))
    };
    let index_path = dir.join(INDEX);
    let single = there(SINGLE);
    let mut shards = Shards::default();
    if let Some(index) = read_index(&index_path)? {
        let missing = index.keys().find(|shard| there(shard).is_none());
        match (missing, single) {
            (None, _) => {
                if let Some(stray) = single.filter(|single| !index.keys().any(|shard| there(shard) == Some(single))) {
                    warnings.push(format!("{stray} lies beside the shards that {INDEX} lists, and was left out"));
                }
                for (shard, tensors) in &index {
                    let path = dir.join(there(shard).unwrap_or(shard));
                    shards.scan(&path)?;
                    let file = shards.files.len() - 1;
                    if let Some(tensor) =
                        tensors.iter().find(|name| shards.found.get(*name).is_none_or(|at| at.file != file))
                    {
                        return Err(ConvertError::MissingTensor { path, tensor: tensor.clone() });
                    }
                }
                return Ok(shards);
            }
            (Some(shard), None) => {
                return Err(ConvertError::MissingShard { path: dir.join(shard), index: index_path });
            }
            (Some(shard), Some(single)) => {
                warnings.push(format!("{INDEX} lists {shard}, which is not there: {single} was taken alone"));
            }
        }
    }
    let files = match single {
        Some(single) => vec![single.clone()],
        None => numbered(dir, &names)?,
    };
    for file in files {
        shards.scan(&dir.join(file))?;
    }
    Ok(shards)
}

/// The names of the files in `dir`, in order. One that is no text is none that an index could list, so it is left out.
fn names(dir: &Path, warnings: &mut Vec<String>) -> Result<Vec<String>, ConvertError> {
    let fail = |source| ConvertError::Io { path: dir.into(), source };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        match entry.file_name().into_string() {
            Ok(name) if entry.path().is_file() => names.push(name),
            Err(name) if entry.path().is_file() => {
                warnings.push(format!("{} has a name that is not UTF-8, and was left out", name.display()));
            }
            _ => {}
        }
    }
    names.sort();
    Ok(names)
}

/// The shards of a checkpoint whose index is not there, by the numbers in their names.
fn numbered(dir: &Path, names: &[String]) -> Result<Vec<String>, ConvertError> {
    let mut sets: BTreeMap<(String, u32), BTreeMap<u32, &String>> = BTreeMap::new();
    for name in names {
        if let Some((stem, number, total)) = shard_number(name) {
            sets.entry((stem, total)).or_default().insert(number, name);
        }
    }
    let complete = |total: u32, set: &BTreeMap<u32, &String>| (1..=total).all(|number| set.contains_key(&number));
    let mut whole = sets.iter().filter(|((_, total), set)| complete(*total, set));
    if let (Some((_, set)), None) = (whole.next(), whole.next()) {
        return Ok(set.values().map(|name| (*name).clone()).collect());
    }
    let weights = [".safetensors", ".bin", ".pt", ".pth", ".gguf"];
    let weights = names.iter().filter(|name| weights.iter().any(|end| name.to_ascii_lowercase().ends_with(end)));
    let weights: Vec<&str> = weights.map(String::as_str).collect();
    let more = if weights.len() > MAX_NAMED { ", …" } else { "" };
    let there = weights[..weights.len().min(MAX_NAMED)].join(", ") + more;
    Err(match sets.is_empty() {
        true if there.is_empty() => ConvertError::NoWeights { path: dir.into() },
        true => ConvertError::OtherWeights { path: dir.into(), there },
        false => ConvertError::NoIndex { path: dir.join(INDEX), there },
    })
}

/// What stands in the name `STEM-00001-of-00002.safetensors`: stem, number, total.
fn shard_number(name: &str) -> Option<(String, u32, u32)> {
    let lower = name.to_ascii_lowercase();
    let (rest, total) = lower.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?;
    Some((stem.to_owned(), digits(number)?, digits(total).filter(|&total| total > 0)?))
}

/// The tensors that an index lists, by shard.
#[derive(Default)]
struct Index {
    weight_map: Option<BTreeMap<String, Vec<String>>>,
}

impl<'de> Members<'de> for Index {
    fn member<A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        if key == "weight_map" {
            let WeightMap(weight_map) = map.next_value()?;
            self.weight_map = Some(weight_map);
        } else {
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }
}

/// A map from tensor to shard, turned round.
struct WeightMap(BTreeMap<String, Vec<String>>);

impl<'de> serde::Deserialize<'de> for WeightMap {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(WeightMapVisitor)
    }
}

struct WeightMapVisitor;

impl<'de> serde::de::Visitor<'de> for WeightMapVisitor {
    type Value = WeightMap;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object `weight_map` from tensor to shard")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
        let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
        while let Some((tensor, shard)) = map.next_entry::<String, std::borrow::Cow<'_, str>>()? {
            match shards.get_mut(&*shard) {
                Some(tensors) => tensors.push(tensor),
                None => {
                    shards.insert(shard.into_owned(), vec![tensor]);
                }
            }
        }
        Ok(WeightMap(shards))
    }
}

/// Reads an index; `None` where there is none.
fn read_index(path: &Path) -> Result<Option<BTreeMap<String, Vec<String>>>, ConvertError> {
    let invalid = |message: String| ConvertError::Json { path: path.into(), message };
    let mut index = Index::default();
    if !read_members(path, &mut index)? {
        return Ok(None);
    }
    let map = index
        .weight_map
        .filter(|map| !map.is_empty())
        .ok_or_else(|| invalid("expected an object `weight_map` from tensor to shard".into()))?;
    for (shard, tensors) in &map {
        // A shard lies in the folder of its index: a name that leads elsewhere is no shard.
        let plain = Path::new(shard).file_name().is_some_and(|name| name == shard.as_str());
        if !plain || !shard.to_ascii_lowercase().ends_with(".safetensors") {
            let tensor = tensors.first().map_or("", String::as_str);
            return Err(invalid(format!(
                "tensor {tensor}: {shard:?} is no name of a safetensors file beside the index"
            )));
        }
    }
    Ok(Some(map))
}

impl Shards {
    /// Where the file with index `file` is.
    pub(crate) fn path(&self, file: usize) -> PathBuf {
        self.files[file].path().to_path_buf()
    }

    /// Maps one shard and adds its tensors.
    fn scan(&mut self, path: &Path) -> Result<(), ConvertError> {
        let mapped = map_weights(path)?;
        let (header, metadata) = SafeTensors::read_metadata(mapped.bytes())
            .map_err(|error| ConvertError::BadShard { path: path.into(), message: error.to_string() })?;
        let data = header + size_of::<u64>();
        for (name, info) in metadata.tensors() {
            let entry = Found {
                name: name.clone(),
                file: self.files.len(),
                dtype: info.dtype,
                shape: info.shape.iter().map(|&n| n as u64).collect(),
                range: data + info.data_offsets.0..data + info.data_offsets.1,
            };
            if let Some(previous) = self.found.insert(name.clone(), entry) {
                let why = format!("it is in {} already", self.path(previous.file).display());
                return Err(ConvertError::UnexpectedTensor { path: path.into(), tensor: name, why });
            }
        }
        self.files.push(mapped);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_from_names() {
        let number = |name| shard_number(name).map(|(stem, number, total)| format!("{stem} {number} {total}"));
        assert_eq!(number("model-00002-of-00013.safetensors").as_deref(), Some("model 2 13"));
        assert_eq!(number("Model-x-1-OF-2.SafeTensors").as_deref(), Some("model-x 1 2"));
        for name in ["model.safetensors", "model-1-of-0.safetensors", "model-+1-of-2.safetensors", "a-1-of-2.bin"] {
            assert_eq!(number(name), None, "{name}");
        }
    }
}
