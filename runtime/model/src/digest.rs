//! What tells a model from every other, whatever file it lies in: hashes of its shape and of its tensors' values.
//!
//! A tensor's values are hashed as a GGUF file in the default layout has them: rows of blocks, unpacked where they lie packed,
//! queries, keys and values apart where they are fused, a head that repeats the embedding left out. So files in both layouts, split or whole,
//! with or without checksums, aligned in whatever way and with other keys beside those of the shape are one model; a weight that
//! differs in a bit makes another.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use sha2::{Digest as _, Sha256};
use st_format::{Gating, Matrix, ModelShape, Scope, Tensor};
use st_gguf::GgufFile;

use crate::error::ModelError;
use crate::progress::LoadProgress;
use crate::weights::TensorSource;

/// Bytes that are read at once of a tensor that holds no experts, about.
const READ_BYTES: usize = 256 << 10;

/// A SHA-256.
pub type Hash = [u8; 32];

/// The hashes of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelDigest {
    /// The numbers of its shape, by name.
    pub shape: Vec<(&'static str, String)>,
    /// Its tensors, those of the whole model first, then layer by layer.
    pub tensors: Vec<TensorDigest>,
}

/// The hashes of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorDigest {
    /// Its name in the default layout.
    pub name: String,
    /// The type of its values.
    pub ty: &'static str,
    /// One of all of it; of a tensor that stacks experts' matrices one of each.
    pub parts: Vec<Hash>,
}

/// What one thread hashes at a time.
#[derive(Clone, Copy)]
enum Unit {
    Tensor(Tensor, usize),
    Expert(usize, usize),
}

impl ModelDigest {
    /// Reads and hashes all of `file`, on so many threads; `progress` hears of bytes and may stop it.
    ///
    /// # Errors
    /// Where it is no complete model, cannot be read, or is damaged by its own checksums; [`ModelError::Cancelled`].
    pub fn of(file: &GgufFile, threads: usize, progress: &dyn LoadProgress) -> Result<Self, ModelError> {
        let config = file.header.model_shape()?;
        let source = TensorSource::new(file, &config, progress)?;
        let units = units(&source, &config);
        let next = AtomicUsize::new(0);
        let work = || -> Result<Vec<(usize, Vec<Hash>)>, ModelError> {
            let mut done = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(&unit) = units.get(index) else { return Ok(done) };
                done.push((index, hashes(&source, &config, unit, progress)?));
            }
        };
        let mut all = thread::scope(|scope| {
            let helpers: Vec<_> = (1..threads.max(1))
                // A thread that cannot be had leaves its share to the others.
                .filter_map(|_| thread::Builder::new().spawn_scoped(scope, work).ok())
                .collect();
            let mut all = work();
            for helper in helpers {
                let more = helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                all = all.and_then(|mut all| {
                    all.extend(more?);
                    Ok(all)
                });
            }
            all
        })?;
        all.sort_unstable_by_key(|(index, _)| *index);
        let hashed = units.iter().copied().zip(all.into_iter().map(|(_, hashes)| hashes));
        Ok(Self { shape: shape(&config), tensors: tensors(&source, hashed)? })
    }

    /// The hash of all of it.
    pub fn sha256(&self) -> Hash {
        let mut all = Sha256::new();
        for (name, value) in &self.shape {
            all.update(format!("{name}={value}\n"));
        }
        for TensorDigest { name, ty, parts } in &self.tensors {
            all.update(format!("{name} {ty} {}\n", parts.len()));
            parts.iter().for_each(|part| all.update(part));
        }
        all.finalize().into()
    }
}

