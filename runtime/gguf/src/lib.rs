//! GGUF files: a capped reader for versions 2 and 3, a streaming writer for version 3, and the index
//! that says where each expert's weights lie.
//!
//! This crate owns the file format and nothing else: it moves bytes and checks that they are where the
//! header says. It knows no arithmetic on weights; what a model's metadata mean is st-format's to say, and
//! this crate hands it the file ([`Header::model_shape`]). How an output comes to its name
//! ([`OutputFile`]) is the same for files of other kinds, and is theirs too.
//!
//! ```
//! use st_gguf::{ExpertIndex, GgufFile, Matrix};
//!
//! let file = GgufFile::open("../../models/tiny/tiny-q4_0.gguf")?;
//! let shape = file.header.model_shape()?;
//! println!("{} layers of {} experts", shape.n_layers, shape.n_experts);
//! for tensor in &file.header.tensors {
//!     println!("{}: {} {:?}, {} bytes", tensor.name, tensor.ty, tensor.shape, tensor.n_bytes);
//! }
//! let experts = ExpertIndex::from_header(&file.header, &shape)?;
//! let range = experts.matrix(0, 5, Matrix::Gate);
//! let mut gate = vec![0; range.len as usize];
//! file.source.read_exact_at(&mut gate, range.offset)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Input is not trusted. Every count and length is compared with what is left of the file *and* with a
//! fixed cap ([`limits`]) before anything is allocated, so that a damaged or hostile file costs an error
//! and never a panic or an outsized allocation. Refused outright: version 1, big-endian files, duplicate
//! keys or tensor names, tensors that overlap, are misaligned or leave the file.

mod checksums;
pub mod crc32c;
mod encode;
mod error;
mod expert_index;
mod header;
mod layout;
mod metadata;
mod output;
mod parse;
mod placed;
mod placeholder;
mod reader;
mod source;
mod split;
mod writer;

pub use checksums::{CheckReport, Checksums, checksum_keys, checksum_parts, reserve_checksums};
pub use encode::{Plan, TensorSpec, encode as encode_header, plan};
pub use error::{GgufError, Result};
pub use expert_index::{ByteRange, ExpertIndex};
pub use header::{Header, TensorInfo};
pub use layout::{Layout, RecordLayout, describe_records, layout_keys, tensor_names};
pub use metadata::Metadata;
pub use output::{Kind, OutputFile, begins_with, check_output};
pub use placed::PlacedWriter;
pub use placeholder::Placeholder;
pub use reader::GgufFile;
pub use source::{FileSource, MemorySource, Part, ReadAt};
pub use st_format::{Array, GgmlType, Matrix, ModelShape, OctetArray, StringArray, Value};
pub use writer::{GgufWriter, WriteOptions};

/// Caps on what a header may claim, far above any real file, far below what would hurt.
pub mod limits {
    /// Most metadata keys.
    pub const MAX_KEYS: u64 = 1 << 16;
    /// Most tensors.
    pub const MAX_TENSORS: u64 = 1 << 16;
    /// Longest metadata key in bytes; the format's own bound.
    pub const MAX_KEY_BYTES: u64 = (1 << 16) - 1;
    /// Longest tensor name in bytes that is read. Readers built on ggml stop at [`MAX_WRITTEN_NAME_BYTES`].
    pub const MAX_NAME_BYTES: u64 = 1024;
    /// Longest tensor name in bytes that is written, so that readers built on ggml take the file.
    pub const MAX_WRITTEN_NAME_BYTES: u64 = 63;
    /// Longest single string value in bytes.
    pub const MAX_STRING_BYTES: u64 = 16 << 20;
    /// Most elements of one array.
    pub const MAX_ARRAY_LEN: u64 = 1 << 24;
    /// Most elements of an array whose elements are arrays.
    pub const MAX_NESTED_LEN: u64 = 1 << 12;
    /// How deep arrays may nest; 1 is an array of scalars or strings.
    pub const MAX_ARRAY_DEPTH: u32 = 3;
    /// Most dimensions of a tensor.
    pub const MAX_DIMS: u32 = 4;
    /// Largest header (everything before the tensor data) in bytes.
    pub const MAX_HEADER_BYTES: u64 = 64 << 20;
}
