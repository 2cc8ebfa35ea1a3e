//! Which experts are used most: beside a model's file, or of the last run with it.
//!
//! Owns where such lists lie. One that cannot be read or written costs time and nothing else, so nobody is told.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use st_gguf::{GgufFile, Kind, OutputFile, begins_with};
use st_model::{Engine, Hot};

use crate::context::Context;

const LIST: Kind = Kind { name: "a list of hot experts", recognizes: |bytes| begins_with(bytes, b"{\"hot_experts\"") };
/// No list is longer.
const MAX_BYTES: u64 = 16 << 20;

/// Where a list lies that somebody has put beside a model's file; `None` where that has no name.
pub(crate) fn beside(file: &GgufFile) -> Option<PathBuf> {
    Some(file.source.path()?.with_extension("hot.json"))
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
        std::io::Write::write_all(&mut file, hot.to_json().as_bytes()).ok()?;
        file.finish().ok()
    };
    write();
}

/// Where the list of the last run with a model lies.
fn place(fingerprint: &str, context: &Context) -> PathBuf {
    context.env.store.join("hot").join(format!("{fingerprint}.json"))
}
