//! Small model files in both layouts for the tests of this crate, with bytes that tell every expert and matrix apart.

use crate::{Matrix, SlotFormat};
use st_format::{ModelShape, Tensor};
use st_gguf::{
    ExpertIndex, FileSource, GgmlType, GgufFile, GgufWriter, Layout, Metadata, ReadAt, RecordLayout, TensorSpec,
    WriteOptions, describe_records, reserve_checksums, tensor_names,
};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

/// A slot format that is not the canonical one: bytes are changed, regions are longer than the matrices and have gaps, and each layer
/// has its own sizes.
#[derive(Debug, Clone)]
pub(crate) struct TestFormat {
    /// Per layer: the types of the three matrices, and their bytes.
    types: Vec<[GgmlType; 3]>,
    canonical: Vec<[usize; 3]>,
}

impl TestFormat {
    /// Matrices of `weights` weights, of types that change from one to the next and from layer to layer.
    fn new(n_layers: usize, weights: u64) -> Self {
        const TYPES: [GgmlType; 3] = [GgmlType::F32, GgmlType::F16, GgmlType::I8];
        let types: Vec<_> =
            (0..n_layers).map(|layer| [0, 1, 2].map(|matrix| TYPES[(2 * layer + matrix) / 2 % 3])).collect();
        let bytes = |ty: GgmlType| ty.bytes_for_shape(&[weights]).unwrap() as usize;
        Self { canonical: types.iter().map(|types| types.map(bytes)).collect(), types }
    }

    fn start(&self, layer: usize, matrix: Matrix) -> usize {
        self.canonical[layer][..matrix as usize].iter().map(|len| (len + 3).next_multiple_of(64)).sum()
    }

    fn records(&self) -> Vec<RecordLayout> {
        let of = |layer| RecordLayout {
            types: self.types[layer],
            bytes: self.record_bytes(layer) as u64,
            starts: Matrix::ALL.map(|matrix| self.start(layer, matrix) as u64),
        };
        (0..self.types.len()).map(of).collect()
    }
}

impl SlotFormat for TestFormat {
    fn slot_bytes(&self) -> usize {
        (0..self.types.len()).map(|layer| self.record_bytes(layer)).max().unwrap()
    }

    fn record_bytes(&self, layer: usize) -> usize {
        self.region(layer, Matrix::Down).end.next_multiple_of(4096)
    }

    fn region(&self, layer: usize, matrix: Matrix) -> Range<usize> {
        let start = self.start(layer, matrix);
        start..start + self.canonical[layer][matrix as usize] + 3
    }

    fn canonical_bytes(&self, layer: usize, matrix: Matrix) -> usize {
        self.canonical[layer][matrix as usize]
    }

    fn fill(&self, layer: usize, matrix: Matrix, canonical: &[u8], region: &mut [u8]) {
        let sizes = (self.canonical_bytes(layer, matrix), self.region(layer, matrix).len());
        assert_eq!((canonical.len(), region.len()), sizes);
        for (to, from) in region.iter_mut().zip(canonical) {
            *to = from.rotate_left(3) ^ 0xa5;
        }
        region[canonical.len()..].fill(0xee);
    }
}

/// A model file with nothing but experts.
pub(crate) struct Fixture {
    _dir: tempfile::TempDir,
    pub(crate) path: PathBuf,
    pub(crate) source: Arc<dyn ReadAt>,
    pub(crate) index: ExpertIndex,
    pub(crate) shape: ModelShape,
    pub(crate) format: TestFormat,
    pub(crate) n_experts: usize,
}

/// Shapes whose matrices are whole pages, and shapes where nothing is aligned.
pub(crate) const ALIGNED: (u64, u64) = (64, 32);
pub(crate) const ODD: (u64, u64) = (37, 29);

impl Fixture {
    pub(crate) fn new(layout: Layout, n_layers: usize, n_experts: usize, shape: (u64, u64)) -> Self {
        Self::aligned_to(4096, layout, n_layers, n_experts, shape)
    }

    pub(crate) fn aligned_to(
        alignment: u64,
        layout: Layout,
        n_layers: usize,
        n_experts: usize,
        (n_embd, n_ff): (u64, u64),
    ) -> Self {
        let format = TestFormat::new(n_layers, n_embd * n_ff);
        let mut metadata = Metadata::new();
        let shape = ModelShape {
            n_layers,
            n_experts,
            n_embd: n_embd as usize,
            n_ff: n_ff as usize,
            ..ModelShape::published_4b()
        };
        let (mut tensors, mut data) = (Vec::new(), Vec::new());
        match layout {
            Layout::Gguf => {
                for layer in 0..n_layers {
                    for matrix in Matrix::ALL {
                        let tensor = Tensor::experts(matrix);
                        tensors.push(TensorSpec {
                            name: tensor.name(layer),
                            shape: tensor.ggml_shape(&shape),
                            ty: format.types[layer][matrix as usize],
                        });
                        let bytes = format.canonical_bytes(layer, matrix);
                        data.push((0..n_experts).flat_map(|e| canonical(layer, e, matrix, bytes)).collect());
                    }
                }
            }
            Layout::Offload => {
                let records: Vec<Vec<u8>> =
                    (0..n_layers * n_experts).map(|key| record(&format, key / n_experts, key % n_experts)).collect();
                describe_records(&mut metadata, &format.records());
                for layer in 0..n_layers {
                    tensors.push(TensorSpec {
                        name: tensor_names::packed(layer),
                        shape: vec![format.record_bytes(layer) as u64, n_experts as u64],
                        ty: GgmlType::I8,
                    });
                    data.push(records[layer * n_experts..(layer + 1) * n_experts].concat());
                }
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        reserve_checksums(&mut metadata, &tensors);
        let mut writer =
            GgufWriter::create(&path, &metadata, &tensors, WriteOptions { alignment, overwrite: false }).unwrap();
        data.iter().for_each(|tensor: &Vec<u8>| writer.write(tensor).unwrap());
        writer.state_checksums(metadata).unwrap();
        writer.finish().unwrap();
        let index = ExpertIndex::from_header(&GgufFile::open(&path).unwrap().header, &shape).unwrap();
        let source = Arc::new(FileSource::open(&path).unwrap());
        Self { _dir: dir, path, source, index, shape, format, n_experts }
    }

    /// What the slot must hold for a matrix.
    pub(crate) fn expected(&self, layer: usize, expert: usize, matrix: Matrix) -> Vec<u8> {
        region(&self.format, layer, expert, matrix)
    }

    pub(crate) fn format(&self) -> Arc<dyn SlotFormat> {
        Arc::new(self.format.clone())
    }
}

fn canonical(layer: usize, expert: usize, matrix: Matrix, len: usize) -> Vec<u8> {
    let mut state = ((layer * 1000 + expert * 10 + matrix as usize + 1) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..len).map(next).collect()
}

fn region(format: &TestFormat, layer: usize, expert: usize, matrix: Matrix) -> Vec<u8> {
    let mut region = vec![0; format.region(layer, matrix).len()];
    let canonical = canonical(layer, expert, matrix, format.canonical_bytes(layer, matrix));
    format.fill(layer, matrix, &canonical, &mut region);
    region
}

fn record(format: &TestFormat, layer: usize, expert: usize) -> Vec<u8> {
    let mut record = vec![0; format.record_bytes(layer)];
    for matrix in Matrix::ALL {
        record[format.region(layer, matrix)].copy_from_slice(&region(format, layer, expert, matrix));
    }
    record
}
