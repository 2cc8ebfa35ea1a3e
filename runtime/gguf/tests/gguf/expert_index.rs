//! Experts are found in both layouts, and a file that does not hold what it says is refused.

use st_gguf::{
    Array, ExpertIndex, GgmlType, GgufError, GgufFile, Layout, Matrix, Metadata, ModelShape, RecordLayout, TensorSpec,
    Value, describe_records, layout_keys, tensor_names,
};

use crate::common::{counting, spec, write_file};

const N_LAYERS: usize = 2;
const N_EXPERTS: usize = 3;
const N_EMBD: u64 = 64;
const N_FF: u64 = 32;
const MATRIX_BYTES: u64 = N_EMBD * N_FF / 32 * 18;

fn shape() -> ModelShape {
    ModelShape {
        n_layers: N_LAYERS,
        n_experts: N_EXPERTS,
        n_embd: N_EMBD as usize,
        n_ff: N_FF as usize,
        ..ModelShape::published_4b()
    }
}

fn stacked() -> Vec<TensorSpec> {
    let mut tensors = Vec::new();
    for layer in 0..N_LAYERS {
        for matrix in Matrix::ALL {
            let shape = match matrix {
                Matrix::Down => [N_FF, N_EMBD, N_EXPERTS as u64],
                _ => [N_EMBD, N_FF, N_EXPERTS as u64],
            };
            tensors.push(spec(&tensor_names::stacked(layer, matrix), &shape, GgmlType::Q4_0));
        }
    }
    tensors
}

fn offload_metadata() -> Metadata {
    let mut metadata = Metadata::new();
    metadata.insert(layout_keys::KIND, "offload");
    metadata.insert(layout_keys::VERSION, layout_keys::VERSION_NUMBER);
    metadata.insert(layout_keys::EXPERT_TYPE, GgmlType::Q4_0.id());
    metadata.insert(layout_keys::RECORD_BYTES, 8192u64);
    metadata.insert(layout_keys::GATE_OFFSET, 0u64);
    metadata.insert(layout_keys::UP_OFFSET, 1152u64);
    metadata.insert(layout_keys::DOWN_OFFSET, 2368u64);
    metadata.insert(layout_keys::CRC32C, (0..6).collect::<Vec<u32>>());
    metadata
}

fn packed() -> Vec<TensorSpec> {
    (0..N_LAYERS).map(|layer| spec(&tensor_names::packed(layer), &[8192, N_EXPERTS as u64], GgmlType::I8)).collect()
}

fn open(metadata: &Metadata, tensors: &[TensorSpec]) -> GgufFile {
    let dir = tempfile::tempdir().unwrap();
    write_file(&dir.path().join("m.gguf"), metadata, tensors, 4096)
}

#[track_caller]
fn assert_refused(metadata: &Metadata, tensors: &[TensorSpec], message: &str) -> GgufError {
    assert_shape_refused(&shape(), metadata, tensors, message)
}

#[track_caller]
fn assert_shape_refused(shape: &ModelShape, metadata: &Metadata, tensors: &[TensorSpec], message: &str) -> GgufError {
    let error = ExpertIndex::from_header(&open(metadata, tensors).header, shape).unwrap_err();
    assert!(error.to_string().contains(message), "got: {error}\nexpected: {message}");
    assert!(error.to_string().contains("m.gguf"), "{error}");
    error
}

#[test]
fn the_gguf_layout() {
    let file = open(&Metadata::new(), &stacked());
    let index = ExpertIndex::from_header(&file.header, &shape()).unwrap();
    assert_eq!((index.layout(), index.n_layers(), index.n_experts()), (Layout::Gguf, N_LAYERS, N_EXPERTS));
    assert_eq!((index.n_embd(), index.n_ff(), index.all_types()), (N_EMBD, N_FF, vec![GgmlType::Q4_0]));
    for layer in 0..N_LAYERS {
        for expert in 0..N_EXPERTS {
            assert_eq!((index.record(layer, expert), index.checksums(layer, expert)), (None, &[][..]));
            for matrix in Matrix::ALL {
                let tensor = file.header.tensor(&tensor_names::stacked(layer, matrix)).unwrap();
                let range = index.matrix(layer, expert, matrix);
                assert_eq!(range.len, MATRIX_BYTES);
                assert_eq!(range.offset, tensor.offset + expert as u64 * MATRIX_BYTES);
                assert!(range.end() <= tensor.offset + tensor.n_bytes);
                let mut bytes = vec![0; range.len as usize];
                file.source.read_exact_at(&mut bytes, range.offset).unwrap();
                let start = expert * MATRIX_BYTES as usize;
                assert_eq!(bytes, counting(tensor.n_bytes)[start..start + bytes.len()]);
            }
        }
    }
}

