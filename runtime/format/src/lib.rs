//! The vocabulary of a SmallThinker model in a file, once for everybody: ggml's element types, metadata values, the
//! tensors and their names, the three matrices of an expert, and the model's shape with the `smallthinker.*` keys
//! that state it.
//!
//! This crate reads no file and computes nothing: it knows what is written, and whether that is a model that is
//! computed here. It imports no other crate of the workspace.
//!
//! ```
//! use st_format::{GgmlType, Matrix, ModelShape, Tensor};
//!
//! let shape = ModelShape::published_4b();
//! let gates = Tensor::experts(Matrix::Gate);
//! assert_eq!(gates.name(3), "blk.3.ffn_gate_exps.weight");
//! assert_eq!(gates.ggml_shape(&shape), [1536, 768, 32]);
//! // All experts of a layer take 64 MB in Q4_0.
//! let bytes = Matrix::ALL.map(|matrix| GgmlType::Q4_0.bytes_for_shape(&Tensor::experts(matrix).ggml_shape(&shape)));
//! assert_eq!(bytes.into_iter().flatten().sum::<u64>(), 63_700_992);
//! // What a file states of it.
//! let keys = shape.to_metadata();
//! assert!(keys.contains(&("smallthinker.expert_used_count".to_owned(), 4u32.into())));
//! ```

mod error;
mod ggml_type;
mod matrix;
mod read;
mod rope;
mod settings;
mod shape;
mod tensor;
mod value;

pub use error::FormatError;
pub use ggml_type::GgmlType;
pub use matrix::Matrix;
pub use read::{ARCHITECTURE, Described, is_no_token, is_transposed_down, same_shape};
pub use rope::RopeScaling;
pub use shape::{Gating, Misfit, ModelShape, largest};
pub use tensor::{Scope, Tensor, tensor_names};
pub use value::{Array, OctetArray, StringArray, Value};
