//! Small model files in both layouts for the tests of this crate, with bytes that tell every expert and matrix apart.

use crate::{Matrix, SlotFormat};
use st_format::{ModelShape, Tensor};
use st_gguf::{
    ExpertIndex, FileSource, GgmlType, GgufFile, GgufWriter, Layout, Metadata, ReadAt, TensorSpec, Value, WriteOptions,
    layout_keys, reserve_checksums, tensor_names,
};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

/// A slot format that is not the canonical one: bytes are changed, regions are longer than the matrices and have gaps.
#[derive(Debug, Clone)]
pub(crate) struct TestFormat {
    canonical: [usize; 3],
}

impl TestFormat {
    fn start(&self, matrix: Matrix) -> usize {
        self.canonical[..matrix as usize].iter().map(|len| (len + 3).next_multiple_of(64)).sum()
    }
}

impl SlotFormat for TestFormat {
    fn slot_bytes(&self) -> usize {
        self.region(Matrix::Down).end.next_multiple_of(4096)
    }

    fn region(&self, matrix: Matrix) -> Range<usize> {
        let start = self.start(matrix);
        start..start + self.canonical[matrix as usize] + 3
    }

    fn canonical_bytes(&self, matrix: Matrix) -> usize {
        self.canonical[matrix as usize]
    }

    fn fill(&self, matrix: Matrix, canonical: &[u8], region: &mut [u8]) {
        assert_eq!((canonical.len(), region.len()), (self.canonical_bytes(matrix), self.region(matrix).len()));
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
        let matrix_bytes = (n_embd * n_ff * 4) as usize;
        let format = TestFormat { canonical: [matrix_bytes; 3] };
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
                            ty: GgmlType::F32,
                        });
                        data.push((0..n_experts).flat_map(|e| canonical(layer, e, matrix, matrix_bytes)).collect());
                    }
                }
            }
            Layout::Offload => {
                let records: Vec<Vec<u8>> =
                    (0..n_layers * n_experts).map(|key| record(&format, key / n_experts, key % n_experts)).collect();
                metadata.insert(layout_keys::KIND, layout_keys::KIND_OFFLOAD);
                metadata.insert(layout_keys::VERSION, Value::U32(layout_keys::VERSION_NUMBER));
                metadata.insert(layout_keys::EXPERT_TYPE, Value::U32(GgmlType::F32.id()));
                metadata.insert(layout_keys::RECORD_BYTES, Value::U64(format.slot_bytes() as u64));
                let keys = [layout_keys::GATE_OFFSET, layout_keys::UP_OFFSET, layout_keys::DOWN_OFFSET];
                for (key, matrix) in keys.into_iter().zip(Matrix::ALL) {
                    metadata.insert(key, Value::U64(format.region(matrix).start as u64));
                }
                for layer in 0..n_layers {
                    tensors.push(TensorSpec {
                        name: tensor_names::packed(layer),
                        shape: vec![format.slot_bytes() as u64, n_experts as u64],
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
    let mut region = vec![0; format.region(matrix).len()];
    format.fill(matrix, &canonical(layer, expert, matrix, format.canonical_bytes(matrix)), &mut region);
    region
}

fn record(format: &TestFormat, layer: usize, expert: usize) -> Vec<u8> {
    let mut record = vec![0; format.slot_bytes()];
    for matrix in Matrix::ALL {
        record[format.region(matrix)].copy_from_slice(&region(format, layer, expert, matrix));
    }
    record
}
