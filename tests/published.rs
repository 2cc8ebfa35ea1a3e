//! Forms in which other programs write models: fused projections, PowerInfer's own files, weights of few bits.

use std::path::{Path, PathBuf};

use st_bench::synth::encode::{encode_row, row_bytes};
use st_convert::{Layout, WeightType};
use st_format::{Matrix, ModelShape, Tensor};
use st_gguf::{GgmlType, GgufFile, GgufWriter, TensorSpec, WriteOptions, reserve_checksums};
use st_kernels::dequantize_row;
use st_model::LoadOptions;
use tempfile::TempDir;

use crate::program::{arg, run};
use crate::{common, made};

/// A tensor and its bytes.
type Entry = (TensorSpec, Vec<u8>);

/// Writes the file `input` again as `out`, with the tensors that `change` makes of its own.
pub(crate) fn rewrite(input: &Path, out: &Path, change: impl FnOnce(&ModelShape, Vec<Entry>) -> Vec<Entry>) {
    let file = GgufFile::open(input).expect("a model");
    let shape = file.header.model_shape().expect("a shape");
    let entry = |tensor: &st_gguf::TensorInfo| {
        let spec = TensorSpec { name: tensor.name.clone(), shape: tensor.shape.clone(), ty: tensor.ty };
        (spec, file.read_tensor(tensor).expect("a tensor"))
    };
    let entries = change(&shape, file.header.tensors.iter().map(entry).collect());
    let specs: Vec<_> = entries.iter().map(|(spec, _)| spec.clone()).collect();
    let mut metadata = file.header.metadata.clone();
    reserve_checksums(&mut metadata, &specs);
    let options = WriteOptions { alignment: file.header.alignment, overwrite: false };
    let mut writer = GgufWriter::create(out, &metadata, &specs, options).expect("a file");
    entries.iter().for_each(|(_, bytes)| writer.write(bytes).expect("room on the disk"));
    writer.state_checksums(metadata).expect("checksums");
    writer.finish().expect("a file");
}

fn tiny(ty: WeightType) -> PathBuf {
    common::converted(&common::repo("models/tiny/checkpoint"), ty, Layout::Gguf)
}

fn logits(path: &Path) -> Vec<f32> {
    let engine = common::engine(GgufFile::open(path).expect("a model"), &LoadOptions::default());
    common::all_logits(&engine, &(3..60).collect::<Vec<_>>())
}

/// Queries, keys and values of each layer below each other in one tensor.
fn fuse(shape: &ModelShape, mut entries: Vec<Entry>) -> Vec<Entry> {
    for layer in 0..shape.n_layers {
        let mut take = |tensor: Tensor| {
            let at = entries.iter().position(|(spec, _)| spec.name == tensor.name(layer)).expect("a tensor");
            entries.remove(at)
        };
        let [q, k, v] = [Tensor::AttnQ, Tensor::AttnK, Tensor::AttnV].map(&mut take);
        let rows = q.0.shape[1] + k.0.shape[1] + v.0.shape[1];
        let spec =
            TensorSpec { name: format!("blk.{layer}.attn_qkv.weight"), shape: vec![q.0.shape[0], rows], ty: q.0.ty };
        entries.push((spec, [q.1, k.1, v.1].concat()));
    }
    entries
}

#[test]
fn a_fused_projection_is_its_three_parts() {
    let dir = tempfile::tempdir().expect("a folder");
    let (fused, offload) = (dir.path().join("fused.gguf"), dir.path().join("fused-offload.gguf"));
    rewrite(&tiny(WeightType::Q8_0), &fused, fuse);
    run(["layout", arg(&fused), arg(&offload), "--to", "offload"]).ok();
    let expected = logits(&tiny(WeightType::Q8_0));
    assert!(logits(&fused) == expected && logits(&offload) == expected);
    let name = arg(&fused).to_owned();
    run(["quantize", &name, "--q4_0", "--compare", arg(&converted(&dir, &tiny(WeightType::Q8_0), &["--q4_0"]))]).ok();
    // Both forms at once contradict each other.
    let both = dir.path().join("both.gguf");
    rewrite(&tiny(WeightType::Q8_0), &both, |shape, entries| {
        let mut both = entries.clone();
        both.extend(fuse(shape, entries).into_iter().filter(|(spec, _)| spec.name.contains("qkv")));
        both
    });
    run(["run", arg(&both), "-p", "x"]).fails(&["blk.0.attn_qkv.weight", "has no place"]);
}

/// What `quantize` makes of a file with some options.
fn converted(dir: &TempDir, input: &Path, options: &[&str]) -> PathBuf {
    let stem = input.file_stem().expect("a name").to_string_lossy();
    let out = dir.path().join(format!("{stem}{}.gguf", options.concat()));
    let mut args = vec!["quantize", arg(input), "-o", arg(&out)];
    args.extend(options);
    run(args).ok();
    out
}

