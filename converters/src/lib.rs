//! From a checkpoint to a GGUF file: reading, validating, converting and writing SmallThinker models.
//!
//! The crate moves weights and checks them; it never runs a model. Its only contract with the runtime is the file.
//! It reads no environment, prints nothing and never exits: configuration comes in as arguments, progress goes out
//! through [`Progress`], warnings come back with the result.
//!
//! ```
//! use st_convert::{Cancel, ConvertOptions, Input, Layout, NoProgress, WeightType, convert, plan};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let input = Input::open("../models/tiny/checkpoint".as_ref())?;
//! let options = ConvertOptions { threads: 2, ..ConvertOptions::new(WeightType::Q4_0, Layout::Gguf) };
//! let planned = plan(&input, &options)?;
//!
//! let folder = tempfile::tempdir()?;
//! let output = folder.path().join("tiny.gguf");
//! convert(&input, &options, &output, false, &NoProgress, &Cancel::new())?;
//! assert_eq!(std::fs::metadata(&output)?.len(), planned.output_bytes);
//!
//! // The file has the same bytes on every machine, whatever the number of threads.
//! assert_eq!(std::fs::read(&output)?, std::fs::read("../models/tiny/tiny-q4_0.gguf")?);
//! # Ok(())
//! # }
//! ```

pub mod arriving;
mod checkpoint;
mod compare;
mod config;
mod convert;
mod error;
mod gguf_input;
mod imatrix;
mod input;
mod json;
mod layout;
mod mapped;
mod metadata;
mod open;
mod options;
mod pipeline;
mod progress;
mod quantize;
mod record;
mod relayout;
mod shards;
pub mod tensor_map;
mod tokenizer;
mod tokenizer_json;
mod vocabulary;

pub use compare::{Difference, DifferenceKind};
pub use config::ModelConfig;
pub use convert::{ConvertPlan, Converted, PlannedTensor, SearchGain, compare, convert, plan};
pub use error::ConvertError;
pub use imatrix::Imatrix;
pub use input::Input;
pub use options::ConvertOptions;
pub use progress::{Cancel, NoProgress, Progress};
pub use relayout::{RelayoutOptions, compare_relayout, relayout};
pub use st_gguf::Layout;
pub use st_kernels::{SquaredErrors, WeightType};
