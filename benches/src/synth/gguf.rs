//! Writes a synthetic model directly as a GGUF file, its weights of one type or mixed as llama-quantize mixes them; in Q4_0 with the
//! same weights and keys that converting the BF16 checkpoint gives.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use st_gguf::{
    GgmlType, GgufWriter, Layout, Matrix, Metadata, RecordLayout, StringArray, TensorSpec, WriteOptions,
    describe_records, reserve_checksums, tensor_names,
};
use st_kernels::{ExpertFormat, WeightType};

use super::mix::{Mix, fitting, tensor_of};
use super::recipe::{Kind, Recipe, Tensor};
use super::stream::{Part, encode_rows, parts, pipeline};
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

/// What the file will be.
struct Plan<'a> {
    recipe: &'a Recipe,
    mix: &'a Mix,
    tensors: &'a [Tensor],
    specs: Vec<TensorSpec>,
    items: Vec<Item<'a>>,
}

/// Writes `path` with weights as `mix` has them, in the given layout, replacing it only where `overwrite` says so.
///
/// # Errors
/// Whatever the writer says; shapes that have no expert record, and types that are not computed, in the `offload` layout.
pub fn write_gguf(
    recipe: &Recipe,
    mix: &Mix,
    layout: Layout,
    path: &Path,
    overwrite: bool,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<()> {
    let tensors = recipe.tensors();
    let mut plan = Plan { recipe, mix, tensors: &tensors, specs: Vec::new(), items: Vec::new() };
    let mut metadata = metadata(recipe)?;
    plan.dense();
    let formats = match layout {
        Layout::Gguf => {
            plan.stacked();
            Vec::new()
        }
        Layout::Offload => plan.records(&mut metadata)?,
    };
    let Plan { specs, items, .. } = plan;
    reserve_checksums(&mut metadata, &specs);
    let options = WriteOptions { overwrite, alignment: ALIGNMENT };
    let mut writer = GgufWriter::create(path, &metadata, &specs, options)?;
    let make = |item: Item<'_>, buffer: &mut Vec<u8>| match item {
        Item::Rows(part) => encode_rows(recipe, part.tensor, part.rows, part.ty, buffer),
        Item::Records(experts) => encode_records(recipe, &formats[experts[0][0].layer], &experts, buffer),
    };
    pipeline(items.into_iter(), make, |bytes| {
        progress(bytes.len() as u64);
        writer.write(bytes).context("cannot write the file")
    })?;
    writer.state_checksums(metadata)?;
    writer.finish().context("cannot complete the file")
}

impl<'a> Plan<'a> {
    /// The type of a weight, as far as its rows allow.
    fn type_of(&self, weight: &Tensor) -> GgmlType {
        let shape = self.recipe.shape();
        fitting(self.mix.type_of(tensor_of(weight), weight.layer, shape.n_layers, !shape.tied), weight.cols)
    }

    /// All that is always resident.
    fn dense(&mut self) {
        for tensor in self.tensors {
            if MATRICES.iter().any(|&(_, kind)| kind == tensor.kind) {
                continue;
            }
            let (which, ty) = (tensor_of(tensor), self.type_of(tensor));
            self.specs.push(TensorSpec {
                name: which.name(tensor.layer),
                shape: which.ggml_shape(self.recipe.shape()),
                ty,
            });
            self.items.extend(parts(tensor, ty).map(Item::Rows));
        }
    }

    /// The experts of one kind and layer.
    fn experts_of(&self, layer: usize, kind: Kind) -> impl Iterator<Item = &'a Tensor> + use<'a> {
        self.tensors.iter().filter(move |tensor| tensor.kind == kind && tensor.layer == layer)
    }

    /// Experts as three stacked tensors per layer.
    fn stacked(&mut self) {
        for layer in 0..self.recipe.shape().n_layers {
            for (matrix, kind) in MATRICES {
                let Some(first) = self.experts_of(layer, kind).next() else { continue };
                let (shape, ty) = (tensor_of(first).ggml_shape(self.recipe.shape()), self.type_of(first));
                self.specs.push(TensorSpec { name: tensor_names::stacked(layer, matrix), shape, ty });
                let experts = self.experts_of(layer, kind);
                self.items.extend(experts.flat_map(|tensor| parts(tensor, ty)).map(Item::Rows));
            }
        }
    }

    /// Experts as one tensor of records per layer, which `metadata` is to describe; how they lie.
    fn records(&mut self, metadata: &mut Metadata) -> Result<Vec<ExpertFormat>> {
        let (shape, mut formats) = (self.recipe.shape(), Vec::new());
        for layer in 0..shape.n_layers {
            let [gate, up, down] = MATRICES.map(|(_, kind)| self.experts_of(layer, kind));
            let experts: Vec<[&Tensor; 3]> =
                gate.zip(up).zip(down).map(|((gate, up), down)| [gate, up, down]).collect();
            let [gate, up, down] = experts[0].map(|tensor| WeightType::try_from(self.type_of(tensor)));
            let format = ExpertFormat::with_types([gate?, up?, down?], shape.n_embd, shape.n_ff)
                .context("cannot lay out experts")?;
            let ne = vec![format.record_bytes() as u64, shape.n_experts as u64];
            self.specs.push(TensorSpec { name: tensor_names::packed(layer), shape: ne, ty: GgmlType::I8 });
            self.items.extend(experts.chunks(RECORDS).map(|some| Item::Records(some.to_vec())));
            formats.push(format);
        }
        let of = |format: &ExpertFormat| RecordLayout {
            types: Matrix::ALL.map(|matrix| format.type_of(matrix).ggml()),
            bytes: format.record_bytes() as u64,
            starts: Matrix::ALL.map(|matrix| format.region(matrix).start as u64),
        };
        describe_records(metadata, &formats.iter().map(of).collect::<Vec<_>>());
        Ok(formats)
    }
}

/// Appends the records of `experts` to `out`.
fn encode_records(recipe: &Recipe, format: &ExpertFormat, experts: &[[&Tensor; 3]], out: &mut Vec<u8>) -> Result<()> {
    let start = out.len();
    out.resize(start + experts.len() * format.record_bytes(), 0);
    let records = out[start..].par_chunks_mut(format.record_bytes());
    records.zip(experts).try_for_each(|(record, matrices)| {
        let mut canonical = [const { Vec::new() }; 3];
        for (i, matrix) in Matrix::ALL.into_iter().enumerate() {
            let ty = format.type_of(matrix).ggml();
            encode_rows(recipe, matrices[i], 0..matrices[i].rows, ty, &mut canonical[i])?;
        }
        let [gate, up, down] = &canonical;
        format.pack_record(gate, up, down, record);
        Ok(())
    })
}

fn metadata(recipe: &Recipe) -> Result<Metadata> {
    let (s, vocab) = (recipe.shape(), recipe.vocab());
    let mut out = Metadata::new();
    out.insert("general.architecture", "smallthinker");
    out.insert("general.type", "model");
    out.insert("general.name", s.name.as_str());
    out.insert("general.file_type", 2_u32);
    out.insert("general.quantization_version", 2_u32);
    for (key, value) in s.to_metadata() {
        out.insert(key, value);
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
