//! One test per reason to refuse a file.

use proptest::prelude::*;
use st_gguf::{
    Array, GgmlType, GgufError, GgufFile, Header, MemorySource, Metadata, ReadAt, StringArray, Value, limits,
};

use crate::common::{Raw, assert_rejects, parse, spec, write_file};

const U8: u32 = 0;
const U32: u32 = 4;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const F32: u32 = 0;

#[test]
fn an_empty_file_and_other_files() {
    assert_rejects([], "it is empty");
    assert_rejects(*b"PK\x03\x04 a zip file", r#"starts with "PK\x03\x04", not with "GGUF""#);
    assert_rejects(*b"ab", r#"starts with "ab""#);
    assert_rejects(*b"GG", "truncated");
}

#[test]
fn other_versions_and_byte_orders() {
    assert_rejects(Raw(b"GGUF".to_vec()).u32(1).u64(0).u64(0).0, "version 1 is not supported (versions 2 and 3 are)");
    assert_rejects(Raw(b"GGUF".to_vec()).u32(4).u64(0).u64(0).0, "version 4");
    assert_rejects(Raw(b"GGUF".to_vec()).u32(0).u64(0).u64(0).0, "version 0");
    assert_rejects(Raw(b"GGUF".to_vec()).bytes(&3u32.to_be_bytes()).u64(0).u64(0).0, "big-endian");
}

#[test]
fn version_2_is_read() {
    let header = parse(Raw(b"GGUF".to_vec()).u32(2).u64(0).u64(1).key("k", U32).u32(7).0).unwrap();
    assert_eq!((header.version, header.metadata.u32("k").unwrap()), (2, Some(7)));
}

#[test]
fn counts_that_the_file_cannot_hold() {
    assert_rejects(Raw::new(5, 0).0, "needs 120 bytes at offset 24, but 0 are left");
    assert_rejects(Raw::new(0, 5).0, "needs 65 bytes at offset 24, but 0 are left");
}

#[test]
fn counts_above_the_caps() {
    assert_rejects(Raw::new(limits::MAX_TENSORS + 1, 0).0, "the number of tensors");
    assert_rejects(Raw::new(u64::MAX, u64::MAX).0, "the number of tensors");
    assert_rejects(Raw::new(0, limits::MAX_KEYS + 1).0, "the number of metadata keys");
}

#[test]
fn a_key_that_is_too_long() {
    let raw = Raw::new(0, 1).u64(limits::MAX_KEY_BYTES + 1).bytes(&[b'k'; 70_000]);
    assert_rejects(raw.0, "the length of metadata key number 0 is 65536, more than the 65535 allowed");
}

#[test]
fn a_string_that_is_too_long() {
    let raw = Raw::new(0, 1).key("k", STRING).u64(limits::MAX_STRING_BYTES + 1);
    assert_rejects(raw.0, "the length of the value of metadata key `k`");
    let raw = Raw::new(0, 1).key("k", STRING).u64(1000).bytes(b"short");
    assert_rejects(raw.0, "the value of metadata key `k` needs 1000 bytes");
    let raw = Raw::new(0, 1).key("k", STRING).u64(u64::MAX);
    assert_rejects(raw.0, "`k`");
}

#[test]
fn text_that_is_not_utf8() {
    assert_rejects(Raw::new(0, 1).u64(2).bytes(b"\xff\xfe").bytes(&[0; 8]).0, "metadata key number 0: is not UTF-8");
    // Values that nothing is computed with do no harm.
    for len in [2, 200_000] {
        let raw = Raw::new(0, 1).key("k", STRING).u64(len).bytes(&vec![0xff; len as usize]);
        let file = GgufFile::from_static(raw.0.leak()).unwrap();
        assert_eq!(file.header.metadata.get("k"), Some(&Value::Octets(vec![0xff; len as usize])));
        assert!(
            file.header
                .metadata
                .str("k")
                .unwrap_err()
                .to_string()
                .contains("`k`: expected string, got string that is not UTF-8")
        );
    }
    let array =
        Raw::new(0, 1).key("k", ARRAY).u32(STRING).u64(3).u64(1).bytes(b"a").u64(1).bytes(b"\xff").u64(2).bytes(b"bc");
    let file = GgufFile::from_static(array.0.leak()).unwrap();
    let Some(Value::Array(Array::Octets(strings))) = file.header.metadata.get("k") else { panic!("strings") };
    assert_eq!(strings.iter().collect::<Vec<_>>(), [&b"a"[..], b"\xff", b"bc"]);
    assert_eq!((strings.get(1), strings.get(3)), (Some(&b"\xff"[..]), None));
    assert!(file.header.metadata.strings("k").unwrap_err().to_string().contains("not all UTF-8"));
}

#[test]
fn a_file_that_is_cut_says_how_much_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let tensors = [spec("a", &[1000], GgmlType::F32), spec("b", &[500], GgmlType::F32)];
    let file = write_file(&path, &Metadata::new(), &tensors, 4096);
    let b = file.header.tensor("b").unwrap();
    let (start, needed) = (b.offset, b.offset + b.n_bytes);
    for missing in [1, 2000, 2001, 5000] {
        std::fs::File::options().write(true).open(&path).unwrap().set_len(needed - missing).unwrap();
        let error = GgufFile::open(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("{missing} of {needed} bytes are missing")), "{error}");
        let first = if needed - missing < file.header.tensor("a").unwrap().offset + 4000 { "`a`" } else { "`b`" };
        assert!(error.contains(first), "{error}: {start}");
    }
}

