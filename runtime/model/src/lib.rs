//! SmallThinker from a GGUF file to text: layers, memory plan, tokenizer, generation.
//!
//! An [`Engine`] is a loaded model, shared; a [`Chat`] is one conversation with it. A [`Session`] runs the tokens of one
//! text, and [`generate()`] answers a prompt in it. Below them, [`Engine::forward`] runs the rows of a [`Batch`] that go on
//! with any number of [`Sequence`]s: each row gets the logits that it would have alone, bit for bit. [`Reference`] is the
//! same model in plain f32, for comparison. This crate reads model files and nothing else: it knows no checkpoints, no hub
//! and no command line, prints nothing and reads no environment.
//!
//! ```
//! use std::ops::ControlFlow;
//!
//! use st_model::sampler::SamplerOptions;
//! use st_model::{Chat, Engine, GenerateOptions, LoadOptions};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let options = LoadOptions { threads: 2, ..LoadOptions::default() };
//! let engine = Engine::open("../../models/tiny/tiny-q4_0.gguf", &options)?;
//! let mut chat = Chat::new(&engine, SamplerOptions { seed: 7, ..SamplerOptions::default() })?;
//! let limits = GenerateOptions { max_tokens: Some(40), ..GenerateOptions::default() };
//! for question in ["Tell me a story.", "And then?"] {
//!     let answer = chat.ask(question, &limits, &mut (), &mut |text| {
//!         print!("{text}");
//!         ControlFlow::Continue(())
//!     })?;
//!     assert!(answer.text.len() > 10);
//! }
//! assert_eq!(chat.messages().len(), 4);
//! # Ok(())
//! # }
//! ```

mod activations;
mod added;
mod answer;
mod batch;
mod bpe;
pub mod chat;
mod constraint;
mod conversation;
mod cut;
mod digest;
mod draft;
mod draw;
mod engine;
mod error;
pub mod generate;
mod governor;
mod kv_cache;
mod logits_hash;
mod logprobs;
mod lookup;
mod marks;
mod model;
mod moe;
mod observer;
mod ops;
mod options;
mod plan;
mod planner;
mod predictor;
mod progress;
mod python;
mod receipt;
mod reference;
mod router;
pub mod sampler;
mod sequence;
mod session;
mod sizes;
mod smaller;
mod snapshot;
mod template;
pub mod text;
pub mod tokenizer;
mod transformers;
mod vocabulary;
mod weights;
mod work;
mod workspace;

pub use answer::{Answer, FinishReason, GenerateOptions, Next};
pub use batch::{Batch, BatchKind};
pub use constraint::Constraint;
pub use conversation::{Chat, Prompt};
pub use digest::{Hash, ModelDigest, TensorDigest};
pub use draft::{Draft, DraftLimit, DraftStats, Drafts, Planned};
pub use engine::Engine;
pub use error::ModelError;
pub use generate::{GenerateError, GenerateStats, Generation, generate, generate_within};
pub use governor::Governor;
pub use logits_hash::LogitsHash;
pub use logprobs::Logprobs;
pub use observer::{Inputs, Observer};
pub use ops::HeadStats;
pub use options::{LoadOptions, SparseHead};
pub use plan::{MemoryPlan, Residency};
pub use planner::Planner;
pub use predictor::{PREDICTOR_TENSOR, Predictor};
pub use progress::LoadProgress;
pub use receipt::{Difference, Proven, Receipt, ReceiptError, Settings};
pub use reference::{LayerTrace, Reference};
pub use router::Routing;
pub use sequence::Sequence;
pub use session::Session;
pub use smaller::SmallerModel;
pub use snapshot::{SNAPSHOT_MAGIC, SnapshotError};
pub use st_experts::io::ExpertIo;
pub use st_experts::{Hot, HotError, IoMode, StoreError, StoreStats};
pub use st_format::{Gating, ModelShape};
pub use st_kernels::{Isa, Kernels, KvType};
pub use work::Work;
pub use workspace::Workspace;
