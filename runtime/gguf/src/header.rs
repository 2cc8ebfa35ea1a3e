//! The header of a GGUF file: metadata and the table of tensors, each of which is known to lie inside the
//! file, aligned and apart from the others, once [`Header::parse`] has returned it.

use std::collections::HashMap;
use std::sync::Arc;

use st_format::{Described, ModelShape, same_shape, tensor_names};

use crate::checksums::Checksums;
use crate::encode::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC};
use crate::error::{GgufError, Result};
use crate::parse::{Context, Cursor};
use crate::source::{ReadAt, name_of};
use crate::split;
use crate::{GgmlType, Metadata, Placeholder, Value, limits};

/// Where a tensor lies and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its shape in ggml order: fastest dimension first. Empty for a single number.
    pub shape: Vec<u64>,
    /// The type of its elements.
    pub ty: GgmlType,
    /// Where it starts, from the start of the file.
    pub offset: u64,
    /// Its bytes. For a type that is not known: all up to the next tensor or the end of the file.
    pub n_bytes: u64,
}

impl TensorInfo {
    /// Number of elements.
    pub fn n_elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// Everything that comes before the tensor data.
#[derive(Clone, Debug)]
pub struct Header {
    /// The version of the format: 2 or 3.
    pub version: u32,
    /// Keys and values, in file order.
    pub metadata: Metadata,
    /// The tensors, in file order.
    pub tensors: Vec<TensorInfo>,
    /// Every tensor starts at a multiple of this, counted from `data_offset`.
    pub alignment: u64,
    /// Where the tensor data starts.
    pub data_offset: u64,
    /// Length of the file.
    pub file_len: u64,
    index: HashMap<String, usize>,
    file: String,
    /// As the file states them: whoever takes keys out of `metadata` to save memory does not change them.
    pub(crate) checksums: Arc<Checksums>,
}

impl Header {
    /// Reads and checks the header of `source`. Reads no tensor data.
    ///
    /// # Errors
    /// Every [`GgufError`] that concerns reading; each names the file and the field.
    pub fn parse(source: &dyn ReadAt) -> Result<Self> {
        let file = name_of(source);
        let mut cursor = Cursor::new(source, &file);
        let version = check_start(&mut cursor, source, &file)?;

        let n_tensors = cursor.u64()?;
        let n_keys = cursor.u64()?;
        cursor.limit("the number of tensors in", n_tensors, limits::MAX_TENSORS)?;
        cursor.limit("the number of metadata keys in", n_keys, limits::MAX_KEYS)?;
        // Least sizes: a key is a length, a value a type and a byte; a tensor is a name's length, a number
        // of dimensions, a type and an offset.
        cursor.expect(n_keys * 13 + n_tensors * 24, 1)?;

        let mut metadata = Metadata::of_file(&file);
        for i in 0..n_keys {
            cursor.context = Context::Key(i);
            let key = cursor.string(limits::MAX_KEY_BYTES)?;
            cursor.context = Context::Value(key.clone());
            let value = cursor.value()?;
            if metadata.insert(&key, value).is_some() {
                return Err(GgufError::DuplicateKey { file, key });
            }
        }

        let mut tensors = Vec::with_capacity(n_tensors as usize);
        let mut index = HashMap::with_capacity(n_tensors as usize);
        for i in 0..n_tensors {
            let tensor = read_tensor_info(&mut cursor, i)?;
            if index.insert(tensor.name.clone(), tensors.len()).is_some() {
                return Err(GgufError::DuplicateTensor { file, tensor: tensor.name });
            }
            tensors.push(tensor);
        }

        let alignment = metadata.u64(ALIGNMENT_KEY)?.unwrap_or(DEFAULT_ALIGNMENT);
        if !alignment.is_power_of_two() || alignment > u64::from(u32::MAX) {
            let problem = format!("must be a power of two below 2^32, got {alignment}");
            return Err(GgufError::malformed(file, format!("metadata key `{ALIGNMENT_KEY}`"), problem));
        }
        let data_offset = cursor.pos().next_multiple_of(alignment);
        let file_len = source.len();
        place(&mut tensors, &file, alignment, data_offset, file_len)?;
        let checksums = Arc::default();
        let header = Self { version, metadata, tensors, alignment, data_offset, file_len, index, file, checksums };
        Ok(header.with_checksums())
    }

    /// The header with the sums that it states.
    fn with_checksums(mut self) -> Self {
        self.checksums = Arc::new(Checksums::from_header(&self));
        self
    }

    /// The sums that the file states.
    pub fn checksums(&self) -> &Checksums {
        &self.checksums
    }

