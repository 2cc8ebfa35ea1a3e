//! What is written is read back, value for value and byte for byte.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use st_gguf::{
    Array, FileSource, GgmlType, GgufFile, GgufWriter, Metadata, OctetArray, ReadAt, StringArray, TensorSpec, Value,
    WriteOptions, plan,
};

use crate::common::{counting, spec, write_file};

fn array() -> impl Strategy<Value = Array> {
    use prop::collection::vec;
    let flat = prop_oneof![
        vec(any::<u8>(), 0..5).prop_map(Array::U8),
        vec(any::<i8>(), 0..5).prop_map(Array::I8),
        vec(any::<u16>(), 0..5).prop_map(Array::U16),
        vec(any::<i16>(), 0..5).prop_map(Array::I16),
        vec(any::<u32>(), 0..5).prop_map(Array::U32),
        vec(any::<i32>(), 0..5).prop_map(Array::I32),
        vec(-1e30f32..1e30, 0..5).prop_map(Array::F32),
        vec(any::<bool>(), 0..5).prop_map(Array::Bool),
        vec(any::<String>(), 0..5).prop_map(|v| Array::String(v.into_iter().collect())),
        vec(any::<u64>(), 0..5).prop_map(Array::U64),
        vec(any::<i64>(), 0..5).prop_map(Array::I64),
        vec(-1e300f64..1e300, 0..5).prop_map(Array::F64),
        vec(vec(any::<u8>(), 0..5), 0..5).prop_map(|mut v| {
            // One at least that is no text, or they would come back as texts.
            v.push(vec![0xff]);
            let mut strings = OctetArray::default();
            assert!(v.iter().all(|string| strings.push(string)));
            Array::Octets(strings)
        }),
    ];
    flat.prop_recursive(2, 8, 3, |inner| vec(inner, 0..3).prop_map(Array::Array))
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        (-1e30f32..1e30).prop_map(Value::F32),
        any::<bool>().prop_map(Value::Bool),
        any::<String>().prop_map(Value::String),
        array().prop_map(Value::Array),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        (-1e300f64..1e300).prop_map(Value::F64),
        prop::collection::vec(any::<u8>(), 0..9).prop_map(|mut bytes| {
            bytes.push(0xff);
            Value::Octets(bytes)
        }),
    ]
}

