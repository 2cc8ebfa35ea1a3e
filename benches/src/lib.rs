//! What the benchmarks share: the synthetic checkpoint generator.
//!
//! Nothing here is part of `st-tool`; nothing of `st-tool` imports it.
//!
//! ```
//! use st_bench::synth::measure::measure;
//!
//! # fn main() -> anyhow::Result<()> {
//! // What a synthetic model is to resemble: which experts and neurons the bundled model's tokens use.
//! for measured in measure("../models/tiny/tiny-q4_0.gguf".as_ref(), 16, 2, 1)? {
//!     let layers = measured.mean(0..measured.layers.len()).expect("it has layers");
//!     println!("{:.0} % of chosen experts' neurons are silent", 100.0 * layers.zeros);
//!     assert!(layers.zeros > 0.1 && layers.zeros < 1.0);
//! }
//! # Ok(())
//! # }
//! ```

pub mod synth;
