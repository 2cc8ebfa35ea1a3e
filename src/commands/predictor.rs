//! The LM head's predictor as a file that a person names.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use st_gguf::{GgmlType, ModelShape, TensorSpec, crc32c};
use st_model::{PREDICTOR_TENSOR, Predictor};

use crate::models::not_stdin;

/// Reads the predictor of a model of this shape.
pub(crate) fn open(path: &Path, shape: &ModelShape) -> anyhow::Result<Predictor> {
    not_stdin(path)?;
    Ok(Predictor::open(path, shape)?)
}

/// The tensor that a model of this shape holds its predictor in, and its bytes.
pub(crate) fn tensor(path: &Path, shape: &ModelShape) -> anyhow::Result<(TensorSpec, Arc<[u8]>)> {
    let predictor = open(path, shape)?;
    let weights = predictor.hidden() * (shape.n_embd + shape.n_vocab);
    let spec = TensorSpec { name: PREDICTOR_TENSOR.into(), shape: vec![weights as u64], ty: GgmlType::Q4_0 };
    Ok((spec, predictor.bytes().into()))
}

/// What tells one predictor from another, before a model is here that it may fit.
pub(crate) fn mark(path: &Path) -> anyhow::Result<String> {
    not_stdin(path)?;
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(format!("predictor of {} bytes, {:08x}", bytes.len(), crc32c::crc32c(&bytes)))
}
