//! The model's shape as the rest of this crate calls it. What a file must state is st-format's to say.

pub use st_format::{Gating, ModelShape as ModelConfig};
