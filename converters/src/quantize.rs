//! Rows of weights from one type to another, checked on the way.
//!
//! Owns the promise that no output holds a weight that its input did not mean: NaN and infinity are refused by name and
//! position, and so are weights that the chosen type cannot hold. The bytes of a block are `st-kernels`' business.

use half::f16;
use half::slice::HalfFloatSliceExt;
use st_kernels::{Kernels, SquaredErrors, WeightType, dequantize_row, quantize_row_q8_0};

use crate::error::ConvertError;
use crate::input::{SourceTensor, weight_bytes};

/// Weights that pass through at a time: their floats stay in the first-level cache.
const CHUNK: usize = 4096;

/// Everything from here on rounds to infinity as f16.
const F16_OVERFLOW: f32 = 65520.0;
/// Bits of the first float that rounds to infinity as bfloat16.
const BF16_OVERFLOW_BITS: u32 = 0x7f7f_8000;
/// Bits of infinity; every NaN is above.
const INFINITY_BITS: u32 = 0x7f80_0000;

/// Buffers of one thread.
#[derive(Debug)]
pub(crate) struct Scratch {
    kernels: Kernels,
    floats: Vec<f32>,
    halves: Vec<f16>,
    importance: Vec<f32>,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        Self {
            kernels: Kernels::detect(),
            floats: vec![0.0; CHUNK],
            halves: vec![f16::ZERO; CHUNK],
            importance: Vec::new(),
        }
    }
}

/// What weights are turned into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) ty: WeightType,
    /// For Q4_0: look for each block's best scale instead of taking the reference one.
    pub(crate) search: bool,
}

impl Target {
    /// Bytes of `n` weights, which are whole blocks.
    pub(crate) fn bytes(self, n: usize) -> usize {
        n / self.ty.block_len() * self.ty.block_bytes()
    }
}

/// Converts the weights in `bytes`, which start at weight `first` of `source`, and fills `out`.
/// Both lengths are those of the same number of whole blocks. `importance` is that of each column, for a search. Returns the errors, where
/// scales are searched for; else zeros.
pub(crate) fn convert_weights(
    source: &SourceTensor,
    first: usize,
    bytes: &[u8],
    (target, importance): (Target, Option<&[f32]>),
    scratch: &mut Scratch,
    out: &mut [u8],
) -> Result<SquaredErrors, ConvertError> {
    let mut errors = SquaredErrors::default();
    let in_chunks = bytes.chunks(weight_bytes(source.ty, CHUNK));
    let out_chunks = out.chunks_mut(target.bytes(CHUNK));
    let is_copied = source.ty == target.ty && !target.search;
    for (index, (bytes, out)) in in_chunks.zip(out_chunks).enumerate() {
        let n = out.len() / target.ty.block_bytes() * target.ty.block_len();
        let largest = decode(source.ty, bytes, scratch, n);
        let floats = &scratch.floats[..n];
        // What is copied fits as it is, if it is a number.
        if largest >= INFINITY_BITS || !is_copied && !fits(largest, target.ty) {
            return Err(misfit(source, first + index * CHUNK, floats, target.ty));
        }
        if is_copied {
            out.copy_from_slice(bytes);
        } else {
            let weighed = importance.filter(|_| target.search && target.ty == WeightType::Q4_0);
            errors += match weighed {
                None => encode(scratch.kernels, floats, target, &mut scratch.halves[..n], out),
                Some(columns) => {
                    let start = (first + index * CHUNK) % columns.len();
                    scratch.importance.clear();
                    scratch.importance.extend(columns.iter().cycle().skip(start).take(n));
                    scratch.kernels.quantize_row_q4_0_weighed(floats, &scratch.importance, out)
                }
            };
        }
    }
    Ok(errors)
}

/// Rows `first_row..` of a matrix of `columns` columns, as many as fill `out` with little-endian floats, out of `bytes`, which hold it
/// transposed: row after row of `n_rows` weights of type `ty`.
pub(crate) fn untranspose(
    ty: WeightType,
    bytes: &[u8],
    columns: usize,
    n_rows: usize,
    first_row: usize,
    out: &mut [u8],
) {
    let mut stored = vec![0.0; columns * n_rows];
    dequantize_row(ty, bytes, &mut stored);
    for (i, row) in out.chunks_exact_mut(columns * 4).enumerate() {
        for (column, float) in row.chunks_exact_mut(4).enumerate() {
            float.copy_from_slice(&stored[column * n_rows + first_row + i].to_le_bytes());
        }
    }
}