    /// The header of a file in parts: the first one's, with the tensors of all, each part starting at its offset.
    pub(crate) fn joined(parts: Vec<(u64, Self)>, file_len: u64) -> Result<Self> {
        let mut parts = parts.into_iter();
        let Some((_, mut joined)) = parts.next() else {
            return Err(GgufError::malformed("a split file", "the number of parts", "is 0"));
        };
        for (start, part) in parts {
            for mut tensor in part.tensors {
                if joined.index.insert(tensor.name.clone(), joined.tensors.len()).is_some() {
                    return Err(GgufError::DuplicateTensor { file: part.file, tensor: tensor.name });
                }
                tensor.offset += start;
                joined.tensors.push(tensor);
            }
        }
        joined.file_len = file_len;
        Ok(joined.with_checksums())
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|&i| &self.tensors[i])
    }

    /// Where the matrix called `name` of a model of this shape lies: the tensor, and the first row in it. Queries, keys and values may be
    /// one tensor.
    ///
    /// # Errors
    /// [`GgufError::MissingTensor`].
    pub fn place_of(&self, name: &str, shape: &ModelShape) -> Result<(&TensorInfo, usize)> {
        let fused = || tensor_names::fused(name, shape).and_then(|(name, row)| Some((self.tensor(&name)?, row)));
        let found = self.tensor(name).map(|tensor| (tensor, 0)).or_else(fused);
        found.map_or_else(|| self.require_tensor(name).map(|tensor| (tensor, 0)), Ok)
    }

    /// The tensor called `name`, or the error that says it is missing.
    ///
    /// # Errors
    /// [`GgufError::MissingTensor`].
    pub fn require_tensor(&self, name: &str) -> Result<&TensorInfo> {
        self.tensor(name).ok_or_else(|| GgufError::MissingTensor { file: self.file.clone(), tensor: name.to_owned() })
    }

    /// The file's path as text, for messages; a description where it lives in memory.
    pub fn file_name(&self) -> &str {
        &self.file
    }

    /// The shape of the SmallThinker model in the file; see [`ModelShape::from_metadata`].
    ///
    /// # Errors
    /// [`GgufError::Model`]; [`GgufError::SplitPart`] for one part of a model.
    pub fn model_shape(&self) -> Result<ModelShape> {
        if let Some((number, count)) = split::part_of(&self.metadata)? {
            return Err(GgufError::SplitPart { file: self.file.clone(), number, count, missing: None });
        }
        ModelShape::from_metadata(self)
            .map_err(|problem| GgufError::Model { file: self.file.clone(), problem: Box::new(problem) })
    }

    /// Fails unless `tensor` has `expected` as its shape (ggml order); trailing dimensions of one do not count.
    ///
    /// # Errors
    /// [`GgufError::Shape`].
    pub fn expect_shape(&self, tensor: &TensorInfo, expected: &[u64]) -> Result<()> {
        if same_shape(&tensor.shape, expected) {
            return Ok(());
        }
        Err(GgufError::Shape {
            file: self.file.clone(),
            tensor: tensor.name.clone(),
            expected: expected.to_vec(),
            got: tensor.shape.clone(),
        })
    }

    /// Fails unless the elements of `tensor` are of type `expected`.
    ///
    /// # Errors
    /// [`GgufError::Type`].
    pub fn expect_type(&self, tensor: &TensorInfo, expected: GgmlType) -> Result<()> {
        if tensor.ty == expected {
            return Ok(());
        }
        let (file, name) = (self.file.clone(), tensor.name.clone());
        Err(GgufError::Type { file, tensor: name, expected, got: tensor.ty })
    }
}

impl Described for Header {
    fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    fn keys(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.metadata.iter().map(|(key, _)| key))
    }

    fn tensor_shape(&self, name: &str) -> Option<&[u64]> {
        self.tensor(name).map(|tensor| &*tensor.shape)
    }

    fn tensor_names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.tensors.iter().map(|tensor| &*tensor.name))
    }
}

