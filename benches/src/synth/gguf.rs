//! Writes a synthetic model directly as a GGUF file of Q4_0 weights (norms and routers F32), with the same weights and
//! keys that converting the BF16 checkpoint gives.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use st_gguf::{
    GgmlType, GgufWriter, Layout, Matrix, Metadata, StringArray, TensorSpec, Value, WriteOptions, describe_records,
    reserve_checksums, tensor_names,
};
use st_kernels::{ExpertFormat, WeightType};

use super::recipe::{Kind, Recipe, Tensor};
use super::shape::Shape;
use super::stream::{Encoding, Part, encode_rows, parts, pipeline};
use super::vocab::{CHAT_TEMPLATE, Pieces};

/// Tensors start on pages.
const ALIGNMENT: u64 = 4096;
/// Experts whose records are made at a time.
const RECORDS: usize = 8;
/// Expert matrices in file order.
const MATRICES: [(Matrix, Kind); 3] = [(Matrix::Gate, Kind::Gate), (Matrix::Up, Kind::Up), (Matrix::Down, Kind::Down)];

/// One piece of the file's data.
enum Item<'a> {
    /// Rows of one tensor.
    Rows(Part<'a>),
    /// Records of some experts of a layer: gate, up and down of each.
    Records(Vec<[&'a Tensor; 3]>),
}

/// Writes `path` in the given layout, replacing it only where `overwrite` says so.
///
/// # Errors
/// Whatever the writer says; shapes that have no expert record.
pub fn write_gguf(
    recipe: &Recipe,
    layout: Layout,
    path: &Path,
    overwrite: bool,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<()> {
    let shape = recipe.shape();
    let tensors = recipe.tensors();
    let format = ExpertFormat::new(WeightType::Q4_0, shape.n_embd, shape.n_ff).context("cannot lay out experts")?;
    let mut metadata = metadata(recipe)?;
    let mut specs = Vec::new();
    let mut items = Vec::new();
    plan_dense(&tensors, &mut specs, &mut items);
    match layout {
        Layout::Gguf => plan_stacked(shape, &tensors, &mut specs, &mut items),
        Layout::Offload => {
            plan_records(shape, &tensors, &format, &mut specs, &mut items);
            let starts = Matrix::ALL.map(|matrix| format.region(matrix).start as u64);
            describe_records(&mut metadata, GgmlType::Q4_0, format.record_bytes() as u64, starts);
        }
    }
    reserve_checksums(&mut metadata, &specs);
    let options = WriteOptions { overwrite, alignment: ALIGNMENT };
    let mut writer = GgufWriter::create(path, &metadata, &specs, options)?;
    let make = |item: Item<'_>, buffer: &mut Vec<u8>| {
        match item {
            Item::Rows(part) => encode_rows(recipe, part.tensor, part.rows, part.encoding, buffer),
            Item::Records(experts) => encode_records(recipe, &format, &experts, buffer),
        }
        Ok(())
    };
    pipeline(items.into_iter(), make, |bytes| {
        progress(bytes.len() as u64);
        writer.write(bytes).context("cannot write the file")
    })?;
    writer.state_checksums(metadata)?;
    writer.finish().context("cannot complete the file")
}

/// All that is always resident.
fn plan_dense<'a>(tensors: &'a [Tensor], specs: &mut Vec<TensorSpec>, items: &mut Vec<Item<'a>>) {
    for tensor in tensors {
        let Some(name) = dense_name(tensor) else { continue };
        let vector = matches!(tensor.kind, Kind::FinalNorm | Kind::AttentionNorm | Kind::FfnNorm);
        let float = vector || tensor.kind == Kind::Router;
        let mut ne = vec![tensor.cols as u64];
        if !vector {
            ne.push(tensor.rows as u64);
        }
        let (ty, encoding) = if float { (GgmlType::F32, Encoding::F32) } else { (GgmlType::Q4_0, Encoding::Q4_0) };
        specs.push(TensorSpec { name, shape: ne, ty });
        items.extend(parts(tensor, encoding).map(Item::Rows));
    }
}

/// The experts of one kind and layer.
fn experts_of(tensors: &[Tensor], layer: usize, kind: Kind) -> impl Iterator<Item = &Tensor> {
    tensors.iter().filter(move |t| t.kind == kind && t.layer == layer)
}

/// Experts as three stacked tensors per layer.
fn plan_stacked<'a>(shape: &Shape, tensors: &'a [Tensor], specs: &mut Vec<TensorSpec>, items: &mut Vec<Item<'a>>) {
    for layer in 0..shape.n_layers {
        for (matrix, kind) in MATRICES {
            let Some(first) = experts_of(tensors, layer, kind).next() else { continue };
            let ne = vec![first.cols as u64, first.rows as u64, shape.n_experts as u64];
            specs.push(TensorSpec { name: tensor_names::stacked(layer, matrix), shape: ne, ty: GgmlType::Q4_0 });
            let experts = experts_of(tensors, layer, kind);
            items.extend(experts.flat_map(|tensor| parts(tensor, Encoding::Q4_0)).map(Item::Rows));
        }
    }
}