/// Turns `bytes` into the first `n` floats of the scratch. Returns the largest magnitude among them, as the bits of a
/// float, so that NaN counts as the largest: plain integer loops over the stored form, which compilers turn into a few
/// vector instructions.
fn decode(ty: WeightType, bytes: &[u8], scratch: &mut Scratch, n: usize) -> u32 {
    let floats = &mut scratch.floats[..n];
    match ty {
        WeightType::F32 => {
            for (float, &bytes) in floats.iter_mut().zip(bytes.as_chunks().0) {
                *float = f32::from_le_bytes(bytes);
            }
            largest_float(floats)
        }
        WeightType::BF16 => {
            let stored = bytes.as_chunks().0;
            for (float, &bytes) in floats.iter_mut().zip(stored) {
                *float = f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16);
            }
            u32::from(largest_half(stored)) << 16
        }
        WeightType::F16 => {
            let stored = bytes.as_chunks().0;
            let halves = &mut scratch.halves[..n];
            for (half, &bytes) in halves.iter_mut().zip(stored) {
                *half = f16::from_le_bytes(bytes);
            }
            halves.convert_to_f32_slice(floats);
            f16::from_bits(largest_half(stored)).to_f32().to_bits()
        }
        quantized => {
            dequantize_row(quantized, bytes, floats);
            largest_float(floats)
        }
    }
}

/// The largest of some floats without their signs, as bits.
fn largest_float(floats: &[f32]) -> u32 {
    floats.iter().fold(0, |largest: i32, float| largest.max((float.to_bits() & 0x7fff_ffff) as i32)) as u32
}

/// The largest of some 16-bit floats without their signs, as bits.
fn largest_half(stored: &[[u8; 2]]) -> u16 {
    stored.iter().fold(0, |largest: i16, &bytes| largest.max((u16::from_le_bytes(bytes) & 0x7fff) as i16)) as u16
}

fn encode(kernels: Kernels, floats: &[f32], target: Target, halves: &mut [f16], out: &mut [u8]) -> SquaredErrors {
    match target.ty {
        WeightType::Q4_0 if target.search => return kernels.quantize_row_q4_0_search(floats, out),
        WeightType::Q4_0 => kernels.quantize_row_q4_0(floats, out),
        WeightType::Q8_0 => quantize_row_q8_0(floats, out),
        WeightType::F32 => {
            for (out, float) in out.chunks_exact_mut(4).zip(floats) {
                out.copy_from_slice(&float.to_le_bytes());
            }
        }
        WeightType::F16 => {
            halves.convert_from_f32_slice(floats);
            for (out, half) in out.chunks_exact_mut(2).zip(halves) {
                out.copy_from_slice(&half.to_le_bytes());
            }
        }
        WeightType::BF16 => {
            for (out, float) in out.chunks_exact_mut(2).zip(floats) {
                // Round to nearest even; the values are finite and stay so.
                let bits = float.to_bits();
                let rounded = bits + 0x7fff + (bits >> 16 & 1);
                out.copy_from_slice(&((rounded >> 16) as u16).to_le_bytes());
            }
        }
        ty => unreachable!("{ty} is not written"),
    }
    SquaredErrors::default()
}

/// Whether a weight of this magnitude is a number that `ty` can hold.
fn fits(bits: u32, ty: WeightType) -> bool {
    let magnitude = f32::from_bits(bits);
    let held = match ty {
        WeightType::F32 => true,
        WeightType::F16 => magnitude < F16_OVERFLOW,
        WeightType::BF16 => bits < BF16_OVERFLOW_BITS,
        WeightType::Q4_0 => magnitude / 8.0 < F16_OVERFLOW,
        WeightType::Q8_0 => magnitude / 127.0 < F16_OVERFLOW,
        _ => false,
    };
    bits < INFINITY_BITS && held
}

