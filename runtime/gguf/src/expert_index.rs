//! Where each expert's weights lie in a file: (layer, expert, matrix) to a byte range, for both layouts.
//!
//! In the `gguf` layout a layer's experts are stacked in three tensors, one per matrix, and an expert is
//! three ranges. In the `offload` layout they are records of one tensor, and an expert is one range with
//! a checksum, in which the three matrices lie one after the other. Building the index proves the shapes;
//! nothing here reads weights.

use st_format::{Tensor, is_transposed_down};

use crate::error::{GgufError, Result};
use crate::header::{Header, TensorInfo};
use crate::layout::{Layout, layout_keys, tensor_names};
use crate::{GgmlType, Matrix, ModelShape};

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
    n_experts: usize,
    n_embd: u64,
    n_ff: u64,
    layers: Vec<LayerExperts>,
    /// CRC-32C per record, or per matrix, layer by layer and expert by expert; empty where the file states none.
    checksums: Vec<u32>,
}

/// Where the experts of one layer lie; gate, up, down.
#[derive(Clone, Debug)]
struct LayerExperts {
    types: [GgmlType; 3],
    /// Where the tensors of the three matrices start; where the records start, thrice.
    starts: [u64; 3],
    /// Distance from one expert to the next.
    strides: [u64; 3],
    /// Each matrix within a stride.
    regions: [ByteRange; 3],
}

impl ExpertIndex {
    /// Finds the experts of a model of this shape in `header`, and proves that every tensor has the shape and size
    /// that it implies. Any matrix of any layer may have a type of its own.
    ///
    /// # Errors
    /// A missing or mistyped key, a missing tensor, a tensor of another shape, rows that are no whole blocks of their type, or an
    /// `offload` layout of another version or with offsets that cannot be.
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
        let mut index = Self::empty(Layout::Gguf, shape);
        for layer in 0..shape.n_layers {
            let mut found = LayerExperts::NOWHERE;
            let [gate, up, down] =
                Matrix::ALL.map(|matrix| header.require_tensor(&tensor_names::stacked(layer, matrix)));
            let tensors = [gate?, up?, down?];
            for (i, matrix) in Matrix::ALL.into_iter().enumerate() {
                let len = matrix_bytes(shape, header, tensors[i], matrix, tensors[i].ty)?;
                found.regions[i] = ByteRange { offset: 0, len };
                (found.types[i], found.starts[i], found.strides[i]) = (tensors[i].ty, tensors[i].offset, len);
            }
            for (tensor, matrix) in tensors.into_iter().zip(Matrix::ALL) {
                if matrix == Matrix::Down && is_transposed_down(&tensor.shape, shape) {
                    let (file, tensor) = (header.file_name().to_owned(), tensor.name.clone());
                    return Err(GgufError::TransposedDown { file, tensor });
                }
                header.expect_shape(tensor, &Tensor::experts(matrix).ggml_shape(shape))?;
            }
            index.layers.push(found);
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
        let mut index = Self::empty(Layout::Offload, shape);
        let stated = StatedRecords::read(header, shape.n_layers)?;
        for layer in 0..shape.n_layers {
            let tensor = header.require_tensor(&tensor_names::packed(layer))?;
            let mut found = stated.layer(header, shape, tensor, layer)?;
            let record_bytes = found.strides[0];
            header.expect_shape(tensor, &[record_bytes, shape.n_experts as u64])?;
            header.expect_type(tensor, GgmlType::I8)?;
            found.starts = [tensor.offset; 3];
            index.layers.push(found);
        }
        let metadata = &header.metadata;
        index.checksums = metadata.u32s(layout_keys::CRC32C)?.ok_or_else(|| metadata.missing(layout_keys::CRC32C))?;
        let (expected, got) = (shape.n_layers * shape.n_experts, index.checksums.len());
        if got != expected {
            let problem = format!("expected {expected} checksums, one per expert, got {got}");
            return Err(malformed(header, layout_keys::CRC32C, problem));
        }
        Ok(index)
    }