fn tensors() -> impl Strategy<Value = Vec<TensorSpec>> {
    let types = prop::sample::select(GgmlType::ALL.to_vec());
    let one = (types, 1u64..3, prop::collection::vec(1u64..4, 0..4));
    prop::collection::vec(one, 0..6).prop_map(|all| {
        all.into_iter()
            .enumerate()
            .map(|(i, (ty, blocks, mut shape))| {
                shape.insert(0, blocks * ty.block_len());
                spec(&format!("tensor.{i}"), &shape, ty)
            })
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn metadata_and_tensors(
        entries in prop::collection::vec(("[a-z]{1,4}", value()), 0..10),
        tensors in tensors(),
        alignment in prop::sample::select(vec![1u64, 8, 32, 4096]),
    ) {
        let mut metadata = Metadata::new();
        for (key, value) in entries {
            metadata.insert(key, value);
        }
        let dir = tempfile::tempdir().unwrap();
        let file = write_file(&dir.path().join("f.gguf"), &metadata, &tensors, alignment);
        let header = &file.header;
        let plan = plan(&metadata, &tensors, alignment).unwrap();

        metadata.insert("general.alignment", alignment as u32);
        prop_assert_eq!(&header.metadata, &metadata);
        prop_assert_eq!((header.version, header.alignment, header.data_offset), (3, alignment, plan.header_bytes));
        prop_assert_eq!(header.file_len, plan.total);
        prop_assert_eq!(header.tensors.len(), tensors.len());
        for (i, (info, spec)) in header.tensors.iter().zip(&tensors).enumerate() {
            prop_assert_eq!((&info.name, &info.shape, info.ty), (&spec.name, &spec.shape, spec.ty));
            prop_assert_eq!((info.offset, info.n_bytes), (plan.offsets[i], plan.sizes[i]));
            prop_assert_eq!(info.offset % alignment, 0);
            prop_assert_eq!(file.read_tensor(info).unwrap(), counting(info.n_bytes));
        }
    }

    #[test]
    fn data_may_be_cut_anywhere(cuts in prop::collection::vec(0usize..700, 0..6)) {
        let tensors = [spec("a", &[33], GgmlType::I8), spec("b", &[64, 5], GgmlType::Q8_0), spec("c", &[1], GgmlType::F64)];
        let data = counting(33 + 340 + 8);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f.gguf");
        let mut writer = GgufWriter::create(&path, &Metadata::new(), &tensors, WriteOptions::default()).unwrap();
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(data.len())).collect();
        cuts.extend([0, data.len()]);
        cuts.sort_unstable();
        for pair in cuts.windows(2) {
            writer.write(&data[pair[0]..pair[1]]).unwrap();
        }
        writer.finish().unwrap();
        let file = GgufFile::open(&path).unwrap();
        let read: Vec<u8> = file.header.tensors.iter().flat_map(|t| file.read_tensor(t).unwrap()).collect();
        prop_assert_eq!(read, data);
    }
}

#[test]
fn strings_longer_than_the_read_window() {
    let mut metadata = Metadata::new();
    let long = "ĠÄ三".repeat(60_000);
    metadata.insert("long", long.as_str());
    metadata.insert("mixed", ["short", &long, "", &long[..129_997]].into_iter().collect::<StringArray>());
    metadata.insert("after", 7u32);
    let dir = tempfile::tempdir().unwrap();
    let file = write_file(&dir.path().join("f.gguf"), &metadata, &[], 32);
    metadata.insert("general.alignment", 32u32);
    assert_eq!(file.header.metadata, metadata);
}

#[test]
fn a_vocabulary_of_the_real_size_is_read_in_large_pieces() {
    let tokens: StringArray = (0..151_936).map(|i| format!("Ġtoken{i}")).collect();
    let merges: StringArray = (0..151_387).map(|i| format!("Ġto{i} ken{i}")).collect();
    let types = vec![1i32; tokens.len()];
    let mut metadata = Metadata::new();
    metadata.insert("tokenizer.ggml.tokens", tokens.clone());
    metadata.insert("tokenizer.ggml.merges", merges);
    metadata.insert("tokenizer.ggml.token_type", types);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f.gguf");
    write_file(&path, &metadata, &[], 4096);

    let source = Arc::new(Counted { file: FileSource::open(&path).unwrap(), reads: AtomicUsize::new(0) });
    let file = GgufFile::from_source(Arc::clone(&source) as _).unwrap();
    assert_eq!(file.header.metadata.strings("tokenizer.ggml.tokens").unwrap(), Some(&tokens));
    // Not string by string.
    let (reads, pieces) = (source.reads.load(Ordering::Relaxed), source.len() / 4096);
    assert!((reads as u64) < pieces, "{reads} reads of {} bytes", source.len());
}

/// A file that counts how often it is read.
#[derive(Debug)]
struct Counted {
    file: FileSource,
    reads: AtomicUsize,
}

impl ReadAt for Counted {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.file.read_exact_at(buf, offset)
    }

    fn len(&self) -> u64 {
        self.file.len()
    }
}

#[test]
fn ranges_stay_inside_their_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = [spec("a", &[8], GgmlType::F32), spec("b", &[8], GgmlType::F32)];
    let file = write_file(&dir.path().join("f.gguf"), &Metadata::new(), &tensors, 32);
    let tensor = file.header.tensor("a").unwrap();
    let mut buf = [0; 4];
    file.read_range(tensor, 28, &mut buf).unwrap();
    assert_eq!(buf, [28, 29, 30, 31]);
    for start in [29, 32, u64::MAX] {
        let error = file.read_range(tensor, start, &mut buf).unwrap_err();
        assert!(error.to_string().contains("tensor `a` has 32 bytes"), "{error}");
    }
    assert!(file.header.require_tensor("c").unwrap_err().to_string().ends_with("tensor `c` is missing"));
}

#[test]
fn a_file_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f.gguf");
    write_file(&path, &Metadata::new(), &[spec("a", &[8], GgmlType::F32)], 32);
    let bytes: &'static [u8] = std::fs::read(&path).unwrap().leak();
    let file = GgufFile::from_static(bytes).unwrap();
    assert_eq!(file.read_tensor(&file.header.tensors[0]).unwrap(), counting(32));
    let error = GgufFile::from_static(&bytes[..10]).unwrap_err();
    assert!(error.to_string().starts_with("GGUF data in memory: "), "{error}");
}
