//! SmallThinker from a GGUF file to text: layers, memory plan, tokenizer, generation.
//!
//! An [`Engine`] is a loaded model, shared; a [`Session`] is one conversation with it; [`generate()`] answers a prompt in
//! a session. Below them, [`Engine::forward`] runs the rows of a [`Batch`] that go on with any number of [`Sequence`]s:
//! each row gets the logits that it would have alone, bit for bit. [`Reference`] is the same model in plain f32, for
//! comparison. This crate reads model files and nothing else: it knows no checkpoints, no hub and no command line, prints
//! nothing and reads no environment.

mod activations;
mod added;
mod answer;
mod batch;
mod bpe;
pub mod chat;
mod config;
mod cut;
mod engine;
mod error;
pub mod generate;
mod kv_cache;
mod marks;
mod model;
mod moe;
mod observer;
mod ops;
mod options;
mod plan;
mod progress;
mod python;
mod reference;
mod router;
pub mod sampler;
mod sequence;
mod session;
mod sizes;
mod template;
pub mod text;
pub mod tokenizer;
mod weights;
mod work;
mod workspace;

pub use answer::{Answer, FinishReason, GenerateOptions, Next};
pub use batch::{Batch, BatchKind};
pub use config::{Gating, ModelConfig};
pub use engine::Engine;
pub use error::ModelError;
pub use generate::{GenerateError, GenerateStats, Generation, generate};
pub use observer::Observer;
pub use options::LoadOptions;
pub use plan::{MemoryPlan, Residency};
pub use progress::LoadProgress;
pub use reference::{LayerTrace, Reference};
pub use router::Routing;
pub use sequence::Sequence;
pub use session::Session;
pub use st_experts::io::ExpertIo;
pub use st_experts::{IoMode, StoreError, StoreStats};
pub use st_kernels::{Isa, KvType};
pub use work::Work;
pub use workspace::Workspace;