    fn empty(layout: Layout, shape: &ModelShape) -> Self {
        Self {
            layout,
            n_experts: shape.n_experts,
            n_embd: shape.n_embd as u64,
            n_ff: shape.n_ff as u64,
            layers: Vec::with_capacity(shape.n_layers),
            checksums: Vec::new(),
        }
    }

    /// How the file arranges its experts.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Number of layers.
    pub fn n_layers(&self) -> usize {
        self.layers.len()
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

    /// The types of gate, up and down of a layer's experts.
    ///
    /// # Panics
    /// Where there is no such layer.
    pub fn types(&self, layer: usize) -> [GgmlType; 3] {
        self.layers[layer].types
    }

    /// Every type that an expert matrix of some layer has, each once, in the order in which they are first met.
    pub fn all_types(&self) -> Vec<GgmlType> {
        let mut all = Vec::new();
        for ty in self.layers.iter().flat_map(|layer| layer.types) {
            if !all.contains(&ty) {
                all.push(ty);
            }
        }
        all
    }

    /// Where a matrix of an expert lies: canonical rows in the `gguf` layout, the record's region, padding
    /// included, in the `offload` layout.
    ///
    /// # Panics
    /// Where there is no such layer or expert.
    pub fn matrix(&self, layer: usize, expert: usize, matrix: Matrix) -> ByteRange {
        assert!(expert < self.n_experts, "expert {expert} of {}", self.n_experts);
        let (at, i) = (&self.layers[layer], matrix as usize);
        let ByteRange { offset, len } = at.regions[i];
        ByteRange { offset: at.starts[i] + expert as u64 * at.strides[i] + offset, len }
    }

    /// Where an expert's record lies; `None` in the `gguf` layout.
    ///
    /// # Panics
    /// As [`matrix`](Self::matrix).
    pub fn record(&self, layer: usize, expert: usize) -> Option<ByteRange> {
        assert!(expert < self.n_experts, "expert {expert} of {}", self.n_experts);
        let at = &self.layers[layer];
        let (start, len) = (at.starts[0], at.strides[0]);
        (self.layout == Layout::Offload).then(|| ByteRange { offset: start + expert as u64 * len, len })
    }

    /// CRC-32C of what an expert's bytes are read as: of its record in the `offload` layout, of gate, up and down in the `gguf`
    /// layout; nothing where the file states none.
    ///
    /// # Panics
    /// As [`matrix`](Self::matrix).
    pub fn checksums(&self, layer: usize, expert: usize) -> &[u32] {
        assert!(layer < self.layers.len() && expert < self.n_experts, "layer {layer}, expert {expert}");
        let n = self.checksums.len() / (self.layers.len() * self.n_experts);
        let first = (layer * self.n_experts + expert) * n;
        &self.checksums[first..first + n]
    }
}

impl LayerExperts {
    const NOWHERE: Self = Self {
        types: [GgmlType::I8; 3],
        starts: [0; 3],
        strides: [0; 3],
        regions: [ByteRange { offset: 0, len: 0 }; 3],
    };
}

/// What a file in the `offload` layout states of its records: one entry that holds for every layer, or one for each.
struct StatedRecords {
    types: Vec<u32>,
    bytes: Vec<u64>,
    /// The keys under which the starts of gate, up and down stand, and the starts.
    starts: [(&'static str, Vec<u64>); 3],
}

impl StatedRecords {
    fn read(header: &Header, n_layers: usize) -> Result<Self> {
        let metadata = &header.metadata;
        let version = metadata.u32(layout_keys::VERSION)?.ok_or_else(|| metadata.missing(layout_keys::VERSION))?;
        let by_layer = match version {
            layout_keys::VERSION_NUMBER => false,
            layout_keys::VERSION_BY_LAYER => true,
            _ => {
                let known =
                    [layout_keys::VERSION_NUMBER, layout_keys::VERSION_BY_LAYER].map(|n| n.to_string()).join(" and ");
                let problem = format!("record format {version} is not known (only {known} are); convert again");
                return Err(malformed(header, layout_keys::VERSION, problem));
            }
        };
        let list = |key: &str, per_layer: usize| {
            if !by_layer {
                return Ok(vec![metadata.u64(key)?.ok_or_else(|| metadata.missing(key))?]);
            }
            let list = metadata.u64s(key)?.ok_or_else(|| metadata.missing(key))?;
            let expected = n_layers * per_layer;
            if list.len() != expected {
                return Err(malformed(header, key, format!("expected {expected} entries, got {}", list.len())));
            }
            Ok(list)
        };
        // A number that is no type's is an unknown type, which whoever needs its size refuses.
        let types: Vec<u32> =
            list(layout_keys::EXPERT_TYPE, 3)?.into_iter().map(|id| u32::try_from(id).unwrap_or(u32::MAX)).collect();
        let of_version = |t: &GgmlType| layout_keys::ONE_TYPE.contains(t) || matches!(t, GgmlType::Unknown(_));
        let other = types.iter().map(|&id| GgmlType::from_id(id)).find(|t| !of_version(t));
        if let Some(other) = other.filter(|_| !by_layer) {
            let problem = format!("record format {version} does not hold {other}; convert again");
            return Err(malformed(header, layout_keys::VERSION, problem));
        }
        let mut keys = layout_keys::OFFSETS;
        if metadata.get(layout_keys::UP_OFFSET).is_none() && metadata.get(layout_keys::UP_OFFSET_BEFORE).is_some() {
            keys[1] = layout_keys::UP_OFFSET_BEFORE;
        }
        let bytes = list(layout_keys::RECORD_BYTES, 1)?;
        let [gate, up, down] = keys.map(|key| list(key, 1).map(|starts| (key, starts)));
        Ok(Self { types, bytes, starts: [gate?, up?, down?] })
    }

    /// The records of one layer, which `tensor` holds; where they start in the file is still open.
    fn layer(&self, header: &Header, shape: &ModelShape, tensor: &TensorInfo, layer: usize) -> Result<LayerExperts> {
        let of = |list: &[u64]| list[if list.len() == 1 { 0 } else { layer }];
        let record_bytes = of(&self.bytes);
        if record_bytes == 0 || !record_bytes.is_multiple_of(layout_keys::RECORD_ALIGNMENT) {
            let page = layout_keys::RECORD_ALIGNMENT;
            let problem = format!("must be a multiple of {page}, got {record_bytes}");
            return Err(malformed(header, layout_keys::RECORD_BYTES, problem));
        }
        let mut bounds = [record_bytes; 4];
        for (bound, (key, starts)) in bounds.iter_mut().zip(&self.starts) {
            *bound = of(starts);
            if !bound.is_multiple_of(layout_keys::REGION_ALIGNMENT) {
                let unit = layout_keys::REGION_ALIGNMENT;
                return Err(malformed(header, key, format!("must be a multiple of {unit}, got {bound}")));
            }
        }
        let types = match &self.types[..] {
            [one] => [*one; 3],
            all => [0, 1, 2].map(|i| all[3 * layer + i]),
        };
        let types = types.map(GgmlType::from_id);
        let mut found = LayerExperts { types, strides: [record_bytes; 3], ..LayerExperts::NOWHERE };
        for matrix in Matrix::ALL {
            let i = matrix as usize;
            let needed = matrix_bytes(shape, header, tensor, matrix, types[i])?;
            let len = bounds[i + 1].checked_sub(bounds[i]).filter(|&len| len >= needed);
            let len = len.ok_or_else(|| {
                let (name, start, end) = (matrix.name(), bounds[i], bounds[i + 1]);
                let problem =
                    format!("the {name} matrix needs {needed} bytes, its place in a record is {start}..{end}");
                malformed(header, self.starts[i].0, problem)
            })?;
            found.regions[i] = ByteRange { offset: bounds[i], len };
        }
        Ok(found)
    }
}

fn malformed(header: &Header, key: &str, problem: String) -> GgufError {
    GgufError::malformed(header.file_name(), format!("metadata key `{key}`"), problem)
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
