//! The header as bytes, and where each tensor goes: the part of writing that touches no disk.

use std::collections::HashSet;

use crate::error::{GgufError, Result};
use crate::{Array, GgmlType, Metadata, Value, limits};

pub(crate) const MAGIC: [u8; 4] = *b"GGUF";
pub(crate) const ALIGNMENT_KEY: &str = "general.alignment";
/// What holds where the key is absent, as the format says.
pub(crate) const DEFAULT_ALIGNMENT: u64 = 32;
const VERSION: u32 = 3;

/// ggml's numbers for the types of metadata values.
pub(crate) mod value_type {
    pub(crate) const U8: u32 = 0;
    pub(crate) const I8: u32 = 1;
    pub(crate) const U16: u32 = 2;
    pub(crate) const I16: u32 = 3;
    pub(crate) const U32: u32 = 4;
    pub(crate) const I32: u32 = 5;
    pub(crate) const F32: u32 = 6;
    pub(crate) const BOOL: u32 = 7;
    pub(crate) const STRING: u32 = 8;
    pub(crate) const ARRAY: u32 = 9;
    pub(crate) const U64: u32 = 10;
    pub(crate) const I64: u32 = 11;
    pub(crate) const F64: u32 = 12;
}

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name, at most [`limits::MAX_WRITTEN_NAME_BYTES`] bytes.
    pub name: String,
    /// Its shape in ggml order: fastest dimension first.
    pub shape: Vec<u64>,
    /// The type of its elements.
    pub ty: GgmlType,
}

/// Where everything of a file goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Bytes before the first tensor, padding included.
    pub header_bytes: u64,
    /// Where each tensor starts, from the start of the file, in the order of the specs.
    pub offsets: Vec<u64>,
    /// Bytes of each tensor, without padding.
    pub sizes: Vec<u64>,
    /// Bytes of the whole file; the last tensor is padded like the others.
    pub total: u64,
}

/// Computes where `tensors` go in a file with `metadata`, every one at a multiple of `alignment` bytes.
///
/// # Errors
/// [`GgufError::Malformed`] for an alignment that is not a power of two, and for metadata outside of
/// [`limits`]; [`GgufError::Tensor`] for a tensor whose name, shape or type cannot be written.
pub fn plan(metadata: &Metadata, tensors: &[TensorSpec], alignment: u64) -> Result<Plan> {
    encode(metadata, tensors, alignment).map(|(_, plan)| plan)
}

/// The header's bytes, padded to where the tensor data starts, and the plan they state.
///
/// # Errors
/// As [`plan`].
pub fn encode(metadata: &Metadata, tensors: &[TensorSpec], alignment: u64) -> Result<(Vec<u8>, Plan)> {
    const FILE: &str = "GGUF to be written";
    let stored_alignment =
        u32::try_from(alignment).ok().filter(|alignment| alignment.is_power_of_two()).ok_or_else(|| {
            let problem = format!("must be a power of two below 2^32, got {alignment}");
            GgufError::malformed(FILE, "alignment", problem)
        })?;
    check_limit("number of tensors", tensors.len() as u64, limits::MAX_TENSORS)?;
    let mut metadata = metadata.clone();
    metadata.insert(ALIGNMENT_KEY, stored_alignment);
    check_limit("number of metadata keys", metadata.len() as u64, limits::MAX_KEYS)?;

    let mut names = HashSet::with_capacity(tensors.len());
    let mut sizes = Vec::with_capacity(tensors.len());
    let mut relative = Vec::with_capacity(tensors.len());
    let mut data_bytes = 0u64;
    for spec in tensors {
        let invalid = |problem: String| GgufError::tensor(FILE, &spec.name, problem);
        if spec.name.is_empty() || spec.name.len() as u64 > limits::MAX_WRITTEN_NAME_BYTES {
            let limit = limits::MAX_WRITTEN_NAME_BYTES;
            return Err(invalid(format!("needs a name of 1 to {limit} bytes")));
        }
        if !names.insert(spec.name.as_str()) {
            return Err(GgufError::DuplicateTensor { file: FILE.into(), tensor: spec.name.clone() });
        }
        if spec.shape.len() > limits::MAX_DIMS as usize || spec.shape.contains(&0) {
            return Err(invalid(format!("cannot be written with shape {:?}", spec.shape)));
        }
        let size = spec
            .ty
            .bytes_for_shape(&spec.shape)
            .ok_or_else(|| invalid(format!("of shape {:?} is no whole number of {} blocks", spec.shape, spec.ty)))?;
        relative.push(data_bytes);
        sizes.push(size);
        data_bytes = data_bytes
            .checked_add(size)
            .and_then(|end| end.checked_next_multiple_of(alignment))
            .ok_or_else(|| invalid("makes the file larger than 2^64 bytes".into()))?;
    }

    let mut out = Vec::new();
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    put_len(&mut out, tensors.len());
    put_len(&mut out, metadata.len());
    for (key, value) in metadata.iter() {
        check_limit("length of a metadata key", key.len() as u64, limits::MAX_KEY_BYTES)?;
        put_string(&mut out, key.as_bytes());
        put_value(&mut out, key, value)?;
    }
    for (spec, offset) in tensors.iter().zip(&relative) {
        put_string(&mut out, spec.name.as_bytes());
        out.extend_from_slice(&(spec.shape.len() as u32).to_le_bytes());
        for n in &spec.shape {
            out.extend_from_slice(&n.to_le_bytes());
        }
        out.extend_from_slice(&spec.ty.id().to_le_bytes());
        out.extend_from_slice(&offset.to_le_bytes());
    }
    let header_bytes = (out.len() as u64).next_multiple_of(alignment);
    check_limit("size of the header", header_bytes, limits::MAX_HEADER_BYTES)?;
    out.resize(header_bytes as usize, 0);

    let total = header_bytes
        .checked_add(data_bytes)
        .ok_or_else(|| GgufError::malformed(FILE, "tensor data", "makes the file larger than 2^64 bytes"))?;
    // No sum overflows: each offset is below `data_bytes`.
    let offsets = relative.iter().map(|offset| header_bytes + offset).collect();
    Ok((out, Plan { header_bytes, offsets, sizes, total }))
}

