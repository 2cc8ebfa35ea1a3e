//! What can go wrong, in words for the person who owns the file.

use std::io;
use std::path::PathBuf;

use st_format::FormatError;

use crate::{GgmlType, Placeholder};

/// The result of every fallible function here.
pub type Result<T, E = GgufError> = std::result::Result<T, E>;

/// Why a GGUF file cannot be read or written. `file` is its path, or a description of bytes in memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// The operating system refused an operation.
    #[error("{file}: cannot {action}")]
    Io {
        /// The file.
        file: String,
        /// What was attempted, such as `open the file`.
        action: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The path names a directory, a pipe or a device.
    #[error("{file}: not a regular file")]
    NotAFile {
        /// The path.
        file: String,
    },
    /// The first four bytes are not `GGUF`.
    #[error("{file}: not a GGUF file: it starts with {found}, not with \"GGUF\"")]
    NotGguf {
        /// The file.
        file: String,
        /// The bytes met, escaped.
        found: String,
    },
    /// The file stands for one that was never fetched.
    #[error("{file} is {what}")]
    Placeholder {
        /// The file.
        file: String,
        /// What it is.
        what: Placeholder,
    },
    /// A GGUF file of the other byte order.
    #[error("{file}: a big-endian GGUF file; only little-endian ones are read")]
    BigEndian {
        /// The file.
        file: String,
    },
    /// A version other than 2 and 3.
    #[error("{file}: GGUF version {version} is not supported (versions 2 and 3 are)")]
    Version {
        /// The file.
        file: String,
        /// The version it states.
        version: u32,
    },
    /// The file ends before what its header announces.
    #[error(
        "{file}: the file is truncated or damaged: {what} needs {needed} bytes at offset {offset}, but {left} are left"
    )]
    Truncated {
        /// The file.
        file: String,
        /// What was being read.
        what: String,
        /// Where it starts.
        offset: u64,
        /// Bytes it needs at least.
        needed: u64,
        /// Bytes left in the file from there.
        left: u64,
    },
    /// The file ends before its last tensor does.
    #[error(
        "{file}: tensor `{tensor}` lies at bytes {start}..{end}, but the file has only {len}: it is truncated or \
         damaged ({} of {needed} bytes are missing)", needed.saturating_sub(*len)
    )]
    Cut {
        /// The file.
        file: String,
        /// The first tensor that is not whole.
        tensor: String,
        /// Where it starts.
        start: u64,
        /// Where it would end.
        end: u64,
        /// Bytes that the file needs at least.
        needed: u64,
        /// Bytes that it has.
        len: u64,
    },
    /// One part of a split file whose other parts are not where their names say.
    #[error("{file}: this is part {number} of {count} of a split file{}", missing_clause(missing.as_deref()))]
    SplitPart {
        /// The file.
        file: String,
        /// Which part it is, from 1.
        number: u64,
        /// How many there are.
        count: u64,
        /// The part that is missing, where the name of this one says how it is called.
        missing: Option<String>,
    },
    /// A count or length above the cap of [`limits`](crate::limits).
    #[error("{file}: {what} is {got}, more than the {limit} allowed: the file is damaged")]
    Limit {
        /// The file.
        file: String,
        /// What is counted.
        what: String,
        /// The count stated.
        got: u64,
        /// The most that is accepted.
        limit: u64,
    },
    /// A header field with a value that cannot be.
    #[error("{file}: {what}: {problem}")]
    Malformed {
        /// The file.
        file: String,
        /// The field.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The same metadata key twice.
    #[error("{file}: metadata key `{key}` appears twice")]
    DuplicateKey {
        /// The file.
        file: String,
        /// The key.
        key: String,
    },
    /// The same tensor name twice.
    #[error("{file}: tensor `{tensor}` appears twice")]
    DuplicateTensor {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
    },
    /// A tensor whose shape, type or place cannot be.
    #[error("{file}: tensor `{tensor}` {problem}")]
    Tensor {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// What is wrong, as the rest of the sentence.
        problem: String,
    },
    /// A metadata key that is needed and absent.
    #[error("{file}: metadata key `{key}` is missing")]
    MissingKey {
        /// The file.
        file: String,
        /// The key.
        key: String,
    },
    /// A metadata key with a value of another type than needed.
    #[error("{file}: metadata key `{key}`: expected {expected}, got {got}")]
    KeyType {
        /// The file.
        file: String,
        /// The key.
        key: String,
        /// The type needed.
        expected: String,
        /// The type, or the value that does not fit.
        got: String,
    },
    /// A tensor that is needed and absent.
    #[error("{file}: tensor `{tensor}` is missing")]
    MissingTensor {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
    },
    /// Down matrices that are transposed, as PowerInfer wants them.
    #[error("{file}: tensor `{tensor}` is transposed: this is a file for PowerInfer alone")]
    TransposedDown {
        /// The file.
        file: String,
        /// Its name.
        tensor: String,
    },
    /// A tensor of another shape than needed. Shapes are in ggml order, fastest dimension first.
    #[error("{file}: tensor `{tensor}`: expected shape {expected:?}, got {got:?}")]
    Shape {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The shape needed.
        expected: Vec<u64>,
        /// The shape found.
        got: Vec<u64>,
    },
    /// A tensor of another type than needed.
    #[error("{file}: tensor `{tensor}`: expected type {expected}, got {got}")]
    Type {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The type needed.
        expected: GgmlType,
        /// The type found.
        got: GgmlType,
    },
    /// Data that is not what it was when the file was written.
    #[error(
        "{file}: {}tensor `{tensor}` at byte {offset} is damaged: crc32c is {got:#010x}, the file states {expected:#010x}",
        expert_of(.expert)
    )]
    Damaged {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Which expert of a tensor of experts.
        expert: Option<usize>,
        /// Where the damaged part starts, from the start of the file.
        offset: u64,
        /// CRC-32C of the bytes read.
        got: u32,
        /// CRC-32C that the file states.
        expected: u32,
    },
    /// The file holds no SmallThinker model that is computed here.
    #[error("{file}: {problem}")]
    Model {
        /// The file.
        file: String,
        /// What is wrong.
        problem: Box<FormatError>,
    },
    /// The output exists and replacing it was not allowed.
    #[error("{}: the file exists already", path.display())]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// The output exists and is of another kind; such a file is never replaced.
    #[error("{}: the file exists and is not {kind}: it is left as it is", path.display())]
    OtherKind {
        /// The output.
        path: PathBuf,
        /// What would be written.
        kind: &'static str,
    },
    /// The output is a link that stands for an open file of a process.
    #[error("{file}: it leads to an open file of a process, and is no file of its own")]
    Descriptor {
        /// The output.
        file: String,
    },
    /// The output is `-`.
    #[error("-: {kind} goes to a file of its own, not to stdout")]
    Stdout {
        /// What would be written.
        kind: &'static str,
    },
    /// The output would lie in a folder that does not exist.
    #[error("{}: the folder {} does not exist", path.display(), folder.display())]
    NoFolder {
        /// The output.
        path: PathBuf,
        /// The folder.
        folder: PathBuf,
    },
    /// Another process is writing the same output.
    #[error("{}: another process is writing this file (it holds {})", path.display(), partial.display())]
    Busy {
        /// The output.
        path: PathBuf,
        /// The partial file that is locked.
        partial: PathBuf,
    },
    /// The disk is too full for the output.
    #[error("{}: not enough disk space: {needed} bytes are needed{}", path.display(), available_clause(*.available))]
    NoSpace {
        /// The output.
        path: PathBuf,
        /// Bytes of the complete file.
        needed: u64,
        /// Bytes free for it, where known.
        available: Option<u64>,
        /// The system's reason, where a write failed.
        #[source]
        source: Option<io::Error>,
    },
    /// The caller wrote more or less data than the tensors it announced.
    #[error("{file}: tensor data of {expected} bytes was announced, {got} bytes were written")]
    DataSize {
        /// The output.
        file: String,
        /// Bytes announced.
        expected: u64,
        /// Bytes written, or attempted.
        got: u64,
    },
}

fn available_clause(available: Option<u64>) -> String {
    available.map_or_else(String::new, |bytes| format!(", {bytes} are free"))
}

fn missing_clause(missing: Option<&str>) -> String {
    missing.map_or_else(String::new, |path| format!(", and {path} is not there"))
}

impl GgufError {
    pub(crate) fn io(file: impl ToString, action: impl Into<String>, source: io::Error) -> Self {
        Self::Io { file: file.to_string(), action: action.into(), source }
    }

    pub(crate) fn tensor(file: impl ToString, tensor: &str, problem: impl Into<String>) -> Self {
        Self::Tensor { file: file.to_string(), tensor: tensor.to_owned(), problem: problem.into() }
    }

    pub(crate) fn malformed(file: impl ToString, what: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Malformed { file: file.to_string(), what: what.into(), problem: problem.into() }
    }
}

/// The beginning of a sentence about a part of a tensor.
fn expert_of(expert: &Option<usize>) -> String {
    expert.map_or_else(String::new, |expert| format!("expert {expert} of "))
}
