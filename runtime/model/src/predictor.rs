//! The authors' LM-head predictor: two small matrices whose product scores the rows of the head, so that only those worth it are computed.
//!
//! Owns where it is read from: the `model_lm_head.pt` of the published checkpoints, or a GGUF file that holds the two as one tensor. It is
//! kept as Q4_0, as the authors' engine computes with it. What does not fit the model is refused.

use std::cell::Cell;
use std::panic::{UnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Once};

use candle_core::{DType, pickle};
use st_format::same_shape;
use st_gguf::{GgufFile, ModelShape};
use st_kernels::{BLOCK_LEN, WeightType, dequantize_row, quantize_row_q4_0};

use crate::error::ModelError;

/// The tensor that holds both matrices in a GGUF file: `[hidden × (n_embd + n_vocab)]`, all rows of the first, then those of the second.
pub const PREDICTOR_TENSOR: &str = "lm_head_profiler.weight";

/// The widest predictor that is read; published ones have 128.
const MAX_HIDDEN: usize = 4096;
/// A file beyond this is no predictor: that of a vocabulary of a million in 32 bits takes 0.5 GB.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// A predictor of one model.
#[derive(Clone, Debug)]
pub struct Predictor {
    hidden: usize,
    /// Q4_0 rows: `hidden` of `n_embd` weights, then `n_vocab` of `hidden`.
    bytes: Arc<[u8]>,
}

impl Predictor {
    /// Reads the predictor of a model of this shape from a file: PyTorch's (`fc1.weight`, `fc2.weight`) or a GGUF file.
    ///
    /// # Errors
    /// [`ModelError::Predictor`] where there is none or it fits another model; [`ModelError::Gguf`].
    pub fn open(path: &Path, shape: &ModelShape) -> Result<Self, ModelError> {
        let refuse = |problem: String| ModelError::Predictor { path: path.display().to_string(), problem };
        let failed = |error: std::io::Error| refuse(error.to_string());
        let mut start = [0; 4];
        let len = std::fs::metadata(path).map_err(failed)?.len();
        let mut file = std::fs::File::open(path).map_err(failed)?;
        std::io::Read::read(&mut file, &mut start).map_err(failed)?;
        match &start {
            b"GGUF" => {
                let found = Self::in_gguf(&GgufFile::open(path)?, shape)?;
                found.ok_or_else(|| refuse(format!("there is no `{PREDICTOR_TENSOR}` in it")))
            }
            b"PK\x03\x04" if len <= MAX_FILE_BYTES => {
                // The reader of pickles panics on some that are damaged.
                let read = without_panics(|| Self::in_pickle(path, shape));
                read.unwrap_or_else(|| Err("it is damaged".into())).map_err(refuse)
            }
            _ => Err(refuse("it is neither a GGUF file nor one of PyTorch's".into())),
        }
    }

    /// The predictor that a GGUF file holds, if it does.
    ///
    /// # Errors
    /// [`ModelError::Predictor`] where it fits another model; [`ModelError::Gguf`].
    pub fn in_gguf(file: &GgufFile, shape: &ModelShape) -> Result<Option<Self>, ModelError> {
        let Some(tensor) = file.header.tensor(PREDICTOR_TENSOR) else { return Ok(None) };
        let refuse = |problem| ModelError::Predictor { path: file.header.file_name().to_owned(), problem };
        let n = tensor.n_elements();
        if !same_shape(&tensor.shape, &[n]) {
            return Err(refuse(format!("`{PREDICTOR_TENSOR}` has shape {:?}, expected one dimension", tensor.shape)));
        }
        let both = shape.n_embd + shape.n_vocab;
        let hidden = usize::try_from(n).ok().filter(|n| n.is_multiple_of(both)).map_or(0, |n| n / both);
        check_hidden(hidden, shape).map_err(refuse)?;
        let unknown = |_| refuse(format!("`{PREDICTOR_TENSOR}` has type {}", tensor.ty));
        let ty = WeightType::try_from(tensor.ty).map_err(unknown)?;
        let bytes = file.read_tensor(tensor)?;
        let mut floats = vec![0.0; hidden * both];
        dequantize_row(ty, &bytes, &mut floats);
        let bytes = if ty == WeightType::Q4_0 { finite(&floats).map(|()| bytes) } else { quantized(&floats) };
        Ok(Some(Self { hidden, bytes: bytes.map_err(refuse)?.into() }))
    }