#[test]
fn array_lengths_that_lie() {
    let array = |ty: u32, len: u64| Raw::new(0, 1).key("k", ARRAY).u32(ty).u64(len).bytes(&[0; 16]).0;
    assert_rejects(array(U8, limits::MAX_ARRAY_LEN + 1), "the array length of the value of metadata key `k`");
    assert_rejects(array(U8, 17), "needs 17 bytes");
    assert_rejects(array(U32, 5), "needs 20 bytes");
    assert_rejects(array(BOOL, 17), "needs 17 bytes");
    assert_rejects(array(STRING, 3), "needs 24 bytes");
    assert_rejects(array(ARRAY, 2), "needs 24 bytes");
    assert_rejects(array(ARRAY, limits::MAX_NESTED_LEN + 1), "the number of arrays in");
    let string = Raw::new(0, 1).key("k", ARRAY).u32(STRING).u64(1).u64(limits::MAX_STRING_BYTES + 1);
    assert_rejects(string.0, "the length of a string in the value of metadata key `k`");
}

#[test]
fn arrays_nested_too_deeply() {
    let mut raw = Raw::new(0, 1).key("k", ARRAY);
    for _ in 0..100 {
        raw = raw.u32(ARRAY).u64(1);
    }
    assert_rejects(raw.0, "the nesting of the value of metadata key `k` is 4, more than the 3");
}

#[test]
fn unknown_value_types_and_odd_booleans() {
    assert_rejects(Raw::new(0, 1).key("k", 13).u64(0).0, "unknown value type 13");
    assert_rejects(Raw::new(0, 1).key("k", ARRAY).u32(13).u64(0).0, "unknown array type 13");
    assert_rejects(Raw::new(0, 1).key("k", BOOL).bytes(&[2]).0, "is 2, where a truth value is 0 or 1");
}

#[test]
fn the_same_key_twice() {
    assert_rejects(Raw::new(0, 2).key("k", U32).u32(1).key("k", U32).u32(1).0, "metadata key `k` appears twice");
}

#[test]
fn the_same_tensor_twice() {
    let raw = Raw::new(2, 0).tensor("t", &[8], F32, 0).tensor("t", &[8], F32, 32).data(64);
    assert_rejects(raw.0, "tensor `t` appears twice");
}

