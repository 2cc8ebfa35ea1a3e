//! Every part of a file's data has a checksum, and damage to any of it is found where it is read.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use st_gguf::crc32c;
use st_gguf::{
    CheckReport, Checksums, ExpertIndex, GgmlType, GgufError, GgufFile, GgufWriter, Layout, Matrix, Metadata,
    ModelShape, TensorInfo, TensorSpec, WriteOptions, checksum_keys, layout_keys, reserve_checksums, tensor_names,
};

use crate::common::{counting, spec};

const N_LAYERS: usize = 2;
const N_EXPERTS: u64 = 3;

/// Keys and tensors of a small model in a layout.
fn model(layout: Layout) -> (Metadata, Vec<TensorSpec>) {
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", "smallthinker");
    metadata.insert("smallthinker.block_count", N_LAYERS as u32);
    metadata.insert("smallthinker.expert_count", N_EXPERTS as u32);
    metadata.insert("smallthinker.embedding_length", 64u32);
    metadata.insert("smallthinker.expert_feed_forward_length", 32u32);
    let mut tensors = vec![spec("token_embd.weight", &[64, 5], GgmlType::F32), spec("a.norm", &[7], GgmlType::F32)];
    match layout {
        Layout::Gguf => {
            for layer in 0..N_LAYERS {
                for matrix in Matrix::ALL {
                    let [cols, rows] = if matrix == Matrix::Down { [32, 64] } else { [64, 32] };
                    let name = tensor_names::stacked(layer, matrix);
                    tensors.push(spec(&name, &[cols, rows, N_EXPERTS], GgmlType::Q4_0));
                }
            }
        }
        Layout::Offload => {
            metadata.insert(layout_keys::KIND, layout_keys::KIND_OFFLOAD);
            metadata.insert(layout_keys::VERSION, layout_keys::VERSION_NUMBER);
            metadata.insert(layout_keys::EXPERT_TYPE, GgmlType::Q4_0.id());
            metadata.insert(layout_keys::RECORD_BYTES, 4096u64);
            metadata.insert(layout_keys::GATE_OFFSET, 0u64);
            metadata.insert(layout_keys::UP_OFFSET, 1152u64);
            metadata.insert(layout_keys::DOWN_OFFSET, 2304u64);
            for layer in 0..N_LAYERS {
                tensors.push(spec(&tensor_names::packed(layer), &[4096, N_EXPERTS], GgmlType::I8));
            }
        }
    }
    (metadata, tensors)
}

/// The shape of its experts.
fn shape() -> ModelShape {
    ModelShape { n_layers: N_LAYERS, n_embd: 64, n_ff: 32, n_experts: N_EXPERTS as usize, ..ModelShape::published_4b() }
}

/// Writes it with checksums, the data cut into pieces of `cut` bytes.
fn write(dir: &Path, layout: Layout, cut: usize) -> PathBuf {
    let (mut metadata, tensors) = model(layout);
    reserve_checksums(&mut metadata, &tensors);
    let path = dir.join("m.gguf");
    let options = WriteOptions { overwrite: true, ..WriteOptions::default() };
    let mut writer = GgufWriter::create(&path, &metadata, &tensors, options).unwrap();
    let data: Vec<u8> = writer.plan().sizes.iter().flat_map(|&size| counting(size)).collect();
    data.chunks(cut).for_each(|piece| writer.write(piece).unwrap());
    writer.state_checksums(metadata).unwrap();
    writer.finish().unwrap();
    path
}

fn check(file: &GgufFile) -> CheckReport {
    file.check(&mut |_| ControlFlow::Continue(())).unwrap().unwrap()
}

#[test]
fn every_part_has_a_sum_however_the_data_is_cut() {
    let dir = tempfile::tempdir().unwrap();
    for layout in [Layout::Gguf, Layout::Offload] {
        let whole = std::fs::read(write(dir.path(), layout, usize::MAX)).unwrap();
        let path = write(dir.path(), layout, 1000);
        assert!(std::fs::read(&path).unwrap() == whole);
        let file = GgufFile::open(&path).unwrap();
        let index = ExpertIndex::from_header(&file.header, &shape()).unwrap();
        let sum = |offset: u64, len: u64| crc32c::crc32c(&whole[offset as usize..(offset + len) as usize]);
        for tensor in &file.header.tensors {
            let sums = file.checksums().of(&tensor.name);
            let part = tensor.n_bytes / sums.len() as u64;
            let expected: Vec<u32> = (0..sums.len() as u64).map(|i| sum(tensor.offset + i * part, part)).collect();
            assert_eq!(sums, expected, "{}", tensor.name);
            let experts = tensor_names::experts_in(&tensor.name).map(|(layout, _)| layout);
            assert_eq!(
                (sums.len() as u64, experts),
                if tensor.name.contains("exps") { (N_EXPERTS, Some(layout)) } else { (1, None) }
            );
        }
        for (layer, expert) in (0..N_LAYERS).flat_map(|layer| (0..N_EXPERTS as usize).map(move |e| (layer, e))) {
            let expected: Vec<u32> = match index.record(layer, expert) {
                Some(record) => vec![sum(record.offset, record.len)],
                None => Matrix::ALL.map(|m| index.matrix(layer, expert, m)).map(|r| sum(r.offset, r.len)).to_vec(),
            };
            assert_eq!(index.checksums(layer, expert), expected);
        }
        let report = check(&file);
        let parts = if layout == Layout::Gguf { 2 + 2 * 3 * 3 } else { 2 + 2 * 3 };
        assert_eq!((report.parts, report.bytes, report.without), (parts, file.checked_bytes(), 0));
        assert!(report.damaged.is_empty());
        assert!(file.check(&mut |_| ControlFlow::Break(())).unwrap().is_none());
    }
}

