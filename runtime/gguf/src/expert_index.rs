//! Where each expert's weights lie in a file: (layer, expert, matrix) to a byte range, for both layouts.
//!
//! In the `gguf` layout a layer's experts are stacked in three tensors, one per matrix, and an expert is
//! three ranges. In the `offload` layout they are records of one tensor, and an expert is one range with
//! a checksum, in which the three matrices lie one after the other. Building the index proves the shapes;
//! nothing here reads weights.

use st_format::Tensor;

use crate::error::{GgufError, Result};
use crate::header::{Header, TensorInfo};
use crate::{GgmlType, Matrix, Metadata, ModelShape};

/// Metadata keys of the `offload` layout.
pub mod layout_keys {
    /// `"offload"`; a file in the `gguf` layout has no such key.
    pub const KIND: &str = "st.layout.kind";
    /// Version of the record format: [`VERSION_NUMBER`].
    pub const VERSION: &str = "st.layout.version";
    /// Bytes of one record.
    pub const RECORD_BYTES: &str = "st.layout.record_bytes";
    /// Where the gate matrix starts in a record.
    pub const GATE_OFFSET: &str = "st.layout.gate_offset";
    /// Where the up matrix starts in a record.
    pub const UP_OFFSET: &str = "st.layout.up_offset";
    /// What [`UP_OFFSET`] was called in the first files; still read.
    pub const UP_OFFSET_BEFORE: &str = "st.layout.neuron_offset";
    /// Where the down matrix starts in a record.
    pub const DOWN_OFFSET: &str = "st.layout.down_offset";
    /// CRC-32C of every record, layer by layer.
    pub const CRC32C: &str = "st.layout.crc32c";
    /// ggml's number for the type of the experts' weights.
    pub const EXPERT_TYPE: &str = "st.layout.expert_type";
    /// All of them, in the order they are written.
    pub const ALL: [&str; 8] = [KIND, VERSION, EXPERT_TYPE, RECORD_BYTES, GATE_OFFSET, UP_OFFSET, DOWN_OFFSET, CRC32C];
    /// Where gate, up and down start.
    pub const OFFSETS: [&str; 3] = [GATE_OFFSET, UP_OFFSET, DOWN_OFFSET];
    /// The value of [`KIND`].
    pub const KIND_OFFLOAD: &str = "offload";
    /// The record format this crate knows.
    pub const VERSION_NUMBER: u32 = 2;
    /// A record is a whole number of these.
    pub const RECORD_ALIGNMENT: u64 = 4096;
    /// Each matrix of a record starts at a multiple of this.
    pub const REGION_ALIGNMENT: u64 = 64;
}

/// States the keys of the `offload` layout: records of `record_bytes`, in which gate, up and down start at `starts`. The records'
/// checksums are [`reserve_checksums`](crate::reserve_checksums)'s.
pub fn describe_records(metadata: &mut Metadata, expert_type: GgmlType, record_bytes: u64, starts: [u64; 3]) {
    metadata.insert(layout_keys::KIND, layout_keys::KIND_OFFLOAD);
    metadata.insert(layout_keys::VERSION, layout_keys::VERSION_NUMBER);
    metadata.insert(layout_keys::EXPERT_TYPE, expert_type.id());
    metadata.insert(layout_keys::RECORD_BYTES, record_bytes);
    for (key, start) in layout_keys::OFFSETS.into_iter().zip(starts) {
        metadata.insert(key, start);
    }
}

/// Names of the tensors that hold experts.
pub mod tensor_names {
    pub use st_format::tensor_names::{packed, stacked};

    use super::Layout;

    /// The layout in which a tensor of this name holds experts, and their layer; `None` for any other tensor.
    pub fn experts_in(name: &str) -> Option<(Layout, usize)> {
        let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
        let layout = match part {
            "ffn_exps.packed" => Layout::Offload,
            "ffn_gate_exps.weight" | "ffn_up_exps.weight" | "ffn_down_exps.weight" => Layout::Gguf,
            _ => return None,
        };
        Some((layout, layer.parse().ok()?))
    }
}

/// How a file arranges its experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// The standard one: per layer and matrix, one tensor of all experts.
    Gguf,
    /// Per layer, one tensor of page-aligned records, each one expert ready to compute.
    Offload,
}

impl Layout {
    /// `gguf` or `offload`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gguf => "gguf",
            Self::Offload => layout_keys::KIND_OFFLOAD,
        }
    }
}

/// A run of bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ByteRange {
    /// From the start of the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl ByteRange {
    /// One past the last byte.
    pub const fn end(self) -> u64 {
        self.offset + self.len
    }
}

