//! The command line as types: names, defaults and help, and nothing that acts.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use clap::error::ContextKind;
use clap::{ArgAction, ArgGroup, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use st_model::{DraftLimit, Isa, Kernels};

use crate::size::parse_size;

/// SmallThinker from the Hugging Face hub to an answer, on a CPU, with little memory and a disk.
///
/// MODEL is `tiny` (a small model inside this program), a .gguf file, `4b`, `21b`, or `owner/name` on the hub;
/// `4b:q4_0` is the GGUF file of that type; for `quantize` also a folder with a checkpoint.
#[derive(Debug, Parser)]
#[command(name = "st-tool", version = env!("ST_TOOL_VERSION"), max_term_width = 100, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// No progress and no notes; errors are still shown.
    #[arg(short, long, global = true, display_order = 900)]
    pub(crate) quiet: bool,

    /// Log what happens inside to stderr; twice for more.
    #[arg(short, long, global = true, display_order = 901, action = ArgAction::Count)]
    pub(crate) verbose: u8,

    /// Fetch or remove without asking.
    #[arg(long, global = true, display_order = 902)]
    pub(crate) yes: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What the figures of the expert cache mean; the only place that tells it to people.
const EXPERT_FIGURES: &str = "\
With --memory, the figures tell of the expert cache too, for prompt and generation apart:
  hits, misses     experts asked for that were in memory from an earlier use, or had to be read; a
                   batch of prompt tokens asks once for each expert that it touches in a layer
  found in memory  hits / (hits + misses)
  read per token   bytes read from the disk / tokens, with what pages hold beyond the experts
  stalled          time in which a computing thread was blocked, waiting for an expert
  hidden           share of the time of reading in which no computing thread was blocked
  guesses right    share of the missing experts guessed for the next layer that its router chose,
                   whether or not the guess was followed; – where none was made
  evictions        experts that gave up their place to another
  rereads          experts read that had been in memory before: what more memory would save";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Fetch a model from the Hugging Face hub.
    Download(DownloadArgs),
    /// Convert a checkpoint to a GGUF file.
    Quantize(QuantizeArgs),
    /// Rearrange the experts of a GGUF file for reading them from disk, or back.
    Layout(LayoutArgs),
    /// Answer a prompt, or chat.
    #[command(after_help = EXPERT_FIGURES)]
    Run(RunArgs),
    /// Answer over HTTP, as OpenAI's API does; several at once.
    Serve(ServeArgs),
    /// Measure speed.
    #[command(after_help = EXPERT_FIGURES)]
    Bench(BenchArgs),
    /// Replay recorded routing with caches of other sizes and policies.
    CacheSim(CacheSimArgs),
    /// Write the logits of every position to a file.
    Logits(LogitsArgs),
    /// Show what is in a GGUF file.
    Inspect(InspectArgs),
    /// Measure how well a model predicts a text.
    Perplexity(PerplexityArgs),
    /// Say what a model would take and how fast it would be here, before it is fetched.
    Plan(PlanArgs),
    /// Run texts, and show which experts they use, how sparse neurons are, and what caches would do.
    Profile(ProfileArgs),
    /// Prove an answer by its receipt: make it again, here, and compare each token and its logits.
    Verify(VerifyArgs),
    /// Turn text into token ids, or back.
    Tokenize(TokenizeArgs),
    /// Show which models are here, in the hub's cache and in the store of converted files.
    List(ListArgs),
    /// Remove a model from the hub's cache and from the store.
    Rm(RmArgs),
    /// Print what a shell completes: names of verbs, options and values.
    Completions(CompletionsArgs),
    /// Write the manual pages.
    Man(ManArgs),
}

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
pub(crate) struct CompletionsArgs {
    /// The shell that will read them.
    #[arg(value_name = "SHELL")]
    pub(crate) shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// The folder for `st-tool.1` and a page for each verb; it is made where it is missing.
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
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

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("input"))]
pub(crate) struct RunArgs {
    /// The model; without it, the small one inside this program.
    #[arg(value_name = "MODEL")]
    pub(crate) model: Option<OsString>,
    /// Answer this and exit; `-` reads stdin.
    #[arg(short, long, value_name = "TEXT", group = "input", allow_hyphen_values = true)]
    pub(crate) prompt: Option<String>,
    /// Answer what is in FILE and exit; `-` reads stdin.
    #[arg(short, long, value_name = "FILE", group = "input")]
    pub(crate) file: Option<PathBuf>,
    /// The prompt as token ids: comma-separated, or @FILE.
    #[arg(long, value_name = "LIST", group = "input", conflicts_with_all = ["system", "raw"])]
    pub(crate) token_ids: Option<OsString>,
    /// The system message.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub(crate) system: Option<String>,
    /// No chat template: continue the text as it is.
    #[arg(long)]
    pub(crate) raw: bool,
    /// Tokens to generate at most; -1, the default, goes on until the end token or the context is full.
    #[arg(short = 'n', long, value_name = "N", default_value = "-1", hide_default_value = true, value_parser = unless::<usize>)]
    pub(crate) max_tokens: Unless<usize>,
    /// Context length; by default the model's own, or what the memory allows.
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) ctx: Option<usize>,
    /// How keys and values are kept (bf16 where the weights are quantized, otherwise f16).
    #[arg(long, value_name = "TYPE")]
    pub(crate) kv_type: Option<KvName>,
    #[command(flatten)]
    pub(crate) head: HeadArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    /// End the answer before this text (`--stop=TEXT` where it begins with a dash).
    #[arg(long, value_name = "TEXT", num_args = 1..)]
    pub(crate) stop: Vec<String>,
    /// Make the answer JSON that fits this JSON schema.
    #[arg(long, value_name = "FILE|JSON", group = "fit")]
    pub(crate) schema: Option<OsString>,
    /// Make the answer fit this grammar, in llguidance's form of lark; `-` reads stdin.
    #[arg(long, value_name = "FILE", group = "fit")]
    pub(crate) grammar: Option<PathBuf>,
    /// Draft from what was said and run several tokens in one pass: as many as pay, `off`, or at most N. Changes no token.
    #[arg(long, value_name = "auto|off|N", default_value = "auto", value_parser = draft)]
    pub(crate) draft: DraftLimit,
    /// A smaller model with the same tokens drafts where the text itself does not, such as 4b for 21b. It stays in memory, and that is
    /// part of --memory.
    #[arg(long, value_name = "MODEL")]
    pub(crate) draft_model: Option<OsString>,
    /// One JSON object per answer on stdout.
    #[arg(long)]
    pub(crate) json: bool,
    /// Speed and memory on stderr at the end; with `=live` also in a line that moves while the answer is made, at a terminal.
    #[arg(long, value_name = "WHEN", num_args = 0..=1, require_equals = true, default_missing_value = "end")]
    pub(crate) stats: Option<StatsName>,
    /// Write which experts each token is sent to, for `st-tool cache-sim`; replaces an earlier trace.
    #[arg(long, value_name = "FILE")]
    pub(crate) record_routing: Option<PathBuf>,
    /// Keep what is computed of the conversation in FILE, and go on from it; saves time and changes no token.
    #[arg(long, value_name = "FILE")]
    pub(crate) session: Option<PathBuf>,
    /// Write what proves the answer, for `st-tool verify`; replaces an earlier receipt.
    #[arg(long, value_name = "FILE", conflicts_with = "sparse_head")]
    pub(crate) receipt: Option<PathBuf>,
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

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// A file that `run --receipt` wrote; `-` reads stdin.
    #[arg(value_name = "RECEIPT")]
    pub(crate) receipt: PathBuf,
    /// The model; by default the one that the receipt names.
    #[arg(value_name = "MODEL")]
    pub(crate) model: Option<OsString>,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("auth"))]