#[test]
fn a_tensor_name_that_is_too_long() {
    let raw = Raw::new(1, 0).u64(limits::MAX_NAME_BYTES + 1).bytes(&[b'n'; 2000]);
    assert_rejects(raw.0, "the length of the name of tensor number 0");
}

#[test]
fn too_many_dimensions_and_impossible_shapes() {
    assert_rejects(Raw::new(1, 0).tensor("t", &[1; 5], F32, 0).data(32).0, "number of dimensions");
    for shape in [&[0][..], &[4, 0], &[u64::MAX], &[1 << 40, 1 << 40], &[u64::MAX, 0]] {
        assert_rejects(Raw::new(1, 0).tensor("t", shape, F32, 0).data(32).0, "tensor `t` has the impossible shape");
    }
    assert_rejects(Raw::new(1, 0).tensor("t", &[1 << 62], F32, 0).data(32).0, "tensor `t`");
}

#[test]
fn rows_that_are_no_whole_blocks() {
    let q4_0 = GgmlType::Q4_0.id();
    assert_rejects(Raw::new(1, 0).tensor("t", &[16, 2], q4_0, 0).data(64).0, "no whole blocks of Q4_0");
}

#[test]
fn a_tensor_outside_of_the_file() {
    assert_rejects(Raw::new(1, 0).tensor("t", &[9], F32, 0).data(32).0, "but the file has only 96");
    assert_rejects(Raw::new(1, 0).tensor("t", &[8], F32, 1 << 40).data(32).0, "truncated or damaged");
    assert_rejects(Raw::new(1, 0).tensor("t", &[8], F32, u64::MAX - 31).data(32).0, "truncated or damaged");
    assert_rejects(Raw::new(1, 0).tensor("t", &[8], 99, 64).data(32).0, "truncated or damaged");
}

#[test]
fn a_misaligned_tensor() {
    assert_rejects(Raw::new(1, 0).tensor("t", &[1], F32, 4).data(32).0, "starts at 4, not at a multiple of 32");
}

#[test]
fn overlapping_tensors() {
    let raw = Raw::new(2, 0).tensor("a", &[16], F32, 32).tensor("b", &[16], F32, 0).data(96);
    assert_rejects(raw.0, "tensor `b` overlaps with tensor `a`");
    let raw = Raw::new(2, 0).tensor("a", &[8], F32, 0).tensor("b", &[8], F32, 0).data(32);
    assert_rejects(raw.0, "overlaps");
    let raw = Raw::new(2, 0).tensor("a", &[8], 99, 0).tensor("b", &[8], F32, 0).data(32);
    assert_rejects(raw.0, "overlaps");
}

#[test]
fn a_tensor_of_unknown_type_spans_to_the_next() {
    let raw = Raw::new(2, 0).tensor("b", &[8], 99, 64).tensor("a", &[8], 98, 0).data(100);
    let header = parse(raw.0).unwrap();
    assert_eq!(header.tensor("a").unwrap().n_bytes, 64);
    assert_eq!(header.tensor("b").unwrap().n_bytes, 36);
}

#[test]
fn alignments() {
    let aligned = |alignment: u32| {
        let mut raw = Raw::new(1, 1).key("general.alignment", U32).u32(alignment).tensor("t", &[1], F32, 0);
        raw.0.resize(8192, 0);
        raw.0
    };
    for alignment in [1, 2, 32, 4096] {
        let header = parse(aligned(alignment)).unwrap();
        assert_eq!(header.data_offset % u64::from(alignment), 0);
        assert_eq!(header.alignment, u64::from(alignment));
    }
    for alignment in [0, 3, 48] {
        assert_rejects(aligned(alignment), "must be a power of two");
    }
    assert_rejects(aligned(1 << 31), "truncated or damaged");
    let text = Raw::new(0, 1).key("general.alignment", STRING).string("32");
    assert_rejects(text.0, "`general.alignment`: expected an unsigned 64-bit integer, got string");
}