fn check_limit(what: &str, got: u64, limit: u64) -> Result<()> {
    if got <= limit {
        return Ok(());
    }
    let problem = format!("is {got}, more than the {limit} that readers accept");
    Err(GgufError::malformed("GGUF to be written", what, problem))
}

fn put_len(out: &mut Vec<u8>, len: usize) {
    out.extend_from_slice(&(len as u64).to_le_bytes());
}

fn put_string(out: &mut Vec<u8>, string: &[u8]) {
    put_len(out, string.len());
    out.extend_from_slice(string);
}

pub(crate) fn put_value(out: &mut Vec<u8>, key: &str, value: &Value) -> Result<()> {
    macro_rules! put {
        ($id:ident, $v:expr) => {{
            out.extend_from_slice(&value_type::$id.to_le_bytes());
            out.extend_from_slice(&$v.to_le_bytes());
        }};
    }
    match value {
        Value::U8(v) => put!(U8, v),
        Value::I8(v) => put!(I8, v),
        Value::U16(v) => put!(U16, v),
        Value::I16(v) => put!(I16, v),
        Value::U32(v) => put!(U32, v),
        Value::I32(v) => put!(I32, v),
        Value::F32(v) => put!(F32, v),
        Value::Bool(v) => put!(BOOL, u8::from(*v)),
        Value::U64(v) => put!(U64, v),
        Value::I64(v) => put!(I64, v),
        Value::F64(v) => put!(F64, v),
        Value::String(v) => {
            let what = format!("length of the value of metadata key `{key}`");
            check_limit(&what, v.len() as u64, limits::MAX_STRING_BYTES)?;
            out.extend_from_slice(&value_type::STRING.to_le_bytes());
            put_string(out, v.as_bytes());
        }
        Value::Octets(v) => {
            out.extend_from_slice(&value_type::STRING.to_le_bytes());
            put_string(out, v);
        }
        Value::Array(v) => {
            out.extend_from_slice(&value_type::ARRAY.to_le_bytes());
            put_array(out, key, v, 1)?;
        }
    }
    Ok(())
}

