//! What all verbs take that run a model.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use st_model::Isa;

use super::values::{Unless, threads};
use crate::size::parse_size;

/// Where the weights are and what running them may cost.
#[derive(Debug, Default, Args)]
pub(crate) struct EngineArgs {
    /// The most memory this process may use, all told, such as 1GiB.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) memory: Option<u64>,
    /// Compute threads; by default the physical cores.
    #[arg(long, value_name = "N", default_value = "-1", hide_default_value = true, value_parser = threads)]
    pub(crate) threads: Unless<usize>,
    /// Do not begin to read experts before attention (for measuring).
    #[arg(long)]
    pub(crate) no_prefetch: bool,
    /// Do not guess which experts the next layer will want (for measuring).
    #[arg(long)]
    pub(crate) no_guess: bool,
    /// Do not fill the cache with the experts that were used most (for measuring).
    #[arg(long)]
    pub(crate) no_hot: bool,
    /// Expert reads in flight at once, from 1 to 8; by default 4 (for measuring).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=8))]
    pub(crate) reads: Option<u8>,
    /// How experts are read from disk (for measuring).
    #[arg(long, value_name = "MODE", default_value = "auto")]
    pub(crate) io: IoName,
    /// Kernels of this instruction set instead of the best that the CPU has (for measuring).
    #[arg(long, value_name = "NAME", value_parser = parse_isa)]
    pub(crate) isa: Option<Isa>,
}

/// An LM head of which only some rows are computed.
#[derive(Debug, Default, Args)]
pub(crate) struct HeadArgs {
    /// Compute only the rows of the LM head that the authors' predictor scores above T (0): faster, and approximate.
    #[arg(long, value_name = "T", num_args = 0..=1, default_missing_value = "0", allow_negative_numbers = true, value_parser = threshold)]
    pub(crate) sparse_head: Option<f32>,
    /// The predictor: model_lm_head.pt, or a GGUF file that holds it; by default the model's file.
    #[arg(long, value_name = "FILE", requires = "sparse_head")]
    pub(crate) predictor: Option<PathBuf>,
    /// Compute all rows as well, and count how often the likeliest token is lost (slow).
    #[arg(long, requires = "sparse_head")]
    pub(crate) sparse_head_check: bool,
}

fn threshold(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(number) if number.is_finite() => Ok(number),
        _ => Err("expected a number, such as 0 or -2".into()),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvName {
    /// 2 bytes per value; long prompts are fastest, where the CPU multiplies BF16.
    Bf16,
    /// 2 bytes per value, 3 bits more exact.
    F16,
    /// About 1 byte per value.
    #[value(name = "q8_0")]
    Q8_0,
    /// 4 bytes per value.
    F32,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum IoName {
    /// Measure, then choose.
    #[default]
    Auto,
    /// Past the page cache.
    Direct,
    /// Through the page cache.
    Buffered,
}

fn parse_isa(text: &str) -> Result<Isa, String> {
    let named = Isa::ALL.into_iter().find(|isa| isa.name() == text);
    named.ok_or_else(|| format!("the names are {}", Isa::ALL.map(Isa::name).join(", ")))
}
