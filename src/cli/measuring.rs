//! Verbs that look into a model and measure it.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgGroup, Args, ValueEnum};

use super::engine::{EngineArgs, HeadArgs};
use super::values::{Unless, conversations, count, positive, threads};
use crate::size::parse_size;

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("text"))]
pub(crate) struct TokenizeArgs {
    /// The model.
    #[arg(value_name = "MODEL")]
    pub(crate) model: OsString,
    /// The text; by default, and with `-`, what is on stdin.
    #[arg(short, long, value_name = "TEXT", group = "text", allow_hyphen_values = true)]
    pub(crate) prompt: Option<String>,
    /// What is in FILE; `-` reads stdin.
    #[arg(short, long, value_name = "FILE", group = "text")]
    pub(crate) file: Option<PathBuf>,
    /// The text is a list of ids, to be turned into text.
    #[arg(long)]
    pub(crate) decode: bool,
    /// The text of a control token, such as `<|im_end|>`, is text like any other, as in a message.
    #[arg(long, conflicts_with = "decode")]
    pub(crate) plain: bool,
    /// One JSON object: each token's id and text.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    /// The model; of one on the hub, only a header is fetched.
    #[arg(value_name = "MODEL")]
    pub(crate) model: OsString,
    /// Memory that the process may use, all told; several to compare. By default a ladder of sizes.
    #[arg(long, value_name = "SIZE", num_args = 1.., value_delimiter = ',', value_parser = parse_size)]
    pub(crate) memory: Vec<u64>,
    /// Context length; by default the model's own, or what the memory allows.
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) ctx: Option<usize>,
    /// Conversations at once, as `serve` has them.
    #[arg(long, value_name = "N", value_parser = conversations)]
    pub(crate) parallel: Option<usize>,
    /// A trace that `run --record-routing` wrote; by default the routing of the bundled model.
    #[arg(long, value_name = "FILE")]
    pub(crate) routing: Option<PathBuf>,
    /// Compute threads; by default the physical cores.
    #[arg(long, value_name = "N", default_value = "-1", hide_default_value = true, value_parser = threads)]
    pub(crate) threads: Unless<usize>,
    /// One JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ProfileArgs {
    /// The model.
    #[arg(value_name = "MODEL")]
    pub(crate) model: OsString,
    /// A text; several are set side by side. `-` reads stdin.
    #[arg(short, long, value_name = "TEXT", num_args = 1.., required = true)]
    pub(crate) file: Vec<PathBuf>,
    /// The folder for profile.json, report.html and its pictures; it is made where it is missing.
    #[arg(short, long, value_name = "DIR")]
    pub(crate) output: PathBuf,
    /// Tokens of each text, at most.
    #[arg(long, value_name = "N", default_value = "4096", value_parser = positive)]
    pub(crate) tokens: usize,
    /// Write which experts were used most beside FILE, as `FILE` with `.hot.json`: a run of it under a budget fills its cache with them.
    #[arg(long, value_name = "FILE.gguf")]
    pub(crate) write_hot: Option<PathBuf>,
    /// The profile on stdout, too.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("expected a number from 0 to 1".into()),
    }
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// The model; without it, the small one inside this program.
    #[arg(value_name = "MODEL")]
    pub(crate) model: Option<OsString>,
    /// Prompt tokens.
    #[arg(short = 'p', value_name = "N", default_value_t = 512, value_parser = count)]
    pub(crate) prompt_tokens: usize,
    /// Generated tokens.
    #[arg(short = 'n', value_name = "N", default_value_t = 128, value_parser = count)]
    pub(crate) generated_tokens: usize,
    /// Tokens in the context before either begins.
    #[arg(short = 'd', value_name = "DEPTH", default_value_t = 0, value_parser = count)]
    pub(crate) depth: usize,
    /// Conversations that generate together, one token of each in every step, each from a text of its own; tokens per
    /// second are those of all.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = positive)]
    pub(crate) parallel: usize,
    /// Generate once more with drafts of which the share P, from 0 to 1, is right, token by token: the answer itself, spoiled; without
    /// other drafts, whatever the text is.
    #[arg(long, value_name = "P", conflicts_with = "parallel", value_parser = share)]
    pub(crate) draft_accept: Option<f64>,
    /// How often each is measured.
    #[arg(short = 'r', value_name = "REPS", default_value_t = 5, value_parser = positive)]
    pub(crate) repetitions: usize,
    #[command(flatten)]
    pub(crate) head: HeadArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    /// A table or an object.
    #[arg(short = 'o', value_name = "FORMAT", default_value = "md")]
    pub(crate) output: BenchFormat,
    /// Write which experts each token of all repetitions is sent to, the one that warms up included, for
    /// `st-tool cache-sim`; replaces an earlier trace.
    #[arg(long, value_name = "FILE")]
    pub(crate) record_routing: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct CacheSimArgs {
    /// A file that `--record-routing` wrote; `-` reads stdin.
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Sizes of the cache in experts, comma-separated; by default ten, up to all experts.
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = positive, conflicts_with = "memory")]
    pub(crate) slots: Vec<usize>,
    /// Sizes of the whole process, comma-separated, as `run` takes them; the context is that of the recorded run.
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = parse_size)]
    pub(crate) memory: Vec<u64>,
    /// One JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LogitsArgs {
    /// The model.
    #[arg(value_name = "MODEL")]
    pub(crate) model: OsString,
    /// The tokens: comma-separated, or @FILE.
    #[arg(long, value_name = "LIST")]
    pub(crate) token_ids: OsString,
    /// The safetensors file to write.
    #[arg(short, long, value_name = "OUT.safetensors")]
    pub(crate) output: PathBuf,
    /// Also what each layer gives out and which experts it chose.
    #[arg(long)]
    pub(crate) layers: bool,
    /// Compute with plain 32-bit floats.
    #[arg(long, conflicts_with_all = ["memory", "threads"])]
    pub(crate) reference: bool,
    /// Replace an existing output, of the same kind.
    #[arg(long)]
    pub(crate) force: bool,
    /// The most memory this process may use, all told, such as 1GiB.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) memory: Option<u64>,
    /// Compute threads; by default the physical cores.
    #[arg(long, value_name = "N", default_value = "-1", hide_default_value = true, value_parser = threads)]
    pub(crate) threads: Unless<usize>,
}

#[derive(Debug, Args)]
pub(crate) struct PerplexityArgs {
    /// The model.
    #[arg(value_name = "MODEL")]
    pub(crate) model: OsString,
    /// The text; `-` reads stdin.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Compare with this model, such as the same in F32: the KL divergence, and how much perplexity changes, each with its error.
    #[arg(long, value_name = "MODEL", conflicts_with = "memory")]
    pub(crate) against: Option<OsString>,
    /// Tokens per window; by default 512, or the model's context where that is shorter.
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) ctx: Option<usize>,
    /// One JSON object.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchFormat {
    Md,
    Json,
}
