//! SmallThinker over HTTP: the APIs that clients speak, one queue, and one thread that runs all conversations together.
//!
//! [`serve()`] takes a listener, [`Settings`] and an [`Operator`] who loads the model, hears when it answers and says when to end.
//! Whoever asks gets the answer that he would get alone, whatever else runs: rows decide nothing about bits. This crate knows no
//! command line, prints nothing and reads no environment.
//!
//! Inside, every API makes jobs (`job`) of its requests and texts of their events; `queue` holds them, `scheduler` runs them, a step
//! at a time, and `prefix` keeps what later ones may begin with.
//!
//! ```
//! use std::net::TcpListener;
//! use std::sync::Arc;
//!
//! use st_model::{Engine, LoadOptions, ModelError};
//! use st_server::{Loading, Operator, ServeError, Settings, serve};
//!
//! struct Once;
//!
//! impl Operator for Once {
//!     type Error = ModelError;
//!
//!     fn load(&self, _: &Loading<'_>) -> Result<Arc<Engine>, ModelError> {
//!         Engine::open("../../models/tiny/tiny-q4_0.gguf", &LoadOptions { sequences: 4, ..LoadOptions::default() })
//!     }
//!
//!     fn ready(&self, engine: &Engine) {
//!         assert_eq!(engine.ctx(), 2048);
//!     }
//!
//!     fn should_end(&self) -> bool { true }
//! }
//!
//! # fn main() -> Result<(), ServeError<ModelError>> {
//! serve(TcpListener::bind("127.0.0.1:0")?, Settings::new("tiny"), &Once)
//! # }
//! ```

mod answers;
mod api;
mod app;
mod asked;
mod body;
mod clock;
mod conversation;
mod disk;
mod error;
mod failure;
mod fields;
mod guard;
mod job;
mod keys;
mod log;
mod metrics;
mod page;
mod piece;
mod prefix;
mod prepare;
mod queue;
mod router;
mod sampling;
mod scheduler;
mod serve;
mod settings;
mod slots;
mod tokens;
mod tools;

pub use log::{Record, What};
pub use serve::{Loading, Operator, ServeError, serve};
pub use settings::Settings;