    fn in_pickle(path: &Path, shape: &ModelShape) -> Result<Self, String> {
        let shown = |error: candle_core::Error| error.to_string().lines().next().unwrap_or_default().to_owned();
        check_pickle(path)?;
        let tensors = pickle::PthTensors::new(path, None).map_err(shown)?;
        let of = |name: &str| {
            let info = tensors.tensor_infos().get(name).ok_or_else(|| format!("there is no `{name}` in it"))?;
            let dims = info.layout.dims().to_vec();
            let plain = info.layout.is_contiguous() && info.layout.start_offset() == 0;
            let float = matches!(info.dtype, DType::F32 | DType::F16 | DType::BF16);
            match dims[..] {
                [rows, columns] if plain && float => Ok([rows, columns]),
                _ => Err(format!("`{name}` is {:?} of {dims:?}, expected a plain matrix of floats", info.dtype)),
            }
        };
        let ([hidden, n_embd], [n_vocab, again]) = (of("fc1.weight")?, of("fc2.weight")?);
        if (n_embd, n_vocab, again) != (shape.n_embd, shape.n_vocab, hidden) {
            let (want_embd, want_vocab) = (shape.n_embd, shape.n_vocab);
            return Err(format!(
                "its matrices are [{hidden}, {n_embd}] and [{n_vocab}, {again}], expected [N, {want_embd}] and [{want_vocab}, N]"
            ));
        }
        check_hidden(hidden, shape)?;
        let mut bytes = Vec::new();
        for name in ["fc1.weight", "fc2.weight"] {
            let tensor = tensors.get(name).map_err(shown)?.ok_or_else(|| format!("there is no `{name}` in it"))?;
            let floats =
                tensor.to_dtype(DType::F32).and_then(|tensor| tensor.flatten_all()?.to_vec1()).map_err(shown)?;
            bytes.extend(quantized(&floats)?);
        }
        Ok(Self { hidden, bytes: bytes.into() })
    }

    /// Rows of the first matrix, and columns of the second.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// What [`PREDICTOR_TENSOR`] holds in Q4_0.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

fn check_hidden(hidden: usize, shape: &ModelShape) -> Result<(), String> {
    let fits = (1..=MAX_HIDDEN).contains(&hidden) && hidden.is_multiple_of(BLOCK_LEN);
    match fits && shape.n_embd.is_multiple_of(BLOCK_LEN) {
        true => Ok(()),
        false => Err(format!(
            "it is no predictor of a model of {} values and {} tokens: its width has to be a multiple of {BLOCK_LEN} up to {MAX_HIDDEN}",
            shape.n_embd, shape.n_vocab
        )),
    }
}

/// Refuses what is more than a state dict of plain tensors: the ways to build other objects, some of which the reader takes on trust.
fn check_pickle(path: &Path) -> Result<(), String> {
    const NAMES: [&[u8]; 3] = [b"_rebuild_from_type_v2", b"_rebuild_parameter", b"__torch__"];
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    for at in (0..bytes.len()).filter(|&at| bytes[at] == b'_') {
        if let Some(name) = NAMES.into_iter().find(|name| bytes[at..].starts_with(name)) {
            return Err(format!("it holds more than a state dict of tensors: `{}`", name.escape_ascii()));
        }
    }
    Ok(())
}

/// What `read` gives, or `None` where it panics; nothing is printed of that. Panics of other threads are none of its business.
fn without_panics<T>(read: impl FnOnce() -> T + UnwindSafe) -> Option<T> {
    thread_local!(static IS_QUIET: Cell<bool> = const { Cell::new(false) });
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !IS_QUIET.get() {
                before(info);
            }
        }));
    });
    IS_QUIET.set(true);
    let result = catch_unwind(read);
    IS_QUIET.set(false);
    result.ok()
}

fn finite(floats: &[f32]) -> Result<(), String> {
    match floats.iter().find(|float| !float.is_finite()) {
        Some(got) => Err(format!("it holds {got}")),
        None => Ok(()),
    }
}

fn quantized(floats: &[f32]) -> Result<Vec<u8>, String> {
    finite(floats)?;
    let mut bytes = vec![0; floats.len() / BLOCK_LEN * WeightType::Q4_0.block_bytes()];
    quantize_row_q4_0(floats, &mut bytes);
    Ok(bytes)
}
