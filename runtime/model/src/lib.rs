//! SmallThinker from a GGUF file to text: layers, memory plan, tokenizer, generation.

mod bpe;
pub mod chat;
mod cut;
mod python;
pub mod sampler;
pub mod text;
pub mod tokenizer;
