//! Which type llama-quantize gives to which tensor, and files made so.
//!
//! The rules are those of llama.cpp's `src/llama-quant.cpp` for models of this kind: grouped heads, a mixture of experts.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use st_gguf::{GgmlType, GgufFile, GgufWriter, ModelShape, WriteOptions, reserve_checksums};
use st_kernels::{WeightType, dequantize_row};

use super::encode::{encode_row, row_bytes};
use super::recipe::Tensor as Weight;

pub use st_format::Tensor;

/// A kind of file: what llama-quantize calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    name: &'static str,
    /// Embedding, gate, up, query and key.
    base: GgmlType,
    /// The head, or the embedding where there is no other head.
    head: GgmlType,
    value: Choice,
    attention_output: GgmlType,
    down: Choice,
}

/// A type that depends on the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    Always(GgmlType),
    /// In the first `layers / divisor` layers another.
    First {
        divisor: usize,
        early: GgmlType,
        later: GgmlType,
    },
    /// In the first four layers, or the first two, another.
    Count {
        count: usize,
        early: GgmlType,
        later: GgmlType,
    },
    /// In the first and the last eighth and in every third layer between another.
    More {
        more: GgmlType,
        less: GgmlType,
    },
}

impl Choice {
    fn of(self, layer: usize, n_layers: usize) -> GgmlType {
        let eighth = n_layers / 8;
        let (holds, [yes, no]) = match self {
            Self::Always(ty) => (true, [ty; 2]),
            Self::First { divisor, early, later } => (layer < n_layers / divisor, [early, later]),
            Self::Count { count, early, later } => (layer < count, [early, later]),
            Self::More { more, less } => {
                let edge = layer < eighth || layer >= 7 * n_layers / 8;
                (edge || (layer - eighth) % 3 == 2, [more, less])
            }
        };
        if holds { yes } else { no }
    }
}

impl Mix {
    /// Everything of one type.
    pub const fn pure(ty: GgmlType) -> Self {
        let (value, down) = (Choice::Always(ty), Choice::Always(ty));
        Self { name: "pure", base: ty, head: ty, value, attention_output: ty, down }
    }

    /// The kind of this name, such as `q4_k_m`; `q4_0-imatrix` is what a Q4_0 file is where an importance matrix was given.
    ///
    /// # Errors
    /// A name that is none.
    pub fn named(name: &str) -> Result<Self> {
        let found = Self::all().into_iter().find(|mix| mix.name == name);
        found.with_context(|| {
            let names: Vec<_> = Self::all().iter().map(|mix| mix.name).collect();
            format!("`{name}` is none of {}", names.join(", "))
        })
    }

    /// What it is called.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Every kind that has a name.
    #[rustfmt::skip]
    pub fn all() -> Vec<Self> {
        use Choice::{Always, Count, First, More};
        use GgmlType::*;
        let mix = |name, base, head, value, attention_output, down| Self { name, base, head, value, attention_output, down };
        let plain = |name, ty, head| mix(name, ty, head, Always(ty), ty, Always(ty));
        let eighth = |early, later| First { divisor: 8, early, later };
        vec![
            plain("q4_0-pure", Q4_0, Q4_0),
            plain("f16", F16, F16),
            plain("bf16", BF16, BF16),
            plain("q4_0", Q4_0, Q6_K),
            plain("q4_1", Q4_1, Q6_K),
            plain("q5_0", Q5_0, Q6_K),
            plain("q5_1", Q5_1, Q6_K),
            plain("q8_0", Q8_0, Q8_0),
            plain("q6_k", Q6_K, Q6_K),
            plain("q3_k_s", Q3_K, Q6_K),
            plain("q5_k_s", Q5_K, Q6_K),
            mix("q4_0-imatrix", Q4_0, Q6_K, Always(Q4_0), Q4_0, eighth(Q4_1, Q4_0)),
            mix("q2_k", Q2_K, Q6_K, Always(Q4_K), Q3_K, Always(Q3_K)),
            mix("q3_k_m", Q3_K, Q6_K, Count { count: 2, early: Q5_K, later: Q4_K }, Q4_K, First { divisor: 16, early: Q5_K, later: Q4_K }),
            mix("q4_k_s", Q4_K, Q6_K, Count { count: 4, early: Q5_K, later: Q4_K }, Q4_K, eighth(Q5_K, Q4_K)),
            mix("q4_k_m", Q4_K, Q6_K, More { more: Q6_K, less: Q4_K }, Q4_K, More { more: Q6_K, less: Q4_K }),
            mix("q5_k_m", Q5_K, Q6_K, More { more: Q6_K, less: Q5_K }, Q5_K, More { more: Q6_K, less: Q5_K }),
            mix("iq4_nl", IQ4_NL, Q6_K, Always(Q5_K), IQ4_NL, eighth(Q5_K, IQ4_NL)),
            mix("iq4_xs", IQ4_XS, Q6_K, Always(Q5_K), IQ4_XS, eighth(Q5_K, IQ4_XS)),
            // One kind of expert matrix and some of attention in 16 bit, as some files with types for single tensors are.
            mix("bf16_q8_0", Q8_0, BF16, Always(Q8_0), BF16, Always(BF16)),
        ]
    }

    /// The type of a tensor in a model of `n_layers` layers, with or without a head beside the embedding.
    pub fn type_of(&self, tensor: Tensor, layer: usize, n_layers: usize, has_head: bool) -> GgmlType {
        match tensor {
            Tensor::OutputNorm | Tensor::AttnNorm | Tensor::FfnNorm | Tensor::FfnGateInp => GgmlType::F32,
            Tensor::Output => self.head,
            Tensor::TokenEmbd if !has_head => self.head,
            Tensor::TokenEmbd | Tensor::AttnQ | Tensor::AttnK | Tensor::FfnGateExps | Tensor::FfnUpExps => self.base,
            Tensor::AttnV => self.value.of(layer, n_layers),
            Tensor::AttnOutput => self.attention_output,
            Tensor::FfnDownExps => self.down.of(layer, n_layers),
        }
    }
}

