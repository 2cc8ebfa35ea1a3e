//! The LM head's predictor as a file that a person names.

use std::path::Path;

use st_gguf::ModelShape;
use st_model::Predictor;

use crate::models::not_stdin;

/// Reads the predictor of a model of this shape.
pub(crate) fn open(path: &Path, shape: &ModelShape) -> anyhow::Result<Predictor> {
    not_stdin(path)?;
    Ok(Predictor::open(path, shape)?)
}