pub(crate) struct ServeArgs {
    /// The model; without it, the small one inside this program.
    #[arg(value_name = "MODEL")]
    pub(crate) model: Option<OsString>,
    /// The address to listen on; any but this machine's own needs a key.
    #[arg(long, value_name = "H", default_value = "127.0.0.1")]
    pub(crate) host: String,
    /// The port to listen on; 0 takes any that is free.
    #[arg(long, value_name = "P", default_value_t = 8080)]
    pub(crate) port: u16,
    /// Conversations at once; each has room for the whole context.
    #[arg(long, value_name = "N", default_value = "4", value_parser = conversations)]
    pub(crate) parallel: usize,
    /// Context length; by default the model's own, or what the memory allows.
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) ctx: Option<usize>,
    /// How keys and values are kept (bf16 where the weights are quantized, otherwise f16).
    #[arg(long, value_name = "TYPE")]
    pub(crate) kv_type: Option<KvName>,
    /// What requests must bring as their key; by default ST_TOOL_API_KEY. Other users of this machine see it; a file is better.
    #[arg(long, value_name = "KEY", group = "auth")]
    pub(crate) api_key: Option<String>,
    /// Keys that requests may bring, one a line.
    #[arg(long, value_name = "FILE", group = "auth")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// No key, whoever may reach the address.
    #[arg(long, group = "auth")]
    pub(crate) no_auth: bool,
    /// Let web pages of this origin ask, such as `https://chat.example`; `*` lets all.
    #[arg(long, value_name = "ORIGIN", num_args = 1..)]
    pub(crate) cors: Vec<String>,
    /// Requests that may wait; more are refused.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = count)]
    pub(crate) queue: usize,
    /// The largest request.
    #[arg(long, value_name = "SIZE", default_value = "8MiB", value_parser = parse_size)]
    pub(crate) max_body: u64,
    /// Tokens of a prompt that are read at once while others are answered, at most [default: as many as leave a layer short].
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) prompt_piece: Option<usize>,
    /// Time that answers under way get when the server is told to end.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub(crate) grace: u32,
    /// Keep what conversations have computed in DIR, so that it is there after a restart.
    #[arg(long, value_name = "DIR")]
    pub(crate) cache_dir: Option<PathBuf>,
    /// How much of it; 0 is none.
    #[arg(long, value_name = "SIZE", default_value = "4GiB", value_parser = size_or_none)]
    pub(crate) cache_size: u64,
    /// Draft from what was said and run several tokens of an answer in one pass: as many as pay, `off`, or at most N. Changes no token.
    #[arg(long, value_name = "auto|off|N", default_value = "auto", value_parser = draft)]
    pub(crate) draft: DraftLimit,
    /// One JSON object for each request and answer on stderr, without texts or keys.
    #[arg(long)]
    pub(crate) log_json: bool,
    /// Give receipts with answers that ask for them, for `st-tool verify`; the model is read and hashed first.
    #[arg(long)]
    pub(crate) receipts: bool,
    /// Names that requests may call the model by; it is listed by the first.
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub(crate) alias: Vec<String>,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("expected a number from 0 to 1".into()),
    }
}