#[test]
fn the_offload_layout() {
    let file = open(&offload_metadata(), &packed());
    let index = ExpertIndex::from_header(&file.header, &shape()).unwrap();
    assert_eq!(index.layout(), Layout::Offload);
    assert_eq!(index.types(1), [GgmlType::Q4_0; 3]);
    let record = index.record(1, 2).unwrap();
    assert_eq!(record.offset, file.header.tensor("blk.1.ffn_exps.packed").unwrap().offset + 2 * 8192);
    assert_eq!((record.len, record.offset % 4096), (8192, 0));
    assert_eq!(index.checksums(1, 2), [5]);
    let [gate, up, down] = Matrix::ALL.map(|matrix| index.matrix(1, 2, matrix));
    assert_eq!((gate.offset, gate.len), (record.offset, 1152));
    assert_eq!((up.offset, up.len), (record.offset + 1152, 1216));
    assert_eq!((down.offset, down.end()), (record.offset + 2368, record.end()));
}

#[test]
fn matrices_that_are_no_whole_blocks() {
    let odd = ModelShape { n_ff: 33, ..shape() };
    assert_shape_refused(&odd, &Metadata::new(), &stacked(), "no whole number of blocks");
}

#[test]
fn the_place_of_up_is_read_under_its_first_name_too() {
    let mut metadata = offload_metadata();
    let place = metadata.remove(layout_keys::UP_OFFSET).unwrap();
    metadata.insert(layout_keys::UP_OFFSET_BEFORE, place);
    let index = ExpertIndex::from_header(&open(&metadata, &packed()).header, &shape()).unwrap();
    assert_eq!(index.matrix(0, 0, Matrix::Up).len, 1216);
}

#[test]
fn a_missing_tensor() {
    let mut tensors = stacked();
    tensors.remove(4);
    assert_refused(&Metadata::new(), &tensors, "tensor `blk.1.ffn_up_exps.weight` is missing");
    assert_refused(&Metadata::new(), &[], "tensor `blk.0.ffn_gate_exps.weight` is missing");
    let more_layers = ModelShape { n_layers: 3, ..shape() };
    assert_shape_refused(&more_layers, &Metadata::new(), &stacked(), "tensor `blk.2.ffn_gate_exps.weight` is missing");
}

#[test]
fn a_wrong_shape_names_both() {
    let mut tensors = stacked();
    tensors[2].shape = vec![N_FF, 2 * N_EMBD, N_EXPERTS as u64];
    let message = "tensor `blk.0.ffn_down_exps.weight`: expected shape [32, 64, 3], got [32, 128, 3]";
    assert_refused(&Metadata::new(), &tensors, message);
    tensors[2].shape = vec![N_EMBD, N_FF, N_EXPERTS as u64];
    assert_refused(&Metadata::new(), &tensors, "tensor `blk.0.ffn_down_exps.weight` is transposed");
}

#[test]
fn matrices_and_layers_of_different_types() {
    let mut tensors = stacked();
    (tensors[1].ty, tensors[5].ty) = (GgmlType::F16, GgmlType::Q8_0);
    let file = open(&Metadata::new(), &tensors);
    let index = ExpertIndex::from_header(&file.header, &shape()).unwrap();
    assert_eq!(index.types(0), [GgmlType::Q4_0, GgmlType::F16, GgmlType::Q4_0]);
    assert_eq!(index.types(1), [GgmlType::Q4_0, GgmlType::Q4_0, GgmlType::Q8_0]);
    assert_eq!(index.all_types(), [GgmlType::Q4_0, GgmlType::F16, GgmlType::Q8_0]);
    let up = file.header.tensor("blk.0.ffn_up_exps.weight").unwrap();
    let range = index.matrix(0, 2, Matrix::Up);
    assert_eq!((range.offset, range.len), (up.offset + 2 * N_EMBD * N_FF * 2, N_EMBD * N_FF * 2));
    assert_eq!(index.matrix(1, 1, Matrix::Down).len, N_EMBD * N_FF / 32 * 34);
}

/// Records of two layers that differ in types and sizes, and their tensors.
fn two_kinds_of_records() -> (Vec<RecordLayout>, Vec<TensorSpec>) {
    let records = [(GgmlType::Q4_0, 8192, [0, 1152, 2368]), (GgmlType::Q8_0, 12288, [0, 2176, 4352])];
    let records = records.map(|(down, bytes, starts)| {
        let types = [GgmlType::Q4_0, GgmlType::Q4_0, down];
        RecordLayout { types, bytes, starts }
    });
    let tensors = records
        .iter()
        .enumerate()
        .map(|(layer, record)| spec(&tensor_names::packed(layer), &[record.bytes, N_EXPERTS as u64], GgmlType::I8));
    (records.to_vec(), tensors.collect())
}

