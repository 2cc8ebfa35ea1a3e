//! The vocabulary of a SmallThinker model in a file, once for everybody: ggml's element types, metadata values, the
//! tensors and their names, the three matrices of an expert, and the model's shape with the `smallthinker.*` keys
//! that state it.
//!
//! This crate reads no file and computes nothing: it knows what is written, and whether that is a model that is
//! computed here. It imports no other crate of the workspace.

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
pub use read::{ARCHITECTURE, Described, same_shape};
pub use rope::RopeScaling;
pub use shape::{Gating, Misfit, ModelShape};
pub use tensor::{Scope, Tensor, tensor_names};
pub use value::{Array, StringArray, Value};