/// Flips one bit after another all over the data; what is between the tensors is nobody's.
#[test]
fn no_flipped_bit_goes_unnoticed() {
    let dir = tempfile::tempdir().unwrap();
    let mut state = 1u64;
    for layout in [Layout::Gguf, Layout::Offload] {
        let path = write(dir.path(), layout, usize::MAX);
        let good = std::fs::read(&path).unwrap();
        let header = GgufFile::open(&path).unwrap().header;
        for _ in 0..200 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let tensor = &header.tensors[(state >> 40) as usize % header.tensors.len()];
            let (at, bit) = ((state >> 8) % tensor.n_bytes, state >> 60 & 7);
            let mut bytes = good.clone();
            bytes[(tensor.offset + at) as usize] ^= 1 << bit;
            let file = GgufFile::from_static(bytes.leak()).unwrap();
            let report = check(&file);
            let [GgufError::Damaged { tensor: named, expert, offset, .. }] = &report.damaged[..] else {
                panic!("{}: byte {at}, bit {bit}: {:?}", tensor.name, report.damaged)
            };
            let parts = file.checksums().of(&tensor.name).len() as u64;
            let part = at / (tensor.n_bytes / parts);
            assert_eq!((named, *offset), (&tensor.name, tensor.offset + part * (tensor.n_bytes / parts)));
            assert_eq!(*expert, tensor.name.contains("exps").then_some(part as usize));
            // Whoever reads the tensor, whole or in pieces of any order, hears of it.
            assert!(matches!(file.read_tensor(tensor), Err(GgufError::Damaged { .. })));
            let half = tensor.n_bytes / 2;
            let mut buf = vec![0; tensor.n_bytes as usize];
            let later = file.read_range(tensor, half, &mut buf[half as usize..]);
            assert!(later.is_err() || file.read_range(tensor, 0, &mut buf[..half as usize]).is_err());
        }
        let padding = header.tensors.iter().map(|t| t.offset + t.n_bytes).find(|end| end % 4096 != 0).unwrap();
        let mut bytes = good.clone();
        bytes[padding as usize] ^= 1;
        assert!(check(&GgufFile::from_static(bytes.leak()).unwrap()).damaged.is_empty());
    }
}

/// Files of other programs have none, and lists that another program carried over to other tensors are not believed.
#[test]
fn a_list_that_does_not_fit_is_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), Layout::Gguf, usize::MAX);
    let header = GgufFile::open(&path).unwrap().header;
    let with = |change: &dyn Fn(&mut Metadata)| {
        let mut header = header.clone();
        change(&mut header.metadata);
        Checksums::from_header(&header)
    };
    let none = with(&|metadata| {
        metadata.remove(checksum_keys::CRC32C);
    });
    assert!(none.is_empty() && !none.are_of_another_file());
    for change in [
        (&|m: &mut Metadata| drop(m.insert(checksum_keys::CRC32C, vec![0u32; 5]))) as &dyn Fn(&mut Metadata),
        &|m| drop(m.insert(checksum_keys::CRC32C, "none")),
        &|m| drop(m.insert(checksum_keys::VERSION, 9u32)),
        &|m| drop(m.remove(checksum_keys::VERSION)),
        &|m| drop(m.insert("tokenizer.chat_template", "another")),
    ] {
        let sums = with(change);
        assert!(sums.is_empty() && sums.are_of_another_file());
    }
    for change in [
        (&|tensors: &mut Vec<TensorInfo>| drop(tensors.pop())) as &dyn Fn(&mut Vec<TensorInfo>),
        &|tensors| tensors.swap(2, 3),
        &|tensors| tensors[0].ty = GgmlType::I32,
        &|tensors| tensors[0].shape.reverse(),
    ] {
        let mut other = header.clone();
        change(&mut other.tensors);
        assert!(Checksums::from_header(&other).are_of_another_file());
    }
}
