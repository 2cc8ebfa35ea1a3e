//! The importance matrix: for each column of each weight matrix, the sum of the squares of what it was multiplied with, in the form that
//! llama.cpp and `quantize --imatrix` read.

use std::path::Path;

use st_format::ModelShape;
use st_format::Tensor;
use st_gguf::{
    GgmlType, GgufError, GgufFile, GgufWriter, Kind, Metadata, StringArray, TensorSpec, WriteOptions, check_output,
};
use st_model::Inputs;

/// What `general.type` says of such files.
const TYPE: &str = "imatrix";

/// Sums of squares of one kind of matrix, for every layer and, where there are such, expert.
struct Sums {
    tensors: &'static [Tensor],
    columns: usize,
    matrices: usize,
    /// By layer and matrix.
    sums: Vec<f32>,
    /// Rows that were added, by layer and matrix.
    counts: Vec<f32>,
}

/// Sums of all matrices.
pub(crate) struct Importance {
    n_layers: usize,
    attention: Sums,
    output: Sums,
    experts: Sums,
    down: Sums,
    /// Tokens of one pass, for who reads the file.
    chunk: usize,
}

impl Sums {
    fn new(tensors: &'static [Tensor], n_layers: usize, columns: usize, matrices: usize) -> Self {
        let n = n_layers * matrices;
        Self { tensors, columns, matrices, sums: vec![0.0; n * columns], counts: vec![0.0; n] }
    }

    fn add(&mut self, layer: usize, matrix: usize, row: &[f32]) {
        let place = layer * self.matrices + matrix;
        let sums = &mut self.sums[place * self.columns..][..self.columns];
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x * x);
        self.counts[place] += 1.0;
    }
}

impl Importance {
    /// Nothing was added yet.
    pub(crate) fn new(config: &ModelShape, chunk: usize) -> Self {
        let n = config.n_layers;
        Self {
            n_layers: n,
            attention: Sums::new(&[Tensor::AttnQ, Tensor::AttnK, Tensor::AttnV], n, config.n_embd, 1),
            output: Sums::new(&[Tensor::AttnOutput], n, config.q_dim(), 1),
            experts: Sums::new(&[Tensor::FfnGateExps, Tensor::FfnUpExps], n, config.n_embd, config.n_experts),
            down: Sums::new(&[Tensor::FfnDownExps], n, config.n_ff, config.n_experts),
            chunk,
        }
    }

    /// Memory that it takes, in bytes.
    pub(crate) fn memory(config: &ModelShape) -> u64 {
        let columns = 2 * config.n_embd + config.q_dim() + config.n_experts * (config.n_embd + config.n_ff + 2);
        // And once more for the tensor that is written.
        4 * (config.n_layers * columns) as u64 + 4 * (config.n_experts * config.n_embd.max(config.n_ff)) as u64
    }

    /// Adds some rows.
    pub(crate) fn add(&mut self, layer: usize, of: Inputs<'_>, rows: &[f32]) {
        match of {
            Inputs::Attention => {
                rows.chunks_exact(self.attention.columns).for_each(|row| self.attention.add(layer, 0, row));
            }
            Inputs::AttentionOutput => {
                rows.chunks_exact(self.output.columns).for_each(|row| self.output.add(layer, 0, row));
            }
            Inputs::Experts(routing) => {
                let chosen = routing.ids().chunks_exact(routing.n_used().max(1));
                for (row, ids) in rows.chunks_exact(self.experts.columns).zip(chosen) {
                    ids.iter().for_each(|&id| self.experts.add(layer, id as usize, row));
                }
            }
            Inputs::Down(expert) => {
                rows.chunks_exact(self.down.columns).for_each(|row| self.down.add(layer, expert as usize, row));
            }
        }
    }

    /// Whether `path` can become such a file: it is free, or one already.
    ///
    /// # Errors
    /// Where it is anything else.
    pub(crate) fn check(path: &Path) -> Result<(), GgufError> {
        check_output(path, Kind::GGUF, true)?;
        let is_model = path.exists()
            && std::fs::metadata(path).is_ok_and(|about| about.len() > 0)
            && !GgufFile::open(path)
                .is_ok_and(|file| file.header.metadata.str("general.type").ok().flatten() == Some(TYPE));
        match is_model {
            true => Err(GgufError::OtherKind { path: path.to_owned(), kind: "an importance matrix" }),
            false => Ok(()),
        }
    }

    /// Writes the file; `texts` are the names of what was run.
    ///
    /// # Errors
    /// What writing meets.
    pub(crate) fn write(&self, path: &Path, texts: &[String]) -> Result<(), GgufError> {
        Self::check(path)?;
        let mut metadata = Metadata::new();
        metadata.insert("general.type", TYPE);
        let names: StringArray = texts.iter().map(String::as_str).collect();
        metadata.insert("imatrix.datasets", names);
        let tokens = self.attention.counts.first().copied().unwrap_or(0.0) as usize;
        metadata.insert("imatrix.chunk_count", tokens.div_ceil(self.chunk.max(1)) as u32);
        metadata.insert("imatrix.chunk_size", self.chunk as u32);
        let mut specs = Vec::new();
        let mut data: Vec<&[f32]> = Vec::new();
        for layer in 0..self.n_layers {
            for of in [&self.attention, &self.output, &self.experts, &self.down] {
                let places = layer * of.matrices..(layer + 1) * of.matrices;
                for tensor in of.tensors {
                    let name = tensor.name(layer);
                    let spec = |end: &str, columns: usize| TensorSpec {
                        name: format!("{name}.{end}"),
                        shape: vec![columns as u64, of.matrices as u64],
                        ty: GgmlType::F32,
                    };
                    specs.extend([spec("in_sum2", of.columns), spec("counts", 1)]);
                    data.push(&of.sums[places.start * of.columns..places.end * of.columns]);
                    data.push(&of.counts[places.clone()]);
                }
            }
        }
        let options = WriteOptions { alignment: 32, overwrite: true };
        let mut writer = GgufWriter::create(path, &metadata, &specs, options)?;
        for floats in data {
            let bytes: Vec<u8> = floats.iter().flat_map(|float| float.to_le_bytes()).collect();
            writer.write(&bytes)?;
        }
        writer.finish()
    }
}
