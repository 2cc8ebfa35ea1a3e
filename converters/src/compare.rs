//! Differences between what a conversion produces and a file that is there already, tensor by tensor.

use std::collections::HashSet;
use std::fmt;

use st_gguf::{GgmlType, GgufFile, TensorInfo, TensorSpec};

use crate::error::ConvertError;

/// How one tensor differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The tensor.
    pub tensor: String,
    /// What differs.
    pub kind: DifferenceKind,
}

/// What differs between two tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DifferenceKind {
    /// The file has no such tensor.
    Missing,
    /// The file has a tensor that the conversion does not make.
    Extra,
    /// Another shape (fastest dimension first).
    Shape {
        /// In the file.
        got: Vec<u64>,
        /// Of the conversion.
        expected: Vec<u64>,
    },
    /// Another type.
    Type {
        /// In the file.
        got: GgmlType,
        /// Of the conversion.
        expected: GgmlType,
    },
    /// Other contents.
    Bytes {
        /// Bytes that differ.
        count: u64,
        /// Bytes of the tensor.
        total: u64,
        /// Position of the first one in the tensor.
        first: u64,
    },
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tensor = &self.tensor;
        match &self.kind {
            DifferenceKind::Missing => write!(f, "{tensor}: missing from the file"),
            DifferenceKind::Extra => write!(f, "{tensor}: in the file only"),
            DifferenceKind::Shape { got, expected } => write!(f, "{tensor}: shape {got:?}, expected {expected:?}"),
            DifferenceKind::Type { got, expected } => write!(f, "{tensor}: type {got}, expected {expected}"),
            DifferenceKind::Bytes { count, total, first } => {
                write!(f, "{tensor}: {count} of {total} bytes differ, the first at {first}")
            }
        }
    }
}

/// A comparison in progress: takes the bytes of the expected tensors in order.
pub(crate) struct Comparison<'a> {
    file: GgufFile,
    expected: &'a [TensorSpec],
    /// Per expected tensor: its counterpart, where its bytes can be compared.
    counterparts: Vec<Option<TensorInfo>>,
    differences: Vec<Difference>,
    /// The tensor that the last bytes belonged to, and how far it was compared.
    tensor: usize,
    position: u64,
    buffer: Vec<u8>,
}

impl<'a> Comparison<'a> {
    pub(crate) fn new(file: GgufFile, expected: &'a [TensorSpec]) -> Self {
        let mut differences = Vec::new();
        let counterparts = expected.iter().map(|spec| {
            let info = file.header.tensor(&spec.name);
            let kind = match info {
                None => DifferenceKind::Missing,
                Some(info) if info.shape != spec.shape => {
                    DifferenceKind::Shape { got: info.shape.clone(), expected: spec.shape.clone() }
                }
                Some(info) if info.ty != spec.ty => DifferenceKind::Type { got: info.ty, expected: spec.ty },
                Some(info) => return Some(info.clone()),
            };
            differences.push(Difference { tensor: spec.name.clone(), kind });
            None
        });
        let counterparts = counterparts.collect();
        let names: HashSet<&str> = expected.iter().map(|spec| spec.name.as_str()).collect();
        for info in file.header.tensors.iter().filter(|info| !names.contains(info.name.as_str())) {
            differences.push(Difference { tensor: info.name.clone(), kind: DifferenceKind::Extra });
        }
        Self { file, expected, counterparts, differences, tensor: 0, position: 0, buffer: Vec::new() }
    }

    /// Compares the next bytes of expected tensor `tensor`.
    pub(crate) fn add(&mut self, tensor: usize, bytes: &[u8]) -> Result<(), ConvertError> {
        if tensor != self.tensor {
            (self.tensor, self.position) = (tensor, 0);
        }
        let start = self.position;
        self.position += bytes.len() as u64;
        let Some(info) = &self.counterparts[tensor] else { return Ok(()) };
        self.buffer.resize(bytes.len(), 0);
        self.file.read_unchecked(info, start, &mut self.buffer)?;
        if self.buffer == bytes {
            return Ok(());
        }
        let differing = || bytes.iter().zip(&self.buffer).enumerate().filter(|(_, (a, b))| a != b);
        let first_here = start + differing().next().map_or(0, |(at, _)| at as u64);
        let here = differing().count() as u64;
        let name = &self.expected[tensor].name;
        match self.differences.last_mut() {
            Some(Difference { tensor, kind: DifferenceKind::Bytes { count, .. } }) if tensor == name => *count += here,
            _ => self.differences.push(Difference {
                tensor: name.clone(),
                kind: DifferenceKind::Bytes { count: here, total: info.n_bytes, first: first_here },
            }),
        }
        Ok(())
    }

    pub(crate) fn finish(self) -> Vec<Difference> {
        self.differences
    }
}