#[test]
fn records_that_differ_from_layer_to_layer() {
    let (records, tensors) = two_kinds_of_records();
    let mut metadata = Metadata::new();
    describe_records(&mut metadata, &records);
    metadata.insert(layout_keys::CRC32C, (0..6).collect::<Vec<u32>>());
    assert_eq!(metadata.u32(layout_keys::VERSION).unwrap(), Some(layout_keys::VERSION_BY_LAYER));
    let file = open(&metadata, &tensors);
    let index = ExpertIndex::from_header(&file.header, &shape()).unwrap();
    for (layer, stated) in records.iter().enumerate() {
        assert_eq!(index.types(layer), stated.types);
        let record = index.record(layer, 2).unwrap();
        assert_eq!(record.len, stated.bytes);
        assert_eq!(record.offset, file.header.tensor(&tensor_names::packed(layer)).unwrap().offset + 2 * stated.bytes);
        let starts = Matrix::ALL.map(|matrix| index.matrix(layer, 2, matrix).offset - record.offset);
        assert_eq!(starts, stated.starts);
    }
    // Alike in all layers, but not in all matrices.
    let mut metadata = Metadata::new();
    describe_records(&mut metadata, &[records[1]; N_LAYERS]);
    assert_eq!(metadata.u64s(layout_keys::RECORD_BYTES).unwrap().unwrap(), [12288; N_LAYERS]);
}

#[test]
fn lists_of_records_that_do_not_fit() {
    let (records, tensors) = two_kinds_of_records();
    let cases: [(&str, Value, &str); 5] = [
        (layout_keys::EXPERT_TYPE, vec![2u32; 5].into(), "expected 6 entries, got 5"),
        (layout_keys::EXPERT_TYPE, vec![2u32, 2, 2, 2, 2, 77].into(), "experts of type unknown type 77"),
        (layout_keys::RECORD_BYTES, vec![8192u64].into(), "expected 2 entries, got 1"),
        (layout_keys::RECORD_BYTES, 8192u64.into(), "expected array of unsigned 64-bit integers, got u64"),
        (
            layout_keys::DOWN_OFFSET,
            vec![2368u64, 11264].into(),
            "the down matrix needs 2176 bytes, its place in a record is 11264..12288",
        ),
    ];
    for (key, value, message) in cases {
        let mut metadata = Metadata::new();
        describe_records(&mut metadata, &records);
        metadata.insert(layout_keys::CRC32C, (0..6).collect::<Vec<u32>>());
        metadata.insert(key, value);
        assert_refused(&metadata, &tensors, message);
    }
}

#[test]
fn offload_keys_that_are_missing_or_cannot_be() {
    for key in layout_keys::ALL.into_iter().filter(|&key| key != layout_keys::KIND) {
        let mut metadata = offload_metadata();
        metadata.remove(key);
        assert_refused(&metadata, &packed(), &format!("metadata key `{key}` is missing"));
    }
    let cases: [(&str, Value, &str); 11] = [
        (layout_keys::KIND, "upside-down".into(), "expected \"offload\", got \"upside-down\""),
        (layout_keys::VERSION, 3u32.into(), "record format 3 is not known (only 2 and 4 are); convert again"),
        (layout_keys::EXPERT_TYPE, GgmlType::Q4_K.id().into(), "record format 2 does not hold Q4_K; convert again"),
        (layout_keys::EXPERT_TYPE, 99u32.into(), "experts of type unknown type 99"),
        (layout_keys::RECORD_BYTES, 0u64.into(), "must be a multiple of 4096"),
        (layout_keys::RECORD_BYTES, 8000u64.into(), "must be a multiple of 4096, got 8000"),
        (layout_keys::RECORD_BYTES, 12288u64.into(), "expected shape [12288, 3], got [8192, 3]"),
        (layout_keys::GATE_OFFSET, 1u64.into(), "must be a multiple of 64, got 1"),
        (layout_keys::UP_OFFSET, 1088u64.into(), "the gate matrix needs 1152 bytes, its place in a record is 0..1088"),
        (layout_keys::DOWN_OFFSET, (u64::MAX - 63).into(), "the down matrix needs 1152 bytes"),
        (layout_keys::CRC32C, Value::Array(Array::U32(vec![1])), "expected 6 checksums, one per expert, got 1"),
    ];
    for (key, value, message) in cases {
        let mut metadata = offload_metadata();
        metadata.insert(key, value);
        assert_refused(&metadata, &packed(), message);
    }
}

#[test]
fn offload_tensors_that_do_not_match() {
    let mut tensors = packed();
    tensors[1].ty = GgmlType::I16;
    assert_refused(&offload_metadata(), &tensors, "`blk.1.ffn_exps.packed`: expected type I8, got I16");
    assert_refused(&offload_metadata(), &packed()[..1], "tensor `blk.1.ffn_exps.packed` is missing");
}

#[test]
#[should_panic(expected = "expert 3 of 3")]
fn asking_for_an_expert_beyond_the_last_is_a_bug() {
    ExpertIndex::from_header(&open(&Metadata::new(), &stacked()).header, &shape()).unwrap().matrix(0, 3, Matrix::Gate);
}