fn draft(text: &str) -> Result<DraftLimit, String> {
    match (text, text.parse()) {
        ("auto", _) => Ok(DraftLimit::Auto),
        ("off", _) | (_, Ok(0)) => Ok(DraftLimit::Off),
        (_, Ok(n)) => Ok(DraftLimit::Most(n)),
        (_, Err(_)) => Err("expected auto, off or a number of tokens".into()),
    }
}

#[derive(Debug, Args)]
pub(crate) struct SamplingArgs {
    /// Randomness; 0 always takes the likeliest token.
    #[arg(long, value_name = "F", default_value_t = 0.8)]
    pub(crate) temp: f32,
    /// Choose among the N likeliest tokens; 0 or -1 for all.
    #[arg(long, value_name = "N", default_value = "40", value_parser = unless::<usize>)]
    pub(crate) top_k: Unless<usize>,
    /// Choose among the likeliest tokens of this total probability.
    #[arg(long, value_name = "F", default_value_t = 0.95)]
    pub(crate) top_p: f32,
    /// Leave out tokens less likely than this share of the likeliest.
    #[arg(long, value_name = "F", default_value_t = 0.05)]
    pub(crate) min_p: f32,
    /// Make the last 64 tokens less likely; 1 does nothing.
    #[arg(long, value_name = "F", default_value_t = 1.0)]
    pub(crate) repeat_penalty: f32,
    /// Make tokens less likely by F for each time that the answer has them already.
    #[arg(long, value_name = "F", default_value_t = 0.0)]
    pub(crate) frequency_penalty: f32,
    /// Make tokens less likely by F where the answer has them already.
    #[arg(long, value_name = "F", default_value_t = 0.0)]
    pub(crate) presence_penalty: f32,
    /// Add F to the logit of the token ID.
    #[arg(long, value_name = "ID=F", num_args = 1.., value_parser = bias)]
    pub(crate) logit_bias: Vec<(u32, f32)>,
    /// Start of the random sequence, for the same answer again; -1, the default, takes another every time.
    #[arg(long, value_name = "N", default_value = "-1", hide_default_value = true, value_parser = unless::<u64>)]
    pub(crate) seed: Unless<u64>,
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

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum StatsName {
    /// When the answer is there.
    End,
    /// While it is made, too.
    Live,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchFormat {
    Md,
    Json,
}

impl Cli {
    /// Reads the arguments of the process.
    pub(crate) fn from_args() -> Result<Self, clap::Error> {
        Self::from(std::env::args_os())
    }

    /// The whole command line, for whoever describes it. `--version` tells more than `-V`.
    pub(crate) fn definition() -> clap::Command {
        let runs = |isa: &Isa| Kernels::for_isa(*isa).is_some();
        let sets: Vec<_> = Isa::ALL.into_iter().filter(runs).map(Isa::name).collect();
        let used = Kernels::detect().isa().name();
        let version = format!("{}\ninstruction sets: {}\nused here: {used}", env!("ST_TOOL_VERSION"), sets.join(", "));
        Self::command().long_version(version)
    }

    fn from(args: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> Result<Self, clap::Error> {
        // -1 is a value, for the option's own words to accept or refuse, and never an option that does not exist.
        let takes_numbers = |arg: clap::Arg| match arg.is_positional() || !arg.get_action().takes_values() {
            true => arg,
            false => arg.allow_negative_numbers(true),
        };
        let mut command = Self::definition().mut_subcommands(|verb| verb.mut_args(takes_numbers));
        let mut matches = command.try_get_matches_from_mut(args).map_err(|mut error| {
            // "'-- --option' passes it as a value": it would be a MODEL.
            error.remove(ContextKind::Suggested);
            error
        })?;
        Self::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut command))
    }
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

fn parse_isa(text: &str) -> Result<Isa, String> {
    let named = Isa::ALL.into_iter().find(|isa| isa.name() == text);
    named.ok_or_else(|| format!("the names are {}", Isa::ALL.map(Isa::name).join(", ")))
}

/// A number, or none where it is -1: what the option is by default, as other tools of this kind write it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unless<T>(pub(crate) Option<T>);

fn unless<T: FromStr>(text: &str) -> Result<Unless<T>, String> {
    match text {
        "-1" => Ok(Unless(None)),
        _ => text
            .parse()
            .map(|number| Unless(Some(number)))
            .map_err(|_| "it must be a whole number from 0, or -1".into()),
    }
}

fn bias(text: &str) -> Result<(u32, f32), String> {
    let parsed = text.split_once('=').and_then(|(id, by)| Some((id.trim().parse().ok()?, by.trim().parse().ok()?)));
    parsed.filter(|(_, by): &(u32, f32)| by.is_finite()).ok_or_else(|| "write ID=F, such as 151645=-5".into())
}

/// More threads than the largest machines have are a slip.
const MAX_THREADS: usize = 1024;

fn threads(text: &str) -> Result<Unless<usize>, String> {
    match unless(text)? {
        Unless(Some(0)) => Err("it must be at least 1".into()),
        Unless(Some(many)) if many > MAX_THREADS => Err(format!("it must be at most {MAX_THREADS}")),
        number => Ok(number),
    }
}

/// More conversations than any machine of this kind serves are a slip.
const MAX_CONVERSATIONS: usize = 64;

fn conversations(text: &str) -> Result<usize, String> {
    match positive(text)? {
        many if many > MAX_CONVERSATIONS => Err(format!("it must be at most {MAX_CONVERSATIONS}")),
        number => Ok(number),
    }
}

fn size_or_none(text: &str) -> Result<u64, String> {
    if text.trim() == "0" { Ok(0) } else { parse_size(text) }
}

fn count(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| "it must be a whole number from 0".into())
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("it must be at least 1".into()),
        Ok(number) => Ok(number),
        Err(_) => Err("it must be a whole number from 1".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn minus_one_is_no_limit_and_any() {
        let parse = |args: &[&str]| match Cli::from([&["st-tool", "run"], args].concat()).expect("valid").command {
            Command::Run(args) => args,
            _ => panic!("run"),
        };
        for (args, given) in [
            (&["-n", "-1", "--seed", "-1", "--top-k", "-1", "--threads", "-1"][..], None),
            (&["-n-1", "--seed=-1", "--top-k=-1", "--threads=-1"], None),
            (&["-n", "7", "--seed", "7", "--top-k", "7", "--threads", "7"], Some(7)),
        ] {
            let args = parse(args);
            assert_eq!((args.max_tokens.0, args.sampling.top_k.0, args.engine.threads.0), (given, given, given));
            assert_eq!(args.sampling.seed.0, given.map(|n| n as u64));
        }
        let args = parse(&[]);
        assert_eq!((args.max_tokens.0, args.sampling.top_k.0, args.engine.threads.0), (None, Some(40), None));
    }

    #[test]
    fn exactly_one_type_is_asked_for() {
        let parse = |args: &[&str]| {
            let all = ["st-tool", "quantize", "m"].iter().chain(args).copied();
            Cli::from(all.collect::<Vec<_>>())
        };
        assert!(parse(&[]).is_err());
        assert!(parse(&["--q4_0", "--f32"]).is_err());
        for (flag, name) in [
            ("--q4_0", TypeName::Q4_0),
            ("--q8_0", TypeName::Q8_0),
            ("--f16", TypeName::F16),
            ("--bf16", TypeName::Bf16),
            ("--f32", TypeName::F32),
        ] {
            let Command::Quantize(args) = parse(&[flag]).expect("valid").command else { panic!("quantize") };
            assert_eq!(args.type_name(), name);
        }
    }
}