#[test]
fn a_header_that_never_ends() {
    /// A source that claims to be long and holds nothing but zeros behind its start.
    #[derive(Debug)]
    struct Endless(Vec<u8>);
    impl ReadAt for Endless {
        fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
            for (i, byte) in buf.iter_mut().enumerate() {
                *byte = self.0.get(offset as usize + i).copied().unwrap_or(0);
            }
            Ok(())
        }
        fn len(&self) -> u64 {
            u64::MAX / 2
        }
    }
    let mut raw = Raw::new(0, 64);
    for i in 0..64 {
        // Sixteen million zero bytes follow each of these few.
        raw = raw.key(&format!("k{i}"), ARRAY).u32(U8).u64(0);
    }
    assert!(Header::parse(&Endless(raw.0)).is_ok());
    let raw = Raw::new(0, 1).key("k", ARRAY).u32(10).u64(limits::MAX_ARRAY_LEN);
    let error = Header::parse(&Endless(raw.0)).unwrap_err();
    assert!(matches!(error, GgufError::Limit { .. }), "{error}");
}

#[test]
fn a_source_that_is_shorter_than_it_says() {
    #[derive(Debug)]
    struct Shrunk(MemorySource<Vec<u8>>);
    impl ReadAt for Shrunk {
        fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
            self.0.read_exact_at(buf, offset)
        }
        fn len(&self) -> u64 {
            self.0.len() + 100
        }
    }
    let raw = Raw::new(0, 1).key("k", U32);
    let error = Header::parse(&Shrunk(MemorySource(raw.0))).unwrap_err();
    assert!(matches!(error, GgufError::Io { .. }), "{error}");
}

fn sample_file() -> Vec<u8> {
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", "test");
    metadata.insert("tokens", ["one", "two", "三"].into_iter().collect::<StringArray>());
    metadata.insert("flags", vec![true, false]);
    metadata.insert("nested", Value::Array(Array::Array(vec![Array::U16(vec![1, 2]), Array::F64(vec![0.5])])));
    metadata.insert("rate", 1.5f32);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sample.gguf");
    let tensors = [spec("a", &[32, 2], GgmlType::Q4_0), spec("b", &[8], GgmlType::F32)];
    write_file(&path, &metadata, &tensors, 32);
    std::fs::read(path).unwrap()
}

#[test]
fn truncation_at_every_byte_is_an_error() {
    let file = sample_file();
    assert!(parse(file.clone()).is_ok());
    for len in 0..file.len() {
        let error = parse(&file[..len]).expect_err("a truncated file was accepted");
        assert!(!matches!(error, GgufError::Io { .. }), "{len}: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever is overwritten, parsing ends, and what it accepts can be read without harm.
    #[test]
    fn damage_never_panics(at in 0usize..400, damage in prop::collection::vec(any::<u8>(), 1..9)) {
        let mut file = sample_file_cached().to_vec();
        for (i, byte) in damage.into_iter().enumerate() {
            let len = file.len();
            file[(at + i) % len] = byte;
        }
        if let Ok(file) = GgufFile::from_source(std::sync::Arc::new(MemorySource(file))) {
            for tensor in &file.header.tensors {
                prop_assert_eq!(file.read_tensor(tensor).unwrap().len() as u64, tensor.n_bytes);
            }
        }
    }

    /// The same for bytes that were never a file behind a plausible start.
    #[test]
    fn noise_never_panics(tensors in 0u64..4, keys in 0u64..4, noise in prop::collection::vec(0u8..14, 0..300)) {
        let _ = parse(Raw::new(tensors, keys).bytes(&noise).0);
    }
}

fn sample_file_cached() -> &'static [u8] {
    static FILE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    FILE.get_or_init(sample_file)
}
