//! Verbs that answer: run, serve, verify.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgGroup, Args, ValueEnum};
use st_model::DraftLimit;

use super::engine::{EngineArgs, HeadArgs, KvName};
use super::values::{Unless, conversations, count, positive, size_or_none, unless};
use crate::size::parse_size;

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

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum StatsName {
    /// When the answer is there.
    End,
    /// While it is made, too.
    Live,
}

fn bias(text: &str) -> Result<(u32, f32), String> {
    let parsed = text.split_once('=').and_then(|(id, by)| Some((id.trim().parse().ok()?, by.trim().parse().ok()?)));
    parsed.filter(|(_, by): &(u32, f32)| by.is_finite()).ok_or_else(|| "write ID=F, such as 151645=-5".into())
}