/// Experts as one tensor of records per layer.
fn plan_records<'a>(
    shape: &Shape,
    tensors: &'a [Tensor],
    format: &ExpertFormat,
    specs: &mut Vec<TensorSpec>,
    items: &mut Vec<Item<'a>>,
) {
    for layer in 0..shape.n_layers {
        let ne = vec![format.record_bytes() as u64, shape.n_experts as u64];
        specs.push(TensorSpec { name: tensor_names::packed(layer), shape: ne, ty: GgmlType::I8 });
        let [gate, up, down] = MATRICES.map(|(_, kind)| experts_of(tensors, layer, kind));
        let experts: Vec<[&Tensor; 3]> = gate.zip(up).zip(down).map(|((gate, up), down)| [gate, up, down]).collect();
        items.extend(experts.chunks(RECORDS).map(|some| Item::Records(some.to_vec())));
    }
}

/// Appends the records of `experts` to `out`.
fn encode_records(recipe: &Recipe, format: &ExpertFormat, experts: &[[&Tensor; 3]], out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + experts.len() * format.record_bytes(), 0);
    let records = out[start..].par_chunks_mut(format.record_bytes());
    records.zip(experts).for_each(|(record, matrices)| {
        let [gate, up, down] = matrices.map(|tensor| {
            let mut bytes = Vec::new();
            encode_rows(recipe, tensor, 0..tensor.rows, Encoding::Q4_0, &mut bytes);
            bytes
        });
        format.pack_record(&gate, &up, &down, record);
    });
}

/// The name of a tensor that is no expert's.
fn dense_name(tensor: &Tensor) -> Option<String> {
    let layer = |part: &str| Some(format!("blk.{}.{part}.weight", tensor.layer));
    match tensor.kind {
        Kind::Embedding => Some("token_embd.weight".into()),
        Kind::Head => Some("output.weight".into()),
        Kind::FinalNorm => Some("output_norm.weight".into()),
        Kind::AttentionNorm => layer("attn_norm"),
        Kind::FfnNorm => layer("ffn_norm"),
        Kind::Query => layer("attn_q"),
        Kind::Key => layer("attn_k"),
        Kind::Value => layer("attn_v"),
        Kind::Output => layer("attn_output"),
        Kind::Router => layer("ffn_gate_inp"),
        Kind::Gate | Kind::Up | Kind::Down => None,
    }
}

fn metadata(recipe: &Recipe) -> Result<Metadata> {
    let (s, vocab) = (recipe.shape(), recipe.vocab());
    let mut out = Metadata::new();
    out.insert("general.architecture", "smallthinker");
    out.insert("general.type", "model");
    out.insert("general.name", s.name.as_str());
    out.insert("general.file_type", 2_u32);
    out.insert("general.quantization_version", 2_u32);
    let mut put = |key: &str, value: Value| out.insert(format!("smallthinker.{key}"), value);
    let n = |value: usize| Value::U32(value as u32);
    put("block_count", n(s.n_layers));
    put("context_length", n(s.context));
    put("embedding_length", n(s.n_embd));
    put("feed_forward_length", n(s.n_ff));
    put("expert_feed_forward_length", n(s.n_ff));
    put("expert_count", n(s.n_experts));
    put("expert_used_count", n(s.n_experts_used));
    put("expert_gating_func", n(if s.softmax { 1 } else { 2 }));
    put("vocab_size", n(s.vocab));
    put("attention.head_count", n(s.n_heads));
    put("attention.head_count_kv", n(s.n_kv_heads));
    put("attention.key_length", n(s.head_dim));
    put("attention.value_length", n(s.head_dim));
    put("attention.layer_norm_rms_epsilon", Value::F32(s.rms_eps as f32));
    put("rope.freq_base", Value::F32(s.rope_theta as f32));
    put("rope.dimension_count", n(s.head_dim));
    put("rope.layer_pattern", s.rope.clone().into());
    if s.windowed.contains(&true) {
        put("attention.sliding_window", n(s.window));
        put("attention.sliding_window_pattern", s.windowed.clone().into());
    }
    let pieces = Pieces::build(vocab, 0);
    let mut tokens = StringArray::with_capacity(vocab.total);
    let mut types = Vec::with_capacity(vocab.total);
    for (token, kind) in pieces.typed() {
        ensure!(tokens.push(&token), "the vocabulary is too large");
        types.push(kind);
    }
    let mut merges = StringArray::with_capacity(pieces.merges.len());
    for line in pieces.merge_lines() {
        ensure!(merges.push(&line), "there are too many merges");
    }
    out.insert("tokenizer.ggml.model", "gpt2");
    out.insert("tokenizer.ggml.pre", "qwen2");
    out.insert("tokenizer.ggml.tokens", tokens);
    out.insert("tokenizer.ggml.token_type", types);
    out.insert("tokenizer.ggml.merges", merges);
    out.insert("tokenizer.ggml.bos_token_id", vocab.end_of_text() as u32);
    out.insert("tokenizer.ggml.eos_token_id", vocab.turn_end() as u32);
    out.insert("tokenizer.ggml.padding_token_id", vocab.end_of_text() as u32);
    out.insert("tokenizer.ggml.eos_token_ids", vec![vocab.turn_end() as u32, vocab.end_of_text() as u32]);
    out.insert("tokenizer.ggml.add_bos_token", false);
    out.insert("tokenizer.chat_template", CHAT_TEMPLATE);
    // Stated here so that it comes before the layout's keys, as where an existing file is rearranged.
    out.insert("general.alignment", ALIGNMENT as u32);
    Ok(out)
}
