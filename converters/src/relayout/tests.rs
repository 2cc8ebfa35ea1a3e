use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;

use proptest::prelude::*;
use st_format::{ModelShape, Scope, Tensor};
use tempfile::TempDir;

use super::*;
use crate::layout::{ALIGNMENT, alignment_of};
use crate::progress::NoProgress;
use st_gguf::crc32c;

const N_LAYERS: usize = 2;
const N_EXPERTS: usize = 3;

/// A model of the smallest size.
fn shape(n_embd: u64, n_ff: u64) -> ModelShape {
    ModelShape {
        n_layers: N_LAYERS,
        n_embd: n_embd as usize,
        n_heads: 1,
        n_kv_heads: 1,
        head_dim: 2,
        n_experts: N_EXPERTS,
        n_experts_used: 1,
        n_ff: n_ff as usize,
        n_vocab: 7,
        rope_layers: vec![true; N_LAYERS],
        windows: vec![None; N_LAYERS],
        ..ModelShape::published_4b()
    }
}

/// A file in the `gguf` layout with arbitrary weights, as this tool orders it.
struct Sample {
    dir: TempDir,
    metadata: Metadata,
    tensors: Vec<TensorSpec>,
    alignment: u64,
}

impl Sample {
    fn new(ty: GgmlType, n_embd: u64, n_ff: u64) -> Self {
        let quantized = !matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16);
        let alignment = alignment_of(Layout::Gguf, quantized);
        let mut metadata = Metadata::new();
        metadata.insert("general.architecture", "smallthinker");
        metadata.insert("general.alignment", alignment as u32);
        let shape = shape(n_embd, n_ff);
        for (key, value) in shape.to_metadata() {
            metadata.insert(key, value);
        }
        let spec =
            |tensor: Tensor, layer, ty| TensorSpec { name: tensor.name(layer), shape: tensor.ggml_shape(&shape), ty };
        let mut tensors = vec![spec(Tensor::TokenEmbd, 0, ty), spec(Tensor::OutputNorm, 0, GgmlType::F32)];
        for layer in 0..N_LAYERS {
            let layers = Tensor::ALL.iter().filter(|tensor| tensor.scope() == Scope::Layer);
            tensors.extend(layers.map(|&tensor| spec(tensor, layer, GgmlType::F32)));
        }
        for layer in 0..N_LAYERS {
            tensors.extend(Matrix::ALL.map(|matrix| spec(Tensor::experts(matrix), layer, ty)));
        }
        Self { dir: tempfile::tempdir().unwrap(), metadata, tensors, alignment }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes it with bytes that follow from `seed`.
    fn write(&self, seed: u64) -> PathBuf {
        let path = self.path("in.gguf");
        let options = WriteOptions { alignment: self.alignment, overwrite: true };
        let mut metadata = self.metadata.clone();
        reserve_checksums(&mut metadata, &self.tensors);
        let mut writer = GgufWriter::create(&path, &metadata, &self.tensors, options).unwrap();
        let mut state = seed | 1;
        for size in writer.plan().sizes.clone() {
            let bytes: Vec<u8> = (0..size)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (state >> 56) as u8
                })
                .collect();
            writer.write(&bytes).unwrap();
        }
        writer.state_checksums(metadata).unwrap();
        writer.finish().unwrap();
        path
    }
}

fn options(to: Layout, threads: usize) -> RelayoutOptions {
    RelayoutOptions { to, threads, overwrite: false }
}

fn run(input: &Path, to: Layout, threads: usize, out: &Path) -> Result<ConvertPlan, ConvertError> {
    relayout(input, &options(to, threads), out, &NoProgress, &Cancel::new())
}

fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn there_and_back_gives_the_same_bytes(
        seed: u64,
        // Shapes with and without padding in each region.
        shape in prop::sample::select(vec![(64u64, 32u64), (96, 160), (128, 64), (160, 96)]),
        ty in prop::sample::select(&WeightType::ALL),
    ) {
        let whole = |n: u64| n.next_multiple_of(ty.block_len() as u64);
        let (shape, ty) = ((whole(shape.0), whole(shape.1)), ty.ggml());
        let sample = Sample::new(ty, shape.0, shape.1);
        let input = sample.write(seed);
        let (packed, packed3) = (sample.path("offload.gguf"), sample.path("offload3.gguf"));
        let (back, back3) = (sample.path("back.gguf"), sample.path("back3.gguf"));
        let plan = run(&input, Layout::Offload, 1, &packed).unwrap();
        run(&input, Layout::Offload, 3, &packed3).unwrap();
        let bytes = fs::read(&packed).unwrap();
        prop_assert_eq!(bytes.len() as u64, plan.output_bytes);
        prop_assert!(bytes == fs::read(&packed3).unwrap(), "threads change the bytes");

        run(&packed, Layout::Gguf, 1, &back).unwrap();
        run(&packed, Layout::Gguf, 3, &back3).unwrap();
        let first = fs::read(&input).unwrap();
        prop_assert!(fs::read(&back).unwrap() == first, "not the first file's bytes");
        prop_assert!(fs::read(&back3).unwrap() == first, "threads change the bytes");
    }
}

/// Converting to a layout, and converting to the other and rearranging, are the same.
#[test]
fn it_agrees_with_the_converter() {
    let dir = tempfile::tempdir().unwrap();
    for ty in [WeightType::Q4_0, WeightType::Q8_0, WeightType::BF16] {
        let checkpoint = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/mini-21b");
        let input = crate::Input::open(&checkpoint).unwrap();
        let [direct, moved] = [Layout::Gguf, Layout::Offload].map(|layout| {
            let out = dir.path().join(format!("{ty}-{}.gguf", layout.name()));
            let options = crate::ConvertOptions { threads: 2, ..crate::ConvertOptions::new(ty, layout) };
            crate::convert(&input, &options, &out, false, &NoProgress, &Cancel::new()).unwrap();
            out
        });
        for (from, to, same) in [(&direct, Layout::Offload, &moved), (&moved, Layout::Gguf, &direct)] {
            let out = dir.path().join(format!("{ty}-again-{}.gguf", to.name()));
            run(from, to, 2, &out).unwrap();
            assert!(fs::read(&out).unwrap() == fs::read(same).unwrap(), "{ty} to {}", to.name());
        }
    }
}

#[test]
fn records_are_page_aligned_and_carry_their_checksums() {
    let sample = Sample::new(GgmlType::Q4_0, 96, 160);
    let packed = sample.path("offload.gguf");
    let plan = run(&sample.write(1), Layout::Offload, 2, &packed).unwrap();
    assert!(plan.warnings.iter().any(|warning| warning.contains("llama.cpp")));
    let file = GgufFile::open(&packed).unwrap();
    let index = ExpertIndex::from_header(&file.header, &file.header.model_shape().unwrap()).unwrap();
    assert_eq!(index.layout(), Layout::Offload);
    for layer in 0..N_LAYERS {
        for expert in 0..N_EXPERTS {
            let range = index.record(layer, expert).unwrap();
            assert_eq!((range.offset % 4096, range.len % 4096), (0, 0));
            let mut record = vec![0; range.len as usize];
            file.source.read_exact_at(&mut record, range.offset).unwrap();
            assert_eq!(index.checksums(layer, expert), [crc32c::crc32c(&record)]);
        }
    }
}

