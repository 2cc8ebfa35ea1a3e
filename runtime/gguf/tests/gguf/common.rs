//! A header put together by hand, so that it can lie.

use std::path::Path;

use st_gguf::{GgmlType, GgufError, GgufFile, GgufWriter, Header, MemorySource, Metadata, TensorSpec, WriteOptions};

pub(crate) fn parse(bytes: impl Into<Vec<u8>>) -> Result<Header, GgufError> {
    Header::parse(&MemorySource(bytes.into()))
}

/// Asserts that `bytes` are refused with a message that contains `message`.
#[track_caller]
pub(crate) fn assert_rejects(bytes: impl Into<Vec<u8>>, message: &str) {
    match parse(bytes) {
        Ok(_) => panic!("accepted; expected: {message}"),
        Err(error) => assert!(error.to_string().contains(message), "got: {error}\nexpected: {message}"),
    }
}

/// A header under construction.
#[derive(Clone)]
pub(crate) struct Raw(pub(crate) Vec<u8>);

impl Raw {
    /// Magic, version 3, and the two counts.
    pub(crate) fn new(n_tensors: u64, n_keys: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(3).u64(n_tensors).u64(n_keys)
    }

    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn u32(self, v: u32) -> Self {
        self.bytes(&v.to_le_bytes())
    }

    pub(crate) fn u64(self, v: u64) -> Self {
        self.bytes(&v.to_le_bytes())
    }

    pub(crate) fn string(self, s: &str) -> Self {
        self.u64(s.len() as u64).bytes(s.as_bytes())
    }

    /// A key and the number of its value's type; the value is to follow.
    pub(crate) fn key(self, key: &str, value_type: u32) -> Self {
        self.string(key).u32(value_type)
    }

    pub(crate) fn tensor(mut self, name: &str, shape: &[u64], ty: u32, offset: u64) -> Self {
        self = self.string(name).u32(shape.len() as u32);
        for &n in shape {
            self = self.u64(n);
        }
        self.u32(ty).u64(offset)
    }

    /// Pads to a multiple of 32 and appends `n` bytes of tensor data.
    pub(crate) fn data(mut self, n: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(32) + n, 0xaa);
        self
    }
}

pub(crate) fn spec(name: &str, shape: &[u64], ty: GgmlType) -> TensorSpec {
    TensorSpec { name: name.into(), shape: shape.into(), ty }
}

/// Writes a file in which every tensor's bytes count upwards.
pub(crate) fn write_file(path: &Path, metadata: &Metadata, tensors: &[TensorSpec], alignment: u64) -> GgufFile {
    write(path, metadata, tensors, alignment);
    GgufFile::open(path).unwrap()
}

/// [`write_file`] without opening it.
pub(crate) fn write(path: &Path, metadata: &Metadata, tensors: &[TensorSpec], alignment: u64) {
    let options = WriteOptions { alignment, overwrite: true };
    let mut writer = GgufWriter::create(path, metadata, tensors, options).unwrap();
    for size in writer.plan().sizes.clone() {
        writer.write(&counting(size)).unwrap();
    }
    writer.finish().unwrap();
}

pub(crate) fn counting(n: u64) -> Vec<u8> {
    (0..n).map(|i| (i % 251) as u8).collect()
}

pub(crate) fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