/// Names the first weight that does not fit; what is no number comes before what is too large.
fn misfit(source: &SourceTensor, first: usize, floats: &[f32], ty: WeightType) -> ConvertError {
    let infinite = floats.iter().position(|float| !float.is_finite());
    let position = infinite.or_else(|| floats.iter().position(|float| !fits(float.abs().to_bits(), ty))).unwrap_or(0);
    let (tensor, value) = (source.name.clone(), floats[position]);
    let index = source.first_weight + (first + position) as u64;
    match infinite {
        Some(_) => ConvertError::NonFinite { tensor, index, value },
        None => ConvertError::TooLarge { tensor, index, value, ty: ty.name() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;
    use safetensors::SafeTensors;
    use st_kernels::quantize_row_q4_0;

    const ALL: [WeightType; 5] = WeightType::WRITTEN;

    fn source(ty: WeightType) -> SourceTensor {
        SourceTensor { name: "t".into(), first_weight: 100, file: 0, range: 0..0, ty, transposed: false }
    }

    fn run(ty: WeightType, bytes: &[u8], n: usize, to: WeightType) -> Result<Vec<u8>, ConvertError> {
        let target = Target { ty: to, search: false };
        let mut out = vec![0; target.bytes(n)];
        convert_weights(&source(ty), 0, bytes, (target, None), &mut Scratch::new(), &mut out)?;
        Ok(out)
    }

    fn as_bytes(ty: WeightType, floats: &[f32]) -> Vec<u8> {
        match ty {
            WeightType::F32 => floats.iter().flat_map(|x| x.to_le_bytes()).collect(),
            WeightType::F16 => floats.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            WeightType::BF16 => floats.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
            WeightType::Q8_0 => {
                let mut out = vec![0; weight_bytes(WeightType::Q8_0, floats.len())];
                quantize_row_q8_0(floats, &mut out);
                out
            }
            other => unreachable!("{other} is not made here"),
        }
    }

    fn wave(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.013).collect()
    }

    #[test]
    fn golden_vectors_pass_through_byte_for_byte() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/quant_vectors.safetensors");
        let file = std::fs::read(path).unwrap();
        let tensors = SafeTensors::deserialize(&file).unwrap();
        let mut seen = 0;
        for name in tensors.names() {
            let Some(case) = name.strip_suffix(".input") else { continue };
            let input = tensors.tensor(name).unwrap();
            let n = input.data().len() / 4;
            for (ty, suffix) in [(WeightType::Q4_0, "q4_0"), (WeightType::Q8_0, "q8_0")] {
                let expected = tensors.tensor(&format!("{case}.{suffix}")).unwrap();
                // The vectors are gguf-py's; ggml's C code, which is followed, gives the scale of zeros a sign.
                if (case, suffix) == ("negative_zeros", "q4_0") {
                    let out = run(WeightType::F32, input.data(), n, ty).unwrap();
                    assert!(out.chunks_exact(18).all(|block| block[..2] == 0x8000_u16.to_le_bytes()));
                    continue;
                }
                match run(WeightType::F32, input.data(), n, ty) {
                    Ok(out) => assert!(out == expected.data(), "{case} {suffix}"),
                    // The reference stores an infinite scale where this converter refuses.
                    Err(error) => assert!(matches!(error, ConvertError::TooLarge { .. }), "{case}: {error}"),
                }
                seen += 1;
            }
        }
        assert!(seen >= 30, "only {seen} golden cases");
    }

    #[test]
    fn every_pair_of_types_agrees_with_the_way_through_floats() {
        let n = 2 * CHUNK + 96;
        let floats = wave(n);
        for from in [WeightType::F32, WeightType::F16, WeightType::BF16, WeightType::Q8_0] {
            let bytes = as_bytes(from, &floats);
            let mut meant = vec![0.0; n];
            dequantize_row(from, &bytes, &mut meant);
            for to in ALL {
                let out = run(from, &bytes, n, to).unwrap();
                let expected = match to {
                    WeightType::F32 => as_bytes(WeightType::F32, &meant),
                    WeightType::F16 => as_bytes(WeightType::F16, &meant),
                    WeightType::BF16 => as_bytes(WeightType::BF16, &meant),
                    WeightType::Q8_0 if from == WeightType::Q8_0 => bytes.clone(),
                    WeightType::Q8_0 => as_bytes(WeightType::Q8_0, &meant),
                    WeightType::Q4_0 => {
                        let mut out = vec![0; n / 32 * 18];
                        quantize_row_q4_0(&meant, &mut out);
                        out
                    }
                    _ => unreachable!("{to} is not written"),
                };
                assert!(out == expected, "{from:?} to {to}");
            }
        }
    }

    #[test]
    fn a_weight_that_is_no_number_is_named() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for ty in [WeightType::F32, WeightType::F16, WeightType::BF16] {
                for to in ALL {
                    let mut floats = wave(CHUNK + 64);
                    floats[CHUNK + 3] = bad;
                    match run(ty, &as_bytes(ty, &floats), floats.len(), to).unwrap_err() {
                        ConvertError::NonFinite { tensor, index, .. } => {
                            assert_eq!((tensor.as_str(), index), ("t", 100 + CHUNK as u64 + 3));
                        }
                        other => panic!("{other}"),
                    }
                }
            }
        }
        let mut blocks = as_bytes(WeightType::Q8_0, &wave(64));
        blocks[34..36].copy_from_slice(&f16::NAN.to_le_bytes());
        for to in ALL {
            assert!(matches!(run(WeightType::Q8_0, &blocks, 64, to), Err(ConvertError::NonFinite { index: 132, .. })));
        }
    }

    #[test]
    fn a_weight_that_the_type_cannot_hold_is_named() {
        let limits = [(WeightType::F16, 65519.0, 65520.0), (WeightType::Q4_0, 524_000.0, 524_160.0)];
        for (to, fits, overflows) in limits.into_iter().chain([(WeightType::BF16, 3.389e38, 3.4e38)]) {
            let mut floats = wave(64);
            floats[40] = fits;
            let out = run(WeightType::F32, &as_bytes(WeightType::F32, &floats), 64, to).unwrap();
            let mut back = vec![0.0; 64];
            dequantize_row(to, &out, &mut back);
            assert!(back.iter().all(|x| x.is_finite()));
            floats[40] = -overflows;
            let error = run(WeightType::F32, &as_bytes(WeightType::F32, &floats), 64, to).unwrap_err();
            assert!(matches!(error, ConvertError::TooLarge { index: 140, .. }), "{error}");
        }
    }
}
