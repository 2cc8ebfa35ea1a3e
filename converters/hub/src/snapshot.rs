//! What can be told about a checkpoint folder without reading its weights: whether it is one of ours, and whole.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use serde::Deserialize;

use crate::names::check_file_name;
use crate::{HubError, RepoId};

/// The file that says what a model is.
pub(crate) const CONFIG: &str = "config.json";
/// The architecture that this program is for.
const ARCHITECTURE: &str = "SmallThinkerForCausalLM";
/// Longest `config.json` that is read.
pub(crate) const MAX_CONFIG: u64 = 4 << 20;
/// Longest weight index that is read.
const MAX_INDEX: u64 = 64 << 20;

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    architectures: Vec<String>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Refuses a `config.json` of another kind of model.
pub(crate) fn check_architecture(repo: &RepoId, config: &[u8]) -> Result<(), HubError> {
    let found = match serde_json::from_slice::<Config>(config) {
        Ok(config) if config.architectures.iter().any(|a| a == ARCHITECTURE) => return Ok(()),
        Ok(config) if config.architectures.is_empty() => "its config.json names no architecture".to_owned(),
        Ok(config) => format!("its config.json says {}", config.architectures.join(", ")),
        Err(e) => format!("its config.json cannot be read: {e}"),
    };
    Err(HubError::NotSmallThinker { repo: repo.to_string(), found })
}

/// The same for the `config.json` in a folder.
pub(crate) fn check_architecture_file(repo: &RepoId, folder: &Path) -> Result<(), HubError> {
    let path = folder.join(CONFIG);
    let text = read_limited(&path, MAX_CONFIG).map_err(HubError::io("read", &path))?;
    check_architecture(repo, &text)
}

/// Whether a folder has a configuration and every weight file that its index names.
pub(crate) fn looks_whole(folder: &Path) -> bool {
    if !folder.join(CONFIG).is_file() {
        return false;
    }
    match read_limited(&folder.join("model.safetensors.index.json"), MAX_INDEX) {
        Ok(text) => serde_json::from_slice::<Index>(&text).is_ok_and(|index| {
            let shards: std::collections::BTreeSet<&String> = index.weight_map.values().collect();
            !shards.is_empty() && shards.iter().all(|s| check_file_name(s).is_ok() && folder.join(s).is_file())
        }),
        Err(_) => folder.join("model.safetensors").is_file(),
    }
}

fn read_limited(path: &Path, limit: u64) -> std::io::Result<Vec<u8>> {
    let file = File::open(path)?;
    if fs::metadata(path)?.len() > limit {
        return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, "far larger than such a file is"));
    }
    let mut text = Vec::new();
    file.take(limit).read_to_end(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_architecture_passes() {
        let repo = RepoId::parse("a/b").unwrap();
        check_architecture(&repo, br#"{"architectures":["SmallThinkerForCausalLM"]}"#).unwrap();
        for (config, said) in [
            (r#"{"architectures":["LlamaForCausalLM"]}"#, "says LlamaForCausalLM"),
            ("{}", "names no architecture"),
            ("<html>", "cannot be read"),
        ] {
            let error = check_architecture(&repo, config.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn a_snapshot_is_whole_with_all_its_shards() {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        assert!(!looks_whole(folder.path()));
        put("config.json", "{}");
        assert!(!looks_whole(folder.path()));
        put("model.safetensors.index.json", r#"{"weight_map":{"a":"1.safetensors","b":"2.safetensors"}}"#);
        put("1.safetensors", "");
        assert!(!looks_whole(folder.path()));
        put("2.safetensors", "");
        assert!(looks_whole(folder.path()));
        put("model.safetensors.index.json", r#"{"weight_map":{"a":"../1.safetensors"}}"#);
        assert!(!looks_whole(folder.path()));
    }
}
