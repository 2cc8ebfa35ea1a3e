//! The model inside this program.

/// As `st-tool quantize --q4_0` makes it from `models/tiny/checkpoint`.
pub(crate) static TINY: &[u8] = include_bytes!("../models/tiny/tiny-q4_0.gguf");
