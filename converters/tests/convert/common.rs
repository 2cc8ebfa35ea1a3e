//! What the tests of this crate share: where the reference checkpoints lie, and checkpoints that are edited copies.

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors, View};
use serde_json::Value;
use st_convert::{Cancel, ConvertError, ConvertOptions, ConvertPlan, Input, Layout, NoProgress, WeightType, convert};

pub(crate) const TYPES: [WeightType; 5] = WeightType::WRITTEN;
pub(crate) const LAYOUTS: [Layout; 2] = [Layout::Gguf, Layout::Offload];

pub(crate) fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

pub(crate) fn tiny() -> PathBuf {
    repository("models/tiny/checkpoint")
}

pub(crate) fn mini(name: &str) -> PathBuf {
    repository("tests/golden").join(name)
}

pub(crate) fn options(ty: WeightType, layout: Layout) -> ConvertOptions {
    ConvertOptions { threads: 2, ..ConvertOptions::new(ty, layout) }
}

pub(crate) fn run(input: &Path, options: &ConvertOptions, out: &Path) -> Result<ConvertPlan, ConvertError> {
    convert(&Input::open(input)?, options, out, false, &NoProgress, &Cancel::new()).map(|converted| converted.plan)
}

/// Converts and returns the file's bytes.
pub(crate) fn bytes(input: &Path, options: &ConvertOptions) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    run(input, options, &out).unwrap();
    std::fs::read(out).unwrap()
}

/// A tensor of a checkpoint, owned, so that tests can edit it.
#[derive(Clone)]
pub(crate) struct Owned {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<u8>,
}

impl View for Owned {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        (&self.data).into()
    }
    fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// A checkpoint in memory.
pub(crate) struct Checkpoint {
    pub(crate) config: Value,
    pub(crate) tensors: Vec<(String, Owned)>,
}

impl Checkpoint {
    /// The tensors and the configuration of a reference checkpoint, in one shard.
    pub(crate) fn load(dir: &Path) -> Self {
        let config = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
        let mut tensors = Vec::new();
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                let file = std::fs::read(&path).unwrap();
                for (name, view) in SafeTensors::deserialize(&file).unwrap().iter() {
                    let (dtype, shape) = (view.dtype(), view.shape().to_vec());
                    tensors.push((name.to_owned(), Owned { dtype, shape, data: view.data().to_vec() }));
                }
            }
        }
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        Self { config, tensors }
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut Owned {
        &mut self.tensors.iter_mut().find(|(other, _)| other == name).unwrap().1
    }

    pub(crate) fn save(&self, dir: &Path) {
        std::fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        let views = self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
    }

    /// Saves to a folder of its own and converts: the file's bytes, and the notes.
    pub(crate) fn converted(&self, options: &ConvertOptions) -> (Vec<u8>, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        self.save(dir.path());
        let out = dir.path().join("out.gguf");
        let plan = run(dir.path(), options, &out).unwrap();
        (std::fs::read(out).unwrap(), plan.warnings)
    }

    /// Gives every tensor the name that `rename` makes of its own.
    pub(crate) fn renamed(&self, rename: impl Fn(&str) -> String) -> Self {
        let tensors = self.tensors.iter().map(|(name, tensor)| (rename(name), tensor.clone()));
        Self { config: self.config.clone(), tensors: tensors.collect() }
    }

    /// Saves to a folder of its own, converts to Q4_0 and returns the message of the failure.
    pub(crate) fn failure(&self) -> String {
        let dir = tempfile::tempdir().unwrap();
        self.save(dir.path());
        failure(dir.path())
    }
}

impl View for &Owned {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        (&self.data).into()
    }
    fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// Converts a broken input and returns the message; nothing may be left in the output folder.
pub(crate) fn failure(input: &Path) -> String {
    let dir = tempfile::tempdir().unwrap();
    let error = run(input, &options(WeightType::Q4_0, Layout::Gguf), &dir.path().join("out.gguf")).unwrap_err();
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?} left behind");
    let mut message = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        message = format!("{message}: {cause}");
        source = cause.source();
    }
    message
}