/// What llama-quantize falls back to where rows of `columns` weights are no whole blocks of `ty`.
pub fn fitting(ty: GgmlType, columns: usize) -> GgmlType {
    use GgmlType::*;
    let fits = |ty: GgmlType| ty.bytes_for_shape(&[columns as u64]).is_some();
    let smaller = match ty {
        _ if fits(ty) => return ty,
        IQ4_XS => IQ4_NL,
        Q2_K | Q3_K => Q4_0,
        Q4_K => Q5_0,
        Q5_K => Q5_1,
        Q6_K => Q8_0,
        _ => F16,
    };
    if fits(smaller) { smaller } else { F16 }
}

/// The tensor of a model that a weight of a synthetic one belongs to.
pub fn tensor_of(weight: &Weight) -> Tensor {
    use super::recipe::Kind;
    match weight.kind {
        Kind::Embedding => Tensor::TokenEmbd,
        Kind::Head => Tensor::Output,
        Kind::FinalNorm => Tensor::OutputNorm,
        Kind::AttentionNorm => Tensor::AttnNorm,
        Kind::FfnNorm => Tensor::FfnNorm,
        Kind::Query => Tensor::AttnQ,
        Kind::Key => Tensor::AttnK,
        Kind::Value => Tensor::AttnV,
        Kind::Output => Tensor::AttnOutput,
        Kind::Router => Tensor::FfnGateInp,
        Kind::Gate => Tensor::FfnGateExps,
        Kind::Up => Tensor::FfnUpExps,
        Kind::Down => Tensor::FfnDownExps,
    }
}

/// The tensor of this name, and its layer.
fn tensor_named(name: &str, shape: &ModelShape) -> Option<(Tensor, usize)> {
    let layers = 0..shape.n_layers;
    layers
        .flat_map(|layer| Tensor::ALL.map(|tensor| (tensor, layer)))
        .find(|(tensor, layer)| tensor.name(*layer) == name)
}

/// Writes the GGUF file `input`, whose weights are in the `gguf` layout, again as `out`, the tensors of the types that `type_of` chooses
/// (or those that fit instead, see [`fitting`]).
///
/// # Errors
/// Whatever reading and writing says; types that are not read or not made here.
pub fn remix(input: &Path, out: &Path, type_of: &dyn Fn(Tensor, usize) -> GgmlType) -> Result<()> {
    let file = GgufFile::open(input)?;
    let shape = file.header.model_shape()?;
    let mut specs = Vec::new();
    for tensor in &file.header.tensors {
        let Some((which, layer)) = tensor_named(&tensor.name, &shape) else { bail!("{} has no place", tensor.name) };
        let ty = fitting(type_of(which, layer), tensor.shape[0] as usize);
        specs.push(st_gguf::TensorSpec { name: tensor.name.clone(), shape: tensor.shape.clone(), ty });
    }
    let mut metadata = file.header.metadata.clone();
    reserve_checksums(&mut metadata, &specs);
    let options = WriteOptions { alignment: file.header.alignment, overwrite: false };
    let mut writer = GgufWriter::create(out, &metadata, &specs, options)?;
    for (tensor, spec) in file.header.tensors.iter().zip(&specs) {
        let (from, columns) = (WeightType::try_from(tensor.ty)?, tensor.shape[0] as usize);
        let (row_in, row_out) = (row_bytes(tensor.ty, columns)?, row_bytes(spec.ty, columns)?);
        let bytes = file.read_tensor(tensor)?;
        ensure!(bytes.len().is_multiple_of(row_in), "{} is not whole rows", tensor.name);
        let mut encoded = vec![0; bytes.len() / row_in * row_out];
        encoded.par_chunks_mut(row_out).zip(bytes.par_chunks(row_in)).try_for_each(|(out, bytes)| {
            let mut row = vec![0.0; columns];
            dequantize_row(from, bytes, &mut row);
            encode_row(spec.ty, &row, out)
        })?;
        writer.write(&encoded)?;
    }
    writer.state_checksums(metadata)?;
    Ok(writer.finish()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mixes_are_those_of_the_4b_and_the_21b() {
        let mix = Mix::named("q4_k_m").unwrap();
        let more =
            |n: usize| (0..n).filter(move |&layer| mix.type_of(Tensor::FfnDownExps, layer, n, true) == GgmlType::Q6_K);
        assert_eq!(more(32).collect::<Vec<_>>(), [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]);
        assert_eq!((more(52).count(), more(52).next_back()), (26, Some(51)));
        assert_eq!(mix.type_of(Tensor::TokenEmbd, 0, 32, true), GgmlType::Q4_K);
        assert_eq!(mix.type_of(Tensor::TokenEmbd, 0, 32, false), GgmlType::Q6_K);
        let early = Mix::named("q4_0-imatrix").unwrap();
        let count =
            (0..32).filter(|&layer| early.type_of(Tensor::FfnDownExps, layer, 32, true) == GgmlType::Q4_1).count();
        assert_eq!(count, 4);
        assert!(Mix::named("q9").is_err());
        assert_eq!(fitting(GgmlType::Q4_K, 192), GgmlType::Q5_0);
        assert_eq!(fitting(GgmlType::Q6_K, 40), GgmlType::F16);
    }
}