fn put_array(out: &mut Vec<u8>, key: &str, array: &Array, depth: u32) -> Result<()> {
    let what = || format!("length of the array of metadata key `{key}`");
    check_limit(&what(), array.len() as u64, limits::MAX_ARRAY_LEN)?;
    macro_rules! put {
        ($id:ident, $v:expr) => {{
            out.extend_from_slice(&value_type::$id.to_le_bytes());
            put_len(out, $v.len());
            for v in $v {
                out.extend_from_slice(&v.to_le_bytes());
            }
        }};
    }
    match array {
        Array::U8(v) => put!(U8, v),
        Array::I8(v) => put!(I8, v),
        Array::U16(v) => put!(U16, v),
        Array::I16(v) => put!(I16, v),
        Array::U32(v) => put!(U32, v),
        Array::I32(v) => put!(I32, v),
        Array::F32(v) => put!(F32, v),
        Array::U64(v) => put!(U64, v),
        Array::I64(v) => put!(I64, v),
        Array::F64(v) => put!(F64, v),
        Array::Bool(v) => {
            out.extend_from_slice(&value_type::BOOL.to_le_bytes());
            put_len(out, v.len());
            out.extend(v.iter().map(|&v| u8::from(v)));
        }
        Array::String(v) => {
            out.extend_from_slice(&value_type::STRING.to_le_bytes());
            put_len(out, v.len());
            for string in v.iter() {
                check_limit(&what(), string.len() as u64, limits::MAX_STRING_BYTES)?;
                put_string(out, string.as_bytes());
            }
        }
        Array::Octets(v) => {
            out.extend_from_slice(&value_type::STRING.to_le_bytes());
            put_len(out, v.len());
            v.iter().for_each(|string| put_string(out, string));
        }
        Array::Array(v) => {
            let depth_of = format!("nesting of the array of metadata key `{key}`");
            check_limit(&depth_of, u64::from(depth) + 1, limits::MAX_ARRAY_DEPTH.into())?;
            check_limit(&what(), v.len() as u64, limits::MAX_NESTED_LEN)?;
            out.extend_from_slice(&value_type::ARRAY.to_le_bytes());
            put_len(out, v.len());
            for inner in v {
                put_array(out, key, inner, depth + 1)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, shape: &[u64], ty: GgmlType) -> TensorSpec {
        TensorSpec { name: name.into(), shape: shape.into(), ty }
    }

    #[test]
    fn offsets_are_aligned_and_the_end_is_padded() {
        let tensors = [spec("a", &[3], GgmlType::F32), spec("b", &[32, 2], GgmlType::Q4_0)];
        let plan = plan(&Metadata::new(), &tensors, 4096).unwrap();
        assert_eq!(plan.header_bytes, 4096);
        assert_eq!(plan.offsets, [4096, 8192]);
        assert_eq!(plan.sizes, [12, 36]);
        assert_eq!(plan.total, 12288);
    }

    #[test]
    fn alignment_replaces_what_the_metadata_said() {
        let mut metadata = Metadata::new();
        metadata.insert(ALIGNMENT_KEY, 32u32);
        metadata.insert("z", 1u32);
        let (bytes, plan) = encode(&metadata, &[], 64).unwrap();
        assert_eq!(plan.total, bytes.len() as u64);
        assert_eq!(bytes.len() % 64, 0);
        assert_eq!(&bytes[16..24], &2u64.to_le_bytes(), "no second alignment key");
    }

    #[test]
    fn what_cannot_be_read_back_is_not_written() {
        let one = |tensor: TensorSpec| plan(&Metadata::new(), &[tensor], 32).unwrap_err().to_string();
        assert!(one(spec("", &[1], GgmlType::F32)).contains("needs a name"));
        assert!(one(spec(&"x".repeat(64), &[1], GgmlType::F32)).contains("1 to 63 bytes"));
        assert!(one(spec("t", &[1; 5], GgmlType::F32)).contains("cannot be written with shape"));
        assert!(one(spec("t", &[0], GgmlType::F32)).contains("cannot be written with shape"));
        assert!(one(spec("t", &[33], GgmlType::Q4_0)).contains("whole number of Q4_0 blocks"));
        assert!(one(spec("t", &[1], GgmlType::Unknown(99))).contains("unknown type 99"));
        let huge = [spec("a", &[u64::MAX], GgmlType::I8), spec("b", &[1], GgmlType::I8)];
        assert!(plan(&Metadata::new(), &huge, 32).is_err());
        let twice = [spec("a", &[1], GgmlType::I8), spec("a", &[1], GgmlType::I8)];
        let error = plan(&Metadata::new(), &twice, 32).unwrap_err();
        assert!(matches!(error, GgufError::DuplicateTensor { .. }), "{error}");
        for alignment in [0, 3, 1 << 32] {
            assert!(plan(&Metadata::new(), &[], alignment).is_err(), "{alignment}");
        }
    }

    #[test]
    fn limits_hold_for_writing_too() {
        let mut deep = Array::U8(vec![1]);
        for _ in 0..limits::MAX_ARRAY_DEPTH {
            deep = Array::Array(vec![deep]);
        }
        for value in [Value::Array(deep), "x".repeat(limits::MAX_STRING_BYTES as usize + 1).into()] {
            let mut metadata = Metadata::new();
            metadata.insert("key", value);
            let error = plan(&metadata, &[], 32).unwrap_err();
            assert!(error.to_string().contains("`key`"), "{error}");
        }
    }
}