#[test]
fn a_file_in_another_order_and_alignment_keeps_its_tensors() {
    let mut sample = Sample::new(GgmlType::Q4_0, 64, 32);
    sample.alignment = 32;
    sample.tensors.reverse();
    let input = sample.write(5);
    let (packed, back) = (sample.path("offload.gguf"), sample.path("back.gguf"));
    run(&input, Layout::Offload, 2, &packed).unwrap();
    run(&packed, Layout::Gguf, 2, &back).unwrap();
    let (first, last) = (GgufFile::open(&input).unwrap(), GgufFile::open(&back).unwrap());
    assert_eq!(last.header.alignment, ALIGNMENT);
    assert_eq!(first.header.tensors.len(), last.header.tensors.len());
    for tensor in &first.header.tensors {
        let other = last.header.require_tensor(&tensor.name).unwrap();
        assert_eq!((&tensor.shape, tensor.ty), (&other.shape, other.ty));
        assert_eq!(first.read_tensor(tensor).unwrap(), last.read_tensor(other).unwrap(), "{}", tensor.name);
    }
}

/// Flips the last bit of `range`.
fn damage(path: &Path, range: ByteRange) {
    let mut bytes = fs::read(path).unwrap();
    bytes[range.end() as usize - 1] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_damaged_record_ends_the_work_and_names_the_expert() {
    let sample = Sample::new(GgmlType::Q4_0, 64, 32);
    let packed = sample.path("offload.gguf");
    run(&sample.write(2), Layout::Offload, 2, &packed).unwrap();
    let header = GgufFile::open(&packed).unwrap().header;
    damage(&packed, ExpertIndex::from_header(&header, &header.model_shape().unwrap()).unwrap().record(1, 2).unwrap());
    for threads in [1, 3] {
        let error = run(&packed, Layout::Gguf, threads, &sample.path("back.gguf")).unwrap_err();
        assert!(matches!(error, ConvertError::Gguf(GgufError::Damaged { expert: Some(2), .. })), "{error}");
        assert!(error.to_string().contains("expert 2 of tensor `blk.1.ffn_exps.packed`"), "{error}");
    }
    assert_eq!(names_in(sample.dir.path()), ["in.gguf", "offload.gguf"]);
}

#[test]
fn so_do_a_damaged_matrix_and_a_damaged_dense_tensor() {
    // The embedding is copied in several pieces.
    let mut sample = Sample::new(GgmlType::Q4_0, 64, 32);
    sample.tensors[0].shape[1] = 140_000;
    let input = sample.write(2);
    let header = GgufFile::open(&input).unwrap().header;
    let index = ExpertIndex::from_header(&header, &header.model_shape().unwrap()).unwrap();
    let good = fs::read(&input).unwrap();
    let matrices = Matrix::ALL.map(|m| (tensor_names::stacked(1, m), Some(2), index.matrix(1, 2, m)));
    let dense = ["token_embd.weight", "blk.1.attn_norm.weight"].map(|name| {
        let tensor = header.tensor(name).unwrap();
        (name.to_owned(), None, ByteRange { offset: tensor.offset, len: tensor.n_bytes })
    });
    for (name, which, range) in matrices.into_iter().chain(dense) {
        fs::write(&input, &good).unwrap();
        damage(&input, range);
        for threads in [1, 3] {
            let error = run(&input, Layout::Offload, threads, &sample.path("out.gguf")).unwrap_err();
            let ConvertError::Gguf(GgufError::Damaged { tensor, expert, offset, .. }) = error else {
                panic!("{error}")
            };
            assert_eq!((tensor, expert, offset), (name.clone(), which, range.offset));
        }
    }
    assert_eq!(names_in(sample.dir.path()), ["in.gguf"]);
}

#[test]
fn what_is_refused_before_anything_is_written() {
    let mut sample = Sample::new(GgmlType::Q4_0, 64, 32);
    let input = sample.write(3);
    let out = sample.path("out.gguf");
    let error = run(&input, Layout::Gguf, 1, &out).unwrap_err();
    assert!(error.to_string().ends_with("is in the gguf layout already"), "{error}");

    sample.metadata.insert("general.architecture", "llama");
    let error = run(&sample.write(3), Layout::Offload, 1, &out).unwrap_err();
    assert!(error.to_string().contains("expected a SmallThinker model, got `llama`"), "{error}");

    let unknown = Sample::new(GgmlType::Q8_1, 64, 32);
    let error = run(&unknown.write(3), Layout::Offload, 1, &out).unwrap_err();
    assert!(error.to_string().contains("of type Q8_1, cannot be packed"), "{error}");

    let mut missing = Sample::new(GgmlType::Q4_0, 64, 32);
    missing.tensors.pop();
    let error = run(&missing.write(3), Layout::Offload, 1, &out).unwrap_err();
    assert!(error.to_string().contains("`blk.1.ffn_down_exps.weight` is missing"), "{error}");

    fs::write(&out, "precious").unwrap();
    let good = Sample::new(GgmlType::Q4_0, 64, 32);
    assert!(run(&good.write(3), Layout::Offload, 1, &out).is_err());
    assert_eq!(fs::read(&out).unwrap(), b"precious");
}

#[test]
fn other_offsets_than_the_format_has_are_refused() {
    let sample = Sample::new(GgmlType::Q4_0, 64, 32);
    let packed = sample.path("offload.gguf");
    run(&sample.write(4), Layout::Offload, 1, &packed).unwrap();
    let file = GgufFile::open(&packed).unwrap();
    let mut metadata = file.header.metadata.clone();
    let up = metadata.u64(layout_keys::UP_OFFSET).unwrap().unwrap();
    metadata.insert(layout_keys::UP_OFFSET, up + 64);
    let tensors: Vec<TensorSpec> = file
        .header
        .tensors
        .iter()
        .map(|tensor| TensorSpec { name: tensor.name.clone(), shape: tensor.shape.clone(), ty: tensor.ty })
        .collect();
    let write_options = WriteOptions { alignment: ALIGNMENT, overwrite: true };
    let mut writer = GgufWriter::create(&packed, &metadata, &tensors, write_options).unwrap();
    for tensor in &file.header.tensors {
        writer.write(&file.read_tensor(tensor).unwrap()).unwrap();
    }
    writer.finish().unwrap();
    let error = run(&packed, Layout::Gguf, 1, &sample.path("back.gguf")).unwrap_err();
    assert!(error.to_string().contains(layout_keys::UP_OFFSET), "{error}");
}

#[test]
fn progress_adds_up_and_cancelling_leaves_nothing() {
    #[derive(Default)]
    struct Count(Mutex<(u64, u64, bool)>, Option<Cancel>);
    impl Progress for Count {
        fn start(&self, total_bytes: u64) {
            self.0.lock().unwrap().0 = total_bytes;
        }
        fn advance(&self, bytes: u64) {
            self.0.lock().unwrap().1 += bytes;
            if let Some(cancel) = &self.1 {
                cancel.cancel();
            }
        }
        fn finish(&self) {
            self.0.lock().unwrap().2 = true;
        }
    }
    let sample = Sample::new(GgmlType::Q8_0, 64, 32);
    let (input, packed, back) = (sample.write(6), sample.path("offload.gguf"), sample.path("back.gguf"));
    for (from, to, out) in [(&input, Layout::Offload, &packed), (&packed, Layout::Gguf, &back)] {
        let count = Count::default();
        relayout(from, &options(to, 2), out, &count, &Cancel::new()).unwrap();
        let (total, done, finished) = *count.0.lock().unwrap();
        assert!(total > 0 && total == done && finished, "{done} of {total}");
    }
    let cancel = Cancel::new();
    let count = Count(Mutex::default(), Some(cancel.clone()));
    let error = relayout(&input, &options(Layout::Offload, 1), &sample.path("x.gguf"), &count, &cancel).unwrap_err();
    assert!(matches!(error, ConvertError::Cancelled), "{error}");
    assert_eq!(names_in(sample.dir.path()), ["back.gguf", "in.gguf", "offload.gguf"]);
}