/// The numbers that say how tensors are computed.
fn shape(config: &ModelShape) -> Vec<(&'static str, String)> {
    let ModelShape { n_layers, n_embd, n_heads, n_kv_heads, head_dim, n_experts, n_experts_used, .. } = *config;
    let gating = match config.gating {
        Gating::Softmax => "softmax",
        Gating::Sigmoid => "sigmoid",
    };
    let rope = config.rope_layers.iter().map(|&rope| if rope { '1' } else { '0' }).collect();
    let windows: Vec<String> = config.windows.iter().map(|window| window.unwrap_or(0).to_string()).collect();
    let mut shape: Vec<(&'static str, String)> = [
        ("layers", n_layers),
        ("embedding", n_embd),
        ("heads", n_heads),
        ("key/value heads", n_kv_heads),
        ("head width", head_dim),
        ("experts", n_experts),
        ("experts used", n_experts_used),
        ("neurons", config.n_ff),
        ("vocabulary", config.n_vocab),
    ]
    .map(|(name, number)| (name, number.to_string()))
    .into();
    shape.extend([
        ("norm epsilon", config.rms_eps.to_string()),
        ("rope theta", config.rope_theta.to_string()),
        ("gating", gating.to_owned()),
        ("rope layers", rope),
        ("windows", windows.join(",")),
    ]);
    shape
}

fn units(source: &TensorSource<'_>, config: &ModelShape) -> Vec<Unit> {
    let of = |scope| Tensor::ALL.into_iter().filter(move |tensor| tensor.scope() == scope);
    let of_model = of(Scope::Model).filter(|&tensor| tensor != Tensor::Output || source.has_head());
    let of_layer = |layer| {
        let experts = (0..config.n_experts).map(move |expert| Unit::Expert(layer, expert));
        of(Scope::Layer).map(move |tensor| Unit::Tensor(tensor, layer)).chain(experts)
    };
    of_model.map(|tensor| Unit::Tensor(tensor, 0)).chain((0..config.n_layers).flat_map(of_layer)).collect()
}

fn hashes(
    source: &TensorSource<'_>,
    config: &ModelShape,
    unit: Unit,
    progress: &dyn LoadProgress,
) -> Result<Vec<Hash>, ModelError> {
    match unit {
        Unit::Expert(layer, expert) => {
            let matrices = source.expert_canonical(layer, expert)?;
            progress.loaded(matrices.iter().map(|bytes| bytes.len() as u64).sum());
            Ok(matrices.iter().map(|bytes| Sha256::digest(bytes).into()).collect())
        }
        Unit::Tensor(tensor, layer) => {
            let name = tensor.name(layer);
            let (columns, rows) = tensor.dims(config);
            let (ty, rows) = (source.weight_type(&name)?, rows.unwrap_or(1));
            let blocks = || ModelError::Blocks { name: name.clone(), ty: ty.name(), n_in: columns };
            let row_bytes = ty.row_bytes(columns).ok_or_else(blocks)?;
            let step = (READ_BYTES / row_bytes.max(1)).max(1);
            let (mut hash, mut buffer) = (Sha256::new(), vec![0; step.min(rows) * row_bytes]);
            for start in (0..rows).step_by(step) {
                let bytes = &mut buffer[..step.min(rows - start) * row_bytes];
                source.read_rows(&name, start, row_bytes, bytes)?;
                hash.update(bytes);
            }
            Ok(vec![hash.finalize().into()])
        }
    }
}

/// The units put together: the matrices of a layer's experts stand in three tensors.
fn tensors(
    source: &TensorSource<'_>,
    hashed: impl Iterator<Item = (Unit, Vec<Hash>)>,
) -> Result<Vec<TensorDigest>, ModelError> {
    let mut tensors: Vec<TensorDigest> = Vec::new();
    for (unit, parts) in hashed {
        match unit {
            Unit::Tensor(tensor, layer) => {
                let name = tensor.name(layer);
                tensors.push(TensorDigest { ty: source.weight_type(&name)?.name(), name, parts });
            }
            Unit::Expert(layer, expert) => {
                if expert == 0 {
                    let format = &source.formats()[layer];
                    tensors.extend(Matrix::ALL.map(|matrix| TensorDigest {
                        name: Tensor::experts(matrix).name(layer),
                        ty: format.type_of(matrix).name(),
                        parts: Vec::new(),
                    }));
                }
                let first = tensors.len() - Matrix::ALL.len();
                tensors[first..].iter_mut().zip(parts).for_each(|(tensor, part)| tensor.parts.push(part));
            }
        }
    }
    Ok(tensors)
}
