//! SmallThinker from a GGUF file to text: layers, memory plan, tokenizer, generation.
//!
//! An [`Engine`] is a loaded model, shared; a [`Session`] is one mutable conversation with it; [`generate()`] answers a
//! prompt in a session. [`Reference`] is the same model in plain f32, for comparison. This crate reads model files and
//! nothing else: it knows no checkpoints, no hub and no command line, prints nothing and reads no environment.

mod activations;
mod added;
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
mod ops;
mod plan;
mod progress;
mod python;
mod reference;
mod router;
pub mod sampler;
mod session;
mod sizes;
mod template;
pub mod text;
pub mod tokenizer;
mod weights;

pub use config::{Gating, ModelConfig};
pub use engine::{Engine, LoadOptions};
pub use error::ModelError;
pub use generate::{FinishReason, GenerateOptions, GenerateStats, Generation, Step, generate};
pub use plan::MemoryPlan;
pub use progress::LoadProgress;
pub use reference::{LayerTrace, Reference};
pub use router::Routing;
pub use session::{OnLayer, OnRouting, Session, Work};
pub use st_experts::io::ExpertIo;
pub use st_experts::{IoMode, StoreError, StoreStats};
pub use st_kernels::{Isa, KvType};