/// Where every expert lies.
#[derive(Clone, Debug)]
pub struct ExpertIndex {
    layout: Layout,
    n_layers: usize,
    n_experts: usize,
    n_embd: u64,
    n_ff: u64,
    expert_type: GgmlType,
    /// Per layer: where the tensors of the three matrices start; where the records start, thrice.
    starts: Vec<[u64; 3]>,
    /// Distance from one expert to the next, per matrix.
    strides: [u64; 3],
    /// Each matrix within a stride.
    regions: [ByteRange; 3],
    /// CRC-32C per record, or per matrix, layer by layer and expert by expert; empty where the file states none.
    checksums: Vec<u32>,
}

impl ExpertIndex {
    /// Finds the experts of a model of this shape in `header`, and proves that every tensor has the shape and type
    /// that it implies.
    ///
    /// # Errors
    /// A missing or mistyped key, a missing tensor, a tensor of another shape or type, experts of more than
    /// one type, or an `offload` layout of another version or with offsets that cannot be.
    pub fn from_header(header: &Header, shape: &ModelShape) -> Result<Self> {
        match header.metadata.str(layout_keys::KIND)? {
            None => Self::stacked(header, shape),
            Some(layout_keys::KIND_OFFLOAD) => Self::packed(header, shape),
            Some(other) => Err(GgufError::malformed(
                header.file_name(),
                format!("metadata key `{}`", layout_keys::KIND),
                format!("expected \"{}\", got \"{other}\"", layout_keys::KIND_OFFLOAD),
            )),
        }
    }

    fn stacked(header: &Header, shape: &ModelShape) -> Result<Self> {
        let first = header.require_tensor(&tensor_names::stacked(0, Matrix::Gate))?;
        let expert_type = first.ty;
        let mut index = Self::empty(Layout::Gguf, shape, expert_type);
        for matrix in Matrix::ALL {
            let i = matrix as usize;
            let len = matrix_bytes(shape, header, first, matrix, expert_type)?;
            index.strides[i] = len;
            index.regions[i] = ByteRange { offset: 0, len };
        }
        for layer in 0..shape.n_layers {
            let mut starts = [0; 3];
            for matrix in Matrix::ALL {
                let tensor = header.require_tensor(&tensor_names::stacked(layer, matrix))?;
                header.expect_shape(tensor, &Tensor::experts(matrix).ggml_shape(shape))?;
                header.expect_type(tensor, expert_type)?;
                starts[matrix as usize] = tensor.offset;
            }
            index.starts.push(starts);
        }
        let checksums = header.checksums();
        for layer in 0..shape.n_layers {
            let of = Matrix::ALL.map(|matrix| checksums.of(&tensor_names::stacked(layer, matrix)));
            index
                .checksums
                .extend((0..shape.n_experts).flat_map(|expert| of.map(|sums| sums.get(expert).copied())).flatten());
        }
        // All or none: another program may have left some of the tensors out of its list.
        if index.checksums.len() != shape.n_layers * shape.n_experts * Matrix::ALL.len() {
            index.checksums = Vec::new();
        }
        Ok(index)
    }

    fn packed(header: &Header, shape: &ModelShape) -> Result<Self> {
        let metadata = &header.metadata;
        let required_u64 = |key| metadata.u64(key)?.ok_or_else(|| metadata.missing(key));
        let malformed = |key: &str, problem: String| {
            GgufError::malformed(header.file_name(), format!("metadata key `{key}`"), problem)
        };

        let version = required_u64(layout_keys::VERSION)?;
        if version != u64::from(layout_keys::VERSION_NUMBER) {
            let known = layout_keys::VERSION_NUMBER;
            let problem = format!("record format {version} is not known (only {known} is); convert again");
            return Err(malformed(layout_keys::VERSION, problem));
        }
        let type_id =
            metadata.u32(layout_keys::EXPERT_TYPE)?.ok_or_else(|| metadata.missing(layout_keys::EXPERT_TYPE))?;
        let expert_type = GgmlType::from_id(type_id);

        let first = header.require_tensor(&tensor_names::packed(0))?;
        let record_bytes = required_u64(layout_keys::RECORD_BYTES)?;
        if record_bytes == 0 || !record_bytes.is_multiple_of(layout_keys::RECORD_ALIGNMENT) {
            let page = layout_keys::RECORD_ALIGNMENT;
            let problem = format!("must be a multiple of {page}, got {record_bytes}");
            return Err(malformed(layout_keys::RECORD_BYTES, problem));
        }
        let mut index = Self::empty(Layout::Offload, shape, expert_type);
        index.strides = [record_bytes; 3];
        let mut keys = layout_keys::OFFSETS;
        if metadata.get(layout_keys::UP_OFFSET).is_none() && metadata.get(layout_keys::UP_OFFSET_BEFORE).is_some() {
            keys[1] = layout_keys::UP_OFFSET_BEFORE;
        }
        let mut bounds = [record_bytes; 4];
        for (bound, key) in bounds.iter_mut().zip(keys) {
            *bound = required_u64(key)?;
            if !bound.is_multiple_of(layout_keys::REGION_ALIGNMENT) {
                let unit = layout_keys::REGION_ALIGNMENT;
                return Err(malformed(key, format!("must be a multiple of {unit}, got {bound}")));
            }
        }
        for matrix in Matrix::ALL {
            let i = matrix as usize;
            let needed = matrix_bytes(shape, header, first, matrix, expert_type)?;
            let len = bounds[i + 1].checked_sub(bounds[i]).filter(|&len| len >= needed);
            let len = len.ok_or_else(|| {
                let (name, start, end) = (matrix.name(), bounds[i], bounds[i + 1]);
                let problem =
                    format!("the {name} matrix needs {needed} bytes, its place in a record is {start}..{end}");
                malformed(keys[i], problem)
            })?;
            index.regions[i] = ByteRange { offset: bounds[i], len };
        }

        for layer in 0..shape.n_layers {
            let tensor = header.require_tensor(&tensor_names::packed(layer))?;
            header.expect_shape(tensor, &[record_bytes, shape.n_experts as u64])?;
            header.expect_type(tensor, GgmlType::I8)?;
            index.starts.push([tensor.offset; 3]);
        }
        index.checksums = metadata.u32s(layout_keys::CRC32C)?.ok_or_else(|| metadata.missing(layout_keys::CRC32C))?;
        let (expected, got) = (shape.n_layers * shape.n_experts, index.checksums.len());
        if got != expected {
            let problem = format!("expected {expected} checksums, one per expert, got {got}");
            return Err(malformed(layout_keys::CRC32C, problem));
        }
        Ok(index)
    }

