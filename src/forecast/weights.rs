//! How many bytes of a model's file a token touches: what a forecast needs to know of it.

use st_gguf::{ExpertIndex, GgufError, GgufFile, Header, Layout, Matrix, ModelShape};

/// Bytes of a model, as kernels and disks read them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Weights {
    /// The matrix that makes logits.
    pub(crate) head: f64,
    /// What is not an expert, of a layer.
    pub(crate) dense: f64,
    /// The gate of an expert, which is read whole.
    pub(crate) gate: f64,
    /// Its up and down, of which the rows of live neurons are read.
    pub(crate) up_and_down: f64,
    /// An expert, as it is read from the disk.
    pub(crate) read: f64,
    /// Whether what is read has to be arranged for the kernels: experts that are not packed for that in the file.
    pub(crate) is_arranged: bool,
    /// The shape.
    pub(crate) shape: ModelShape,
}

impl Weights {
    /// Those of a file.
    ///
    /// # Errors
    /// Where it is no complete model.
    pub(crate) fn of(file: &GgufFile) -> Result<Self, GgufError> {
        Self::of_header(&file.header)
    }

    fn of_header(header: &Header) -> Result<Self, GgufError> {
        let shape = header.model_shape()?;
        let index = ExpertIndex::from_header(header, &shape)?;
        let n_layers = shape.n_layers as f64;
        let mean = |bytes: &dyn Fn(usize) -> u64| (0..shape.n_layers).map(bytes).sum::<u64>() as f64 / n_layers;
        let matrix = |layer, matrix| index.matrix(layer, 0, matrix).len;
        let read = |layer| match index.record(layer, 0) {
            Some(record) => record.len,
            None => Matrix::ALL.map(|one| matrix(layer, one).next_multiple_of(4096)).iter().sum(),
        };
        let dense = header.tensors.iter().filter(|tensor| {
            tensor.name.starts_with("blk.") && st_gguf::tensor_names::experts_in(&tensor.name).is_none()
        });
        let head = ["output.weight", "token_embd.weight"].iter().find_map(|name| header.tensor(name));
        Ok(Self {
            head: head.map_or(0.0, |tensor| tensor.n_bytes as f64),
            dense: dense.map(|tensor| tensor.n_bytes).sum::<u64>() as f64 / n_layers,
            gate: mean(&|layer| matrix(layer, Matrix::Gate)),
            up_and_down: mean(&|layer| matrix(layer, Matrix::Up) + matrix(layer, Matrix::Down)),
            read: mean(&read),
            is_arranged: index.layout() == Layout::Gguf,
            shape,
        })
    }

    /// Bytes of one expert that a token reads where this share of neurons lives.
    pub(crate) fn expert(&self, live: f64) -> f64 {
        self.gate + live * self.up_and_down
    }

    /// Bytes of a layer that a token reads.
    pub(crate) fn layer(&self, live: f64) -> f64 {
        self.dense + self.shape.n_experts_used as f64 * self.expert(live)
    }
}
