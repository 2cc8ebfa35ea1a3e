//! Which experts are used most: beside a model's file, or of the last run with it.
//!
//! Owns where such lists lie. One that cannot be read, or kept after a run, costs time and nothing else, so nobody is told; one that
//! somebody asked for is written, or an error.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use st_format::ModelShape;
use st_gguf::{GgufFile, Kind, OutputFile, begins_with, check_output};
use st_model::{Engine, Hot};

use crate::context::Context;
use crate::report::Advice;

const LIST: Kind = Kind { name: "a list of hot experts", recognizes: |bytes| begins_with(bytes, b"{\"hot_experts\"") };
/// No list is longer.
const MAX_BYTES: u64 = 16 << 20;

/// Where a list lies that somebody has put beside a model's file; `None` where that has no name.
pub(crate) fn beside(file: &GgufFile) -> Option<PathBuf> {
    Some(file.source.path()?.with_extension("hot.json"))
}

/// A list that is to be written beside a model's file.
pub(crate) struct Beside {
    path: PathBuf,
    fingerprint: String,
}

impl Beside {
    /// The list beside `model`, of a model with this shape.
    ///
    /// # Errors
    /// No such model, one of another shape, a list that cannot be written.
    pub(crate) fn of(model: &Path, shape: &ModelShape) -> anyhow::Result<Self> {
        let file = GgufFile::open(model)?;
        let other = file.header.model_shape()?;
        if (other.n_layers, other.n_experts) != (shape.n_layers, shape.n_experts) {
            let problem = format!("{} is a model of another shape than the one that is profiled", model.display());
            return Err(Advice::new(problem, "--write-hot names a file of the same model").into());
        }
        let path = beside(&file).unwrap_or_else(|| model.with_extension("hot.json"));
        check_output(&path, LIST, true)?;
        Ok(Self { path, fingerprint: Engine::fingerprint_of(&file)? })
    }

    /// Writes how often each expert was used, layer by layer; says where.
    ///
    /// # Errors
    /// It could not be written.
    pub(crate) fn write(self, uses: Vec<Vec<u64>>) -> anyhow::Result<PathBuf> {
        let mut file = OutputFile::create(&self.path, LIST, true)?;
        let text = Hot::new(self.fingerprint, uses).to_json();
        file.write_all(text.as_bytes()).with_context(|| format!("cannot write {}", self.path.display()))?;
        file.finish()?;
        Ok(self.path)
    }
}

/// The list for a model: the one beside it, else that of the last run.
pub(crate) fn find(file: &GgufFile, context: &Context) -> Option<Arc<Hot>> {
    let read = |path: PathBuf| {
        fs::metadata(&path).ok().filter(|about| about.len() <= MAX_BYTES)?;
        Hot::parse(&fs::read(path).ok()?).ok()
    };
    let of_last_run = || read(place(&Engine::fingerprint_of(file).ok()?, context));
    beside(file).and_then(read).or_else(of_last_run).map(Arc::new)
}

/// Keeps what a run has used for the next.
pub(crate) fn keep(engine: &Engine, context: &Context) {
    let Some(hot) = engine.hot() else { return };
    let path = place(&engine.fingerprint(), context);
    let write = || -> Option<()> {
        fs::create_dir_all(path.parent()?).ok()?;
        let mut file = OutputFile::create(&path, LIST, true).ok()?;
        file.write_all(hot.to_json().as_bytes()).ok()?;
        file.finish().ok()
    };
    write();
}

/// Where the list of the last run with a model lies.
fn place(fingerprint: &str, context: &Context) -> PathBuf {
    context.env.store.join("hot").join(format!("{fingerprint}.json"))
}
