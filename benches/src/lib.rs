//! What the benchmarks share: the synthetic checkpoint generator.
//!
//! Nothing here is part of `st-tool`; nothing of `st-tool` imports it.

pub mod synth;
