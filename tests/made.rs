//! Small models of any weight types, with weights that no quantizer made.

use std::path::{Path, PathBuf};

use st_convert::{Layout, WeightType};
use st_format::{ModelShape, Scope, Tensor};
use st_gguf::{GgmlType, GgufFile, GgufWriter, TensorSpec, WriteOptions, reserve_checksums};

use crate::common;

/// A shape whose rows are whole blocks of every type.
fn shape(n_vocab: usize) -> ModelShape {
    ModelShape {
        n_layers: 3,
        n_embd: 256,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 64,
        n_experts: 6,
        n_experts_used: 2,
        n_ff: 256,
        n_vocab,
        context_length: 512,
        rope_layers: vec![true, false, true],
        windows: vec![None, Some(24), None],
        ..ModelShape::published_4b()
    }
}

/// Writes a model to `folder` whose matrices are of the types that `ty` gives for a tensor and a layer. Norms and routers are F32.
pub(crate) fn model(folder: &Path, ty: impl Fn(Tensor, usize) -> WeightType) -> PathBuf {
    let tokenizer =
        GgufFile::open(common::converted(&common::repo("tests/golden/mini-21b"), WeightType::F32, Layout::Gguf))
            .expect("a model");
    let shape = shape(tokenizer.header.model_shape().expect("a shape").n_vocab);
    let mut metadata = tokenizer.header.metadata.clone();
    for (key, value) in shape.to_metadata() {
        metadata.insert(key, value);
    }
    let mut specs = Vec::new();
    for scope in [Scope::Model, Scope::Layer, Scope::Expert] {
        for layer in 0..if scope == Scope::Model { 1 } else { shape.n_layers } {
            for tensor in Tensor::ALL.into_iter().filter(|tensor| tensor.scope() == scope) {
                let plain = tensor == Tensor::FfnGateInp || tensor.dims(&shape).1.is_none();
                let ty = if plain { GgmlType::F32 } else { ty(tensor, layer).ggml() };
                specs.push((tensor, TensorSpec { name: tensor.name(layer), shape: tensor.ggml_shape(&shape), ty }));
            }
        }
    }
    let only: Vec<TensorSpec> = specs.iter().map(|(_, spec)| spec.clone()).collect();
    reserve_checksums(&mut metadata, &only);
    let path = folder.join("made.gguf");
    let options = WriteOptions { overwrite: true, alignment: 4096 };
    let mut writer = GgufWriter::create(&path, &metadata, &only, options).expect("a file");
    let mut state = 88_172_645_463_325_252;
    for (tensor, spec) in &specs {
        let n = spec.shape.iter().product::<u64>() as usize;
        let around = if tensor.dims(&shape).1.is_none() { 1.0 } else { 0.0 };
        let ty = WeightType::try_from(spec.ty).expect("a type that is computed");
        writer.write(&weights(&mut state, ty, n, around)).expect("room on the disk");
    }
    writer.state_checksums(metadata).expect("checksums");
    writer.finish().expect("a file");
    path
}

/// `n` weights of about 1/16 around a value (which only floats are).
fn weights(state: &mut u64, ty: WeightType, n: usize, around: f32) -> Vec<u8> {
    let mut next = || {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state >> 32
    };
    let mut bytes = vec![0; n / ty.block_len() * ty.block_bytes()];
    // Where f16 scales and minima lie, and how large they have to be.
    let scales: &[(usize, f32)] = match ty {
        WeightType::F32 | WeightType::F16 | WeightType::BF16 => {
            for bytes in bytes.chunks_exact_mut(ty.block_bytes()) {
                let value = around + (next() as u16 as f32 / 32768.0 - 1.0) / 8.0;
                match ty {
                    WeightType::F32 => bytes.copy_from_slice(&value.to_le_bytes()),
                    WeightType::F16 => bytes.copy_from_slice(&half::f16::from_f32(value).to_le_bytes()),
                    _ => bytes.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
                }
            }
            return bytes;
        }
        WeightType::Q4_0 => &[(0, 1.0 / 64.0)],
        WeightType::Q4_1 => &[(0, 1.0 / 64.0), (2, -7.5 / 64.0)],
        WeightType::Q5_0 => &[(0, 1.0 / 128.0)],
        WeightType::Q5_1 => &[(0, 1.0 / 128.0), (2, -15.5 / 128.0)],
        WeightType::Q8_0 => &[(0, 1.0 / 1024.0)],
        WeightType::Q2_K => &[(80, 1.0 / 128.0), (82, 1.5 / 128.0)],
        WeightType::Q3_K => &[(108, 1.0 / 512.0)],
        WeightType::Q4_K => &[(0, 1.0 / 2048.0), (2, 7.5 / 2048.0)],
        WeightType::Q5_K => &[(0, 1.0 / 4096.0), (2, 15.5 / 4096.0)],
        WeightType::Q6_K => &[(208, 1.0 / 16384.0)],
        WeightType::IQ4_NL => &[(0, 1.0 / 1024.0)],
        WeightType::IQ4_XS => &[(0, 1.0 / 16384.0)],
        WeightType::MXFP4 => &[],
    };
    for block in bytes.chunks_exact_mut(ty.block_bytes()) {
        block.fill_with(|| next() as u8);
        if ty == WeightType::MXFP4 {
            block[0] = 120 + (block[0] & 3);
        }
        // The signs of both, so that a minimum still brings values back around 0.
        let sign = if next() & 1 == 0 { 1.0 } else { -1.0 };
        for &(at, scale) in scales {
            block[at..at + 2].copy_from_slice(&half::f16::from_f32(sign * scale).to_le_bytes());
        }
    }
    bytes
}