    fn empty(layout: Layout, shape: &ModelShape, expert_type: GgmlType) -> Self {
        Self {
            layout,
            n_layers: shape.n_layers,
            n_experts: shape.n_experts,
            n_embd: shape.n_embd as u64,
            n_ff: shape.n_ff as u64,
            expert_type,
            starts: Vec::with_capacity(shape.n_layers),
            strides: [0; 3],
            regions: [ByteRange { offset: 0, len: 0 }; 3],
            checksums: Vec::new(),
        }
    }

    /// How the file arranges its experts.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Number of layers.
    pub fn n_layers(&self) -> usize {
        self.n_layers
    }

    /// Number of experts in each layer.
    pub fn n_experts(&self) -> usize {
        self.n_experts
    }

    /// Size of the hidden state.
    pub fn n_embd(&self) -> u64 {
        self.n_embd
    }

    /// Number of neurons of one expert.
    pub fn n_ff(&self) -> u64 {
        self.n_ff
    }

    /// The type of all experts' weights.
    pub fn expert_type(&self) -> GgmlType {
        self.expert_type
    }

    /// Where a matrix of an expert lies: canonical rows in the `gguf` layout, the record's region, padding
    /// included, in the `offload` layout.
    ///
    /// # Panics
    /// Where there is no such layer or expert.
    pub fn matrix(&self, layer: usize, expert: usize, matrix: Matrix) -> ByteRange {
        assert!(expert < self.n_experts, "expert {expert} of {}", self.n_experts);
        let i = matrix as usize;
        let ByteRange { offset, len } = self.regions[i];
        ByteRange { offset: self.starts[layer][i] + expert as u64 * self.strides[i] + offset, len }
    }

    /// Where an expert's record lies; `None` in the `gguf` layout.
    ///
    /// # Panics
    /// As [`matrix`](Self::matrix).
    pub fn record(&self, layer: usize, expert: usize) -> Option<ByteRange> {
        assert!(expert < self.n_experts, "expert {expert} of {}", self.n_experts);
        let start = self.starts[layer][0];
        let len = self.strides[0];
        (self.layout == Layout::Offload).then(|| ByteRange { offset: start + expert as u64 * len, len })
    }

    /// CRC-32C of what an expert's bytes are read as: of its record in the `offload` layout, of gate, up and down in the `gguf`
    /// layout; nothing where the file states none.
    ///
    /// # Panics
    /// As [`matrix`](Self::matrix).
    pub fn checksums(&self, layer: usize, expert: usize) -> &[u32] {
        assert!(layer < self.n_layers && expert < self.n_experts, "layer {layer}, expert {expert}");
        let n = self.checksums.len() / (self.n_layers * self.n_experts);
        let first = (layer * self.n_experts + expert) * n;
        &self.checksums[first..first + n]
    }
}

/// Bytes of one expert's `matrix` in canonical form; `tensor` is who to blame where there is no such size.
fn matrix_bytes(shape: &ModelShape, header: &Header, tensor: &TensorInfo, matrix: Matrix, ty: GgmlType) -> Result<u64> {
    let (columns, rows) = Tensor::experts(matrix).dims(shape);
    let shape = [columns as u64, rows.unwrap_or(1) as u64];
    ty.bytes_for_shape(&shape).ok_or_else(|| {
        let problem = format!(
            "holds experts of type {ty}, whose {} matrix of shape {shape:?} is no whole number of blocks",
            matrix.name()
        );
        GgufError::tensor(header.file_name(), &tensor.name, problem)
    })
}