/// Checks magic and version; leaves the cursor behind them.
fn check_start(cursor: &mut Cursor<'_>, source: &dyn ReadAt, file: &str) -> Result<u32> {
    let mut magic = [0; 4];
    let known = source.len().min(4) as usize;
    source
        .read_exact_at(&mut magic[..known], 0)
        .map_err(|source| GgufError::io(file, "read the first bytes", source))?;
    if magic[..known] != MAGIC[..known] || known == 0 {
        if let Some(what) = placeholder(source) {
            return Err(GgufError::Placeholder { file: file.to_owned(), what });
        }
        let found = if known == 0 {
            "nothing (it is empty)".to_owned()
        } else {
            format!("\"{}\"", magic[..known].escape_ascii())
        };
        return Err(GgufError::NotGguf { file: file.to_owned(), found });
    }
    cursor.u32()?;
    let version = cursor.u32()?;
    match version {
        2 | 3 => Ok(version),
        // A small number, read in the wrong byte order, has its low half empty.
        swapped if swapped != 0 && swapped & 0xffff == 0 => Err(GgufError::BigEndian { file: file.to_owned() }),
        version => Err(GgufError::Version { file: file.to_owned(), version }),
    }
}

/// What a source that is no GGUF file is instead, where that can be told.
fn placeholder(source: &dyn ReadAt) -> Option<Placeholder> {
    let mut start = vec![0; source.len().min(Placeholder::PREFIX_BYTES as u64) as usize];
    source.read_exact_at(&mut start, 0).ok()?;
    Placeholder::of(&start)
}

/// Reads one entry of the tensor table. `offset` is still relative and `n_bytes` unset.
fn read_tensor_info(cursor: &mut Cursor<'_>, i: u64) -> Result<TensorInfo> {
    cursor.context = Context::TensorName(i);
    let name = cursor.string(limits::MAX_NAME_BYTES)?;
    cursor.context = Context::Tensor(name.clone());
    let n_dims = cursor.u32()?;
    cursor.limit("the number of dimensions in", n_dims.into(), limits::MAX_DIMS.into())?;
    let mut shape = Vec::with_capacity(n_dims as usize);
    for _ in 0..n_dims {
        shape.push(cursor.u64()?);
    }
    let ty = GgmlType::from_id(cursor.u32()?);
    let offset = cursor.u64()?;
    Ok(TensorInfo { name, shape, ty, offset, n_bytes: 0 })
}

/// Turns relative offsets into absolute ones, computes sizes, and proves that the tensors are aligned, lie
/// inside the file and do not overlap.
fn place(tensors: &mut [TensorInfo], file: &str, alignment: u64, data_offset: u64, file_len: u64) -> Result<()> {
    let sized = tensors.iter().map(|tensor| (tensor.offset, tensor.ty.bytes_for_shape(&tensor.shape).unwrap_or(0)));
    let needed = sized.map(|(offset, bytes)| data_offset.saturating_add(offset).saturating_add(bytes)).max();
    for tensor in &mut *tensors {
        let invalid = |problem: String| GgufError::tensor(file, &tensor.name, problem);
        let elements = tensor.shape.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim));
        if elements.is_none_or(|n| n == 0 || n > i64::MAX as u64) {
            return Err(invalid(format!("has the impossible shape {:?}", tensor.shape)));
        }
        if !tensor.offset.is_multiple_of(alignment) {
            let offset = tensor.offset;
            return Err(invalid(format!("starts at {offset}, not at a multiple of {alignment}")));
        }
        if !matches!(tensor.ty, GgmlType::Unknown(_)) {
            tensor.n_bytes = tensor.ty.bytes_for_shape(&tensor.shape).ok_or_else(|| {
                let (shape, ty) = (&tensor.shape, tensor.ty);
                invalid(format!("has shape {shape:?}, whose rows are no whole blocks of {ty}"))
            })?;
        }
        let start = data_offset.saturating_add(tensor.offset);
        let end = start.saturating_add(tensor.n_bytes);
        if end > file_len {
            let needed = needed.unwrap_or(end).max(end);
            return Err(GgufError::Cut {
                file: file.to_owned(),
                tensor: tensor.name.clone(),
                start,
                end,
                needed,
                len: file_len,
            });
        }
        tensor.offset = start;
    }

    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_unstable_by_key(|&i| tensors[i].offset);
    for pair in order.windows(2) {
        let next = tensors[pair[1]].offset;
        let tensor = &mut tensors[pair[0]];
        if matches!(tensor.ty, GgmlType::Unknown(_)) {
            tensor.n_bytes = next - tensor.offset;
        }
        if tensor.n_bytes == 0 || next - tensor.offset < tensor.n_bytes {
            let name = tensor.name.clone();
            let other = &tensors[pair[1]].name;
            return Err(GgufError::tensor(file, &name, format!("overlaps with tensor `{other}`")));
        }
    }
    if let Some(&last) = order.last()
        && matches!(tensors[last].ty, GgmlType::Unknown(_))
    {
        tensors[last].n_bytes = file_len - tensors[last].offset;
    }
    Ok(())
}
