//! Synthetic checkpoints: random weights of any shape whose routing and neuron sparsity resemble a trained model's.
//!
//! The weights mean nothing; what counts is what they cost. See [`recipe`] for how the statistics come about.

pub mod calibrate;
pub mod checkpoint;
pub mod encode;
pub mod gguf;
pub mod measure;
pub mod mix;
pub mod recipe;
pub mod rng;
pub mod shape;
pub mod stream;
pub mod successor;
pub mod vocab;