#[test]
fn few_bits_are_quantized_again_only_where_that_is_asked_for() {
    let dir = tempfile::tempdir().expect("a folder");
    let mixed = made::model(dir.path(), |tensor, layer| match (tensor, layer) {
        (Tensor::FfnDownExps, 1) => WeightType::Q6_K,
        (Tensor::AttnV, _) => WeightType::Q5_K,
        (Tensor::TokenEmbd, _) => WeightType::Q8_0,
        _ => WeightType::Q4_K,
    });
    let refused = run(["quantize", arg(&mixed), "--q4_0", "-o", "x.gguf"]).fails(&[]);
    assert!(refused.stderr.contains("below 8 bits") && refused.hint().contains("--allow-requantize"), "{refused:?}");
    // Floats hold what there is; going on from them is the same.
    let floats = converted(&dir, &mixed, &["--f32"]);
    let [direct, by_floats] =
        [converted(&dir, &mixed, &["--q4_0", "--allow-requantize"]), converted(&dir, &floats, &["--q4_0"])];
    assert!(std::fs::read(&direct).expect("a file") == std::fs::read(by_floats).expect("a file"));
    let read = |path: &Path, name: &str| {
        let file = GgufFile::open(path).expect("a model");
        let tensor = file.header.require_tensor(name).expect("a tensor").clone();
        let mut floats = vec![0.0; tensor.n_elements() as usize];
        dequantize_row(
            WeightType::try_from(tensor.ty).expect("a type"),
            &file.read_tensor(&tensor).expect("it"),
            &mut floats,
        );
        floats
    };
    for name in ["blk.1.ffn_down_exps.weight", "blk.0.attn_v.weight", "output.weight", "token_embd.weight"] {
        assert!(read(&mixed, name) == read(&floats, name), "{name}");
    }
    // What has the type already is copied.
    run(["quantize", arg(&direct), "--q4_0", "--compare", arg(&direct)]).ok();
    run(["quantize", arg(&direct), "--q4_0", "--layout", "offload", "-o", arg(&dir.path().join("packed.gguf"))]).ok();
}

/// Files of floats are what other programs go on from: llama-quantize puts tensors 32 bytes apart whatever a file states.
#[test]
fn files_of_floats_have_the_usual_alignment() {
    for (ty, alignment) in
        [(WeightType::F16, 32), (WeightType::F32, 32), (WeightType::Q8_0, 4096), (WeightType::Q4_0, 4096)]
    {
        assert_eq!(GgufFile::open(tiny(ty)).expect("a model").header.alignment, alignment, "{ty}");
    }
}

/// A file as PowerInfer wants it: down transposed and Q4_0 along the outputs.
fn transpose_down(shape: &ModelShape, mut entries: Vec<Entry>) -> Vec<Entry> {
    for (spec, bytes) in entries.iter_mut().filter(|(spec, _)| spec.name.contains("ffn_down_exps")) {
        let (n_ff, n_embd) = (shape.n_ff, shape.n_embd);
        let floats: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let row = row_bytes(GgmlType::Q4_0, n_embd).expect("whole blocks");
        *bytes = vec![0; row * n_ff * shape.n_experts];
        for (i, out) in bytes.chunks_exact_mut(row).enumerate() {
            let (expert, neuron) = (i / n_ff, i % n_ff);
            let column: Vec<f32> =
                (0..n_embd).map(|output| floats[(expert * n_embd + output) * n_ff + neuron]).collect();
            encode_row(GgmlType::Q4_0, &column, out).expect("a row");
        }
        (spec.ty, spec.shape) = (GgmlType::Q4_0, Tensor::experts(Matrix::Up).ggml_shape(shape));
    }
    entries
}

#[test]
fn a_powerinfer_file_is_told_from_its_plain_twin_and_can_be_converted() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("Tiny.Q4_0.powerinfer.gguf");
    rewrite(&tiny(WeightType::F32), &path, transpose_down);
    for args in [&["run", arg(&path), "-p", "x"][..], &["layout", arg(&path), "x.gguf", "--to", "offload"]] {
        let refused = run(args).fails(&["blk.0.ffn_down_exps.weight", "transposed", "PowerInfer"]);
        assert!(refused.hint().contains("Tiny.Q4_0.gguf"), "{}", refused.hint());
    }
    run(["quantize", arg(&path), "--q4_0", "-o", "x.gguf"]).fails(&["blk.0.ffn_down_exps.weight", "below 8 bits"]);
    let plain = dir.path().join("plain.gguf");
    let written = run(["quantize", arg(&path), "--q8_0", "--allow-requantize", "-o", arg(&plain)]);
    assert!(written.stderr.contains("weights change"), "{}", written.stderr);
    written.ok();
    let packed = dir.path().join("packed.gguf");
    run(["quantize", arg(&path), "--q8_0", "--allow-requantize", "--layout", "offload", "-o", arg(&packed)]).ok();
    assert!(logits(&plain) == logits(&packed));
    // Its down matrices are those of the model, as far as 4 bits go.
    let (file, original) =
        (GgufFile::open(&plain).expect("a model"), GgufFile::open(tiny(WeightType::F32)).expect("it"));
    let floats = |file: &GgufFile, ty| {
        let tensor = file.header.require_tensor("blk.1.ffn_down_exps.weight").expect("a tensor");
        let mut floats = vec![0.0; tensor.n_elements() as usize];
        dequantize_row(ty, &file.read_tensor(tensor).expect("it"), &mut floats);
        floats
    };
    let (got, want) = (floats(&file, WeightType::Q8_0), floats(&original, WeightType::F32));
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|value| value * value).sum::<f32>().sqrt();
    let error = norm(&mut got.iter().zip(&want).map(|(a, b)| a - b)) / norm(&mut want.iter().copied());
    assert!(error < 0.12, "{error}");
}
