//! Verbs about files: fetching, converting, looking into, listing and removing them.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgGroup, Args, ValueEnum};

use super::values::{Unless, positive, threads};

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// One JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// `4b`, `21b` or `owner/name`: all of it; with `:TYPE` the GGUF file of that type.
    #[arg(value_name = "MODEL")]
    pub(crate) model: OsString,
}

#[derive(Debug, Args)]
pub(crate) struct DownloadArgs {
    /// `4b`, `21b` or `owner/name`; with `:TYPE` behind it, the GGUF file of that type.
    #[arg(value_name = "MODEL")]
    pub(crate) model: String,
    /// Branch, tag or commit.
    #[arg(long, value_name = "REV", default_value = "main")]
    pub(crate) revision: String,
    /// Only files that match; by default what a conversion needs.
    #[arg(long, value_name = "GLOB", num_args = 1..)]
    pub(crate) include: Vec<String>,
    /// Plain files in DIR instead of the shared hub cache.
    #[arg(long, value_name = "DIR")]
    pub(crate) local_dir: Option<PathBuf>,
    /// Access token; by default HF_TOKEN, then what `hf auth login` left.
    #[arg(long, value_name = "TOKEN")]
    pub(crate) token: Option<String>,
    /// Answer from the cache alone.
    #[arg(long)]
    pub(crate) offline: bool,
    /// Files at once.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = positive)]
    pub(crate) jobs: usize,
    /// List files, sizes and free space; fetch nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("type").required(true))]
pub(crate) struct QuantizeArgs {
    /// A checkpoint folder, `4b`, `21b`, `owner/name`, or a GGUF file.
    #[arg(value_name = "MODEL")]
    pub(crate) model: OsString,
    /// 4 bits and a scale per 32 weights.
    #[arg(long = "q4_0", group = "type")]
    pub(crate) q4_0: bool,
    /// 8 bits and a scale per 32 weights.
    #[arg(long = "q8_0", group = "type")]
    pub(crate) q8_0: bool,
    /// 16-bit floats.
    #[arg(long, group = "type")]
    pub(crate) f16: bool,
    /// bfloat16.
    #[arg(long, group = "type")]
    pub(crate) bf16: bool,
    /// 32-bit floats.
    #[arg(long, group = "type")]
    pub(crate) f32: bool,
    /// Type of the embedding and LM head alone; by default as the rest.
    #[arg(long, value_name = "TYPE")]
    pub(crate) output_type: Option<TypeName>,
    /// For Q4_0: choose each block's scale for the least squared error, and tell what that gains. Takes about twice the time.
    #[arg(long)]
    pub(crate) search: bool,
    /// Weigh the errors of that search by this importance matrix: one of `st-tool profile`, or of llama.cpp. Implies --search.
    #[arg(long, value_name = "FILE")]
    pub(crate) imatrix: Option<PathBuf>,
    /// Quantize again what is below 8 bits already, which loses more than quantizing the original.
    #[arg(long)]
    pub(crate) allow_requantize: bool,
    /// Put the LM head's predictor into the output, for `run --sparse-head`: out of model_lm_head.pt, or a GGUF file that holds it.
    #[arg(long, value_name = "FILE")]
    pub(crate) predictor: Option<PathBuf>,
    /// Keep the LM head that a tied model stores beside the embedding, where the two differ.
    #[arg(long)]
    pub(crate) keep_head: bool,
    /// Fetch a checkpoint that is not here as a whole, and keep it; otherwise it is converted while it is fetched, and not kept.
    #[arg(long, conflicts_with_all = ["dry_run", "compare"])]
    pub(crate) keep: bool,
    /// How the experts lie in the file.
    #[arg(long, value_name = "LAYOUT", default_value = "gguf")]
    pub(crate) layout: LayoutName,
    /// The file to write; by default ./NAME-TYPE.gguf.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Replace an existing output, of the same kind.
    #[arg(long)]
    pub(crate) force: bool,
    /// Show the tensors and their sizes; write nothing.
    #[arg(long, conflicts_with = "compare")]
    pub(crate) dry_run: bool,
    /// Convert in memory and compare with FILE, tensor by tensor; exit status 1 where they differ.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["output", "force"])]
    pub(crate) compare: Option<PathBuf>,
    /// Threads; the output does not depend on it. By default all.
    #[arg(long, value_name = "N", default_value = "-1", hide_default_value = true, value_parser = threads)]
    pub(crate) threads: Unless<usize>,
}

#[derive(Debug, Args)]
pub(crate) struct LayoutArgs {
    /// The GGUF file to read.
    #[arg(value_name = "IN.gguf")]
    pub(crate) input: PathBuf,
    /// The GGUF file to write.
    #[arg(value_name = "OUT.gguf", required_unless_present = "compare")]
    pub(crate) output: Option<PathBuf>,
    /// The layout to bring it to.
    #[arg(long, value_name = "LAYOUT")]
    pub(crate) to: LayoutName,
    /// Replace an existing output, of the same kind.
    #[arg(long)]
    pub(crate) force: bool,
    /// Rearrange in memory and compare with FILE, tensor by tensor; exit status 1 where they differ.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["output", "force"])]
    pub(crate) compare: Option<PathBuf>,
    /// Threads; the output does not depend on it. By default all.
    #[arg(long, value_name = "N", default_value = "-1", hide_default_value = true, value_parser = threads)]
    pub(crate) threads: Unless<usize>,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// A GGUF file, or a model.
    #[arg(value_name = "FILE|MODEL")]
    pub(crate) model: OsString,
    /// List every tensor.
    #[arg(long)]
    pub(crate) tensors: bool,
    /// Compare all data with the file's checksums, and a file of the hub's cache with the hub's SHA-256.
    #[arg(long)]
    pub(crate) check: bool,
    /// One JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Types that weights can be written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TypeName {
    #[value(name = "q4_0")]
    Q4_0,
    #[value(name = "q8_0")]
    Q8_0,
    F16,
    Bf16,
    F32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LayoutName {
    /// A standard file that llama.cpp loads too.
    Gguf,
    /// Each expert in one piece, as it lies in memory.
    Offload,
}

impl QuantizeArgs {
    /// The one type that was asked for.
    pub(crate) fn type_name(&self) -> TypeName {
        match (self.q4_0, self.q8_0, self.f16, self.bf16) {
            (true, ..) => TypeName::Q4_0,
            (_, true, ..) => TypeName::Q8_0,
            (_, _, true, _) => TypeName::F16,
            (.., true) => TypeName::Bf16,
            _ => TypeName::F32,
        }
    }
}
